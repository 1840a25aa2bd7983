"""The Python of the guides runs as it stands."""

import re
from pathlib import Path

import pytest
import torch

PAGES = sorted((Path(__file__).parents[2] / "docs").glob("*.md"))
GUIDES = [page for page in PAGES if "```python" in page.read_text()]


@pytest.mark.filterwarnings("ignore")  # the compiler warns of its own ways
@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_python_blocks_run_in_order(guide: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", guide.read_text(), flags=re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    torch._dynamo.reset()
    for block in blocks:
        exec(compile(block, guide.name, "exec"), names)  # noqa: S102
    torch._dynamo.reset()
