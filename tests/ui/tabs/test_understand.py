"""Ranges, the cells of a map, the mix without each adapter, and what an adapter's page says; without a browser."""

import itertools
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from dora_diffusion.generation.generate import GenerationSettings, GenerationStopped
from ui.backend.request import AdapterChoice, DrawRequest, Parts, SlotValues, check_adapters
from ui.backend.run import Update
from ui.backend.session import Session
from ui.backend.tags import resolve_tags
from ui.generate.controls import Stops, Variations
from ui.generate.stage import ProgressView, build_stage, status_of
from ui.tabs import leave_one_out, weight_grid
from ui.tabs.axes import MAX_CELLS, parse_range
from ui.tabs.inspect_page import facts_of, interference_of, plot_of
from ui.tabs.leave_one_out import leave_each_out, mean_difference, names_in, row_html
from ui.tabs.weight_grid import build_weight_grid, map_html, picked_slots
from ui.tabs.weight_grid_cells import A_B, ADAPTER_WEIGHT, Axes, Cell, plan, request_of, save_sheet

PARTS = Parts("unet", ("text_encoder",))
SETTINGS = GenerationSettings("a cat", seed=3, steps=2)


def _slot(file: str | None, strength: float = 1.0, *, enabled: bool = True, solo: bool = False) -> SlotValues:
    return SlotValues(file, enabled, strength, False, 1.0, 1.0, solo=solo)


RACK = (_slot("ink", 0.8), _slot("lego", -0.5), _slot(None))


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("-1..1/0.5", (-1.0, -0.5, 0.0, 0.5, 1.0)),
        ("1..-1/1", (1.0, 0.0, -1.0)),
        ("0, .5, 1", (0.0, 0.5, 1.0)),
        ("0..0.3/0.1", (0.0, 0.1, 0.2, 0.3)),
        ("0..1/0.4", (0.0, 0.4, 0.8)),
        (" 2 ,, 0..1/1, 1", (2.0, 0.0, 1.0)),
        ("-0, 0", (0.0,)),
        ("0.5..0.5/1", (0.5,)),
    ],
)
def test_ranges(text: str, values: tuple[float, ...]) -> None:
    assert parse_range(text) == values


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "expected such as"),
        ("", "expected such as"),
        (",,", "commas only"),
        ("x", "expected a number"),
        ("nan", "expected a number"),
        ("inf..1/1", "expected a number"),
        ("-3..1/1", "from -2 to 2"),
        ("1e999999999", "from -2 to 2"),
        ("0..1", "has no step"),
        ("0..1/0", "got step"),
        ("0..1/-1", "got step"),
        ("0..1/1e-999999", "got step"),
        ("0..1/0.25/2", "expected a number"),
        ("-2..2/0.01", "has 401 numbers"),
        ("0..1/0.02, -1..-0.5/0.02", "more than 64"),
        ("0," * 200, "400 characters"),
        (["0"], "list"),
    ],
)
def test_what_is_no_range_is_told_in_one_line(text: object, complaint: str) -> None:
    with pytest.raises(ValueError, match="^weights: ") as caught:
        parse_range(text)
    assert complaint in str(caught.value) and "\n" not in str(caught.value)


def test_a_map_of_adapters_and_weights_keeps_the_rest_of_the_mix() -> None:
    rows = plan(Axes(ADAPTER_WEIGHT, (), (0.0, 1.5)), RACK)
    assert [[cell.label for cell in row] for row in rows] == [
        ["ink: off", "ink: 0", "ink: 1.5"],
        ["lego: off", "lego: 0", "lego: 1.5"],
    ]
    assert [row[0].is_baseline for row in rows] == [True, True]
    assert _mix(rows[0][2]) == {"ink": 1.5, "lego": -0.5}
    assert _mix(rows[1][0]) == {"ink": 0.8}


