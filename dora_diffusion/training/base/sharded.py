"""A base that no device has to hold whole: each process keeps a part of the denoiser's weights (torch's FSDP2).

A block is gathered for its forward and its backward, and let go. What is trained is small, and whole everywhere: it is
put in afterwards, and FSDP2 never hears of it. All processes have to do the same forwards in the same order.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dora_diffusion.families import family_of_pipeline


def shard_base(pipe: Any, device: torch.device) -> str:
    """Spread the denoiser of a base in main memory over the processes; the rest stays there.

    Args:
        pipe: the base, frozen, before any adapter is injected.
        device: of this process.

    Returns:
        How much of it each keeps, on one line.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    denoiser: nn.Module = getattr(pipe, family_of_pipeline(pipe).denoiser.name)
    whole = sum(parameter.nbytes for parameter in denoiser.parameters())
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    apart = _kept_whole(denoiser)
    ignored: dict[str, Any] = {"ignored_params": apart} if apart else {}  # which torch 2.6 has not
    for block in (*_blocks(denoiser), denoiser):
        fully_shard(block, mesh=mesh, reshard_after_forward=True, **ignored)
    for parameter in apart:
        parameter.data = parameter.data.to(device)
    held, processes = sum(_own(parameter).nbytes for parameter in denoiser.parameters()), mesh.size()
    share = f"{held / 2**20:.0f} MiB of {whole / 2**20:.0f}"
    return f"base       {type(pipe).__name__}'s denoiser spread over {processes} processes (FSDP2): {share} in each"


def _kept_whole(denoiser: nn.Module) -> set[nn.Parameter]:
    """Parameters that are no part of what is spread: FSDP2 takes one dtype and no scalars."""
    counts: dict[torch.dtype, int] = {}
    for parameter in denoiser.parameters():
        counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    main = max(counts, key=lambda dtype: counts[dtype])
    return {parameter for parameter in denoiser.parameters() if parameter.dtype != main or parameter.dim() == 0}


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules that stand in lists: what a denoiser repeats."""
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _blocks(child)


def _own(parameter: Tensor) -> Tensor:
    """What this process keeps of a parameter."""
    local: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return local
