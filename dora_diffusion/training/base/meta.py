"""A base without its weights: the pipeline's own classes, built from their configs on the meta device."""

import importlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dora_diffusion.pipelines.loading import EMBEDDED, configs_of, load_pipeline, read_index
from dora_diffusion.utils.quiet import quietly
from dora_diffusion.utils.text import first_line


def load_skeleton(source: str | Path, *, dtype: torch.dtype) -> Any:
    """As `load_pipeline`, but no weights are read: models are on the meta device, tokenizers and schedulers are true.

    A single file names no classes, so it is loaded and its weights let go.

    Raises:
        ValueError: one line that says what was looked for and what is there.
    """
    with quietly():
        return _load(source, dtype)


def _load(source: str | Path, dtype: torch.dtype) -> Any:
    folder = configs_of(source)
    if folder is None:
        return without_numbers(load_pipeline(source, dtype=dtype))
    is_local = str(source) in EMBEDDED or folder == Path(source)
    import diffusers

    index = dict(read_index(folder))
    kind = getattr(diffusers, index.pop("_class_name")[1])
    try:
        components = {
            name: _component(folder / name, *entry, dtype=dtype, has_weights=is_local) for name, entry in index.items()
        }
        settings = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        return pipeline_on_meta(kind, components, settings)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError) as error:
        raise ValueError(
            f"model {str(source)!r}: a base could not be built from its configs: {first_line(error)}"
        ) from None


def without_numbers(pipe: Any) -> Any:
    """Let a pipeline's weights go; those that two layers share stay shared."""
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            nn.Module.to(part, device="meta")
            getattr(part, "tie_weights", lambda: None)()
    return pipe


def _component(folder: Path, library: str, class_name: str, *, dtype: torch.dtype, has_weights: bool) -> Any:
    from diffusers import pipelines

    kind = getattr(getattr(pipelines, library, None) or importlib.import_module(library), class_name)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        return kind.from_pretrained(folder, local_files_only=True)
    if has_weights and not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} holds no .safetensors")
    return model_on_meta(kind, json.loads((folder / "config.json").read_text(encoding="utf-8")), dtype)


def model_on_meta(kind: Any, config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """A frozen model of diffusers or transformers that has shapes and no numbers.

    Args:
        kind: the class.
        config: as its `config.json` has it; what is not there is the class's default.
        dtype: of its floating-point tensors.
    """
    with torch.device("meta"):
        if hasattr(kind, "from_config"):
            model: nn.Module = kind.from_config(dict(config))
        else:
            model = kind(kind.config_class.from_dict(dict(config)))
    # tables of positions, which numpy computes, are not on the meta device yet; diffusers' own `to` warns of casts
    nn.Module.to(model, device="meta", dtype=dtype)
    return model.requires_grad_(False).eval()


def pipeline_on_meta(kind: Any, components: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    """A pipeline of given parts.

    Args:
        kind: a pipeline of diffusers.
        components: its parts by name; those it needs and that are not there are None.
        settings: other arguments, such as `requires_safety_checker`; what it does not take is left out.
    """
    arguments: dict[str, Any] = {}
    for name, parameter in list(inspect.signature(kind.__init__).parameters.items())[1:]:
        if name in components:
            arguments[name] = components[name]
        elif name in settings and not isinstance(settings[name], list):
            arguments[name] = settings[name]
        elif parameter.default is inspect.Parameter.empty:
            arguments[name] = None
    return kind(**arguments)
