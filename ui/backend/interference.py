"""The interference meter: how much each adapter of the rack changes, block by block, and whether they collide."""

from collections.abc import Sequence
from html import escape

from dora_diffusion import interference, load_adapter
from dora_diffusion.blending import Interference
from ui.backend.session import Session

MEETING = 0.05  # cosines nearer to 0 say that two changes do not meet


def measure(session: Session, files: Sequence[str]) -> Interference:
    """Measure adapters of the library at strength 1 against each other; waits for a drawing under way.

    Raises:
        ValueError: no adapter, one that is not in the library, or one that is not for this base.
    """
    if not files:
        raise ValueError("interference: the rack is empty; pick adapters first")
    paths = {file: session.library.find(file).path for file in dict.fromkeys(files)}
    with session.weights() as weights:
        states = {file: load_adapter(path, base=weights) for file, path in paths.items()}
        return interference(states, base=weights)


def interference_html(found: Interference) -> str:
    """Norms by block as bars, and the cosine of every pair."""
    return f'<div class="meter">{_pairs(found)}{_norms(found)}</div>'


def verdict(cosine: float) -> str:
    """A cosine in words."""
    if abs(cosine) < MEETING:
        return "hardly meet"
    return "pull together" if cosine > 0 else "work against each other"


def _pairs(found: Interference) -> str:
    if not found.cosines:
        return '<p class="rack-note">With two adapters or more, this also says whether they collide.</p>'
    rows = "".join(
        f"<tr><th scope='row'>{escape(one)} and {escape(other)}</th>"
        f"<td>{_needle(found.overall_cosines[one, other])}</td>"
        f"<td>{found.overall_cosines[one, other]:+.3f}</td>"
        f"<td>{verdict(found.overall_cosines[one, other])}; {found.shared[one, other]} layers in common</td></tr>"
        for one, other in found.cosines
    )
    return (
        "<table class='pairs'><caption>Do they collide? The cosine of what they change, from -1 to 1</caption>"
        f"<tbody>{rows}</tbody></table>"
    )


def _needle(cosine: float) -> str:
    """A mark on a line from -1 to 1."""
    at = 50 + 50 * max(-1.0, min(1.0, cosine))
    return (
        '<svg class="needle" viewBox="0 0 100 10" aria-hidden="true">'
        '<line class="scale" x1="0" x2="100" y1="5" y2="5"/><line class="scale" x1="50" x2="50" y1="2" y2="8"/>'
        f'<circle cx="{min(max(at, 4), 96):.1f}" cy="5" r="4"/></svg>'
    )


def _norms(found: Interference) -> str:
    blocks = list(dict.fromkeys(block for norms in found.norms.values() for block in norms))
    most = max((norm for norms in found.norms.values() for norm in norms.values()), default=0.0)
    heads = "".join(f"<th scope='col'>{escape(name)}</th>" for name in found.norms)
    lines = "".join(
        f"<tr><th scope='row'>{escape(block)}</th>"
        + "".join(_bar(norms.get(block), most) for norms in found.norms.values())
        + "</tr>"
        for block in blocks
    )
    total = "".join(f"<td><b>{norm:.3g}</b></td>" for norm in found.overall.values())
    return (
        "<div class='norms'><table><caption>How much each changes at strength 1, by block: ‖W' − W‖</caption>"
        f"<thead><tr><th scope='col'>block</th>{heads}</tr></thead><tbody>{lines}"
        f"<tr><th scope='row'>all</th>{total}</tr></tbody></table></div>"
    )


def _bar(norm: float | None, most: float) -> str:
    if norm is None:
        return "<td>–</td>"
    share = norm / most if most > 0 else 0.0
    return f'<td><span class="bar" style="width:{3 * share:.2f}rem"></span>{norm:.3g}</td>'


CSS = """
.meter { display: flex; flex-direction: column; gap: .8rem; font-size: .82rem; }
.meter table { width: 100%; border-collapse: collapse; }
.meter caption { text-align: left; color: var(--body-text-color-subdued); padding-bottom: .3rem; }
.meter table, .meter tr, .meter th, .meter td { border: 0 !important; }
.meter th { text-align: left; font-weight: 500; overflow-wrap: anywhere; }
.meter th, .meter td { padding: .1rem .5rem .1rem 0 !important; vertical-align: middle; }
.meter .pairs th { min-width: 5rem; }
@media (max-width: 600px) { .meter .pairs td:has(.needle) { display: none; } }
.meter .norms { overflow-x: auto; max-height: 24rem; }
.meter .bar { display: inline-block; height: .6rem; margin-right: .4rem; border-radius: .15rem;
  background: var(--color-accent); vertical-align: middle; }
.meter .needle { width: 7rem; height: .7rem; }
.meter .needle .scale { stroke: var(--border-color-primary); stroke-width: 1; }
.meter .needle circle { fill: var(--color-accent); }
"""
