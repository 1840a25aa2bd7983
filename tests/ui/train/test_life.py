"""What the Train tab says, whatever happens to a run; lines of Python stand in for the trainer."""

import json
import shutil
import threading
import time
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

gr = pytest.importorskip("gradio", reason="gradio is not installed: pip install dora-diffusion[ui]")

from dora_diffusion.pretrain.scenes import background  # noqa: E402  (after the skip above)
from tests.ui.scripted import WAIT, Scripted, config_of_run, make_run, until, write_losses  # noqa: E402
from tests.ui.served import served  # noqa: E402
from ui.backend.session import Session  # noqa: E402
from ui.options import UiOptions  # noqa: E402
from ui.train import process as train_process  # noqa: E402
from ui.train.log import last_reason  # noqa: E402
from ui.train.runs import LOG, LossReader  # noqa: E402
from ui.train.tab import build_train  # noqa: E402

SHOWN = ("run", "status", "plot", "samples", "checkpoint", "start", "stop", "seen")


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    """What the trainer runs."""
    scripted = Scripted()
    monkeypatch.setattr(train_process, "spawn", scripted)
    return scripted


class Tab:
    """The Train tab of one page without a browser: its handlers, and what stands in its widgets."""

    def __init__(self, session: Session, options: UiOptions) -> None:
        with gr.Blocks() as demo:
            self.train = build_train(session, options)
        handlers = {fn.name: fn.fn for fn in demo.fns.values()}
        self._tick, self._resume = handlers["tick"], handlers["resume"]
        self.trainer = self.train.trainer
        self.shown: dict[str, Any] = dict.fromkeys(SHOWN)

    def ask(self) -> dict[str, Any]:
        """What a tick answers to the page as it is now; `take` it, late or never."""
        return dict(zip(SHOWN, self._tick(self.shown["run"], self.shown["seen"]), strict=True))

    def take(self, answer: dict[str, Any]) -> dict[str, Any]:
        """Put an answer into the widgets; what it changed."""
        news = {name: _value(answer[name]) for name in answer if not _is_skip(answer[name])}
        self.shown |= {name: value for name, value in news.items() if value is not None}
        return news

    def tick(self) -> dict[str, Any]:
        """Ask, and take the answer."""
        return self.take(self.ask())

    def resume(self) -> None:
        """Press Resume."""
        self.take(dict(zip(("run", "status", "start", "stop"), self._resume(self.shown["run"]), strict=True)))

    def wait(self) -> None:
        """Until the process has ended."""
        until(lambda: not self.trainer.running)


def _is_skip(value: Any) -> bool:
    return isinstance(value, dict) and value.get("__type__") == "update"


def _value(answer: Any) -> Any:
    if isinstance(answer, gr.Button):
        return answer.interactive
    return answer.value if isinstance(answer, gr.Dropdown) else answer


@pytest.fixture
def options(adapters: Path, tmp_path: Path) -> UiOptions:
    """Folders of their own."""
    (tmp_path / "sets").mkdir()
    return UiOptions(model="random", adapters=adapters, datasets=(tmp_path / "sets",), runs=tmp_path / "runs")


@pytest.fixture
def tab(session: Session, options: UiOptions, scripted: Scripted) -> Iterator[Tab]:
    """A page whose trainer is scripted."""
    tab = Tab(session, options)
    yield tab
    tab.train.close()


def _buttons(tab: Tab) -> tuple[bool, bool]:
    return tab.shown["start"], tab.shown["stop"]


def test_a_run_that_comes_and_goes_between_two_ticks_leaves_the_buttons_right(
    tab: Tab, options: UiOptions, scripted: Scripted
) -> None:
    make_run(options, "robot", checkpoints=1)
    tab.shown["run"] = "robot"
    for _ in range(2):  # the second time, the page was shown the same end before
        tab.tick()
        tab.resume()
        assert _buttons(tab) == (False, True) and "going on" in tab.shown["status"]
        tab.wait()
        tab.tick()
        assert _buttons(tab) == (True, False) and "done" in tab.shown["status"]


def test_an_answer_from_before_a_start_does_not_hide_its_end(tab: Tab, options: UiOptions) -> None:
    run = make_run(options, "robot", checkpoints=1)
    tab.shown["run"] = "robot"
    tab.resume()
    tab.wait()
    tab.tick()
    write_losses(run, 1, at=time.time())
    late = tab.ask()
    tab.resume()
    tab.take(late)
    tab.wait()
    tab.tick()
    assert _buttons(tab) == (True, False) and "done" in tab.shown["status"]


