"""Put DoRA layers into a model, and take them out again so that the model is what it was."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from dora_diffusion.families import component_of_model
from dora_diffusion.layers import Adaptable, Adapter, DoRAConv2d, DoRALinear, NormGrad, check_adaptable, check_shapes
from dora_diffusion.state import AdapterState

TrainableLayer = DoRALinear | DoRAConv2d


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
    """

    rank: int = 8
    alpha: float = 8.0
    target_modules: str | list[str] | None = None
    dropout: float = 0.0
    use_dora: bool = True
    norm_grad: NormGrad = "detached"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}")


class Injection:
    """What `inject` did to a model: its layers, their parameters, and the way back."""

    def __init__(self, model: nn.Module, layers: Mapping[str, TrainableLayer], trainable: list[nn.Parameter]) -> None:
        self._model = model
        self._layers = dict(layers)
        self._trainable = trainable

    @property
    def matched(self) -> dict[str, int]:
        """Layer path -> rank."""
        return {path: layer.adapter.down.shape[0] for path, layer in self._layers.items()}

    def parameters(self) -> list[nn.Parameter]:
        """Every A, B and m, fp32."""
        return [parameter for layer in self._layers.values() for parameter in layer.adapter.parameters()]

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """`PATH.down`, `PATH.up`, `PATH.magnitude` -> parameter."""
        return {
            f"{path}.{name}": parameter
            for path, layer in self._layers.items()
            for name, parameter in layer.adapter.named_parameters()
        }

    def magnitudes(self) -> list[nn.Parameter]:
        """The m of every DoRA layer (they take no weight decay)."""
        return [layer.adapter.magnitude for layer in self._layers.values() if layer.adapter.magnitude is not None]

    def state(self) -> AdapterState:
        """A copy of the adapter; paths are relative to the model (`state().under("unet")` for a file)."""
        return AdapterState({path: layer.adapter.state() for path, layer in self._layers.items()})

    @torch.no_grad()
    def load(self, state: AdapterState) -> None:
        """Copy an adapter's values in. Its layers, ranks and kind must be those of this injection.

        Raises:
            ValueError: a layer is missing on one side, or shapes, scale or kind differ.
        """
        if different := state.modules.keys() ^ self._layers.keys():
            raise ValueError(f"the adapter and the injection differ in {len(different)} layers, {min(different)} first")
        for path, layer in self._layers.items():
            module, adapter = state.modules[path], layer.adapter
            check_shapes(path, module, layer.base)
            if module.down.shape != adapter.down.shape or module.scale != adapter.scale:
                raise ValueError(
                    f"{path}: the adapter has rank {module.rank} and scale {module.scale:g}, "
                    f"expected {adapter.down.shape[0]} and {adapter.scale:g}"
                )
            if (module.magnitude is None) != (adapter.magnitude is None):
                raise ValueError(f"{path}: one side is DoRA and the other plain LoRA")
            adapter.down.copy_(module.down)
            adapter.up.copy_(module.up)
            if adapter.magnitude is not None and module.magnitude is not None:
                adapter.magnitude.copy_(module.magnitude)

    def eject(self) -> nn.Module:
        """Put the base layers back; the model is bit for bit what it was before, and trains what it trained before."""
        for path, layer in self._layers.items():
            self._model.set_submodule(path, layer.base)
        for parameter in self._trainable:
            parameter.requires_grad_(True)
        self._layers.clear()
        return self._model


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
    if any(isinstance(module, Adapter) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} holds an adapter already: eject it first")
    generator = generator or torch.Generator().manual_seed(0)
    targets = {path: check_adaptable(path, model.get_submodule(path)) for path in target_paths(model, config)}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    layers = {path: _layer(base, config, generator) for path, base in targets.items()}
    for path, layer in layers.items():
        layer.train(model.training)
        model.set_submodule(path, layer)
    return Injection(model, layers, trainable)


def _layer(base: Adaptable, config: DoRAConfig, generator: torch.Generator) -> TrainableLayer:
    adapter = Adapter(base, rank=config.rank, alpha=config.alpha, use_dora=config.use_dora, generator=generator)
    if isinstance(base, nn.Conv2d):
        return DoRAConv2d(base, adapter, dropout=config.dropout, norm_grad=config.norm_grad)
    return DoRALinear(base, adapter, dropout=config.dropout, norm_grad=config.norm_grad)


def target_paths(model: nn.Module, config: DoRAConfig) -> list[str]:
    """The paths of the layers that `config.target_modules` names, in the model's order; a ValueError when none."""
    paths = [path for path, _ in model.named_modules() if path]
    endings = _endings(model, config.target_modules)
    if endings is None:
        pattern = _pattern(str(config.target_modules))
        found = [path for path in paths if pattern.fullmatch(path)]
    else:
        unused = [end for end in endings if not any(_ends_with(path, end) for path in paths)]
        if isinstance(config.target_modules, list) and unused:
            raise ValueError(f"target_modules: {unused[0]!r} matches no layer of {type(model).__name__}")
        found = [path for path in paths if any(_ends_with(path, end) for end in endings)]
    if not found:
        raise ValueError(f"target_modules={config.target_modules!r} matches no layer of {type(model).__name__}")
    return found


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f"target_modules: {text!r} is no regular expression ({error})") from None


def _ends_with(path: str, ending: str) -> bool:
    return path == ending or path.endswith("." + ending)


def _endings(model: nn.Module, targets: str | list[str] | None) -> tuple[str, ...] | None:
    """Path endings for a preset or list; None when `targets` is a regular expression."""
    if isinstance(targets, list):
        return tuple(targets)
    component = component_of_model(model)
    if component is None and targets is None:
        raise ValueError(f"{type(model).__name__} is of no family known here: name its layers in target_modules")
    presets = component.presets if component else {}
    return presets.get(targets or "attention")
