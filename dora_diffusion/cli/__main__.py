"""`python -m dora_diffusion.cli`."""

import sys

from dora_diffusion.cli import main

sys.exit(main())
