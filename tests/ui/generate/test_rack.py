"""The rack without a browser: what its widgets say, how it is filled, moved and emptied, and what it tells."""

import base64
import io
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="gradio is not installed: pip install dora-diffusion[ui]")

import gradio as gr  # noqa: E402  (after the skip above)

from dora_diffusion.blending import Interference  # noqa: E402
from dora_diffusion.functional.blend_modes import MODES  # noqa: E402
from dora_diffusion.generation.curves import NAMED_CURVES  # noqa: E402
from dora_diffusion.generation.generate import GenerationSettings  # noqa: E402
from ui.backend.interference import interference_html, measure, verdict  # noqa: E402
from ui.backend.request import DrawRequest, SlotValues, check_adapters  # noqa: E402
from ui.backend.session import Session  # noqa: E402
from ui.generate.controls import Controls  # noqa: E402
from ui.generate.curves import CONSTANT, OWN_POINTS, curve_html, name_of_text, text_of_name  # noqa: E402
from ui.generate.form import build_form, build_prompt  # noqa: E402
from ui.generate.masks import SIDE, mask_html, painter_value, read_painted  # noqa: E402
from ui.generate.rack import IN_ORDER, SLOTS, Rack, broken_list, build_rack, mode_html  # noqa: E402
from ui.generate.recipes import DrawRecipe  # noqa: E402
from ui.generate.slots import EMPTY_SLOT, LOADING, badge, block_updates, shown_slots, slot_choices  # noqa: E402

INK = SlotValues.of("ink", 0.8)
LEGO = replace(INK, file="lego", strength=-0.5, curve="0:0, 1:1", solo=True, blocks=(1.0, 0.5, 0.0))


@pytest.fixture
def rack(session: Session) -> Iterator[Rack]:
    """A rack in a page of its own, which is not served."""
    with gr.Blocks() as demo:
        yield build_rack(session, demo)


def _state(rack: Rack, slots: tuple[SlotValues, ...] = (), blend: str = "additive") -> dict[Any, Any]:
    """What a browser sends after these updates."""
    return {widget: _value(change) for widget, change in rack.updates(slots, blend).items()}


def _value(change: Any) -> Any:
    return change.value if isinstance(change, gr.components.Component) else change


def _moved(state: dict[Any, Any], changes: dict[Any, Any]) -> dict[Any, Any]:
    return state | {widget: _value(change) for widget, change in changes.items()}


def test_what_is_put_in_is_read_back(rack: Rack) -> None:
    mask = Image.new("L", (8, 8), 255)
    wanted = (INK, replace(LEGO, mask=mask))
    state = _state(rack, wanted, "compose")
    assert rack.inputs <= set(state)
    assert rack.outputs == set(state)
    read = rack.read(state)
    assert len(read) == SLOTS
    assert read[0] == replace(INK, blocks=(1.0, 1.0, 1.0))
    assert read[1] == replace(LEGO, mask=mask)
    assert all(not slot.file for slot in read[2:])
    assert rack.blend(state) == "compose"
    (only,) = check_adapters(read, rack.session.parts)  # lego is solo
    assert (only.file, only.curve, only.mask is not None) == ("lego", ((0.0, 0.0), (1.0, 1.0)), True)


def test_the_desk_asks_for_what_the_page_holds(session: Session) -> None:
    with gr.Blocks() as demo:
        form = build_form(session, build_prompt(), demo)
        controls = Controls(session, gr.State("random"), form, build_rack(session, demo))
    settings = GenerationSettings("a cat", "dog", 3, 2, 3.0, 64, 128, "euler")
    changes = controls.updates(DrawRecipe(settings, (EMPTY_SLOT, INK), "additive"))
    assert set(changes) <= controls.outputs
    state = {widget: getattr(widget, "value", None) for widget in controls.inputs}
    state |= {widget: _value(change) for widget, change in changes.items()} | {form.count: 3}
    parts = session.parts
    asked = DrawRequest(settings, check_adapters((replace(INK, blocks=(1.0, 1.0, 1.0)),), parts), count=3)
    assert controls.request(state) == asked
    kept = controls.recipe(state)
    assert (kept.settings, kept.blend, [slot.file for slot in kept.slots]) == (settings, "additive", ["ink"])
    state[controls.rack.slots[1].strength] = 9
    for read in (controls.request, controls.recipe):
        with pytest.raises(ValueError, match="^slot 2, strength: got 9"):
            read(state)
        with pytest.raises(ValueError, match="^the base is random now: another tab has switched it"):
            read(state | {controls.model: "pocket"})


def test_more_adapters_than_slots_are_refused(rack: Rack) -> None:
    with pytest.raises(ValueError, match="got 9 adapters, expected at most 8"):
        rack.updates([INK] * 9)


