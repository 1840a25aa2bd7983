"""Class pictures for prior preservation: those of a folder, or what the base itself draws for the class.

What is drawn is kept, with a manifest beside it (`class.json`): how each picture was made, and the hash of its bytes. A
picture of another prompt, base or setting, or one that has been changed, is drawn anew.

Several processes draw a share each, then look for the others' entries in the folder, which they must have in common. No
collective waits meanwhile: a backend ends one that takes long (NCCL after ten minutes, unless told otherwise), and
drawing may take hours. Of each file there is one writer: process 0 of the manifest, any other of a hidden part of it.
"""

import hashlib
import json
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn
from tqdm import tqdm

from dora_diffusion.families import family_of_pipeline
from dora_diffusion.generation.generate import GenerationSettings, generate_together
from dora_diffusion.generation.png_metadata import save_picture
from dora_diffusion.training.base.identity import weights_digest
from dora_diffusion.training.config import PriorConfig, TrainConfig
from dora_diffusion.training.data.captions import METADATA_FILES
from dora_diffusion.training.data.examples import Example, find_examples
from dora_diffusion.training.processes import ALONE, Processes
from dora_diffusion.utils.atomic import sha256_of, write_atomically
from dora_diffusion.utils.images import SUFFIXES, list_files

MANIFEST = "class.json"
_DRAWN = re.compile(r"class-\d{4,}\.png")
_HOW = 1  # raised whenever the same recipe would draw another picture
_SECONDS = 0.2  # between looks at what the others have drawn
_PATIENCE = 30  # seconds until it is said who is waited for

Entry = Mapping[str, Any]


def ensure_class_examples(pipe: Any, config: TrainConfig, *, processes: Processes = ALONE) -> list[Example]:
    """The class examples that are trained; [] without prior preservation.

    Args:
        pipe: the base, before any adapter is injected.
        config: under `prior.mode` generated, prompts are used in turn; each picture keeps its own in a .txt. Pictures
            in the folder that were not drawn here count, and stay as they are.
        processes: that share the folder and the work: each draws every so manieth of the pictures that are missing.

    Raises:
        ValueError: a picture of the folder has no caption.
    """
    prior = config.prior
    if prior.mode != "generated":
        return folder_examples(prior, seed=config.optim.seed)
    if not prior.prompts:
        return []
    folder = prior.class_dir or config.output_dir / "class"
    folder.mkdir(parents=True, exist_ok=True)
    others = _some(_own_pictures(folder, prior.prompts[0]), prior.drawn_images, seed=config.optim.seed)
    recipes = _recipes(pipe, config, prior.drawn_images - len(others))
    manifest = _Manifest(folder, recipes, processes.rank)
    missing = _missing(manifest, processes)
    _draw_all(pipe, config, manifest, missing, writes=processes.leads or not processes.in_step)
    manifest.wait()
    return [*others, *(Example(folder / name, recipe.prompt) for name, recipe in recipes.items())]


def _missing(manifest: "_Manifest", processes: Processes) -> list[str]:
    """What this process is to draw."""
    if not processes.in_step:
        return manifest.missing(processes.share(list(manifest.recipes)))
    processes.meet("class pictures")
    missing = manifest.missing(manifest.recipes)
    processes.meet("class pictures looked at")  # before the first is written: all draw the same
    return missing


def folder_examples(prior: PriorConfig, *, seed: int) -> list[Example]:
    """The pictures of class_dir as they are, no more than class_images; [] without a class_dir.

    Raises:
        ValueError: there are none, or one has no caption.
    """
    if prior.class_dir is None:
        return []
    found = find_examples(prior.class_dir, instance_prompt=prior.prompts[0] if prior.prompts else None)
    return _some(found, prior.class_images or len(found), seed=seed)


def _own_pictures(folder: Path, prompt: str) -> list[Example]:
    """The pictures in a folder that were not drawn here."""
    files = list_files(folder)
    foreign = any(path.suffix.lower() in SUFFIXES and not _DRAWN.fullmatch(path.name) for path in files)
    if not foreign and not any(path.name in METADATA_FILES for path in files):
        return []
    examples = find_examples(folder, instance_prompt=prompt)
    return [example for example in examples if not (example.path.parent == folder and _is_drawn(example.path))]


def _is_drawn(path: Path) -> bool:
    return _DRAWN.fullmatch(path.name) is not None


def _some(examples: Sequence[Example], count: int, *, seed: int) -> list[Example]:
    """So many of the examples, in their order, chosen by a hash of their names: the same ones in every run."""
    ranked = sorted(examples, key=lambda one: hashlib.sha256(f"{seed}/{one.path.name}".encode()).digest())
    chosen = {example.path for example in ranked[:count]}
    return [example for example in examples if example.path in chosen]


