"""How many steps an epoch of another trainer has: its pictures, if they are on this machine."""

import math
from collections.abc import Iterable

from dora_diffusion.training.data.concepts import repeated_folders
from dora_diffusion.training.data.examples import find_pictures
from dora_diffusion.training.data.masks import is_mask
from dora_diffusion.training.import_config.records import Folder, Source


def pictures_of(source: Source, path: str) -> int:
    """How many pictures a folder has, its masks not counted.

    Raises:
        ValueError: it is not on this machine.
    """
    if not source.has_folder(path):
        raise ValueError(f"counts the pictures of {path!r}, which is not on this machine; set the steps yourself")
    try:
        return sum(not is_mask(file) for file in find_pictures(source.at(path), ()))
    except ValueError:  # none at all
        return 0


def _learnt(source: Source, folders: Iterable[Folder]) -> int:
    learnt = [folder for folder in folders if not folder.is_class]
    return sum(
        int(folder.repeats * pictures_of(source, folder.path) if folder.samples is None else folder.samples)
        for folder in learnt
    )


def samples_of_an_epoch(source: Source) -> int:
    """Pictures of an epoch, each as often as it is repeated; those of the class are not counted.

    Raises:
        ValueError: a folder is not on this machine, or there is nothing to count.
    """
    count = _learnt(source, source.folders)
    if source.tree is not None:
        own = pictures_of(source, source.tree)
        inner = [Folder(str(one.path.absolute()), one.repeats) for one in repeated_folders(source.at(source.tree))]
        count += _learnt(source, inner) if inner else own
    if count < 1:
        raise ValueError("counts pictures, and the file names no folder that has some; set the steps yourself")
    return count


def steps_of(samples: int, *, batch: int, accumulation: int) -> int:
    """Optimiser steps of so many samples, the last of them with what is left."""
    return math.ceil(math.ceil(samples / batch) / accumulation)
