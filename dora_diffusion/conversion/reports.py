"""The walk over an adapter's layers that every conversion is, and what it tells of them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from dora_diffusion.state import AdapterState, Module
from dora_diffusion.utils.progress import LayerProgress


@dataclass(frozen=True)
class Report:
    """How near a conversion came, layer by layer.

    Attributes:
        errors: the layers that it changed -> ||W'_new - W'_old|| / ||W'_old - W||; of D's where no base was given.
        ranks: the same layers -> their new rank.
        left_out: layers looked at that needed no change: equal in both models, small enough already, of that kind.
    """

    errors: Mapping[str, float]
    ranks: Mapping[str, int]
    left_out: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Report({self.sentence()})"

    @property
    def largest(self) -> float:
        """The error of the worst layer; 0 when there is none."""
        return max(self.errors.values(), default=0.0)

    @property
    def worst(self) -> str:
        """The path of that layer; empty when there is none."""
        return max(self.errors, key=lambda path: self.errors[path], default="")

    @property
    def mean(self) -> float:
        """The mean of the layers' errors; 0 when there is none."""
        return sum(self.errors.values()) / len(self.errors) if self.errors else 0.0

    def sentence(self) -> str:
        """Layers, ranks and errors on one line."""
        if not self.errors:
            return f"0 layers, {len(self.left_out)} left as they were"
        low, high = min(self.ranks.values()), max(self.ranks.values())
        ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
        return (
            f"{len(self.errors)} layers, {len(self.left_out)} left as they were; {ranks}; "
            f"relative error {self.mean:.2g} on average, {self.largest:.2g} at most"
        )


@dataclass(frozen=True)
class Converted:
    """A layer's new module and its error."""

    module: Module
    error: float


def walk(
    paths: Iterable[str], convert: Callable[[str], Converted | None], progress: LayerProgress | None
) -> tuple[dict[str, Module], Report]:
    """Convert layer after layer; None of `convert` leaves one out."""
    wanted = tuple(paths)
    modules: dict[str, Module] = {}
    errors: dict[str, float] = {}
    for done, path in enumerate(wanted, start=1):
        if (converted := convert(path)) is not None:
            modules[path], errors[path] = converted.module, converted.error
        if progress is not None:
            progress(done, len(wanted), path)
    ranks = {path: module.rank for path, module in modules.items()}
    return modules, Report(errors, ranks, tuple(path for path in wanted if path not in modules))


def rewritten(
    adapter: AdapterState,
    operation: str,
    convert: Callable[[str], Converted | None],
    progress: LayerProgress | None,
    report: Callable[[Report], None] | None,
) -> AdapterState:
    """The adapter with the layers that `convert` changes, everything else kept, and a fact about it in the metadata."""
    modules, summary = walk(adapter.modules, convert, progress)
    if report is not None:
        report(summary)
    metadata = {**adapter.metadata, f"dora_diffusion.{operation}": summary.sentence()}
    return replace(adapter, modules={**adapter.modules, **modules}, metadata=metadata)
