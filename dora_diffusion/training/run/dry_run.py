"""`train --dry-run`: what a config would do and need, without doing it."""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dora_diffusion.training.config import DataConfig, TrainConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dora_diffusion.pipelines.textual_inversion import Words
    from dora_diffusion.state import AdapterState
    from dora_diffusion.training.base.memory import Device, MemoryEstimate
    from dora_diffusion.training.base.trainable import TrainablePipeline
    from dora_diffusion.training.data.concepts import Split
    from dora_diffusion.training.data.examples import Example


_SIZES_NAMED = 5


def describe_plan(
    config: TrainConfig, *, memory: float | None = None, skeleton: "Callable[[torch.dtype], Any] | None" = None
) -> str:
    """The plan of a run in a few lines; raises what the run itself would about folder, data, base and targets.

    The base's weights are not read, nor is anything drawn or trained.

    Args:
        config: of the run.
        memory: GiB of a card for which settings are sought that fit; None takes those of the config.
        skeleton: dtype -> a base without weights to plan with, where the config's own is not at hand.
    """
    from dora_diffusion.training.base.devices import device_for, with_precision
    from dora_diffusion.training.base.memory import estimate_memory
    from dora_diffusion.training.run.fitting import fitted, fitting_lines, usable

    config = with_precision(config, where := device_for(config.device))
    *lines, output = (plan := _plan(config, skeleton)).lines
    device: Device = "cpu" if where.type == "cpu" and memory is None else "cuda"  # other GPUs take what it takes
    if memory is None:
        found = estimate_memory(plan.trainable, config, device=device)
        return "\n".join([*lines, *memory_lines(found, f"on {where.type}"), output])

    def estimate(other: TrainConfig) -> "MemoryEstimate":
        return estimate_memory(_planned(other, skeleton), other, device="cuda")

    tried = fitted(config, usable(memory), estimate)
    return "\n".join([*lines, *fitting_lines(tried, memory), *memory_lines(tried[-1].estimate, "on cuda"), output])


def _planned(config: TrainConfig, skeleton: "Callable[[torch.dtype], Any] | None") -> "TrainablePipeline":
    """A base without weights, with what is trained in it."""
    from dora_diffusion.training.base.below import plan_below
    from dora_diffusion.training.base.meta import load_skeleton
    from dora_diffusion.training.base.trainable import PRECISIONS, prepare_trainable

    dtype = PRECISIONS[config.optim.mixed_precision]
    pipe = load_skeleton(config.model, dtype=dtype) if skeleton is None else skeleton(dtype)
    below = plan_below(pipe, config.base.adapters)
    return replace(prepare_trainable(pipe, config, from_start=False), below=below)


def check_plan(config: TrainConfig) -> None:
    """Raise what `describe_plan` would, without the estimate of memory, which takes a while for a large model."""
    _plan(config, None)


@dataclass(frozen=True)
class _Plan:
    """A base without weights, with what is trained in it, and what is said of it; the output last."""

    trainable: "TrainablePipeline"
    lines: list[str]


def _plan(config: TrainConfig, skeleton: "Callable[[torch.dtype], Any] | None") -> _Plan:
    from dora_diffusion.pipelines.quantise import check_library
    from dora_diffusion.training.base.devices import device_for, with_precision
    from dora_diffusion.training.base.sizes import sizes_of
    from dora_diffusion.training.base.start import plan_start
    from dora_diffusion.training.base.trainable import trainable_count
    from dora_diffusion.training.data.buckets import in_buckets
    from dora_diffusion.training.data.concepts import checked_examples
    from dora_diffusion.training.data.examples import check_words
    from dora_diffusion.training.run.card import base_lines
    from dora_diffusion.training.run.exports import check_exports
    from dora_diffusion.training.run.folder import check_writable
    from dora_diffusion.training.run.metadata import adapter_metadata, tool_metadata
    from dora_diffusion.training.run.previews import check_previews
    from dora_diffusion.training.run.trackers import check_trackers
    from dora_diffusion.training.step.objective import objective_of
    from dora_diffusion.training.step.optimisers import check_optimizer, parameter_groups

    config = with_precision(config, device_for(config.device))
    check_writable(config.output_dir)
    check_library(config.base.quantise, key="base.quantise")
    check_optimizer(config.optim)
    check_trackers(config.logging)
    split = checked_examples(config.data, seed=config.optim.seed)
    examples = split.train
    check_words(config.words.starts, examples)
    trainable = _planned(config, skeleton)
    check_previews(trainable.pipe, config.preview)
    started = plan_start(trainable.injections, config.adapter, trainable.family.name)
    # raises for a scheduler that cannot be trained
    objective_of(trainable.pipe, config.optim, config.flow, config.loss, tokens=1)
    parameter_groups(trainable, config.optim, config.words)  # raises for a pattern that names no layer
    sized = in_buckets(examples, config.data, sizes_of(trainable.pipe))
    check_exports(config, trainable)
    optim = config.optim
    seen = optim.steps * optim.batch_size * optim.gradient_accumulation
    own = adapter_metadata(config, trainable.family, step=optim.steps)
    file = file_bytes(trainable.adapter(tool_metadata(config, trainable.pipe, split, step=optim.steps) | own))
    lines = [
        f"base       {config.model} ({trainable.family.name})",
        *base_lines(trainable.pipe, config, trainable.below, started or ""),
        f"images     {_images(config.data, split)}, each seen about {seen / _samples(examples):.0f} times",
        f"sizes      {_sizes(sized)}",
        *(f"adapter    {name}: {len(part.matched)} layers" for name, part in trainable.injections.items()),
        *([] if trainable.words is None else [f"words      {_words(trainable.words)}"]),
        f"trained    {trainable_count(trainable.parameters()):,} numbers",
        *([f"file       {file / 1e6:.1f} MB"] if trainable.injections else []),
        *([f"exports    {', '.join(config.export)}"] if config.export else []),
        f"steps      {optim.steps} of {optim.batch_size} x {optim.gradient_accumulation}, seed {optim.seed}",
        f"prior      {_prior(config, split)}",
        f"output     {config.output_dir}",
    ]
    return _Plan(trainable, lines)


