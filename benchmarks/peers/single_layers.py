"""Part a: one layer at the shapes and token counts of real models; the norm's refresh; and how costs grow (part d)."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.peers.memory import kept_for_backward, largest_tensor, peak_of
from benchmarks.peers.timing import Timing, timed
from benchmarks.peers.variants import BUILDS, RANK, Variant, build, check_agreement, standing
from dora_diffusion.functional import dora as functional


@dataclass(frozen=True)
class Setting:
    """Where and how hard to measure."""

    device: str
    dtype: torch.dtype
    rounds: int
    is_quick: bool


@dataclass(frozen=True)
class Shape:
    """A linear layer of a model: `tokens` inputs of size `inputs` to size `outputs`."""

    name: str
    tokens: int
    inputs: int
    outputs: int


SHAPES = (
    Shape("SD1.5 self-attention, 64x64", 4096, 320, 320),
    Shape("SD1.5 cross-attention k/v, text", 77, 768, 320),
    Shape("SD1.5 self-attention, 16x16", 256, 1280, 1280),
    Shape("SDXL self-attention, 32x32", 1024, 1280, 1280),
    Shape("SDXL cross-attention k/v, text", 77, 2048, 1280),
    Shape("SD3-medium attention, 1024 px", 4096, 1536, 1536),
    Shape("FLUX.1 attention, 512 px", 1024, 3072, 3072),
)
QUICK_SHAPES = (Shape("quick", 64, 96, 64), Shape("quick text", 8, 48, 64))


def measure(setting: Setting) -> list[dict[str, object]]:
    """Forward, forward + backward, and memory of every variant at every shape."""
    found = []
    for shape in QUICK_SHAPES if setting.is_quick else SHAPES:
        print(f"  {shape.name}", flush=True)
        found.append({"shape": asdict(shape), **_one(shape, list(BUILDS), RANK, setting)})
    return found


def _one(shape: Shape, names: list[str], rank: int, setting: Setting) -> dict[str, object]:
    model = nn.Sequential(nn.Linear(shape.inputs, shape.outputs)).to(setting.device, setting.dtype)
    bases = {"0": model[0]}
    x = torch.randn(shape.tokens, shape.inputs, device=setting.device, dtype=setting.dtype, requires_grad=True)
    variants = build(model, ["0"], names, rank)
    check_agreement(lambda: model(x), model, variants)
    calls = {"base": Variant(bases, ()), **variants}

    def forward(variant: Variant) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with standing(model, variant, bases):
                return model(x)

        return call

    def step(variant: Variant) -> Callable[[], None]:
        def call() -> None:
            forward(variant)().sum().backward()
            for parameter in (x, *variant.parameters):
                parameter.grad = None

        return call

    repeat = max(1, int(2e8 / (shape.tokens * shape.inputs * shape.outputs)))
    quick = {"rounds": setting.rounds, "device": setting.device, "repeat": min(repeat, 20)}
    known = [x, *(p for variant in variants.values() for p in variant.parameters), *model.parameters()]
    return {
        "forward": _plain(timed({n: forward(v) for n, v in calls.items()}, "base", **quick)),
        "forward_backward": _plain(timed({n: step(v) for n, v in calls.items()}, "base", **quick)),
        "kept_bytes": {n: kept_for_backward(forward(v), known) for n, v in calls.items()},
        "peak_bytes": {n: peak_of(step(v), setting.device) for n, v in calls.items()},
    }


def _plain(timings: dict[str, Timing]) -> dict[str, dict[str, float]]:
    return {name: asdict(timing) for name, timing in timings.items()}


@torch.no_grad()
def measure_norm(setting: Setting) -> dict[str, object]:
    """The norm of W + s B A: factored, densely, and as PEFT does (through an identity matrix)."""
    size = 256 if setting.is_quick else 3072
    options = {"device": setting.device, "dtype": torch.float32}
    weight, down = torch.randn(size, size, **options), torch.randn(RANK, size, **options)
    up, scale = UP_SCALE * torch.randn(size, RANK, **options), 1.0

    def as_peft() -> Tensor:
        eye = torch.eye(size, **options)
        return torch.linalg.norm(weight + scale * F.linear(F.linear(eye, down), up).T, dim=1)

    calls = {
        "factored": lambda: functional.row_norms(weight, down, up, scale),
        "dense": lambda: (weight + scale * (up @ down)).norm(dim=1),
        "as PEFT": as_peft,
    }
    error = float((calls["factored"]() / calls["dense"]() - 1).abs().max())
    timings = timed(calls, "factored", rounds=3 * setting.rounds, device=setting.device)
    return {
        "size": size,
        "relative_error": error,
        "seconds": _plain(timings),
        "largest_tensor_bytes": {name: largest_tensor(call) for name, call in calls.items()},
    }


UP_SCALE = 0.01
GROWTH_NAMES = ["PEFT LoRA", "PEFT DoRA", "our LoRA", "our DoRA"]


def measure_growth(setting: Setting) -> dict[str, object]:
    """Forward + backward of a 1280x1280 layer as rank and tokens grow."""
    size = 64 if setting.is_quick else 1280
    ranks = (4, 8) if setting.is_quick else (4, 8, 16, 32, 64, 128)
    tokens = (8, 16) if setting.is_quick else (77, 256, 1024, 4096)

    def ratios(count: int, rank: int) -> object:
        print(f"  {count} tokens, rank {rank}", flush=True)
        return _one(Shape("growth", count, size, size), GROWTH_NAMES, rank, setting)["forward_backward"]

    middle = tokens[len(tokens) // 2]
    return {
        "size": size,
        "rank": {str(rank): ratios(middle, rank) for rank in ranks},
        "tokens": {str(count): ratios(count, RANK) for count in tokens},
    }
