"""Which adapters of a library are shown: a search as one types, filters, an order, a page."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ui.library.library import AdapterFile, AdapterLibrary

PAGE = 48
LONGEST_SEARCH = 200
MOST_CHOICES = 200
UNDECLARED = "not told"
ORDERS: Mapping[str, Callable[[AdapterFile], Any]] = {
    "name": lambda file: (file.name.lower(), file.name),
    "newest": lambda file: -(file.stamp.modified_ns if file.stamp else 0),
    "largest": lambda file: -file.bytes,
}


@dataclass(frozen=True)
class Query:
    """What the user asks for.

    Attributes:
        text: words that all have to occur, in names, titles, trigger words, tags or authors.
        family: of the base; "" for any, `UNDECLARED` for those that do not say.
        kind, tag: "" for any.
        only_fitting: leave out what is known to be for another base than the app's.
        order: a key of ORDERS.
        page: from 0.
    """

    text: str = ""
    family: str = ""
    kind: str = ""
    tag: str = ""
    only_fitting: bool = True
    order: str = "name"
    page: int = 0


@dataclass(frozen=True)
class Shown:
    """One page of what was found.

    Attributes:
        files: of the page.
        found: how many on all pages.
        hidden: how many more there are for other bases.
        page, pages: the page's number from 0, never beyond the last, and how many there are.
    """

    files: tuple[AdapterFile, ...]
    found: int
    hidden: int
    page: int
    pages: int


@dataclass(frozen=True)
class Choices:
    """What can be filtered by, the most frequent first."""

    families: tuple[str, ...]
    kinds: tuple[str, ...]
    tags: tuple[str, ...]


def check_query(query: Query) -> Query:
    """The query, if a browser may ask for it.

    Raises:
        ValueError: one line: a field is of another kind, too long, or unknown.
    """
    for name in ("text", "family", "kind", "tag", "order"):
        value = getattr(query, name)
        if not isinstance(value, str) or len(value) > LONGEST_SEARCH:
            got = f"{len(value)} characters" if isinstance(value, str) else type(value).__name__
            raise ValueError(f"{name}: got {got}, expected text of at most {LONGEST_SEARCH} characters")
    if query.order not in ORDERS:
        raise ValueError(f"order: got {query.order[:40]!r}, expected one of {', '.join(ORDERS)}")
    if isinstance(query.page, bool) or not isinstance(query.page, int | float) or not 0 <= query.page < 1 << 30:
        raise ValueError("page: expected a whole number from 0")
    return replace(query, page=int(query.page), only_fitting=bool(query.only_fitting))


def shown_of(library: AdapterLibrary, query: Query, *, family: str) -> Shown:
    """The files that a query finds.

    Args:
        library: where to look.
        query: checked.
        family: the app's base is of it.
    """
    words = query.text.lower().split()
    found = [file for file in library.files if _matches(file, query, words)]
    kept = [file for file in found if misfit(file, family) is None] if query.only_fitting else found
    if query.order != "name":  # the library is in the order of names
        kept = sorted(kept, key=ORDERS[query.order])
    if words:  # stable: what is called so comes before what only mentions it
        kept.sort(key=lambda file: not all(word in file.name.lower() for word in words))
    kept.sort(key=lambda file: file.problem is not None)  # stable, too
    pages = max(1, -(-len(kept) // PAGE))
    page = min(query.page, pages - 1)
    return Shown(tuple(kept[page * PAGE : (page + 1) * PAGE]), len(kept), len(found) - len(kept), page, pages)


def choices_of(files: Iterable[AdapterFile]) -> Choices:
    """What the files offer to filter by."""
    families: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    tags: Counter[str] = Counter()
    for file in files:
        if file.seen is not None:
            families[file.family or UNDECLARED] += 1
            kinds[_plain(file.kind)] += 1
            tags.update(tag.lower() for tag in file.tags)
    return Choices(*(tuple(name for name, _ in counts.most_common(MOST_CHOICES)) for counts in (families, kinds, tags)))


def misfit(file: AdapterFile, family: str) -> str | None:
    """Why an adapter is not for the app's base, in one line; None when it may be."""
    if not file.family or not family or file.family == family:
        return None
    return f"for {file.family}, and the base is {family}"


def _matches(file: AdapterFile, query: Query, words: list[str]) -> bool:
    if query.family and (file.family or UNDECLARED) != query.family:
        return False
    if query.kind and _plain(file.kind) != query.kind:
        return False
    if query.tag and query.tag not in map(str.lower, file.tags):
        return False
    return all(word in file.haystack for word in words)


def _plain(kind: str) -> str:
    """ "DoRA in 96 layers, LoRA in 32" is a DoRA to a filter."""
    return kind.split(" in ", 1)[0]
