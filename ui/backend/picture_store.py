"""Pictures on disk: each under a new name with what it was made of; a base's is found again while it is there."""

import threading
from collections import OrderedDict
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from PIL import Image

from dora_diffusion.generation.generate import Canvas, GenerationSettings
from dora_diffusion.generation.inputs import keep_input, kept_name
from dora_diffusion.generation.png_metadata import AdapterUse, Origin, picture_sha256, save_picture
from dora_diffusion.generation.prompts import LoraTag

MAX_BASES = 64

BaseKey = tuple[str, GenerationSettings, Origin]


@dataclass(frozen=True)
class Drawn:
    """A picture and all that it was made of; `PictureStore.save` writes it.

    Attributes:
        image: RGB.
        settings: as drawn: this picture's own seed, the prompt without tags.
        adapters: who took part.
        origin: canvas and tags.
        model: the base.
        seconds: of drawing.
        inputs: pictures that the metadata name by hash: canvas and masks.
    """

    image: Any
    settings: GenerationSettings
    adapters: tuple[AdapterUse, ...]
    origin: Origin
    model: str
    seconds: float
    inputs: tuple[Image.Image, ...] = ()


class PictureStore:
    """The folder that pictures are saved in. Any thread may save."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self._bases: OrderedDict[BaseKey, Path] = OrderedDict()
        self._lock = threading.Lock()

    def save(self, drawn: Drawn, folder: Path | None = None) -> Path:
        """Write a picture with its metadata under a new name, into the output folder unless another is given.

        The pictures that its metadata name by hash are kept beside, in the output folder.
        """
        folder = self.output if folder is None else folder
        for picture in drawn.inputs:
            keep_input(self.output, picture)
        folder.mkdir(parents=True, exist_ok=True)
        with self._lock:
            return save_picture(
                drawn.image,
                _new_file(folder, drawn.settings),
                drawn.settings,
                model=drawn.model,
                adapters=drawn.adapters,
                origin=drawn.origin,
            )

    def known_base(self, key: BaseKey) -> Path | None:
        """The picture of a base alone that was drawn by these settings; None when there is none any more."""
        path = self._bases.get(key)
        return path if path is not None and path.is_file() else None

    def remember_base(self, key: BaseKey, path: Path) -> None:
        """Let `known_base` find a picture; of more than MAX_BASES the oldest is forgotten."""
        self._bases[key] = path
        self._bases.move_to_end(key)
        while len(self._bases) > MAX_BASES:
            self._bases.popitem(last=False)


def base_key(model: str, settings: GenerationSettings, canvas: Canvas | None) -> BaseKey:
    """All that decides the picture of a base alone."""
    return model, settings, origin_of(canvas, ())


def origin_of(canvas: Canvas | None, tags: tuple[LoraTag, ...]) -> Origin:
    """What metadata say of the picture that was drawn on, and of tags."""
    if canvas is None:
        return Origin(tags=tags)
    image, mask = picture_sha256(canvas.image), None if canvas.mask is None else picture_sha256(canvas.mask)
    return Origin(image, mask, tags, kept_name(image), None if mask is None else kept_name(mask))


def _new_file(folder: Path, settings: GenerationSettings) -> Path:
    """A name that sorts by time and is not taken."""
    stem = f"{datetime.now():%Y%m%d-%H%M%S}-seed{settings.seed}"
    names = (f"{stem}{suffix}.png" for suffix in ("", *(f"-{number}" for number in range(2, 10_000))))
    return next(path for name in names if not (path := folder / name).exists())
