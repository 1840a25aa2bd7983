"""Adapters of full size through every format and conversion: `python -m benchmarks.interchange` writes interchange.md.

First it prints which layouts of which families are read and written, and why that is believed; `--table`: that alone.

The layers are those of Stable Diffusion XL, UNet and both text encoders, with random values; no weights are needed.
The base's are views into one buffer, so that what is measured is the work and not a model's place in memory. Peaks are
those of the process's resident memory, beyond what it held before.
"""

import argparse
import ctypes
import gc
import json
import logging
import os
import platform
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import dora_diffusion as dd
from benchmarks.full_size.models import pipeline_of
from benchmarks.full_size.published import PUBLISHED
from benchmarks.layouts_by_family import tables
from dora_diffusion.conversion import Extraction, resize, to_dora, to_lora
from dora_diffusion.formats import FORMATS
from dora_diffusion.functional.dora import initial_magnitude
from dora_diffusion.layers.base_layers import logical_shape
from dora_diffusion.layers.targets import target_paths
from dora_diffusion.state import AdapterState, ModuleState
from dora_diffusion.utils.atomic import write_atomically

Shapes = Mapping[str, tuple[int, ...]]
Steps = Callable[[int, int, str], None]
PARTS = ("unet", "text_encoder", "text_encoder_2")
PRESETS = ("attention", "all")
STATUS = Path("/proc/self/status")
_MIB = 2**20
_NAMES = ("first", "second")


@dataclass(frozen=True)
class Cost:
    """What a piece of work took.

    Attributes:
        seconds: wall clock.
        peak: bytes of resident memory beyond what was held before; None where the system does not tell.
        size: bytes of the file that was written or read; None where there is none.
        note: what it was, or why it could not be done.
    """

    seconds: float
    peak: int | None
    size: int | None = None
    note: str = ""


def main() -> int:
    """Measure the presets asked for; others that were measured before stay in the file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.interchange", description=__doc__)
    parser.add_argument("--presets", default=",".join(PRESETS), help="of the UNet and the text encoders")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--quick", action="store_true", help="a sixteenth of every side: does it run, not how fast")
    parser.add_argument("--output", type=Path, help="docs/results; with --quick a new temporary folder")
    parser.add_argument("--table", action="store_true", help="print layouts by families, and measure nothing")
    arguments = parser.parse_args()
    print(tables(), flush=True)
    if arguments.table:
        return 0
    wanted = arguments.presets.split(",")
    if unknown := [preset for preset in wanted if preset not in PRESETS]:
        parser.error(f"--presets {unknown[0]}: expected some of {','.join(PRESETS)}")
    output = arguments.output or Path(tempfile.mkdtemp() if arguments.quick else "docs/results")
    logging.disable(logging.WARNING)  # what other libraries say at import
    file, report = output / "interchange.json", output / "interchange.md"
    results = json.loads(file.read_text()) if file.is_file() else {}
    if results and results["machine"]["quick"] != arguments.quick:
        parser.error(f"{file}: figures of tiny and of full shapes do not mix; name another --output")
    for preset in wanted:
        shapes = shapes_of(preset, divisor=16 if arguments.quick else 1)
        results[preset] = measure(shapes, arguments.rank, preset)
        results["machine"] = {**machine(), "rank": arguments.rank, "quick": arguments.quick}
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(file, (json.dumps(results, indent=1) + "\n").encode())
    write_atomically(report, report_of(results).encode())
    print(f"wrote {report}")
    return 0


def shapes_of(preset: str, *, divisor: int = 1) -> Shapes:
    """Path -> shape of every layer that a preset adapts; sides divided, kernels not."""
    pipe = pipeline_of(next(model for model in PUBLISHED if model.family == "sdxl"))
    shapes = {}
    for part in PARTS:
        model = getattr(pipe, part)
        for path in target_paths(model, preset):
            out, columns, *kernel = logical_shape(model.get_submodule(path))
            sides = (max(4, out // divisor), max(4, columns // divisor))
            shapes[f"{part}.{path.removeprefix('text_model.')}"] = (*sides, *kernel)
    return shapes


class Base:
    """Weights by path, bf16: views into one random buffer, each with its own start."""

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = shapes
        largest = max(torch.Size(shape).numel() for shape in shapes.values())
        noise = torch.randn(largest + len(shapes), generator=torch.Generator().manual_seed(0))
        self._buffer = (0.03 * noise).bfloat16()
        self._starts = {path: start for start, path in enumerate(shapes)}

    def __call__(self, path: str) -> Tensor:
        """The weight of a layer."""
        shape, start = self._shapes[path], self._starts[path]
        return self._buffer[start : start + torch.Size(shape).numel()].view(shape)

    def tuned(self, path: str) -> Tensor:
        """The same, fine-tuned in every direction: each number changed by about a tenth, fp32."""
        weight = self(path).float()
        return torch.addcmul(weight, weight.flatten().flip(0).view(weight.shape), torch.tensor(2.0))


def adapter_of(shapes: Shapes, rank: int, base: Base, *, seed: int, use_dora: bool = True) -> AdapterState:
    """A random adapter in fp16, magnitudes near the norms of the base."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for path, (out, *rest) in shapes.items():
        r = min(rank, out, torch.Size(rest).numel())
        down = (torch.randn(r, *rest, generator=generator) / r**0.5).half()
        up = (0.01 * torch.randn(out, r, *[1] * (len(rest) - 1), generator=generator)).half()
        magnitude = initial_magnitude(base(path)) * (1 + 0.02 * torch.randn(out, generator=generator))
        modules[path] = ModuleState(down, up, float(r), magnitude if use_dora else None)
    return AdapterState(modules)


