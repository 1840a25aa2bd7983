"""Adapters out of fine-tuned models, to other ranks, from LoRA to DoRA and back, and for other tools.

Every operation works layer by layer in fp32 and can say how near each layer came: see `Report`.
"""

from dora_diffusion.conversion.extract import Extraction, extract
from dora_diffusion.conversion.for_tool import ForTool, for_tool
from dora_diffusion.conversion.lora_dora import to_dora, to_lora, to_out_axis
from dora_diffusion.conversion.reports import Report
from dora_diffusion.conversion.resize import resize
from dora_diffusion.conversion.tools import TOOLS, Tool
from dora_diffusion.utils.progress import LayerProgress as Progress

__all__ = [
    "TOOLS",
    "Extraction",
    "ForTool",
    "Progress",
    "Report",
    "Tool",
    "extract",
    "for_tool",
    "resize",
    "to_dora",
    "to_lora",
    "to_out_axis",
]
