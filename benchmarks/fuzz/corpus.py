"""Files that no mutation makes: the absurd, the hostile, the merely large, and what is no file at all."""

import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.fuzz.parts import Parts, of_tensors, with_length
from dora_diffusion.formats.safetensors_reader import MAX_TENSORS

Maker = Callable[[Path], None]
KEY = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
# a layer of each name, however many
LAYER = "unet.down_blocks.0.attentions.0.transformer_blocks.{}.attn1.to_q"


def special_files() -> dict[str, Maker]:
    """Name -> what makes it at a path."""
    return {**_HEADERS, **_LARGE, **_METADATA, **_ADAPTERS, **_NO_FILES}


def _raw(data: bytes) -> Maker:
    return lambda path: void(path.write_bytes(data))


def void(_: object) -> None:
    """Drop a value, in a lambda."""


def _header(text: bytes, data: bytes = b"") -> Maker:
    return _raw(with_length(text)[0] + data)


def _lazily(make: Callable[[], bytes]) -> Maker:
    """A large file, made only when it is wanted."""
    return lambda path: void(path.write_bytes(make()))


def _entry(*, dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> bytes:
    return json.dumps({KEY: {"dtype": dtype, "shape": shape, "data_offsets": offsets}}).encode()


def _many(count: int, key: Callable[[int], str], *, size: int = 2, dtype: str = "F16") -> bytes:
    """A sound container of so many small tensors."""
    text = ",".join(
        f'{json.dumps(key(n))}:{{"dtype":"{dtype}","shape":[{size // 2}],"data_offsets":[{size * n},{size * (n + 1)}]}}'
        for n in range(count)
    )
    return with_length(f"{{{text}}}".encode())[0] + bytes(size * count)


def _pairs(count: int) -> bytes:
    """A sound adapter of so many layers."""
    tensors = {}
    for number in range(count):
        tensors[f"{LAYER.format(number)}.lora_A.weight"] = torch.ones(1, 2)
        tensors[f"{LAYER.format(number)}.lora_B.weight"] = torch.ones(2, 1)
    return of_tensors(tensors).packed()


def _filled(unit: bytes, megabytes: float, start: bytes = b'{"a":[', end: bytes = b"0]}") -> bytes:
    return with_length(start + unit * int(megabytes * 2**20 / len(unit)) + end)[0]


_HEADERS: dict[str, Maker] = {
    "empty": _raw(b""),
    "seven bytes": _raw(b"\0" * 7),
    "eight zeros": _raw(b"\0" * 8),
    "length only": _raw((8).to_bytes(8, "little")),
    "no tensors": _header(b"{}"),
    "metadata alone": _header(b'{"__metadata__":{"a":"b"}}'),
    "a list": _header(b"[]"),
    "a number": _header(b"8"),
    "null": _header(b"null"),
    "NaN": _header(b"NaN"),
    "text": _raw(b"Hello, I am no adapter. " * 50),
    "an HTML page": _raw(b"<!DOCTYPE html><html><body>404: not found</body></html>" * 20),
    "a pointer of git LFS": _raw(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 144\n"),
    "a zip": _raw(b"PK\x03\x04" + b"\0" * 200),
    "a GGUF": _raw(b"GGUF\x03\0\0\0" + b"\0" * 200),
    "a PNG": _raw(b"\x89PNG\r\n\x1a\n" + b"\0" * 200),
    "byte order mark": _header(b"\xef\xbb\xbf" + _entry(), bytes(4)),
    "UTF-16": _header(_entry().decode().encode("utf-16"), bytes(4)),
    "not UTF-8": _header(b'{"\xff\xfe":0}'),
    "padded": _header(_entry() + b" " * 100, bytes(4)),
    "trailing bytes": _header(_entry(), bytes(5)),
    "trailing JSON": _header(_entry() + b"{}", bytes(4)),
    "deep lists": _header(b"[" * 100_000 + b"]" * 100_000),
    "deep objects": _header(b'{"a":' * 20_000 + b"0" + b"}" * 20_000),
    "deep in a shape": _header(_entry(shape=8).replace(b"8", b"[" * 5000 + b"]" * 5000), bytes(4)),
    "long number": _header(_entry(shape=["N"]).replace(b'"N"', b"1" * 1_000_000), bytes(4)),
    "negative zero": _header(_entry(shape=["N"]).replace(b'"N"', b"-0"), bytes(4)),
    "shape overflow": _header(_entry(shape=[2**32, 2**32, 4]), bytes(4)),
    "shape overflow to its bytes": _header(_entry(shape=[2**62, 4, 1]), bytes(4)),
    "zero beside huge": _header(_entry(shape=[0, 2**62, 2**62], offsets=[0, 0])),
    "more than the file": _header(_entry(shape=[2**38], offsets=[0, 2**40]), bytes(4)),
    "empty tensor": _header(_entry(shape=[0, 8], offsets=[0, 0])),
    "scalar": _header(_entry(shape=[]), bytes(4)),
    "overlap": _header(_entry()[:-1] + b',"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "hole": _header(_entry()[:-1] + b',"b":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}}', bytes(12)),
    "unaligned": _header(
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"F32","shape":[1],"data_offsets":[1,5]}}',
        bytes(5),
    ),
    "key twice": _header(b'{"a":0,"a":0}'),
    "field twice": _header(b'{"a":{"dtype":"F32","dtype":"F16","shape":[1],"data_offsets":[0,2]}}', bytes(2)),
    "metadata twice": _header(b'{"__metadata__":{"a":"b","a":"c"}}'),
    "metadata as a tensor": _header(b'{"__metadata__":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
    "numbers in metadata": _header(b'{"__metadata__":{"a":8}}'),
    "half a character": _header(b'{"__metadata__":{"a":"\\ud800"}}'),
    "half a character in a key": _header(_entry().replace(b"unet", b"\\ud800unet"), bytes(4)),
    "lines in a key": _header(_entry().replace(b"unet", b"\\r\\nunet\\u2028"), bytes(4)),
    "terminal codes in a key": _header(_entry().replace(b"unet", b"\\u001b[2Junet\\u0000"), bytes(4)),
    "long key": _header(_entry().replace(b"unet", b"u" * 10_000), bytes(4)),
    "long bad dtype": _header(_entry(dtype="F" * 100_000), bytes(4)),
    "signal that is not finite": _header(_entry(), b"\0\0\xc0\x7f"),
}
_LARGE: dict[str, Maker] = {
    "header of 100 MB": _lazily(lambda: _filled(b" ", 100)),
    "header of 100 MB claimed": _raw((100 * 2**20).to_bytes(8, "little") + b"{" * 100),
    "header of all bytes": _raw((2**64 - 1).to_bytes(8, "little") + b"{}"),
    "a million tiny tensors": _lazily(lambda: _many(1_000_000, str)),
    "a hundred thousand": _lazily(lambda: _many(100_000, str)),
    "most allowed: tensors of nothing known": _lazily(
        lambda: _many(MAX_TENSORS, lambda number: f"tensor.number.{number}.of.many")
    ),
    "most allowed: halves of pairs": _lazily(lambda: _many(MAX_TENSORS, lambda n: f"{LAYER.format(n)}.lora_A.weight")),
    "most allowed: keys of kohya, flat": _lazily(
        lambda: _many(MAX_TENSORS, lambda n: f"lora_unet_down_blocks_{n}_attentions_0_transformer_blocks_0.alpha")
    ),
    "one tensor too many": _lazily(lambda: _many(MAX_TENSORS + 1, str)),
    "lists without end": _lazily(lambda: _filled(b"[],", 4.9)),
    "lists within the count": _lazily(lambda: _filled(b"[],", 0.14)),
    "objects without end": _lazily(lambda: _filled(b"{},", 4.9)),
    "numbers without end": _lazily(lambda: _filled(b"1000,", 4.9)),
    "strings without end": _lazily(lambda: _filled(b'"a",', 4.9)),
    "escapes without end": _lazily(lambda: _filled(b'\\"', 4.9, b'{"a":"', b'"}')),
    "backslashes without end": _lazily(lambda: _filled(b"\\\\", 4.9, b'{"a":"', b'"}')),
    "quotes without end": _lazily(lambda: _filled(b'"', 4.9)),
    "numbers of 4,000 digits": _lazily(lambda: _filled(b"1" * 4000 + b",", 4.9)),
    "blanks without end": _lazily(lambda: _filled(b" ", 4.9)),
    "a key of 5 MB": _lazily(lambda: _filled(b"k", 4.9, b'{"', b'":0}')),
    "widest characters": _lazily(lambda: _filled("\U0001f600".encode(), 4.9, b'{"__metadata__":{"a":"', b'"}}')),
    "one wide character": _lazily(lambda: _filled(b"x", 4.9, '{"__metadata__":{"a":"\U0001f600'.encode(), b'"}}')),
    "most tensors, widest keys": _lazily(
        lambda: _many(24_999, lambda n: f"{n}".rjust(20, "\U0001f600"), size=0, dtype="F16")
    ),
    "most tensors, most sides": _lazily(
        lambda: Parts(
            {
                f"{n}.": {"dtype": "U8", "shape": [1000, 0, *[1000] * 4], "data_offsets": [0, 0]}
                for n in range(MAX_TENSORS)
            },
            b"",
        ).packed()
    ),
    "NaN at the end of 32 MB": _lazily(
        lambda: Parts(
            {KEY: {"dtype": "F32", "shape": [8 * 2**20], "data_offsets": [0, 32 * 2**20]}},
            bytes(32 * 2**20 - 4) + b"\0\0\xc0\x7f",
        ).packed()
    ),
    "an adapter of 2,000 layers": _lazily(lambda: _pairs(2000)),
}


