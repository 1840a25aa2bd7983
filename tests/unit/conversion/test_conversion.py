"""Extracting, resizing, LoRA to DoRA and back: exact where the mathematics is, reported where it is not."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lycoris.utils import extract_conv, extract_linear
from torch import Tensor

from dora_diffusion.conversion import Extraction, Report, extract, resize, to_dora, to_lora, to_out_axis
from dora_diffusion.functional.blend_modes import AdapterTerm, additive
from dora_diffusion.functional.dora import column_norms, initial_magnitude, low_rank_delta, rows
from dora_diffusion.layers.targets import target_paths
from dora_diffusion.state import AdapterState, FactoredState, Module, ModuleState
from tests.pocket_random import random_adapter, random_pocket_pipeline
from tests.tolerances import assert_close, assert_identical

SHAPES: Mapping[str, tuple[int, ...]] = {
    "unet.mid.to_q": (40, 40),
    "unet.mid.ff": (96, 40),
    "unet.mid.conv": (24, 16, 3, 3),
    "unet.mid.point": (32, 24, 1, 1),
    "text_encoder.k_proj": (24, 56),
}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def base_of(seed: int = 100) -> dict[str, Tensor]:
    return {
        path: normal(*shape, seed=seed + i) / rows(torch.empty(shape)).shape[1] ** 0.5
        for i, (path, shape) in enumerate(SHAPES.items())
    }


BASE = base_of()


def weight_at(path: str) -> Tensor:
    return BASE[path]


def module(path: str, *, rank: int = 6, seed: int = 0, axis: str | None = "out", size: float = 0.6) -> ModuleState:
    weight = BASE[path]
    down = normal(rank, *weight.shape[1:], seed=seed) / rows(weight).shape[1] ** 0.5
    up = normal(weight.shape[0], rank, *[1] * (weight.dim() - 2), seed=seed + 1) * size / rank**0.5
    state = ModuleState(down, up, alpha=rank / 2)
    if axis is None:
        return state
    norms = initial_magnitude(weight) if axis == "out" else column_norms(weight, down, up, 0.0)
    return replace(state, magnitude=norms * torch.exp(0.3 * normal(len(norms), seed=seed + 2)), axis=axis)


def adapter(**options) -> AdapterState:
    modules = {path: module(path, seed=10 * i, **options) for i, path in enumerate(SHAPES)}
    vectors = {"unet.mid.ff.bias": normal(96, seed=7)}
    return AdapterState(modules, {"note": "kept"}, vectors, {"odd": torch.ones(2)}, "kohya")


def made_of(state: Module, path: str) -> Tensor:
    """W', by the blending formulas, which conversion does not use."""
    return additive(BASE[path], [AdapterTerm(state.delta(), state.magnitude, state.axis)])


def tuned_by(state: AdapterState) -> dict[str, Tensor]:
    return {path: made_of(part, path) for path, part in state.modules.items()}


def assert_same_weights(new: AdapterState, old: AdapterState) -> None:
    assert new.modules.keys() == old.modules.keys()
    assert_close(tuned_by(new), tuned_by(old))


def assert_all_else_kept(new: AdapterState, old: AdapterState) -> None:
    assert new.metadata.items() >= old.metadata.items()
    assert (new.vectors, new.extra, new.origin) == (old.vectors, old.extra, old.origin)


def reported(call: Callable[[Callable[[Report], None]], object]) -> Report:
    """The one report that a conversion makes."""
    reports: list[Report] = []
    call(reports.append)
    assert len(reports) == 1
    return reports[0]


def true_error(new: Module, old: Tensor, path: str) -> float:
    return float((made_of(new, path) - old).norm() / (old - BASE[path]).norm())


def truncated(matrix: Tensor, rank: int) -> Tensor:
    left, values, right = torch.linalg.svd(rows(matrix).double(), full_matrices=False)
    return ((left[:, :rank] * values[:rank]) @ right[:rank]).float().reshape(matrix.shape)


def test_an_exact_dora_is_extracted_where_a_lora_leaves_a_third() -> None:
    known = adapter()
    tuned = tuned_by(known)
    reports: list[Report] = []
    found = extract(tuned, BASE, rank=6, options=Extraction(list(SHAPES)), report=reports.append)
    assert_same_weights(found, known)
    assert reports[0].largest < 1e-5 and reports[0].ranks == dict.fromkeys(SHAPES, 6)
    assert {part.magnitude.shape for part in found.modules.values()} == {(shape[0],) for shape in SHAPES.values()}
    for path, part in found.modules.items():
        assert_close(rows(made_of(part, path)).norm(dim=1), rows(tuned[path]).norm(dim=1))
        assert part.down.shape == (6, *SHAPES[path][1:])
    plain = reported(
        lambda report: extract(tuned, BASE, rank=6, options=Extraction(list(SHAPES), use_dora=False), report=report)
    )
    assert min(plain.errors.values()) > 0.2


