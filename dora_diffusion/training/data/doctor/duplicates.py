"""Pictures that are there twice: by their bytes, or nearly, by a hash of how they look and then by their colours.

Not every pair is compared. Of 7 bands that the 64 bits of a hash are parted in, two hashes that differ in up to 6 bits
have one in common, so a picture is compared with those alone that share a band with it, and none is missed.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from dora_diffusion.training.data.doctor.findings import Finding
from dora_diffusion.training.data.doctor.looks import Look
from dora_diffusion.utils.text import shown_path

# Re-saving, halving, brightening by a tenth or a slight crop stay below both; the same drawing on another background,
# or two drawings alike in shape, do not (tried on DreamBooth's photos and on emoji).
NEAR_BITS = 6
NEAR_COLOUR = 20.0

_BITS = 64
_BANDS = tuple(np.array_split(np.arange(_BITS), NEAR_BITS + 1))


def duplicates(looks: Sequence[Look]) -> Iterator[Finding]:
    """Each picture that equals, or nearly equals, an earlier one; the first of those is named."""
    by_digest: dict[str, Look] = {}
    earlier = _Earlier(looks)
    for number, look in enumerate(looks):
        same = by_digest.setdefault(look.digest, look)
        near = same if same is not look else earlier.first_near(number)
        earlier.add(number)
        if near is not None:
            how = "the same bytes as" if near is same else "nearly the same picture as"
            yield Finding("duplicate", look.path, f"{how} {_named(near, beside=look)}; keep one of them")


def _named(look: Look, *, beside: Look) -> str:
    """By its name, with its folder where that is another."""
    return shown_path(look.path.name if look.path.parent == beside.path.parent else look.path)


class _Earlier:
    """Pictures that were seen, found by the bands of their hashes; equal hashes are one."""

    def __init__(self, looks: Sequence[Look]) -> None:
        packed = np.stack([look.bits for look in looks]) if looks else np.zeros((0, _BITS // 8), np.uint8)
        self._looks = looks
        self._bits = np.unpackbits(packed, axis=1)
        self._keys = [look.bits.tobytes() for look in looks]
        self._colours = np.stack([look.colours.ravel() for look in looks]) if looks else np.zeros((0, 192), np.float32)
        self._members: dict[bytes, list[int]] = {}
        self._in_band: dict[tuple[int, bytes], list[int]] = {}

    def add(self, number: int) -> None:
        """Let it be found by those that come later."""
        members = self._members.setdefault(self._keys[number], [])
        members.append(number)
        if len(members) == 1:
            for band in self._bands_of(number):
                self._in_band.setdefault(band, []).append(number)

    def first_near(self, number: int) -> Look | None:
        """The first of those that are near in both."""
        near = self._near_in_bits(number)
        if not near.size:
            return None
        differences = np.abs(self._colours[near] - self._colours[number]).mean(axis=1)
        found = near[differences <= NEAR_COLOUR]
        return self._looks[int(found[0])] if found.size else None

    def _near_in_bits(self, number: int) -> NDArray[np.intp]:
        """Those whose hash is near, in their order."""
        sharing = {other for band in self._bands_of(number) for other in self._in_band.get(band, ())}
        candidates = np.array(sorted(sharing), dtype=np.intp)
        distances = np.count_nonzero(self._bits[candidates] != self._bits[number], axis=1)
        hashes = [self._keys[int(one)] for one in candidates[distances <= NEAR_BITS]]
        return np.array(sorted(member for one in hashes for member in self._members[one]), dtype=np.intp)

    def _bands_of(self, number: int) -> Iterator[tuple[int, bytes]]:
        for band, places in enumerate(_BANDS):
            yield band, self._bits[number, places].tobytes()
