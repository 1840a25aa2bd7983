"""The app without its widgets: one pipeline, its adapters, one drawing at a time."""

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from diffusers import DiffusionPipeline

from dora_diffusion.adapters import AdapterManager, LoadReport
from dora_diffusion.families import family_of_pipeline
from dora_diffusion.generation import (
    AdapterUse,
    GenerationSettings,
    GenerationStopped,
    StepReport,
    generate,
    save_picture,
)
from ui.library import AdapterLibrary, Stamp, stamp_of
from ui.request import AdapterChoice, DrawRequest, Parts
from ui.run import Run

MAX_LOADED = 8
MAX_BASES = 64


class Session:
    """Shared by every tab. The lock guards pipeline and manager; a mix of adapters belongs to one request only."""

    def __init__(self, pipe: DiffusionPipeline, *, model: str, folder: Path, output: Path) -> None:
        self.model = model
        self.library = AdapterLibrary(folder)
        self.library.refresh()
        self._pipe = pipe
        self._output = output
        self._manager = AdapterManager(pipe)
        self._lock = threading.Lock()
        self._loaded: OrderedDict[str, Stamp] = OrderedDict()
        self._bases: OrderedDict[GenerationSettings, Path] = OrderedDict()
        self._runs: dict[str, Run] = {}
        self._runs_lock = threading.Lock()

    @property
    def parts(self) -> Parts:
        """The base's components that adapters may change."""
        family = family_of_pipeline(self._pipe)
        present = (part.name for part in family.text_encoders if getattr(self._pipe, part.name, None) is not None)
        return Parts(family.denoiser.name, tuple(present))

    @property
    def loaded(self) -> tuple[str, ...]:
        """Adapters held in memory, the longest unused first."""
        return tuple(self._loaded)

    @property
    def busy(self) -> bool:
        """Whether the pipeline is at work."""
        return self._lock.locked()

    def load(self, file: str) -> LoadReport:
        """Load an adapter of the library unless it is loaded already; waits for a drawing under way.

        Raises:
            ValueError: not in the library, or not an adapter for this base.
        """
        with self._lock:
            return self._ensure_loaded(file, keep=())

    def start(self, request: DrawRequest, *, owner: str) -> Run:
        """Draw in the background: the blend, then the base unless it is known for these settings.

        Args:
            request: what to draw.
            owner: whose run it is (a tab); a run the owner still has is stopped.
        """
        run = Run(lambda run: self._work(request, run))
        with self._runs_lock:
            if (earlier := self._runs.get(owner)) is not None:
                earlier.stop()
            self._runs = {name: other for name, other in self._runs.items() if not other.finished} | {owner: run}
        run.start()
        return run

    def stop(self, owner: str) -> None:
        """Stop the owner's run within a step; nothing when there is none."""
        with self._runs_lock:
            run = self._runs.get(owner)
        if run is not None:
            run.stop()

    def close(self) -> None:
        """Stop every run, then leave the pipeline as it was given."""
        with self._runs_lock:
            runs = tuple(self._runs.values())
        for run in runs:
            run.stop()
        with self._lock:
            self._manager.unload()
            self._loaded.clear()

    def _work(self, request: DrawRequest, run: Run) -> None:
        try:
            with self._turn(run):
                self._draw_both(request, run)
            run.post(replace(run.latest, phase="done", preview=None))
        except GenerationStopped:
            run.post(replace(run.latest, phase="stopped"))

    @contextmanager
    def _turn(self, run: Run) -> Iterator[None]:
        while not self._lock.acquire(timeout=0.1):
            if run.is_stopping():
                raise GenerationStopped
        try:
            yield
        finally:
            self._manager.set_adapters({})
            self._lock.release()

    def _draw_both(self, request: DrawRequest, run: Run) -> None:
        base = self._known_base(request.settings)
        run.post(replace(run.latest, phase="loading", base=base))
        reports = [self._ensure_loaded(choice.file, keep=_files(request.adapters)) for choice in request.adapters]
        if request.adapters:
            self._manager.set_adapters({choice.file: choice.weight for choice in request.adapters})
            uses = [
                AdapterUse(name=choice.file, sha256=report.sha256, weight=choice.weight)
                for choice, report in zip(request.adapters, reports, strict=True)
            ]
            picture = self._draw(request.settings, uses, run, phase="blend", folder=self._output)
            run.post(replace(run.latest, picture=picture))
        if base is None:
            self._manager.set_adapters({})
            base = self._draw(request.settings, [], run, phase="base", folder=self._output / "base")
            self._remember_base(request.settings, base)
        run.post(replace(run.latest, base=base, picture=run.latest.picture or base))

    def _draw(
        self, settings: GenerationSettings, uses: Sequence[AdapterUse], run: Run, *, phase: str, folder: Path
    ) -> Path:
        run.post(replace(run.latest, phase=phase, step=0, total=settings.steps, preview=None))

        def on_step(report: StepReport) -> None:
            run.post(replace(run.latest, step=report.step, total=report.total, preview=report.preview))

        picture = generate(self._pipe, settings, on_step=on_step, should_stop=run.is_stopping, preview_every=1)
        folder.mkdir(parents=True, exist_ok=True)
        return save_picture(picture, _new_file(folder, settings), settings, model=self.model, adapters=uses)

    def _ensure_loaded(self, file: str, *, keep: Sequence[str]) -> LoadReport:
        """Load, or load again when the file has changed; the longest unused beyond MAX_LOADED make room."""
        path = self.library.find(file).path
        try:
            stamp = stamp_of(path)
        except OSError as error:
            raise ValueError(f"{file}: the file is gone ({error.strerror}); press Refresh") from error
        if self._loaded.get(file) != stamp:
            if file in self._loaded:
                self._unload(file)
            self._manager.load_adapter(path, name=file)
            self._loaded[file] = stamp
        self._loaded.move_to_end(file)
        spare = [name for name in self._loaded if name not in (*keep, file)]
        for oldest in spare[: max(0, len(self._loaded) - MAX_LOADED)]:
            self._unload(oldest)
        return self._manager.reports[file]

    def _unload(self, file: str) -> None:
        self._manager.delete_adapter(file)
        del self._loaded[file]

    def _known_base(self, settings: GenerationSettings) -> Path | None:
        path = self._bases.get(settings)
        return path if path is not None and path.is_file() else None

    def _remember_base(self, settings: GenerationSettings, path: Path) -> None:
        self._bases[settings] = path
        self._bases.move_to_end(settings)
        while len(self._bases) > MAX_BASES:
            self._bases.popitem(last=False)


def _files(adapters: Sequence[AdapterChoice]) -> tuple[str, ...]:
    return tuple(choice.file for choice in adapters)


def _new_file(folder: Path, settings: GenerationSettings) -> Path:
    """A name that sorts by time and is not taken."""
    stem = f"{datetime.now():%Y%m%d-%H%M%S}-seed{settings.seed}"
    names = (f"{stem}{suffix}.png" for suffix in ("", *(f"-{number}" for number in range(2, 10_000))))
    return next(path for name in names if not (path := folder / name).exists())
