"""The tensors that LyCORIS writes for a layer, read by these rules, draw what its live module draws.

The judge is what its module draws (`forward`). Its `get_merged_weight` is a second one where it is sound: for LoHa and
LoKr it multiplies by the scale twice and forgets the scalar (4.1.3), so it is asked only where both are 1.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import product

import pytest
import torch
from lycoris.modules.full import FullModule
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from torch import Tensor, nn

from dora_diffusion.functional.dora import AXES, Axis, dora_weight, rows
from dora_diffusion.state import FactoredState, Module, ModuleState

RANK, ALPHA = 2, 3.0
TOLERANCE = 1e-6  # of the largest number, fp32
TheirModule = LoConModule | LohaModule | LokrModule | FullModule


@dataclass(frozen=True)
class Writer:
    """One way in which LyCORIS writes a layer: its module, and what it is given beside rank and alpha."""

    module: type[TheirModule]
    options: Mapping[str, object] = field(default_factory=dict)
    keys: frozenset[str] = frozenset()
    loses_scale: bool = False  # LoKr with both halves whole, which has a test of its own


WRITERS = {
    "locon": Writer(LoConModule, {}, frozenset({"lora_up.weight", "lora_down.weight"})),
    "loha": Writer(LohaModule, {}, frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})),
    "lokr": Writer(LokrModule, {}, frozenset({"lokr_w1", "lokr_w2_a", "lokr_w2_b"})),
    "lokr, both pairs": Writer(
        LokrModule, {"decompose_both": True}, frozenset({"lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b"})
    ),
    "lokr, first a pair": Writer(
        LokrModule,
        {"decompose_both": True, "factor": 4, "unbalanced_factorization": True},
        frozenset({"lokr_w1_a", "lokr_w1_b", "lokr_w2"}),
    ),
    "lokr, both whole": Writer(LokrModule, {"full_matrix": True}, frozenset({"lokr_w1", "lokr_w2"}), loses_scale=True),
}
TUCKER_WRITERS = {
    "locon": Writer(
        LoConModule, {"use_tucker": True}, frozenset({"lora_up.weight", "lora_down.weight", "lora_mid.weight"})
    ),
    "loha": Writer(LohaModule, {"use_tucker": True}, WRITERS["loha"].keys | {"hada_t1", "hada_t2"}),
    "lokr": Writer(LokrModule, {"use_tucker": True}, WRITERS["lokr"].keys | {"lokr_t2"}),
    "lokr, both pairs": Writer(
        LokrModule, {"use_tucker": True, "decompose_both": True}, WRITERS["lokr, both pairs"].keys | {"lokr_t2"}
    ),
}
# 36 outputs and 16 inputs split into 6 x 6 and 4 x 4: a rank of 2 leaves both halves of LoKr room for a pair
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(16, 36), (3, 16)),
    "conv 1x1": (lambda: nn.Conv2d(16, 36, 1), (2, 16, 5, 5)),
    "conv 3x3": (lambda: nn.Conv2d(16, 36, 3, stride=2, padding=1), (2, 16, 7, 7)),
}
TRAINED = pytest.mark.parametrize("use_scalar, rs_lora", list(product([False, True], repeat=2)))
AXIS = pytest.mark.parametrize("axis", [None, "out", "in"])


def read(tensors: Mapping[str, Tensor]) -> Module:
    """What a file's tensors for one layer mean.

    alpha is that of the file, in which the scalar is multiplied into the first factor, and rank stabilisation into
    alpha. The rank is the rows of a `down`, `_b` or core; LoKr with both halves whole has none, and scale 1.
    """
    tensors = {key.removesuffix(".weight"): tensor.detach() for key, tensor in tensors.items()}
    magnitude, axis = read_magnitude(tensors.pop("dora_scale", None))
    if "diff" in tensors:
        return FactoredState("full", {"diff": tensors["diff"]}, magnitude=magnitude, axis=axis)
    alpha = float(tensors.pop("alpha"))
    if "lora_up" in tensors:
        down, up, mid = tensors["lora_down"], tensors["lora_up"], tensors.get("lora_mid")
        return ModuleState(down, up, alpha, magnitude, axis=axis, mid=mid)
    algorithm = "loha" if "hada_w1_a" in tensors else "lokr"
    second = next((tensors[key] for key in ("hada_w1_b", "lokr_w1_b", "lokr_w2_b") if key in tensors), None)
    scale = 1.0 if second is None else alpha / second.shape[0]
    return FactoredState(algorithm, tensors, scale, alpha, magnitude, axis)


def read_magnitude(scale: Tensor | None) -> tuple[Tensor | None, Axis]:
    """(out, 1[, 1, 1]) or (1, in[, 1, 1]): the dimension that is not 1."""
    if scale is None:
        return None, "out"
    assert scale.dim() > 1
    return scale.flatten(), AXES[0] if scale.shape[0] > 1 else AXES[1]


def live(writer: Writer, layer: nn.Module, *, axis: Axis | None = None, **options: object) -> TheirModule:
    """Their module on a layer, trained as it were: nothing in it is at its initial value."""
    generator = torch.Generator().manual_seed(1)
    if axis is not None:
        options |= {"weight_decompose": True, "wd_on_out": axis == "out"}
    given = {"lora_dim": RANK, "alpha": ALPHA, **writer.options, **options}
    module = writer.module("layer", layer, 1.0, **given).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name == "dora_scale":
                parameter.mul_(0.7 + 0.6 * torch.rand(parameter.shape, generator=generator))
            elif name == "scalar":
                parameter.fill_(0.7)
            else:
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return module


def make(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layer = LAYERS[kind][0]().requires_grad_(False)
    return layer, torch.randn(LAYERS[kind][1], generator=torch.Generator().manual_seed(3))


def weights_of(module: Module, layer: nn.Module) -> dict[str, Tensor]:
    """W' at strength 1, by the pair, and by the dense difference."""
    pair, weight = module.as_pair(), layer.weight
    delta = module.delta().reshape(weight.shape)
    beside_ones = torch.eye(len(rows(delta)))
    given = {"weight": weight, "magnitude": pair.magnitude, "axis": pair.axis}
    by_pair = dora_weight(
        weight, pair.down.reshape(-1, *weight.shape[1:]), pair.up, pair.scale, given["magnitude"], axis=given["axis"]
    )
    by_delta = dora_weight(weight, delta, beside_ones, 1.0, given["magnitude"], axis=given["axis"])
    return {"pair": by_pair, "delta": by_delta}


