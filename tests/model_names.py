"""Names of tensors as checkpoints of each architecture hold them, with what each is, and its name in GGUF files.

Written down from published checkpoints, one tensor of each kind; "-" stands for a tensor that has no name in a GGUF
file, PARTS for one that is there in parts, which follow it, None in place of GGUF names for an architecture without a
table.
"""

from __future__ import annotations

from typing import NamedTuple


class Names(NamedTuple):
    """`config` as in config.json, or what of it tells the architecture; rows (name, dimensions, role, GGUF name)."""

    config: dict[str, object]
    rows: tuple[tuple[str, int, str, str | None], ...]


PARTS = "in parts"
L = "model.layers.1."
B = "encoder.layer.1."
DECODER = (
    ("model.embed_tokens.weight", 2, "embedding", "token_embd.weight"),
    (f"{L}input_layernorm.weight", 1, "norm", "blk.1.attn_norm.weight"),
    (f"{L}self_attn.q_proj.weight", 2, "attention", "blk.1.attn_q.weight"),
    (f"{L}self_attn.k_proj.weight", 2, "attention", "blk.1.attn_k.weight"),
    (f"{L}self_attn.v_proj.weight", 2, "attention", "blk.1.attn_v.weight"),
    (f"{L}self_attn.o_proj.weight", 2, "attention", "blk.1.attn_output.weight"),
    ("model.norm.weight", 1, "norm", "output_norm.weight"),
)
DENSE = (
    (f"{L}mlp.gate_proj.weight", 2, "mlp", "blk.1.ffn_gate.weight"),
    (f"{L}mlp.up_proj.weight", 2, "mlp", "blk.1.ffn_up.weight"),
    (f"{L}mlp.down_proj.weight", 2, "mlp", "blk.1.ffn_down.weight"),
)
TWO_NORMS = ((f"{L}post_attention_layernorm.weight", 1, "norm", "blk.1.ffn_norm.weight"),)
HEAD = (("lm_head.weight", 2, "head", "output.weight"),)
QKV_BIASES = tuple((f"{L}self_attn.{p}_proj.bias", 1, "bias", f"blk.1.attn_{p}.bias") for p in "qkv")
QK_NORMS = tuple((f"{L}self_attn.{p}_norm.weight", 1, "norm", f"blk.1.attn_{p}_norm.weight") for p in "qk")
EXPERTS = (
    (f"{L}mlp.gate.weight", 2, "router", "blk.1.ffn_gate_inp.weight"),
    (f"{L}mlp.experts.5.gate_proj.weight", 2, "expert", "blk.1.ffn_gate_exps.weight"),
    (f"{L}mlp.experts.5.up_proj.weight", 2, "expert", "blk.1.ffn_up_exps.weight"),
    (f"{L}mlp.experts.5.down_proj.weight", 2, "expert", "blk.1.ffn_down_exps.weight"),
)
SHARED_EXPERTS = tuple(
    (f"{L}mlp.shared_experts.{p}_proj.weight", 2, "shared expert", f"blk.1.ffn_{p}_shexp.weight")
    for p in ("gate", "up", "down")
)
# k_b and v_b are the parts of kv_b.
LATENT = (
    (f"{L}self_attn.kv_a_proj_with_mqa.weight", 2, "attention", "blk.1.attn_kv_a_mqa.weight"),
    (f"{L}self_attn.kv_a_layernorm.weight", 1, "norm", "blk.1.attn_kv_a_norm.weight"),
    (f"{L}self_attn.k_b_proj.weight", 3, "attention", "blk.1.attn_k_b.weight"),
    (f"{L}self_attn.v_b_proj.weight", 3, "attention", "blk.1.attn_v_b.weight"),
)
FOUR_NORMS = (
    (f"{L}post_attention_layernorm.weight", 1, "norm", "blk.1.post_attention_norm.weight"),
    (f"{L}pre_feedforward_layernorm.weight", 1, "norm", "blk.1.ffn_norm.weight"),
    (f"{L}post_feedforward_layernorm.weight", 1, "norm", "blk.1.post_ffw_norm.weight"),
)
NO_HEAD = (("lm_head.weight", 2, "head", "-"),)


