"""Whole adapters made into one: what is saved is what the mode's dense arithmetic says, as far as the rank allows."""

import itertools
import json
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dora_diffusion.blending import BLEND_SENTENCES, BlendOptions, blend, blend_with_report, needs_base
from dora_diffusion.functional.blend_modes import MODES, AdapterTerm
from dora_diffusion.functional.dora import Axis, dora_weight
from dora_diffusion.functional.merge_methods import METHODS, Sparsity
from dora_diffusion.functional.strengths import Weight, strength_at
from dora_diffusion.state import AdapterState, FactoredState, Module, ModuleState
from tests.tolerances import assert_close, assert_identical
from tests.unit.blending.adapters import CONV, LINEAR, SHAPES, TEXT, adapter, base, dora_module, full_module

EXACT = pytest.mark.parametrize("mode", ["additive", "compose", "direction-magnitude"])
WEIGHTS: dict[str, Weight] = {"a": 0.6, "b": 0.5, "c": -0.2}


def three() -> dict[str, AdapterState]:
    return {"a": adapter(1), "b": adapter(20, dora=False, rank=3), "c": adapter(40, rank=1)}


def terms_at(path: str, adapters: Mapping[str, AdapterState], weights: Mapping[str, Weight]) -> list[AdapterTerm]:
    return [
        AdapterTerm(found.modules[path].delta(), found.modules[path].magnitude, found.modules[path].axis, s)
        for name, found in adapters.items()
        if path in found.modules and (s := strength_at(path, weights[name])) != 0
    ]


def dense(path: str, module: Module, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """W' of a layer under a saved module."""
    pair = module.as_pair()
    return dora_weight(base(path, dtype=dtype), pair.down, pair.up, pair.scale, pair.magnitude, axis=pair.axis)


def error(actual: Tensor, expected: Tensor, weight: Tensor) -> float:
    return float((actual - expected).norm() / (expected - weight).norm())


@EXACT
@pytest.mark.parametrize("path", SHAPES)
def test_the_saved_pair_is_the_mode_itself_at_the_sum_of_ranks(mode: str, path: str) -> None:
    made = blend_with_report(three(), WEIGHTS, base=base, mode=mode)
    module = made.adapter.modules[path]
    assert module.rank == 6
    assert made.report.layers[path].error == 0
    assert_close(
        dense(path, module), MODES[mode](base(path), terms_at(path, three(), WEIGHTS)), computed_in=torch.float64
    )


@EXACT
@pytest.mark.parametrize("path", SHAPES)
def test_the_in_axis_stays_the_in_axis(mode: str, path: str) -> None:
    adapters = {"a": adapter(1, axis="in"), "b": adapter(20, dora=False), "c": adapter(40, axis="in")}
    module = blend(adapters, WEIGHTS, base=base, mode=mode).modules[path]
    assert (module.axis, module.magnitude.shape) == ("in", (SHAPES[path][1],))
    assert_close(
        dense(path, module), MODES[mode](base(path), terms_at(path, adapters, WEIGHTS)), computed_in=torch.float64
    )


@EXACT
def test_one_adapter_at_one_is_itself(mode: str) -> None:
    for one in (adapter(1), adapter(1, dora=False), adapter(1, axis="in")):
        made = blend({"a": one}, {"a": 1.0}, base=base, mode=mode)
        for path in SHAPES:
            assert_close(dense(path, made.modules[path]), dense(path, one.modules[path]), computed_in=torch.float64)


@EXACT
def test_the_order_of_names_does_not_change_a_bit(mode: str) -> None:
    results = [
        blend({name: three()[name] for name in order}, WEIGHTS, base=base, mode=mode)
        for order in itertools.permutations(WEIGHTS)
    ]
    for other in results[1:]:
        assert list(other.modules) == list(results[0].modules)
        assert other.metadata == results[0].metadata
        for path, module in results[0].modules.items():
            assert_identical(other.modules[path].tensors, module.tensors)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "direction-magnitude"])
