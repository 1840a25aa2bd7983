"""Pictures during training: the same prompts, the same seed, so that only the adapter changes between them."""

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from dora_diffusion.generation.generate import GenerationSettings, check_drawable, generate
from dora_diffusion.training.base.trainable import TrainablePipeline
from dora_diffusion.training.config import PreviewConfig
from dora_diffusion.training.processes import Processes
from dora_diffusion.utils.atomic import atomic_file
from dora_diffusion.utils.image_grid import grid

STRIP = "strip.png"
_APART = ".step-"
_SECONDS = 0.2  # between looks at a folder of which another machine shows what it knew a while ago


def settings_of(preview: PreviewConfig) -> list[GenerationSettings]:
    """What is drawn for each prompt."""
    found = []
    for one in preview.prompts:
        width, height = one.sides or (None, None)
        found.append(
            GenerationSettings(
                one.prompt,
                one.negative,
                seed=preview.seed if one.seed is None else one.seed,
                steps=one.steps or preview.steps,
                guidance_scale=preview.guidance_scale if one.guidance_scale is None else one.guidance_scale,
                width=width,
                height=height,
            )
        )
    return found


def own_previews(preview: PreviewConfig, processes: Processes) -> PreviewConfig:
    """The previews that this process draws."""
    return preview.model_copy(update={"prompts": processes.share_of_forwards(preview.prompts)})


def prompts_of(preview: PreviewConfig) -> list[str]:
    """All that text encoders are asked for previews."""
    return [prompt for one in settings_of(preview) for prompt in (one.prompt, one.negative_prompt)]


def check_previews(pipe: Any, preview: PreviewConfig) -> None:
    """A ValueError of one line for a preview that the base cannot draw; nothing is drawn."""
    for number, settings in enumerate(settings_of(preview)):
        try:
            check_drawable(pipe, settings)
        except ValueError as error:
            raise ValueError(f"preview.prompts[{number}]: {error}") from None


def draw_previews(trainable: TrainablePipeline, preview: PreviewConfig) -> list[Image.Image]:
    """One picture a preview prompt, with the adapter as it stands."""
    wanted = zip(settings_of(preview), preview.prompts, strict=True)
    with trainable.drawing(), trainable.placement.drawing(), trainable.frozen.recalled():
        return [_drawn(trainable, settings, one.strength) for settings, one in wanted]


def _drawn(trainable: TrainablePipeline, settings: GenerationSettings, strength: float) -> Image.Image:
    if strength == 1:
        return generate(trainable.pipe, settings)
    with trainable.at_strength(strength):
        return generate(trainable.pipe, settings)


def pass_on(
    drawn: list[Image.Image], processes: Processes, folder: Path, *, step: int, count: int
) -> list[Image.Image]:
    """The pictures of all prompts, in the leading process; the others hand theirs over in files, and have none.

    Args:
        drawn: this process's share.
        processes: that have drawn one each.
        folder: of the previews, which they have in common.
        step: of the previews.
        count: of the prompts.
    """
    if processes.count == 1 or processes.in_step:
        return drawn
    apart = folder / f"{_APART}{step:08d}"
    apart.mkdir(parents=True, exist_ok=True)
    for number, picture in zip(processes.share(range(count)), drawn, strict=True):
        _save(picture, apart / f"{number}.png")
    processes.meet(f"previews of {step}")
    if not processes.leads:
        return []
    taken = [_taken(apart / f"{number}.png") for number in range(count)]
    shutil.rmtree(apart, ignore_errors=True)
    return taken


def _taken(path: Path) -> Image.Image:
    while not path.exists():
        time.sleep(_SECONDS)
    with Image.open(path) as picture:
        picture.load()
        return picture.copy()


def preview_path(folder: Path, step: int) -> Path:
    """Where the previews of a step lie: `samples/step-00000100.png`."""
    return folder / f"step-{step:08d}.png"


def save_previews(pictures: Sequence[Image.Image], folder: Path, *, step: int) -> Path:
    """All prompts' pictures of a step side by side."""
    folder.mkdir(parents=True, exist_ok=True)
    path = preview_path(folder, step)
    _save(grid([pictures]), path)
    return path


def forget_previews(folder: Path, *, after: int) -> None:
    """Remove what an earlier start drew after so many steps: it is drawn anew, or was of other settings."""
    for file in _numbered(folder):
        if int(file.stem[5:]) > after:
            file.unlink(missing_ok=True)
    if after < 0:
        for file in (folder / STRIP, *folder.glob("prompt-*.png")):
            file.unlink(missing_ok=True)
    for apart in folder.glob(f"{_APART}*"):
        shutil.rmtree(apart, ignore_errors=True)


def _numbered(folder: Path) -> list[Path]:
    """The previews of each step, in their order."""
    found = [file for file in folder.glob("step-*.png") if file.stem[5:].isdigit()]
    return sorted(found, key=lambda file: int(file.stem[5:]))


def save_last_apart(folder: Path, count: int) -> list[Path]:
    """The pictures of the last row, each in a file of its own, for the card: `samples/prompt-1.png`; [] without a row.

    Args:
        folder: of the previews.
        count: how many prompts there are.
    """
    for file in folder.glob("prompt-*.png"):
        file.unlink(missing_ok=True)
    rows = _numbered(folder)
    if not rows or not count:
        return []
    with Image.open(rows[-1]) as picture:
        row = picture.convert("RGB")
    width = row.width // count
    paths = [folder / f"prompt-{number + 1}.png" for number in range(count)]
    for number, path in enumerate(paths):
        _save(row.crop((number * width, 0, (number + 1) * width, row.height)), path)
    return paths


def save_strip(folder: Path) -> Path | None:
    """Every step's row under one another, labelled: `samples/strip.png`; None when there are no previews.

    Rows of another size than the last, drawn before a resumption with other prompts, are left out.
    """
    drawn = []
    for file in _numbered(folder):
        with Image.open(file) as picture:
            drawn.append((file, picture.convert("RGB")))
    if not drawn:
        return None
    alike = [(file, picture) for file, picture in drawn if picture.size == drawn[-1][1].size]
    files = [file for file, _ in alike]
    sheet = grid([[picture] for _, picture in alike])
    draw = ImageDraw.Draw(sheet)
    for row, file in enumerate(files):
        y = row * sheet.height // len(files)
        draw.rectangle((0, y, 66, y + 14), fill="white")
        draw.text((3, y + 1), f"step {int(file.stem[5:])}", fill="black")
    path = folder / STRIP
    _save(sheet, path)
    return path


def _save(picture: Image.Image, path: Path) -> None:
    with atomic_file(path) as file:
        picture.save(file, format="PNG")
