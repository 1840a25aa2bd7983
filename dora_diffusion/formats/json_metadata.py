"""JSON inside of files' metadata: a stranger's, so bounded before it is parsed."""

import json
from typing import Any

from dora_diffusion.formats.safetensors_reader import shown

# A config of PEFT's for a thousand layers, each with its pattern, has some 300,000 characters.
LONGEST = 1_000_000


def json_object(text: str, what: str) -> dict[str, Any]:
    """The object that a text is.

    Args:
        text: JSON.
        what: where it stands, for the message.

    Raises:
        ValueError: it is too long, no JSON, or no object.
    """
    if len(text) > LONGEST:
        raise ValueError(f"{what} has {len(text)} characters, expected at most {LONGEST}")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not JSON ({shown(error)})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{what}: expected a JSON object")
    return found
