"""Training from the app: what the browser may ask for, the trainer as a process, what is read from a run folder."""

import os
import signal
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline

from dora_diffusion.generation.generate import GenerationSettings
from dora_diffusion.pretrain.scenes import background
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.utils.atomic import load_tensors, sha256_of
from tests.tolerances import assert_identical
from tests.ui.scripted import until
from ui.backend.checks import check_name
from ui.backend.request import DrawRequest
from ui.backend.session import Session
from ui.library.library import AdapterLibrary
from ui.train.data import find_dataset, list_datasets, list_pictures, save_caption
from ui.train.grid import check_weights, choose_rows, draw_grid
from ui.train.plan import Planner
from ui.train.plot import loss_plot
from ui.train.process import Trainer
from ui.train.recipes import PLAIN, Fields, build_config, list_recipes, recipe_settings
from ui.train.runs import (
    LOG,
    Losses,
    LossReader,
    ended_early,
    find_checkpoint,
    find_run,
    list_checkpoints,
    list_runs,
    list_samples,
    send_to_library,
)

EXAMPLES = Path(__file__).parents[3] / "examples"
FIELDS = Fields(
    name="robot", dataset="sets/cats", recipe=PLAIN, instance_prompt="a zqx cat", rank=2, steps=3, learning_rate=1e-3,
    resolution=32, batch_size=1, seed=0, text_encoder=False, dora=True, samples="", every=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def base(pipe: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random pocket as a folder."""
    folder = tmp_path_factory.mktemp("base")
    pipe.save_pretrained(folder)
    return folder


def _make_roots(folder: Path) -> tuple[Path, ...]:
    cats = folder / "sets" / "cats"
    cats.mkdir(parents=True)
    for name in ("red", "blue", "meadow"):
        background(name, 64).save(cats / f"{name}.png")
    (cats / "red.txt").write_text("a red wall\n")
    return (folder / "sets",)


@pytest.fixture
def roots(tmp_path: Path) -> tuple[Path, ...]:
    """A root with one folder of three pictures, one of them captioned."""
    return _make_roots(tmp_path)


@pytest.fixture
def trainer() -> Iterator[Trainer]:
    """Ended after the test."""
    trainer = Trainer()
    yield trainer
    trainer.close()


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three steps that is through: checkpoints at 2 and 3."""
    folder = tmp_path_factory.mktemp("trained")
    trainer = Trainer()
    fields = replace(FIELDS, samples="a zqx cat", text_encoder=True)
    config = build_config(fields, model=str(base), roots=_make_roots(folder), runs=folder / "runs")
    quick = config.preview.model_copy(update={"steps": 2})  # how good the samples are is asked nowhere
    run = trainer.start(config.model_copy(update={"preview": quick}))
    _wait(trainer)
    assert trainer.state().phase == "done", (run / LOG).read_text()
    trainer.close()
    return run


def _wait(trainer: Trainer) -> None:
    until(lambda: not trainer.running)


def _config(roots: tuple[Path, ...], runs: Path, base: object = "pocket", **changes: object) -> TrainConfig:
    return build_config(replace(FIELDS, **changes), model=str(base), roots=roots, runs=runs)  # type: ignore[arg-type]


def test_folders_with_pictures_are_listed_and_nothing_else_is_found(roots: tuple[Path, ...], tmp_path: Path) -> None:
    (roots[0] / ".hidden").mkdir()
    background("red", 64).save(roots[0] / ".hidden" / "1.png")
    (roots[0] / "empty").mkdir()
    assert list_datasets((*roots, tmp_path / "nowhere")) == {"sets/cats": roots[0] / "cats"}
    assert find_dataset("sets/cats", roots) == roots[0] / "cats"
    for wrong in ("sets/../sets/cats", str(roots[0] / "cats"), "/etc", "", None, 3, ["sets/cats"]):
        with pytest.raises(ValueError, match="^dataset: got .*, expected a folder with pictures under"):
            find_dataset(wrong, roots)


def test_the_examples_are_data_sets_with_recipes() -> None:
    assert {"examples/subject-robot/images", "examples/style-ink/images"} <= list_datasets([EXAMPLES]).keys()
    recipes = list_recipes([EXAMPLES])
    assert {"subject-robot/subject", "style-ink/style"} <= recipes.keys()
    assert "subject-robot/words" not in recipes  # it trains no adapter


def test_a_caption_is_written_beside_its_picture(roots: tuple[Path, ...]) -> None:
    folder = roots[0] / "cats"
    assert [(picture.name, picture.caption) for picture in list_pictures(folder)] == [
        ("blue.png", None),
        ("meadow.png", None),
        ("red.png", "a red wall"),
    ]
    assert save_caption(folder, "blue.png", "  a blue\nwall é ") == folder / "blue.txt"
    assert (folder / "blue.txt").read_text(encoding="utf-8") == "a blue wall é\n"
    assert sorted(path.name for path in folder.iterdir() if path.suffix != ".png") == ["blue.txt", "red.txt"]


@pytest.mark.parametrize(
    ("name", "caption", "reason"),
    [
        ("../cats/blue.png", "x", "^picture: got '../cats/blue.png', expected one of the gallery"),
        ("red.txt", "x", "^picture: got 'red.txt'"),
        (None, "x", "^picture: got nothing"),
        ("blue.png", " ", "^caption: got none, expected words; .* remove blue.txt$"),
        ("blue.png", 3, "^caption: got 3, expected text"),
        ("blue.png", "x" * 2001, "^caption: got 2001 characters"),
        ("blue.png", "\ud800", "^caption: got half of a surrogate pair"),
    ],
)
def test_captions_and_names_of_pictures_are_checked(
    roots: tuple[Path, ...], name: object, caption: object, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        save_caption(roots[0] / "cats", name, caption)
    assert not (roots[0] / "cats" / "blue.txt").exists()


def test_a_recipe_without_a_rate_shows_its_optimisers_own(tmp_path: Path) -> None:
    (tmp_path / "toy" / "images").mkdir(parents=True)
    text = (
        "output_dir: run\ndata: {instance_dir: images}\noptim: {optimizer: lion, text_encoder_learning_rate: 1.0e-5}\n"
    )
    (tmp_path / "toy" / "toy.yaml").write_text(f"{text}adapter: {{train_text_encoder: true}}\n")
    (name,) = [name for name in list_recipes([tmp_path]) if name != PLAIN]
    assert recipe_settings(name, [tmp_path])["optim"]["learning_rate"] == 3e-5


def test_a_recipe_takes_the_fields_and_keeps_its_proportions(tmp_path: Path) -> None:
    fields = replace(
        FIELDS, dataset="examples/subject-robot/images", recipe="subject-robot/subject", rank=4, learning_rate=3e-4,
        steps=40, text_encoder=True, dora=False, samples="a zqx robot\n\n a cat ",
    )  # fmt: skip
    config = build_config(fields, model="somewhere", roots=[EXAMPLES], runs=tmp_path)
    assert config.model == "somewhere" and config.output_dir == tmp_path / "robot"
    assert (config.adapter.rank, config.adapter.alpha, config.adapter.use_dora) == (4, 4.0, False)
    assert config.optim.text_encoder_learning_rate == pytest.approx(1.5e-4)
    assert (config.optim.steps, config.optim.warmup_steps, config.optim.min_snr_gamma) == (40, 4, None)
    assert [one.prompt for one in config.preview.prompts] == ["a zqx robot", "a cat"]
    assert len(config.prior.class_prompts) == 8


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("name", "../robot", r"^run name: got '\.\./robot', expected up to 64 letters"),
        ("name", "", "^run name: got nothing"),
        ("name", ["a"], "^run name: got"),
        ("recipe", "/etc/passwd", "^recipe: got '/etc/passwd', expected one of the list"),
        ("rank", 0, "^rank: got 0, expected a whole number from 1 to 1024"),
        ("rank", "8", "^rank: got '8'"),
        ("steps", None, "^steps: got nothing"),
        ("learning_rate", float("nan"), "^learning rate: got nan"),
        ("resolution", 30, "resolution.*multiple of 8"),
        ("text_encoder", "yes", "^text encoder: got 'yes', expected on or off"),
        ("samples", "a\n" * 9, "^sample prompts: got 9 lines, expected at most 8"),
        ("samples", 3, "^sample prompts: got 3, expected text"),
        ("every", -1, "^samples every: got -1"),
    ],
)
def test_every_field_is_checked(
    roots: tuple[Path, ...], tmp_path: Path, field: str, value: object, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason) as raised:
        _config(roots, tmp_path / "runs", **{field: value})
    assert "\n" not in str(raised.value)


def test_the_plan_tells_memory_and_refuses_as_training_would(
    roots: tuple[Path, ...], base: Path, tmp_path: Path
) -> None:
    planner = Planner()
    printed = planner.plan(_config(roots, tmp_path / "runs", base))
    assert "memory" in printed and "steps      3 of 1 x 1" in printed
    assert not (tmp_path / "runs").exists()
    with pytest.raises(ValueError, match="2 of 3 pictures have no caption") as raised:
        planner.plan(_config(roots, tmp_path / "runs", base, instance_prompt=""))
    assert "\n" not in str(raised.value)


def test_what_a_run_leaves_is_read_back(trained: Path) -> None:
    losses = LossReader(trained).losses()
    assert list(losses.train) == [1, 2, 3] and 0 in losses.validation
    assert [step for step, _ in list_samples(trained)] == [0, 2, 3]
    assert list(list_checkpoints(trained)) == [2, 3]
    assert_identical(load_tensors(find_checkpoint(trained, 3)), load_tensors(trained / "adapter.safetensors"))
    assert list_runs(trained.parent) == ["robot"]
    for wrong in ("..", ".", "robot/../robot", None, 3):
        with pytest.raises(ValueError, match="^run: got"):
            find_run(trained.parent, wrong)
    for wrong_step in (1, True, "3", None):
        with pytest.raises(ValueError, match="^checkpoint: got .*, expected one of: 2, 3$"):
            find_checkpoint(trained, wrong_step)


def test_a_checkpoint_comes_into_the_library(trained: Path, adapters: Path) -> None:
    library = AdapterLibrary(adapters)
    assert send_to_library(trained, 2, library) == "robot-step2"
    assert library.find("robot-step2").path.read_bytes() == find_checkpoint(trained, 2).read_bytes()
    assert send_to_library(trained, 2, library) == "robot-step2"
    assert send_to_library(trained, 3, library, name="best") == "best"
    with pytest.raises(ValueError, match="^ink: the library has another adapter of that name"):
        send_to_library(trained, 3, library, name="ink")
    (adapters / "robot-step3.safetensors").write_bytes((adapters / "ink.safetensors").read_bytes())
    assert send_to_library(trained, 3, library) == f"robot-step3-{sha256_of(find_checkpoint(trained, 3))[:8]}"
    for wrong in ("../ink", "a/b", ".hidden", 3):
        with pytest.raises(ValueError, match="^name in the library: got"):
            send_to_library(trained, 3, library, name=wrong)
    assert not [path for path in adapters.iterdir() if path.name.startswith(".")]


def test_the_grid_has_the_base_first_and_a_row_for_each_checkpoint(trained: Path, session: Session) -> None:
    asked: list[DrawRequest] = []

    def draw(request: DrawRequest) -> Path:
        asked.append(request)
        (drawn,) = session.draw(request)
        return session.save(drawn)

    settings = GenerationSettings("a zqx cat", steps=1)
    *_, cells = draw_grid(trained, session.library, settings, (0.0, 2.0), draw)
    assert [cell.label for cell in cells] == [
        "step 2 · base", "step 2 · 0", "step 2 · 2", "step 3 · base", "step 3 · 0", "step 3 · 2",
    ]  # fmt: skip
    assert [[choice.file for choice in request.adapters] for request in asked] == [[], ["robot-step2"], ["robot-step3"]]
    assert cells[0].picture == cells[1].picture == cells[3].picture
    assert sha256_of(cells[2].picture) != sha256_of(cells[0].picture)


@pytest.mark.parametrize("wrong", ["", "a", "3", "1,1", "nan", None, 1, ",".join(map(str, range(9)))])
def test_weights_of_the_grid_are_checked(wrong: object) -> None:
    assert check_weights(" 0.5, -1 ,") == (0.5, -1.0)
    with pytest.raises(ValueError, match="^weights: "):
        check_weights(wrong)


def test_many_checkpoints_are_thinned_and_the_last_stays() -> None:
    rows = choose_rows(range(1, 51))
    assert len(rows) == 8 and rows[-1] == 50 and rows == sorted(set(rows))


def test_a_second_start_is_refused_and_stop_ends_the_process_group(
    roots: tuple[Path, ...], base: Path, tmp_path: Path, trainer: Trainer
) -> None:
    long = _config(roots, tmp_path / "runs", base, steps=100_000, every=1)
    run = trainer.start(long)
    with pytest.raises(ValueError, match="^training: robot is under way; stop it first, or wait until it is done$"):
        trainer.start(_config(roots, tmp_path / "runs", base, name="other"))
    with pytest.raises(ValueError, match="^training: robot is under way"):
        trainer.resume(run)
    until(lambda: list_checkpoints(run) or not trainer.running)
    assert trainer._last is not None
    process = trainer._last.process
    assert process.poll() is None, (run / LOG).read_text()
    trainer.stop()
    assert trainer.state().phase == "stopped"
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    before = max(list_checkpoints(run))
    with pytest.raises(ValueError, match="^robot: there is such a run already; resume it, or choose another name$"):
        trainer.start(long)
    trainer.resume(run)
    until(lambda: max(list_checkpoints(run)) > before or not trainer.running)
    assert max(list_checkpoints(run)) > before, (run / LOG).read_text()
    trainer.close()
    assert not trainer.running
    with pytest.raises(ValueError, match="the app is closing"):
        trainer.resume(run)


def test_a_crash_shows_its_last_line(roots: tuple[Path, ...], base: Path, tmp_path: Path, trainer: Trainer) -> None:
    trainer.start(_config(roots, tmp_path / "runs", base, instance_prompt=""))
    _wait(trainer)
    state = trainer.state()
    assert state.phase == "failed"
    assert "2 of 3 pictures have no caption" in state.message and "Traceback" not in state.message
    trainer.start(_config(roots, tmp_path / "runs", base, steps=100_000))  # nothing was learnt: the name is free
    assert trainer._last is not None
    os.killpg(trainer._last.process.pid, signal.SIGKILL)
    _wait(trainer)
    assert trainer.state().phase == "failed"
    assert trainer.state().message.startswith("killed by signal 9, perhaps for want of memory")


def test_a_run_that_writes_elsewhere_is_not_resumed(trained: Path, tmp_path: Path, trainer: Trainer) -> None:
    other = tmp_path / "runs" / "other"
    other.mkdir(parents=True)
    (other / "config.yaml").write_bytes((trained / "config.yaml").read_bytes())
    with pytest.raises(ValueError, match="output_dir is .*, expected the folder it lies in"):
        trainer.resume(other)


def _event_file(path: Path, pairs: list[tuple[int, float]], tag: str = "loss/train") -> bytes:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    path.parent.mkdir(parents=True, exist_ok=True)
    data = b""
    for step, loss in pairs:
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=loss)])
        record = Event(step=step, summary=summary).SerializeToString()
        data += struct.pack("<QI", len(record), 0) + record + struct.pack("<I", 0)
    path.write_bytes(data)
    return data


