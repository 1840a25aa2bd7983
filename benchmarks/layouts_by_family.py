"""Layout x family: what holds for the files of each, and why their names are believed.

`python -m benchmarks.layouts_by_family` writes the tables into docs/formats.md; `make interchange` prints them. What is
said here is held by `tests/formats/test_layouts_by_family.py`: every cell is written and read at full size, every
source's test is there and has a case for the family.
"""

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dora_diffusion.families import FAMILIES
from dora_diffusion.formats import FORMATS
from dora_diffusion.formats.dialects import DIALECTS, Dialect
from dora_diffusion.utils.atomic import write_atomically

Kind = Literal["L", "K", "N"]
PAGE = Path(__file__).parents[1] / "docs" / "formats.md"
START, END = "<!-- layouts by family -->\n", "<!-- end of layouts by family -->\n"

LAYOUTS: tuple[Dialect, ...] = (*FORMATS.values(), *(dialect for dialect in DIALECTS if not dialect.is_written))
"""Those that are written, as `--to` lists them, then those that are read alone."""
NAMES = tuple(family.name for family in FAMILIES)
UNETS = ("sd1", "sd2", "sdxl")
PIXART = ("pixart-alpha", "pixart-sigma")
FLUX_2 = ("flux2", "flux2-klein")
OLDER = (*UNETS, "sd3", "flux", *PIXART)
DITS = ("sd3", "auraflow", "flux", *FLUX_2, "sana", *PIXART, "hunyuan-dit", "lumina2", "z-image")
ABSENT = {("xlabs", name) for name in NAMES if name != "flux"}
"""No such files can be: XLabs made its names for FLUX.1 alone."""
REFUSED = {("old-diffusers", name) for name in NAMES if name not in UNETS}
"""Nobody would read such a file: before 0.20 diffusers had no transformers, and today's knows them by other names."""
WITH_TEXTS = {"comfyui": (*UNETS, "sd3", "flux"), "original": (), "bare": (), "xlabs": ()}
"""Families whose text encoders a layout has names for, where not all have; others' are refused."""
NO_NAME = "the {layout} format has no name for {component} of {family}; choose another format"
NOT_WRITTEN = "format '{layout}' is unknown: expected one of "


@dataclass(frozen=True)
class Claim:
    """Cells that a test speaks for.

    Attributes:
        layout: the row.
        families: the columns.
        case: the test's parameters, where they do not name the family or a model of it.
    """

    layout: str
    families: tuple[str, ...]
    case: str = ""


@dataclass(frozen=True)
class Source:
    """Why names are believed.

    Attributes:
        kind: L, a tool or diffusers' own reader of such files runs in the test; K, the keys are spelt as in the tool's
            code or a published file; N, the layers' names are judged by a reader of the makers' checkpoints.
        what: the tool and its version, or where the list is from.
        judges: whether files are read, written, or both.
        test: without parameters.
        claims: the cells.
    """

    kind: Kind
    what: str
    judges: Literal["read", "written", "both"]
    test: str
    claims: tuple[Claim, ...]


def _same(families: tuple[str, ...], *layouts: str) -> tuple[Claim, ...]:
    return tuple(Claim(layout, families) for layout in layouts)


