"""The model card: what hub pages read of it, and that no caption breaks its YAML, its Markdown or a shell."""

import shlex
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from dora_diffusion.training.base.below import Below
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.run.card import Left, code, code_block, run_card
from dora_diffusion.training.run.exports import Exported

EVIL = "---\n`rm -rf /`\n```\n\"; $(touch x) 'quoted' # [a](javascript:b) <script>: - *"


def config_of(folder: Path, **sections) -> TrainConfig:
    (folder / "images").mkdir(exist_ok=True)
    data = {"instance_dir": folder / "images", **sections.pop("data", {})}
    return TrainConfig.model_validate({"output_dir": folder / "run", "data": data, **sections})


def front(card: str) -> dict:
    """The YAML of a card as the hub's own library reads it."""
    return ModelCard(card).data.to_dict()


def test_the_front_matter_says_what_hub_pages_look_for(tmp_path) -> None:
    config = config_of(
        tmp_path,
        model="stabilityai/stable-diffusion-xl-base-1.0@main",
        data={"trigger": "zqx robot", "instance_prompt": "a photo of {}"},
        preview={"prompts": ["a zqx robot", "zqx: robot"]},
    )
    found = front(run_card(config, Left(), ["samples/prompt-1.png", "samples/prompt-2.png"]))
    assert found == {
        "base_model": "stabilityai/stable-diffusion-xl-base-1.0",
        "base_model_relation": "adapter",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "diffusers", "lora", "template:sd-lora", "dora"],
        "instance_prompt": "zqx robot",
        "widget": [
            {"text": "a zqx robot", "output": {"url": "samples/prompt-1.png"}},
            {"text": "zqx: robot", "output": {"url": "samples/prompt-2.png"}},
        ],
    }
    assert "# license: " in run_card(config, Left())


def test_a_base_that_is_no_repository_is_not_named_as_one(tmp_path) -> None:
    (tmp_path / "base").mkdir()
    for model in ("pocket", str(tmp_path / "base")):
        card = run_card(config_of(tmp_path, model=model), Left())
        assert "base_model" not in front(card) and str(tmp_path) not in card
    assert "# DoRA adapter on `base`" in card


def test_tags_say_what_it_is(tmp_path) -> None:
    plain = front(run_card(config_of(tmp_path, adapter={"use_dora": False}), Left()))
    assert plain["tags"] == ["text-to-image", "diffusers", "lora", "template:sd-lora"]
    words = config_of(tmp_path, adapter={"train_unet": False}, words={"starts": {"<zqx>": "robot"}})
    alone = front(run_card(words, Left(words=[Path("words/zqx.safetensors")])))
    assert "lora" not in alone["tags"] and "textual_inversion" in alone["tags"]
    assert alone["instance_prompt"] == "<zqx>"


def test_what_strangers_wrote_stays_text(tmp_path) -> None:
    config = config_of(
        tmp_path, data={"instance_prompt": EVIL, "trigger": EVIL}, preview={"prompts": [EVIL]}, model=EVIL
    )
    below = [Below("`name`.safetensors", 0.5, "ab12", "DoRA", 3)]
    exports = [Exported("kohya", tmp_path / "exports" / "a`b-kohya.safetensors", "read back")]
    card = run_card(config, Left(below=below, exports=exports), ["samples/prompt-1.png"])
    found = front(card)
    assert found["instance_prompt"] == found["widget"][0]["text"] == " ".join(EVIL.split())
    body = ModelCard(card).text
    line = next(line for line in body.splitlines() if line.startswith("# DoRA"))
    assert line.count("````") == 2  # a span that its own three backticks cannot end
    command = body.partition("````bash\n")[2].partition("\n````")[0]
    words = shlex.split(command)
    assert words[words.index("--prompt") + 1] == " ".join(EVIL.split())
    assert "``a`b" not in body and "`` exports/a`b-kohya.safetensors ``" not in body
    assert "``exports/a`b-kohya.safetensors``" in body


@pytest.mark.parametrize(
    ("text", "span"),
    [("a", "`a`"), ("a`b", "``a`b``"), ("`a", "`` `a ``"), ("a``", "``` a`` ```"), ("a\n b", "`a b`"), ("", "``")],
)
def test_a_span_of_code_has_more_backticks_than_its_text(text: str, span: str) -> None:
    assert code(text) == span


def test_a_block_of_code_is_ended_by_nothing_in_it() -> None:
    assert code_block("a\n```\nb", "bash") == "````bash\na\n```\nb\n````"
    assert code_block("a", "bash") == "```bash\na\n```"


def test_a_run_that_names_no_prompt_is_drawn_with_one_all_the_same(tmp_path) -> None:
    captioned = config_of(tmp_path)
    captioned = captioned.model_copy(
        update={
            "preview": captioned.preview.model_copy(update={"prompts": []}),
            "data": captioned.data.model_copy(update={"instance_prompt": None, "trigger": None}),
        }
    )
    assert "--prompt 'as the captions have it'" in run_card(captioned, Left())
