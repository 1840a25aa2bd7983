"""Hooks on a denoiser that change adapters' strengths as a picture is drawn: schedules over the run, masks over it."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dora_diffusion.families import Family, family_of_denoiser
from dora_diffusion.functional.masks import added_inside, mask_on, prediction_of, with_prediction
from dora_diffusion.functional.schedules import Reading, Schedule, progress_of, reading_of, timestep_of
from dora_diffusion.pipelines.components import denoisers_of, live_model, timed_of

T = TypeVar("T")
SetStrengths = Callable[[str, Mapping[str, float]], None]


class DenoiserHooks:
    """The schedules and masks of a pipeline's adapters. Hooks stand on its denoisers exactly while one needs them.

    A schedule is followed by ControlNets, too, which are told the time as denoisers are.
    """

    def __init__(self, pipe: Any, set_strengths: SetStrengths) -> None:
        """`set_strengths` gives a component's layers theirs, times a factor for each adapter that it names."""
        self._pipe = pipe
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
        self._change(self._schedules, name, schedule)

    def set_mask(self, name: str, mask: Tensor | None) -> None:
        """Set or end an adapter's mask, (1, 1, h, w) in 0..1."""
        self._change(self._masks, name, mask)

    def forget(self, name: str) -> None:
        """End whatever an adapter has."""
        if name in self._schedules or name in self._masks:
            self._schedules.pop(name, None)
            self.set_mask(name, None)

    def _change(self, have: dict[str, T], name: str, value: T | None) -> None:
        """Set or end one, once it is sure that hooks can stand."""
        if value is None:
            have.pop(name, None)
        else:
            for component in timed_of(self._pipe):
                _check_hookable(component, live_model(self._pipe, component))
            have[name] = value
        self.stand()

    def stand(self) -> None:
        """Put the hooks where they belong now; between drawings every adapter has its plain strength."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        denoisers = denoisers_of(self._pipe)
        for component in timed_of(self._pipe):
            self._set_strengths(component, {})
            if self.is_needed:
                self._hook(component, predicts=component in denoisers)

    def _hook(self, component: str, *, predicts: bool) -> None:
        """Stand outside a compiled model."""
        model = live_model(self._pipe, component)
        _check_hookable(component, model)
        itself = getattr(model, "_orig_mod", model)
        names = tuple(inspect.signature(type(itself).forward).parameters)[1:]
        call = _Call(component, predicts, names, family_of_denoiser(itself))
        before = partial(self._before, call)
        self._hooks.append(model.register_forward_pre_hook(before, with_kwargs=True))
        if predicts:
            after = partial(self._after, call)
            self._hooks.append(model.register_forward_hook(after, with_kwargs=True, prepend=True))

    def _factors(self, call: "_Call", arguments: Any, keywords: Any, masked: str | None) -> dict[str, float]:
        """Each adapter's factor at a call of the denoiser: its schedule's, and 0 for masked ones but `masked`."""
        factors: dict[str, float] = {}
        if self._schedules:
            progress = call.progress(self._pipe, timestep_of(arguments, keywords, call.names))
            factors = {name: schedule.at(progress) for name, schedule in self._schedules.items()}
        others = [name for name in self._masks if name != masked] if call.predicts else []
        return {**factors, **dict.fromkeys(others, 0.0)}

    def _before(self, call: "_Call", module: nn.Module, arguments: Any, keywords: Any) -> None:
        self._set_strengths(call.component, self._factors(call, arguments, keywords, None))

    def _after(self, call: "_Call", module: nn.Module, arguments: Any, keywords: Any, output: Any) -> Any:
        if not self._masks:
            return output
        without = mixed = prediction_of(output)
        grid = call.grid(without, arguments, keywords)
        for name, mask in self._masks.items():
            self._set_strengths(call.component, self._factors(call, arguments, keywords, name))
            inside = prediction_of(module.forward(*arguments, **keywords))
            mixed = added_inside(mixed, without, inside, mask_on(mask, without, grid))
        return with_prediction(output, mixed)


def _check_hookable(component: str, model: Any) -> None:
    """A ValueError of one line for a model compiled in place."""
    if getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError(
            f"{component} was compiled in place, which leaves no step to change strengths at: compile it as "
            f"pipe.{component} = torch.compile(pipe.{component})"
        )


@dataclass
class _Call:
    """How a component is called.

    Attributes:
        component: its name.
        predicts: whether masks act on it; a ControlNet, like a text encoder, knows no places.
        names: of its forward's parameters.
        family: where one knows the model.
        reading: where none does, how its time was read last.
    """

    component: str
    predicts: bool
    names: tuple[str, ...]
    family: Family | None
    reading: Reading | None = None

    def progress(self, pipe: Any, timestep: Any) -> float:
        """How far the run of the pipeline's scheduler is."""
        scheduler = getattr(pipe, "scheduler", None)
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is None:
            raise ValueError("a schedule needs a pipeline with a scheduler, whose timesteps tell how far a run is")
        time = torch.as_tensor(timestep)
        if self.family is not None:
            return progress_of(self.family.scheduler_time(time), timesteps)
        self.reading = reading_of(time, timesteps, self.reading)
        return progress_of(self.reading(float(time.flatten()[0])), timesteps)

    def grid(self, prediction: Tensor, arguments: Any, keywords: Any) -> tuple[int, int] | None:
        """Rows and columns of a prediction's tokens; None where it predicts maps.

        Raises:
            ValueError: it predicts tokens, and nobody here knows in which order.
        """
        if self.family is not None:
            return self.family.grid(arguments, keywords)
        if prediction.dim() < 4:
            raise ValueError(
                f"{self.component}: where its {tuple(prediction.shape)} tokens lie in the picture is not known here, "
                "so that no mask can be laid on them: set_mask(NAME, None), or use a model of a family with a record"
            )
        return None
