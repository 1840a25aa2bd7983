"""Every strength mode against the tool it is named after: PEFT and LyCORIS live, the others by their source."""

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from lycoris.modules.locon import LoConModule
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from dora_diffusion.functional.blend_modes import MODES, AdapterTerm
from dora_diffusion.functional.dora import Axis

RELATIVE = 1e-6  # of the norm of the whole answer, in fp32
STRENGTHS = (-1.0, 0.0, 0.5, 1.0, 2.0)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 10, bias=False), (3, 6)),
    "square": (lambda: nn.Linear(8, 8), (3, 8)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, padding=1), (2, 4, 7, 7)),
    "point": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 5, 5)),
}
KINDS = pytest.mark.parametrize("kind", LAYERS)
ORDERS = tuple(itertools.permutations(range(3)))
MIXED = (0.7, -0.4, 1.5)


def assert_same(actual: Tensor, expected: Tensor, relative: float = RELATIVE) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert float((actual - expected).norm() / expected.norm()) <= relative


def layer_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return LAYERS[kind][0]().requires_grad_(False)


def input_of(kind: str) -> Tensor:
    return torch.randn(LAYERS[kind][1], generator=torch.Generator().manual_seed(9))


def answer(layer: nn.Module, weight: Tensor, x: Tensor) -> Tensor:
    return torch.func.functional_call(layer, {"weight": weight}, (x,))


def peft_layer(kind: str, dora: Sequence[bool]) -> nn.Module:
    """PEFT's own layer over `kind` with one adapter for each entry, named by its position, as after training."""
    first, *more = (
        LoraConfig(r=2 + number, lora_alpha=3, target_modules=["0"], use_dora=use_dora)
        for number, use_dora in enumerate(dora)
    )
    model = get_peft_model(nn.Sequential(layer_of(kind)), first, adapter_name="0")
    for number, config in enumerate(more, 1):
        model.add_adapter(str(number), config)
    layer, generator = model.base_model.model[0], torch.Generator().manual_seed(1)
    with torch.no_grad():
        for number, use_dora in enumerate(dora):
            up = layer.lora_B[str(number)].weight
            up.copy_(0.3 * torch.randn(up.shape, generator=generator))
            if use_dora:
                magnitude = layer.lora_magnitude_vector[str(number)].weight
                magnitude.mul_(0.7 + 0.8 * torch.rand(magnitude.shape, generator=generator))
    return layer


def peft_terms(layer: nn.Module, order: Sequence[int], strengths: Sequence[float]) -> list[AdapterTerm]:
    terms = []
    for number in order:
        up, down = layer.lora_B[str(number)].weight.detach(), layer.lora_A[str(number)].weight.detach()
        delta = layer.scaling[str(number)] * (up.flatten(1) @ down.flatten(1))
        dora = str(number) in layer.lora_magnitude_vector
        magnitude = layer.lora_magnitude_vector[str(number)].weight.detach().flatten() if dora else None
        terms.append(AdapterTerm(delta, magnitude, strength=strengths[number]))
    return terms


@torch.no_grad()
def against_peft(kind: str, dora: Sequence[bool], order: Sequence[int], strengths: Sequence[float]) -> None:
    layer = peft_layer(kind, dora)
    base, names = layer.base_layer, [str(number) for number in order]
    ours = MODES["peft"](base.weight.clone(), peft_terms(layer, order, strengths))
    for number, strength in enumerate(strengths):
        layer.set_scale(str(number), strength)
    layer.set_adapter(names)
    x = input_of(kind)
    assert_same(answer(base, ours, x), layer(x))
    layer.merge(adapter_names=names)
    assert_same(ours, layer.base_layer.weight)


@KINDS
@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("use_dora", [True, False])
def test_one_adapter_is_pefts(kind: str, strength: float, use_dora: bool) -> None:
    against_peft(kind, [use_dora], [0], [strength])


@KINDS
@pytest.mark.parametrize("order", [*ORDERS, (0, 1), (1, 0)])
@pytest.mark.parametrize("dora", [(True, True, True), (True, False, True)])
def test_several_adapters_are_pefts_in_every_order(kind: str, order: tuple[int, ...], dora: tuple[bool, ...]) -> None:
    against_peft(kind, dora, order, MIXED)


def test_pefts_scale_layer_is_the_strength() -> None:
    layer = peft_layer("linear", [True])
    ours = MODES["peft"](layer.base_layer.weight.clone(), peft_terms(layer, [0], [0.5]))
    layer.set_adapter(["0"])
    layer.scale_layer(0.5)
    x = input_of("linear")
    with torch.no_grad():
        assert_same(answer(layer.base_layer, ours, x), layer(x))


