"""Ending a run early, whoever asks: between two steps, so that a checkpoint can be written first."""

import _thread
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from dora_diffusion.training.processes import StopRequest

SECONDS_TO_END = 60.0
_HANGUP: signal.Signals | None = getattr(signal, "SIGHUP", None)  # not every system has it
_ASKING = tuple(number for number in (signal.SIGINT, signal.SIGTERM, _HANGUP) if number is not None)
_STDIN = 0
_FORWARDED = 10.0  # seconds for which a signal may be the first once more, passed on by a launcher


@contextmanager
def stop_requests(*, by_all: bool = False) -> Iterator[StopRequest]:
    """Inside the block SIGINT, SIGTERM and SIGHUP only ask; one more of the first two raises KeyboardInterrupt.

    A signal that is ignored (`nohup`) or has a handler already keeps it. Outside the main thread, where Python lets
    nobody set handlers, nothing asks.

    Args:
        by_all: whether this is one of several processes, whose launcher passes on what a terminal has sent to all: what
            comes within ten seconds of the first is that once more.
    """
    request = StopRequest(by_all=by_all)

    def ask(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not request.asked:
            request.asked, request.at = True, now
        elif number != _HANGUP and not (by_all and now - request.at < _FORWARDED):
            raise KeyboardInterrupt  # SIGHUP comes twice by itself: from the terminal, and from the shell in it

    free = (signal.SIG_DFL, signal.default_int_handler)
    here = threading.current_thread() is threading.main_thread()
    ours = [number for number in _ASKING if here and signal.getsignal(number) in free]
    before = {number: signal.signal(number, ask) for number in ours}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_with_stdin(*, seconds: float = SECONDS_TO_END) -> None:
    """From now on, end as Ctrl+C does once standard input closes; what has not ended `seconds` later is cut off.

    For a program that starts a run and holds the other end of a pipe: the system closes it however that program ends,
    killed or not. It takes the place of reading standard input.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as of what a script starts in its background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=_end_after_stdin, args=(seconds,), name="end-with-stdin", daemon=True).start()


def _end_after_stdin(seconds: float) -> None:
    try:
        while os.read(_STDIN, 4096):  # not sys.stdin: its lock would be held while the interpreter shuts down
            pass
    except OSError:  # there is none
        pass
    _thread.interrupt_main()
    time.sleep(seconds)
    os._exit(130)  # files are written atomically: the newest checkpoint is whole
