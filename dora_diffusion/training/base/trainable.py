"""What is trained: the base pipeline with adapters injected."""

from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dora_diffusion.families import Family, family_of_pipeline
from dora_diffusion.functional.dora import scale_of
from dora_diffusion.layers.config import DoRAConfig
from dora_diffusion.layers.dora import DoRALayer
from dora_diffusion.layers.injection import Injection, inject, refresh_norms
from dora_diffusion.layers.quantisation import stays_put
from dora_diffusion.pipelines.loading import load_pipeline
from dora_diffusion.pipelines.quantise import check_library, quantise_pipeline, quantised_parts
from dora_diffusion.pipelines.textual_inversion import Words, add_words
from dora_diffusion.state import AdapterState, join
from dora_diffusion.training.base.below import Below
from dora_diffusion.training.base.blocks import compile_blocks, release_blocks
from dora_diffusion.training.base.encoders import FrozenEncoders
from dora_diffusion.training.base.placement import Placement
from dora_diffusion.training.base.start import install, read_start
from dora_diffusion.training.base.swap import BlockSwap
from dora_diffusion.training.config import AdapterConfig, BaseConfig, DataConfig, OptimConfig, TrainConfig

Own = TypeVar("Own", int, float)
_CPU = torch.device("cpu")
PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TrainablePipeline:
    """A pipeline under training.

    Attributes:
        pipe: the base with what is trained in it.
        family: of the base.
        injections: component name -> its adapter.
        words: new ones, or None.
        below: the adapters that are part of the base.
        started: what was started from, on one line; empty for nothing.
        placement: moves its components.
        swap: the denoiser's blocks that wait in main memory, or None.
    """

    pipe: Any
    family: Family
    injections: Mapping[str, Injection]
    placement: Placement
    words: Words | None = None
    below: tuple[Below, ...] = ()
    started: str = ""
    swap: BlockSwap | None = None

    @property
    def denoiser(self) -> nn.Module:
        """The UNet or transformer."""
        module: nn.Module = getattr(self.pipe, self.family.denoiser.name)
        return module

    def trains_text(self) -> bool:
        """Whether captions must be encoded anew at every step."""
        return self.words is not None or any(name != self.family.denoiser.name for name in self.injections)

    @property
    def device(self) -> torch.device:
        """Where steps are taken."""
        return self.placement.device

    def encode_pictures(self, pixels: Tensor) -> Tensor:
        """Pixels (N, 3, H, W) in [-1, 1] -> latents; in fp32, for some autoencoders overflow below, and it is kept."""
        self.placement.bring("vae")
        pixels, vae, dtype = pixels.to(self.device), self.pipe.vae, self.pipe.vae.dtype
        if dtype == torch.float32:
            return self.family.codec.encode(self.pipe, pixels)
        _cast(vae, torch.float32)
        try:
            return self.family.codec.encode(self.pipe, pixels)
        finally:
            _cast(vae, dtype)

    @cached_property
    def frozen(self) -> FrozenEncoders:
        """The text encoders that nothing is trained in."""
        placement, together = self.placement, self.placement.together
        names = [name for name in encoders_of(self.pipe, self.family) if name not in together]
        beside = together if self.trains_text() else frozenset[str]()  # which pipelines ask in one breath
        return FrozenEncoders(self.pipe, names, lambda: placement.device, lambda: placement.bring(*beside, *names))

    def bring_encoders(self) -> None:
        """Have the text encoders on the device, to encode captions."""
        self.placement.bring(*encoders_of(self.pipe, self.family))

    def bring_denoiser(self) -> None:
        """Have what a step needs on the device."""
        self.placement.bring_together()

    def parameters(self) -> list[nn.Parameter]:
        """Every trained parameter, in a fixed order."""
        adapted = [parameter for injection in self.injections.values() for parameter in injection.parameters()]
        return adapted + ([] if self.words is None else self.words.parameters())

    def named_tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint must hold."""
        parts = {name: injection.named_tensors() for name, injection in self.injections.items()}
        words = {} if self.words is None else {"words": self.words.named_parameters()}
        return {f"{part}.{name}": tensor for part, named in (parts | words).items() for name, tensor in named.items()}

    def train(self, mode: bool = True) -> None:
        """Training or drawing mode of what is trained; what it stands in is frozen, and drops nothing of its own."""
        for name in {self.family.denoiser.name, *self.injections}:
            _train_adapters(getattr(self.pipe, name), mode)

    def adapter(self, metadata: Mapping[str, str]) -> AdapterState:
        """The adapter as it stands."""
        return join([injection.state().under(name) for name, injection in self.injections.items()], metadata)

    def eject(self) -> None:
        """Leave the pipeline as it was before `prepare_trainable`."""
        if self.swap is not None:
            self.swap.remove()
        release_blocks(self.denoiser)
        for injection in self.injections.values():
            injection.eject()
        if self.words is not None:
            self.words.remove()

    def refresh_norms(self) -> None:
        """Take the norms that an optimiser's step has made old, of all components, with one wait for the device."""
        refresh_norms(self.injections.values())

    def forget_norms(self) -> None:
        """Take every norm anew: parameters have changed where nothing sees it."""
        for injection in self.injections.values():
            injection.forget_norms()

    @contextmanager
    def base_alone(self) -> Any:
        """The base as it was, without gradients: adapters and new words are off, and come back as they were."""
        with ExitStack() as stack:
            for injection in self.injections.values():
                stack.enter_context(injection.off())
            if self.words is not None:
                stack.enter_context(self.words.off())
            stack.enter_context(torch.no_grad())
            yield

    @contextmanager
    def at_strength(self, strength: float) -> Any:
        """Adapters at a strength; new words stay what they are."""
        with ExitStack() as stack:
            for injection in self.injections.values():
                stack.enter_context(injection.at_strength(strength))
            yield

    @contextmanager
    def drawing(self) -> Any:
        """Inference mode for previews and validation; training mode again afterwards."""
        self.train(False)
        self.bring_denoiser()
        self.refresh_norms()
        try:
            with torch.no_grad():
                yield
        finally:
            self.train(True)


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """As `model.to(dtype)`, which tensors that have shapes only refuse."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def _train_adapters(model: nn.Module, mode: bool) -> None:
    """T5 would drop a tenth of its own activations in training mode: what is frozen stays in drawing mode."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    model.eval()
    for module in model.modules():
        # transformers recomputes in training mode alone; such a layer only calls others, and drops nothing itself
        if isinstance(module, DoRALayer | GradientCheckpointingLayer):
            module.training = mode


