"""Ways to break a sound file, each a pure function of the file, another file and a random generator."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

from benchmarks.fuzz.parts import Parts, put_together, with_length

Mutation = Callable[[Parts, Parts, Random], bytes]

_HUGE = (2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**30)
_WRONG: tuple[Any, ...] = (-1, 1.5, True, None, "8", "", [], {}, [[1]], *_HUGE)
_SIGNS = (b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"0", b"\x00", b"\xff")
_WHOLE = (
    "F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F8_E8M0", "I64", "I8", "U8", "U16", "U32", "U64", "C64",
    "BOOL",
)  # fmt: skip
_DTYPES = (*_WHOLE, "F4", "F6_E2M3", "F33", "f32", "", "torch.float32")
_SIZES = {"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
_SUFFIXES = (
    "", ".weight", ".alpha", ".dora_scale", ".lora_A.weight", ".lora_B.weight", ".lora_down.weight",
    ".lora_up.weight", ".lora_mid.weight", ".lora_magnitude_vector", ".magnitude", ".diff", ".diff_b", ".w_norm",
    ".hada_w1_a", ".hada_t1", ".lokr_w1", ".lokr_w2", ".lokr_t2", ".lora_B.bias", ".lora_A.default.weight",
    ".lora_B", ".scalar",
)  # fmt: skip
_PREFIXES = (
    "", "lora_unet_", "lora_te_", "lora_te1_", "lora_te3_", "lora_transformer_", "lycoris_", "unet.",
    "transformer.", "clip_l.", "diffusion_model.", "text_encoders.clip_l.transformer.", "text_encoder.",
    "base_model.model.", ".", "..", "t5.",
)  # fmt: skip


def flip_bits(parts: Parts, other: Parts, draw: Random) -> bytes:
    """A few bits anywhere, or in the header only."""
    raw = bytearray(parts.packed())
    end = len(raw) if draw.random() < 0.4 else len(raw) - len(parts.data)
    for _ in range(draw.choice((1, 1, 2, 8, 64))):
        raw[draw.randrange(end)] ^= 1 << draw.randrange(8)
    return bytes(raw)


def change_size(parts: Parts, other: Parts, draw: Random) -> bytes:
    """Cut short, longer, or without a piece of its middle."""
    raw = parts.packed()
    at = draw.randrange(len(raw))
    kind = draw.randrange(3)
    if kind == 0:
        return raw[:at]
    return raw + draw.randbytes(draw.randrange(1, 100)) if kind == 1 else raw[:at] + raw[at + draw.randrange(1, 64) :]


def change_length(parts: Parts, other: Parts, draw: Random) -> bytes:
    """The header's length, a little or absurdly wrong."""
    raw = parts.packed()
    header = raw[8 : len(raw) - len(parts.data)]
    true = len(header)
    length = draw.choice((0, 1, true - 1, true + 1, true + len(parts.data), 2 * true, 100_000_000, 2**63, 2**64 - 1))
    return with_length(header, min(length, 2**64 - 1))[0] + parts.data


def change_text(parts: Parts, other: Parts, draw: Random) -> bytes:
    """Characters of the header's JSON lost, added or put in another's place."""
    raw = parts.packed()
    text = bytearray(raw[8 : len(raw) - len(parts.data)])
    for _ in range(draw.choice((1, 1, 2, 5))):
        at = draw.randrange(len(text))
        kind = draw.randrange(3)
        if kind == 0:
            del text[at]
        else:
            text[at : at + kind - 1] = draw.choice(_SIGNS)
    return with_length(bytes(text))[0] + parts.data


def change_offsets(parts: Parts, other: Parts, draw: Random) -> bytes:
    """Offsets moved, swapped, huge or of another type."""
    entries = _copied(parts)
    key = _key(parts, draw)
    begin, end = entries[key]["data_offsets"]
    by = draw.choice((-8, -1, 1, 4, 64))
    entries[key]["data_offsets"] = draw.choice(
        (
            [begin + by, end + by],
            [begin, end + by],
            [end, begin],
            [begin],
            [],
            [begin, end, end],
            None,
            "08",
            [draw.choice(_WRONG), end],
            [begin, draw.choice(_WRONG)],
            entries[_key(parts, draw)]["data_offsets"],
        )
    )
    return replace(parts, entries=entries).packed()


