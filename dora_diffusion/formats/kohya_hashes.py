"""Hashes that other tools keep in a file's metadata: taken anew, for the old ones are another file's.

Sources: kohya-ss/sd-scripts `library/train_util.py` (`precalculate_safetensors_hashes`, whose legacy hash is A1111's
old model hash), and the modelspec of Stability AI (`modelspec.hash_sha256`: the tensors' bytes).
"""

import hashlib
from collections.abc import Mapping

from torch import Tensor

from dora_diffusion.utils.atomic import serialised

_KOHYA = ("sshs_model_hash", "sshs_legacy_hash")
_MODELSPEC = "modelspec.hash_sha256"
_LEGACY_START, _LEGACY_LENGTH = 0x100000, 0x10000


def with_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The same metadata, with those hashes that it has taken of these tensors."""
    if not any(key in metadata for key in (*_KOHYA, _MODELSPEC)):
        return dict(metadata)
    training = {key: text for key, text in metadata.items() if key.startswith("ss_")}
    header, body = serialised(tensors, training)
    whole = hashlib.sha256(body).hexdigest()
    legacy = hashlib.sha256(_slice(header, body, _LEGACY_START, _LEGACY_START + _LEGACY_LENGTH)).hexdigest()[:8]
    taken = {"sshs_model_hash": whole, "sshs_legacy_hash": legacy, _MODELSPEC: f"0x{whole}"}
    return {**metadata, **{key: value for key, value in taken.items() if key in metadata}}


def without_hashes(metadata: Mapping[str, str]) -> dict[str, str]:
    """The same metadata for tensors that lie in several files."""
    return {key: text for key, text in metadata.items() if key not in (*_KOHYA, _MODELSPEC)}


def _slice(header: bytes, body: memoryview, start: int, end: int) -> bytes:
    """Bytes of a file whose header and body lie apart."""
    behind = len(header)
    return header[start:end] + bytes(body[max(0, start - behind) : max(0, end - behind)])
