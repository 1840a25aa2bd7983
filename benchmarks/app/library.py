"""How long the app takes over thousands of adapters: the first look, later ones, a start with the index, a search.

    python -m benchmarks.app.library --files 10000

The files are hard links of a few hundred distinct ones: three families' layers, five formats
and kinds, metadata of their own. Times are of this process alone, without a page.
"""

import argparse
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tests.ui.many_adapters import fill
from ui.library.cards import cards_html
from ui.library.catalogue import Query, shown_of
from ui.library.library import AdapterLibrary
from ui.library.thumbnails import Thumbnails


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _settle(library: AdapterLibrary) -> float:
    """Until every header is read."""
    started = time.perf_counter()
    while library.unread:
        time.sleep(0.02)
    return time.perf_counter() - started


def measure(folder: Path, index: Path) -> Iterator[tuple[str, float]]:
    """What -> seconds."""
    library = AdapterLibrary(folder, index=index)
    first = _timed(lambda: library.refresh(patience=0))
    yield "first look: names listed", first
    yield "first look: every header read", first + _settle(library)
    yield "later look, nothing changed", min(_timed(lambda: library.refresh()) for _ in range(5))
    some = next(folder.rglob("*.safetensors"))
    shutil.copy(some, folder / "the newest one.safetensors")
    yield "later look, one file is new", _timed(lambda: library.refresh())
    assert "the newest one" in library.usable
    library.close()
    again = AdapterLibrary(folder, index=index)
    yield "first look of another start, with the index", _timed(lambda: again.refresh())
    assert not again.unread
    texts = ("", "k", "ko", "watercolour 17", "night v1", "nothing like it")
    searches = [Query(text=text, family=family) for text in texts for family in ("", "sd1")]
    times = [_timed(partial(shown_of, again, query, family="sd1")) for query in searches]
    yield "search as one types, the first", times[0]
    yield f"search as one types, the slowest of {len(times) - 1} more", max(times[1:])
    thumbnails = Thumbnails()
    yield (
        "cards of one page",
        _timed(lambda: cards_html(shown_of(again, Query(), family="sd1"), thumbnails, family="sd1")),
    )
    again.close()


def main() -> None:
    """Print a table and its JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=int, default=10_000)
    count = parser.parse_args().files
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "adapters"
        fill(folder, count)
        figures = dict(measure(folder, Path(temporary) / "index.json"))
        size = os.path.getsize(Path(temporary) / "index.json")
    for what, seconds in figures.items():
        print(f"{what:<48} {1000 * seconds:9.1f} ms")
    facts = {"files": count, "index_bytes": size, "python": platform.python_version(), "seconds": figures}
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