def test_extraction_reports_what_it_leaves_and_how_near_it_comes() -> None:
    known = adapter()
    tuned = {**tuned_by(known), "unet.mid.to_q": BASE["unet.mid.to_q"]}
    seen: list[tuple[int, int, str]] = []
    reports: list[Report] = []
    found = extract(
        tuned,
        BASE,
        rank=2,
        options=Extraction(list(SHAPES)),
        report=reports.append,
        progress=lambda *now: seen.append(now),
    )
    assert seen == [(i, len(SHAPES), path) for i, path in enumerate(SHAPES, start=1)]
    assert reports[0].left_out == ("unet.mid.to_q",)
    assert found.modules.keys() == SHAPES.keys() - {"unet.mid.to_q"}
    for path, error in reports[0].errors.items():
        assert error == pytest.approx(true_error(found.modules[path], tuned[path], path), rel=1e-3)
    assert (
        reports[0].largest
        == max(reports[0].errors.values())
        == reports[0].errors[reports[0].worst]
        > reports[0].mean
        > 0.1
    )
    assert found.metadata["dora_diffusion.extracted"] == reports[0].sentence()
    assert "4 layers, 1 left as they were; rank 2; relative error" in reports[0].sentence()


@pytest.mark.parametrize("path", ["unet.mid.to_q", "unet.mid.ff", "unet.mid.conv"])
def test_a_plain_extraction_is_that_of_lycoris(path: str) -> None:
    tuned = {path: made_of(adapter().modules[path], path)}
    found = extract(tuned, BASE, rank=5, options=Extraction([path], use_dora=False)).modules[path]
    theirs = extract_conv if BASE[path].dim() == 4 else extract_linear
    (down, up, _), kind = theirs(tuned[path] - BASE[path], mode="fixed", mode_param=5)
    assert kind == "low rank"
    assert found.magnitude is None and found.scale == 1
    assert_close(found.delta(), low_rank_delta(down, up, 1.0))


def test_an_error_keeps_as_many_ranks_as_each_layer_needs() -> None:
    modules = {path: module(path, rank=2 + 2 * (i % 2), seed=10 * i) for i, path in enumerate(SHAPES)}
    options = Extraction(list(SHAPES), error=1e-3)
    found = extract(tuned_by(AdapterState(modules)), BASE, rank=12, options=options)
    assert {path: part.rank for path, part in found.modules.items()} == {p: m.rank for p, m in modules.items()}


def test_rounding_is_no_change_but_nan_is_a_complaint() -> None:
    half = {path: weight.half() for path, weight in BASE.items()}
    with pytest.raises(ValueError, match="nothing to extract: the 5 layers compared are equal in both models"):
        extract(half, BASE, rank=4, options=Extraction(list(SHAPES)))
    with pytest.raises(ValueError, match="nothing to extract"):
        extract(
            base_of(),
            {p: w + 1e-5 * w.norm() for p, w in BASE.items()},
            rank=4,
            options=Extraction(list(SHAPES), negligible=0.01),
        )
    broken = {**BASE, "unet.mid.ff": BASE["unet.mid.ff"] * float("nan")}
    with pytest.raises(ValueError, match=r"unet.mid.ff: one of the models holds NaN or infinities there"):
        extract(broken, BASE, rank=4, options=Extraction(list(SHAPES)))
    other = {**BASE, "unet.mid.ff": torch.ones(3, 40)}
    with pytest.raises(ValueError, match=r"unet.mid.ff: the tuned model has shape \(3, 40\), the base \(96, 40\)"):
        extract(other, BASE, rank=4, options=Extraction(list(SHAPES)))
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        extract(BASE, BASE, rank=0)


