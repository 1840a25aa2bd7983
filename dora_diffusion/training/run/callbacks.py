"""What a program hooks into a run: its steps, previews, checkpoints and end."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from dora_diffusion.training.run.finish import TrainResult

_CALLS = ("step", "preview", "checkpoint", "end")


class TrainingCallback(Protocol):
    """What `train(callbacks=...)` calls; subclass it and write those methods that are of use, the others do nothing.

    They are called in the order given, by the main process alone, in the thread that trains, which waits for them. What
    they raise ends the run after a checkpoint. A resumed run calls them from where it goes on.

    Examples:
        ```python
        import dora_diffusion as dd

        class Watch(dd.TrainingCallback):
            def step(self, number: int, loss: float, rate: float) -> None:
                print(f"step {number}: loss {loss:.4f} at {rate:.1e}")

        dd.train(dd.TrainConfig.from_yaml("subject.yaml"), callbacks=[Watch()])
        ```
    """

    def step(self, number: int, loss: float, rate: float) -> None:
        """A step was taken.

        Args:
            number: of the steps done so far.
            loss: its mean over this step's pictures; not a number when a guarded step had none.
            rate: the learning rate.
        """

    def preview(self, number: int, pictures: Sequence[Image.Image], path: Path) -> None:
        """Previews were drawn.

        Args:
            number: of the steps done so far; 0 is the base.
            pictures: one for each prompt.
            path: of the PNG that shows them side by side.
        """

    def checkpoint(self, number: int, folder: Path) -> None:
        """A checkpoint was saved.

        Args:
            number: of the steps done so far.
            folder: that holds it, with `adapter.safetensors` to draw with.
        """

    def end(self, result: TrainResult) -> None:
        """The run has left its files."""


class CallbackFailed(ValueError):
    """What a callback raised, in one line that names it."""


class Callbacks:
    """Those of a run.

    Args:
        callbacks: in their order.
        are_called: whether by this process.

    Raises:
        ValueError: one lacks a method.
    """

    def __init__(self, callbacks: Sequence[TrainingCallback], *, are_called: bool = True) -> None:
        for one in callbacks:
            missing = [name for name in _CALLS if not callable(getattr(one, name, None))]
            if missing:
                raise ValueError(
                    f"callbacks: {_name(one)} has no method {missing[0]}; expected a subclass of TrainingCallback"
                )
        self._callbacks = tuple(callbacks) if are_called else ()

    def step(self, number: int, loss: float, rate: float) -> None:
        """See `TrainingCallback`."""
        self._call("step", f"after step {number}", number, loss, rate)

    def preview(self, number: int, pictures: Sequence[Image.Image], path: Path) -> None:
        """See `TrainingCallback`."""
        self._call("preview", f"after step {number}", number, pictures, path)

    def checkpoint(self, number: int, folder: Path) -> None:
        """See `TrainingCallback`."""
        self._call("checkpoint", f"after step {number}", number, folder)

    def end(self, result: TrainResult) -> None:
        """See `TrainingCallback`."""
        self._call("end", f"after {result.steps} steps", result)

    def _call(self, name: str, when: str, *arguments: Any) -> None:
        for one in self._callbacks:
            try:
                getattr(one, name)(*arguments)
            except Exception as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                raise CallbackFailed(f"callback {_name(one)}.{name} {when}: {reason}") from error


def _name(callback: object) -> str:
    kind = callback if isinstance(callback, type) else type(callback)
    return kind.__qualname__
