"""Tensors of scenes for pretraining: pictures for the VAE, and (picture, scene) pairs for the denoiser."""

from itertools import product
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dora_diffusion.pretrain.icons import icon_names, load_icons
from dora_diffusion.pretrain.scenes import OBJECT_PIXELS, Scene, compose, vocabulary

HELD_OUT_SHARE = 0.05


def to_tensor(picture: Image.Image) -> Tensor:
    """RGB picture -> uint8 (3, H, W)."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous()


def held_out_pairs(seed: int = 0) -> set[tuple[str, str]]:
    """5 % of (object, style) pairs that the denoiser never sees; no object loses more than one of its styles."""
    words = vocabulary()
    objects = list(words.objects)
    rng = Random(seed)
    rng.shuffle(objects)
    count = round(HELD_OUT_SHARE * len(objects) * len(words.styles))
    return {(name, rng.choice(sorted(words.styles))) for name in objects[:count]}


def autoencoder_pictures(icon_folder: Path, count: int, seed: int = 0) -> Tensor:
    """Random composites of every icon of the base styles but the unseen objects: uint8 (count, 3, 128, 128)."""
    words = vocabulary()
    rng = Random(seed)
    sets = list(words.styles.values())
    common = set.intersection(*(set(icon_names(name, icon_folder)) for name in sets))
    names = sorted(common - set(words.unseen_objects))
    icons = [icon for name in sets for icon in load_icons(name, names, icon_folder).values()]
    pictures = [
        to_tensor(compose(rng.choice(icons), rng.choice(words.backgrounds), rng.choice(list(OBJECT_PIXELS))))
        for _ in tqdm(range(count), desc="pictures for the autoencoder", mininterval=10)
    ]
    return torch.stack(pictures)


def all_scenes() -> list[Scene]:
    """Every object x style x background x size of the base, held-out pairs left out."""
    words = vocabulary()
    held_out = held_out_pairs()
    return [
        Scene(name, style, background, size)
        for name, style, background, size in product(words.objects, words.styles, words.backgrounds, OBJECT_PIXELS)
        if (name, style) not in held_out
    ]


def scene_pictures(scenes: list[Scene], icon_folder: Path) -> Tensor:
    """The scenes' pictures: uint8 (N, 3, 128, 128). Every scene must name its style."""
    words = vocabulary()
    sets = {**words.styles, **words.unseen_styles}
    names: dict[str, set[str]] = {}
    for scene in scenes:
        names.setdefault(str(scene.style), set()).add(scene.object)
    icons = {style: load_icons(sets[style], sorted(objects), icon_folder) for style, objects in names.items()}
    return torch.stack(
        [
            to_tensor(compose(icons[str(s.style)][s.object], s.background, s.size))
            for s in tqdm(scenes, desc="scenes", mininterval=10)
        ]
    )
