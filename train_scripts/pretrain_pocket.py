"""Make the embedded bases: `python train_scripts/pretrain_pocket.py --folder pocket-work [--base dit] [--ship]`.

Needs npm (it fetches the @iconify-json emoji sets once) and the `pretrain` extra. Hours on two cores; stop it at will,
the same command goes on. `--base dit` makes the pocket DiT with the autoencoder and tokenizer of the shipped pocket.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from dora_diffusion.pipelines.loading import POCKET, POCKET_DIT
from dora_diffusion.pretrain.autoencoder import AutoencoderRecipe
from dora_diffusion.pretrain.denoiser import DenoiserRecipe
from dora_diffusion.pretrain.run import PretrainFolder, pretrain, pretrain_dit, ship_newest, ship_newest_dit
from dora_diffusion.pretrain.text import TextRecipe
from dora_diffusion.utils.console import OneLineParser


def main() -> None:
    """Train what is not trained yet; with --ship write the result into the package."""
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="working folder: icons, checkpoints, latents")
    parser.add_argument("--base", choices=("unet", "dit"), default="unet", help="the pocket or the pocket DiT")
    parser.add_argument("--steps", type=int, default=DenoiserRecipe().steps, help="of the denoiser")
    parser.add_argument("--ship", action="store_true", help="write the newest weights into the package and stop")
    arguments = parser.parse_args()
    folders = PretrainFolder(arguments.folder)
    denoiser = replace(DenoiserRecipe(), steps=arguments.steps)
    if arguments.base == "dit":
        if arguments.ship:
            ship_newest_dit(folders, POCKET, POCKET_DIT)
        else:
            pretrain_dit(folders, POCKET, TextRecipe(), denoiser)
    elif arguments.ship:
        ship_newest(folders, POCKET)
    else:
        pretrain(folders, AutoencoderRecipe(), TextRecipe(), denoiser)


if __name__ == "__main__":
    main()
