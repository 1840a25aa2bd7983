"""Adapters as cards: HTML, every word of a file or its name escaped."""

import hashlib
import time
from collections.abc import Sequence
from html import escape

from ui.library.catalogue import Shown, misfit
from ui.library.library import AdapterFile
from ui.library.thumbnails import Thumbnails

PATIENCE = 0.15  # seconds for pictures that are not ready; the rest come with the next look
WORDS, TAGS = 4, 4

# What a click or Enter on a card tells: never more than a name or a word, which the server looks up again.
ON_LOAD = """
element.addEventListener("click", (event) => {
  const word = event.target.closest("[data-word]");
  if (word) { trigger("word", { name: word.dataset.name, word: Number(word.dataset.word) }); return; }
  const tag = event.target.closest("[data-tag]");
  if (tag) { trigger("tag", { tag: tag.dataset.tag }); return; }
  const card = event.target.closest("[data-pick]");
  if (card) trigger("pick", { name: card.dataset.pick });
});
"""

CSS = """
#browser-page, #browser-seen, #browser-asked, #browser-waiting { display: none !important; }
#browser-cards .cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(136px, 1fr)); gap: .6rem; }
#browser-cards .card { display: flex; flex-direction: column; min-width: 0; overflow: hidden; border-radius: .6rem;
  border: 1px solid var(--border-color-primary); background: var(--block-background-fill);
  transition: border-color .12s, box-shadow .12s; }
#browser-cards .card:not(.off):hover { border-color: var(--color-accent); box-shadow: 0 2px 10px rgb(0 0 0 / .14); }
#browser-cards .card > button { all: unset; box-sizing: border-box; cursor: pointer; display: flex;
  flex-direction: column; width: 100%; min-width: 0; }
#browser-cards .card > button:focus-visible { outline: 2px solid var(--color-accent); outline-offset: -2px;
  border-radius: .6rem; }
#browser-cards .card.off { opacity: .68; }
#browser-cards .card.off > button { cursor: not-allowed; }
#browser-cards .face { position: relative; width: 100%; aspect-ratio: 4 / 3; overflow: hidden; display: block;
  background: hsl(var(--hue) 38% 52%); }
#browser-cards .face.tile { background: linear-gradient(135deg, hsl(var(--hue) 46% 54%),
  hsl(calc(var(--hue) + 48) 44% 38%)); }
#browser-cards .off .face.tile { background: var(--neutral-400); }
#browser-cards .face img { width: 100%; height: 100%; object-fit: cover; display: block; margin: 0; }
#browser-cards .off .face img { filter: grayscale(1); }
#browser-cards .face .initials { position: absolute; inset: 0; display: grid; place-items: center; color: #fff;
  font-size: 1.9rem; font-weight: 600; letter-spacing: .03em; text-shadow: 0 1px 4px rgb(0 0 0 / .35); }
#browser-cards .badge { position: absolute; left: .4rem; top: .4rem; max-width: calc(100% - .8rem); overflow: hidden;
  text-overflow: ellipsis; white-space: nowrap; padding: .08rem .45rem; border-radius: 1rem; font-size: .72rem;
  font-weight: 600; color: #fff; background: rgb(15 23 42 / .74); }
#browser-cards .title { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 2; overflow: hidden;
  padding: .4rem .55rem 0; font-weight: 600; font-size: .86rem; line-height: 1.25; overflow-wrap: anywhere;
  color: var(--body-text-color); }
#browser-cards .facts { padding: .1rem .55rem .4rem; font-size: .74rem; color: var(--body-text-color-subdued);
  overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
#browser-cards .why { padding: 0 .55rem .5rem; font-size: .74rem; line-height: 1.3; color: #b91c1c;
  overflow-wrap: anywhere; display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 4;
  overflow: hidden; }
.dark #browser-cards .why { color: #fca5a5; }
#browser-cards .words { display: flex; flex-wrap: wrap; gap: .25rem; padding: 0 .5rem .5rem; margin-top: auto; }
#browser-cards .words button { all: unset; box-sizing: border-box; cursor: pointer; max-width: 100%; overflow: hidden;
  text-overflow: ellipsis; white-space: nowrap; padding: .04rem .45rem; border-radius: 1rem; font-size: .72rem;
  border: 1px solid var(--border-color-primary); color: var(--body-text-color-subdued); }
#browser-cards .words button[data-word] { color: var(--color-accent); border-color: var(--color-accent); }
#browser-cards .words button:hover, #browser-cards .words button:focus-visible { background: var(--color-accent);
  border-color: var(--color-accent); color: #fff; }
#browser-cards .nothing { padding: 1.6rem .6rem; text-align: center; color: var(--body-text-color-subdued); }
#browser-status .line { font-size: .82rem; color: var(--body-text-color-subdued); overflow-wrap: anywhere; }
#browser-status progress { width: 100%; height: .3rem; accent-color: var(--color-accent); }
#browser-pages { align-items: center; flex-wrap: nowrap; }
#browser-filters { gap: .5rem; }
"""


