"""No file is written under names that nobody reads: each layer of a published model, and layers of no model known here.

ComfyUI reads `lora_unet_` before the makers' names with underscores for dots, and for UNets diffusers' names too
(`comfy/lora.py`); what the makers' names are is judged by diffusers' own converters in `test_dit_layouts.py`.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.full_size.published import PUBLISHED
from dora_diffusion.formats import FORMATS, load_adapter, save_adapter
from dora_diffusion.formats.dialects import PEFT_FILE
from dora_diffusion.formats.flat_names import flatten
from dora_diffusion.formats.reading import FAMILY_KEY
from dora_diffusion.formats.writing import write
from dora_diffusion.layers.config import DoRAConfig
from dora_diffusion.layers.injection import inject
from dora_diffusion.state import AdapterState, ModuleState
from tests.formats.test_any_part_of_a_model import layers_of, module
from tests.tolerances import assert_identical

ANY_MODEL = {"diffusers", "peft", "lycoris"}


def names_in(state: AdapterState, format: str) -> set[str]:
    tensors, _ = write(state, FORMATS[format])
    return {key.partition(".lora_")[0].removesuffix(".alpha") for key in tensors}


@pytest.mark.parametrize("name", sorted(model.name for model in PUBLISHED))
def test_kohya_names_are_the_makers_own_or_a_unet_s(name: str) -> None:
    family, shapes = layers_of(name)
    denoiser = {path: module(shape, "pair") for path, shape in shapes.items() if not path.startswith("text_encoder")}
    state = AdapterState(denoiser, {FAMILY_KEY: family})
    kohya = names_in(state, "kohya")
    if family in ("sd1", "sd2", "sana", "z-image"):
        assert kohya == {f"lora_unet_{flatten(path.partition('.')[2])}" for path in denoiser}
        return
    makers = {name.removeprefix("diffusion_model.") for name in names_in(state, "comfyui")}
    assert kohya == {f"lora_unet_{flatten(name)}" for name in makers}
    assert makers == {name for name in names_in(state, "original")}


@pytest.mark.parametrize("name", sorted(model.name for model in PUBLISHED))
def test_a_layer_that_the_makers_have_no_name_for_is_refused_by_name(name: str) -> None:
    family, shapes = layers_of(name)
    denoiser = next(path.split(".")[0] for path in shapes if not path.startswith("text_encoder"))
    known = next(path for path in shapes if path.startswith(denoiser))
    strange = f"{denoiser}.of_mine.to_q"
    state = AdapterState({known: module(shapes[known], "pair"), strange: module((8, 8), "pair")}, {FAMILY_KEY: family})
    for format in sorted(set(FORMATS) - ANY_MODEL):
        refusal = f"^{strange}: no model known here has this layer, and nobody reads a {format}"
        if (format, denoiser) == ("old-diffusers", "transformer"):
            refusal = "^the old-diffusers format has no name for transformer"
        with pytest.raises(ValueError, match=refusal):
            write(state, FORMATS[format])


class Mine(nn.Module):
    """A model of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 6)


def own(component: str) -> AdapterState:
    injection = inject(Mine(), DoRAConfig(rank=2, alpha=2, target_modules=["first", "second"]))
    return injection.state().under(component)


@pytest.mark.parametrize("component", ["unet", "transformer"])
@pytest.mark.parametrize("format", sorted(FORMATS))
def test_a_model_of_one_s_own_is_written_for_itself_alone(tmp_path: Path, component: str, format: str) -> None:
    state = own(component)
    path = tmp_path / ("mine" if FORMATS[format] is PEFT_FILE else "mine.safetensors")
    if format not in ANY_MODEL:
        with pytest.raises(ValueError) as refused:
            save_adapter(state, path, format=format)
        expected = (
            f"nobody reads a {format} file with it; write peft or diffusers, which the model's own pipeline reads, or "
            "lycoris, for LyCORIS' wrapper"
        )
        if (format, component) == ("old-diffusers", "transformer"):
            expected = (
                "the old-diffusers format has no name for transformer of an unknown family; choose another format"
            )
        assert str(refused.value).endswith(expected)
        assert not path.exists()
        return
    save_adapter(state, path, format=format)
    if format == "lycoris":
        return  # its wrapper asks the model; flat names of an unknown one have no dots of their own
    again = load_adapter(path)
    assert again.modules.keys() == state.modules.keys()
    for layer, mine in state.modules.items():
        assert_identical(again.modules[layer].delta(), mine.delta())
    fresh = inject(Mine(), DoRAConfig(rank=2, alpha=2, target_modules=["first", "second"]))
    fresh.load(AdapterState({layer.partition(".")[2]: found for layer, found in again.modules.items()}))


def pair(path: str, out: int, columns: int) -> dict[str, Any]:
    return {path: ModuleState(torch.ones(2, columns), torch.ones(out, 2), 2.0)}


def test_layers_of_several_families_are_asked_about_where_their_makers_call_them_differently() -> None:
    state = AdapterState(pair("transformer.transformer_blocks.0.attn.to_q", 3072, 3072))
    for format in ("kohya", "comfyui", "original", "omi"):
        with pytest.raises(
            ValueError, match=rf"^the {format} format has the makers' names .* those of .*flux.* or .*: say "
        ):
            write(state, FORMATS[format])
    told = AdapterState(state.modules, {FAMILY_KEY: "flux"})
    assert names_in(told, "kohya") == {"lora_unet_double_blocks_0_img_attn_qkv"}


def test_a_unet_s_layers_may_leave_open_which_unet() -> None:
    path = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    assert names_in(AdapterState(pair(path, 640, 640)), "kohya") == {f"lora_{flatten(path)}"}


@pytest.mark.parametrize("format", ["kohya", "comfyui", "omi"])
def test_shares_that_no_published_model_has_are_refused(format: str) -> None:
    single = "transformer.single_transformer_blocks.0"
    state = AdapterState(pair(f"{single}.attn.to_q", 8, 8) | pair(f"{single}.proj_mlp", 16, 8), {FAMILY_KEY: "flux"})
    with pytest.raises(
        ValueError, match=r"proj_mlp: the .* needs its original name, .* for flux of these dimensions, and nobody"
    ):
        write(state, FORMATS[format])
