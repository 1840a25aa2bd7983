"""What a model's makers call its layers, beside what diffusers calls them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Fusion:
    """A layer of the original model, and the layers of diffusers' model that it is.

    Attributes:
        original: its name in the original code, dotted: `double_blocks.0.img_attn.qkv`.
        paths: diffusers' layers, in the order of its rows: most often one.
        shares: how its rows are divided among them, in proportion: (1, 1, 1, 4) for FLUX's `linear1`.
        swapped: its two halves of rows stand the other way round in diffusers (shift and scale of the last adaLN).
        swapped_by_shape: they do where the weight has two rows for each column, and only there; a name cannot tell.
    """

    original: str
    paths: tuple[str, ...]
    shares: tuple[int, ...] = (1,)
    swapped: bool = False
    swapped_by_shape: bool = False

    def swaps(self, rows: int, columns: int) -> bool:
        """Whether the halves of the original weight, which has this shape, are swapped in diffusers."""
        return self.swapped or (self.swapped_by_shape and rows == 2 * columns)


def _any_shape(original: str, rows: int, columns: int) -> bool:
    """The names are no other model's."""
    return True


@dataclass(frozen=True)
class Layout:
    """The names of one component, both ways.

    Attributes:
        name: for reports: "sgm", "flux".
        families: names of the model families whose component it is.
        component: the pipeline's attribute: "unet", "transformer", "text_encoder_2".
        of_original: a name in the original code -> its fusion; None when there is no such layer.
        of_path: a path in diffusers, without the component -> the fusion that it is part of, or None.
        fits: a name in the original code, rows and columns of its weight -> whether it can be this model's: tells
            models apart whose makers use the same names.
        encoders: what tools call a text encoder ("te3", "t5") -> the pipeline's attribute, where it is another than the
            number says.
    """

    name: str
    families: tuple[str, ...]
    component: str
    of_original: Callable[[str], Fusion | None]
    of_path: Callable[[str], Fusion | None]
    fits: Callable[[str, int, int], bool] = _any_shape
    encoders: Mapping[str, str] = field(default_factory=dict)
