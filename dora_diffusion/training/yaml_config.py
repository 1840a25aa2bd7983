"""From a YAML file to data that a pydantic model can check, and from its errors to one line for people.

Knows no key by name: the model (values, sections of values, lists of sections) is an argument.
"""

import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

Model = type[BaseModel]

# Below this likeness the nearest key is no help, and the section's keys are named instead.
_LIKENESS = 0.6

# Pydantic's words for these are about Python, not YAML.
_EXPECTED = {"is_instance_of": "a path", "model_type": "a section of `key: value` lines", "invalid_key": "a name"}

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120


@dataclass(frozen=True)
class YamlFile:
    """A file's mapping, and the line of each of its dotted keys."""

    path: Path
    data: dict[Any, Any]
    lines: Mapping[str, int]


def read(path: Path, model: Model) -> YamlFile:
    """Read a YAML mapping; a section whose lines are all comments (null to YAML) comes back as {}.

    Raises:
        ValueError: one line; no such file, not YAML (with its line), not a mapping, or a key given twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        data = yaml.safe_load(text)
        lines = dict(_lines_of(yaml.compose(text, Loader=yaml.SafeLoader), path))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error}); expected a YAML file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start}); expected a YAML file") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}" if mark else f"{path}"
        raise ValueError(f"{where}: not valid YAML: {error.problem}; check indents, colons and quotes") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        got = "nothing" if data is None else _SHORT.repr(data)
        raise ValueError(f"{path}: got {got}, expected `key: value` lines")
    return YamlFile(path, _with_empty_sections(data, sections_of(model)), lines)


def _with_empty_sections(data: Mapping[Any, Any], sections: Mapping[str, Model], prefix: str = "") -> dict[Any, Any]:
    filled = {}
    for key, value in data.items():
        if f"{prefix}{key}" in sections and (value is None or isinstance(value, dict)):
            value = _with_empty_sections(value or {}, sections, f"{prefix}{key}.")
        filled[key] = value
    return filled


def _lines_of(node: yaml.Node | None, path: Path, prefix: str = "") -> Iterator[tuple[str, int]]:
    """Dotted key -> line; a key that occurs twice is an error (PyYAML takes the last in silence)."""
    seen: dict[str, int] = {}
    if isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            yield from _lines_of(item, path, f"{prefix.removesuffix('.')}[{number}].")
    for key_node, value_node in node.value if isinstance(node, yaml.MappingNode) else ():
        key, line = f"{prefix}{key_node.value}", key_node.start_mark.line + 1
        if key in seen:
            raise ValueError(f"{path}:{line}: {key}: given twice, first in line {seen[key]}; expected it once")
        seen[key] = line
        yield key, line
        yield from _lines_of(value_node, path, f"{key}.")


def override(data: dict[Any, Any], key: str, text: str, model: Model) -> None:
    """Put a flag's value into a file's data, in place.

    Numbers, true, false, null, `[lists]`, `{key: value}` and quoted text are taken as in YAML, all else as text as it
    stands: a prompt may hold `: ` or ` #`, which mean something else in YAML.

    Raises:
        ValueError: no such key.
    """
    if key in sections_of(model):
        first = next(iter(sections_of(model)[key].model_fields))
        raise ValueError(f"--{key}: a section, expected one of its keys, such as --{key}.{first}")
    if key not in keys_of(model):
        raise ValueError(f"--{key}: no such key; {_advice(key, model)}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    if not (value is None or isinstance(value, (int, float, list)) or text.startswith(("'", '"', "{"))):
        value = text
    *sections, name = key.split(".")
    fields: Any = data
    for section in sections:
        fields = fields.setdefault(section, {}) if isinstance(fields, dict) else None
    if isinstance(fields, dict):  # otherwise the section itself is the mistake, and is reported by the model
        fields[name] = value


def sections_of(model: Model, prefix: str = "") -> dict[str, Model]:
    """Dotted key -> the section there; `data.concepts[]` for the items of a list."""
    found: dict[str, Model] = {}
    for name, field in model.model_fields.items():
        kind, key = field.annotation, f"{prefix}{name}"
        if get_origin(kind) is list:
            kind, key = get_args(kind)[0], f"{key}[]"
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= {key: kind, **sections_of(kind, f"{key}.")}
    return found


def keys_of(model: Model) -> list[str]:
    """The dotted key of every value; a list of sections is one."""
    sections = sections_of(model)
    inner = [f"{section}.{name}" for section, kind in sections.items() for name in kind.model_fields]
    return [key for key in (*model.model_fields, *inner) if key not in sections and "[]" not in key]


def one_line(error: ValidationError, file: YamlFile, overrides: Mapping[str, str], model: Model) -> str:
    """The first mistake that pydantic found, where it stands, and how many more there are."""
    key, message = first_mistake(error, model)
    if key in overrides:
        where = f"--{key}"
    else:
        where = f"{file.path}:{file.lines[key]}: {key}" if key in file.lines else f"{file.path}: {key}"
    others = len({_key_of(details, model) for details in error.errors()}) - 1
    more = f" (and {others} more)" if others else ""
    return " ".join(f"{where}: {message}{more}".split())


def first_mistake(error: ValidationError, model: Model) -> tuple[str, str]:
    """The dotted key of the first mistake that pydantic found, and what is wrong with it."""
    # An unknown key comes first: it is often why another one is missing.
    errors = sorted(error.errors(), key=lambda details: details["type"] != "extra_forbidden")
    keys = [_key_of(details, model) for details in errors]
    if errors[0]["type"] == "value_error":  # a check across keys: its message starts with the key
        key, _, message = errors[0]["msg"].removeprefix("Value error, ").partition(": ")
        return key, message
    first = [details for details, other in zip(errors, keys, strict=True) if other == keys[0]]
    return keys[0], _describe(keys[0], first, model)


def _key_of(details: ErrorDetails, model: Model) -> str:
    """The dotted key that an error is about, without list indices and pydantic's names for a union's branches."""
    sections, key = sections_of(model), ""
    for part in details["loc"]:
        if isinstance(part, int) and key:
            if f"{_of_any(key)}[]" not in sections:  # a place in a list of values
                break
            key += f"[{part}]"
        elif not key or _of_any(key) in sections:
            key += f".{part}" if key else str(part)
        else:  # a name for a union's branch, or a key of a value
            break
    return key


def _of_any(key: str) -> str:
    """`data.concepts[1]` -> `data.concepts[]`, as sections are called."""
    return re.sub(r"\[\d+\]", "[]", key)


def _describe(key: str, errors: Sequence[ErrorDetails], model: Model) -> str:
    """What is wrong with one key, from all that pydantic has to say about it."""
    deepest = max(len(details["loc"]) for details in errors)
    errors = [details for details in errors if len(details["loc"]) == deepest]
    if errors[0]["type"] == "extra_forbidden":
        return f"no such key; {_advice(key, model)}"
    if errors[0]["type"] == "missing":
        section, _, name = key.rpartition(".")
        return f"missing; expected: {_section(section, model).model_fields[name].description}"
    texts = [_EXPECTED.get(details["type"], details["msg"].split(" should ", 1)[-1]) for details in errors]
    expected = dict.fromkeys(text.removeprefix("be ").removeprefix("have ") for text in texts)
    return f"got {_SHORT.repr(errors[0]['input'])}, expected {' or '.join(expected)}"


def _advice(key: str, model: Model) -> str:
    """What was probably meant by an unknown key."""
    section, _, name = key.rpartition(".")

    def likeness(known: str) -> tuple[float, float]:
        return (
            SequenceMatcher(None, name, known.rpartition(".")[2]).ratio(),
            SequenceMatcher(None, key, known).ratio(),
        )

    if key in keys_of(model):
        return f"expected {name} indented under {section}:"
    in_item = [f"{section}.{known}" for known in _section(section, model).model_fields] if "[" in section else []
    sections = [known for known in sections_of(model) if "[]" not in known]
    nearest = max(in_item or [*keys_of(model), *sections], key=likeness)
    if likeness(nearest)[0] >= _LIKENESS:
        return f"did you mean {nearest}?"
    return f"expected one of {', '.join(_section(section, model).model_fields)}"


def _section(key: str, model: Model) -> Model:
    """The section of a dotted key, or the model itself where there is none."""
    return sections_of(model).get(_of_any(key), model)
