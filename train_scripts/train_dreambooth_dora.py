"""Train an adapter: `accelerate launch train_scripts/train_dreambooth_dora.py --config subject.yaml`.

The same as `dora-diffusion train subject.yaml`, in a form that `accelerate launch` starts on several devices.
"""

import sys

from dora_diffusion.cli import main

if __name__ == "__main__":
    arguments = [part for text in sys.argv[1:] for part in (text.split("=", 1) if text[:9] == "--config=" else [text])]
    if "--config" in arguments:
        position = arguments.index("--config")
        arguments = [*arguments[position + 1 : position + 2], *arguments[:position], *arguments[position + 2 :]]
    sys.exit(main(["train", *arguments]))
