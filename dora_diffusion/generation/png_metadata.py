"""What a PNG says of how it was drawn: A1111's text, a JSON chunk that loses nothing, and reading both back."""

import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dora_diffusion._version import __version__
from dora_diffusion.generation.base_use import BaseUse, base_of_entry
from dora_diffusion.generation.generate import GenerationSettings
from dora_diffusion.generation.prompts import LoraTag, written_name
from dora_diffusion.generation.samplers import SAMPLERS
from dora_diffusion.utils.atomic import write_atomically
from dora_diffusion.utils.checks import check_fields
from dora_diffusion.utils.text import encodable

METADATA_CHUNK = "dora_diffusion"
MAX_ADAPTERS = 64  # more than that in one picture are not read
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class AdapterUse:
    """An adapter's part in a picture.

    Attributes:
        name: what it was loaded under.
        sha256: of its file.
        weight: its strength, or one for each part.
        mode: how adapters were mixed, a key of `blend_modes.MODES`.
        schedule: (progress, factor) points, or None for a constant strength.
        mask: `picture_sha256` of where it drew, or None for everywhere.
        file: where its file lay; None when the picture does not say.
        mask_file: the same of its mask.
    """

    name: str
    sha256: str | None
    weight: float | Mapping[str, float]
    mode: str = "additive"
    schedule: tuple[tuple[float, float], ...] | None = None
    mask: str | None = None
    file: str | None = None
    mask_file: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class WordUse:
    """A new word that a picture was drawn with, and where its file lay."""

    word: str
    sha256: str
    file: str | None = None

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Origin:
    """What else a picture came from.

    Attributes:
        canvas, canvas_mask: `picture_sha256` of what it was drawn on, and of where; None without one.
        tags: of the prompt, whose adapters are among the picture's.
        canvas_file, canvas_mask_file: where these lay: paths, or beside the picture as `inputs.kept_name` has it.
        base: what it was drawn with; None when that is not known.
    """

    canvas: str | None = None
    canvas_mask: str | None = None
    tags: tuple[LoraTag, ...] = ()
    canvas_file: str | None = None
    canvas_mask_file: str | None = None
    base: BaseUse | None = None


NOTHING_ELSE = Origin()


def _weight_text(weight: float | Mapping[str, float]) -> str:
    if isinstance(weight, Mapping):
        return "/".join(f"{part}={value:g}" for part, value in weight.items())
    return f"{weight:g}"


def parameters_text(settings: GenerationSettings, *, model: str, adapters: Sequence[AdapterUse]) -> str:
    """The `parameters` text that A1111 and its kin write and read."""
    tags = "".join(f" <lora:{written_name(use.name)}:{_weight_text(use.weight)}>" for use in adapters)
    lines = [settings.prompt + tags]
    if settings.negative_prompt:
        lines.append(f"Negative prompt: {settings.negative_prompt}")
    facts = {
        "Steps": settings.steps,
        "Sampler": SAMPLERS[settings.sampler].title,
        "CFG scale": f"{settings.guidance_scale:g}",
        "Seed": settings.seed,
        "Model": model,
        "Version": f"dora_diffusion {__version__}",
    }
    if settings.strength is not None:
        facts["Denoising strength"] = f"{settings.strength:g}"
    if settings.width and settings.height:
        facts["Size"] = f"{settings.width}x{settings.height}"
    if hashes := [f"{use.name}: {use.sha256}" for use in adapters if use.sha256]:
        facts["Lora hashes"] = '"' + ", ".join(hashes) + '"'
    return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in facts.items())])


def picture_metadata(
    settings: GenerationSettings,
    *,
    model: str,
    adapters: Sequence[AdapterUse],
    words: Sequence[WordUse] = (),
    origin: Origin = NOTHING_ELSE,
) -> PngInfo:
    """PNG text chunks: A1111's `parameters`, and a JSON chunk `dora_diffusion` that loses nothing."""
    record = {
        "version": __version__,
        "model": model,
        "settings": asdict(settings),
        "adapters": [{**asdict(use), "weight": _plain(use.weight)} for use in adapters],
        "words": [asdict(use) for use in words],
        "blend": adapters[0].mode if adapters else "additive",
        "canvas": _canvas_entry(origin) if origin.canvas else None,
        "base": None if origin.base is None else asdict(origin.base),
        "tags": [{"name": tag.name, "weight": _plain(tag.weight)} for tag in origin.tags],
    }
    info = PngInfo()
    info.add_itxt("parameters", encodable(parameters_text(settings, model=model, adapters=adapters)))
    info.add_itxt(METADATA_CHUNK, encodable(json.dumps(record, ensure_ascii=False)))
    return info


