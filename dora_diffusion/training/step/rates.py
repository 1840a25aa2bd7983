"""Learning rates as a function of the step."""

import math

import torch
from diffusers.optimization import get_scheduler

from dora_diffusion.training.config import OptimConfig


class RateSchedule:
    """Learning rates as a function of the step alone, so that a resumed run needs no scheduler state."""

    def __init__(self, optimizer: torch.optim.Optimizer, optim: OptimConfig) -> None:
        scheduler = get_scheduler(
            optim.schedule,
            optimizer=torch.optim.SGD([torch.zeros(1)], lr=1.0),
            num_warmup_steps=optim.warmup_steps,
            num_training_steps=optim.steps,
        )
        self._factor = scheduler.lr_lambdas[0]
        self._optimizer = optimizer
        self._rates = [group["lr"] for group in optimizer.param_groups]

    def drop_ended_gradients(self, step: int) -> None:
        """Groups that stand still from a step on have no say in how the gradients of the others are cut."""
        for group in self._optimizer.param_groups:
            if step >= group.get("until", math.inf):
                for parameter in group["params"]:
                    parameter.grad = None

    def set(self, step: int) -> float:
        """Set the rates of a step; return the first group's, times what the optimiser has found where it is a factor.

        A group that ends at a step stands still from it on.
        """
        factor = self._factor(step)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor if step < group.get("until", math.inf) else 0.0
        found: float = self._optimizer.param_groups[0].get("d", 1.0)  # Prodigy's estimate
        return self._rates[0] * factor * found