def _images(data: DataConfig, split: "Split") -> str:
    folders = [folder for folder in (data.instance_dir, *(concept.dir for concept in data.concepts)) if folder]
    where = str(folders[0]) if len(folders) == 1 else f"{len(folders)} folders, {folders[0]} first"
    repeats = "" if _samples(split.train) == len(split.train) else f", {_samples(split.train)} with repeats"
    measured = f", {len(split.validation)} measured" if split.validation else ""
    kept = f", {len(split.classes)} of the class" if split.classes else ""
    return f"{len(split.train)} in {where}{repeats}{measured}{kept}"


def _sizes(sized: Sequence["Example"]) -> str:
    """How many pictures are trained at which size, and how much of them is cut off."""
    from dora_diffusion.training.data.buckets import kept_share

    counts = Counter(example.size for example in sized).most_common()
    named = ", ".join(f"{count} of {width}x{height}" for (width, height), count in counts[:_SIZES_NAMED])
    more = f" and {len(counts) - _SIZES_NAMED} sizes more" if len(counts) > _SIZES_NAMED else ""
    lost = [1 - float(kept_share(example.original, example.size)) for example in sized]
    mean, most = 100 * sum(lost) / len(lost), 100 * max(lost)
    return f"{named}{more}; {mean:.1f} % of a picture is cut off, at most {most:.1f} %"


def _prior(config: TrainConfig, split: "Split") -> str:
    """What is kept of the base, and how many class pictures it takes; reads those of a folder."""
    from dora_diffusion.training.data.concepts import opened
    from dora_diffusion.training.step.priors import folder_examples

    prior, prompts = config.prior, ", ".join(config.prior.prompts)
    if prior.mode == "generated":
        drawn = [f"{prompts}: {prior.drawn_images} class pictures, drawn by the base where missing"] if prompts else []
        given = [f"{len(split.classes)} class pictures of data.concepts"] if split.classes else []
        return "; ".join([*drawn, *given]) or "none"
    count = len(opened(folder_examples(prior, seed=config.optim.seed))) + len(split.classes)
    if prior.mode == "folder":
        return f"{count} class pictures, {prior.class_dir} as it is"
    asked = {"class": prompts or "their own captions", "blank": "an empty caption", "instance": "their own captions"}
    pictures = f"{count} class pictures" if count else "the same pictures"
    said = "their own captions" if count and prior.asked_with == "class" else asked[prior.asked_with]
    return f"what the base itself predicts of {pictures}, asked with {said}"


def _samples(examples: Sequence["Example"]) -> int:
    """How many samples an epoch has."""
    return sum(example.repeats for example in examples)


def _words(words: "Words") -> str:
    widths = ", ".join(f"{name} {tuple(vectors.shape)}" for name, vectors in words.named_parameters().items())
    return f"{', '.join(words.names)}: {widths}"


def memory_lines(memory: "MemoryEstimate", where: str) -> list[str]:
    """An estimate as a small table under the word `memory`; `where` says what it holds for."""
    divisor, unit = (2**30, "GiB") if memory.total >= 2**30 else (2**20, "MiB")
    parts, resting = (
        ", ".join(f"{name} {size / divisor:.2f}" for name, size in some.items())
        for some in (memory.present, memory.resting)
    )
    rows = {
        "weights": (
            sum(memory.present.values()),
            parts + (f"; in main memory meanwhile: {resting}" if resting else ""),
        ),
        "adapter": (memory.adapters, ""),
        "gradients": (memory.gradients, ""),
        "optimiser": (memory.optimiser, ""),
        "activations": (memory.activations, f"{memory.worst_moment} at {memory.side} px"),
        "in all": (memory.total, f"{where}; the process itself and the allocator's gaps come on top"),
    }
    lines = [f"{name:<11} {size / divisor:8.2f} {unit}  {note}".rstrip() for name, (size, note) in rows.items()]
    return [("memory     " if index == 0 else " " * 11) + line for index, line in enumerate(lines)]


def file_bytes(adapter: "AdapterState") -> int:
    """The size of an adapter's file, whether its tensors have numbers or only shapes."""
    from dora_diffusion.formats import FORMATS
    from dora_diffusion.formats.writing import write

    tensors, metadata = write(adapter, FORMATS["diffusers"])
    return _header_bytes(tensors, metadata) + sum(tensor.nbytes for tensor in tensors.values())


def _header_bytes(tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str]) -> int:
    """A safetensors file's beginning: the length of a JSON text in eight bytes, and the text, filled up to eights."""
    header: dict[str, object] = {"__metadata__": metadata}
    start = 0
    for key, tensor in sorted(tensors.items()):  # as the library orders those of one dtype
        header[key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, start + tensor.nbytes]}
        start += tensor.nbytes
    return 8 + 8 * math.ceil(len(json.dumps(header, separators=(",", ":"), ensure_ascii=False)) / 8)
