"""An adapter's facts as HTML. Everything that comes out of a file is escaped."""

from collections.abc import Mapping
from typing import Any

from dora_diffusion.inspection.report import family_in_words
from ui.markup import bar, chip, escaped, row

MAX_TEXT = 4000  # characters of one metadata entry
MAX_ENTRIES = 200

CSS = """
.facts { display: grid; gap: .7rem; overflow-wrap: anywhere; }
.facts h3 { font-size: 1rem; margin: 0; }
.facts table { width: 100%; border-collapse: collapse; margin: 0; font-size: .88rem; border: 0; }
.facts tr { border: 0; }
.facts th, .facts td { padding: .2rem .5rem .2rem 0; border: 0; text-align: left;
  vertical-align: top; font-weight: 400; }
.facts th { color: var(--body-text-color-subdued); white-space: nowrap; }
.facts ul { margin: 0; padding-left: 1.1rem; }
.facts pre { white-space: pre-wrap; margin: 0; font-size: .8rem; max-height: 14rem; overflow: auto; }
.facts .note { border-left: 3px solid #b45309; padding-left: .6rem; }
.facts .bar { display: inline-block; height: .55rem; border-radius: .2rem; vertical-align: middle;
  background: var(--color-accent); min-width: 1px; }
"""


def facts_html(name: str, facts: Mapping[str, Any]) -> str:
    """What `inspect_adapter` found, for people.

    Args:
        name: of the library.
        facts: its answer; with `matched` when a base was there.
    """
    axis = {"in": "magnitudes per input", "out": "magnitudes per output"}.get(str(facts["magnitude_axis"]))
    chips = [str(facts["kind"]), f"rank {_ranks(facts['ranks'])}", axis, f"{facts['format']} format"]
    rows = {
        "Family": family_in_words(facts),
        "Fits this base": _fit(facts),
        "Keys": f"{facts['keys_matched']} of {facts['keys']} understood",
        "Size": f"{facts['parameters']:,} parameters, {facts['bytes']:,} bytes, {', '.join(facts['dtypes'])}",
        "Biases and norms": facts["vectors"] or None,
        "SHA-256": facts["sha256"],
    }
    table = "".join(row(name, [escaped(value)]) for name, value in rows.items() if value)
    return (
        f'<div class="facts"><h3>{escaped(name)}</h3>'
        f"<div>{''.join(map(chip, filter(None, chips)))}</div>"
        f"<table>{table}</table>{_parts(facts)}{_notes(facts)}{_metadata(facts['metadata'])}</div>"
    )


def _ranks(ranks: list[int]) -> str:
    return "/".join(map(str, ranks)) if len(ranks) < 6 else f"{ranks[0]} to {ranks[-1]}"


def _fit(facts: Mapping[str, Any]) -> str | None:
    if "matched" not in facts:
        return None
    return f"{facts['matched']}" + (f"; the first that does not: {facts['misfit']}" if facts["misfit"] else "")


def _parts(facts: Mapping[str, Any]) -> str:
    """Layers and the size of the change, by component."""
    norms: Mapping[str, float] = facts["delta_norm"]
    most = max(norms.values(), default=0.0)
    lines = "".join(
        f"<tr><td>{escaped(part)}</td><td>{count}</td><td>{bar(norms.get(part, 0.0), most, longest_rem=8)} "
        f"{norms.get(part, 0.0):.4g}</td></tr>"
        for part, count in facts["layers"].items()
    )
    return f"<table><thead><tr><th>Part</th><th>Layers</th><th>‖ΔW‖ at strength 1</th></tr></thead>{lines}</table>"


def _notes(facts: Mapping[str, Any]) -> str:
    return "".join(f'<div class="note">{escaped(note)}</div>' for note in facts["notes"])


def _metadata(metadata: Mapping[str, str]) -> str:
    entries = [(key, text) for key, text in metadata.items() if text]
    if not entries:
        return "<div>The file has no metadata.</div>"
    rows = "".join(row(key[:100], [f"<pre>{escaped(_cut(text))}</pre>"]) for key, text in entries[:MAX_ENTRIES])
    more = f"<p>{len(entries) - MAX_ENTRIES} more are not shown.</p>" if len(entries) > MAX_ENTRIES else ""
    return f"<details><summary>Metadata, {len(entries)} entries</summary><table>{rows}</table>{more}</details>"


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} … ({len(text):,} characters)"
