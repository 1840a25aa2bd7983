"""How like a drawn object is to the true drawing of it, with the background taken out.

    likeness(a, b) = Pearson correlation of (a - background) and (b - background), RGB at 32 x 32

1 is the very same object in the same place, 0 is nothing in common. It stands beside two bounds, or it says nothing:
the ceiling (the truth through the base's own autoencoder) and the floor (what the base draws of other objects there).
"""

import numpy as np
from PIL import Image

from dora_diffusion.evaluate.recognition import thumbnail
from dora_diffusion.pretrain.scenes import background, background_in


def likeness(drawn: Image.Image, truth: Image.Image, caption: str) -> float:
    """Correlation of two pictures in -1..1 after the caption's background is taken from both (if it names one)."""
    name = background_in(caption)
    behind = 0.0 if name is None else thumbnail(background(name))
    a, b = thumbnail(drawn) - behind, thumbnail(truth) - behind
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float((a * b).sum()) / scale if scale > 0 else 0.0