def measure(shapes: Shapes, rank: int, preset: str) -> dict[str, Any]:
    """Every piece of work on one adapter."""
    base = Base(shapes)
    adapter = adapter_of(shapes, rank, base, seed=1)
    with tempfile.TemporaryDirectory() as folder:
        files = _through_files(adapter, Path(folder), preset)
        loading = _load_elsewhere(Path(folder))
    work = _conversions(adapter, shapes, rank, base, preset)
    plain = [adapter_of(shapes, rank, base, seed=seed, use_dora=False) for seed in (2, 3)]
    beside = {**loading, **_two_loras(plain, rank, base), **_extract_elsewhere(shapes, rank, base)}
    named = [{name: asdict(cost) for name, cost in part.items()} for part in (files, work, beside)]
    numbers = sum(tensor.numel() for module in adapter.modules.values() for tensor in module.tensors.values())
    return {"layers": len(shapes), "numbers": numbers, **dict(zip(("files", "work", "beside"), named, strict=True))}


def _through_files(adapter: AdapterState, folder: Path, preset: str) -> dict[str, Cost]:
    """Write and read the adapter in every format that can hold it."""
    costs = {}
    for name in tqdm(FORMATS, desc=f"{preset}, formats"):
        path = folder / (name if name == "peft" else f"{name}.safetensors")
        try:
            written = cost_of(lambda name=name, path=path: dd.save_adapter(adapter, path, format=name))
        except ValueError as error:
            costs[f"{name}, write"] = Cost(0.0, None, note=str(error))
            continue
        size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
        costs[f"{name}, write"] = Cost(written.seconds, written.peak, size)
        found: list[AdapterState] = []
        read = cost_of(lambda path=path, found=found: found.append(dd.load_adapter(path)))
        assert found[0].modules.keys() == adapter.modules.keys(), name
        costs[f"{name}, read"] = Cost(read.seconds, read.peak, size)
    return costs


