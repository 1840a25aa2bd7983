"""The modules of a pipeline, found by component and path, past whatever wraps them."""

from typing import Any, cast

from torch import Tensor, nn

from dora_diffusion.layers.base_layers import Base, check_adaptable, is_peft_layer
from dora_diffusion.layers.blended import BlendedLayer
from dora_diffusion.layers.dora import DoRALayer
from dora_diffusion.pipelines.components import model_of


class PipelineModules:
    """The layers and parameters of a pipeline, by component and path, past whatever wraps them."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe

    def model(self, component: str) -> nn.Module | None:
        """A component; None when the pipeline has no model of that name."""
        return model_of(self._pipe, component)

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
        if isinstance(module, DoRALayer):
            raise ValueError(f"{path}: an adapter is in training there: eject() the injection first")
        return f"{component}.{live}".removesuffix("."), base_beneath(path, module)

    def layer(self, path: str) -> tuple[str, Base]:
        """As `find`, for a layer that can carry an adapter; a ValueError for one that cannot."""
        live, found = self.find(path)
        return live, check_adaptable(path, found)

    def place(self, path: str) -> tuple[nn.Module, str]:
        """Where a layer stands that `layer` has found: the module that has it, and what that calls it."""
        component, _, inner = path.partition(".")
        model = self.model(component)
        assert model is not None
        return parent_of(model, inner)

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


def parent_of(model: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that has another, and what it calls it."""
    parent, _, name = path.rpartition(".")
    return model.get_submodule(parent), name


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Let a module stand at a path; beneath PEFT's layer, where one stands there."""
    there = model.get_submodule(path)
    if is_peft_layer(there):
        there.base_layer = module
    else:
        model.set_submodule(path, module)


def base_beneath(path: str, module: nn.Module) -> nn.Module:
    """The base of a layer, beneath ours and PEFT's.

    A plain LoRA of PEFT's adds to whatever lies beneath it, so that both act side by side.

    Raises:
        ValueError: PEFT's layer scales what lies beneath, or is merged into it.
    """
    if is_peft_layer(module):
        _check_adds(path, module)
        module = cast(nn.Module, module.base_layer)
    return module.base if isinstance(module, BlendedLayer | DoRALayer) else module


def _check_adds(path: str, layer: Any) -> None:
    if not type(layer).__module__.startswith("peft.tuners.lora.") or getattr(layer, "lora_magnitude_vector", None):
        what = "a DoRA" if getattr(layer, "lora_magnitude_vector", None) else f"a {type(layer).__name__}"
        raise ValueError(
            f"{path} carries {what} of PEFT's, which scales what lies beneath it: call unload_lora_weights() and load "
            "both adapters here"
        )
    if layer.merged:
        raise ValueError(f"{path}: a LoRA of PEFT's is fused into its weight: call unfuse_lora() first")


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
        raise ValueError(
            f"{path}: its weight is away (sequential CPU offload); do this before it, or use offload='model'"
        )
    return tensor
