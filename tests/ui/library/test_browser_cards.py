"""The browser without a page: what a search finds, what a card says, and that strangers' words stay words."""

import time
from pathlib import Path

import pytest
from PIL import Image

from dora_diffusion.inspection.header import DeclaredMetadata, HeaderSummary, Structure
from ui.library.browser import BrowserHandlers, add_word
from ui.library.cards import card_html, initials, size_in_words
from ui.library.catalogue import PAGE, Query, check_query, choices_of, shown_of
from ui.library.library import AdapterFile, AdapterLibrary
from ui.library.shelf import Stamp
from ui.library.thumbnails import Thumbnails

EVIL = '"><script>alert(1)</script>'


def _file(
    name: str, *, family: str = "sd1", kind: str = "LoRA", tags: tuple[str, ...] = (), title: str = "", size: int = 5000
) -> AdapterFile:
    structure = Structure("kohya", kind, family, (4, 8), "out", 88, ("unet",))
    seen = HeaderSummary(structure, DeclaredMetadata(title=title, triggers=(f"{title} word",), tags=tags))
    return AdapterFile(name, f"/nowhere/{name}", Stamp(size, size), None, seen)


class Shelf:
    """As much of a library as a search looks at."""

    def __init__(self, *files: AdapterFile) -> None:
        self.files = files


SHELF = Shelf(
    _file("a/cat", tags=("Night",), size=1),
    _file("b/dog", family="sdxl", kind="DoRA in 96 layers, LoRA in 32", tags=("cat",), size=3),
    _file("c/fish", family="", kind="DoRA", size=2),
    AdapterFile("d/broken", "/nowhere/d", None, "cut short"),
)


@pytest.mark.parametrize(
    ("query", "names"),
    [
        (Query(), ["a/cat", "c/fish", "d/broken"]),
        (Query(only_fitting=False), ["a/cat", "b/dog", "c/fish", "d/broken"]),
        (Query(text="CAT", only_fitting=False), ["a/cat", "b/dog"]),
        (Query(text="ca og", only_fitting=False), ["b/dog"]),
        (Query(text="no such thing"), []),
        (Query(kind="DoRA", only_fitting=False), ["b/dog", "c/fish"]),
        (Query(family="not told"), ["c/fish", "d/broken"]),
        (Query(tag="night"), ["a/cat"]),
        (Query(order="largest", only_fitting=False), ["b/dog", "c/fish", "a/cat", "d/broken"]),
        (Query(order="newest"), ["c/fish", "a/cat", "d/broken"]),
    ],
)
def test_finds(query: Query, names: list[str]) -> None:
    shown = shown_of(SHELF, check_query(query), family="sd1")  # type: ignore[arg-type]
    assert [file.name for file in shown.files] == names
    assert shown.found == len(names)


def test_pages_end_where_the_files_end() -> None:
    shelf = Shelf(*(_file(f"{number:04}") for number in range(2 * PAGE + 1)))
    shown = shown_of(shelf, Query(page=99), family="sd1")  # type: ignore[arg-type]
    assert (shown.page, shown.pages, [file.name for file in shown.files]) == (2, 3, [f"{2 * PAGE:04}"])


def test_choices_are_what_there_is() -> None:
    choices = choices_of(SHELF.files)
    assert choices.families == ("sd1", "sdxl", "not told")
    assert choices.kinds == ("DoRA", "LoRA")
    assert choices.tags == ("night", "cat")


