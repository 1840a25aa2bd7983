"""A pipeline that somebody else has loaded, as the base of a run: it is given back as it was."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dora_diffusion.families import family_of_pipeline
from dora_diffusion.layers.quantisation import is_quantised
from dora_diffusion.training.config import BaseConfig

# What switching on gradient checkpointing, and drawing, leave behind.
_SWITCHES = ("training", "gradient_checkpointing", "_gradient_checkpointing_func", "use_slicing")


@contextmanager
def borrowed(pipe: Any, dtype: torch.dtype, device: torch.device, files: BaseConfig) -> Iterator[Any]:
    """The pipeline frozen, on a device and in a precision; afterwards tensors, modes and flags are what they were.

    Weights are not written to: those of another dtype or device are copies, and the pipeline's own come back, bit for
    bit. Quantised components stay as they are.

    Args:
        pipe: a diffusers pipeline.
        dtype: of the run.
        device: of the run.
        files: of the config, which must name no components.

    Raises:
        ValueError: one line: it is no pipeline of a known family, is offloaded, or the config names components too.
    """
    _check(pipe, files)
    modules = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    with ExitStack() as giving_back:
        for module in modules:
            giving_back.enter_context(_kept(module))
        bar, scheduler = dict(getattr(pipe, "_progress_bar_config", {})), pipe.scheduler
        for module in modules:
            module.requires_grad_(False)
            module.eval()
            _move(module, dtype, device)
        try:
            yield pipe
        finally:
            pipe.set_progress_bar_config(**bar)
            pipe.scheduler = scheduler


def _check(pipe: Any, files: BaseConfig) -> None:
    if not hasattr(pipe, "components"):
        raise ValueError(f"pipeline: got a {type(pipe).__name__}, expected a diffusers pipeline, loaded")
    family_of_pipeline(pipe)
    named = [name for name in ("transformer", "unet", "vae") if getattr(files, name) is not None]
    if named:
        raise ValueError(f"base.{named[0]}: names a file beside a pipeline that is given; put it into the pipeline")
    if files.quantise is not None:
        raise ValueError(
            f"base.quantise: got {files.quantise!r} beside a pipeline that is given; expected null, and "
            "load_pipeline(quantise=...) for the pipeline"
        )
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and (hasattr(part, "_hf_hook") or hasattr(part, "_diffusers_hook")):
            raise ValueError(
                f"pipeline: its {name} is offloaded, which does not go with training; load it without, or call its "
                "remove_all_hooks()"
            )


@contextmanager
def _kept(module: nn.Module) -> Iterator[None]:
    """Whatever is done meanwhile to a module's tensors by assignment, and to its switches, is undone."""
    tensors = [(tensor, tensor.data, tensor.requires_grad) for tensor in _tensors(module)]
    switches = [
        (part, {name: vars(part)[name] for name in _SWITCHES if name in vars(part)}) for part in module.modules()
    ]
    try:
        yield
    finally:
        for tensor, data, needs_gradient in tensors:
            tensor.data = data
            tensor.requires_grad_(needs_gradient)
        for part, values in switches:
            for name in _SWITCHES:
                vars(part).pop(name, None)
            vars(part).update(values)


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _move(module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """To a device and, where it is of another precision, to that."""
    if any(is_quantised(part) for part in module.modules()):
        return
    casts = next((tensor.dtype for tensor in module.parameters()), dtype) != dtype
    for tensor in _tensors(module):
        changes = casts and tensor.is_floating_point()
        tensor.data = tensor.data.to(device, dtype if changes else tensor.dtype)
