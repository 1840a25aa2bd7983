"""The modules of a pipeline, found by component and path, past whatever wraps them."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from dora_diffusion.layers.base_layers import Base, check_adaptable
from dora_diffusion.layers.blended import BlendedLayer


class PipelineModules:
    """The layers and parameters of a pipeline, by component and path, past whatever wraps them."""

    def __init__(self, pipe: Any, components: Sequence[str]) -> None:
        self._pipe = pipe
        self._components = tuple(components)

    def model(self, component: str) -> nn.Module | None:
        """A component, out of the wrapper that torch.compile puts around it; None when the pipeline has none."""
        model = getattr(self._pipe, component, None) if component in self._components else None
        return getattr(model, "_orig_mod", model)

    def find(self, path: str) -> tuple[str, nn.Module]:
        """The path as this pipeline spells it, and the module there; never a BlendedLayer, but the base inside it.

        CLIP encoders have or lack `text_model.`, by transformers' version. A ValueError when there is none.
        """
        component, _, inner = path.partition(".")
        model = self.model(component)
        for candidate in (inner, f"text_model.{inner}", inner.removeprefix("text_model.")):
            found = None if model is None else _submodule(model, candidate)
            if found is not None:
                return f"{component}.{candidate}".removesuffix("."), found.base if isinstance(
                    found, BlendedLayer
                ) else found
        raise ValueError(f"layer {path} is not in this pipeline; is the adapter for another base model?")

    def layer(self, path: str) -> tuple[str, Base]:
        """As `find`, for a layer that can carry an adapter; a ValueError for one that cannot."""
        live, found = self.find(path)
        return live, check_adaptable(path, found)

    def parameter(self, path: str) -> tuple[str, nn.Module, str]:
        """As `find`, for a parameter that a vector can be added to: its path, owner and name there."""
        parent, _, name = path.rpartition(".")
        live, owner = self.find(parent)
        parameter = owner._parameters.get(name)
        if name == "bias" and parameter is None:
            raise ValueError(f"{path}: this {type(owner).__name__} has no bias to add to; is this another base model?")
        if parameter is None:
            raise ValueError(f"parameter {path} is not in this pipeline; is the adapter for another base model?")
        if name == "weight" and parameter.dim() > 1:
            raise ValueError(f"{path}: the whole weight of a {type(owner).__name__} is no vector; give it as `diff`")
        if not parameter.is_floating_point():
            raise ValueError(f"{path}: a parameter of {parameter.dtype} cannot be added to")
        return f"{live}.{name}", owner, name

    def put(self, path: str, module: nn.Module) -> None:
        """Let a module stand at a path that `find` has given."""
        component, inner = path.split(".", 1)
        model = self.model(component)
        assert model is not None
        model.set_submodule(inner, module)


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def at_hand(path: str, tensor: Tensor) -> Tensor:
    """The tensor; a ValueError when it is away."""
    if tensor.is_meta:
        raise ValueError(f"{path}: its weight is away (sequential CPU offload); adapters need offload='model' or none")
    return tensor