def test_layers_are_chosen_as_for_training() -> None:
    def chosen(targets: object) -> list[str]:
        return list(extract(tuned_by(adapter()), BASE, rank=1, options=Extraction(targets)).modules)

    assert chosen(["to_q", "conv"]) == ["unet.mid.to_q", "unet.mid.conv"]
    assert chosen(r"mid\.(ff|point)") == ["unet.mid.ff", "unet.mid.point"]
    with pytest.raises(ValueError, match=r"'to_x' matches no layer of a mapping"):
        chosen(["to_x"])
    with pytest.raises(ValueError, match=r"matches none of the 5 layers"):
        chosen("nothing")
    with pytest.raises(ValueError, match=r"is no regular expression"):
        chosen("(")
    assert chosen(None) == ["text_encoder.k_proj"]  # a family's; a UNet that none knows has nothing called attention
    with pytest.raises(ValueError, match="matches none of the 1 layers"):
        extract({"unet.mid.ff": BASE["unet.mid.ff"]}, BASE, rank=1, options=Extraction(None))
    assert "unet.mid.ff" in chosen("all-linear") and "unet.mid.conv" not in chosen("all-linear")
    assert chosen("all") == list(BASE)
    with pytest.raises(ValueError, match="a function does not list its layers: name them in full"):
        extract(weight_at, weight_at, rank=1)
    with pytest.raises(ValueError, match=r"unet.mid.other is not among the 5 tensors given"):
        extract({**BASE, "unet.mid.other": torch.ones(2, 2)}, BASE, rank=1, options=Extraction(["other"]))


def test_functions_give_weights_too() -> None:
    tuned = tuned_by(adapter())
    found = extract(tuned.__getitem__, weight_at, rank=6, options=Extraction(list(SHAPES)))
    assert_close(tuned_by(found), tuned)


def pocket_pair():
    """A pipeline, and one whose weights of every attention layer a DoRA has changed, and two vectors."""
    base, tuned = random_pocket_pipeline(), random_pocket_pipeline()
    known = random_adapter(base)
    with torch.no_grad():
        for path, part in known.modules.items():
            component, _, inner = path.partition(".")
            layer = getattr(tuned, component).get_submodule(inner)
            layer.weight.copy_(additive(layer.weight, [AdapterTerm(part.delta(), part.magnitude)]))
        tuned.unet.conv_in.bias += 0.5
        next(m for m in tuned.unet.modules() if isinstance(m, torch.nn.GroupNorm)).weight += 0.25
    return base, tuned, known


def test_pipelines_folders_and_presets_give_the_same(tmp_path: Path) -> None:
    base, tuned, known = pocket_pair()
    rank = max(known.ranks)
    reports: list[Report] = []
    found = extract(tuned, base, rank=rank, options=Extraction(vectors=True), report=reports.append)
    assert found.modules.keys() == known.modules.keys()
    assert reports[0].largest < 1e-4
    attention = [
        f"{name}.{path}" for name in ("unet", "text_encoder") for path in target_paths(getattr(base, name), "attention")
    ]
    assert {path.replace(".text_model.", ".") for path in attention} == {*reports[0].errors, *reports[0].left_out}
    assert sorted(float(v.max()) for v in found.vectors.values()) == [0.25, 0.5]
    assert "unet.conv_in.bias" in found.vectors
    tuned.save_pretrained(tmp_path)
    from_folder = extract(tmp_path, base, rank=rank, options=Extraction(vectors=True))
    assert from_folder.modules.keys() == found.modules.keys()
    assert_close(from_folder.vectors, found.vectors)
    for path, part in from_folder.modules.items():
        assert_close(part.delta(), found.modules[path].delta())


def test_resizing_a_lora_is_its_truncated_svd() -> None:
    lora = adapter(axis=None)
    reports: list[Report] = []
    small = resize(lora, rank=3, report=reports.append)
    assert_all_else_kept(small, lora)
    assert small.metadata["dora_diffusion.resized"] == reports[0].sentence()
    for path, part in small.modules.items():
        assert (part.rank, part.down.shape[1:]) == (3, SHAPES[path][1:])
        delta = lora.modules[path].delta()
        assert_close(part.delta(), truncated(delta, 3))
        assert reports[0].errors[path] == pytest.approx(
            float((truncated(delta, 3) - delta).norm() / delta.norm()), rel=1e-3
        )
    assert_same_weights(resize(lora, rank=3, base=BASE.__getitem__), small)


def test_a_doras_rows_keep_their_lengths_and_a_base_brings_it_nearer() -> None:
    dora = adapter()
    blind = resize(dora, rank=3)
    reports: list[Report] = []
    seen = resize(dora, rank=3, base=weight_at, report=reports.append)
    for path, old in tuned_by(dora).items():
        for new in (blind.modules[path], seen.modules[path]):
            assert new.rank == 3
            assert_identical(new.magnitude, dora.modules[path].magnitude)
            assert_close(rows(made_of(new, path)).norm(dim=1), rows(old).norm(dim=1))
        error = true_error(seen.modules[path], old, path)
        assert error == pytest.approx(reports[0].errors[path], rel=1e-3)
        assert error < true_error(blind.modules[path], old, path) * 1.001


