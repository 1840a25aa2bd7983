"""Errors as one line in the browser: mistakes in full, files by their name, of anything else the kind."""

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

gr = pytest.importorskip("gradio", reason="gradio is not installed: pip install dora-diffusion[ui]")

from dora_diffusion.training.config import TrainConfig  # noqa: E402
from dora_diffusion.utils import atomic as storage  # noqa: E402  (after the skip above)
from ui.backend.session import Session  # noqa: E402
from ui.errors import line_of, user_errors  # noqa: E402
from ui.tabs.inspect_page import plot_of  # noqa: E402
from ui.train.process import Trainer  # noqa: E402


def _shown(work: Callable[[], object], *, is_markup: bool = True) -> gr.Error:
    with pytest.raises(gr.Error) as caught, user_errors(is_markup=is_markup):
        work()
    return caught.value


def _raise(error: Exception) -> None:
    raise error


def test_a_mistake_is_one_line_of_text() -> None:
    error = _shown(lambda: _raise(ValueError("slot 1: got '<b>',\nexpected a name")))
    assert (error.message, error.print_exception) == ("slot 1: got '&lt;b&gt;', expected a name", False)
    plain = _shown(lambda: _raise(ValueError("got '<b>'")), is_markup=False)
    assert plain.message == "got '<b>'"
    again = _shown(lambda: _raise(error))
    assert again is error


def test_what_nobody_foresaw_is_told_by_its_kind() -> None:
    error = _shown(lambda: _raise(RuntimeError("secret")))
    assert (error.message, error.print_exception) == ("RuntimeError; the terminal that runs the app says more", True)
    assert _shown(lambda: _raise(OSError("no name"))).print_exception


def test_a_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    error = _shown(lambda: (tmp_path / "<b>\n.txt").read_text())
    assert error.message == rf"{tmp_path}/&lt;b&gt;\n.txt: cannot be read or written (No such file or directory)"
    assert not error.print_exception
    assert len(line_of(OSError(errno.ENAMETOOLONG, "File name too long", "x" * 5000))) < 400
    odd = line_of(OSError(errno.EIO, "Input/output error", b"\xff"))
    assert odd == r"\udcff: cannot be read or written (Input/output error)"


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")  # as the system says it: without a name

    monkeypatch.setattr(storage.os, "fsync", full)
    config = TrainConfig.model_validate({"output_dir": str(tmp_path / "run"), "data": {"instance_dir": str(tmp_path)}})
    error = _shown(lambda: Trainer().start(config))
    expected = f"{tmp_path}/run/config.yaml: cannot be read or written (No space left on device)"
    assert (error.message, error.print_exception) == (expected, False)


def test_a_folder_that_cannot_be_made_is_named(session: Session) -> None:
    session.output.mkdir()
    (session.output / "plots").write_text("in the way")
    error = _shown(lambda: plot_of(session, ("ink",)))
    assert error.message == f"{session.output}/plots: cannot be read or written (File exists)"
