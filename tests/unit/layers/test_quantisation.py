"""Adapters on quantised linears: read once a norm, never folded. Real libraries where installed, and a stand-in."""

import importlib.util
import logging
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from dora_diffusion.functional import dora as f
from dora_diffusion.layers import quantisation as quantised
from dora_diffusion.layers.base_layers import check_adaptable, dense_weight, logical_shape
from dora_diffusion.layers.blended import BlendedLayer
from dora_diffusion.layers.config import DoRAConfig
from dora_diffusion.layers.fuse import fuse_weights
from dora_diffusion.layers.injection import inject
from tests.tolerances import assert_close, assert_identical

OUT, IN = 48, 64
CONFIG = {"rank": 4, "target_modules": ["0"]}


class Halved(nn.Module):
    """A stand-in: a linear layer that keeps int8 steps of 1/64."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        steps = (linear.weight.detach() * 64).round().to(torch.int8)
        self.weight = nn.Parameter(steps, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, (self.weight / 64).to(x.dtype), self.bias)


STAND_IN = quantised.Quantisation("stand-in", lambda m: isinstance(m, Halved), lambda m: m.weight / 64)


def _nf4(linear: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(IN, OUT, compute_dtype=linear.weight.dtype, quant_type="nf4")
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def _int8(linear: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False)
    layer.load_state_dict(linear.state_dict())
    return layer.to("cpu")


def _torchao(linear: nn.Linear) -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = nn.Sequential(linear)
    quantize_(model, Int8WeightOnlyConfig())
    return model[0]


def _gguf(linear: nn.Linear) -> nn.Module:
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType.Q8_0
    layer = GGUFLinear(IN, OUT, bias=True, compute_dtype=linear.weight.dtype)
    packed = quants.quantize(linear.weight.detach().float().numpy(), kind)
    layer.weight = GGUFParameter(torch.from_numpy(packed), quant_type=kind)
    layer.bias = linear.bias
    return layer


# name -> (library, from a dense linear to a quantised one, largest relative error of its own forward)
MAKERS = {
    "stand-in": (None, Halved, 1e-2),
    "nf4": ("bitsandbytes", _nf4, 1e-2),
    "int8": ("bitsandbytes", _int8, 3e-2),  # this one quantises its input too
    "torchao": ("torchao", _torchao, 1e-2),
    "gguf": ("gguf", _gguf, 1e-2),
}
pytestmark = pytest.mark.filterwarnings("ignore")  # these libraries warn of kernels that a CPU lacks


@pytest.fixture(params=MAKERS)
def kind(request, monkeypatch) -> Iterator[str]:
    library = MAKERS[request.param][0]
    if library is not None and importlib.util.find_spec(library) is None:
        pytest.skip(f"needs {library}: make test-quantised")
    monkeypatch.setattr(quantised, "QUANTISATIONS", (*quantised.QUANTISATIONS, STAND_IN))
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield request.param
    logging.disable(logging.NOTSET)


def make(kind: str) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(MAKERS[kind][1](nn.Linear(IN, OUT).to(torch.bfloat16)))
    return model, torch.randn(5, IN).to(torch.bfloat16)


def test_the_dense_weight_is_the_one_it_draws_with(kind: str) -> None:
    model, x = make(kind)
    for _ in range(2):  # the first forward of some moves things about
        dense = dense_weight(model[0])
        assert tuple(dense.shape) == (OUT, IN) == logical_shape(model[0])
        expected = nn.functional.linear(x.float(), dense.float(), model[0].bias.float())
        error = (model(x).float() - expected).abs().max() / expected.abs().max()
        assert error < MAKERS[kind][2]
    assert check_adaptable("layer", model[0]) is model[0]


def test_trains_from_the_base_on_with_one_dense_weight_a_step(kind: str, monkeypatch) -> None:
    model, x = make(kind)
    plain = model(x)
    calls = []
    real = quantised.dequantise

    def counting(module: nn.Module) -> Tensor | None:
        calls.append(module)
        return real(module)

    injection = inject(model, DoRAConfig(**CONFIG))
    monkeypatch.setattr("dora_diffusion.layers.base_layers.dequantise", counting)
    assert_identical(model(x), plain)
    injection.keep_norms()
    calls.clear()
    before = [parameter.detach().clone() for parameter in injection.parameters()]
    optimizer = torch.optim.AdamW(injection.parameters(), lr=1e-2)
    for _ in range(3):
        for _ in range(2):
            inputs = x.clone().requires_grad_()
            model(inputs).float().square().sum().backward()
            assert bool(inputs.grad.abs().sum() > 0)
        optimizer.step()
        optimizer.zero_grad()
    assert len(calls) == 3
    assert all(not torch.equal(a, b) for a, b in zip(injection.parameters(), before, strict=True))
    assert {parameter.dtype for parameter in injection.parameters()} == {torch.float32}
    assert_identical(injection.eject()(x), plain)


def test_blends_as_the_dequantised_layer_would(kind: str) -> None:
    model, x = make(kind)
    weight = dense_weight(model[0]).float()
    down, up = torch.randn(4, IN) / 4, 0.1 * torch.randn(OUT, 4)
    term = f.gain_form(weight, down, up, 1.0, f.initial_magnitude(weight) * 1.2)
    blended = BlendedLayer(model[0])
    blended.set_terms([term])
    blended.set_strengths(torch.tensor([0.7]))
    dense = f.apply_gain_form(weight, f.scale_gain_form(term, 0.7))
    expected = nn.functional.linear(x.float(), dense, model[0].bias.float())
    error = (blended(x).float() - expected).abs().max() / expected.abs().max()
    assert error < 2 * MAKERS[kind][2]
    with pytest.raises(ValueError, match="some.path: a quantised .* cannot be folded; leave the adapter unfused"):
        fuse_weights({"some.path": (model[0], term)})


def test_gradients_are_those_on_the_dequantised_layer() -> None:
    torch.manual_seed(0)
    stand_in = Halved(nn.Linear(IN, OUT))
    dense = nn.Linear(IN, OUT)
    with torch.no_grad():
        dense.weight.copy_(stand_in.weight / 64)
        dense.bias.copy_(stand_in.bias)
    answers = []
    for base in (stand_in, dense):
        model = nn.Sequential(base)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(quantised, "QUANTISATIONS", (STAND_IN,))
            injection = inject(model, DoRAConfig(**CONFIG, norm_grad="exact"))
            with torch.no_grad():
                injection.ups()[0].normal_(generator=torch.Generator().manual_seed(1))
            out = model(torch.ones(2, IN))
            answers.append([out, *torch.autograd.grad(out.square().sum(), injection.parameters())])
    assert_close(*answers)


@pytest.mark.parametrize("compress", [True, False])
def test_a_4_bit_weight_that_was_packed_for_a_cpu_is_the_same_weight(compress: bool) -> None:
    """bitsandbytes packs it at a forward without gradients on a CPU with AVX512-BF16, its scales rounded to bf16."""
    bnb = pytest.importorskip("bitsandbytes")
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.linspace(0.1, 3, 64)[:, None], torch.linspace(0.2, 2, 256)  # so that no two scales are alike
    dense = nn.Linear(256, 64)
    dense.weight.data = torch.randn(64, 256, generator=generator) * rows * columns
    layer = bnb.nn.Linear4bit(256, 64, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=compress)
    layer.load_state_dict(dense.state_dict())
    layer = layer.to("cpu").eval()
    before = dense_weight(layer).clone()
    packed, state = bnb.functional._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    layer.weight.data, layer.weight.quant_state = packed, state
    after = dense_weight(layer).float()
    assert ((after - before).abs() <= 2**-8 * before.abs()).all()
    assert state.packing_format_for_cpu  # looked at, and left as it was


def test_a_weight_nobody_can_read_is_refused_in_one_line() -> None:
    plain = nn.Linear(4, 4)
    plain.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    packed = nn.Module()
    packed.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))
    for module in (plain, packed):
        with pytest.raises(ValueError, match="^some.path: a weight quantised to .* load the model in bf16$") as caught:
            check_adaptable("some.path", module)
        assert "\n" not in str(caught.value)


class Float8Linear(nn.Linear):
    """Keeps fp8 and computes in its input's dtype, as diffusers' layerwise casting does."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


def test_a_weight_kept_in_fp8_is_read_and_blended_but_not_folded() -> None:
    torch.manual_seed(0)
    base = Float8Linear(IN, OUT)
    base.weight.requires_grad_(False)
    base.weight.data = base.weight.data.to(torch.float8_e4m3fn)
    model, x = nn.Sequential(base), torch.randn(5, IN)
    plain, weight = model(x), base.weight.data.float()
    injection = inject(model, DoRAConfig(**CONFIG))
    assert_identical(model(x), plain)
    assert {parameter.dtype for parameter in injection.parameters()} == {torch.float32}
    with torch.no_grad():
        injection.ups()[0].normal_(std=0.1)
    trained, state = model(x), injection.state().modules["0"]
    injection.eject()
    term = f.gain_form(weight, state.down, state.up, state.scale, state.magnitude)
    blended = BlendedLayer(base)
    blended.set_terms([term])
    blended.set_strengths(torch.ones(1))
    assert_close(blended(x), trained)
    with pytest.raises(ValueError, match="cannot be folded"):
        fuse_weights({"0": (base, term)})
