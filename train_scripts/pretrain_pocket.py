"""Make the embedded base: `python train_scripts/pretrain_pocket.py --folder pocket-work [--ship]`.

Needs npm (it fetches the @iconify-json emoji sets once) and the `pretrain` extra. Hours on two cores; stop it at will,
the same command goes on.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from dora_diffusion.pipelines import POCKET
from dora_diffusion.pretrain.autoencoder import AutoencoderRecipe
from dora_diffusion.pretrain.denoiser import DenoiserRecipe
from dora_diffusion.pretrain.run import Workshop, pretrain, ship_newest
from dora_diffusion.pretrain.text import TextRecipe


def main() -> None:
    """Train what is not trained yet; with --ship write the result into the package."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="working folder: icons, checkpoints, latents")
    parser.add_argument("--steps", type=int, default=DenoiserRecipe().steps, help="of the denoiser")
    parser.add_argument("--ship", action="store_true", help="write the newest weights into the package and stop")
    arguments = parser.parse_args()
    workshop = Workshop(arguments.folder)
    if arguments.ship:
        ship_newest(workshop, POCKET)
        return
    pretrain(workshop, AutoencoderRecipe(), TextRecipe(), replace(DenoiserRecipe(), steps=arguments.steps))


if __name__ == "__main__":
    main()