def load_base(model: str, dtype: torch.dtype, files: BaseConfig | None = None) -> Any:
    """The base pipeline in main memory, frozen, with components from files of their own."""
    own = files or BaseConfig()
    check_library(own.quantise, key="base.quantise")
    pipe = load_pipeline(model, dtype=dtype, device="cpu", transformer=own.transformer, unet=own.unet, vae=own.vae)
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False)
    return pipe


def quantise_base(pipe: Any, base: BaseConfig, device: torch.device) -> None:
    """Quantise what the config names, once nothing is folded into it any more, layer by layer where steps are taken."""
    if base.quantise is not None:
        quantise_pipeline(pipe, base.quantise, key="base.quantise")
        for name in quantised_parts(pipe, base.quantise, key="base.quantise"):
            nn.Module.to(getattr(pipe, name), device)


def encoders_of(pipe: Any, family: Family) -> list[str]:
    """The text encoders that a pipeline has."""
    return [part.name for part in family.text_encoders if getattr(pipe, part.name, None) is not None]


def prepare_trainable(
    pipe: Any, config: TrainConfig, *, device: torch.device = _CPU, from_start: bool = True
) -> TrainablePipeline:
    """Put the adapters and new words that the config asks for into a base pipeline.

    Args:
        pipe: the base, wherever it is.
        config: of the run.
        device: where steps will be taken.
        from_start: False leaves `adapter.start` unread: a checkpoint, or nothing, takes its place.
    """
    family = family_of_pipeline(pipe)
    start = read_start(pipe, config.adapter) if from_start else None
    wanted = {family.denoiser.name: config.adapter.rank} if config.adapter.train_unet else {}
    for name in text_encoders_of(pipe, family, config.adapter, config.optim):
        wanted[name] = own_setting(config.adapter.text_encoder_rank, name, config.adapter.rank)
    generator = torch.Generator().manual_seed(config.optim.seed)
    injections = {
        name: inject(
            getattr(pipe, name),
            _layer_config(config.adapter, rank, is_denoiser=name == family.denoiser.name),
            generator=generator,
        )
        for name, rank in wanted.items()
    }
    started = "" if start is None else install(start, pipe, injections, config.adapter)
    starts = config.words.starts
    words = add_words(pipe, starts, vectors=config.words.vectors) if starts else None
    if config.optim.gradient_checkpointing:
        for name in {family.denoiser.name, *injections}:  # gradients of text adapters run through the denoiser too
            _enable_checkpointing(getattr(pipe, name))
    denoiser = getattr(pipe, family.denoiser.name)
    is_skeleton, count = next(denoiser.parameters()).is_meta, config.base.swap_blocks
    swap = BlockSwap(denoiser, count, device) if count and not is_skeleton else None
    worded = [] if words is None else [name.partition(".")[0] for name in words.named_parameters()]
    placement = _placement(pipe, config.data, device, trained={family.denoiser.name, *wanted, *worded}, swap=swap)
    trainable = TrainablePipeline(pipe, family, injections, placement, words, started=started, swap=swap)
    trainable.train()
    if config.base.compile and not is_skeleton:
        compile_blocks(denoiser)
    return trainable


