"""No file of a user is ever unpickled: canaries under every extension and at every door, and a look at the source."""

import ast
import hashlib
import io
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save

from dora_diffusion.formats import detect_format, examine, load_adapter
from dora_diffusion.formats.pickles import COMMAND
from dora_diffusion.inspection.header import summarise_header
from dora_diffusion.inspection.report import inspect_adapter
from dora_diffusion.pipelines.base_weights import weights_of
from dora_diffusion.pipelines.loading import EMBEDDED, load_pipeline
from dora_diffusion.pipelines.textual_inversion import load_word
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.run import checkpoint
from dora_diffusion.utils import atomic as storage

ROOT = Path(__file__).parents[2]
PACKAGES = ("dora_diffusion", "ui", "train_scripts")


class Canary:
    """Touches a file when it is unpickled."""

    def __init__(self, nest: Path) -> None:
        self._nest = nest

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self._nest}'",)


def _pickled(canary: Canary) -> bytes:
    return pickle.dumps(canary)


def _protocol_0(canary: Canary) -> bytes:
    return pickle.dumps(canary, protocol=0)


def _torch_zip(canary: Canary) -> bytes:
    buffer = io.BytesIO()
    torch.save({"unet.to_q.lora_A.weight": canary}, buffer)
    return buffer.getvalue()


