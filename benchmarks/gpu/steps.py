"""Section 3: time and peak memory of a training step, ours beside PEFT's, in the ways that cards of all sizes need.

Forward, backward and AdamW of one picture under bf16's autocast, adapters in fp32. The four adapters stand on the same
base in one process and take turns; compiled ones come one after another, for each is compiled anew.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.models import Model, inputs, models, pipeline
from benchmarks.gpu.setting import NOT_ON_CPU, NotAvailable, Row, Rows, Setting, row_of
from benchmarks.peers.memory import peak_of
from benchmarks.peers.timing import compare, once
from benchmarks.peers.variants import Variant, build, check_agreement, put
from dora_diffusion.families import family_of_pipeline
from dora_diffusion.layers.targets import target_paths
from dora_diffusion.pipelines.quantise import check_library, quantise_pipeline

NAMES = ("PEFT LoRA", "PEFT DoRA", "our LoRA", "our DoRA")
REFERENCE = "PEFT LoRA"
NF4 = "+ nf4"
_STEPS_A_TURN = 2
_ENOUGH = 12.0  # seconds after which no further round of a way begins
_TOO_LITTLE = 15.0  # seconds for which no way begins
_BYTES_OF_ADAMW = 12  # a parameter and two moments, fp32


@dataclass
class Stage:
    """A base with the four adapters beside it, one of which stands in it.

    Attributes:
        denoiser: the base.
        bases: its layers that are adapted, by path.
        variants: the adapters.
        forward: a forward pass.
        device: of it.
        differs: in what the adapters do not compute the same; None where they do.
    """

    denoiser: Any
    bases: Mapping[str, nn.Module]
    variants: Mapping[str, Variant]
    forward: Callable[[], torch.Tensor]
    device: str
    differs: str | None = None

    def steps(self) -> dict[str, Callable[[], None]]:
        """A training step of each."""
        return {name: self._step(variant) for name, variant in self.variants.items()}

    def _step(self, variant: Variant) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(variant.parameters, lr=1e-6)

        def step() -> None:
            variant.refresh()
            with torch.autocast(self.device, torch.bfloat16):
                out = self.forward()
            out.float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        return step


@dataclass(frozen=True)
class Group:
    """Ways in which one stage is measured, one after another."""

    model: Model
    ways: Sequence[str]


def rows(setting: Setting) -> Rows:
    """Each model in each way; ways for which no time is left are said to be left out."""
    for group in _groups(models(is_tiny=setting.is_tiny), is_tiny=setting.is_tiny):
        # made for the first way that there is time for
        stage = cache(lambda group=group: _stage(group.model, setting.device, is_nf4=NF4 in group.ways))
        for name in group.ways:
            facts = {"name": group.model.name, "way": name}
            yield row_of(facts, lambda stage=stage, name=name: _one(stage, name, setting))
        del stage
        gc.collect()
        if setting.device == "cuda":
            torch.cuda.empty_cache()


def _groups(every: Sequence[Model], *, is_tiny: bool) -> list[Group]:
    """What takes longest comes last: compiling, and SDXL's UNet after FLUX.1's few blocks."""
    plain = [Group(model, ("bf16", "+ checkpointing", "+ block swap")) for model in every]
    compiled = [Group(model, ("+ compile",)) for model in every[::-1]]
    return [*plain, *(Group(model, (NF4,)) for model in every), *(compiled[:1] if is_tiny else compiled)]


def _one(make: Callable[[], Stage], name: str, setting: Setting) -> Row:
    if setting.left < _TOO_LITTLE and not setting.is_tiny:
        raise NotAvailable(f"no time was left, {setting.left:.0f} s")
    stage = make()
    with _WAYS[name](stage):
        put(stage.denoiser, stage.bases)
        steps = stage.steps()
        if name == "+ compile":
            return _in_order(stage, steps, setting)
        facts = {"adapters": _in_turns(stage, steps, setting), **_peaks(stage, steps, setting)}
        return facts if stage.differs is None else {**facts, "differs": stage.differs}


def _stage(model: Model, device: str, *, is_nf4: bool) -> Stage:
    if is_nf4:
        _need_nf4()
    pipe = pipeline(model, device)
    family = family_of_pipeline(pipe)
    denoiser = getattr(pipe, family.denoiser.name)
    if is_nf4:  # quantised on its way to the device
        denoiser.to("cpu")
        quantise_pipeline(pipe, "nf4")
        denoiser.to(device)
        denoiser.is_loaded_in_4bit = True  # by which PEFT knows it
    denoiser.train()
    made = inputs(pipe, model, device)
    paths = target_paths(denoiser, "attention")
    bases = {path: denoiser.get_submodule(path) for path in paths}
    variants = build(denoiser, list(paths), list(NAMES))
    for variant in variants.values():
        for parameter in variant.parameters:
            parameter.data = parameter.data.float()  # as every trainer holds them
    timestep = torch.full((1,), 500.0, device=device)
    noisy = made.latents.to(torch.bfloat16)

    def forward() -> torch.Tensor:
        return family.predict(denoiser, noisy, timestep, made.conditioning, made.frames)

    stage = Stage(denoiser, bases, variants, forward, device)
    stage.differs = _difference(stage)
    return stage


def _difference(stage: Stage) -> str | None:
    """Whether the DoRAs, and the LoRAs, compute the same, as far as bf16 tells."""
    try:
        with torch.autocast(stage.device, torch.bfloat16):
            check_agreement(lambda: stage.forward().to(torch.bfloat16), stage.denoiser, stage.variants)
    except AssertionError as differs:
        return str(differs)
    return None


def _need_nf4() -> None:
    try:
        check_library("nf4")
    except ValueError as missing:
        raise NotAvailable(str(missing)) from None


def _in_turns(stage: Stage, steps: Mapping[str, Callable[[], None]], setting: Setting) -> Row:
    """Seconds of each adapter's step, and their ratios to PEFT's LoRA in the same round."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    names, began = list(steps), time.monotonic()
    for number in range(setting.rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            put(stage.denoiser, stage.variants[name].layers)
            steps[name]()  # after a change of layers
            times = [once(steps[name], stage.device) for _ in range(1 if setting.is_tiny else _STEPS_A_TURN)]
            taken[name].append(statistics.mean(times))
        if time.monotonic() - began > _ENOUGH:
            break
    found = compare(taken, REFERENCE)
    return {
        name: {"seconds": one.seconds, "over_peft": one.ratio, "low": one.low, "high": one.high, "rounds": one.rounds}
        for name, one in found.items()
    }


def _in_order(stage: Stage, steps: Mapping[str, Callable[[], None]], setting: Setting) -> Row:
    """As `_in_turns`, one adapter after another: seconds to the first step's end, of later ones; recompiles."""
    found: dict[str, Any] = {}
    order = ("our DoRA", REFERENCE, "our LoRA", "PEFT DoRA")  # what matters most first
    for name in order[:2] if setting.is_tiny else order:
        if setting.left < _TOO_LITTLE and not setting.is_tiny:
            found[name] = {"left_out": "no time was left"}
            continue
        put(stage.denoiser, stage.variants[name].layers)
        found[name] = row_of({}, lambda name=name: _compiled(steps[name], stage, setting))
    base = found[REFERENCE].get("seconds")
    for one in found.values():
        if base and "seconds" in one:
            one["over_peft"] = one["seconds"] / base
    return {"adapters": {name: found[name] for name in NAMES if name in found}, "held": None, "peaks": {}}


def _compiled(step: Callable[[], None], stage: Stage, setting: Setting) -> Row:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    first = once(step, stage.device)
    step()
    graphs = graphs_compiled()
    times = [once(step, stage.device) for _ in range(2 if setting.is_tiny else 4 * _STEPS_A_TURN)]
    return {
        "first": first,
        "seconds": statistics.median(times),
        "graphs": graphs,
        "recompiled": graphs_compiled() - graphs,
        "peak": NOT_ON_CPU if stage.device == "cpu" else peak_of(step, stage.device),
    }


def graphs_compiled() -> int:
    """How many graphs dynamo has compiled since its counters were cleared."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _peaks(stage: Stage, steps: Mapping[str, Callable[[], None]], setting: Setting) -> Row:
    """Bytes that each adapter's training holds at its peak, the base with it and the other three without."""
    if setting.device == "cpu":
        return {"held": NOT_ON_CPU, "peaks": dict.fromkeys(steps, NOT_ON_CPU)}
    own = {name: _numbers(variant.parameters) * _BYTES_OF_ADAMW for name, variant in stage.variants.items()}
    peaks = {}
    for name, step in steps.items():
        put(stage.denoiser, stage.variants[name].layers)
        step()
        others = sum(own.values()) - own[name]
        peaks[name] = torch.cuda.memory_allocated() - others + peak_of(step, stage.device)
    return {"held": torch.cuda.memory_allocated() - sum(own.values()), "peaks": peaks}


def _numbers(parameters: Sequence[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


@contextmanager
def _plain(stage: Stage) -> Iterator[None]:
    yield


@contextmanager
def _checkpointing(stage: Stage) -> Iterator[None]:
    stage.denoiser.enable_gradient_checkpointing()
    try:
        yield
    finally:
        stage.denoiser.disable_gradient_checkpointing()


@contextmanager
def _swap(stage: Stage) -> Iterator[None]:
    """Half of the blocks in main memory, with checkpointing, as whoever lacks memory has it."""
    blocks, swap = _part("blocks"), _part("swap")
    put(stage.denoiser, stage.bases)
    count = max(1, len(blocks.repeated_blocks(stage.denoiser)) // 2)
    swapped = swap.BlockSwap(stage.denoiser, count, torch.device(stage.device))
    try:
        with _checkpointing(stage):
            yield
    finally:
        put(stage.denoiser, stage.bases)
        swapped.remove()


@contextmanager
def _compile(stage: Stage) -> Iterator[None]:
    """Block by block; without a compiler, on a CPU, only traced."""
    blocks = _part("blocks")
    options = {"backend": "eager"} if stage.device == "cpu" else {}
    blocks.compile_blocks(stage.denoiser, **options)
    try:
        yield
    finally:
        blocks.release_blocks(stage.denoiser)
        torch._dynamo.reset()


_WAYS: Mapping[str, Callable[[Stage], AbstractContextManager[None]]] = {
    "bf16": _plain,
    "+ checkpointing": _checkpointing,
    "+ block swap": _swap,
    NF4: _plain,
    "+ compile": _compile,
}


def _part(name: str) -> Any:
    """A module of training.base that this version may not have yet."""
    try:
        return import_module(f"dora_diffusion.training.base.{name}")
    except ModuleNotFoundError:
        raise NotAvailable(f"this version has no dora_diffusion.training.base.{name}") from None
