"""Options of how it is trained, and of the noise."""

from typing import Any

from dora_diffusion.training.import_config.counts import samples_of_an_epoch
from dora_diffusion.training.import_config.kohya.data import batch_size
from dora_diffusion.training.import_config.kohya.steps import (
    batch,
    epoch,
    epochs_decide,
    halves,
    is_flow,
    network,
    ours,
    steps_here,
    trains_text,
)
from dora_diffusion.training.import_config.optimisers import SAYS, SET_BY_IT, below, name_of, optimiser, option
from dora_diffusion.training.import_config.records import (
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
from dora_diffusion.training.import_config.values import (
    flag,
    is_free_of_rates,
    learning_rate,
    number,
    precision,
    real,
    schedule,
    text,
    text_encoders,
    warmup,
    whole,
)

_FLOWS = ("sigmoid", "uniform", "shift", "flux_shift")
_NO_FLOW = "of bases that are trained by flow matching"


def _max_train_steps(value: Any, source: Source) -> Answer:
    if epochs_decide(source):
        return needless("max_train_epochs decides")
    steps = whole(value)
    says = "half: here a step trains class pictures beside its batch" if halves(source)[1] else ""
    return to("optim.steps", ours(steps, source), says)


def _max_train_epochs(value: Any, source: Source) -> Answer:
    if not epochs_decide(source):
        return needless("max_train_steps decides")
    epochs, each = whole(value), epoch(source)
    said = f"{epochs} x {each} steps: {samples_of_an_epoch(source)} pictures with repeats, batch {batch(source)}"
    return to("optim.steps", ours(epochs * each, source), f"{said}; buckets of few pictures made it a little more")


def _encoder_rates(value: Any, source: Source) -> dict[str, float]:
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    rates = value if isinstance(value, list) else [value]
    has_t5 = flag(source.get("network_args.train_t5xxl", False))
    last = {"flux": 2 if has_t5 else 1, "sd3": 3 if has_t5 else 2}.get(network(source), len(rates))
    spread = rates if len(rates) > 1 else rates * max(1, last)
    return {name: real(rate) for name, rate in zip(names, spread[: max(1, last)], strict=False)}


def _text_encoder_lr(value: Any, source: Source) -> Answer:
    if not trains_text(source):
        return needless("no text encoder is trained")
    if is_free_of_rates(source.get("optimizer_type", "")):
        return several({"adapter.train_text_encoder": True}, "the rate is the optimiser's factor")
    rates = _encoder_rates(value, source)
    return text_encoders(rates, all_of_them=network(source) in {"lora", "lycoris"} and len(rates) == 1)


def _unet_lr(value: Any, source: Source) -> Answer:
    kind = source.get("optimizer_type", "")
    if name_of(kind) == "adafactor" and flag(source.get("optimizer_args.relative_step", True)):
        return needless("not used there: with relative_step Adafactor makes it; here it is the optimiser's own")
    return learning_rate("optim.learning_rate", value, kind)


def _optimiser(value: Any, source: Source) -> Answer:
    given = below(source, "optimizer_args.")
    return optimiser(value, given, decays="weight_decay" in given)


def _option(key: str) -> Any:
    def convert(value: Any, source: Source) -> Answer:
        return option(key, source.get("optimizer_type", "AdamW"), below(source, "optimizer_args."))

    return convert


def _flagged(name: str) -> Any:
    def convert(value: Any, source: Source) -> Answer:
        if source.has("optimizer_type") or not flag(value):
            return needless("optimizer_type decides" if flag(value) else "off there too")
        return to("optim.optimizer", name)

    return convert


def _relative_step(value: Any, source: Source) -> Answer:
    return lost("rates come from the configuration here") if flag(value) else needless("as here")


def _own_warmup(value: Any, source: Source) -> Answer:
    if name_of(source.get("optimizer_type", "")) != "schedulefree":
        return lost("no option of the optimiser here")
    return to("optim.warmup_steps", ours(whole(value), source))


def _learning_rate(value: Any, source: Source) -> Answer:
    if not source.has("unet_lr"):
        return _unet_lr(value, source)
    if not source.has("learning_rate") or source.has("text_encoder_lr") or not trains_text(source):
        return needless("unet_lr decides")
    return learning_rate("optim.text_encoder_learning_rate", value, source.get("optimizer_type", ""))


def _warmup(value: Any, source: Source) -> Answer:
    found = number(value)
    if _schedule_name(source).startswith("adafactor"):
        return needless("not used there either")
    return warmup(ours(found, source) if found >= 1 else found, steps_here(source), is_share=0 < found < 1)


def _warmup_percent(value: Any, source: Source) -> Answer:
    return warmup(real(value) / 100, steps_here(source), is_share=True)


def _schedule_name(source: Source) -> str:
    return str(source.get("lr_scheduler", "constant")).lower()


def _lr_scheduler(value: Any, source: Source) -> Answer:
    name = text(value)
    if name.lower().startswith("adafactor"):
        raise ValueError("got Adafactor's own, expected constant, linear or cosine")
    # sd-scripts refuses a warm-up beside constant, its GUI does not
    return schedule(name, number(source.get("lr_warmup", 0)))


def _timestep_sampling(value: Any, source: Source) -> Answer:
    kind = text(value).lower()
    if kind == "sigma":
        return needless("weighting_scheme and discrete_flow_shift decide")
    density = "uniform" if kind == "uniform" else "logit_normal"
    if kind in {"sigmoid", "uniform"}:
        return several({"loss.timesteps.density": density, "flow.shift": 1.0})
    if kind == "flux_shift":
        return several({"loss.timesteps.density": density}, "the shift that the base draws with")
    if kind == "shift":
        return several({"loss.timesteps.density": density})
    raise ValueError(f"got {kind}, expected sigma, uniform, sigmoid, shift or flux_shift")


def _sampling(source: Source) -> str:
    return str(source.get("timestep_sampling", "sigma")).lower()


def _flow_shift(value: Any, source: Source) -> Answer:
    if network(source) != "flux" and not source.has("discrete_flow_shift"):
        return needless(_NO_FLOW)
    if _sampling(source) not in {"sigma", "shift"}:
        return needless(f"not used with {_sampling(source)}")
    return to("flow.shift", real(value))


def _training_shift(value: Any, source: Source) -> Answer:
    return to("flow.shift", real(value)) if network(source) == "sd3" else needless("of Stable Diffusion 3")


def _sigmoid_scale(value: Any, source: Source) -> Answer:
    if _sampling(source) in {"sigma", "uniform"}:
        return needless(f"not used with {_sampling(source)}")
    return to("loss.timesteps.std", real(value))


def _weighting_scheme(value: Any, source: Source) -> Answer:
    kind = text(value).lower()
    settings: dict[str, Any] = {}
    if not is_flow(source):
        return needless(_NO_FLOW)
    if kind in {"sigma_sqrt", "cosmap"}:
        settings["flow.weighting"] = kind
    if _sampling(source) not in _FLOWS:
        settings["loss.timesteps.density"] = kind if kind in {"logit_normal", "mode"} else "uniform"
    return several(settings, "" if settings else "timestep_sampling decides")


def _of_logits(key: str) -> Any:
    def convert(value: Any, source: Source) -> Answer:
        if not is_flow(source):
            return needless(_NO_FLOW)
        if source.get("weighting_scheme") != ("mode" if key == "mode_scale" else "logit_normal"):
            return needless("not used with that weighting_scheme")
        if _sampling(source) in _FLOWS:
            return needless("timestep_sampling decides")
        return to(f"loss.timesteps.{key.removeprefix('logit_')}", real(value))

    return convert


def _guidance(value: Any, source: Source) -> Answer:
    return (
        needless("1, as here") if real(value) == 1 else lost("bases that were distilled from guidance are told 1 here")
    )


OPTIM: list[Row] = [
    Row("max_train_steps", ("optim.steps",), "half with is_reg and an odd batch", _max_train_steps, 800, unset=1600),
    Row(
        "max_train_epochs",
        ("optim.steps",),
        "epochs x pictures x repeats / batch / accumulation, when the pictures are here",
        _max_train_epochs,
        2,
        beside={"train_data_dir": "img"},
    ),
    Row(
        "train_batch_size",
        ("optim.batch_size",),
        "half with class pictures: they stand beside a batch here",
        batch_size,
        4,
    ),
    copied("gradient_accumulation_steps", "optim.gradient_accumulation", 2, read=whole),
    Row("learning_rate", ("optim.learning_rate",), "unless unet_lr is given", _learning_rate, 1e-4, unset=2e-6),
    Row("unet_lr", ("optim.learning_rate",), "", _unet_lr, 1e-4),
    Row(
        "text_encoder_lr",
        ("adapter.train_text_encoder", "optim.text_encoder_learning_rate"),
        "a list is one for each encoder; 0 = not trained",
        _text_encoder_lr,
        5e-5,
    ),
    Row("optimizer_type", SET_BY_IT, SAYS, _optimiser, "Prodigy"),
    Row("use_lion_optimizer", ("optim.optimizer",), "of older files", _flagged("lion"), True),
    Row("use_8bit_adam", ("optim.optimizer",), "of older files", _flagged("adamw8bit"), True),
    copied(
        "optimizer_args.weight_decay",
        "optim.weight_decay",
        "0.1",
        read=real,
        says="of the low-rank pair; magnitudes never decay",
    ),
    *(
        Row(
            f"optimizer_args.{key}",
            ("optim.optimizer_options",),
            "",
            _option(key),
            example,
            beside={"optimizer_type": of},
        )
        for key, example, of in (
            ("betas", "0.9,0.99", "AdamW"),
            ("eps", "1e-6", "AdamW"),
            ("amsgrad", "True", "AdamW"),
            ("beta3", "0.98", "Prodigy"),
            ("decouple", "True", "Prodigy"),
            ("use_bias_correction", "True", "Prodigy"),
            ("safeguard_warmup", "True", "Prodigy"),
            ("d0", "1e-5", "Prodigy"),
            ("d_coef", "2", "Prodigy"),
            ("growth_rate", "1.02", "Prodigy"),
            ("slice_p", "11", "Prodigy"),
            ("r", "0.5", "AdamWScheduleFree"),
            ("weight_lr_power", "1.0", "AdamWScheduleFree"),
            ("clip_threshold", "1.0", "AdaFactor"),
            ("decay_rate", "-0.8", "AdaFactor"),
            ("beta1", "0.9", "AdaFactor"),
            ("scale_parameter", "False", "AdaFactor"),
        )
    ),
    Row(
        "optimizer_args.warmup_steps",
        ("optim.warmup_steps",),
        "of AdamWScheduleFree",
        _own_warmup,
        "10",
        beside={"optimizer_type": "AdamWScheduleFree"},
    ),
    Row("optimizer_args.relative_step", (), "rates come from the configuration here", _relative_step, "True"),
    *without(
        "no option of the optimiser here",
        "optimizer_args.* optimizer_schedulefree_wrapper schedulefree_wrapper_args",
        example="0.9,0.99",
    ),
    Row(
        "lr_scheduler",
        ("optim.lr_scheduler",),
        "constant, constant_with_warmup, linear, cosine; restarts and floors are left out",
        _lr_scheduler,
        "linear",
        unset="constant",
    ),
    Row(
        "lr_warmup_steps",
        ("optim.warmup_steps",),
        "below 1 it is a share of the steps",
        _warmup,
        10,
        beside={"lr_scheduler": "cosine", "max_train_steps": 800},
    ),
    Row(
        "lr_warmup",
        ("optim.warmup_steps",),
        "of the GUI: percent",
        _warmup_percent,
        10,
        beside={"lr_scheduler": "cosine", "max_train_steps": 800},
    ),
    *without(
        "no counterpart: cosine falls to 0 once",
        (
            "lr_scheduler_num_cycles lr_scheduler_power lr_decay_steps lr_scheduler_timescale "
            "lr_scheduler_min_lr_ratio lr_scheduler_type lr_scheduler_args lr_scheduler_args.*"
        ),
        off=(1, "1"),
        example=3,
    ),
    copied("max_grad_norm", "optim.max_grad_norm", 0.5, read=real),
    copied("mixed_precision", "optim.mixed_precision", "bf16", read=precision, unset="no"),
    *without("what is trained stays fp32 here", "full_fp16 full_bf16", example=True),
    copied("gradient_checkpointing", "optim.gradient_checkpointing", True, read=flag),
    copied("seed", "optim.seed", 42, read=whole, says="not given: 0 here, another each time there"),
    copied("prior_loss_weight", "prior.weight", 0.5, read=real),
    *unneeded("the base's own scheduler says so", "v2 v_parameterization"),
    *unneeded("always so here", "weighted_captions", example=True),
    *without(
        "captions end where the base's text encoder ends",
        "max_token_length t5xxl_max_token_length gemma2_max_token_length",
        off=(75, "75", 77, 256, 512),
        example=225,
    ),
    *without(
        "the text encoder's last layers are those that the base's pipeline takes", "clip_skip", off=(1, "1"), example=2
    ),
    *without(
        "other ways to quantise here: set `base.quantise` to fp8, int8 or nf4", "fp8_base fp8_base_unet", example=True
    ),
    *without(
        "no counterpart yet for blocks on the CPU: `base.quantise`, `optim.gradient_checkpointing`, a smaller rank",
        "blocks_to_swap cpu_offload_checkpointing split_mode fused_backward_pass",
        example=True,
    ),
    *without("no counterpart yet", "torch_compile", example=True),
    *unneeded("with torch_compile", "dynamo_backend", example="inductor"),
]


FLOW: list[Row] = [
    Row(
        "timestep_sampling",
        ("loss.timesteps.density", "flow.shift"),
        "sigmoid: logit_normal, shift 1; uniform: shift 1; flux_shift: the base's own; sigma: by weighting_scheme",
        _timestep_sampling,
        "sigmoid",
    ),
    Row("sigmoid_scale", ("loss.timesteps.std",), "", _sigmoid_scale, 1.5, beside={"timestep_sampling": "sigmoid"}),
    Row(
        "discrete_flow_shift",
        ("flow.shift",),
        "with timestep_sampling sigma or shift",
        _flow_shift,
        3.0,
        beside={"timestep_sampling": "shift"},
        unset=3.0,
    ),
    Row(
        "training_shift",
        ("flow.shift",),
        "Stable Diffusion 3",
        _training_shift,
        3.0,
        beside={"network_module": "networks.lora_sd3"},
        unset=1.0,
    ),
    Row(
        "weighting_scheme",
        ("loss.timesteps.density", "flow.weighting"),
        "of flow matching alone",
        _weighting_scheme,
        "cosmap",
        beside={"network_module": "networks.lora_flux"},
        unset="uniform",
    ),
    *(
        Row(
            key,
            (f"loss.timesteps.{key.removeprefix('logit_')}",),
            f"with weighting_scheme {scheme}",
            _of_logits(key),
            0.5,
            beside={"weighting_scheme": scheme, "network_module": "networks.lora_flux"},
        )
        for key, scheme in (("logit_mean", "logit_normal"), ("logit_std", "logit_normal"), ("mode_scale", "mode"))
    ),
    Row("guidance_scale", (), "bases that were distilled from guidance are told 1 here", _guidance, 3.5),
    *unneeded(
        "the base's objective, by its scheduler",
        "model_prediction_type model_type apply_t5_attn_mask apply_lg_attn_mask",
        example="raw",
    ),
    *without(
        "no counterpart: `data.captions.dropout` leaves out whole captions",
        "clip_l_dropout_rate clip_g_dropout_rate t5_dropout_rate",
        example=0.1,
    ),
    *without("no counterpart", "pos_emb_random_crop_rate enable_scaled_pos_embed system_prompt", example="x"),
]
