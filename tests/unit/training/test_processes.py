"""Sharing and waiting without a collective: several threads stand for processes, with one store."""

import threading
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed import HashStore

from dora_diffusion.training.config import OptimConfig
from dora_diffusion.training.processes import ALONE, Processes
from dora_diffusion.training.step.training_step import TrainingStep

LONG = 60.0


def together(count: int, work: Callable[[Processes], None]) -> list[threading.Thread]:
    """Start a thread for each process, in turn."""
    store = HashStore()
    threads = [threading.Thread(target=work, args=(Processes(rank, count, store),)) for rank in range(count)]
    for thread in threads:
        thread.start()
    return threads


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_are_disjoint_and_all_of_it(count: int) -> None:
    shares = [Processes(rank, count).share(range(5)) for rank in range(count)]
    assert sorted(thing for share in shares for thing in share) == [0, 1, 2, 3, 4]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(("accumulation", "count"), [(1, 1), (2, 2), (3, 2)])
def test_micro_batches_are_those_of_one_process_dealt_out(accumulation: int, count: int) -> None:
    def numbers(rank: int, step: int) -> list[int]:
        accelerator: Any = SimpleNamespace(
            num_processes=count, process_index=rank, prepare_optimizer=lambda optimizer: optimizer
        )
        optim = OptimConfig(gradient_accumulation=accumulation)
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        parts: dict[str, Any] = {"batches_at": None, "optimizer": optimizer, "guard": None}
        return TrainingStep(optim, accelerator, None, None, **parts).micro_batches(step)  # type: ignore[arg-type]

    dealt: list[int] = []
    for step in range(3):
        of_each = [numbers(rank, step) for rank in range(count)]
        dealt += [of_one[micro] for micro in range(accumulation) for of_one in of_each]
    assert dealt == list(range(3 * accumulation * count))


def test_nobody_goes_on_before_all_have_come() -> None:
    come, gone, late = [], [], threading.Event()

    def work(processes: Processes) -> None:
        if processes.rank == 2:
            assert late.wait(LONG)
        come.append(processes.rank)
        processes.meet("here")
        gone.append(len(come))

    threads = together(3, work)
    threads[0].join(0.5)
    assert gone == []
    late.set()
    for thread in threads:
        thread.join(LONG)
    assert gone == [3, 3, 3]


def test_what_each_says_is_heard_in_their_order_and_the_leading_one_alone_is_asked() -> None:
    heard: dict[int, object] = {}

    def work(processes: Processes) -> None:
        said = processes.exchange("said", f"by {processes.rank}")
        answers = [processes.told(f"question {answer}", partial(asked, processes, answer)) for answer in (False, True)]
        heard[processes.rank] = (said, answers)

    def asked(processes: Processes, answer: bool) -> bool:
        assert processes.rank == 0
        return answer

    for thread in together(2, work):
        thread.join(LONG)
    assert heard == {rank: (["by 0", "by 1"], [False, True]) for rank in range(2)}


def test_one_alone_waits_for_nobody() -> None:
    ALONE.meet("here")
    assert ALONE.exchange("said", "it") == ["it"] and ALONE.told("is it", lambda: True) is True
    assert ALONE.leads and ALONE.share("ab") == ["a", "b"]
