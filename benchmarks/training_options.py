"""What a loss weighting, an average, dropout and each optimiser do, with against without: `python -m
benchmarks.training_options`.

The robot of examples/subject-robot is trained on the pocket base without prior preservation, so that what an option
costs of other things can be seen, once for each arm and seed, and measured as benchmarks/compared_runs.py says. The
rate of each optimiser is that of its candidates with the highest likeness in a run of a seed that is not compared. The
candidates were written down before the first run.
"""

import argparse
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from benchmarks.compared_runs import ROBOT, ROOT, SEEDS, Page, commit_of, compare, scores_of, write
from dora_diffusion.training.config import TrainConfig

_PLAIN = "AdamW alone"
_TUNED_AT = 100
# Arm -> settings beside those of subject.yaml without its prior.
OPTIONS: Mapping[str, Mapping[str, str]] = {
    "min-SNR, gamma 5": {"optim.min_snr_gamma": "5"},
    "Huber, by SNR": {"loss.kind": "huber"},
    "noise offset 0.05": {"loss.noise_offset": "0.05"},
    "input perturbation 0.1": {"loss.input_perturbation": "0.1"},
    "average (EMA), 0.99": {"optim.ema_decay": "0.99"},
    "adapter dropout 0.1": {"adapter.dropout": "0.1"},
    "caption dropout 0.1": {"data.captions.dropout": "0.1"},
}
# Optimiser -> rates that are tried: about 3, 10 and 30 times what its library advises, as 1e-3 is 10 times AdamW's.
RATES: Mapping[str, tuple[float, ...]] = {
    "adamw": (3e-4, 1e-3, 3e-3),
    "schedulefree": (1e-3, 3e-3, 1e-2),
    "adafactor": (3e-3, 1e-2, 3e-2),
    "lion": (1e-4, 3e-4, 1e-3),
    "came": (1.5e-4, 5e-4, 1.5e-3),
    "prodigy": (0.5, 1.0, 2.0),
}
ARMS = (_PLAIN, *OPTIONS, *(name for name in RATES if name != "adamw"))


def page(rates: Mapping[str, float]) -> Page:
    """What is said around the figures."""
    told = ", ".join(f"{name} {rate:g}" for name, rate in rates.items())
    about = (
        f"Rates, each the best of three at seed {_TUNED_AT}: {told}.",
        "Text encoders take half of it, except where prodigy finds one for all. There is no prior preservation.",
    )
    pairs = tuple((arm, _PLAIN) for arm in ARMS[1:])
    return Page("training_options", "Options of training, with against without", about, "option", pairs)


def config_of(arm: str, seed: int, folder: Path, rates: Mapping[str, float]) -> TrainConfig:
    """The run of an arm and a seed, in a folder of its own."""
    optimizer = arm if arm in rates else "adamw"
    own = with_optimizer(optimizer, rates[optimizer]) | OPTIONS.get(arm, {})
    name = "".join(letter if letter.isalnum() or letter == "." else "-" for letter in arm)
    fixed = {"prior.class_prompts": "[]", "preview.prompts": "[]", "optim.seed": str(seed)}
    return TrainConfig.from_yaml(ROBOT / "subject.yaml", fixed | {"output_dir": str(folder / f"{name}-{seed}")} | own)


def with_optimizer(name: str, rate: float) -> dict[str, str]:
    """Settings of an optimiser at a rate: its own schedule where it wants one, and subject.yaml's where not."""
    settings = {"optim.optimizer": name, "optim.learning_rate": str(rate)}
    settings["optim.text_encoder_learning_rate"] = "null" if name == "prodigy" else str(rate / 2)
    return settings | ({"optim.lr_scheduler": "null"} if name == "schedulefree" else {})


def tuned(name: str, folder: Path, draws: int) -> float:
    """The rate of an optimiser's candidates with the highest likeness."""

    def likeness(rate: float) -> float:
        own = folder / "tuning" / f"{rate:g}"
        print(f"tuning: {name} at {rate:g}", file=sys.stderr)
        return scores_of(config_of(name, _TUNED_AT, own, {name: rate}), draws)["likeness"]

    return max(RATES[name], key=likeness)


def main() -> int:
    """Tune, train, measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "training_options", help="where the runs lie")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--draws", type=int, default=4, help="pictures of each true caption")
    arguments = parser.parse_args()
    commit = commit_of(arguments.runs)
    rates = {name: tuned(name, arguments.runs, arguments.draws) for name in RATES}
    command = "python -m benchmarks.training_options" + "".join(f" {argument}" for argument in sys.argv[1:])
    told = page(rates)
    of = partial(config_of, folder=arguments.runs, rates=rates)
    for found in compare(told, ARMS, of, seeds=arguments.seeds, draws=arguments.draws):
        write(told, found, arguments.output, commit=commit, command=command, more={"rates": rates})
    return 0


if __name__ == "__main__":
    sys.exit(main())
