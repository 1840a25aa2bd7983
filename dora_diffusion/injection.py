"""Put DoRA layers into a model, and take them out again so that the model is what it was."""

import math
import re
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from dora_diffusion.bases import Base, check_adaptable, check_shapes, dense_weight
from dora_diffusion.checks import check_fields
from dora_diffusion.families import component_of_model, ends_with
from dora_diffusion.functional import count_zero_rows, initial_magnitude, master_dtype, scale_of
from dora_diffusion.initialisation import INITS, Init, embedding_pair, initial_pair, principal_pair
from dora_diffusion.layers import NORM_GRADS, Adapter, BlendedLayer, DoRALayer, NormGrad
from dora_diffusion.state import AdapterState, ModuleState, rank_in_words
from dora_diffusion.step_clock import CLOCK

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class DoRAConfig:
    """How layers are adapted.

    Attributes:
        rank: r of the low-rank pair.
        alpha: the scale is alpha / rank.
        target_modules: None for the family's attention layers; a preset (`attention`, `all-linear`, `all`); a list of
            path endings; or a regular expression that must match the whole path.
        dropout: probability, on the low-rank branch only.
        use_dora: False trains a plain LoRA.
        norm_grad: "detached" holds the norm constant in the backward pass (the paper's default), "exact" does not.
        use_rslora: the scale is alpha / sqrt(rank) (arXiv 2312.03732).
        rank_pattern: pattern -> rank of the layers whose path ends in it; a regular expression, the first that fits, as
            in PEFT: `{"mid_block.*to_k": 32, "to_out.0": 4}`.
        alpha_pattern: pattern -> alpha, likewise.
        init: what A and B start from: "default" (B = 0), "gaussian", "orthogonal" or "pissa"; see `initialisation`. An
            embedding knows "pissa" and one other start, A = 0.
        train_magnitude: False freezes m at the norm of the base's rows, so that only directions are learnt.
    """

    rank: int = 8
    alpha: float = 8.0
    target_modules: str | list[str] | None = None
    dropout: float = 0.0
    use_dora: bool = True
    norm_grad: NormGrad = "detached"
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    init: Init = "default"
    train_magnitude: bool = True

    def __post_init__(self) -> None:
        check_fields(self)
        for rank in (self.rank, *self.rank_pattern.values()):
            if rank < 1:
                raise ValueError(f"rank must be at least 1, got {rank}")
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            if not 0 < alpha < math.inf:
                raise ValueError(f"alpha must be a positive number, got {alpha}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")
        for name, value, known in (("norm_grad", self.norm_grad, NORM_GRADS), ("init", self.init, INITS)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


class Injection:
    """What `inject` did to a model: its layers, their parameters, and the way back."""

    def __init__(self, model: nn.Module, layers: Mapping[str, DoRALayer], trainable: list[nn.Parameter]) -> None:
        self._model = model
        self._layers = dict(layers)
        self._trainable = trainable
        self._listening: weakref.finalize[..., DoRALayer] | None = None

    def __repr__(self) -> str:
        facts = [type(self._model).__name__, f"{len(self._layers)} layers", rank_in_words([*self.matched.values()])]
        return f"Injection({', '.join(filter(None, facts))})"

    @property
    def matched(self) -> dict[str, int]:
        """Layer path -> rank."""
        return {path: layer.adapter.down.shape[0] for path, layer in self._layers.items()}

    def parameters(self) -> list[nn.Parameter]:
        """Every A, B and m that is trained, fp32."""
        return [parameter for parameter in self.named_parameters().values() if parameter.requires_grad]

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """`PATH.down`, `PATH.up`, `PATH.magnitude` -> parameter, frozen magnitudes too."""
        return {
            f"{path}.{name}": parameter
            for path, layer in self._layers.items()
            for name, parameter in layer.adapter.named_parameters()
        }

    def named_tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint of this injection must hold: the parameters, and PiSSA's frozen anchors."""
        anchors = {
            f"{path}.{name}": buffer
            for path, layer in self._layers.items()
            for name, buffer in layer.adapter.named_buffers()
        }
        return {**self.named_parameters(), **anchors}

    def downs(self) -> list[nn.Parameter]:
        """The A of every layer."""
        return [layer.adapter.down for layer in self._layers.values()]

    def ups(self) -> list[nn.Parameter]:
        """The B of every layer (LoRA+ gives them a higher learning rate, arXiv 2402.12354)."""
        return [layer.adapter.up for layer in self._layers.values()]

    def magnitudes(self) -> list[nn.Parameter]:
        """The trained m of every DoRA layer (they take no weight decay)."""
        found = [layer.adapter.magnitude for layer in self._layers.values()]
        return [magnitude for magnitude in found if magnitude is not None and magnitude.requires_grad]

    def keep_norms(self) -> None:
        """From now on take each layer's norm once an optimiser step, instead of at every forward.

        Right whatever torch optimiser trains (any optimiser's step makes the norms old), under gradient accumulation
        and gradient checkpointing, after `load`, `.to()`, and edits of parameters or base weights that autograd sees.
        Forwards without gradients always take the norm anew. The one thing that leaves no trace is an edit through
        `.data` by something that is no torch optimiser, between two forwards that both train: call `forget_norms`.
        """
        if self._listening is not None or not self._layers:
            return
        CLOCK.listen()
        self._listening = weakref.finalize(next(iter(self._layers.values())), CLOCK.leave)
        for layer in self._layers.values():
            layer.keeps_norm = True

    def forget_norms(self) -> None:
        """Take every norm anew at its next forward."""
        for layer in self._layers.values():
            layer.forget_norm()

    def state(self) -> AdapterState:
        """A copy of the adapter; paths are relative to the model (`state().under("unet")` for a file)."""
        return AdapterState({path: layer.adapter.state() for path, layer in self._layers.items()})

    @torch.no_grad()
    def load(self, state: AdapterState) -> None:
        """Copy an adapter's values in. Its layers, ranks and kind must be those of this injection.

        Raises:
            ValueError: a layer is missing on one side, or shapes, scale or kind differ; nothing is changed then.
        """
        if different := state.modules.keys() ^ self._layers.keys():
            raise ValueError(f"the adapter and the injection differ in {len(different)} layers, {min(different)} first")
        for path, layer in self._layers.items():
            _check_loadable(path, state.modules[path].as_pair(), layer)
        for path, layer in self._layers.items():
            _copy_in(state.modules[path].as_pair(), layer.adapter)
        self.forget_norms()

    def eject(self) -> nn.Module:
        """Put the base layers back; the model is bit for bit what it was before, and trains what it trained before."""
        for path, layer in self._layers.items():
            self._model.set_submodule(path, layer.base)
        for parameter in self._trainable:
            parameter.requires_grad_(True)
        self._layers.clear()
        if self._listening is not None:
            self._listening()
            self._listening = None
        return self._model


def _check_loadable(path: str, module: ModuleState, layer: DoRALayer) -> None:
    check_shapes(path, module, layer.base)
    own = layer.adapter.state()
    if module.axis != "out":
        raise ValueError(f"{path}: magnitudes of the {module.axis} axis can be drawn with, not trained")
    if module.rank != own.rank or not math.isclose(module.scale, own.scale, rel_tol=1e-6):
        raise ValueError(
            f"{path}: the adapter has rank {module.rank} and scale {module.scale:g}, "
            f"expected {own.rank} and {own.scale:g}"
        )
    if (module.magnitude is None) != (own.magnitude is None):
        raise ValueError(f"{path}: one side is DoRA and the other plain LoRA")


def _copy_in(module: ModuleState, adapter: Adapter) -> None:
    own = adapter.down.shape[0]
    adapter.down.copy_(module.down[:own].reshape(adapter.down.shape))
    adapter.up.copy_(module.up[:, :own].reshape(adapter.up.shape))
    if adapter.anchor_down is not None and adapter.anchor_up is not None:
        adapter.anchor_down.copy_(module.down[own:])
        adapter.anchor_up.copy_(-module.up[:, own:])
    if adapter.magnitude is not None and module.magnitude is not None:
        adapter.magnitude.copy_(module.magnitude)


def inject(model: nn.Module, config: DoRAConfig, *, generator: torch.Generator | None = None) -> Injection:
    """Put an adapter beside every targeted layer and freeze the rest of the model.

    At once the model draws exactly what it drew before: B is 0 and every gain is 1.

    Args:
        model: any module; UNet, transformer, text encoder.
        config: rank, targets, kind.
        generator: the randomness of A; None seeds one with 0.

    Returns:
        The injection, with the parameters to train and `eject()`.

    Raises:
        ValueError: nothing matches, a match cannot be adapted, or the model holds an adapter already.
    """
    if any(isinstance(module, Adapter | BlendedLayer) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} holds an adapter already: eject it, or unload its manager, first")
    generator = generator or torch.Generator().manual_seed(0)
    targets = {path: check_adaptable(path, model.get_submodule(path)) for path in target_paths(model, config)}
    ranks = _by_pattern("rank_pattern", config.rank_pattern, list(targets), config.rank)
    alphas = _by_pattern("alpha_pattern", config.alpha_pattern, list(targets), config.alpha)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    layers = {
        path: _layer(base, config, rank=ranks[path], alpha=alphas[path], generator=generator)
        for path, base in targets.items()
    }
    _warn_of_zero_rows(layers)
    for parameter in trainable:
        parameter.requires_grad_(False)
    for path, layer in layers.items():
        layer.train(model.training)
        model.set_submodule(path, layer)
    return Injection(model, layers, trainable)


def _by_pattern(name: str, patterns: Mapping[str, Number], paths: list[str], default: Number) -> dict[str, Number]:
    """Path -> the value of the first pattern that its end matches, or the default."""
    compiled = {pattern: _pattern(name, rf"(?:.*\.)?(?:{pattern})") for pattern in patterns}
    found = {
        path: next((pattern for pattern, regex in compiled.items() if regex.fullmatch(path)), None) for path in paths
    }
    if unused := [pattern for pattern in patterns if pattern not in found.values()]:
        raise ValueError(f"{name}: {unused[0]!r} decides for none of the {len(paths)} targeted layers")
    return {path: default if pattern is None else patterns[pattern] for path, pattern in found.items()}


def _layer(base: Base, config: DoRAConfig, *, rank: int, alpha: float, generator: torch.Generator) -> DoRALayer:
    weight, scale = dense_weight(base), scale_of(alpha, rank, rank_stabilised=config.use_rslora)
    if config.init == "pissa":
        pair = principal_pair(weight, rank, scale, generator)
    elif isinstance(base, nn.Embedding):
        pair = embedding_pair(tuple(weight.shape), rank, generator)
    else:
        pair = initial_pair(tuple(weight.shape), rank, config.init, generator)
    magnitude = initial_magnitude(weight) if config.use_dora else None
    adapter = Adapter(pair.to(weight.device, master_dtype(weight.dtype)), magnitude, scale=scale)
    if adapter.magnitude is not None:
        adapter.magnitude.requires_grad_(config.train_magnitude)
    return DoRALayer(base, adapter, dropout=config.dropout, norm_grad=config.norm_grad)


def _warn_of_zero_rows(layers: Mapping[str, DoRALayer]) -> None:
    """Say once how many rows have no direction for a magnitude to scale."""
    magnitudes = {path: layer.adapter.magnitude for path, layer in layers.items()}
    counts = {
        path: count_zero_rows(magnitude.detach())
        for path, magnitude in magnitudes.items()
        if magnitude is not None and not magnitude.is_meta
    }
    if total := sum(counts.values()):
        where = [path for path, count in counts.items() if count]
        warnings.warn(
            f"{total} rows of {len(where)} layers ({where[0]} first) are zero in the base: their gain stays 1 and they "
            "adapt as plain LoRA",
            stacklevel=3,
        )


def target_paths(model: nn.Module, config: DoRAConfig) -> list[str]:
    """The paths of the layers that `config.target_modules` names, in the model's order; a ValueError when none."""
    paths = [path for path, _ in model.named_modules() if path]
    endings = _endings(model, config.target_modules)
    if endings is None:
        pattern = _pattern("target_modules", str(config.target_modules))
        found = [path for path in paths if pattern.fullmatch(path)]
    else:
        unused = [end for end in endings if not any(ends_with(path, end) for path in paths)]
        if isinstance(config.target_modules, list) and unused:
            raise ValueError(f"target_modules: {unused[0]!r} matches no layer of {type(model).__name__}")
        found = [path for path in paths if any(ends_with(path, end) for end in endings)]
    if not found:
        raise ValueError(f"target_modules={config.target_modules!r} matches no layer of {type(model).__name__}")
    return found


def _pattern(name: str, text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f"{name}: {text!r} is no regular expression ({error})") from None


def _endings(model: nn.Module, targets: str | list[str] | None) -> tuple[str, ...] | None:
    """Path endings for a preset or list; None when `targets` is a regular expression."""
    if isinstance(targets, list):
        return tuple(targets)
    component = component_of_model(model)
    if component is None and targets is None:
        raise ValueError(f"{type(model).__name__} is of no family known here: name its layers in target_modules")
    presets = component.presets if component else {}
    return presets.get(targets or "attention")
