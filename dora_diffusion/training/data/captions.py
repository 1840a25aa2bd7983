"""Captions: where a picture's own are found, and which text of them a step is trained with.

What a step sees is a function of (seed, epoch, picture) alone, by hashes that no Python version will change.
"""

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_diffusion.utils.images import SUFFIXES
from dora_diffusion.utils.text import shown_path

if TYPE_CHECKING:  # the doctor reads captions with what is here, and needs no pydantic
    from dora_diffusion.training.config import CaptionsConfig

METADATA = "metadata.jsonl"
METADATA_FILES = (METADATA, "metadata.csv", "metadata.parquet")
CAPTION_SUFFIXES = (".txt", ".caption")
CAPTION_COLUMNS = ("text", "caption", "prompt")
TRIGGER = "{}"
_WILDCARD = re.compile(r"\{([^{}]*\|[^{}]*)\}")
_NUMBERS = re.compile(r"(?:^|(?<=\s))[\W\d]+(?=\s|$)")

Captions = tuple[str, ...]


def find_captions(picture: Path, listed: Mapping[Path, Captions]) -> Captions | None:
    """A picture's own captions, each on one line; () when its text file or its line is empty, None when it has none.

    By precedence: the text file of its name (`3.txt` or `3.caption` beside `3.png`, or `3.png.txt`), a line of the
    folder's metadata. Several lines of a text file are several captions.

    Raises:
        ValueError: the text file cannot be read as UTF-8.
    """
    sidecar = find_sidecar(picture)
    if sidecar is not None:
        lines = (" ".join(line.split()) for line in read_text(sidecar).splitlines())
        return tuple(line for line in lines if line)
    return listed.get(picture)


def find_sidecar(picture: Path) -> Path | None:
    """The text file of the picture's name, if there is one."""
    return next((path for path in sidecars_of(picture) if path.is_file()), None)


def sidecars_of(picture: Path) -> list[Path]:
    """Where a picture's text file may lie, by precedence."""
    endings = [ending for suffix in CAPTION_SUFFIXES for ending in (suffix, suffix.upper())]
    return [picture.with_suffix(ending) for ending in endings] + [
        picture.with_name(picture.name + ending) for ending in endings
    ]


def words_of_file(picture: Path) -> str:
    """What a file's name says: `0012_a-red_robot (3).png` -> "a red robot"."""
    spaced = re.sub(r"[\s_\-]+", " ", picture.stem)
    return " ".join(_NUMBERS.sub(" ", spaced).split())


def read_metadata(folder: str | Path) -> dict[Path, Captions]:
    """Picture -> captions, from the folder's `metadata.jsonl`, `.csv` or `.parquet`; {} when there is none.

    The columns are those of Hugging Face's imagefolder: `file_name`, and `text`, `caption` or `prompt`; a list of texts
    is several captions.

    Raises:
        ValueError: one line that names the file and its line: unreadable, no such picture, no caption, named twice; or
            two such files.
    """
    found = [Path(folder) / name for name in METADATA_FILES if (Path(folder) / name).is_file()]
    if len(found) > 1:
        raise ValueError(f"{shown_path(found[1])}: stands beside {found[0].name}, expected one of them")
    captions: dict[Path, Captions] = {}
    for where, row in _rows(found[0]) if found else ():
        picture, texts = _entry(row, Path(folder), where)
        if picture in captions:
            raise ValueError(f"{where}: {shown_path(picture.name)} is named twice, expected one line for each picture")
        captions[picture] = texts
    return captions


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Where each row stands, and the row."""
    if path.suffix == ".csv":
        table = csv.DictReader(io.StringIO(read_text(path), newline=""))
        for row in table:
            yield f"{shown_path(path)}:{table.line_num}", row
    elif path.suffix == ".parquet":
        for number, row in enumerate(_parquet(path), start=1):
            yield f"{shown_path(path)}, row {number}", row
    else:
        for number, line in enumerate(read_text(path).split("\n"), start=1):
            where = f"{shown_path(path)}:{number}"
            if line.strip():
                try:
                    yield where, json.loads(line)
                except (ValueError, RecursionError):
                    raise ValueError(f'{where}: not JSON, expected {{"file_name": "1.png", "text": "a dog"}}') from None


def _parquet(path: Path) -> list[Any]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        hint = "pip install 'dora-diffusion[parquet]', or save it as metadata.csv"
        raise ValueError(f"{shown_path(path)}: needs the package pyarrow; {hint}") from None
    try:
        rows: list[Any] = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise ValueError(f"{shown_path(path)}: no parquet file ({str(error).splitlines()[0]})") from None
    return rows


def _entry(row: Any, folder: Path, where: str) -> tuple[Path, Captions]:
    name = row.get("file_name") if isinstance(row, dict) else None
    if not isinstance(name, str):
        raise ValueError(f"{where}: got no file_name, expected the name of a picture")
    picture = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{where}: file_name {name!r} leads out of the folder, expected a picture in it")
    if picture.suffix.lower() not in SUFFIXES or not os.path.isfile(picture):
        raise ValueError(f"{where}: file_name {name!r} is no picture in {shown_path(folder)}; mend or remove the line")
    found = [row[column] for column in CAPTION_COLUMNS if row.get(column) is not None]
    texts = found[0] if found and isinstance(found[0], list) else found[:1]
    if not texts or not all(isinstance(text, str) for text in texts):
        there = found or [row[column] for column in CAPTION_COLUMNS if column in row]
        got = f"got {there[0]!r}" if there else "got none of them"
        raise ValueError(f"{where}: {got}, expected a caption in one of {', '.join(CAPTION_COLUMNS)}")
    lines = (" ".join(text.split()) for text in texts)
    return picture, tuple(line for line in lines if line)


def read_text(path: Path) -> str:
    """A file's text; a ValueError of one line where it cannot be read as UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{shown_path(path)}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise ValueError(f"{shown_path(path)}: cannot be read ({error.strerror})") from None


