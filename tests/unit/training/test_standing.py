"""Which measurement is the best, and when patience ends: beside a literal reading of what the settings say."""

from random import Random

import pytest

from dora_diffusion.training.run.standing import Best, Standing, without_better

Losses = list[tuple[int, float]]


def rows(*losses: float) -> Losses:
    """A measurement before the first step, and one every ten."""
    return [(10 * number, loss) for number, loss in enumerate(losses)]


def judged(standing: Standing, losses: Losses, *, last: int = 10_000) -> Standing:
    """After all of them, or after the one that ended the run."""
    end_of(standing, losses, last=last)
    return standing


def end_of(standing: Standing, losses: Losses, *, last: int = 10_000) -> int | None:
    """The step after which the run ended."""
    for count in range(1, len(losses) + 1):
        standing.judge(losses[:count], last=last)
        if standing.ended_early:
            return losses[count - 1][0]
    return None


def test_the_best_is_the_first_of_the_lowest_after_a_step() -> None:
    assert judged(Standing(keeps_best=True), rows(1.0, 4.0, 3.0, 3.0, 5.0)).best == Best(20, 3.0)
    assert judged(Standing(), rows(1.0, 4.0, 3.0)).best is None


@pytest.mark.parametrize("seed", range(20))
def test_patience_ends_after_so_many_in_a_row_without_a_better_one(seed: int) -> None:
    rng, patience = Random(seed), 1 + seed % 4
    losses = rows(*(rng.random() for _ in range(30)))
    ends, bad, lowest = None, 0, float("inf")
    for step, loss in losses[1:]:
        bad, lowest = (0, loss) if loss < lowest else (bad + 1, lowest)
        if bad == patience:
            ends = step
            break
    assert end_of(Standing(patience=patience), losses) == ends


def test_the_last_step_is_no_early_end_and_never_ends_without_patience() -> None:
    assert not judged(Standing(patience=1), rows(1.0, 2.0, 3.0), last=20).ended_early
    assert not judged(Standing(), rows(*range(50))).ended_early


def test_an_extension_begins_patience_anew_and_keeps_the_best() -> None:
    losses = rows(9.0, 1.0, 2.0, 3.0)
    standing = judged(Standing(keeps_best=True, patience=2), losses)
    assert standing.ended_early
    standing.extend(30)
    for count, ends in ((5, False), (6, False), (7, True)):
        longer = [*losses, (40, 5.0), (50, 6.0), (60, 7.0)][:count]
        standing.judge(longer, last=10_000)
        assert (standing.ended_early, standing.best) == (ends, Best(10, 1.0))


def test_what_a_checkpoint_holds_of_it_goes_on_as_it_was() -> None:
    losses = rows(9.0, 3.0, 4.0)
    standing = judged(Standing(keeps_best=True, patience=3), losses)
    standing.extend(10)
    again = Standing(keeps_best=True, patience=3)
    again.resume(standing.progress())
    assert again.progress() == standing.progress()
    off = Standing(keeps_best=False)
    off.resume(standing.progress())
    assert off.best is None
    older = Standing(keeps_best=True)
    older.resume({})  # of a checkpoint from before there was any
    assert (older.best, older.ended_early) == (None, False)


def test_counting_begins_after_a_step() -> None:
    losses = rows(0.0, 5.0, 6.0, 7.0)
    assert [without_better(losses, since=since) for since in (0, 10, 20, 30)] == [2, 1, 0, 0]
