"""Ending a run early: what signals do inside the block and outside, and a process that outlives its standard input."""

import signal
import subprocess
import sys
import threading

import pytest

from dora_diffusion.training.run.signals import stop_requests

pytestmark = pytest.mark.usefixtures("plain_signals")

PATIENCE = 300.0  # seconds, for machines that do other things as well
FOREVER = 10**6  # steps

SCRIPT = """
import time
from dora_diffusion.training.run.signals import end_with_stdin
try:
    print("here", flush=True)
    end_with_stdin(seconds={seconds})
    for _ in range({steps}):
        time.sleep(0.01)
except KeyboardInterrupt:
    print("asked", flush=True)
    time.sleep({linger})
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_ends(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt), stop_requests() as stop:
        assert not stop.asked
        signal.raise_signal(number)
        assert stop.asked
        signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_what_a_launcher_passes_on_is_the_first_signal_once_more(monkeypatch) -> None:
    with pytest.raises(KeyboardInterrupt), stop_requests(by_all=True) as stop:
        signal.raise_signal(signal.SIGINT)  # the terminal's, to all processes
        signal.raise_signal(signal.SIGTERM)  # the launcher's, which the terminal has told too
        assert stop.asked and not stop.stands  # a step has to tell the others
        stop.agreed = True
        assert stop.stands
        stop.at -= 60
        signal.raise_signal(signal.SIGINT)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system knows no SIGHUP")
def test_a_terminal_that_is_closed_asks_however_often_it_says_so() -> None:
    with stop_requests() as stop:
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
        assert stop.asked


def test_a_signal_that_is_ignored_or_handled_already_stays_so() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, signal.SIG_IGN), signal.signal(signal.SIGTERM, lambda n, _: heard.append(n))
    try:
        with stop_requests() as stop:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
        assert not stop.asked and heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])


def test_another_thread_trains_without_handlers() -> None:
    asked: list[bool] = []

    def work() -> None:
        with stop_requests() as stop:
            asked.append(stop.asked)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(PATIENCE)
    assert asked == [False]


def _start(steps: int, linger: float, *, seconds: float = PATIENCE) -> subprocess.Popen[bytes]:
    script = SCRIPT.format(steps=steps, linger=linger, seconds=seconds)
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"here\n"
    return process


@pytest.mark.parametrize(("linger", "seconds", "code"), [(0, PATIENCE, 0), (PATIENCE, 1.0, 130)])
def test_a_closed_standard_input_interrupts_and_then_ends(linger: float, seconds: float, code: int) -> None:
    with _start(FOREVER, linger, seconds=seconds) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(b"words mean nothing\n")
        process.stdin.flush()
        assert process.poll() is None
        process.stdin.close()
        assert process.stdout.read() == b"asked\n"
        assert process.wait(PATIENCE) == code


def test_a_run_that_is_through_does_not_wait_for_its_standard_input() -> None:
    with _start(0, 0) as process:
        assert process.wait(PATIENCE) == 0 and process.stdout is not None
        assert process.stdout.read() == b""


def test_without_a_standard_input_it_ends() -> None:
    script = "import os; os.close(0)\n" + SCRIPT.format(steps=FOREVER, linger=0, seconds=PATIENCE)
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=PATIENCE, check=False)
    assert process.stdout == b"here\nasked\n"
