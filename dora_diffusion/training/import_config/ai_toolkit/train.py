"""Options of how it is trained."""

from typing import Any

from dora_diffusion.training.import_config.ai_toolkit.steps import accumulated, ours
from dora_diffusion.training.import_config.optimisers import SAYS, SET_BY_IT, below, optimiser, option
from dora_diffusion.training.import_config.records import (
    Answer,
    Row,
    Source,
    copied,
    needless,
    several,
    to,
    unneeded,
    without,
)
from dora_diffusion.training.import_config.values import (
    flag,
    learning_rate,
    number,
    precision,
    real,
    schedule,
    text,
    whole,
)

_OPTIMISERS = ("train.optimizer", "adamw")
_PARAMETERS = "train.optimizer_params."
_FREE_NOTE = "a plain number, unless the optimiser takes it for a factor"


def _steps(value: Any, source: Source) -> Answer:
    found = ours(value, source)
    why = []
    if accumulated(source) > 1:
        why.append("there each of the accumulated passes was a step")
    if any(folder.is_class for folder in source.folders):
        why.append("there every other step was the class's, here it is in each")
    return to("optim.steps", found, "; ".join(why))


def _rate(key: str) -> Any:
    def convert(value: Any, source: Source) -> Answer:
        return learning_rate(key, value, source.get(*_OPTIMISERS))

    return convert


def _text_rate(value: Any, source: Source) -> Answer:
    if not flag(source.get("train.train_text_encoder", False)):
        return needless("no text encoder is trained")
    return learning_rate("optim.text_encoder_learning_rate", value, source.get(*_OPTIMISERS))


def _lr(value: Any, source: Source) -> Answer:
    if source.has("train.unet_lr"):
        return needless("unet_lr decides")
    return learning_rate("optim.learning_rate", value, source.get(*_OPTIMISERS))


def _lr_scheduler(value: Any, source: Source) -> Answer:
    return schedule(value, number(source.get("train.lr_scheduler_params.num_warmup_steps", 0)))


def _warmup(value: Any, source: Source) -> Answer:
    if str(source.get("train.lr_scheduler")).lower() in {"none", "constant", "cosine", "linear", "step"}:
        return needless("not used with that lr_scheduler")
    return to("optim.warmup_steps", ours(value, source))


def _ratio(value: Any, source: Source) -> Answer:
    return needless("1, as here") if number(value) == 1 else to("optim.gradient_accumulation", whole(value))


def _preservation(value: Any, source: Source) -> Answer:
    if not flag(value):
        return needless("off there too")
    return several({"prior.mode": "adapter_off", "prior.caption": "class"})


def _blank_preservation(value: Any, source: Source) -> Answer:
    if not flag(value):
        return needless("off there too")
    return several({"prior.mode": "adapter_off", "prior.caption": "blank"})


def _of(switch: str, key: str, read_value: Any) -> Any:
    """A setting that counts only while another is on."""

    def convert(value: Any, source: Source) -> Answer:
        if not flag(source.get(switch, False)):
            return needless(f"{switch.partition('.')[2]} is off")
        return to(key, read_value(value))

    return convert


def _optimiser(value: Any, source: Source) -> Answer:
    given = below(source, _PARAMETERS)
    return optimiser(value, given, decays="weight_decay" in given)


def _option(key: str) -> Any:
    def convert(value: Any, source: Source) -> Answer:
        return option(key, source.get(*_OPTIMISERS), below(source, _PARAMETERS))

    return convert


def _ema(value: Any, source: Source) -> Answer:
    if not flag(source.get("train.ema_config.use_ema", False)):
        return needless("off there too")
    return to("optim.ema_decay", real(source.get("train.ema_config.ema_decay", 0.999)))


