"""Send a payload and judge what it came to."""

import http.client
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from benchmarks.app.payloads.kinds import KINDS, Kind
from benchmarks.app.payloads.payloads import Body, filled
from benchmarks.app.payloads.target import Answer, Target


@dataclass(frozen=True)
class Outcome:
    """What one payload came to.

    Attributes:
        kind: its kind's name.
        payload: the payload, as one line.
        answers: to each request that it was sent with.
        faults: what broke the promise; empty when it was kept.
    """

    kind: str
    payload: str
    answers: tuple[Answer, ...]
    faults: tuple[str, ...]


def judged(target: Target, kind: Kind, payload: Any) -> Outcome:
    """Send it; afterwards nothing may have been fetched or written anywhere, and the app must be well."""
    target.answers.clear()
    before = target.listing()
    faults: list[str] = []
    try:
        faults += kind.send(target, filled(payload, target.words))
        faults += target.faults()
    except (OSError, httpx.HTTPError, http.client.HTTPException) as error:  # no answer is a fault like another
        faults.append(f"{type(error).__name__}: {error}")
    written = {path for path in target.listing() - before if not path.startswith(kind.may_write)}
    faults += [f"wrote {path}" for path in sorted(written)]
    return Outcome(kind.name, label(payload), tuple(target.answers), tuple(faults))


def all_judged(target: Target, kinds: Sequence[Kind] = KINDS, say: Callable[[str], None] = print) -> Iterator[Outcome]:
    """Every payload of these kinds; `say` hears of those that broke a promise."""
    for kind in kinds:
        for payload in kind.payloads:
            outcome = judged(target, kind, payload)
            if outcome.faults:
                say(f"{outcome.kind}: {outcome.payload}: {'; '.join(outcome.faults)}")
            yield outcome


def label(payload: Any) -> str:
    """The payload as one line of at most 80 characters."""
    text = payload.name if isinstance(payload, Body) else str(payload)
    return ascii(text)[1:-1][:80]
