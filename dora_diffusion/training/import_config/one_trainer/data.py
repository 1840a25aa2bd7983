"""Options of concepts, captions, pictures and masks."""

from typing import Any

from dora_diffusion.training.import_config.counts import pictures_of
from dora_diffusion.training.import_config.records import (
    CONCEPT,
    Answer,
    Row,
    Source,
    copied,
    lost,
    needless,
    several,
    to,
    unneeded,
    without,
)
from dora_diffusion.training.import_config.values import flag, number, real, several_sizes, text, whole


def _of_balancing(value: Any, source: Source) -> Answer:
    count = real(value)
    if str(source.get("concepts[].balancing_strategy", "REPEATS")).upper() == "SAMPLES":
        return _samples(count, source)
    if count == int(count) and count >= 1:
        return to(f"{CONCEPT}.repeats", int(count))
    return lost(f"repeats are whole numbers here; a `weight` of {count} does the same to the loss")


def _samples(count: float, source: Source) -> Answer:
    pictures = pictures_of(source, str(source.get("concepts[].path", "")))
    if not pictures or count % pictures:
        return lost(f"{count:.0f} samples an epoch of {pictures} pictures: repeats are whole numbers here")
    return to(f"{CONCEPT}.repeats", int(count // pictures))


def _type(value: Any, source: Source) -> Answer:
    kind = text(value).upper()
    if kind == "STANDARD":
        return needless("learnt, as here")
    if kind == "VALIDATION":
        return to(f"{CONCEPT}.role", "validation")
    if kind == "PRIOR_PREDICTION":
        says = "towards what the base predicts for them"
        return several({f"{CONCEPT}.role": "class", "prior.mode": "adapter_off"}, says)
    raise ValueError(f"got {kind}, expected STANDARD, VALIDATION or PRIOR_PREDICTION")


def _validation_concept(value: Any, source: Source) -> Answer:
    return to(f"{CONCEPT}.role", "validation") if flag(value) else needless("learnt, as here")


def _prompt_source(value: Any, source: Source) -> Answer:
    kind = text(value).lower()
    if kind == "sample":
        return needless("a text file beside each picture, as here")
    if kind == "filename":
        return to("data.captions.from_file_name", True)
    return needless("prompt_path has it") if kind == "concept" else lost("expected sample, filename or concept")


def _prompt_path(value: Any, source: Source) -> Answer:
    if str(source.get("concepts[].text.prompt_source", "sample")).lower() != "concept":
        return needless("prompt_source is another")
    try:
        lines = source.at(text(value)).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeError):
        raise ValueError("that file is not on this machine; write its prompt into the concept") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError("that file is empty")
    return to(f"{CONCEPT}.prompt", prompts[0], "the first of its lines" if len(prompts) > 1 else "")


def _tag_dropout(value: Any, source: Source) -> Answer:
    if not flag(source.get("concepts[].text.tag_dropout_enable", False)):
        return needless("tag_dropout_enable is off")
    return to("data.captions.tag_dropout", real(value)) if number(value) else needless("off there too")


def _keep_tags(value: Any, source: Source) -> Answer:
    names = ("concepts[].text.enable_tag_shuffling", "concepts[].text.tag_dropout_enable")
    if not any(flag(source.get(name, False)) for name in names):
        return needless("tags are neither shuffled nor dropped")
    return to("data.captions.keep_tokens", whole(value))


def _flip(value: Any, source: Source) -> Answer:
    return to("data.flip", True) if flag(value) else needless("off there too")


def _jitter(value: Any, source: Source) -> Answer:
    return to("data.crop", "random" if flag(value) else "center")


def _own_resolution(value: Any, source: Source) -> Answer:
    if not flag(source.get("concepts[].image.enable_resolution_override", False)):
        return needless("enable_resolution_override is off")
    return several_sizes(f"{CONCEPT}.resolution", value)


def _buckets(value: Any, source: Source) -> Answer:
    on = flag(value)
    return several({"data.buckets": True, "data.upscale": True} if on else {"data.buckets": False})


def _masked(value: Any, source: Source) -> Answer:
    if not flag(value):
        return needless("off there too")
    return to("data.mask_outside", real(source.get("unmasked_weight", 0.1)), "masks are NAME-masklabel.png, as there")


def _normalised(value: Any, source: Source) -> Answer:
    return needless("always so here" if flag(value) else "here a masked loss is always divided by the area of its mask")


DATA: list[Row] = [
    Row(
        "resolution",
        ("data.resolution",),
        "a list, as there; `1024x768` is a square of its area",
        lambda value, source: several_sizes("data.resolution", value),
        "512, 768",
        unset="512",
    ),
    Row(
        "aspect_ratio_bucketing",
        ("data.buckets", "data.upscale"),
        "with upscale true: small pictures are made larger there",
        _buckets,
        False,
        unset=True,
    ),
    *unneeded(
        "latents are kept in memory here when they can be",
        "latent_caching clear_cache_before_training only_cache",
        example=True,
    ),
    Row(
        "cache_dir",
        ("data.cache_dir",),
        "with latent_caching",
        lambda value, source: (
            to("data.cache_dir", text(value))
            if flag(source.get("latent_caching", True))
            else needless("latent_caching is off")
        ),
        "workspace-cache/run",
    ),
    Row(
        "masked_training",
        ("data.mask_outside",),
        "unmasked_weight; masks are NAME-masklabel.png, as there",
        _masked,
        True,
    ),
    *unneeded("with masked_training", "unmasked_weight", example=0.1),
    *unneeded("masks are always used here", "unmasked_probability", example=0.1),
    Row("normalize_masked_area_loss", (), "always so here", _normalised, False),
    *without(
        "no counterpart for masks: `prior.mode: adapter_off` keeps whole pictures",
        "masked_prior_preservation_weight",
        example=0.5,
    ),
    *without("no counterpart: pictures and captions alone are learnt from", "custom_conditioning_image", example=True),
    *unneeded("of videos", "frames", example="25"),
    *unneeded("read too, when it is there", "concept_file_name sample_definition_file_name", example="concepts.json"),
    copied("concepts[].path", f"{CONCEPT}.dir", "img", read=text),
    Row(
        "concepts[].enabled",
        (),
        "those that are off are left out",
        lambda value, source: needless("as here" if flag(value) else "left out, as there"),
        True,
    ),
    Row(
        "concepts[].type",
        (f"{CONCEPT}.role", "prior.mode"),
        "VALIDATION; PRIOR_PREDICTION: class, and `adapter_off`",
        _type,
        "PRIOR_PREDICTION",
        beside={"concepts": [{"path": "img"}]},
    ),
    Row("concepts[].validation_concept", (f"{CONCEPT}.role",), "of older files", _validation_concept, True),
    Row("concepts[].balancing", (f"{CONCEPT}.repeats",), "a whole number; SAMPLES / pictures", _of_balancing, 4.0),
    Row("concepts[].repeats", (f"{CONCEPT}.repeats",), "of older files", _of_balancing, 4.0),
    *unneeded("with balancing", "concepts[].balancing_strategy", example="REPEATS"),
    copied("concepts[].loss_weight", f"{CONCEPT}.weight", 0.5, read=real),
    *without("make a concept of each", "concepts[].include_subdirectories", example=True),
    Row(
        "concepts[].image_variations",
        ("data.cache_variants",),
        "",
        lambda value, source: to("data.cache_variants", whole(value)) if whole(value) > 1 else needless("1"),
        4,
    ),
    *unneeded("captions are drawn anew each time", "concepts[].text_variations", example=4),
    *unneeded("optim.seed decides", "concepts[].seed concepts[].name concepts[].__version", example=7),
    Row(
        "concepts[].text.prompt_source",
        ("data.captions.from_file_name",),
        "filename; sample and concept need nothing",
        _prompt_source,
        "filename",
    ),
    Row(
        "concepts[].text.prompt_path",
        (f"{CONCEPT}.prompt",),
        "its first line",
        _prompt_path,
        "prompts.txt",
        beside={"concepts[].text.prompt_source": "concept"},
    ),
    copied("concepts[].text.enable_tag_shuffling", "data.captions.shuffle", True, read=flag),
    Row(
        "concepts[].text.keep_tags_count",
        ("data.captions.keep_tokens",),
        "",
        _keep_tags,
        2,
        beside={"concepts[].text.enable_tag_shuffling": True},
    ),
    copied("concepts[].text.tag_delimiter", "data.captions.separator", ";", read=text),
    *unneeded("with tag_dropout_probability", "concepts[].text.tag_dropout_enable"),
    Row(
        "concepts[].text.tag_dropout_probability",
        ("data.captions.tag_dropout",),
        "",
        _tag_dropout,
        0.2,
        beside={"concepts[].text.tag_dropout_enable": True},
    ),
    *without(
        "each tag is left out by itself",
        "concepts[].text.tag_dropout_mode",
        off=("full", "random"),
        example="RANDOM_WEIGHTED",
    ),
    *without(
        "those that stay are the first: `data.captions.keep_tokens`",
        (
            "concepts[].text.tag_dropout_special_tags_mode concepts[].text.tag_dropout_special_tags "
            "concepts[].text.tag_dropout_special_tags_regex"
        ),
        example="WHITELIST",
    ),
    *without(
        "no counterpart", "concepts[].text.caps_randomize_enable concepts[].text.caps_randomize_lowercase", example=True
    ),
    *unneeded(
        "with caps_randomize_enable",
        "concepts[].text.caps_randomize_mode concepts[].text.caps_randomize_probability",
        example=0.5,
    ),
    Row("concepts[].image.enable_crop_jitter", ("data.crop",), "random", _jitter, True),
    Row("concepts[].image.enable_random_flip", ("data.flip",), "", _flip, True),
    *without(
        "only mirroring at random and cropping are done here; change the pictures themselves",
        " ".join(
            f"concepts[].image.{name}"
            for name in (
                "enable_fixed_flip",
                "enable_random_rotate",
                "enable_fixed_rotate",
                "enable_random_brightness",
                "enable_fixed_brightness",
                "enable_random_contrast",
                "enable_fixed_contrast",
                "enable_random_saturation",
                "enable_fixed_saturation",
                "enable_random_hue",
                "enable_fixed_hue",
                "enable_random_circular_mask_shrink",
                "enable_random_mask_rotate_crop",
            )
        ),
        example=True,
    ),
    *unneeded(
        "of what is switched above",
        " ".join(
            f"concepts[].image.{name}"
            for name in (
                "random_rotate_max_angle",
                "random_brightness_max_strength",
                "random_contrast_max_strength",
                "random_saturation_max_strength",
                "random_hue_max_strength",
            )
        ),
        example=10.0,
    ),
    *unneeded("with resolution_override", "concepts[].image.enable_resolution_override"),
    Row(
        "concepts[].image.resolution_override",
        (f"{CONCEPT}.resolution",),
        "",
        _own_resolution,
        "768",
        beside={"concepts[].image.enable_resolution_override": True},
    ),
]
