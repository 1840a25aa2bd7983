"""The modules of a pipeline, found by component and path, past whatever wraps them."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from dora_diffusion.families import FAMILIES
from dora_diffusion.layers.base_layers import Base, check_adaptable
from dora_diffusion.layers.blended import BlendedLayer


class PipelineModules:
    """The layers and parameters of a pipeline, by component and path, past whatever wraps them."""

    def __init__(self, pipe: Any, components: Sequence[str]) -> None:
        self._pipe = pipe
        self._components = tuple(components)

    def model(self, component: str) -> nn.Module | None:
        """A component; None when the pipeline has none of that name."""
        return model_of(self._pipe, component) if component in self._components else None

    def find(self, path: str) -> tuple[str, nn.Module]:
        """The path as this pipeline spells it, and the module there; never a BlendedLayer, but the base inside it.

        A ValueError when there is none.
        """
        component, _, inner = path.partition(".")
        model = self.model(component)
        found = None if model is None else find_module(model, inner)
        if found is None:
            raise ValueError(f"layer {path} is not in this pipeline; is the adapter for another base model?")
        live, module = found
        base = module.base if isinstance(module, BlendedLayer) else module
        return f"{component}.{live}".removesuffix("."), base

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


def model_of(pipe: Any, component: str) -> nn.Module | None:
    """A pipeline's component, out of the wrapper that torch.compile puts around it; None when it is no model."""
    model = getattr(pipe, component, None)
    model = getattr(model, "_orig_mod", model)
    return model if isinstance(model, nn.Module) else None


def adaptable_models(pipe: Any) -> dict[str, nn.Module]:
    """The components of a pipeline that some family's adapters change, by name."""
    names = dict.fromkeys(part.name for family in FAMILIES for part in family.components)
    return {name: model for name in names if (model := model_of(pipe, name)) is not None}


def find_module(model: nn.Module, path: str) -> tuple[str, nn.Module] | None:
    """The path as this model spells it, and the module there; None when there is none.

    CLIP encoders have or lack `text_model.`, by transformers' version.
    """
    for candidate in (path, f"text_model.{path}", path.removeprefix("text_model.")):
        try:
            return candidate, model.get_submodule(candidate)
        except AttributeError:
            continue
    return None


def at_hand(path: str, tensor: Tensor) -> Tensor:
    """The tensor; a ValueError when it is away."""
    if tensor.is_meta:
        raise ValueError(f"{path}: its weight is away (sequential CPU offload); use offload='model' or none")
    return tensor
