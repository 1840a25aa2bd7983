"""Where captions come from, and which text a step is trained with: a function of seed, epoch and picture alone."""

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import dora_diffusion as dd
from dora_diffusion.families import family_of_pipeline
from dora_diffusion.generation.prompts import encode_captions, prompt_arguments
from dora_diffusion.training.base.trainable import prepare_trainable
from dora_diffusion.training.config import CaptionsConfig, ConceptConfig, DataConfig, TrainConfig
from dora_diffusion.training.data.batches import BatchSource
from dora_diffusion.training.data.captions import caption_at, find_captions, read_metadata, words_of_file
from dora_diffusion.training.data.concepts import checked_examples
from dora_diffusion.training.data.doctor import examine
from dora_diffusion.training.data.examples import Example, find_examples
from tests.pocket_random import random_pocket_pipeline
from tests.tolerances import assert_close


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = np.random.default_rng(list(str(path).encode())).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(numbers).resize((32, 32)).save(path)  # no two alike
    return path


def captions_of(folder: Path, prompt: str | None = None) -> dict[str, tuple[str, ...]]:
    return {example.path.name: example.captions for example in find_examples(folder, instance_prompt=prompt)}


# Where they come from


@pytest.mark.parametrize("name", ["1.txt", "1.caption", "1.png.txt", "1.png.caption", "1.TXT", "1.CAPTION"])
def test_text_files_by_every_name_that_tools_give_them(tmp_path: Path, name: str) -> None:
    picture(tmp_path / "1.png")
    (tmp_path / name).write_text("of its own")
    assert captions_of(tmp_path, "of all") == {"1.png": ("of its own",)}
    assert not examine(tmp_path, min_side=8).findings


def test_lines_of_a_text_file_are_captions_and_empty_lines_are_not(tmp_path: Path) -> None:
    picture(tmp_path / "1.png")
    (tmp_path / "1.txt").write_text("a red  robot\n\n  a robot, red \n")
    assert captions_of(tmp_path) == {"1.png": ("a red robot", "a robot, red")}
    (tmp_path / "1.txt").write_text("\n \n")
    assert find_captions(tmp_path / "1.png", {}) == ()
    with pytest.raises(ValueError, match="1 of 1 pictures have no caption, or an empty one"):
        captions_of(tmp_path, "of all")


def test_a_table_of_captions(tmp_path: Path) -> None:
    for name in ("1.png", "2.png"):
        picture(tmp_path / name)
    (tmp_path / "metadata.csv").write_text('file_name,text\n1.png,"a dog, sitting"\n2.png,two\n')
    assert captions_of(tmp_path) == {"1.png": ("a dog, sitting",), "2.png": ("two",)}
    (tmp_path / "metadata.csv").write_text("file_name,text\n1.png,one\n3.png,three\n")
    with pytest.raises(ValueError, match=r"metadata.csv:3: file_name '3.png' is no picture in"):
        captions_of(tmp_path, "of all")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "1.png", "text": ["one", "uno"]}))
    with pytest.raises(ValueError, match=r"metadata.csv: stands beside metadata.jsonl, expected one of them"):
        captions_of(tmp_path, "of all")
    (tmp_path / "metadata.csv").unlink()
    assert captions_of(tmp_path, "of all") == {"1.png": ("one", "uno"), "2.png": ("of all",)}


def test_a_parquet_table_is_read_by_pyarrow_and_asks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "1.png")
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"metadata.parquet: needs the package pyarrow; pip install 'dora-diffusion"):
        read_metadata(tmp_path)
    table = SimpleNamespace(to_pylist=lambda: [{"file_name": "1.png", "text": None, "caption": "one"}])
    parquet = SimpleNamespace(read_table=lambda path: table)
    monkeypatch.setitem(sys.modules, "pyarrow", SimpleNamespace(ArrowException=RuntimeError, parquet=parquet))
    assert read_metadata(tmp_path) == {tmp_path / "1.png": ("one",)}


