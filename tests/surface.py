"""What users rely on, as a list: public names and signatures, flags, endpoints, element ids, keys of metadata.

`python -m tests.surface` writes tests/golden/surface.json anew: only when something was added, never to lose a name.
"""

import argparse
import ast
import dataclasses
import importlib
import inspect
import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import gradio as gr
from PIL import Image
from pydantic import BaseModel

import dora_diffusion as dd

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden" / "surface.json"
# Packages that people import from by name, beside `dora_diffusion` itself.
PACKAGES = ("adapters", "blending", "conversion", "families", "formats", "generation", "pipelines")
PACKAGE_NAMES = {
    "adapters": ["AdapterManager", "LoadReport"],
    "generation": ["GenerationSettings", "generate", "save_picture"],
    "pipelines": ["load_pipeline"],
}

Surface = dict[str, list[str]]


def library() -> Surface:
    """Public names with their parameters, and what the classes among them offer."""
    names: list[str] = []
    for name in dd.__all__:
        value = getattr(dd, name)
        names.append(name)
        names += [f"{name}({parameter})" for parameter in _parameters(value)]
        if inspect.isclass(value):
            names += [f"{name}.{member}" for member in _members(value)]
            names += [f"{name}.{key}" for key in _config_keys(value)]
    packages = []
    for package in PACKAGES:
        module = importlib.import_module(f"dora_diffusion.{package}")
        packages += [f"{package}.{name}" for name in getattr(module, "__all__", PACKAGE_NAMES.get(package, []))]
        packages += [f"{package}.{name}" for name in PACKAGE_NAMES.get(package, []) if hasattr(module, name)]
    return {"names": sorted(names), "packages": sorted(set(packages))}


def _parameters(value: Any) -> list[str]:
    return [
        f"{parameter.name}{'' if parameter.default is parameter.empty else '=...'}"
        for parameter in inspect.signature(value).parameters.values()
        if parameter.name not in ("data", "self")
    ]


def _members(value: type) -> list[str]:
    fields = [field.name for field in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
    own = [name for name in vars(value) if not name.startswith("_") and not issubclass(value, BaseModel)]
    return sorted({*fields, *own})


def _config_keys(value: type, prefix: str = "") -> list[str]:
    if not issubclass(value, BaseModel):
        return []
    keys = []
    for name, field in value.model_fields.items():
        keys.append(prefix + name)
        for inner in get_args(field.annotation) or (field.annotation,):  # `Section | None` is a section, too
            keys += _config_keys(inner, f"{prefix}{name}.") if inspect.isclass(inner) else []
    return keys


def command_line() -> Surface:
    """Commands, their positional arguments and their flags."""
    from dora_diffusion.cli import COMMANDS

    found = []
    for name, (_, add) in COMMANDS.items():
        parser = argparse.ArgumentParser(prog=name)
        parser.set_defaults(takes_settings=False)
        add(parser)
        for action in parser._actions:
            known = _choices(action)
            choices = f" {{{','.join(known)}}}" if known else ""
            found.append(f"{name} {' '.join(action.option_strings) or action.dest}{choices}")
    return {"flags": sorted(found)}


def _choices(action: argparse.Action) -> list[str]:
    """What an argument may be; names of formats are known once one is given, and each is tried."""
    from dora_diffusion.formats import FORMATS

    if action.dest == "to" and callable(action.type):
        return [action.type(name) for name in FORMATS]
    return [str(choice) for choice in action.choices or ()]


def app(demo: gr.Blocks) -> Surface:
    """Named endpoints with their parameters, and every element id of the page."""
    endpoints = demo.get_api_info()["named_endpoints"]
    calls = [
        f"{path} {parameter['parameter_name']}" for path, call in endpoints.items() for parameter in call["parameters"]
    ]
    elements = {block.elem_id for block in demo.blocks.values() if block.elem_id}
    return {"endpoints": sorted([*endpoints, *calls]), "elements": sorted(elements)}


def files(run: Path, picture: Path) -> Surface:
    """Names in a run's folder, and keys of the metadata of its adapter and of a picture."""
    paths = sorted(path.relative_to(run).as_posix() for path in run.rglob("*") if "events.out" not in path.name)
    adapter = dd.load_adapter(run / "adapter.safetensors")
    with Image.open(picture) as opened:
        chunks = dict(opened.info)
    record = json.loads(chunks["dora_diffusion"])
    keys = [*chunks, *_keys(record, "dora_diffusion.")]
    return {"run": paths, "adapter_metadata": sorted(adapter.metadata), "picture_metadata": sorted(keys)}


def _keys(record: Mapping[str, Any], prefix: str) -> list[str]:
    found = []
    for key, value in record.items():
        found.append(prefix + key)
        inner = value[0] if isinstance(value, list) and value else value
        found += _keys(inner, f"{prefix}{key}.") if isinstance(inner, Mapping) else []
    return found


def metadata_literals() -> Surface:
    """Every string in the code that starts as our metadata keys do, those that are put together included."""
    found = set()
    for path in [*ROOT.glob("dora_diffusion/**/*.py"), *ROOT.glob("ui/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found |= {node.value} if _is_metadata_key(node.value) else set()
    return {"metadata_literals": sorted(found)}


def _is_metadata_key(text: str) -> bool:
    if not re.fullmatch(r"dora_diffusion\.[a-z_.]+", text):
        return False
    part = text.split(".")[1]
    return not (ROOT / "dora_diffusion" / part).exists()  # "dora_diffusion.cli" is a module


def short_run(folder: Path) -> tuple[Path, Path]:
    """A run of two steps and a picture drawn with it, through the command line."""
    from dora_diffusion.cli import main

    run, picture, config = folder / "run", folder / "picture.png", folder / "config.yaml"
    config.write_text(
        json.dumps(
            {
                "model": "pocket",
                "output_dir": str(run),
                "data": {"instance_dir": str(ROOT / "examples/subject-robot/images"), "resolution": 64},
                "optim": {"steps": 2, "batch_size": 1},
                "preview": {"prompts": ["a robot"], "every": 1, "steps": 1},
                "validation": {"every": 1, "repeats": 1},
                "checkpoint": {"every": 1},
            }
        )
    )
    assert main(["train", str(config)]) == 0
    drawn = ["--steps", "1", "--width", "64", "--height", "64", "--prompt", "a robot", "--output", str(picture)]
    assert main(["generate", "--adapter", f"{run / 'adapter.safetensors'}:0.5", *drawn]) == 0
    return run, picture


def collect(folder: Path, demo: gr.Blocks) -> Surface:
    """The whole list."""
    return {**library(), **command_line(), **app(demo), **files(*short_run(folder)), **metadata_literals()}


def page(folder: Path) -> gr.Blocks:
    """The app's page, over a random base."""
    from tests.pocket_random import random_pocket_pipeline
    from ui.app import build_app
    from ui.backend.session import Session
    from ui.options import UiOptions

    session = Session(random_pocket_pipeline(), model="random", folder=folder / "adapters", output=folder / "out")
    return build_app(session, UiOptions(model="random", runs=folder / "runs"))[0]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        GOLDEN.write_text(json.dumps(collect(Path(name), page(Path(name))), indent=1) + "\n")
