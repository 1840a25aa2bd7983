"""Files between diffusers and here, both ways, with diffusers itself as the judge, text encoders included."""

import re
from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import replace
from functools import cache
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, UNet2DConditionModel
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils.state_dict_utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_kohya,
    convert_state_dict_to_peft,
)
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from dora_diffusion.conversion import for_tool
from dora_diffusion.formats import detect_format, load_adapter, save_adapter
from dora_diffusion.functional.low_rank import relative_error
from dora_diffusion.inspection.verify import verify_for_tool
from dora_diffusion.layers.base_layers import dense_weight
from dora_diffusion.pipelines.base_weights import base_weights as pipe_weights
from dora_diffusion.state import AdapterState, ModuleState
from tests.families.pipelines import PIPELINES
from tests.formats.adapters import Make, adapter_of, dense, dora, in_dora, layers_of, loha, lora
from tests.tolerances import assert_identical, assert_near

# Of the largest number. Files are fp32 and both sides merge them in fp64; a scale folded into B is rounded to fp32, and
# two steps of a pipeline make more of that.
TOLERANCE, ROUNDED, DRAWN = 1e-12, 1e-6, 1e-5
KINDS = (nn.Linear, nn.Conv2d, nn.Embedding)
# Parts into which diffusers loads adapters.
LOADED = {
    "sd1": ("unet", "text_encoder"),
    "sd2": ("unet", "text_encoder"),
    "sdxl": ("unet", "text_encoder", "text_encoder_2"),
    "sd3": ("transformer", "text_encoder", "text_encoder_2"),
    "flux-dev": ("transformer", "text_encoder"),
}


@cache
def _pipeline(name: str) -> Any:
    return PIPELINES[name].build()


def build(name: str) -> Any:
    """A pipeline of its own; what is never adapted is shared."""
    pipe = _pipeline(name)
    parts = {part: deepcopy(getattr(pipe, part)) for part in LOADED[name]}
    own = type(pipe)(**{**pipe.components, **parts})
    own.set_progress_bar_config(disable=True)
    return own


def weights_of(pipe: Any, components: Iterable[str]) -> dict[str, Tensor]:
    """Dense weight of every layer by path with its component, PEFT's wrappers looked through; copies in fp64."""
    return {
        f"{component}.{path.removeprefix('text_model.').removesuffix('.base_layer')}": dense_weight(module).double()
        for component in components
        for path, module in getattr(pipe, component).named_modules()
        if isinstance(module, KINDS) and ".lora_" not in path
    }


def one_of_each(name: str, components: Iterable[str]) -> dict[str, Tensor]:
    """Weights of layers, one of every sort in a block of every sort: those whose paths differ in more than numbers."""
    weights = dict(layers_of(_pipeline(name), components))
    found = {re.sub(r"\.\d+", "", path): path for path in weights}
    return {path: weights[path] for path in found.values()}


def peft_layers(pipe: Any, components: Iterable[str]) -> dict[str, LoraLayer]:
    return {
        f"{component}.{path.removeprefix('text_model.')}": module
        for component in components
        for path, module in getattr(pipe, component).named_modules()
        if isinstance(module, LoraLayer)
    }


def in_fp64(pipe: Any) -> Any:
    """The same pipeline, cast."""
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.double()
    return pipe


def picture(pipe: Any) -> Tensor:
    """Two steps of the whole pipeline in fp64, text encoders included: what the denoiser makes of noise."""
    return in_fp64(pipe)(
        prompt="a robot",
        num_inference_steps=2,
        guidance_scale=2.0,
        height=32,
        width=32,
        generator=torch.Generator().manual_seed(3),
        output_type="latent",
    ).images