def test_a_real_parquet_table(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pip install 'dora-diffusion[parquet]'")
    from pyarrow import parquet

    picture(tmp_path / "1.png")
    parquet.write_table(pyarrow.table({"file_name": ["1.png"], "text": ["one"]}), tmp_path / "metadata.parquet")
    assert read_metadata(tmp_path) == {tmp_path / "1.png": ("one",)}
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1 broken")
    with pytest.raises(ValueError, match="metadata.parquet: no parquet file"):
        read_metadata(tmp_path)


@pytest.mark.parametrize(
    "name, said",
    [("a-red_robot", "a red robot"), ("0012_a red robot (3)", "a red robot"), ("IMG_2041", "IMG"), ("123", "")],
)
def test_names_of_files_that_say_something(name: str, said: str) -> None:
    assert words_of_file(Path(f"{name}.png")) == said


def test_a_name_of_a_file_goes_before_the_prompt_where_it_is_asked_for(tmp_path: Path) -> None:
    picture(tmp_path / "a red robot.png")
    picture(tmp_path / "2.png")
    data = DataConfig(instance_dir=tmp_path, instance_prompt="a robot", captions=CaptionsConfig(from_file_name=True))
    assert [example.caption for example in checked_examples(data, seed=0).train] == ["a robot", "a red robot"]


# Folders


def test_folders_of_kohya_are_repeats_and_captions(tmp_path: Path) -> None:
    picture(tmp_path / "10_zqx robot" / "1.png")
    picture(tmp_path / "2_car" / "2.png")
    (tmp_path / "2_car" / "2.txt").write_text("a car of its own")
    picture(tmp_path / "0_left_out" / "3.png")
    picture(tmp_path / "reg" / "4.png")
    found = checked_examples(DataConfig(instance_dir=tmp_path), seed=0).train
    assert [(example.path.name, example.caption, example.repeats) for example in found] == [
        ("2.png", "a car of its own", 2),
        ("1.png", "zqx robot", 10),
    ]
    picture(tmp_path / "5.png")  # beside them
    found = checked_examples(DataConfig(instance_dir=tmp_path, instance_prompt="any"), seed=0).train
    assert [(example.path.name, example.repeats) for example in found] == [("5.png", 1), ("2.png", 2), ("1.png", 10)]
    assert found[2].caption == "any"
    (tmp_path / "20000_more").mkdir()
    with pytest.raises(ValueError, match="20000_more: 20000 repeats, expected at most 10000"):
        checked_examples(DataConfig(instance_dir=tmp_path, instance_prompt="any"), seed=0)


def test_the_doctor_reads_the_folders_of_kohya(tmp_path: Path) -> None:
    picture(tmp_path / "10_zqx robot" / "1.png")
    picture(tmp_path / "2_car" / "2.png")
    (tmp_path / "2_car" / "3.txt").write_text("of no picture")
    report = examine(tmp_path, min_side=8)
    assert report.images == 2
    assert [(f.kind, f.path.relative_to(tmp_path).as_posix()) for f in report.findings] == [
        ("orphan-caption", "2_car/3.txt")
    ]
    (tmp_path / "2_car" / "2.png").write_bytes((tmp_path / "10_zqx robot" / "1.png").read_bytes())
    assert [f.kind for f in examine(tmp_path, min_side=8).findings] == ["orphan-caption", "duplicate"]


def test_concepts_have_prompts_triggers_weights_and_roles(tmp_path: Path) -> None:
    for folder in ("robot", "dog", "held"):
        picture(tmp_path / folder / "1.png")
    (tmp_path / "robot" / "1.txt").write_text("{} on a table")
    data = DataConfig(
        instance_prompt="a photo of {}",
        concepts=[
            ConceptConfig(dir=tmp_path / "robot", trigger="zqx robot", repeats=3, weight=0.5, caption_dropout=0.25),
            ConceptConfig(dir=tmp_path / "dog", prompt="a dog", role="class"),
            ConceptConfig(dir=tmp_path / "held", trigger="zqx robot", role="validation"),
        ],
    )
    train, validation, classes = checked_examples(data, seed=0)
    assert train == [Example(tmp_path / "robot" / "1.png", "zqx robot on a table", (), 3, 0.5, 0.25, original=(32, 32))]
    assert [example.caption for example in validation] == ["a photo of zqx robot"]
    assert [example.caption for example in classes] == ["a dog"]
    with pytest.raises(ValueError, match=r"1.png: a caption holds \{\}, which stands for a trigger; set data.trigger"):
        checked_examples(DataConfig(instance_dir=tmp_path / "robot"), seed=0)


def test_mistakes_in_concepts_name_their_place(tmp_path: Path) -> None:
    picture(tmp_path / "robot" / "1.png")
    file = tmp_path / "run.yaml"

    def error(data: str) -> str:
        file.write_text(f"output_dir: out\ndata:\n{data}")
        with pytest.raises(ValueError) as caught:
            TrainConfig.from_yaml(file)
        return str(caught.value).replace(str(tmp_path), "HERE")

    assert "data.instance_dir: missing; expected a folder, or one among data.concepts" in error("  flip: true\n")
    concepts = "  concepts:\n    - {dir: robot}\n    - dir: robot\n"
    assert error(concepts + "      repeat: 3\n").endswith(
        "run.yaml:6: data.concepts[1].repeat: no such key; did you mean data.concepts[1].repeats?"
    )
    assert "run.yaml:6: data.concepts[1].repeats: got 0, expected greater than or equal to 1" in error(
        concepts + "      repeats: 0\n"
    )
    assert "data.concepts: dir 'HERE/none', expected an existing folder" in error("  concepts: [{dir: none}]\n")
    assert "data.captions.shufle: no such key; did you mean data.captions.shuffle?" in error(
        "  instance_dir: robot\n  captions: {shufle: true}\n"
    )
    assert "data.caption_dropout: got 0.1 beside data.captions.dropout" in error(
        "  instance_dir: robot\n  caption_dropout: 0.1\n  captions: {dropout: 0.1}\n"
    )


def test_a_setting_three_levels_deep_is_a_flag(tmp_path: Path) -> None:
    picture(tmp_path / "robot" / "1.png")
    file = tmp_path / "run.yaml"
    file.write_text("output_dir: out\ndata: {instance_dir: robot}\n")
    config = TrainConfig.from_yaml(file, {"data.captions.shuffle": "true", "data.captions.separator": ";"})
    assert config.data.captions == CaptionsConfig(shuffle=True, separator=";")
    again = tmp_path / "again.yaml"
    again.write_text(config.to_yaml())
    assert TrainConfig.from_yaml(again) == config


# What a step is trained with

TAGS = "robot, red, on a table, at night, alone"
RULES = CaptionsConfig(shuffle=True, keep_tokens=1, tag_dropout=0.5)


def drawn(captions: tuple[str, ...], rules: CaptionsConfig, count: int = 400, dropout: float = 0.0) -> list[str]:
    return [caption_at(captions, rules, seed=3, place=f"{number}/0", dropout=dropout) for number in range(count)]


def test_tags_are_shuffled_and_dropped_but_for_the_first() -> None:
    found = drawn((TAGS,), RULES)
    assert all(caption.startswith("robot") for caption in found)
    assert len(set(found)) > 40 and set(", ".join(found).split(", ")) == set(TAGS.split(", "))
    kept = Counter(tag for caption in found for tag in caption.split(", "))
    assert all(120 < kept[tag] < 280 for tag in TAGS.split(", ")[1:])  # of 400, half: 10 sigma are 100
    orders = {caption for caption in drawn((TAGS,), CaptionsConfig(shuffle=True))}
    assert len(orders) > 80 and all(sorted(order.split(", ")) == sorted(TAGS.split(", ")) for order in orders)


def test_captions_and_wildcards_are_chosen_and_dropped() -> None:
    assert set(drawn(("one", "two", "three"), CaptionsConfig())) == {"one", "two", "three"}
    rules = CaptionsConfig(wildcards=True)
    assert set(drawn(("a {red|green {big|small}} robot",), rules)) == {
        "a red robot",
        "a green big robot",
        "a green small robot",
    }
    assert set(drawn(("a {red|green} robot",), CaptionsConfig())) == {"a {red|green} robot"}
    assert set(drawn(("a {red} robot",), rules)) == {"a {red} robot"}  # no choice, so no wildcard
    assert drawn(("one",), rules, dropout=1.0) == [""] * 400 and "" not in drawn(("one",), rules)
    assert 20 < drawn(("one",), rules, dropout=0.1).count("") < 70


@given(seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 99), sample=st.integers(0, 10**6))
def test_the_text_depends_on_seed_and_place_alone(seed: int, epoch: int, sample: int) -> None:
    def text(place: str) -> str:
        return caption_at((TAGS, "x, y"), RULES, seed=seed, place=place, dropout=0.1)

    before = text(f"{epoch}/{sample}")
    text("another/one")
    assert text(f"{epoch}/{sample}") == before


