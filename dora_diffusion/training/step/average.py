"""What is drawn, measured and saved where that is an average of what is trained, and no state of it.

Either an exponential moving average beside any optimiser (`optim.ema_decay`, diffusers' EMAModel), or that of an
optimiser that averages by itself (schedule-free, arXiv 2405.15682).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dora_diffusion.training.base.trainable import TrainablePipeline
from dora_diffusion.training.config import OptimConfig


def _nothing() -> None:
    return


@dataclass(frozen=True)
class Average:
    """An average of what is trained; as it is made without arguments, there is none.

    Attributes:
        parameters: those that make room for it.
        put_in: writes it into them.
        taken_out: told when they are about to be as they were.
        changed: told when either has been done, which libraries do where autograd does not see it.
        tensors: name -> all that a checkpoint must hold of it beside what is trained; filled in place.
    """

    parameters: Sequence[nn.Parameter] = ()
    put_in: Callable[[], object] = _nothing
    taken_out: Callable[[], object] = _nothing
    changed: Callable[[], object] = _nothing
    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """While the block lasts the average stands where what is trained was; that comes back bit for bit."""
        kept = [parameter.detach().clone() for parameter in self.parameters]
        self.put_in()
        self.changed()
        try:
            yield
        finally:
            self.taken_out()
            with torch.no_grad():
                for parameter, value in zip(self.parameters, kept, strict=True):
                    parameter.copy_(value)
            self.changed()


def average_of(trainable: TrainablePipeline, optimizer: Any, optim: OptimConfig) -> Average:
    """The average that a run shows; from now on the steps of the optimiser keep it.

    Args:
        trainable: what is trained.
        optimizer: over it; one that averages by itself is ready to train.
        optim: whether there is one, and its decay.
    """
    if optim.kind.averages:
        # there and back by the optimiser's own `train()` would be rounded, so what was there is kept
        return Average(trainable.parameters(), optimizer.eval, optimizer.train, trainable.forget_norms)
    if optim.ema_decay is not None:
        return _moving_average(trainable, optimizer, optim.ema_decay)
    return Average()


def _moving_average(trainable: TrainablePipeline, optimizer: torch.optim.Optimizer, decay: float) -> Average:
    """a <- a - (1 - d)(a - p) after each step, d = min(decay, (1 + n) / (10 + n)) after n steps before it, 0 at first.

    So a run of any length forgets how it began.
    """
    from diffusers.training_utils import EMAModel  # imports PEFT, where that is installed

    named = {
        name: tensor
        for name, tensor in trainable.named_tensors().items()
        if isinstance(tensor, nn.Parameter) and tensor.requires_grad
    }
    parameters = list(named.values())
    ema = EMAModel(parameters, decay=decay, foreach=True)
    steps = torch.zeros((), dtype=torch.int64)  # a tensor, so that whoever puts back the average puts it back too

    def update(*_: Any) -> None:
        ema.optimization_step = int(steps)
        ema.step(parameters)
        steps.add_(1)

    optimizer.register_step_post_hook(update)
    shadows = {f"average.{name}": shadow for name, shadow in zip(named, ema.shadow_params, strict=True)}
    return Average(
        parameters,
        lambda: ema.copy_to(parameters),
        changed=trainable.forget_norms,
        tensors={**shadows, "average.steps": steps},
    )