def test_loras_stay_plain_and_need_no_base(mode: str) -> None:
    adapters = {"a": adapter(1, dora=False), "b": adapter(20, dora=False, rank=3)}
    weights = {"a": 0.6, "b": -0.5}
    made = blend(adapters, weights, base=None, mode=mode)
    for path, module in made.modules.items():
        assert module.magnitude is None
        assert module.down.shape[1:] == SHAPES[path][1:]
        expected = sum(term.strength * term.delta for term in terms_at(path, adapters, weights))
        assert_close(module.delta(), expected, computed_in=torch.float64)
    with_base = blend(adapters, weights, base=base, mode=mode)
    for path, module in made.modules.items():
        assert_identical(module.tensors, with_base.modules[path].tensors)


@pytest.mark.parametrize("mode", METHODS)
@pytest.mark.parametrize("rank", [None, 3])
def test_plain_differences_are_merged_without_a_base(mode: str, rank: int | None) -> None:
    adapters = {"a": adapter(1, dora=False), "b": adapter(20, dora=False, rank=3)}
    adapters["b"] = replace(adapters["b"], modules={**adapters["b"].modules, LINEAR: full_module(LINEAR, 7)})
    weights: dict[str, Weight] = {"a": 0.6, "b": -0.5}
    assert not needs_base(adapters, weights, mode=mode, options=BlendOptions())
    one, other = (blend_with_report(adapters, weights, base=b, mode=mode, rank=rank) for b in (None, base))
    for path, module in one.adapter.modules.items():
        assert module.as_pair().down.shape == other.adapter.modules[path].as_pair().down.shape
        assert_close(module.delta(), other.adapter.modules[path].delta(), computed_in=torch.float32)
        assert one.report.layers[path].error == pytest.approx(other.report.layers[path].error, abs=1e-5)


@pytest.mark.parametrize(
    "changes, mode, as_dora, why",
    [
        ({"a": True}, "additive", None, "'a' is a DoRA, whose difference"),
        ({"b": True}, "ties", None, "'b' is a DoRA, whose difference"),
        ({}, "direction-magnitude", None, "the mode 'direction-magnitude' turns"),
        ({}, "compose", True, "as_dora asks for magnitudes"),
    ],
)
def test_where_a_base_is_needed_it_is_said_why(changes, mode: str, as_dora: bool | None, why: str) -> None:
    adapters = {name: adapter(number, dora=changes.get(name, False)) for number, name in enumerate("ab", start=1)}
    weights: dict[str, Weight] = {"a": 1.0, "b": 1.0}
    options = BlendOptions(as_dora=as_dora)
    assert needs_base(adapters, weights, mode=mode, options=options)
    with pytest.raises(ValueError, match=f"^{next(iter(SHAPES))}: {why}.*; give base= .*--base"):
        blend(adapters, weights, mode=mode, options=options)
    blend(adapters, weights, base=base, mode=mode, options=options)
    off: dict[str, Weight] = {name: 0.0 for name in adapters}
    assert not needs_base(adapters, off, mode="ties", options=options)


def test_loras_can_be_saved_as_a_dora_and_doras_as_a_lora() -> None:
    adapters = {"a": adapter(1, dora=False), "b": adapter(20, dora=False)}
    weights: dict[str, Weight] = {"a": 0.6, "b": 0.4}
    as_dora = blend(adapters, weights, base=base, mode="additive", options=BlendOptions(as_dora=True))
    goal = base(LINEAR) + sum(term.strength * term.delta for term in terms_at(LINEAR, adapters, weights))
    assert as_dora.is_dora
    assert_close(dense(LINEAR, as_dora.modules[LINEAR]), goal, computed_in=torch.float64)
    assert_close(as_dora.modules[LINEAR].magnitude, goal.norm(dim=1), computed_in=torch.float64)
    made = blend_with_report(three(), WEIGHTS, base=base, mode="additive", rank=10, options=BlendOptions(as_dora=False))
    assert not made.adapter.is_dora
    goal = MODES["additive"](base(LINEAR), terms_at(LINEAR, three(), WEIGHTS))
    assert made.report.layers[LINEAR].error < 1e-12  # of full rank
    assert_close(dense(LINEAR, made.adapter.modules[LINEAR]), goal, computed_in=torch.float64)


