"""Draw a picture with a pipeline, watched and stoppable, and keep how it was made inside the PNG."""

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

import dora_diffusion
from dora_diffusion.families import Family, family_of_pipeline, pixel_multiple
from dora_diffusion.storage import write_atomically

METADATA_CHUNK = "dora_diffusion"


@dataclass(frozen=True)
class GenerationSettings:
    """What to draw. Width and height in pixels; None is the model's own size."""

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    steps: int = 20
    guidance_scale: float = 4.0
    width: int | None = None
    height: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= 1000:
            raise ValueError(f"steps must lie in 1..1000, got {self.steps}")
        if not 0 <= self.guidance_scale <= 100:
            raise ValueError(f"guidance_scale must lie in 0..100, got {self.guidance_scale}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must lie in 0..2^63, got {self.seed}")
        for name, side in (("width", self.width), ("height", self.height)):
            if side is not None and (side % 8 or not 64 <= side <= 4096):
                raise ValueError(f"{name} must be a multiple of 8 in 64..4096, got {side}")


@dataclass(frozen=True)
class StepReport:
    """Progress of a drawing: `step` of `total` done, and a preview when one was asked for."""

    step: int
    total: int
    preview: Image.Image | None


@dataclass(frozen=True)
class AdapterUse:
    """An adapter's part in a picture."""

    name: str
    sha256: str | None
    weight: float | Mapping[str, float]
    mode: str = "additive"


@dataclass(frozen=True)
class WordUse:
    """A new word that a picture was drawn with."""

    word: str
    sha256: str


class GenerationStopped(Exception):
    """The drawing was stopped on request; nothing is wrong."""


def generate(
    pipe: Any,
    settings: GenerationSettings,
    *,
    on_step: Callable[[StepReport], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    preview_every: int = 0,
) -> Image.Image:
    """Draw one picture.

    The starting noise is made on the CPU, so a seed draws the same picture on every device up to rounding.

    Args:
        pipe: a diffusers pipeline, with whatever adapters its manager has set.
        settings: what to draw.
        on_step: called after every step.
        should_stop: asked after every step.
        preview_every: decode a preview every so many steps; 0 never.

    Raises:
        GenerationStopped: within a step of `should_stop` answering yes.
    """

    family = family_of_pipeline(pipe)
    height, width = _sides(pipe, family, settings)

    def report(index: int, latents: Tensor) -> None:
        if should_stop is not None and should_stop():
            raise GenerationStopped
        if on_step is not None:
            wanted = preview_every > 0 and (index + 1) % preview_every == 0 and index + 1 < settings.steps
            preview = _preview(pipe, family, latents[:1], (height, width)) if wanted else None
            on_step(StepReport(index + 1, settings.steps, preview))

    pipe.set_progress_bar_config(disable=True)
    result = pipe(
        **family.arguments(pipe, settings),
        num_inference_steps=settings.steps,
        width=width,
        height=height,
        generator=torch.Generator().manual_seed(settings.seed),
        **_callback(pipe, report),
    )
    picture: Image.Image = result.images[0]
    return picture


def _sides(pipe: Any, family: Family, settings: GenerationSettings) -> tuple[int, int]:
    """(height, width) to draw; a ValueError when the model has no such size."""
    native, multiple = family.native_side(pipe), pixel_multiple(pipe, family)
    for name, side in (("width", settings.width), ("height", settings.height)):
        if side is not None and side % multiple:
            raise ValueError(f"{name}: got {side}, expected a multiple of {multiple} for {family.name}")
    return settings.height or native, settings.width or native


def _callback(pipe: Any, report: Callable[[int, Tensor], None]) -> dict[str, Any]:
    """`report` as the pipeline calls back after a step: by today's name, or by the older one that PixArt still has."""
    if "callback_on_step_end" in inspect.signature(pipe.__call__).parameters:

        def today(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            report(index, tensors["latents"])
            return tensors

        return {"callback_on_step_end": today}

    def older(index: int, timestep: Any, latents: Tensor) -> None:
        report(index, latents)

    return {"callback": older}


@torch.no_grad()
def _preview(pipe: Any, family: Family, latents: Tensor, sides: tuple[int, int]) -> Image.Image:
    """Decode the latents of a running pipeline as they stand."""
    height, width = (side // pipe.vae_scale_factor for side in sides)
    picture: Image.Image = pipe.image_processor.postprocess(
        family.codec.decode(pipe, family.unpack(latents, height, width))
    )[0]
    return picture


def _weight_text(weight: float | Mapping[str, float]) -> str:
    if isinstance(weight, Mapping):
        return "/".join(f"{part}={value:g}" for part, value in weight.items())
    return f"{weight:g}"


def parameters_text(settings: GenerationSettings, *, model: str, adapters: Sequence[AdapterUse]) -> str:
    """The `parameters` text that A1111 and its kin write and read."""
    tags = "".join(f" <lora:{use.name}:{_weight_text(use.weight)}>" for use in adapters)
    lines = [settings.prompt + tags]
    if settings.negative_prompt:
        lines.append(f"Negative prompt: {settings.negative_prompt}")
    facts = {
        "Steps": settings.steps,
        "Sampler": "model default",
        "CFG scale": f"{settings.guidance_scale:g}",
        "Seed": settings.seed,
        "Model": model,
        "Version": f"dora_diffusion {dora_diffusion.__version__}",
    }
    if settings.width and settings.height:
        facts["Size"] = f"{settings.width}x{settings.height}"
    if hashes := [f"{use.name}: {use.sha256}" for use in adapters if use.sha256]:
        facts["Lora hashes"] = '"' + ", ".join(hashes) + '"'
    return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in facts.items())])


def picture_metadata(
    settings: GenerationSettings, *, model: str, adapters: Sequence[AdapterUse], words: Sequence[WordUse] = ()
) -> PngInfo:
    """PNG text chunks: A1111's `parameters`, and a JSON chunk `dora_diffusion` that loses nothing."""
    record = {
        "version": dora_diffusion.__version__,
        "model": model,
        "settings": asdict(settings),
        "adapters": [{**asdict(use), "weight": _plain(use.weight)} for use in adapters],
        "words": [asdict(use) for use in words],
    }
    info = PngInfo()
    info.add_itxt("parameters", parameters_text(settings, model=model, adapters=adapters))
    info.add_itxt(METADATA_CHUNK, json.dumps(record, ensure_ascii=False))
    return info


def _plain(weight: float | Mapping[str, float]) -> float | dict[str, float]:
    return dict(weight) if isinstance(weight, Mapping) else weight


def save_picture(
    image: Image.Image,
    path: str | Path,
    settings: GenerationSettings,
    *,
    model: str,
    adapters: Sequence[AdapterUse],
    words: Sequence[WordUse] = (),
) -> Path:
    """Write a PNG with its metadata, atomically; a ValueError when the path is no .png."""
    import io

    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: pictures are written as PNG; give a name that ends in .png")
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=picture_metadata(settings, model=model, adapters=adapters, words=words))
    write_atomically(path, buffer.getvalue())
    return path