# In training


def config_of(tmp_path: Path, **data) -> TrainConfig:
    return TrainConfig(output_dir=tmp_path / "run", data=DataConfig(**data), optim={"batch_size": 2, "steps": 4})


def test_a_caption_means_in_training_what_it_means_when_it_is_drawn() -> None:
    pipe = random_pocket_pipeline()
    family = family_of_pipeline(pipe)
    captions = ["a (red:1.4) robot", "a [small] robot", r"a robot \(red\)", "a robot", ""]
    made = encode_captions(pipe, family, captions)["encoder_hidden_states"]
    for caption, row in zip(captions, made, strict=True):
        plain, _, embeds = prompt_arguments(pipe, family, caption, "")
        expected = embeds["prompt_embeds"] if embeds else family.encode(pipe, [plain])["encoder_hidden_states"]
        assert_close(row[None], expected)
    assert not torch.allclose(made[0], family.encode(pipe, ["a (red:1.4) robot"])["encoder_hidden_states"][0])
    with pytest.raises(ValueError, match="<lora:ink> names an adapter"):
        encode_captions(pipe, family, ["a robot <lora:ink:1>"])


def test_weights_in_captions_reach_a_text_encoder_that_is_trained() -> None:
    pipe = random_pocket_pipeline()
    family = family_of_pipeline(pipe)
    pipe.text_encoder.requires_grad_(True)
    encode_captions(pipe, family, ["a (red:1.4) robot", "one"])["encoder_hidden_states"].square().sum().backward()
    assert pipe.text_encoder.get_input_embeddings().weight.grad.abs().sum() > 0