@pytest.mark.parametrize("path", SHAPES)
@pytest.mark.parametrize("order", ["abc", "cab", "bca"])
@pytest.mark.parametrize(
    ("mode", "axis"),
    [("peft", "out"), ("comfyui", "out"), ("comfyui", "in"), ("lycoris", "out"), ("lycoris", "in"), ("a1111", "in")],
)
def test_a_tools_mode_is_one_dora_too(mode: str, axis: Axis, order: str, path: str) -> None:
    found = {"a": adapter(1, axis=axis), "b": adapter(20, dora=False, rank=3), "c": adapter(40, rank=1, axis=axis)}
    adapters = {name: found[name] for name in order}
    made = blend_with_report(adapters, WEIGHTS, base=base, mode=mode)
    goal = MODES[mode](base(path), terms_at(path, adapters, WEIGHTS))
    assert made.report.layers[path].error == 0
    assert made.adapter.modules[path].rank == 6
    assert_close(dense(path, made.adapter.modules[path]), goal, computed_in=torch.float64)


def test_what_a1111_makes_of_the_out_axis_is_approximated_and_told() -> None:
    made = blend_with_report(three(), WEIGHTS, base=base, mode="a1111", rank=10)
    goal = MODES["a1111"](base(LINEAR), terms_at(LINEAR, three(), WEIGHTS))
    reported = made.report.layers[LINEAR].error
    assert reported == pytest.approx(error(dense(LINEAR, made.adapter.modules[LINEAR]), goal, base(LINEAR)), abs=1e-9)
    assert reported < 1e-9  # of full rank
    assert blend_with_report(three(), WEIGHTS, base=base, mode="a1111").report.layers[LINEAR].error > 1e-3


def test_the_order_counts_where_the_tool_has_one() -> None:
    there, back = (
        blend({name: three()[name] for name in order}, WEIGHTS, base=base, mode="comfyui").modules[LINEAR]
        for order in ("abc", "cba")
    )
    assert float((dense(LINEAR, there) - dense(LINEAR, back)).norm()) > 1e-2


@pytest.mark.parametrize("mode", METHODS)
def test_methods_of_differences_at_full_rank_are_the_method(mode: str) -> None:
    made = blend_with_report(three(), WEIGHTS, base=base, mode=mode, rank=100, options=BlendOptions(density=1.0))
    path = LINEAR
    deltas = [
        MODES["additive"](base(path), [AdapterTerm(t.delta, t.magnitude, t.axis, 1.0)]) - base(path)
        for t in terms_at(path, three(), WEIGHTS)
    ]
    expected = METHODS[mode](deltas, [0.6, 0.5, -0.2], Sparsity(1.0))
    module = made.adapter.modules[path]
    assert module.rank == 10
    assert module.magnitude is None
    assert_close(module.delta(), expected, computed_in=torch.float64)


@pytest.mark.parametrize("mode", ["ties", "dare-ties", "magnitude-prune", "dare-linear"])
def test_methods_of_differences_as_dora_and_by_seed(mode: str) -> None:
    options = BlendOptions(density=0.6, seed=4, as_dora=True)
    one, two = (blend_with_report(three(), WEIGHTS, base=base, mode=mode, options=options) for _ in range(2))
    other = blend(three(), WEIGHTS, base=base, mode=mode, options=BlendOptions(density=0.6, seed=5, as_dora=True))
    assert one.adapter.is_dora
    assert_identical(one.adapter.modules[CONV].tensors, two.adapter.modules[CONV].tensors)
    same = torch.equal(one.adapter.modules[CONV].down, other.modules[CONV].down)
    assert same == (not mode.startswith("dare"))
    assert 0 < one.report.layers[CONV].error < 1


