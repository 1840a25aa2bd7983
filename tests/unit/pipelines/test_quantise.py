"""Quantising a base's linear layers: which ones, by which library, and training beside them. A stand-in, and the real
libraries where they are installed."""

import importlib.util

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from dora_diffusion.layers import quantisation
from dora_diffusion.pipelines import quantise as quantise_module
from dora_diffusion.pipelines.loading import load_pipeline
from dora_diffusion.pipelines.quantise import (
    SCHEMES,
    Scheme,
    check_library,
    linear_paths,
    quantise_pipeline,
    quantised_bytes,
)
from dora_diffusion.training.base.trainable import load_base, prepare_trainable, quantise_base
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.run import train as train_module
from dora_diffusion.training.run.dry_run import describe_plan
from dora_diffusion.training.run.train import train
from tests.pocket_random import random_pocket_pipeline


class Halved(nn.Module):
    """A stand-in: a linear layer that keeps int8 steps of 1/256."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        steps = (linear.weight.detach() * 256).round().to(torch.int8)
        self.weight = nn.Parameter(steps, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, (self.weight / 256).to(x.dtype), self.bias)


def _halve(model: nn.Module, paths) -> None:
    for path in paths:
        model.set_submodule(path, Halved(model.get_submodule(path)))


@pytest.fixture
def stand_in(monkeypatch) -> None:
    """int8 by this file's own layer."""
    kind = quantisation.Quantisation("stand-in", lambda m: isinstance(m, Halved), lambda m: m.weight / 256)
    monkeypatch.setattr(quantisation, "QUANTISATIONS", (kind, *quantisation.QUANTISATIONS))
    monkeypatch.setitem(SCHEMES, "int8", Scheme("torch", 8.0, _halve))


@pytest.fixture
def config(tmp_path):
    """`quantise` -> a run of two steps on a base of random weights."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "images" / "red.png")
    random_pocket_pipeline().save_pretrained(tmp_path / "base")

    def made(quantise, **base) -> TrainConfig:
        settings = {
            "model": str(tmp_path / "base"),
            "base": {"quantise": quantise, **base},
            "output_dir": tmp_path / "run",
            "data": {"instance_dir": tmp_path / "images", "instance_prompt": "a red", "resolution": 32},
            "adapter": {"rank": 2},
            "optim": {"steps": 2, "learning_rate": 1e-2},
            "validation": {"every": 0},
            "checkpoint": {"every": 1},
        }
        return TrainConfig.model_validate(settings)

    return made


def _needs(name: str):
    library = SCHEMES[name].library
    return pytest.param(
        name, marks=pytest.mark.skipif(importlib.util.find_spec(library) is None, reason=f"needs {library}")
    )


REAL = [_needs(name) for name in SCHEMES]


def test_what_no_preset_adapts_stays_as_it_is() -> None:
    unet = random_pocket_pipeline().unet
    paths = linear_paths(unet)
    linears = {path for path, module in unet.named_modules() if type(module) is nn.Linear}
    assert linears - set(paths) == {path for path in linears if "time_emb" in path or "add_embedding" in path}
    assert any(path.endswith("attn1.to_q") for path in paths)


@pytest.mark.parametrize("name", REAL)
def test_a_pipeline_is_loaded_quantised_and_draws(name: str, tmp_path) -> None:
    random_pocket_pipeline().save_pretrained(tmp_path)
    dense, pipe = load_pipeline(tmp_path).unet, load_pipeline(tmp_path, quantise={"unet": name})
    assert all(quantisation.is_quantised(pipe.unet.get_submodule(path)) for path in linear_paths(dense))
    assert not any(quantisation.is_quantised(module) for module in pipe.text_encoder.modules())
    noisy, words = torch.randn(1, 8, 4, 4), torch.randn(1, 77, 256)
    ask = {"sample": noisy, "timestep": torch.tensor(500), "encoder_hidden_states": words}
    near, exact = pipe.unet(**ask).sample, dense(**ask).sample
    assert 0 < (near - exact).norm() < 0.3 * exact.norm()


@pytest.mark.parametrize("name", REAL)
def test_the_record_says_how_many_bits_a_number_takes(name: str) -> None:
    model = nn.Sequential(nn.Linear(1024, 1024, bias=False)).to(torch.bfloat16)
    saved, dense = quantised_bytes(model, name)
    SCHEMES[name].convert(model, ["0"])
    held = sum(map(_bytes, model.to("cpu").state_dict().values()))
    assert dense == 2 * 1024**2 and held == pytest.approx(dense - saved, rel=0.01)


def _bytes(tensor: Tensor) -> int:
    """Of a tensor, or of those that it is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(_bytes(getattr(tensor, inner)) for inner in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("name", REAL)
def test_a_run_beside_quantised_layers_moves_what_is_trained_and_nothing_else(name: str, config) -> None:
    settings = config(name)
    pipe = load_base(settings.model, torch.float32, settings.base)
    quantise_base(pipe, settings.base, torch.device("cpu"))
    paths = [path for path, module in pipe.unet.named_modules() if quantisation.is_quantised(module)]
    before = {path: quantisation.dequantise(pipe.unet.get_submodule(path)).clone() for path in paths}
    trainable = prepare_trainable(pipe, settings)
    start = {name: tensor.clone() for name, tensor in trainable.named_tensors().items()}
    optimizer = torch.optim.SGD(trainable.parameters(), lr=0.1)
    for _ in range(2):  # A has no gradient while B is zero
        trainable.refresh_norms()
        pipe.unet(
            torch.randn(1, 8, 16, 16), torch.tensor(500), torch.randn(1, 77, 256)
        ).sample.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(start[name], tensor) for name, tensor in trainable.named_tensors().items())
    trainable.eject()
    assert before
    for path, weight in before.items():  # bitsandbytes rounds its scales to bf16 when it packs them anew for a CPU
        after = quantisation.dequantise(pipe.unet.get_submodule(path)).to(weight.dtype)
        assert ((after - weight).abs() <= (2**-7 if name == "nf4" else 0) * weight.abs()).all(), path


