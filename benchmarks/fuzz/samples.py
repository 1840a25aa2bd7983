"""Sound adapter files: what every registered format writes, and keys as other tools spell them."""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.fuzz.parts import Parts, of_tensors, taken_apart
from dora_diffusion.formats import FORMATS, save_adapter
from dora_diffusion.state import AdapterState, FactoredState, Module, ModuleState

_SD1 = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1."
_CONV = "unet.mid_block.resnets.0.conv1"
_CLIP = "text_encoder.encoder.layers.0.self_attn.q_proj"
_FLUX = "transformer.transformer_blocks.0.attn."
_SINGLE = "transformer.single_transformer_blocks.0."


def _drawn(*shape: int) -> Tensor:
    return torch.randn(shape)


def _pair(out: int, columns: int, rank: int = 2, *, dora: bool = True) -> ModuleState:
    return ModuleState(_drawn(rank, columns), _drawn(out, rank), float(rank), _drawn(out).abs() if dora else None)


def _states() -> dict[str, AdapterState]:
    """Adapters of every algorithm; only names and shapes matter, so the sides are small."""
    conv = ModuleState(_drawn(2, 6, 3, 3), _drawn(8, 2, 1, 1), 1.0, _drawn(8).abs())
    tucker = ModuleState(_drawn(2, 6, 1, 1), _drawn(8, 2, 1, 1), 2.0, mid=_drawn(2, 2, 3, 3))
    loha = {name: _drawn(*((8, 2) if name.endswith("a") else (2, 6))) for name in _HADAMARD}
    lokr = {"lokr_w1": _drawn(2, 2), "lokr_w2_a": _drawn(4, 2), "lokr_w2_b": _drawn(2, 3)}
    factored: dict[str, Module] = {
        f"{_SD1}to_q": FactoredState("loha", loha, 0.5, 1.0, _drawn(8).abs()),
        f"{_SD1}to_k": FactoredState("lokr", lokr, 0.5, 1.0),
        f"{_SD1}to_v": FactoredState("full", {"diff": _drawn(8, 6)}),
        _CONV: tucker,
    }
    inner = replace_axis(_pair(8, 6))
    flux: dict[str, Module] = {f"{_FLUX}{name}": _pair(8, 8) for name in ("to_q", "to_k", "to_v", "to_out.0")}
    flux |= {f"{_SINGLE}attn.{name}": _pair(8, 8) for name in ("to_q", "to_k", "to_v")}
    flux |= {f"{_SINGLE}proj_mlp": _pair(32, 8)}
    metadata = {"note": "kept", "ss_network_args": '{"algo": "lora"}'}
    return {
        "DoRA": AdapterState({f"{_SD1}to_q": _pair(8, 6), _CLIP: _pair(6, 6), _CONV: conv}, metadata),
        "LoRA": AdapterState({f"{_SD1}to_q": _pair(8, 6, dora=False), _CLIP: _pair(6, 6, 3, dora=False)}, metadata),
        "factored": AdapterState(factored, metadata),
        "in-axis": AdapterState({f"{_SD1}to_q": inner, f"{_SD1}to_k": _pair(8, 6)}, metadata),
        "flux": AdapterState(flux, metadata),
        "vectors": AdapterState(
            {f"{_SD1}to_q": _pair(8, 6)}, metadata, {"unet.down_blocks.0.attentions.0.norm.weight": _drawn(8)}
        ),
    }


_HADAMARD = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


def replace_axis(module: ModuleState) -> ModuleState:
    """The same pair with a magnitude for each input."""
    return ModuleState(module.down, module.up, module.alpha, _drawn(module.down.shape[1]).abs(), axis="in")


def _kohya(layer: str, out: int, columns: int, **more: Tensor) -> dict[str, Tensor]:
    pair = {"lora_down.weight": _drawn(2, columns), "lora_up.weight": _drawn(out, 2), "alpha": torch.tensor(1.0)}
    return {f"{layer}.{part}": tensor for part, tensor in {**pair, **more}.items()}


