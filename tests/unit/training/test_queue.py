"""`train a.yaml b.yaml`: what is refused at once, what goes on after a failure, and how a queue ends."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from dora_diffusion.cli import main
from dora_diffusion.pretrain.scenes import background
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.run import queue
from dora_diffusion.training.run.queue import Ended, Queued, check_queue, queue_of, run_queue, summary
from tests.pocket_random import random_pocket_pipeline

PATIENCE = 60.0


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    random_pocket_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def images(tmp_path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    background("beach", 64).save(folder / "one.png")
    return folder


def config_file(folder: Path, name: str, base: Path, **sections) -> Path:
    """A run of two steps, in a folder by its own name."""
    config = TrainConfig.model_validate(
        {
            "model": str(base),
            "output_dir": folder / "runs" / name,
            "data": {"instance_dir": folder / "images", "instance_prompt": "a cat", "resolution": 32},
            "adapter": {"rank": 2},
            "optim": {"steps": 2, **sections.pop("optim", {})},
            "validation": {"every": 0, "repeats": 1},
            **sections,
        }
    )
    file = folder / f"{name}.yaml"
    file.write_text(config.to_yaml())
    return file


def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *scripts: str) -> list[Queued]:
    """Runs that do what a script says instead of training; `PLACE` in it is a folder."""
    (tmp_path / "images").mkdir(exist_ok=True)
    runs, commands = [], {}
    for number, script in enumerate(scripts):
        file = config_file(tmp_path, f"run{number}", Path("pocket"))
        runs.append(Queued(file, TrainConfig.from_yaml(file)))
        code = textwrap.dedent(script).replace("PLACE", str(tmp_path))
        commands[file] = [sys.executable, "-c", code]
    monkeypatch.setattr(Queued, "command", property(lambda run: commands[run.file]))
    return runs


def until(path: Path) -> None:
    end = time.monotonic() + PATIENCE
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.01)


def test_a_run_is_asked_for_as_it_would_be_alone(tmp_path, images, base) -> None:
    begun, new = (config_file(tmp_path, name, base) for name in ("begun", "new"))
    (tmp_path / "runs" / "begun" / "checkpoints" / "step-00000001").mkdir(parents=True)
    configs = {file: TrainConfig.from_yaml(file) for file in (begun, new)}
    settings = ["--optim.steps", "3"]
    first, second = queue_of(configs, resume="latest", accept_changes=True, settings=settings)
    program = [sys.executable, "-m", "dora_diffusion.cli", "train"]
    own = ["--resume", "latest", "--accept-changes"]
    assert first.command == [*program, str(begun), "--end-with-stdin", *own, *settings]
    assert second.command == [*program, str(new), "--end-with-stdin", *settings]
    extended = queue_of(configs, extend=9)
    assert [run.command[-2:] for run in extended] == [["--extend", "9"]] * 2


def test_a_failure_does_not_keep_the_others_and_is_told_in_one_line(tmp_path, monkeypatch, capfd) -> None:
    runs = scripted(
        tmp_path,
        monkeypatch,
        """
        from pathlib import Path
        Path("PLACE/runs/run0").mkdir(parents=True)
        Path("PLACE/runs/run0/adapter.safetensors").write_bytes(b"")
        """,
        """
        import sys
        print("training:  50%| 1/2 [00:01, 1.00it/s]", file=sys.stderr)
        print("dora-diffusion: the disk is full", file=sys.stderr)
        print("a warning that comes late", file=sys.stderr)
        sys.exit(2)
        """,
        "raise RuntimeError('out of luck')",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "pass",
    )
    ended = run_queue(runs)
    assert [(end.status, end.word) for end in ended] == [
        *((0, "done"), (2, "failed"), (1, "failed"), (-9, "failed"), (0, "done"))
    ]
    told = summary(runs, ended).splitlines()
    assert told[0] == "queue      2 of 5 done"
    assert told[1].endswith(f"done     {tmp_path / 'runs' / 'run0' / 'adapter.safetensors'}")
    assert told[2].endswith("failed   the disk is full")
    assert told[3].endswith("failed   RuntimeError: out of luck")
    assert told[4].endswith("failed   killed by SIGKILL; the system does so where memory runs out")
    passed_on = capfd.readouterr()
    assert "a warning that comes late" in passed_on.err and "queue      3 of 5: " in passed_on.out


@pytest.mark.usefixtures("plain_signals")
def test_a_signal_reaches_the_run_once_and_ends_the_queue(tmp_path, monkeypatch) -> None:
    runs = scripted(
        tmp_path,
        monkeypatch,
        """
        import signal, sys, time
        from pathlib import Path
        asked = []
        signal.signal(signal.SIGINT, lambda *_: asked.append(1))
        Path("PLACE/ready").touch()
        while not asked:
            time.sleep(0.01)
        time.sleep(0.3)
        Path("PLACE/asked").write_text(str(len(asked)))
        sys.exit(130)
        """,
        "from pathlib import Path; Path('PLACE/second').touch()",
    )

    def press() -> None:
        until(tmp_path / "ready")
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    ended = run_queue(runs)
    thread.join()
    assert [end.word for end in ended] == ["stopped", "waits"]
    assert (tmp_path / "asked").read_text() == "1"
    assert not (tmp_path / "second").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_that_somebody_else_ended_does_not_end_the_queue(tmp_path, monkeypatch) -> None:
    runs = scripted(tmp_path, monkeypatch, "import os; os.kill(os.getpid(), 15)", "pass")
    assert [end.word for end in run_queue(runs)] == ["stopped", "done"]


def test_what_a_run_watches_closes_when_the_queue_is_killed(tmp_path) -> None:
    script = f"""
        import sys
        from pathlib import Path
        from dora_diffusion.training.config import TrainConfig
        from dora_diffusion.training.run.queue import Queued, run_queue
        child = "import sys; from pathlib import Path; Path('{tmp_path}/ready').touch(); sys.stdin.read(); " \\
            "Path('{tmp_path}/closed').touch()"
        Queued.command = property(lambda run: [sys.executable, "-c", child])
        run_queue([Queued(Path("a.yaml"), None)])
        """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], start_new_session=True) as process:
        until(tmp_path / "ready")
        assert not (tmp_path / "closed").exists()
        process.kill()
    until(tmp_path / "closed")


def test_a_mistake_in_the_last_is_told_before_the_first_begins(tmp_path, images, base, capsys) -> None:
    first = config_file(tmp_path, "first", base)
    typo = config_file(tmp_path, "typo", base)
    typo.write_text(typo.read_text().replace("rank: 2", "rnk: 2"))
    assert main(["train", str(first), str(typo)]) == 2
    assert "typo.yaml" in (said := capsys.readouterr().err) and "did you mean adapter.rank?" in said
    lost = config_file(tmp_path, "lost", base, adapter={"rank": 2, "target_modules": ["to_nowhere"]})
    assert main(["train", str(first), str(lost)]) == 2
    assert f"{lost}: target_modules: 'to_nowhere' matches no layer" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_what_cannot_be_a_queue_is_refused(tmp_path, images, base, capsys, monkeypatch) -> None:
    one, two = (config_file(tmp_path, name, base) for name in ("one", "two"))
    assert main(["train", str(one), str(two), "--output_dir", str(tmp_path / "same")]) == 2
    assert f"{two}: output_dir: {tmp_path / 'same'} is that of {one} too" in capsys.readouterr().err
    assert main(["train", str(one), str(one)]) == 2
    assert f"{one}: named twice" in capsys.readouterr().err
    assert main(["train", str(one), str(two), "--accept-changes"]) == 2
    assert "expected --resume latest" in capsys.readouterr().err
    (tmp_path / "runs" / "two" / "checkpoints" / "step-00000001").mkdir(parents=True)
    assert main(["train", str(one), str(two)]) == 2
    assert f"{two}: {tmp_path / 'runs' / 'two'}: holds checkpoints of an earlier run" in capsys.readouterr().err
    runs = [Queued(file, TrainConfig.from_yaml(file)) for file in (one, two)]
    with pytest.raises(ValueError, match="under accelerate launch name one config"):
        check_queue(runs, {"WORLD_SIZE": "2"})


def test_a_run_may_start_from_one_before_it(tmp_path, images, base) -> None:
    first = config_file(tmp_path, "first", base)
    start = tmp_path / "runs" / "first" / "adapter.safetensors"
    second = config_file(tmp_path, "second", base, adapter={"rank": 2, "start": start})
    configs = {file: TrainConfig.from_yaml(file) for file in (first, second)}
    check_queue(queue_of(configs))
    with pytest.raises(ValueError, match="second.yaml: .*adapter.safetensors"):
        check_queue(queue_of(dict(reversed(configs.items()))))


def test_plans_of_a_queue_are_printed_one_after_another(tmp_path, images, base, capsys) -> None:
    files = [str(config_file(tmp_path, name, base)) for name in ("one", "two")]
    assert main(["train", *files, "--dry-run", "--optim.steps", "7"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[1] for line in out.splitlines() if line.startswith("queue")] == files
    assert out.count("steps      7 of 1 x 1") == 2 and out.count("memory  ") == 2
    assert not (tmp_path / "runs").exists()


def test_the_exit_status_says_whether_any_failed(tmp_path, images, base, monkeypatch, capsys) -> None:
    files = [str(config_file(tmp_path, name, base)) for name in ("one", "two")]

    def status(*ends: Ended) -> int:
        monkeypatch.setattr(queue, "run_queue", lambda runs: list(ends))
        return main(["train", *files])

    assert status(Ended(0), Ended(0)) == 0
    assert status(Ended(2, "why"), Ended(0)) == 1
    assert status(Ended(130), Ended(None)) == 130
    assert "waits" in capsys.readouterr().out


@pytest.mark.slow
def test_runs_of_a_queue_are_those_that_they_are_alone(tmp_path, images, base, capfd) -> None:
    wild = {"learning_rate": 1e30, "lr_scheduler": "constant", "steps": 6}
    files = [
        config_file(tmp_path, "one", base),
        config_file(tmp_path, "wild", base, optim=wild, guard={"restores": 0, "skips": 1, "window": 2}),
        config_file(tmp_path, "two", base, optim={"seed": 1}),
    ]
    assert main(["train", *map(str, files)]) == 1
    told = capfd.readouterr().out
    assert "queue      2 of 3 done" in told and "failed   step " in told
    for name in ("one", "two"):
        alone = config_file(tmp_path, f"alone-{name}", base, optim={"seed": int(name == "two")})
        assert main(["train", str(alone)]) == 0
        adapters = [tmp_path / "runs" / run / "adapter.safetensors" for run in (name, f"alone-{name}")]
        assert adapters[0].read_bytes() == adapters[1].read_bytes()