def test_a_map_without_the_others_starts_at_the_base() -> None:
    rows = plan(Axes(ADAPTER_WEIGHT, (), (1.5,), alone=True), RACK)
    assert [[_mix(cell) for cell in row] for row in rows] == [[{}, {"ink": 1.5}], [{}, {"lego": 1.5}]]


def test_a_map_of_two_crosses_their_weights() -> None:
    rows = plan(Axes(A_B, ("lego", "ink"), (0.25, 2.0), (-1.0, 1.0)), RACK)
    assert [[_mix(cell) for cell in row] for row in rows] == [
        [{"lego": -1.0}, {"lego": -1.0, "ink": 0.25}, {"lego": -1.0, "ink": 2.0}],
        [{"lego": 1.0}, {"lego": 1.0, "ink": 0.25}, {"lego": 1.0, "ink": 2.0}],
    ]
    assert rows[0][1].label == "lego -1: ink 0.25"


def _mix(cell: Cell) -> dict[str, Any]:
    """What a cell's slots draw."""
    return {choice.file: choice.weight for choice in check_adapters(cell.slots, PARTS) if choice.draws}


def test_a_map_takes_solo_off_and_other_adapters_into_free_slots() -> None:
    rack = (_slot("ink", 0.8, solo=True), _slot("lego"), _slot(None))
    (row,) = plan(Axes(ADAPTER_WEIGHT, ("new",), (1.0,)), rack)
    assert _mix(row[0]) == {"ink": 0.8}
    assert _mix(row[1]) == {"ink": 0.8, "new": 1.0}
    with pytest.raises(ValueError, match="new: the rack has no free slot"):
        plan(Axes(ADAPTER_WEIGHT, ("new",), (1.0,)), rack[:2])


def test_a_map_is_bounded_and_needs_its_adapters() -> None:
    with pytest.raises(ValueError, match="2 x 41 cells .* at most 64"):
        plan(Axes(ADAPTER_WEIGHT, (), tuple(index / 40 for index in range(40))), RACK)
    with pytest.raises(ValueError, match="got 0 adapters, expected 1"):
        plan(Axes(ADAPTER_WEIGHT, (), (1.0,)), (_slot(None),))
    with pytest.raises(ValueError, match="got 1 adapters, expected 2"):
        plan(Axes(A_B, ("ink",), (1.0,), (1.0,)), RACK)
    with pytest.raises(ValueError, match="expected one of"):
        plan(Axes("<b>", (), (1.0,)), RACK)
    assert MAX_CELLS == 64


def test_the_map_is_drawn_saved_and_picked(session: Session, tmp_path: Path) -> None:
    axes = Axes(ADAPTER_WEIGHT, (), (0.0, 1.0), alone=True)
    rows = plan(axes, RACK)
    resolved = resolve_tags(DrawRequest(SETTINGS), session.library.usable, session.parts)
    draw = Variations(session, tmp_path / "out" / "maps", threading.Event())
    cells = [cell for row in rows for cell in row]
    pictures = [draw.draw(request_of(cell, resolved, session.parts, alone=True)) for cell in cells]
    assert len({*pictures}) == 3  # the base of both rows, and of strength 0, is drawn once
    assert pictures[0] == pictures[1] == pictures[3] == pictures[4]
    sheet = save_sheet(rows, pictures, resolved, axes, session)
    with Image.open(sheet) as opened:
        record = json.loads(opened.info["weight_map"])
        assert json.loads(opened.info["dora_diffusion"])["settings"]["seed"] == 3
        with Image.open(pictures[0]) as one:
            assert opened.width >= 3 * one.width and opened.height > 2 * one.height
    assert record["axes"]["across"] == [0.0, 1.0]
    assert [[use["name"] for use in cell["adapters"]] for cell in record["cells"]] == [
        [],
        [],
        ["ink"],
        [],
        [],
        ["lego"],
    ]
    html = map_html(rows, pictures[:4])
    assert html.count("<img") == 4 and html.count("pending") == 2
    known = tuple(cell.slots for cell in cells)
    assert picked_slots("2:17", known) == cells[2].slots
    for wrong in ("6:1", "-1:1", "x", "", None, 2, "²:1", "0003:1"):
        with pytest.raises(ValueError, match="expected one of its 6 cells"):
            picked_slots(wrong, known)


