"""Load a base: the embedded pocket, a diffusers folder, or a hub id."""

import contextlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

POCKET = Path(__file__).parent / "assets" / "pocket"


def load_pipeline(source: str | Path = "pocket", *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """A diffusers pipeline, ready to draw.

    Args:
        source: "pocket", a folder in diffusers' layout, or a hub id such as `owner/name`.
        dtype: of the weights in memory.
        device: "cpu", "cuda", "mps".

    Raises:
        ValueError: one line that says what was looked for and what is there.
    """
    from diffusers import DiffusionPipeline

    folder = POCKET if str(source) == "pocket" else Path(source)
    is_folder = folder.is_dir()
    if is_folder and not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder}: no model_index.json there; expected a folder in diffusers' layout")
    if not is_folder and (folder.suffix or str(source).count("/") != 1 or str(source).startswith((".", "/"))):
        raise ValueError(f"model {str(source)!r}: no such folder; expected 'pocket', a diffusers folder or a hub id")
    name = str(folder) if is_folder else str(source)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from None
    try:
        with _quiet_progress():
            pipe = DiffusionPipeline.from_pretrained(
                name, dtype=dtype, use_safetensors=True, local_files_only=is_folder
            )
    except (OSError, ValueError, SafetensorError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        where = "folder" if is_folder else "hub (offline, or no such model)"
        raise ValueError(f"model {name!r} could not be loaded from the {where}: {first_line}") from None
    return pipe.to(device)


@contextlib.contextmanager
def _quiet_progress() -> Any:
    """Components that load in a moment need no progress bars."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in libraries:
            library.enable_progress_bar()
