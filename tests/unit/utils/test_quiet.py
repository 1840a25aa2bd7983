"""Loading says nothing that is no news, hides nothing else, and leaves the user's settings as they were."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dora_diffusion.formats import save_adapter
from dora_diffusion.utils.quiet import quiet_lines, quietly
from tests.pocket_random import random_adapter, random_pocket_pipeline

ROBOT = Path(__file__).parents[3] / "examples" / "subject-robot"
TORCHVISION = "`SiglipImageProcessor` requires torchvision (not installed); falling back to `SiglipImageProcessorPil`"
PROCESSOR = "Expected types for feature_extractor: (CLIPImageProcessor,), got CLIPImageProcessorPil."


def run(*arguments: object) -> "subprocess.CompletedProcess[str]":
    """A fresh process that is told nothing by its surroundings."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_VERBOSITY")}
    words = [sys.executable, *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("base", ["pocket", "pocket-dit"])
def test_loading_a_pipeline_prints_nothing(base: str) -> None:
    done = run("-c", f"import dora_diffusion as dd; dd.load_pipeline({base!r})")
    assert (done.stdout, done.stderr) == ("", "")


def test_commands_print_their_own_lines_only(tmp_path: Path) -> None:
    file = save_adapter(random_adapter(random_pocket_pipeline()), tmp_path / "ink.safetensors")
    other, picture, size = tmp_path / "mix.safetensors", tmp_path / "out.png", ("--width", 64, "--height", 64)
    draw = ("generate", "--prompt", "a castle", "--steps", 2, "--adapter", file, "--output", picture, *size)
    for arguments, first, bar in (
        (("doctor", ROBOT / "images"), f"{ROBOT / 'images'}: 6 pictures", ""),
        (("inspect", file, "--model", "pocket"), f"{file}: DoRA", ""),
        (("convert", file, other, "--to", "kohya"), f"wrote {other}", ""),
        (("resize", file, other, "--rank", 1), f"wrote {other}", "resizing"),
        (("blend", other, "--adapter", file), f"wrote {other}", "blending|reading back"),
        (("bake", "pocket", tmp_path / "baked", "--adapter", file), f"wrote {tmp_path / 'baked'}", "baking"),
        (("train", ROBOT / "subject.yaml", "--dry-run"), "base       pocket (sd1)", ""),
        (draw, "base: pocket on ", "drawing"),
    ):
        done = run("-m", "dora_diffusion.cli", *arguments)
        assert done.stdout.startswith(first), arguments
        lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line]
        names = tuple(name + ":" for name in bar.split("|") if name)
        assert all(names and line.startswith(names) for line in lines), (arguments, done.stderr)


@pytest.mark.parametrize(
    "logger, line, is_news",
    [
        ("transformers.utils.import_utils", TORCHVISION, False),
        ("transformers.utils.import_utils", "`UMT5` requires sentencepiece", True),
        ("transformers.modeling_utils", TORCHVISION, True),
        ("diffusers.pipelines.pipeline_utils", PROCESSOR, False),
        ("diffusers.pipelines.pipeline_utils", "Expected types for unet: (A,), got B.", True),
        ("diffusers.pipelines.pipeline_utils", "the weights of unet were newly initialised", True),
    ],
)
def test_only_what_is_no_news_is_held_back_and_only_meanwhile(logger: str, line: str, is_news: bool) -> None:
    heard: list[str] = []
    ear = logging.Handler()
    ear.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    voice = logging.getLogger(logger)
    filters, level = list(voice.filters), voice.level
    voice.addHandler(ear)
    try:
        with quiet_lines(), quiet_lines():
            voice.error(line)
        assert heard == ([line] if is_news else [])
        voice.error(line)
        assert heard == [line] * (2 if is_news else 1)
    finally:
        voice.removeHandler(ear)
    assert voice.filters == filters and voice.level == level


@pytest.mark.parametrize("is_on", [True, False])
def test_bars_are_as_the_user_set_them_after_loading(is_on: bool) -> None:
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [library.is_progress_bar_enabled() for library in libraries]
    try:
        for library in libraries:
            (library.enable_progress_bar if is_on else library.disable_progress_bar)()
        downloads = are_progress_bars_disabled()
        with pytest.raises(KeyError), quietly():
            assert not any(library.is_progress_bar_enabled() for library in libraries)
            assert are_progress_bars_disabled() == downloads  # minutes of downloading are worth a bar
            raise KeyError
        assert [library.is_progress_bar_enabled() for library in libraries] == [is_on, is_on]
        assert are_progress_bars_disabled() == downloads
    finally:
        for library, was_on in zip(libraries, before, strict=True):
            (library.enable_progress_bar if was_on else library.disable_progress_bar)()