def test_a_negative_magnitude_survives_resizing() -> None:
    path = "unet.mid.ff"
    part = module(path, rank=8)
    exact = replace(part, down=torch.cat([part.down[:4], 0 * part.down[4:]]))
    part = replace(exact, magnitude=torch.where(torch.arange(96) % 5 == 0, -exact.magnitude, exact.magnitude))
    new = resize(AdapterState({path: part}), rank=4, base=weight_at).modules[path]
    assert new.rank == 4
    assert true_error(new, made_of(part, path), path) < 1e-5


@pytest.mark.parametrize("base", [None, weight_at], ids=["blind", "with the base"])
def test_resizing_up_changes_nothing(base: object) -> None:
    dora = adapter()
    for rank in (6, 60):
        assert resize(dora, rank=rank, base=base).modules == dora.modules


@pytest.mark.parametrize("axis", ["out", None])
def test_an_error_drops_only_ranks_that_are_not_needed(axis: str | None) -> None:
    def padded(part: ModuleState) -> ModuleState:
        down, up = torch.cat([part.down, 0 * part.down]), torch.cat([part.up, part.up], dim=1)
        return replace(part, down=down, up=up, alpha=2 * part.alpha)

    exact = adapter(axis=axis)
    wide = replace(exact, modules={path: padded(part) for path, part in exact.modules.items()})
    for base in (None, weight_at):
        small = resize(wide, error=1e-3, base=base)
        assert {part.rank for part in small.modules.values()} == {6}
        assert_same_weights(small, exact)
    assert resize(exact, error=1e-6).modules == exact.modules
    with pytest.raises(ValueError, match="expected a rank, an error, or both; got neither"):
        resize(exact)
    with pytest.raises(ValueError, match=r"error must lie in \[0, 1\)"):
        resize(exact, error=1.5)