def test_losses_are_read_as_they_grow_and_a_resumption_takes_over(tmp_path: Path) -> None:
    first = tmp_path / "logs" / "run" / "events.out.tfevents.100.a"
    whole = _event_file(first, [(1, 0.5), (2, 0.25), (3, 0.125)])
    first.write_bytes(whole[:-7])
    reader = LossReader(tmp_path)
    assert reader.losses().train == {1: 0.5, 2: 0.25}
    first.write_bytes(whole)
    assert reader.losses().train == {1: 0.5, 2: 0.25, 3: 0.125}
    _event_file(first.with_name("events.out.tfevents.101.a"), [(2, 1.0)])
    assert reader.losses().train == {1: 0.5, 2: 1.0}
    first.with_name("events.out.tfevents.102.a").write_bytes(b"\xff" * 400)
    assert reader.losses().train == {1: 0.5, 2: 1.0}


def test_losses_on_fixed_noise_are_read_under_either_name(tmp_path: Path) -> None:
    for number, tag in enumerate(("loss/validation", "loss/fit")):
        _event_file(tmp_path / "logs" / "run" / f"events.out.tfevents.{number}.a", [(number, 0.5 + number)], tag)
    assert LossReader(tmp_path).losses().validation == {0: 0.5, 1: 1.5}


