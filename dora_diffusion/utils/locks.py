"""A lock that may be copied with what it guards."""

import threading
from typing import Any, Self


class Lock:
    """A re-entrant lock; a copy of it is a new one, so that a pipeline with adapters can be copied or pickled."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def acquire(self) -> None:
        """Wait for it."""
        self._lock.acquire()

    def release(self) -> None:
        """Give it back; nothing happens when this thread does not hold it."""
        if self._lock._is_owned():  # type: ignore[attr-defined]
            self._lock.release()

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()
