"""Score an embedded base: `python train_scripts/score_pocket.py --folder pocket-work [--base pocket-dit]`.

Recognition over 100 captions, and over the held-out (object, style) pairs; a grid of 40 captions; the autoencoder's
PSNR on objects it never saw. Needs the `pretrain` extra (the drawings are the judge).
"""

import argparse
import json
import time
from collections.abc import Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image

from dora_diffusion.evaluate.recognition import as_dict, draw_scenes, random_scenes, score
from dora_diffusion.pipelines.loading import EMBEDDED, POCKET, load_pipeline
from dora_diffusion.pretrain.autoencoder import reconstruction_psnr
from dora_diffusion.pretrain.icons import load_icons
from dora_diffusion.pretrain.package import draw_batch
from dora_diffusion.pretrain.pictures import held_out_pairs, scene_pictures
from dora_diffusion.pretrain.run import PretrainFolder, trained_dit_pipeline, trained_pipeline
from dora_diffusion.pretrain.scenes import Scene, compose, vocabulary
from dora_diffusion.utils.atomic import atomic_file, write_atomically
from dora_diffusion.utils.console import OneLineParser
from dora_diffusion.utils.image_grid import grid


def main() -> None:
    """Draw, judge, write `BASE.json` and `BASE-grid.png`."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="working folder of pretraining: its icons judge")
    parser.add_argument("--base", choices=EMBEDDED, default="pocket")
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    parser.add_argument("--newest", action="store_true", help="score the newest checkpoint, not the shipped base")
    parser.add_argument("--count", type=int, default=100)
    arguments = parser.parse_args()
    folders, words = PretrainFolder(arguments.folder), vocabulary()
    pipe = newest(folders, arguments.base) if arguments.newest else load_pipeline(arguments.base)
    icons = {style: load_icons(name, list(words.objects), folders.icons) for style, name in words.styles.items()}

    @cache
    def reference(scene: Scene) -> Image.Image:
        return compose(icons[str(scene.style)][scene.object], scene.background, scene.size)

    def draw(captions: Sequence[str], seed: int) -> list[Image.Image]:
        return draw_batch(pipe, captions, seed)

    held_out = sorted(held_out_pairs())
    seen = [pair for pair in product(words.objects, words.styles) if pair not in held_out]
    scenes, unseen = random_scenes(arguments.count, pairs=seen, seed=1), random_scenes(36, pairs=held_out, seed=2)
    started = time.monotonic()
    pictures = draw_scenes(draw, scenes, seed=100)
    seconds = (time.monotonic() - started) / len(scenes)
    strangers = [Scene(name, style, "blue") for name in words.unseen_objects for style in words.styles]
    report = {
        "seen_pairs": as_dict(score(pictures, scenes, reference)),
        "held_out_pairs": as_dict(score(draw_scenes(draw, unseen, seed=500), unseen, reference)),
        "autoencoder_psnr_db": round(reconstruction_psnr(pipe.vae, scene_pictures(strangers, folders.icons)), 2),
        "seconds_a_picture_in_batches_of_10": round(seconds, 2),
    }
    write_atomically(arguments.output / f"{arguments.base}.json", (json.dumps(report, indent=1) + "\n").encode())
    with atomic_file(arguments.output / f"{arguments.base}-grid.png") as file:
        rows = [pictures[start : start + 10] for start in range(0, min(40, len(pictures)), 10)]
        grid(rows).save(file, format="PNG")
    print(json.dumps(report, indent=1))


def newest(folders: PretrainFolder, base: str) -> Any:
    """The pipeline of the newest checkpoint of a base."""
    return trained_pipeline(folders) if base == "pocket" else trained_dit_pipeline(folders, POCKET)


if __name__ == "__main__":
    main()
