"""The judges themselves: what likeness and recognition say of pictures whose answer is known."""

import pytest
from PIL import Image, ImageDraw

from dora_diffusion.evaluate.likeness import likeness
from dora_diffusion.evaluate.recognition import Scores, nearest_background, score
from dora_diffusion.pretrain.scenes import Scene, background, caption, compose, vocabulary

PLACES = vocabulary().backgrounds


def drawing(name: str, style: str) -> Image.Image:
    """A drawing that depends on object and style: a bar whose place and colour tell them apart."""
    words = vocabulary()
    index, hue = words.objects.index(name), 90 * list(words.styles).index(style)
    icon = Image.new("RGBA", (120, 120))
    ImageDraw.Draw(icon).rectangle(
        (index % 12 * 10, index // 12 * 12, index % 12 * 10 + 9, 119), fill=(hue, 250, 255 - hue)
    )
    return icon


def reference(scene: Scene) -> Image.Image:
    return compose(drawing(scene.object, str(scene.style)), scene.background, scene.size)


@pytest.mark.parametrize("place", PLACES)
def test_likeness_is_one_for_the_same_and_looks_past_the_background(place: str) -> None:
    scene = Scene("rocket", "noto", place)
    truth, empty = reference(scene), background(place)
    other = reference(Scene("hedgehog", "noto", place))
    assert likeness(truth, truth, caption(scene)) == pytest.approx(1)
    assert likeness(empty, truth, caption(scene)) == 0
    assert likeness(other, truth, caption(scene)) < 0.7


@pytest.mark.parametrize("place", PLACES)
def test_a_background_is_its_own_nearest(place: str) -> None:
    assert nearest_background(background(place)) == place


def test_scores_count_what_is_right() -> None:
    asked = [Scene("rocket", "noto", "blue"), Scene("owl", "flat", "beach"), Scene("crown", "twemoji", "red")]
    assert score([reference(s) for s in asked], asked, reference) == Scores(3, 1.0, 1.0, 1.0)
    drawn = [
        reference(Scene("pizza", "noto", "blue")),  # another object
        reference(Scene("owl", "noto", "beach")),  # another style, so not the object in that style's place either
        reference(Scene("crown", "twemoji", "green")),  # another background
    ]
    got = score(drawn, asked, reference)
    assert (got.count, got.background) == (3, pytest.approx(2 / 3))
    assert got.style < 1
    assert got.object < 1
