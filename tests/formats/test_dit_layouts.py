"""The original names of diffusion transformers, judged by diffusers' own converters: of single files, and scripts.

A model of the published structure is built on the meta device; every row of a weight gets a number of its own, and the
weights are written under the original names by the layout. The converter must find every tensor that it looks for,
leave none, and give back every number where it came from.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from diffusers.loaders import single_file_utils as theirs
from torch import Tensor, nn

from benchmarks.full_size.models import model_of
from benchmarks.full_size.published import PUBLISHED
from dora_diffusion.formats.fused_layers import split
from dora_diffusion.formats.layouts import LAYOUTS, Fusion, Layout
from dora_diffusion.state import ModuleState
from tests import conversion_scripts as scripts
from tests.tolerances import assert_identical

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A published model.

    Attributes:
        layout: the name of its layout.
        convert: diffusers' converter, which empties the checkpoint that it is given.
        of_no_layer: parameters that are no layer's: diffusers' name -> the makers'.
        unread: tensors of the makers' that the converter wants to see, and drops or leaves.
        scales: the makers call the weights of normalisations of queries and keys `scale`.
    """

    layout: str
    convert: Callable[[Tensors], Tensors]
    of_no_layer: dict[str, str]
    unread: tuple[str, ...] = ()
    scales: bool = False


POSITIONS = {"pos_embed.pos_embed": "pos_embed"}
SD3 = Case("sd3", theirs.convert_sd3_transformer_checkpoint_to_diffusers, POSITIONS)
FLUX = Case("flux", theirs.convert_flux_transformer_checkpoint_to_diffusers, {}, scales=True)
FLUX_2 = Case("flux2", theirs.convert_flux2_transformer_checkpoint_to_diffusers, {}, scales=True)
TABLES = {
    f"transformer_blocks.{number}.scale_shift_table": f"blocks.{number}.scale_shift_table" for number in range(28)
}
SANA = Case(
    "sana",
    theirs.convert_sana_transformer_to_diffusers,
    {**TABLES, "scale_shift_table": "final_layer.scale_shift_table"},
    unread=("pos_embed", "y_embedder.y_embedding"),
)
PIXART = Case("pixart", scripts.pixart, SANA.of_no_layer, unread=SANA.unread)
HUNYUAN_DIT = Case(
    "hunyuan-dit",
    scripts.hunyuan_dit,
    {
        "time_extra_emb.pooler.positional_embedding": "pooler.positional_embedding",
        "text_embedding_padding": "text_embedding_padding",
    },
)
CASES = {
    "FLUX.1 dev": FLUX,
    "FLUX.1 schnell": FLUX,
    "SD 3 medium": SD3,
    "SD 3.5 medium": SD3,
    "SD 3.5 large": SD3,
    "AuraFlow 0.3": Case(
        "auraflow",
        theirs.convert_auraflow_transformer_checkpoint_to_diffusers,
        {"pos_embed.pos_embed": "positional_encoding", "register_tokens": "register_tokens"},
    ),
    "Lumina-Image 2.0": Case("lumina2", theirs.convert_lumina2_to_diffusers, {}, unread=("norm_final.weight",)),
    "Z-Image": Case(
        "z-image",
        theirs.convert_z_image_transformer_checkpoint_to_diffusers,
        {name: name for name in ("x_pad_token", "cap_pad_token")},
        unread=("norm_final.weight",),
    ),
    "FLUX.2 dev": FLUX_2,
    "FLUX.2 Klein 4B": FLUX_2,
    "FLUX.2 Klein 9B": FLUX_2,
    "Sana 0.6B": SANA,
    "Sana 1.6B": SANA,
    "PixArt-alpha 1024": PIXART,
    "PixArt-Sigma 1024": PIXART,
    "Hunyuan-DiT 1.1": HUNYUAN_DIT,
    "Hunyuan-DiT 1.2": HUNYUAN_DIT,
}
NAMES = pytest.mark.parametrize("name", CASES)


@cache
def transformer(name: str) -> nn.Module:
    return model_of(next(model for model in PUBLISHED if model.name == name).parts["transformer"])


