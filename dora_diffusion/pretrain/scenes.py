"""Pictures the pocket base learns from: one drawn object on a background, and the caption that says all of it.

A picture varies in exactly four things (object, style, size, background) and the caption names each of them,
because what a caption leaves out a small model can only blur.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw

VOCABULARY_FILE = Path(__file__).parent.parent / "assets" / "pocket" / "vocabulary.json"
PICTURE_SIZE = 128
OBJECT_PIXELS = {"large": 100, "small": 56}


@dataclass(frozen=True)
class Vocabulary:
    """The words of the pocket base. `styles` and `unseen_styles` map a caption word to an icon set's name."""

    objects: tuple[str, ...]
    unseen_objects: tuple[str, ...]
    styles: dict[str, str]
    unseen_styles: dict[str, str]
    colours: dict[str, str]
    settings: dict[str, str]

    @property
    def backgrounds(self) -> tuple[str, ...]:
        """Every background's name: the colours, then the drawn settings."""
        return (*self.colours, *self.settings)


@dataclass(frozen=True)
class Scene:
    """One picture, named: `style` None leaves the style out of the caption (never out of the picture)."""

    object: str
    style: str | None
    background: str
    size: str = "large"


@cache
def vocabulary() -> Vocabulary:
    """The vocabulary that ships beside the pocket base's weights."""
    data = json.loads(VOCABULARY_FILE.read_text())
    return Vocabulary(
        objects=tuple(data["objects"]),
        unseen_objects=tuple(data["unseen_objects"]),
        styles=data["styles"],
        unseen_styles=data["unseen_styles"],
        colours=data["colours"],
        settings=data["settings"],
    )


def place_words(background: str) -> str:
    """'blue' -> 'on a blue background', 'beach' -> 'on the beach'."""
    words = vocabulary()
    if background in words.settings:
        return words.settings[background]
    if background not in words.colours:
        raise ValueError(f"background {background!r} is unknown: expected one of {', '.join(words.backgrounds)}")
    article = "an" if background[0] in "aeiou" else "a"
    return f"on {article} {background} background"


def background_in(text: str) -> str | None:
    """The name of the background that a caption names, or None."""
    return next((name for name in vocabulary().backgrounds if place_words(name) in text), None)


def caption(scene: Scene) -> str:
    """The canonical caption: `a [small] [STYLE style] OBJECT PLACE`."""
    words = ["small"] if scene.size == "small" else []
    words += [scene.style, "style"] if scene.style else []
    words.append(scene.object)
    return " ".join(["a", *words, place_words(scene.background)])


def varied_caption(scene: Scene, rng: Random) -> str:
    """One of a few templates that say the same; the canonical one half of the time."""
    style = f"{scene.style} style " if scene.style else ""
    small = "small " if scene.size == "small" else ""
    place = place_words(scene.background)
    thing = f"{small}{scene.object}"
    variants = (
        f"{small}{style}{scene.object} {place}",
        f"a {style}drawing of a {thing} {place}",
        f"a {thing} {place}" + (f", {scene.style} style" if scene.style else ""),
    )
    return caption(scene) if rng.random() < 0.5 else rng.choice(variants)


def _vertical_gradient(top: str, bottom: str, size: int) -> Image.Image:
    mask = Image.linear_gradient("L").resize((size, size))
    return Image.composite(Image.new("RGB", (size, size), bottom), Image.new("RGB", (size, size), top), mask)


def _meadow(draw: ImageDraw.ImageDraw, s: int) -> None:
    draw.ellipse((-0.5 * s, 0.58 * s, 1.5 * s, 1.8 * s), fill="#63b540")
    draw.ellipse((0.76 * s, 0.07 * s, 0.92 * s, 0.23 * s), fill="#ffe45e")


def _night(draw: ImageDraw.ImageDraw, s: int) -> None:
    for x, y in ((8, 12), (30, 30), (70, 8), (108, 20), (118, 60), (12, 66), (16, 112), (60, 120), (100, 108)):
        centre_x, centre_y, r = x * s / 128, y * s / 128, 0.018 * s
        draw.ellipse((centre_x - r, centre_y - r, centre_x + r, centre_y + r), fill="#fff6c8")


def _beach(draw: ImageDraw.ImageDraw, s: int) -> None:
    draw.rectangle((0, 0.45 * s, s, 0.68 * s), fill="#2a8fd0")
    draw.rectangle((0, 0.68 * s, s, s), fill="#f2d795")


def _snow(draw: ImageDraw.ImageDraw, s: int) -> None:
    draw.polygon(((0, 0.6 * s), (0.28 * s, 0.2 * s), (0.56 * s, 0.6 * s)), fill="#8ba3bb")
    draw.polygon(((0.5 * s, 0.6 * s), (0.78 * s, 0.28 * s), (1.1 * s, 0.6 * s)), fill="#9db3c8")
    draw.rectangle((0, 0.6 * s, s, s), fill="#f7fbff")


def _desert(draw: ImageDraw.ImageDraw, s: int) -> None:
    draw.ellipse((-0.4 * s, 0.55 * s, 0.8 * s, 1.5 * s), fill="#e0a458")
    draw.ellipse((0.35 * s, 0.62 * s, 1.6 * s, 1.5 * s), fill="#cf8b42")


def _water(draw: ImageDraw.ImageDraw, s: int) -> None:
    for x, y in ((14, 20), (24, 44), (110, 30), (100, 12), (116, 90), (10, 88)):
        centre_x, centre_y, r = x * s / 128, y * s / 128, 0.035 * s
        box = (centre_x - r, centre_y - r, centre_x + r, centre_y + r)
        draw.ellipse(box, outline="#c9f3ff", width=max(1, round(0.012 * s)))
    draw.rectangle((0, 0.9 * s, s, s), fill="#cdb47c")


_SETTINGS = {
    "meadow": ("#8fd0f5", "#d8f0fb", _meadow),
    "night": ("#10163a", "#2b2f6b", _night),
    "beach": ("#bfe6fa", "#e9f8ff", _beach),
    "snow": ("#c5d9ea", "#e6f0f8", _snow),
    "desert": ("#ffd9a0", "#fff0cf", _desert),
    "water": ("#3fb4d8", "#0d4f8b", _water),
}


@cache
def _background_at(name: str, size: int) -> Image.Image:
    words = vocabulary()
    if name in words.colours:
        return Image.new("RGB", (size, size), words.colours[name])
    if name not in _SETTINGS:
        raise ValueError(f"background {name!r} is unknown: expected one of {', '.join(words.backgrounds)}")
    top, bottom, paint = _SETTINGS[name]
    large = _vertical_gradient(top, bottom, 4 * size)
    paint(ImageDraw.Draw(large), 4 * size)
    return large.resize((size, size), Image.Resampling.LANCZOS)


def background(name: str, size: int = PICTURE_SIZE) -> Image.Image:
    """An RGB picture of a named colour or drawn setting, `size` pixels square."""
    return _background_at(name, size).copy()


def compose(icon: Image.Image, background_name: str, size: str = "large") -> Image.Image:
    """Put an RGBA icon in the middle of a background.

    Args:
        icon: RGBA drawing, square.
        background_name: a colour or setting of the vocabulary.
        size: "large" (100 of 128 pixels) or "small" (56 of 128).

    Returns:
        RGB picture, 128 x 128.
    """
    pixels = OBJECT_PIXELS[size]
    drawn = icon.resize((pixels, pixels), Image.Resampling.LANCZOS)
    picture = background(background_name)
    corner = (PICTURE_SIZE - pixels) // 2
    picture.paste(drawn, (corner, corner), drawn)
    return picture
