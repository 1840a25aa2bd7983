"""dora_diffusion: image-generation adapters built on DoRA (arXiv 2402.09353).

    pipe = load_pipeline("pocket")
    manager = AdapterManager(pipe)
    manager.load_adapter("ink.safetensors", name="ink")
    manager.set_adapters({"ink": 0.8})
    pipe("a castle on the beach").images[0]

Names are imported when first used, so that `import dora_diffusion` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dora_diffusion.adapters import AdapterManager, LoadReport
    from dora_diffusion.baking import bake
    from dora_diffusion.blending import BlendOptions, blend, blend_with_report, interference
    from dora_diffusion.conversion import Extraction, extract, resize, to_dora, to_lora, to_out_axis
    from dora_diffusion.formats import examine, load_adapter, save_adapter
    from dora_diffusion.generation import GenerationSettings, generate
    from dora_diffusion.injection import DoRAConfig, Injection, inject
    from dora_diffusion.pipelines import load_pipeline
    from dora_diffusion.state import AdapterState, ModuleState
    from dora_diffusion.tokens import Words, WordState, add_words, install_words, load_word, save_words
    from dora_diffusion.training.config import TrainConfig
    from dora_diffusion.training.loop import train

__version__ = "0.1.0"

_HOMES = {
    "AdapterManager": "adapters",
    "LoadReport": "adapters",
    "BlendOptions": "blending",
    "blend": "blending",
    "blend_with_report": "blending",
    "interference": "blending",
    "Extraction": "conversion",
    "bake": "baking",
    "examine": "formats",
    "extract": "conversion",
    "resize": "conversion",
    "to_dora": "conversion",
    "to_lora": "conversion",
    "to_out_axis": "conversion",
    "load_adapter": "formats",
    "save_adapter": "formats",
    "GenerationSettings": "generation",
    "generate": "generation",
    "DoRAConfig": "injection",
    "Injection": "injection",
    "inject": "injection",
    "load_pipeline": "pipelines",
    "AdapterState": "state",
    "ModuleState": "state",
    "WordState": "tokens",
    "Words": "tokens",
    "add_words": "tokens",
    "install_words": "tokens",
    "load_word": "tokens",
    "save_words": "tokens",
    "TrainConfig": "training.config",
    "train": "training.loop",
}

__all__ = [
    "AdapterManager",
    "AdapterState",
    "BlendOptions",
    "DoRAConfig",
    "Extraction",
    "GenerationSettings",
    "Injection",
    "LoadReport",
    "ModuleState",
    "TrainConfig",
    "WordState",
    "Words",
    "add_words",
    "bake",
    "blend",
    "blend_with_report",
    "examine",
    "extract",
    "generate",
    "inject",
    "install_words",
    "interference",
    "load_adapter",
    "load_pipeline",
    "load_word",
    "resize",
    "save_adapter",
    "save_words",
    "to_dora",
    "to_lora",
    "to_out_axis",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dora_diffusion' has no attribute {name!r}")
    value = getattr(import_module(f"dora_diffusion.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
