"""Which tensors the policy picks, with the reason for each, over the names of real model families."""

from __future__ import annotations

from pathlib import Path

import pytest

from arrowquant_gpu.errors import PolicyError
from arrowquant_gpu.formats import TensorInfo
from arrowquant_gpu.formats.checkpoint import open_checkpoint
from arrowquant_gpu.models import generic
from arrowquant_gpu.pipeline.policy import Policy

from .minilm import model_dir

LINEAR = "linear weight"
PER_HEAD = "linear weights, a matrix for each head"
STACKED = "experts of a mixture, stacked; groups run along the last axis"
LLAMA = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008}
MOE = {"num_experts": 60, "vocab_size": 151936, "hidden_size": 2048}

# (config, name, shape, reason); quantized where the reason is that of a rule that quantizes.
TABLE = [
    (LLAMA, "model.layers.0.self_attn.q_proj.weight", (4096, 4096), LINEAR),
    (LLAMA, "model.layers.0.mlp.gate_proj.weight", (11008, 4096), LINEAR),
    (LLAMA, "model.layers.0.mlp.down_proj.weight", (4096, 11008), LINEAR),
    (LLAMA, "model.layers.0.mlp.gate_up_proj.weight", (22016, 4096), LINEAR),
    (LLAMA, "model.layers.0.self_attn.qkv_proj.bias", (12288,), "0-D or 1-D: a norm, bias or scale"),
    (LLAMA, "model.layers.0.input_layernorm.weight", (4096,), "0-D or 1-D: a norm, bias or scale"),
    (LLAMA, "model.embed_tokens.weight", (32000, 4096), "embedding"),
    (LLAMA, "lm_head.weight", (32000, 4096), "output head"),
    (LLAMA, "language_model.lm_head.weight", (32000, 4096), "output head"),
    (LLAMA, "output.weight", (32000, 4096), "output head"),
    (LLAMA, "oddly_named.weight", (32000, 4096), "as many rows as the vocabulary: an embedding or output head"),
    (LLAMA | {"intermediate_size": 32000}, "oddly_named.weight", (32000, 4096), LINEAR),
    (
        {"text_config": LLAMA},
        "oddly_named.weight",
        (32000, 9),
        "as many rows as the vocabulary: an embedding or output head",
    ),
    (None, "oddly_named.weight", (32000, 4096), LINEAR),
    # BERT
    (None, "encoder.layer.0.attention.self.query.weight", (384, 384), LINEAR),
    (None, "bert.encoder.layer.11.output.dense.weight", (384, 1536), LINEAR),
    (None, "embeddings.word_embeddings.weight", (30522, 384), "embedding"),
    (None, "embeddings.token_type_embeddings.weight", (2, 384), "embedding"),
    (None, "pooler.dense.weight", (384, 384), "pooler"),
    (None, "cls.predictions.transform.dense.weight", (384, 384), "output head"),
    (None, "classifier.weight", (2, 384), "classifier head"),
    (None, "qa_outputs.weight", (2, 384), "classifier head"),
    # GGUF
    (None, "blk.0.ssm_conv1d.weight", (1536, 4), "small, and in float in GGUF files"),
    (None, "blk.0.shortconv.conv.weight", (1024, 3), "small, and in float in GGUF files"),
    (None, "blk.0.time_mix_w1.weight", (64, 2048), "small, and in float in GGUF files"),
    (None, "blk.0.indexer.k_proj.weight", (128, 2048), "small, and in float in GGUF files"),
    (None, "blk.0.time_mix_key.weight", (2048, 2048), LINEAR),
    (None, "altup_proj.weight", (3, 2048, 2048), "small, and in float in GGUF files"),
    (None, "blk.0.laurel_l.weight", (64, 2048), "small, and in float in GGUF files"),
    # Mixtures of experts
    (MOE, "model.layers.0.mlp.gate.weight", (60, 2048), "router of a mixture of experts"),
    (MOE, "model.layers.0.mlp.shared_expert_gate.weight", (1, 2048), "router of a mixture of experts"),
    (MOE, "model.layers.0.block_sparse_moe.gate.weight", (8, 4096), "router of a mixture of experts"),
    (MOE, "model.layers.0.feed_forward.router.weight", (16, 5120), "router of a mixture of experts"),
    (MOE, "model.layers.0.mlp.experts.7.gate_proj.weight", (1408, 2048), LINEAR),
    (MOE, "model.layers.0.mlp.shared_expert.up_proj.weight", (5632, 2048), LINEAR),
    (MOE, "model.layers.0.mlp.experts.gate_up_proj", (60, 2816, 2048), STACKED),
    (MOE, "model.layers.0.mlp.experts.down_proj", (60, 2048, 1408), STACKED),
    (MOE, "transformer.blocks.0.ffn.experts.mlp.w1", (172032, 6144), STACKED),
    (MOE, "model.layers.0.mlp.experts.gate_up_proj_bias", (60, 2816), "bias"),
    (MOE, "l.0.moe.input_linear.weight", (60, 512, 256), "as many matrices as experts; groups run along the last axis"),
    # Parts
    (None, "model.layers.0.self_attn.k_b_proj.weight", (128, 512, 128), PER_HEAD),
    ({"model_type": "deepseek_v3"}, "model.layers.0.self_attn.v_b_proj.weight", (128, 128, 512), PER_HEAD),
    # Other families
    (None, "transformer.wte.weight", (50257, 768), "embedding"),
    (None, "transformer.wpe.weight", (1024, 768), "embedding"),
    (None, "transformer.h.0.attn.c_attn.weight", (768, 2304), LINEAR),
    (None, "shared.weight", (32128, 512), "embedding"),
    (
        *(None, "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (32, 8)),
        "position or relation bias, an embedding",
    ),
    (None, "vision_tower.embeddings.patch_embedding.weight", (1024, 3, 14, 14), "embedding"),
    (None, "conv1.weight", (64, 3, 7, 7), "3-D or more: a convolution or another parameter that is not linear"),
    (None, "mixer.conv1d.weight", (1536, 1, 4), "3-D or more: a convolution or another parameter that is not linear"),
    (None, "mixer.A_log", (1536, 16), "a matrix whose name does not end in 'weight': not known to be linear"),
    (None, "mixer.x_proj.weight", (80, 1536), LINEAR),
    (None, "transformer_blocks.0.norm1.linear.weight", (18432, 3072), LINEAR),
    (None, "transformer_blocks.0.attn.to_q.weight", (3072, 3072), LINEAR),
    (None, "single_transformer_blocks.3.proj_out.weight", (3072, 15360), LINEAR),
    (None, "proj_out.weight", (64, 3072), "output head"),
    (None, "some.layer_norm.weight", (4, 384), "norm"),
    (None, "weight", (8, 8), LINEAR),
    (None, "attn.in_proj_weight", (2304, 768), LINEAR),
]
QUANTIZED = {r.reason for r in generic().rules if r.quantize} | {
    "as many matrices as experts; groups run along the last axis"
}


def tensor(name: str, shape: tuple[int, ...], dtype: str = "bfloat16") -> TensorInfo:
    return TensorInfo(name, dtype, shape, Path("model.safetensors"), 0, 0)


def decide(policy: Policy, name: str, shape: tuple[int, ...], dtype: str = "bfloat16") -> tuple[bool, str]:
    return policy.decide(tensor(name, shape, dtype))[:2]


@pytest.mark.parametrize(("config", "name", "shape", "reason"), TABLE)
def test_table(config: dict | None, name: str, shape: tuple[int, ...], reason: str) -> None:
    assert decide(Policy(None, config), name, shape) == (reason in QUANTIZED, reason)


def test_every_rule_is_reached_by_the_table() -> None:
    assert {r.reason for r in generic().rules} <= {reason for _, _, _, reason in TABLE}


def test_the_table_in_the_documents_is_this_one() -> None:
    text = (Path(__file__).parent.parent / "docs" / "policy.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    documented = [(row[3], row[2] == "quantized") for row in rows if len(row) == 4 and row[2] in ("kept", "quantized")]
    assert documented == list(dict.fromkeys((rule.reason, rule.quantize) for rule in generic().rules))


def test_what_holds_no_weights_is_kept_whatever_is_asked_for() -> None:
    policy = Policy(None, include=[".*"])
    assert decide(policy, "position_ids", (1, 512), "int64") == (False, "int64: not weights")
    assert decide(policy, "w.weight", (0, 4)) == (False, "empty")
    assert decide(policy, "w.weight", (4, 8), "float4_e2m1fn")[0] is False
    assert decide(policy, "norm.weight", (8,)) == (True, "included by --include .*")


@pytest.mark.interop
def test_minilm_is_its_36_encoder_matrices() -> None:
    source = open_checkpoint(model_dir())
    policy = Policy(source.tensors, source.config)
    quantized = [info for info in source.tensors.values() if policy.decide(info).quantize]
    assert len(source.tensors) == 104
    assert len(quantized) == 36
    assert sum(info.shape[0] * info.shape[1] for info in quantized) == 10_616_832
    assert all(info.name.startswith("encoder.layer.") for info in quantized)


def test_ignore_beats_include_beats_the_table() -> None:
    names = ["lm_head.weight", "a.q_proj.weight", "a.k_proj.weight"]
    policy = Policy(names, include=[r"lm_head", r"q_proj"], ignore=[r"^a\.q"])
    decisions = {name: decide(policy, name, (8, 8)) for name in names}
    assert decisions == {
        "lm_head.weight": (True, "included by --include lm_head"),
        "a.q_proj.weight": (False, r"ignored by --ignore ^a\.q"),
        "a.k_proj.weight": (True, LINEAR),
    }


def test_expressions_are_searched_in_the_whole_tensor_name() -> None:
    policy = Policy(["model.layers.10.mlp.weight"], ignore=[r"layers\.1\d\..*weight$"])
    assert not policy.decide(tensor("model.layers.10.mlp.weight", (8, 8))).quantize
    assert policy.decide(tensor("model.layers.1.mlp.weight", (8, 8))).quantize


def test_an_expression_that_matches_nothing_is_an_error_that_names_what_is_near() -> None:
    names = ["model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"]
    with pytest.raises(
        PolicyError, match=r"--ignore 'gate_prj' matches none of the 3 tensor names\. Near it: gate_proj"
    ):
        Policy(names, ignore=["gate_prj"])
    with pytest.raises(PolicyError, match=r"--include 'zzz' matches none .* The names are like model\.layers"):
        Policy(names, include=["zzz"])


def test_an_expression_that_is_none_is_an_error() -> None:
    with pytest.raises(PolicyError, match=r"--ignore '\(\(' is not a regular expression: .*position"):
        Policy(["a"], ignore=["(("])
