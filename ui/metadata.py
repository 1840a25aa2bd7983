"""What a saved picture says about itself, and the pictures that it names by hash."""

import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from dora_diffusion.generation.generate import METADATA_CHUNK, AdapterUse, GenerationSettings, Origin, picture_sha256
from dora_diffusion.generation.prompts import LoraTag
from dora_diffusion.utils.atomic import write_atomically

INPUTS = "inputs"
MAX_ADAPTERS = 64
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class PictureRecord:
    """What a picture was made of, as its file says.

    Attributes:
        settings: of the drawing, its prompt without tags.
        model: the base's name.
        adapters: who took part, in order.
        blend: how they were mixed.
        origin: hashes of canvas and its mask (see `find_input`), and the prompt's tags.
        parameters: the text that A1111 and its kin read.
    """

    settings: GenerationSettings
    model: str
    adapters: tuple[AdapterUse, ...]
    blend: str
    origin: Origin
    parameters: str


def metadata_text(path: Path) -> str:
    """The PNG's own text chunks, read back from the file: the `parameters` line, then the JSON in full.

    Raises:
        ValueError: no picture, or its texts are too long to be read.
    """
    texts = picture_texts(path)
    parts = [texts.get("parameters", "")]
    if METADATA_CHUNK in texts:
        parts.append(_laid_out(texts[METADATA_CHUNK]))
    return "\n\n".join(part for part in parts if part)


def _laid_out(text: str) -> str:
    """JSON over many lines; what is none, or nested too deeply for that, as one line that says so."""
    try:
        return json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError) as error:
        return f"{METADATA_CHUNK}: {len(text)} characters that cannot be read as JSON ({type(error).__name__})"


def picture_texts(path: Path) -> dict[str, str]:
    """A PNG's text chunks; empty for another picture.

    Raises:
        ValueError: no picture, or its texts are too long to be read.
    """
    try:
        with Image.open(path, formats=["PNG", "JPEG", "WEBP"]) as picture:
            picture.load()  # texts may stand behind the pixels
            return {str(name): value for name, value in picture.info.items() if isinstance(value, str)}
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path.name}: not a picture that can be read ({type(error).__name__})") from None


def read_metadata(path: Path) -> PictureRecord | None:
    """What a picture of ours was made of; None when its file does not say.

    Raises:
        ValueError: no picture, or a record that is broken: one line.
    """
    texts = picture_texts(path)
    if METADATA_CHUNK not in texts:
        return None
    try:
        record = json.loads(texts[METADATA_CHUNK])
        return _record_of(record, texts.get("parameters", ""))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        told = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise ValueError(f"{path.name}: its metadata is not as this app writes it ({told})") from None


def _record_of(record: Mapping[str, Any], parameters: str) -> PictureRecord:
    known = GenerationSettings.__dataclass_fields__
    settings = GenerationSettings(**{name: value for name, value in record["settings"].items() if name in known})
    for name in ("prompt", "negative_prompt"):
        if not isinstance(getattr(settings, name), str):
            raise ValueError(f"{name} is no text")
    adapters = tuple(_use_of(entry) for entry in record["adapters"][:MAX_ADAPTERS])
    canvas = record.get("canvas") or {}
    tags = tuple(LoraTag(str(tag["name"]), _weight_of(tag["weight"])) for tag in record.get("tags", ())[:MAX_ADAPTERS])
    return PictureRecord(
        settings=settings,
        model=str(record["model"]),
        adapters=adapters,
        blend=str(record.get("blend", adapters[0].mode if adapters else "additive")),
        origin=Origin(_hash_of(canvas.get("picture")), _hash_of(canvas.get("mask")), tags),
        parameters=parameters,
    )


def _use_of(entry: Mapping[str, Any]) -> AdapterUse:
    points = entry.get("schedule")
    return AdapterUse(
        name=str(entry["name"]),
        sha256=_hash_of(entry["sha256"]),
        weight=_weight_of(entry["weight"]),
        mode=str(entry.get("mode", "additive")),
        schedule=None if points is None else tuple((float(progress), float(factor)) for progress, factor in points),
        mask=_hash_of(entry.get("mask")),
    )


def _weight_of(weight: Any) -> float | dict[str, float]:
    if isinstance(weight, Mapping):
        return {str(part): float(value) for part, value in weight.items()}
    return float(weight)


def _hash_of(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise ValueError("a hash is no SHA-256")
    return value


def keep_input(output: Path, picture: Image.Image) -> str:
    """Store a canvas or mask under the hash that metadata names it by, once; returns the hash."""
    sha256 = picture_sha256(picture)
    path = output / INPUTS / f"{sha256}.png"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        write_atomically(path, buffer.getvalue())
    return sha256


def find_input(output: Path, sha256: str) -> Image.Image | None:
    """The canvas or mask of that hash, its pixels checked against it; None when it is not there or another picture.

    Raises:
        ValueError: not the form of a hash.
    """
    checked = _hash_of(sha256)
    path = output / INPUTS / f"{checked}.png"
    if not path.is_file():
        return None
    try:
        with Image.open(path, formats=["PNG"]) as opened:
            picture = opened.copy()
    except (OSError, SyntaxError, Image.DecompressionBombError):
        return None
    return picture if picture_sha256(picture) == checked else None
