"""A slice of `benchmarks/app/load.py`: tabs at once, cancels, and files that change under the app's hands."""

from pathlib import Path

import pytest

from benchmarks.app.load import cancels, concurrent, controls, faults


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return controls(tmp_path_factory.mktemp("load") / "adapters")


def test_each_picture_is_the_one_drawn_alone(folder: Path, tmp_path: Path) -> None:
    assert concurrent(folder, tmp_path, count=12, clients=4, seed=7).problems == ()


def test_a_cancel_ends_within_a_step_and_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    assert cancels(folder, tmp_path, count=5, seed=7).problems == ()


def test_adapters_that_change_meanwhile_give_their_picture_or_an_error(folder: Path, tmp_path: Path) -> None:
    assert faults(folder, tmp_path, count=12, seed=7).problems == ()
