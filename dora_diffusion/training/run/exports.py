"""What a run writes at its end beside its own file: the adapter in other formats, and made for other tools.

Each is written whole or not at all, read back before it takes its place, and the same bytes from the same adapter.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dora_diffusion.conversion import TOOLS, for_tool
from dora_diffusion.formats import FORMATS, load_adapter, peft, save_adapter
from dora_diffusion.formats.family_detection import family_of
from dora_diffusion.formats.reading import as_stored
from dora_diffusion.formats.writing import write
from dora_diffusion.inspection.verify import verify_copy, verify_for_tool
from dora_diffusion.pipelines.base_weights import weights_of
from dora_diffusion.state import AdapterState, Module, ModuleState, WeightOf
from dora_diffusion.training.base.trainable import TrainablePipeline
from dora_diffusion.training.config import Export, TrainConfig
from dora_diffusion.training.run.metadata import adapter_metadata, named_for_tools
from dora_diffusion.utils.atomic import atomic_path, remove_folder

FOLDER = "exports"
_FOR = "for-"


@dataclass(frozen=True)
class Exported:
    """One file, or folder of PEFT's.

    Attributes:
        name: as the config has it.
        path: where it lies.
        line: what it became, and how near it came when it was read back.
    """

    name: str
    path: Path
    line: str


def export_path(config: TrainConfig, name: str) -> Path:
    """`exports/robot-kohya.safetensors` of a run in the folder `robot`; PEFT's is a folder."""
    is_folder = name == "peft"
    return config.output_dir / FOLDER / f"{config.output_dir.name}-{name}{'' if is_folder else '.safetensors'}"


def check_exports(config: TrainConfig, trainable: TrainablePipeline) -> None:
    """Refuse before the first step what could not be written after the last; shapes are enough.

    Raises:
        ValueError: one line: a format that cannot hold it, or a tool that does not read this model's adapters.
    """
    if not config.export:
        return
    adapter = trainable.adapter(adapter_metadata(config, trainable.family, step=0))
    if next(trainable.denoiser.parameters()).is_meta:
        adapter = _with_numbers(adapter)
    for name in config.export:
        try:
            _check(name, adapter)
        except ValueError as error:
            raise ValueError(f"export: {name}: {error}") from None


def _with_numbers(adapter: AdapterState) -> AdapterState:
    """An adapter of the meta device with some numbers, others in each layer: writers ask whether two are equal."""
    modules = {path: _numbered(module, number) for number, (path, module) in enumerate(adapter.modules.items(), 1)}
    return replace(adapter, modules=modules)


def _numbered(module: Module, number: float) -> Module:
    if not isinstance(module, ModuleState):
        return module
    down, up = (torch.full(tensor.shape, number) for tensor in (module.down, module.up))
    magnitude = None if module.magnitude is None else torch.full(module.magnitude.shape, number)
    return replace(module, down=down, up=up, magnitude=magnitude)


def _check(name: Export, adapter: AdapterState) -> None:
    if not name.startswith(_FOR):
        if FORMATS[name] is not FORMATS["peft"]:
            write(adapter, FORMATS[name])
        return
    tool, family = TOOLS[name.removeprefix(_FOR)], family_of(adapter)
    if family is None or family not in tool.formats:
        raise ValueError(f"{tool.title} reads no adapters of {family}; it does of {', '.join(tool.formats)}")
    if unread := [path for path in adapter.modules if tool.is_unread(family, path)]:
        raise ValueError(
            f"{tool.title} does not read {len(unread)} of {len(adapter.modules)} layers, such as {unread[0]}; train "
            "others (adapter.target_modules), or leave it out"
        )


def write_exports(config: TrainConfig, adapter: AdapterState, pipe: Any) -> list[Exported]:
    """Write all that is asked for, and remove what an earlier end of the run left and nobody asks for now.

    Args:
        config: of the run.
        adapter: what was learnt.
        pipe: the base; its weights are asked for in main memory, one by one.

    Raises:
        ValueError: one line; the format cannot hold it, or it cannot be written.
    """
    _forget(config)
    weights = weights_of(pipe)
    adapter = replace(adapter, modules={path: module.to(device="cpu") for path, module in adapter.modules.items()})
    return [_export(config, name, adapter, lambda path: weights(path).cpu()) for name in config.export]


def missing_exports(config: TrainConfig, held: Sequence[str]) -> list[str]:
    """What is asked for and is not among the files of a finished run, which are relative to its folder."""
    paths = {name: export_path(config, name).relative_to(config.output_dir).as_posix() for name in config.export}
    return [name for name, path in paths.items() if path not in held]


def _forget(config: TrainConfig) -> None:
    wanted = {export_path(config, name) for name in config.export}
    for name in (*FORMATS, *(f"{_FOR}{tool}" for tool in TOOLS)):
        path = export_path(config, name)
        if path in wanted:
            continue
        if path.is_dir() and peft.is_folder(path):
            remove_folder(path)
        elif path.is_file():
            path.unlink()


def _export(config: TrainConfig, name: Export, adapter: AdapterState, base: WeightOf) -> Exported:
    path = export_path(config, name)
    adapter = replace(adapter, metadata=named_for_tools(adapter.metadata, path.name.removesuffix(".safetensors")))
    try:
        line = (_export_for_tool if name.startswith(_FOR) else _export_format)(path, name, adapter, base)
    except ValueError as error:
        raise ValueError(
            f"export: {name}: {error}; the run is done and its adapter written: mend export in the YAML and say "
            "--resume latest"
        ) from None
    return Exported(name, path, line)


def _export_format(path: Path, name: str, adapter: AdapterState, base: WeightOf) -> str:
    with atomic_path(path) as new:
        save_adapter(adapter, new, format=name)
        return verify_copy(load_adapter(new, base=base), adapter).sentence()


def _export_for_tool(path: Path, name: str, adapter: AdapterState, base: WeightOf) -> str:
    made = for_tool(adapter, name.removeprefix(_FOR), base=base)
    with atomic_path(path) as new:
        save_adapter(made.adapter, new, format=made.format)
        read_back = verify_for_tool(load_adapter(new, base=as_stored), adapter, made.tool, base=base)
    return f"{made.sentence()}; {read_back.sentence()}"