def _torch_legacy(canary: Canary) -> bytes:
    buffer = io.BytesIO()
    torch.save({"unet.to_q.lora_A.weight": canary}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def _tar(canary: Canary) -> bytes:
    """As torch wrote before 0.1.10: a tar of pickles."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            data = pickle.dumps(canary)
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def _numpy(canary: Canary) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([canary], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def _zip(canary: Canary) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(canary))
        archive.writestr("archive/version", "3")
    return buffer.getvalue()


def _behind_safetensors(canary: Canary) -> bytes:
    """A sound file with a zip at its end, which zip readers take for a zip."""
    return save({"unet.to_q.lora_A.weight": torch.ones(1, 2)}) + _zip(canary)


def _inside_safetensors(canary: Canary) -> bytes:
    """Sound to the last byte: the pickle is a tensor, and stands in the metadata too."""
    raw = torch.frombuffer(bytearray(pickle.dumps(canary)), dtype=torch.uint8)
    return save({"unet.to_q.lora_A.weight": raw}, {"lora_adapter_metadata": pickle.dumps(canary, protocol=0).decode()})


CANARIES: dict[str, Callable[[Canary], bytes]] = {
    "pickle": _pickled,
    "protocol 0": _protocol_0,
    "torch": _torch_zip,
    "torch, legacy": _torch_legacy,
    "torch, tar": _tar,
    "numpy": _numpy,
    "zip": _zip,
    "behind safetensors": _behind_safetensors,
    "inside safetensors": _inside_safetensors,
}
EXTENSIONS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz", ".zip", ".gguf", "")
DOORS: dict[str, Callable[[Path], object]] = {
    "load_adapter": load_adapter,
    "detect_format": detect_format,
    "examine": examine,
    "inspect_adapter": inspect_adapter,
    "load_word": load_word,
    "load_pipeline": load_pipeline,
    "load_pipeline with a config": lambda path: load_pipeline(path, config="pocket"),
    "weights_of": weights_of,
}
# A tensor of bytes is a sound file with a strange key: there is nothing to refuse yet.
READS = {("detect_format", "inside safetensors"), ("examine", "inside safetensors")}


@pytest.mark.parametrize("kind", [name for name in CANARIES if "safetensors" not in name])
def test_the_canaries_are_alive(tmp_path, kind: str) -> None:
    nest = tmp_path / "nest"
    data = CANARIES[kind](Canary(nest))
    if kind == "numpy":
        np.load(io.BytesIO(data), allow_pickle=True)
    elif kind in ("torch, tar", "zip"):
        inside = data[data.index(b"\x80\x04") :]
        pickle.loads(inside)
    elif kind.startswith("torch"):
        torch.load(io.BytesIO(data), weights_only=False)
    else:
        pickle.loads(data)
    assert nest.exists()


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", CANARIES)
def test_no_door_opens_a_pickle(tmp_path, door: str, kind: str) -> None:
    nest = tmp_path / "nest"
    for extension in EXTENSIONS:
        path = tmp_path / f"canary{extension}"
        path.write_bytes(CANARIES[kind](Canary(nest)))
        if (door, kind) in READS:
            DOORS[door](path)
        else:
            _refused(DOORS[door], path)
        assert not nest.exists(), f"{kind} under {extension!r} was run by {door}"


def _refused(read: Callable[[Path], object], path: Path) -> None:
    with pytest.raises(ValueError) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message
    assert len(message.splitlines()) == 1
    assert len(message) < 500


SAID = "a pickle, which can run code when it is opened; convert it to safetensors: python -c "


@pytest.mark.parametrize(
    "kind", [name for name in CANARIES if name not in ("protocol 0", "numpy") and "saf" not in name]
)
@pytest.mark.parametrize("extension", [".safetensors", ".bin", ".pt", ".ckpt", ".pth", ""])
def test_a_pickle_is_told_as_one(tmp_path, kind: str, extension: str) -> None:
    path = tmp_path / f"ink{extension}"
    path.write_bytes(CANARIES[kind](Canary(tmp_path / "nest")))
    for door in (load_adapter, examine, inspect_adapter, load_word, summarise_header):
        with pytest.raises(ValueError) as caught:
            door(path)
        assert str(caught.value).startswith(f"{path}: {SAID}")
    assert not (tmp_path / "nest").exists()


@pytest.mark.parametrize("kind", ["protocol 0", "numpy"])
def test_a_pickle_that_no_byte_tells_is_told_by_its_name(tmp_path, kind: str) -> None:
    path = tmp_path / "ink.PT"
    path.write_bytes(CANARIES[kind](Canary(tmp_path / "nest")))
    with pytest.raises(ValueError, match=f"ink.PT: {re.escape(SAID)}"):
        load_adapter(path)


@pytest.mark.parametrize("name", ["ink.pt", "pytorch_lora_weights.bin", "unet/adapter_model.bin", "adapter_model.bin"])
def test_a_folder_with_a_pickle_alone_names_it(tmp_path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(_torch_zip(Canary(tmp_path / "nest")))
    if "adapter_model" in name:
        (path.parent / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1}))
    for door in (load_adapter, examine):
        with pytest.raises(ValueError) as caught:
            door(tmp_path)
        assert str(caught.value).startswith(f"{path}: {SAID}")


def test_a_broken_safetensors_file_is_no_pickle(tmp_path) -> None:
    whole = save({"lora_unet_mid_block_proj_in.alpha": torch.ones(1)})
    for data in (whole[:-1], whole[:5], b"\0" * 600, b"", b"{}"):
        (tmp_path / "ink.safetensors").write_bytes(data)
        with pytest.raises(ValueError) as caught:
            load_adapter(tmp_path / "ink.safetensors")
        assert "pickle" not in str(caught.value)


LAYER = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
PAIR = {f"{LAYER}.lora_down.weight": torch.randn(2, 4), f"{LAYER}.lora_up.weight": torch.randn(4, 2)}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("pickled", "read"),
    [
        (PAIR, lambda path: load_adapter(path).ranks == (2,)),
        ({"state_dict": PAIR, "epoch": 3}, lambda path: load_adapter(path).ranks == (2,)),
        ({"<zqx>": torch.ones(4)}, lambda path: load_word(path).word == "<zqx>"),
        (
            {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.ones(2, 4).T.T}, "name": "x", "step": 5},
            lambda path: load_word(path).word == "OUT",
        ),
    ],
)
def test_the_way_out_that_is_told_is_one(tmp_path, pickled: Any, read: Callable[[Path], bool], legacy: bool) -> None:
    torch.save(pickled, tmp_path / "IN", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError) as caught:
        load_adapter(tmp_path / "IN")
    command = shlex.split(str(caught.value).removeprefix(f"{tmp_path / 'IN'}: {SAID.removesuffix('python -c ')}"))
    subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, check=True)
    assert read(tmp_path / "OUT.safetensors")
    assert COMMAND in (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")


def test_the_way_out_runs_no_code(tmp_path) -> None:
    (tmp_path / "IN").write_bytes(_torch_zip(Canary(tmp_path / "nest")))
    done = subprocess.run([sys.executable, *shlex.split(COMMAND)[1:]], cwd=tmp_path, check=False, capture_output=True)
    assert done.returncode and not (tmp_path / "nest").exists()


PICKLED_NAMES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.safetensors", "pytorch_lora_weights.bin")


@pytest.mark.parametrize("name", PICKLED_NAMES)
@pytest.mark.parametrize("component", ["", "unet"])
def test_a_folder_of_pefts_with_a_pickle_is_refused(tmp_path, name: str, component: str) -> None:
    nest = tmp_path / "nest"
    folder = tmp_path / "adapter" / component
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1}))
    (folder / name).write_bytes(_torch_zip(Canary(nest)))
    for door in ("load_adapter", "inspect_adapter"):
        _refused(DOORS[door], tmp_path / "adapter")
    assert not nest.exists()


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize(
    "name", ["diffusion_pytorch_model.bin", "pytorch_model.bin", "diffusion_pytorch_model.safetensors"]
)
def test_a_base_in_a_folder_is_never_unpickled(tmp_path, part: str, name: str) -> None:
    nest = tmp_path / "nest"
    base = shutil.copytree(EMBEDDED["pocket"], tmp_path / "base")
    for weights in (base / part).glob("*.safetensors"):
        weights.unlink()
    name = name.replace("diffusion_pytorch_", "") if part == "text_encoder" else name
    (base / part / name).write_bytes(_torch_zip(Canary(nest)))
    with pytest.raises(ValueError, match=r"^.+$"):
        load_pipeline(base)
    assert not nest.exists()


@pytest.mark.parametrize("name", ["parameters.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("kind", CANARIES)
def test_a_checkpoint_is_never_unpickled(tmp_path, name: str, kind: str) -> None:
    """Even one whose manifest was made to fit."""
    nest = tmp_path / "nest"
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones(2)
    optimizer.step()
    data = {"instance_dir": ".", "instance_prompt": "a cat"}
    config = TrainConfig.model_validate({"output_dir": str(tmp_path), "data": data})
    state = checkpoint.TrainingState({"w": weight}, optimizer, None, 1, [])
    folder = checkpoint.save(state, config, step=1, folder=tmp_path / "checkpoints")
    (folder / name).write_bytes(raw := CANARIES[kind](Canary(nest)))
    assert storage.valid_checkpoints(folder.parent) == []
    manifest = json.loads((folder / storage.MANIFEST).read_text())
    manifest[name] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (folder / storage.MANIFEST).write_text(json.dumps(manifest))
    assert storage.valid_checkpoints(folder.parent) == [folder]
    # a sound file that is no checkpoint's is missed by its names
    with pytest.raises((ValueError, SafetensorError, KeyError)):
        checkpoint.resume(state, checkpoint.newest(folder.parent))
    assert not nest.exists()


MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "pandas"}
CALLS = {"torch.load", "torch.jit.load", "torch.hub.load", "torch.package.PackageImporter", "eval", "exec"}
CALLS |= {
    f"yaml.{name}" for name in ("load", "load_all", "unsafe_load", "unsafe_load_all", "full_load", "full_load_all")
}
KEYWORDS = {
    ("allow_pickle", "True"),
    ("trust_remote_code", "True"),
    ("weights_only", "False"),
    ("use_safetensors", "False"),
}
METHODS = {"load_state", "read_pickle", "load_lora_weights"}
# Classes that hold no weights.
WEIGHTLESS = {"CLIPTokenizer", "AutoTokenizer"}
# What is no torch module: tokenizers, schedulers, image processors.
LOOKED_AT = {"dora_diffusion/training/base/meta.py": ["kind.from_pretrained without use_safetensors=True"]}


def _dangers(source: str) -> list[str]:
    """What in a module's source could unpickle a file or run what is in it."""
    tree = ast.parse(source)
    names = {}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name: alias.name for alias in node.names}
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            found += [node.module] * (node.module.split(".")[0] in MODULES)
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            root, _, rest = ast.unparse(node).partition(".")
            full = f"{names.get(root, root)}{'.' * bool(rest)}{rest}"
            found += [full] * (full in CALLS)
            found += [full] * (isinstance(node, ast.Attribute) and node.attr in METHODS)
        if isinstance(node, ast.Call):
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            found += [f"{word}={value}" for word, value in given.items() if (word, value) in KEYWORDS]
            found += _without_safetensors(node, given)
    return found


