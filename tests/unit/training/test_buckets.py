"""Buckets: at which size a picture is trained, and in what order their batches come."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dora_diffusion.training.base.sizes import Sizes
from dora_diffusion.training.config import ConceptConfig, DataConfig
from dora_diffusion.training.data.buckets import LONGEST_ASPECT, bucket_of, in_buckets, kept_share
from dora_diffusion.training.data.examples import Example
from dora_diffusion.training.data.order import StepSampler

SDXL = Sizes(native=1024, multiple=8, family="sdxl")


@pytest.mark.parametrize(
    ("picture", "resolution", "size"),
    [
        ((1024, 1024), 1024, (1024, 1024)),
        ((6000, 4000), 1024, (1216, 832)),  # as kohya's table has it
        ((4000, 6000), 1024, (832, 1216)),
        ((1920, 1080), 1024, (1344, 768)),
        ((4032, 3024), 512, (576, 448)),
        ((1000, 1000), 1024, (960, 960)),  # no upscaling: a smaller bucket
        ((500, 130), 512, (480, 128)),
        ((33, 30), 64, (24, 24)),  # smaller than a step of buckets: in steps of the base
        ((8, 8), 1024, (8, 8)),
    ],
)
def test_the_bucket_of_a_picture(picture, resolution, size) -> None:
    assert bucket_of(picture, resolution=resolution, multiple=8) == size


def test_small_pictures_are_made_larger_only_when_asked() -> None:
    assert bucket_of((100, 100), resolution=512, multiple=8) == (96, 96)
    assert bucket_of((100, 100), resolution=512, multiple=8, upscale=True) == (512, 512)
    assert bucket_of((300, 200), resolution=512, multiple=8, upscale=True) == (608, 416)


@given(
    picture=st.tuples(st.integers(16, 5000), st.integers(16, 5000)),
    resolution=st.sampled_from([64, 512, 768, 1024]),
    multiple=st.sampled_from([8, 16]),
    upscale=st.booleans(),
)
def test_a_bucket_fits_the_base_the_memory_and_the_picture(picture, resolution, multiple, upscale) -> None:
    size = bucket_of(picture, resolution=resolution, multiple=multiple, upscale=upscale)
    assert all(side > 0 and side % multiple == 0 for side in size)
    assert size[0] * size[1] <= resolution**2
    assert max(size) <= LONGEST_ASPECT * min(size)
    if not upscale:
        assert size[0] <= picture[0] and size[1] <= picture[1]
    turned = bucket_of(picture[::-1], resolution=resolution, multiple=multiple, upscale=upscale)
    assert kept_share(picture[::-1], turned) == kept_share(picture, size)
    if upscale and max(picture) <= 2 * min(picture) and resolution >= 512:
        assert kept_share(picture, size) > 0.9


def test_slivers_are_refused_whether_there_are_buckets_or_not(tmp_path: Path) -> None:
    sliver = Example(tmp_path / "wall.png", "a", original=(10_000, 20))
    for buckets in (True, False):
        data = DataConfig(instance_dir=tmp_path, buckets=buckets)
        with pytest.raises(ValueError, match=r"wall.png: 10000x20 pixels, a sliver of which little would be left"):
            in_buckets([sliver], data, SDXL)


def test_a_picture_smaller_than_every_bucket_is_named(tmp_path: Path) -> None:
    tiny = Example(tmp_path / "dot.png", "a", original=(7, 9))
    with pytest.raises(
        ValueError, match=r"dot.png: 7x9 pixels, expected at least 8 on the shorter side; .* data.upscale: true"
    ):
        in_buckets([tiny], DataConfig(instance_dir=tmp_path), SDXL)
    (sized,) = in_buckets([tiny], DataConfig(instance_dir=tmp_path, upscale=True), SDXL)
    assert sized.size == (896, 1152)


def test_every_resolution_once_and_concepts_their_own(tmp_path: Path) -> None:
    data = DataConfig(instance_dir=tmp_path, resolution=[1024, 512])
    large, small = (
        Example(tmp_path / "1", "a", original=(3000, 3000)),
        Example(tmp_path / "2", "a", original=(500, 500)),
    )
    own = Example(tmp_path / "3", "a", original=(3000, 3000), resolutions=(768,))
    sizes = [(one.path.name, one.size) for one in in_buckets([large, small, own], data, SDXL)]
    # what is smaller than both resolutions would be the same picture twice
    assert sizes == [("1", (512, 512)), ("1", (1024, 1024)), ("2", (480, 480)), ("2", (448, 448)), ("3", (768, 768))]
    square = DataConfig(instance_dir=tmp_path, resolution=512, buckets=False)
    assert [one.size for one in in_buckets([large, small], square, SDXL)] == [(512, 512)] * 2


def test_a_resolution_that_the_base_has_not_is_refused(tmp_path: Path) -> None:
    flux = Sizes(native=1024, multiple=16, family="flux1")
    with pytest.raises(ValueError, match="data.resolution: got 1000, expected a multiple of 16 for flux1"):
        in_buckets([Example(tmp_path, "a", original=(9, 9))], DataConfig(instance_dir=tmp_path, resolution=1000), flux)


def test_resolutions_are_checked_as_one_number_is(tmp_path: Path) -> None:
    for resolution in ([], [512, 500], 500, [True]):
        with pytest.raises(ValueError, match="resolution"):
            DataConfig(instance_dir=tmp_path, resolution=resolution)
        with pytest.raises(ValueError, match="resolution"):
            ConceptConfig(dir=tmp_path, resolution=resolution)
    assert ConceptConfig(dir=tmp_path, resolution=[512, 768]).resolutions == (512, 768)


@given(
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 5),
)
def test_batches_are_full_of_one_bucket_and_every_sample_is_seen_alike(counts, batch_size, seed) -> None:
    starts = [sum(counts[:index]) for index in range(len(counts))]
    buckets = [range(start, start + count) for start, count in zip(starts, counts, strict=True)]
    sampler = StepSampler(buckets, batch_size=batch_size, seed=seed)
    total, seen = sum(counts), Counter()
    for step in range(total):  # as many batches as fill `batch_size` epochs of every bucket
        samples = [place.sample for place in sampler.places_at(step)]
        assert len(samples) == batch_size
        assert any(set(samples) <= set(bucket) for bucket in buckets)
        seen.update(samples)
    assert seen == {sample: batch_size for sample in range(total)}


def test_the_order_of_buckets_is_shuffled_and_a_function_of_the_step() -> None:
    buckets = [range(0, 8), range(8, 16), range(16, 24)]
    sampler = StepSampler(buckets, batch_size=4, seed=1)
    steps = [sampler.places_at(step) for step in range(60)]
    again = StepSampler(buckets, batch_size=4, seed=1)
    assert [again.places_at(step) for step in reversed(range(60))] == steps[::-1]
    turns = [places[0].sample // 8 for places in steps]
    assert len({tuple(turns[start : start + 6]) for start in range(0, 60, 6)}) > 5
    assert all(sorted(turns[start : start + 6]) == [0, 0, 1, 1, 2, 2] for start in range(0, 60, 6))
    other = StepSampler(buckets, batch_size=4, seed=2)
    assert [other.places_at(step) for step in range(60)] != steps
    # Written down, so that no change of Python or of this code silently breaks the resuming of old runs.
    assert [[place.sample for place in places] for places in steps[:3]] == [
        [5, 1, 2, 0],
        [23, 16, 20, 18],
        [15, 10, 11, 12],
    ]