def with_weights(pipe: Any, adapter: AdapterState) -> Any:
    """The same pipeline in fp64, with W' in the place of W."""
    with torch.no_grad():
        for component in adapter.components:
            model = getattr(in_fp64(pipe), component)
            modules = {path.removeprefix("text_model."): module for path, module in model.named_modules()}
            for path, module in adapter.modules.items():
                if path.startswith(f"{component}."):
                    weight = modules[path.removeprefix(f"{component}.")].weight
                    weight.copy_(dense(weight, module))
    return pipe


def varied(weight: Tensor, generator: torch.Generator) -> ModuleState:
    """A DoRA of rank 1, 2 or 3, by the shape of the weight, alpha other than the rank."""
    pair = lora(weight, generator, rank=1 + sum(weight.shape) % 3)
    return replace(pair, magnitude=dora(weight, generator).magnitude)


def assert_holds(layers: dict[str, LoraLayer], original: AdapterState) -> None:
    """PEFT's layers hold exactly these adapters: the pair, its scale folded into B, and the magnitudes."""
    assert layers.keys() == original.modules.keys()
    for path, module in original.modules.items():
        assert isinstance(module, ModuleState)
        layer = layers[path]
        (name,) = layer.lora_A
        assert layer.scaling[name] == 1.0
        assert_identical(layer.lora_A[name].weight, module.down)
        assert_identical(layer.lora_B[name].weight, module.up * module.scale)
        assert (name in layer.lora_magnitude_vector) == (module.magnitude is not None)
        if module.magnitude is not None:
            assert_identical(layer.lora_magnitude_vector[name].weight.flatten(), module.magnitude)


@pytest.mark.parametrize(
    "name, make", [*((name, varied) for name in LOADED), ("sdxl", dora), ("sdxl", lora), ("flux-dev", lora)]
)
def test_diffusers_loads_fuses_and_draws_what_was_written(tmp_path: Path, name: str, make: Make) -> None:
    original = adapter_of(one_of_each(name, LOADED[name]).items(), make)
    path = save_adapter(original, tmp_path / "a.safetensors")
    pipe = build(name)
    before = weights_of(pipe, LOADED[name])
    pipe.load_lora_weights(str(path))
    assert_holds(peft_layers(pipe, LOADED[name]), original)
    drawn = picture(pipe)
    assert_near(drawn, picture(with_weights(build(name), original)), DRAWN)
    assert (drawn - picture(build(name))).abs().max() > 1e-2
    for layer, weight in merged(pipe, name).items():
        if layer in original.modules:
            assert_near(weight, dense(before[layer], original.modules[layer]), ROUNDED)
        else:
            assert_identical(weight, before[layer])


def one_of_each_kind() -> Make:
    """Plain pairs, DoRAs of both axes and LoHas in turn."""
    kinds = cycle((dora, in_dora, lora, loha))
    return lambda weight, generator: next(kinds)(weight, generator)


@pytest.mark.parametrize("name", ["sd1", "flux-dev"])
def test_diffusers_draws_what_was_made_for_it_as_near_as_is_said(tmp_path: Path, name: str) -> None:
    pipe = build(name)
    before = weights_of(pipe, LOADED[name])
    original = adapter_of(one_of_each(name, LOADED[name]).items(), one_of_each_kind())
    original = replace(original, metadata={"dora_diffusion.family": name.removesuffix("-dev")})
    made = for_tool(original, "diffusers", base=pipe, rank=6)
    assert made.made.keys() == {"as they were", "as the nearest DoRA"}
    path = save_adapter(made.adapter, tmp_path / "a.safetensors", format=made.format)
    said = verify_for_tool(load_adapter(path), original, made.tool, base=pipe_weights(pipe)).error
    pipe.load_lora_weights(str(path))
    weights = merged(pipe, name)
    missed = {
        layer: relative_error(weights[layer], dense(before[layer], module), before[layer])
        for layer, module in original.modules.items()
    }
    assert max(missed.values()) == pytest.approx(said, rel=1e-3) and said > 0.01
    for layer, module in original.modules.items():
        if module.axis == "out":
            assert_near(weights[layer], dense(before[layer], module), ROUNDED)


