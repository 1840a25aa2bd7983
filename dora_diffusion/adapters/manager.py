"""AdapterManager: several adapters on one diffusers pipeline, blended additively or as other tools blend.

    W' = W + sum_i strength_i (W'_i - W)

Strength 0 is the base bit for bit, strength 1 what was trained; the order of adapters is nothing. Every layer's mix is
one gain form (see `functional`), so drawing costs one base product and one low-rank pair however many adapters. The
other modes of `blend_modes` are no such sum: their weights are computed densely and fused in, until the strengths
change.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dora_diffusion.adapters.bias_offsets import Offsets
from dora_diffusion.adapters.blended_layers import Slots
from dora_diffusion.adapters.bundled_words import BundledWords
from dora_diffusion.adapters.call_hooks import CallHooks, refuse_fused_projections
from dora_diffusion.adapters.denoiser_hooks import DenoiserHooks
from dora_diffusion.adapters.files import AdapterReader
from dora_diffusion.adapters.holders import refuse_held, take_over
from dora_diffusion.adapters.matching import Fitted, Loaded, LoadReport, fit, kind_in_words
from dora_diffusion.adapters.mode_weights import mode_changes
from dora_diffusion.formats.bundled_words import word_of
from dora_diffusion.functional.blend_modes import ADDITIVE, MODES
from dora_diffusion.functional.masks import mask_of
from dora_diffusion.functional.schedules import schedule_of
from dora_diffusion.functional.strengths import (
    Weight,
    Weights,
    WeightsOfNames,
    check_strength,
    is_felt,
    strengths_by_name,
)
from dora_diffusion.layers.base_layers import dense_weight
from dora_diffusion.layers.fuse import FusedWeights, check_fusable, fuse_weights, fuse_weights_by
from dora_diffusion.layers.targets import preset_paths, target_paths
from dora_diffusion.pipelines.components import adaptable_models, as_pipeline, denoisers_of, name_of_pipeline
from dora_diffusion.pipelines.modules import PipelineModules, at_hand
from dora_diffusion.pipelines.textual_inversion import WordState, bundled_words
from dora_diffusion.state import AdapterState
from dora_diffusion.utils.checks import check_type
from dora_diffusion.utils.locks import Lock

Method = Callable[..., Any]


def _alone(method: Method) -> Method:
    """Let a method of the manager run by itself: other threads' calls come first."""

    @wraps(method)
    def locked(self: "AdapterManager", *arguments: Any, **keywords: Any) -> Any:
        with self._lock:
            return method(self, *arguments, **keywords)

    return locked


