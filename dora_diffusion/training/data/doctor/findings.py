"""What the doctor says: faults, each of a kind, and notes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dora_diffusion.training.data.examples import Example
from dora_diffusion.utils.text import shown_path

Kind = Literal[
    "corrupt",
    "sliver",
    "too-small",
    "missing-caption",
    "empty-caption",
    "bad-caption",
    "cut-caption",
    "orphan-caption",
    "orphan-mask",
    "bad-mask",
    "not-an-image",
    "subfolder",
    "same-stem",
    "duplicate",
    "partly-read",
    "tiny",
    "odd-shape",
]

# In the order of the report; True where training would fail or something that lies in the folder would not be used.
IS_LOSS: dict[Kind, bool] = {
    "corrupt": True,
    "sliver": True,
    "too-small": True,
    "missing-caption": True,
    "empty-caption": True,
    "bad-caption": True,
    "cut-caption": True,
    "orphan-caption": True,
    "orphan-mask": True,
    "bad-mask": True,
    "not-an-image": True,
    "subfolder": True,
    "same-stem": False,
    "duplicate": False,
    "partly-read": False,
    "tiny": False,
    "odd-shape": False,
}


@dataclass(frozen=True)
class Finding:
    """One fault.

    Attributes:
        kind: what sort of fault.
        path: the file, or subfolder, that has it.
        message: what is wrong and how to mend it, without the path.
    """

    kind: Kind
    path: Path
    message: str


@dataclass(frozen=True)
class DoctorReport:
    """What was found in a folder, or in all folders of a config.

    Attributes:
        folder: the folder examined; of several the one that holds them all.
        images: pictures that training would use, damaged ones included, masks not.
        sizes: (width, height) in pixels of every readable picture, upright.
        findings: the faults, gravest kind first, then in natural order.
        notes: lines of what is no fault and good to know.
        sized: the pictures as a base trains them, once for each size; () where no size is known.
        sizes_of: for which base and resolution they are sized.
    """

    folder: Path
    images: int
    sizes: tuple[tuple[int, int], ...]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()
    sized: tuple[Example, ...] = ()
    sizes_of: str = ""

    @property
    def losses(self) -> tuple[Finding, ...]:
        """The findings by which training would fail, or leave out something that lies in the folder."""
        return tuple(finding for finding in self.findings if IS_LOSS[finding.kind])


def reason_of(error: ValueError, path: Path) -> str:
    """`FILE: reason` -> `reason`, `FILE:3: reason` -> `line 3: reason`."""
    rest = str(error).removeprefix(f"{shown_path(path)}:")
    return f"line {rest}" if rest[:1].isdigit() else rest.strip()
