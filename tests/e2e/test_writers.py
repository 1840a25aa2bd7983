"""What writes, on a disk that fails and under kill -9: the old one stays, whole, and the next write cleans up.

docs/reliability.md is the table of all that writes; here are those that are one call. That of a checkpoint, of a baked
base and of the command line have tests of their own, which the table names.
"""

import contextlib
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from dora_diffusion.formats import save_adapter
from dora_diffusion.formats.safetensors_stream import Slot, write_tensor_file
from dora_diffusion.generation.generate import GenerationSettings
from dora_diffusion.generation.inputs import keep_input
from dora_diffusion.generation.png_metadata import save_picture
from dora_diffusion.pipelines.textual_inversion import WordState, save_words
from dora_diffusion.pretrain import checkpoints
from dora_diffusion.state import AdapterState
from dora_diffusion.training.run.previews import save_previews, save_strip
from dora_diffusion.utils.atomic import recover, save_tensors, write_atomically
from tests.failing_disk import contents, fail_at_every_call
from tests.formats.adapters import adapter_of, dora, place
from ui.library.shelf_index import Known, write_index
from ui.train.data import save_caption

ROOT = Path(__file__).parents[2]
# Old or new: what is written, and into which folder.
Write = Callable[[int, Path], object]


def picture(seed: int) -> Image.Image:
    return Image.effect_noise((48, 48), 10 + seed).convert("RGB")


def adapter(seed: int) -> AdapterState:
    paths = [f"unet.mid_block.attentions.0.transformer_blocks.0.attn1.{name}" for name in ("to_q", "to_k")]
    return adapter_of([(path, torch.ones(320, 320)) for path in paths], dora, seed=seed)


def put_adapter(format: str) -> Write:
    return lambda seed, folder: save_adapter(adapter(seed), place(folder, format), format=format)


def put_stream(seed: int, folder: Path) -> None:
    slots = {"a": Slot("F32", (64, 64))}
    write_tensor_file(folder / "base.safetensors", slots, [("a", torch.full((64, 64), float(seed)))])


def put_picture(seed: int, folder: Path) -> None:
    save_picture(picture(seed), folder / "a.png", GenerationSettings("a hat"), model="pocket", adapters=[])


def put_caption(seed: int, folder: Path) -> None:
    if not (folder / "a.png").exists():
        write_atomically(folder / "a.png", b"no picture yet")
    save_caption(folder, "a.png", f"caption number {seed}")


WRITERS: dict[str, Write] = {
    **{f"adapter, {format}": put_adapter(format) for format in ("diffusers", "kohya", "peft")},
    "tensors": lambda seed, folder: save_tensors({"a": torch.full((64,), seed)}, folder / "a.safetensors"),
    "tensor by tensor": put_stream,
    "words": lambda seed, folder: save_words([WordState("zqx", (torch.full((1, 8), float(seed)),))], folder),
    "picture": put_picture,
    "preview": lambda seed, folder: save_previews([picture(seed)], folder, step=1),
    "caption": put_caption,
    "index of adapters": lambda seed, folder: write_index(folder / "i.json", {"a": Known((seed, 1, 2), "x", None)}),
}
EVERY = pytest.mark.parametrize("name", WRITERS)


def room_of(tmp_path: Path, name: str) -> Path:
    """A folder in which the old one is."""
    room = tmp_path / "room"
    room.mkdir()
    WRITERS[name](0, room)
    return room


@EVERY
def test_whatever_call_of_it_fails_the_old_one_stays(tmp_path: Path, name: str) -> None:
    room = room_of(tmp_path, name)
    messages = fail_at_every_call(lambda: WRITERS[name](1, room), room, may_be_new=True)
    assert messages and all("\n" not in message for message in messages)


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file grows beyond some bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@EVERY
def test_a_full_disk_leaves_the_old_one_and_nothing_beside_it(tmp_path: Path, name: str) -> None:
    room = room_of(tmp_path, name)
    before = contents(room)
    with full_disk(), pytest.raises((OSError, ValueError), match=r"^[^\n]+$"):
        WRITERS[name](1, room)
    assert contents(room) == before


# Each write in a process that kills itself before what is built takes its place, or before it is on the disk.
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.e2e.test_writers import WRITERS
for name in WRITERS:
    if (child := os.fork()) == 0:
        killed = lambda *arguments, **options: os.kill(os.getpid(), signal.SIGKILL)
        setattr(os, sys.argv[2], killed)
        WRITERS[name](1, Path(sys.argv[1]) / name)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, name
"""


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_kill_9_leaves_every_old_one_and_the_next_write_cleans_up(tmp_path: Path, call: str) -> None:
    before = {}
    for name, write in WRITERS.items():
        (tmp_path / name).mkdir()
        write(0, tmp_path / name)
        before[name] = contents(tmp_path / name)
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path), call]
    subprocess.run(command, check=True, cwd=ROOT)
    for name, write in WRITERS.items():
        room = tmp_path / name
        recover(room)
        left = contents(room)
        assert {path: left[path] for path in before[name]} == before[name], name
        assert all(Path(path).parts[0].startswith(".") for path in left.keys() - before[name].keys()), name
        write(1, room)
        assert contents(room).keys() == before[name].keys(), name
        assert contents(room) != before[name], name


def test_a_picture_that_is_kept_by_its_hash_is_kept_whole_or_not_at_all(tmp_path: Path) -> None:
    with full_disk(), pytest.raises(OSError, match="File too large"):
        keep_input(tmp_path, picture(0))
    assert list((tmp_path / "inputs").iterdir()) == []
    assert (tmp_path / "inputs" / f"{keep_input(tmp_path, picture(0))}.png").is_file()


def test_a_strip_of_previews_on_a_full_disk_stays_as_it_was(tmp_path: Path) -> None:
    save_previews([picture(0)], tmp_path, step=1)
    save_strip(tmp_path)
    save_previews([picture(1)], tmp_path, step=2)
    before = contents(tmp_path)
    with full_disk(), pytest.raises(OSError, match="File too large"):
        save_strip(tmp_path)
    assert contents(tmp_path) == before


def test_a_checkpoint_counts_without_its_line_of_the_curve(tmp_path: Path) -> None:
    """The curve is a log: a line of it may be cut or missing, and a run goes on all the same."""
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer, parts = torch.optim.AdamW([parameter]), {"model": {"a": torch.ones(3)}}
    checkpoints.save(tmp_path, parts, optimizer, checkpoints.Progress(step=1))
    (tmp_path / "curve.jsonl").write_text('{"step": 1, "sec')
    assert checkpoints.resume(tmp_path, parts, optimizer).step == 1
