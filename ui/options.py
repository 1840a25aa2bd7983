"""What the app is started with."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class UiOptions:
    """Settings of one app; they cannot be changed from the browser.

    Attributes:
        model: the base, as `dora_diffusion.load_pipeline` takes it.
        adapters: the folder whose `*.safetensors` (and those of its direct subfolders) can be picked.
        output: where pictures are saved; the only folder the browser may read from.
        host: the address to listen on. Anything but loopback lets other machines use the app: it has no login.
        port: TCP port.
        datasets: folders under which pictures to train on, and recipes, are looked for; those not there are left out.
        runs: the folder of training runs.
        models: a folder of further bases to switch to, or None: diffusers folders and `.safetensors` files.
        transformer: a file with the base's transformer, in place of its own; None = its own.
        unet: the same for its UNet.
        vae: the same for its VAE.
        device: what draws: "cpu", "cuda", "xpu", "mps", or "auto" for the best that is here.
    """

    model: str = "pocket"
    adapters: Path = Path(".")
    output: Path = Path("outputs")
    host: str = "127.0.0.1"
    port: int = 7860
    datasets: tuple[Path, ...] = (Path("examples"), Path("datasets"))
    runs: Path = Path("runs")
    models: Path | None = None
    transformer: Path | None = None
    unet: Path | None = None
    vae: Path | None = None
    device: str = "auto"

    @property
    def files(self) -> dict[str, Path]:
        """Components of the base that come from files of their own."""
        files = {"transformer": self.transformer, "unet": self.unet, "vae": self.vae}
        return {name: file for name, file in files.items() if file is not None}

    def __post_init__(self) -> None:
        if not self.adapters.is_dir():
            raise ValueError(f"adapters: got {self.adapters}, expected an existing folder; name one with --adapters")
        if self.models is not None and not self.models.is_dir():
            raise ValueError(f"models: got {self.models}, expected an existing folder; name one with --models")
        if self.output.exists() and not self.output.is_dir():
            raise ValueError(f"output: got {self.output}, which is a file; name a folder with --output")
        if not 1 <= self.port <= 65535:
            raise ValueError(f"port: got {self.port}, expected 1 to 65535; choose one with --port")
        if self.runs.exists() and not self.runs.is_dir():
            raise ValueError(f"runs: got {self.runs}, which is a file; name a folder with --runs")
