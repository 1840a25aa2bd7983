"""HTML as the app writes it: text is escaped here, whoever it comes from; what is called markup is HTML already."""

import base64
import html
import io
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

from PIL import Image


def escaped(text: object) -> str:
    """A text inside an element or an attribute."""
    return html.escape(str(text))


def toast_text(text: str) -> str:
    """A text for a toast of gradio's, which shows quotes as they are."""
    return html.escape(text, quote=False)


def paragraph(text: str, kind: str, *, is_status: bool = False) -> str:
    """A line of text of that class; screen readers read out a status when it comes."""
    role = ' role="status"' if is_status else ""
    return f'<p class="{kind}"{role}>{escaped(text)}</p>'


def chip(text: str, kind: str = "") -> str:
    """A fact in a small frame; `kind` is "", "warn" or "bad"."""
    return f'<span class="{f"chip {kind}".strip()}">{escaped(text)}</span>'


def alert(text: str) -> str:
    """Why something cannot be used, in a frame; screen readers read it out."""
    return f'<span class="chip bad" role="alert">{escaped(text)}</span>'


def status_html(text: str, *, share: float | None = None, kind: str = "") -> str:
    """A line of text, with a progress bar when `share` (0..1) is given."""
    bar = "" if share is None else f'<progress max="1" value="{share:.3f}" aria-label="progress"></progress>'
    return f'<div class="status {kind}" role="status" aria-live="polite"><span>{escaped(text)}</span>{bar}</div>'


def bullets(items: Iterable[str]) -> str:
    """A list of markup."""
    return f"<ul>{''.join(f'<li>{item}</li>' for item in items)}</ul>"


def column_heads(names: Iterable[str]) -> str:
    """The heads of a table's columns."""
    return "".join(f'<th scope="col">{escaped(name)}</th>' for name in names)


def row(head: str, cells: Iterable[str]) -> str:
    """A row of a table: what stands at its head, and cells of markup."""
    return f'<tr><th scope="row">{escaped(head)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'


def bar(value: float, most: float, *, longest_rem: float) -> str:
    """A bar as long as a value is large, beside the largest of its column."""
    width = longest_rem * abs(value) / most if most > 0 else 0.0
    return f'<span class="bar" style="width:{width:.2f}rem"></span>'


def region(content: str, kind: str, label: str) -> str:
    """Markup that may be scrolled, by the keyboard too."""
    return f'<div class="{kind}" tabindex="0" role="region" aria-label="{escaped(label)}">{content}</div>'


def polyline(points: Iterable[tuple[float, float]], kind: str) -> str:
    """A line of an SVG through points in its own units."""
    corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="{kind}" points="{corners}"/>'


def saved_picture(path: Path, alt: str) -> str:
    """A picture of the output folder, fetched by its path."""
    address = f"gradio_api/file={quote(str(path.resolve()))}"
    return f'<img src="{escaped(address)}" alt="{escaped(alt)}" loading="lazy">'


def picture_url(picture: Image.Image, *, format: str = "PNG", quality: int = 88) -> str:
    """A picture inside the page, as a `data:` address; the quality is JPEG's."""
    buffer = io.BytesIO()
    picture.save(buffer, format=format, quality=quality)
    return f"data:image/{format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
