"""The script for the day a GPU is lent runs on tiny shapes, and tells what went wrong."""

import json
import sys

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import app as gpu_app
from benchmarks.gpu import hot_swap, report, sections, steps
from benchmarks.gpu.sections import SECTIONS, Outcome, run_apart
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.tests_marked import marked_files, outcome


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # other libraries' layers and compilers warn
@pytest.mark.parametrize("section", list(SECTIONS))
def test_each_section_of_the_gpu_script_runs_on_tiny_shapes(tmp_path, monkeypatch, section: str) -> None:
    """Here, and one of them in a process of its own, as all are on a GPU."""
    arguments = ["--device", "cpu", "--tiny", "--only", section, "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["gpu", *arguments, *([] if section == "app" else ["--here"])])
    assert gpu.main() == 0
    found = json.loads((tmp_path / "gpu.json").read_text())["sections"][section]
    assert found["rows"] and found["error"] is None
    left_out = [row["left_out"] for row in found["rows"] if "left_out" in row]
    assert all("bitsandbytes" in reason or "this version has no" in reason for reason in left_out)
    text = (tmp_path / "gpu.md").read_text()
    assert f"## {SECTIONS[section].title}" in text and "**Tiny shapes" in text


def test_a_section_that_fails_keeps_its_rows_and_spoils_no_other(tmp_path, monkeypatch) -> None:
    def broken(setting: Setting):
        yield {"name": "a row", "left_out": "by choice"}
        raise RuntimeError("no card\nat all")

    row = {"name": "tabs", "device": "cpu", "requests": 2, "done": 2, "median": 0.5, "worst": 1.0, "a_second": 2.0}
    monkeypatch.setattr(hot_swap, "rows", broken)
    monkeypatch.setattr(gpu_app, "rows", lambda setting: iter([row]))
    arguments = ["--device", "cpu", "--tiny", "--here", "--only", "hotswap,app", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["gpu", *arguments])
    assert gpu.main() == 1
    text = (tmp_path / "gpu.md").read_text()
    assert "**Did not come to its end:** RuntimeError: no card\n" in text
    assert "| a row | left out: by choice |" in text
    assert "| tabs | cpu | 2 of 2 | 0.50 s | 1.00 s | 2.00 |" in text


def test_processes_that_fail_or_do_not_end_are_told_of(tmp_path) -> None:
    file = tmp_path / "rows.json"
    failed = run_apart([sys.executable, "-c", "import sys; sys.exit('out of memory')"], file, 60)
    assert (failed.rows, failed.error) == ((), "ended with 1: out of memory")
    file.write_text(json.dumps({"rows": [{"name": "first"}], "error": None}))
    late = run_apart([sys.executable, "-c", "import time; time.sleep(60)"], file, 0.5)
    assert (late.rows, late.error) == (({"name": "first"},), "did not end within 0 s")
    file.write_text(json.dumps({"rows": [{"name": "first", "a": {"b": {"error": "deep"}}}], "error": None}))
    assert run_apart([sys.executable, "-c", ""], file, 60).faults == ["first: deep"]


def test_the_gpu_script_takes_less_than_ten_minutes_and_leaves_out_what_time_is_short_for() -> None:
    assert sum(section.seconds for section in SECTIONS.values()) <= 580
    rows = list(steps.rows(Setting("cpu", False, 0.0)))
    assert len(rows) == 10
    assert all(row["left_out"].startswith("no time was left") for row in rows)


def test_figures_of_a_cpu_are_none_for_the_results(monkeypatch, capsys) -> None:
    monkeypatch.setattr(gpu, "outcome_of", None)  # would take hours
    refused = {("--device", "cpu", "--tiny"): "name another --output", ("--device", "cpu"): "expected --tiny"}
    if not torch.cuda.is_available():
        refused[()] = "torch sees no GPU here"
    for arguments, said in refused.items():
        monkeypatch.setattr(sys, "argv", ["gpu", *arguments])
        with pytest.raises(SystemExit):
            gpu.main()
        assert said in capsys.readouterr().err


def test_what_pytest_says_is_counted() -> None:
    assert "tests/unit/test_gpu.py" in marked_files()
    good = outcome("....s\n4 passed, 1 skipped, 3 deselected in 2.00s\n", 0, needs_passes=True)
    assert (good["passed"], good["failed"], good["skipped"], "error" in good) == (4, 0, 1, False)
    bad = outcome("F.\nFAILED tests/a.py::test_b - assert 1 == 2\n1 failed, 1 passed in 1.00s\n", 1, needs_passes=True)
    assert (bad["failed"], bad["error"]) == (1, "FAILED tests/a.py::test_b - assert 1 == 2")
    assert outcome("24 skipped in 1.00s", 0, needs_passes=True)["error"] == "no test ran: 24 skipped in 1.00s"
    assert "error" not in outcome("24 skipped in 1.00s", 0, needs_passes=False)
    assert outcome("ERROR: no such option", 4, needs_passes=False)["error"] == "ERROR: no such option"


def test_figures_of_a_gpu_are_told_in_their_units() -> None:
    memory = {"name": "SDXL UNet", "checkpointing": True, "estimate": 2**30, "activations": 0}
    adapter = {"seconds": 0.25, "over_peft": 1.02, "low": 1.01, "high": 1.04, "rounds": 5}
    compiled = {"first": 20.0, "seconds": 0.1, "graphs": 2, "recompiled": 0, "peak": 2**21, "over_peft": 0.9}
    rows = (
        {
            "name": "SDXL UNet",
            "way": "bf16",
            "adapters": {"our DoRA": adapter},
            "held": 0,
            "peaks": {"our DoRA": 2**30},
        },
        {"name": "SDXL UNet", "way": "+ compile", "adapters": {"our DoRA": compiled}, "held": None, "peaks": {}},
        {"name": "SDXL UNet", "way": "+ nf4", "error": "OutOfMemoryError: CUDA out of memory"},
    )
    outcomes = {
        "memory": Outcome(({**memory, "measured": 10**9, "error_share": 0.0737},), None, 30.0),
        "steps": Outcome(rows, "did not end within 210 s", 210.0),
    }
    text = report.page(outcomes, {"device": "a card"}, is_tiny=False)
    assert "Tiny" not in text
    assert "| SDXL UNet | yes | 1,024 MiB | 954 MiB | +7.4 % |" in text
    assert "| SDXL UNet | bf16 | our DoRA | 250.0 ms | 1.020 (1.010-1.040) | 1,024 MiB |  |" in text
    assert "| our DoRA | 100.0 ms | 0.900 | 2 MiB | 20.0 s, 2 graphs, then 0 more |" in text
    assert "| SDXL UNet | + nf4 | **OutOfMemoryError: CUDA out of memory** |" in text
    assert "did not end within 210 s; SDXL UNet: OutOfMemoryError" in text
    assert [sections.errors_of(row) for row in rows] == [[], [], ["OutOfMemoryError: CUDA out of memory"]]