def change_shape(parts: Parts, other: Parts, draw: Random) -> bytes:
    """A shape that its bytes do not have, or have by chance."""
    entries = _copied(parts)
    entry = entries[_key(parts, draw)]
    shape = entry["shape"]
    side = draw.randrange(len(shape)) if shape else 0
    entry["shape"] = draw.choice(
        (
            shape[::-1],
            [*shape, 1],
            [1, *shape],
            [math.prod(shape)],
            [],
            [0, *shape],
            [2**32, 2**32],
            [2**62, 4, *shape],
            [1] * 8 + shape,
            [0, 2**62, 2**62],
            None,
            "",
            str(shape),
            {},
            8,
            [*shape[:side], draw.choice(_WRONG), *shape[side + 1 :]],
        )
    )
    return replace(parts, entries=entries).packed()


def change_dtype(parts: Parts, other: Parts, draw: Random) -> bytes:
    """Another dtype, of any width; half the time for all tensors."""
    entries = _copied(parts)
    dtype = draw.choice((*_DTYPES, None, 8))
    for key in entries if draw.random() < 0.5 else [_key(parts, draw)]:
        entries[key]["dtype"] = dtype
    return replace(parts, entries=entries).packed()


def change_entry(parts: Parts, other: Parts, draw: Random) -> bytes:
    """An entry that lacks a field, has another, or is no object."""
    entries = _copied(parts)
    key = _key(parts, draw)
    kind = draw.randrange(4)
    if kind == 0:
        entries[key].pop(draw.choice(("dtype", "shape", "data_offsets")))
    elif kind == 1:
        entries[key]["more"] = draw.choice(_WRONG)
    else:
        entries[key] = draw.choice((*_WRONG, {}, list(entries[key].values())))
    return replace(parts, entries=entries).packed()


def change_keys(parts: Parts, other: Parts, draw: Random) -> bytes:
    """Keys renamed: a letter, a number, a prefix, a suffix, two swapped, too long, with control characters."""
    keys = list(parts.entries)
    for _ in range(draw.choice((1, 1, 2, len(keys)))):
        at = draw.randrange(len(keys))
        keys[at] = _renamed(keys[at], draw)
    if draw.random() < 0.2:
        one, two = draw.randrange(len(keys)), draw.randrange(len(keys))
        keys[one], keys[two] = keys[two], keys[one]
    renamed = dict(zip(keys, parts.entries.values(), strict=True))
    if len(renamed) < len(keys):  # two came out alike: the file stays whole without the first
        pieces = {
            key: (entry["dtype"], entry["shape"], parts.data[slice(*entry["data_offsets"])])
            for key, entry in renamed.items()
        }
        return put_together(pieces, parts.metadata).packed()
    return replace(parts, entries=renamed).packed()


def _renamed(key: str, draw: Random) -> str:
    layer, _, suffix = key.partition(".lora_") if ".lora_" in key else key.rpartition(".")
    at = draw.randrange(max(1, len(key)))
    digits = [place for place, letter in enumerate(key) if letter.isdigit()]
    place = draw.choice(digits) if digits else at
    return draw.choice(
        (
            key[:at] + draw.choice("abc0._ é") + key[at + 1 :],
            key[:at] + key[at + 1 :],
            key[:place] + draw.choice(("9", "-1", "99999999999999999999", "²", "")) + key[place + 1 :],
            layer + draw.choice(_SUFFIXES),
            draw.choice(_PREFIXES) + key,
            draw.choice(_PREFIXES) + key.partition(".")[2],
            key.upper(),
            key * draw.choice((2, 200)),
            key[:at] + draw.choice(("\n", "\r", "\x00", "\x1b[2J", "\u2028", "\ud800", "\U0001f600")) + key[at:],
            f"__metadata__{draw.choice(('', '.weight'))}",
            suffix or "x",
        )
    )


