"""Class images for prior preservation: what the base itself draws for the class, made once and kept."""

from pathlib import Path
from typing import Any

from tqdm import tqdm

from dora_diffusion.generation.generate import GenerationSettings, generate
from dora_diffusion.generation.png_metadata import save_picture
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.data.examples import Example, find_examples
from dora_diffusion.utils.atomic import write_atomically
from dora_diffusion.utils.images import SUFFIXES


def ensure_class_examples(pipe: Any, config: TrainConfig) -> list[Example]:
    """Class examples, drawn by the unadapted base where the folder holds too few; [] without prior preservation.

    Args:
        pipe: the base, before any adapter is injected.
        config: `prior.class_prompts` (or one `class_prompt`) are used in turn; each picture keeps its own in a .txt.
    """
    prompts = config.prior.prompts
    if not prompts:
        return []
    folder = config.prior.class_dir or config.output_dir / "class"
    folder.mkdir(parents=True, exist_ok=True)
    have = sum(path.suffix.lower() in SUFFIXES for path in folder.iterdir())
    names = [f"class-{index:04d}.png" for index in range(config.prior.class_images)]
    missing = [index for index, name in enumerate(names) if not (folder / name).exists()]
    for index in tqdm(missing[: max(0, len(names) - have)], desc="class images", disable=have >= len(names)):
        _draw(pipe, config, folder / names[index], index)
    return find_examples(folder, instance_prompt=prompts[0])


def _draw(pipe: Any, config: TrainConfig, path: Path, index: int) -> None:
    """Draw class picture `index`; its caption is written first, so that no picture is ever without."""
    prompts, guidance = config.prior.prompts, config.prior.guidance_scale
    prompt = prompts[index % len(prompts)]
    settings = GenerationSettings(
        prompt,
        seed=config.optim.seed * 100_003 + index,
        steps=config.preview.steps,
        guidance_scale=config.preview.guidance_scale if guidance is None else guidance,
    )
    picture = generate(pipe, settings)
    write_atomically(path.with_suffix(".txt"), prompt.encode())
    save_picture(picture, path, settings, model=config.model, adapters=[])
