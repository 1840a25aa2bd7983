"""Going on from a checkpoint: what has changed since it was saved, what is refused, and a run that is made longer."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel

from dora_diffusion.training.config import ConceptConfig, OptimConfig, TrainConfig
from dora_diffusion.training.run.checkpoint import Saved, newest, resolved, resumable_part
from dora_diffusion.training.run.identity import Identity, changes

_TOLD_AT_MOST = 6
# What is trained has other shapes, or other parts, once one of these has changed.
_SHAPING = (
    *("rank", "target_modules", "use_dora", "rank_pattern", "init", "train_magnitude"),
    *("train_unet", "train_text_encoder", "text_encoder_rank"),
)
_FIXED = (
    *(f"adapter.{name}" for name in _SHAPING),
    *("words.starts", "words.vectors"),
    # what an optimiser keeps is in the order of its groups, which patterns make
    *("optim.optimizer", "optim.optimizer_options", "optim.lr_pattern", "optim.ema_decay"),
)


def find_saved(config: TrainConfig) -> Saved:
    """The checkpoint that a run goes on from.

    Raises:
        ValueError: there is none, or none that is whole.
    """
    saved = newest(config.output_dir / "checkpoints")
    if saved is None:
        raise ValueError(
            f"{config.output_dir}: holds no checkpoint to resume; start anew without --resume, or name the run's own "
            "output_dir (a relative one begins at the current folder)"
        )
    return saved


def extended(config: TrainConfig, saved: Saved, steps: int) -> TrainConfig:
    """The config of a run that goes on to so many steps in all.

    Raises:
        ValueError: it was to have more steps already.
    """
    if steps < saved.planned or steps <= 0:
        raise ValueError(
            f"--extend {steps}: the run has {saved.planned} steps; expected more, the number of steps in all"
        )
    return config.model_copy(update={"optim": config.optim.model_copy(update={"steps": steps})})


@dataclass(frozen=True)
class Place:
    """Where a run trains.

    Attributes:
        processes: how many train together.
        device: the kind of device.
    """

    processes: int
    device: str


class Comparison:
    """What has changed between a checkpoint and now, as it becomes known.

    Args:
        saved: the checkpoint.
        config: of now.
        place: where it trains now.
        accept: whether changes are to be accepted.
        extends: whether the number of steps may be another.
    """

    def __init__(self, saved: Saved, config: TrainConfig, place: Place, *, accept: bool, extends: bool) -> None:
        self._saved, self._config, self._place = saved, config, place
        self._accept, self._extends = accept, extends
        self._accepted: list[str] = []

    def check_settings(self) -> None:
        """Compare the settings.

        Raises:
            ValueError: something has changed that is not accepted, or that cannot be.
        """
        before, now = self._saved.progress, resumable_part(self._config)
        old = {**_filled(before["settings"], now, _defaults()), "processes": before["processes"]}
        found = dict(_differences(old, {**now, "processes": self._place.processes}))
        steps = found.pop("optim.steps", None) if self._extends else None
        fixed = [text for key, text in found.items() if key in _FIXED]
        if fixed:
            raise ValueError(
                f"{self._saved.path}: cannot resume, {_told(fixed)}; what was learnt does not fit what is trained now: "
                "use the same settings or another output_dir"
            )
        self._judge(list(found.values()))
        self._accepted += [f"{steps} (--extend)"] if steps else []
        if self._saved.step > self._config.optim.steps:
            raise ValueError(
                f"{self._saved.path}: cannot resume, it has done more than optim.steps, {self._config.optim.steps}; "
                "expected at least as many"
            )

    def check_parts(self, identity: Identity) -> None:
        """Compare what is known by now of what the run is made of.

        Raises:
            ValueError: something has changed that is not accepted.
        """
        if self._saved.identity is not None:
            self._judge(changes(self._saved.identity, identity))

    def _judge(self, told: Sequence[str]) -> None:
        if told and not self._accept:
            hint = " (--extend makes a run longer)" if any("optim.steps" in text for text in told) else ""
            raise ValueError(
                f"{self._saved.path}: cannot resume, {_told(told)}{hint}; put it back, choose another output_dir, or "
                "go on all the same with --accept-changes"
            )
        self._accepted += told

    def noted(self, identity: Identity) -> Identity:
        """The identity for the next checkpoints, with what was accepted, now and before."""
        before = () if self._saved.identity is None else self._saved.identity.accepted
        now = tuple(f"step {self._saved.step}: {text}" for text in self._accepted)
        return replace(identity, accepted=(*before, *now))

    def message(self) -> str:
        """What it goes on from, in one line."""
        skipped = f"; skipped what is not whole: {', '.join(self._saved.skipped)}" if self._saved.skipped else ""
        older = "; it is from before pictures, captions and base were noted, so they could not be compared"
        accepted = f"; accepted: {_told(self._accepted)}" if self._accepted else ""
        unknown = older if self._saved.identity is None else ""
        return f"resuming from {self._saved.path.name}{skipped}{unknown}{self._moved()}{accepted}"

    def _moved(self) -> str:
        before, now = self._saved.device, self._place.device
        if before in (None, now):
            return ""
        return f"; it was trained on {before} and goes on on {now}, which rounds otherwise, whatever the precision"


def _told(texts: Sequence[str]) -> str:
    more = f"; and {len(texts) - _TOLD_AT_MOST} more" if len(texts) > _TOLD_AT_MOST else ""
    return "; ".join(texts[:_TOLD_AT_MOST]) + more


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted key -> what it was and is; those that are fixed are told whole."""
    for key in sorted(old.keys() | new.keys()):
        before, now, name = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(before, dict) and isinstance(now, dict) and name not in _FIXED:
            yield from _differences(before, now, f"{name}.")
        elif before != now:
            yield name, f"{name} was {before!r} and is now {now!r}"


def _defaults() -> dict[str, Any]:
    """What older checkpoints did where they do not name a setting, sections in sections."""
    found = _defaults_of(TrainConfig)
    found["data"]["buckets"] = False  # all were squares
    found["optim"] |= resolved(OptimConfig()) | {"mixed_precision": "no"}
    return found


def _defaults_of(kind: type[BaseModel]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, one in kind.model_fields.items():
        if isinstance(one.annotation, type) and issubclass(one.annotation, BaseModel):
            found[name] = _defaults_of(one.annotation)
        elif not one.is_required():
            found[name] = one.get_default(call_default_factory=True)
    return found


def _filled(old: Mapping[str, Any], new: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an older checkpoint, with the defaults of sections and keys that came later."""
    filled = dict(old)
    for key, now in new.items():
        default = defaults.get(key)
        if isinstance(now, dict) and isinstance(default, dict) and isinstance(old.get(key, {}), dict):
            filled[key] = _filled(old.get(key, {}), now, default)
        elif key not in old and key in defaults:
            filled[key] = default
        elif key == "concepts" and len(old[key]) == len(now):
            filled[key] = [_filled(*pair, _defaults_of(ConceptConfig)) for pair in zip(old[key], now, strict=True)]
    return filled
