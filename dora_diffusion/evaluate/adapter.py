"""Score an adapter against true pictures it was not trained on: before, after, ceiling and floor, and a grid."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from dora_diffusion.adapters.manager import AdapterManager
from dora_diffusion.evaluate.likeness import likeness
from dora_diffusion.families import family_of_pipeline
from dora_diffusion.generation.generate import GenerationSettings, generate
from dora_diffusion.pipelines.loading import load_pipeline
from dora_diffusion.pipelines.textual_inversion import install_words, load_word
from dora_diffusion.pretrain.scenes import background_in, place_words
from dora_diffusion.utils.atomic import atomic_file, write_atomically
from dora_diffusion.utils.image_grid import grid


@dataclass(frozen=True)
class Truth:
    """A true picture and the caption that asks for it."""

    picture: Image.Image
    caption: str


@dataclass(frozen=True)
class AdapterScores:
    """Mean likeness to the truth (see `likeness`) over `count` pictures, and its bounds.

    Attributes:
        before: drawn by the base alone.
        after: drawn with the adapter at strength 1.
        ceiling: the truth itself, through the base's autoencoder.
        floor: what the base draws of other objects at the same place, under captions it knows.
        count: pictures behind `before` and behind `after`.
    """

    before: float
    after: float
    ceiling: float
    floor: float
    count: int


STRANGERS = ("teddy bear", "rocket", "pizza", "butterfly", "castle", "guitar")


def evaluate_adapter(
    adapter: Path | None,
    truths: list[Truth],
    output: Path,
    *,
    model: str = "pocket",
    seeds: int = 4,
    words: Sequence[Path] = (),
    device: str = "cpu",
) -> AdapterScores:
    """Draw every truth's caption with and without the adapter; write `report.json` and `grid.png` into `output`.

    `words` are files of new words, which belong to the adapter, or stand alone; `device` is as
    `load_pipeline` takes it.

    The grid's rows: truth, base, adapter.

    Raises:
        ValueError: the adapter does not fit the base, or there are no truths.
    """
    if not truths:
        raise ValueError("nothing to evaluate against: the truth folder holds no pictures")
    pipe = load_pipeline(model, device=device)
    manager = AdapterManager(pipe)
    if adapter is not None:
        manager.load_adapter(adapter, name="adapter")
    size = truths[0].picture.size
    rows = {"before": _draw_all(pipe, truths, size, seeds, title="before the adapter")}
    manager.set_adapters(dict.fromkeys(manager.names, 1.0))
    learnt = install_words(pipe, [load_word(path) for path in words]) if words else None
    rows["after"] = _draw_all(pipe, truths, size, seeds, title="with the adapter")
    if learnt is not None:
        learnt.remove()
    manager.unload()
    means = {name: _mean_likeness(drawn, truths) for name, drawn in rows.items()}
    scores = AdapterScores(
        **means,
        ceiling=_mean_likeness([[_through_vae(pipe, truth.picture)] for truth in truths], truths),
        floor=_mean_likeness([[_stranger(pipe, truth, index)] for index, truth in enumerate(truths)], truths),
        count=len(truths) * seeds,
    )
    output.mkdir(parents=True, exist_ok=True)
    captions = [truth.caption for truth in truths]
    report = {"scores": {k: round(v, 3) for k, v in asdict(scores).items()}, "captions": captions, "model": model}
    write_atomically(output / "report.json", (json.dumps(report, indent=1) + "\n").encode())
    first = {name: [pictures[0] for pictures in drawn] for name, drawn in rows.items()}
    with atomic_file(output / "grid.png") as file:
        grid([[truth.picture for truth in truths], first["before"], first["after"]]).save(file, format="PNG")
    return scores


def _draw_all(
    pipe: Any, truths: list[Truth], size: tuple[int, int], seeds: int, *, title: str
) -> list[list[Image.Image]]:
    """Every truth's caption from every seed."""
    return [
        [_draw(pipe, truth.caption, seed).resize(size) for seed in range(seeds)] for truth in tqdm(truths, desc=title)
    ]


def _draw(pipe: Any, caption: str, seed: int) -> Image.Image:
    return generate(pipe, GenerationSettings(caption, seed=seed))


def _mean_likeness(drawn: list[list[Image.Image]], truths: list[Truth]) -> float:
    values = [
        likeness(picture, truth.picture, truth.caption)
        for pictures, truth in zip(drawn, truths, strict=True)
        for picture in pictures
    ]
    return sum(values) / len(values)


@torch.no_grad()
def _through_vae(pipe: Any, picture: Image.Image) -> Image.Image:
    """What the base's autoencoder makes of a picture: no adapter can draw it better than that."""
    pixels = pipe.image_processor.preprocess(picture).to(pipe.device)
    codec = family_of_pipeline(pipe).codec
    decoded: Image.Image = pipe.image_processor.postprocess(codec.decode(pipe, codec.encode(pipe, pixels)))[0]
    return decoded


def _stranger(pipe: Any, truth: Truth, index: int) -> Image.Image:
    """Another object on the truth's background, drawn by the base."""
    name = background_in(truth.caption)
    place = f" {place_words(name)}" if name else ""
    return _draw(pipe, f"a {STRANGERS[index % len(STRANGERS)]}{place}", index)