def test_a_quantised_run_is_resumed_and_an_unquantised_one_is_not_gone_on_with(config, stand_in) -> None:
    whole = train(config("int8")).adapter.read_bytes()
    folder = config("int8").output_dir
    for file in ("adapter.safetensors", "manifest.json"):
        (folder / file).unlink()
    for path in sorted((folder / "checkpoints").glob("step-*"))[1:]:
        path.rename(folder.parent / path.name)
    with pytest.raises(ValueError, match="base.quantise was 'int8' and is now None"):
        train(config(None), resume="latest")
    assert train(config("int8"), resume="latest").adapter.read_bytes() == whole


def test_adapters_below_are_folded_before_layers_are_quantised(config, stand_in, tmp_path, monkeypatch) -> None:
    from dora_diffusion.formats import save_adapter
    from tests.pocket_random import random_adapter

    save_adapter(random_adapter(random_pocket_pipeline()), tmp_path / "below.safetensors")
    settings = config("int8", adapters={tmp_path / "below.safetensors": 1.0})
    order = []
    for name in ("lay_below", "quantise_base"):
        real = getattr(train_module, name)
        monkeypatch.setattr(train_module, name, lambda *a, real=real, name=name: order.append(name) or real(*a))
    assert train(settings).steps == 2
    assert order == ["lay_below", "quantise_base"]


def test_the_plan_knows_what_quantising_saves(config, stand_in) -> None:
    def weights(plan: str) -> float:
        line = next(line for line in plan.splitlines() if "weights" in line)
        return float(line.split("unet ")[1].split(",")[0].split(")")[0])

    assert weights(describe_plan(config("int8"))) < weights(describe_plan(config(None)))


def test_a_missing_library_is_said_before_anything_is_loaded(config, monkeypatch) -> None:
    monkeypatch.setattr(quantise_module, "find_spec", lambda name: None)
    said = "base.quantise: nf4 needs bitsandbytes, which is not installed; pip install bitsandbytes"
    for call in (describe_plan, train):
        with pytest.raises(ValueError, match=said):
            call(config("nf4"))
    with pytest.raises(ValueError, match="quantise: got 'nf3', expected nf4, int8, fp8 or null"):
        check_library("nf3")


def test_components_that_are_not_there_or_quantised_already_are_named(stand_in) -> None:
    pipe = random_pocket_pipeline()
    with pytest.raises(ValueError, match="quantise: got 'transformer', expected one of .*unet"):
        quantise_pipeline(pipe, {"transformer": "int8"})
    quantise_pipeline(pipe, "int8")
    with pytest.raises(ValueError, match="unet has no linear layers in full precision"):
        quantise_pipeline(pipe, "int8")
