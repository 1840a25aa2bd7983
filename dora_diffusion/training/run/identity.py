"""What a run is made of, by hashes: its pictures, captions, masks and base; and what of it has changed."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import nn

from dora_diffusion.families import family_of_pipeline
from dora_diffusion.training.base.identity import weights_digest
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.data.concepts import Split
from dora_diffusion.training.data.examples import Example
from dora_diffusion.utils.atomic import sha256_of
from dora_diffusion.utils.text import shown_path

_NAMED_AT_MOST = 3
_HASHED_AT_ONCE = 8
# An example's fields, by the name of what they make up; others go by their own.
_WORDS = {"path": "picture", "caption": "caption", "others": "caption"}
# What follows from the picture, the settings and the base.
_DERIVED = ("original", "size", "resolutions")

Part = Mapping[str, Any]


@dataclass(frozen=True)
class Identity:
    """What a run is made of.

    Attributes:
        parts: `pictures` and `class pictures` (a picture's name -> its hash, its captions' and masks', its role),
            `base` (component -> hash), `base.adapters`; one that is not known yet is missing.
        accepted: what had changed at a resumption that was to go on all the same, a line each.
    """

    parts: Mapping[str, Part]
    accepted: tuple[str, ...] = field(default=())

    def to_json(self) -> str:
        """As `from_json` reads it."""
        return json.dumps({"parts": self.parts, "accepted": self.accepted}, indent=1, ensure_ascii=True)

    @classmethod
    def from_json(cls, text: str) -> "Identity":
        """The identity that a checkpoint holds."""
        found = json.loads(text)
        return cls(found["parts"], tuple(found["accepted"]))


def pictures_identity(config: TrainConfig, split: Split) -> Part:
    """Of the pictures that are learnt, measured, and given for the class."""
    roles = {"learnt": split.train, "measured": split.validation, "class": split.classes}
    return examples_identity(config, [(role, example) for role, examples in roles.items() for example in examples])


def examples_identity(config: TrainConfig, examples: Sequence[tuple[str, Example]]) -> Part:
    """Of examples with their roles: name, relative to the folder that holds it -> what is known of it, hashed."""
    folders = _folders(config)
    with ThreadPoolExecutor(_HASHED_AT_ONCE) as threads:
        facts = list(threads.map(lambda one: {"role": one[0], **_facts(one[1])}, examples))
    named: dict[str, Any] = {}
    times: Counter[str] = Counter()
    for (_, example), known in zip(examples, facts, strict=True):
        name = _name(example.path, folders)
        times[name] += 1
        named[name if times[name] == 1 else f"{name} ({times[name]})"] = known
    return named


def base_identity(pipe: Any) -> Part:
    """Of the base's parts that training asks: denoiser, autoencoder, text encoders, and how its scheduler predicts."""
    family = family_of_pipeline(pipe)
    names = [family.denoiser.name, "vae", *(part.name for part in family.text_encoders)]
    parts = {name: getattr(pipe, name, None) for name in names}
    digests = {name: weights_digest(part) for name, part in parts.items() if isinstance(part, nn.Module)}
    scheduler = pipe.scheduler
    return {**digests, "scheduler": f"{type(scheduler).__name__} {scheduler.config.get('prediction_type')}"}


def below_identity(config: TrainConfig) -> Part:
    """Of the adapters below what is trained: name -> strength and hash."""
    return {file.name: [strength, sha256_of(file)] for file, strength in config.base.adapters.items()}


def _facts(example: Example) -> dict[str, Any]:
    """What an example says: files by their bytes, texts by a hash, numbers as they are."""
    kept: dict[str, Any] = {}
    texts: dict[str, list[Any]] = {}
    for one in (one for one in fields(example) if one.name not in _DERIVED):
        value, word = getattr(example, one.name), _WORDS.get(one.name, one.name)
        if isinstance(value, Path):
            if value.is_file():
                kept[word] = sha256_of(value)
        elif value is None or isinstance(value, (int, float, bool)):
            kept[word] = value
        else:
            texts.setdefault(word, []).append(value)
    return kept | {word: _text_hash(values) for word, values in texts.items()}


def _text_hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, default=str).encode()).hexdigest()


def _folders(config: TrainConfig) -> dict[Path, str]:
    """Where pictures may lie -> what stands before their names."""
    data, prior = config.data, config.prior
    named = [("", data.instance_dir), ("validation/", data.validation_dir)]
    named += [(f"concepts[{index}]/", concept.dir) for index, concept in enumerate(data.concepts)]
    named += [("class/", prior.class_dir or config.output_dir / "class")]
    found: dict[Path, str] = {}
    for name, folder in named:
        if folder is not None:
            found.setdefault(folder, name)
    return found


def _name(path: Path, folders: Mapping[Path, str]) -> str:
    """A picture's name, whose beginning says which folder it is in: its nearest."""
    around = next((parent for parent in path.parents if parent in folders), path.parent)
    return folders.get(around, "") + path.relative_to(around).as_posix()


def changes(old: Identity, new: Identity) -> list[str]:
    """What is no longer as it was, a few words for each kind of change; parts that one does not know are left out."""
    told: list[str] = []
    for part, now in new.parts.items():
        before = old.parts.get(part)
        if before is None:
            continue
        if part == "base":
            names = sorted(before.keys() | now.keys())
            told += [f"the base's {name} changed" for name in names if _differs(name, before, now)]
        elif part == "base.adapters":
            names = sorted(name for name in before.keys() | now.keys() if _differs(name, before, now))
            told += [f"{part}.{name} was {before.get(name)!r} and is now {now.get(name)!r}" for name in names]
        else:
            told += _of_pictures(before, now, "class picture" if part.startswith("class") else "picture")
    return told


def _differs(name: str, before: Part, now: Part) -> bool:
    return bool(before.get(name) != now.get(name))


def _of_pictures(before: Part, now: Part, word: str) -> list[str]:
    told = [
        *_counted(word, "removed", [name for name in before if name not in now]),
        *_counted(word, "added", [name for name in now if name not in before]),
    ]
    by_kind: dict[str, list[str]] = {}
    for name in (name for name in now if name in before):
        for kind in sorted(before[name].keys() | now[name].keys()):
            if _differs(kind, before[name], now[name]):
                by_kind.setdefault(kind, []).append(name)
    for kind, names in by_kind.items():
        told += _counted(word if kind == "picture" else kind, "changed", names)
    return told


def _counted(word: str, what: str, names: Sequence[str]) -> list[str]:
    """`3 pictures changed: a.png, b.png, c.png`; nothing where there are no names."""
    if not names:
        return []
    shown = ", ".join(shown_path(Path(name)) for name in names[:_NAMED_AT_MOST])
    more = " ..." if len(names) > _NAMED_AT_MOST else ""
    several = "s" if len(names) > 1 and not word.endswith("s") else ""
    return [f"{len(names)} {word}{several} {what}: {shown}{more}"]
