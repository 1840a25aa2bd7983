"""Whether the app is well, as JSON for those who watch it; and ending it so that nothing is left."""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

import gradio as gr
import torch
from fastapi import FastAPI

import dora_diffusion
from ui.backend.session import Session

CLOSING_SECONDS = 10.0
HEALTH = "/health"
_HANGUP: signal.Signals | None = getattr(signal, "SIGHUP", None)  # not every system has it


def health(session: Session, *, started: float) -> dict[str, Any]:
    """What GET /health answers; nothing in it tells what is drawn, or where files lie.

    Args:
        session: the app's.
        started: `time.monotonic()` at the app's start.
    """
    return {
        "status": "ok",
        "version": dora_diffusion.__version__,
        "model": Path(session.model).name or session.model,
        "busy": session.busy,
        "queue": session.waiting,
        "adapters": {
            "usable": len(session.library.usable),
            "broken": len(session.library.broken),
            "loaded": len(session.loaded),
        },
        "memory": {"process_bytes": process_bytes(), "gpu_bytes": gpu_bytes()},
        "uptime_seconds": round(time.monotonic() - started, 1),
    }


def health_route(app: FastAPI, session: Session) -> None:
    """Serve `health` at /health of a launched app; it waits for no drawing."""
    started = time.monotonic()

    def answer() -> dict[str, Any]:
        return health(session, started=started)

    app.add_api_route(HEALTH, answer, methods=["GET"], include_in_schema=False)


def process_bytes() -> int | None:
    """Memory that this process holds; None where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def gpu_bytes() -> int | None:
    """Memory of tensors on the current CUDA device; None without one."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else None


def close_all(closers: Sequence[Callable[[], object]], *, seconds: float = CLOSING_SECONDS) -> bool:
    """Call every closer, in order, whatever the ones before did; whether all of them ended in time.

    What raises is told on stderr in one line.
    """

    def run() -> None:
        for close in closers:
            try:
                close()
            except Exception as error:
                name = getattr(close, "__qualname__", type(close).__name__)
                _tell(f"closing, {name}: {type(error).__name__}: {error}", file=sys.stderr)

    worker = threading.Thread(target=run, name="closing", daemon=True)
    worker.start()
    worker.join(seconds)
    return not worker.is_alive()


def stop_serving(demo: gr.Blocks) -> None:
    """Close a launched app at once. For the stream of a page that is still open, gradio would wait five seconds."""
    log = logging.getLogger("uvicorn.error")
    level = log.level
    log.setLevel(logging.CRITICAL)  # that a stream was cut off is no error here
    if demo.server is not None:
        demo.server.force_exit = True
    try:
        demo.close(verbose=False)
    finally:
        log.setLevel(level)


def on_shutdown(demo: gr.Blocks, session: Session, closers: Sequence[Callable[[], object]] = ()) -> None:
    """Stay until Ctrl+C, SIGTERM or SIGHUP, then end everything: drawings within a step, the server, `closers`.

    SIGHUP says that the terminal was closed; under `nohup`, which ignores it, the app stays. What has not ended after
    CLOSING_SECONDS (a step of a large model) is cut off: files are written atomically, so none is left half. A second
    Ctrl+C does that at once. Call it from the main thread.

    Args:
        demo: launched, with `prevent_thread_lock`.
        session: the app's.
        closers: called once drawings have been told to stop, each without arguments: child processes are ended here.
    """
    asked: list[int] = []  # no Event: a handler must take no lock

    def ask(number: int, frame: object) -> None:
        if asked and number != _HANGUP:  # which comes twice: from the terminal, and from the shell in it
            os._exit(128 + number)
        asked.append(number)

    stays = _HANGUP is not None and signal.getsignal(_HANGUP) == signal.SIG_IGN
    ending = [signal.SIGINT, signal.SIGTERM, *([] if _HANGUP is None or stays else [_HANGUP])]
    before = {number: signal.signal(number, ask) for number in ending}
    try:
        while demo.is_running and not asked:
            time.sleep(0.2)
        _tell("Closing …", file=sys.stdout)
        if not close_all([session.stop_all, *closers, session.close, lambda: stop_serving(demo)]):
            _tell(f"A drawing did not end within {CLOSING_SECONDS:g} s and was cut off.", file=sys.stderr)
            os._exit(0)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tell(line: str, *, file: TextIO) -> None:
    """Print a line, if there is still a terminal to read it."""
    with contextlib.suppress(OSError):
        print(line, file=file, flush=True)
