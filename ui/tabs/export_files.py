"""The rack written to disk, as one adapter or as a whole model, then drawn from disk and compared pixel by pixel."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from dora_diffusion.blending import BLEND_SENTENCES, BlendOptions, blend_with_report
from dora_diffusion.blending.bake import bake
from dora_diffusion.conversion import TOOLS, for_tool
from dora_diffusion.formats import FORMATS, load_examined, save_adapter
from dora_diffusion.functional.blend_modes import ADDITIVE, MODES
from dora_diffusion.generation.generate import GenerationStopped, generate
from dora_diffusion.inspection.verify import verify_for_tool
from dora_diffusion.pipelines.base_weights import EMBEDDED, BaseWeights
from dora_diffusion.pipelines.loading import load_pipeline
from dora_diffusion.state import AdapterState
from ui.backend.checks import check_name
from ui.backend.picture_difference import largest_difference
from ui.backend.picture_store import Drawn
from ui.backend.request import AdapterChoice, DrawRequest
from ui.backend.session import Session, ShouldStop
from ui.backend.tags import resolve_tags

AS_DRAWN = ""
TARGETS = ("an adapter", "a whole model")
EXPORTS, MODELS = "exports", "models"

MixWeights = dict[str, float | dict[str, float]]


@dataclass(frozen=True)
class ExportOptions:
    """How the rack is written.

    Attributes:
        name: of the file or folder.
        target: of TARGETS.
        mode: a key of `BLEND_SENTENCES`, or AS_DRAWN.
        format: of an adapter.
        tool: a key of `TOOLS`, for whom the adapter is made, in the format that it reads; empty for `format`.
        rank: of an adapter's layers at most; None for the sum.
        density: what ties, dare and magnitude-prune keep.
    """

    name: str
    target: str = TARGETS[0]
    mode: str = AS_DRAWN
    format: str = "diffusers"
    tool: str = ""
    rank: int | None = None
    density: float = 0.5


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the file or folder.
        name: what the library calls it; empty for a whole model.
        pictures: drawn with the rack, and with what was written; saved.
        largest_difference: of the two, in any channel of any pixel, 0 to 255.
        sentence: all of it on one line.
    """

    path: Path
    name: str
    pictures: tuple[Path, Path]
    largest_difference: int
    sentence: str


def check_options(options: ExportOptions) -> ExportOptions:
    """The options, if they can be: a ValueError names the one that cannot."""
    name = check_name("name", options.name)
    for what, value, known in (
        ("write", options.target, TARGETS),
        ("mode", options.mode, (AS_DRAWN, *BLEND_SENTENCES)),
        ("format", options.format, tuple(FORMATS)),
        ("tool", options.tool, ("", *TOOLS)),
    ):
        if value not in known:
            raise ValueError(f"{what}: got {str(value)[:40]!r}, expected one of {', '.join(filter(None, known))}")
    return replace(options, name=name.removesuffix(".safetensors"))


def export_mix(
    session: Session, request: DrawRequest, options: ExportOptions, *, should_stop: ShouldStop | None = None
) -> Exported:
    """Draw a mix, write it, draw with what was written, and compare the two.

    Args:
        session: whose base and library are used; an adapter is written into its library's folder, a whole model into
            the output folder.
        request: of one picture; its adapters are what is written.
        options: how.
        should_stop: asked while waiting, after every step of a drawing, and after every layer or tensor.

    Raises:
        ValueError: one line: nothing to write, a name that is taken, a curve or mask, which no file can hold, or a mode
            or format that cannot hold the mix. Nothing is left behind then.
        GenerationStopped: `should_stop` said yes. Nothing is left behind then either.
    """
    options = check_options(options)
    wanted = replace(resolve_tags(request, session.library.usable, session.parts).request, count=1)
    if not wanted.adapters:
        raise ValueError("nothing to export: turn on an adapter in the rack, at a strength other than 0")
    if moving := [choice.file for choice in wanted.adapters if choice.curve or choice.mask]:
        raise ValueError(f"{moving[0]}: has a curve or a mask, which no file can hold; take it off to export")
    options = replace(options, mode=options.mode or wanted.blend)
    write = _as_adapter if options.target == TARGETS[0] else _as_model
    return write(session, wanted, options, should_stop or (lambda: False))