def test_an_answer_that_is_lost_is_sent_again_and_none_is_sent_twice(tab: Tab, options: UiOptions) -> None:
    make_run(options, "robot", checkpoints=2)
    tab.shown["run"] = "robot"
    tab.ask()
    assert set(tab.tick()) == set(SHOWN)
    assert tab.shown["checkpoint"] == 2 and _buttons(tab) == (True, False)
    assert tab.tick() == {}


@pytest.mark.parametrize("seen", [None, 3, "", "[]", "{", "[" * 100_000, '{"start": {"a": 1}}', "1" * 10_000])
def test_whatever_a_page_says_it_shows_it_gets_what_is_so(tab: Tab, options: UiOptions, seen: object) -> None:
    tab.shown["seen"] = seen
    assert set(tab.tick()) == set(SHOWN) and "No run on show" in tab.shown["status"]
    assert set(json.loads(tab.shown["seen"])) == set(SHOWN) - {"seen"}


def test_a_run_whose_folder_is_removed_is_no_longer_shown(tab: Tab, options: UiOptions, scripted: Scripted) -> None:
    run = make_run(options, "robot", checkpoints=1)
    write_losses(run, 2, at=time.time())
    tab.shown["run"] = "robot"
    tab.tick()
    assert "<svg" in tab.shown["plot"]
    shutil.rmtree(run)
    tab.tick()
    assert "No run on show" in tab.shown["status"] and tab.shown["plot"] == tab.shown["samples"] == ""


def test_a_page_that_still_shows_a_removed_run_is_told_not_refused(
    session: Session, options: UiOptions, tmp_path: Path
) -> None:
    with served(session, tmp_path) as app:
        (tick,) = [fn for fn in app.demo.fns.values() if fn.name == "tick" and len(fn.outputs) == len(SHOWN)]
        make_run(options, "robot")
        for seen in (None, "robot", "gone"):
            asked = {"fn_index": tick._id, "data": [seen, ""], "session_hash": "page"}
            answer = app.ask("POST", "gradio_api/run/predict", json=asked)
            assert answer.status_code == 200
            expected = "robot: step 0 of 3" if seen == "robot" else "No run on show"
            assert expected in answer.json()["data"][1]


def test_a_run_whose_folder_is_removed_while_it_trains_is_told(
    tab: Tab, options: UiOptions, scripted: Scripted
) -> None:
    scripted.script = WAIT
    run = make_run(options, "robot", checkpoints=1)
    tab.shown["run"] = "robot"
    tab.resume()
    shutil.rmtree(run)
    answer = tab.ask()
    assert "robot: its folder was removed while it trains" in answer["status"]
    assert answer["run"].value is None  # a value that is not listed would be refused at every tick
    tab.take(answer)
    assert _buttons(tab) == (False, True)
    tab.trainer.stop()
    assert tab.trainer.state().phase == "stopped"


def test_what_an_earlier_attempt_left_is_not_shown_as_the_next_ones(
    tab: Tab, options: UiOptions, scripted: Scripted
) -> None:
    scripted.script = WAIT
    run = make_run(options, "robot")
    write_losses(run, 2, at=time.time())
    (run / "samples").mkdir()
    background("red", 64).save(run / "samples" / "step-00000002.png")
    tab.shown["run"] = "robot"
    tab.tick()
    assert "step 2 of 3" in tab.shown["status"] and tab.shown["samples"]
    tab.trainer.start(config_of_run(options, "robot"))
    tab.tick()
    assert "step 0 of 3: getting ready" in tab.shown["status"] and tab.shown["samples"] == ""
    assert "No loss" in tab.shown["plot"]


def test_a_run_that_goes_on_stands_at_its_checkpoint_until_it_has_trained(
    tab: Tab, options: UiOptions, scripted: Scripted
) -> None:
    scripted.script = WAIT
    run = make_run(options, "robot", checkpoints=1)
    write_losses(run, 2, at=time.time() - 60)  # one step more than was saved
    tab.shown["run"] = "robot"
    tab.resume()
    tab.tick()
    assert "step 1 of 3: getting ready" in tab.shown["status"]
    write_losses(run, 2, at=time.time())
    tab.tick()
    assert "step 2 of 3, loss 0.5" in tab.shown["status"]


def test_a_run_is_done_when_its_files_are_there(tab: Tab, options: UiOptions) -> None:
    run = make_run(options, "robot", checkpoints=2)
    write_losses(run, 3, at=time.time())  # it was killed while it wrote its files
    tab.shown["run"] = "robot"
    tab.tick()
    assert "step 3 of 3; it can be resumed from step 2" in tab.shown["status"]
    for file in ("adapter.safetensors", "validation.json"):
        (run / file).touch()
    tab.tick()
    assert "done, step 3 of 3" in tab.shown["status"]


