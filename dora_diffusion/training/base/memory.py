"""How much memory a training run will need, found without weights: one step is taken on tensors that have shapes only.

Rules of thumb know neither attention that keeps no scores, nor a layer's own casts, nor what checkpointing spares. Here
the models' own code runs, forward and backward, on torch's fake tensors: tensors of the meta device that say they are
on the CPU, so that autocast and the choice of kernels are real. Every storage made there is counted while it lives.

Not seen: memory inside one operation, an allocator's rounding and gaps, libraries and the process itself.
"""

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from dora_diffusion.functional.objectives import weighted_squared_error
from dora_diffusion.pipelines.quantise import quantised_bytes, quantised_parts
from dora_diffusion.training.base.devices import with_precision
from dora_diffusion.training.base.sizes import sizes_of
from dora_diffusion.training.base.trainable import PRECISIONS, TrainablePipeline
from dora_diffusion.training.config import BaseConfig, OptimConfig, TrainConfig

Device = Literal["cpu", "cuda"]

# What CUDA's autocast computes in fp32 and the CPU's does not, of the models here (torch.amp's documentation).
_CUDA_FP32 = frozenset(
    {
        *("layer_norm", "group_norm", "softmax", "normalize", "norm", "sum", "prod", "cumsum"),
        *("pow", "__pow__", "rsqrt", "reciprocal", "exp", "log", "softplus"),
    }
)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that training holds at its worst moment.

    Attributes:
        weights: component -> its frozen weights and buffers; all stay in memory.
        adapters: A, B, m and frozen anchors, and new words' vectors, fp32.
        gradients: of what is trained, fp32.
        optimiser: what it keeps of what is trained (AdamW two moments, fp32), and the moving average's fp32.
        moments: what is done -> the most that it holds beside weights, adapters and optimiser.
        side: of a picture, in pixels.
    """

    weights: Mapping[str, int]
    adapters: int
    gradients: int
    optimiser: int
    moments: Mapping[str, int]
    side: int

    @property
    def worst_moment(self) -> str:
        """What is being done when the most is held."""
        return max(self.moments, key=lambda name: self.moments[name])

    @property
    def activations(self) -> int:
        """What the worst moment holds beside all the rest."""
        return max(0, self.moments[self.worst_moment] - self.gradients)

    @property
    def total(self) -> int:
        """The sum of all."""
        return sum(self.weights.values()) + self.adapters + self.gradients + self.optimiser + self.activations


def _zero_of(tensor: Tensor) -> float | int | bool:
    """What a tensor without numbers says where code asks for one: are there rows without a norm?"""
    return False if tensor.dtype == torch.bool else 0.0 if tensor.is_floating_point() else 0


# The device is asked of every tensor by autograd, oftener than all operations together; torch's own answer is slow.
_ANSWERS: Mapping[Any, Callable[[Any], Any]] = {
    torch.ops.aten._local_scalar_dense.default: _zero_of,
    torch.ops.prim.device.default: lambda fake: fake.fake_device,
}


class Watch(TorchDispatchMode):
    """Counts the bytes of storages that are made under it, while they live; views count once.

    Attributes:
        live: bytes now.
        peak: the most at once since the last `peak_of` began.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        """`known`: tensors whose storages do not count."""
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[int, tuple[weakref.ref[Any], int]] = {}
        for tensor in known:
            self._note(tensor.untyped_storage(), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and note what it made; asked about a tensor without numbers, answer at once."""
        if func in _ANSWERS and isinstance(args[0], FakeTensor):
            return _ANSWERS[func](args[0])
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self._note(storage, storage.nbytes())
        return result

    def _note(self, storage: Any, size: int) -> None:
        key = id(storage)
        if key in self._seen:
            return

        def freed(_: Any) -> None:
            self.live -= self._seen.pop(key)[1]

        self._seen[key] = weakref.ref(storage, freed), size
        self.live += size
        self.peak = max(self.peak, self.live)

    def peak_of(self, call: Callable[[], object]) -> int:
        """The most bytes alive at once during a call, what was made before it too."""
        self.peak = self.live
        call()
        return self.peak


class _CastsOfCuda(TorchFunctionMode):
    """Under autocast, what CUDA computes in fp32 is computed in fp32 on the CPU too."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _CUDA_FP32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, _to_fp32, (args, kwargs))
        return func(*args, **kwargs)


def _to_fp32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


@contextmanager
def _shapes_only(models: Iterable[nn.Module]) -> Iterator[None]:
    """Models on the meta device become ones whose tensors say they are on the CPU, and so do all made in here."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # a layer asks for its tensors' addresses to know whether they were replaced; it compares them, no more
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        twins: dict[int, Tensor] = {}
        for model in models:
            for module in model.modules():
                _move(module, twins)
        yield


def _move(module: nn.Module, twins: dict[int, Tensor]) -> None:
    """Give a module fake tensors; one that is shared stays shared (`twins`: id of a tensor -> its fake)."""

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in twins:
            made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
            is_parameter = isinstance(tensor, nn.Parameter)
            twins[id(tensor)] = nn.Parameter(made, requires_grad=tensor.requires_grad) if is_parameter else made
        return twins[id(tensor)]

    for name, value in vars(module).items():
        if name in ("_parameters", "_buffers"):
            value.update(tree_map_only(Tensor, fake, value))  # in place: a stand-in shares them with its base
        elif isinstance(value, Tensor | list | tuple):
            vars(module)[name] = tree_map_only(Tensor, fake, value)


def estimate_memory(trainable: TrainablePipeline, config: TrainConfig, *, device: Device) -> MemoryEstimate:
    """What one training step of `trainable` holds at its worst.

    A pipeline on the meta device is used up by it. With a true one on the CPU a true step is taken, which tests
    compare with.

    Args:
        trainable: injected, as `prepare_trainable` leaves it.
        config: batch, resolution, precision, prior preservation (class pictures double the batch; under adapter_off
            they are a second one, beside the gradients of the first).
        device: where training will run; "cuda" computes norms and softmax in fp32 under autocast.

    Raises:
        ValueError: the resolution does not fit the model.
    """
    models, config = _modules(trainable.pipe), with_precision(config, torch.device(device))
    with ExitStack() as stack:
        if next(trainable.denoiser.parameters()).is_meta:
            stack.enter_context(_shapes_only(models.values()))
        for injection in trainable.injections.values():
            injection.keep_norms()
        if device == "cuda":
            stack.enter_context(_CastsOfCuda())
        watch = stack.enter_context(Watch(tensor for model in models.values() for tensor in _tensors(model)))
        moments = _moments(trainable, config, watch)
    saved, dense = _quantised(trainable.pipe, config.base)
    moments = {name: size + (dense if name.startswith("a step") else 0) for name, size in moments.items()}
    own = list(trainable.named_tensors().values())
    trained = tensor_bytes(trainable.parameters())
    return MemoryEstimate(
        weights={
            name: tensor_bytes(_without(own, _tensors(model))) - saved.get(name, 0) for name, model in models.items()
        },
        adapters=tensor_bytes(own),
        gradients=trained,
        optimiser=_kept_bytes(trainable, config.optim),
        moments=moments,
        side=_largest_side(trainable, config),
    )


def _quantised(pipe: Any, base: BaseConfig) -> tuple[dict[str, int], int]:
    """Component -> bytes that quantising saves of its weights; and of the largest layer, made dense in its forward."""
    if base.quantise is None:
        return {}, 0
    parts = quantised_parts(pipe, base.quantise, key="base.quantise")
    sizes = {name: quantised_bytes(getattr(pipe, name), scheme) for name, scheme in parts.items()}
    return {name: saved for name, (saved, _) in sizes.items()}, max(dense for _, dense in sizes.values())


def _kept_bytes(trainable: TrainablePipeline, optim: OptimConfig) -> int:
    """What is kept of every trained parameter beside its gradient."""
    parameters, options = trainable.parameters(), optim.options
    kept = sum(optim.kind.state_bytes(parameter.shape, options) for parameter in parameters)
    return kept + (0 if optim.ema_decay is None else tensor_bytes(parameters))


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages of some tensors."""
    storages = {id(storage): storage for storage in (tensor.untyped_storage() for tensor in tensors)}
    return sum(storage.nbytes() for storage in storages.values())


def _modules(pipe: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _without(some: Iterable[Tensor], tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """The others of `tensors`."""
    known = {id(tensor) for tensor in some}
    return (tensor for tensor in tensors if id(tensor) not in known)


def _moments(trainable: TrainablePipeline, config: TrainConfig, watch: Watch) -> dict[str, int]:
    """Encode a picture, take a step, and decode a picture if the run draws any; the peak of each."""
    family, pipe = trainable.family, trainable.pipe
    side = _largest_side(trainable, config)
    latents: list[Tensor] = []
    is_apart = config.prior.mode == "adapter_off"
    if config.optim.gradient_accumulation > 1 or is_apart:  # then a forward pass meets the gradients of the one before
        for parameter in trainable.parameters():
            parameter.grad = torch.zeros_like(parameter)

    def encode() -> None:
        latents.append(trainable.encode_pictures(torch.zeros(1, 3, side, side)))

    count = config.optim.batch_size * (2 if config.has_class_pictures and not is_apart else 1)
    moments = {"encoding a picture": watch.peak_of(encode)}
    moments[f"a step of {count}"] = watch.peak_of(lambda: _step(trainable, config, latents[0], count))
    if config.preview.prompts:
        moments["decoding a preview"] = watch.peak_of(lambda: family.codec.decode(pipe, latents[0]))
    return moments


def _largest_side(trainable: TrainablePipeline, config: TrainConfig) -> int:
    """Of the square that no picture has more pixels than."""
    sizes, own = sizes_of(trainable.pipe), [concept.resolutions for concept in config.data.concepts]
    return max(side for resolutions in ((), *own) for side in sizes.resolutions(config.data, resolutions))


def _step(trainable: TrainablePipeline, config: TrainConfig, latent: Tensor, count: int) -> None:
    """Noise, predict, compare, backward, as `loop` does it, whatever the noise. `latent`: (1, C, h, w)."""
    dtype = PRECISIONS[config.optim.mixed_precision]
    is_apart = config.prior.mode == "adapter_off"  # then the captions of both halves are read first
    conditioning, *_others = [_conditioning(trainable, count, dtype) for _ in range(2 if is_apart else 1)]
    latents = torch.cat([latent] * count).float()
    noise = torch.zeros_like(latents)
    noisy, timesteps = latents + noise, torch.full((count,), 500.0)

    def predict() -> Tensor:
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            frames = torch.zeros(count, 6)
            return trainable.family.predict(trainable.denoiser, noisy.to(dtype), timesteps, conditioning, frames)

    goal = noise - latents
    if is_apart:
        with trainable.base_alone():
            goal = predict()
    loss = weighted_squared_error(predict(), goal, torch.ones(count))
    # as `loss.backward()`, which would hide what checkpointing computes again from a TorchFunctionMode
    _engine_run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def _conditioning(trainable: TrainablePipeline, count: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Conditioning of `count` captions of full length, behind the text encoders that are trained."""
    denoiser: Any = trainable.denoiser
    blank = trainable.family.blank(denoiser.config)
    trained = {name for name in trainable.injections if name != trainable.family.denoiser.name}
    trained.update(() if trainable.words is None else trainable.words.encoders)
    longest = max(tensor.shape[1] for tensor in blank.values() if tensor.dim() > 2)
    read = sum((_read(getattr(trainable.pipe, name), count, longest) for name in sorted(trained)), torch.zeros(()))
    return {
        name: torch.zeros(count, *shape.shape[1:], dtype=dtype) + read.to(dtype)
        if shape.is_floating_point()
        else torch.zeros(count, *shape.shape[1:], dtype=shape.dtype)
        for name, shape in blank.items()
    }


def _read(encoder: Any, count: int, longest: int) -> Tensor:
    """A number that stands for all that a text encoder says of `count` captions: what it keeps for backward counts."""
    places = getattr(encoder.config, "max_position_embeddings", None) or longest
    ids = torch.zeros(count, min(places, longest), dtype=torch.int64)
    said = encoder(input_ids=ids, output_hidden_states=True)
    hidden: Tensor = said.hidden_states[-1]
    return hidden.mean()
