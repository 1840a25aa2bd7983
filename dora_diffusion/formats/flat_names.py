"""Flat names of layers, as kohya's tools write them, and the dotted paths that they were.

`down_blocks_0_attentions_0_proj_in` has lost which of its underscores were dots. It is never guessed: every path that a
layer of a known model can have is a pattern below, and a flat name is looked up among them, flattened.
"""

import re
from functools import cache

_NUMBER = re.compile(r"(?<![^_-])[0-9]+(?![^_-])")
_CHOICE = re.compile(r"\(([^()]*)\)")
# Longer than any layer's name: what is longer is not looked at.
_LONGEST = 256

_FEED_FORWARD = "(ff.net.#|ff.net.#.proj|ff_context.net.#|ff_context.net.#.proj)"
_ATTENTION = "(to_q|to_k|to_v|to_out.#|norm_q|norm_k)"
_JOINT = "(add_q_proj|add_k_proj|add_v_proj|to_add_out|norm_added_q|norm_added_k)"
_ADAPTIVE = "(linear|norm|silu)"
_EMBEDDER = "(linear_#|act|act_#)"

# One pattern a line. `#` is a number between dots, underscores or hyphens; (a|b) a choice. What stands before a dot of
# a pattern is a path too.
DIFFUSERS = (
    # UNets of Stable Diffusion, and their added embeddings of texts
    "(down_blocks.#|mid_block|up_blocks.#).attentions.#.(norm|proj_in|proj_out)",
    f"(down_blocks.#|mid_block|up_blocks.#).attentions.#.transformer_blocks.#.(attn1|attn2).{_ATTENTION}",
    f"(down_blocks.#|mid_block|up_blocks.#).attentions.#.transformer_blocks.#.{_FEED_FORWARD}",
    "(down_blocks.#|mid_block|up_blocks.#).attentions.#.transformer_blocks.#.(norm1|norm2|norm3)",
    "(down_blocks.#|mid_block|up_blocks.#).resnets.#.(norm1|norm2|conv1|conv2|conv_shortcut|time_emb_proj)",
    "(down_blocks.#|mid_block|up_blocks.#).resnets.#.(dropout|nonlinearity)",
    "(down_blocks.#.downsamplers|up_blocks.#.upsamplers).#.conv",
    "(conv_in|conv_out|conv_norm_out|conv_act|time_proj|add_time_proj)",
    f"(time_embedding|add_embedding|class_embedding).{_EMBEDDER}",
    "add_embedding.(norm1|norm2|proj|pool.(q_proj|k_proj|v_proj))",
    # transformers in blocks: SD3, FLUX, FLUX.2, PixArt, Sana, Qwen-Image, AuraFlow
    f"(transformer_blocks|joint_transformer_blocks|single_transformer_blocks).#.(attn|attn1|attn2).{_ATTENTION}",
    f"(transformer_blocks|joint_transformer_blocks).#.attn.{_JOINT}",
    f"(transformer_blocks|single_transformer_blocks).#.{_FEED_FORWARD}",
    "transformer_blocks.#.(ff|ff_context).(linear_in|linear_out|act_fn.gate_fn)",
    "transformer_blocks.#.ff.(conv_inverted|conv_depth|conv_point|nonlinearity)",
    "(joint_transformer_blocks|single_transformer_blocks).#.(ff|ff_context).(linear_#|out_projection)",
    f"(transformer_blocks|joint_transformer_blocks|single_transformer_blocks).#.(norm|norm1|norm2|norm3).{_ADAPTIVE}",
    f"(transformer_blocks|joint_transformer_blocks).#.(norm1_context|norm2_context).{_ADAPTIVE}",
    "single_transformer_blocks.#.(proj_mlp|act_mlp|proj_out|attn.to_qkv_mlp_proj|attn.mlp_act_fn.gate_fn)",
    "transformer_blocks.#.(img|txt)_(mod.#|norm1|norm2|mlp.net.#.proj)",
    "(double_stream_modulation_img|double_stream_modulation_txt|single_stream_modulation).(linear|act_fn)",
    "(x_embedder|context_embedder|img_in|txt_in|txt_norm|proj_out|rope_embedder|time_step_embed|caption_norm)",
    "(pos_embed|patch_embed).proj",
    f"norm_out.(linear|linear_#|norm|silu|timestep_embedder.{_EMBEDDER})",
    f"(time_text_embed|time_guidance_embed).(timestep_embedder|guidance_embedder|text_embedder).{_EMBEDDER}",
    "(time_text_embed|time_guidance_embed|time_extra_emb|time_caption_embed).time_proj",
    f"(time_embed|adaln_single).(linear|silu|emb.time_proj|emb.timestep_embedder.{_EMBEDDER})",
    f"adaln_single.emb.(resolution_embedder|aspect_ratio_embedder).{_EMBEDDER}",
    "adaln_single.emb.additional_condition_proj",
    f"time_embed.guidance_(condition_proj|embedder.{_EMBEDDER})",
    f"(caption_projection|text_embedder|time_step_proj).{_EMBEDDER}",
    # Hunyuan-DiT
    f"blocks.#.(attn1|attn2).{_ATTENTION}",
    f"blocks.#.(norm1|norm2|norm3).{_ADAPTIVE}",
    "blocks.#.(skip_linear|skip_norm|ff.net.#.proj)",
    f"time_extra_emb.(timestep_embedder|extra_embedder).{_EMBEDDER}",
    "time_extra_emb.(size_proj|style_embedder|pooler.(q_proj|k_proj|v_proj|c_proj))",
    # Lumina 2 and Z-Image
    f"(layers|context_refiner|noise_refiner).#.(attn|attention).{_ATTENTION}",
    "(layers|context_refiner|noise_refiner).#.feed_forward.(linear_#|w1|w2|w3|silu)",
    f"(layers|context_refiner|noise_refiner).#.(norm1|norm2).{_ADAPTIVE}",
    "(layers|context_refiner|noise_refiner).#.(attention_norm1|attention_norm2|ffn_norm1|ffn_norm2|adaLN_modulation.#)",
    f"time_caption_embed.(caption_embedder.#|timestep_embedder.{_EMBEDDER})",
    "(t_embedder.mlp.#|cap_embedder.#|all_x_embedder.#-#)",
    "all_final_layer.#-#.(linear|norm_final|adaLN_modulation.#)",
)
TEXT_ENCODERS = (
    # CLIP
    "(text_model.|)encoder.layers.#.self_attn.(q_proj|k_proj|v_proj|out_proj)",
    "(text_model.|)encoder.layers.#.(mlp.fc1|mlp.fc2|mlp.activation_fn|layer_norm1|layer_norm2)",
    "(text_model.|)embeddings.(token_embedding|position_embedding)",
    "(text_model.|)final_layer_norm",
    "text_projection",
    # T5
    "encoder.block.#.layer.#.(SelfAttention.(q|k|v|o|relative_attention_bias)|layer_norm|dropout)",
    "encoder.block.#.layer.#.DenseReluDense.(wi|wi_#|wo|act|dropout)",
    "(shared|encoder.embed_tokens|encoder.final_layer_norm|encoder.dropout)",
    # BERT
    "encoder.layer.#.attention.(self.(query|key|value|dropout)|output.(dense|dropout|LayerNorm))",
    "encoder.layer.#.(intermediate.(dense|intermediate_act_fn)|output.(dense|dropout|LayerNorm))",
    "embeddings.(word_embeddings|position_embeddings|token_type_embeddings|LayerNorm|dropout)",
    "pooler.(dense|activation)",
    # Gemma, Qwen and Mistral
    "(model.|model.language_model.|language_model.|)layers.#.self_attn.(q_proj|k_proj|v_proj|o_proj|q_norm|k_norm)",
    "(model.|model.language_model.|language_model.|)layers.#.mlp.(gate_proj|up_proj|down_proj|act_fn)",
    "(model.|model.language_model.|language_model.|)layers.#.(input_layernorm|post_attention_layernorm)",
    "(model.|model.language_model.|language_model.|)layers.#.(pre|post)_feedforward_layernorm",
    "(model.|model.language_model.|language_model.|)(embed_tokens|norm|rotary_emb)",
    "lm_head",
    # the eyes of Qwen and Mistral
    "(model.|)visual.blocks.#.(norm1|norm2|attn.(qkv|proj)|mlp.(gate_proj|up_proj|down_proj|act_fn))",
    "(model.|)visual.(merger.ln_q|merger.mlp.#|patch_embed.proj|rotary_pos_emb)",
    "(model.|)vision_tower.(ln_pre|patch_conv|patch_positional_embedding)",
    "(model.|)vision_tower.transformer.layers.#.attention.(q_proj|k_proj|v_proj|o_proj)",
    "(model.|)vision_tower.transformer.layers.#.feed_forward.(gate_proj|up_proj|down_proj|act_fn)",
    "(model.|)vision_tower.transformer.layers.#.(attention_norm|ffn_norm)",
    "(model.|)multi_modal_projector.(linear_#|act|norm|patch_merger.merging_layer)",
)
MAKERS = (
    # Stable Diffusion's UNets
    "(input_blocks.#|output_blocks.#|middle_block).#.(in_layers.#|out_layers.#|emb_layers.#|skip_connection)",
    "(input_blocks.#|output_blocks.#|middle_block).#.(norm|proj_in|proj_out|op|conv)",
    f"(input_blocks.#|output_blocks.#|middle_block).#.transformer_blocks.#.(attn1|attn2).{_ATTENTION}",
    "(input_blocks.#|output_blocks.#|middle_block).#.transformer_blocks.#.(norm1|norm2|norm3|ff.net.#.proj)",
    "(time_embed.#|label_emb.#.#|out.#)",
    # FLUX and FLUX.2
    "double_blocks.#.(img|txt)_(attn.(qkv|proj|norm.query_norm|norm.key_norm)|mlp.#|mod.lin|norm1|norm2)",
    "single_blocks.#.(linear1|linear2|modulation.lin|norm.query_norm|norm.key_norm|pre_norm)",
    "(time_in|vector_in|guidance_in).(in_layer|out_layer)",
    "(double_stream_modulation_img|double_stream_modulation_txt|single_stream_modulation).lin",
    "final_layer.(linear|adaLN_modulation.#|norm_final)",
    # SD3
    "joint_blocks.#.(x_block|context_block).(attn|attn2).(qkv|proj|ln_q|ln_k)",
    "joint_blocks.#.(x_block|context_block).(mlp.fc1|mlp.fc2|adaLN_modulation.#|norm1|norm2)",
    "(x_embedder.proj|y_embedder.mlp.#)",
    # AuraFlow
    "(double_layers|single_layers).#.(mlp|mlpX|mlpC).(c_fc1|c_fc2|c_proj)",
    "(double_layers|single_layers).#.(modX.#|modC.#|modCX.#)",
    "(double_layers|single_layers).#.attn.(w1q|w1k|w1v|w1o|w2q|w2k|w2v|w2o|q_norm1|q_norm2|k_norm1|k_norm2)",
    "(cond_seq_linear|init_x_linear|final_linear|modF.#)",
    # Lumina 2 and Z-Image
    "(layers|context_refiner|noise_refiner).#.attention.(qkv|out|q_norm|k_norm)",
    "norm_final",
    # PixArt and Sana
    "blocks.#.(attn.(qkv|proj|q_norm|k_norm)|cross_attn.(q_linear|kv_linear|proj|q_norm|k_norm))",
    "blocks.#.mlp.(fc1|fc2|inverted_conv.conv|depth_conv.conv|point_conv.conv)",
    "(y_embedder.y_proj.fc1|y_embedder.y_proj.fc2|t_block.#|attention_y_norm)",
    "(csize_embedder|ar_embedder|cfg_embedder).mlp.#",
    # Hunyuan-DiT
    "blocks.#.(attn1|attn2).(Wqkv|q_proj|kv_proj|out_proj|q_norm|k_norm)",
    "(blocks.#.default_modulation.#|mlp_t5.#|extra_embedder.#|style_embedder|pooler.(q_proj|k_proj|v_proj|c_proj))",
    # OpenCLIP
    "transformer.resblocks.#.(attn.in_proj|attn.out_proj|mlp.c_fc|mlp.c_proj|mlp.gelu|ln_#)",
    "(token_embedding|positional_embedding|ln_final)",
)


