"""The documented endpoints, for `gradio_client` and plain HTTP: generate, list_adapters, blend.

Values arrive as JSON, as they were sent: everything is checked here. Files are named by what the library lists, or
are uploads of this app's own run; no path of the caller's is opened.
"""

import re
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gradio as gr

import dora_diffusion as dd
from dora_diffusion.formats import FORMATS
from dora_diffusion.functional.blend_modes import ADDITIVE
from dora_diffusion.generation.generate import Canvas
from ui.backend.request import (
    AdapterChoice,
    DetailValues,
    DrawRequest,
    Parts,
    SlotValues,
    check_adapters,
    check_canvas,
    check_settings,
    check_text,
    check_whole,
)
from ui.backend.run import Update
from ui.backend.session import Session
from ui.errors import user_errors
from ui.library.library import AdapterFile

CALLS_AT_ONCE = 8
MAX_ADAPTERS = 8
MAX_RANK = 512
OPTIONS = ("width", "height", "sampler", "count", "blend", "picture", "mask", "strength")
ADAPTER_FIELDS = ("strength", "denoiser", "text_encoders", "blocks", "curve", "mask")
SINGLE_FILE_FORMATS = tuple(name for name in FORMATS if name != "peft")  # PEFT's is a folder
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,79}")


def add_api(session: Session, demo: gr.Blocks) -> None:
    """Add the endpoints to the open block; `/?view=api` and `Client.view_api()` show them."""

    def generate(
        prompt: str,
        adapters: dict[str, Any] | None = None,
        negative_prompt: str = "",
        seed: int = 0,
        steps: int = 20,
        guidance: float = 4.0,
        options: dict[str, Any] | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Draw pictures with a mix of adapters; the progress while it draws, then the saved PNGs.

        adapters: name -> strength from -2 to 2, or {"strength", "denoiser", "text_encoders", "blocks", "curve",
        "mask"}; prompts may hold <lora:name:0.8> too. options: {"width", "height", "sampler", "count", "blend",
        "picture", "mask", "strength"}, the last three to start from an uploaded picture. Cancelling the job stops
        the drawing.
        """
        with user_errors(is_markup=False):
            settings = {"seed": seed, "steps": steps, "guidance": guidance}
            request = draw_request(session.parts, (prompt, negative_prompt), settings, adapters, options, demo)
            for update in session.start(request, owner=f"api-{uuid.uuid4()}").updates():
                yield _answer(update)

    def list_adapters() -> list[dict[str, Any]]:
        """What the adapter folder holds: name, kind, base, rank, trigger words, and why a file cannot be used."""
        session.library.watch()
        return [_described(file, session) for file in session.library.files]

    def blend(
        adapters: dict[str, Any],
        name: str,
        mode: str = ADDITIVE,
        format: str = "diffusers",
        rank: int | None = None,
    ) -> dict[str, Any]:
        """Merge adapters into one new file of the adapter folder: adapters as for generate, name without a suffix."""
        with user_errors(is_markup=False):
            return _blended(session, (adapters, name), mode=mode, format=format, rank=rank)

    for endpoint in (generate, list_adapters, blend):
        gr.api(  # type: ignore[attr-defined]
            endpoint, concurrency_limit=CALLS_AT_ONCE
        )


def draw_request(
    parts: Parts,
    prompts: tuple[Any, Any],
    settings: Mapping[str, Any],
    adapters: Any,
    options: Any,
    demo: gr.Blocks,
) -> DrawRequest:
    """A call of `generate`, checked.

    Args:
        parts: of the base.
        prompts: the prompt and the negative one.
        settings: seed, steps, guidance.
        adapters, options: as the caller gave them.
        demo: whose uploads may be named.

    Raises:
        ValueError: one line that names the field.
    """
    wanted = _fields("options", options, OPTIONS)
    details = DetailValues(wanted.get("sampler"), wanted.get("width"), wanted.get("height"), wanted.get("strength"))
    return DrawRequest(
        check_settings(*prompts, settings["seed"], settings["steps"], settings["guidance"], details),
        choices_of(adapters, parts, demo),
        check_text("blend", wanted.get("blend")) or ADDITIVE,
        check_whole("count", wanted.get("count", 1), low=1, high=16),
        _canvas(wanted, demo),
    )


def choices_of(adapters: Any, parts: Parts, demo: gr.Blocks | None = None) -> tuple[AdapterChoice, ...]:
    """Adapters as a caller names them, checked; names are looked up when they are loaded.

    Raises:
        ValueError: not a mapping from names, too many, an unknown field, a strength out of range.
    """
    if adapters is None:
        return ()
    if not isinstance(adapters, Mapping):
        raise ValueError(f"adapters: got {type(adapters).__name__}, expected a mapping such as {{'ink': 0.8}}")
    if len(adapters) > MAX_ADAPTERS:
        raise ValueError(f"adapters: got {len(adapters)}, expected at most {MAX_ADAPTERS}")
    return check_adapters([_slot(name, value, demo) for name, value in adapters.items()], parts)


def _slot(name: Any, value: Any, demo: gr.Blocks | None) -> SlotValues:
    if not isinstance(value, Mapping):
        return SlotValues(name, True, value, False, 0.0, 0.0)
    fields = _fields(f"adapters, {str(name)[:40]}", value, ADAPTER_FIELDS)
    strength = fields.get("strength", 1.0)
    blocks = fields.get("blocks")
    if blocks is not None and not isinstance(blocks, list):
        raise ValueError(f"adapters, {str(name)[:40]}: blocks must be a list of numbers")
    return SlotValues(
        file=name,
        enabled=True,
        strength=strength,
        apart=not {"denoiser", "text_encoders"}.isdisjoint(fields),
        denoiser=fields.get("denoiser", strength),
        text_encoders=fields.get("text_encoders", strength),
        blocks=None if blocks is None else tuple(blocks),
        curve=fields.get("curve", ""),
        mask=_uploaded("mask", fields.get("mask"), demo),
    )


def _fields(name: str, value: Any, known: tuple[str, ...]) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{name}: got {type(value).__name__}, expected a mapping of {', '.join(known)}")
    unknown = [key for key in value if key not in known]
    if unknown:
        raise ValueError(f"{name}: got {str(unknown[0])[:40]!r}, expected only {', '.join(known)}")
    return value


def _canvas(options: Mapping[str, Any], demo: gr.Blocks) -> Canvas | None:
    picture, mask = (_uploaded(name, options.get(name), demo) for name in ("picture", "mask"))
    return check_canvas(picture, mask)


def _uploaded(name: str, value: Any, demo: gr.Blocks | None) -> str | None:
    """The path of an upload; only what was uploaded to this run of the app is one."""
    if value is None:
        return None
    path = value.get("path") if isinstance(value, Mapping) else None
    if demo is None or not isinstance(path, str) or path not in getattr(demo, "upload_file_set", ()):
        raise ValueError(f"{name}: not an upload to this app; send it with gradio_client.handle_file")
    return path


def _answer(update: Update) -> dict[str, Any]:
    """Pictures come with the last news only: a client fetches every file that it is told of."""
    pictures = update.pictures if update.is_last else ()
    return {
        "phase": update.phase,
        "step": update.step,
        "total": update.total,
        "ahead": update.ahead,
        "seconds": round(update.seconds, 3),
        "pictures": [_file(path) for path in pictures],
        "base": _file(update.base) if update.is_last and update.base else None,
    }


def _file(path: Path) -> dict[str, Any]:
    return {"path": str(path.resolve()), "orig_name": path.name, "meta": {"_type": "gradio.FileData"}}


def _described(file: AdapterFile, session: Session) -> dict[str, Any]:
    return {
        "name": file.name,
        "title": file.title,
        "kind": file.kind,
        "family": file.family,
        "rank": file.rank,
        "triggers": list(file.triggers),
        "tags": list(file.tags),
        "bytes": file.bytes,
        "problem": file.problem,
        "loaded": file.name in session.loaded,
    }


def _blended(session: Session, named: tuple[Any, Any], *, mode: Any, format: Any, rank: Any) -> dict[str, Any]:
    parts = session.parts
    choices = [choice for choice in choices_of(named[0], parts) if choice.draws]
    if not choices:
        raise ValueError("adapters: none has a strength; name at least one, such as {'ink': 0.8}")
    moving = next((choice.file for choice in choices if choice.curve or choice.mask), None)
    if moving is not None:
        raise ValueError(f"{moving}: a curve or a mask cannot be merged into a file; leave it out")
    path = _new_adapter(session.library.folder, named[1])
    if format not in SINGLE_FILE_FORMATS:
        raise ValueError(f"format: got {str(format)[:40]!r}, expected one of {', '.join(SINGLE_FILE_FORMATS)}")
    limit = None if rank is None else check_whole("rank", rank, low=1, high=MAX_RANK)
    files = {choice.file: session.library.find(choice.file).path for choice in choices}
    with session.weights() as base:
        states = {name: dd.load_adapter(path, base=base) for name, path in files.items()}
        paths = {name: (*state.modules, *state.vectors) for name, state in states.items()}
        weights = {choice.file: choice.weight_on(paths[choice.file], parts) for choice in choices}
        blended = dd.blend_with_report(states, weights, base=base, mode=check_text("mode", mode), rank=limit)
    with session.naming:
        _new_adapter(session.library.folder, named[1])  # another call may have taken the name meanwhile
        dd.save_adapter(blended.adapter, path, format=format)
    session.library.refresh()
    return {
        "name": path.stem,
        "mode": mode,
        "format": format,
        "layers": len(blended.report.layers),
        "rank": max((layer.rank for layer in blended.report.layers.values()), default=0),
        "largest_error": max((layer.error for layer in blended.report.layers.values()), default=0.0),
    }


def _new_adapter(folder: Path, name: Any) -> Path:
    """Where a new adapter of that name goes; a ValueError when it is no plain name, or taken."""
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name.endswith((" ", ".")):
        raise ValueError(
            f"name: got {str(name)[:40]!r}, expected letters, digits, blanks, '.', '_' and '-', at most 80, no folder"
        )
    path = folder / f"{name}.safetensors"
    if path.exists() or path.is_symlink():
        raise ValueError(f"name: there is an adapter {name!r} already; choose another name")
    return path