def lycoris_modules(base: nn.Module, dora: Sequence[bool], *, on_out: bool) -> list[LoConModule]:
    modules, generator = [], torch.Generator().manual_seed(1)
    for number, use_dora in enumerate(dora):
        module = LoConModule("layer", base, 1.0, 2 + number, 3, weight_decompose=use_dora, wd_on_out=on_out)
        with torch.no_grad():
            up = module.lora_up.weight
            up.copy_(0.3 * torch.randn(up.shape, generator=generator))
            if use_dora:
                module.dora_scale.mul_(0.7 + 0.8 * torch.rand(module.dora_scale.shape, generator=generator))
        modules.append(module)
    return modules


def lycoris_term(module: LoConModule, *, on_out: bool) -> AdapterTerm:
    magnitude = module.dora_scale.detach().flatten() if module.wd else None
    return AdapterTerm(module.get_diff_weight()[0].detach(), magnitude, "out" if on_out else "in", module.multiplier)


@torch.no_grad()
def against_lycoris(
    kind: str, dora: Sequence[bool], strengths: Sequence[float], order: Sequence[int], *, on_out: bool
) -> None:
    base, x = layer_of(kind), input_of(kind)
    made = lycoris_modules(base, dora, on_out=on_out)
    for module, strength in zip(made, strengths, strict=True):
        module.multiplier = strength
    modules = [made[number] for number in order]
    weight = base.weight.clone()
    ours = answer(base, MODES["lycoris"](weight, [lycoris_term(module, on_out=on_out) for module in modules]), x)
    for module in modules:
        module.apply_to()
    assert_same(ours, base(x))
    if len(modules) == 1:
        merged = modules[0].get_merged_weight(strengths[order[0]])[0].reshape(weight.shape)
        assert_same(MODES["lycoris"](weight, [lycoris_term(modules[0], on_out=on_out)]), merged)


@KINDS
@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("on_out", [True, False])
@pytest.mark.parametrize("use_dora", [True, False])
def test_one_adapter_is_lycoris(kind: str, strength: float, on_out: bool, use_dora: bool) -> None:
    against_lycoris(kind, [use_dora], [strength], [0], on_out=on_out)


@KINDS
@pytest.mark.parametrize("order", [*ORDERS, (0, 1), (1, 0)])
@pytest.mark.parametrize("on_out", [True, False])
def test_several_adapters_are_lycoris_hooks_in_every_order(kind: str, order: tuple[int, ...], on_out: bool) -> None:
    against_lycoris(kind, (True, False, True), MIXED, order, on_out=on_out)


def norms(weight: Tensor, axis: Axis) -> Tensor:
    """Of rows or columns, keeping the dimensions: written apart from the code under test."""
    keep = 0 if axis == "out" else 1
    return weight.square().sum(dim=[d for d in range(weight.dim()) if d != keep], keepdim=True).sqrt()


def shaped(term: AdapterTerm, weight: Tensor) -> Tensor:
    """A magnitude as its file holds it: (out, 1[, 1, 1]) or (1, in[, 1, 1])."""
    assert term.magnitude is not None
    return term.magnitude.reshape(norms(weight, term.axis).shape)


def by_comfyui(weight: Tensor, terms: Sequence[AdapterTerm]) -> Tensor:
    """ComfyUI v0.3.77, comfy/weight_adapter/base.py, weight_decompose, patch after patch.

    The out axis there is `dora_scale.shape[0] == weight.shape[0]`, and it takes the norm of `weight`, not of
    `weight_calc`; finfo.eps is added. A patch without `dora_scale` is `weight += strength * alpha * lora_diff`.
    """
    weight = weight.clone()
    for term in terms:
        calc = weight + term.delta
        if term.magnitude is None:
            weight = weight + term.strength * term.delta
            continue
        norm = (norms(weight, "out") if term.axis == "out" else norms(calc, "in")) + torch.finfo(weight.dtype).eps
        calc = calc * (shaped(term, weight) / norm)
        weight = calc if term.strength == 1.0 else weight + term.strength * (calc - weight)
    return weight