def with_trigger(captions: Iterable[str], trigger: str | None, where: str) -> Captions:
    """Captions in which {} is the trigger.

    Raises:
        ValueError: a caption asks for one, and there is none.
    """
    captions = tuple(captions)
    if trigger is None and any(TRIGGER in caption for caption in captions):
        raise ValueError(f"{where}: a caption holds {TRIGGER}, which stands for a trigger; set data.trigger")
    return tuple(caption.replace(TRIGGER, trigger or "") for caption in captions)


def caption_at(captions: Sequence[str], rules: "CaptionsConfig", *, seed: int, place: str, dropout: float) -> str:
    """The text that one sample is trained with.

    Args:
        captions: the picture's; one of them is taken.
        rules: what is done to it, in this order: wildcards, tags left out, tags shuffled.
        seed: of the run.
        place: what tells the sample from all others, such as "epoch/picture".
        dropout: the share of samples whose text is empty.
    """

    def draw(purpose: str) -> float:
        return unit_of(f"{seed}/{place}/{purpose}")

    if draw("dropout") < dropout:
        return ""
    caption = captions[int(draw("caption") * len(captions))]
    if rules.wildcards:
        caption = _chosen(caption, draw)
    if not (rules.shuffle or rules.tag_dropout):
        return caption
    tags = [tag.strip() for tag in caption.split(rules.separator)]
    kept, others = tags[: rules.keep_tokens], tags[rules.keep_tokens :]
    numbered = [(number, tag) for number, tag in enumerate(others) if draw(f"tag {number}") >= rules.tag_dropout]
    if rules.shuffle:
        numbered.sort(key=lambda pair: draw(f"order {pair[0]}"))
    joiner = rules.separator if rules.separator.endswith(" ") else f"{rules.separator} "
    return joiner.join([*kept, *(tag for _, tag in numbered)])


def _chosen(caption: str, draw: Any) -> str:
    """`a {red|green} robot` -> "a green robot"; inner braces first."""
    number = 0
    while (found := _WILDCARD.search(caption)) is not None:
        words = found[1].split("|")
        word = words[int(draw(f"wildcard {number}") * len(words))].strip()
        caption = caption[: found.start()] + word + caption[found.end() :]
        number += 1
    return " ".join(caption.split())


def longest_choice(caption: str) -> str:
    """A caption with the longest of the words that each `{red|green}` may become."""
    while (found := _WILDCARD.search(caption)) is not None:
        caption = caption[: found.start()] + max(found[1].split("|"), key=len).strip() + caption[found.end() :]
    return " ".join(caption.split())


def unit_of(text: str) -> float:
    """A number in [0, 1) that depends on a text alone."""
    digest = hashlib.sha256(text.encode(errors="surrogateescape")).digest()
    return int.from_bytes(digest[:7], "big") / 2**56
