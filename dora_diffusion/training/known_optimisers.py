"""Optimisers: a frozen record of each, with the settings that its own library advises.

What a record says of a rate is for adapters of the default kind; `optim.learning_rate` replaces it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

OptimiserName = Literal["adamw", "adamw8bit", "prodigy", "schedulefree", "adafactor", "lion", "came"]
StateBytes = Callable[[Sequence[int], Mapping[str, Any]], int]

_FP32 = 4
# bitsandbytes keeps smaller tensors in fp32, and a scale for each block of so many codes.
_SMALLEST_OF_CODES, _BLOCK = 4096, 256


@dataclass(frozen=True)
class Optimiser:
    """One optimiser.

    Attributes:
        name: in `optim.optimizer`.
        package: what pip calls it.
        module: where its class lies.
        class_name: the class, one of torch's kind.
        rate: the learning rate that is advised.
        decay: the weight decay that is advised.
        state_bytes: a parameter's shape and the options -> bytes that are kept of it beside it, at most.
        options: further arguments of the class that are advised.
        fixed: arguments of the class that no option may change: other keys say them, or a run could not go on.
        schedule: what `optim.lr_scheduler` is without a word.
        one_rate: it finds the rate itself, one for all; `optim.learning_rate` is a factor of it.
        averages: it trains at one point and is read at another: its class has `train()` and `eval()`.
    """

    name: OptimiserName
    package: str
    module: str
    class_name: str
    rate: float
    decay: float
    state_bytes: StateBytes
    options: Mapping[str, Any] = field(default_factory=dict)
    fixed: tuple[str, ...] = ()
    schedule: Literal["cosine", "constant"] = "cosine"
    one_rate: bool = False
    averages: bool = False


def _moments(count: int) -> StateBytes:
    """So many tensors of the parameter's shape."""
    return lambda shape, options: _FP32 * count * math.prod(shape)


def _codes(shape: Sequence[int], options: Mapping[str, Any]) -> int:
    numbers = math.prod(shape)
    smallest = options.get("min_8bit_size", _SMALLEST_OF_CODES)
    return 2 * _FP32 * numbers if numbers < smallest else 2 * (numbers + _FP32 * math.ceil(numbers / _BLOCK))


def _sliced(shape: Sequence[int], options: Mapping[str, Any]) -> int:
    """Two moments, and of each `slice_p`-th number where it began and its gradients' sum."""
    numbers = math.prod(shape)
    return 2 * _FP32 * (numbers + math.ceil(numbers / options.get("slice_p", 1)))


def _factors(shape: Sequence[int]) -> int:
    """A row and a column in place of a moment; the moment itself of a vector."""
    numbers = math.prod(shape)
    return _FP32 * (numbers if len(shape) < 2 else numbers // shape[-1] + numbers // shape[-2])


def _factored(shape: Sequence[int], options: Mapping[str, Any]) -> int:
    has_first = options.get("beta1") is not None
    return _factors(shape) + _FP32 * (1 + (math.prod(shape) if has_first else 0))


def _confident(shape: Sequence[int], options: Mapping[str, Any]) -> int:
    """One moment, and two that are factored; of a vector only one of those."""
    return _FP32 * (1 + math.prod(shape)) + (2 if len(shape) > 1 else 1) * _factors(shape)


_OF_TORCH = ("maximize", "foreach", "capturable", "differentiable", "fused")

OPTIMISERS: Mapping[str, Optimiser] = {
    one.name: one
    for one in (
        Optimiser("adamw", "torch", "torch.optim", "AdamW", 1e-4, 1e-2, _moments(2), fixed=_OF_TORCH),
        # "Adam with 8-bit states", otherwise a replacement of torch's with the same settings.
        Optimiser(
            *("adamw8bit", "bitsandbytes", "bitsandbytes.optim", "AdamW8bit", 1e-4, 1e-2, _codes),
            fixed=("optim_bits", "args", "is_paged"),
        ),
        # prodigyopt's README, "Diffusion models"; no schedule or a cosine without restarts.
        Optimiser(
            *("prodigy", "prodigyopt", "prodigyopt", "Prodigy", 1.0, 1e-2, _sliced),
            options={"safeguard_warmup": True, "use_bias_correction": True},
            fixed=("fsdp_in_use",),
            one_rate=True,
        ),
        # its README: 1 to 10 times the rate that a schedule begins with; its own decay is 0.
        Optimiser(
            *("schedulefree", "schedulefree", "schedulefree", "AdamWScheduleFree", 3e-4, 0.0, _moments(2)),
            fixed=("warmup_steps", "foreach"),
            schedule="constant",
            averages=True,
        ),
        # transformers' documentation, for a rate that is given from outside.
        Optimiser(
            *("adafactor", "transformers", "transformers.optimization", "Adafactor", 1e-3, 0.0, _factored),
            options={"scale_parameter": False, "relative_step": False},
            fixed=("relative_step", "warmup_init"),
        ),
        # lion-pytorch's README: 3 to 10 times less than AdamW's, the decay so much more.
        Optimiser("lion", "lion-pytorch", "lion_pytorch", "Lion", 3e-5, 3e-2, _moments(1), fixed=("use_triton",)),
        # its README: 1 to 3 times less than AdamW's, decay as there.
        Optimiser("came", "came-pytorch", "came_pytorch", "CAME", 5e-5, 1e-2, _confident),
    )
}