def layout_of(name: str) -> Layout:
    return next(layout for layout in LAYOUTS if layout.name == CASES[name].layout)


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer that has a weight."""
    return {path: layer for path, layer in model.named_modules() if isinstance(getattr(layer, "weight", None), Tensor)}


def fusion_of(layout: Layout, path: str) -> Fusion:
    fusion = layout.of_path(path)
    assert fusion is not None, path
    return fusion


def columns_of(layer: nn.Module) -> int:
    return layer.weight[0].numel()


def numbered(shape: torch.Size, start: int) -> Tensor:
    """One column, no number twice; whole numbers, so that nothing can round."""
    shape = torch.Size((shape[0], 1)) if len(shape) > 1 else shape
    return torch.arange(start, start + shape.numel(), dtype=torch.int32).reshape(shape)


def tensors_of(model: nn.Module) -> Tensors:
    """Numbers in place of every tensor of a checkpoint."""
    found, start = {}, 0
    for key, tensor in model.state_dict().items():
        found[key] = numbered(tensor.shape, start)
        start += found[key].numel()
    return found


def original_for(name: str, tensors: Tensors) -> Tensors:
    """diffusers' tensors under the original names."""
    case, layout, found = CASES[name], layout_of(name), {}
    for path, layer in layers(transformer(name)).items():
        fusion = fusion_of(layout, path)
        for kind in ("weight", "bias"):
            if path == fusion.paths[0] and f"{path}.{kind}" in tensors:
                whole = torch.cat([tensors[f"{each}.{kind}"] for each in fusion.paths])
                if fusion.swaps(len(whole), columns_of(layer)):
                    scale, shift = whole.chunk(2)
                    whole = torch.cat([shift, scale])
                is_scale = case.scales and fusion.original.endswith(("query_norm", "key_norm"))
                found[f"{fusion.original}.{'scale' if is_scale else kind}"] = whole
    found.update({other: tensors[own] for own, other in case.of_no_layer.items() if own in tensors})
    return found | {key: torch.zeros(1) for key in case.unread}


@NAMES
def test_their_converter_finds_every_number_where_the_layout_says_it_is(name) -> None:
    expected = tensors_of(transformer(name))
    checkpoint = original_for(name, expected)
    converted = CASES[name].convert(checkpoint)
    assert checkpoint == {}
    assert_identical(converted, expected)


@NAMES
def test_every_layer_has_one_name_on_each_side(name) -> None:
    layout, paths = layout_of(name), list(layers(transformer(name)))
    fusions = {path: fusion_of(layout, path) for path in paths}
    assert all(path in fusion.paths for path, fusion in fusions.items())
    assert sorted(paths) == sorted(path for fusion in set(fusions.values()) for path in fusion.paths)
    originals = {fusion.original: fusion for fusion in fusions.values()}
    assert len(originals) == len(set(fusions.values()))
    assert {original: layout.of_original(original) for original in originals} == originals


@pytest.mark.parametrize(
    "name",
    [
        *("FLUX.1 dev", "SD 3.5 medium", "AuraFlow 0.3", "Lumina-Image 2.0", "Sana 0.6B"),
        *("PixArt-alpha 1024", "Hunyuan-DiT 1.1"),
    ],
)
def test_an_adapter_follows_the_weight_that_their_converter_moves(name) -> None:
    """Rows of B and m go where the same rows of the weight go."""
    model, layout, tensors = transformer(name), layout_of(name), tensors_of(transformer(name))
    whole, moved, expected = original_for(name, tensors), {}, {}
    for original, fusion in {(fusion := fusion_of(layout, path)).original: fusion for path in layers(model)}.items():
        columns = columns_of(model.get_submodule(fusion.paths[0]))
        up = whole.get(f"{original}.weight")
        if up is not None and up.dim() > 1 and (len(fusion.paths) > 1 or fusion.swaps(len(up), columns)):
            module = ModuleState(torch.empty(1, columns, device="meta"), up, 1.0, magnitude=up[:, 0])
            for path, part in split(fusion, module).items():
                moved |= {f"{path} B": part.up, f"{path} m": part.magnitude}
                expected |= {f"{path} B": (w := tensors[f"{path}.weight"]), f"{path} m": w[:, 0]}
    assert expected
    assert_identical(moved, expected)


@pytest.mark.parametrize("name", ["SD 3 medium", "SD 3.5 medium", "SD 3.5 large"])
def test_only_the_last_context_is_swapped_at_every_depth(name) -> None:
    layout, model = layout_of(name), transformer(name)
    last = len(model.transformer_blocks) - 1
    assert last in (23, 37)
    for number in range(last + 1):
        fusion = layout.of_original(f"joint_blocks.{number}.context_block.adaLN_modulation.1")
        (path,) = fusion.paths
        assert fusion.swaps(*model.get_submodule(path).weight.shape) == (number == last)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "#", "double_blocks.#.img_attn.qkv", "transformer_blocks.#.attn.to_q", "layers.#.attention.qkv"),
        *("double_blocks.0", "double_blocks.x.img_attn.qkv", "double_blocks.0.img_attn.qkv.weight", "blocks.1.", "π"),
    ],
)
def test_other_names_are_of_no_layer(layout, name) -> None:
    assert layout.of_original(name) is None
    assert layout.of_path(name) is None
