"""The table of layouts by families in docs/formats.md: every cell is tried at full size, every source is there."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.full_size.published import PUBLISHED
from benchmarks.layouts_by_family import (
    ABSENT,
    LAYOUTS,
    NAMES,
    NO_NAME,
    NOT_WRITTEN,
    PAGE,
    REFUSALS,
    REFUSED,
    SOURCES,
    Claim,
    cell,
    names_texts,
    page_of,
    tables,
)
from dora_diffusion.formats import FORMATS, detect_format, format_of, load_adapter, save_adapter
from dora_diffusion.formats.dialects import Dialect
from dora_diffusion.formats.family_detection import family_of
from dora_diffusion.formats.layouts import OTHER_NAMES
from dora_diffusion.formats.layouts.flux_xlabs import FLUX_XLABS
from dora_diffusion.formats.reading import FAMILY_KEY, read, take_apart
from dora_diffusion.formats.writing import write
from dora_diffusion.state import AdapterState
from tests.families.pipelines import PIPELINES
from tests.formats.published_layers import MODELS, blank, layers_of, pair

ROOT = Path(__file__).parents[2]
WRITTEN = [layout for layout in LAYOUTS if layout.is_written and layout.name != "peft"]
BY_NAME = {layout.name: layout for layout in LAYOUTS}
EVERY_MODEL = pytest.mark.parametrize("model", sorted(MODELS))


def parts_of(model: str) -> dict[str, dict[str, tuple[int, ...]]]:
    """Component -> its layers with their sizes."""
    _, shapes = layers_of(model)
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for path, shape in shapes.items():
        found.setdefault(path.split(".")[0], {})[path] = shape
    return found


def adapter_of(layout: str, family: str, shapes: dict[str, tuple[int, ...]]) -> AdapterState:
    """DoRAs where the layout holds them: they tell ai-toolkit's files from diffusers'."""
    is_dora = layout != "old-diffusers"
    return AdapterState({path: pair(shape, is_dora=is_dora) for path, shape in shapes.items()}, {FAMILY_KEY: family})


def assert_read(tensors: dict[str, Tensor], metadata: dict[str, str], family: str, paths: set[str], told: str) -> None:
    """As the family, with these layers and nothing beside them."""
    reading = take_apart({key: tuple(tensor.shape) for key, tensor in tensors.items()}, metadata)
    adapter = read(tensors, metadata, reading)
    assert adapter.modules.keys() == paths and not adapter.extra
    assert family_of(adapter) == family
    assert format_of(Path("a"), reading, list(tensors)) == told


def seen_as(layout: Dialect, family: str) -> str:
    """What a file is called: some layouts are one for some families."""
    if layout.name == "onetrainer-legacy" and family in ("sd1", "sd2", "sdxl"):
        return "kohya"  # OneTrainer's own is the same for SD 1 and 2; for SDXL the names tell nothing of the tool
    if family == "qwen-image":  # its makers' names are diffusers'
        return {"omi": "diffusers", "original": "bare"}.get(layout.name, layout.name)
    return layout.name


@EVERY_MODEL
@pytest.mark.parametrize("layout", WRITTEN, ids=lambda layout: layout.name)
def test_a_denoiser_of_full_size_is_written_and_read_back(layout: Dialect, model: str) -> None:
    """Without being told the family, but for PixArt-Sigma, whose layers are all alpha's too."""
    family, _ = layers_of(model)
    shapes = parts_of(model)[MODELS[model].denoiser]
    if (layout.name, family) in REFUSED:
        text = NO_NAME.format(layout=layout.name, component=MODELS[model].denoiser, family=family)
        with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
            write(adapter_of(layout.name, family, shapes), layout)
        return
    assert cell(layout, family).startswith("rw")
    tensors, metadata = write(adapter_of(layout.name, family, shapes), layout)
    told = {FAMILY_KEY: family} if family == "pixart-sigma" else {}
    kept = {key: text for key, text in metadata.items() if key != FAMILY_KEY}
    assert_read(tensors, kept | told, family, set(shapes), seen_as(layout, family))


@EVERY_MODEL
@pytest.mark.parametrize("layout", WRITTEN, ids=lambda layout: layout.name)
def test_text_encoders_are_written_where_a_cell_says_so_and_refused_elsewhere(layout: Dialect, model: str) -> None:
    family, _ = layers_of(model)
    for component, shapes in parts_of(model).items():
        if component != MODELS[model].denoiser and (layout.name, family) not in REFUSED:
            adapter = adapter_of(layout.name, family, shapes)
            if names_texts(layout.name, family):
                tensors, metadata = write(adapter, layout)
                found = read(
                    tensors, metadata, take_apart({key: tuple(t.shape) for key, t in tensors.items()}, metadata)
                )
                assert found.modules.keys() == shapes.keys() and family_of(found) == family
            else:
                text = NO_NAME.format(layout=layout.name, component=component, family=family)
                with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
                    write(adapter, layout)