_FILES, _CONVERTERS = "tests/parity/test_diffusers_files.py", "tests/parity/test_flat_and_makers_names.py"
_ONETRAINER, _TOOLS = "tests/formats/test_onetrainer_names.py", "tests/formats/test_tools.py"
SOURCES: tuple[Source, ...] = (
    Source(
        "L",
        "diffusers 0.42.1 loads our file and draws the same",
        "written",
        "tests/families/test_families.py::test_plain_diffusers_draws_the_same_from_the_file",
        _same(tuple(name for name in NAMES if name not in (*PIXART, "hunyuan-dit")), "diffusers"),
    ),
    Source(
        "L",
        "a file of diffusers' 0.42.1 own `save_lora_weights`",
        "read",
        f"{_FILES}::test_files_of_diffusers_with_metadata_mean_what_was_trained",
        _same(("sd1", "sdxl", "sd3", "flux"), "diffusers"),
    ),
    Source(
        "L",
        "PEFT 0.21.2 loads our folder and merges the same",
        "written",
        "tests/parity/test_peft_files.py::test_what_is_written_peft_loads_and_merges_alike",
        _same(NAMES, "peft"),
    ),
    Source(
        "L",
        "a folder of PEFT's 0.21.2 own `save_pretrained`",
        "read",
        "tests/parity/test_peft_files.py::test_folders_of_every_sort_of_model",
        _same(("sd1", "sdxl", "sd3", "flux"), "peft"),
    ),
    Source(
        "L",
        "diffusers 0.42.1 loads our file and merges the same",
        "written",
        f"{_FILES}::test_diffusers_reads_our_kohya_file_alike",
        _same(UNETS, "kohya"),
    ),
    Source(
        "L",
        "diffusers' 0.42.1 converter of such files, layer by layer",
        "written",
        f"{_CONVERTERS}::test_diffusers_reads_what_we_write",
        (
            *_same(("flux", *FLUX_2, "qwen-image", "z-image"), "kohya"),
            *_same((*FLUX_2, "lumina2", "qwen-image"), "comfyui"),
        ),
    ),
    Source(
        "L",
        "a file of LyCORIS' 4.1.3 own wrapper, key by key",
        "both",
        "tests/parity/test_lycoris_wrapper.py::test_lycoris_names_the_layers_of_every_family_as_we_do",
        _same(NAMES, "lycoris"),
    ),
    Source(
        "L",
        "a file as diffusers' older scripts converted it, by diffusers 0.42.1",
        "read",
        f"{_FILES}::test_files_of_its_older_scripts_are_read",
        _same(UNETS, "old-diffusers"),
    ),
    Source(
        "L",
        "diffusers' 0.42.1 converter of such files, layer by layer",
        "read",
        f"{_CONVERTERS}::test_diffusers_reads_bare_names_as_we_do",
        _same(("qwen-image", "z-image"), "bare"),
    ),
    Source(
        "L",
        "diffusers' 0.42.1 converter of such files, layer by layer",
        "read",
        f"{_CONVERTERS}::test_diffusers_reads_xlabs_names_as_we_do",
        (Claim("xlabs", ("flux",), "-"),),
    ),
    Source(
        "K",
        "OneTrainer's names of every sort of layer: its own conversions, 23df3832 (2026) and 8fd97dcc (2025)",
        "both",
        f"{_ONETRAINER}::test_these_are_the_names_that_we_write",
        (
            *_same((*OLDER, *FLUX_2, "qwen-image"), "kohya", "comfyui", "original"),
            *_same(("sana", "z-image"), "kohya"),
            *_same(OLDER, "onetrainer-legacy", "omi"),
        ),
    ),
    Source(
        "K",
        "the same; we write the makers' names, which is another file",
        "read",
        f"{_ONETRAINER}::test_these_names_are_read_as_the_layers_they_are",
        _same(("sana", "z-image"), "comfyui", "original"),
    ),
    Source(
        "K",
        "keys spelt out from the tools' code: OneTrainer, sd-scripts, LyCORIS, ai-toolkit, diffusers before 0.20",
        "both",
        f"{_TOOLS}::test_a_tools_file_is_read_and_written_back_bit_for_bit",
        (
            Claim("diffusers", ("sdxl",), "OneTrainer diffusers"),
            Claim("kohya", ("sdxl",), "OneTrainer kohya"),
            Claim("kohya", ("flux",), "kohya FLUX with T5"),
            Claim("kohya", ("sd3",), "kohya SD3 with T5"),
            Claim("comfyui", ("flux",), "OneTrainer comfy"),
            Claim("lycoris", ("flux",), "SimpleTuner LyCORIS"),
            Claim("ai-toolkit", ("flux",), "ai-toolkit"),
            Claim("old-diffusers", UNETS, "old diffusers"),
            Claim("omi", ("flux",), "OMI"),
            Claim("onetrainer-legacy", ("flux",), "OneTrainer legacy"),
            Claim("original", ("flux",), "OneTrainer original"),
        ),
    ),
    Source(
        "K",
        "key lists of published files and of tools' trainers, `tests/formats/strangers/`",
        "read",
        "tests/formats/test_strangers.py::test_a_stranger_s_file_is_read_whole",
        (
            Claim("kohya", ("sd1",), "sd1-doubled-prefix"),
            Claim("comfyui", ("flux2-klein",), "klein9b-lokr"),
            Claim("comfyui", ("z-image",), "z-image-out"),
            Claim("original", PIXART, "pixart-original"),
            Claim("bare", ("qwen-image",), "qwen-lightning-bare"),
            Claim("bare", ("qwen-image",), "qwen-diffsynth"),
            Claim("bare", ("z-image",), "z-image-bare"),
            Claim("xlabs", ("flux",), "flux-xlabs"),
        ),
    ),
    Source(
        "L",
        "diffusers' 0.42.1 reader of sgm blocks, every layer",
        "written",
        "tests/formats/test_unet_layouts.py::test_diffusers_reads_an_adapter_of_these_names",
        (Claim("kohya", ("sdxl",), "-"),),
    ),
    Source(
        "N",
        "diffusers' 0.42.1 readers of the makers' checkpoints, every number of every layer",
        "both",
        "tests/formats/test_unet_layouts.py::test_diffusers_reads_a_checkpoint_of_these_names",
        _same(UNETS, "comfyui", "original", "omi"),
    ),
    Source(
        "N",
        "the same, and diffusers' conversion scripts",
        "both",
        "tests/formats/test_dit_layouts.py::test_their_converter_finds_every_number_where_the_layout_says_it_is",
        (
            *_same(DITS, "comfyui", "original"),
            *_same(tuple(name for name in DITS if name not in ("sana", "z-image")), "kohya"),
        ),
    ),
)


