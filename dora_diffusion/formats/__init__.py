"""Adapter files: `load_adapter` and `save_adapter`. Each format is one file with `recognises`, `read` and `write`."""

from pathlib import Path
from types import ModuleType

from dora_diffusion.formats import diffusers
from dora_diffusion.formats.container import read_header, read_tensors
from dora_diffusion.state import AdapterState
from dora_diffusion.storage import save_tensors

__all__ = ["FORMATS", "detect_format", "load_adapter", "read_header", "save_adapter"]

FORMATS: dict[str, ModuleType] = {"diffusers": diffusers}


def detect_format(path: str | Path) -> str:
    """The name of a file's format, from its header alone; a ValueError of one line when none fits."""
    keys = [key for key in read_header(path) if key != "__metadata__"]
    for name, module in FORMATS.items():
        if module.recognises(keys):
            return name
    example = f", first key {keys[0]!r}" if keys else ", no tensors"
    raise ValueError(f"{path}: no adapter format known here ({', '.join(FORMATS)}) fits its {len(keys)} keys{example}")


def load_adapter(path: str | Path) -> AdapterState:
    """Read an adapter file; its format is detected. Safetensors only, never a pickle.

    Raises:
        ValueError: one line that names the file and what is wrong.
    """
    module = FORMATS[detect_format(path)]
    tensors, metadata = read_tensors(path)
    try:
        adapter: AdapterState = module.read(tensors, metadata)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return adapter


def save_adapter(adapter: AdapterState, path: str | Path, *, format: str = "diffusers") -> Path:
    """Write an adapter file atomically; returns its path.

    Raises:
        ValueError: the format is unknown.
    """
    if format not in FORMATS:
        raise ValueError(f"format {format!r} is unknown: expected one of {', '.join(FORMATS)}")
    tensors, metadata = FORMATS[format].write(adapter)
    save_tensors(tensors, Path(path), metadata)
    return Path(path)
