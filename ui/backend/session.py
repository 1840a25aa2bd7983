"""The app without its widgets: one base at a time, its adapters, one drawing at a time."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from dora_diffusion.adapters.matching import LoadReport
from dora_diffusion.families import family_of_pipeline
from dora_diffusion.generation.base_use import BaseUse, hash_of_source, hashed_parts
from dora_diffusion.generation.generate import GenerationSettings, GenerationStopped, StepReport, each_seed, generate
from dora_diffusion.generation.inputs import kept_name
from dora_diffusion.generation.png_metadata import AdapterUse, picture_sha256
from dora_diffusion.generation.samplers import sampler_names
from dora_diffusion.pipelines.base_weights import BaseWeights, base_weights
from dora_diffusion.pipelines.loading import load_pipeline
from dora_diffusion.utils.hardware import dtype_name
from ui.backend.draw_queue import DrawQueue
from ui.backend.engine import Engine, LoadedAdapter, bases_offered
from ui.backend.picture_store import Drawn, PictureStore, base_key, origin_of
from ui.backend.request import AdapterChoice, BaseParts, DrawRequest
from ui.backend.run import Run
from ui.backend.tags import Resolved, resolve_tags
from ui.library.library import AdapterLibrary

OnStep = Callable[[StepReport], None]
ShouldStop = Callable[[], bool]


class Session:
    """Shared by every tab. Turns guard the base; a mix of adapters belongs to one request only."""

    def __init__(
        self,
        pipe: Any,
        *,
        model: str,
        folder: Path,
        output: Path,
        models: Path | None = None,
        files: Mapping[str, Path] | None = None,
    ) -> None:
        """
        Args:
            pipe: the base to begin with.
            model: what it is called.
            folder: of adapters.
            output: where pictures are saved.
            models: a folder of further bases to switch to: folders in diffusers' layout and `.safetensors` files.
            files: components of that base which come from files of their own, as `load_pipeline` takes them.
        """
        self.library = AdapterLibrary(folder)
        self.library.refresh()
        self.output = output
        self._pictures = PictureStore(output)
        self._engine = Engine(pipe, model=model, library=self.library)
        self._first = model
        self._files = dict(files or {})
        self._models_folder = models
        self._base = self._described(pipe, model)
        self._turns = DrawQueue()
        self._runs: dict[str, Run] = {}
        self._runs_lock = threading.Lock()
        self._closing = threading.Event()
        self.naming = threading.Lock()  # held from the look whether a name is free until its file is there

    @property
    def model(self) -> str:
        """What the present base is called."""
        return self._engine.model

    @property
    def source(self) -> str | Path:
        """Where the present base lies, as `load_pipeline` takes it."""
        return bases_offered(self._first, self._models_folder)[self._engine.model]

    @property
    def files(self) -> dict[str, Path]:
        """Component -> file of its own, of the present base."""
        return self._files_of(self._engine.model)

    def _files_of(self, model: str) -> dict[str, Path]:
        return self._files if model == self._first else {}

    @property
    def models(self) -> tuple[str, ...]:
        """Bases that `switch` takes: the first one, the embedded ones, and those of the models folder."""
        return tuple(bases_offered(self._first, self._models_folder))

    @property
    def parts(self) -> BaseParts:
        """The base's components and blocks that adapters may change."""
        return self._engine.parts

    @property
    def family(self) -> str:
        """The name of the base's model family: `sd1`, `flux` ..."""
        return family_of_pipeline(self._engine.pipe).name

    @property
    def samplers(self) -> tuple[str, ...]:
        """Samplers that suit the base."""
        return sampler_names(self._engine.pipe)

    @property
    def loaded(self) -> tuple[str, ...]:
        """Adapters held in memory, the longest unused first."""
        return self._engine.loaded

    @property
    def busy(self) -> bool:
        """Whether the base is at work."""
        return self._turns.waiting > 0

    @property
    def waiting(self) -> int:
        """How many drawings there are: the one under way and those that wait."""
        return self._turns.waiting

    def load(self, file: str) -> LoadedAdapter:
        """Load an adapter of the library unless it is loaded already; waits for a drawing under way, and no other.

        Raises:
            ValueError: not in the library, or not an adapter for this base.
        """
        with self._turns.turn(is_short=True):
            return self._engine.load(file)

    def switch(self, model: str, *, adapters: Sequence[str] | None = None) -> dict[str, str]:
        """Put another base in the present one's place, when those that wait before have drawn.

        Args:
            model: one of `models`.
            adapters: to load into it; None takes those that the present base holds.

        Returns:
            Each adapter that does not fit the new base -> why, in one line.

        Raises:
            ValueError: not one of `models`, or it cannot be loaded; the present base stays then.
        """
        sources = bases_offered(self._first, self._models_folder)
        if model not in sources:
            raise ValueError(f"model {str(model)[:80]!r} is not offered here; expected one of {', '.join(sources)}")
        with self._turns.turn():
            old = self._engine
            if old.model == model:
                return {}
            wanted = old.loaded if adapters is None else tuple(adapters)
            device = str(getattr(old.pipe, "device", "cpu"))
            files = self._files_of(model)
            pipe = load_pipeline(
                sources[model],
                dtype=old.pipe.dtype,
                device=device,
                transformer=files.get("transformer"),
                unet=files.get("unet"),
                vae=files.get("vae"),
            )
            described = self._described(pipe, model)
            self._engine, self._base = Engine(pipe, model=model, library=self.library), described
            old.close()
            return self._misfits(wanted)

    def start(self, request: DrawRequest, *, owner: str) -> Run:
        """Draw in the background: the blend of every seed, then the base of the last unless it is known.

        Args:
            request: what to draw.
            owner: whose run it is (a tab); a run the owner still has is stopped.

        Raises:
            ValueError: a tag in the prompt that names no adapter.
        """
        wanted = self._resolved(request)
        engine = self._engine
        run = Run(lambda run: self._work(wanted, engine, run))
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

    def draw(
        self, request: DrawRequest, *, should_stop: ShouldStop | None = None, on_step: OnStep | None = None
    ) -> list[Drawn]:
        """Draw every seed of a request and wait for it; nothing is saved, and no base is drawn.

        Args:
            request: what to draw.
            should_stop: asked while waiting and after every step.
            on_step: called after every step, without previews.

        Raises:
            ValueError: what the request asks for cannot be drawn.
            GenerationStopped: `should_stop` said yes.
        """
        asks = should_stop or (lambda: False)

        def asked() -> bool:
            return self._closing.is_set() or asks()

        wanted, engine = self._resolved(request), self._engine
        with self._turns.turn(should_stop=asked):
            self._check_engine(engine)
            uses = self._load_all(wanted.request, asked)
            with engine.mixed(wanted.request):
                return [
                    self._drawn(settings, wanted, uses, should_stop=asked, on_step=on_step)
                    for settings in each_seed(wanted.request.settings, wanted.request.count)
                ]

    def save(self, drawn: Drawn, folder: Path | None = None) -> Path:
        """Write a picture with its metadata into the output folder, unless another is given; returns its new path."""
        return self._pictures.save(drawn, folder)

    @contextmanager
    def weights(self) -> Iterator[BaseWeights]:
        """The base's own weights in main memory, to be read within the block; drawings wait until it ends."""
        with self._turns.turn(is_short=True):
            base = base_weights(self._engine.pipe)
            # beside adapters as their files have them, wherever the base draws
            yield replace(
                base, weight=lambda path: base.weight(path).cpu(), parameter=lambda path: base.parameter(path).cpu()
            )

    def stop_all(self) -> None:
        """Stop whatever draws, within a step, for good: nothing is drawn afterwards."""
        self._closing.set()
        with self._runs_lock:
            runs = tuple(self._runs.values())
        for run in runs:
            run.stop()

    def close(self) -> None:
        """Stop whatever draws, then leave the pipeline as it was given."""
        self.stop_all()
        with self._turns.turn(is_short=True):
            self._engine.close()
        self.library.close()

    def _misfits(self, files: Sequence[str]) -> dict[str, str]:
        reasons = {}
        for file in files:
            try:
                self._engine.ensure_loaded(file, keep=files)
            except ValueError as error:
                reasons[file] = str(error)
        return reasons

    def _resolved(self, request: DrawRequest) -> Resolved:
        return resolve_tags(request, self.library.usable, self.parts)

    def _check_engine(self, engine: Engine) -> None:
        """A request names the parts of the base that it was made for."""
        if engine is not self._engine:
            raise ValueError(f"the base was switched to {self.model} while this waited; press Generate again")

    def _work(self, wanted: Resolved, engine: Engine, run: Run) -> None:
        def on_wait(ahead: int) -> None:
            run.post(replace(run.latest, ahead=ahead))

        try:
            with self._turns.turn(should_stop=run.is_stopping, on_wait=on_wait):
                self._check_engine(engine)
                self._draw_both(wanted, run)
            run.post(replace(run.latest, phase="done", preview=None))
        except GenerationStopped:
            run.post(replace(run.latest, phase="stopped"))

    def _draw_both(self, wanted: Resolved, run: Run) -> None:
        request = wanted.request
        every = each_seed(request.settings, request.count)
        known = self._pictures.known_base(base_key(self.model, every[-1], request.canvas))
        run.post(replace(run.latest, phase="loading", ahead=0, base=known, count=request.count))
        started = time.perf_counter()
        uses = self._load_all(request, run.is_stopping)
        run.post(replace(run.latest, load_seconds=time.perf_counter() - started))
        if request.adapters:
            with self._engine.mixed(request) as mix_seconds:
                run.post(replace(run.latest, mix_seconds=mix_seconds))
                for settings in every:
                    _tell(run, self._draw_and_save(settings, wanted, uses, run, "blend", self.output))
        bare = replace(wanted, request=replace(request, adapters=()), tags=())
        for settings in every[-1:] if request.adapters else every:
            key = base_key(self.model, settings, request.canvas)
            base = self._pictures.known_base(key)
            if base is None:
                base = self._draw_and_save(settings, bare, (), run, "base", self.output / "base")
                self._pictures.remember_base(key, base)
            if not request.adapters:
                _tell(run, base)
            run.post(replace(run.latest, base=base))

    def _load_all(self, request: DrawRequest, should_stop: ShouldStop) -> tuple[AdapterUse, ...]:
        files = [choice.file for choice in request.adapters]
        uses = []
        for choice in request.adapters:
            if should_stop():
                raise GenerationStopped
            uses.append(self._use(choice, self._engine.ensure_loaded(choice.file, keep=files), request.blend))
        return tuple(uses)

    def _use(self, choice: AdapterChoice, report: LoadReport, blend: str) -> AdapterUse:
        mask = None if choice.mask is None else picture_sha256(choice.mask)
        return AdapterUse(
            choice.file,
            report.sha256,
            choice.weight,
            blend,
            choice.curve,
            mask,
            file=str(self.library.find(choice.file).path),
            mask_file=None if mask is None else kept_name(mask),
        )

    def _draw_and_save(
        self,
        settings: GenerationSettings,
        wanted: Resolved,
        uses: tuple[AdapterUse, ...],
        run: Run,
        phase: str,
        folder: Path,
    ) -> Path:
        run.post(replace(run.latest, phase=phase, step=0, total=settings.steps, preview=None))

        def on_step(report: StepReport) -> None:
            run.post(replace(run.latest, step=report.step, total=report.total, preview=report.preview))

        drawn = self._drawn(settings, wanted, uses, should_stop=run.is_stopping, on_step=on_step, preview_every=1)
        run.post(replace(run.latest, draw_seconds=run.latest.draw_seconds + drawn.seconds))
        return self.save(drawn, folder)

    def _drawn(
        self,
        settings: GenerationSettings,
        wanted: Resolved,
        uses: tuple[AdapterUse, ...],
        *,
        should_stop: ShouldStop,
        on_step: OnStep | None,
        preview_every: int = 0,
    ) -> Drawn:
        canvas = wanted.request.canvas
        started = time.perf_counter()
        image = generate(
            self._engine.pipe,
            settings,
            canvas=canvas,
            on_step=on_step,
            should_stop=should_stop,
            preview_every=preview_every,
        )
        seconds = time.perf_counter() - started
        origin = replace(origin_of(canvas, wanted.tags), base=self._base)
        return Drawn(image, settings, uses, origin, self.model, seconds, _inputs(wanted.request))

    def _described(self, pipe: Any, model: str) -> BaseUse:
        """A base that was just loaded, as pictures name it; its files are hashed."""
        source = bases_offered(self._first, self._models_folder)[model]
        return BaseUse(
            str(source),
            dtype_name(pipe.dtype),
            pipe.device.type,
            sha256=hash_of_source(source),
            parts=hashed_parts(self._files_of(model)),
        )


def _tell(run: Run, picture: Path) -> None:
    run.post(replace(run.latest, picture=picture, pictures=(*run.latest.pictures, picture)))


def _inputs(request: DrawRequest) -> tuple[Image.Image, ...]:
    canvas = request.canvas
    own = () if canvas is None else (canvas.image, canvas.mask)
    return tuple(picture for picture in (*own, *(choice.mask for choice in request.adapters)) if picture is not None)