@pytest.mark.parametrize("name, component", [("sdxl", "text_encoder_2"), ("sd1", "unet"), ("flux-dev", "transformer")])
def test_a_file_for_one_part_leaves_the_others_alone(tmp_path: Path, name: str, component: str) -> None:
    original = adapter_of(one_of_each(name, [component]).items(), varied)
    pipe = build(name)
    pipe.load_lora_weights(str(save_adapter(original, tmp_path / "a.safetensors")))
    assert_holds(peft_layers(pipe, LOADED[name]), original)


def test_a_layer_whose_path_is_the_end_of_others_is_told_apart(tmp_path: Path) -> None:
    """FLUX has `proj_out` and `single_transformer_blocks.0.proj_out`; PEFT's config names layers by ends of paths."""
    weights = dict(layers_of(_pipeline("flux-dev"), ["transformer"]))
    generator = torch.Generator().manual_seed(0)
    last, inner = "transformer.proj_out", "transformer.single_transformer_blocks.0.proj_out"
    for number, ranks in enumerate([(2, 3), (3, 2)]):
        pairs = zip((last, inner), ranks, strict=True)
        original = AdapterState({path: lora(weights[path], generator, rank=rank) for path, rank in pairs})
        path = save_adapter(original, tmp_path / f"{number}.safetensors")
        pipe = build("flux-dev")
        pipe.load_lora_weights(str(path))
        assert_holds(peft_layers(pipe, LOADED["flux-dev"]), original)
        assert {path: module.rank for path, module in load_adapter(path).modules.items()} == {
            path: module.rank for path, module in original.modules.items()
        }


TARGETS = {
    "unet": ["to_q", "to_out.0", "proj_in", "conv1", "ff.net.2"],
    "transformer": ["to_q", "add_k_proj", "ff.net.2", "proj_mlp"],
    "text_encoder": ["q_proj", "fc1"],
    "text_encoder_2": ["q_proj", "fc2"],
}
CONFIGS: dict[str, dict[str, Any]] = {
    "LoRA": {"lora_alpha": 2},
    "DoRA": {"lora_alpha": 2, "use_dora": True},
    "DoRA, alpha is not the rank": {"lora_alpha": 5, "use_dora": True},
    "LoRA, alpha is not the rank": {"lora_alpha": 5},
    "rsLoRA DoRA": {"lora_alpha": 3, "use_rslora": True, "use_dora": True},
    "patterns": {
        "lora_alpha": 3,
        "use_dora": True,
        "rank_pattern": {"to_q": 1, "q_proj": 3},
        "alpha_pattern": {"to_q": 5, "layers.1.self_attn.q_proj": 7, "fc1": 9},
    },
}


def config_of(component: str, kind: str) -> LoraConfig:
    """PEFT takes no pattern that fits nothing."""
    settings = dict(CONFIGS[kind])
    for key in settings.keys() & {"rank_pattern", "alpha_pattern"}:
        known = {name: n for name, n in settings[key].items() if name.rpartition(".")[2] in TARGETS[component]}
        settings[key] = known
    return LoraConfig(r=2, target_modules=TARGETS[component], **settings)


def trained(name: str, kind: str) -> Any:
    """A pipeline with diffusers' own adapter in every part, as it were after training."""
    pipe = build(name)
    generator = torch.Generator().manual_seed(1)
    for component in LOADED[name]:
        model = getattr(pipe, component)
        model.add_adapter(config_of(component, kind))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_magnitude" in key:
                    parameter.mul_(0.6 + torch.rand(parameter.shape, generator=generator))
                elif "lora_" in key:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return pipe


def state_dicts(pipe: Any, name: str) -> dict[str, dict[str, Tensor]]:
    return {component: get_peft_model_state_dict(getattr(pipe, component)) for component in LOADED[name]}


