"""TrainConfig: reading, writing and one clear line for every mistake."""

from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from dora_diffusion.training import config as module
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.yaml_config import sections_of

MINIMAL = "output_dir: runs/dog\ndata:\n  instance_dir: pictures\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    return tmp_path / "run.yaml"


def error_of(file: Path, text: str, overrides: dict[str, str] | None = None) -> str:
    """The message that reading `text` ends in, with the file's folder left out."""
    file.write_text(text)
    with pytest.raises(ValueError) as caught:
        TrainConfig.from_yaml(file, overrides)
    message = str(caught.value)
    assert "\n" not in message and not isinstance(caught.value, ValidationError)
    return message.replace(f"{file.parent}/", "")


def test_defaults_and_paths(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    file.write_text(MINIMAL)
    config = TrainConfig.from_yaml(file)
    assert config.data.instance_dir == tmp_path / "pictures"  # beside the file
    assert config.output_dir == elsewhere / "runs/dog"  # in the current directory
    assert config.model == "pocket"
    assert config.prior.prompts == ()
    assert (config.adapter.rank, config.adapter.alpha, config.adapter.use_dora) == (8, 8.0, True)
    assert (config.optim.steps, config.optim.rate, config.optim.min_snr_gamma) == (1000, 1e-4, 5.0)
    assert (config.validation.every, config.validation.at_most, config.validation.timesteps) == (100, 6, 4)


def test_every_value_round_trips_from_any_folder(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text(
        MINIMAL
        + "  instance_prompt: 'a photo: é # 1'\n  validation_dir: pictures\n  caption_dropout: 0.1\n"
        + "model: ./base\n"
        + "prior: {class_prompts: [a dog, 'no'], class_dir: class, weight: 0.5}\n"
        + "adapter: {target_modules: [to_q, to_k], train_text_encoder: true, text_encoder_rank: 2}\n"
        + "optim: {learning_rate: 1e-5, text_encoder_learning_rate: 3e-6, min_snr_gamma: null, mixed_precision: no}\n"
        + "preview: {prompts: [a dog on the moon], every: 10}\ncheckpoint: {keep: 1}\n"
    )
    config = TrainConfig.from_yaml(file)
    assert config.model == str(tmp_path / "base")
    assert config.prior.prompts == ("a dog", "no")
    assert config.optim.learning_rate == 1e-5  # text to YAML 1.1
    assert config.optim.mixed_precision == "no"  # false to YAML 1.1
    copy = tmp_path / "other" / "config.yaml"
    copy.parent.mkdir()
    copy.write_text(config.to_yaml(), encoding="utf-8")
    monkeypatch.chdir(copy.parent)
    assert TrainConfig.from_yaml(copy) == config


def test_the_written_file_names_every_key(file: Path) -> None:
    file.write_text(MINIMAL)
    lines = TrainConfig.from_yaml(file).to_yaml().splitlines()
    written = {line.split(":")[0].strip() for line in lines if ":" in line}
    sections = [kind for key, kind in sections_of(TrainConfig).items() if "[]" not in key]  # lists are empty
    expected = set(TrainConfig.model_fields).union(*(kind.model_fields for kind in sections))
    assert written == expected


def test_every_field_has_a_docstring() -> None:
    models: list[type[BaseModel]] = [TrainConfig, *sections_of(TrainConfig).values()]
    bare = [
        f"{model.__name__}.{name}" for model in models for name, f in model.model_fields.items() if not f.description
    ]
    assert bare == []


def test_every_path_but_the_output_starts_at_the_file() -> None:
    inner = {f"{s}.{n}": f.annotation for s, m in sections_of(TrainConfig).items() for n, f in m.model_fields.items()}
    paths = [key for key, annotation in inner.items() if "Path" in str(annotation)]
    assert tuple(paths) == module._PATHS_BESIDE_FILE


def test_overrides_replace_and_take_text_as_it_stands(file: Path) -> None:
    file.write_text(MINIMAL + "optim:\n  steps: 5\npreview:\n")
    overrides = TrainConfig.parse_overrides(
        [
            "--optim.steps",
            "10",
            "--adapter.rank=4",
            "--data.instance_prompt",
            "a dog: # 1=2",
            "--preview.prompts=[a, b]",
        ]
        + ["--optim.learning_rate", "3e-4", "--optim.min_snr_gamma=null", "--data.flip", "true", "--model", '"5"']
    )
    config = TrainConfig.from_yaml(file, overrides)
    assert (config.optim.steps, config.adapter.rank, config.data.instance_prompt) == (10, 4, "a dog: # 1=2")
    assert ([one.prompt for one in config.preview.prompts], config.optim.learning_rate) == (["a", "b"], 3e-4)
    assert (config.optim.min_snr_gamma, config.data.flip, config.model) == (None, True, "5")


def test_a_path_in_an_override_starts_at_the_current_directory(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "cats").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    file.write_text(MINIMAL)
    config = TrainConfig.from_yaml(file, {"data.instance_dir": "cats"})
    assert config.data.instance_dir == tmp_path / "here" / "cats"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["steps"], "got 'steps', expected --section.key value, such as --optim.steps 400"),
        (["--"], "got '--', expected --section.key value, such as --optim.steps 400"),
        (["--optim.steps"], "--optim.steps: got no value, expected --optim.steps VALUE or --optim.steps=VALUE"),
        (["--a", "--b"], "--a: got no value, expected --a VALUE or --a=VALUE"),
        (["--a=1", "--a", "2"], "--a: given twice, '1' and '2'; expected it once"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        TrainConfig.parse_overrides(arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ("optim:\n  step: 5\n", "run.yaml:5: optim.step: no such key; did you mean optim.steps?"),
        ("learning_rate: 1\n", "run.yaml:4: learning_rate: no such key; did you mean optim.learning_rate?"),
        ("data.flip: true\n", "run.yaml:4: data.flip: no such key; expected flip indented under data:"),
        (
            "preview:\n  zz: 1\n",
            "run.yaml:5: preview.zz: no such key; expected one of prompts, every, seed, steps, guidance_scale",
        ),
        ("optim:\n  steps: true\n", "run.yaml:5: optim.steps: got True, expected a valid integer"),
        (
            "optim:\n  steps: ten\n  seed: -1\n",
            "run.yaml:5: optim.steps: got 'ten', expected a valid integer (and 1 more)",
        ),
        ("optim:\n  learning_rate: 0\n", "run.yaml:5: optim.learning_rate: got 0, expected greater than 0"),
        ("optim:\n  learning_rate: .nan\n", "run.yaml:5: optim.learning_rate: got nan, expected a finite number"),
        ("adapter:\n  norm_grad: off\n", "run.yaml:5: adapter.norm_grad: got False, expected 'detached' or 'exact'"),
        (
            "adapter:\n  target_modules: 5\n",
            "run.yaml:5: adapter.target_modules: got 5, expected a valid string or a valid list",
        ),
        ("adapter:\n  target_modules: [5]\n", "run.yaml:5: adapter.target_modules: got 5, expected a valid string"),
        ("optim: 5\n", "run.yaml:4: optim: got 5, expected a section of `key: value` lines"),
        ("1: 5\n", "run.yaml:4: 1: got 1, expected a name"),
        ("data:\n  flip: true\n", "run.yaml:4: data: given twice, first in line 2; expected it once"),
        ("optim:\n  seed: 1\n  seed: 2\n", "run.yaml:6: optim.seed: given twice, first in line 5; expected it once"),
        (
            "prior:\n  class_dir: c\n",
            "run.yaml:5: prior.class_dir: got 'c' without prior.class_prompt, expected both or neither",
        ),
        (
            "prior:\n  mode: folder\n",
            "run.yaml:5: prior.mode: got 'folder' without prior.class_dir, expected a folder of class pictures there",
        ),
        (
            "prior:\n  mode: folder\n  class_dir: c\n",
            "run.yaml:6: prior.class_dir: got 'c', expected an existing folder of pictures, for prior.mode folder "
            "draws none",
        ),
        (
            "prior:\n  caption: blank\n",
            "run.yaml:5: prior.caption: got 'blank' with prior.mode 'generated', expected null; it is adapter_off's",
        ),
        (
            "prior:\n  mode: adapter_off\n",
            "run.yaml:5: prior.mode: got 'adapter_off' without prior.class_prompt to ask with; expected one, class "
            "pictures, or prior.caption blank or instance",
        ),
        (
            "prior: {mode: adapter_off, caption: instance}\nwords: {starts: {<a>: cat}}\n",
            "run.yaml:4: prior.caption: got 'instance' beside words.starts, whose words the base cannot read; expected "
            "class or blank",
        ),
        (
            "prior: {mode: adapter_off, class_prompt: an <a>}\nwords: {starts: {<a>: cat}}\n",
            "run.yaml:4: prior.class_prompt: 'an <a>' holds the new word '<a>', which the base cannot read; expected "
            "words that it knows",
        ),
        (
            "prior: {class_prompt: a, class_prompts: [b]}\n",
            "run.yaml:4: prior.class_prompts: got ['b'] beside prior.class_prompt, expected one of them",
        ),
        (
            "adapter:\n  train_unet: false\n",
            "run.yaml:5: adapter.train_unet: got false, and adapter.train_text_encoder too; "
            "expected true for one of them, or words.starts to learn new words alone",
        ),
        (
            "optim:\n  text_encoder_learning_rate: 1e-5\n",
            "run.yaml:5: optim.text_encoder_learning_rate: got 1e-05, but adapter.train_text_encoder is false; "
            "expected null, or true",
        ),
        (
            "optim:\n  warmup_steps: 5\n  lr_scheduler: constant\n",
            "run.yaml:5: optim.warmup_steps: got 5 with optim.lr_scheduler 'constant', which has none; "
            "expected 0, or 'constant_with_warmup'",
        ),
        (
            "loss: {timesteps: {min: 500, max: 500}}\n",
            "run.yaml:4: loss.timesteps.min: got 500, expected less than max, which is 500",
        ),
        (
            "loss:\n  timesteps:\n    mean: 0.5\n",
            "run.yaml:6: loss.timesteps.mean: got 0.5 with density null, which has none; expected density logit_normal "
            "beside it",
        ),
        (
            "loss: {timesteps: {density: mode, alpha: 2}}\n",
            "run.yaml:4: loss.timesteps.alpha: got 2.0 with density mode, which has none; expected density beta "
            "beside it",
        ),
        (
            "loss: {timesteps: {density: uniform}}\nflow:\n  logit_mean: 1\n",
            "run.yaml:6: flow.logit_mean: got 1.0 beside loss.timesteps.density, expected one of them: loss.timesteps",
        ),
        (
            "loss:\n  kind: huber\n  huber_c: 2\n",
            "run.yaml:6: loss.huber_c: got 2.0 with loss.huber_schedule 'snr', which falls to it from 1; expected at "
            "most 1, or 'constant'",
        ),
        (
            "loss: {noise_offset_random: true}\n",
            "run.yaml:4: loss.noise_offset_random: got true without loss.noise_offset, expected both or neither",
        ),
        ("loss:\n  kind: l1\n", "run.yaml:5: loss.kind: got 'l1', expected 'mse' or 'huber'"),
        (
            "loss:\n  noise_ofset: 0.1\n",
            "run.yaml:5: loss.noise_ofset: no such key; did you mean loss.noise_offset?",
        ),
        (
            "optim:\n  warmup_steps: 5\n  steps: 4\n",
            "run.yaml:5: optim.warmup_steps: got 5, expected at most optim.steps, which is 4",
        ),
    ],
)
def test_one_line_for_a_mistake(file: Path, added: str, message: str) -> None:
    assert error_of(file, MINIMAL + added) == message


HELD_OUT = "without held-out pictures, whose loss alone tells what is best; expected data.validation_share, "


@pytest.mark.parametrize(
    ("added", "message"),
    [
        (
            "preview:\n  prompts: [a, {prompt: b, sise: 64}]\n",
            "run.yaml:5: preview.prompts[1].sise: no such key; did you mean preview.prompts[1].size?",
        ),
        (
            "preview:\n  prompts: [{prompt: a, size: 63}]\n",
            "preview.prompts[0].size: got 63, expected a multiple of 8 or a valid list",
        ),
        ("preview:\n  prompts: [{negative: a}]\n", "preview.prompts[0].prompt: missing; expected: What is drawn."),
        ("checkpoint: {keep_best: true}\n", f"run.yaml:4: checkpoint.keep_best: got true {HELD_OUT}"),
        ("validation: {patience: 3}\n", f"run.yaml:4: validation.patience: got 3 {HELD_OUT}"),
        (
            "checkpoint: {final: best}\n",
            "run.yaml:4: checkpoint.final: got 'best' with checkpoint.keep_best false, expected true for it",
        ),
    ],
)
def test_one_line_for_previews_and_the_best(file: Path, added: str, message: str) -> None:
    assert message in error_of(file, MINIMAL + added)


@pytest.mark.parametrize(
    "held_out",
    ["  validation_share: 0.5\n", "  validation_dir: pictures\n", "  concepts: [{dir: c, role: validation}]\n"],
)
def test_the_best_of_pictures_that_are_held_out_can_be_kept(file: Path, held_out: str) -> None:
    (file.parent / "c").mkdir()
    file.write_text(f"{MINIMAL}{held_out}checkpoint: {{keep_best: true, final: best}}\nvalidation: {{patience: 2}}\n")
    config = TrainConfig.from_yaml(file)
    assert config.checkpoint.keep_best and config.validation.patience == 2


def test_a_preview_is_written_as_it_was_said(file: Path) -> None:
    said = [
        "a",
        {"prompt": "b", "size": 64},
        {"prompt": "c", "negative": "d", "seed": 1, "size": [64, 96], "steps": 2, "strength": 0.5},
    ]
    file.write_text(f"{MINIMAL}preview: {{prompts: {said}}}\n")
    config = TrainConfig.from_yaml(file)
    assert config.model_dump(mode="json")["preview"]["prompts"] == said
    assert [one.sides for one in config.preview.prompts] == [None, (64, 64), (64, 96)]
    file.write_text(config.to_yaml())
    assert TrainConfig.from_yaml(file) == config


def test_repeats_of_old_measure_every_picture(file: Path) -> None:
    for text, most in (("", 6), ("repeats: 4", None), ("repeats: 4, pictures: 3", 3), ("pictures: 9", 9)):
        file.write_text(f"{MINIMAL}validation: {{{text}}}\n")
        assert TrainConfig.from_yaml(file).validation.at_most == most


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "run.yaml: got nothing, expected `key: value` lines"),
        ("[1]", "run.yaml: got [1], expected `key: value` lines"),
        ("output_dir: x\n", "run.yaml: data: missing; expected: The pictures that are learnt."),
        (
            "data: {instance_dir: pictures}\n",
            "run.yaml: output_dir: missing; expected: The run's folder; relative to the current directory.",
        ),
        (
            "output_dir: x\ndata:\n  instnce_dir: p\n",
            "run.yaml:3: data.instnce_dir: no such key; did you mean data.instance_dir?",
        ),
        (
            "output_dir: x\ndata:\n  instance_dir: nope\n",
            "run.yaml:3: data.instance_dir: got 'nope', expected an existing folder of pictures",
        ),
        ("output_dir: ''\ndata: {instance_dir: pictures}\n", "run.yaml:1: output_dir: got '', expected a path"),
        (
            MINIMAL + "  validation_share: 0.2\n  validation_dir: pictures\n",
            "run.yaml:4: data.validation_share: got 0.2 beside data.validation_dir, expected one of them",
        ),
    ],
)
def test_one_line_for_a_whole_file(file: Path, text: str, message: str) -> None:
    assert error_of(file, text) == message


