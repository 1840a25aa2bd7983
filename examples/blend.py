"""Two adapters on one base: each alone, and both together, in one picture.

python examples/blend.py --model pocket-dit --output blend.png \\
    --adapter runs/subject-robot-dit/adapter.safetensors --adapter runs/style-ink-dit/adapter.safetensors \\
    "an ink style zqx robot on the beach" "an ink style zqx robot on a red background"
"""

import argparse
import sys
from pathlib import Path

from dora_diffusion import AdapterManager, GenerationSettings, generate, load_pipeline
from dora_diffusion.utils.atomic import atomic_path
from dora_diffusion.utils.image_grid import grid


def main() -> int:
    """Draw every prompt under every mix; rows are mixes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--adapter", type=Path, action="append", required=True, help="may be repeated")
    parser.add_argument("--output", type=Path, default=Path("blend.png"))
    parser.add_argument("prompts", nargs="+")
    arguments = parser.parse_args()
    pipe = load_pipeline(arguments.model)
    manager = AdapterManager(pipe)
    names = [path.parent.name for path in arguments.adapter]
    for name, path in zip(names, arguments.adapter, strict=True):
        manager.load_adapter(path, name=name)
    rows = []
    for mix in ([], *([name] for name in names), names):
        manager.set_adapters(dict.fromkeys(mix, 1.0))
        rows.append([generate(pipe, GenerationSettings(prompt)) for prompt in arguments.prompts])
        print(f"row {len(rows)}: {' + '.join(mix) or 'the base'}")
    with atomic_path(arguments.output) as new:
        grid(rows).save(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
