"""Blend whole adapters: layer by layer, so that no more than one layer is ever dense."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dora_diffusion.blending.exact import why_weight
from dora_diffusion.blending.layer import blend_layer
from dora_diffusion.blending.layer_inputs import Made, Piece, piece_of
from dora_diffusion.blending.reports import (
    BLEND_SENTENCES,
    Blended,
    BlendOptions,
    BlendReport,
    LayerReport,
)
from dora_diffusion.functional.blend_modes import ACTIVE_AT_ZERO, IN_ORDER, MODES
from dora_diffusion.functional.strengths import Weight, check_strength, is_meant, strength_at
from dora_diffusion.pipelines.base_weights import weights_of
from dora_diffusion.state import AdapterState, Module, WeightOf
from dora_diffusion.utils.progress import LayerProgress

# Facts about the base, which a blend shares with adapters that agree on them. Everything else tells of one training.
_SHARED_FACTS = (
    "dora_diffusion.family",
    "dora_diffusion.base_model",
    "modelspec.architecture",
    "modelspec.implementation",
    "modelspec.prediction_type",
    "modelspec.resolution",
    "modelspec.sai_model_spec",
)
_WORDS = "dora_diffusion.words"


def blend(
    adapters: Mapping[str, AdapterState],
    weights: Mapping[str, Weight],
    *,
    base: Any = None,
    mode: str = "compose",
    rank: int | None = None,
    options: BlendOptions | None = None,
    progress: LayerProgress | None = None,
) -> AdapterState:
    """Several adapters as one, by the arithmetic of a mode.

    The modes of whole weights (`additive`, `compose`, `peft` ...) are one adapter exactly at the sum of the ranks, but
    for `a1111` with magnitudes of the out axis, magnitudes of both axes in one layer, and strengths that cancel a row
    of the base. There, in the modes of differences (`ties` ...) and at smaller ranks a layer is the best DoRA or LoRA
    of the rank, and `blend_with_report` tells its error.

    Args:
        adapters: name -> adapter. The order counts in the modes `peft`, `comfyui` and `a1111`.
        weights: name -> its strength, or strengths by part: `{"unet": 0.8, "unet.up_blocks": 1.2}`.
        base: a pipeline, an embedded base's name, a diffusers folder or a single .safetensors file. None will do where
            plain LoRAs (or LoHa, LoKr) make a plain LoRA, in every mode but `direction-magnitude`.
        mode: a key of `BLEND_SENTENCES`.
        rank: of each layer, at most; None for the sum of the adapters' ranks.
        options: what only some modes ask for.
        progress: called after every layer.

    Returns:
        The blend, fp32, on the CPU. Vectors are added up, times their strengths. Tensors that belong to no layer are
        kept unless two adapters disagree on them.

    Raises:
        ValueError: no adapters, an unknown mode or name, a strength that is no finite number, a layer that the base
            does not have or has in another shape, both axes in one layer, tensors on which two adapters disagree.

    Examples:
        ```python
        import dora_diffusion as dd

        adapters = {"ink": dd.load_adapter("ink.safetensors"), "lego": dd.load_adapter("lego.safetensors")}
        mix = dd.blend(adapters, {"ink": 0.8, "lego": 0.4}, base="pocket")
        dd.save_adapter(mix, "mix.safetensors")
        ```
    """
    return blend_with_report(
        adapters, weights, base=base, mode=mode, rank=rank, options=options, progress=progress
    ).adapter


def blend_with_report(
    adapters: Mapping[str, AdapterState],
    weights: Mapping[str, Weight],
    *,
    base: Any = None,
    mode: str = "compose",
    rank: int | None = None,
    options: BlendOptions | None = None,
    progress: LayerProgress | None = None,
) -> Blended:
    """`blend`, and what became of each layer.

    Examples:
        ```python
        import dora_diffusion as dd

        adapters = {"ink": dd.load_adapter("ink.safetensors"), "lego": dd.load_adapter("lego.safetensors")}
        found = dd.blend_with_report(adapters, {"ink": 0.8, "lego": 0.4}, base="pocket", mode="svd", rank=4)
        print(found.report.sentence())
        dd.save_adapter(found.adapter, "mix.safetensors")
        ```
    """
    options = options or BlendOptions()
    _check(adapters, weights, mode, rank)
    names = list(adapters) if mode in IN_ORDER else sorted(adapters)
    ordered = {name: adapters[name] for name in names}
    extra, dropped = _extra(ordered, options)
    weight_of = None if base is None else weights_of(base)
    modules: dict[str, Module] = {}
    layers: dict[str, LayerReport] = {}
    paths = list(dict.fromkeys(path for adapter in ordered.values() for path in adapter.modules))
    for done, path in enumerate(paths, start=1):
        pieces = _pieces(path, ordered, weights, mode)
        if pieces:
            made, who = _blend_at(path, weight_of, pieces, mode, rank, options)
            modules[path] = made.module.to(device="cpu")
            layers[path] = LayerReport(made.module.rank, made.error, who)
        if progress is not None:
            progress(done, len(paths), path)
    vectors = _vectors(ordered, weights)
    report = BlendReport(mode, layers, len(vectors), tuple(extra), dropped)
    return Blended(AdapterState(modules, _metadata(ordered, weights, report, options), vectors, extra), report)


def _check(adapters: Mapping[str, AdapterState], weights: Mapping[str, Weight], mode: str, rank: int | None) -> None:
    if mode not in BLEND_SENTENCES:
        raise ValueError(f"mode {mode!r} is unknown; expected one of {', '.join(BLEND_SENTENCES)}")
    if not adapters:
        raise ValueError("no adapters to blend")
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    if adapters.keys() != weights.keys():
        odd = sorted(adapters.keys() ^ weights.keys())[0]
        lacks = "a strength without an adapter" if odd in weights else "an adapter without a strength"
        raise ValueError(f"{odd!r} is {lacks}: expected the same names in adapters and weights")
    for name, adapter in adapters.items():
        check_strength(name, weights[name], (*adapter.modules, *adapter.vectors))


def needs_base(
    adapters: Mapping[str, AdapterState], weights: Mapping[str, Weight], *, mode: str, options: BlendOptions
) -> bool:
    """Whether `blend` must know the base."""
    paths = dict.fromkeys(path for adapter in adapters.values() for path in adapter.modules)
    return any(
        why_weight([name for name, module, _ in found if module.magnitude is not None], mode, as_dora=options.as_dora)
        for found in (_pieces(path, adapters, weights, mode) for path in paths)
        if found
    )


def _pieces(
    path: str, adapters: Mapping[str, AdapterState], weights: Mapping[str, Weight], mode: str
) -> list[tuple[str, Module, float]]:
    """Adapters that have the layer and are turned on there."""
    found = []
    for name, adapter in adapters.items():
        strength = strength_at(path, weights[name])
        is_on = strength != 0 or (mode in ACTIVE_AT_ZERO and is_meant(path, weights[name]))
        if path in adapter.modules and is_on:
            found.append((name, adapter.modules[path], strength))
    return found


def _blend_at(
    path: str,
    weight_of: WeightOf | None,
    found: Sequence[tuple[str, Module, float]],
    mode: str,
    rank: int | None,
    options: BlendOptions,
) -> tuple[Made, tuple[str, ...]]:
    weight = None if weight_of is None else weight_of(path).detach()
    pieces: list[Piece] = [piece_of(name, module, strength, weight, path) for name, module, strength in found]
    why = why_weight([piece.name for piece in pieces if piece.is_dora], mode, as_dora=options.as_dora)
    if weight is None and why:
        raise ValueError(
            f"{path}: {why}; give base= a pipeline, the name of an embedded base, a folder or a file (--base)"
        )
    try:
        made = blend_layer(path, weight, pieces, mode, rank, options)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return made, tuple(piece.name for piece in pieces)


def _vectors(adapters: Mapping[str, AdapterState], weights: Mapping[str, Weight]) -> dict[str, Tensor]:
    """sum s_i v_i, fp32."""
    total: dict[str, Tensor] = {}
    for name, adapter in adapters.items():
        for path, vector in adapter.vectors.items():
            strength = strength_at(path, weights[name])
            if strength == 0:
                continue
            added = strength * vector.to(dtype=torch.float32, device="cpu")
            if path in total and total[path].shape != added.shape:
                raise ValueError(
                    f"{path}: {name!r} has {tuple(added.shape)} numbers, another adapter {tuple(total[path].shape)}; "
                    "are they for the same base model?"
                )
            total[path] = total[path] + added if path in total else added
    return total


def _extra(adapters: Mapping[str, AdapterState], options: BlendOptions) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Tensors that belong to no layer: what only one adapter has, or all alike; and the keys of the others."""
    kept: dict[str, Tensor] = {}
    odd: dict[str, None] = {}
    for name, adapter in adapters.items():
        for key, tensor in adapter.extra.items():
            if key not in kept or _same(kept[key], tensor):
                kept[key] = tensor
            elif options.extra == "refuse":
                raise ValueError(
                    f"{name!r} and another adapter hold different tensors {key!r}, which belong to no known layer; "
                    "extra='drop' blends without them"
                )
            else:
                odd[key] = None
    return {key: tensor for key, tensor in kept.items() if key not in odd}, tuple(odd)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.cpu(), other.cpu())