@EVERY_MODEL
def test_peft_s_folders_are_written_and_read_back(tmp_path: Path, model: str) -> None:
    family, _ = layers_of(model)
    shapes = parts_of(model)[MODELS[model].denoiser]
    folder = save_adapter(adapter_of("peft", family, shapes), tmp_path / "a", format="peft", dtype=torch.float16)
    assert detect_format(folder) == "peft"
    adapter = load_adapter(folder, family=family if family == "pixart-sigma" else None)
    assert adapter.modules.keys() == shapes.keys() and family_of(adapter) == family


@EVERY_MODEL
def test_bare_names_are_read(model: str) -> None:
    family, _ = layers_of(model)
    shapes = parts_of(model)[MODELS[model].denoiser]
    tensors = {}
    for path, shape in shapes.items():
        name, module = path.split(".", 1)[1], pair(shape)
        tensors |= {f"{name}.lora_down.weight": module.down, f"{name}.lora_up.weight": module.up}
    told = {FAMILY_KEY: family} if family == "pixart-sigma" else {}
    assert_read(tensors, told, family, set(shapes), "bare")


def test_xlabs_names_are_flux_s_and_no_other_s() -> None:
    assert [layout.families for layout in OTHER_NAMES] == [("flux",)]
    assert {family for _, family in ABSENT} == set(NAMES) - {"flux"}
    shapes = parts_of("FLUX.1 dev")["transformer"]
    fusions = {fusion for path in shapes if (fusion := FLUX_XLABS.of_path(path.split(".", 1)[1])) is not None}
    assert len(fusions) == 4 * 19 + 2 * 38
    tensors = {}
    for fusion in fusions:
        sizes = [shapes[f"transformer.{path}"] for path in fusion.paths]
        rows = sum(size[0] for size in sizes)
        tensors |= {
            f"{fusion.original}.down.weight": blank(1, sizes[0][1]),
            f"{fusion.original}.up.weight": blank(rows, 1),
        }
    paths = {f"transformer.{path}" for fusion in fusions for path in fusion.paths}
    assert_read(tensors, {}, "flux", paths, "xlabs")


@pytest.mark.parametrize("layout", ["bare", "xlabs"])
def test_what_is_read_alone_is_not_written(tmp_path: Path, layout: str) -> None:
    adapter = adapter_of("kohya", "sd1", parts_of("SD 1.5")["unet"])
    with pytest.raises(ValueError, match=re.escape(NOT_WRITTEN.format(layout=layout))):
        save_adapter(adapter, tmp_path / "a.safetensors", format=layout)
    assert all(cell(BY_NAME[layout], family)[:2] in ("r ", "-") for family in NAMES)


def test_a_dora_in_the_oldest_format_is_refused_in_the_page_s_words() -> None:
    text = REFUSALS["a DoRA in `old-diffusers`"]
    with pytest.raises(ValueError, match=re.escape(text)):
        write(adapter_of("kohya", "sd1", parts_of("SD 1.5")["unet"]), FORMATS["old-diffusers"])


@cache
def collected() -> frozenset[str]:
    """The ids of all cases of the tests that are named."""
    tests = sorted({source.test for source in SOURCES})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n", "0", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return frozenset(line for line in done.stdout.splitlines() if "::" in line)


@cache
def families() -> dict[str, str]:
    """What a case's id may begin with -> the family: its name, a published model's or a tiny pipeline's."""
    published = {model.name: model.family for model in PUBLISHED}
    return {name: name for name in NAMES} | {name: tiny.family for name, tiny in PIPELINES.items()} | published


def cases_of(test: str) -> dict[str, set[str]]:
    """Family -> what follows it in the ids of a test's cases, which may be a layout."""
    found: dict[str, set[str]] = {}
    for each in collected():
        name, _, case = each.removesuffix("]").partition("[")
        if name == test and (words := [word for word in families() if case.startswith(word)]):
            longest = max(words, key=len)
            found.setdefault(families()[longest], set()).add(case.removeprefix(longest).lstrip("-, "))
    return found


def has_case(test: str, claim: Claim, family: str) -> bool:
    """Whether a test has a case for a cell."""
    if claim.case:
        return (f"{test}[{claim.case}]" if claim.case != "-" else test) in collected()
    cases = cases_of(test)
    tells_layout = any(BY_NAME.keys() & ends for ends in cases.values())
    return family in cases and (not tells_layout or claim.layout in cases[family])


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.test.rpartition("::")[2])
def test_every_source_is_a_test_that_has_a_case_for_each_cell(source) -> None:
    for claim in source.claims:
        assert claim.layout in BY_NAME and set(claim.families) <= set(NAMES)
        assert [family for family in claim.families if not has_case(source.test, claim, family)] == [], claim


def test_the_page_has_these_tables() -> None:
    """If not: python -m benchmarks.layouts_by_family."""
    assert tables() in PAGE.read_text()
    assert page_of(PAGE.read_text()) == PAGE.read_text()
