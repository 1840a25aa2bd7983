"""Adapters out of fine-tuned models, to other ranks, and from LoRA to DoRA and back. All but resizing need the base.

Every operation works layer by layer in fp32 and can say how near each layer came: see `Report`.
"""

from dora_diffusion.conversion.extract import Extraction, extract
from dora_diffusion.conversion.lora_dora import to_dora, to_lora, to_out_axis
from dora_diffusion.conversion.reports import Progress, Report
from dora_diffusion.conversion.resize import resize

__all__ = ["Extraction", "Progress", "Report", "extract", "resize", "to_dora", "to_lora", "to_out_axis"]
