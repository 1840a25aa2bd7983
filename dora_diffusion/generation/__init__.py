"""Pictures out of a pipeline: settings, samplers, prompts, img2img, and what a PNG says of itself."""

from dora_diffusion.generation.generate import GenerationSettings, GenerationStopped, generate
from dora_diffusion.generation.png_metadata import save_picture

__all__ = ["GenerationSettings", "GenerationStopped", "generate", "save_picture"]