def _canvas_entry(origin: Origin) -> dict[str, str | None]:
    return {
        "picture": origin.canvas,
        "mask": origin.canvas_mask,
        "picture_file": origin.canvas_file,
        "mask_file": origin.canvas_mask_file,
    }


def _plain(weight: float | Mapping[str, float]) -> float | dict[str, float]:
    return dict(weight) if isinstance(weight, Mapping) else weight


def picture_sha256(image: Image.Image) -> str:
    """SHA-256 of a picture's mode, size and pixels, however it is stored."""
    head = f"{image.mode} {image.width}x{image.height}\n".encode()
    return hashlib.sha256(head + image.tobytes()).hexdigest()


def save_picture(
    image: Image.Image,
    path: str | Path,
    settings: GenerationSettings,
    *,
    model: str,
    adapters: Sequence[AdapterUse],
    words: Sequence[WordUse] = (),
    origin: Origin = NOTHING_ELSE,
) -> Path:
    """Write a PNG with its metadata, atomically; a ValueError when the path is no .png."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: pictures are written as PNG; give a name that ends in .png")
    buffer = io.BytesIO()
    info = picture_metadata(settings, model=model, adapters=adapters, words=words, origin=origin)
    image.save(buffer, format="PNG", pnginfo=info)
    write_atomically(path, buffer.getvalue())
    return path


@dataclass(frozen=True)
class PictureRecord:
    """What a picture was made of, as its file says.

    Attributes:
        settings: of the drawing, its prompt without tags.
        model: the base's name.
        adapters: who took part, in order.
        blend: how they were mixed.
        origin: hashes of canvas and its mask (see `find_input`), the prompt's tags, and the base in full.
        parameters: the text that A1111 and its kin read.
        words: new words that were in the base.
    """

    settings: GenerationSettings
    model: str
    adapters: tuple[AdapterUse, ...]
    blend: str
    origin: Origin
    parameters: str
    words: tuple[WordUse, ...] = ()


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
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise ValueError(f"{path.name}: its metadata is not as this app writes it ({reason})") from None


def _record_of(record: Mapping[str, Any], parameters: str) -> PictureRecord:
    known = GenerationSettings.__dataclass_fields__
    settings = GenerationSettings(**{name: value for name, value in record["settings"].items() if name in known})
    for name in ("prompt", "negative_prompt"):
        if not isinstance(getattr(settings, name), str):
            raise ValueError(f"{name} is no text")
    adapters = tuple(_use_of(entry) for entry in record["adapters"][:MAX_ADAPTERS])
    tags = tuple(LoraTag(str(tag["name"]), _weight_of(tag["weight"])) for tag in record.get("tags", ())[:MAX_ADAPTERS])
    return PictureRecord(
        settings=settings,
        model=str(record["model"]),
        adapters=adapters,
        blend=str(record.get("blend", adapters[0].mode if adapters else "additive")),
        origin=_origin_of(record, tags),
        parameters=parameters,
        words=tuple(_word_of(entry) for entry in record.get("words", ())[:MAX_ADAPTERS]),
    )


def _origin_of(record: Mapping[str, Any], tags: tuple[LoraTag, ...]) -> Origin:
    canvas = record.get("canvas") or {}
    base = base_of_entry(record.get("base"))
    for sha256 in () if base is None else (base.sha256, *(use.sha256 for use in base.parts)):
        check_sha256(sha256)
    return Origin(
        check_sha256(canvas.get("picture")),
        check_sha256(canvas.get("mask")),
        tags,
        _text_of(canvas.get("picture_file")),
        _text_of(canvas.get("mask_file")),
        base,
    )


def _word_of(entry: Mapping[str, Any]) -> WordUse:
    # of a word that came from memory there is no hash
    return WordUse(str(entry["word"]), check_sha256(entry["sha256"] or None) or "", _text_of(entry.get("file")))


def _text_of(value: Any) -> str | None:
    return None if value is None else str(value)


def _use_of(entry: Mapping[str, Any]) -> AdapterUse:
    points = entry.get("schedule")
    return AdapterUse(
        name=str(entry["name"]),
        sha256=check_sha256(entry["sha256"]),
        weight=_weight_of(entry["weight"]),
        mode=str(entry.get("mode", "additive")),
        schedule=None if points is None else tuple((float(progress), float(factor)) for progress, factor in points),
        mask=check_sha256(entry.get("mask")),
        file=_text_of(entry.get("file")),
        mask_file=_text_of(entry.get("mask_file")),
    )


def _weight_of(weight: Any) -> float | dict[str, float]:
    if isinstance(weight, Mapping):
        return {str(part): float(value) for part, value in weight.items()}
    return float(weight)


def check_sha256(value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not _SHA256.fullmatch(value):
        raise ValueError("a hash is no SHA-256")
    return value