@EXACT
def test_a_smaller_rank_is_near_and_its_error_is_told(mode: str) -> None:
    made = blend_with_report(three(), WEIGHTS, base=base, mode=mode, rank=4)
    for path, module in made.adapter.modules.items():
        goal = MODES[mode](base(path), terms_at(path, three(), WEIGHTS))
        assert module.rank == 4
        reported = made.report.layers[path].error
        assert reported == pytest.approx(error(dense(path, module), goal, base(path)), rel=1e-6)
        assert 0 < reported < 0.5
    assert made.report.exact == 0
    assert made.report.worst in SHAPES


@EXACT
def test_ranks_beyond_the_weight_are_capped_and_stay_exact(mode: str) -> None:
    adapters = {"a": adapter(1, rank=8), "b": adapter(20, rank=8)}
    made = blend_with_report(adapters, {"a": 0.5, "b": 0.5}, base=base, mode=mode)
    goal = MODES[mode](base(LINEAR), terms_at(LINEAR, adapters, {"a": 0.5, "b": 0.5}))
    assert made.adapter.modules[LINEAR].rank == 10
    assert_close(dense(LINEAR, made.adapter.modules[LINEAR]), goal, computed_in=torch.float64)


def test_a_whole_difference_takes_part() -> None:
    adapters = {"a": adapter(1), "w": AdapterState({CONV: full_module(CONV, 3)})}
    made = blend(adapters, {"a": 0.5, "w": 0.8}, base=base, mode="additive").modules[CONV]
    goal = MODES["additive"](base(CONV), terms_at(CONV, adapters, {"a": 0.5, "w": 0.8}))
    assert_close(dense(CONV, made), goal, computed_in=torch.float64)


def test_layers_of_only_some_adapters_and_strengths_by_part() -> None:
    adapters = {"a": adapter(1, paths=(LINEAR, TEXT)), "b": adapter(20, paths=(LINEAR, CONV))}
    weights: dict[str, Weight] = {"a": {"unet": 0.5, "text_encoder": 0.0}, "b": {"unet": 1.0, "unet.down_blocks": 0.25}}
    made = blend_with_report(adapters, weights, base=base)
    assert set(made.adapter.modules) == {LINEAR, CONV}  # at 0 the text encoder is the base's own
    assert made.report.layers[CONV].adapters == ("b",)
    assert made.report.layers[LINEAR].adapters == ("a", "b")
    goal = MODES["compose"](base(LINEAR), terms_at(LINEAR, adapters, weights))
    assert_close(dense(LINEAR, made.adapter.modules[LINEAR]), goal, computed_in=torch.float64)
    assert_close(
        dense(CONV, made.adapter.modules[CONV]), dense(CONV, adapters["b"].modules[CONV]), computed_in=torch.float64
    )


def test_an_adapter_that_a_part_leaves_out_is_absent_even_where_zero_is_not() -> None:
    adapters = {"a": adapter(1), "b": adapter(20)}
    weights: dict[str, Weight] = {"a": 1.0, "b": {"text_encoder": 1.0}}
    made = blend_with_report(adapters, weights, base=base, mode="peft")
    assert made.report.layers[LINEAR].adapters == ("a",)
    made = blend_with_report(adapters, {"a": 1.0, "b": 0.0}, base=base, mode="peft")
    assert made.report.layers[LINEAR].adapters == ("a", "b")