def test_a_syntax_error_names_its_line(file: Path) -> None:
    message = error_of(file, MINIMAL + "optim:\n\tsteps: 3\n")
    assert message.startswith("run.yaml:5: not valid YAML: found character '\\t' that cannot start any token; ")


def test_files_that_are_no_yaml_files(file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as missing:
        TrainConfig.from_yaml(file)
    assert str(missing.value) == f"{file}: cannot be read (No such file or directory); expected a YAML file"
    with pytest.raises(ValueError) as folder:
        TrainConfig.from_yaml(tmp_path)
    assert str(folder.value) == f"{tmp_path}: cannot be read (Is a directory); expected a YAML file"
    file.write_bytes(b"model: \xff\xfe")
    with pytest.raises(ValueError) as binary:
        TrainConfig.from_yaml(file)
    assert str(binary.value) == f"{file}: not UTF-8 text (byte 7); expected a YAML file"


def test_no_object_is_built_from_a_file(file: Path) -> None:
    message = error_of(file, "output_dir: !!python/object/apply:os.getcwd []\n")
    assert message.startswith("run.yaml:1: not valid YAML: could not determine a constructor for the tag ")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"optim.step": "4"}, "--optim.step: no such key; did you mean optim.steps?"),
        ({"optim": "4"}, "--optim: a section, expected one of its keys, such as --optim.steps"),
        ({"optim.steps": "x"}, "--optim.steps: got 'x', expected a valid integer"),
        ({"prior.class_images": "0"}, "--prior.class_images: got 0, expected greater than or equal to 1"),
    ],
)
def test_a_bad_override_is_named_as_the_flag(file: Path, overrides: dict[str, str], message: str) -> None:
    assert error_of(file, MINIMAL, overrides) == message


def test_a_built_configuration_cannot_change(file: Path) -> None:
    file.write_text(MINIMAL)
    config = TrainConfig.from_yaml(file)
    with pytest.raises(ValidationError, match="frozen"):
        config.optim.steps = 3


def test_a_component_s_file_starts_at_the_config_and_must_be_there(file: Path) -> None:
    text = MINIMAL + "base: {unet: tuned.safetensors}\n"
    assert "base.unet: got 'tuned.safetensors', expected an existing .safetensors or .gguf file" in error_of(file, text)
    (file.parent / "tuned.safetensors").write_bytes(b"")
    assert TrainConfig.from_yaml(file).base.unet == file.parent / "tuned.safetensors"