def test_a_run_whose_pictures_are_gone_says_so_instead_of_offering_to_go_on(tab: Tab, options: UiOptions) -> None:
    run = make_run(options, "robot", checkpoints=2)
    write_losses(run, 2, at=time.time())
    options.datasets[0].rmdir()
    tab.shown["run"] = "robot"
    tab.tick()
    assert "robot: step 2; " in tab.shown["status"] and "expected an existing folder" in tab.shown["status"]
    for file in ("adapter.safetensors", "validation.json"):
        (run / file).touch()
    tab.tick()
    assert "robot: done, step 2<" in tab.shown["status"]


def test_another_run_says_what_is_under_way(tab: Tab, options: UiOptions, scripted: Scripted) -> None:
    scripted.script = WAIT
    make_run(options, "robot", checkpoints=1)
    tab.trainer.resume(make_run(options, "other", checkpoints=1))
    tab.shown["run"] = "robot"
    tab.tick()
    assert "resumed from step 1 (other is under way)" in tab.shown["status"] and _buttons(tab) == (False, True)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("print('dora-diffusion: step 2: too steep'); print('a leaked semaphore'); exit(2)", "step 2: too steep"),
        ("print('training: 5%|#', end=''); print('dora-diffusion: no space'); exit(2)", "no space"),
        ("raise RuntimeError('CUDA error\\nhint: compile with DSA')", "RuntimeError: CUDA error"),
        ("exit(3)", "it wrote nothing"),
        ("import os; print('x'); os.kill(os.getpid(), 9)", "killed by signal 9, perhaps for want of memory; its last"),
        ("import os; os.kill(os.getpid(), 11)", "killed by signal 11; its last line: none"),
    ],
)
def test_a_run_that_died_by_itself_says_why(
    tab: Tab, options: UiOptions, scripted: Scripted, script: str, reason: str
) -> None:
    scripted.script = script
    make_run(options, "robot", checkpoints=1)
    tab.shown["run"] = "robot"
    tab.resume()
    tab.wait()
    tab.tick()
    assert tab.trainer.state().message.startswith(reason), tab.trainer.state()
    assert f"robot failed at step 1 of 3: {reason}" in tab.shown["status"] and _buttons(tab) == (True, False)


def test_a_run_that_somebody_else_interrupted_is_stopped_not_failed(
    tab: Tab, options: UiOptions, scripted: Scripted
) -> None:
    scripted.script = "exit(130)"
    tab.trainer.resume(make_run(options, "robot", checkpoints=1))
    tab.wait()
    assert tab.trainer.state().phase == "stopped"


def test_a_full_disk_is_named_even_when_the_log_could_not_be_written(
    tab: Tab, options: UiOptions, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted.script = "exit(1)"
    run = make_run(options, "robot", checkpoints=1)
    tab.trainer.resume(run)
    tab.wait()
    usage = namedtuple("usage", ["total", "used", "free"])(100, 100, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert tab.trainer.state().message == f"the disk of {run} is full; it wrote nothing"


def test_a_start_that_fails_leaves_the_last_run_on_record(tab: Tab, options: UiOptions, scripted: Scripted) -> None:
    tab.trainer.resume(make_run(options, "robot", checkpoints=1))
    tab.wait()
    (make_run(options, "other") / LOG).mkdir()
    with pytest.raises(OSError, match="directory"):
        tab.trainer.resume(options.runs / "other")
    assert (tab.trainer.state().run, tab.trainer.state().phase) == ("robot", "done")


def test_two_pages_that_start_one_name_start_one_run(tab: Tab, options: UiOptions, scripted: Scripted) -> None:
    scripted.script = WAIT
    outcomes: list[str] = []

    def press() -> None:
        try:
            outcomes.append(tab.trainer.start(config_of_run(options, "robot")).name)
        except ValueError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=press) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = "training: robot is under way; stop it first, or wait until it is done"
    assert sorted(outcomes) == ["robot", *[refused] * 3]


def test_losses_of_a_removed_run_are_forgotten(options: UiOptions) -> None:
    run = make_run(options, "robot")
    write_losses(run, 3, at=100.0)
    reader = LossReader(run)
    assert list(reader.losses().train) == [1, 2, 3] and reader.losses().written == 100.0
    shutil.rmtree(run / "logs")
    assert not reader.losses().train and reader.losses().written == 0
    write_losses(run, 1, at=200.0)
    assert list(reader.losses().train) == [1]


def test_a_reason_is_found_without_a_log_and_in_a_long_one(tmp_path: Path) -> None:
    assert last_reason(tmp_path / "none") == ""
    (tmp_path / "log").write_bytes(b"dora-diffusion: x\r" + b"\xff\n" * (1 << 20))
    assert last_reason(tmp_path / "log") == "\ufffd"
