"""`report.html`: a whole run on one page, pictures and curves within it, nothing fetched from elsewhere.

It says the same of a run that was killed and resumed: there is no time in it. How long steps took stands in `logs`.
"""

import base64
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image
from pydantic import BaseModel
from tqdm import tqdm

from dora_diffusion._version import __version__
from dora_diffusion.training.base.trainable import TrainablePipeline, trainable_count
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.data.concepts import Split
from dora_diffusion.training.data.doctor.contact_sheet import contact_sheet
from dora_diffusion.training.run.card import Left, kind_of
from dora_diffusion.training.run.charts import Curve, binned, chart, smoothed
from dora_diffusion.training.run.metadata import base_name
from dora_diffusion.training.run.movement import movement
from dora_diffusion.training.run.previews import STRIP
from dora_diffusion.utils.atomic import write_atomically
from dora_diffusion.utils.text import encodable, first_line

FILE = "report.html"
_WIDEST = 1600  # pixels of a picture in the page
_TALLEST = 16000
_QUALITY = 85
_CELLS = 64
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#111827;max-width:1000px;margin:24px auto;padding:0 16px}
h1{font-size:24px}h2{font-size:18px;margin-top:32px;border-bottom:1px solid #e5e7eb}
table{border-collapse:collapse}td,th{text-align:left;vertical-align:top;padding:2px 16px 2px 0}
td+td{overflow-wrap:anywhere}img,svg{max-width:100%;height:auto}code,pre{font:13px/1.45 ui-monospace,monospace}
pre{overflow-x:auto;background:#f3f4f6;padding:8px}svg text{font:11px system-ui,sans-serif;fill:#4b5563}
.grid{stroke:#e5e7eb}.axis{stroke:#9ca3af}.legend span{margin-right:16px}
"""


@dataclass(frozen=True)
class Seen:
    """What a report shows beside the run's folder and settings.

    Attributes:
        left: what the run left.
        examples: its pictures, with their sizes.
        losses: (step, loss) pairs.
        guard: what it counted.
    """

    left: Left
    examples: Split
    losses: Sequence[tuple[int, float]]
    guard: Mapping[str, int]


def write_report(config: TrainConfig, trainable: TrainablePipeline, seen: Seen) -> None:
    """Write the page. A run has all it was for by then: what goes wrong here is a line, and no end of it."""
    try:
        page = report_page(config, trainable, seen)
        write_atomically(config.output_dir / FILE, page.encode())
    except Exception as error:  # noqa: BLE001  # of any library that draws or reads pictures
        tqdm.write(f"{config.output_dir / FILE}: not written ({first_line(error)}); the run itself is whole")


def report_page(config: TrainConfig, trainable: TrainablePipeline, seen: Seen) -> str:
    """The page as HTML; a part that cannot be made says why in its place."""
    title = f"{kind_of(config)} on {base_name(config)}"
    parts: dict[str, Callable[[], str]] = {
        "Loss": lambda: _curves(seen),
        "Validation": lambda: _validation(seen),
        "Previews": lambda: _strip(config.output_dir),
        "How far the base was moved": lambda: _moved(trainable),
        "What was learnt": lambda: _sheet(config, seen.examples),
        "Cost": lambda: _cost(config, trainable, seen),
        "Written": lambda: _written(seen.left),
        "Settings": lambda: _settings(config),
    }
    body = "".join(_part(name, make) for name, make in parts.items())
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{_text(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body><h1>{_text(title)}</h1>\n"
        f"<p>{_text(_summary(config, seen.left.outcome.steps))}</p>\n{body}</body></html>\n"
    )


def _part(name: str, make: Callable[[], str]) -> str:
    try:
        inside = make()
    except Exception as error:  # noqa: BLE001  # the rest of the page is as good without it
        inside = f"<p>Could not be made: {_text(first_line(error))}</p>"
    return f"<h2>{_text(name)}</h2>\n{inside}\n" if inside else ""


def _text(text: object) -> str:
    """Anybody's text, as text."""
    return escape(encodable(str(text)))


def _table(rows: Sequence[tuple[object, ...]], head: Sequence[str] = ()) -> str:
    lines = ["".join(f"<th>{_text(cell)}</th>" for cell in head)] if head else []
    lines += ["".join(f"<td>{_text(cell)}</td>" for cell in row) for row in rows]
    return "<table>\n" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "\n</table>"


def _summary(config: TrainConfig, steps: int) -> str:
    optim = config.optim
    return (
        f"{steps} steps of batch {optim.batch_size} x {optim.gradient_accumulation}, learning rate "
        f"{optim.rate:g}, by dora_diffusion {__version__}."
    )


def _curves(seen: Seen) -> str:
    return chart(
        [
            Curve("each step", binned(seen.losses), "#94a3b8", is_faint=True),
            Curve("mean of those around it", smoothed(seen.losses), "#2563eb"),
        ]
    )


def _validation(seen: Seen) -> str:
    """Apart from the loss of steps: its noise never changes, and so its size is another."""
    outcome = seen.left.outcome
    if not outcome.losses:
        return ""
    rows = [(step, f"{loss:.4f}") for step, loss in outcome.losses]
    name = f"loss on fixed noise, of {'held-out' if outcome.is_held_out else 'trained'} pictures"
    drawn = chart([Curve(name, outcome.losses, "#dc2626", has_dots=True)])
    return f"{drawn}\n<details><summary>Numbers</summary>{_table(rows, ('step', 'loss'))}</details>"


def _strip(folder: Path) -> str:
    path = folder / "samples" / STRIP
    if not path.is_file():
        return ""
    with Image.open(path) as picture:
        return _picture(picture.convert("RGB"), "previews, a row a step")


def _sheet(config: TrainConfig, examples: Split) -> str:
    sheet, left_out = contact_sheet(
        examples.train,
        sizes_of="this run",
        with_masks=config.data.mask_outside is not None,
        cells=_CELLS,
    )
    more = f"<p>{left_out} pictures more are not shown.</p>" if left_out else ""
    return _picture(sheet, "pictures, with the frame that is kept of each") + more


def _picture(picture: Image.Image, about: str) -> str:
    """Within the page, smaller where it is large."""
    scale = min(1.0, _WIDEST / picture.width, _TALLEST / picture.height)
    small = (
        picture
        if scale == 1
        else picture.resize(
            (max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), Image.Resampling.LANCZOS
        )
    )
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=_QUALITY)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="{_text(about)}" src="data:image/jpeg;base64,{data}">'


def _moved(trainable: TrainablePipeline) -> str:
    """Block by block, the two numbers of DoRA's section 3.2, as trackers are told them."""
    found = movement(trainable)
    blocks = [name.partition("/")[2] for name in found if name.startswith("direction/")]
    if not blocks:
        return ""
    rows = [
        (block, f"{found[f'direction/{block}']:.3g}\N{DEGREE SIGN}", f"{100 * found[f'magnitude/{block}']:.3g} %")
        for block in blocks
    ]
    about = "Means over the rows of each block's layers: how far a row is turned, and how far its length changed."
    return f"<p>{about}</p>\n{_table(rows, ('block', 'direction', 'length'))}"


def _cost(config: TrainConfig, trainable: TrainablePipeline, seen: Seen) -> str:
    optim = config.optim
    steps = seen.left.outcome.steps
    shown = steps * optim.batch_size * optim.gradient_accumulation
    an_epoch = sum(example.repeats for example in seen.examples.train)
    rows: list[tuple[object, object]] = [
        ("steps", f"{steps}, of {optim.batch_size} x {optim.gradient_accumulation} pictures a process"),
        ("pictures", f"{len(seen.examples.train)}, each seen about {shown / max(1, an_epoch):.0f} times"),
        ("class pictures", len(seen.examples.classes)),
        ("measured pictures", len(seen.examples.validation)),
        ("trained", f"{trainable_count(trainable.parameters()):,} numbers"),
        ("steps skipped by the guard", seen.guard.get("guard/skipped", 0)),
        ("times that the last good state came back", seen.guard.get("guard/restored", 0)),
        ("time", "in logs, for TensorBoard: it is another each time that the same is trained"),
    ]
    return _table(rows)


def _written(left: Left) -> str:
    rows = [(f"{each.path.parent.name}/{each.path.name}", each.line) for each in left.exports]
    rows += [(f"words/{path.name}", "") for path in left.words]
    rows += [(each.name, f"below it, part of the base, at {each.strength:g}") for each in left.below]
    return _table(rows) if rows else ""


def _settings(config: TrainConfig) -> str:
    """What is not as it is by default, then everything; of a path the name only, for a page is shown to others."""
    every = list(_values(config.model_copy(update={"model": base_name(config)})))
    own = [(key, value) for key, value, is_default in every if not is_default]
    lines = "\n".join(f"{key}: {value}" for key, value, _ in every)
    return f"{_table(own)}\n<details><summary>All settings</summary><pre>{_text(lines)}</pre></details>"


def _values(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, str, bool]]:
    """Dotted key, its value in words, and whether it is the default."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _values(value, f"{prefix}{name}.")
        else:
            is_default = not field.is_required() and value == field.get_default(call_default_factory=True)
            yield f"{prefix}{name}", _shown(value), is_default


def _shown(value: object) -> str:
    if isinstance(value, Path):
        return value.name
    if isinstance(value, BaseModel):
        return ", ".join(f"{key} {shown}" for key, shown, is_default in _values(value) if not is_default)
    if isinstance(value, list):
        return "; ".join(map(_shown, value)) or "none"
    if isinstance(value, Mapping):
        return "; ".join(f"{_shown(key)}: {_shown(inner)}" for key, inner in value.items()) or "none"
    return "null" if value is None else str(value)