def test_a_run_that_ended_early_is_done(tmp_path: Path) -> None:
    assert not ended_early(tmp_path)
    for text, ended in (("{}", False), ("[]", False), ("{", False), ('{"ended_early": true}', True)):
        (tmp_path / "manifest.json").write_text(text)
        assert ended_early(tmp_path) is ended


def test_the_plot_is_svg_whatever_the_losses() -> None:
    assert "No loss" in loss_plot(Losses(), total=10)
    assert "No loss" in loss_plot(Losses({1: float("nan")}), total=10)
    for losses in (Losses({1: 0.5}), Losses({}, {0: 0.0}), Losses({step: 1 / step for step in range(1, 5000)})):
        svg = loss_plot(losses, total=10)
        assert svg.startswith("<svg") and "nan" not in svg and len(svg) < 40_000


@pytest.mark.parametrize("name", ["robot", "a", "A-1_b.c", "x" * 64])
def test_good_names_pass(name: str) -> None:
    assert check_name("run name", f" {name} ") == name


def test_broken_pictures_do_not_stop_the_gallery(roots: tuple[Path, ...]) -> None:
    from ui.train.pictures import _page_of

    (roots[0] / "cats" / "zzz.png").write_bytes(b"no picture")
    gallery, _ = _page_of(roots[0] / "cats", 1)
    assert len(gallery.value) == 4
    with pytest.raises(ValueError, match="^page: got 2"):
        _page_of(roots[0] / "cats", 2)


def test_a_run_starts_from_the_files_of_the_app_s_base(tmp_path: Path) -> None:
    file = tmp_path / "unet.safetensors"
    file.touch()
    fields = replace(FIELDS, dataset="examples/subject-robot/images", recipe="subject-robot/subject")
    config = build_config(fields, model="pocket", roots=[EXAMPLES], runs=tmp_path, files={"unet": file})
    assert config.base.unet == file and config.base.vae is None
