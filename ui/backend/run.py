"""One drawing in the background: a worker thread, its latest news, and the way to stop it."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

FRAME_SECONDS = 1 / 6
NEWS_SECONDS = 1.0


@dataclass(frozen=True)
class Update:
    """All that is known of a run at one moment; each holds what the ones before held, so any may be missed.

    Attributes:
        phase: 'waiting' for another picture, 'loading' adapters, 'blend', 'base', then 'done' or 'stopped'.
        step, total: progress within the phase; total 0 before the first step.
        preview: a small RGB picture of the phase's drawing as it stands.
        picture: the newest finished picture, saved.
        base: what `picture` is without adapters, saved.
        seconds: since the start.
        ahead: while waiting, how many drawings are before this one.
        pictures: all finished pictures of this run, in the order of their seeds.
        count: how many there will be.
        load_seconds, mix_seconds, draw_seconds: reading adapters, setting their strengths, drawing them; 0 until then.
    """

    phase: str = "waiting"
    step: int = 0
    total: int = 0
    preview: Image.Image | None = None
    picture: Path | None = None
    base: Path | None = None
    seconds: float = 0.0
    ahead: int = 0
    pictures: tuple[Path, ...] = ()
    count: int = 1
    load_seconds: float = 0.0
    mix_seconds: float = 0.0
    draw_seconds: float = 0.0

    @property
    def is_last(self) -> bool:
        """Whether the run ends with this."""
        return self.phase in ("done", "stopped")


class Run:
    """Runs `work(run)` in a thread. `work` posts news and looks at `is_stopping`; `updates` gives the newest."""

    def __init__(self, work: Callable[["Run"], None]) -> None:
        self._stopping = threading.Event()
        self._news = threading.Condition()
        self._latest = Update()
        self._unread = True
        self._error: BaseException | None = None
        self._finished = False
        self._started = time.monotonic()
        self._worker = threading.Thread(target=self._guarded, args=(work,), name="drawing", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._worker.start()

    def stop(self) -> None:
        """Ask the work to end; it does within a step."""
        self._stopping.set()

    def is_stopping(self) -> bool:
        """Whether the work should end."""
        return self._stopping.is_set()

    @property
    def finished(self) -> bool:
        """Whether the work has ended."""
        return self._finished

    @property
    def latest(self) -> Update:
        """What was posted last."""
        return self._latest

    def post(self, update: Update) -> None:
        """Give news: `replace(run.latest, ...)`; called by the work. The time is filled in here."""
        with self._news:
            self._latest = replace(update, seconds=time.monotonic() - self._started)
            self._unread = True
            self._news.notify_all()

    def updates(self) -> Iterator[Update]:
        """The newest update each time there is one, at most six a second, the last one always.

        Leaving early (a closed tab) stops the work; an error of the work is raised here.
        """
        try:
            while (update := self._next()) is not None:
                yield update
                if not update.is_last:  # while this is not through, the page drops a press of Generate
                    time.sleep(FRAME_SECONDS)
            if self._error is not None:
                raise self._error
        finally:
            self.stop()
            if self._finished:  # of a closed tab the work ends within a step; waiting for it would hold up every tab
                self._worker.join()

    def _next(self) -> Update | None:
        with self._news:
            # now and then without news, too: only between two updates can a closed tab's generator be closed
            if not self._news.wait_for(lambda: self._unread or self._finished, timeout=NEWS_SECONDS):
                return self._latest
            if not self._unread:
                return None
            self._unread = False
            return self._latest

    def _guarded(self, work: Callable[["Run"], None]) -> None:
        try:
            work(self)
        except BaseException as error:
            self._error = error
        finally:
            with self._news:
                self._finished = True
                self._news.notify_all()
