"""The loss and the learning rate of every step, as checkpoints and the end of a run hold them: `loss.csv`.

It lies in each checkpoint whole, so that a resumed run goes on where that checkpoint was, and ends in the same bytes.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

FILE = "loss.csv"
_HEAD = ("step", "loss", "learning_rate")


class History:
    """What each step came to; the loss of a step that could not be taken is nan."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, float, float]] = []

    def add(self, step: int, loss: float, rate: float) -> None:
        """Note the loss and the learning rate of the step after which so many are done, to six digits."""
        self._rows.append((step, _short(loss), _short(rate)))

    @property
    def losses(self) -> Sequence[tuple[int, float]]:
        """(step, loss) pairs."""
        return [(step, loss) for step, loss, _ in self._rows]

    def as_csv(self) -> str:
        """A line for each step, under a head."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(_HEAD)
        writer.writerows((step, f"{loss:.6g}", f"{rate:.6g}") for step, loss, rate in self._rows)
        return text.getvalue()

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint's; from nothing where it is from before there was one."""
        lines = path.read_text(encoding="utf-8").splitlines()[1:] if path.is_file() else []
        self._rows = [(int(step), float(loss), float(rate)) for step, loss, rate in csv.reader(lines)]


def _short(number: float) -> float:
    """As the file holds it, so that a run that was resumed has the very numbers."""
    return float(f"{number:.6g}")