def test_a_gain_near_zero_is_approximated_instead_of_dividing_by_it() -> None:
    """Of W is left: by adding, 1 - (2 - 1) at a gain of 2; by directions, 1 - 1 - 1 + 1/2 + 1/2 of two doubles."""
    weight = base(LINEAR)
    still = dora_module(LINEAR, 1)
    doubled = ModuleState(still.down, 1e-9 * still.up, still.alpha, 2 * weight.norm(dim=1))
    plain = adapter(20, paths=(LINEAR,), dora=False)
    twice = AdapterState({LINEAR: FactoredState("full", {"diff": weight})})
    for mode, adapters, weights in (
        ("additive", {"a": AdapterState({LINEAR: doubled}), "b": plain}, {"a": -1.0, "b": 0.5}),
        ("direction-magnitude", {"a": twice, "b": twice}, {"a": 1.0, "b": 1.0}),
    ):
        made = blend_with_report(adapters, weights, base=base, mode=mode, rank=10)
        assert all(float(tensor.abs().max()) < 1e3 for tensor in made.adapter.modules[LINEAR].tensors.values())
        assert made.report.layers[LINEAR].error < 1e-6


@pytest.mark.parametrize("mode", ["peft", "comfyui", "lycoris"])
def test_rows_of_zeros_do_not_make_a_tools_mode_inexact(mode: str) -> None:
    def with_hole(path: str) -> Tensor:
        return base(path).index_fill(0, torch.tensor([2]), 0.0)

    made = blend_with_report(three(), WEIGHTS, base=with_hole, mode=mode)
    assert made.report.exact == 3
    module = made.adapter.modules[LINEAR]
    v = with_hole(LINEAR) + module.delta()
    goal = MODES[mode](with_hole(LINEAR), terms_at(LINEAR, three(), WEIGHTS))
    if mode != "comfyui":  # which divides by its eps there
        assert_close(module.magnitude / v.norm(dim=1) * v.T, goal.T, computed_in=torch.float64)


@EXACT
def test_rows_of_zeros_adapt_as_lora_and_other_tools_agree(mode: str) -> None:
    def with_hole(path: str) -> Tensor:
        return base(path).index_fill(0, torch.tensor([2]), 0.0)

    made = blend(three(), WEIGHTS, base=with_hole, mode=mode).modules[LINEAR]
    expected = sum(term.strength * term.delta[2] for term in terms_at(LINEAR, three(), WEIGHTS))
    v = with_hole(LINEAR) + made.delta()
    assert_close(v[2] * made.magnitude[2] / v[2].norm(), expected, computed_in=torch.float64)


def test_both_axes_add_up_but_do_not_compose() -> None:
    adapters = {"a": adapter(1, paths=(LINEAR,)), "b": adapter(20, paths=(LINEAR,), axis="in")}
    weights: dict[str, Weight] = {"a": 0.5, "b": 0.5}
    with pytest.raises(ValueError, match=f"{LINEAR}: .*convert the adapter of the in axis to the out axis first"):
        blend(adapters, weights, base=base)
    made = blend_with_report(adapters, weights, base=base, mode="additive", rank=10)
    assert made.adapter.modules[LINEAR].axis == "out"
    assert made.report.layers[LINEAR].error < 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_blended_in_fp32(dtype: torch.dtype) -> None:
    half = {"a": adapter(1, dtype=dtype), "b": adapter(20, dtype=dtype)}
    wide = {
        name: AdapterState({path: module.to(dtype=torch.float32) for path, module in found.modules.items()})
        for name, found in half.items()
    }
    weights: dict[str, Weight] = {"a": 0.5, "b": 0.25}
    one = blend(half, weights, base=lambda path: base(path, dtype=dtype))
    two = blend(wide, weights, base=lambda path: base(path, dtype=dtype).float())
    for path in SHAPES:
        assert one.modules[path].down.dtype == torch.float32
        assert_close(one.modules[path].tensors, two.modules[path].tensors)


