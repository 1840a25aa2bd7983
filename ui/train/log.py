"""What a process of ours wrote, in one line: where it is, or why it failed."""

import os
from pathlib import Path

_TAIL_BYTES, _LONG_TAIL_BYTES = 8192, 1 << 17
_LONGEST = 500
_OURS = "dora-diffusion: "  # what the command line puts before a mistake that it tells in one line
_TRACEBACK = "Traceback (most recent call last)"


def last_line(log: Path) -> str:
    """The last line of a log that is not blank; of a progress bar, its newest state; "" without a log."""
    lines = _lines(_tail(log, _TAIL_BYTES))
    return lines[-1].strip().removeprefix(_OURS)[:_LONGEST] if lines else ""


def last_reason(log: Path) -> str:
    """Why the process that wrote a log failed, as well as its words tell; "" without a log.

    Our own one line, or the error of the newest traceback: libraries write hints behind an error, and warnings while
    they shut down.
    """
    lines = _lines(_tail(log, _LONG_TAIL_BYTES))
    for line in reversed(lines):
        if _OURS in line:  # a progress bar may stand before it
            return line.rpartition(_OURS)[2].strip()[:_LONGEST]
    begun = max((at for at, line in enumerate(lines) if _TRACEBACK in line), default=len(lines))
    error = next((line for line in lines[begun + 1 :] if not line[0].isspace()), None)
    return (error or (lines[-1] if lines else "")).strip()[:_LONGEST]


def _tail(log: Path, most: int) -> bytes:
    try:
        with open(log, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - most))
            return file.read(most)
    except OSError:
        return b""


def _lines(output: bytes) -> list[str]:
    """Those that are not blank."""
    return [line for line in output.decode(errors="replace").replace("\r", "\n").splitlines() if line.strip()]
