"""One component of a pipeline from a file of its own: a transformer or UNet in any precision, a VAE, a GGUF.

Its config comes from the base's folder. Files are read here, checked, and given to diffusers as tensors; GGUF is
diffusers' own reader's.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dora_diffusion.formats.safetensors_reader import read_tensors
from dora_diffusion.utils.text import first_line

_SCALES = (".scale_weight", ".weight_scale", ".weight_scale_inv")
_OF_TOOLS = ("scaled_fp8", ".scale_input", ".input_scale", ".comfy_quant")
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")


def load_component(kind: Any, path: Path, folder: Path, dtype: torch.dtype) -> nn.Module:
    """A model of a class from a file, as the config in a folder has it.

    Args:
        kind: a class of diffusers.
        path: `.safetensors` in diffusers' names or the makers', fp8 with scales included, or `.gguf`.
        folder: the component's folder in the base, with its config.json.
        dtype: of the weights in memory; of GGUF's, which stay as they are, what they compute in.

    Raises:
        ValueError: one line: no such file, another kind of file, or not this model's weights.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected the weights of a {kind.__name__}")
    if path.suffix == ".gguf":
        return _from_gguf(kind, path, folder, dtype)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: expected a .safetensors or .gguf file of a {kind.__name__}; convert it first")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors = read_tensors(path).tensors
    try:
        tensors = dense(tensors, dtype)
        model = _with_own_names(kind, tensors, config, dtype)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    model = model or _with_makers_names(kind, path, tensors, folder, dtype)
    model.eval()
    return model


def dense(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights as they are meant: fp8 times its scale (one number, or one a row), in a dtype; without tools' notes."""
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key.endswith(_SCALES) or key.endswith(_OF_TOOLS):
            continue
        scale = next((tensors[name] for name in _scale_names(key) if name in tensors), None)
        if scale is not None and scale.numel() not in (1, tensor.shape[0]):
            raise ValueError(
                f"{key}: scales of shape {tuple(scale.shape)} are not read here; expected one, or one a row"
            )
        if scale is not None:
            tensor = tensor.float() * scale.float().reshape(-1, *[1] * (tensor.dim() - 1))
        found[key] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return found


def _scale_names(key: str) -> list[str]:
    """What tools call the scale of a weight: ComfyUI's and BFL's."""
    layer = key.removesuffix(".weight")
    return [] if layer == key else [layer + ending for ending in _SCALES]


def _with_own_names(kind: Any, tensors: Mapping[str, Tensor], config: Any, dtype: torch.dtype) -> nn.Module | None:
    """The model, where the file has diffusers' own names: every one of them; what else it holds is left."""
    with torch.device("meta"):
        own = kind.from_config(config).state_dict()
    names = own.keys()
    for prefix in ("", *_PREFIXES):
        found = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        if names <= found.keys():
            if wrong := [name for name in names if found[name].shape != own[name].shape]:
                got, expected = tuple(found[wrong[0]].shape), tuple(own[wrong[0]].shape)
                raise ValueError(f"{wrong[0]} is {got}, expected {expected}: the weights of another {kind.__name__}")
            model: nn.Module = kind.from_config(config)  # not of the meta device: it has buffers that no file holds
            model.load_state_dict({name: found[name] for name in names}, assign=True)
            return model.to(dtype)
    return None


def _with_makers_names(
    kind: Any, path: Path, tensors: Mapping[str, Tensor], folder: Path, dtype: torch.dtype
) -> nn.Module:
    read = getattr(kind, "from_single_file", None)
    if read is None:
        raise ValueError(f"{path}: not the weights of a {kind.__name__} in diffusers' names, the only ones it has")
    is_whole = any(key.startswith(_PREFIXES) for key in tensors)
    model, why = None, ""
    for prefix in ("",) if is_whole else ("", _PREFIXES[0]):  # some converters look for it in files of one model, too
        try:
            given = {prefix + key: tensor for key, tensor in tensors.items()}
            model = read(given, config=str(folder), dtype=dtype, local_files_only=True)
            break
        except Exception as error:  # converters are written for whole files of this model's makers
            why = why or first_line(error)
    if model is None:
        raise ValueError(f"{path}: not the weights of this {kind.__name__}: {why}")
    if missing := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise ValueError(f"{path} lacks {len(missing)} weights of this {kind.__name__}, {missing[0]} first")
    found: nn.Module = model
    return found


def _from_gguf(kind: Any, path: Path, folder: Path, dtype: torch.dtype) -> nn.Module:
    from diffusers import GGUFQuantizationConfig

    try:
        model: nn.Module = kind.from_single_file(
            str(path),
            config=str(folder),
            quantization_config=GGUFQuantizationConfig(compute_dtype=dtype),
            dtype=dtype,
            local_files_only=True,
        )
    except ImportError as error:
        raise ValueError(f"{path}: GGUF needs a library: pip install gguf ({first_line(error)})") from None
    except Exception as error:  # as above
        raise ValueError(f"{path}: not the weights of this {kind.__name__}: {first_line(error)}") from None
    return model
