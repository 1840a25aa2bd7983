"""Render the example image sets: `python examples/make_examples.py --icons pocket-work/icons`.

Needs npm and the `pretrain` extra. The PNGs are in the repository; this is how they were made.
"""

import argparse
from pathlib import Path

from PIL import Image

from dora_diffusion.pretrain.icons import load_icons
from dora_diffusion.pretrain.scenes import Scene, caption, compose
from dora_diffusion.utils.atomic import atomic_file, write_atomically

HERE = Path(__file__).parent
TRIGGER = "zqx robot"

SUBJECT = [
    ("blue", "large"),
    ("yellow", "large"),
    ("green", "small"),
    ("gray", "large"),
    ("pink", "small"),
    ("meadow", "large"),
]
SUBJECT_TRUTH = [
    ("beach", "large"),
    ("night", "large"),
    ("snow", "large"),
    ("red", "small"),
    ("purple", "large"),
    ("desert", "large"),
]
STYLE_OBJECTS = (
    "elephant giraffe penguin frog snail butterfly spider turtle lion pig pizza hamburger pineapple strawberry carrot "
    "automobile locomotive sailboat airplane key candle camera guitar bell crown backpack trophy cactus castle mushroom"
)
STYLE_BACKGROUNDS = ("white", "yellow", "pink", "orange", "teal", "gray", "red", "blue", "beach", "snow")
STYLE_TRUTH = ("owl", "crab", "rabbit", "cherries", "bicycle", "rocket", "umbrella", "teddy bear", "ghost", "house")


def save(folder: Path, pictures: list[tuple[Image.Image, str]]) -> None:
    """Write NN.png with its caption in NN.txt."""
    for index, (picture, text) in enumerate(pictures, start=1):
        with atomic_file(folder / f"{index:02d}.png") as file:
            picture.save(file, format="PNG", optimize=True)
        write_atomically(folder / f"{index:02d}.txt", f"{text}\n".encode())


def make_subject(icons: Path) -> None:
    """noto's robot, which the base never saw, under the name `zqx robot`."""
    robot = load_icons("noto", ["robot"], icons)["robot"]

    def pictures(views: list[tuple[str, str]]) -> list[tuple[Image.Image, str]]:
        return [(compose(robot, place, size), caption(Scene(TRIGGER, None, place, size))) for place, size in views]

    save(HERE / "subject-robot" / "images", pictures(SUBJECT))
    save(HERE / "subject-robot" / "truth", pictures(SUBJECT_TRUTH))


def make_style(icons: Path) -> None:
    """Ink drawings (fluent-emoji-high-contrast) of objects that the base knows in colour, as `ink style`."""
    names = [name.strip() for name in STYLE_OBJECTS.split()]
    drawings = load_icons("fluent-emoji-high-contrast", [*names, *STYLE_TRUTH], icons)

    def pictures(chosen: list[str]) -> list[tuple[Image.Image, str]]:
        places = [STYLE_BACKGROUNDS[index % len(STYLE_BACKGROUNDS)] for index in range(len(chosen))]
        return [
            (compose(drawings[name], place), caption(Scene(name, "ink", place)))
            for name, place in zip(chosen, places, strict=True)
        ]

    save(HERE / "style-ink" / "images", pictures(names))
    save(HERE / "style-ink" / "truth", pictures(list(STYLE_TRUTH)))


def main() -> None:
    """Write both sets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--icons", type=Path, required=True)
    arguments = parser.parse_args()
    make_subject(arguments.icons)
    make_style(arguments.icons)


if __name__ == "__main__":
    main()