def save(pipe: Any, name: str, folder: Path, *, metadata: bool, converted: bool = False) -> Path:
    """diffusers' `save_lora_weights`, as its training scripts call it."""
    layers = state_dicts(pipe, name)
    if converted:
        layers = {component: convert_state_dict_to_diffusers(tensors) for component, tensors in layers.items()}
    written_metadata = _collate_lora_metadata({part: getattr(pipe, part) for part in LOADED[name]}) if metadata else {}
    pipe.save_lora_weights(
        folder, **{f"{part}_lora_layers": tensors for part, tensors in layers.items()}, **written_metadata
    )
    return folder / "pytorch_lora_weights.safetensors"


def assert_means(
    adapter: AdapterState, before: dict[str, Tensor], after: dict[str, Tensor], tolerance: float = TOLERANCE
) -> None:
    """`adapter` changes exactly the layers that changed, and to the same weights."""
    changed = {path for path in before if not torch.equal(before[path], after[path])}
    assert adapter.modules.keys() == changed and changed
    for path in changed:
        assert_near(dense(before[path], adapter.modules[path]), after[path], tolerance)


def merged(pipe: Any, name: str) -> dict[str, Tensor]:
    """What diffusers fuses, in fp64."""
    in_fp64(pipe).fuse_lora(components=list(LOADED[name]))
    return weights_of(pipe, LOADED[name])


@pytest.mark.parametrize(
    "name, kind",
    [*(("sd1", kind) for kind in CONFIGS), ("sdxl", "patterns"), ("sd3", "patterns"), ("flux-dev", "patterns")],
)
def test_files_of_diffusers_with_metadata_mean_what_was_trained(tmp_path: Path, name: str, kind: str) -> None:
    pipe = trained(name, kind)
    path = save(pipe, name, tmp_path, metadata=True)
    assert detect_format(path) == "diffusers"
    adapter = load_adapter(path)
    assert adapter.is_dora == bool(CONFIGS[kind].get("use_dora")) and not adapter.extra
    assert_means(adapter, weights_of(build(name), LOADED[name]), merged(pipe, name))


def _bare(key: str) -> str:
    return key.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


def _dotted(key: str) -> str:
    return f"{key}.weight" if key.endswith("lora_magnitude_vector") else key


@pytest.mark.parametrize("spelling", [_bare, _dotted])
def test_both_spellings_of_magnitudes_are_read(tmp_path: Path, spelling: Callable[[str], str]) -> None:
    pipe = trained("sd1", "DoRA")
    path = save(pipe, "sd1", tmp_path, metadata=False)
    tensors = {spelling(key): tensor for key, tensor in load_file(path).items()}
    save_file(tensors, path)
    assert_means(load_adapter(path), weights_of(build("sd1"), LOADED["sd1"]), merged(pipe, "sd1"))


@pytest.mark.parametrize("name", ["sd1", "flux-dev"])
def test_without_metadata_alpha_is_the_rank_as_diffusers_has_it(tmp_path: Path, name: str) -> None:
    """The file has lost its alpha: what it means is what diffusers makes of it, not what was trained."""
    path = save(trained(name, "LoRA, alpha is not the rank"), name, tmp_path, metadata=False)
    fresh = build(name)
    before = weights_of(fresh, LOADED[name])
    fresh.load_lora_weights(str(path))
    assert_means(load_adapter(path), before, merged(fresh, name))


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_files_of_its_older_scripts_are_read(tmp_path: Path, name: str) -> None:
    """`lora.down`, `lora_linear_layer.down`: names from before PEFT, which some scripts still convert to."""
    pipe = trained(name, "LoRA")
    path = save(pipe, name, tmp_path, metadata=False, converted=True)
    assert any(".lora.down.weight" in key or "lora_linear_layer" in key for key in load_file(path))
    assert detect_format(path) == "old-diffusers"
    assert_means(load_adapter(path), weights_of(build(name), LOADED[name]), merged(pipe, name))


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_what_diffusers_converts_to_kohya_is_read(tmp_path: Path, name: str) -> None:
    pipe = trained(name, "LoRA")
    path = save(pipe, name, tmp_path, metadata=False)
    converted = convert_state_dict_to_kohya(load_file(path))
    save_file(converted, tmp_path / "kohya.safetensors")
    assert detect_format(tmp_path / "kohya.safetensors") == "kohya"
    adapter = load_adapter(tmp_path / "kohya.safetensors")
    assert not adapter.extra
    assert_means(adapter, weights_of(build(name), LOADED[name]), merged(pipe, name))


