"""A file of another trainer -> its data, and whose it is. Nothing in it is run."""

import json
import re
import shlex
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dora_diffusion.training.import_config.ai_toolkit import AI_TOOLKIT
from dora_diffusion.training.import_config.diffusers import DIFFUSERS, SCRIPT
from dora_diffusion.training.import_config.kohya import KOHYA
from dora_diffusion.training.import_config.one_trainer import ONE_TRAINER
from dora_diffusion.training.import_config.records import Tool
from dora_diffusion.utils.text import shown, shown_path

TOOLS = (KOHYA, AI_TOOLKIT, ONE_TRAINER, DIFFUSERS)
EXPECTED = (
    "expected a training or dataset TOML of kohya's sd-scripts or its GUI's JSON, a YAML of ai-toolkit, a JSON of "
    "OneTrainer, or a command of diffusers' train_dreambooth_lora*.py"
)
_LARGEST = 16 * 2**20
_KOHYA = {
    "pretrained_model_name_or_path",
    "network_module",
    "network_dim",
    "LoRA_type",
    "train_data_dir",
    "dataset_config",
}
_ONE_TRAINER = {"base_model_name", "training_method", "lora_rank", "peft_type", "concept_file_name", "model_type"}
_COMMAND = re.compile(r"train_dreambooth_lora\w*\.py|\w*train_network\.py")


def read(path: Path) -> tuple[Tool, Mapping[str, Any]]:
    """Whose a file is, and its keys.

    Raises:
        ValueError: one line; it cannot be read, is damaged, or is none of those that are known.
    """
    content = _content(path)
    command = _COMMAND.search(content)
    if command is not None and path.suffix.lower() not in {".toml", ".json", ".yaml", ".yml"}:
        data = _flags(path, content, command)
        return (DIFFUSERS if "dreambooth" in command[0] else KOHYA), data
    data = _parsed(path, content)
    if not isinstance(data, Mapping):
        raise ValueError(f"{shown_path(path)}: {_is_a(data)}, {EXPECTED}")
    return _tool_of(path, data), data


def _content(path: Path) -> str:
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"{shown_path(path)}: larger than {_LARGEST // 2**20} MiB, {EXPECTED}")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{shown_path(path)}: cannot be read ({error.strerror or error}); {EXPECTED}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{shown_path(path)}: not UTF-8 text (byte {error.start}); {EXPECTED}") from None


def _parsed(path: Path, content: str) -> Any:
    """What a file's ending says it is; others as JSON, TOML or YAML, whatever it can be."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".toml":
            return tomllib.loads(content)
        if suffix == ".json":
            return json.loads(content)
        if suffix in {".yaml", ".yml"}:
            return yaml.safe_load(content)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        kind = suffix.lstrip(".").upper().replace("YML", "YAML")
        raise ValueError(f"{shown_path(path)}: not valid {kind}: {shown(error, 200)}") from None
    for reader in (json.loads, tomllib.loads, yaml.safe_load):
        try:
            found = reader(content)
        except (yaml.YAMLError, ValueError, RecursionError):
            continue
        if isinstance(found, Mapping):
            return found
    return content


def _is_a(data: Any) -> str:
    names = {list: "a list", str: "text", type(None): "nothing"}
    return f"got {names.get(type(data), type(data).__name__)}"


def _tool_of(path: Path, data: Mapping[Any, Any]) -> Tool:
    if not all(isinstance(key, str) for key in data):
        raise ValueError(f"{shown_path(path)}: keys that are no text, {EXPECTED}")
    inner = {key for value in data.values() if isinstance(value, Mapping) for key in value}
    if "output_dir" in data and isinstance(data.get("data"), Mapping):
        raise ValueError(f"{shown_path(path)}: a configuration of dora-diffusion already; {EXPECTED}")
    if isinstance(data.get("config"), Mapping) and ("process" in data["config"] or "job" in data):
        return AI_TOOLKIT
    if isinstance(data.get("datasets"), list) or _KOHYA & {*data, *inner}:
        return KOHYA
    if _ONE_TRAINER & {*data}:
        return ONE_TRAINER
    some = ", ".join(shown(key, 40) for key in list(data)[:3])
    raise ValueError(f"{shown_path(path)}: its keys ({some or 'none'}) are no trainer's that is known, {EXPECTED}")


def _flags(path: Path, content: str, command: re.Match[str]) -> dict[str, Any]:
    """`--rank=8 --use_dora` -> {"rank": "8", "use_dora": True}; variables that the script sets are put in."""
    variables = dict(re.findall(r"^\s*(?:export\s+)?(\w+)=[\"']?([^\"'\n]*)[\"']?\s*$", content, re.MULTILINE))
    text = re.sub(r"[\\^`]\r?\n", " ", content[command.start() :])
    text = re.sub(r"\$\{?(\w+)\}?", lambda found: variables.get(found[1], found[0]), text.splitlines()[0])
    try:
        words = shlex.split(text, comments=True)
    except ValueError as error:
        raise ValueError(f"{shown_path(path)}: the command cannot be read ({error}); check its quotes") from None
    found: dict[str, Any] = {}
    name = SCRIPT
    found[SCRIPT] = [words[0]]
    for word in words[1:]:
        if word.startswith("--"):
            name, has_value, value = word[2:].partition("=")
            found[name] = [value] if has_value else []
        else:
            found[name].append(word)
    return {key: _one(values) for key, values in found.items()}


def _one(values: list[str]) -> Any:
    if not values:
        return True
    return values[0] if len(values) == 1 else values
