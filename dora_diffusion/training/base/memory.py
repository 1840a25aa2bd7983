"""How much memory a training run will need, found without weights: one step is taken on tensors that have shapes only.

Rules of thumb know neither attention that keeps no scores, nor a layer's own casts, nor what checkpointing spares. Here
the models' own code runs, forward and backward, on torch's fake tensors: tensors of the meta device that say they are
on the CPU, so that autocast and the choice of kernels are real. Every storage made there is counted while it lives.

Not seen: memory inside one operation, an allocator's rounding and gaps, libraries and the process itself.
"""

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
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
from dora_diffusion.training.base.blocks import repeated_blocks
from dora_diffusion.training.base.devices import with_precision
from dora_diffusion.training.base.sizes import sizes_of
from dora_diffusion.training.base.swap import swapped_bytes
from dora_diffusion.training.base.trainable import PRECISIONS, TrainablePipeline, encoders_of
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
        weights: component -> its frozen weights and buffers, as far as they are on the device when it is there.
        adapters: A, B, m and frozen anchors, and new words' vectors, fp32.
        gradients: of what is trained, fp32.
        optimiser: what it keeps of what is trained (AdamW two moments, fp32), and the moving average's fp32.
        moments: what is done -> the most that it holds beside weights, adapters and optimiser.
        places: what is done -> the components that are on the device meanwhile.
        side: of a picture, in pixels.
        denoiser: the component whose blocks can be swapped.
        spared: what so many swapped blocks spare of its weights on the device, from none on; empty on the CPU.
    """

    weights: Mapping[str, int]
    adapters: int
    gradients: int
    optimiser: int
    moments: Mapping[str, int]
    places: Mapping[str, tuple[str, ...]]
    side: int
    denoiser: str = ""
    spared: tuple[int, ...] = ()

    def with_swapped(self, count: int) -> "MemoryEstimate":
        """With so many of the denoiser's blocks swapped."""
        weights = {**self.weights, self.denoiser: self.weights[self.denoiser] - self.spared[count]}
        return replace(self, weights=weights, spared=())

    def held(self, moment: str) -> int:
        """All that a moment holds."""
        own = self.adapters + self.optimiser + max(self.gradients, self.moments[moment])
        return own + sum(self.weights[name] for name in self.places[moment])

    @property
    def worst_moment(self) -> str:
        """What is being done when the most is held."""
        return max(self.moments, key=self.held)

    @property
    def present(self) -> dict[str, int]:
        """The weights that are on the device then."""
        return {name: self.weights[name] for name in self.places[self.worst_moment]}

    @property
    def resting(self) -> dict[str, int]:
        """The weights that are in main memory then."""
        return {name: size for name, size in self.weights.items() if name not in self.present}

    @property
    def activations(self) -> int:
        """What the worst moment holds beside all the rest."""
        return max(0, self.moments[self.worst_moment] - self.gradients)

    @property
    def total(self) -> int:
        """The sum of all."""
        return self.held(self.worst_moment)


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
    """What training `trainable` holds at its worst.

    A pipeline on the meta device is used up by it. With a true one on the CPU a true step is taken, which tests
    compare with.

    Args:
        trainable: injected, as `prepare_trainable` leaves it.
        config: batch, resolution, precision, prior preservation (class pictures double the batch; under adapter_off
            they are a second one, beside the gradients of the first).
        device: where training will run; "cuda" computes norms and softmax in fp32 under autocast, and has components in
            memory of its own only while they are used (`Placement`).

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
    moments = {name: size + (dense if "step" in name or "drawing" in name else 0) for name, size in moments.items()}
    own = list(trainable.named_tensors().values())
    trained = tensor_bytes(trainable.parameters())
    found = MemoryEstimate(
        weights={
            name: tensor_bytes(_without(own, _tensors(model))) - saved.get(name, 0) for name, model in models.items()
        },
        adapters=tensor_bytes(own),
        gradients=trained,
        optimiser=_kept_bytes(trainable, config.optim),
        moments=moments,
        places={name: _places(name, trainable, list(models), device) for name in moments},
        side=_largest_side(trainable, config),
        denoiser=trainable.family.denoiser.name,
        spared=_spared(trainable, saved) if device == "cuda" else (),
    )
    return found.with_swapped(config.base.swap_blocks) if device == "cuda" and config.base.swap_blocks else found


def _spared(trainable: TrainablePipeline, saved: Mapping[str, int]) -> tuple[int, ...]:
    """What so many swapped blocks spare, from none on; quantised ones as much less as the whole denoiser is less."""
    denoiser = trainable.denoiser
    whole = tensor_bytes(_tensors(denoiser))
    left = whole - saved.get(trainable.family.denoiser.name, 0)
    counts = range(len(repeated_blocks(denoiser)) + 1)
    return tuple(swapped_bytes(denoiser, count) * left // whole for count in counts)


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


_CAPTIONS, _PICTURES, _DRAWING, _DECODING = (
    "encoding a caption",
    "encoding a picture",
    "drawing a preview",
    "decoding a preview",
)


def _moments(trainable: TrainablePipeline, config: TrainConfig, watch: Watch) -> dict[str, int]:
    """Encode a caption and a picture, take a step, and draw a picture if the run draws any; the peak of each."""
    family, pipe = trainable.family, trainable.pipe
    side = _largest_side(trainable, config)
    latents: list[Tensor] = []
    is_apart = config.prior.mode == "adapter_off"
    draws = bool(config.preview.prompts)

    def read() -> None:
        longest = _longest(family.blank(_settings_of(trainable)))
        with torch.no_grad():
            for name in encoders_of(pipe, family):
                _read(getattr(pipe, name), 1, longest)

    def encode() -> None:
        latents.append(trainable.encode_pictures(torch.zeros(1, 3, side, side)))

    count = config.optim.batch_size * (2 if config.has_class_pictures and not is_apart else 1)
    moments = {_CAPTIONS: watch.peak_of(read), _PICTURES: watch.peak_of(encode)}
    if draws:  # guidance asks twice
        moments[_DRAWING] = watch.peak_of(lambda: _drawn(trainable, config, latents[0]))
        moments[_DECODING] = watch.peak_of(lambda: family.codec.decode(pipe, latents[0]))
    if config.optim.gradient_accumulation > 1 or is_apart:  # then a forward pass meets the gradients of the one before
        for parameter in trainable.parameters():
            parameter.grad = torch.zeros_like(parameter)
    moments[f"a step of {count}"] = watch.peak_of(lambda: _step(trainable, config, latents[0], count))
    return moments


def _places(moment: str, trainable: TrainablePipeline, components: Sequence[str], device: Device) -> tuple[str, ...]:
    """The components that are on the device at a moment: in main memory all of them, always."""
    if device == "cpu":
        return tuple(components)
    used = {
        _CAPTIONS: encoders_of(trainable.pipe, trainable.family),
        _PICTURES: ["vae"],
        _DRAWING: [trainable.family.denoiser.name],
        _DECODING: ["vae"],
    }
    here = trainable.placement.beside(*used[moment]) if moment in used else trainable.placement.together
    return tuple(name for name in components if name in here)


def _settings_of(trainable: TrainablePipeline) -> Any:
    """Of the denoiser."""
    denoiser: Any = trainable.denoiser
    return denoiser.config


@torch.no_grad()
def _drawn(trainable: TrainablePipeline, config: TrainConfig, latent: Tensor) -> None:
    """One step of drawing, with guidance."""
    dtype = PRECISIONS[config.optim.mixed_precision]
    latents, timesteps = torch.cat([latent] * 2).to(dtype), torch.full((2,), 500.0)
    trainable.family.predict(
        trainable.denoiser, latents, timesteps, _blank(trainable, 2, dtype, torch.zeros(())), torch.zeros(2, 6)
    )


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
    trained = {name for name in trainable.injections if name != trainable.family.denoiser.name}
    trained.update(() if trainable.words is None else trainable.words.encoders)
    longest = _longest(trainable.family.blank(_settings_of(trainable)))
    read = sum((_read(getattr(trainable.pipe, name), count, longest) for name in sorted(trained)), torch.zeros(()))
    return _blank(trainable, count, dtype, read)


def _blank(trainable: TrainablePipeline, count: int, dtype: torch.dtype, read: Tensor) -> dict[str, Tensor]:
    """Conditioning that depends on what was read."""
    blank = trainable.family.blank(_settings_of(trainable))
    return {
        name: torch.zeros(count, *shape.shape[1:], dtype=dtype) + read.to(dtype)
        if shape.is_floating_point()
        else torch.zeros(count, *shape.shape[1:], dtype=shape.dtype)
        for name, shape in blank.items()
    }


def _longest(blank: Mapping[str, Tensor]) -> int:
    """Tokens of a full caption."""
    return max(tensor.shape[1] for tensor in blank.values() if tensor.dim() > 2)


def _read(encoder: Any, count: int, longest: int) -> Tensor:
    """A number that stands for all that a text encoder says of `count` captions: what it keeps for backward counts."""
    places = getattr(encoder.config, "max_position_embeddings", None) or longest
    ids = torch.zeros(count, min(places, longest), dtype=torch.int64)
    said = encoder(input_ids=ids, output_hidden_states=True)
    hidden: Tensor = said.hidden_states[-1]
    return hidden.mean()
