"""What is trained: the base pipeline with adapters injected, and the optimiser over their parameters."""

from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch import nn

import dora_diffusion
from dora_diffusion.families import Family, family_of_pipeline
from dora_diffusion.functional import scale_of
from dora_diffusion.injection import DoRAConfig, Injection, inject
from dora_diffusion.pipelines import load_pipeline
from dora_diffusion.state import AdapterState, join
from dora_diffusion.training.config import TrainConfig

PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Subject:
    """A pipeline under training. `injections`: component name -> its adapter."""

    pipe: Any
    family: Family
    injections: Mapping[str, Injection]

    @property
    def denoiser(self) -> nn.Module:
        """The UNet or transformer."""
        module: nn.Module = getattr(self.pipe, self.family.denoiser.name)
        return module

    def trains_text(self) -> bool:
        """Whether captions must be encoded anew at every step."""
        return any(name != self.family.denoiser.name for name in self.injections)

    def parameters(self) -> list[nn.Parameter]:
        """Every trained parameter, in a fixed order."""
        return [parameter for injection in self.injections.values() for parameter in injection.parameters()]

    def train(self, mode: bool = True) -> None:
        """Training or drawing mode of the adapted components."""
        for name in {self.family.denoiser.name, *self.injections}:
            getattr(self.pipe, name).train(mode)

    def adapter(self, metadata: Mapping[str, str]) -> AdapterState:
        """The adapter as it stands."""
        return join([injection.state().under(name) for name, injection in self.injections.items()], metadata)

    def eject(self) -> None:
        """Leave the pipeline as it was before `prepare_subject`."""
        for injection in self.injections.values():
            injection.eject()

    @contextmanager
    def drawing(self) -> Any:
        """Inference mode for previews and validation; training mode again afterwards."""
        self.train(False)
        try:
            with torch.no_grad():
                yield
        finally:
            self.train(True)


def load_base(config: TrainConfig, device: torch.device) -> Any:
    """The base pipeline in the precision that the config asks for, frozen."""
    pipe = load_pipeline(config.model, dtype=PRECISIONS[config.optim.mixed_precision], device=str(device))
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False)
    return pipe


def prepare_subject(pipe: Any, config: TrainConfig) -> Subject:
    """Inject the adapters that the config asks for into a base pipeline."""
    family = family_of_pipeline(pipe)
    wanted = {family.denoiser.name: config.adapter.rank} if config.adapter.train_unet else {}
    if config.adapter.train_text_encoder:
        rank = config.adapter.text_encoder_rank or config.adapter.rank
        wanted.update({part.name: rank for part in family.text_encoders if getattr(pipe, part.name, None) is not None})
    generator = torch.Generator().manual_seed(config.optim.seed)
    injections = {
        name: inject(
            getattr(pipe, name),
            _layer_config(config, rank, is_denoiser=name == family.denoiser.name),
            generator=generator,
        )
        for name, rank in wanted.items()
    }
    if config.optim.gradient_checkpointing:
        for name in {family.denoiser.name, *injections}:  # gradients of text adapters run through the denoiser too
            _enable_checkpointing(getattr(pipe, name))
    subject = Subject(pipe, family, injections)
    subject.train()
    return subject


def _layer_config(config: TrainConfig, rank: int, *, is_denoiser: bool) -> DoRAConfig:
    """How one component is adapted; what names layers is the denoiser's."""
    adapter = config.adapter
    scale = scale_of(adapter.alpha, adapter.rank, rank_stabilised=adapter.use_rslora)
    return DoRAConfig(
        rank=rank,
        alpha=scale / scale_of(1, rank, rank_stabilised=adapter.use_rslora),  # another rank keeps the scale
        target_modules=_targets(config, is_denoiser),
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
    names = ("enable_gradient_checkpointing", "activation_checkpointing_enable", "gradient_checkpointing_enable")
    next(getattr(model, name) for name in names if hasattr(model, name))()


def _targets(config: TrainConfig, is_denoiser: bool) -> str | list[str] | None:
    """Explicit names and patterns are the denoiser's; a text encoder takes presets."""
    targets = config.adapter.target_modules
    presets = ("attention", "all-linear", "all")
    return targets if is_denoiser or targets in presets else None


def build_optimizer(subject: Subject, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with each component's own rate; B has LoRA+'s ratio, magnitudes a multiplier and no weight decay."""
    optim = config.optim
    groups = []
    for name, injection in subject.injections.items():
        is_text = name != subject.family.denoiser.name
        rate = optim.text_encoder_learning_rate if is_text else None
        rate = optim.learning_rate if rate is None else rate
        decay = optim.weight_decay
        groups.append({"params": injection.downs(), "lr": rate, "weight_decay": decay})
        groups.append({"params": injection.ups(), "lr": rate * optim.loraplus_lr_ratio, "weight_decay": decay})
        if magnitudes := injection.magnitudes():
            groups.append({"params": magnitudes, "lr": rate * optim.magnitude_lr_multiplier, "weight_decay": 0.0})
    return torch.optim.AdamW(groups)


class RateSchedule:
    """Learning rates as a function of the step alone, so that a resumed run needs no scheduler state."""

    def __init__(self, optimizer: torch.optim.Optimizer, config: TrainConfig) -> None:
        scheduler = get_scheduler(
            config.optim.lr_scheduler,
            optimizer=torch.optim.SGD([torch.zeros(1)], lr=1.0),
            num_warmup_steps=config.optim.warmup_steps,
            num_training_steps=config.optim.steps,
        )
        self._factor = scheduler.lr_lambdas[0]
        self._optimizer = optimizer
        self._rates = [group["lr"] for group in optimizer.param_groups]

    def set(self, step: int) -> float:
        """Set the rates of a step; return the first group's."""
        factor = self._factor(step)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        return self._rates[0] * factor


def adapter_metadata(config: TrainConfig, family: Family, *, step: int) -> dict[str, str]:
    """What a reader of the file should know, as strings."""
    facts = {
        "version": dora_diffusion.__version__,
        "family": family.name,
        # the name only: a path tells strangers about the user's machine
        "base_model": Path(config.model).name if Path(config.model).is_absolute() else config.model,
        "norm_grad": config.adapter.norm_grad,
        "magnitude_axis": "out",
        "instance_prompt": config.data.instance_prompt or "",
        "steps": str(step),
    }
    return {f"dora_diffusion.{name}": value for name, value in facts.items()}


def trainable_count(parameters: Iterable[nn.Parameter]) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in parameters)
