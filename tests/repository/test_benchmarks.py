"""The benchmarks run from end to end on tiny shapes, and their own comparisons hold."""

import json
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks import interchange, priors, views
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import app as gpu_app
from benchmarks.gpu import hot_swap, report, sections, steps
from benchmarks.gpu.sections import SECTIONS, Outcome, run_apart
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.tests_marked import marked_files, outcome
from benchmarks.layouts_by_family import tables
from benchmarks.peers import __main__ as benchmarks
from benchmarks.peers.memory import kept_for_backward, largest_tensor, peak_of
from benchmarks.peers.timing import compare
from benchmarks.peers.variants import build, check_agreement
from benchmarks.training import __main__ as training
from benchmarks.training import beside, clock
from benchmarks.training.bases import pictures, pocket
from benchmarks.training.clock import Stopwatch, Turn, Way, alternate, quietest, ratio, share
from benchmarks.training.dreambooth import DreamBoothLora, Recipe, lora_layers, pixels_of
from benchmarks.training.parts import LISTED, spread_outside
from benchmarks.training.report import verdict


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


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that is a second later at every look, so that no clock decides a test."""
    looks = count()
    monkeypatch.setattr(clock, "user_seconds", lambda: float(next(looks)))


@pytest.mark.usefixtures("ticks")
@pytest.mark.filterwarnings("ignore")  # other libraries' layers warn
def test_a_quick_run_of_the_training_benchmark_writes_its_page(tmp_path, monkeypatch) -> None:
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["training", "--quick", "--rounds", "2", "--output", str(tmp_path)])
    try:
        assert training.main() == 0
    finally:
        benchmarks.logging.disable(benchmarks.logging.NOTSET)
        torch.set_num_threads(threads)
    results = json.loads((tmp_path / "training.json").read_text())
    assert results.keys() == {*training.PARTS, "machine"}
    for case in results["beside"]:
        looks = {name: way["seconds"]["median"] for name, way in case["ways"].items()}
        parts = {
            name: {part: share["median"] * looks[name] for part, share in case["ways"][name]["shares"].items()}
            for name in (beside.RECIPE, beside.DORA)
        }  # a part that comes once has one tick: the recipe reads pictures, latents and text in three
        assert parts[beside.DORA] == pytest.approx(dict.fromkeys(LISTED, 1))
        assert parts[beside.RECIPE] == pytest.approx(dict.fromkeys(LISTED, 1) | {"norms": 0, "batch": 3})
    assert (results["validation"]["steps"], results["validation"]["times"]) == (1000, 11)
    text = (tmp_path / "training.md").read_text()
    assert "| SD1.5's step over PEFT LoRA's | <= 1.05 | " in text
    assert text.count("| our DoRA's step over diffusers' LoRA recipe; ") == 3


def test_the_quietest_rounds_are_the_same_for_all() -> None:
    quiet, loud = ({"a": Turn(1.0, {}), "b": Turn(2.0, {})}, {"a": Turn(1.5, {}), "b": Turn(9.0, {})})
    flattering = {"a": Turn(9.0, {}), "b": Turn(1.0, {})}  # the fastest b, beside the slowest a
    assert quietest([loud, quiet, flattering]) == [quiet]
    found = ratio([quiet, loud], "b", "a")
    assert (found.median, found.low, found.high) == (4.0, 3.0, 5.0)


@pytest.mark.usefixtures("ticks")
def test_ways_take_turns_and_their_parts_are_told() -> None:
    watch, order = Stopwatch(), []

    def work(name: str) -> None:
        order.append(name)
        watch.around("part", lambda: None)()

    rounds = alternate({name: Way(lambda name=name: work(name)) for name in "ab"}, rounds=2, watch=watch)
    assert "".join(order) == "ab" + "ab" + "ba"  # once to warm up
    assert [turn for turns in rounds for turn in turns.values()] == [Turn(3.0, {"part": 1.0})] * 4
    assert share(rounds, "a", ["part", "never"]).median == pytest.approx(1 / 3)


def test_what_lies_outside_counts_captions_that_are_encoded_ahead() -> None:
    turns = {"way": Turn(10.0, {"forward": 4.0, "backward": 4.0, "norms": 1.0}), beside.CAPTION: Turn(5.0, {})}
    assert spread_outside([turns], "way", ["forward", "backward"], 0).median == pytest.approx(0.2)
    assert spread_outside([turns], "way", ["forward", "backward", "norms"], 0).median == pytest.approx(0.1)
    assert spread_outside([turns], "way", ["forward", "backward"], 2).median == pytest.approx(1 - 8 / 20)


def test_a_target_is_open_between_its_quartiles() -> None:
    assert [verdict({"low": 1.0, "high": high, "rounds": 4}, 1.05) for high in (1.05, 1.06)] == ["yes", "open"]
    assert verdict({"low": 1.06, "high": 1.2, "rounds": 4}, 1.05) == "no"
    assert [verdict({"low": value, "high": value, "rounds": 3}, 1.05) for value in (0.9, 1.2)] == ["open", "open"]


@pytest.mark.parametrize("precomputes", [False, True])
def test_the_recipe_trains_what_the_script_trains(tmp_path, precomputes: bool) -> None:
    pipe = pocket().pipe
    layers = lora_layers(pipe.unet, 4)
    recipe = Recipe(pictures(tmp_path / "photos", 128, 4), "a cat", 128, 2, 4, precomputes)
    read = []
    pipe.text_encoder.register_forward_hook(lambda *_: read.append(1))
    torch.manual_seed(0)
    trainer = DreamBoothLora(pipe, recipe, Stopwatch())
    before = [parameter.detach().clone() for parameter in trainer.parameters]
    losses = [trainer.take() for _ in range(3)]
    assert all(0 < loss < 10 for loss in losses)
    assert len(read) == (1 if precomputes else 3)
    assert len(before) == 2 * len(layers) == 144
    assert not any(torch.equal(old, new) for old, new in zip(before, trainer.parameters, strict=True))
    assert not any(parameter.requires_grad for parameter in (*pipe.vae.parameters(), *pipe.text_encoder.parameters()))


def test_the_recipes_pictures_are_random_squares() -> None:
    wide = Image.new("RGB", (40, 20), (255, 0, 0))
    wide.paste((0, 0, 255), (20, 0, 40, 20))
    torch.manual_seed(0)
    crops = [pixels_of(wide, 10) for _ in range(20)]
    assert {tuple(crop.shape) for crop in crops} == {(3, 10, 10)}
    assert len({float(crop[0].mean()) for crop in crops}) > 3
    assert all(float(crop.min()) >= -1 and float(crop.max()) <= 1 for crop in crops)


def test_sides_that_train_other_layers_are_not_compared(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("benchmarks.training.dreambooth.TARGETS", ["to_q"])
    with pytest.raises(AssertionError, match="the two train other layers"):
        beside.steps_in_turns(beside.Case(pocket(), 1), tmp_path, rounds=1)


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


def test_in_bf16_variants_that_it_cannot_tell_apart_are_no_fault() -> None:
    model, x = nn.Sequential(nn.Linear(8, 6)).bfloat16(), torch.zeros(3, 8, dtype=torch.bfloat16)
    variants = build(model, ["0"], ["our LoRA", "our DoRA"])
    for variant in variants.values():
        variant.layers["0"].base.bias.data.fill_(1.0)  # an answer that no adapter changes
    check_agreement(lambda: model(x), model, variants)


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
    assert priors.verdict([0.9, 0.8, 0.9], [0.8, 0.7, 0.85]).startswith("higher, +0.083")
    assert priors.verdict([0.7, 0.6], [0.8, 0.7]).startswith("lower, -0.100")
    assert priors.verdict([0.9, 0.9, 0.7], [0.5, 0.5, 0.8]).startswith("tie, +0.233")
    run = {"before": 0.5, "ceiling": 0.9, "likeness": 0.8, "asked": 0.7, "others": 0.6}
    page = priors.report({"none": [run, run], "generated": [{**run, "asked": 0.8}, run]}, "abc", "python -m x")
    assert "| generated against none | tie, +0.000 (+0.000 to +0.000) | tie, +0.050" in page


@pytest.mark.parametrize("arm", list(priors.ARMS))
def test_every_arm_is_a_run_of_its_own(tmp_path, arm: str) -> None:
    config = priors.config_of(arm, 1, tmp_path, {"optim.steps": "20"})
    assert (config.optim.seed, config.optim.steps, config.preview.prompts) == (1, 20, [])
    assert arm.startswith("none") == (config.prior.mode == "generated" and not config.prior.prompts)
    assert len({priors.config_of(name, 1, tmp_path, {}).output_dir for name in priors.ARMS}) == len(priors.ARMS)


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
