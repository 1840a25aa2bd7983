"""What other tools draw with: which of our formats each reads, of which models, and what it makes of a layer.

A tool computes magnitudes by one of the formulas of `functional.blend_modes`. Read in their sources:

    ComfyUI     comfy/weight_adapter/base.py, since pull request 7727 (April 2025)
    Forge       backend/patcher/lora.py, since pull request 2856 (May 2025)
    A1111       extensions-builtin/Lora/network.py, since pull request 16151 (1.10, July 2024)
    InvokeAI    invokeai/backend/patches/layers (August 2026)
    SD.Next     modules/lora/network.py and native_adapter.py (2026)
    diffusers   0.42 with PEFT 0.21: the tests ask it live
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from dora_diffusion.functional.blend_modes import MODES
from dora_diffusion.state import FactoredState, Module, ModuleState, term_of


@dataclass(frozen=True)
class Tool:
    """One tool.

    Attributes:
        name: as users type it.
        title: as it calls itself, and since when it computes so.
        formats: family -> the format of ours that it reads of it.
        mode: of `MODES`, what it makes of one adapter on one layer.
        is_over_base_norms: it divides magnitudes per output by N(W), not by N(W + D).
        is_whole_read: it reads whole differences.
        is_factored_dora_read: it computes magnitudes beside LoHa, LoKr and Tucker cores.
        is_scale_outside: it scales what a DoRA changes by alpha / r, not D.
        is_vector_read: it adds differences of biases and normalisations.
        unread: family -> which layers of its it leaves out, a regular expression for their paths.
    """

    name: str
    title: str
    formats: Mapping[str, str]
    mode: str
    is_over_base_norms: bool = False
    is_whole_read: bool = True
    is_factored_dora_read: bool = True
    is_scale_outside: bool = False
    is_vector_read: bool = False
    unread: Mapping[str, str] = field(default_factory=dict)

    def drawn(self, module: Module, weight: Tensor) -> Tensor | None:
        """The weight that the tool draws with at strength 1, or None for a layer that it cannot compute.

        Args:
            module: as a file has it.
            weight: W, (out, in[, kh, kw]), fp32 or fp64.
        """
        module = module.to(dtype=weight.dtype)
        is_pair = isinstance(module, ModuleState) and module.mid is None
        if not is_pair and module.magnitude is not None and not self.is_factored_dora_read:
            return None
        if isinstance(module, FactoredState) and module.algorithm == "full" and not self.is_whole_read:
            return None
        term = term_of(module)
        if self.is_scale_outside and module.magnitude is not None and module.scale:
            term = replace(term, delta=term.delta / module.scale, strength=module.scale)
        try:
            return MODES[self.mode](weight, [term])
        except ValueError:  # magnitudes of an axis that it does not know
            return None

    def is_unread(self, family: str, path: str) -> bool:
        """Whether it leaves a layer out that its files may hold."""
        pattern = self.unread.get(family)
        return pattern is not None and re.match(pattern, path) is not None


def _each(format: str, *families: str) -> dict[str, str]:
    return dict.fromkeys(families, format)


_STABLE_DIFFUSION = ("sd1", "sd2", "sdxl")
_TRANSFORMERS = ("sd3", "auraflow", "flux", "flux2", "flux2-klein", "qwen-image", "lumina2", "z-image")

COMFYUI = Tool(
    name="comfyui",
    title="ComfyUI (since April 2025)",
    formats={
        **_each("kohya", *_STABLE_DIFFUSION),
        **_each("comfyui", *_TRANSFORMERS, "pixart-alpha", "pixart-sigma", "hunyuan-dit"),
    },
    mode="comfyui",
    is_over_base_norms=True,
    is_vector_read=True,
)
FORGE = Tool(
    name="forge",
    title="Forge (since May 2025)",
    formats=_each("kohya", *_STABLE_DIFFUSION, "sd3", "flux"),
    mode="comfyui",
    is_over_base_norms=True,
    is_vector_read=True,
)
A1111 = Tool(
    name="a1111",
    title="AUTOMATIC1111 (since 1.10)",
    formats=_each("kohya", *_STABLE_DIFFUSION),
    mode="a1111",
)
INVOKEAI = Tool(
    name="invokeai",
    title="InvokeAI (6)",
    formats=_each("kohya", *_STABLE_DIFFUSION, "flux"),
    mode="a1111",
    is_factored_dora_read=False,
    # it takes kohya's files of FLUX.1 by their blocks, and knows the T5 by another prefix
    unread={"flux": r"transformer\.(?!(single_)?transformer_blocks\.)|text_encoder_2\."},
)
SDNEXT = Tool(
    name="sdnext",
    title="SD.Next (2026)",
    formats={
        **_each("kohya", *_STABLE_DIFFUSION),
        **_each("lycoris", "sd3", "flux", "flux2", "flux2-klein", "z-image"),
    },
    mode="a1111",
    is_scale_outside=True,
)
DIFFUSERS = Tool(
    name="diffusers",
    title="diffusers (0.42)",
    formats=_each("diffusers", *_STABLE_DIFFUSION, *_TRANSFORMERS, "sana"),
    mode="peft",
    is_whole_read=False,
)

TOOLS: Mapping[str, Tool] = {tool.name: tool for tool in (COMFYUI, FORGE, A1111, INVOKEAI, SDNEXT, DIFFUSERS)}


def tool_named(name: str) -> Tool:
    """The tool of a name; a ValueError that lists them."""
    if name not in TOOLS:
        raise ValueError(f"{name!r} is no tool that is known here: expected one of {', '.join(TOOLS)}")
    return TOOLS[name]
