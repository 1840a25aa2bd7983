"""What came of the chaos, as a record for JSON and as a page."""

import platform
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from benchmarks.chaos.features import FEATURES, KINDS
from benchmarks.chaos.run import Fault, Kill, Reference


@dataclass(frozen=True)
class Outcome:
    """What came of the runs of one kind.

    Attributes:
        kills: each.
        full: what a run failed with, for each call from which on the disk was full.
        faults: what should not have been.
        reference: the run that nothing befell.
    """

    kills: Sequence[Kill]
    full: Sequence[str]
    faults: Sequence[Fault]
    reference: Reference


def summary(outcomes: Sequence[Outcome], command: str) -> dict[str, Any]:
    """Everything that the page says."""
    kills = [kill for outcome in outcomes for kill in outcome.kills]
    full = [message for outcome in outcomes for message in outcome.full]
    return {
        "command": command,
        "machine": {
            "system": platform.system(),
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "diffusers", "accelerate")},
        },
        "features": FEATURES,
        "kinds": list(KINDS),
        "kills": len(kills),
        "runs": len({kill.run for kill in kills}),
        "where": dict(Counter(kill.where for kill in kills).most_common()),
        "files": [sum(held is not None for held in outcome.reference.files.values()) for outcome in outcomes],
        "full": len(full),
        "full_at": dict(Counter(_kind(message) for message in full).most_common()),
        "faults": [f"{fault.run}: {fault.what}" for outcome in outcomes for fault in outcome.faults],
    }


def _kind(message: str) -> str:
    """The last part of the path that a failure names, without numbers."""
    path = re.search(r"'([^']+)'|output_dir: (\S+)", message)
    named = (path[1] or path[2]) if path else "no path"
    return re.sub(r"\d+", "N", named.rsplit("/", 1)[-1])


def report(found: dict[str, Any]) -> str:
    """The page."""
    where = "\n".join(f"| {place} | {count} |" for place, count in found["where"].items())
    full = ", ".join(f"`{name}` {count}" for name, count in found["full_at"].items())
    machine = ", ".join(f"{name} {value}" for name, value in found["machine"].items())
    kinds, files = "; ".join(found["kinds"]), " and ".join(map(str, found["files"]))
    faults = "\n".join(f"- {fault}" for fault in found["faults"]) or "None."
    return f"""# Killed runs and full disks

Written by `{found["command"]}`. {machine}.

Small runs with every feature on ({found["features"]}), of two
kinds ({kinds}),
were killed with SIGKILL and resumed, up to four times, then left to come to their ends. All {files} files of
their folders (adapter, checkpoints with optimiser and identity, class pictures, samples, strip, validation, losses,
exports, report, card, config, cached latents; not the TensorBoard logs) had to equal, byte for byte, those of a run
that nothing befell, with nothing beside them. No kill may leave a checkpoint that is not whole.

| killed | kills |
| --- | --- |
{where}
| in all, of {found["runs"]} runs | {found["kills"]} |

Then the disk was full from one call on, for each of the {found["full"]} calls of a run of two steps that write, sync,
make or move something (all but TensorBoard's own): the error had to be one line, nothing half done could stay, and with
room again the run had to come to the same end. Calls that failed, by the file that the error names: {full or "none"}.

## Faults

{faults}
"""
