"""Pictures' shapes: which are refused, which are cut, and the size that each is trained at."""

from collections.abc import Sequence
from dataclasses import dataclass

from dora_diffusion.training.base.sizes import Sizes
from dora_diffusion.training.config import DataConfig
from dora_diffusion.training.data.buckets import in_buckets
from dora_diffusion.training.data.doctor.findings import Finding, reason_of
from dora_diffusion.training.data.examples import Example


@dataclass(frozen=True)
class Sizing:
    """How pictures are sized.

    Attributes:
        data: resolutions, and whether there are buckets.
        sizes: of the base.
        base: its name.
    """

    data: DataConfig
    sizes: Sizes
    base: str

    def __str__(self) -> str:
        sides = ", ".join(map(str, self.sizes.resolutions(self.data)))
        return f"{self.base} at {sides}, sides multiples of {self.sizes.multiple}"


def sized_examples(examples: Sequence[Example], sizing: Sizing) -> tuple[list[Example], list[Finding]]:
    """Examples, once for each size that they are trained at, and those that cannot be.

    Raises:
        ValueError: a resolution that the base cannot be trained at.
    """
    for own in {example.resolutions for example in examples}:
        sizing.sizes.resolutions(sizing.data, own)
    sized: list[Example] = []
    findings: list[Finding] = []
    for example in examples:
        try:
            sized += in_buckets([example], sizing.data, sizing.sizes)
        except ValueError as error:
            findings.append(Finding("too-small", example.path, reason_of(error, example.path)))
    return sized, findings
