"""Configurations of other trainers -> ours: kohya's sd-scripts, ai-toolkit, OneTrainer, diffusers' DreamBooth scripts.

One table for each trainer (`kohya`, `ai_toolkit`, `one_trainer`, `diffusers`): its key, ours, and a small function for
the value. `reading` tells whose a file is, `convert` walks over its keys, `report` says what became of each.
"""

from pathlib import Path

import yaml

from dora_diffusion.training.import_config import reading
from dora_diffusion.training.import_config.convert import Imported, convert
from dora_diffusion.utils.atomic import write_atomically
from dora_diffusion.utils.text import shown_path


def read_config(path: Path, *, output: Path) -> Imported:
    """A file of another trainer as our settings.

    Args:
        path: the file.
        output: the YAML file that is meant; relative paths are made to start at its folder.

    Raises:
        ValueError: one line that names the file: it cannot be read, or is none of those that are known.
    """
    tool, data = reading.read(path)
    try:
        return convert(tool.read(data, path), tool, output=output)
    except ValueError as error:
        raise ValueError(f"{shown_path(path)}: {error}") from None


def write_config(imported: Imported, path: Path, *, source: Path) -> None:
    """The YAML file of an import; its first line says where it is from."""
    text = yaml.safe_dump(imported.data(), sort_keys=False, allow_unicode=True, width=110)
    name = shown_path(source.name)
    head = (
        f"# From {name}, of {imported.tool.name}: `dora-diffusion import-config {name}` says what of it is not here.\n"
    )
    write_atomically(path, f"{head}{text}".encode())
