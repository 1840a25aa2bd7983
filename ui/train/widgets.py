"""What the parts of the Train tab share: how the tab looks, and lines of text in it."""

from html import escape

CSS = """
.train-report pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; margin: 0; }
.train-report.bad pre { border-left: 3px solid #dc2626; padding-left: .6rem; }
.train-plot { width: 100%; height: auto; display: block; }
.train-plot line { stroke: var(--border-color-primary); stroke-width: 1; }
.train-plot text { fill: var(--body-text-color-subdued); font-size: 12px; }
.train-plot polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
.train-plot .raw { stroke: var(--body-text-color-subdued); stroke-width: 1; opacity: .45; }
.train-plot .smooth { stroke: var(--color-accent); }
.train-plot .validation { stroke: #d97706; }
.train-plot circle.validation { fill: #d97706; stroke: none; }
.train-legend { display: flex; gap: 1rem; font-size: .85rem; margin: .2rem 0 0; flex-wrap: wrap; }
.train-legend span::before { content: ""; display: inline-block; width: 1rem; height: .2rem; margin-right: .35rem;
  vertical-align: middle; background: var(--body-text-color-subdued); }
.train-legend .smooth::before { background: var(--color-accent); }
.train-legend .validation::before { background: #d97706; }
.train-strip { max-height: 28rem; overflow-y: auto; }
.train-strip figure { margin: 0 0 .5rem; }
.train-strip img { display: block; max-width: 100%; height: auto; border-radius: .3rem; }
.train-strip figcaption { font-size: .85rem; color: var(--body-text-color-subdued); }
.train-none { color: var(--body-text-color-subdued); }
"""


def report_html(text: str, *, bad: bool = False) -> str:
    """Lines of text as they are."""
    return f'<div class="train-report{" bad" if bad else ""}"><pre>{escape(text)}</pre></div>'
