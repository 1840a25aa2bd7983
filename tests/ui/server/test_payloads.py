"""What `python -m benchmarks.app.payloads` sends: none of it reads, writes, fetches or runs what it should not."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from diffusers import StableDiffusionPipeline

pytest.importorskip("gradio", reason="gradio is not installed: pip install dora-diffusion[ui]")

from benchmarks.app.payloads import payloads  # noqa: E402  (after the skip above)
from benchmarks.app.payloads.browser import CHROMIUM, Seen, seen_by_browser  # noqa: E402
from benchmarks.app.payloads.kinds import DRAWN, KINDS, Kind, health_and_drawing, live  # noqa: E402
from benchmarks.app.payloads.report import report, summary  # noqa: E402
from benchmarks.app.payloads.run import all_judged, judged, label  # noqa: E402
from benchmarks.app.payloads.target import SECRET, Target, target_over  # noqa: E402

CASES = [
    pytest.param(kind, payload, id=f"{kind.name}: {label(payload)}") for kind in KINDS for payload in kind.payloads
]


@pytest.fixture(scope="module")
def target(pipe: StableDiffusionPipeline, adapter_bytes: dict[str, bytes]) -> Iterator[Target]:
    """The app over adapters sound, broken and hostile; what it fetched for someone at any time is found at the end."""
    with target_over(pipe, adapter_bytes) as target:
        yield target
        assert list(target.faults()) == []


def test_there_are_more_than_two_hundred() -> None:
    assert len(CASES) == 233


@pytest.mark.parametrize(("kind", "payload"), CASES)
def test_a_payload_comes_to_what_it_must(target: Target, kind: Kind, payload: Any) -> None:
    outcome = judged(target, kind, payload)
    assert outcome.faults == ()
    assert outcome.answers


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: apt-get install chromium")
def test_a_browser_runs_nothing_of_what_files_say(target: Target) -> None:
    seen = seen_by_browser(target.app.url)
    assert seen is not None and seen.hosts == ("127.0.0.1",)
    assert seen.faults() == []


def test_a_sound_call_is_drawn_after_all_that(target: Target) -> None:
    assert health_and_drawing(target)["sound_call"] == DRAWN


def _kind(part: str) -> Kind:
    [kind] = [kind for kind in KINDS if part in kind.name]
    return kind


def test_a_leak_is_seen(target: Target) -> None:
    (target.root / "out" / "leak.txt").write_text(SECRET)
    faults = judged(target, _kind("paths of files"), "/gradio_api/file={output}/leak.txt").faults
    assert faults == ("answered 200", f"leaked {SECRET!r}: {SECRET}")


@pytest.mark.parametrize(
    ("part", "payload", "fault"),
    [
        ("that the server is to fetch", "/health", "answered 200"),
        ("foreign Host", {}, "/config: answered 200"),
        ("to generate", {}, "was done"),
        ("to blend", {"name": "new"}, "was done; wrote adapters/new.safetensors"),
        ("handlers that are not there", 0, "answered 200"),
        ("bodies", payloads.Body("short", payloads.JOIN, b"{}", 413), "answered 422, not 413"),
        ("scripts", "<b>no file has this</b>", "is shown nowhere"),
    ],
)
def test_what_is_served_after_all_is_seen(target: Target, part: str, payload: Any, fault: str) -> None:
    assert fault in "; ".join(judged(target, _kind(part), payload).faults)


def test_a_fetch_and_a_file_outside_are_seen(target: Target) -> None:
    def send(target: Target, payload: Any) -> Iterator[str]:
        httpx.get(f"http://{target.words['trap']}{payload}")
        target.trap.hook("socket.connect", (None, ("203.0.113.5", 80)))
        (target.root / "escaped.txt").touch()
        yield from ()

    assert judged(target, Kind("a breach", "nothing", ("/x",), send), "/x").faults == (
        "called /x",
        "reached 203.0.113.5",
        "wrote escaped.txt",
    )


def test_an_answer_that_does_not_come_is_seen_and_reported(target: Target) -> None:
    def send(target: Target, payload: Any) -> Iterator[str]:
        yield from ()
        raise TimeoutError("1 calls did not end")

    said: list[str] = []
    outcomes = list(all_judged(target, [Kind(KINDS[0].name, "nothing", ("/x",), send)], said.append))
    assert said == [f"{KINDS[0].name}: /x: TimeoutError: 1 calls did not end"]
    found = summary(outcomes, [health_and_drawing(target)] * 2, Seen(("1",), (), ("127.0.0.1",), 0), (2.0, 1.0))
    assert json.loads(json.dumps(found))["broken"] == 1
    assert "## Broken promises" in report(found)
    assert "1 scripts of theirs ran" in report(found)


@pytest.mark.parametrize("script", payloads.SCRIPTS[:4])
def test_markup_is_seen(script: str) -> None:
    assert live(f'<p title="{script}">')
    assert Seen((), (), ("127.0.0.1", "evil.example"), 1).faults() == ["asked evil.example", "1 elements with handlers"]