def plain(*rows: tuple[str, int, str]) -> tuple[tuple[str, int, str, str | None], ...]:
    return tuple((*row, None) for row in rows)


NAMES: dict[str, Names] = {
    "llama": Names({"model_type": "llama"}, (*DECODER, *DENSE, *TWO_NORMS, *HEAD)),
    "mistral": Names({"architectures": ["MistralForCausalLM"]}, (*DECODER, *DENSE, *TWO_NORMS, *HEAD)),
    "mixtral": Names(
        {"model_type": "mixtral"},
        (
            *(*DECODER, *TWO_NORMS, *HEAD),
            (f"{L}block_sparse_moe.gate.weight", 2, "router", "blk.1.ffn_gate_inp.weight"),
            (f"{L}block_sparse_moe.experts.5.w1.weight", 2, "expert", "blk.1.ffn_gate_exps.weight"),
            (f"{L}block_sparse_moe.experts.5.w2.weight", 2, "expert", "blk.1.ffn_down_exps.weight"),
            (f"{L}block_sparse_moe.experts.5.w3.weight", 2, "expert", "blk.1.ffn_up_exps.weight"),
        ),
    ),
    "qwen2": Names({"model_type": "qwen2"}, (*DECODER, *DENSE, *TWO_NORMS, *HEAD, *QKV_BIASES)),
    "qwen2_moe": Names(
        {"model_type": "qwen2_moe"},
        (
            *(*DECODER, *TWO_NORMS, *HEAD, *QKV_BIASES, *EXPERTS),
            (f"{L}mlp.shared_expert_gate.weight", 2, "router", "blk.1.ffn_gate_inp_shexp.weight"),
            (f"{L}mlp.shared_expert.gate_proj.weight", 2, "shared expert", "blk.1.ffn_gate_shexp.weight"),
            (f"{L}mlp.shared_expert.up_proj.weight", 2, "shared expert", "blk.1.ffn_up_shexp.weight"),
            (f"{L}mlp.shared_expert.down_proj.weight", 2, "shared expert", "blk.1.ffn_down_shexp.weight"),
        ),
    ),
    "qwen3": Names({"model_type": "qwen3"}, (*DECODER, *DENSE, *TWO_NORMS, *HEAD, *QK_NORMS)),
    "qwen3_moe": Names({"model_type": "qwen3_moe"}, (*DECODER, *TWO_NORMS, *HEAD, *QK_NORMS, *EXPERTS)),
    "gemma": Names({"model_type": "gemma"}, (*DECODER, *DENSE, *TWO_NORMS, *NO_HEAD)),
    "gemma2": Names({"model_type": "gemma2"}, (*DECODER, *DENSE, *FOUR_NORMS, *NO_HEAD)),
    "gemma3": Names({"model_type": "gemma3_text"}, (*DECODER, *DENSE, *FOUR_NORMS, *QK_NORMS, *NO_HEAD)),
    "phi": Names(
        {"model_type": "phi"},
        (
            *(row for row in DECODER if "o_proj" not in row[0] and row[0] != "model.norm.weight"),
            *QKV_BIASES,
            (f"{L}input_layernorm.bias", 1, "bias", "blk.1.attn_norm.bias"),
            (f"{L}self_attn.dense.weight", 2, "attention", "blk.1.attn_output.weight"),
            (f"{L}self_attn.dense.bias", 1, "bias", "blk.1.attn_output.bias"),
            (f"{L}mlp.fc1.weight", 2, "mlp", "blk.1.ffn_up.weight"),
            (f"{L}mlp.fc2.weight", 2, "mlp", "blk.1.ffn_down.weight"),
            ("model.final_layernorm.weight", 1, "norm", "output_norm.weight"),
            ("lm_head.weight", 2, "head", "output.weight"),
            ("lm_head.bias", 1, "bias", "output.bias"),
        ),
    ),
    "phi3": Names(
        {"model_type": "phi3"},
        (
            *(row for row in DECODER if not row[0].endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))),
            *(*TWO_NORMS, *HEAD),
            (f"{L}self_attn.qkv_proj.weight", 2, "attention", "blk.1.attn_qkv.weight"),
            (f"{L}mlp.gate_up_proj.weight", 2, "mlp", "blk.1.ffn_up.weight"),
            (f"{L}mlp.down_proj.weight", 2, "mlp", "blk.1.ffn_down.weight"),
        ),
    ),
    "deepseek_v2": Names(
        {"model_type": "deepseek_v2", "num_hidden_layers": 27},
        (
            *(*HEAD, *TWO_NORMS, *DENSE, *EXPERTS, *LATENT, *SHARED_EXPERTS),
            ("model.embed_tokens.weight", 2, "embedding", "token_embd.weight"),
            (f"{L}self_attn.q_proj.weight", 2, "attention", "blk.1.attn_q.weight"),
            (f"{L}self_attn.o_proj.weight", 2, "attention", "blk.1.attn_output.weight"),
            (f"{L}self_attn.rotary_emb.inv_freq", 1, "other", "-"),
        ),
    ),
    "deepseek_v3": Names(
        {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "num_hidden_layers": 61},
        (
            *(*HEAD, *TWO_NORMS, *DENSE, *EXPERTS, *LATENT, *SHARED_EXPERTS),
            (f"{L}self_attn.q_a_proj.weight", 2, "attention", "blk.1.attn_q_a.weight"),
            (f"{L}self_attn.q_a_layernorm.weight", 1, "norm", "blk.1.attn_q_a_norm.weight"),
            (f"{L}self_attn.q_b_proj.weight", 2, "attention", "blk.1.attn_q_b.weight"),
            (f"{L}mlp.gate.e_score_correction_bias", 1, "bias", "blk.1.exp_probs_b.bias"),
            ("model.layers.61.mlp.experts.255.gate_proj.weight", 2, "expert", "-"),
            ("model.layers.61.self_attn.kv_b_proj.weight", 2, "attention", "-"),
            ("model.layers.61.eh_proj.weight", 2, "other", "-"),
            ("model.layers.61.enorm.weight", 1, "norm", "-"),
            ("model.layers.61.shared_head.head.weight", 2, "head", "-"),
            ("model.layers.61.embed_tokens.weight", 2, "embedding", "-"),
        ),
    ),
    "gpt_oss": Names(
        {"model_type": "gpt_oss"},
        (
            *(*DECODER, *HEAD, *QKV_BIASES),
            (f"{L}post_attention_layernorm.weight", 1, "norm", "blk.1.post_attention_norm.weight"),
            (f"{L}self_attn.o_proj.bias", 1, "bias", "blk.1.attn_output.bias"),
            (f"{L}self_attn.sinks", 1, "other", "blk.1.attn_sinks.weight"),
            (f"{L}mlp.router.weight", 2, "router", "blk.1.ffn_gate_inp.weight"),
            (f"{L}mlp.router.bias", 1, "bias", "blk.1.ffn_gate_inp.bias"),
            (f"{L}mlp.experts.gate_up_proj", 3, "expert", PARTS),
            (f"{L}mlp.experts.gate_proj.weight", 3, "expert", "blk.1.ffn_gate_exps.weight"),
            (f"{L}mlp.experts.up_proj.weight", 3, "expert", "blk.1.ffn_up_exps.weight"),
            (f"{L}mlp.experts.gate_up_proj_bias", 2, "bias", PARTS),
            (f"{L}mlp.experts.gate_proj.bias", 2, "bias", "blk.1.ffn_gate_exps.bias"),
            (f"{L}mlp.experts.up_proj.bias", 2, "bias", "blk.1.ffn_up_exps.bias"),
            (f"{L}mlp.experts.down_proj", 3, "expert", PARTS),
            (f"{L}mlp.experts.down_proj.weight", 3, "expert", "blk.1.ffn_down_exps.weight"),
            (f"{L}mlp.experts.down_proj_bias", 2, "bias", PARTS),
            (f"{L}mlp.experts.down_proj.bias", 2, "bias", "blk.1.ffn_down_exps.bias"),
        ),
    ),
    "bert": Names(
        {"model_type": "bert"},
        (
            ("embeddings.word_embeddings.weight", 2, "embedding", "token_embd.weight"),
            ("embeddings.position_embeddings.weight", 2, "position", "position_embd.weight"),
            ("embeddings.token_type_embeddings.weight", 2, "position", "token_types.weight"),
            ("embeddings.LayerNorm.weight", 1, "norm", "token_embd_norm.weight"),
            ("embeddings.LayerNorm.bias", 1, "bias", "token_embd_norm.bias"),
            (f"{B}attention.self.query.weight", 2, "attention", "blk.1.attn_q.weight"),
            (f"{B}attention.self.key.bias", 1, "bias", "blk.1.attn_k.bias"),
            (f"{B}attention.self.value.weight", 2, "attention", "blk.1.attn_v.weight"),
            (f"{B}attention.output.dense.weight", 2, "attention", "blk.1.attn_output.weight"),
            (f"{B}attention.output.LayerNorm.weight", 1, "norm", "blk.1.attn_output_norm.weight"),
            (f"{B}intermediate.dense.weight", 2, "mlp", "blk.1.ffn_up.weight"),
            (f"{B}output.dense.weight", 2, "mlp", "blk.1.ffn_down.weight"),
            (f"{B}output.LayerNorm.bias", 1, "bias", "blk.1.layer_output_norm.bias"),
            (f"bert.{B}output.dense.weight", 2, "mlp", "blk.1.ffn_down.weight"),
            ("pooler.dense.weight", 2, "head", "-"),
            ("cls.predictions.transform.dense.weight", 2, "head", "-"),
        ),
    ),
    "dream": Names(
        {"model_type": "Dream", "architectures": ["DreamModel"]}, (*DECODER, *DENSE, *TWO_NORMS, *HEAD, *QKV_BIASES)
    ),
    "llada": Names(
        {"model_type": "llada", "architectures": ["LLaDAModelLM"]},
        (
            ("model.transformer.wte.weight", 2, "embedding", "token_embd.weight"),
            ("model.transformer.blocks.1.attn_norm.weight", 1, "norm", "blk.1.attn_norm.weight"),
            ("model.transformer.blocks.1.ff_norm.weight", 1, "norm", "blk.1.ffn_norm.weight"),
            ("model.transformer.blocks.1.q_proj.weight", 2, "attention", "blk.1.attn_q.weight"),
            ("model.transformer.blocks.1.v_proj.weight", 2, "attention", "blk.1.attn_v.weight"),
            ("model.transformer.blocks.1.attn_out.weight", 2, "attention", "blk.1.attn_output.weight"),
            ("model.transformer.blocks.1.ff_proj.weight", 2, "mlp", "blk.1.ffn_gate.weight"),
            ("model.transformer.blocks.1.up_proj.weight", 2, "mlp", "blk.1.ffn_up.weight"),
            ("model.transformer.blocks.1.ff_out.weight", 2, "mlp", "blk.1.ffn_down.weight"),
            ("model.transformer.ln_f.weight", 1, "norm", "output_norm.weight"),
            ("model.transformer.ff_out.weight", 2, "head", "output.weight"),
        ),
    ),
    "gguf": Names(
        {},
        tuple(
            (name, ndim, role, name)
            for name, ndim, role in (
                ("token_embd.weight", 2, "embedding"),
                ("per_layer_token_embd.weight", 2, "embedding"),
                ("position_embd.weight", 2, "position"),
                ("token_types.weight", 2, "position"),
                ("rope_freqs.weight", 1, "other"),
                ("output_norm.weight", 1, "norm"),
                ("output.weight", 2, "head"),
                ("cls.output.weight", 2, "other"),
                ("blk.1.attn_q.weight", 2, "attention"),
                ("blk.1.attn_q.bias", 1, "bias"),
                ("blk.1.attn_q_norm.weight", 2, "norm"),
                ("blk.1.attn_kv_a_mqa.weight", 2, "attention"),
                ("enc.blk.1.attn_rel_b.weight", 2, "position"),
                ("dec.blk.1.cross_attn_o.weight", 2, "attention"),
                ("blk.1.ffn_gate.weight", 2, "mlp"),
                ("blk.1.ffn_gate_inp.weight", 2, "router"),
                ("blk.1.ffn_gate_inp_shexp.weight", 2, "router"),
                ("blk.1.ffn_gate_exps.weight", 3, "expert"),
                ("blk.1.ffn_gate_up_exps.weight", 3, "expert"),
                ("blk.1.ffn_up_shexp.weight", 2, "shared expert"),
                ("blk.1.ssm_conv1d.weight", 2, "conv"),
                ("blk.1.shortconv.conv.weight", 2, "conv"),
                ("blk.1.ssm_in.weight", 2, "other"),
                ("blk.1.ssm_a", 2, "other"),
            )
        ),
    ),
    "flux": Names(
        {"_class_name": "FluxTransformer2DModel"},
        plain(
            ("img_in.weight", 2, "embedding"),
            ("time_in.in_layer.weight", 2, "embedding"),
            ("double_blocks.0.img_mod.lin.weight", 2, "modulation"),
            ("double_blocks.0.img_attn.qkv.weight", 2, "attention"),
            ("double_blocks.0.img_attn.norm.query_norm.scale", 1, "norm"),
            ("double_blocks.0.txt_mlp.2.weight", 2, "mlp"),
            ("single_blocks.0.linear1.weight", 2, "attention"),
            ("single_blocks.0.modulation.lin.weight", 2, "modulation"),
            ("final_layer.linear.weight", 2, "head"),
            ("final_layer.adaLN_modulation.1.weight", 2, "modulation"),
            ("transformer_blocks.0.norm1.linear.weight", 2, "modulation"),
            ("transformer_blocks.0.norm1_context.linear.weight", 2, "modulation"),
            ("transformer_blocks.0.attn.to_q.weight", 2, "attention"),
            ("transformer_blocks.0.attn.add_k_proj.weight", 2, "attention"),
            ("transformer_blocks.0.attn.to_out.0.weight", 2, "attention"),
            ("transformer_blocks.0.ff.net.0.proj.weight", 2, "mlp"),
            ("transformer_blocks.0.ff_context.net.2.weight", 2, "mlp"),
            ("single_transformer_blocks.0.proj_mlp.weight", 2, "mlp"),
            ("single_transformer_blocks.0.proj_out.weight", 2, "mlp"),
            ("x_embedder.weight", 2, "embedding"),
            ("time_text_embed.timestep_embedder.linear_1.weight", 2, "embedding"),
            ("norm_out.linear.weight", 2, "modulation"),
            ("proj_out.weight", 2, "head"),
        ),
    ),
    "sdxl": Names(
        {"_class_name": "UNet2DConditionModel"},
        plain(
            ("conv_in.weight", 4, "conv"),
            ("time_embedding.linear_1.weight", 2, "embedding"),
            ("add_embedding.linear_1.weight", 2, "embedding"),
            ("down_blocks.1.resnets.0.conv1.weight", 4, "conv"),
            ("down_blocks.1.resnets.0.time_emb_proj.weight", 2, "modulation"),
            ("down_blocks.1.attentions.0.norm.weight", 1, "norm"),
            ("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight", 2, "attention"),
            ("down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight", 2, "attention"),
            ("down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj.weight", 2, "mlp"),
            ("down_blocks.1.downsamplers.0.conv.weight", 4, "conv"),
            ("model.diffusion_model.input_blocks.4.0.in_layers.2.weight", 4, "conv"),
            ("model.diffusion_model.input_blocks.4.0.emb_layers.1.weight", 2, "modulation"),
            ("model.diffusion_model.time_embed.0.weight", 2, "embedding"),
            ("model.diffusion_model.label_emb.0.0.weight", 2, "embedding"),
            ("conv_out.weight", 4, "conv"),
        ),
    ),
    "sd3": Names(
        {"_class_name": "SD3Transformer2DModel"},
        plain(
            ("pos_embed.pos_embed", 3, "position"),
            ("context_embedder.weight", 2, "embedding"),
            ("transformer_blocks.0.attn.add_q_proj.weight", 2, "attention"),
            ("transformer_blocks.0.attn.norm_q.weight", 1, "norm"),
            ("transformer_blocks.0.norm1_context.linear.weight", 2, "modulation"),
            ("transformer_blocks.0.ff_context.net.0.proj.weight", 2, "mlp"),
            ("joint_blocks.0.x_block.attn.qkv.weight", 2, "attention"),
            ("joint_blocks.0.context_block.adaLN_modulation.1.weight", 2, "modulation"),
            ("joint_blocks.0.context_block.mlp.fc1.weight", 2, "mlp"),
            ("t_embedder.mlp.0.weight", 2, "embedding"),
            ("final_layer.linear.weight", 2, "head"),
            ("proj_out.weight", 2, "head"),
        ),
    ),
    "wan": Names(
        {"_class_name": "WanTransformer3DModel"},
        plain(
            ("patch_embedding.weight", 5, "embedding"),
            ("text_embedding.0.weight", 2, "embedding"),
            ("time_projection.1.weight", 2, "modulation"),
            ("blocks.0.self_attn.q.weight", 2, "attention"),
            ("blocks.0.self_attn.norm_q.weight", 1, "norm"),
            ("blocks.0.cross_attn.q.weight", 2, "attention"),
            ("blocks.0.cross_attn.k_img.weight", 2, "attention"),
            ("blocks.0.ffn.0.weight", 2, "mlp"),
            ("blocks.0.modulation", 3, "modulation"),
            ("head.head.weight", 2, "head"),
            ("head.modulation", 3, "modulation"),
            ("blocks.0.attn1.to_q.weight", 2, "attention"),
            ("blocks.0.attn2.add_k_proj.weight", 2, "attention"),
            ("blocks.0.ffn.net.0.proj.weight", 2, "mlp"),
            ("blocks.0.scale_shift_table", 3, "modulation"),
            ("condition_embedder.time_proj.weight", 2, "modulation"),
            ("condition_embedder.text_embedder.linear_1.weight", 2, "embedding"),
            ("proj_out.weight", 2, "head"),
        ),
    ),
    "dit": Names(
        {"_class_name": "DiTTransformer2DModel"},
        plain(
            ("pos_embed.proj.weight", 4, "position"),
            ("transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight", 2, "embedding"),
            ("transformer_blocks.0.norm1.linear.weight", 2, "modulation"),
            ("transformer_blocks.0.attn1.to_v.weight", 2, "attention"),
            ("transformer_blocks.0.ff.net.2.weight", 2, "mlp"),
            ("proj_out_1.weight", 2, "modulation"),
            ("proj_out_2.weight", 2, "head"),
            ("blocks.0.attn.qkv.weight", 2, "attention"),
            ("blocks.0.mlp.fc1.weight", 2, "mlp"),
            ("blocks.0.adaLN_modulation.1.weight", 2, "modulation"),
            ("y_embedder.embedding_table.weight", 2, "embedding"),
            ("t_embedder.mlp.0.weight", 2, "embedding"),
            ("x_embedder.proj.weight", 4, "embedding"),
            ("final_layer.linear.weight", 2, "head"),
            ("final_layer.adaLN_modulation.1.weight", 2, "modulation"),
        ),
    ),
}
