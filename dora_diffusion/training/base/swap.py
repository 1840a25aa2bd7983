"""Blocks of a denoiser that wait in main memory, and come to the device for their forward and their backward.

Frozen weights alone are swapped: what is trained stays, and nothing has to be carried back. A block's storages are
emptied rather than replaced, so that the views that autograd has saved of them are whole again when the block is: it
works with gradient checkpointing and without. A block comes before its forward and before the first gradient of what
it returned, and goes when another one comes; on a CUDA device the one that came after it last time is brought
meanwhile, on a stream of its own. Norms that are refreshed read a layer's weight from main memory.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dora_diffusion.layers.dora import Adapter
from dora_diffusion.layers.offloaded import empty, fill, is_away, make_room, plain_tensors, release, settle
from dora_diffusion.training.base.blocks import repeated_blocks


class _Block:
    """A block that is swapped.

    Attributes:
        tensors: its frozen ones.
        ready: of a block that is being brought, what to wait for.
    """

    def __init__(self, module: nn.Module, tensors: Sequence[Tensor]) -> None:
        self.module, self.tensors = module, tensors
        self.ready: torch.cuda.Event | None = None

    @property
    def is_whole(self) -> bool:
        """Whether its storages are full, or are being filled."""
        return not any(map(is_away, self.tensors))

    @property
    def is_gone(self) -> bool:
        """Whether its storages are empty."""
        return all(map(is_away, self.tensors))

    def leave(self) -> None:
        """Give its memory back, once nothing writes to it any more."""
        self.wait()
        for tensor in self.tensors:
            empty(tensor)

    def wait(self) -> None:
        """Let what comes now on this stream wait until the block is whole."""
        if self.ready is not None:
            torch.cuda.current_stream().wait_event(self.ready)
            self.ready = None

    def come(self) -> None:
        """Bring its numbers."""
        for tensor in self.tensors:
            fill(tensor)


class BlockSwap:
    """The blocks of a model that are swapped; `remove` brings all back.

    Args:
        model: with its adapters in place; quantised blocks too.
        count: of blocks that are swapped, at equal distances, so that those between give time for the next.
        device: of the forward.

    Raises:
        ValueError: the model has fewer blocks.
    """

    def __init__(self, model: nn.Module, count: int, device: torch.device) -> None:
        blocks = list(repeated_blocks(model).values())
        if count > len(blocks):
            raise ValueError(
                f"base.swap_blocks: got {count}, but {type(model).__name__} has {len(blocks)} blocks; expected at most "
                f"{len(blocks)}"
            )
        shared = _shared(model)
        self.model, self._device = model, device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._blocks = [self._settled(blocks[number * len(blocks) // count], shared) for number in range(count)]
        self._after: dict[tuple[bool, int], int] = {}
        self._last: tuple[bool, int] | None = None
        self._handles = [
            handle for number, block in enumerate(self._blocks) for handle in self._hooked(number, block.module)
        ]

    def rest(self) -> None:
        """Send every block away, until one is asked for."""
        for block in self._blocks:
            if not block.is_gone:
                block.leave()

    def remove(self) -> None:
        """Bring every block back, to stay."""
        for handle in self._handles:
            handle.remove()
        for block in self._blocks:
            block.wait()
            for tensor in block.tensors:
                release(tensor)
        self._blocks, self._handles = [], []

    def _settled(self, module: nn.Module, shared: set[int]) -> _Block:
        """A block whose frozen tensors have homes in main memory, and empty storages on the device."""
        module.to(self._device)
        tensors = [plain for tensor in _frozen(module) if id(tensor) not in shared for plain in plain_tensors(tensor)]
        for tensor in tensors:
            settle(tensor, is_pinned=self._stream is not None)
            empty(tensor)
        return _Block(module, tensors)

    def _hooked(self, number: int, module: nn.Module) -> Iterator[Any]:
        def before(module: nn.Module, arguments: Any) -> None:
            self._bring(number, in_backward=torch._C._current_graph_task_id() != -1)

        def after(module: nn.Module, arguments: Any, returned: Any) -> None:
            for leaf in tree_leaves(returned):
                if isinstance(leaf, Tensor) and leaf.requires_grad:
                    leaf.register_hook(before_backward)

        def before_backward(gradient: Tensor) -> None:
            self._bring(number, in_backward=True)

        yield module.register_forward_pre_hook(before)
        yield module.register_forward_hook(after)

    @torch.no_grad()
    def _bring(self, number: int, *, in_backward: bool) -> None:
        """Have a block here, all others but the next away."""
        block, now = self._blocks[number], (in_backward, number)
        if self._last == now and block.is_whole and block.ready is None:
            return
        if self._last is not None and self._last != now:
            self._after[self._last] = number
        self._last = now
        for other in self._blocks:
            if other is not block and not other.is_gone:
                other.leave()
        if not block.is_whole:
            block.come()
        block.wait()
        self._prefetch(now)

    def _prefetch(self, now: tuple[bool, int]) -> None:
        """Begin to bring the block that came after this one last time."""
        following = self._after.get(now)
        if self._stream is None or following is None or self._blocks[following].is_whole:
            return
        block, here = self._blocks[following], torch.cuda.current_stream(self._device)
        for tensor in block.tensors:  # memory of this stream: what was in it before is done with when it is written
            make_room(tensor)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            block.come()
            block.ready = self._stream.record_event()


def _shared(model: nn.Module) -> set[int]:
    """Ids of tensors that stand in several places; they stay."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    counts = Counter(id(tensor) for _, tensor in named)
    return {key for key, count in counts.items() if count > 1}


def _frozen(module: nn.Module) -> list[Tensor]:
    """A block's frozen tensors, without those of adapters, which are read outside of its forward too."""
    parts = [part for part in module.modules() if not isinstance(part, Adapter)]
    own = [tensor for part in parts for tensor in (*part.parameters(False), *part.buffers(False))]
    return [tensor for tensor in own if not tensor.requires_grad]


def swapped_bytes(model: nn.Module, count: int) -> int:
    """What so many swapped blocks spare of a model's frozen weights: all but the two largest, one in use, one to come.

    Args:
        model: with its adapters in place, its tensors with numbers or with shapes alone.
        count: of blocks.
    """
    blocks = list(repeated_blocks(model).values())
    chosen = [blocks[number * len(blocks) // count] for number in range(count)] if count else []
    return sum(sorted((sum(tensor.nbytes for tensor in _frozen(block)) for block in chosen), reverse=True)[2:])
