"""A base's own weights by an adapter's paths, wherever they lie: in a pipeline, a diffusers folder, a single file.

Converting, blending and baking need W of a layer, not a model that runs: what lies on disk is read tensor by tensor.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dora_diffusion.formats.base_checkpoint import Checkpoint, Place, open_checkpoint
from dora_diffusion.layers.base_layers import check_adaptable, dense_weight, is_peft_layer, logical_shape
from dora_diffusion.layers.blended import BlendedLayer
from dora_diffusion.layers.dora import DoRALayer
from dora_diffusion.layers.offloaded import value_of
from dora_diffusion.pipelines.components import adaptable_models, as_pipeline, is_pipeline
from dora_diffusion.pipelines.modules import at_hand, base_beneath, find_module
from dora_diffusion.state import WeightOf

_ASSETS = Path(__file__).parents[1] / "assets"
POCKET = _ASSETS / "pocket"
POCKET_DIT = _ASSETS / "pocket-dit"
EMBEDDED: Mapping[str, Path] = {"pocket": POCKET, "pocket-dit": POCKET_DIT}

# Layers whose tensor is a table, one row per token: W is its transpose, as in `base_layers`.
_TABLES = (
    *("token_embedding", "position_embedding", "shared", "embed_tokens", "relative_attention_bias"),
    *("word_embeddings", "position_embeddings", "token_type_embeddings", "style_embedder", "class_embedding"),
    "addition_t_embedding",
)


@dataclass(frozen=True)
class BaseWeights:
    """A base, read on demand. An instance is itself a `WeightOf`.

    Attributes:
        name: for messages.
        weight: a layer's path -> W (out, in[, kh, kw]), in the base's dtype.
        parameter: the path of a parameter, `unet.conv_in.bias` -> it, as stored.
        paths: the layers that adapters can change, in the base's order.
    """

    name: str
    weight: WeightOf
    parameter: WeightOf
    paths: Callable[[], tuple[str, ...]]

    def __call__(self, path: str) -> Tensor:
        """`weight(path)`."""
        return self.weight(path)


def weights_of(base: Any) -> WeightOf:
    """What gives W of a base's layers.

    Args:
        base: a diffusers pipeline, the name of an embedded base, a folder in diffusers' layout, a single .safetensors
            file under its original names or diffusers', or a function of the same kind, which is returned as it is.

    Raises:
        ValueError: one line that says what was looked for and what is there.
    """
    return base if callable(base) and not is_pipeline(base) else base_weights(base)


def base_weights(base: Any) -> BaseWeights:
    """The same for a pipeline or files, with its parameters and the list of its layers; errors as of `weights_of`."""
    if isinstance(base, BaseWeights):
        return base
    if isinstance(base, str | Path):
        return _of_checkpoint(open_checkpoint(local_base(base)))
    if is_pipeline(base):
        return _of_pipeline(as_pipeline(base))
    raise ValueError(f"a base must be a pipeline, an embedded name, a folder or a file, got {type(base).__name__}")


def local_base(base: str | Path) -> Path:
    """The folder or file of an embedded name or a path; a ValueError when nothing is there."""
    path = EMBEDDED.get(str(base), Path(base))
    if not path.exists():
        raise ValueError(
            f"base {str(base)!r}: no such file or folder; expected {', '.join(map(repr, EMBEDDED))}, a folder in "
            "diffusers' layout or a .safetensors file"
        )
    return path


def is_table(layer: str) -> bool:
    """Whether a layer, by its name, is an embedding."""
    return layer.rpartition(".")[2] in _TABLES


def _of_checkpoint(checkpoint: Checkpoint) -> BaseWeights:
    def place(path: str) -> Place:
        found = checkpoint.find(path)
        if found is None:
            layer = path.removesuffix(".weight")
            raise ValueError(f"{checkpoint.source}: layer {layer} is not there; is the adapter for another base model?")
        return found

    def weight(path: str) -> Tensor:
        stored = place(f"{path}.weight").read()
        return stored.T if is_table(path) else stored

    def paths() -> tuple[str, ...]:
        layers = [name.removesuffix(".weight") for name in checkpoint.names() if name.endswith(".weight")]
        return tuple(layer for layer in dict.fromkeys(layers) if len(place(f"{layer}.weight").shape) in (2, 4))

    return BaseWeights(str(checkpoint.source), weight, lambda path: place(path).read(), paths)


def _of_pipeline(pipe: Any) -> BaseWeights:
    name = type(pipe).__name__
    if getattr(pipe, "num_fused_loras", 0):
        raise ValueError(f"{name} has fused LoRAs in its weights: call unfuse_lora() first")
    models = adaptable_models(pipe)

    def layer_at(path: str) -> nn.Module:
        component, _, inner = path.partition(".")
        found = find_module(models[component], inner) if component in models else None
        if found is None:
            raise ValueError(f"{name}: layer {path} is not there; is the adapter for another base model?")
        return _refuse_fused(path, base_beneath(path, found[1]))

    def weight(path: str) -> Tensor:
        base = check_adaptable(path, layer_at(path))
        at_hand(path, value_of(base, "weight"))
        return dense_weight(base)

    def parameter(path: str) -> Tensor:
        layer, _, ending = path.rpartition(".")
        found = getattr(layer_at(layer), ending, None)
        if not isinstance(found, Tensor):
            raise ValueError(f"{name}: parameter {path} is not there; is the adapter for another base model?")
        return at_hand(path, found).detach()

    return BaseWeights(name, weight, parameter, lambda: tuple(_layers(models)))


def _layers(models: Mapping[str, nn.Module]) -> Iterator[str]:
    for component, model in models.items():
        inside = ""
        for path, module in model.named_modules():
            if inside and path.startswith(inside):
                continue
            if isinstance(module, BlendedLayer | DoRALayer) or is_peft_layer(module):
                inside = path + "."
            if _is_adaptable(path, module):
                yield f"{component}.{path.removeprefix('text_model.')}"


def _is_adaptable(path: str, module: nn.Module) -> bool:
    try:
        return len(logical_shape(check_adaptable(path, base_beneath(path, module)))) in (2, 4)
    except ValueError:
        return False


def _refuse_fused(path: str, layer: nn.Module) -> nn.Module:
    if getattr(layer, "is_fused", False):
        raise ValueError(f"{path}: adapters are fused into the base's weights; call unfuse() first")
    return layer