def _with_metadata(key: str, value: Callable[[], str], layers: int = 1) -> Maker:
    def make() -> bytes:
        tensors = {}
        for number in range(layers):
            tensors[f"{LAYER.format(number)}.lora_A.weight"] = torch.ones(1, 2)
            tensors[f"{LAYER.format(number)}.lora_B.weight"] = torch.ones(2, 1)
        return of_tensors(tensors, {key: value()}).packed()

    return _lazily(make)


_CONFIG = "lora_adapter_metadata"
_METADATA: dict[str, Maker] = {
    f"config: {name}": _with_metadata(_CONFIG, value, layers)
    for name, value, layers in (
        ("deep", lambda: "[" * 100_000, 1),
        ("deep object", lambda: '{"a":' * 100_000, 1),
        ("lists of 4 MB", lambda: '{"a":[' + "[]," * 1_300_000 + "0]}", 1),
        ("text of 4 MB", lambda: json.dumps({"unet.lora_alpha": "x" * 2**22}), 1),
        ("pattern of 4 MB", lambda: json.dumps({"unet.alpha_pattern": {"x" * 2**22: 1}}), 1),
        ("patterns of 4 MB", lambda: json.dumps({"unet.alpha_pattern": {f"a{n}": 1 for n in range(300_000)}}), 1),
        (
            "1,000 patterns, 1,000 layers",
            lambda: json.dumps({"unet.alpha_pattern": {f"blocks.{n}.to_v": 1 for n in range(1000)}}),
            1000,
        ),
        ("catastrophic pattern", lambda: json.dumps({"unet.alpha_pattern": {"(.*.*)*(.*)*x$": 1}}), 1),
        ("stars", lambda: json.dumps({"unet.alpha_pattern": {".*a.*a.*a.*a.*a.*a.*x": 1}}), 1),
        ("alpha of 4,000 digits", lambda: '{"unet.lora_alpha": ' + "1" * 4000 + "}", 1),
        ("alpha of 100,000 digits", lambda: '{"unet.lora_alpha": ' + "1" * 100_000 + "}", 1),
        ("alpha NaN", lambda: '{"unet.lora_alpha": NaN}', 1),
        ("long value", lambda: json.dumps({"unet.alpha_pattern": "y" * 100_000}), 1),
        ("lines in a value", lambda: json.dumps({"unet.lora_alpha": "a\nb\nc"}), 1),
    )
} | {
    f"{key}: {name}": _with_metadata(key, value)
    for key in ("ss_network_args", "ot_config", "dora_diffusion.magnitude_axis", "ss_base_model_version")
    for name, value in (
        ("deep", lambda: "[" * 100_000),
        ("4 MB", lambda: "x" * 2**22),
        ("lists of 4 MB", lambda: '{"a":[' + "[]," * 1_300_000 + "0]}"),
    )
}


