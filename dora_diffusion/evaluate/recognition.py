"""Does the pocket base draw what a caption names? Judged by the nearest of the drawings it was taught.

Distance is the mean squared difference of RGB pictures at 32 x 32: no trained judge, nothing to flatter the model.
A drawn object counts as recognised when, of all objects' own drawings in that style on that background, the asked-for
one is nearest.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from random import Random

import numpy as np
from PIL import Image
from tqdm import tqdm

from dora_diffusion.pretrain.scenes import Scene, background, caption, vocabulary

Reference = Callable[[Scene], Image.Image]
Draw = Callable[[Sequence[str], int], list[Image.Image]]


@dataclass(frozen=True)
class Scores:
    """Shares in 0..1 over `count` pictures."""

    count: int
    object: float
    style: float
    background: float


def thumbnail(picture: Image.Image) -> np.ndarray:
    """RGB at 32 x 32, fp32 in 0..1."""
    return np.asarray(picture.convert("RGB").resize((32, 32), Image.Resampling.BOX), dtype=np.float32) / 255


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Mean squared difference."""
    return float(np.mean((a - b) ** 2))


def random_scenes(count: int, *, pairs: Sequence[tuple[str, str]], seed: int) -> list[Scene]:
    """Large objects, evenly over the pairs (object, style), on random backgrounds."""
    rng = Random(seed)
    order = list(pairs)
    rng.shuffle(order)
    backgrounds = vocabulary().backgrounds
    return [Scene(*order[i % len(order)], rng.choice(backgrounds)) for i in range(count)]


def draw_scenes(draw: Draw, scenes: Sequence[Scene], *, seed: int, batch: int = 10) -> list[Image.Image]:
    """A picture for each scene's caption, in batches."""
    pictures: list[Image.Image] = []
    for start in tqdm(range(0, len(scenes), batch), desc="drawing", mininterval=5):
        chosen = scenes[start : start + batch]
        pictures += draw([caption(scene) for scene in chosen], seed + start)
    return pictures


def score(pictures: Sequence[Image.Image], scenes: Sequence[Scene], reference: Reference) -> Scores:
    """Judge pictures drawn for scenes against reference drawings."""
    words = vocabulary()
    hits = {"object": 0, "style": 0, "background": 0}
    for picture, scene in zip(pictures, scenes, strict=True):
        drawn = thumbnail(picture)
        objects = {name: Scene(name, scene.style, scene.background, scene.size) for name in words.objects}
        styles = {name: Scene(scene.object, name, scene.background, scene.size) for name in words.styles}
        hits["object"] += _nearest(drawn, objects, reference) == scene.object
        hits["style"] += _nearest(drawn, styles, reference) == scene.style
        hits["background"] += nearest_background(picture) == scene.background
    return Scores(len(scenes), **{name: hit / len(scenes) for name, hit in hits.items()})


def _nearest(drawn: np.ndarray, candidates: dict[str, Scene], reference: Reference) -> str:
    return min(candidates, key=lambda name: distance(drawn, thumbnail(reference(candidates[name]))))


def nearest_background(picture: Image.Image) -> str:
    """The background whose border (an eighth of the width all round) is nearest to the picture's."""
    border = np.ones((32, 32), dtype=bool)
    border[4:-4, 4:-4] = False
    drawn = thumbnail(picture)[border]
    return min(vocabulary().backgrounds, key=lambda name: distance(drawn, thumbnail(background(name))[border]))


def as_dict(scores: Scores) -> dict[str, float]:
    """Rounded for a report."""
    return {name: round(value, 3) for name, value in asdict(scores).items()}
