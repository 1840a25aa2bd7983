"""LyCORIS' own files of a whole UNet: ours draws what LyCORIS draws, and LyCORIS draws what ours wrote."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lycoris.wrapper import LycorisNetwork, create_lycoris, create_lycoris_from_weights
from safetensors.torch import load_file
from torch import Tensor, nn

from dora_diffusion.adapters.manager import AdapterManager
from dora_diffusion.families import FAMILIES, family_of_pipeline
from dora_diffusion.formats import detect_format, examine, load_adapter, save_adapter
from dora_diffusion.formats.flat_names import flatten
from dora_diffusion.inspection.header import summarise_header
from dora_diffusion.state import AdapterState, Module, ModuleState
from tests.families.pipelines import PIPELINES
from tests.formats.adapters import KINDS, adapter_of, layers_of
from tests.pocket_random import random_pocket_pipeline
from tests.tolerances import assert_identical

pytestmark = pytest.mark.filterwarnings("ignore")  # LyCORIS warns of layers that it leaves alone

ALGORITHMS = {
    "LoRA": {"algo": "lora"},
    "LoCon with Tucker": {"algo": "locon", "use_tucker": True},
    "DoRA per output": {"algo": "lora", "dora_wd": True, "wd_on_output": True},
    "DoRA per input": {"algo": "lora", "dora_wd": True, "wd_on_output": False},
    "LoHa": {"algo": "loha"},
    "LoHa, DoRA per output": {"algo": "loha", "dora_wd": True, "wd_on_output": True},
    "LoKr": {"algo": "lokr", "factor": 4},
    "LoKr with Tucker, DoRA per input": {"algo": "lokr", "use_tucker": True, "dora_wd": True, "wd_on_output": False},
    "LoKr of pairs": {"algo": "lokr", "decompose_both": True},
    "full": {"algo": "full"},
    "LoRA with norms": {"algo": "lora", "train_norm": True},
    "rank-stabilised, scalar": {"algo": "lora", "rs_lora": True, "use_scalar": True},
}


def network(unet: nn.Module, settings: dict) -> LycorisNetwork:
    LycorisNetwork.LORA_PREFIX = "lycoris"
    made = create_lycoris(unet, 1.0, **{"linear_dim": 4, "linear_alpha": 2, "preset": "full", **settings})
    made.apply_to()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_((0.1 * parameter if name.endswith("dora_scale") else 0.05) * noise)
    return made.double()


@torch.no_grad()
def predicted(unet: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(1, unet.config.in_channels, 16, 16, generator=generator)
    text = torch.randn(1, 8, unet.config.cross_attention_dim, generator=generator)
    return unet.double()(latents.double(), torch.tensor([500]), text.double()).sample


def near(got: Tensor, expected: Tensor, base: Tensor) -> None:
    """The change of the prediction, to 1e-4 of its size: some hundred layers one after another."""
    assert (expected - base).norm() > 1e-3 * base.norm()
    assert (got - expected).norm() <= 1e-4 * (expected - base).norm()


def weaker(module: Module) -> Module:
    """A twentieth of the difference, so that the prediction stays one and fp32 has digits to compare."""
    if isinstance(module, ModuleState):
        return replace(module, up=0.05 * module.up)
    name = next(iter(module.factors))
    return replace(module, factors={**module.factors, name: 0.05 * module.factors[name]})


@pytest.mark.parametrize("kind", ALGORITHMS)
def test_ours_draws_what_lycoris_draws(tmp_path: Path, kind: str) -> None:
    pipe = random_pocket_pipeline()
    base = predicted(pipe.unet)
    theirs = network(pipe.unet, ALGORITHMS[kind])
    expected = predicted(pipe.unet)
    theirs.save_weights(str(tmp_path / "theirs.safetensors"), torch.float32, {"ss_note": "kept"})
    theirs.restore()
    assert torch.equal(predicted(pipe.unet), base)
    path = tmp_path / "theirs.safetensors"
    assert detect_format(path) == "lycoris" and not examine(path).unknown
    fresh = random_pocket_pipeline()
    manager = AdapterManager(fresh)
    manager.load_adapter(path, name="theirs")
    manager.set_adapters({"theirs": 1.0})
    near(predicted(fresh.unet), expected, base)
    again = load_adapter(save_adapter(load_adapter(path), tmp_path / "ours.safetensors", format="lycoris"))
    manager.load_adapter(again, name="ours")
    manager.set_adapters({"ours": 1.0})
    near(predicted(fresh.unet), expected, base)


BASE_MADE = {
    "GLoRA": {"algo": "glora"},
    "(IA)^3 of outputs": {"algo": "ia3"},
    "(IA)^3 of inputs": {"algo": "ia3", "train_on_input": True},
    "OFT": {"algo": "diag-oft"},
    "OFT, limited and rescaled": {"algo": "diag-oft", "constraint": 1e-3, "rescaled": True},
    "BOFT": {"algo": "boft", "linear_dim": 8},
    "BOFT, limited and rescaled": {"algo": "boft", "linear_dim": 8, "constraint": 1e-3, "rescaled": True},
}


@pytest.mark.parametrize("kind", BASE_MADE)
def test_what_is_made_of_the_base_s_weight_is_read_beside_it(tmp_path: Path, kind: str) -> None:
    pipe = random_pocket_pipeline()
    theirs = network(pipe.unet, BASE_MADE[kind]).float()  # it takes its rotations in fp32
    expected = {module.lora_name: module.get_diff_weight(1.0)[0] for module in theirs.loras}
    path = tmp_path / "theirs.safetensors"
    theirs.save_weights(str(path), torch.float32, {})
    theirs.restore()
    assert detect_format(path) == "lycoris" and not examine(path).unknown
    assert summarise_header(path).structure.layers == len(expected)  # what a library shows, without a base
    with pytest.raises(ValueError, match="is made of the base's weight; load it with its base at hand"):
        load_adapter(path)
    layers = dict(pipe.unet.named_modules())
    read = load_adapter(path, base=lambda layer: layers[layer.removeprefix("unet.")].weight)
    assert len(read.modules) == len(expected)
    theirs.save_weights(str(tmp_path / "as they are.safetensors"), None, {})  # whole numbers stay whole ones
    kept = load_adapter(
        tmp_path / "as they are.safetensors", base=lambda layer: layers[layer.removeprefix("unet.")].weight
    )
    assert kept.modules.keys() == read.modules.keys()
    for name, module in read.modules.items():
        delta = expected["lycoris_" + flatten(name.removeprefix("unet."))]
        assert delta.norm() > 0
        assert (module.delta().reshape(delta.shape) - delta).norm() < 2e-5 * delta.norm(), name


@pytest.mark.parametrize("kind", BASE_MADE)
@torch.no_grad()
def test_what_is_made_of_the_base_s_weight_is_drawn_with(tmp_path: Path, kind: str) -> None:
    pipe = random_pocket_pipeline()
    base = predicted(pipe.unet)
    theirs = network(pipe.unet, BASE_MADE[kind]).float()
    path = tmp_path / "theirs.safetensors"
    theirs.save_weights(str(path), torch.float32, {})
    theirs.restore()
    manager = AdapterManager(pipe)
    manager.load_adapter(path, name="theirs")
    manager.set_adapters({"theirs": 1.0})
    drawn = predicted(pipe.unet)
    manager.unload()
    assert torch.equal(predicted(pipe.unet), base)
    layers = dict(pipe.unet.named_modules())
    read = load_adapter(path, base=lambda layer: layers[layer.removeprefix("unet.")].weight)
    for name, module in read.modules.items():
        weight = layers[name.removeprefix("unet.")].weight
        weight += module.delta().reshape(weight.shape)
    near(drawn, predicted(pipe.unet), base)


@pytest.mark.parametrize("kind", ["LoRA", "DoRA", "Tucker", "LoHa", "full"])
def test_lycoris_draws_what_ours_wrote(tmp_path: Path, kind: str) -> None:
    pipe = random_pocket_pipeline()
    base = predicted(pipe.unet)
    layers = [(path, 0.1 * weight) for path, weight in layers_of(pipe, ["unet"]) if "attn" in path or "conv1" in path]
    adapter = AdapterState({name: weaker(module) for name, module in adapter_of(layers, KINDS[kind]).modules.items()})
    path = save_adapter(adapter, tmp_path / "ours.safetensors", format="lycoris")
    manager = AdapterManager(pipe)
    manager.load_adapter(adapter, name="ours")
    manager.set_adapters({"ours": 1.0})
    expected = predicted(pipe.unet)
    manager.unload()
    LycorisNetwork.LORA_PREFIX = "lycoris"
    theirs, _ = create_lycoris_from_weights(1.0, str(path), pipe.unet)
    theirs.apply_to()
    near(predicted(pipe.unet), expected, base)


ONE_OF_EACH = {tiny.family: name for name, tiny in PIPELINES.items()}


@pytest.mark.parametrize("family", [family.name for family in FAMILIES])
def test_lycoris_names_the_layers_of_every_family_as_we_do(tmp_path: Path, family: str) -> None:
    """Its file of all the layers that it wraps, read here and written again: the same keys, the same numbers."""
    pipe = PIPELINES[ONE_OF_EACH[family]].build()
    part = family_of_pipeline(pipe).denoiser.name
    theirs = network(getattr(pipe, part), {"algo": "lora"})
    path = tmp_path / "theirs.safetensors"
    theirs.save_weights(str(path), torch.float32, {})
    theirs.restore()
    assert detect_format(path) == "lycoris" and not examine(path).unknown
    read = load_adapter(path, family=family)
    layers = {name: weight for name, weight in layers_of(pipe, [part]) if name in read.modules}
    assert len(layers) == len(read.modules) == len(theirs.loras) > 10
    assert all(module.shape[0] == len(layers[name]) for name, module in read.modules.items())
    assert_identical(load_file(save_adapter(read, tmp_path / "ours.safetensors", format="lycoris")), load_file(path))
