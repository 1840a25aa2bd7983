"""diffusers' own verbs on a pipeline, done by AdapterManager: for code that calls `load_lora_weights` already."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dora_diffusion.adapters.manager import AdapterManager
from dora_diffusion.formats.reading import read, take_apart
from dora_diffusion.functional.blend_modes import ADDITIVE
from dora_diffusion.functional.strengths import Weight, is_felt, strengths_by_name

Names = str | Sequence[str]
Strengths = tuple[dict[str, Weight], str]
"""What `AdapterManager.set_adapters` was told: strengths, and the mode."""


def attach(pipe: Any) -> AdapterManager:
    """Let this pipeline's `load_lora_weights` and its kin use a manager; other pipelines keep diffusers' own.

    Attributes of the one object are set, and no class is changed: `load_lora_weights`, `set_adapters`, `enable_lora`,
    `disable_lora`, `fuse_lora`, `unfuse_lora`, `delete_adapters`, `unload_lora_weights`, `get_active_adapters`,
    `get_list_adapters`. They take what diffusers' take, where it means something here, and files of every tool. What
    the manager alone can do (schedules, masks, blend modes) is done with the manager that is returned. `detach` undoes
    it.

    Returns:
        The manager, the same one when the pipeline has one attached already.

    Raises:
        ValueError: PEFT's layers stand in the pipeline, or it has nothing that adapters could change.

    Examples:
        ```python
        import dora_diffusion as dd

        pipe = dd.load_pipeline("pocket")
        manager = dd.attach(pipe)
        pipe.load_lora_weights("ink.safetensors", adapter_name="ink")
        pipe.load_lora_weights("lego.safetensors", adapter_name="lego")
        pipe.set_adapters(["ink", "lego"], adapter_weights=[0.8, 0.4])
        picture = pipe("a castle on the beach", num_inference_steps=4).images[0]
        print(manager.active)
        dd.detach(pipe)  # the base, and diffusers' own verbs
        ```
    """
    verbs = vars(pipe).get("_dora_verbs")
    if verbs is None:
        verbs = _Verbs(AdapterManager(pipe))
        object.__setattr__(pipe, "_dora_verbs", verbs)
        for name in _NAMES:
            object.__setattr__(pipe, name, getattr(verbs, name))
    manager: AdapterManager = verbs.manager
    return manager


def detach(pipe: Any) -> None:
    """Undo `attach`: unload its adapters, and let the pipeline's class answer again; nothing happens without one.

    Examples:
        ```python
        import dora_diffusion as dd

        pipe = dd.load_pipeline("pocket")
        dd.attach(pipe)
        dd.detach(pipe)
        assert "load_lora_weights" not in vars(pipe)
        ```
    """
    verbs = vars(pipe).pop("_dora_verbs", None)
    if verbs is not None:
        verbs.manager.unload()
        for name in _NAMES:
            vars(pipe).pop(name, None)


class _Verbs:
    """The verbs of diffusers' LoRA loaders, on a manager."""

    def __init__(self, manager: AdapterManager) -> None:
        self.manager = manager
        self._paused: Strengths | None = None  # of adapters that are disabled
        self._unfused: Strengths | None = None  # of before `fuse_lora`

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        adapter_name: str | None = None,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
    ) -> None:
        """Load an adapter, which alone is active then, at 1; `subfolder` and `weight_name` are in a folder."""
        source = pretrained_model_name_or_path_or_dict
        if isinstance(source, Mapping):
            source = read(source, {}, take_apart({key: tensor.shape for key, tensor in source.items()}, {}))
        elif weight_name is not None or subfolder is not None:
            source = Path(source, subfolder or "", weight_name or "")
        name = adapter_name or self._free_name()
        self.manager.load_adapter(source, name=name)
        self._set({name: 1.0})

    def set_adapters(
        self, adapter_names: Names, adapter_weights: float | Sequence[Weight | None] | Mapping[str, float] | None = None
    ) -> None:
        """Let these adapters be active, at these strengths: one for all, or one each; None is 1."""
        self._set(strengths_by_name(adapter_names, adapter_weights))

    def get_active_adapters(self) -> list[str]:
        """Those with a strength, also while they are disabled."""
        weights = self.manager.weights if self._paused is None else self._paused[0]
        return [name for name, weight in weights.items() if is_felt(weight)]

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Component -> the adapters that change it."""
        reports = self.manager.reports
        parts = dict.fromkeys(part for report in reports.values() for part in report.components)
        return {part: [name for name, report in reports.items() if part in report.components] for part in parts}

    def disable_lora(self) -> None:
        """Draw as the base, until `enable_lora`."""
        if self._paused is None:
            before = self._strengths()
            self.manager.set_adapters({})
            self._paused = before

    def enable_lora(self) -> None:
        """Undo `disable_lora`."""
        if self._paused is not None:
            self._set(*self._paused)

    def fuse_lora(
        self,
        components: Any = None,
        *,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: Names | None = None,
    ) -> None:
        """Fold the active adapters into the weights, in every component that they change; all numbers are finite."""
        if components is not None:
            raise ValueError("fuse_lora: all components are fused; give strengths by part: set_adapters(NAME, [{...}])")
        before = self._strengths()
        weights = before[0] if adapter_names is None else dict.fromkeys(_list(adapter_names), 1.0)
        try:
            self._set({name: _times(weight, lora_scale) for name, weight in weights.items()})
            self.manager.fuse()
        except ValueError:
            self._set(*before)
            raise
        self._unfused = before

    def unfuse_lora(self, components: Any = None) -> None:
        """Undo `fuse_lora`, bit for bit; strengths are those of before it."""
        self.manager.unfuse()
        if self._unfused is not None:
            self._set(*self._unfused)
            self._unfused = None

    def delete_adapters(self, adapter_names: Names) -> None:
        """Forget adapters."""
        for name in _list(adapter_names):
            self.manager.delete_adapter(name)
            if self._paused is not None:
                self._paused[0].pop(name, None)

    def unload_lora_weights(self) -> None:
        """Forget all adapters."""
        self._paused = self._unfused = None
        self.manager.unload()

    def _strengths(self) -> "Strengths":
        return self.manager.weights, self.manager.blend

    def _set(self, weights: Mapping[str, Any], blend: str = ADDITIVE) -> None:
        self.manager.set_adapters(weights, blend)
        self._paused = None

    def _free_name(self) -> str:
        """As diffusers names them: default_0, default_1."""
        return next(name for number in range(10_000) if (name := f"default_{number}") not in self.manager.names)


_NAMES = tuple(name for name in vars(_Verbs) if not name.startswith("_"))


def _list(names: Names) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _times(weight: Weight, scale: float) -> Weight:
    return {part: value * scale for part, value in weight.items()} if isinstance(weight, Mapping) else weight * scale
