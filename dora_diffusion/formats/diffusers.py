"""diffusers' adapter files: `unet.PATH.lora_A.weight`, `.lora_B.weight`, `.lora_magnitude_vector.weight`.

Two facts decide how it is written. Readers that ignore the metadata take alpha = rank, so the scale is folded into B.
transformers' loader loses a magnitude spelt without `.weight`, so it is written with it; both spellings are read.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dora_diffusion.state import AdapterState, ModuleState

_KEY = re.compile(r"^(?P<path>.+)\.(?P<part>lora_A|lora_B|lora_magnitude_vector)(\.weight)?$")
_CLIP_PREFIX = re.compile(r"^(text_encoder(?:_\d)?)\.text_model\.")
METADATA_KEY = "lora_adapter_metadata"


def recognises(keys: list[str]) -> bool:
    """Whether the keys are of this format."""
    return any(key.endswith(".lora_A.weight") for key in keys)


def read(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> AdapterState:
    """Tensors of a file -> AdapterState.

    Raises:
        ValueError: a key that is no adapter's, a layer with half a pair, or malformed metadata.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        found = _KEY.match(key)
        if not found:
            raise ValueError(f"{key}: not a key of a diffusers adapter file")
        path = _CLIP_PREFIX.sub(r"\1.", found["path"])
        parts.setdefault(path, {})[found["part"]] = tensor
    scales = _Scales(metadata)
    return AdapterState({path: _module(path, found, scales) for path, found in parts.items()}, dict(metadata))


def _module(path: str, parts: Mapping[str, Tensor], scales: "_Scales") -> ModuleState:
    if missing := {"lora_A", "lora_B"} - parts.keys():
        raise ValueError(f"{path}: {min(missing)}.weight is missing")
    down, up, magnitude = parts["lora_A"], parts["lora_B"], parts.get("lora_magnitude_vector")
    if down.dim() not in (2, 4) or up.dim() != down.dim() or down.shape[0] != up.shape[1] or not down.numel():
        raise ValueError(f"{path}: A {tuple(down.shape)} and B {tuple(up.shape)} are no low-rank pair")
    if magnitude is not None and magnitude.numel() != up.shape[0]:
        raise ValueError(f"{path}: magnitude has shape {tuple(magnitude.shape)}, expected ({up.shape[0]},)")
    alpha, stabilised = scales.of(path, down.shape[0])
    return ModuleState(down, up, alpha, None if magnitude is None else magnitude.reshape(-1), stabilised)


class _Scales:
    """Alpha of each layer, from PEFT's config in the metadata; without one alpha is the rank."""

    def __init__(self, metadata: Mapping[str, str]) -> None:
        try:
            self._config: dict[str, Any] = json.loads(metadata.get(METADATA_KEY, "{}"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"metadata {METADATA_KEY} is not JSON ({error})") from None
        if not isinstance(self._config, dict):
            raise ValueError(f"metadata {METADATA_KEY}: expected a JSON object")
        for key, value in self._config.items():
            if key.endswith(".alpha_pattern") and not isinstance(value, dict | None):
                raise ValueError(f"metadata {METADATA_KEY}: {key} is {value!r}, expected an object")

    def of(self, path: str, rank: int) -> tuple[float, bool]:
        """(alpha, rank-stabilised) of a layer."""
        component, inner = path.split(".", 1) if "." in path else ("", path)
        patterns = self._config.get(f"{component}.alpha_pattern") or {}
        alpha = self._config.get(f"{component}.lora_alpha", rank)
        # PEFT takes patterns as regular expressions, the first that fits; a stranger's expression is never run here,
        # and what PEFT and diffusers write are plain ends of paths
        ending = next((name for name in patterns if inner == name or inner.endswith("." + name)), None)
        alpha = alpha if ending is None else patterns[ending]
        is_number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
        if not is_number or not abs(alpha) < 1e30:
            raise ValueError(f"metadata {METADATA_KEY}: alpha of {path} is {str(alpha)[:40]}, expected a number")
        return float(alpha), bool(self._config.get(f"{component}.use_rslora", False))


def write(adapter: AdapterState) -> tuple[dict[str, Tensor], dict[str, str]]:
    """AdapterState -> tensors and metadata of a file; a ValueError when the format cannot hold it."""
    tensors: dict[str, Tensor] = {}
    for path, kept in adapter.modules.items():
        module = kept.as_pair()
        if module.magnitude is not None and module.axis != "out":
            raise ValueError(f"{path}: diffusers' format has magnitudes of the out axis only, got the in axis")
        key = _file_path(path)
        tensors[f"{key}.lora_A.weight"] = module.down
        tensors[f"{key}.lora_B.weight"] = module.up if module.scale == 1 else module.up * module.scale
        if module.magnitude is not None:
            # PEFT keeps a convolution's magnitude as (1, out, 1, 1)
            shape = (1, -1, 1, 1) if module.down.dim() == 4 else (-1,)
            tensors[f"{key}.lora_magnitude_vector.weight"] = module.magnitude.reshape(shape)
    config = {name: value for part in adapter.components for name, value in _peft_config(adapter, part).items()}
    return tensors, {**adapter.metadata, "format": "pt", METADATA_KEY: json.dumps(config, sort_keys=True)}


def _file_path(path: str) -> str:
    component, inner = path.split(".", 1)
    is_clip = component.startswith("text_encoder") and inner.startswith("encoder.layers.")
    return f"{component}.text_model.{inner}" if is_clip else path


def _peft_config(adapter: AdapterState, component: str) -> dict[str, Any]:
    """What PEFT needs to know of one component, with the scale already folded into B (alpha = rank).

    PEFT matches the end of a path, so paths without `text_model.` fit every version of transformers.
    """
    paths = {path.split(".", 1)[1]: m for path, m in adapter.modules.items() if path.startswith(component + ".")}
    ranks = [module.rank for module in paths.values()]
    common = max(set(ranks), key=ranks.count)
    other = {path: module.rank for path, module in paths.items() if module.rank != common}
    config = {
        "r": common,
        "lora_alpha": common,
        "rank_pattern": other,
        "alpha_pattern": other,
        "target_modules": sorted(paths),
        "use_dora": any(module.magnitude is not None for module in paths.values()),
        "use_rslora": False,
    }
    return {f"{component}.{name}": value for name, value in config.items()}