def _lycoris(layer: str, parts: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {f"{layer}.{part}": _drawn(*shape) for part, shape in parts.items()}


def _peft(layer: str, out: int, columns: int, magnitude: str = "lora_magnitude_vector") -> dict[str, Tensor]:
    pair = {"lora_A.weight": _drawn(2, columns), "lora_B.weight": _drawn(out, 2), magnitude: _drawn(out).abs()}
    return {f"{layer}.{part}": tensor for part, tensor in pair.items()}


_XLABS = {"down": (2, 8), "up": (24, 2)}
_GLORA = {"a1": (6, 2), "a2": (2, 6), "b1": (8, 2), "b2": (2, 6)}


def _foreign() -> dict[str, tuple[dict[str, Tensor], dict[str, str]]]:
    """Keys of tools, spelt by hand: a format that is not registered yet must be refused in a line all the same."""
    block = "down_blocks.0.attentions.0.transformer_blocks.0.attn1."
    sd1, flux = f"lora_unet_{block.replace('.', '_')}to_", "transformer_blocks.0.attn.to_q"
    sdxl = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    clip = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    loha = {name: (8, 2) if name.endswith("a") else (2, 6) for name in _HADAMARD}
    config = {"ss_network_module": "lycoris.kohya", "ss_network_args": '{"wd_on_output": "True"}'}
    return {
        "kohya": ({**_kohya(f"{sd1}q", 8, 6, dora_scale=_drawn(8, 1)), **_kohya(clip, 6, 6)}, config),
        "kohya SDXL": (_kohya(sdxl, 8, 6, dora_scale=_drawn(1, 6)), config),
        "kohya FLUX": (_kohya("lora_unet_double_blocks_0_img_attn_qkv", 24, 8), {"ss_base_model_version": "flux1"}),
        "kohya SD3": (_kohya("lora_unet_joint_blocks_0_x_block_attn_qkv", 24, 8), {}),
        "LyCORIS": (
            {
                **_lycoris(f"{sd1}q", {**loha, "alpha": (), "dora_scale": (8, 1)}),
                **_lycoris(f"{sd1}k", {"lokr_w1": (2, 2), "lokr_w2": (4, 3), "alpha": ()}),
                **_lycoris(f"{sd1}v", {"diff": (8, 6), "diff_b": (8,)}),
                **_lycoris("lora_unet_down_blocks_0_resnets_0_norm1", {"w_norm": (8,), "b_norm": (8,)}),
            },
            config,
        ),
        "LyCORIS wrapper": (_kohya("lycoris_transformer_blocks_0_attn_to_q", 8, 8), {}),
        "ComfyUI": (_peft("diffusion_model.double_blocks.0.img_attn.qkv", 24, 8, "dora_scale"), {}),
        "OneTrainer legacy": (_kohya("lora_transformer_transformer_blocks_0_attn_to_q", 8, 8), {"ot_branch": "x"}),
        "OMI": (_kohya("transformer.double_blocks.0.img_attn.qkv.0", 8, 8), {}),
        "original": (_peft("double_blocks.0.img_attn.qkv", 24, 8, "dora_scale"), {}),
        "ai-toolkit": (_peft(f"transformer.{flux}", 8, 8, "magnitude"), {}),
        "PEFT": (_peft(f"base_model.model.{block}to_q", 8, 6), {}),
        "old diffusers": (
            {
                f"unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.{half}.weight": _drawn(
                    *shape
                )
                for half, shape in (("down", (2, 6)), ("up", (8, 2)))
            },
            {},
        ),
        "bare": (_kohya(flux, 8, 8), {}),
        "XLabs": (
            {f"double_blocks.0.processor.qkv_lora1.{half}.weight": _drawn(*shape) for half, shape in _XLABS.items()},
            {},
        ),
        "a prefix twice": (_kohya(f"lora_unet_unet_{block.replace('.', '_')}to_q", 8, 6), {}),
        "OFT": (_lycoris(f"{sd1}q", {"oft_blocks": (4, 2, 2), "rescale": (8, 1), "alpha": ()}), config),
        "BOFT": (_lycoris(f"{sd1}q", {"oft_blocks": (2, 2, 4, 4), "alpha": ()}), config),
        "GLoRA": (_lycoris(f"{sd1}q", {f"{name}.weight": shape for name, shape in _GLORA.items()}), config),
        "(IA)^3": (_lycoris(f"{sd1}q", {"weight": (8,), "on_input": ()}), config),
        "another kind": (_lycoris(f"{sd1}q", {"q_layer.weight": (2, 6), "lambda_layer": (1, 2)}), config),
        "another model": (_peft("diffusion_model.blocks.0.self_attn.q", 8, 8, "dora_scale"), {}),
        "bundled words": ({**_kohya(f"{sd1}q", 8, 6), "bundle_emb.robot.clip_l": _drawn(2, 6)}, {}),
        "a word": ({"emb_params": _drawn(2, 6)}, {}),
        "half precision": ({key: tensor.half() for key, tensor in _kohya(f"{sd1}q", 8, 6).items()}, {}),
        "no adapter": ({"model.diffusion_model.input_blocks.0.0.weight": _drawn(8, 4, 3, 3)}, {}),
    }


def sound_files(seed: int = 0) -> dict[str, Parts]:
    """Name -> a sound file: all that the registered formats write of every adapter, and other tools' keys."""
    torch.manual_seed(seed)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, state in _states().items():
            for name in FORMATS:
                if (parts := _written(state, name, Path(folder))) is not None:
                    found[f"{name}: {kind}"] = parts
    return found | {f"by hand: {name}": of_tensors(*made) for name, made in _foreign().items()}


def _written(state: AdapterState, name: str, folder: Path) -> Parts | None:
    """None where the format cannot hold the adapter; of a folder the first file of weights."""
    path = folder / f"{len(list(folder.iterdir()))}-{name}{'' if name == 'peft' else '.safetensors'}"
    try:
        save_adapter(state, path, format=name)
    except ValueError:
        return None
    return taken_apart(min(path.rglob("*.safetensors"), default=path).read_bytes())