def _conversions(adapter: AdapterState, shapes: Shapes, rank: int, base: Base, preset: str) -> dict[str, Cost]:
    """What makes adapters out of adapters, and out of models."""
    other, lora = adapter_of(shapes, rank, base, seed=4), adapter_of(shapes, rank, base, seed=5, use_dora=False)
    two, weights = {"a": adapter, "b": other}, {"a": 0.7, "b": 0.5}
    everything = Extraction(target_modules=list(shapes))
    work: dict[str, Callable[[Steps], object]] = {
        "blend of two, compose, ranks added": lambda steps: dd.blend(
            two, weights, base=base, mode="compose", progress=steps
        ),
        f"blend of two, compose, rank {rank}": lambda steps: dd.blend(
            two, weights, base=base, mode="compose", rank=rank, progress=steps
        ),
        "resize to a quarter of the rank, without the base": lambda steps: resize(
            adapter, rank=max(1, rank // 4), progress=steps
        ),
        "resize to a quarter of the rank, with the base": lambda steps: resize(
            adapter, rank=max(1, rank // 4), base=base, progress=steps
        ),
        "LoRA to DoRA": lambda steps: to_dora(lora, base=base, progress=steps),
        f"DoRA to LoRA, rank {rank}": lambda steps: to_lora(adapter, base=base, rank=rank, progress=steps),
        f"extract a DoRA, rank {rank}": lambda steps: dd.extract(
            base.tuned, base, rank=rank, options=everything, progress=steps
        ),
    }
    return {name: _with_bar(f"{preset}, {name}", call) for name, call in work.items()}


def _with_bar(name: str, call: Callable[[Steps], object]) -> Cost:
    with tqdm(desc=name, mininterval=2) as bar:

        def step(done: int, total: int, path: str) -> None:
            bar.total = total
            bar.update()

        return cost_of(lambda: call(step))


def _load_elsewhere(folder: Path) -> dict[str, Cost]:
    """The same files read by the libraries they come from, as far as they do it without a model."""
    from diffusers.loaders import StableDiffusionXLLoraLoaderMixin
    from peft.utils import load_peft_weights

    def by_diffusers(name: str) -> Callable[[], object]:
        return lambda: StableDiffusionXLLoraLoaderMixin.lora_state_dict(str(folder), weight_name=f"{name}.safetensors")

    calls: dict[str, tuple[Callable[[], object], str]] = {
        "diffusers reads the diffusers file": (by_diffusers("diffusers"), "tensors by key; scales are not applied yet"),
        "diffusers reads the kohya file": (by_diffusers("kohya"), "drops every magnitude"),
    }
    for part in sorted((folder / "peft").rglob("adapter_config.json")):
        name = part.parent.name
        calls[f"PEFT reads the folder {name}"] = (
            lambda path=part.parent: load_peft_weights(str(path), device="cpu"),
            "tensors by key; the configuration is not read",
        )
    return {name: _attempted(call, note) for name, (call, note) in calls.items()}


def _attempted(call: Callable[[], object], note: str) -> Cost:
    """A cost, or why another library could not do it."""
    try:
        cost = cost_of(call)
    except Exception as error:  # theirs may be of any kind
        return Cost(0.0, None, note=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}")
    return Cost(cost.seconds, cost.peak, note=note)


def _two_loras(adapters: list[AdapterState], rank: int, base: Base) -> dict[str, Cost]:
    """Two plain LoRAs into one of the same rank. Without magnitudes: PEFT's `add_weighted_adapter` forgets them."""
    named, weights = dict(zip(_NAMES, adapters, strict=True)), dict(zip(_NAMES, (0.7, 0.5), strict=True))
    model = _in_peft(adapters, base)

    def theirs() -> None:
        model.add_weighted_adapter(
            list(weights), list(weights.values()), "blend", combination_type="svd", svd_rank=rank
        )

    what = f"two plain LoRAs into one of rank {rank}"
    return {
        what: _with_bar(
            what, lambda steps: dd.blend(named, weights, base=None, mode="additive", rank=rank, progress=steps)
        ),
        f"{what}, PEFT, combination_type='svd'": _attempted(theirs, "an SVD of a dense matrix for each layer"),
    }


def _in_peft(adapters: list[AdapterState], base: Base) -> Any:
    """Both adapters on a tree of layers with their names, which stands for the model."""
    from peft import LoraConfig, get_peft_model

    paths = list(adapters[0].modules)
    ranks = {path: module.rank for path, module in adapters[0].modules.items()}
    config = LoraConfig(r=max(ranks.values()), target_modules=paths, rank_pattern=ranks, init_lora_weights=False)
    model = get_peft_model(_tree(paths, base), config, adapter_name=_NAMES[0])
    model.add_adapter(_NAMES[1], config)
    for name, adapter in zip(_NAMES, adapters, strict=True):
        for path, module in adapter.modules.items():
            layer = model.base_model.model.get_submodule(path)
            layer.lora_A[name].weight.data = module.down.float()
            layer.lora_B[name].weight.data = module.up.float()
            layer.scaling[name] = module.scale
    return model.base_model


def _tree(paths: Sequence[str], base: Base) -> nn.Module:
    """Bare layers at the paths; their weights are the base's views."""
    root = nn.Module()
    for path in paths:
        parent = root
        *names, last = path.split(".")
        for name in names:
            if not hasattr(parent, name):
                parent.add_module(name, nn.Module())
            parent = parent.get_submodule(name)
        weight = base(path)
        with torch.device("meta"):
            out, columns, *kernel = weight.shape
            layer = nn.Conv2d(columns, out, kernel) if kernel else nn.Linear(columns, out)
        layer.weight, layer.bias = nn.Parameter(weight, requires_grad=False), None
        parent.add_module(last, layer)
    return root


def _extract_elsewhere(shapes: Shapes, rank: int, base: Base) -> dict[str, Cost]:
    """LyCORIS' plain LoRA out of two models: one layer of each shape is extracted, and its time counted for all."""
    from lycoris.utils import extract_conv, extract_linear

    paths = {shape: path for path, shape in shapes.items()}
    counts = Counter(shapes.values())

    def each(count: Mapping[tuple[int, ...], int]) -> float:
        total = 0.0
        for shape, path in tqdm(paths.items(), desc="LyCORIS, a layer of each shape"):
            change = base.tuned(path) - base(path).float()
            extract_one = extract_conv if len(shape) == 4 else extract_linear
            start = time.perf_counter()
            extract_one(change, mode="fixed", mode_param=rank)
            total += count[shape] * (time.perf_counter() - start)
        return total

    found: list[float] = []
    cost = _attempted(
        lambda: found.append(each(counts)), f"reckoned from {len(counts)} shapes; a full SVD for each layer"
    )
    name = f"extract a LoRA of rank {rank}, LyCORIS"
    return {name: Cost(found[0], cost.peak, note=cost.note) if found else cost}


def cost_of(call: Callable[[], object]) -> Cost:
    """Time a call and watch the process's resident memory."""
    gc.collect()
    before = _reset_peak()
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    peak = _status("VmHWM")
    return Cost(seconds, None if before is None or peak is None else max(0, peak - before))


def _reset_peak() -> int | None:
    """Give freed memory back and let Linux forget its peak; the resident bytes, None on other systems."""
    if not STATUS.is_file():
        return None
    ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # a container may forbid it
        return None
    return _status("VmRSS")


def _status(key: str) -> int | None:
    lines = STATUS.read_text().splitlines() if STATUS.is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), None)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    names = ("torch", "diffusers", "peft", "lycoris-lora")
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