def _adapter(parts: dict[str, tuple[int, ...]], layer: str = KEY, dtype: torch.dtype = torch.float16) -> Maker:
    return _lazily(
        lambda: of_tensors(
            {f"{layer}.{key}": torch.full(shape, 0.01, dtype=dtype) for key, shape in parts.items()}
        ).packed()
    )


_FLAT = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
_ADAPTERS: dict[str, Maker] = {
    "thin pair of a giant weight": _adapter({"lora_A.weight": (1, 200_000), "lora_B.weight": (200_000, 1)}),
    "LoKr of a giant weight": _adapter({"lokr_w1": (700, 700), "lokr_w2": (700, 700)}, _FLAT),
    "LoKr of thin halves": _adapter(
        {"lokr_w1_a": (9000, 1), "lokr_w1_b": (1, 9000), "lokr_w2_a": (9000, 1), "lokr_w2_b": (1, 9000)}, _FLAT
    ),
    "LoHa of a giant weight": _adapter(
        {"hada_w1_a": (100_000, 1), "hada_w1_b": (1, 100_000), "hada_w2_a": (100_000, 1), "hada_w2_b": (1, 100_000)},
        _FLAT,
    ),
    "LoHa of a high rank": _adapter(
        {"hada_w1_a": (64, 3000), "hada_w1_b": (3000, 64), "hada_w2_a": (64, 3000), "hada_w2_b": (3000, 64)}, _FLAT
    ),
    "Tucker of a giant kernel": _adapter(
        {"lora_down.weight": (500, 4000, 1, 1), "lora_up.weight": (4, 500, 1, 1), "lora_mid.weight": (500, 500, 1, 1)},
        _FLAT,
    ),
    "Tucker of many taps": _adapter(
        {"lora_down.weight": (2, 4000, 1, 1), "lora_up.weight": (4000, 2, 1, 1), "lora_mid.weight": (2, 2, 300, 300)},
        _FLAT,
    ),
    "rank 0": _adapter({"lora_A.weight": (0, 8), "lora_B.weight": (8, 0)}),
    "rank above the sides": _adapter({"lora_A.weight": (64, 2), "lora_B.weight": (2, 64)}),
    "no inputs": _adapter({"lora_A.weight": (2, 0), "lora_B.weight": (8, 2)}),
    "eight dimensions": _adapter({"lora_A.weight": (1,) * 8, "lora_B.weight": (1,) * 8}),
    "integers": _lazily(
        lambda: of_tensors(
            {
                f"{KEY}.lora_A.weight": torch.ones(2, 4, dtype=torch.int64),
                f"{KEY}.lora_B.weight": torch.ones(4, 2, dtype=torch.int64),
            }
        ).packed()
    ),
    "largest numbers": _lazily(
        lambda: of_tensors(
            {f"{KEY}.lora_A.weight": torch.full((2, 4), 3e38), f"{KEY}.lora_B.weight": torch.full((4, 2), 3e38)}
        ).packed()
    ),
    "orphan magnitude": _adapter({"dora_scale": (8, 1)}, _FLAT),
    "square magnitude that tells nothing": _adapter(
        {"lora_down.weight": (2, 8), "lora_up.weight": (8, 2), "dora_scale": (8,)}, _FLAT
    ),
    "a name without a layer": _adapter({"lora_A.weight": (2, 4), "lora_B.weight": (4, 2)}, ""),
    "dots for a name": _adapter({"lora_A.weight": (2, 4), "lora_B.weight": (4, 2)}, "...."),
    "a flat name of underscores": _adapter(
        {"lora_down.weight": (2, 4), "lora_up.weight": (4, 2)}, "lora_unet_" + "_" * 200
    ),
    "a flat name of many words": _adapter(
        {"lora_down.weight": (2, 4), "lora_up.weight": (4, 2)}, "lora_unet_" + "_".join(["to", "q"] * 45)
    ),
    "a path that climbs": _adapter({"lora_A.weight": (2, 4), "lora_B.weight": (4, 2)}, "unet.../../../../etc/passwd"),
}