def sources_of(layout: str, family: str) -> list[int]:
    """Numbers of the sources that speak for a cell, from 1."""
    return [number for number, source in enumerate(SOURCES, 1) if _speaks(source.claims, layout, family)]


def _speaks(claims: Iterable[Claim], layout: str, family: str) -> bool:
    return any(claim.layout == layout and family in claim.families for claim in claims)


def names_texts(layout: str, family: str) -> bool:
    """Whether a layout has names for the family's text encoders."""
    return family in WITH_TEXTS.get(layout, NAMES)


def cell(layout: Dialect, family: str) -> str:
    """`rw+ L1,3 N7`: read and written, text encoders too, and by which sources."""
    if (layout.name, family) in ABSENT:
        return "-"
    if (layout.name, family) in REFUSED:
        return "refused"
    what = ("rw" if layout.is_written else "r") + ("+" if names_texts(layout.name, family) else "")
    found: dict[Kind, list[str]] = {}
    for number in sources_of(layout.name, family):
        found.setdefault(SOURCES[number - 1].kind, []).append(str(number))
    why = [kind + ",".join(found[kind]) for kind in ("L", "K", "N") if kind in found]
    return " ".join([what, *(why or ["own"])])


_HEAD = """`python -m benchmarks.layouts_by_family` writes these tables. In a cell, `rw` is read and written, `r` read
alone, `+` the text encoders too, and what follows is why its names are believed, by number below:

- **L**: the tool itself, or diffusers' own reader of such files, runs in the test.
- **K**: the keys are those of the tool's code, or of a published file.
- **N**: the layers' names are judged by a reader of the makers' checkpoints; prefix and parts are spelt as the tool has
  them for other models.
- **own**: nobody else's word; a file comes back as it was, and that is all.
- `-`: there is no such file; XLabs made its names for FLUX.1 alone.

Every cell is written at the published models' full size and read back as the same family and layers
(`tests/formats/test_layouts_by_family.py`). PixArt-Sigma's layers are all alpha's too: it is told by the metadata.
What is refused, in these words:

{refusals}
"""
REFUSALS: Mapping[str, str] = {
    "`refused`, and text encoders where a cell has no `+`": NO_NAME,
    "writing a layout that is read alone": NOT_WRITTEN + "...",
    "a DoRA in `old-diffusers`": "this format holds plain LoRA only, and the layer is a DoRA; make a LoRA first",
}


def tables() -> str:
    """All of it as markdown."""
    refusals = "\n".join(
        f'- {what}: "{text.format(layout="LAYOUT", component="text_encoder", family="FAMILY")}"'
        for what, text in REFUSALS.items()
    )
    return "\n".join([_HEAD.format(refusals=refusals), *_cells(), "", *_numbered(), ""])


def _cells() -> list[str]:
    lines = ["| | " + " | ".join(NAMES) + " |", "| --- |" + " --- |" * len(NAMES)]
    for layout in LAYOUTS:
        lines.append(f"| `{layout.name}` | " + " | ".join(cell(layout, family) for family in NAMES) + " |")
    return lines


def _numbered() -> list[str]:
    lines = ["| | source | judges | test |", "| --- | --- | --- | --- |"]
    judged = {"both": "read, written"}
    for number, source in enumerate(SOURCES, 1):
        judges = judged.get(source.judges, source.judges)
        lines.append(f"| {source.kind}{number} | {source.what} | {judges} | `{source.test}` |")
    return lines


def page_of(page: str) -> str:
    """A page with the tables between its two marks."""
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{tables()}\n{END}{after}"


def main() -> int:
    """Write the tables into the page."""
    write_atomically(PAGE, page_of(PAGE.read_text()).encode())
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