def assert_near(got: Tensor, expected: Tensor) -> None:
    error = float((got - expected).abs().max() / expected.abs().max())
    assert error <= TOLERANCE, f"relative error {error:.2e}"


@torch.no_grad()
def assert_draws_alike(theirs: TheirModule, module: Module, layer: nn.Module, x: Tensor) -> None:
    expected = theirs(x)
    assert (expected - layer(x)).abs().max() > 0.05
    for weight in weights_of(module, layer).values():
        assert_near(torch.func.functional_call(layer, {"weight": weight}, (x,)), expected)


@AXIS
@TRAINED
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", WRITERS)
def test_every_algorithm_draws_as_its_live_module(name, kind, axis, use_scalar, rs_lora) -> None:
    writer, (layer, x) = WRITERS[name], make(kind)
    rs_lora = rs_lora and not writer.loses_scale
    theirs = live(writer, layer, axis=axis, use_scalar=use_scalar, rs_lora=rs_lora)
    tensors = theirs.custom_state_dict()
    assert writer.keys == tensors.keys() - {"alpha", "dora_scale"}
    assert_draws_alike(theirs, read(tensors), layer, x)


@AXIS
@TRAINED
@pytest.mark.parametrize("name", TUCKER_WRITERS)
def test_tucker_cores_draw_as_their_live_module(name, axis, use_scalar, rs_lora) -> None:
    writer, (layer, x) = TUCKER_WRITERS[name], make("conv 3x3")
    theirs = live(writer, layer, axis=axis, use_scalar=use_scalar, rs_lora=rs_lora)
    tensors = theirs.custom_state_dict()
    assert writer.keys == tensors.keys() - {"alpha", "dora_scale"}
    assert_draws_alike(theirs, read(tensors), layer, x)