def _locked(path: Path) -> None:
    path.write_bytes(_pairs(1))
    path.chmod(0)


def _loop(path: Path) -> None:
    path.symlink_to(path)


def _archive(path: Path) -> None:
    with tarfile.open(path, "w"):
        pass


def _folder(files: dict[str, Callable[[], bytes]]) -> Maker:
    """A folder as PEFT saves one."""

    def make(path: Path) -> None:
        path.mkdir()
        for name, data in files.items():
            (path / name).write_bytes(data())

    return make


def _pipe_for_weights(path: Path) -> None:
    _folder({"adapter_config.json": lambda: b"{}"})(path)
    os.mkfifo(path / "adapter_model.safetensors")


_NO_FILES: dict[str, Maker] = {
    "nothing": lambda path: None,
    "a folder": lambda path: path.mkdir(),
    "a pipe": lambda path: os.mkfifo(path),
    "a device without end": lambda path: path.symlink_to("/dev/zero"),
    "a link to itself": _loop,
    "a link to nothing": lambda path: path.symlink_to("not-there"),
    "not allowed": _locked,
    "a tar": _archive,
    "sparse, of 1 TB": lambda path: void((path.touch(), os.truncate(path, 2**40))),
    "PEFT: no weights": _folder({"adapter_config.json": lambda: b"{}"}),
    "PEFT: weights that are a pipe": _pipe_for_weights,
    "PEFT: broken JSON": _folder({"adapter_config.json": lambda: b"{", "adapter_model.safetensors": lambda: _pairs(1)}),
    "PEFT: deep JSON": _folder(
        {"adapter_config.json": lambda: b"[" * 100_000, "adapter_model.safetensors": lambda: _pairs(1)}
    ),
    "PEFT: 32 MB of lists": _folder(
        {
            "adapter_config.json": lambda: b'{"a":[' + b"[]," * (11 * 2**20) + b"0]}",
            "adapter_model.safetensors": lambda: _pairs(1),
        }
    ),
    "PEFT: not UTF-8": _folder(
        {"adapter_config.json": lambda: b"\xff\xfe{}", "adapter_model.safetensors": lambda: _pairs(1)}
    ),
    "PEFT: peft_type of 100,000 characters": _folder(
        {
            "adapter_config.json": lambda: json.dumps({"peft_type": "x\n" * 50_000}).encode(),
            "adapter_model.safetensors": lambda: _pairs(1),
        }
    ),
}
