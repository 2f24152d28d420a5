"""Small Hugging Face models of the families that loaders treat differently, written without torch.

Every format can carry every linear weight of them: row lengths are multiples of 256, and rows multiples of 64.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from . import tiny_tokenizers
from .fixtures import llama_shapes, random_weights, write_safetensors

LAYERS, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCAB, EXPERTS = 2, 256, 512, 4, 2, 512, 4


def _model(directory: Path | str, dtype: str, shapes: Mapping[str, tuple[int, ...]], seed: int, **own: object) -> Path:
    """A directory with model.safetensors, config.json and generation_config.json; `own` keys of its config."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory / "model.safetensors", random_weights(shapes, dtype, seed), {"format": "pt"})
    config = {
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "torch_dtype": dtype,
        **own,
    }
    generation = {"bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"], "do_sample": False}
    for name, value in {"config.json": config, "generation_config.json": generation}.items():
        (directory / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    return directory


def tiny_llama_gqa(directory: Path | str, dtype: str = "bfloat16") -> Path:
    """LlamaForCausalLM: grouped-query attention, an output head of its own, the tokenizer of Llama 3."""
    shapes = llama_shapes(LAYERS, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCAB)
    own = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}
    own |= {"attention_bias": False, "mlp_bias": False, "bos_token_id": VOCAB - 3, "eos_token_id": VOCAB - 2}
    directory = _model(directory, dtype, shapes, 1, **own)
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|finetune_right_pad_id|>"]
    names = dict(zip(("bos_token", "eos_token", "pad_token"), special, strict=True))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, **names}
    tiny_tokenizers.byte_level(directory, "llama3", VOCAB, config, special)
    return directory


def tiny_qwen2(directory: Path | str, dtype: str = "bfloat16") -> Path:
    """Qwen2ForCausalLM: biases of q, k and v, the output head tied to the embeddings, the tokenizer of Qwen2."""
    shapes = llama_shapes(LAYERS, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCAB, tied=True)
    projections = tuple(f"{p}_proj.weight" for p in "qkv")
    shapes |= {n.replace(".weight", ".bias"): s[:1] for n, s in shapes.items() if n.endswith(projections)}
    own = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": True}
    own |= {"use_sliding_window": False, "bos_token_id": VOCAB - 3, "eos_token_id": VOCAB - 1}
    directory = _model(directory, dtype, shapes, 2, **own)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    config = {"tokenizer_class": "Qwen2Tokenizer", "model_max_length": 512, "add_prefix_space": False}
    config |= {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None}
    tiny_tokenizers.byte_level(directory, "qwen2", VOCAB, config, special)
    return directory