def flatten(path: str) -> str:
    """A dotted path as kohya's tools write it: `mid_block.resnets.0` -> `mid_block_resnets_0`."""
    return path.replace(".", "_")


def unflatten(flat: str) -> str | None:
    """The dotted path of a layer's flat name, without the prefix of its component; None where no known model has it.

    Paths of diffusers' and transformers' models and the original own are known, of layers and of what holds layers.
    """
    if len(flat) > _LONGEST or "#" in flat:
        return None
    pattern = _patterns().get(_NUMBER.sub("#", flat))
    if pattern is None:
        return None
    numbers = iter(_NUMBER.findall(flat))
    return "".join(next(numbers) if character == "#" else character for character in pattern)


@cache
def _patterns() -> dict[str, str]:
    """Flat pattern -> dotted pattern."""
    found = {}
    for line in (*DIFFUSERS, *TEXT_ENCODERS, *MAKERS):
        for pattern in choices(line):
            words = pattern.split(".")
            for end in range(1, len(words) + 1):
                path = ".".join(words[:end])
                found[flatten(path)] = path
    return found


def choices(pattern: str) -> list[str]:
    """A pattern with every choice made, choices in choices too: `(a|b.(c|d)).e` -> `a.e`, `b.c.e`, `b.d.e`."""
    found = _CHOICE.search(pattern)
    if found is None:
        return [pattern]
    before, after = pattern[: found.start()], pattern[found.end() :]
    made = [path for option in found[1].split("|") for path in choices(before + option + after)]
    return list(dict.fromkeys(made))
