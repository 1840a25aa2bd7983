"""UNets of Stable Diffusion as CompVis' `ldm` (1.x, 2.x) and Stability's `sgm` (XL) name their layers.

There the blocks are one list down, `input_blocks`, and one up, `output_blocks`; what a block is made of follows from
where it stands. So each structure is a table of its blocks, and what is inside of a block has one name everywhere.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from dora_diffusion.formats.layouts.record import Fusion, Layout

_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_LABELS = {"label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"}
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
# Both libraries call the layers of a spatial transformer the same.
_TRANSFORMER = re.compile(
    r"norm|proj_in|proj_out"
    r"|transformer_blocks\.[0-9]+\.(attn[12]\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2)|norm[123])"
)
# A block, and what is inside of it.
_BLOCK = re.compile(
    r"((?:input_blocks|output_blocks)\.[0-9]+\.[0-9]+|middle_block\.[0-9]+"
    r"|(?:(?:down|up)_blocks\.[0-9]+|mid_block)\.(?:resnets|attentions)\.[0-9]+)\.(.+)"
)


@dataclass(frozen=True)
class _Names:
    """One library's names -> the other's.

    Attributes:
        blocks: resnets and attentions.
        inside: layers of a resnet.
        layers: layers that are in no such block.
    """

    blocks: Mapping[str, str]
    inside: Mapping[str, str]
    layers: Mapping[str, str]

    def reversed(self) -> "_Names":
        return _Names(_reversed(self.blocks), _reversed(self.inside), _reversed(self.layers))

    def of(self, name: str) -> str | None:
        """A layer by the other library's name; None for what is no layer."""
        if name in self.layers:
            return self.layers[name]
        found = _BLOCK.fullmatch(name)
        other = self.blocks.get(found[1]) if found else None
        if found is None or other is None:
            return None
        if ".attentions." in f"{found[1]} {other}":
            layer = found[2] if _TRANSFORMER.fullmatch(found[2]) else None
        else:
            layer = self.inside.get(found[2])
        return None if layer is None else f"{other}.{layer}"


def _reversed(names: Mapping[str, str]) -> dict[str, str]:
    return {value: key for key, value in names.items()}


def _names(attends: Sequence[bool], ends: Mapping[str, str], *, resnets: int = 2) -> _Names:
    """original names -> diffusers', for a UNet whose levels have attention or not, the finest level first.

    `resnets`: how many a level has on the way down; one more on the way up.
    """
    blocks = {
        "middle_block.0": "mid_block.resnets.0",
        "middle_block.1": "mid_block.attentions.0",
        "middle_block.2": "mid_block.resnets.1",
    }
    layers = dict(ends)
    last = len(attends) - 1
    for level, has_attention in enumerate(attends):
        first = 1 + level * (resnets + 1)
        for layer in range(resnets):
            blocks[f"input_blocks.{first + layer}.0"] = f"down_blocks.{level}.resnets.{layer}"
            if has_attention:
                blocks[f"input_blocks.{first + layer}.1"] = f"down_blocks.{level}.attentions.{layer}"
        if level != last:
            layers[f"input_blocks.{first + resnets}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
    for level, has_attention in enumerate(reversed(attends)):
        first = level * (resnets + 1)
        for layer in range(resnets + 1):
            blocks[f"output_blocks.{first + layer}.0"] = f"up_blocks.{level}.resnets.{layer}"
            if has_attention:
                blocks[f"output_blocks.{first + layer}.1"] = f"up_blocks.{level}.attentions.{layer}"
        if level != last:
            # after the attention, where there is one
            original = f"output_blocks.{first + resnets}.{2 if has_attention else 1}.conv"
            layers[original] = f"up_blocks.{level}.upsamplers.0.conv"
    return _Names(blocks, _RESNET, layers)


def _layout(name: str, families: tuple[str, ...], originals: _Names) -> Layout:
    """A UNet's names, both ways."""
    paths = originals.reversed()

    def of_original(original: str) -> Fusion | None:
        path = originals.of(original)
        return None if path is None else Fusion(original, (path,))

    def of_path(path: str) -> Fusion | None:
        original = paths.of(path)
        return None if original is None else Fusion(original, (path,))

    return Layout(name, families, "unet", of_original, of_path)


LDM = _layout("ldm", ("sd1", "sd2"), _names((True, True, True, False), _ENDS))
SGM = _layout("sgm", ("sdxl",), _names((False, True, True), {**_ENDS, **_LABELS}))


def layout_of(layers: Collection[str]) -> Layout | None:
    """The names of the UNet that has these layers by its original names, whatever its depth; None when it is none."""
    downs = [int(layer.split(".")[1]) for layer in layers if re.fullmatch(r"input_blocks\.[0-9]+\.0\.op", layer)]
    if not downs or "middle_block.0.in_layers.0" not in layers:
        return None
    resnets, levels = min(downs) - 1, len(downs) + 1
    attends = [f"input_blocks.{1 + level * (resnets + 1)}.1.proj_in" in layers for level in range(levels)]
    return _layout("ldm", ("sd1", "sd2", "sdxl"), _names(attends, {**_ENDS, **_LABELS}, resnets=resnets))