def tiny_mixtral(directory: Path | str, dtype: str = "bfloat16") -> Path:
    """MixtralForCausalLM: four experts in tensors of their own, as in the files of Mixtral, and its kind of tokenizer.

    Every token goes to every expert: to which two of four would hang on roundings that loaders are free to do.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in llama_shapes(LAYERS, HIDDEN, INTERMEDIATE, HEADS, KV_HEADS, VOCAB).items():
        layer, mlp, projection = name.partition("mlp.")
        if not mlp:
            shapes[name] = shape
            continue
        if projection == "gate_proj.weight":
            shapes[layer + "block_sparse_moe.gate.weight"] = (EXPERTS, HIDDEN)
        weight = {"gate_proj.weight": "w1", "down_proj.weight": "w2", "up_proj.weight": "w3"}[projection]
        shapes |= {f"{layer}block_sparse_moe.experts.{i}.{weight}.weight": shape for i in range(EXPERTS)}
    own = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "tie_word_embeddings": False}
    own |= {"num_local_experts": EXPERTS, "num_experts_per_tok": EXPERTS, "sliding_window": None}
    directory = _model(directory, dtype, shapes, 3, **own, bos_token_id=1, eos_token_id=2)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "LlamaTokenizer", "model_max_length": 512, "add_bos_token": True, "legacy": True}
    tiny_tokenizers.byte_fallback(directory, VOCAB, config | {"add_eos_token": False} | names)
    return directory


def _latent_shapes(q_rank: int | None, n_layers: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a DeepSeek: latent attention, the first layer dense, the others mixtures with shared experts."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    for i in range(n_layers):
        layer, query = f"model.layers.{i}.", HEADS * (NOPE + ROPE)
        shapes |= {f"{layer}{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
        if q_rank is None:
            shapes[f"{layer}self_attn.q_proj.weight"] = (query, HIDDEN)
        else:
            shapes[f"{layer}self_attn.q_a_proj.weight"] = (q_rank, HIDDEN)
            shapes[f"{layer}self_attn.q_a_layernorm.weight"] = (q_rank,)
            shapes[f"{layer}self_attn.q_b_proj.weight"] = (query, q_rank)
        shapes[f"{layer}self_attn.kv_a_proj_with_mqa.weight"] = (KV_RANK + ROPE, HIDDEN)
        shapes[f"{layer}self_attn.kv_a_layernorm.weight"] = (KV_RANK,)
        shapes[f"{layer}self_attn.kv_b_proj.weight"] = (HEADS * (NOPE + VALUE), KV_RANK)
        shapes[f"{layer}self_attn.o_proj.weight"] = (HIDDEN, HEADS * VALUE)
        experts = [f"experts.{e}" for e in range(EXPERTS)]
        sizes = {"": INTERMEDIATE} if i == 0 else {"shared_experts.": 2 * MOE, **{f"{e}.": MOE for e in experts}}
        for part, size in sizes.items():
            shapes |= {f"{layer}mlp.{part}{name}_proj.weight": (size, HIDDEN) for name in ("gate", "up")}
            shapes[f"{layer}mlp.{part}down_proj.weight"] = (HIDDEN, size)
        if i:
            shapes[f"{layer}mlp.gate.weight"] = (EXPERTS, HIDDEN)
    return shapes


NOPE, ROPE, VALUE, KV_RANK, MOE = 64, 32, 96, 256, 256
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 32, "beta_slow": 1}


def _tiny_deepseek(
    directory: Path | str, dtype: str, version: int, shapes: Mapping[str, tuple[int, ...]], **own: object
) -> Path:
    own |= {"architectures": [f"DeepseekV{version}ForCausalLM"], "model_type": f"deepseek_v{version}"}
    own |= {"num_key_value_heads": HEADS, "tie_word_embeddings": False, "bos_token_id": VOCAB - 2}
    own |= {"eos_token_id": VOCAB - 1, "rms_norm_eps": 1e-6, "attention_bias": False, "first_k_dense_replace": 1}
    own |= {"kv_lora_rank": KV_RANK, "qk_nope_head_dim": NOPE, "qk_rope_head_dim": ROPE, "v_head_dim": VALUE}
    own |= {"moe_intermediate_size": MOE, "n_routed_experts": EXPERTS, "n_shared_experts": 2, "moe_layer_freq": 1}
    directory = _model(directory, dtype, shapes, 4 + version, **own)
    special = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"]
    names = dict(zip(("bos_token", "eos_token"), special, strict=True))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, **names}
    tiny_tokenizers.byte_level(directory, f"deepseek{version}", VOCAB, config, special)
    return directory


def tiny_deepseek_v2(directory: Path | str, dtype: str = "bfloat16") -> Path:
    """DeepseekV2ForCausalLM as V2-Lite: queries from one matrix, every token to every expert by softmax, yarn."""
    own = {"q_lora_rank": None, "scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False}
    own |= {"num_experts_per_tok": EXPERTS, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}
    own |= {"rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}}
    return _tiny_deepseek(directory, dtype, 2, _latent_shapes(None, LAYERS), **own)


def tiny_deepseek_v3(directory: Path | str, dtype: str = "bfloat16") -> Path:
    """DeepseekV3ForCausalLM: queries from a low rank, one of two groups of experts by biased sigmoids, and after the
    last layer one that predicts a further token.

    The biases are far apart, so that the choice does not hang on roundings.
    """
    shapes, last = _latent_shapes(256, LAYERS + 1), f"model.layers.{LAYERS}."
    shapes |= {f"{last}{name}.weight": (HIDDEN,) for name in ("enorm", "hnorm", "shared_head.norm")}
    shapes |= {f"{last}eh_proj.weight": (HIDDEN, 2 * HIDDEN), f"{last}shared_head.head.weight": (VOCAB, HIDDEN)}
    shapes[f"{last}embed_tokens.weight"] = (VOCAB, HIDDEN)
    own = {"q_lora_rank": 256, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True}
    own |= {"num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5}
    own |= {"num_nextn_predict_layers": 1, "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}
    directory = _tiny_deepseek(directory, dtype, 3, shapes, **own)
    tensors = load_file(directory / "model.safetensors")
    for i in range(1, LAYERS + 1):
        bias = np.array([0, 3, 6, 9], np.float32)[np.random.default_rng(i).permutation(EXPERTS)]
        tensors[f"model.layers.{i}.mlp.gate.e_score_correction_bias"] = bias
    write_safetensors(directory / "model.safetensors", tensors, {"format": "pt"})
    return directory


# Of which GGUF files have tensors cut into parts.
DEEPSEEK: Mapping[str, Callable[[Path | str, str], Path]] = {
    "deepseek_v2": tiny_deepseek_v2,
    "deepseek_v3": tiny_deepseek_v3,
}


def tiny_gpt_oss(directory: Path | str, dtype: str = "bfloat16", **own: object) -> Path:
    """GptOssForCausalLM: stacked experts with biases, sinks, a window of 8 tokens in every other layer.

    As in the published models rows are whole blocks of 32 and not of 256. Every token goes to every expert.
    """
    hidden, inner, head = 288, 320, 64
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, hidden), "model.norm.weight": (hidden,)}
    for layer in (f"model.layers.{i}." for i in range(LAYERS)):
        shapes |= {f"{layer}{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
        for p, n in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            shapes[f"{layer}self_attn.{p}_proj.weight"] = (n * head, hidden)
            shapes[f"{layer}self_attn.{p}_proj.bias"] = (n * head,)
        shapes |= {
            f"{layer}self_attn.o_proj.weight": (hidden, HEADS * head),
            f"{layer}self_attn.o_proj.bias": (hidden,),
        }
        shapes |= {f"{layer}self_attn.sinks": (HEADS,), f"{layer}mlp.router.weight": (EXPERTS, hidden)}
        shapes |= {f"{layer}mlp.router.bias": (EXPERTS,), f"{layer}mlp.experts.down_proj": (EXPERTS, inner, hidden)}
        shapes[f"{layer}mlp.experts.gate_up_proj"] = (EXPERTS, hidden, 2 * inner)
        shapes[f"{layer}mlp.experts.gate_up_proj_bias"] = (EXPERTS, 2 * inner)
        shapes[f"{layer}mlp.experts.down_proj_bias"] = (EXPERTS, hidden)
    shapes["lm_head.weight"] = (VOCAB, hidden)
    rope = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
    rope |= {"original_max_position_embeddings": 128, "rope_theta": 150000.0}
    config = {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "tie_word_embeddings": False}
    config |= {"hidden_size": hidden, "intermediate_size": inner, "head_dim": head, "num_local_experts": EXPERTS}
    config |= {"num_experts_per_tok": EXPERTS, "sliding_window": 8, "attention_bias": True, "rope_parameters": rope}
    config |= {"layer_types": ["sliding_attention", "full_attention"], "swiglu_limit": 7.0}
    config |= {"bos_token_id": VOCAB - 3, "eos_token_id": VOCAB - 1, "pad_token_id": VOCAB - 2, "rope_theta": None}
    directory = _model(directory, dtype, shapes, 4, **(config | own))
    special = ["<|startoftext|>", "<|endoftext|>", "<|return|>"]
    options = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, "add_bos_token": False}
    options |= {"pad_token": special[1], "eos_token": special[2]}
    tiny_tokenizers.byte_level(directory, "gpt-oss", VOCAB, options, special)
    return directory


MODELS: Mapping[str, Callable[[Path | str, str], Path]] = {
    "llama": tiny_llama_gqa,
    "qwen2": tiny_qwen2,
    "mixtral": tiny_mixtral,
}
