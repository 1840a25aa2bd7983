"""Draw a picture with a pipeline, watched and stoppable, and keep how it was made inside the PNG."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dora_diffusion.families import Family, family_of_pipeline, pixel_multiple
from dora_diffusion.generation.img2img import DEFAULT_STRENGTH, Start, start_on
from dora_diffusion.generation.img2img import Canvas as Canvas
from dora_diffusion.generation.prompts import checked_prompts, prompt_arguments
from dora_diffusion.generation.samplers import DEFAULT as DEFAULT_SAMPLER
from dora_diffusion.generation.samplers import SAMPLERS, check_steps, made_from, sampling
from dora_diffusion.utils.checks import check_fields
from dora_diffusion.utils.text import check_unicode


@dataclass(frozen=True)
class GenerationSettings:
    """What to draw.

    Attributes:
        prompt, negative_prompt: `(more:1.2)` and `[less]` weigh words where the family can; see `prompts`.
        seed: of the starting noise.
        steps: of a whole run; one that starts from a picture takes `strength` of them.
        guidance_scale: how strongly the prompt is followed; 1 is without guidance.
        width, height: in pixels; None is the model's own size.
        sampler: a name of `generation.samplers.SAMPLERS`; "default" is the pipeline's own scheduler.
        strength: how much of a canvas's picture is drawn anew, above 0 up to 1; None is DEFAULT_STRENGTH.

    Examples:
        ```python
        from dataclasses import replace

        import dora_diffusion as dd

        settings = dd.GenerationSettings("a flat style (castle:1.3) in the snow", steps=4, sampler="euler")
        pipe = dd.load_pipeline("pocket")
        pictures = [dd.generate(pipe, replace(settings, seed=seed)) for seed in range(2)]
        ```
    """

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    steps: int = 20
    guidance_scale: float = 4.0
    width: int | None = None
    height: int | None = None
    sampler: str = DEFAULT_SAMPLER
    strength: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        check_unicode("prompt", self.prompt)
        check_unicode("negative_prompt", self.negative_prompt)
        if not 1 <= self.steps <= 1000:
            raise ValueError(f"steps must lie in 1..1000, got {self.steps}")
        if not 0 <= self.guidance_scale <= 100:
            raise ValueError(f"guidance_scale must lie in 0..100, got {self.guidance_scale}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must lie in 0..2^63, got {self.seed}")
        for name, side in (("width", self.width), ("height", self.height)):
            if side is not None and (side % 8 or not 64 <= side <= 4096):
                raise ValueError(f"{name} must be a multiple of 8 in 64..4096, got {side}")
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler {self.sampler!r} is unknown: expected one of {', '.join(SAMPLERS)}")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise ValueError(f"strength must lie above 0 and up to 1, got {self.strength}")


def each_seed(settings: GenerationSettings, count: int) -> list[GenerationSettings]:
    """The settings of so many pictures, each with the seed after the one before; a ValueError beyond the last seed."""
    return [replace(settings, seed=settings.seed + offset) for offset in range(count)]


@dataclass(frozen=True)
class StepReport:
    """Progress of a drawing: `step` of `total` done, and a preview when one was asked for."""

    step: int
    total: int
    preview: Image.Image | None


class GenerationStopped(Exception):
    """The drawing was stopped on request; nothing is wrong."""


def generate(
    pipe: Any,
    settings: GenerationSettings,
    *,
    canvas: Canvas | None = None,
    on_step: Callable[[StepReport], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    preview_every: int = 0,
) -> Image.Image:
    """Draw one picture.

    The starting noise is made on the CPU, so a seed draws the same picture on every device up to rounding. The
    pipeline's scheduler is put back after, whatever sampler was asked for and however the drawing ends.

    Args:
        pipe: a diffusers pipeline, with whatever adapters its manager has set.
        settings: what to draw.
        canvas: a picture to start from, and where it may change.
        on_step: called after every step.
        should_stop: asked after every step.
        preview_every: decode a preview every so many steps; 0 never.

    Raises:
        ValueError: a size, sampler, number of steps, weighted word or canvas that this model cannot draw: one line.
        GenerationStopped: within a step of `should_stop` answering yes.

    Examples:
        ```python
        import dora_diffusion as dd

        pipe = dd.load_pipeline("pocket")
        settings = dd.GenerationSettings("a noto style rocket on the beach", seed=7, steps=4)
        picture = dd.generate(pipe, settings, on_step=lambda report: print(report.step, "of", report.total))
        picture.save("rocket.png")
        ```
    """
    family = family_of_pipeline(pipe)
    height, width = sides = _sides(pipe, family, settings)
    canvas = None if canvas is None else canvas.fitted(width, height)
    with sampling(pipe, settings.sampler) as scheduler:
        check_steps(scheduler, settings.sampler, settings.steps)
        start = _start(pipe, family, settings, canvas, sides)

        def after_step(index: int, latents: Tensor) -> Tensor:
            if should_stop is not None and should_stop():
                raise GenerationStopped
            total = getattr(start.pipe, "num_timesteps", settings.steps)  # samplers may call the model twice a step
            if on_step is not None:
                wanted = preview_every > 0 and (index + 1) % preview_every == 0 and index + 1 < total
                on_step(StepReport(index + 1, total, _preview(pipe, family, latents[:1], sides) if wanted else None))
            return latents if start.outside is None else start.outside.kept(latents, pipe.scheduler, index, total)

        start.pipe.set_progress_bar_config(disable=True)
        result = start.pipe(
            **_words(pipe, family, settings),
            **start.arguments,
            num_inference_steps=settings.steps,
            generator=torch.Generator().manual_seed(settings.seed),
            **_callback(start.pipe, after_step),
        )
    picture: Image.Image = result.images[0]
    return picture if canvas is None else canvas.kept_outside(picture)


def generate_together(pipe: Any, settings: Sequence[GenerationSettings]) -> list[Image.Image]:
    """Draw pictures in one pass, each as `generate` draws it, up to rounding.

    Prompts with weighed words are drawn one by one.

    Args:
        pipe: as for `generate`.
        settings: of each picture, which differ in prompt and seed alone.

    Raises:
        ValueError: they differ in more, or as `generate`.
    """
    first = settings[0]
    if any(replace(one, prompt=first.prompt, seed=first.seed) != first for one in settings):
        raise ValueError("settings of pictures that are drawn together differ in more than prompt and seed")
    family = family_of_pipeline(pipe)
    words = [_words(pipe, family, one) for one in settings]
    if len(settings) == 1 or any(isinstance(value, Tensor) for said in words for value in said.values()):
        return [generate(pipe, one) for one in settings]
    height, width = _sides(pipe, family, first)
    with sampling(pipe, first.sampler) as scheduler, _decoding_in_turn(pipe):
        check_steps(scheduler, first.sampler, first.steps)
        pipe.set_progress_bar_config(disable=True)
        result = pipe(
            **{
                name: [said[name] for said in words] if isinstance(value, str) else value
                for name, value in words[0].items()
            },
            width=width,
            height=height,
            num_inference_steps=first.steps,
            generator=[torch.Generator().manual_seed(one.seed) for one in settings],
        )
    return list(result.images)


@contextmanager
def _decoding_in_turn(pipe: Any) -> Iterator[None]:
    """The VAE takes one picture after another: whole batches of large ones would need more memory than the drawing."""
    before = getattr(pipe.vae, "use_slicing", None)
    if before is None:
        yield
        return
    pipe.vae.use_slicing = True
    try:
        yield
    finally:
        pipe.vae.use_slicing = before


def check_drawable(pipe: Any, settings: GenerationSettings, *, has_canvas: bool = False) -> None:
    """A ValueError of one line, as `generate` raises it, for what this model cannot draw; nothing is drawn.

    Args:
        pipe: the pipeline that will draw.
        settings: what it is to draw.
        has_canvas: whether it is to start from a picture.
    """
    family = family_of_pipeline(pipe)
    _sides(pipe, family, settings)
    made_from(pipe.scheduler, settings.sampler)
    checked_prompts(family, settings.prompt, settings.negative_prompt)
    if has_canvas:
        _strength(settings)


def _words(pipe: Any, family: Family, settings: GenerationSettings) -> dict[str, Any]:
    """Prompts and guidance as the pipeline's arguments."""
    prompt, negative, embeddings = prompt_arguments(pipe, family, settings.prompt, settings.negative_prompt)
    arguments = family.arguments(pipe, replace(settings, prompt=prompt, negative_prompt=negative))
    return {**arguments, "prompt": None, "negative_prompt": None, **embeddings} if embeddings else arguments


