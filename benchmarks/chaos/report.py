"""What came of the chaos, as a record for JSON and as a page."""

import platform
import re
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from benchmarks.chaos.features import FEATURES
from benchmarks.chaos.run import Fault, Kill, Reference


def summary(
    kills: Sequence[Kill], full: Sequence[str], faults: Sequence[Fault], reference: Reference, command: str
) -> dict[str, Any]:
    """Everything that the page says."""
    return {
        "command": command,
        "machine": {
            "system": platform.system(),
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "diffusers", "accelerate")},
        },
        "features": FEATURES,
        "kills": len(kills),
        "runs": len({kill.run for kill in kills}),
        "where": dict(Counter(kill.where for kill in kills).most_common()),
        "files": sum(held is not None for held in reference.files.values()),
        "full": len(full),
        "full_at": dict(Counter(_kind(message) for message in full).most_common()),
        "faults": [f"{fault.run}: {fault.what}" for fault in faults],
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
    faults = "\n".join(f"- {fault}" for fault in found["faults"]) or "None."
    return f"""# Killed runs and full disks

Written by `{found["command"]}`. {machine}.

A small run with every feature on ({found["features"]})
was killed with SIGKILL and resumed, up to four times, then left to come to its end. All {found["files"]} files of its
folders (adapter, checkpoints with optimiser and identity, class pictures, samples, strip, validation, card, config,
cached latents; not the TensorBoard logs) had to equal, byte for byte, those of a run that nothing befell, with nothing
beside them. No kill may leave a checkpoint that is not whole.

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
