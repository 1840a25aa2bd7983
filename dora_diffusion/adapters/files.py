"""Reading an adapter for one pipeline: the file's own evidence first, then what the pipeline tells of its names."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from dora_diffusion.adapters.diffusers_names import locate_with
from dora_diffusion.adapters.matching import Fitted, fit
from dora_diffusion.families import family_of_denoiser
from dora_diffusion.formats import load_examined
from dora_diffusion.formats.keys import WIDENED
from dora_diffusion.formats.layer_lookup import Locate
from dora_diffusion.formats.reading import OVER_BASE_KEY
from dora_diffusion.pipelines.components import denoisers_of, model_of
from dora_diffusion.pipelines.modules import PipelineModules
from dora_diffusion.state import AdapterState, WeightOf

Read = tuple[AdapterState, Fitted, str | None]
"""An adapter, the same as a pipeline has it, and the SHA-256 of its file."""


class AdapterReader:
    """Reads adapters for one pipeline."""

    def __init__(self, pipe: Any, modules: PipelineModules, base_weight: WeightOf) -> None:
        """`base_weight` answers for magnitudes whose file does not tell their axis, and for changes made of weights."""
        self._pipe = pipe
        self._modules = modules
        self._base_weight = base_weight

    def read(self, source: str | Path | AdapterState, name: str, *, strict: bool) -> Read:
        """An adapter that fits the pipeline.

        Raises:
            ValueError: it is broken, or of another base: one line, of what the file alone says.
        """
        if isinstance(source, AdapterState):
            if OVER_BASE_KEY in source.metadata:
                made_for = source.metadata[OVER_BASE_KEY]
                raise ValueError(f"{name!r} was made for {made_for} alone: save it, and load the file that is written")
            return source, fit(source, name, self._modules), None
        try:
            return self._file(source, strict=strict)
        except ValueError:
            find = locate_with(self._pipe)  # the newest models' names are known to diffusers alone
            if find is not None:
                with suppress(ValueError):
                    return self._file(source, strict=strict, find=find)
            for family in self._families():
                with suppress(ValueError):
                    return self._file(source, strict=strict, family=family)
            raise

    def _families(self) -> list[str]:
        """What is drawn with, where the file's names leave several."""
        models = [model_of(self._pipe, name) for name in denoisers_of(self._pipe)]
        found = [family_of_denoiser(model) for model in models if model is not None]
        return [family.name for family in found if family is not None]

    def _file(self, source: str | Path, *, strict: bool, find: Locate | None = None, family: str | None = None) -> Read:
        adapter, examined = load_examined(source, base=self._base_weight, family=family, strict=strict, find=find)
        return adapter, self._fitted(adapter, str(source)), examined.sha256

    def _fitted(self, adapter: AdapterState, label: str) -> Fitted:
        try:
            return fit(adapter, label, self._modules)
        except ValueError as error:
            if any(key.endswith(f".{WIDENED}") for key in adapter.extra):
                raise ValueError(
                    f"{error}; the file is for a base whose layers have more inputs ({WIDENED}), as control models have"
                ) from None
            raise