_HEAD = """# Interchange: what files and conversions of full size cost

`python -m benchmarks.interchange`, or `make interchange`. Random values in the layers of Stable Diffusion XL: the UNet
and both text encoders, fp16 pairs of rank {rank} with fp32 magnitudes, a bf16 base. {processor}, {threads} of {cores}
cores; torch {torch}, diffusers {diffusers}, peft {peft}, lycoris-lora {lycoris-lora}. One run each: read differences of
a tenth as noise. The peak is resident memory beyond what the process held before, so a file that was read counts with
the tensors that it became.
"""


def report_of(results: Mapping[str, Any]) -> str:
    """The results as markdown."""
    sections = [_HEAD.format(**results["machine"])]
    for preset in (preset for preset in PRESETS if preset in results):
        found = results[preset]
        sections.append(
            f"## Preset `{preset}`: {found['layers']} layers, {found['numbers'] / 1e6:.1f} million numbers\n\n"
            + "\n\n".join(_table(found[part]) for part in ("files", "work", "beside"))
            + "\n"
        )
    return "\n".join(sections)


def _table(costs: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["| what | seconds | peak, MiB | file, MiB | |", "| --- | --- | --- | --- | --- |"]
    for name, cost in costs.items():
        seconds = "-" if cost["seconds"] == 0 else f"{cost['seconds']:.2f}"
        lines.append(f"| {name} | {seconds} | {_mib(cost['peak'])} | {_mib(cost['size'])} | {cost['note']} |")
    return "\n".join(lines)


def _mib(count: int | None) -> str:
    return "-" if count is None else f"{count / _MIB:,.0f}"


if __name__ == "__main__":
    sys.exit(main())