def by_a1111(weight: Tensor, terms: Sequence[AdapterTerm]) -> Tensor:
    """stable-diffusion-webui since PR 16151, extensions-builtin/Lora/network.py, finalize_updown.

    updown = updown * calc_scale(); then (updown + W) * (dora_scale / its column norms) - W; then times the multiplier.
    The norms are (1, in[, 1, 1]) whatever the shape of `dora_scale`, and the patches follow one another.
    """
    for term in terms:
        updown = term.delta
        if term.magnitude is not None:
            merged = updown + weight
            updown = merged * (shaped(term, weight) / norms(merged, "in")) - weight
        weight = weight + updown * term.strength
    return weight


def dora(weight: Tensor, term: AdapterTerm) -> Tensor:
    """W'_i, by the paper's equation."""
    v = weight + term.delta
    return v if term.magnitude is None else v * shaped(term, weight) / norms(v, term.axis)


def by_adding(weight: Tensor, terms: Sequence[AdapterTerm]) -> Tensor:
    """W + sum s (W' - W): also what SD.Next does."""
    return weight + sum((term.strength * (dora(weight, term) - weight) for term in terms), torch.zeros_like(weight))


def axis_of(terms: Sequence[AdapterTerm]) -> Axis:
    return next((term.axis for term in terms if term.magnitude is not None), "out")


def by_composing(weight: Tensor, terms: Sequence[AdapterTerm]) -> Tensor:
    """V = W + sum s D and m = prod m_i^s_i N(W)^(1 - sum s_i)."""
    axis = axis_of(terms)
    v, m = weight.clone(), norms(weight, axis)
    for term in terms:
        v = v + term.strength * term.delta
        own = norms(weight + term.delta, axis) if term.magnitude is None else shaped(term, weight)
        m = m * (own / norms(weight, axis)) ** term.strength
    return v if all(term.magnitude is None for term in terms) else v * m / norms(v, axis)


def by_directions(weight: Tensor, terms: Sequence[AdapterTerm]) -> Tensor:
    """Unit rows added, then the length of `by_composing`."""
    axis = axis_of(terms)
    unit = weight / norms(weight, axis)
    v, m = unit.clone(), norms(weight, axis)
    for term in terms:
        one = weight + term.delta
        v = v + term.strength * (one / norms(one, axis) - unit)
        own = norms(one, axis) if term.magnitude is None else shaped(term, weight)
        m = m * (own / norms(weight, axis)) ** term.strength
    return v * m / norms(v, axis)


FORMULAS: dict[str, Callable[[Tensor, Sequence[AdapterTerm]], Tensor]] = {
    "comfyui": by_comfyui,
    "a1111": by_a1111,
    "additive": by_adding,
    "compose": by_composing,
    "direction-magnitude": by_directions,
}
MODE = pytest.mark.parametrize("mode", FORMULAS)


def made_terms(weight: Tensor, axis: Axis, strengths: Sequence[float], plain: Sequence[int] = ()) -> list[AdapterTerm]:
    terms, generator = [], torch.Generator().manual_seed(5)
    for number, strength in enumerate(strengths):
        delta = 0.2 * torch.randn(weight.shape, generator=generator).to(weight.dtype)
        count = weight.shape[0 if axis == "out" else 1]
        share = (0.7 + 0.8 * torch.rand(count, generator=generator)).to(weight.dtype)
        magnitude = None if number in plain else share * norms(weight, axis).flatten()
        terms.append(AdapterTerm(delta, magnitude, axis, strength))
    return terms


@MODE
@KINDS
@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("plain", [(), (0,)], ids=["dora", "lora"])
def test_one_adapter_follows_the_formula(
    mode: str, kind: str, axis: Axis, strength: float, plain: tuple[int, ...]
) -> None:
    weight = layer_of(kind).weight
    terms = made_terms(weight, axis, [strength], plain)
    assert_same(MODES[mode](weight, terms), FORMULAS[mode](weight, terms))


@MODE
@KINDS
@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("order", [*ORDERS, (0, 1), (1, 0)])
def test_several_adapters_follow_the_formula_in_every_order(
    mode: str, kind: str, axis: Axis, order: tuple[int, ...]
) -> None:
    weight = layer_of(kind).weight
    made = made_terms(weight, axis, MIXED, plain=[1])
    terms = [made[number] for number in order]
    assert_same(MODES[mode](weight, terms), FORMULAS[mode](weight, terms))


def test_the_order_shows_where_a_tool_is_sequential() -> None:
    """So that the orders above are no empty claim."""
    weight = layer_of("linear").weight
    terms = made_terms(weight, "out", MIXED)
    for mode in ("peft", "comfyui", "a1111"):
        there, back = (MODES[mode](weight, side) for side in (terms, terms[::-1]))
        assert float((there - back).norm() / there.norm()) > 1e-3
