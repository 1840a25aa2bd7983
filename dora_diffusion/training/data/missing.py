"""Pictures that can no longer be read while a run is on."""

from pathlib import Path

from tqdm import tqdm


class PicturesMissing(ValueError):
    """So many pictures of a run can no longer be read that it stops."""


class MissingPictures:
    """Which of a run's pictures cannot be read now. Each is told once; one that is back counts no longer.

    Args:
        count: the run's pictures.
        share: how many of them may be missing before `note` raises.
    """

    def __init__(self, count: int, *, share: float) -> None:
        self._count, self._share = count, share
        self._gone: set[Path] = set()

    def note(self, path: Path, error: ValueError) -> None:
        """A picture cannot be read: its sample is left out.

        Raises:
            PicturesMissing: more than the share are missing.
        """
        if path in self._gone:
            return
        self._gone.add(path)
        if len(self._gone) > self._share * self._count:
            raise PicturesMissing(
                f"{len(self._gone)} of {self._count} pictures cannot be read any more, more than guard.missing "
                f"{self._share:g} allows; the last: {error}. Put them back and go on with --resume latest"
            )
        tqdm.write(f"{error}; its samples are left out while it is away")

    def found(self, path: Path) -> None:
        """A picture was read."""
        self._gone.discard(path)
