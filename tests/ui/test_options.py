"""What the app is started with reaches the base."""

from pathlib import Path

import pytest

import ui.app
from dora_diffusion.cli import main as commands
from ui.__main__ import main


@pytest.mark.parametrize(("given", "device"), [((), "auto"), (("--device", "mps"), "mps")])
def test_the_device_reaches_the_base(
    given: tuple[str, ...], device: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []

    def load_pipeline(model: str, *, device: str, transformer: object, unet: object, vae: object) -> None:
        asked.append(device)
        raise ValueError("enough")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ui.app, "load_pipeline", load_pipeline)
    assert main(given) == 2
    assert commands(["ui", *given]) == 2
    assert asked == [device, device]
