"""The same tests under other arithmetic and on other random numbers: nothing here may decide whether they pass.

TEST_MKLDNN=0 switches oneDNN off. TEST_SEED=n adds n to every seed that is set in the tests' own process. Both show a
tolerance that fits one machine or one draw by luck; so do ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA and MKL_CBWR, which
the libraries read themselves.
"""

import os
import tempfile
from typing import Any

import torch

_SEED = int(os.environ.get("TEST_SEED", "0"))


def apply() -> None:
    """What the environment asks for, before anything is drawn."""
    if os.environ.get("TEST_MKLDNN") == "0":
        torch.backends.mkldnn.set_flags(False)
    if capability := os.environ.get("ATEN_CPU_CAPABILITY"):  # code compiled for other registers must not be taken up
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/inductor-{capability}")
    if _SEED:
        _shift_seeds(_SEED)


def _shift_seeds(by: int) -> None:
    plain = torch.manual_seed

    class Shifted(torch.Generator):
        def manual_seed(self, seed: int) -> torch.Generator:
            return super().manual_seed(seed + by)

        def initial_seed(self) -> int:
            return super().initial_seed() - by

    def manual_seed(seed: Any) -> torch.Generator:
        return plain(int(seed) + by)

    torch.Generator, torch.manual_seed = Shifted, manual_seed