def test_filled_slots_are_shown_and_the_first_empty_one(rack: Rack) -> None:
    assert shown_slots(["", "", ""]) == (True, False, False)
    assert shown_slots(["a", "", "b", ""]) == (True, True, True, False)
    assert shown_slots(["a", "b"]) == (True, True)
    changes = rack.updates([INK, LEGO])
    assert [changes[slot.root].visible for slot in rack.slots] == [True, True, True, *[False] * 5]


def test_add_takes_the_next_free_slot(rack: Rack) -> None:
    state = _state(rack, (INK,))
    state = _moved(state, rack.add(state, "lego", strength=0.4))
    assert rack.read(state)[1] == replace(EMPTY_SLOT, file="lego", strength=0.4, denoiser=0.4, text_encoders=0.4,
                                          blocks=(1.0, 1.0, 1.0))  # fmt: skip
    with pytest.raises(ValueError, match="lego: is in slot 2 already"):
        rack.add(state, "lego")
    with pytest.raises(ValueError, match="no such adapter"):
        rack.add(state, "../../etc/passwd")
    with pytest.raises(ValueError, match="broken: not a safetensors file"):
        rack.add(state, "broken")
    full = _state(rack, tuple(replace(INK, file=f"other {number}") for number in range(SLOTS)))
    with pytest.raises(ValueError, match="all 8 slots are taken"):
        rack.add(full, "ink")


def test_a_move_takes_everything_along_and_passes_empty_slots(rack: Rack) -> None:
    mask = Image.new("L", (8, 8), 255)
    before = _state(rack, (replace(INK, mask=mask), EMPTY_SLOT, LEGO))
    after = _moved(before, rack.move(before, 0, 1))
    assert rack.read(after)[0] == LEGO
    assert rack.read(after)[2] == replace(INK, mask=mask, blocks=(1.0, 1.0, 1.0))
    assert not rack.read(after)[1].file
    assert "changes nothing" in after[rack.sentence]
    assert rack.read(_moved(after, rack.move(after, 2, -1))) == rack.read(before)
    assert rack.read(_moved(before, rack.move(before, 0, -1))) == rack.read(before)
    assert rack.read(_moved(before, rack.move(before, 2, 1))) == rack.read(before)


def test_another_base_has_its_own_blocks_and_tells_of_the_adapters_anew(rack: Rack) -> None:
    state = _state(rack, (INK,))
    changes = rack.switched(state)
    assert set(changes) <= rack.outputs
    assert [changes[slider].label for slider in rack.slots[0].blocks] == ["Down blocks", "Middle block", "Up blocks"]
    assert changes[rack.slots[0].denoiser].label == "UNet"
    assert changes[rack.slots[0].badge] == LOADING
    assert changes[rack.asked][1:] == ("ink", *[""] * (SLOTS - 1))
    fewer = block_updates(rack.slots[0], replace(rack.session.parts, blocks=()))
    assert [fewer[slider].visible for slider in rack.slots[0].blocks] == [False, False, False]


def test_remove_forgets_what_the_slot_held(rack: Rack) -> None:
    state = _state(rack, (LEGO, INK))
    state = _moved(state, rack.remove(state, 0))
    assert rack.read(state)[0] == replace(EMPTY_SLOT, file="", blocks=(1.0, 1.0, 1.0))
    assert rack.read(state)[1].file == "ink"


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in IN_ORDER])
def test_order_changes_nothing_where_the_rack_says_so(session: Session, mode: str) -> None:
    plain = replace(LEGO, curve="", solo=False)

    def pixels(*slots: SlotValues) -> np.ndarray:
        request = DrawRequest(GenerationSettings("a cat", steps=2), check_adapters(slots, session.parts), mode)
        (drawn,) = session.draw(request)
        return np.asarray(drawn.image, dtype=np.int16)

    difference = np.abs(pixels(INK, plain) - pixels(plain, INK)).max()
    assert difference <= (0 if mode == "additive" else 2)
    assert ("but rounding" in mode_html(mode)) == (mode != "additive")


def test_a_mode_is_told_in_one_sentence() -> None:
    for mode in MODES:
        html = mode_html(mode)
        assert ("The order of the slots changes the picture" in html) == (mode in IN_ORDER)
        assert ("Curves and masks need the additive mode" in html) == (mode != "additive")
    with pytest.raises(ValueError, match="blend: got '<script>', expected one of additive"):
        mode_html("<script>")


def test_badge_tells_type_rank_axis_format_and_time(session: Session, rack: Rack) -> None:
    assert rack.badges.known("ink") == LOADING
    html = rack.badges.load("ink")
    for part in ("DoRA", "rank 4", "out axis", "diffusers", "88/88 keys matched", "loaded in"):
        assert part in html
    assert rack.badges.known("ink") == html
    assert "no such adapter" in rack.badges.load("<b>")
    assert "<b>" not in rack.badges.load("<b>")
    report = replace(session.load("ink").report, kind="<i>odd</i>", matched=87)
    assert "<i>" not in badge(report)
    assert "chip warn" in badge(report)