def _metadata(
    adapters: Mapping[str, AdapterState], weights: Mapping[str, Weight], report: BlendReport, options: BlendOptions
) -> dict[str, str]:
    """Facts of the blend, and those about the base on which the adapters agree; nothing of any one training."""
    all_facts = [adapter.metadata for adapter in adapters.values()]
    shared = {
        key: all_facts[0][key]
        for key in _SHARED_FACTS
        if key in all_facts[0] and all(facts.get(key) == all_facts[0][key] for facts in all_facts)
    }
    words = dict.fromkeys(word for facts in all_facts for word in facts.get(_WORDS, "").split())
    facts = {
        "mode": report.mode,
        "names": json.dumps(list(adapters), ensure_ascii=False),
        "weights": json.dumps({name: weights[name] for name in adapters}, ensure_ascii=False, default=dict),
        "result": report.sentence(),
    }
    if report.mode not in MODES:
        facts |= {"density": str(options.density), "seed": str(options.seed), "elect": options.elect}
    return {
        **shared,
        **({_WORDS: " ".join(words)} if words else {}),
        **{f"dora_diffusion.blend.{key}": value for key, value in facts.items()},
        "modelspec.merged_from": ", ".join(
            adapter.metadata.get("modelspec.title", name) for name, adapter in adapters.items()
        ),
    }
