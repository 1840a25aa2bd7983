"""Text is text wherever it is put into HTML."""

import base64
import io
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from ui import markup

HOSTILE = """<b onclick='x()'>&amp;"'</b>"""


class _Reader(HTMLParser):
    """What a browser makes of markup: its elements, and all the text and attributes in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.texts += [value for _, value in attrs if value]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.mark.parametrize(
    ("make", "elements"),
    [
        (markup.escaped, []),
        (markup.toast_text, []),
        (lambda text: markup.paragraph(text, "kept"), ["p"]),
        (lambda text: markup.paragraph(text, "kept", is_status=True), ["p"]),
        (markup.chip, ["span"]),
        (markup.alert, ["span"]),
        (lambda text: markup.status_html(text, share=0.5, kind="good"), ["div", "span", "progress"]),
        (lambda text: markup.column_heads([text]), ["th"]),
        (lambda text: markup.row(text, ["<i>1</i>"]), ["tr", "th", "td", "i"]),
        (lambda text: markup.region("<i>1</i>", "strip", text), ["div", "i"]),
        (lambda text: markup.saved_picture(Path("/out/a.png"), text), ["img"]),
    ],
)
def test_a_text_makes_no_element_and_comes_out_as_it_was(make: Callable[[str], str], elements: list[str]) -> None:
    read = _Reader(make(HOSTILE))
    assert read.elements == elements
    assert HOSTILE in ("".join(read.texts), *read.texts)


def test_facts_alerts_and_lists() -> None:
    assert markup.chip("rank 4") == '<span class="chip">rank 4</span>'
    assert markup.chip("3/4 keys", "warn") == '<span class="chip warn">3/4 keys</span>'
    assert markup.alert("no") == '<span class="chip bad" role="alert">no</span>'
    assert markup.bullets(["a", "<b>b</b>"]) == "<ul><li>a</li><li><b>b</b></li></ul>"
    assert markup.paragraph("Saved.", "kept", is_status=True) == '<p class="kept" role="status">Saved.</p>'
    assert "progress" not in markup.status_html("Drawing")


def test_bars_are_measured_by_the_largest() -> None:
    assert markup.bar(-1.0, 4.0, longest_rem=8) == '<span class="bar" style="width:2.00rem"></span>'
    assert "width:0.00rem" in markup.bar(0.0, 0.0, longest_rem=8)
    assert markup.polyline([(0, 1), (2.25, 3)], "raw") == '<polyline class="raw" points="0.0,1.0 2.2,3.0"/>'


def test_addresses_of_pictures(tmp_path: Path) -> None:
    named = markup.saved_picture(tmp_path / 'a "b" %.png', "alt")
    assert f"gradio_api/file={tmp_path}/a%20%22b%22%20%25.png" in named
    grey = Image.linear_gradient("L")
    kind, _, content = markup.picture_url(grey).partition(";base64,")
    assert kind == "data:image/png"
    assert Image.open(io.BytesIO(base64.b64decode(content))).tobytes() == grey.tobytes()
    assert markup.picture_url(grey, format="JPEG").startswith("data:image/jpeg;base64,")


def test_html_is_escaped_in_one_place() -> None:
    app = Path(markup.__file__).parent
    others = [path for path in sorted(app.rglob("*.py")) if path != Path(markup.__file__)]
    assert len(others) > 50
    assert [path.name for path in others if "from html import" in path.read_text(encoding="utf-8")] == []
