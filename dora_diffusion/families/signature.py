"""What an adapter file shows of its family: names of layers, sizes of published models, what tools call it.

Names and sizes are written as patterns of paths, without the component before them: `#` is a number, `(a|b)` a choice,
and `*`, which only sizes may use, any run of characters. `formats.family_detection` compares files with them;
`formats.flat_names` takes from them which underscores of a flat name were dots.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class PublishedSize:
    """Numbers of one published model, by which relatives of the same names are told apart.

    Attributes:
        blocks: pattern that ends in a block's number -> how many blocks there are.
        inputs: pattern of a layer -> its input features; the first that fits counts.
        layout: name of the layout (`formats/layouts`) that must know its layers, where the part's paths allow for more.
    """

    blocks: Mapping[str, int]
    inputs: Mapping[str, int]
    layout: str = ""


@dataclass(frozen=True)
class PartSignature:
    """How a component of a family is recognised.

    Attributes:
        paths: patterns of the paths of its modules, in any size.
        sizes: of its published models; without any, names alone tell it.
        convolves: whether the projections around a UNet's attention are convolutions; None where there are none.
        is_projected: it is a CLIPTextModelWithProjection, whose paths keep their `text_model.` in transformers 5.
    """

    paths: tuple[str, ...]
    sizes: tuple[PublishedSize, ...] = ()
    convolves: bool | None = None
    is_projected: bool = False


@dataclass(frozen=True)
class Signature:
    """What tells a family's adapters from others'.

    Attributes:
        parts: component -> how it is recognised; every component of the family.
        called: expression for the beginning of what tools call the base in metadata (`modelspec.architecture`,
            `ss_base_model_version`, OneTrainer's `model_type`), in lower case, words joined by hyphens.
        lookalikes: the same for other models whose layers have the very names and sizes of this family's.
        encoders: what tools call its text encoders -> component: ComfyUI's "clip_l", "clip_h", "clip_g", "t5xxl", the
            Open Model Initiative's "t5", and kohya's "te" and "te3" where it is not te1, te2, te3 in order.
        is_original: its makers call its layers as diffusers does, so that it needs no layout.
    """

    parts: Mapping[str, PartSignature]
    called: str
    lookalikes: str = ""
    encoders: Mapping[str, str] = field(default_factory=dict)
    is_original: bool = False


# Names that blocks of several families have.
ATTENTION_NAMES = "(to_q|to_k|to_v|to_out.#|norm_q|norm_k)"
JOINT_NAMES = "(add_q_proj|add_k_proj|add_v_proj|to_add_out|norm_added_q|norm_added_k)"
FEED_FORWARD_NAMES = "(ff.net.#|ff.net.#.proj|ff_context.net.#|ff_context.net.#.proj)"
ADAPTIVE_NAMES = "(linear|norm|silu)"
EMBEDDER_NAMES = "(linear_#|act|act_#)"
# Attention to picture and text tokens side by side.
JOINT_PATHS = (
    f"transformer_blocks.#.(attn|attn2).{ATTENTION_NAMES}",
    f"transformer_blocks.#.(attn|attn2).{JOINT_NAMES}",
)
_TAKE_TOKENS = (
    "(to_q|to_k|to_v|add_q_proj|add_k_proj|add_v_proj|to_qkv_mlp_proj|net.0.proj|proj_mlp"
    "|linear|linear_in|linear_1|w1|w3)"
)


def transformer_size(width: int, blocks: Mapping[str, int], inputs: Mapping[str, int] | None = None) -> PublishedSize:
    """A transformer whose blocks take tokens of one width, but for the layers in `inputs`.

    Args:
        width: input features of its attention and feed-forward.
        blocks: the name of a stack of blocks -> how many there are.
        inputs: as PublishedSize has them, for layers of other widths.
    """
    numbers = {f"{stack}.#": count for stack, count in blocks.items()}
    tokens = {f"({'|'.join(blocks)}).#.(*.|){_TAKE_TOKENS}": width}
    return PublishedSize(numbers, {**(inputs or {}), **tokens})
