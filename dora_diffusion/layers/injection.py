"""Put DoRA layers into a model, and take them out again so that the model is what it was."""

import math
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dora_diffusion.functional.dora import count_zero_rows, initial_magnitude, master_dtype, scale_of
from dora_diffusion.functional.row_changes import RowChanges
from dora_diffusion.layers.base_layers import Base, check_adaptable, check_shapes, dense_weight
from dora_diffusion.layers.blended import BlendedLayer
from dora_diffusion.layers.config import DoRAConfig
from dora_diffusion.layers.dora import Adapter, DoRALayer, refresh
from dora_diffusion.layers.initialisation import embedding_pair, initial_pair, principal_pair
from dora_diffusion.layers.step_counter import CLOCK
from dora_diffusion.layers.targets import by_pattern, target_paths
from dora_diffusion.state import AdapterState, ModuleState, rank_in_words


class Injection:
    """What `inject` did to a model: its layers, their parameters, and the way back.

    Examples:
        ```python
        import torch
        from torch import nn

        import dora_diffusion as dd

        model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
        injection = dd.inject(model, dd.DoRAConfig(rank=4, target_modules=["0", "2"]))
        injection.keep_norms()  # one norm a layer and optimiser step
        optimizer = torch.optim.AdamW(injection.parameters(), lr=1e-3)
        for _ in range(3):
            model(torch.randn(16, 32)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        adapter = injection.state()
        injection.eject()  # the very layers that were there before
        assert isinstance(model[0], nn.Linear)
        ```
    """

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

    def scale(self, path: str) -> float:
        """s of a layer's D = s B A."""
        return self._layers[path].adapter.scale

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

    def refresh_norms(self) -> None:
        """Take every norm that is old, now: with one wait for the device in all, where each layer would have its own.

        Until an optimiser steps or a parameter is edited, forwards use them, with gradients or without (so do previews
        and validation), and a compiled model reads them without a break of its graph. Call it before the forwards of
        each step; it keeps norms from then on, as `keep_norms` does.
        """
        refresh_norms([self])

    def forget_norms(self) -> None:
        """Take every norm anew at its next forward."""
        for layer in self._layers.values():
            layer.forget_norm()

    @contextmanager
    def off(self) -> Iterator[None]:
        """While the block lasts the model computes what it did before; nothing of the adapter is lost or forgotten."""
        were = {path: layer.is_off for path, layer in self._layers.items()}
        for layer in self._layers.values():
            layer.is_off = True
        try:
            yield
        finally:
            for path, layer in self._layers.items():
                layer.is_off = were[path]

    @contextmanager
    def at_strength(self, strength: float) -> Iterator[None]:
        """While the block lasts weights are W + strength (W' - W); 1 is the adapter as it is, 0 the base."""
        were = {path: layer.strength for path, layer in self._layers.items()}
        for layer in self._layers.values():
            layer.strength = strength
        try:
            yield
        finally:
            for path, layer in self._layers.items():
                layer.strength = were[path]

    def row_changes(self) -> dict[str, RowChanges]:
        """Layer path -> how far the rows of its weight have turned and stretched."""
        return {path: layer.row_changes() for path, layer in self._layers.items()}

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


def refresh_norms(injections: Iterable[Injection]) -> None:
    """`Injection.refresh_norms` of several, with one wait for the device in all."""
    layers: list[DoRALayer] = []
    for injection in injections:
        injection.keep_norms()
        layers += injection._layers.values()
    refresh(layers)


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

    Examples:
        ```python
        import dora_diffusion as dd

        pipe = dd.load_pipeline("pocket")
        injection = dd.inject(pipe.unet, dd.DoRAConfig(rank=4))  # the attention layers
        print(sum(parameter.numel() for parameter in injection.parameters()), "numbers to train")
        injection.eject()
        ```
    """
    if any(isinstance(module, Adapter | BlendedLayer) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} holds an adapter already: eject it, or unload its manager, first")
    generator = generator or torch.Generator().manual_seed(0)
    targets = {
        path: check_adaptable(path, model.get_submodule(path)) for path in target_paths(model, config.target_modules)
    }
    ranks = by_pattern("rank_pattern", config.rank_pattern, list(targets), config.rank)
    alphas = by_pattern("alpha_pattern", config.alpha_pattern, list(targets), config.alpha)
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