def _placement(
    pipe: Any, data: DataConfig, device: torch.device, *, trained: Collection[str], swap: BlockSwap | None
) -> Placement:
    """What is used in one step is used together: the denoiser, what is trained, the VAE where views are fresh."""
    together = {*trained} | (set() if data.has_few_views else {"vae"})
    models = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    return Placement(
        pipe, device, together=together, fixed={name for name, part in models.items() if stays_put(part)}, swap=swap
    )


def text_encoders_of(pipe: Any, family: Family, adapter: AdapterConfig, optim: OptimConfig) -> list[str]:
    """The text encoders to adapt; a ValueError when the config names one that the base lacks or does not adapt."""
    present = encoders_of(pipe, family)
    wanted = adapter.train_text_encoder
    chosen = [name for name in present if wanted is True or (wanted and name in wanted)]
    named = {
        "adapter.train_text_encoder": (wanted if isinstance(wanted, list) else [], present),
        "adapter.text_encoder_rank": (adapter.text_encoder_rank, chosen),
        "optim.text_encoder_learning_rate": (optim.text_encoder_learning_rate, chosen),
    }
    for key, (names, known) in named.items():
        unknown = [name for name in names if name not in known] if isinstance(names, list | dict) else []
        if unknown:
            raise ValueError(f"{key}: got {unknown[0]!r}, expected one of {', '.join(known) or '(none)'}")
    return chosen


def own_setting(value: Own | Mapping[str, Own] | None, component: str, default: Own) -> Own:
    """A setting for all text encoders or by name, for one of them."""
    found = value.get(component) if isinstance(value, Mapping) else value
    return default if found is None else found


def _layer_config(adapter: AdapterConfig, rank: int, *, is_denoiser: bool) -> DoRAConfig:
    """How one component is adapted; what names layers is the denoiser's."""
    scale = scale_of(adapter.alpha, adapter.rank, rank_stabilised=adapter.use_rslora)
    return DoRAConfig(
        rank=rank,
        alpha=scale / scale_of(1, rank, rank_stabilised=adapter.use_rslora),  # another rank keeps the scale
        target_modules=_targets(adapter.target_modules, is_denoiser),
        dropout=adapter.dropout,
        use_dora=adapter.use_dora,
        norm_grad=adapter.norm_grad,
        use_rslora=adapter.use_rslora,
        rank_pattern=adapter.rank_pattern if is_denoiser else {},
        alpha_pattern=adapter.alpha_pattern if is_denoiser else {},
        init=adapter.init,
        train_magnitude=adapter.train_magnitude,
    )


def _enable_checkpointing(model: Any) -> None:
    """Gradient checkpointing by the name that the model's library and version give it."""
    if not getattr(model, "_supports_gradient_checkpointing", True):
        raise ValueError(f"optim.gradient_checkpointing: {type(model).__name__} has none in diffusers; expected false")
    names = ("enable_gradient_checkpointing", "activation_checkpointing_enable", "gradient_checkpointing_enable")
    next(getattr(model, name) for name in names if hasattr(model, name))()


def _targets(targets: str | list[str] | None, is_denoiser: bool) -> str | list[str] | None:
    """Explicit names and patterns are the denoiser's; a text encoder takes presets."""
    presets = ("attention", "all-linear", "all")
    return targets if is_denoiser or targets in presets else None


def trainable_count(parameters: Iterable[nn.Parameter]) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in parameters)
