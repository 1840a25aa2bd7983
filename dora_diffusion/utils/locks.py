"""A lock that may be copied with what it guards."""

import threading
from typing import Any, Self


class Lock:
    """A re-entrant lock; a deep copy of it is a new one, so that a pipeline with adapters can be copied."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> Self:
        self._lock.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.release()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)()
