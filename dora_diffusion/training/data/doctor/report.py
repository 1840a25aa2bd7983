"""The doctor's report for people."""

from collections import Counter
from collections.abc import Iterator, Sequence

from dora_diffusion.training.data.buckets import kept_share
from dora_diffusion.training.data.doctor.findings import IS_LOSS, DoctorReport
from dora_diffusion.training.data.examples import Example
from dora_diffusion.utils.text import shown_path

_SIZES_NAMED = 20


def format_report(report: DoctorReport) -> str:
    """The report for people: a summary, one line for each finding, and the verdict."""
    lines = [f"{shown_path(report.folder)}: {report.images} {'picture' if report.images == 1 else 'pictures'}"]
    if report.sizes:
        lines.append(_size_summary(report.sizes))
    if report.sized:
        lines += [f"trained by {report.sizes_of}:", *_table(report.sized)]
    counts = Counter(finding.kind for finding in report.findings)
    if counts:
        lines.append("found: " + ", ".join(f"{counts[kind]} {kind}" for kind in IS_LOSS if counts[kind]))
    for finding in report.findings:
        lines.append(f"  {finding.kind}: {shown_path(finding.path.relative_to(report.folder))}: {finding.message}")
    lines += [f"note: {note}" for note in report.notes]
    if report.losses:
        lines.append(f"{len(report.losses)} of these would be lost, or make training fail: mend them first")
    else:
        lines.append("nothing would be lost")
    return "\n".join(lines)


def _size_summary(sizes: Sequence[tuple[int, int]]) -> str:
    widths, heights = zip(*sizes, strict=True)
    shapes = Counter("square" if w == h else "landscape" if w > h else "portrait" for w, h in sizes)
    named = ", ".join(f"{shapes[shape]} {shape}" for shape in ("square", "landscape", "portrait") if shapes[shape])
    return f"widths {min(widths)}-{max(widths)}, heights {min(heights)}-{max(heights)} pixels; {named}"


def _table(sized: Sequence[Example]) -> Iterator[str]:
    """How many pictures each size has, and how much of them is cut off."""
    buckets = by_size(sized)
    for size, inside in list(buckets.items())[:_SIZES_NAMED]:
        mean, most = cut_share(inside)
        cut = f"{mean:.1f} % of a picture is cut off, at most {most:.1f} %" if most >= 0.05 else "nothing is cut off"
        yield f"  {len(inside):6} of {size[0]}x{size[1]}: {cut}"
    if len(buckets) > _SIZES_NAMED:
        others = list(buckets.values())[_SIZES_NAMED:]
        yield f"  {sum(map(len, others)):6} of {len(others)} more sizes"


def by_size(sized: Sequence[Example]) -> dict[tuple[int, int], list[Example]]:
    """The pictures of each size, the most frequent size first."""
    counts = Counter(example.size for example in sized)
    buckets: dict[tuple[int, int], list[Example]] = {size: [] for size, _ in counts.most_common()}
    for example in sized:
        buckets[example.size].append(example)
    return buckets


def cut_share(examples: Sequence[Example]) -> tuple[float, float]:
    """How much of pictures is cut off, in percent: on average, and at most."""
    lost = [100 * (1 - float(kept_share(example.original, example.size))) for example in examples]
    return sum(lost) / len(lost), max(lost)