@AXIS
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", WRITERS)
def test_their_merged_weight_is_ours(name, kind, axis) -> None:
    writer, (layer, _) = WRITERS[name], make(kind)
    theirs = live(writer, layer, axis=axis, alpha=ALPHA if name == "locon" else RANK)
    expected = theirs.get_merged_weight(shape=theirs.shape)[0].detach()
    for weight in weights_of(read(theirs.custom_state_dict()), layer).values():
        assert_near(weight, expected)


@pytest.mark.parametrize("name", ["loha", "lokr"])
def test_their_merge_takes_the_scale_twice_where_their_drawing_takes_it_once(name) -> None:
    """Why `forward` is the judge. Should this fail, the note at the top of this file is out of date."""
    layer, x = make("linear")
    theirs = live(WRITERS[name], layer)
    drawn = theirs(x) - layer(x)
    merged = (theirs.get_merged_weight(shape=theirs.shape)[0] - layer.weight) @ x.T
    assert_near((ALPHA / RANK * drawn).detach(), merged.T.detach())


@pytest.mark.parametrize("rs_lora", [False, True])
def test_alpha_of_zero_is_never_written(rs_lora) -> None:
    """They read 0 as "the rank", as kohya does, and write that."""
    layer, x = make("linear")
    theirs = live(WRITERS["locon"], layer, alpha=0, rs_lora=rs_lora)
    tensors = theirs.custom_state_dict()
    assert float(tensors["alpha"]) == pytest.approx(RANK * RANK**0.5 if rs_lora else RANK)
    assert_draws_alike(theirs, read(tensors), layer, x)


def test_lokr_with_both_halves_whole_loses_its_rank_and_is_read_at_scale_one() -> None:
    """Trained with rs_lora it drew at sqrt(rank); the file cannot say so, and they too read it at 1."""
    layer, x = make("linear")
    theirs = live(WRITERS["lokr, both whole"], layer, rs_lora=True)
    tensors = theirs.custom_state_dict()
    assert theirs.scale == pytest.approx(RANK**0.5)
    assert float(tensors["alpha"]) == pytest.approx(RANK**1.5)
    parts = [tensors.get(key) for key in LokrModule.weight_list]
    with torch.no_grad():
        reloaded = LokrModule.make_module_from_state_dict("layer", layer, *parts)
    assert reloaded.scale == 1
    assert_draws_alike(reloaded, read(tensors), layer, x)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_whole_difference_and_its_bias_come_from_a_module_that_was_applied(kind) -> None:
    layer, x = make(kind)
    before = layer.weight.clone(), layer.bias.clone()
    theirs = live(Writer(FullModule), layer)
    theirs.apply_to()  # before that, custom_state_dict subtracts the base from what is a difference already
    tensors = theirs.custom_state_dict()
    with torch.no_grad():
        expected = theirs(x)
        weight, bias = (part.detach() for part in theirs.get_merged_weight())
        theirs.restore()
    layer.requires_grad_(False)
    assert tensors.keys() == {"diff", "diff_b"}
    module = read(tensors)
    for ours in weights_of(module, layer).values():
        assert_near(ours, weight)
        ours_bias = before[1] + tensors["diff_b"]
        assert_near(ours_bias, bias)
        assert_near(torch.func.functional_call(layer, {"weight": ours, "bias": ours_bias}, (x,)), expected)


@pytest.mark.parametrize("norm", [nn.LayerNorm(6), nn.GroupNorm(2, 6)])
def test_norms_are_plain_additions(norm) -> None:
    theirs = live(Writer(NormModule), norm.requires_grad_(False))
    tensors = theirs.state_dict()
    assert tensors.keys() == {"w_norm", "b_norm"}
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))
    parameters = {"weight": norm.weight + tensors["w_norm"], "bias": norm.bias + tensors["b_norm"]}
    assert_near(torch.func.functional_call(norm, parameters, (x,)), theirs(x).detach())
    for ours, expected in zip(parameters.values(), theirs.get_merged_weight(), strict=True):
        assert_near(ours, expected.detach())
