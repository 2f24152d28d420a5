"""What is known of models: every architecture over real tensor names, GGUF names and keys, mixes, and the tables."""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import pytest

from arrowquant_gpu import models
from arrowquant_gpu.errors import FormatError
from arrowquant_gpu.grids import GRIDS
from arrowquant_gpu.models import gguf, mix, tables
from arrowquant_gpu.models.tables import architectures
from arrowquant_gpu.schemes import Scheme

from .model_names import DECODER, DENSE, NAMES, PARTS

ROWS = [(arch, *row) for arch, (_, rows) in NAMES.items() for row in rows]
LLAMA = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
GPT_OSS = {
    "model_type": "gpt_oss",
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 24,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 32,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 131072,
    "sliding_window": 128,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "attention_bias": True,
    "swiglu_limit": 7.0,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000,
    "tie_word_embeddings": False,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
    },
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "first_k_dense_replace": 3,
    "num_nextn_predict_layers": 1,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "beta_fast": 32,
        "beta_slow": 1,
        "original_max_position_embeddings": 4096,
    },
}


def test_every_architecture_of_the_table_has_names_here() -> None:
    assert set(NAMES) == set(architectures())
    assert {row.gguf for row in architectures().values()} - {None} == set(gguf.ggufs())
    used = {role for _, _, _, role, _ in ROWS}
    assert used == set(models.ROLES)


@pytest.mark.parametrize("arch", [arch for arch, row in architectures().items() if row.model_types or row.classes])
def test_the_config_tells_the_architecture(arch: str) -> None:
    found = models.find(NAMES[arch].config, [])
    assert (found.name, found.is_known) == (arch, True)
    # A part of the config is looked at too, as models of text and images have it.
    nested = models.find({"model_type": "unheard_of", "text_config": NAMES[arch].config}, [])
    assert nested.name == arch


@pytest.mark.parametrize(("arch", "name", "ndim", "role", "gguf_name"), ROWS)
def test_roles_and_gguf_names(arch: str, name: str, ndim: int, role: str, gguf_name: str | None) -> None:
    model = models.find(NAMES[arch].config, [row[0] for row in NAMES[arch].rows])
    assert model.role(name, (64,) * ndim) == role
    if gguf_name is None:
        assert model.gguf is None
        return
    assert model.gguf is not None
    is_omitted, in_parts = model.gguf.omits(name, NAMES[arch].config), gguf_name == PARTS
    assert is_omitted == (gguf_name == "-")
    assert set(model.gguf.parts(NAMES[arch].config, [name])) == ({name} if in_parts else set())
    if not is_omitted:
        found = model.gguf.name(name)
        assert (None if found is None else found.name) == (None if in_parts else gguf_name)


@pytest.mark.parametrize("arch", [arch for arch, row in architectures().items() if row.names])
def test_names_tell_an_architecture_where_no_config_does(arch: str) -> None:
    names = [row[0] for row in NAMES[arch].rows]
    assert models.find(None, names).name == arch
    assert models.find({"torch_dtype": "bfloat16"}, names).name == arch
    # But not against what the config says.
    assert models.find({"model_type": "mamba"}, names).name == "mamba"


def test_an_architecture_that_is_unknown_has_generic_rules() -> None:
    model = models.find({"model_type": "mamba2"}, ["a.q_proj.weight"])
    assert (model.name, model.is_known, model.gguf, dict(model.tied)) == ("mamba2", False, None, {})
    assert model.role("backbone.layers.0.mixer.in_proj.weight", (8, 8)) == "other"
    assert model.role("x.layers.0.attn.c_proj.weight", (8, 8)) == "attention"
    assert model.role("x.layers.0.ffn.w2.weight", (8, 8)) == "mlp"
    assert model.fused("x.q_proj.weight") == ("q_proj, k_proj, v_proj", "x")
    assert models.find(None, []).name == ""


