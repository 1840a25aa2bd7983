"""What a run leaves at its end: its files, and a manifest by which a finished run is known, and left alone."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dora_diffusion.formats import save_adapter
from dora_diffusion.pipelines.textual_inversion import save_words
from dora_diffusion.state import AdapterState
from dora_diffusion.training.base.trainable import TrainablePipeline
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.run.card import run_card
from dora_diffusion.training.run.checkpoint import ADAPTER, Saved, checkpoint_folder
from dora_diffusion.training.run.previews import save_strip
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
    """

    adapter: Path | None
    words: tuple[Path, ...]
    steps: int
    validation: tuple[tuple[int, float], ...]
    is_new: bool = True


def write_outcome(
    config: TrainConfig, learnt: AdapterState | None, trainable: TrainablePipeline, losses: Sequence[tuple[int, float]]
) -> TrainResult:
    """Write what a run leaves beside its checkpoints; the manifest, which says that all of it is there, last."""
    words = trainable.words
    folder, steps = config.output_dir, config.optim.steps
    adapter = None if learnt is None else save_adapter(learnt, folder / ADAPTER)
    files = [] if words is None else save_words(words.state(), folder / "words")
    save_strip(folder / "samples")
    write_atomically(folder / OUTCOME, json.dumps(losses).encode())
    write_atomically(folder / "README.md", run_card(config, losses, files, trainable.below).encode())
    newest = checkpoint_folder(folder / "checkpoints", steps)
    remove_elders(newest, keep=config.checkpoint.keep)  # a run that was killed after its last save has not done so
    written = [*([] if adapter is None else [adapter]), *files, folder / OUTCOME, newest / MANIFEST]
    hashes = {path.relative_to(folder).as_posix(): sha256_of(path) for path in written}
    write_atomically(folder / MANIFEST, json.dumps({"steps": steps, "sha256": hashes}, indent=1).encode())
    return TrainResult(adapter, tuple(files), steps, tuple(losses))


def finished_result(config: TrainConfig, saved: Saved) -> TrainResult | None:
    """What a run that came to its end has left; None when a step or a file of it is missing, or is another's."""
    folder = config.output_dir
    if saved.step != config.optim.steps:
        return None
    try:
        hashes = json.loads((folder / MANIFEST).read_text())["sha256"]
        is_whole = (saved.path / MANIFEST).relative_to(folder).as_posix() in hashes and all(
            sha256_of(folder / name) == known for name, known in hashes.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    if not is_whole:
        return None
    words = tuple(folder / name for name in hashes if name.startswith("words/"))
    losses = tuple((step, loss) for step, loss in saved.progress["validation"])
    return TrainResult(folder / ADAPTER if ADAPTER in hashes else None, words, saved.step, losses, is_new=False)
