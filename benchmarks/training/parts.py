"""What is measured, part by part, as plain figures for training.json."""

import gc
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.models import ATTENTION, sd15_unet, step_of
from benchmarks.peers.single_layers import Setting
from benchmarks.peers.variants import build, check_agreement
from benchmarks.training import clock
from benchmarks.training.bases import Base, pictures, pocket, sd15
from benchmarks.training.beside import CAPTION, DORA, FRESH, PROMPT, RECIPE, Case, steps_in_turns
from benchmarks.training.clock import Round, Spread, Way, alternate, quietest
from benchmarks.training.ours import adapted, config_of, our_trainer, times_measured
from dora_diffusion.layers.targets import target_paths

Figures = Mapping[str, Any]
NORMS = "norms"
INSIDE = ("forward", "backward")
LISTED = ("batch", NORMS, *INSIDE, "optimiser")
VARIANTS = ("PEFT LoRA", "our LoRA", "our DoRA")


@dataclass(frozen=True)
class Rounds:
    """How many turns each part takes; as they are by default the whole takes some twenty minutes on one core."""

    pocket: int = 150
    pocket_of_four: int = 90
    sd15: int = 12
    validation: int = 60
    peft: int = 36

    @classmethod
    def few(cls, count: int) -> "Rounds":
        """The same few of all."""
        return cls(count, count, count, count, count)


def beside_recipe(folder: Path, rounds: Rounds, *, is_quick: bool) -> list[Figures]:
    """Steps beside diffusers' recipe: the pocket with one picture a step and with four, SD1.5's shapes with one."""
    return [
        _beside(Case(pocket(), 1), folder / "one", rounds.pocket),
        _beside(Case(pocket(), 4), folder / "four", rounds.pocket_of_four),
        _beside(Case(sd15(is_quick=is_quick), 1, (RECIPE, DORA, FRESH)), folder / "sd15", rounds.sd15),
    ]


def _beside(case: Case, folder: Path, count: int) -> Figures:
    print(f"  {case.base.name}, {case.batch_size} a step", flush=True)
    taken = quietest(steps_in_turns(case, folder, rounds=count))
    gc.collect()  # layers and models hold each other
    return {
        "base": case.base.name,
        "batch_size": case.batch_size,
        "side": case.base.side,
        "of_rounds": count,
        "ways": {name: _way(taken, name) for name in (*case.names, CAPTION)},
        "outside": {
            "latents and captions kept": _outside(taken, DORA, 0),
            "no latents kept": _outside(taken, FRESH, 0),
            "no latents kept, every caption another": _outside(taken, FRESH, case.batch_size),
        },
    }


def _way(taken: Sequence[Round], name: str) -> Figures:
    shares = {part: asdict(clock.share(taken, name, [part])) for part in LISTED}
    return {
        "seconds": asdict(clock.seconds(taken, name)),
        "over_recipe": asdict(clock.ratio(taken, name, RECIPE)),
        "shares": shares,
    }


def _outside(taken: Sequence[Round], name: str, captions: int) -> Figures:
    """The share outside forward and backward passes, norms counted inside and outside.

    Captions that are made up anew are encoded for 64 steps at a time, which turns of one step do not show: `captions`
    of them a step are added, as long as one takes.
    """
    return {
        "norms inside": asdict(spread_outside(taken, name, (*INSIDE, NORMS), captions)),
        "norms outside": asdict(spread_outside(taken, name, INSIDE, captions)),
    }


def spread_outside(taken: Sequence[Round], name: str, inside: Sequence[str], captions: int) -> Spread:
    """Of a way, round by round."""
    shares = []
    for turns in taken:
        whole = turns[name].seconds + captions * (turns[CAPTION].seconds if captions else 0.0)
        shares.append(1 - sum(turns[name].parts.get(part, 0.0) for part in inside) / whole)
    return clock.spread(shares)


def validation_share(folder: Path, rounds: Rounds) -> Figures:
    """What measuring the validation loss takes of a default run's steps and measurements, on the pocket."""
    print("  validation", flush=True)
    taken, times, steps = _measurements(pocket(), folder, rounds.validation)
    quiet = quietest(taken)
    shares = [share_of(turns["a step"].seconds, turns["a measurement"].seconds, steps, times) for turns in quiet]
    return {
        "of_rounds": rounds.validation,
        "steps": steps,
        "times": times,
        "share": asdict(clock.spread(shares)),
        "step": asdict(clock.seconds(quiet, "a step")),
        "measurement": asdict(clock.seconds(quiet, "a measurement")),
    }


def _measurements(base: Base, folder: Path, rounds: int) -> tuple[list[Round], int, int]:
    """Turns of a step and a measurement; how often a default run measures, and its steps."""
    photos = pictures(folder / "pictures", base.side, 6)  # as many as a default run measures at most
    config = config_of(photos, PROMPT, base.side, 1, {})
    trainer = our_trainer(adapted(base, config), config, clock.Stopwatch(), steps=rounds + 1)
    ways = {"a step": Way(trainer.take), "a measurement": Way(trainer.measure)}
    return alternate(ways, rounds=rounds), times_measured(config, trainer.validation), config.optim.steps


def share_of(step: float, measurement: float, steps: int, times: int) -> float:
    """The measurements' share of a run."""
    measured = times * measurement
    return measured / (steps * step + measured)


def over_peft(rounds: Rounds, *, is_quick: bool) -> Figures:
    """A step of SD1.5's UNet (forward, backward, AdamW; rank 16, 256 pixels, batch 1) over that of PEFT's LoRA."""
    print("  SD1.5's UNet beside PEFT", flush=True)
    torch.manual_seed(0)
    case = sd15_unet(Setting("cpu", torch.float32, 1, is_quick))
    model = case.model.train()
    paths = target_paths(model, ATTENTION)
    bases = {path: model.get_submodule(path) for path in paths}
    variants = build(model, paths, list(VARIANTS))
    check_agreement(lambda: case.call(1), model, variants)
    ways = {name: Way(step_of(case, variant, bases)) for name, variant in variants.items()}
    taken = quietest(alternate(ways, rounds=rounds.peft))
    return {
        "of_rounds": rounds.peft,
        "ways": {
            name: {
                "seconds": asdict(clock.seconds(taken, name)),
                "over_peft": asdict(clock.ratio(taken, name, "PEFT LoRA")),
            }
            for name in VARIANTS
        },
    }
