"""A fused layer's adapter and those of its parts change the same weight, to the last bit where nothing is added up."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dora_diffusion.formats.fused_layers import fuse, split
from dora_diffusion.formats.layouts import Fusion
from dora_diffusion.functional.dora import dora_weight, rows
from dora_diffusion.state import FactoredState, Module, ModuleState
from tests.tolerances import assert_close, assert_identical

ONE = Fusion("only", ("a",))
TURNED = Fusion("final_layer.adaLN_modulation.1", ("norm_out.linear",), swapped=True)
QKV = Fusion("double_blocks.0.img_attn.qkv", ("to_q", "to_k", "to_v"), (1, 1, 1))
LINEAR_1 = Fusion("single_blocks.0.linear1", ("to_q", "to_k", "to_v", "proj_mlp"), (1, 1, 1, 4))
GROUPED = Fusion("layers.0.attention.qkv", ("to_q", "to_k", "to_v"), (3, 1, 1))
TURNED_PAIR = Fusion("both", ("a", "b"), (1, 1), swapped=True)  # no model has one, the functions allow it
FUSIONS = st.sampled_from([ONE, TURNED, QKV, LINEAR_1, GROUPED, TURNED_PAIR])
KINDS = st.sampled_from(["pair", "tucker", "conv", "full", "loha", "loha tucker", "lokr", "lokr pair"])
WIDTH, RANK = 6, 3
QUICK = settings(deadline=None, max_examples=60)


def draws(seed: int, dtype: torch.dtype = torch.float64):
    """(shape) -> numbers."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def lokr(n, out: int, unit: int, *, paired: bool) -> FactoredState:
    """LoKr whose big factor has `unit` rows."""
    first = {"lokr_w1_a": n(out // unit, 2), "lokr_w1_b": n(2, 2)} if paired else {"lokr_w1": n(out // unit, 2)}
    return FactoredState("lokr", {**first, "lokr_w2": n(unit, WIDTH // 2)}, scale=0.5)


def make(kind: str, out: int, seed: int) -> Module:
    """An adapter of a layer of so many rows."""
    n = draws(seed)
    a, b = ((n(out, RANK), n(RANK, WIDTH)) for _ in range(2))
    lying, core = (n(RANK, out), n(RANK, WIDTH)), n(RANK, RANK, 1, 1)
    return {
        "pair": lambda: ModuleState(n(RANK, WIDTH), n(out, RANK), 2.0, rank_stabilised=seed % 2 == 0),
        "tucker": lambda: ModuleState(n(RANK, WIDTH, 1, 1), n(out, RANK, 1, 1), 2.0, mid=n(RANK, RANK, 3, 3)),
        "conv": lambda: ModuleState(n(RANK, WIDTH, 3, 3), n(out, RANK, 1, 1), 2.0),
        "full": lambda: FactoredState("full", {"diff": n(out, WIDTH)}),
        "loha": lambda: FactoredState(
            "loha", {"hada_w1_a": a[0], "hada_w1_b": a[1], "hada_w2_a": b[0], "hada_w2_b": b[1]}, 0.5, 1.5
        ),
        "loha tucker": lambda: FactoredState(
            "loha",
            {
                **{"hada_t1": core, "hada_w1_a": lying[0], "hada_w1_b": lying[1]},
                **{"hada_t2": core + 1, "hada_w2_a": lying[0] - 1, "hada_w2_b": lying[1] - 1},
            },
        ),
        "lokr": lambda: lokr(n, out, 2, paired=False),
        "lokr pair": lambda: lokr(n, out, 1, paired=True),
    }[kind]()


def with_magnitude(module: Module, seed: int) -> Module:
    return replace(module, magnitude=draws(seed + 1)(module.shape[0]).abs() + 0.1)


def weight_of(module: Module, seed: int) -> Tensor:
    """A base's weight for an adapter's layer."""
    return draws(seed + 2)(*module.delta().shape)


def adapted(weight: Tensor, module: Module) -> Tensor:
    """The dense W', in the dtype of W."""
    pair = module.to(dtype=weight.dtype).as_pair()
    flat = dora_weight(rows(weight), rows(pair.down), rows(pair.up), pair.scale, pair.magnitude, axis=pair.axis)
    return flat.reshape(weight.shape)


def cut(fusion: Fusion, weight: Tensor) -> dict[str, Tensor]:
    """A fused weight's parts, in torch's own words."""
    if fusion.swapped:
        first, second = weight.chunk(2)
        weight = torch.cat([second, first])
    unit = len(weight) // sum(fusion.shares)
    return dict(zip(fusion.paths, weight.split([unit * share for share in fusion.shares]), strict=True))


def assert_same(one: Module, other: Module) -> None:
    """Every bit and every field."""
    assert type(one) is type(other)
    assert_identical(one.tensors, other.tensors)
    tensors = {name: torch.empty(0) for name in ("magnitude", "mid", "down", "up") if hasattr(one, name)}
    blank = {**tensors, **({"factors": {}} if hasattr(one, "factors") else {})}
    assert replace(one, **blank) == replace(other, **blank)


@QUICK
@given(FUSIONS, KINDS, st.booleans(), st.integers(0, 2**16))
def test_the_parts_change_the_parts_of_the_weight_as_the_whole_does(fusion, kind, is_dora, seed) -> None:
    module = make(kind, 2 * sum(fusion.shares), seed)
    module = with_magnitude(module, seed) if is_dora else module
    weight = weight_of(module, seed)
    parts = split(fusion, module)
    assert tuple(parts) == fusion.paths
    expected = cut(fusion, adapted(weight, module))
    assert_close({p: adapted(w, parts[p]) for p, w in cut(fusion, weight).items()}, expected, computed_in=torch.float64)


@QUICK
@given(FUSIONS, KINDS, st.booleans(), st.integers(0, 2**16))
def test_fusing_is_the_inverse_of_splitting_bit_for_bit(fusion, kind, is_dora, seed) -> None:
    module = make(kind, 4 * sum(fusion.shares), seed)  # even halves and parts: LoKr stays what it is
    module = with_magnitude(module, seed) if is_dora else module
    parts = split(fusion, module)
    assert_same(fuse(fusion, parts), module)
    copies = {path: part.to(dtype=torch.float32) for path, part in parts.items()}
    assert_same(fuse(fusion, copies), module.to(dtype=torch.float32))  # equal values do as well as the same tensor


@QUICK
@given(FUSIONS, st.lists(KINDS, min_size=4, max_size=4), st.booleans(), st.integers(0, 2**16))
def test_parts_that_share_nothing_fuse_exactly(fusion, kinds, is_dora, seed) -> None:
    kinds = ["pair" if kind in ("tucker", "conv") else kind for kind in kinds]  # of one layer: linear, or 1 x 1
    found = zip(fusion.paths, fusion.shares, kinds, strict=False)
    parts = {path: make(kind, 2 * share, seed + i) for i, (path, share, kind) in enumerate(found)}
    parts = {path: with_magnitude(part, seed) if is_dora else part for path, part in parts.items()}
    fused = fuse(fusion, parts)
    weight = draws(seed)(2 * sum(fusion.shares), WIDTH)
    expected = {path: adapted(w, parts[path]) for path, w in cut(fusion, weight).items()}
    assert_close(cut(fusion, adapted(weight, fused)), expected, computed_in=torch.float64)
    again = split(fusion, fused)
    assert_close(
        {path: adapted(w, again[path]) for path, w in cut(fusion, weight).items()}, expected, computed_in=torch.float64
    )


def test_a_dora_of_fp32_loses_no_digit() -> None:
    n = draws(0, torch.float32)
    module = ModuleState(n(4, 32), n(7 * 16, 4), 3.0, magnitude=n(7 * 16).abs() + 1)
    weight = n(7 * 16, 32).double()
    parts = split(LINEAR_1, module)
    assert all(part.down is module.down for part in parts.values())
    whole = adapted(weight, module)
    again = torch.cat([adapted(w, parts[path]) for path, w in cut(LINEAR_1, weight).items()])
    assert_close(again, whole, computed_in=torch.float64)


def test_ranks_add_up_only_where_downs_differ() -> None:
    n = draws(0)
    down, other = n(3, WIDTH), n(2, WIDTH)
    parts = {
        "to_q": ModuleState(down, n(4, 3), 3.0),
        "to_k": ModuleState(down.clone(), n(4, 3), 3.0),
        "to_v": ModuleState(other, n(4, 2), 2.0),
    }
    fused = fuse(QKV, parts)
    assert isinstance(fused, ModuleState)
    assert fused.rank == 5 and fused.scale == 1.0
    # one scale: no number is touched
    assert_identical(fused.down, torch.cat([down, other]))
    assert_identical(fused.up[:4, :3], parts["to_q"].up)
    assert_identical(fused.up[8:, 3:], parts["to_v"].up)
    assert not fused.up[:8, 3:].any() and not fused.up[8:, :3].any()


def test_scales_that_differ_are_folded_in_fp32() -> None:
    n = draws(0, torch.float16)
    down = n(2, WIDTH)
    parts = {path: ModuleState(down, n(4, 2), alpha) for path, alpha in zip(QKV.paths, (0.3, 0.7, 1.0), strict=True)}
    fused = fuse(QKV, parts)
    assert isinstance(fused, ModuleState)
    assert fused.rank == 2 and fused.scale == 1.0 and fused.up.dtype == fused.down.dtype == torch.float32
    assert_identical(fused.up[:4], 0.15 * parts["to_q"].up.float())


@pytest.mark.parametrize("kind", ["pair", "full", "loha", "loha tucker", "lokr", "lokr pair"])
def test_a_part_without_an_adapter_gets_zeros(kind) -> None:
    parts = split(LINEAR_1, make(kind, 14, 3))
    whole = torch.cat([part.delta() for part in parts.values()])
    del parts["to_k"]
    fused = fuse(LINEAR_1, parts)
    whole[2:4] = 0
    assert_close(fused.delta(), whole, computed_in=torch.float64)
    assert fused.rank == make(kind, 14, 3).rank  # no column is spent on nothing


def test_lokr_becomes_a_pair_where_parts_end_within_its_big_factor() -> None:
    whole = lokr(draws(0), 12, 3, paired=True)
    parts = split(QKV, whole)
    assert [type(part) for part in parts.values()] == [ModuleState] * 3
    assert_close(torch.cat([part.delta() for part in parts.values()]), whole.delta(), computed_in=torch.float64)
    aligned = split(QKV, lokr(draws(0), 12, 2, paired=True))
    assert [len(part.factors["lokr_w1_a"]) for part in aligned.values()] == [2, 2, 2]


def test_halves_are_swapped_by_shape() -> None:
    fusion = Fusion("joint_blocks.1.context_block.adaLN_modulation.1", ("norm1_context.linear",), swapped_by_shape=True)
    n = draws(0)
    last, other = (ModuleState(n(2, 4), n(count, 2), 1.0, n(count)) for count in (8, 24))
    (turned,) = split(fusion, last).values()
    assert_identical([turned.up, turned.magnitude], [last.up[[4, 5, 6, 7, 0, 1, 2, 3]], last.magnitude.roll(4)])
    assert_same(fuse(fusion, {"norm1_context.linear": turned}), last)
    assert split(fusion, other) == {"norm1_context.linear": other}


def test_an_in_axis_magnitude_stays_where_rows_only_move() -> None:
    n = draws(0)
    module = ModuleState(n(2, 5), n(8, 2), 1.0, n(5).abs() + 1, axis="in")
    weight = n(8, 5)
    (part,) = split(TURNED, module).values()
    assert_close(adapted(weight.roll(4, 0), part), adapted(weight, module).roll(4, 0), computed_in=torch.float64)
    assert_same(fuse(TURNED, {"norm_out.linear": part}), module)


def in_axis(out: int) -> ModuleState:
    return replace(make("pair", out, 0), magnitude=torch.ones(WIDTH, dtype=torch.float64), axis="in")


def pair(out: int) -> Module:
    return make("pair", out, 0)


def dora(out: int) -> Module:
    return with_magnitude(pair(out), 0)


@pytest.mark.parametrize(
    ("fusion", "module", "words"),
    [
        (QKV, in_axis(6), "in-axis magnitude belongs to all rows of the 3 layers"),
        (QKV, pair(8), "8 rows cannot be shared 1:1:1"),
        (LINEAR_1, pair(9), "9 rows cannot be shared 1:1:1:4"),
        (TURNED, pair(7), "7 rows have no halves"),
    ],
)
def test_what_cannot_be_split_is_refused(fusion, module, words) -> None:
    with pytest.raises(ValueError, match=words) as refusal:
        split(fusion, module)
    assert fusion.original in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({}, "no adapter to fuse: expected one for to_q or to_k or to_v"),
        ({"to_out": pair(2)}, "no adapter to fuse"),
        ({"to_q": in_axis(2), "to_k": in_axis(2), "to_v": in_axis(2)}, "in-axis magnitude divides by norms"),
        ({"to_q": dora(2), "to_k": pair(2), "to_v": dora(2)}, "to_q has a magnitude and to_k has none"),
        ({"to_q": dora(2), "to_k": dora(2)}, "to_q has a magnitude and to_v has none"),
        ({"to_q": pair(2), "to_k": pair(3)}, "as 1:1:1, but to_q has 2 x 6, to_k has 3 x 6"),
        ({"to_q": pair(2), "to_k": ModuleState(torch.ones(1, 5), torch.ones(2, 1), 1.0)}, "the same inputs, but to_q"),
    ],
)
def test_what_cannot_be_fused_is_refused(parts, words) -> None:
    with pytest.raises(ValueError, match=words) as refusal:
        fuse(QKV, parts)
    assert QKV.original in str(refusal.value) and "\n" not in str(refusal.value)