def test_vectors_add_up() -> None:
    one = AdapterState({LINEAR: dora_module(LINEAR, 1)}, vectors={"unet.conv_in.bias": torch.ones(3)})
    two = AdapterState({}, vectors={"unet.conv_in.bias": torch.full((3,), 4.0), "unet.norm.weight": torch.ones(2)})
    made = blend_with_report({"a": one, "b": two}, {"a": 0.5, "b": 0.25}, base=base)
    assert_identical(made.adapter.vectors["unet.conv_in.bias"], torch.full((3,), 1.5))
    assert_identical(made.adapter.vectors["unet.norm.weight"], torch.full((2,), 0.25))
    assert made.report.vectors == 2
    wrong = AdapterState({}, vectors={"unet.conv_in.bias": torch.ones(4)})
    with pytest.raises(ValueError, match="the same base model"):
        blend({"a": one, "b": wrong}, {"a": 0.5, "b": 0.25}, base=base)


def test_tensors_of_no_layer_are_kept_refused_or_dropped_aloud() -> None:
    one = AdapterState({LINEAR: dora_module(LINEAR, 1)}, extra={"emb": torch.ones(2), "same": torch.zeros(1)})
    two = AdapterState({}, extra={"emb": torch.zeros(2), "same": torch.zeros(1), "own": torch.ones(1)})
    weights: dict[str, Weight] = {"a": 0.5, "b": 0.5}
    with pytest.raises(ValueError, match="extra='drop'"):
        blend({"a": one, "b": two}, weights, base=base)
    made = blend_with_report({"a": one, "b": two}, weights, base=base, options=BlendOptions(extra="drop"))
    assert set(made.adapter.extra) == {"same", "own"}
    assert made.report.dropped_extra == ("emb",)
    assert "1 other tensors dropped" in made.report.sentence()


def test_metadata_tells_of_the_blend_and_of_no_training() -> None:
    weights: dict[str, Weight] = {"a": 0.6, "b": {"unet": 0.5}, "c": -0.2}
    facts = blend(three(), weights, base=base, mode="dare-ties", options=BlendOptions(seed=7)).metadata
    assert facts["dora_diffusion.family"] == "sd1"
    assert facts["modelspec.merged_from"] == "A1, A20, A40"
    assert json.loads(facts["dora_diffusion.blend.weights"]) == weights
    assert json.loads(facts["dora_diffusion.blend.names"]) == ["a", "b", "c"]
    assert (facts["dora_diffusion.blend.mode"], facts["dora_diffusion.blend.seed"]) == ("dare-ties", "7")
    assert not any(key.startswith("ss_") or key == "modelspec.title" for key in facts)
    assert all(isinstance(value, str) for value in facts.values())


def test_progress_and_report() -> None:
    seen: list[tuple[int, int, str]] = []
    made = blend_with_report(three(), WEIGHTS, base=base, progress=lambda *step: seen.append(step))
    assert seen == [(n, 3, path) for n, path in enumerate(SHAPES, 1)]
    assert json.loads(json.dumps(made.report.as_json()))["layers"][CONV]["rank"] == 6
    assert made.report.sentence().startswith("compose: 3 layers, rank 6 to 6, 3 exact")


def test_what_is_asked_wrongly_is_said_in_one_line() -> None:
    one = {"a": adapter(1)}
    for call, words in (
        (lambda: blend({}, {}, base=base), "no adapters"),
        (lambda: blend(one, {"a": 1.0}, base=base, mode="mix"), "mode 'mix' is unknown; expected one of additive"),
        (lambda: blend(one, {"b": 1.0}, base=base), "the same names"),
        (lambda: blend(one, {"a": float("nan")}, base=base), "finite"),
        (lambda: blend(one, {"a": 1.0}, base=base, rank=0), "at least 1"),
        (lambda: blend(one, {"a": 1.0}, base=lambda path: torch.zeros(3, 3)), "another base model"),
        (lambda: BlendOptions(density=0), "density"),
        (lambda: BlendOptions(extra="keep"), "'refuse' or 'drop'"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_every_mode_is_there() -> None:
    assert list(BLEND_SENTENCES) == [*MODES, *METHODS]