def _first_cells(session: Session, failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the drawing numbered `failing`, from 0, fail."""
    draw, drawn = session.draw, itertools.count()

    def fails(request: DrawRequest, **options: Any) -> Any:
        if next(drawn) == failing:
            raise ValueError("lego: the file is gone")
        return draw(request, **options)

    monkeypatch.setattr(session, "draw", fails)


def test_a_map_that_breaks_off_says_so(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    with gr.Blocks():
        board = build_weight_grid(session)
    resolved = resolve_tags(DrawRequest(SETTINGS), session.library.usable, PARTS)
    rows = plan(Axes(ADAPTER_WEIGHT, ("ink",), (1.0, 2.0)), RACK)
    wanted = weight_grid._Plan(Axes(ADAPTER_WEIGHT, ("ink",), (1.0, 2.0)), rows, resolved, session.parts)
    _first_cells(session, 2, monkeypatch)
    changed = weight_grid._drawing(
        board, session, wanted, Variations(session, session.output / "maps", threading.Event())
    )
    last: dict[Any, Any] = {}
    with pytest.raises(ValueError, match="the file is gone"):
        for changes in changed:
            last |= changes
    assert "Nothing more was drawn: 2 of 3 cells are there, and no sheet" in last[board.status]
    assert last[board.sheet].count("<img") == 2


def test_a_row_that_breaks_off_says_so(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    with gr.Blocks():
        board = leave_one_out.build_leave_one_out()
    request = DrawRequest(SETTINGS, (AdapterChoice("ink", 0.8), AdapterChoice("lego", -0.5)))
    _first_cells(session, 1, monkeypatch)
    changed = leave_one_out._drawing(
        board, request, ["#1 ink", "#2 lego"], Variations(session, session.output, threading.Event())
    )
    last: dict[Any, Any] = {}
    with pytest.raises(ValueError, match="the file is gone"):
        for changes in changed:
            last |= changes
    assert "Nothing more was drawn: 1 of 3 pictures" in last[board.status]


def test_cells_have_the_tags_of_the_prompt_unless_alone(session: Session) -> None:
    request = DrawRequest(GenerationSettings("a cat <lora:lego:0.7>", steps=2))
    resolved = resolve_tags(request, session.library.usable, session.parts)
    ((_, cell),) = plan(Axes(ADAPTER_WEIGHT, ("ink",), (1.0,)), (_slot(None),))
    kept = request_of(cell, resolved, session.parts, alone=False)
    assert [(choice.file, choice.weight) for choice in kept.adapters] == [("ink", 1.0), ("lego", 0.7)]
    assert kept.settings.prompt == "a cat"
    assert [choice.file for choice in request_of(cell, resolved, session.parts, alone=True).adapters] == ["ink"]


def _drawn(
    axes: Axes, rack: tuple[SlotValues, ...], prompt: str = "a <lora:ink:0.25> <lora:lego:0.75>"
) -> list[list[dict[str, Any]]]:
    """What the cells of a map draw."""
    request = DrawRequest(GenerationSettings(prompt), check_adapters(rack, PARTS))
    resolved = resolve_tags(request, ("ink", "lego", "clay"), PARTS)
    rows = [[request_of(cell, resolved, PARTS, alone=axes.alone) for cell in row] for row in plan(axes, rack)]
    return [[{choice.file: choice.weight for choice in cell.adapters} for cell in row] for row in rows]


@pytest.mark.parametrize("silent", [_slot("lego", enabled=False), _slot("lego")], ids=["off", "silenced by solo"])
def test_cells_have_the_tags_of_slots_that_take_no_part(silent: SlotValues) -> None:
    rack = (replace(_slot("clay", 0.5), solo=silent.enabled), silent, _slot(None))
    assert _drawn(Axes(ADAPTER_WEIGHT, ("ink",), (1.0,)), rack) == [
        [{"clay": 0.5, "lego": 0.75}, {"clay": 0.5, "ink": 1.0, "lego": 0.75}]
    ]
    assert _drawn(Axes(ADAPTER_WEIGHT, ("ink",), (1.0,), alone=True), rack) == [[{}, {"ink": 1.0}]]


def test_a_tag_brings_no_varied_adapter_back() -> None:
    for rack in ((_slot(None), _slot(None)), (_slot("ink", 0.8, enabled=False), _slot("lego", 0.5))):
        lego = 0.5 if rack[1].file else 0.75
        for alone, others in ((False, {"lego": lego}), (True, {})):
            axes = Axes(ADAPTER_WEIGHT, ("ink",), (0.0, 1.0), alone=alone)
            assert _drawn(axes, rack) == [[others, others, {**others, "ink": 1.0}]]


def test_a_row_varies_its_own_adapter_only() -> None:
    rack = (_slot(None), _slot(None))
    assert _drawn(Axes(ADAPTER_WEIGHT, ("ink", "clay"), (1.0,)), rack) == [
        [{"lego": 0.75}, {"lego": 0.75, "ink": 1.0}],
        [{"ink": 0.25, "lego": 0.75}, {"clay": 1.0, "ink": 0.25, "lego": 0.75}],
    ]


@pytest.mark.parametrize(("alone", "others"), [(False, {"clay": 0.5}), (True, {})])
def test_a_map_of_two_has_neither_by_its_tag(alone: bool, others: dict[str, float]) -> None:
    rack = (_slot("clay", 0.5), _slot("ink", 0.0), _slot("lego", enabled=False))
    axes = Axes(A_B, ("ink", "lego"), (1.0,), (0.0, 2.0), alone=alone)
    assert _drawn(axes, rack) == [
        [others, {**others, "lego": 1.0}],
        [{**others, "ink": 2.0}, {**others, "ink": 2.0, "lego": 1.0}],
    ]


def test_a_map_draws_what_the_page_would_with_the_cell_in_its_rack() -> None:
    rack = (_slot("clay", 0.5), _slot("ink", enabled=False), _slot("ink", 0.8), _slot("lego", enabled=False))
    page = DrawRequest(GenerationSettings("a <lora:ink:0.25> <lora:lego:0.75>"), check_adapters(rack, PARTS))
    resolved = resolve_tags(page, ("ink", "lego", "clay"), PARTS)
    for kind, files in ((ADAPTER_WEIGHT, ("ink", "lego")), (A_B, ("lego", "ink"))):
        axes = Axes(kind, files, (0.0, 1.0), (0.0, 1.0))
        for cell in (cell for row in plan(axes, rack) for cell in row):
            drawn = request_of(cell, resolved, PARTS, alone=False)
            loaded = replace(page, adapters=check_adapters(cell.slots, PARTS))
            assert drawn == resolve_tags(loaded, ("ink", "lego", "clay"), PARTS).request


def test_leave_one_out_says_what_each_does(session: Session, tmp_path: Path) -> None:
    request = DrawRequest(SETTINGS, (AdapterChoice("ink", 0.8), AdapterChoice("lego", -0.5)))
    names = names_in(request, (_slot(None), _slot("ink"), _slot("lego")))
    assert names == ["#2 ink", "#3 lego"]
    silenced = (_slot("clay", solo=True), _slot("ink"), _slot("lego", solo=True))
    assert names_in(request, silenced) == ["ink (of the prompt)", "#3 lego"]
    *_, row = leave_each_out(request, names, Variations(session, tmp_path / "out", threading.Event()))
    assert [entry.caption for entry in row] == ["all of them", "without #2 ink", "without #3 lego"]
    assert row[0].difference is None
    assert all(entry.difference and entry.difference > 0 for entry in row[1:])
    (alone,) = session.draw(DrawRequest(SETTINGS, (AdapterChoice("lego", -0.5),)))
    with Image.open(row[1].picture) as picture:
        assert picture.tobytes() == alone.image.tobytes()
    assert "mean difference" in row_html(row)


def test_nothing_to_leave_out_is_told(session: Session, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to leave out"):
        list(leave_each_out(DrawRequest(SETTINGS), [], Variations(session, tmp_path, threading.Event())))


def test_mean_difference(tmp_path: Path) -> None:
    for name, colour in (("black", (0, 0, 0)), ("red", (90, 0, 0))):
        Image.new("RGB", (4, 4), colour).save(tmp_path / f"{name}.png")
    assert mean_difference(tmp_path / "black.png", tmp_path / "red.png") == 30.0
    assert mean_difference(tmp_path / "red.png", tmp_path / "red.png") == 0.0


def test_a_stop_ends_variations_of_its_own_tab_only(session: Session, tmp_path: Path) -> None:
    stops = Stops()
    with stops.running("a") as first, stops.running("b") as other, stops.running("a") as second:
        assert first.is_set() and not second.is_set()
        stops.stop("a")
        assert second.is_set() and not other.is_set()
        with pytest.raises(GenerationStopped):
            Variations(session, tmp_path, second).draw(DrawRequest(SETTINGS))
    stops.stop("a")
    assert other.is_set()


def test_the_page_of_an_adapter(session: Session, adapters: Path) -> None:
    html = facts_of(session, "ink")
    for part in ("DoRA", "rank 4", "88 of 88 layers", "unet", "text_encoder"):
        assert part in html
    tensors = load_file(adapters / "ink.safetensors")
    evil = {"modelspec.title": "<script>alert(1)</script>", "ss_tag_frequency": "x" * 9000}
    save_file(tensors, adapters / "evil.safetensors", metadata=evil)
    session.library.refresh()
    html = facts_of(session, "evil")
    assert "<script>" not in html and "&lt;script&gt;" in html and "9,000 characters" in html
    for wrong in ("broken", "../ink", "/etc/passwd", None, 3, ["ink"]):
        with pytest.raises(ValueError):
            facts_of(session, wrong)


def test_a_plot_and_the_interference_of_two(session: Session, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with Image.open(plot_of(session, ("ink", "lego"))) as plot:
        assert plot.format == "PNG" and plot.width > 800
    html = interference_of(session, ("ink", "lego"))
    assert "88 layers in common" in html and "unet.mid_block" in html
    with pytest.raises(ValueError, match="expected two"):
        interference_of(session, ("ink",))


def test_without_matplotlib_the_plot_says_so(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="plots need matplotlib"):
        plot_of(session, ("ink",))


def test_the_status_tells_times_and_the_queue() -> None:
    assert "2 drawings are before this one" in status_of(Update(ahead=2))
    done = Update("done", picture=Path("p.png"), seconds=2.0, load_seconds=0.25, mix_seconds=0.01, draw_seconds=1.7)
    assert "Done in 2.0 s (load 0.25 s, re-weight 0.01 s, draw 1.7 s), saved as p.png" in status_of(done)
    second = Update("blend", 1, 4, pictures=(Path("p.png"),), count=3)
    assert "Blend 2 of 3: step 1 of 4" in status_of(second)


def test_a_finished_run_fills_slider_and_batch(session: Session) -> None:
    with gr.Blocks():
        stage = build_stage()
    progress_view = ProgressView(stage)
    run = session.start(DrawRequest(SETTINGS, (AdapterChoice("ink", 1.0),), count=2), owner="tab")
    sent: dict = {}
    for update in run.updates():
        changes = progress_view.changes(update)
        assert {*changes} <= stage.outputs
        sent |= changes
    assert len(sent[stage.shown]) == 2
    assert sent[stage.compare] == (sent[stage.base], sent[stage.blend]) == (str(update.base), sent[stage.shown][1])