def _sdxl() -> Any:
    """SDXL of its published structure, in which kohya's names count blocks, and of tiny widths."""
    pipe = PIPELINES["sdxl"].build()
    changes = {
        "block_out_channels": (8, 16, 16),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 3),
    }
    pipe.unet = UNet2DConditionModel.from_config({**pipe.unet.config, **changes}).eval()
    return pipe


KOHYA: dict[str, Callable[[], Any]] = {
    "sd1": PIPELINES["sd1"].build,
    "sd2": PIPELINES["sd2"].build,
    "sdxl": _sdxl,
}


@pytest.mark.parametrize("name", KOHYA)
def test_diffusers_reads_our_kohya_file_alike(tmp_path: Path, name: str) -> None:
    """Every layer of the denoiser, convolutions too, and the text encoders; alpha is not the rank."""
    pipe = KOHYA[name]()
    weights = weights_of(pipe, LOADED[name])
    original = adapter_of(layers_of(pipe, LOADED[name]), lora)
    path = save_adapter(original, tmp_path / "a.safetensors", format="kohya")
    assert detect_format(path) == "kohya"
    pipe.load_lora_weights(str(path))
    assert_means(original, weights, merged(pipe, name))
    assert_means(load_adapter(path), weights, weights_of(pipe, LOADED[name]))


def _flux() -> dict[str, Tensor]:
    """Layers of FLUX.1 at full width, one block of each sort, without memory: diffusers knows them by their sizes."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
        clip = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=1))
    return dict(layers_of(SimpleNamespace(transformer=transformer, text_encoder=clip), LOADED["flux-dev"]))


def assert_same_low_rank(tensors: dict[str, Tensor], path: str, module: ModuleState) -> None:
    """diffusers' pair moves random inputs as ours does; the dense difference would be large."""
    x = torch.randn(module.down.shape[1], 4, dtype=torch.float64)
    down, up = tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"]
    module = module.to(dtype=torch.float64)
    assert_near(up.double() @ (down.double() @ x), module.scale * (module.up @ (module.down @ x)), ROUNDED)


# diffusers 0.42.1 converts these as well, but under names without `transformer.`, which it then does not load
OUTSIDE_BLOCKS = ("x_embedder", "context_embedder", "time_text_embed", "norm_out", "proj_out")


def test_diffusers_converts_our_kohya_file_of_flux_alike(tmp_path: Path) -> None:
    """Fused qkv and linear1 are split again, the text encoder is found, shift and scale of the last layer swapped."""
    generator = torch.Generator().manual_seed(0)
    original = AdapterState(
        {
            # diffusers forgets the alpha of the last layer
            path: lora(weight, generator, alpha=2.0 if path.split(".")[1] in OUTSIDE_BLOCKS else 3.0)
            for path, weight in _flux().items()
        }
    )
    path = save_adapter(original, tmp_path / "a.safetensors", format="kohya")
    tensors = convert_state_dict_to_peft(FluxPipeline.lora_state_dict(str(path)))
    assert len(tensors) == 2 * len(original.modules)
    for layer, module in original.modules.items():
        assert isinstance(module, ModuleState)
        is_outside = layer.split(".")[1] in OUTSIDE_BLOCKS
        name = layer.removeprefix("transformer.") if is_outside else layer
        name = name.replace("text_encoder.", "text_encoder.text_model.")
        assert_same_low_rank(tensors, name, module)