@dataclass(frozen=True)
class Recipe:
    """How a class picture is drawn.

    Attributes:
        how: version of the drawing itself.
        base: hash of the base's weights, its dtype with them, and of its scheduler's settings.
        prompt: of the picture.
        seed: of its noise.
        steps: of denoising.
        guidance_scale: how strongly the prompt is followed.
        side: in pixels.
    """

    how: int
    base: str
    prompt: str
    seed: int
    steps: int
    guidance_scale: float
    side: int

    def settings(self) -> GenerationSettings:
        """As `generate` takes it."""
        return GenerationSettings(self.prompt, seed=self.seed, steps=self.steps, guidance_scale=self.guidance_scale)


def _recipes(pipe: Any, config: TrainConfig, count: int) -> dict[str, Recipe]:
    """File name -> recipe of each class picture that there shall be."""
    if count < 1:
        return {}
    prior, preview, base = config.prior, config.preview, _base_digest(pipe)
    guidance = preview.guidance_scale if prior.guidance_scale is None else prior.guidance_scale
    side = family_of_pipeline(pipe).native_side(pipe)
    return {
        f"class-{index:04d}.png": Recipe(
            how=_HOW,
            base=base,
            prompt=prior.prompts[index % len(prior.prompts)],
            seed=config.optim.seed * 100_003 + index,
            steps=preview.steps,
            guidance_scale=guidance,
            side=side,
        )
        for index in range(count)
    }


def _base_digest(pipe: Any) -> str:
    """A hash of all that draws."""
    modules = {name: weights_digest(part) for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    scheduler = {**pipe.scheduler.config, "class": type(pipe.scheduler).__name__}
    return hashlib.sha256(json.dumps([modules, scheduler], sort_keys=True, default=str).encode()).hexdigest()


class _Manifest:
    """What the folder says of its class pictures, as one of several processes reads and writes it.

    Args:
        folder: of the pictures.
        recipes: what there shall be.
        process: of this writer.
    """

    def __init__(self, folder: Path, recipes: Mapping[str, Recipe], process: int) -> None:
        self.folder, self.recipes, self._leads = folder, recipes, process == 0
        self._path = folder / (MANIFEST if self._leads else f".class-{process}.json")

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those of the pictures that are not there, made by their recipes and unchanged since."""
        said = [_entries(path) for path in (self.folder / MANIFEST, *self.folder.glob(".class-*.json"))]
        return [name for name in names if not self._is_there(name, [part[name] for part in said if name in part])]

    def add(self, names: Iterable[str]) -> None:
        """Note pictures that were drawn just now."""
        self._write({**_entries(self._path), **{name: self._entry(name) for name in names}})

    def wait(self) -> None:
        """Until every picture is there; then process 0 puts all parts into the one manifest."""
        missing, started, is_said = self.missing(self.recipes), time.monotonic(), False
        while missing:
            if not is_said and time.monotonic() - started > _PATIENCE:
                print(f"{self.folder}: waiting for {len(missing)} class pictures that other processes draw", flush=True)
                is_said = True
            time.sleep(_SECONDS)
            missing = self.missing(missing)
        parts = list(self.folder.glob(".class-*.json"))
        if self._leads and parts:
            self._write({**_entries(self._path), **{name: self._entry(name) for name in self.recipes}})
            for part in parts:
                part.unlink(missing_ok=True)

    def _is_there(self, name: str, entries: Sequence[Entry]) -> bool:
        recipe = asdict(self.recipes[name])
        same = [entry["sha256"] for entry in entries if entry == {**recipe, "sha256": entry.get("sha256")}]
        return bool(same) and (self.folder / name).is_file() and sha256_of(self.folder / name) in same

    def _entry(self, name: str) -> Entry:
        return {**asdict(self.recipes[name]), "sha256": sha256_of(self.folder / name)}

    def _write(self, entries: Mapping[str, Entry]) -> None:
        write_atomically(self._path, json.dumps(dict(sorted(entries.items())), indent=1).encode())


def _entries(path: Path) -> dict[str, Entry]:
    """What a manifest or a part of one says; nothing where it is missing or cannot be understood."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return {name: entry for name, entry in found.items() if isinstance(entry, dict)} if isinstance(found, dict) else {}


def _draw_all(pipe: Any, config: TrainConfig, manifest: _Manifest, names: Sequence[str], *, writes: bool) -> None:
    """Draw pictures, as many at once as a training step holds; `writes`: whether they are kept."""
    size = config.optim.batch_size
    with tqdm(total=len(names), desc="class images", disable=not names) as bar:
        for start in range(0, len(names), size):
            batch = names[start : start + size]
            drawn = generate_together(pipe, [manifest.recipes[name].settings() for name in batch])
            if writes:
                _save(drawn, config, manifest, batch)
                manifest.add(batch)
            bar.update(len(batch))


def _save(pictures: Sequence[Image.Image], config: TrainConfig, manifest: _Manifest, names: Sequence[str]) -> None:
    """Write class pictures, a caption before each, so that none is ever without."""
    for name, picture in zip(names, pictures, strict=True):
        path, one = manifest.folder / name, manifest.recipes[name].settings()
        write_atomically(path.with_suffix(".txt"), one.prompt.encode())
        save_picture(picture, path, one, model=config.model, adapters=[])
