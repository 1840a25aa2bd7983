"""Pickles, by their first bytes or their names: told as what they are, and never opened."""

from pathlib import PurePath

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
LOOKED_AT = 512
"""How much of a file tells."""
COMMAND = (
    'python -c "import sys, torch; from safetensors.torch import save_file; '
    "d = torch.load(sys.argv[1], 'cpu', weights_only=True); d = d.get('string_to_param', d.get('state_dict', d)); "
    "save_file({k: v.clone().contiguous() for k, v in d.items() if hasattr(v, 'clone')}, sys.argv[2])\" "
    "IN OUT.safetensors"
)
"""What makes safetensors of one where torch is: tensors alone are unpickled, no code is run."""
_ZIPS = (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")  # torch writes its pickles into one
_TAR_AT = 257  # and into a tar before 0.1.10


def is_pickle(name: str, head: bytes) -> bool:
    """Whether a file that is no safetensors file is a pickle, or has one inside, by its first bytes or its name."""
    is_binary = head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")
    is_tar = head[_TAR_AT : _TAR_AT + 5] == b"ustar"
    return is_binary or is_tar or head.startswith(_ZIPS) or PurePath(name).suffix.lower() in SUFFIXES


def refusal(name: str) -> str:
    """Why a file of this name is not read, and what to do."""
    return f"{name}: a pickle, which can run code when it is opened; convert it to safetensors: {COMMAND}"
