"""`make demo`: train the robot, draw it where it was never seen, and put base and adapter side by side.

python examples/demo.py                       a few minutes on two cores; writes demo/before-after.png
python examples/demo.py --model pocket-dit    the same on the embedded DiT; writes demo/before-after-pocket-dit.png
python examples/demo.py --quick               a shortened run for CI; its picture shows the path, not the quality
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

from dora_diffusion import AdapterManager, GenerationSettings, TrainConfig, generate, load_pipeline, train
from dora_diffusion.utils.atomic import atomic_path
from dora_diffusion.utils.image_grid import grid

HERE = Path(__file__).parent
PROMPTS = {
    "on the beach": "a zqx robot on the beach",
    "under a starry sky": "a zqx robot under a starry sky",
    "small, on red": "a small zqx robot on a red background",
    "in the snow": "a zqx robot in the snow",
    "(something else)": "a noto style teddy bear on the beach",
}
CONFIGS = {"pocket": "subject.yaml", "pocket-dit": "subject-dit.yaml"}
QUICK = {
    "optim.steps": "12",
    "optim.warmup_steps": "0",
    "optim.batch_size": "1",
    "prior.class_images": "2",
}


def main() -> int:
    """Train, draw, save; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONFIGS, default="pocket", help="the embedded base")
    parser.add_argument("--quick", action="store_true", help="a dozen steps only")
    parser.add_argument("--output", type=Path, default=Path("demo"))
    arguments = parser.parse_args()
    started = time.monotonic()
    suffix = "" if arguments.model == "pocket" else f"-{arguments.model}"
    run = arguments.output / f"robot-run{suffix}"
    shutil.rmtree(run, ignore_errors=True)
    overrides = {"output_dir": str(run), "preview.prompts": "[]", **(QUICK if arguments.quick else {})}
    result = train(TrainConfig.from_yaml(HERE / "subject-robot" / CONFIGS[arguments.model], overrides))
    assert result.adapter is not None  # the config asks for one
    picture = before_and_after(arguments.model, result.adapter, arguments.output / f"before-after{suffix}.png")
    losses = f"{result.validation[0][1]:.3f} -> {result.validation[-1][1]:.3f}"
    print(f"\nloss on fixed noise {losses}; {time.monotonic() - started:.0f} s in all")
    print(f"adapter: {result.adapter}\npicture: {picture} (above: the base; below: with the adapter)")
    return 0


def before_and_after(model: str, adapter: Path, path: Path) -> Path:
    """Draw every prompt with the adapter at 0 and at 1, in two rows."""
    pipe = load_pipeline(model)
    manager = AdapterManager(pipe)
    manager.load_adapter(adapter, name="robot")
    rows = []
    for strength in (0.0, 1.0):
        manager.set_adapters({"robot": strength})
        rows.append([generate(pipe, GenerationSettings(prompt)) for prompt in PROMPTS.values()])
    with atomic_path(path) as new:
        grid(rows, labels=list(PROMPTS)).save(new)
    return path


if __name__ == "__main__":
    sys.exit(main())
