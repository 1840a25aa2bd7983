"""The same adapter as each library builds it, beside the same base layers, and ways to put one of them into a model."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dora_diffusion import DoRAConfig, inject
from dora_diffusion.layers.base_layers import logical_shape

RANK = 16
# Not 0 and not large: a trained adapter's size.
UP_STD = 0.01
# How far m lies from N(W), at most: enough that a library which left m out would be seen.
MAGNITUDE_SHIFT = 0.2
# Largest difference of two libraries over the largest output. Less than what m changes, so that the check can fail.
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Variant:
    """One library's layers for a model.

    Attributes:
        layers: by path.
        parameters: that train.
        refresh: what is done once before a step of it, beside its forward: our norms are taken all at once.
    """

    layers: Mapping[str, nn.Module]
    parameters: tuple[nn.Parameter, ...]
    refresh: Callable[[], None] = lambda: None


Build = Callable[[nn.Module, list[str], int], Variant]


def put(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Set a variant's layers into the model."""
    for path, layer in layers.items():
        model.set_submodule(path, layer)


@contextlib.contextmanager
def standing(model: nn.Module, variant: Variant, bases: Mapping[str, nn.Module]) -> Iterator[None]:
    """A variant's layers for a while."""
    put(model, variant.layers)
    try:
        yield
    finally:
        put(model, bases)


def _gather(model: nn.Module, paths: list[str]) -> Variant:
    layers = {path: model.get_submodule(path) for path in paths}
    found = dict.fromkeys(p for layer in layers.values() for p in layer.parameters() if p.requires_grad)
    return Variant(layers, tuple(found))


def _peft(use_dora: bool) -> Build:
    def build(model: nn.Module, paths: list[str], rank: int) -> Variant:
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=paths, use_dora=use_dora)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that an earlier variant left its config on the model
            inject_adapter_in_model(config, model)
        return _gather(model, paths)

    return build


def _lycoris(model: nn.Module, paths: list[str], rank: int) -> Variant:
    from lycoris.modules.locon import LoConModule

    layers = {}
    for path in paths:
        base = model.get_submodule(path)
        layers[path] = LoConModule(path, base, 1.0, rank, rank, weight_decompose=True, wd_on_out=True)
        layers[path].to(base.weight.device)
    put(model, layers)
    return _gather(model, paths)


def _ours(*, use_dora: bool = True, norm_grad: str = "detached", keeps_norms: bool = True) -> Build:
    def build(model: nn.Module, paths: list[str], rank: int) -> Variant:
        config = DoRAConfig(
            rank=rank,
            alpha=rank,
            target_modules=paths,
            use_dora=use_dora,
            norm_grad="exact" if norm_grad == "exact" else "detached",
        )
        injection = inject(model, config)
        if not keeps_norms:
            return _gather(model, paths)
        injection.keep_norms()
        return replace(_gather(model, paths), refresh=injection.refresh_norms)

    return build


BUILDS: dict[str, Build] = {
    "PEFT LoRA": _peft(False),
    "PEFT DoRA": _peft(True),
    "LyCORIS DoRA": _lycoris,
    "our LoRA": _ours(use_dora=False),
    "our DoRA": _ours(),
    "our DoRA, norms not kept": _ours(keeps_norms=False),
    "our DoRA, exact": _ours(norm_grad="exact"),
}


def build(model: nn.Module, paths: list[str], names: list[str], rank: int = RANK) -> dict[str, Variant]:
    """Variants by name, all with the same A, B and m; the model stands as it did."""
    model.requires_grad_(False)
    bases = {path: model.get_submodule(path) for path in paths}
    variants = {}
    for name in names:
        variants[name] = BUILDS[name](model, paths, rank)
        put(model, bases)
    for path, base in bases.items():
        generator = torch.Generator().manual_seed(len(path))
        out, *rest = logical_shape(base)
        down = torch.randn(rank, *rest, generator=generator) / rank
        up = UP_STD * torch.randn(out, rank, *[1] * (len(rest) - 1), generator=generator)
        for variant in variants.values():
            _fill(variant.layers[path], down, up)
    return variants


@torch.no_grad()
def _fill(layer: nn.Module, down: Tensor, up: Tensor) -> None:
    """Copy A and B in, under each library's names, and move m off the norm of the base's rows that all start from."""
    if hasattr(layer, "adapter"):
        pair, magnitude = (layer.adapter.down, layer.adapter.up), layer.adapter.magnitude
    elif hasattr(layer, "lora_A"):
        pair = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        vectors = layer.lora_magnitude_vector
        magnitude = vectors["default"].weight if "default" in vectors else None
    else:
        pair, magnitude = (layer.lora_down.weight, layer.lora_up.weight), layer.dora_scale
    pair[0].copy_(down)
    pair[1].copy_(up)
    if magnitude is not None:
        factors = torch.linspace(1 - MAGNITUDE_SHIFT, 1 + MAGNITUDE_SHIFT, magnitude.numel(), device=magnitude.device)
        magnitude.mul_(factors.reshape(magnitude.shape))


@torch.no_grad()
def check_agreement(call: Callable[[], Tensor], model: nn.Module, variants: Mapping[str, Variant]) -> None:
    """Raise when the DoRAs, or the LoRAs, do not compute the same thing: there would be nothing to compare.

    Raise in fp32, too, when a LoRA agrees with a DoRA: then the check could not have told them apart. In bf16 it often
    cannot.
    """
    bases = {path: _base(layer) for path, layer in next(iter(variants.values())).layers.items()}
    answers = {}
    for name, variant in variants.items():
        with standing(model, variant, bases):
            answer = call()
            answers[name] = answer.float()
    dtype = answer.dtype
    limit = AGREEMENT[dtype]
    firsts = []
    for kind in ("DoRA", "LoRA"):
        same = {name: answer for name, answer in answers.items() if kind in name}
        firsts += list(same.values())[:1]
        for name, answer in same.items():
            error = _difference(answer, firsts[-1])
            if not error <= limit:  # NaN is no agreement
                raise AssertionError(f"{name} differs from {next(iter(same))} by {error:.1e}")
    if dtype == torch.float32 and len(firsts) == 2 and _difference(*firsts) < 2 * limit:
        raise AssertionError(f"LoRA and DoRA differ by {_difference(*firsts):.1e} only: the check tells nothing")


def _difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def _base(layer: nn.Module) -> nn.Module:
    if hasattr(layer, "base_layer"):
        return layer.base_layer
    return layer.base if hasattr(layer, "base") else layer.org_module[0]
