"""Which samples a step sees: a function of (seed, step) alone, so a resumed run needs no state of its sampler."""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple


class Place(NamedTuple):
    """Where a sample stands: the epoch, and which of all samples it is."""

    epoch: int
    sample: int


class StepSampler:
    """Batches of one bucket each: every sample once an epoch of its bucket, shuffled anew, across batch borders.

    A batch is always full: a bucket of fewer samples than fit in one takes its turn once in so many epochs, so that
    every sample is seen as often as every other. In what order the buckets come is shuffled too.
    """

    def __init__(self, buckets: Sequence[Sequence[int]], *, batch_size: int, seed: int) -> None:
        """`buckets`: the samples of each, together 0..count-1."""
        if not buckets or not all(buckets) or batch_size < 1:
            counts = [len(bucket) for bucket in buckets]
            raise ValueError(f"got {counts} samples in batches of {batch_size}, expected at least 1 of each")
        self._buckets = buckets
        self._counts = [len(bucket) for bucket in buckets]
        self._batch_size = batch_size
        self._seed = seed
        self._order = lru_cache(maxsize=2 * len(buckets) + 2)(self._shuffled)
        self._turns = lru_cache(maxsize=4)(self._turns_of)

    def places_at(self, step: int) -> list[Place]:
        """The samples of step 0, 1, 2 ..., all of one bucket."""
        beyond = (step + 2 + len(self._counts)) * self._batch_size // sum(self._counts) + 1
        epoch = bisect_right(range(beyond), step, key=self._batches_before) - 1
        bucket, batch = self._turns(epoch)[step - self._batches_before(epoch)]
        start = batch * self._batch_size
        return [self._place_at(bucket, position) for position in range(start, start + self._batch_size)]

    def _batches_before(self, epoch: int) -> int:
        """How many batches the epochs before one have had: each bucket as many as its samples have filled."""
        return sum(epoch * count // self._batch_size for count in self._counts)

    def _turns_of(self, epoch: int) -> tuple[tuple[int, int], ...]:
        """The epoch's batches, as (bucket, its batch): buckets in a shuffled order, each one's batches by number."""
        filled = [
            range(epoch * count // self._batch_size, (epoch + 1) * count // self._batch_size) for count in self._counts
        ]
        turns = [(bucket, batch) for bucket, batches in enumerate(filled) for batch in batches]
        shuffled = sorted(turns, key=lambda turn: hash_of(f"{self._seed}/{epoch}/bucket {turn[0]}/{turn[1]}"))
        rest = [iter(batches) for batches in filled]
        return tuple((bucket, next(rest[bucket])) for bucket, _ in shuffled)

    def _place_at(self, bucket: int, position: int) -> Place:
        epoch, place = divmod(position, self._counts[bucket])
        return Place(epoch, self._order(bucket, epoch)[place])

    def _shuffled(self, bucket: int, epoch: int) -> tuple[int, ...]:
        """A bucket in the order of a hash, which, unlike `random.shuffle`, no Python version will change."""
        return tuple(sorted(self._buckets[bucket], key=lambda sample: hash_of(f"{self._seed}/{epoch}/{sample}")))


def hash_of(text: str) -> bytes:
    """What decides an order: of a text alone."""
    return hashlib.sha256(text.encode(errors="surrogateescape")).digest()