TRAIN: list[Row] = [
    Row(
        "train.steps", ("optim.steps",), "divided by gradient_accumulation_steps, which counted each pass", _steps, 2000
    ),
    copied("train.batch_size", "optim.batch_size", 2, read=whole),
    Row("train.gradient_accumulation_steps", ("optim.gradient_accumulation",), "", _ratio, 4),
    Row("train.gradient_accumulation", ("optim.gradient_accumulation",), "", _ratio, 4),
    copied("train.train_unet", "adapter.train_unet", True, read=flag),
    copied("train.train_text_encoder", "adapter.train_text_encoder", True, read=flag),
    Row("train.lr", ("optim.learning_rate",), _FREE_NOTE, _lr, "1e-4", unset=1e-6),
    Row("train.unet_lr", ("optim.learning_rate",), "", _rate("optim.learning_rate"), 1e-4),
    Row(
        "train.text_encoder_lr",
        ("optim.text_encoder_learning_rate",),
        "",
        _text_rate,
        1e-5,
        beside={"train.train_text_encoder": True},
    ),
    copied("train.embedding_lr", "optim.words_learning_rate", 1e-3, read=real),
    *unneeded(
        "no refiner and no adapter of another kind is trained",
        "train.refiner_lr train.adapter_lr train.train_refiner",
        example=1e-4,
    ),
    Row("train.optimizer", SET_BY_IT, SAYS, _optimiser, "prodigy"),
    copied("train.optimizer_params.weight_decay", "optim.weight_decay", 1e-4, read=real),
    *(
        Row(
            f"{_PARAMETERS}{key}",
            ("optim.optimizer_options",),
            "",
            _option(key),
            example,
            beside={"train.optimizer": of},
        )
        for key, example, of in (
            ("betas", [0.9, 0.99], "adamw"),
            ("eps", 1e-6, "adamw"),
            ("decouple", True, "prodigy"),
            ("use_bias_correction", True, "prodigy"),
            ("safeguard_warmup", True, "prodigy"),
            ("d0", 1e-5, "prodigy"),
            ("d_coef", 2.0, "prodigy"),
            ("growth_rate", 1.02, "prodigy"),
            ("clip_threshold", 1.0, "adafactor"),
            ("decay_rate", -0.8, "adafactor"),
            ("scale_parameter", False, "adafactor"),
        )
    ),
    *without("no option of the optimiser here", "train.optimizer_params.*", example=0.9),
    Row(
        "train.lr_scheduler",
        ("optim.lr_scheduler",),
        "restarts are left out",
        _lr_scheduler,
        "linear",
        unset="constant",
    ),
    Row(
        "train.lr_scheduler_params.num_warmup_steps",
        ("optim.warmup_steps",),
        "",
        _warmup,
        10,
        beside={"train.lr_scheduler": "constant_with_warmup"},
    ),
    *without("no counterpart", "train.lr_scheduler_params.*", example=3),
    copied("train.max_grad_norm", "optim.max_grad_norm", 0.5, read=real),
    copied("train.dtype", "optim.mixed_precision", "bf16", read=precision, unset="fp32"),
    copied("train.gradient_checkpointing", "optim.gradient_checkpointing", False, read=flag, unset=True),
    Row(
        "train.noise_scheduler",
        (),
        "the base's own says what its denoiser predicts",
        lambda value, source: needless("the base's own scheduler decides"),
        "flowmatch",
    ),
    *without(
        "no counterpart: noise and latents are what the base's own are",
        (
            "train.noise_multiplier train.target_noise_multiplier train.img_multiplier "
            "train.noisy_latent_multiplier train.latent_multiplier train.optimal_noise_pairing_samples "
            "train.pred_scaler"
        ),
        off=(1, 1.0),
        example=0.9,
    ),
    Row("train.ema_config.use_ema", ("optim.ema_decay",), "with ema_decay", _ema, True),
    Row(
        "train.ema_config.ema_decay",
        ("optim.ema_decay",),
        "with use_ema",
        _ema,
        0.99,
        beside={"train.ema_config.use_ema": True},
    ),
    *without("no counterpart", "train.ema_config.*", example=0.99),
    Row(
        "train.diff_output_preservation",
        ("prior.mode", "prior.caption"),
        "`adapter_off`, `class`",
        _preservation,
        True,
        beside={"train.diff_output_preservation_class": "robot"},
    ),
    Row(
        "train.diff_output_preservation_class",
        ("prior.class_prompt",),
        "",
        _of("train.diff_output_preservation", "prior.class_prompt", text),
        "robot",
        beside={"train.diff_output_preservation": True},
    ),
    Row(
        "train.diff_output_preservation_multiplier",
        ("prior.weight",),
        "",
        _of("train.diff_output_preservation", "prior.weight", real),
        0.5,
        beside={"train.diff_output_preservation": True, "train.diff_output_preservation_class": "robot"},
    ),
    Row(
        "train.blank_prompt_preservation",
        ("prior.mode", "prior.caption"),
        "`adapter_off`, `blank`",
        _blank_preservation,
        True,
    ),
    Row(
        "train.blank_prompt_preservation_multiplier",
        ("prior.weight",),
        "",
        _of("train.blank_prompt_preservation", "prior.weight", real),
        0.5,
        beside={"train.blank_prompt_preservation": True},
    ),
    copied("train.reg_weight", "prior.weight", 0.5, read=real),
    *without(
        "no counterpart: masks leave out what is outside, `data.mask_outside`",
        "train.inverted_mask_prior",
        example=True,
    ),
    *unneeded("with inverted_mask_prior", "train.inverted_mask_prior_multiplier", example=0.5),
    copied("train.prompt_dropout_prob", "data.captions.dropout", 0.1, read=real),
    *unneeded("a checkpoint says the step", "train.start_step", example=100),
    *unneeded(
        "previews are drawn before the first step and at the end",
        "train.skip_first_sample train.force_first_sample train.disable_sampling",
    ),
    *unneeded(
        "captions are encoded once and kept when no text encoder is trained",
        "train.cache_text_embeddings train.unload_text_encoder",
        example=True,
    ),
    *unneeded("told 1 here, where a base was distilled from guidance", "train.bypass_guidance_embedding", example=True),
    *unneeded(
        "the machine's, or found by itself",
        "train.xformers train.sdp train.attention_backend train.num_train_timesteps train.max_loss_debug",
        example="native",
    ),
    *without(
        "no counterpart",
        (
            "train.do_cfg train.do_random_cfg train.negative_prompt train.do_guidance_loss "
            "train.do_differential_guidance train.single_item_batching train.short_and_long_captions "
            "train.short_and_long_captions_encoder_split train.weight_jitter train.merge_network_on_save "
            "train.free_u train.train_turbo train.match_adapter_assist train.match_noise_norm "
            "train.standardize_images train.standardize_latents train.prompt_saturation_chance "
            "train.do_prior_divergence train.target_norm_std train.do_paramiter_swapping "
            "train.do_blank_stabilization train.max_loss train.do_fft_loss train.t0_loss_target "
            "train.adaptive_scaling_factor train.correct_pred_norm train.do_batch_noise_correction "
            "train.do_signal_correction_noise train.do_signal_amplification "
            "train.latent_feature_extractor_path train.diffusion_feature_extractor_path"
        ),
        example=True,
    ),
    *unneeded(
        "of options that are said above",
        (
            "train.max_negative_prompts train.do_guidance_loss_cfg_zero train.guidance_loss_target "
            "train.guidance_loss_schedule train.differential_guidance_scale train.unconditional_prompt "
            "train.switch_boundary_every train.audio_loss_multiplier train.next_sample_timesteps "
            "train.show_turbo_outputs train.cfg_scale train.max_cfg_scale train.cfg_rescale "
            "train.merge_network_on_save_strength train.paramiter_swapping_factor "
            "train.target_norm_std_value train.correct_pred_norm_multiplier "
            "train.adapter_assist_name_or_path train.adapter_assist_type train.match_adapter_chance "
            "train.latent_feature_loss_weight train.diffusion_feature_extractor_weight"
        ),
        example=2,
    ),
    *without(
        "hold pictures out with `data.validation_share` or a concept of role validation",
        "train.validation_config.*",
        example=512,
    ),
]