def choose_tensors(parts: Parts, other: Parts, draw: Random) -> bytes:
    """Tensors left out or in another order; the file itself stays whole."""
    keys = draw.sample(list(parts.entries), draw.randint(0, len(parts.entries)))
    return put_together({key: _piece(parts, key) for key in keys}, parts.metadata).packed()


def repeat_key(parts: Parts, other: Parts, draw: Random) -> bytes:
    """A key, or a field of an entry, that occurs twice in the JSON."""
    raw = parts.packed()
    text = raw[8 : len(raw) - len(parts.data)].decode()
    key = _key(parts, draw)
    field = draw.choice(("dtype", "shape", "data_offsets"))
    entry = json.dumps(parts.entries[key], separators=(",", ":"))
    value = json.dumps(parts.entries[key][field], separators=(",", ":"))
    if draw.random() < 0.5:
        text = text[:-1] + f",{json.dumps(key)}:{entry}}}"
    else:
        text = text.replace(entry, f'{entry[:-1]},"{field}":{value}}}', 1)
    return with_length(text.encode())[0] + parts.data


def resize_tensors(parts: Parts, other: Parts, draw: Random) -> bytes:
    """Tensors of other shapes whose bytes are there: the container is sound, the adapter is not."""
    pieces = {key: _piece(parts, key) for key in parts.entries}
    for key in draw.sample(list(pieces), draw.choice((1, 1, min(2, len(pieces))))):
        dtype, shape, raw = pieces[key]
        shape = draw.choice(
            (
                [side + draw.choice((-1, 1, 3)) for side in shape],
                shape[::-1],
                [*shape, 1, 1],
                shape[:1],
                [],
                [0],
                [1],
                [max(side, 1) * 2 for side in shape],
                [0 for _ in shape],
                [1, *shape],
                [3] * 5,
            )
        )
        shape = [max(0, side) for side in shape]
        count = math.prod(shape) * _SIZES.get(dtype, 1)
        pieces[key] = (dtype, shape, (raw * (count // max(1, len(raw)) + 1))[:count].ljust(count, b"\x00"))
    return put_together(pieces, parts.metadata).packed()


def retype_tensors(parts: Parts, other: Parts, draw: Random) -> bytes:
    """Tensors of other dtypes whose bytes are there."""
    pieces = {key: _piece(parts, key) for key in parts.entries}
    for key in pieces if draw.random() < 0.3 else [_key(parts, draw)]:
        _, shape, raw = pieces[key]
        dtype = draw.choice(_WHOLE)
        count = math.prod(shape) * _SIZES.get(dtype, 1)
        # zeros and ones are finite in every type
        pieces[key] = (dtype, shape, bytes(count) if draw.random() < 0.7 else bytes([1]) * count)
    return put_together(pieces, parts.metadata).packed()


def change_values(parts: Parts, other: Parts, draw: Random) -> bytes:
    """NaN, infinities, the largest and smallest numbers, zeros."""
    data = bytearray(parts.data)
    key = _key(parts, draw)
    begin, end = parts.entries[key]["data_offsets"]
    infinite, largest, smallest = b"\x80\x7f\x00\x00\x80\x7f", b"\xff\xff\x7f\x7f", b"\x00\x00\x80\x00"
    pattern = draw.choice((b"\xff", b"\x7f", b"\x00", infinite, largest, smallest))
    at = draw.randrange(begin, max(begin + 1, end)) & ~3
    stop = end if draw.random() < 0.5 else min(end, at + 8)
    data[at:stop] = (pattern * (stop - at))[: stop - at]
    return replace(parts, data=bytes(data)).packed()


def change_metadata(parts: Parts, other: Parts, draw: Random) -> bytes:
    """Metadata of wrong types, and JSON inside that is deep, long or not what a reader expects."""
    inside = draw.choice(_METADATA_JSON)
    value = draw.choice((*_WRONG, "[" * 20_000, "{" * 20_000, "x" * 100_000, "\n\r\x00", "\ud800", inside, inside))
    key = draw.choice(
        (
            "lora_adapter_metadata",
            "lora_adapter_metadata",
            "dora_diffusion.magnitude_axis",
            "ss_network_args",
            "ot_config",
            "ss_base_model_version",
            "modelspec.architecture",
            "note",
            "n" * 5000,
            "a\nb",
            "",
        )
    )
    metadata: Any = {**parts.metadata, key: value}
    if draw.random() < 0.1:
        metadata = draw.choice(([], [1], "x", 8, None))
    header = {"__metadata__": metadata, **parts.entries}
    return with_length(json.dumps(header).encode())[0] + parts.data


_METADATA_JSON = tuple(
    json.dumps(config)
    for config in (
        *({"unet.r": 2, "unet.lora_alpha": alpha} for alpha in (None, "8", [], 1e300, -1, 0, True, 10**400)),
        *(
            {"unet.alpha_pattern": {pattern: 3}}
            for pattern in ("to_q", "(a+)+$", "(", "[", ".*.*.*.*", "^$", "x" * 5000)
        ),
        {"unet.alpha_pattern": ["to_q"]},
        {"unet.rank_pattern": 8},
        {"unet.target_modules": 8, "unet.r": "x"},
        {"wd_on_output": "True"},
        {"wd_on_output": 8},
        [1, 2],
        "x",
        None,
    )
) + (
    '{"unet.lora_alpha": NaN}',
    '{"unet.lora_alpha": Infinity}',
    '{"unet.lora_alpha": 1e999}',
    "{",
    "",
    "out",
    "in",
    "both",
)


def splice(parts: Parts, other: Parts, draw: Random) -> bytes:
    """Two files in one: a header on the other's data, the first half of one, or tensors of both."""
    kind = draw.randrange(4)
    one, two = parts.packed(), other.packed()
    if kind == 0:
        return replace(parts, data=other.data).packed()
    if kind == 1:
        return one[: draw.randrange(len(one))] + two[draw.randrange(len(two)) :]
    pieces = {key: _piece(parts, key) for key in parts.entries}
    more = {key: _piece(other, key) for key in other.entries}
    if kind == 2:
        return put_together({**pieces, **more}, {**parts.metadata, **other.metadata}).packed()
    renamed = dict(zip(pieces, (more[key] for key in more), strict=False))  # the one's keys, the other's tensors
    return put_together({**pieces, **renamed}, other.metadata).packed()


def leave(parts: Parts, other: Parts, draw: Random) -> bytes:
    """Nothing at all: the good ones must be read."""
    return parts.packed()


_BYTES = (flip_bits, change_size, change_length, change_text, splice, leave)
_FIELDS = (change_offsets, change_shape, change_dtype, change_entry, repeat_key, change_metadata)
_TENSORS = (change_keys, choose_tensors, resize_tensors, retype_tensors, change_values)
MUTATIONS: dict[str, Mutation] = {mutation.__name__: mutation for mutation in (*_BYTES, *_FIELDS, *_TENSORS)}


def _copied(parts: Parts) -> dict[str, Any]:
    return {key: dict(entry) for key, entry in parts.entries.items()}


def _key(parts: Parts, draw: Random) -> str:
    return draw.choice(list(parts.entries))


def _piece(parts: Parts, key: str) -> tuple[str, list[int], bytes]:
    entry = parts.entries[key]
    return entry["dtype"], entry["shape"], parts.piece(key)


def mutated(sound: dict[str, Parts], seed: int, number: int) -> tuple[str, bytes]:
    """(what was done to which file, the bytes): the same for the same seed and number."""
    draw = Random(f"{seed}-{number}")
    name, mutation = list(MUTATIONS.items())[number % len(MUTATIONS)]
    source, other = draw.choice(list(sound)), draw.choice(list(sound))
    return f"{name} of {source}", mutation(sound[source], sound[other], draw)