def _as_adapter(session: Session, request: DrawRequest, options: ExportOptions, should_stop: ShouldStop) -> Exported:
    is_folder = options.format == "peft" and not options.tool
    path = session.library.folder / (options.name if is_folder else f"{options.name}.safetensors")
    _check_free(path)
    (live,) = session.draw(request, should_stop=should_stop)
    written = False
    try:
        with session.weights() as base:
            states, weights = _mix(session, request, live, base)
            blended = blend_with_report(
                states, weights, base=base, mode=options.mode, rank=options.rank,
                options=BlendOptions(density=options.density), progress=_asking(should_stop),
            )  # fmt: skip
            written_as = _for(options, blended.adapter, base, should_stop)
        with session.naming:  # another tab may have taken the name meanwhile
            _check_free(path)
            save_adapter(written_as.adapter, path, format=written_as.format)
            written = True
        session.library.refresh()
        name = next((file.name for file in session.library.files if file.path == path), options.name)
        merged = replace(request, adapters=(AdapterChoice(name, 1.0),), blend=ADDITIVE)
        (again,) = session.draw(merged, should_stop=should_stop)
        if again.model != live.model:
            raise ValueError(f"the base was switched to {again.model} meanwhile; export again")
        summary = " ".join(filter(None, (blended.report.sentence(), written_as.sentence)))
        return _compared(session, live, again, path, name=name, summary=summary)
    except BaseException:
        if written:
            _remove(path)
            session.library.refresh()
        raise


@dataclass(frozen=True)
class _Written:
    """An adapter as it is saved, in which format, and what is said of it."""

    adapter: AdapterState
    format: str
    sentence: str = ""


def _for(options: ExportOptions, adapter: AdapterState, base: BaseWeights, should_stop: ShouldStop) -> _Written:
    """The adapter itself, or made for a tool, with how far what the tool draws will be from ours."""
    if not options.tool:
        return _Written(adapter, options.format)
    asking = _asking(should_stop)
    made = for_tool(adapter, options.tool, base=base, rank=options.rank, progress=asking)
    found = verify_for_tool(made.adapter, adapter, made.tool, base=base, progress=asking)
    sentence = f"Made {made.sentence()}. It draws each layer's change to {found.error:.2g} or nearer."
    return _Written(made.adapter, made.format, sentence)


def _as_model(session: Session, request: DrawRequest, options: ExportOptions, should_stop: ShouldStop) -> Exported:
    if options.mode not in MODES:
        raise ValueError(f"mode: {options.mode!r} makes adapters only; a whole model is one of {', '.join(MODES)}")
    source = _source_of(session)
    path = session.output / MODELS / (f"{options.name}.safetensors" if source.is_file() else options.name)
    _check_free(path)
    (live,) = session.draw(request, should_stop=should_stop)
    written = False
    try:
        with session.weights() as base:  # one at a time works on a base, and this needs the memory of another
            states, weights = _mix(session, request, live, base)
            path.parent.mkdir(parents=True, exist_ok=True)
            with session.naming:
                _check_free(path)
                report = bake(source, states, weights, path, mode=options.mode, on_progress=_asking(should_stop))
                written = True
            image = generate(load_pipeline(path), live.settings, canvas=request.canvas, should_stop=should_stop)
        again = replace(live, image=image, adapters=(), model=options.name)
        return _compared(session, live, again, path, name="", summary=f"{report.layers} layers changed")
    except BaseException:
        if written:
            _remove(path)
        raise


def _mix(
    session: Session, request: DrawRequest, live: Drawn, base: BaseWeights
) -> tuple[dict[str, AdapterState], MixWeights]:
    """The adapters that drew `live`, and their strengths."""
    if session.model != live.model:
        raise ValueError(f"the base was switched to {session.model} meanwhile; export again")
    states: dict[str, AdapterState] = {}
    weights: MixWeights = {}
    for choice, use in zip(request.adapters, live.adapters, strict=True):
        path = session.library.find(choice.file).path
        state, examined = load_examined(path, base=base)
        if use.sha256 is not None and examined.sha256 != use.sha256:
            raise ValueError(f"{choice.file}: the file has changed since it was drawn with; export again")
        states[choice.file] = state
        weights[choice.file] = choice.weight_on((*state.modules, *state.vectors), session.parts)
    return states, weights


def _asking(should_stop: ShouldStop) -> Callable[..., None]:
    """A callback for progress of any kind that ends the work when a stop is asked for."""

    def progress(*at: object) -> None:
        if should_stop():
            raise GenerationStopped

    return progress


def _source_of(session: Session) -> Path:
    source = EMBEDDED.get(session.model, Path(session.source))
    if not source.exists():
        raise ValueError(f"{session.model}: the base is not a file or folder here; write an adapter instead")
    return source


def _check_free(path: Path) -> None:
    if path.exists():
        raise ValueError(f"name: {path.name} is there already in {path.parent}; choose another")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _compared(session: Session, live: Drawn, again: Drawn, path: Path, *, name: str, summary: str) -> Exported:
    pictures = session.save(live, session.output / EXPORTS), session.save(again, session.output / EXPORTS)
    largest = largest_difference(_rgb(live.image), _rgb(again.image))
    verdict = "the same picture, pixel for pixel" if largest == 0 else f"largest difference {largest} of 255"
    return Exported(path, name, pictures, largest, f"Wrote {path}: {summary}. Drawn from the file: {verdict}.")


def _rgb(image: Any) -> Image.Image:
    converted: Image.Image = image.convert("RGB")
    return converted
