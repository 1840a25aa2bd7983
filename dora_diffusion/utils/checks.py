"""Records that people build by hand check their fields' types by their own annotations, and say which is wrong."""

import numbers
import reprlib
import types
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from dora_diffusion.utils.text import shown_value

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60
_UNIONS = (Union, types.UnionType)
_WORDS: Mapping[Any, str] = {
    **{int: "a whole number", float: "a number", bool: "True or False", str: "text", type(None): "None"},
    **{Mapping: "a mapping", dict: "a mapping"},
}


def check_fields(record: Any) -> None:
    """A ValueError of one line for the first field of a dataclass whose value is of another type than annotated.

    numpy's numbers pass for Python's, a whole number for any number; True and False are no numbers. What the values of
    a `Literal` are, and what numbers lie in range, is the record's own to check.
    """
    for name, kind in _kinds(type(record)).items():  # type: ignore[arg-type]  # mypy: a class has no hash
        check_type(f"{type(record).__name__}.{name}", getattr(record, name), kind)


@cache
def _kinds(record: type) -> dict[str, Any]:
    hints = get_type_hints(record)
    return {field.name: hints[field.name] for field in fields(record)}


def check_type(label: str, value: object, kind: Any) -> None:
    """A ValueError of one line when a value is not of the kind that an annotation names."""
    if not _fits(value, kind):
        what = "" if value is None else f" ({type(value).__name__})"
        got = " ".join(_SHORT.repr(value).split())
        raise ValueError(f"{label}: got {got}{what}, expected {_in_words(kind)}")


def _fits(value: object, kind: Any) -> bool:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in _UNIONS:
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return any(isinstance(value, type(one)) for one in inner)
    if kind in (int, float):
        number = numbers.Integral if kind is int else numbers.Real
        return isinstance(value, number) and not isinstance(value, bool)
    if kind is None:
        return value is None
    if isinstance(origin, type):
        return _holds(value, origin, inner)
    return isinstance(value, kind) if isinstance(kind, type) else True


def _holds(value: object, origin: type, inner: tuple[Any, ...]) -> bool:
    """Whether a container is one, and what it holds fits; what it is asked of a function is not known."""
    if not isinstance(value, origin) or isinstance(value, str):
        return False
    if isinstance(value, Mapping):
        return all(_fits(key, inner[0]) and _fits(one, inner[1]) for key, one in value.items())
    if isinstance(value, tuple) and inner[-1:] != (...,) and issubclass(origin, tuple):
        return len(value) == len(inner) and all(map(_fits, value, inner))
    return not isinstance(value, Sequence) or all(_fits(one, inner[0]) for one in value)


def _in_words(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in _UNIONS:
        return " or ".join(_in_words(one) for one in inner)
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"a mapping of {_in_words(inner[0])} to {_in_words(inner[1])}"
    if isinstance(origin, type) and issubclass(origin, Sequence):
        return f"a {origin.__name__.lower()} of {_in_words(inner[0])}"
    if kind in _WORDS:
        return _WORDS[kind]
    name = kind.__name__ if isinstance(kind, type) else str(kind)
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def check_number(name: str, value: object, *, low: float, high: float) -> float:
    """The value as a float.

    Raises:
        ValueError: not a finite number of [low, high].
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high:
        return float(value)
    raise ValueError(f"{name}: got {shown_value(value)}, expected a number from {low:g} to {high:g}")


def check_whole(name: str, value: object, *, low: int, high: int) -> int:
    """The value as an int.

    Raises:
        ValueError: not a whole number of [low, high].
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high and value == int(value):
        return int(value)
    raise ValueError(f"{name}: got {shown_value(value)}, expected a whole number from {low} to {high}")
