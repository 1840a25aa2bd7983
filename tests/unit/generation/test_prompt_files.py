"""Files of prompts: what is read, and that whatever is not understood names file and line."""

from pathlib import Path

import pytest

from dora_diffusion.generation.generate import GenerationSettings
from dora_diffusion.generation.prompt_files import read_prompts

DEFAULTS = GenerationSettings("", "blurry", seed=5, steps=9, guidance_scale=3.0, sampler="euler")


def _written(folder: Path, text: str) -> Path:
    path = folder / "prompts.txt"
    path.write_text(text, encoding="utf-8")
    return path


def test_lines_and_their_settings(tmp_path: Path) -> None:
    text = (
        "\ufeff# a comment\n\n  a cat, on a hill  \n"
        "a well-known dog -- or two --w 768 --h 512 --s 30 --l 7.5 --d 42 --n bird, cat\n"
        "a fox --N  --W 64\n"
    )
    cat, dog, fox = read_prompts(_written(tmp_path, text), DEFAULTS)
    assert cat.settings == GenerationSettings("a cat, on a hill", "blurry", 5, 9, 3.0, sampler="euler")
    assert dog.settings == GenerationSettings(
        "a well-known dog -- or two", "bird, cat", 42, 30, 7.5, 768, 512, sampler="euler"
    )
    assert fox.settings == GenerationSettings("a fox", "", 5, 9, 3.0, width=64, sampler="euler")
    assert [line.place.rpartition("/")[2] for line in (cat, dog, fox)] == [
        f"prompts.txt, line {number}" for number in (3, 4, 5)
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a cat --x 3", "--x is no setting; expected --w, --h, --s, --l, --d, --n, or a space after the dashes"),
        ("a cat --steps 3", "--steps is no setting; expected --w, "),
        ("a cat --w wide", "--w: got 'wide', expected a whole number"),
        ("a cat --s", "--s: got '', expected a whole number"),
        ("a cat --l x", "--l: got 'x', expected a number"),
        ("a cat --w 100", "width must be a multiple of 8 in 64..4096, got 100"),
        ("a cat --d -1", "seed must lie in 0..2^63, got -1"),
        ("a cat --s 2 --s 3", "--s is given twice; leave one"),
        ("--w 64", "no prompt before the settings; write it at the line's beginning"),
    ],
)
def test_what_is_not_understood_names_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = _written(tmp_path, f"a dog\n\n{line}\n")
    with pytest.raises(ValueError) as caught:
        read_prompts(path, DEFAULTS)
    assert str(caught.value).startswith(f"{path}, line 3: {message}")
    assert "\n" not in str(caught.value)


def test_files_without_prompts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="prompts.txt: holds no prompt; expected one a line$"):
        read_prompts(_written(tmp_path, "\n# none\n"), DEFAULTS)
    (tmp_path / "prompts.txt").write_bytes(b"a caf\xe9")
    with pytest.raises(ValueError, match="prompts.txt: not UTF-8; save it as plain text in UTF-8$"):
        read_prompts(tmp_path / "prompts.txt", DEFAULTS)
    with pytest.raises(ValueError, match="cannot be read"):
        read_prompts(tmp_path, DEFAULTS)