class AdapterManager:
    """Adapters of one pipeline. The pipeline stays an ordinary diffusers pipeline throughout.

    Any pipeline will do, of whatever class, and a model by itself: layers only ask for its modules. A component that is
    replaced (`pipe.unet = other`) gets the adapters at the next call that loads or sets something.

    Args:
        pipe: a diffusers pipeline, a modular one, an object that has models as attributes, or a model.

    Raises:
        ValueError: there is no model in it that adapters could change.

    Examples:
        ```python
        import dora_diffusion as dd

        pipe = dd.load_pipeline("pocket")
        manager = dd.AdapterManager(pipe)
        manager.load_adapter("ink.safetensors", name="ink")
        manager.load_adapter("lego.safetensors", name="lego")
        manager.set_adapters(["ink", "lego"], [0.8, 0.4])  # as diffusers takes them; and by part:
        manager.set_adapters({"ink": 0.8, "lego": {"unet": 0.4, "text_encoder": 0.0}})
        manager.set_schedule("ink", [(0.0, 0.0), (0.3, 1.0)])  # it fades in
        picture = pipe("a castle on the beach", num_inference_steps=4).images[0]

        manager.set_schedule("ink", None)
        manager.fuse()  # drawing costs what the base costs
        manager.unfuse()
        manager.unload()  # the base, bit for bit
        ```
    """

    def __init__(self, pipe: Any) -> None:
        pipe = as_pipeline(pipe)
        if not adaptable_models(pipe):
            raise ValueError(
                f"{type(pipe).__name__} has no denoiser, text encoder or ControlNet that adapters could change; "
                "expected a pipeline that is loaded, or a model"
            )
        self._pipe = pipe
        self._pipe_modules = PipelineModules(pipe)
        self._reader = AdapterReader(pipe, self._pipe_modules, self._base_weight)
        self._slots = Slots(self._pipe_modules)
        self._offsets = Offsets(self._pipe_modules)
        self._words = BundledWords(pipe)
        self._adapters: dict[str, Loaded] = {}
        self._weights: dict[str, Weight] = {}
        self._blend = ADDITIVE
        self._fused: FusedWeights | None = None  # of `fuse`, or of a mode that is not additive
        self._lock = Lock()
        self._scales: dict[str, float] = {}  # of the call that is being drawn, by component
        self._hooks = DenoiserHooks(pipe, self._set_strengths)
        self._calls = CallHooks(pipe, self._lock, self._set_scale)

    def __repr__(self) -> str:
        held = {name: self._weights.get(name, 0.0) for name in self._adapters}
        adapters = ", ".join(f"{name} {weight}" for name, weight in held.items()) or "no adapters"
        blend = "" if self._blend == ADDITIVE else f"; {self._blend}"
        return f"AdapterManager({name_of_pipeline(self._pipe)}: {adapters}{blend}{'; fused' if self._is_fused else ''})"

    @property
    def names(self) -> tuple[str, ...]:
        """Loaded adapters, in the order of loading."""
        return tuple(self._adapters)

    @property
    def weights(self) -> dict[str, Weight]:
        """Strengths as last set; an adapter not named has 0."""
        return dict(self._weights)

    @property
    def active(self) -> dict[str, Weight]:
        """The adapters that change what is drawn now, and their strengths."""
        return {name: weight for name, weight in self._weights.items() if is_felt(weight)}

    @property
    def loaded(self) -> dict[str, LoadReport]:
        """The adapters that are loaded, whatever their strengths: name -> what was loaded; `reports` is the same."""
        return self.reports

    @property
    def blend(self) -> str:
        """The mode that the adapters are mixed by, as last set: a key of `blend_modes.MODES`."""
        return self._blend

    @property
    def reports(self) -> dict[str, LoadReport]:
        """Name -> what was loaded."""
        return {name: loaded.report for name, loaded in self._adapters.items()}

    def paths(self, name: str) -> tuple[str, ...]:
        """Everything that a loaded adapter changes: layers and parameters, by their full paths."""
        return self._loaded(name).paths

    def _base_weight(self, path: str) -> Tensor:
        """What tells the axis of a magnitude when its file does not."""
        return dense_weight(self._pipe_modules.layer(path)[1])

    @_alone
    @torch.no_grad()
    def load_adapter(self, source: str | Path | AdapterState, *, name: str, strict: bool = True) -> LoadReport:
        """Load an adapter under a name, at strength 0 (call `set_adapters` next); a run's folder will do for its file.

        `strict=False` loads the layers that can be computed of a file that holds others beside them. New words that
        the file bundles are read in prompts while the adapter has a strength; the report names them.

        Raises:
            ValueError: the name is taken, or the file is broken or of another base: one line, with a count.
        """
        check_type("load_adapter: name", name, str)
        check_type("load_adapter: source", source, str | Path | AdapterState)
        if name in self._adapters:
            raise ValueError(f"an adapter named {name!r} is loaded already; delete it first or choose another name")
        self._refuse_while_fused("load an adapter")
        self._follow()
        adapter, fitted, sha256 = self._reader.read(source, name, strict=strict)
        label = name if isinstance(source, AdapterState) else str(source)
        words, notes = self._bundled(adapter, label)
        refuse_fused_projections([self._pipe_modules.place(path) for path in fitted.modules])
        self._slots.check_reserved(label, fitted.modules)
        report = LoadReport(
            name=name,
            kind=kind_in_words(adapter),
            ranks=adapter.ranks,
            matched=len(fitted.modules),
            total=len(adapter.modules),
            vectors=len(fitted.vectors),
            extra=sum(word_of(key) is None for key in adapter.extra),
            components=adapter.components,
            sha256=sha256,
            metadata=adapter.metadata,
            words=tuple(state.word for state in words),
            notes=notes,
        )
        take_over(self, {part: self._pipe_modules.model(part) for part in adapter.components})
        with self._unfolded():  # gain forms are of the base's own weights
            terms = self._slots.terms(fitted.modules)
            self._adapters[name] = Loaded(fitted.modules, fitted.vectors, terms, report, words)
            self._install()
        return report

    def _bundled(self, adapter: AdapterState, label: str) -> tuple[tuple[WordState, ...], tuple[str, ...]]:
        try:
            return bundled_words(self._pipe, adapter.extra)
        except ValueError as error:
            raise ValueError(f"{label}: {error}") from None

    @_alone
    def set_adapters(self, weights: Weights, adapter_weights: WeightsOfNames = None, blend: str = ADDITIVE) -> None:
        """Set the strengths: `{"ink": 0.8}` or by part, `{"ink": {"unet": 0.8, "unet.up_blocks": 1.2}}`.

        The longest prefix that fits a layer decides; a layer no prefix fits gets 0. Adapters not named get 0.

        Args:
            weights: adapter -> strength; or, as diffusers takes them, a name or names beside `adapter_weights`:
                `set_adapters(["ink", "lego"], [0.8, 0.4])`. Order counts in the modes "peft", "comfyui" and "a1111".
            adapter_weights: beside names: one strength for all, or one for each; None is 1.
            blend: a key of `blend_modes.MODES`. Any but "additive" is computed densely and fused into the weights: a
                change of strengths takes as long as a `fuse`, and strengths cannot change as the picture is drawn.
                Where a strength of 0 is not the base in the tool that a mode follows, it is not here either.

        Raises:
            ValueError: an unknown adapter or mode, a part that fits none of its layers, a strength that is no finite
                number, not as many strengths as names, or a mode that cannot mix these adapters here. Whatever is
                raised, nothing has changed then.
        """
        self._refuse_while_fused("change strengths")
        self._follow()
        if isinstance(adapter_weights, str):  # set_adapters({"ink": 0.8}, "comfyui")
            adapter_weights, blend = None, adapter_weights
        weights = strengths_by_name(weights, adapter_weights)
        for name, weight in weights.items():
            check_strength(name, weight, self._loaded(name).paths)
        self._words.check(self._adapters, weights)
        if blend == ADDITIVE:
            self._slots.check_room(self._adapters, weights)
        else:
            self._check_blend(blend, weights)
        before = self._weights, self._blend
        try:
            self._mix({name: dict(w) if isinstance(w, Mapping) else float(w) for name, w in weights.items()}, blend)
        except BaseException:  # a mode that cannot mix these adapters, out of memory, or stopped
            self._mix(*before)
            raise

    @_alone
    def set_schedule(self, name: str, points: Sequence[Sequence[float]] | None) -> None:
        """Let an adapter's strength change over the run: `[(0.0, 0.0), (0.3, 1.0)]` fades it in; None ends it.

        The factor multiplies the strength and runs straight from point to point; progress goes from 0 at the first of
        the scheduler's timesteps to 1 at the last. Text encoders, which run before, keep the plain strength.

        Raises:
            ValueError: an unknown adapter, points that are no rising progress in 0..1 with finite factors, or a mode
                that is folded.
        """
        self._refuse_while_fused("set a schedule")
        self._refuse_while_folded("a schedule")
        self._loaded(name)
        self._follow()
        self._hooks.set_schedule(name, None if points is None else schedule_of(points))

    @_alone
    def set_mask(self, name: str, mask: Image.Image | Tensor | None) -> None:
        """Let an adapter draw in a part of the picture only: 1 (white) inside, 0 outside; None ends it.

        The denoiser is asked once more for every masked adapter and the predictions are mixed, so outside a mask the
        prediction is that without the adapter. Text encoders know no places: their part acts everywhere.

        Raises:
            ValueError: an unknown adapter, a mask that is no picture and no (height, width) tensor in 0..1, or a mode
                that is folded.
        """
        self._refuse_while_fused("set a mask")
        self._refuse_while_folded("a mask")
        self._loaded(name)
        self._follow()
        self._hooks.set_mask(name, None if mask is None else mask_of(mask))

    @_alone
    def enable_hotswap(self, *, max_rank: int, target_modules: str | list[str] | None = None) -> None:
        """Set aside room at every target layer, so that adapters come and go without recompiling a compiled model.

        Call it once, before `torch.compile`. From then on each of these layers pays for a rank of `max_rank`, used or
        not; `unload` ends it. Set schedules and masks after compiling `pipe.unet = torch.compile(pipe.unet)`: they act
        from outside the compiled model.

        Args:
            max_rank: the most that the ranks of all adapters with a strength may sum to on a layer.
            target_modules: as DoRAConfig's; names and patterns are the denoiser's, text encoders take presets.

        Raises:
            ValueError: adapters are loaded already, or a target that matches nothing.
        """
        if self._adapters:
            raise ValueError("enable_hotswap must come before the first load_adapter: call unload() first")
        check_type("enable_hotswap: max_rank", max_rank, int)
        if max_rank < 1:
            raise ValueError(f"max_rank must be at least 1, got {max_rank}")
        self._refuse_while_folded("hot swap")
        preset = None if isinstance(target_modules, list) else target_modules or "attention"
        denoisers, paths = denoisers_of(self._pipe), []
        for component, model in adaptable_models(self._pipe).items():
            inner = None if preset is None else preset_paths(model, preset)
            if inner is None and component in denoisers:
                inner = target_paths(model, target_modules)
            paths += [f"{component}.{path}" for path in inner or ()]
        self._slots.reserve(paths, max_rank)
        self._calls.install(self._slots.places, self._touched)

    @_alone
    @torch.no_grad()
    def fuse(self) -> None:
        """Fold the current mix into the base's weights: drawing then costs exactly what the base costs."""
        self._refuse_while_fused("fuse")
        self._refuse_while_folded("fuse()")
        if self._hooks.is_needed:
            raise ValueError("cannot fuse while a schedule or mask is set: strengths change as the picture is drawn")
        self._follow()
        for path, base in self._slots.bases.items():
            at_hand(path, base.weight)
        self._calls.refuse_fused_projections()
        with self._bare_words():
            self._fused = fuse_weights(self._slots.forms(self._adapters))
            self._offsets.are_saved = True
            self._slots.stand_aside()

    @_alone
    def unfuse(self) -> None:
        """Undo `fuse`: the base's weights are again what they were, bit for bit, and the mix runs beside them."""
        if not self._is_fused:
            raise ValueError("nothing is fused")
        with self._bare_words():
            self._unfold()

    @_alone
    def delete_adapter(self, name: str) -> None:
        """Forget one adapter; the others keep their strengths."""
        self._loaded(name)
        self._refuse_while_fused("delete an adapter")
        self._hooks.forget(name)
        self._words.remove()
        self._unfold()
        del self._adapters[name]
        self._weights.pop(name, None)
        self._install()
        self.set_adapters(self._weights, self._blend)

    @_alone
    def unload(self) -> None:
        """Forget all adapters; every module of the pipeline is the very one that was there before."""
        self._words.remove()
        self._unfold()
        for name in self.names:
            self._hooks.forget(name)
        self._adapters, self._weights, self._blend = {}, {}, ADDITIVE
        self._slots.clear()
        self._install()

    def _loaded(self, name: str) -> Loaded:
        if name not in self._adapters:
            raise ValueError(f"no adapter named {name!r} is loaded; loaded: {', '.join(self.names) or 'none'}")
        return self._adapters[name]

    def _install(self) -> None:
        with self._bare_words():
            self._install_layers()

    @contextmanager
    def _bare_words(self) -> Iterator[None]:
        """Layers change places with no adapter's words around them, for an embedding may be one of them."""
        with self._words.aside() as is_outermost:
            yield
        if is_outermost:
            self._words.install(self._adapters, self._weights)

    def _install_layers(self) -> None:
        self._slots.install(self._adapters)
        self._offsets.install({name: loaded.vectors for name, loaded in self._adapters.items()})
        if self._adapters or self._slots.has_room:
            self._calls.install(self._slots.places, self._touched)
        else:
            self._calls.remove()

    @property
    def _touched(self) -> dict[str, nn.Module]:
        """The components that adapters change, or for which room is set aside."""
        return {**self._offsets.components, **self._slots.components}

    def _follow(self) -> None:
        """Where a component was replaced since, let the adapters move on to the new one.

        Raises:
            ValueError: they do not fit it; nothing has changed then.
        """
        self._slots.take_hooks()
        now = {name: self._pipe_modules.model(name) for name in self._touched}
        replaced = {
            name: model  # one that is None was put away to save memory
            for name, model in now.items()
            if model is not None and model is not self._touched[name]
        }
        if not replaced:
            return
        for name, model in replaced.items():
            refuse_held(name, model)
        first = next(iter(replaced))
        if self._slots.has_room:
            raise ValueError(f"{first} was replaced, and enable_hotswap's room is in the old one: unload() first")
        fitted: dict[str, Fitted] = {}
        for name, loaded in self._adapters.items():
            label = f"{first} was replaced; {name}"
            fitted[name] = fit(AdapterState(loaded.modules, vectors=loaded.vectors), label, self._pipe_modules)
        blend = self._blend
        self._words.remove()
        self._unfold()
        self._blend = ADDITIVE
        self._slots.install({})
        self._offsets.install({})
        self._adapters = {
            name: replace(
                self._adapters[name], modules=f.modules, vectors=f.vectors, terms=self._slots.terms(f.modules)
            )
            for name, f in fitted.items()
        }
        self._install()
        self._hooks.stand()
        self._mix(self._weights, blend)

    def _mix(self, weights: dict[str, Weight], blend: str) -> None:
        with self._bare_words():
            self._unfold()
            self._weights, self._blend, self._scales = weights, ADDITIVE, {}
            self._slots.fill(self._adapters, weights if blend == ADDITIVE else {})
            for component in self._touched:
                self._set_strengths(component, {})
            if blend != ADDITIVE:
                self._fold_as(blend)

    def _set_strengths(self, component: str, factors: Mapping[str, float]) -> None:
        """Give everything in a component its strengths: parameters first, for blended layers read their bias."""
        scale = self._scales.get(component, 1.0)
        scaled = {name: factors.get(name, 1.0) * scale for name in self._adapters}
        self._offsets.set_strengths(self._weights, scaled, prefix=f"{component}.")
        self._slots.set_strengths(scaled, prefix=f"{component}.")

    def _set_scale(self, component: str, scale: float) -> None:
        """Multiply all strengths in a component, while a call is drawn that asks for it."""
        if scale == self._scales.get(component, 1.0):
            return
        if self._fused is not None:
            raise ValueError(f"the scale {scale:g} of this call cannot act on adapters that are fused into the weights")
        self._scales[component] = scale
        self._set_strengths(component, {})

    @property
    def _is_fused(self) -> bool:
        return self._fused is not None and self._blend == ADDITIVE

    def _refuse_while_fused(self, action: str) -> None:
        if self._is_fused:
            raise ValueError(f"cannot {action} while fused: call unfuse() first")

    def _refuse_while_folded(self, thing: str) -> None:
        if self._blend != ADDITIVE:
            raise ValueError(
                f"{thing} needs blend='additive': the mode {self._blend!r} is folded into the weights already"
            )

    def _check_blend(self, blend: str, weights: Mapping[str, Weight]) -> None:
        """Refuse a mode that does not exist or cannot be folded now."""
        if blend not in MODES:
            raise ValueError(f"unknown blend {blend!r}; expected {', '.join(MODES)}")
        if self._hooks.is_needed:
            raise ValueError(
                f"blend {blend!r} is folded into the weights, but a schedule or mask changes strengths as the picture "
                "is drawn: end it first, or blend='additive'"
            )
        if self._slots.has_room:
            raise ValueError(
                f"blend {blend!r} is folded into the weights, which enable_hotswap leaves alone: unload() first, "
                "or blend='additive'"
            )
        for path, (base, _) in mode_changes(blend, self._slots.bases, self._adapters, weights).items():
            check_fusable(path, base)
            at_hand(path, base.weight)

    def _fold_as(self, blend: str) -> None:
        """Fold a mode's weights in, by the strengths last set."""
        changes = mode_changes(blend, self._slots.bases, self._adapters, self._weights)
        self._fused = fuse_weights_by(changes, saves_base=True)
        self._blend = blend
        self._slots.stand_aside()

    def _unfold(self) -> None:
        """Undo a fold, if there is one."""
        if self._fused is not None:
            self._fused.undo()
            self._fused = None
            self._offsets.are_saved = False
            self._slots.stand_in()

    @contextmanager
    def _unfolded(self) -> Iterator[None]:
        """The base's own weights stand for a while; the fold of a mode comes back after."""
        blend = self._blend
        with self._bare_words():
            self._unfold()
            try:
                yield
            finally:
                if blend != ADDITIVE:
                    self._fold_as(blend)
