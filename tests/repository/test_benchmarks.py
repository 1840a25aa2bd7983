"""The benchmarks run from end to end on tiny shapes, and their own comparisons hold."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks import compared_runs, interchange, priors, training_options, views
from benchmarks.layouts_by_family import tables
from benchmarks.peers import __main__ as benchmarks
from benchmarks.peers.memory import kept_for_backward, largest_tensor, peak_of
from benchmarks.peers.timing import compare
from benchmarks.peers.variants import build, check_agreement


@pytest.mark.filterwarnings("ignore")  # other libraries' layers warn
def test_a_quick_run_writes_the_report(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--quick", "--rounds", "2", "--output", str(tmp_path)])
    try:
        assert benchmarks.main() == 0
    finally:
        benchmarks.logging.disable(benchmarks.logging.NOTSET)
    results = json.loads((tmp_path / "bench.json").read_text())
    assert results.keys() == {*benchmarks.PARTS, "machine"}
    text = (tmp_path / "bench.md").read_text()
    assert "## Targets" in text
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".md", ".png"}


def test_variants_that_compute_something_else_are_not_compared() -> None:
    model, x = nn.Sequential(nn.Linear(8, 6)), torch.randn(3, 8)
    variants = build(model, ["0"], ["our DoRA", "our DoRA, exact", "PEFT DoRA"])
    check_agreement(lambda: model(x), model, variants)
    with torch.no_grad():
        variants["our DoRA, exact"].layers["0"].adapter.magnitude.mul_(1.2)
    with pytest.raises(AssertionError, match="our DoRA, exact differs from our DoRA by"):
        check_agreement(lambda: model(x), model, variants)


def test_a_library_that_forgets_the_magnitude_is_not_compared() -> None:
    model, x = nn.Sequential(nn.Linear(768, 320)), torch.randn(64, 768)
    variants = build(model, ["0"], ["PEFT DoRA", "our LoRA"])
    check_agreement(lambda: model(x), model, variants)
    with pytest.raises(AssertionError, match="DoRA without m differs from PEFT DoRA"):
        check_agreement(
            lambda: model(x), model, {"PEFT DoRA": variants["PEFT DoRA"], "DoRA without m": variants["our LoRA"]}
        )


def test_tiny_figures_do_not_replace_full_ones(tmp_path, monkeypatch, capsys) -> None:
    full = json.dumps({"machine": {"rounds": 7}, "n": {}})
    (tmp_path / "bench.json").write_text(full)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--quick", "--only", "n", "--output", str(tmp_path)])
    try:
        with pytest.raises(SystemExit):
            benchmarks.main()
    finally:
        benchmarks.logging.disable(benchmarks.logging.NOTSET)
    assert "do not mix" in capsys.readouterr().err
    assert (tmp_path / "bench.json").read_text() == full


def test_ratios_are_medians_over_medians() -> None:
    found = compare({"a": [1.0, 2.0, 9.0], "b": [2.0, 4.0, 6.0]}, "a")
    assert (found["b"].seconds, found["b"].ratio) == (4.0, 2.0)
    assert found["b"].low <= 2.0 <= found["b"].high


def test_memory_is_counted() -> None:
    x = torch.randn(256, 256, requires_grad=True)
    size = 4 * 256 * 256
    assert kept_for_backward(lambda: x.exp(), [x]) == size
    assert largest_tensor(lambda: x.detach() + 1) == size
    assert peak_of(lambda: (x.detach() + 1) * 2, "cpu") == pytest.approx(2 * size, rel=0.05)


def test_the_table_of_layouts_is_printed_alone(monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["interchange", "--table"])
    monkeypatch.setattr(interchange, "measure", None)  # would take a quarter of an hour
    assert interchange.main() == 0
    assert capsys.readouterr().out == tables() + "\n"


def test_what_views_cost_is_written_down(tmp_path, monkeypatch) -> None:
    (tmp_path / "photos").mkdir()
    for index, size in enumerate([(96, 64), (64, 96)]):
        Image.new("RGB", size, (index * 90, 0, 200)).save(tmp_path / "photos" / f"{index}.png")
    arguments = ["views", str(tmp_path / "photos"), "--steps", "2", "--output", str(tmp_path / "views.md")]
    monkeypatch.setattr(sys, "argv", arguments)
    assert views.main() == 0
    text = (tmp_path / "views.md").read_text()
    assert "| photos | 512 | 2 | 0.0 %, 0.0 % | 33.3 %, 33.3 % |" in text
    assert all(f"| {name} | " in text for name in views.VIEWS)


def test_ten_kills_of_training_runs_leave_what_a_whole_run_leaves(tmp_path) -> None:
    """In a process of its own, which forks: of `make chaos` a slice."""
    command = [sys.executable, "-m", "benchmarks.chaos", "--kills", "10", "--no-full-disk", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, cwd=Path(__file__).parents[2])
    found = json.loads((tmp_path / "chaos.json").read_text())
    assert found["faults"] == [] and done.returncode == 0, done.stderr[-2000:]
    assert found["kills"] >= 10
    assert 2 * found["where"]["while a checkpoint was saved"] >= 10
    assert all(count > 30 for count in found["files"])
    assert "None." in (tmp_path / "chaos.md").read_text()


def test_arms_that_seeds_do_not_agree_on_are_a_tie() -> None:
    assert compared_runs.verdict([0.9, 0.8, 0.9], [0.8, 0.7, 0.85]).startswith("higher, +0.083")
    assert compared_runs.verdict([0.7, 0.6], [0.8, 0.7]).startswith("lower, -0.100")
    assert compared_runs.verdict([0.9, 0.9, 0.7], [0.5, 0.5, 0.8]).startswith("tie, +0.233")
    run = {"before": 0.5, "ceiling": 0.9, "likeness": 0.8, "asked": 0.7, "others": 0.6}
    found = {"none": [run, run], "generated": [{**run, "asked": 0.8}, run]}
    page = compared_runs.report(priors.PAGE, found, "abc", "python -m x")
    assert "| generated against none | tie, +0.000 (+0.000 to +0.000) | tie, +0.050" in page


@pytest.mark.parametrize("arm", list(priors.ARMS))
def test_every_arm_is_a_run_of_its_own(tmp_path, arm: str) -> None:
    config = priors.config_of(arm, 1, tmp_path, {"optim.steps": "20"})
    assert (config.optim.seed, config.optim.steps, config.preview.prompts) == (1, 20, [])
    assert arm.startswith("none") == (config.prior.mode == "generated" and not config.prior.prompts)
    assert len({priors.config_of(name, 1, tmp_path, {}).output_dir for name in priors.ARMS}) == len(priors.ARMS)


@pytest.mark.parametrize("arm", training_options.ARMS)
def test_every_option_is_one_thing_beside_the_run_without(tmp_path, arm: str) -> None:
    rates = {name: tried[1] for name, tried in training_options.RATES.items()}
    plain, config = (training_options.config_of(name, 1, tmp_path, rates) for name in (training_options.ARMS[0], arm))
    told, beside = config.model_dump(), plain.model_dump()
    changed = {section for section in told if told[section] != beside[section]} - {"output_dir"}
    assert len(changed) == (arm != training_options.ARMS[0])
    assert (config.output_dir != plain.output_dir) == bool(changed)
    assert (config.optim.optimizer == arm) == (arm in rates)


def test_the_best_rate_is_that_of_the_highest_likeness(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(
        training_options, "scores_of", lambda config, draws: {"likeness": 1 - abs(config.optim.rate - 3e-4)}
    )
    assert training_options.tuned("lion", tmp_path, 1) == 3e-4
    assert training_options.tuned("prodigy", tmp_path, 1) == 0.5
