"""Options of other trainers beside ours, for docs/moving.md.

`python -m benchmarks.options_of_trainers` writes the tables into the page, from those that `dora-diffusion
import-config` works with; `tests/unit/training/test_import_config.py` holds every row and the page to them.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from dora_diffusion.training.import_config.reading import TOOLS
from dora_diffusion.training.import_config.records import Row, Tool
from dora_diffusion.utils.atomic import write_atomically

PAGE = Path(__file__).parents[1] / "docs" / "moving.md"
START, END = "<!-- options of {tool} -->\n", "<!-- end of options of {tool} -->\n"


def table(tool: Tool) -> str:
    """A trainer's options as markdown: those with a counterpart, those that have none, those that need none."""
    taken = [row for row in tool.rows if row.ours]
    lines = ["| there | here | |", "| --- | --- | --- |"]
    lines += [f"| `{_cell(row.name)}` | {_ours(row)} | {_cell(row.says)} |" for row in taken]
    rest = list(_together([row for row in tool.rows if not row.ours]))
    lines += ["", "Without a setting of ours:", "", "| there | why, and what to do |", "| --- | --- |"]
    lines += [f"| {', '.join(f'`{_cell(name)}`' for name in names)} | {_cell(says)} |" for says, names in rest]
    return "\n".join([*lines, ""])


def _ours(row: Row) -> str:
    return ", ".join(f"`{key}`" for key in row.ours)


def _cell(text: str) -> str:
    return text.replace("|", r"\|")


def _together(rows: Sequence[Row]) -> Iterator[tuple[str, list[str]]]:
    """Rows that say the same, in the order of the first."""
    found: dict[str, list[str]] = {}
    for row in rows:
        found.setdefault(row.says, []).append(row.name)
    yield from found.items()


def page_of(page: str) -> str:
    """A page with the tables between their marks."""
    for tool in TOOLS:
        start, end = START.format(tool=tool.name), END.format(tool=tool.name)
        before, mark, rest = page.partition(start)
        _, other, after = rest.partition(end)
        if not mark or not other:
            raise ValueError(f"{PAGE.name}: expected the marks {start.strip()} and {end.strip()}")
        page = f"{before}{start}\n{table(tool)}\n{end}{after}"
    return page


def main() -> int:
    """Write the tables into the page."""
    write_atomically(PAGE, page_of(PAGE.read_text()).encode())
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
