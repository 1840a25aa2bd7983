"""Whose turn it is: first come, first served, each knowing how many are before it."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dora_diffusion.generation.generate import GenerationStopped

MAX_WAITING = 64
LOOK_SECONDS = 0.1


class DrawQueue:
    """A queue for one thing that only one may use at a time."""

    def __init__(self) -> None:
        self._change = threading.Condition()
        self._queue: list[_Ticket] = []

    @property
    def waiting(self) -> int:
        """How many are in the queue, the one whose turn it is among them."""
        return len(self._queue)

    @contextmanager
    def turn(
        self,
        *,
        should_stop: Callable[[], bool] = lambda: False,
        on_wait: Callable[[int], None] = lambda ahead: None,
        is_short: bool = False,
    ) -> Iterator[None]:
        """Wait for a turn and have it.

        Args:
            should_stop: asked ten times a second while waiting.
            on_wait: told how many are before this one, whenever that changes.
            is_short: go before those that wait for longer turns, but not before other short ones.

        Raises:
            GenerationStopped: `should_stop` said yes.
            ValueError: MAX_WAITING are waiting.
        """
        ticket = _Ticket(is_short)
        self._enter(ticket)
        try:
            self._wait(ticket, should_stop, on_wait)
            yield
        finally:
            with self._change:
                self._queue.remove(ticket)
                self._change.notify_all()

    def _enter(self, ticket: "_Ticket") -> None:
        with self._change:
            if len(self._queue) > MAX_WAITING:
                raise ValueError(f"{MAX_WAITING} drawings are waiting already; try again when some are done")
            place = len(self._queue)
            if ticket.is_short:
                long = (i for i, other in enumerate(self._queue) if i > 0 and not other.is_short)
                place = next(long, place)
            self._queue.insert(place, ticket)
            self._change.notify_all()

    def _wait(self, ticket: "_Ticket", should_stop: Callable[[], bool], on_wait: Callable[[int], None]) -> None:
        announced = None
        while True:
            with self._change:
                ahead = self._queue.index(ticket)
                if ahead == announced and ahead > 0:
                    self._change.wait(LOOK_SECONDS)
                    ahead = self._queue.index(ticket)
            if should_stop():
                raise GenerationStopped
            if ahead == 0:
                return
            if ahead != announced:
                on_wait(ahead)
                announced = ahead


class _Ticket:
    """A place in the queue; each is only itself."""

    def __init__(self, is_short: bool) -> None:
        self.is_short = is_short