def test_what_an_architecture_says_goes_before_the_generic_rules() -> None:
    """The head of LLaDA is named as the last matrix of every block is, and as large as its embedding."""
    name = "model.transformer.ff_out.weight"
    assert models.find(None, []).rule(name, (126464, 4096)).quantize
    rule = models.find(NAMES["llada"].config, []).rule(name, (126464, 4096))
    assert (rule.quantize, rule.reason) == (False, "output head")


def test_no_expression_asks_for_the_number_of_a_layer_or_an_expert() -> None:
    """So that what is found for one tensor can be remembered for those of all layers."""
    patterns = [pattern.pattern for row in architectures().values() for _, pattern in row.roles]
    patterns += [rule.match.pattern for rule in models.generic().rules]
    assert not [text for text in patterns if re.search(r"(?<!\w)(?:layers?|blocks|experts)\\\.[\d\[]", text)]
    model = models.find(NAMES["mixtral"].config, [])
    for name in ("layers.7.block_sparse_moe.experts.3.w1.weight", "layers.8.block_sparse_moe.experts.40.w1.weight"):
        assert (model.role(name, (8, 8)), model.role(name, (8,))) == ("expert", "other")


def test_layers() -> None:
    model = models.find(None, [])
    names = ["model.layers.11.mlp.experts.40.up_proj.weight", "h.3.attn.weight", "lm_head.weight", "0.weight"]
    assert [model.layer(name) for name in names] == [11, 3, None, 0]
    assert (model.n_layers(names), model.n_layers(["lm_head.weight"])) == (12, 0)


