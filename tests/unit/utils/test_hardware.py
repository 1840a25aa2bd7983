"""The device that is taken where none is named."""

import pytest
import torch

from dora_diffusion.utils.hardware import DTYPES, device_of, dtype_name


@pytest.mark.parametrize(
    ("cuda", "mps", "device"),
    [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu"), (True, False, "cuda")],
)
def test_auto_is_the_best_that_is_here(monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, device: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert device_of("auto") == device
    assert [device_of(name) for name in ("cpu", "cuda:1", "nonsense")] == ["cpu", "cuda:1", "nonsense"]


def test_dtypes_have_short_names() -> None:
    assert {name: dtype_name(dtype) for name, dtype in DTYPES.items()} == {name: name for name in DTYPES}
    assert dtype_name(torch.float8_e4m3fn) == "float8_e4m3fn"
