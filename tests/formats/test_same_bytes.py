"""The same adapter is the same bytes: in every process, and in whatever order its layers and metadata came.

safetensors keeps metadata in a hash map with a random start in each process, and Python's sets are no better: so two
processes of other seeds write every kind of file that we have, one of them with everything shuffled.
"""

import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from dora_diffusion.formats import FORMATS, save_adapter
from dora_diffusion.formats.safetensors_stream import Slot, write_tensor_file
from dora_diffusion.state import AdapterState
from dora_diffusion.utils.atomic import save_checkpoint, save_tensors
from tests.formats.adapters import Make, dora, lora, place

METADATA = {
    **{f"ss_{name}": f"{name}, önly an example" for name in ("tag_frequency", "output_name", "sd_model_name", "seed")},
    **{"ss_network_dim": "4", "sshs_model_hash": "", "sshs_legacy_hash": "", "modelspec.hash_sha256": "0x0"},
    **{"modelspec.title": 'A "title"\nof two lines', "dora_diffusion.family": "sd1", "ot_config": "{}"},
}
BLOCK = "transformer_blocks.0.attn1"
# path -> rows, columns, rank: two ranks that are as common
LAYERS = {
    f"unet.down_blocks.0.attentions.0.{BLOCK}.to_q": (320, 320, 8),
    f"unet.down_blocks.0.attentions.0.{BLOCK}.to_k": (320, 320, 16),
    f"unet.down_blocks.1.attentions.1.{BLOCK}.to_v": (640, 640, 8),
    f"unet.down_blocks.1.attentions.1.{BLOCK}.to_out.0": (640, 640, 16),
    "text_encoder.encoder.layers.0.self_attn.q_proj": (768, 768, 8),
    "text_encoder.encoder.layers.3.self_attn.v_proj": (768, 768, 16),
}


def adapter(make: Make, shuffled: Callable[[dict], dict], *, components: tuple[str, ...]) -> AdapterState:
    generator = torch.Generator().manual_seed(0)
    modules = {}
    for path, (rows, columns, rank) in LAYERS.items():
        pair = lora(torch.ones(rows, columns), generator, rank=rank)
        whole = make(torch.ones(rows, columns), generator)
        if path.startswith(components):
            modules[path] = type(pair)(pair.down, pair.up, pair.alpha, whole.magnitude)
    extra = {"emb_params": torch.ones(2, 3), "another": torch.zeros(1)}
    return AdapterState(shuffled(modules), shuffled(METADATA), {}, shuffled(extra))


def tensors() -> dict[str, Tensor]:
    return {f"{index}.{kind}": torch.full((3,), index) for index in range(20) for kind in ("exp_avg", "step")}


def write_everything(folder: Path, seed: int) -> None:
    """Every format, and every other writer of tensors; a seed of 0 leaves the order as it is."""
    chance = random.Random(seed)

    def shuffled(found: dict) -> dict:
        items = list(found.items())
        if seed:
            chance.shuffle(items)
        return dict(items)

    for format in FORMATS:
        components = ("unet.",) if format == "original" else ("unet.", "text_encoder.")
        make = lora if format == "old-diffusers" else dora
        save_adapter(adapter(make, shuffled, components=components), place(folder, format, format), format=format)
    save_tensors(shuffled(tensors()), folder / "plain.safetensors")
    slots = {key: Slot("I64", (3,)) for key in tensors()}
    write_tensor_file(folder / "stream.safetensors", slots, tensors().items(), metadata=shuffled(METADATA))
    files = {"a.safetensors": lambda path: save_tensors(shuffled(tensors()), path, shuffled(METADATA))}
    save_checkpoint(folder / "step-1", files)


def hashes(folder: Path) -> dict[str, str]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def written_by_another(folder: Path, *, hash_seed: int, order: int) -> dict[str, str]:
    code = (
        f"import sys; from pathlib import Path; from {__name__} import *; write_everything(Path(sys.argv[1]), {order})"
    )
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
    subprocess.run(
        [sys.executable, "-c", code, str(folder)], env=environment, cwd=Path(__file__).parents[2], check=True
    )
    return hashes(folder)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    write_everything(folder, 0)
    return folder


@pytest.mark.parametrize(("hash_seed", "order"), [(1, 0), (2, 1), (3, 2)])
def test_two_processes_write_the_same_bytes_in_every_format(
    first: Path, tmp_path: Path, hash_seed: int, order: int
) -> None:
    expected = hashes(first)
    assert {name.partition("/")[0].removesuffix(".safetensors") for name in expected} >= set(FORMATS)
    assert written_by_another(tmp_path / "again", hash_seed=hash_seed, order=order) == expected


def test_metadata_are_sorted_and_the_tensors_begin_at_a_multiple_of_eight(first: Path) -> None:
    files = sorted(first.rglob("*.safetensors"))
    assert len(files) > len(FORMATS)
    for path in files:
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        metadata = header.get("__metadata__", {})
        assert length % 8 == 0 and (not metadata or list(header)[0] == "__metadata__"), path
        assert list(metadata) == sorted(metadata), path
        with safe_open(path, framework="pt") as file:  # safetensors checks the header and all offsets
            assert (file.metadata() or {}) == metadata
            assert all(file.get_tensor(key).shape == tuple(header[key]["shape"]) for key in file.keys())  # noqa: SIM118


def test_peft_configs_are_sorted_all_through(first: Path) -> None:
    for path in first.rglob("*.json"):
        if path.name != "manifest.json":
            assert path.read_text() == json.dumps(json.loads(path.read_text()), indent=2, sort_keys=True), path
