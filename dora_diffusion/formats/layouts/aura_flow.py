"""AuraFlow as Fal name it (github.com/cloneofsimo/minRF), beside AuraFlowTransformer2DModel."""

from dora_diffusion.formats.layouts.patterns import renamed, table
from dora_diffusion.formats.layouts.record import Fusion

EMBEDDINGS = {
    "init_x_linear": "pos_embed.proj",
    "cond_seq_linear": "context_embedder",
    "t_embedder.mlp.0": "time_step_proj.linear_1",
    "t_embedder.mlp.2": "time_step_proj.linear_2",
    "final_linear": "proj_out",
}
DOUBLE = {
    "attn.w2q": "attn.to_q",
    "attn.w2k": "attn.to_k",
    "attn.w2v": "attn.to_v",
    "attn.w2o": "attn.to_out.0",
    "attn.w1q": "attn.add_q_proj",
    "attn.w1k": "attn.add_k_proj",
    "attn.w1v": "attn.add_v_proj",
    "attn.w1o": "attn.to_add_out",
    "modX.1": "norm1.linear",
    "modC.1": "norm1_context.linear",
    "mlpX.c_fc1": "ff.linear_1",
    "mlpX.c_fc2": "ff.linear_2",
    "mlpX.c_proj": "ff.out_projection",
    "mlpC.c_fc1": "ff_context.linear_1",
    "mlpC.c_fc2": "ff_context.linear_2",
    "mlpC.c_proj": "ff_context.out_projection",
}
SINGLE = {
    "attn.w1q": "attn.to_q",
    "attn.w1k": "attn.to_k",
    "attn.w1v": "attn.to_v",
    "attn.w1o": "attn.to_out.0",
    "modCX.1": "norm1.linear",
    "mlp.c_fc1": "ff.linear_1",
    "mlp.c_fc2": "ff.linear_2",
    "mlp.c_proj": "ff.out_projection",
}

_TABLE = table(
    *renamed(EMBEDDINGS),
    *renamed(DOUBLE, original="double_layers.#.", path="joint_transformer_blocks.#."),
    *renamed(SINGLE, original="single_layers.#.", path="single_transformer_blocks.#."),
    Fusion("modF.1", ("norm_out.linear",), swapped=True),
)

AURA_FLOW = _TABLE.layout("auraflow", ("auraflow",), "transformer")
