"""One base and its adapters: what is loaded, and a mix that stands for as long as it is drawn."""

import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from dora_diffusion.adapters.manager import AdapterManager
from dora_diffusion.adapters.matching import LoadReport
from dora_diffusion.adapters.mixing import Ingredient, clear_mix, set_mix
from dora_diffusion.families import family_of_pipeline
from dora_diffusion.pipelines.loading import EMBEDDED
from ui.backend.request import AdapterChoice, BaseParts, Block, DrawRequest
from ui.library.library import AdapterLibrary, Stamp, stamp_of

MAX_LOADED = 8
READS = 3


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter in memory.

    Attributes:
        report: what was found in its file.
        model: the base that holds it.
        stamp: the state of the file as it was read.
        seconds: how long reading took; None when it was there already.
    """

    report: LoadReport
    model: str
    stamp: Stamp
    seconds: float | None


class Engine:
    """A pipeline and its manager. It guards nothing: whoever calls has the turn."""

    def __init__(self, pipe: Any, *, model: str, library: AdapterLibrary) -> None:
        self.pipe = pipe
        self.model = model
        self.parts = parts_of(pipe)
        self._library = library
        self._manager = AdapterManager(pipe)
        self._loaded: OrderedDict[str, Stamp] = OrderedDict()

    @property
    def loaded(self) -> tuple[str, ...]:
        """Adapters held in memory, the longest unused first."""
        return tuple(self._loaded)

    def load(self, file: str) -> LoadedAdapter:
        """As `ensure_loaded`, and of which state of the file it is."""
        before, started = self._loaded.get(file), time.perf_counter()
        report, stamp = self.ensure_loaded(file), self._loaded[file]
        return LoadedAdapter(report, self.model, stamp, None if stamp == before else time.perf_counter() - started)

    def ensure_loaded(self, file: str, *, keep: Sequence[str] = ()) -> LoadReport:
        """Load, or load again when the file has changed; the longest unused beyond MAX_LOADED make room.

        Raises:
            ValueError: not in the library, gone, changing as it is read, or not an adapter for this base.
        """
        path = self._library.find(file).path
        if self._loaded.get(file) != _stamp(file, path):
            if file in self._loaded:
                self._unload(file)
            self._read(file, path)
        self._loaded.move_to_end(file)
        spare = [name for name in self._loaded if name not in (*keep, file)]
        for oldest in spare[: max(0, len(self._loaded) - MAX_LOADED)]:
            self._unload(oldest)
        return self._manager.reports[file]

    @contextmanager
    def mixed(self, request: DrawRequest) -> Iterator[float]:
        """Let the request's adapters, all of them loaded, be in the base; gives the seconds that this took.

        After it the base is bare again, however the drawing ends.
        """
        started = time.perf_counter()
        try:
            set_mix(self._manager, [self._ingredient(choice) for choice in request.adapters], blend=request.blend)
            yield time.perf_counter() - started
        finally:
            clear_mix(self._manager, [choice.file for choice in request.adapters])

    def _ingredient(self, choice: AdapterChoice) -> Ingredient:
        weight = choice.weight_on(self._manager.paths(choice.file), self.parts)
        return Ingredient(choice.file, weight, choice.curve, choice.mask)

    def close(self) -> None:
        """Leave the pipeline as it was given."""
        self._manager.unload()
        self._loaded.clear()

    def _read(self, file: str, path: Path) -> None:
        """Load a file that is the same before and after, so that its hash is that of what was loaded."""
        for _ in range(READS):
            before = _stamp(file, path)
            try:
                self._manager.load_adapter(path, name=file)
            except OSError as error:
                raise ValueError(f"{file}: cannot be read ({error.strerror or type(error).__name__})") from error
            if _stamp_or_none(path) == before:
                self._loaded[file] = before
                return
            self._manager.delete_adapter(file)
        raise ValueError(f"{file}: the file changes as it is read; try again when it is finished")

    def _unload(self, file: str) -> None:
        self._manager.delete_adapter(file)
        del self._loaded[file]


def bases_offered(first: str, folder: Path | None) -> Mapping[str, str | Path]:
    """Name -> what `load_pipeline` takes: the first base, the embedded ones, and those of a folder."""
    found: dict[str, str | Path] = {name: name for name in (first, *EMBEDDED)}
    for path in sorted(folder.iterdir()) if folder is not None and folder.is_dir() else ():
        if (path / "model_index.json").is_file() or path.suffix == ".safetensors":
            found.setdefault(path.name, path)
    return found


def parts_of(pipe: Any) -> BaseParts:
    """The base's components that adapters may change, and its denoiser's blocks."""
    family = family_of_pipeline(pipe)
    name = family.denoiser.name
    present = (part.name for part in family.text_encoders if getattr(pipe, part.name, None) is not None)
    return BaseParts(name, tuple(present), _blocks(name, getattr(pipe, name)))


def _blocks(name: str, denoiser: nn.Module) -> tuple[Block, ...]:
    """Down, middle and up of a UNet; of a chain of equal blocks its early, middle and late third."""
    if all(hasattr(denoiser, part) for part in ("down_blocks", "mid_block", "up_blocks")):
        return (
            Block("down blocks", (f"{name}.down_blocks",)),
            Block("middle block", (f"{name}.mid_block",)),
            Block("up blocks", (f"{name}.up_blocks",)),
        )
    chains = ((child, part) for child, part in denoiser.named_children() if isinstance(part, nn.ModuleList))
    depth = [f"{name}.{child}.{i}" for child, part in chains if _is_chain(child) for i in range(len(part))]
    third = -(-len(depth) // 3)
    labels = ("early blocks", "middle blocks", "late blocks")
    cuts = [tuple(depth[index * third : (index + 1) * third]) for index in range(3)]
    return tuple(Block(label, cut) for label, cut in zip(labels, cuts, strict=True) if cut)


def _is_chain(child: str) -> bool:
    return child.endswith("blocks") or child == "layers"


def _stamp(file: str, path: Path) -> Stamp:
    try:
        return stamp_of(path)
    except OSError as error:
        raise ValueError(f"{file}: the file is gone ({error.strerror}); press Refresh") from error


def _stamp_or_none(path: Path) -> Stamp | None:
    try:
        return stamp_of(path)
    except OSError:
        return None
