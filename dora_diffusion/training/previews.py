"""Pictures during training: the same prompts, the same seed, so that only the adapter changes between them."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from dora_diffusion.generation import GenerationSettings, generate
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.subject import Subject


def draw_previews(subject: Subject, config: TrainConfig) -> list[Image.Image]:
    """One picture a preview prompt, with the adapter as it stands."""
    preview = config.preview
    with subject.drawing():
        return [
            generate(
                subject.pipe,
                GenerationSettings(
                    prompt, seed=preview.seed, steps=preview.steps, guidance_scale=preview.guidance_scale
                ),
            )
            for prompt in preview.prompts
        ]


def label_row(texts: Sequence[str], width: int, height: int = 18) -> Image.Image:
    """A white strip with one short text over each column of `width` pixels."""
    strip = Image.new("RGB", (width * len(texts), height), "white")
    draw = ImageDraw.Draw(strip)
    for column, text in enumerate(texts):
        draw.text((column * width + 4, 3), text[: max(1, width // 6 - 1)], fill="black")
    return strip


def grid(rows: Sequence[Sequence[Image.Image]], labels: Sequence[str] = ()) -> Image.Image:
    """Pictures of one size side by side, a row each, with optional labels over the columns."""
    width, height = rows[0][0].size
    top = label_row(labels, width) if labels else None
    offset = top.height if top else 0
    sheet = Image.new("RGB", (width * max(map(len, rows)), height * len(rows) + offset), "white")
    if top:
        sheet.paste(top, (0, 0))
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(picture, (x * width, offset + y * height))
    return sheet


def save_previews(pictures: Sequence[Image.Image], folder: Path, *, step: int) -> Path:
    """All prompts' pictures of a step side by side: `samples/step-00000100.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.png"
    grid([pictures]).save(path)
    return path


def save_strip(folder: Path) -> Path | None:
    """Every step's row under one another, labelled: `samples/strip.png`; None when there are no previews."""
    files = sorted(folder.glob("step-*.png"))
    if not files:
        return None
    sheet = grid([[Image.open(file).convert("RGB")] for file in files])
    draw = ImageDraw.Draw(sheet)
    for row, file in enumerate(files):
        y = row * sheet.height // len(files)
        draw.rectangle((0, y, 66, y + 14), fill="white")
        draw.text((3, y + 1), f"step {int(file.stem[5:])}", fill="black")
    path = folder / "strip.png"
    sheet.save(path)
    return path
