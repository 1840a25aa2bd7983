"""Near duplicates are found by bands: the same ones that comparing every pair finds, without comparing every pair."""

from pathlib import Path

import numpy as np
import pytest

from dora_diffusion.training.data.doctor import duplicates as module
from dora_diffusion.training.data.doctor.duplicates import NEAR_BITS, NEAR_COLOUR, duplicates
from dora_diffusion.training.data.doctor.looks import Look


def look(number: int, bits: np.ndarray, colours: np.ndarray, digest: str = "") -> Look:
    packed = np.packbits(bits.astype(np.uint8))
    path = Path(f"{number}.png")
    return Look(path, (64, 64), digest or str(number), packed, colours.astype(np.float32), *[False] * 4)


def crowd(count: int, seed: int) -> list[Look]:
    """Families of pictures whose hashes differ in 0 to 12 bits and whose colours drift, in a shuffled order."""
    rng = np.random.default_rng(seed)
    looks = []
    for number in range(count):
        parent = np.random.default_rng(int(rng.integers(0, count // 8)))
        bits, colours = parent.integers(0, 2, 64), parent.uniform(0, 255, (8, 8, 3))
        bits[rng.choice(64, int(rng.integers(0, 13)), replace=False)] ^= 1
        looks.append(look(number, bits, colours + rng.uniform(0, 50)))
    return looks


def every_pair(looks: list[Look]) -> list[tuple[int, int]]:
    """(picture, the first earlier one that is near), by the rule itself."""
    bits = np.unpackbits(np.stack([one.bits for one in looks]), axis=1)
    near = []
    for number, one in enumerate(looks):
        for earlier in range(number):
            differing = (bits[earlier] != bits[number]).sum()
            if differing <= NEAR_BITS and np.abs(looks[earlier].colours - one.colours).mean() <= NEAR_COLOUR:
                near.append((number, earlier))
                break
    return near


@pytest.mark.parametrize("seed", range(3))
def test_the_same_are_found_as_by_comparing_every_pair(seed: int) -> None:
    looks = crowd(400, seed)
    expected = every_pair(looks)
    assert 50 < len(expected) < 350
    found = [(int(one.path.stem), one.message) for one in duplicates(looks)]
    assert found == [(a, f"nearly the same picture as {b}.png; keep one of them") for a, b in expected]


@pytest.mark.parametrize("bits", range(NEAR_BITS + 2))
def test_whichever_bits_differ_up_to_the_limit_is_near(bits: int) -> None:
    rng, colours = np.random.default_rng(bits), np.zeros((8, 8, 3))
    for _ in range(200):
        one = rng.integers(0, 2, 64)
        other = one.copy()
        other[rng.choice(64, bits, replace=False)] ^= 1
        assert len(list(duplicates([look(0, one, colours), look(1, other, colours)]))) == (bits <= NEAR_BITS)


def test_ten_thousand_are_not_compared_pairwise(monkeypatch) -> None:
    rng = np.random.default_rng(0)
    looks = [look(number, rng.integers(0, 2, 64), np.zeros((8, 8, 3))) for number in range(10_000)]
    compared = 0
    count_nonzero = np.count_nonzero

    def counted(values, axis):
        nonlocal compared
        compared += len(values)
        return count_nonzero(values, axis=axis)

    monkeypatch.setattr(module.np, "count_nonzero", counted)
    list(duplicates(looks))
    assert 0 < compared < 10_000 * 9_999 / 2 / 50


def test_the_same_bytes_are_named_before_what_is_nearly_the_same() -> None:
    flat, colours = np.zeros(64, int), np.zeros((8, 8, 3))
    looks = [look(0, flat, colours), look(1, flat, colours, "a"), look(2, flat, colours, "a")]
    assert [one.message.split(";")[0] for one in duplicates(looks)] == [
        "nearly the same picture as 0.png",
        "the same bytes as 1.png",
    ]
