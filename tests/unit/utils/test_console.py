"""What a terminal cannot show is shown otherwise, and what UTF-8 cannot hold is told in one line."""

import io
import sys

import pytest

from dora_diffusion.utils.console import line_of_unicode_error, printing_anything, typed_text
from dora_diffusion.utils.text import check_unicode, encodable


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "latin-1"])
def test_nothing_printed_fails_and_the_streams_are_as_before(monkeypatch: pytest.MonkeyPatch, encoding: str) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with printing_anything():
        print("é 日 \udcff")
    assert stream.errors == "strict"
    stream.flush()
    assert stream.buffer.getvalue().decode(encoding).endswith("\\udcff\n")  # type: ignore[attr-defined]
    with pytest.raises(UnicodeEncodeError):
        print("\udcff")


def test_typed_text_is_utf8_or_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [typed_text(text) for text in ("é", "x\udcff")] == ["é", "x\udcff"]
    monkeypatch.setattr("os.fsencode", lambda text: text.encode("ascii", "surrogateescape"))  # as in the C locale
    assert [typed_text(text) for text in ("\udcc3\udca9", "é", "x\udcff")] == ["é", "é", "x\udcff"]


def test_unicode_errors_are_one_line() -> None:
    lines = []
    for mistake in (
        lambda: "dir/é".encode("ascii"),
        lambda: "dir/\udcff\n".encode(),
        lambda: b"\xff\xfe".decode(),
    ):
        with pytest.raises(UnicodeError) as error:
            mistake()
        lines.append(line_of_unicode_error(error.value))
    assert lines == [
        "'dir/é': got signs that this locale's ascii has not; set PYTHONUTF8=1, or use plain letters",
        "'dir/\\udcff\\n' holds bytes that are no UTF-8 text; rename the file, or write it otherwise",
        "got bytes that are no utf-8 text (b'\\xff')",
    ]


def test_text_that_is_none_is_refused_or_escaped() -> None:
    check_unicode("prompt", "日")
    with pytest.raises(ValueError, match=r"^prompt: got 'x\\udcff', which is no Unicode text; expected text in UTF-8$"):
        check_unicode("prompt", "x\udcff")
    assert encodable("日 \ud83d \udcff") == "日 \\ud83d \\udcff"
