"""`loss.csv`: a resumed run has the very numbers of one that went through."""

import math

from dora_diffusion.training.run.history import History


def test_a_resumed_history_is_the_one_that_was_saved(tmp_path) -> None:
    whole = History()
    for step, loss in enumerate([0.123456789, 1e-9, math.nan, 12345.678, 0.1 + 0.2], start=1):
        whole.add(step, loss, 1e-4 / step)
    (tmp_path / "loss.csv").write_text(whole.as_csv())
    resumed = History()
    resumed.add(1, 5.0, 5.0)
    resumed.resume(tmp_path / "loss.csv")
    for history in (whole, resumed):
        history.add(6, 0.25, 1e-5)
    assert resumed.as_csv() == whole.as_csv()
    assert resumed.losses[:2] == whole.losses[:2] == [(1, 0.123457), (2, 1e-9)]
    assert whole.as_csv().splitlines()[:2] == ["step,loss,learning_rate", "1,0.123457,0.0001"]
    assert whole.as_csv().splitlines()[-1] == "6,0.25,1e-05"


def test_a_checkpoint_from_before_it_begins_at_nothing(tmp_path) -> None:
    history = History()
    history.resume(tmp_path / "loss.csv")
    assert history.as_csv() == "step,loss,learning_rate\n" and history.losses == []