def cards_html(shown: Shown, thumbnails: Thumbnails, *, family: str) -> tuple[str, int]:
    """The cards of a page, and how many pictures are not ready yet.

    Args:
        shown: the page.
        thumbnails: where pictures come from.
        family: of the app's base: adapters of others are greyed, with the reason.
    """
    if not shown.files:
        more = f" {shown.hidden} are for other bases." if shown.hidden else ""
        return f'<div class="nothing">Nothing is found.{more}</div>', 0
    end, waiting, cards = time.perf_counter() + PATIENCE, 0, []
    for file in shown.files:
        picture = thumbnails.of(file.thumbnail, end) if file.thumbnail else ""
        waiting += picture is None
        cards.append(card_html(file, picture or "", family=family))
    return f'<div class="cards" role="list">{"".join(cards)}</div>', waiting


def card_html(file: AdapterFile, picture: str, *, family: str) -> str:
    """One card. `picture` is a `data:` address, or empty for a tile with initials."""
    reason = file.problem or misfit(file, family)
    off = ' class="card off"' if reason else ' class="card"'
    pick = ' aria-disabled="true"' if reason else f' data-pick="{escape(file.name)}"'
    why = f'<span class="why">{escape(reason)}</span>' if reason else ""
    return (
        f'<div{off} role="listitem"><button type="button"{pick} title="{escape(file.name)}">'
        f'{_face(file, picture)}<span class="title">{escape(file.title)}</span>'
        f'<span class="facts">{escape(_facts(file))}</span>{why}</button>{"" if reason else _chips(file)}</div>'
    )


def _face(file: AdapterFile, picture: str) -> str:
    kind = file.kind or ("cannot be used" if file.problem else "not read yet")
    badge = f'<span class="badge">{escape(kind)}</span>'
    if picture:
        return f'<span class="face"><img src="{picture}" alt="">{badge}</span>'
    return (
        f'<span class="face tile" style="--hue:{_hue(file.name)}">'
        f'<span class="initials">{escape(initials(file.title))}</span>{badge}</span>'
    )


def initials(title: str) -> str:
    """Two letters of a title: of its first two words, or of its only one."""
    words = [word for word in title.replace("_", " ").replace("-", " ").replace(".", " ").split() if word[0].isalnum()]
    letters = "".join(word[0] for word in words[:2]) if len(words) > 1 else "".join(words)[:2]
    return letters.upper() or "?"


def _hue(name: str) -> int:
    """A colour that stays a name's own."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:2], "big") % 360


def _facts(file: AdapterFile) -> str:
    """Rank, family, axis and size in a line."""
    if file.seen is None:
        return size_in_words(file.bytes) if file.stamp else ""
    axis = {"in": "in axis", "out/in": "both axes", "unclear": "axis unclear"}.get(file.seen.structure.axis, "")
    facts = (f"r{file.rank}" if file.rank else "", file.family or file.base or "base not told", axis)
    return " · ".join(fact for fact in (*facts, size_in_words(file.bytes)) if fact)


def size_in_words(size: int) -> str:
    """ "812 kB", "1.4 GB"."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6)):
        if size >= factor:
            return f"{size / factor:.{1 if size < 10 * factor else 0}f} {unit}"
    return f"{-(-size // 1000)} kB"


def _chips(file: AdapterFile) -> str:
    name = escape(file.name)
    words = [
        f'<button type="button" data-word="{number}" data-name="{name}" title="Put into the prompt">'
        f"{escape(word)}</button>"
        for number, word in enumerate(file.triggers[:WORDS])
    ]
    tags: Sequence[str] = [tag for tag in file.tags if tag not in file.triggers][: max(0, TAGS - len(words))]
    found = [
        f'<button type="button" data-tag="{escape(tag)}" title="Show all with this tag">{escape(tag)}</button>'
        for tag in tags
    ]
    return f'<div class="words">{"".join((*words, *found))}</div>' if words or found else ""


def status_html(shown: Shown, *, total: int, broken: int, unread: int, notice: str) -> str:
    """How many there are, what is still being read, what was left out."""
    where = f"page {shown.page + 1} of {shown.pages}" if shown.pages > 1 else ""
    facts = [f"{shown.found:,} of {total:,} adapters", where]
    facts.append(f"{shown.hidden:,} for other bases" if shown.hidden else "")
    facts.append(f"{broken:,} cannot be used" if broken else "")
    facts += [f"reading headers: {total - unread:,} of {total:,}" if unread else "", notice]
    line = " · ".join(escape(fact) for fact in facts if fact)
    bar = f'<progress max="{total}" value="{total - unread}"></progress>' if unread else ""
    return f'<div class="line">{line}</div>{bar}'
