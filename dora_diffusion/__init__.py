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

from dora_diffusion._version import __version__ as __version__

if TYPE_CHECKING:
    from dora_diffusion.adapters.attach import attach, detach
    from dora_diffusion.adapters.manager import AdapterManager
    from dora_diffusion.adapters.matching import LoadReport
    from dora_diffusion.blending import BlendOptions, blend, blend_with_report, interference
    from dora_diffusion.blending.bake import bake
    from dora_diffusion.conversion import Extraction, ForTool, extract, for_tool, resize, to_dora, to_lora, to_out_axis
    from dora_diffusion.formats import examine, load_adapter, save_adapter
    from dora_diffusion.generation.generate import GenerationSettings, generate
    from dora_diffusion.layers.config import DoRAConfig
    from dora_diffusion.layers.injection import Injection, inject
    from dora_diffusion.pipelines.loading import load_pipeline
    from dora_diffusion.pipelines.textual_inversion import (
        Words,
        WordState,
        add_words,
        install_words,
        load_word,
        save_words,
    )
    from dora_diffusion.state import AdapterState, ModuleState
    from dora_diffusion.training.config import TrainConfig
    from dora_diffusion.training.run.callbacks import TrainingCallback
    from dora_diffusion.training.run.finish import TrainResult
    from dora_diffusion.training.run.train import train

_HOMES = {
    "AdapterManager": "adapters.manager",
    "LoadReport": "adapters.matching",
    "attach": "adapters.attach",
    "detach": "adapters.attach",
    "BlendOptions": "blending",
    "blend": "blending",
    "blend_with_report": "blending",
    "interference": "blending",
    "Extraction": "conversion",
    "ForTool": "conversion",
    "bake": "blending.bake",
    "examine": "formats",
    "extract": "conversion",
    "for_tool": "conversion",
    "resize": "conversion",
    "to_dora": "conversion",
    "to_lora": "conversion",
    "to_out_axis": "conversion",
    "load_adapter": "formats",
    "save_adapter": "formats",
    "GenerationSettings": "generation.generate",
    "generate": "generation.generate",
    "DoRAConfig": "layers.injection",
    "Injection": "layers.injection",
    "inject": "layers.injection",
    "load_pipeline": "pipelines.loading",
    "AdapterState": "state",
    "ModuleState": "state",
    "WordState": "pipelines.textual_inversion",
    "Words": "pipelines.textual_inversion",
    "add_words": "pipelines.textual_inversion",
    "install_words": "pipelines.textual_inversion",
    "load_word": "pipelines.textual_inversion",
    "save_words": "pipelines.textual_inversion",
    "TrainConfig": "training.config",
    "TrainResult": "training.run.finish",
    "TrainingCallback": "training.run.callbacks",
    "train": "training.run.train",
}

__all__ = [
    "AdapterManager",
    "AdapterState",
    "BlendOptions",
    "DoRAConfig",
    "Extraction",
    "ForTool",
    "GenerationSettings",
    "Injection",
    "LoadReport",
    "ModuleState",
    "TrainConfig",
    "TrainResult",
    "TrainingCallback",
    "WordState",
    "Words",
    "add_words",
    "attach",
    "bake",
    "blend",
    "blend_with_report",
    "detach",
    "examine",
    "extract",
    "for_tool",
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