def _without_safetensors(call: ast.Call, given: dict[str | None, str]) -> list[str]:
    """Models of diffusers and transformers take pickles where they are not told otherwise."""
    if not isinstance(call.func, ast.Attribute) or call.func.attr not in ("from_pretrained", "download"):
        return []
    owner = ast.unparse(call.func.value).split(".")[-1]
    is_safe = owner in WEIGHTLESS or given.get("use_safetensors") == "True"
    return [] if is_safe else [f"{ast.unparse(call.func)} without use_safetensors=True"]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_can_unpickle(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert len(files) > 2
    found = {file.relative_to(ROOT).as_posix(): dangers for file in files if (dangers := _dangers(file.read_text()))}
    assert found == {name: dangers for name, dangers in LOOKED_AT.items() if name.startswith(package)}


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(path)",
        "import torch as t\nt.load(path)",
        "from torch import load\nload(path)",
        "from torch import load as read\nread(path)",
        "from torch import jit\njit.load(path)",
        "import pickle",
        "from pickle import loads",
        "import joblib",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import yaml\nyaml.load(text, Loader=yaml.Loader)",
        "import yaml as y\nread = y.unsafe_load",
        "AutoModel.from_pretrained(path)",
        "AutoModel.from_pretrained(path, use_safetensors=False)",
        "AutoModel.from_pretrained(path, use_safetensors=True, trust_remote_code=True)",
        "accelerator.load_state(path)",
        "eval(text)",
    ],
)
def test_the_look_at_the_source_sees(source: str) -> None:
    assert _dangers(source)


@pytest.mark.parametrize(
    "source", ["json.loads(x)", "yaml.safe_load(x)", "np.load(x)", "model.eval()", "storage.load(x)"]
)
def test_the_look_at_the_source_lets_pass(source: str) -> None:
    assert _dangers(f"import json, yaml, numpy as np\n{source}") == []