def _start(
    pipe: Any, family: Family, settings: GenerationSettings, canvas: Canvas | None, sides: tuple[int, int]
) -> Start:
    """The pipeline that draws and what it starts from; `canvas` is fitted to `sides`, (height, width)."""
    if canvas is None:
        return Start(pipe, {"width": sides[1], "height": sides[0]})
    return start_on(pipe, family, canvas, strength=_strength(settings), seed=settings.seed)


def _strength(settings: GenerationSettings) -> float:
    """How much of a canvas is drawn anew; a ValueError when that is no step."""
    strength = DEFAULT_STRENGTH if settings.strength is None else settings.strength
    if int(settings.steps * strength) < 1:
        raise ValueError(f"strength {strength:g} of {settings.steps} steps leaves no step to draw; raise one of them")
    return strength


def _sides(pipe: Any, family: Family, settings: GenerationSettings) -> tuple[int, int]:
    """(height, width) to draw; a ValueError when the model has no such size."""
    native, multiple = family.native_side(pipe), pixel_multiple(pipe, family)
    for name, side in (("width", settings.width), ("height", settings.height)):
        if side is not None and side % multiple:
            raise ValueError(f"{name}: got {side}, expected a multiple of {multiple} for {family.name}")
    return settings.height or native, settings.width or native


def _callback(pipe: Any, after_step: Callable[[int, Tensor], Tensor]) -> dict[str, Any]:
    """`after_step` as the pipeline calls it: by today's name, or PixArt's older one, which takes nothing back."""
    if "callback_on_step_end" in inspect.signature(pipe.__call__).parameters:

        def today(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            return {**tensors, "latents": after_step(index, tensors["latents"])}

        return {"callback_on_step_end": today}

    def older(index: int, timestep: Any, latents: Tensor) -> None:
        after_step(index, latents)

    return {"callback": older}


@torch.no_grad()
def _preview(pipe: Any, family: Family, latents: Tensor, sides: tuple[int, int]) -> Image.Image:
    """Decode the latents of a running pipeline as they stand."""
    height, width = (side // pipe.vae_scale_factor for side in sides)
    picture: Image.Image = pipe.image_processor.postprocess(
        family.codec.decode(pipe, family.unpack(latents, height, width))
    )[0]
    return picture
