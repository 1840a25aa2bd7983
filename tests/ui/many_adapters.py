"""A folder of thousands of adapters: hard links of some dozens that differ in kind, family, format and metadata."""

import json
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save

from dora_diffusion.formats import FORMATS
from dora_diffusion.formats.writing import write
from dora_diffusion.state import AdapterState, FactoredState, Module, ModuleState

STYLES = ("watercolour", "ink", "lego", "pixel", "clay", "neon", "oil", "paper")
TAGS = ("landscape", "portrait", "cat", "castle", "night", "flower", "city")
BASES = {"sd1": "sd_v1", "sdxl": "sdxl_base_v1-0", "flux": "flux1"}
KINDS = (("LoRA", "kohya"), ("DoRA", "diffusers"), ("DoRA", "kohya"), ("LoHa", "lycoris"), ("LoRA", "ai-toolkit"))


def _attention(block: str, width: int, context: int) -> Iterator[tuple[str, int, int]]:
    for layer in ("to_q", "to_k", "to_v", "to_out.0"):
        yield f"{block}.attn1.{layer}", width, width
        yield f"{block}.attn2.{layer}", width, context if layer in ("to_k", "to_v") else width


def _unet(stacks: dict[str, tuple[int, int, int]], context: int) -> Iterator[tuple[str, int, int]]:
    """Stack -> its width, how many attentions there are, and blocks in each."""
    for stack, (width, attentions, depth) in stacks.items():
        for attention in range(attentions):
            for block in range(depth):
                at = f"unet.{stack}.attentions.{attention}.transformer_blocks.{block}"
                yield from _attention(at, width, context)


@cache
def layers_of(family: str) -> tuple[tuple[str, int, int], ...]:
    """(path, out, in) of the layers that people train, as in the published models."""
    if family == "flux":
        double = [f"transformer_blocks.{n}.attn.{name}" for n in range(19) for name in ("to_q", "to_k", "to_v")]
        single = [f"single_transformer_blocks.{n}.attn.{name}" for n in range(38) for name in ("to_q", "to_k", "to_v")]
        return tuple((f"transformer.{path}", 3072, 3072) for path in (*double, *single))
    if family == "sdxl":
        stacks = {"down_blocks.1": (640, 2, 2), "down_blocks.2": (1280, 2, 10), "mid_block": (1280, 1, 10)}
        return tuple(_unet({**stacks, "up_blocks.0": (1280, 3, 10), "up_blocks.1": (640, 3, 2)}, 2048))
    down = {f"down_blocks.{level}": (width, 2, 1) for level, width in enumerate((320, 640, 1280))}
    up = {f"up_blocks.{level}": (width, 3, 1) for level, width in ((1, 1280), (2, 640), (3, 320))}
    return tuple(_unet({**down, "mid_block": (1280, 1, 1), **up}, 768))


def _module(kind: str, out: int, inputs: int) -> Module:
    down, up = torch.ones(1, inputs, dtype=torch.float16), torch.ones(out, 1, dtype=torch.float16)
    if kind == "LoHa":
        return FactoredState("loha", {"hada_w1_a": up, "hada_w1_b": down, "hada_w2_a": up, "hada_w2_b": down}, 1.0, 1.0)
    return ModuleState(down, up, 1.0, torch.ones(out, dtype=torch.float16) if kind == "DoRA" else None)


def _content(number: int) -> bytes:
    """A file's bytes; its number decides everything."""
    family, (kind, format) = list(BASES)[number % 3], KINDS[number // 3 % len(KINDS)]
    if (family, format) == ("flux", "kohya"):  # which fuses q, k and v with layers that are not adapted here
        format = "lycoris"
    style, tag = STYLES[number % len(STYLES)], TAGS[number // 3 % len(TAGS)]
    metadata = {
        "modelspec.title": f"{style.title()} {tag} {number}",
        "modelspec.trigger_phrase": f"{style}style, {tag} v{number}",
        "ss_tag_frequency": json.dumps({f"10_{style}": {tag: 40 + number, "outdoors": 12, "simple background": 3}}),
        "ss_base_model_version": BASES[family],
    }
    adapter = AdapterState({path: _module(kind, out, inputs) for path, out, inputs in layers_of(family)}, metadata)
    tensors, metadata = write(adapter, FORMATS[format])
    return save({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, metadata)


def fill(folder: Path, count: int, *, distinct: int = 60) -> None:
    """Write `count` adapters into subfolders of `folder`, `distinct` of them with content of their own."""
    first: list[Path] = []
    for number in range(count):
        style, tag = STYLES[number % len(STYLES)], TAGS[number % len(TAGS)]
        path = folder / style / f"{style} {tag} {number:05}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number < distinct:
            path.write_bytes(_content(number))
            first.append(path)
        else:
            os.link(first[number % distinct], path)
