"""Adapters on a pipeline: `AdapterManager` loads, blends, fuses and unloads them."""

from dora_diffusion.adapters.manager import AdapterManager
from dora_diffusion.adapters.matching import LoadReport
from dora_diffusion.functional.blend_modes import ADDITIVE

__all__ = ["ADDITIVE", "AdapterManager", "LoadReport"]