def test_fused_parts() -> None:
    mixtral, moe = models.find(NAMES["mixtral"].config, []), "model.layers.0.block_sparse_moe.experts"
    names = [f"{moe}.{i}.w{n}.weight" for i in (0, 1) for n in (1, 2, 3)] + [f"{moe}.0.w1.bias"]
    assert mixtral.fused_groups(names) == [names[:6], names[6:]]
    # Experts need one scheme, but a global scale of their own.
    assert [mixtral.shared(name) for name in names[:4]] == [
        f"{moe}.0: w1, w3",
        None,
        f"{moe}.0: w1, w3",
        f"{moe}.1: w1, w3",
    ]
    deepseek = models.find(NAMES["deepseek_v3"].config, [])
    names = [f"model.layers.0.self_attn.{part}.weight" for part in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa")]
    assert deepseek.fused_groups(names) == [[names[0], names[2]], [names[1]]]
    assert models.find(NAMES["phi3"].config, []).fused("model.layers.0.mlp.up_proj.weight") is None
    assert models.find(NAMES["llada"].config, []).fused("b.ff_proj.weight") == ("ff_proj, up_proj", "b")


@pytest.mark.parametrize(
    ("arch", "said", "is_tied"),
    [("llama", None, False), ("llama", True, True), ("gemma", None, True), ("gemma", False, False)],
)
def test_tied_heads(arch: str, said: bool | None, is_tied: bool) -> None:
    config = NAMES[arch].config | ({} if said is None else {"tie_word_embeddings": said})
    both = ["lm_head.weight", "model.embed_tokens.weight"]
    assert models.find(config, both).tied == ({both[0]: both[1]} if is_tied else {})
    assert models.find({"model_type": "x", "text_config": config}, both).tied == models.find(config, both).tied
    assert models.find(config, both[1:]).tied == {}


class TestGguf:
    def test_rows_of_q_and_k_are_permuted_where_llama_cpp_rotates_pairs(self) -> None:
        permuted = set()
        for arch, (config, rows) in NAMES.items():
            table = models.find(config, []).gguf
            found = {table.name(r[0]).permute for r in rows if table and table.name(r[0])} - {None}
            if found:
                permuted.add(arch)
        assert permuted == {"llama", "mistral", "mixtral", "llada"}
        table = models.find({"model_type": "llama"}, []).gguf
        assert [table.name(f"model.layers.3.self_attn.{p}_proj.bias").permute for p in "qkvo"] == ["q", "k", None, None]

    def test_norms_of_gemma_are_one_larger(self) -> None:
        table = models.find({"model_type": "gemma3"}, []).gguf
        adds = {row[0].split(".")[-2]: table.name(row[0]).add for row in NAMES["gemma3"].rows if row[3] != "-"}
        assert {name for name, add in adds.items() if add} == {name for name in adds if "norm" in name}
        assert {table.name(row[0]).add for table in gguf.ggufs().values() for row in DENSE if table.name(row[0])} == {
            0.0
        }

    def test_what_has_no_name(self) -> None:
        table = models.find({"model_type": "llama"}, []).gguf
        for name in (
            "model.layers.0.self_attn.q_norm.weight",
            "model.layers.x.mlp.up_proj.weight",
            "lm_head",
            "a.weight",
        ):
            assert table.name(name) is None, name
            assert not table.omits(name)
        assert table.omits("model.layers.0.self_attn.rotary_emb.inv_freq")

    def test_keys_of_llama(self) -> None:
        table = models.find(LLAMA, []).gguf
        assert table.keys(LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 500000}}) == {
            "llama.vocab_size": 32000,
            "llama.context_length": 4096,
            "llama.embedding_length": 4096,
            "llama.block_count": 32,
            "llama.feed_forward_length": 11008,
            "llama.attention.head_count": 32,
            "llama.attention.head_count_kv": 8,
            "llama.attention.layer_norm_rms_epsilon": 1e-5,
            "llama.rope.dimension_count": 128,
            "llama.rope.freq_base": 500000.0,
        }
        assert isinstance(table.keys(LLAMA | {"rope_theta": 10000})["llama.rope.freq_base"], float)
        assert table.keys({"text_config": LLAMA}) == table.keys(LLAMA)
        assert (
            table.keys(LLAMA | {"num_key_value_heads": None, "head_dim": None})["llama.attention.head_count_kv"] == 32
        )
        wide = table.keys(LLAMA | {"head_dim": 64})
        assert (wide["llama.rope.dimension_count"], wide["llama.attention.key_length"]) == (64, 64)

    def test_keys_of_gpt_oss(self) -> None:
        table = models.find(GPT_OSS, []).gguf
        want = {
            "vocab_size": 201088,
            "context_length": 131072,
            "embedding_length": 2880,
            "block_count": 24,
            "feed_forward_length": 2880,
            "expert_count": 32,
            "expert_used_count": 4,
            "expert_feed_forward_length": 2880,
            "attention.head_count": 64,
            "attention.head_count_kv": 8,
            "attention.key_length": 64,
            "attention.value_length": 64,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "attention.sliding_window": 128,
            "rope.dimension_count": 64,
            "rope.freq_base": 150000.0,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 32.0,
            "rope.scaling.original_context_length": 4096,
            "rope.scaling.yarn_beta_fast": 32.0,
            "rope.scaling.yarn_beta_slow": 1.0,
        }
        assert table.keys(GPT_OSS) == {f"gpt-oss.{key}": value for key, value in want.items()}
        # What config.json leaves out is as in transformers.
        short = {k: v for k, v in GPT_OSS.items() if k not in ("rope_scaling", "rope_theta", "layer_types")}
        assert table.keys(short) == table.keys(GPT_OSS)
        plain = table.keys(GPT_OSS | {"rope_scaling": {"rope_type": "default"}})
        assert not [key for key in plain if "scaling" in key]
        assert table.vocabulary(GPT_OSS) == ("gpt2", "gpt-4o")

    @pytest.mark.parametrize(
        "said",
        [
            {"layer_types": ["full_attention", "sliding_attention"] * 12},
            {"layer_types": ["sliding_attention", "full_attention"] * 11 + ["sliding_attention"] * 2},
            {"layer_types": "full_attention"},
            {"swiglu_limit": 10.0},
            {"swiglu_alpha": 1},
            {"attention_bias": False},
            {"tie_word_embeddings": True},
            {"rope_scaling": {"rope_type": "yarn", "factor": 32.0, "beta_fast": 16.0}},
            {"rope_parameters": {"rope_type": "yarn", "factor": 32.0, "beta_slow": 2.0}},
        ],
    )
    def test_what_llama_cpp_has_built_in(self, said: dict[str, Any]) -> None:
        table = models.find(GPT_OSS, []).gguf
        with pytest.raises(FormatError, match=r"config\.json has \S+ .*; llama\.cpp has .* built in"):
            table.keys(GPT_OSS | said)

    def test_rope_scaling(self) -> None:
        table = models.find(LLAMA, []).gguf
        yarn = {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 1024}
        found = table.keys(LLAMA | {"rope_scaling": yarn})
        assert {k.removeprefix("llama.rope.scaling."): v for k, v in found.items() if "scaling" in k} == {
            "type": "yarn",
            "factor": 4.0,
            "original_context_length": 1024,
        }
        # These are told by a tensor, not by keys.
        assert not [k for k in table.keys(LLAMA | {"rope_scaling": LLAMA3}) if "scaling" in k]
        with pytest.raises(FormatError, match=r"'longrope'; what GGUF can say is linear, yarn"):
            table.keys(LLAMA | {"rope_scaling": {"type": "longrope", "factor": 2}})
        with pytest.raises(FormatError, match=r"'llama3'; what GGUF can say is linear, yarn"):
            models.find({"model_type": "qwen2"}, []).gguf.keys(LLAMA | {"rope_scaling": LLAMA3})

    def test_a_size_that_is_missing_is_named(self) -> None:
        table = models.find(LLAMA, []).gguf
        with pytest.raises(FormatError, match="no intermediate_size, which GGUF stores as feed_forward_length"):
            table.keys({k: v for k, v in LLAMA.items() if k != "intermediate_size"})
        with pytest.raises(FormatError, match="hidden_size 'big', which is not a number"):
            table.keys(LLAMA | {"hidden_size": "big", "head_dim": 128})

    def test_partial_rotation(self) -> None:
        phi = {**LLAMA, "model_type": "phi", "partial_rotary_factor": 0.4, "hidden_size": 2560, "layer_norm_eps": 1e-5}
        found = models.find(phi, []).gguf.keys(phi)
        assert found["phi2.rope.dimension_count"] == 32
        assert "phi2.attention.layer_norm_rms_epsilon" not in found

    def test_frequencies_of_llama_3_1(self) -> None:
        """Against the same formula written wavelength by wavelength."""
        config = LLAMA | {"rope_theta": 500000.0, "rope_scaling": LLAMA3}
        (found,) = models.find(config, []).gguf.tensors(config).values()
        want = []
        for i in range(0, 128, 2):
            wavelength = 2 * np.pi * 500000.0 ** (i / 128)
            if wavelength < 8192 / 4:
                want.append(1.0)
            elif wavelength > 8192:
                want.append(8.0)
            else:
                smooth = (8192 / wavelength - 1) / (4 - 1)
                want.append(1 / ((1 - smooth) / 8 + smooth))
        assert {1.0, 8.0} < set(want)
        np.testing.assert_allclose(found, want, rtol=1e-6)
        assert (found.dtype, found.shape) == (np.float32, (64,))
        assert models.find(LLAMA, []).gguf.tensors(LLAMA) == {}
        with pytest.raises(FormatError, match="without high_freq_factor"):
            models.find(LLAMA, []).gguf.tensors(
                LLAMA | {"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "high_freq_factor"}}
            )

    def test_tokenizers(self) -> None:
        table = models.find(LLAMA, []).gguf
        assert table.vocabulary({"vocab_size": 32000}) == ("llama", "default")
        assert table.vocabulary({"vocab_size": 128256}) == ("gpt2", "llama-bpe")
        assert models.find({"model_type": "bert"}, []).gguf.tokenizer == "bert"

    def test_keys_of_deepseek(self) -> None:
        """V3 as it is published: what is summed, scaled, counted, named by a number, or one for all."""
        found = models.find(DEEPSEEK, []).gguf.keys(DEEPSEEK)
        assert {k.removeprefix("deepseek2."): v for k, v in found.items()} == {
            "vocab_size": 129280,
            "context_length": 163840,
            "embedding_length": 7168,
            "block_count": 61,
            "feed_forward_length": 18432,
            "attention.head_count": 128,
            "attention.head_count_kv": 1,
            "attention.layer_norm_rms_epsilon": 1e-6,
            "attention.q_lora_rank": 1536,
            "attention.kv_lora_rank": 512,
            "attention.key_length": 576,
            "attention.value_length": 512,
            "attention.key_length_mla": 192,
            "attention.value_length_mla": 128,
            "rope.dimension_count": 64,
            "rope.freq_base": 10000.0,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 40.0,
            "rope.scaling.original_context_length": 4096,
            "rope.scaling.yarn_log_multiplier": 0.1,
            "leading_dense_block_count": 3,
            "expert_count": 256,
            "expert_used_count": 8,
            "expert_shared_count": 1,
            "expert_feed_forward_length": 2048,
            "expert_weights_scale": 2.5,
            "expert_weights_norm": True,
            "expert_gating_func": 2,
            "expert_group_count": 8,
            "expert_group_used_count": 4,
        }
        assert found["deepseek2.expert_weights_norm"] is True
        lite = {**DEEPSEEK, "model_type": "deepseek_v2", "architectures": [], "q_lora_rank": None}
        lite |= {"scoring_func": "softmax", "norm_topk_prob": False, "n_group": None, "topk_group": None}
        found = models.find(lite, []).gguf.keys(lite)
        assert (found["deepseek2.attention.q_lora_rank"], found["deepseek2.expert_gating_func"]) == (0, 1)
        assert not [k for k in found if "group" in k or "weights_norm" in k]
        for version, said in (("v2", 1), ("v3", 2)):
            unsaid = {k: v for k, v in lite.items() if k != "scoring_func"} | {"model_type": f"deepseek_{version}"}
            assert models.find(unsaid, []).gguf.keys(unsaid)["deepseek2.expert_gating_func"] == said

    @pytest.mark.parametrize(
        ("own", "words"),
        [
            ({"rope_interleave": False}, "has rope_interleave False; llama.cpp has True built in"),
            ({"hidden_act": "gelu"}, "has hidden_act 'gelu'; llama.cpp has silu built in"),
            ({"attention_bias": True}, "has attention_bias True; llama.cpp has False built in"),
            ({"topk_method": "greedy"}, "has topk_method 'greedy'; llama.cpp has noaux_tc built in"),
            ({"moe_layer_freq": 2}, "has moe_layer_freq 2; llama.cpp has 1 built in"),
            ({"rope_scaling": {"beta_fast": 4.0}}, "has rope_scaling.beta_fast 4.0; llama.cpp has 32 built in"),
            ({"rope_parameters": {"beta_slow": 2}}, "has rope_parameters.beta_slow 2; llama.cpp has 1 built in"),
            (
                {"rope_scaling": {"attention_factor": 2}},
                "has rope_scaling.attention_factor 2; llama.cpp has 1 built in",
            ),
            ({"scoring_func": "tanh"}, "scoring_func 'tanh'; what GGUF can say is softmax, sigmoid"),
            ({"norm_topk_prob": 1}, "norm_topk_prob 1, which is neither true nor false"),
            ({"v_head_dim": None}, "no v_head_dim, which GGUF stores as attention.value_length_mla"),
            (
                {"qk_rope_head_dim": None},
                "no kv_lora_rank or qk_rope_head_dim, which GGUF stores as attention.key_length",
            ),
            ({"rope_scaling": {"type": "linear", "factor": 2}}, "'linear'; what GGUF can say is yarn"),
            (
                {"rope_scaling": {"type": "yarn", "factor": 2}},
                "no rope_parameters.mscale_all_dim or rope_scaling.mscale",
            ),
            (
                {"rope_scaling": {"type": "yarn", "factor": 2, "mscale": 1.0, "mscale_all_dim": 0.707}},
                r"mscale_all_dim 0.707 and rope_parameters.mscale 1.0; llama.cpp has one value for both",
            ),
            (
                {"rope_scaling": {"type": "yarn", "factor": 2, "mscale_all_dim": 1.0}},
                r"mscale_all_dim 1.0 and rope_parameters.mscale None; llama.cpp has one value",
            ),
        ],
    )
    def test_what_llama_cpp_would_compute_otherwise(self, own: dict[str, Any], words: str) -> None:
        config = DEEPSEEK | own
        with pytest.raises(FormatError, match=words):
            models.find(config, []).gguf.keys(config)

    def test_layers_after_the_last_are_left_out(self) -> None:
        table, name = models.find(DEEPSEEK, []).gguf, "model.layers.{}.self_attn.kv_b_proj.weight"
        assert [table.omits(name.format(i), DEEPSEEK) for i in (0, 60, 61, 62)] == [False, False, True, True]
        assert not table.omits("model.norm.weight", DEEPSEEK)
        assert not table.omits(name.format(61))
        assert not table.omits(name.format(61), {"num_hidden_layers": None})
        assert not models.find(LLAMA, []).gguf.omits(name.format(61), LLAMA)
        assert list(table.parts(DEEPSEEK, [name.format(i) for i in (60, 61)])) == [name.format(60)]

    def test_parts(self) -> None:
        table, name = models.find(DEEPSEEK, []).gguf, "model.layers.7.self_attn.kv_b_proj.weight"
        k, v = table.parts(DEEPSEEK, ["model.norm.weight", name])[name]
        assert (k.name, v.name) == (name.replace("kv_b", "k_b"), name.replace("kv_b", "v_b"))
        assert (k.shape((128 * 256, 512)), v.shape((128 * 256, 512))) == ((128, 512, 128), (128, 128, 512))
        lite = DEEPSEEK | {"model_type": "deepseek_v2"}
        assert models.find(lite, []).gguf.parts(lite, [name]) == {name: (k, v)}
        assert models.find(LLAMA, []).gguf.parts(LLAMA, [name]) == {}

    @pytest.mark.interop
    @pytest.mark.parametrize("arch", [a for a, row in architectures().items() if row.gguf and row.gguf != "gguf"])
    def test_the_gguf_package_has_the_same_names(self, arch: str) -> None:
        import gguf as peer

        table = models.find(NAMES[arch].config, []).gguf
        kind = {name: key for key, name in peer.MODEL_ARCH_NAMES.items()}[table.architecture]
        peers = peer.get_tensor_name_map(kind, 4)
        known = {peer.TENSOR_NAMES[t] for t in peer.MODEL_TENSORS[kind]}
        n_compared = 0
        for name, *_ in NAMES[arch].rows:
            found = table.name(name)
            if found is None or table.omits(name, NAMES[arch].config):
                continue
            # The converter takes this parameter for the bias of a module.
            name = name.replace(".gate.e_score_correction_bias", ".e_score_correction.bias")
            template = found.name.rpartition(".")[0].replace("blk.1.", "blk.{bid}.")
            assert template in known, (name, template)
            # The converter joins experts under the name without their number, and drops the prefix of BERT.
            module = name if name.endswith(".sinks") else name.rpartition(".")[0]
            module = module.replace(".experts.5.", ".experts.").removeprefix("bert.")
            assert peers.get_name(module) == found.name.rpartition(".")[0], name
            n_compared += 1
        assert n_compared >= 9

    @pytest.mark.interop
    def test_the_gguf_package_has_the_same_keys(self) -> None:
        from gguf.constants import Keys

        groups = (Keys.LLM, Keys.Attention, Keys.Rope, Keys.Diffusion)
        known = {v.removeprefix("{arch}.") for group in groups for v in vars(group).values() if isinstance(v, str)}
        ours = {key for table in gguf.ggufs().values() for key in (*table._keys, *table._constants)}
        assert {key for key in ours if key not in known and key != "diffusion.shift_logits"} == set()


class TestMixes:
    def schemes(self, name: str, tensor: str, n_layers: int = 32, role: str = "other", **options: Any) -> list[str]:
        return [
            models.mixes[name].scheme(role, f"blk.{i}.{tensor}.weight", i, n_layers, **options) for i in range(n_layers)
        ]

    def test_names_and_schemes(self) -> None:
        assert list(models.mixes) == ["q2_k_s", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m"]
        for name, found in models.mixes.items():
            # A mix must not hide a scheme of its name.
            assert name not in GRIDS
            for text in (found.base, *(step.scheme for step in found._steps)):
                assert Scheme.parse(text).family == ("ggml" if text == "q8_0" else "kquant"), text
            assert found.scheme("head", "output.weight", None, 32) == "q6_k"
            assert found.scheme("embedding", "token_embd.weight", None, 32) == found.base

    def test_more_bits_by_hand(self) -> None:
        """32 layers: the first and last four, and of 4..27 those that leave 2 when 4 is taken away and divided by 3."""
        more = {0, 1, 2, 3, 28, 29, 30, 31} | {6, 9, 12, 15, 18, 21, 24, 27}
        for name, base in (("q4_k_m", "q4_k"), ("q5_k_m", "q5_k")):
            for tensor in ("attn_v", "ffn_down", "ffn_down_exps"):
                assert self.schemes(name, tensor) == ["q6_k" if i in more else base for i in range(32)]
            assert set(self.schemes(name, "attn_k") + self.schemes(name, "ffn_up")) == {base}

    def test_first_layers(self) -> None:
        assert self.schemes("q4_k_s", "attn_v") == ["q5_k"] * 4 + ["q4_k"] * 28
        assert self.schemes("q4_k_s", "ffn_down") == ["q5_k"] * 4 + ["q4_k"] * 28
        assert self.schemes("q4_k_s", "ffn_down", 40) == ["q5_k"] * 5 + ["q4_k"] * 35
        assert self.schemes("q3_k_m", "attn_v") == ["q5_k"] * 2 + ["q4_k"] * 30
        assert self.schemes("q3_k_m", "ffn_down") == ["q5_k"] * 2 + ["q4_k"] * 30
        assert self.schemes("q3_k_m", "ffn_down", 8) == ["q4_k"] * 8
        assert set(self.schemes("q3_k_m", "attn_output")) == {"q4_k"}
        assert set(self.schemes("q3_k_l", "attn_output") + self.schemes("q3_k_l", "ffn_down")) == {"q5_k"}
        assert set(self.schemes("q3_k_s", "ffn_down")) == {"q3_k"}

    def test_sizes_of_the_model(self) -> None:
        assert set(self.schemes("q4_k_m", "attn_v", experts=8) + self.schemes("q3_k_s", "attn_k", experts=8)) == {
            "q8_0"
        }
        assert set(self.schemes("q4_k_m", "attn_output", experts=8)) == {"q5_k"}
        assert set(self.schemes("q4_k_m", "attn_v", experts=60)) == {"q4_k", "q6_k"}
        assert set(self.schemes("q4_k_m", "attn_v", 80, gqa=8)) == {"q5_k", "q6_k"}
        assert set(self.schemes("q4_k_m", "attn_v", 80, gqa=1)) == {"q4_k", "q6_k"}
        assert set(self.schemes("q2_k_s", "attn_v", gqa=4)) == {"q4_k"}
        assert set(self.schemes("q2_k_s", "attn_v", gqa=2)) == {"q2_k"}

    def test_a_tensor_without_a_name_or_a_layer(self) -> None:
        assert models.mixes["q4_k_m"].scheme("attention", None, 0, 32) == "q4_k"
        assert models.mixes["q4_k_m"].scheme("attention", "attn_v.weight", None, 32) == "q4_k"


class TestTables:
    """An error in a table is found when it is read, and named."""

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (
                lambda d: d["architectures"]["llama"].update(role="decoder"),
                "llama: .*unexpected keyword argument 'role'",
            ),
            (lambda d: d["architectures"]["llama"].update(roles=["decodr"]), "llama: roles: there is no 'decodr'"),
            (
                lambda d: d["architectures"]["llama"].update(fused=["qk"]),
                "llama: fused: there is no 'qk'; there are qkv",
            ),
            (lambda d: d["roles"]["decoder"].update(attn="a"), "role 'attn' is none of attention"),
            (lambda d: d["roles"]["decoder"].update(mlp="("), r"roles.decoder.mlp: '\(' is not a regular expression"),
        ],
    )
    def test_architectures(self, change: Any, words: str) -> None:
        data = tables.read("architectures.toml")
        tables.parse_architectures(copy.deepcopy(data))
        change(data)
        with pytest.raises(ValueError, match=words):
            tables.parse_architectures(data)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda d: d["rules"][3].update(quantise=True), "rule 4: .*'quantise'"),
            (lambda d: d["rules"][3].update(ndim="two"), "rule 4: ndim 'two' is not like 2, 0-1 or 3-"),
            (lambda d: d["rules"][3].pop("reason"), "rule 4: .*'reason'"),
            (lambda d: d.update(fused=["qvk"]), "fused: there is no 'qvk'"),
        ],
    )
    def test_generic_rules(self, change: Any, words: str) -> None:
        data, fused = tables.read("generic.toml"), tables.fused_rows(tables.read("architectures.toml"))
        tables.parse_generic(copy.deepcopy(data), fused)
        change(data)
        with pytest.raises(ValueError, match=words):
            tables.parse_generic(data, fused)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda d: d["architectures"]["llama"].update(norm_plus_one=True), "llama: .*'norm_plus_one'"),
            (lambda d: d["architectures"]["phi"].update(without=["nothing"]), "phi: without: there is no 'nothing'"),
            (lambda d: d["keys"]["bert"]["block_count"].update(kind="int"), "keys.bert.block_count: .*'kind'"),
            (lambda d: d["keys"]["bert"]["block_count"].update(type="u32"), "type 'u32' is none of int, float, text"),
            (lambda d: d["architectures"]["deepseek_v2"].update(parts=["kv"]), "deepseek_v2: parts: there is no 'kv'"),
            (lambda d: d["architectures"]["deepseek_v2"].update(misread=[{"key": 1}]), "deepseek_v2: misread: .*'key'"),
        ],
    )
    def test_gguf(self, change: Any, words: str) -> None:
        data = tables.read("gguf.toml")
        gguf.parse_ggufs(copy.deepcopy(data))
        change(data)
        with pytest.raises(ValueError, match=words):
            gguf.parse_ggufs(data)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda d: d["last"][0].update(layer="more"), "last: rule 1: .*'layer'"),
            (lambda d: d["last"][0].update(layers="most"), "last: rule 1: layers 'most' is none of more, eighth"),
            (lambda d: d["last"][0].update(tensors="value"), "last: rule 1: there is no 'value'"),
            (lambda d: d["first"][0].update(role="heads"), "first: rule 1: role 'heads' is none of"),
            (lambda d: d["mixes"]["q4_k_m"].pop("base"), "q4_k_m: .*'base'"),
        ],
    )
    def test_mixes(self, change: Any, words: str) -> None:
        data = tables.read("mixes.toml")
        mix.parse_mixes(copy.deepcopy(data))
        change(data)
        with pytest.raises(ValueError, match=words):
            mix.parse_mixes(data)


def test_names_of_one_architecture_are_not_taken_for_another() -> None:
    names = [row[0] for row in (*DECODER, *DENSE)]
    assert models.find(None, names).name == ""