def factored(path: str, kind: str, magnitude: Tensor | None = None) -> Module:
    out, columns = rows(BASE[path]).shape
    if kind == "full":
        return FactoredState("full", {"diff": module(path).delta()}, magnitude=magnitude)
    if kind == "loha":
        shapes = {"hada_w1_a": (out, 2), "hada_w1_b": (2, columns), "hada_w2_a": (out, 2), "hada_w2_b": (2, columns)}
        factors = {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
        return FactoredState("loha", factors, 0.02, magnitude=magnitude)
    if kind == "tucker":
        mid, small = normal(4, 4, 3, 3, seed=1) / 6, normal(4, 16, 1, 1, seed=2) / 4
        return ModuleState(small, normal(24, 4, 1, 1, seed=3) / 8, 4.0, magnitude, mid=mid)
    factors = {"lokr_w1": normal(8, 8, seed=1), "lokr_w2_a": normal(out // 8, 2, seed=2)}
    return FactoredState("lokr", {**factors, "lokr_w2_b": normal(2, columns // 8, seed=3)}, 0.02, magnitude=magnitude)


KINDS = [
    ("unet.mid.to_q", "lokr"),
    ("unet.mid.to_q", "loha"),
    ("unet.mid.conv", "full"),
    ("unet.mid.conv", "tucker"),
    ("unet.mid.conv", "loha"),
]


@pytest.mark.parametrize(("path", "kind"), KINDS)
def test_other_factorisations_are_resized_and_converted(path: str, kind: str) -> None:
    plain = AdapterState({path: factored(path, kind)})
    small = resize(plain, rank=3).modules[path]
    assert isinstance(small, ModuleState) and small.rank == 3
    assert_close(rows(small.delta()), truncated(rows(plain.modules[path].delta()), 3))
    dora = to_dora(plain, base=weight_at)
    assert type(dora.modules[path]) is type(plain.modules[path])
    assert_same_weights(dora, plain)
    strong = replace(dora.modules[path], magnitude=dora.modules[path].magnitude * 1.2)
    whole = to_lora(AdapterState({path: strong}), base=weight_at)
    assert_same_weights(whole, AdapterState({path: strong}))


@settings(max_examples=30, deadline=None)
@given(path=st.sampled_from(sorted(SHAPES)), rank=st.integers(1, 8), seed=st.integers(0, 9999), size=st.floats(0, 4))
def test_lora_to_dora_changes_no_weight(path: str, rank: int, seed: int, size: float) -> None:
    lora = AdapterState({path: module(path, rank=rank, seed=seed, axis=None, size=size)})
    reports: list[Report] = []
    dora = to_dora(lora, base=weight_at, report=reports.append)
    assert_same_weights(dora, lora)
    part = dora.modules[path]
    assert (part.magnitude.dtype, part.axis) == (torch.float32, "out")
    assert_close(part.magnitude, rows(made_of(lora.modules[path], path)).norm(dim=1))
    assert reports[0].largest * size < 1e-5 or size == 0  # of W, whose norms the magnitudes are


def test_dora_to_lora_is_whole_or_as_near_as_a_rank_allows() -> None:
    dora = adapter()
    mixed = replace(dora, modules={**dora.modules, "unet.mid.ff": module("unet.mid.ff", axis=None)})
    whole = to_lora(mixed, base=weight_at)
    assert_all_else_kept(whole, mixed)
    assert not whole.is_dora
    assert whole.modules["unet.mid.ff"] is mixed.modules["unet.mid.ff"]
    assert_same_weights(whole, mixed)
    reports: list[Report] = []
    low = to_lora(mixed, base=weight_at, rank=8, report=reports.append)
    assert reports[0].left_out == ("unet.mid.ff",)
    for path, error in reports[0].errors.items():
        assert_close(low.modules[path].delta(), truncated(made_of(mixed.modules[path], path) - BASE[path], 8))
        assert error == pytest.approx(true_error(low.modules[path], made_of(mixed.modules[path], path), path), rel=1e-3)
    near = to_lora(mixed, base=weight_at, error=0.05, report=reports.append)
    assert 0.02 < reports[1].largest <= 0.05
    assert {part.rank for path, part in near.modules.items() if path != "unet.mid.ff"} != {8}


def test_the_in_axis_becomes_the_out_axis() -> None:
    inner = adapter(axis="in")
    reports: list[Report] = []
    outer = to_out_axis(inner, base=weight_at, report=reports.append)
    assert_all_else_kept(outer, inner)
    assert reports[0].ranks == dict.fromkeys(SHAPES, 6)
    for path, old in tuned_by(inner).items():
        part = outer.modules[path]
        assert (part.axis, part.magnitude.shape) == ("out", (SHAPES[path][0],))
        assert reports[0].errors[path] == pytest.approx(true_error(part, old, path), rel=1e-3)
    full = to_out_axis(inner, base=weight_at, rank=999)
    assert_same_weights(full, inner)
    assert to_out_axis(full, base=weight_at).modules == full.modules


def test_both_axes_become_whole_differences() -> None:
    inner = adapter(axis="in")
    assert_same_weights(to_lora(inner, base=weight_at), inner)


def test_half_precision_files_stay_so_and_their_magnitudes_stay_fine() -> None:
    path = "unet.mid.ff"
    half = AdapterState({path: module(path, axis=None).to(dtype=torch.float16)})
    dora = to_dora(half, base=weight_at).modules[path]
    assert (dora.down.dtype, dora.magnitude.dtype) == (torch.float16, torch.float32)
    assert resize(AdapterState({path: dora}), rank=2, base=weight_at).modules[path].up.dtype == torch.float16
    assert to_lora(AdapterState({path: dora}), base=weight_at).modules[path].factors["diff"].dtype == torch.float16
    bfloat = {path: BASE[path].bfloat16()}
    assert to_dora(half, base=bfloat.__getitem__).modules[path].magnitude.dtype == torch.float32


@pytest.mark.parametrize("convert", [to_dora, to_lora, to_out_axis])
def test_a_base_of_another_shape_is_refused(convert: Callable[..., AdapterState]) -> None:
    axis = {to_dora: None, to_lora: "out", to_out_axis: "in"}[convert]
    odd = AdapterState({"unet.mid.to_q": module("unet.mid.ff", axis=axis)})
    with pytest.raises(
        ValueError, match=r"unet.mid.to_q: the adapter is for a weight of \(96, 40\), the base has \(40,"
    ):
        convert(odd, base=weight_at)


def test_an_adapter_that_does_nothing_is_converted_too() -> None:
    path = "unet.mid.conv"
    idle = AdapterState({path: replace(module(path, axis=None), alpha=0.0)})
    assert float(resize(idle, rank=2).modules[path].delta().abs().max()) == 0
    assert_same_weights(to_dora(idle, base=weight_at), idle)
    assert resize(AdapterState({}), rank=2).modules == {}
