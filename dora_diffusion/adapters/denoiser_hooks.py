"""Hooks on a denoiser that change adapters' strengths as a picture is drawn: schedules over the run, masks over it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dora_diffusion.families import Family
from dora_diffusion.functional.masks import added_inside, mask_on, prediction_of, with_prediction
from dora_diffusion.functional.schedules import Schedule, progress_of, timestep_of

SetStrengths = Callable[[Mapping[str, float]], None]


class DenoiserHooks:
    """The schedules and masks of a pipeline's adapters. Hooks stand on its denoiser exactly while one needs them."""

    def __init__(self, pipe: Any, family: Family, set_strengths: SetStrengths) -> None:
        """`set_strengths` gives the denoiser's layers theirs, times a factor for each adapter that it names."""
        self._pipe = pipe
        self._family = family
        self._set_strengths = set_strengths
        self._schedules: dict[str, Schedule] = {}
        self._masks: dict[str, Tensor] = {}
        self._hooks: list[RemovableHandle] = []

    @property
    def is_needed(self) -> bool:
        """Whether any schedule or mask is set."""
        return bool(self._schedules or self._masks)

    def set_schedule(self, name: str, schedule: Schedule | None) -> None:
        """Set or end an adapter's schedule."""
        self._schedules.pop(name, None)
        if schedule is not None:
            self._schedules[name] = schedule
        self._stand()

    def set_mask(self, name: str, mask: Tensor | None) -> None:
        """Set or end an adapter's mask, (1, 1, h, w) in 0..1."""
        self._masks.pop(name, None)
        if mask is not None:
            self._masks[name] = mask
        self._stand()

    def forget(self, name: str) -> None:
        """End whatever an adapter has."""
        if name in self._schedules or name in self._masks:
            self._schedules.pop(name, None)
            self.set_mask(name, None)

    def _stand(self) -> None:
        """Put the hooks where they belong now; between drawings every adapter has its plain strength."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._set_strengths({})
        if self.is_needed:
            denoiser = getattr(self._pipe, self._family.denoiser.name)
            before = denoiser.register_forward_pre_hook(self._before, with_kwargs=True)
            after = denoiser.register_forward_hook(self._after, with_kwargs=True)
            self._hooks = [before, after]

    def _factors(self, arguments: Any, keywords: Any, masked: str | None) -> dict[str, float]:
        """Each adapter's factor at a call of the denoiser: its schedule's, and 0 for masked ones but `masked`."""
        factors: dict[str, float] = {}
        if self._schedules:
            time = self._family.scheduler_time(torch.as_tensor(timestep_of(arguments, keywords)))
            progress = progress_of(time, self._pipe.scheduler.timesteps)
            factors = {name: schedule.at(progress) for name, schedule in self._schedules.items()}
        return {**factors, **dict.fromkeys((name for name in self._masks if name != masked), 0.0)}

    def _before(self, module: nn.Module, arguments: Any, keywords: Any) -> None:
        self._set_strengths(self._factors(arguments, keywords, None))

    def _after(self, module: nn.Module, arguments: Any, keywords: Any, output: Any) -> Any:
        if not self._masks:
            return output
        without = mixed = prediction_of(output)
        grid = self._family.grid(arguments, keywords)
        for name, mask in self._masks.items():
            self._set_strengths(self._factors(arguments, keywords, name))
            inside = prediction_of(module.forward(*arguments, **keywords))
            mixed = added_inside(mixed, without, inside, mask_on(mask, without, grid))
        return with_prediction(output, mixed)
