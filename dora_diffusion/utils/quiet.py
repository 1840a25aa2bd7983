"""What diffusers and transformers say while a base loads and that is no news to its user: that, and nothing else."""

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

# Logger -> the lines of it that are held back. Processors of pictures come in two builds; text to image uses neither.
_NO_NEWS: Mapping[str, re.Pattern[str]] = {
    "transformers.utils.import_utils": re.compile(r"`\w+ImageProcessor\w*` requires torchvision"),
    "diffusers.pipelines.pipeline_utils": re.compile(r"Expected types for \w+: .*ImageProcessor"),
}


@contextmanager
def quietly() -> Iterator[None]:
    """Load a base without lines that are no news and without bars; the user's own settings are as before after it."""
    with quiet_lines(), _quiet_bars():
        yield


@contextmanager
def quiet_lines() -> Iterator[None]:
    """Hold back lines that are no news. Imports nothing."""
    filters = {name: _news_of(pattern) for name, pattern in _NO_NEWS.items()}
    for name, is_news in filters.items():
        logging.getLogger(name).addFilter(is_news)
    try:
        yield
    finally:
        for name, is_news in filters.items():
            logging.getLogger(name).removeFilter(is_news)


def _news_of(pattern: re.Pattern[str]) -> Callable[[logging.LogRecord], bool]:
    return lambda record: pattern.search(record.getMessage()) is None


@contextmanager
def _quiet_bars() -> Iterator[None]:
    """Components that load in a moment need no progress bars; downloads keep theirs."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [library.is_progress_bar_enabled() for library in libraries]
    for library in libraries:
        library._tqdm_active = False  # transformers' own function would also end the hub's bars
    try:
        yield
    finally:
        for library, was_active in zip(libraries, before, strict=True):
            library._tqdm_active = was_active


@contextmanager
def errors_only(module: str) -> Iterator[None]:
    """Let a module of diffusers speak of errors only."""
    logger = logging.getLogger(module)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
