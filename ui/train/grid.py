"""Checkpoints down, weights across, the base first: which one to keep."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dora_diffusion.generation.generate import GenerationSettings
from ui.backend.request import MAX_STRENGTH, AdapterChoice, DrawRequest, check_number
from ui.library.library import AdapterLibrary
from ui.train.runs import list_checkpoints, send_to_library

MAX_ROWS, MAX_WEIGHTS = 8, 8

Draw = Callable[[DrawRequest], Path]


@dataclass(frozen=True)
class Cell:
    """One picture of the grid.

    Attributes:
        step: the row's checkpoint.
        label: what stands under it.
        picture: its file.
    """

    step: int
    label: str
    picture: Path


def check_weights(value: object) -> tuple[float, ...]:
    """`0.5, 1` -> (0.5, 1.0).

    Raises:
        ValueError: no numbers of -2..2 with commas between them, too many, or one twice.
    """
    texts = [text.strip() for text in value.split(",") if text.strip()] if isinstance(value, str) else []
    if not 1 <= len(texts) <= MAX_WEIGHTS:
        raise ValueError(f"weights: got {len(texts)}, expected 1 to {MAX_WEIGHTS} numbers with commas between them")
    weights = tuple(_number(text) for text in texts)
    if len(set(weights)) < len(weights):
        raise ValueError("weights: got one twice, expected each once")
    return weights


def _number(text: str) -> float:
    try:
        value: object = float(text)
    except ValueError:
        value = text
    return check_number("weights", value, low=-MAX_STRENGTH, high=MAX_STRENGTH)


def choose_rows(steps: Sequence[int]) -> list[int]:
    """At most MAX_ROWS of the steps, evenly spread, the last one among them."""
    if len(steps) <= MAX_ROWS:
        return list(steps)
    return [steps[round((index + 1) * len(steps) / MAX_ROWS) - 1] for index in range(MAX_ROWS)]


def draw_grid(
    run: Path, library: AdapterLibrary, settings: GenerationSettings, weights: Sequence[float], draw: Draw
) -> Iterator[tuple[Cell, ...]]:
    """The cells so far, after each one; rows of 1 + len(weights), the base first.

    The checkpoints are copied into the library, and stay there: so each picture can be restored by its hash.

    Raises:
        ValueError: the run has no checkpoint with an adapter, or one cannot be copied or drawn.
    """
    steps = choose_rows(list(list_checkpoints(run)))
    if not steps:
        raise ValueError(f"{run.name}: no checkpoint with an adapter yet; wait for the first, or choose another run")
    names = {step: send_to_library(run, step, library) for step in steps}  # before training removes old ones
    base = draw(DrawRequest(settings, ()))
    cells: tuple[Cell, ...] = ()
    for step, name in names.items():
        cells += (Cell(step, f"step {step} · base", base),)
        for weight in weights:
            chosen = (AdapterChoice(name, weight),) if weight else ()
            picture = draw(DrawRequest(settings, chosen)) if chosen else base
            cells += (Cell(step, f"step {step} · {weight:g}", picture),)
            yield cells
