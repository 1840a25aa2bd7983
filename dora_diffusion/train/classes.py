"""Class images for prior preservation: what the base itself draws for the class, made once and kept."""

from itertools import cycle, islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dora_diffusion.generation import GenerationSettings, generate
from dora_diffusion.storage import write_atomically
from dora_diffusion.train.config import TrainConfig
from dora_diffusion.train.dataset import Example, find_examples


def ensure_class_examples(pipe: Any, config: TrainConfig) -> list[Example]:
    """Class examples, drawn by the unadapted base where the folder holds too few; [] without prior preservation.

    Args:
        pipe: the base, before any adapter is injected.
        config: `prior.class_prompts` (or one `class_prompt`) are used in turn; each picture keeps its own in a .txt.
    """
    prior = config.prior
    prompts = list(prior.prompts)
    if not prompts:
        return []
    folder = prior.class_dir or config.output_dir / "class"
    folder.mkdir(parents=True, exist_ok=True)
    have = [path for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")]
    if len(have) < prior.class_images:
        _draw(pipe, config, prompts, folder, start=len(have))
    return find_examples(folder, instance_prompt=prompts[0])


def _draw(pipe: Any, config: TrainConfig, prompts: list[str], folder: Path, *, start: int) -> None:
    preview = config.preview
    wanted = list(islice(cycle(prompts), config.prior.class_images))
    for index in tqdm(range(start, len(wanted)), desc="class images"):
        settings = GenerationSettings(
            wanted[index],
            seed=config.optim.seed * 100_003 + index,
            steps=preview.steps,
            guidance_scale=preview.guidance_scale,
        )
        path = folder / f"class-{index:04d}.png"
        generate(pipe, settings).save(path)
        write_atomically(path.with_suffix(".txt"), wanted[index].encode())
