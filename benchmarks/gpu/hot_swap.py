"""Section 4: adapters come, go and change under a compiled model, and nothing is compiled anew."""

import statistics
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.setting import Row, Rows, Setting, row_of
from benchmarks.gpu.steps import graphs_compiled
from benchmarks.peers.timing import once
from dora_diffusion.adapters.manager import AdapterManager
from dora_diffusion.pipelines.loading import load_pipeline
from dora_diffusion.state import AdapterState
from tests.pocket_random import random_adapter

STRENGTHS = ({"a": 0.8}, {"b": -0.5}, {"a": 0.4, "b": 0.6})


def rows(setting: Setting) -> Rows:
    """The pocket's UNet compiled whole."""
    yield row_of({"name": "pocket UNet, compiled whole"}, lambda: _swapped(setting))


def _swapped(setting: Setting) -> Row:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    pipe = load_pipeline("pocket", device=setting.device)
    pipe.set_progress_bar_config(disable=True)
    adapters = {name: random_adapter(load_pipeline("pocket"), seed) for seed, name in enumerate("ab")}
    manager = AdapterManager(pipe)
    manager.enable_hotswap(max_rank=8)
    pipe.unet = torch.compile(pipe.unet, backend="eager" if setting.device == "cpu" else "inductor", fullgraph=True)
    first = once(lambda: _drawn(pipe), setting.device)
    drawn, swaps, after = [], [], []
    graphs: int | None = None
    for weights in STRENGTHS * (1 if setting.is_tiny else 3):
        swaps.append(once(lambda weights=weights: _set(manager, adapters, weights), setting.device))
        began = time.perf_counter()
        drawn.append(_drawn(pipe))
        after.append(time.perf_counter() - began)
        graphs = graphs_compiled() if graphs is None else graphs
    recompiled = graphs_compiled() - (graphs or 0)
    torch._dynamo.reset()
    found = {
        "graphs": graphs,
        "recompiled": recompiled,
        "swaps": len(swaps),
        "first_draw": first,
        "swap": statistics.median(swaps),
        "draw": statistics.median(after),
    }
    different = len({tuple(latents.flatten().tolist()) for latents in drawn[: len(STRENGTHS)]})
    if different != len(STRENGTHS):
        raise AssertionError(f"{len(STRENGTHS)} mixes drew {different} different pictures")
    return found if not recompiled else {**found, "error": f"{recompiled} graphs were compiled anew"}


def _set(manager: AdapterManager, adapters: dict[str, AdapterState], weights: dict[str, float]) -> None:
    """Only these adapters, read anew."""
    for name in list(manager.loaded):
        manager.delete_adapter(name)
    for name in weights:
        manager.load_adapter(adapters[name], name=name)
    manager.set_adapters(dict(weights))


def _drawn(pipe: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    latents = pipe("a cat", num_inference_steps=2, generator=generator, output_type="latent").images
    return latents.float().cpu()
