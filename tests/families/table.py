"""docs/families.md from the outcomes of the family tests."""

from collections.abc import Mapping, Sequence

from dora_diffusion.families import FAMILIES
from tests.families.pipelines import PIPELINES

COLUMNS = (
    *("coverage", "predicts as its pipeline", "train", "text encoders", "save, load, draw", "plain diffusers"),
    *("kohya file", "LyCORIS file"),
)

HEAD = """# Model families

Written by `make families` from the outcomes of `tests/families`, which run on a tiny random pipeline of every family
and variant. "yes" means that every test of that column passed; a number refers to the reason below the table.

- **coverage**: the preset `all` and the layers left alone by name are every linear, convolution and embedding layer.
- **predicts as its pipeline**: prompt encoding, the denoiser's call and the autoencoder equal what the diffusers
  pipeline itself does, on whole tensors.
- **train**: ten steps on one batch with the preset `all` lower the loss, move every A, B and m that reaches the
  prediction, and leave the base as it was, bit for bit.
- **text encoders**: the same for all of its text encoders.
- **save, load, draw**: the saved file draws what was trained, folded and unfolded, and comes out without a trace.
- **plain diffusers**: `load_lora_weights` of the same file draws the same picture (denoiser, and the text encoders that
  diffusers loads adapters into).
- **kohya file**, **LyCORIS file**: DoRAs and LoRAs of every layer, linear and convolution, of the denoiser and all text
  encoders come back from these formats with the same weights. Which families' layers are called as their makers call
  them is in docs/formats.md.

Left out, since they learn or call otherwise: Sana-Sprint (consistency, not flow matching), FLUX Fill, Kontext, Control
and Redux, Klein KV, Qwen-Image Edit and Layered, Z-Image Omni, and the ControlNet and PAG pipelines. Other models of
the installed diffusers (Chroma, CogView, HiDream, Kolors, OmniGen ...) have no family yet;
dora_diffusion/families/README.md says how to add one.
"""


def table(outcomes: Mapping[tuple[str, str], Sequence[str]]) -> str:
    """Markdown: a row a pipeline, a column a question, reasons below.

    Args:
        outcomes: (pipeline, column) -> "yes", "no: REASON" or "FAILS", one for each test.
    """
    reasons: dict[str, int] = {}
    lines = [
        "| family | pipeline | " + " | ".join(COLUMNS) + " |",
        "| --- | --- |" + " --- |" * len(COLUMNS),
    ]
    order = [family.name for family in FAMILIES]
    for name, tiny in sorted(PIPELINES.items(), key=lambda item: order.index(item[1].family)):
        cells = [_cell(outcomes.get((name, column), ()), reasons) for column in COLUMNS]
        lines.append(f"| {tiny.family} | {name} | " + " | ".join(cells) + " |")
    notes = [f"{number}. {reason}" for reason, number in reasons.items()]
    return "\n".join([HEAD, *lines, "", *notes]).rstrip() + "\n"


def _cell(outcomes: Sequence[str], reasons: dict[str, int]) -> str:
    failed = [outcome for outcome in outcomes if outcome != "yes"]
    if not outcomes:
        return "not run"
    if not failed:
        return "yes"
    if not failed[0].startswith("no: "):
        return failed[0]
    reason = failed[0].removeprefix("no: ")
    return f"no ({reasons.setdefault(reason, len(reasons) + 1)})"