def test_a_replaced_file_loses_its_badge(rack: Rack, adapters: Path) -> None:
    rack.badges.load("ink")
    (adapters / "ink.safetensors").write_bytes((adapters / "lego.safetensors").read_bytes())
    rack.session.library.refresh()
    assert rack.badges.known("ink") == LOADING
    assert "LoRA" in rack.badges.load("ink")


def test_a_file_replaced_while_it_waits_is_told_as_what_was_read(rack: Rack, adapters: Path) -> None:
    session, ink = rack.session, adapters / "ink.safetensors"
    before, after = ink.read_bytes(), (adapters / "lego.safetensors").read_bytes()
    written = ink.stat().st_mtime_ns
    html: list[str] = []
    with session.weights():
        waiting = threading.Thread(target=lambda: html.append(rack.badges.load("ink")))
        waiting.start()
        while session.waiting < 2:
            assert waiting.is_alive()
        ink.write_bytes(after)
    waiting.join()
    session.library.refresh()
    assert "LoRA" in html[0] and rack.badges.known("ink") == html[0]
    ink.write_bytes(before)
    os.utime(ink, ns=(written, written))
    session.library.refresh()
    assert rack.badges.known("ink") == LOADING
    assert "DoRA" in rack.badges.load("ink")


def test_lists_are_short_and_hold_what_is_chosen(session: Session, adapters: Path) -> None:
    for number in range(320):
        (adapters / f"a{number:03}.safetensors").write_bytes((adapters / "lego.safetensors").read_bytes())
    session.library.refresh(patience=0)
    names = slot_choices(session.library, "lego")
    assert len(names) == 302
    assert "lego" in names
    assert "The first 300 of" in broken_list(session.library)


def test_broken_files_are_told_with_their_reason(session: Session) -> None:
    assert "<b>broken.safetensors</b>: not a safetensors file" in broken_list(session.library)


def test_curves_go_by_name_and_by_points() -> None:
    for name in NAMED_CURVES:
        assert name_of_text(text_of_name(name)) == name
    assert name_of_text("") == CONSTANT
    assert name_of_text("0:0, 0.3:1") == OWN_POINTS
    assert name_of_text("nonsense") == OWN_POINTS
    with pytest.raises(ValueError, match="curve: got 'own points', expected one of constant"):
        text_of_name(OWN_POINTS)


def test_a_curve_is_drawn_or_refused_in_one_line() -> None:
    assert 'aria-label="strength times 0 at the first step, 1 at the last"' in curve_html("fade in")
    assert "<polyline" in curve_html("0:-2, 1:2")
    html = curve_html("<script>alert(1)</script>")
    assert "<script>" not in html
    assert 'role="alert"' in html


def _png(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def test_a_painted_mask_is_read_and_shown() -> None:
    painted = Image.new("RGBA", (SIDE, SIDE), "black")
    painted.paste("white", (0, 0, SIDE // 2, SIDE))
    mask = read_painted(_png(painted))
    assert mask is not None
    assert mask.mode == "L"
    assert np.asarray(mask).mean() == pytest.approx(127.5)
    assert "draws in 50% of the picture" in mask_html(mask)
    assert "draws everywhere" in mask_html(None)
    assert read_painted("") is None
    assert painter_value(mask) != painter_value(mask)


@pytest.mark.parametrize(
    "sent",
    [
        5,
        {"path": "/etc/passwd"},
        "/etc/passwd",
        "https://example.org/mask.png",
        "data:image/svg+xml;base64,PHN2Zy8+",
        "data:image/png;base64,not base64",
        "data:image/png;base64,AAAA",
        "data:image/png;base64," + "A" * (1 << 20),
        _png(Image.new("L", (8, 8))),
        _png(Image.new("L", (4000, 4000))),
    ],
)
def test_what_is_no_mask_is_refused(sent: object) -> None:
    with pytest.raises(ValueError, match=r"\Amask: [^\n]*\Z"):
        read_painted(sent)


def test_the_meter_measures_the_rack(session: Session) -> None:
    found = measure(session, ["ink", "lego"])
    assert found.shared["ink", "lego"] == 88
    html = interference_html(found)
    assert "88 layers in common" in html
    assert "unet.down_blocks.0" in html
    assert "With two adapters" in interference_html(measure(session, ["ink"]))
    with pytest.raises(ValueError, match="the rack is empty"):
        measure(session, [])
    with pytest.raises(ValueError, match="no such adapter"):
        measure(session, ["nowhere"])


def test_the_meter_puts_cosines_in_words_and_escapes_names() -> None:
    assert [verdict(cosine) for cosine in (0.9, 0.01, -0.4)] == [
        "pull together",
        "hardly meet",
        "work against each other",
    ]
    pair = ("<b>", "ink")
    found = Interference(
        {"<b>": {"unet": 1.0}, "ink": {}}, {"<b>": 1.0, "ink": 0.0}, {pair: {}}, {pair: 0.0}, {pair: 0}
    )
    assert "<b>ink" not in interference_html(found)
    assert "&lt;b&gt; and ink" in interference_html(found)
