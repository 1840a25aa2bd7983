"""What sizes of pictures a base can be trained at."""

from dataclasses import dataclass
from typing import Any

from dora_diffusion.families import family_of_pipeline, pixel_multiple
from dora_diffusion.training.config import DataConfig, as_resolutions


@dataclass(frozen=True)
class Sizes:
    """Of a base.

    Attributes:
        native: side of the square pictures that it was made for, in pixels.
        multiple: sides are multiples of this: the VAE's factor times the side of a token.
        family: whose base it is, for messages.
    """

    native: int
    multiple: int
    family: str

    def tokens(self, size: tuple[int, int]) -> int:
        """How many tokens the denoiser sees of a picture of (width, height)."""
        return (size[0] // self.multiple) * (size[1] // self.multiple)

    def resolutions(self, data: DataConfig, own: tuple[int, ...] = ()) -> tuple[int, ...]:
        """The resolutions of a run, or of one concept that has its `own`, smallest first.

        Raises:
            ValueError: one that the base cannot be trained at.
        """
        found = tuple(sorted(set(own or as_resolutions(data.resolution) or (self.native,))))
        for side in found:
            if side % self.multiple:
                raise ValueError(
                    f"data.resolution: got {side}, expected a multiple of {self.multiple} for {self.family}"
                )
        return found


def sizes_of(pipe: Any) -> Sizes:
    """The sizes of a pipeline."""
    family = family_of_pipeline(pipe)
    return Sizes(family.native_side(pipe), pixel_multiple(pipe, family), family.name)
