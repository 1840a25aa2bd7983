"""`env`: what a bug report should say of the machine; nothing of who uses it, and nothing of where things lie."""

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dora_diffusion._version import __version__

# What pictures and files depend on, then what is there only in some environments. torch tells its own.
PACKAGES = ("diffusers", "transformers", "accelerate", "safetensors", "tokenizers", "numpy", "pillow", "pydantic")
OPTIONAL = ("peft", "gradio", "bitsandbytes", "torchao", "lycoris-lora")
DTYPES = ("float32", "bfloat16", "float16")

Facts = dict[str, dict[str, Any]]


def add_env(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Print versions and devices, to be pasted into a bug report. No paths, no names of users or machines, "
        "no environment variables."
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(handler=_env)


def _env(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    found = facts()
    print(json.dumps(found, indent=2) if arguments.json else as_text(found))
    return 0


def facts() -> Facts:
    """Section -> what -> a number, a text, or a list of texts. Never raises: what cannot be told is told as that."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)  # torch tells of old drivers by one
        devices = _devices()
    if heard:
        devices["warning"] = without_paths(str(heard[0].message))
    return {
        "versions": {
            "dora_diffusion": __version__,
            "python": f"{platform.python_version()} ({platform.python_implementation()})",
            "platform": platform.platform(),
            **{name: _version_of(name) for name in ("torch", *PACKAGES)},
            **{name: version for name in OPTIONAL if (version := _version_of(name)) != "not installed"},
        },
        "machine": {"processors": os.cpu_count(), "memory_gib": _memory()},
        "torch": devices,
    }


def as_text(found: Facts) -> str:
    """Aligned lines, section after section."""
    width = max(len(name) for section in found.values() for name in section)
    lines = [
        f"{name:<{width}}  {'; '.join(value) if isinstance(value, list) else value}"
        for section in found.values()
        for name, value in section.items()
    ]
    return "\n".join(lines)


def without_paths(text: str) -> str:
    """One line with every word that looks like a path left out, for paths tell names."""
    return " ".join("..." if {"/", "\\"} & set(word) else word for word in text.split())[:300]


def _attempt(ask: Callable[[], Any]) -> Any:
    """The answer, or in words why there is none: a report is needed most where something is broken."""
    try:
        return ask()
    except Exception as error:
        return without_paths(f"broken: {type(error).__name__}: {error}")


def _version_of(package: str) -> str:
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
    return str(_attempt(lambda: importlib.metadata.version(package)))


def _memory() -> float | None:
    """Of the machine, in GiB, where the system tells it."""
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None


def _devices() -> dict[str, Any]:
    """What torch can draw on."""
    if _version_of("torch") == "not installed":
        return {}
    torch = _attempt(lambda: importlib.import_module("torch"))
    if isinstance(torch, str):
        return {"import torch": torch}
    questions: Mapping[str, Callable[[], Any]] = {
        "threads": lambda: torch.get_num_threads(),
        "interop_threads": lambda: torch.get_num_interop_threads(),
        "cpu_dtypes": lambda: _dtypes(torch, "cpu"),
        "cuda_build": lambda: torch.version.cuda or torch.version.hip or "none",
        "cudnn": lambda: torch.backends.cudnn.version() or "none",
        "cuda": lambda: _cuda(torch),
        "mps": lambda: _dtypes(torch, "mps") if torch.backends.mps.is_available() else "not available",
    }
    return {name: _attempt(ask) for name, ask in questions.items()}


def _cuda(torch: Any) -> Any:
    """Each device in words: name, memory, compute capability, dtypes."""
    if not torch.cuda.is_available():
        return "not available"
    devices = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        memory, capability = f"{card.total_memory / 2**30:.1f} GiB", f"capability {card.major}.{card.minor}"
        devices.append(", ".join((card.name, memory, capability, _dtypes(torch, f"cuda:{index}"))))
    return devices


def _dtypes(torch: Any, device: str) -> str:
    """The dtypes that a device can multiply matrices in: tried, for flags of support differ in what they mean."""
    found = []
    for name in DTYPES:
        matrix = torch.ones(2, 2, dtype=getattr(torch, name), device=device)
        try:
            matrix @ matrix
        except RuntimeError:
            continue
        found.append(name)
    return " ".join(found)