@pytest.mark.parametrize(
    ("query", "message"),
    [
        (Query(text="x" * 201), "text: got 201 characters, expected text of at most 200 characters"),
        (Query(text=7), "text: got int, expected text of at most 200 characters"),  # type: ignore[arg-type]
        (Query(tag=["a"]), "tag: got list, expected text of at most 200 characters"),  # type: ignore[arg-type]
        (Query(order="__class__"), "order: got '__class__', expected one of name, newest, largest"),
        (Query(page=-1), "page: expected a whole number from 0"),
        (Query(page=float("nan")), "page: expected a whole number from 0"),  # type: ignore[arg-type]
        (Query(page="1"), "page: expected a whole number from 0"),  # type: ignore[arg-type]
    ],
)
def test_what_a_browser_may_not_ask(query: Query, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_query(query)
    assert str(caught.value) == message


def test_a_card_says_what_matters() -> None:
    card = card_html(_file("sub/ink", title="Ink wash", tags=("line",)), "", family="sd1")
    facts = (">Ink wash<", ">LoRA<", "r4 to 8 · sd1 · 5 kB", ">Ink wash word<", ">line<", ">IW<")
    for text in ('data-pick="sub/ink"', *facts):
        assert text in card


def test_cards_that_cannot_be_picked_say_why() -> None:
    broken = card_html(AdapterFile("x", "/x", None, "cut short"), "", family="sd1")
    other = card_html(_file("y", family="sdxl"), "", family="sd1")
    assert "cut short" in broken and "for sdxl, and the base is sd1" in other
    for card in (broken, other):
        assert "data-pick" not in card and "data-word" not in card and "card off" in card


def test_strangers_words_are_escaped() -> None:
    file = _file(EVIL, title=EVIL, tags=(EVIL, "'a"), kind=EVIL, family=EVIL)
    for card in (
        card_html(file, "", family=EVIL),
        card_html(file, "", family="sd1"),
        card_html(AdapterFile(EVIL, EVIL, None, EVIL), "", family="sd1"),
    ):
        assert "<script" not in card
        assert '""' not in card.replace('alt=""', "")


@pytest.mark.parametrize(
    ("title", "letters"), [("ink", "IN"), ("my_own style", "MO"), ("v1.2", "V2"), ("!!", "?"), ("日本 画", "日画")]
)
def test_initials(title: str, letters: str) -> None:
    assert initials(title) == letters


@pytest.mark.parametrize(("size", "text"), [(1, "1 kB"), (144_000_000, "144 MB"), (1_400_000_000, "1.4 GB")])
def test_sizes(size: int, text: str) -> None:
    assert size_in_words(size) == text


@pytest.mark.parametrize(
    ("prompt", "word", "result"),
    [
        ("", "sks", "sks"),
        ("a cat", "sks", "a cat, sks"),
        ("a cat, ", "sks", "a cat, sks"),
        ("sks, a cat", "sks", "sks, a cat"),
        ("sks2", "sks", "sks2, sks"),
        ("a", "", "a"),
    ],
)
def test_words_go_into_the_prompt_once(prompt: str, word: str, result: str) -> None:
    assert add_word(prompt, word) == result


def test_pictures_are_small_and_strangers_files_are_none(tmp_path: Path) -> None:
    Image.new("RGBA", (900, 700), "red").save(tmp_path / "good.png")
    (tmp_path / "text.png").write_text("no picture")
    Image.new("1", (9000, 9000)).save(tmp_path / "bomb.png")
    thumbnails, later = Thumbnails(), time.perf_counter() + 60
    good = thumbnails.of(str(tmp_path / "good.png"), later)
    assert good is not None and good.startswith("data:image/jpeg;base64,") and len(good) < 10_000
    assert thumbnails.of(str(tmp_path / "good.png"), 0) == good
    for name in ("text.png", "bomb.png", "missing.png"):
        assert thumbnails.of(str(tmp_path / name), later) == ""
    (tmp_path / "new.png").write_bytes((tmp_path / "good.png").read_bytes())
    assert thumbnails.of(str(tmp_path / "new.png"), 0) is None


def test_handlers_look_names_and_words_up(adapters: Path) -> None:
    (adapters / "ink.json").write_text('{"activation text": "inkstyle"}')
    library = AdapterLibrary(adapters)
    library.refresh()
    handlers = BrowserHandlers(library, lambda: "sd1")
    assert handlers.pick("ink") == "ink"
    assert handlers.word("ink", 0) == "inkstyle"
    for name in ("../ink", "broken", None, 7, {"a": 1}):
        with pytest.raises(ValueError):
            handlers.pick(name)
    for number in (1, -1, "0", True, None, 0.0):
        with pytest.raises(ValueError, match="it has 1 trigger words"):
            handlers.word("ink", number)
    answered, waiting = handlers.look("", None, [], "", True, "name", 0)
    assert waiting == 0 and str(answered[0]).count("data-pick") == 2
    assert "2 of" not in str(answered[1]) and "3 of 3 adapters · 1 cannot be used" in str(answered[1])
    with pytest.raises(ValueError, match="text: got int"):
        handlers.look(7, "", "", "", True, "name", 0)