def test_every_epoch_shows_what_repeats_say_under_captions_of_the_rules(tmp_path: Path) -> None:
    for name, repeats in (("1.png", 3), ("2.png", 1)):
        picture(tmp_path / f"{repeats}_{name[0]}" / name)
        (tmp_path / f"{repeats}_{name[0]}" / name).with_suffix(".txt").write_text(f"{name}, a, b, c")
    config = config_of(tmp_path, instance_dir=tmp_path, captions=CaptionsConfig(shuffle=True, keep_tokens=1))
    examples = [replace(one, size=(32, 32)) for one in checked_examples(config.data, seed=0).train]
    trainable = prepare_trainable(random_pocket_pipeline(), config)
    encoded: list[str] = []
    seen: list[str] = []
    encode = trainable.family.encode

    def record(pipe, captions):
        encoded.extend(captions)
        return encode(pipe, captions)

    object.__setattr__(trainable, "family", SimpleNamespace(**{**vars(trainable.family), "encode": record}))
    source = BatchSource(trainable, config, instances=examples, classes=[])
    for index in range(20):  # ten epochs of four samples
        seen += source.batches_at(index)[0].names
    assert Counter(seen) == {"1.png": 30, "2.png": 10}
    assert len(set(encoded)) == len(encoded) > 6, "captions of later steps are encoded once, together"
    again = BatchSource(trainable, config, instances=examples, classes=[]).batches_at(13)[0]
    assert_close(
        again.conditioning["encoder_hidden_states"], source.batches_at(13)[0].conditioning["encoder_hidden_states"]
    )


def test_weights_of_concepts_weigh_the_loss(tmp_path: Path) -> None:
    for name in ("a", "b", "dog"):
        picture(tmp_path / name / "1.png")
    config = config_of(
        tmp_path,
        instance_prompt="x",
        concepts=[
            ConceptConfig(dir=tmp_path / "a", weight=0.5),
            ConceptConfig(dir=tmp_path / "b"),
            ConceptConfig(dir=tmp_path / "dog", role="class", weight=3.0),
        ],
    )
    split = checked_examples(config.data, seed=0)
    train, classes = ([replace(one, size=(32, 32)) for one in part] for part in (split.train, split.classes))
    trainable = prepare_trainable(random_pocket_pipeline(), config)
    batch = BatchSource(trainable, config, instances=train, classes=classes).batches_at(0)[0]
    assert sorted(batch.weights.tolist()) == [1.0, 2.0, 6.0, 6.0]  # twice, as beside every class picture


def test_a_run_of_concepts_trains_and_resumes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        picture(tmp_path / name / "1.png")
    config = TrainConfig(
        output_dir=tmp_path / "run",
        model="pocket",
        data=DataConfig(
            instance_prompt="a (red:1.2) {}, on a table",
            trigger="robot",
            concepts=[ConceptConfig(dir=tmp_path / "a", repeats=2), ConceptConfig(dir=tmp_path / "b", role="class")],
            captions=CaptionsConfig(shuffle=True, tag_dropout=0.3),
        ),
        adapter={"rank": 1},
        optim={"steps": 2},
        checkpoint={"every": 1},
        validation={"every": 0, "repeats": 1},
    )
    assert dd.train(config).steps == 2
    whole = dd.load_adapter(tmp_path / "run")
    part = config.model_copy(update={"output_dir": tmp_path / "part"})
    dd.train(part)
    newest = tmp_path / "part" / "checkpoints" / "step-00000002"
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    dd.train(part, resume="latest")
    again = dd.load_adapter(tmp_path / "part")
    for path, module in whole.modules.items():
        assert torch.equal(module.up, again.modules[path].up)
