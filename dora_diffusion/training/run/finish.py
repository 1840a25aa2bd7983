"""What a run leaves at its end: its files, and a manifest by which a finished run is known, and left alone."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dora_diffusion.formats import save_adapter
from dora_diffusion.pipelines.textual_inversion import save_words
from dora_diffusion.state import AdapterState
from dora_diffusion.training.base.trainable import TrainablePipeline
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.data.concepts import Split
from dora_diffusion.training.run.card import Left, run_card
from dora_diffusion.training.run.checkpoint import ADAPTER, Saved, checkpoint_folder, names_of_kept
from dora_diffusion.training.run.exports import Exported, missing_exports, write_exports
from dora_diffusion.training.run.history import FILE as HISTORY
from dora_diffusion.training.run.history import History
from dora_diffusion.training.run.previews import save_last_apart, save_strip
from dora_diffusion.training.run.report import Seen, write_report
from dora_diffusion.training.run.standing import Best, Outcome
from dora_diffusion.utils.atomic import MANIFEST, remove_elders, sha256_of, write_atomically

OUTCOME = "validation.json"


@dataclass(frozen=True)
class TrainResult:
    """What a run leaves.

    Attributes:
        adapter: its file; None when new words were learnt alone.
        words: a file for each new word.
        steps: done.
        validation: (step, loss) pairs.
        is_new: whether anything was written; False of a finished run that was left as it is.
        exports: what the adapter was written as too, and what became of it; empty of a run that was left as it is.
        best: (step, loss) of the best checkpoint that is kept; None without `checkpoint.keep_best`.
        ended_early: whether it ended before its last step, by `validation.patience`.

    Examples:
        ```python
        import dora_diffusion as dd

        result = dd.train(dd.TrainConfig.from_yaml("subject.yaml"))
        step, loss = result.validation[-1]
        print(f"{loss:.4f} on fixed noise after {step} steps, best: {result.best}")
        ```
    """

    adapter: Path | None
    words: tuple[Path, ...]
    steps: int
    validation: tuple[tuple[int, float], ...]
    is_new: bool = True
    exports: tuple[Exported, ...] = ()
    best: tuple[int, float] | None = None
    ended_early: bool = False


@dataclass(frozen=True)
class Story:
    """What a run saw and came through.

    Attributes:
        examples: its pictures, with their sizes.
        history: the loss of each step.
        guard: what it counted.
    """

    examples: Split
    history: History
    guard: Mapping[str, int]


def write_outcome(
    config: TrainConfig, learnt: AdapterState | None, trainable: TrainablePipeline, outcome: Outcome, story: Story
) -> TrainResult:
    """Write what a run leaves beside its checkpoints; the manifest, which says that all of it is there, last."""
    words = trainable.words
    folder, steps = config.output_dir, outcome.steps
    adapter = None if learnt is None else save_adapter(learnt, folder / ADAPTER)
    files = [] if words is None else save_words(words.state(), folder / "words")
    exports = [] if learnt is None else write_exports(config, learnt, trainable.pipe)
    save_strip(folder / "samples")
    pictures = save_last_apart(folder / "samples", len(config.preview.prompts))
    write_atomically(folder / OUTCOME, json.dumps(outcome.losses).encode())
    write_atomically(folder / HISTORY, story.history.as_csv().encode())
    left = Left(outcome, files, trainable.below, exports)
    urls = [path.relative_to(folder).as_posix() for path in pictures]
    write_atomically(folder / "README.md", run_card(config, left, urls).encode())
    write_report(config, trainable, Seen(left, story.examples, story.history.losses, story.guard))
    newest = checkpoint_folder(folder / "checkpoints", steps)
    best = outcome.best.step if outcome.best else None
    # a run that was killed after its last save has not done so
    remove_elders(newest, keep=config.checkpoint.keep, spared=names_of_kept(best))
    written = [*([] if adapter is None else [adapter]), *files, *(each.path for each in exports)]
    written += [folder / OUTCOME, folder / HISTORY, newest / MANIFEST]
    hashes = {path.relative_to(folder).as_posix(): sha256_of(path) for path in written}
    said = {"steps": steps, **outcome.notes(), "sha256": hashes}
    write_atomically(folder / MANIFEST, json.dumps(said, indent=1).encode())
    return replace(result_of(outcome, adapter, files), exports=tuple(exports))


def result_of(outcome: Outcome, adapter: Path | None, words: Sequence[Path] = ()) -> TrainResult:
    """How a run ended, with the files that there are."""
    best = None if outcome.best is None else (outcome.best.step, outcome.best.loss)
    return TrainResult(adapter, tuple(words), outcome.steps, outcome.losses, best=best, ended_early=outcome.ended_early)


def finished_result(config: TrainConfig, saved: Saved) -> TrainResult | None:
    """What a run that came to its end has left; None when a step or a file of it is missing, or is another's."""
    folder = config.output_dir
    standing, ended_early = saved.standing, saved.ended_early
    if saved.step != config.optim.steps and not ended_early:
        return None
    try:
        hashes = json.loads((folder / MANIFEST).read_text())["sha256"]
        is_whole = (saved.path / MANIFEST).relative_to(folder).as_posix() in hashes and all(
            sha256_of(folder / name) == known for name, known in hashes.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if not is_whole or missing_exports(config, hashes):
        return None
    words = tuple(folder / name for name in hashes if name.startswith("words/"))
    losses = tuple((step, loss) for step, loss in saved.progress["validation"])
    best = None if standing.get("best") is None else Best(*standing["best"])
    outcome = Outcome(saved.step, losses, best, ended_early=ended_early)
    adapter = folder / ADAPTER if ADAPTER in hashes else None
    return replace(result_of(outcome, adapter, words), is_new=False)
