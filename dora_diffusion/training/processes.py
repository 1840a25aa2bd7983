"""The processes that train together: which this is, its share of what can be done apart, and waiting for the others.

What may take long (drawing, encoding, writing) is waited for through the store by which the processes have found one
another, never in a collective: NCCL ends one after ten minutes, gloo after thirty, and nobody can say how long a
preview takes. A wait looks at the store again and again, between which signals are heard; it has no limit, for whoever
started the processes ends them all when one fails.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar

from accelerate import Accelerator

T = TypeVar("T")

_SECONDS = 0.02  # between the first looks; later ones are further apart
_LONGEST = 0.5
_PATIENCE = 30  # seconds until it is said what is waited for
_numbers = count()


@dataclass(frozen=True)
class Processes:
    """As one of them sees them; as it is made without arguments there is no other.

    Attributes:
        rank: which of them this is; 0 leads.
        count: how many there are.
        store: `torch.distributed.Store` that they have in common; None for one alone.
        in_step: whether all have to do the same forwards in the same order, for they keep the base together.
    """

    rank: int = 0
    count: int = 1
    store: Any = None
    in_step: bool = False

    @property
    def leads(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    def share(self, things: Sequence[T]) -> list[T]:
        """Every so manieth: what this process does of things that all list in one order."""
        return list(things[self.rank :: self.count])

    def share_of_forwards(self, things: Sequence[T]) -> list[T]:
        """The same of what the denoiser is asked for: all of it, where they keep the base together."""
        return list(things) if self.in_step else self.share(things)

    def meet(self, place: str) -> None:
        """Wait until every process has come here; `place`: a name that is used once."""
        self.exchange(place, "")

    def exchange(self, place: str, own: str) -> list[str]:
        """Wait until every process has said something; what each has, in their order. `place`: see `meet`."""
        if self.store is None:
            return [own]
        self.store.set(f"{place}/{self.rank}", own)
        for rank in range(self.count):
            self._await(f"{place}/{rank}", f"process {rank} ({place})")
        return [self.store.get(f"{place}/{rank}").decode() for rank in range(self.count)]

    def told(self, question: str, answer: Callable[[], bool]) -> bool:
        """What the leading process says, which alone is asked; `question`: a name that is used once."""
        if self.store is None:
            return answer()
        if self.leads:
            said = answer()
            self.store.set(question, b"yes" if said else b"no")
            return said
        self._await(question, f"process 0 ({question})")
        return bool(self.store.get(question) == b"yes")

    def _await(self, key: str, who: str) -> None:
        started, pause, is_said = time.monotonic(), _SECONDS, False
        while not self.store.check([key]):
            if not is_said and time.monotonic() - started > _PATIENCE:
                print(f"process {self.rank}: waiting for {who}", flush=True)
                is_said = True
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST)


ALONE = Processes()


def processes_of(accelerator: Accelerator, *, in_step: bool = False) -> Processes:
    """Those of a run. Each has to call this as often as the others: each time they get names of their own."""
    if accelerator.num_processes == 1:
        return ALONE
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    # the one that `init_process_group` has met at: of the launcher, or of process 0
    place, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(place, port, is_master=False, wait_for_workers=False, timeout=timedelta(minutes=10))
    start = f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    prefix = f"dora_diffusion/{start}/{next(_numbers)}"
    return Processes(accelerator.process_index, accelerator.num_processes, PrefixStore(prefix, store), in_step)


class StopRequest:
    """Whether the run is to end; a plain flag, since a lock could be held when a signal comes.

    Args:
        by_all: whether several processes have to agree on the step after which they stop.

    Attributes:
        asked: of this process.
        agreed: whether a step has told all processes that one was asked.
        at: when it was first asked, by the monotonic clock.
    """

    def __init__(self, *, by_all: bool = False) -> None:
        self.by_all = by_all
        self.asked = self.agreed = False
        self.at = 0.0

    @property
    def stands(self) -> bool:
        """Whether the step that was taken is the last."""
        return self.agreed if self.by_all else self.asked
