"""GGUF output: tensors, keys and rows by hand, what is refused and said; and what the reader makes of it."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arrowquant_gpu import dequantize_checkpoint, models, reference, verify_checkpoint
from arrowquant_gpu.dtypes import DTYPES
from arrowquant_gpu.engine.hashes import piece_digest, tensor_hash
from arrowquant_gpu.engine.journal import verify
from arrowquant_gpu.errors import FormatError, SourceError
from arrowquant_gpu.formats import Codes, Entry, TensorInfo, stored_model
from arrowquant_gpu.formats import gguf as sink_module
from arrowquant_gpu.formats import pieces as formats_pieces
from arrowquant_gpu.formats.checkpoint import open_checkpoint
from arrowquant_gpu.formats.gguf import GgufSink
from arrowquant_gpu.formats.gguf_checkpoint import GgufCheckpoint
from arrowquant_gpu.formats.gguf_file import TYPES, read_header
from arrowquant_gpu.formats.output import Output
from arrowquant_gpu.formats.quantized import open_quantized
from arrowquant_gpu.ops import dequantize
from arrowquant_gpu.pipeline import quantize_checkpoint
from arrowquant_gpu.schemes import Scheme
from arrowquant_gpu.tensor import QuantizedTensor

from . import gguf_by_hand, tiny_models
from .bitwise import assert_bitwise_equal
from .fixtures import random_weights, write_safetensors
from .gguf_by_hand import Tensor

RNG = np.random.default_rng(20261123)
F32, F16, Q4_0, Q8_0, BF16 = 0, 1, 2, 8, 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    for name, make in tiny_models.MODELS.items():
        make(folder / name, "bfloat16")
    return folder


def model(folder: Path, tensors: dict[str, np.ndarray], config: dict[str, Any] | None = None) -> Path:
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt", "kept": "yes"})
    return folder


def quantize(source: Path, file: Path, scheme: str = "q8_0", **options: Any) -> Path:
    quantize_checkpoint(source, file, scheme, format="gguf", device="reference", **options)
    return file


def load(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return gguf_by_hand.read(file.read_bytes())


def weights(source: Path) -> dict[str, np.ndarray]:
    checkpoint = open_checkpoint(source)
    return {name: np.array(checkpoint.view(name)) for name in checkpoint.tensors}


def packed(w: np.ndarray, scheme: str) -> np.ndarray:
    return reference.quantize(np.ascontiguousarray(w), Scheme.parse(scheme))[0]


def pairs(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows in the order of llama.cpp, one by one: those that rotate together are neighbours."""
    half = len(w) // heads // 2
    order = [h * 2 * half + part * half + i for h in range(heads) for i in range(half) for part in (0, 1)]
    return w[order]


# Tensors.


def test_a_llama(folder: Path, tmp_path: Path) -> None:
    keys, tensors = load(quantize(folder / "llama", tmp_path / "a.gguf"))
    w = weights(folder / "llama")
    assert len(tensors) == len(w)
    names = {"attn_output": "self_attn.o_proj", "attn_v": "self_attn.v_proj", "ffn_gate": "mlp.gate_proj"}
    names |= {"ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "attn_q": "self_attn.q_proj"}
    for i in range(tiny_models.LAYERS):
        for name, origin in {**names, "attn_k": "self_attn.k_proj"}.items():
            x = w[f"model.layers.{i}.{origin}.weight"]
            heads = {"attn_q": tiny_models.HEADS, "attn_k": tiny_models.KV_HEADS}.get(name)
            x = pairs(x, heads) if heads else x
            got = tensors[f"blk.{i}.{name}.weight"]
            assert (got.kind, got.shape) == (Q8_0, x.shape)
            assert_bitwise_equal(got.rows, packed(x, "q8_0"), name)
        for name, origin in (("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm")):
            got = tensors[f"blk.{i}.{name}.weight"]
            want = w[f"model.layers.{i}.{origin}.weight"].astype(np.float32)
            assert (got.kind, got.shape, got.data) == (F32, want.shape, want.tobytes())
    for name, origin in (("token_embd", "model.embed_tokens"), ("output", "lm_head")):
        assert_bitwise_equal(tensors[f"{name}.weight"].rows, packed(w[f"{origin}.weight"], "q8_0"))
    assert keys["llama.attention.head_count_kv"] == tiny_models.KV_HEADS
    assert {k: keys[f"general.{k}"] for k in ("architecture", "file_type", "quantization_version")} == {
        "architecture": "llama",
        "file_type": 7,
        "quantization_version": 2,
    }


def test_tied_heads_are_left_out_and_biases_are_f32(folder: Path, tmp_path: Path) -> None:
    tensors = weights(folder / "qwen2")
    config = json.loads((folder / "qwen2" / "config.json").read_text())
    source = model(tmp_path / "m", tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, config)
    options = {"format_options": {"tokenizer": "none"}}
    plan = quantize_checkpoint(source, tmp_path / "a.gguf", "q8_0", format="gguf", dry_run=True, **options)
    said = "1 tensors are not in the file (first: lm_head.weight: tied to model.embed_tokens.weight"
    assert any(warning.startswith(said) for warning in plan.warnings)
    keys, found = load(quantize(source, tmp_path / "a.gguf", **options))
    assert "output.weight" not in found
    assert len(found) == len(tensors)
    assert keys["tokenizer.ggml.model"] == "none"
    want = tensors["model.layers.1.self_attn.q_proj.bias"].astype(np.float32)
    assert found["blk.1.attn_q.bias"] == Tensor(F32, want.shape, want.tobytes())
    # Rows of this family stay where they are.
    assert_bitwise_equal(
        found["blk.1.attn_k.weight"].rows, packed(tensors["model.layers.1.self_attn.k_proj.weight"], "q8_0")
    )


def test_experts_are_stacked_in_their_order(folder: Path, tmp_path: Path) -> None:
    keys, tensors = load(quantize(folder / "mixtral", tmp_path / "a.gguf", "q4_0"))
    w = weights(folder / "mixtral")
    for name, origin in (("gate", "w1"), ("down", "w2"), ("up", "w3")):
        got = tensors[f"blk.1.ffn_{name}_exps.weight"]
        parts = [w[f"model.layers.1.block_sparse_moe.experts.{i}.{origin}.weight"] for i in range(tiny_models.EXPERTS)]
        assert (got.kind, got.shape) == (Q4_0, (len(parts), *parts[0].shape))
        assert_bitwise_equal(got.rows, np.concatenate([packed(x, "q4_0") for x in parts]))
    router = w["model.layers.0.block_sparse_moe.gate.weight"].astype(np.float32)
    assert tensors["blk.0.ffn_gate_inp.weight"] == Tensor(F32, router.shape, router.tobytes())
    assert keys["llama.expert_count"] == tiny_models.EXPERTS


LLAMA = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50, "max_position_embeddings": 32}
LLAMA |= {"rms_norm_eps": 1e-5}
Q = "model.layers.0.self_attn.q_proj"
NO_TOKENIZER = {"format_options": {"tokenizer": "none"}}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64", "float8_e4m3fn"])
@pytest.mark.parametrize("piece_bytes", [1 << 24, 3000])
def test_kept_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, piece_bytes: int) -> None:
    """Matrices have the type that they had, where readers compute with it; vectors are F32; rows change places."""
    monkeypatch.setattr(formats_pieces, "PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(sink_module, "PIECE_BYTES", piece_bytes)
    shapes = {f"{Q}.weight": (64, 64), f"{Q}.bias": (64,), "model.norm.weight": (64,)}
    shapes |= {"model.layers.0.self_attn.v_proj.weight": (32, 64), "model.embed_tokens.weight": (50, 64)}
    shapes["model.layers.0.self_attn.k_proj.weight"] = (32, 64)
    tensors = {n: RNG.standard_normal(s).astype(DTYPES[dtype].numpy) for n, s in shapes.items()}
    source = model(tmp_path / "m", tensors, LLAMA)
    file = quantize(source, tmp_path / "a.gguf", ignore=["_proj"], **NO_TOKENIZER)
    _, found = load(file)
    kinds = {"float32": F32, "float16": F16, "bfloat16": BF16, "float64": F32, "float8_e4m3fn": F16}
    types = {F32: np.float32, F16: np.float16, BF16: ml_dtypes.bfloat16}
    for name, origin, heads in (
        ("attn_q", Q, 4),
        ("attn_k", Q.replace("q_", "k_"), 2),
        ("attn_v", Q.replace("q_", "v_"), 0),
    ):
        x, got = tensors[f"{origin}.weight"], found[f"blk.0.{name}.weight"]
        x = (pairs(x, heads) if heads else x).astype(types[kinds[dtype]])
        assert (got.kind, got.shape, got.data) == (kinds[dtype], x.shape, x.tobytes())
    bias = pairs(tensors[f"{Q}.bias"], 4).astype(np.float32)
    assert found["blk.0.attn_q.bias"] == Tensor(F32, (64,), bias.tobytes())
    back = GgufCheckpoint(file)
    assert {n: (e.info.dtype, e.info.shape) for n, e in back.entries.items()} == {
        n: (dtype, t.shape) for n, t in tensors.items()
    }
    for name in tensors.keys() - {"model.embed_tokens.weight"}:
        got = np.concatenate([b.reshape(-1) for _, b in back.blocks(name)])
        want = tensors[name].reshape(-1)
        assert_bitwise_equal(got, want.astype(np.float32).astype(want.dtype), name)


def test_norms_of_gemma_are_one_larger(tmp_path: Path) -> None:
    norm = RNG.standard_normal(64).astype(ml_dtypes.bfloat16)
    tensors = {"model.norm.weight": norm, "model.embed_tokens.weight": np.ones((50, 64), np.float32)}
    config = {**LLAMA, "model_type": "gemma", "head_dim": 16}
    file = quantize(model(tmp_path / "m", tensors, config), tmp_path / "a.gguf", **NO_TOKENIZER)
    assert load(file)[1]["output_norm.weight"].data == (norm.astype(np.float32) + 1).tobytes()
    ((_, got),) = GgufCheckpoint(file).blocks("model.norm.weight")
    assert_bitwise_equal(got.reshape(-1), (norm.astype(np.float32) + 1 - 1).astype(ml_dtypes.bfloat16))


def test_frequencies_of_llama3_are_a_tensor(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = {**LLAMA, "rope_scaling": {**scaling, "original_max_position_embeddings": 16}}
    source = model(tmp_path / "m", {"model.embed_tokens.weight": np.ones((50, 64), np.float32)}, config)
    _, tensors = load(quantize(source, tmp_path / "a.gguf", **NO_TOKENIZER))
    want = models.find(config, []).gguf.tensors(config)["rope_freqs.weight"]
    assert tensors["rope_freqs.weight"] == Tensor(F32, (8,), want.tobytes())


# As llama-quantize has them.
INSTEAD = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}


@pytest.mark.parametrize("length", [384, 320, 100])
@pytest.mark.parametrize("scheme", [*INSTEAD, "q4_0", "mxfp4", "nvfp4"])
def test_rows_that_are_not_whole_blocks(tmp_path: Path, scheme: str, length: int) -> None:
    config = {**LLAMA, "hidden_size": length}
    tensors = {"model.layers.0.mlp.up_proj.weight": RNG.standard_normal((8, length), np.float32)}
    tensors["model.layers.0.mlp.down_proj.weight"] = RNG.standard_normal((4, 512), np.float32)
    source = model(tmp_path / "m", tensors, config)
    block = TYPES[scheme.upper()].block
    stored = {256: INSTEAD.get(scheme, ""), 64: "f16", 32: "f16"}[block] if length % block else scheme
    stored = "f16" if stored and length % TYPES[stored.upper()].block else stored
    plan = quantize_checkpoint(source, tmp_path / "a.gguf", scheme, format="gguf", dry_run=True, **NO_TOKENIZER)
    found = load(quantize(source, tmp_path / "a.gguf", scheme, **NO_TOKENIZER))[1]
    assert found["blk.0.ffn_up.weight"].kind == TYPES[stored.upper()].id
    assert found["blk.0.ffn_down.weight"].kind == TYPES[scheme.upper()].id
    said = [w for w in plan.warnings if "not whole blocks" in w]
    assert bool(said) == (stored != scheme)
    if said:
        assert re.match(rf"1 tensors are {stored} instead of (?:ggml_)?{scheme}: rows of {length} weights", said[0])


def test_pieces_in_any_order_make_the_same_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_checkpoint(folder / "mixtral")
    scheme, files = Scheme.parse("q4_0"), []
    for name, size in (("one", 1 << 24), ("many", 20_000)):
        monkeypatch.setattr(formats_pieces, "PIECE_BYTES", size)
        monkeypatch.setattr(sink_module, "PIECE_BYTES", size)
        output = Output(tmp_path / name, is_directory=False)
        sink = GgufSink(output, source.config, names=tuple(source.tensors))
        entries = []
        for info in source.tensors.values():
            wants = len(info.shape) > 1 and not info.name.endswith((".gate.weight", "0.self_attn.q_proj.weight"))
            entries.append(Entry(info, sink.scheme_for(info, scheme) if wants else None, ""))
        output.begin()
        sink.open(entries, source, {})
        filled: list[tuple[int, int]] = []
        for entry in entries:
            found = sink.pieces(entry)
            assert sum(p.n_bytes for p in found) == entry.info.n_bytes
            x = np.array(source.view(entry.info.name))
            digests = [b""] * len(found)
            for i in RNG.permutation(len(found)):
                p = found[i]
                if entry.scheme is None:
                    codes: Any = x.reshape(-1).view(np.uint8)[p.column : p.column + p.columns]
                else:
                    codes = Codes(*reference.quantize(x[p.row : p.row + p.rows], entry.scheme)[:3])
                arrays = sink.stored(p, codes)
                digests[i] = piece_digest(arrays)
                for place, array in zip(sink.places(p), arrays, strict=True):
                    assert place.n_bytes == array.nbytes
                    output.write(place.file, place.offset, array)
                    filled.append((place.offset, place.offset + place.n_bytes))
            assert verify(output, sink, entry, tensor_hash(digests))
            if name == "many" and entry.info.n_bytes > 40_000:
                assert len(found) > 1
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(sorted(filled))), "places overlap"
        assert sum(b - a for a, b in filled) == sum(map(sink.n_bytes, entries))
        sink.commit()
        files.append((tmp_path / name).read_bytes())
    assert files[0] == files[1]
    assert load(tmp_path / "one")[1].keys() == load(quantize(folder / "mixtral", tmp_path / "whole"))[1].keys()


def test_a_row_that_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats_pieces, "PIECE_BYTES", 4096)
    x = RNG.standard_normal((3, 4096), np.float32)
    source = model(tmp_path / "m", {"model.layers.0.mlp.up_proj.weight": x}, LLAMA)
    _, found = load(quantize(source, tmp_path / "a.gguf", "q4_0", **NO_TOKENIZER))
    assert_bitwise_equal(found["blk.0.ffn_up.weight"].rows, packed(x, "q4_0"))


# What is said of the file.


@pytest.mark.parametrize("mix", list(models.mixes))
@pytest.mark.parametrize("name", ["llama", "qwen2", "mixtral"])
def test_the_file_type_is_that_of_the_mix(folder: Path, tmp_path: Path, name: str, mix: str) -> None:
    plan = quantize_checkpoint(folder / name, tmp_path / "a.gguf", mix, format="gguf", dry_run=True)
    source = open_checkpoint(folder / name)
    sink = GgufSink(Output(tmp_path / "b", is_directory=False), source.config, names=tuple(source.tensors))
    for entry in plan.entries:
        if entry.scheme is not None:
            sink.scheme_for(entry.info, entry.scheme)
    assert sink._file_type(plan.entries) == models.mixes[mix].file_type


def test_what_the_file_was_made_from(folder: Path, tmp_path: Path) -> None:
    source = open_checkpoint(folder / "llama")
    keys, _ = load(quantize(folder / "llama", tmp_path / "a.gguf", "q4_0"))
    assert keys["arrowquant.source_hash"] == source.fingerprint()
    assert json.loads(keys["arrowquant.config"]) == source.config
    back = open_quantized(tmp_path / "a.gguf")
    assert isinstance(back, GgufCheckpoint)
    assert (back.config, back.metadata, back.provenance["scheme"]) == (source.config, source.metadata, "q4_0")
    assert {n: (e.info.dtype, e.info.shape) for n, e in back.entries.items()} == {
        n: (t.dtype, t.shape) for n, t in source.tensors.items()
    }


def test_the_files_that_are_in_it_are_not_said_to_be_missing(folder: Path, tmp_path: Path) -> None:
    plan = quantize_checkpoint(folder / "llama", tmp_path / "a.gguf", "q8_0", format="gguf", dry_run=True)
    assert plan.warnings == (
        "gguf is one file: 1 files of the model directory are not in it (generation_config.json).",
    )


def test_the_default_is_a_mix(folder: Path, tmp_path: Path) -> None:
    quantize_checkpoint(folder / "llama", tmp_path / "a.gguf", format="gguf", device="reference")
    keys, tensors = load(tmp_path / "a.gguf")
    assert keys["general.file_type"] == models.mixes["q4_k_m"].file_type
    assert {t.kind for t in tensors.values()} == {F32, TYPES["Q4_K"].id, TYPES["Q6_K"].id}


def test_pooling_of_a_model_of_sentences(tmp_path: Path) -> None:
    shapes = {"embeddings.word_embeddings.weight": (50, 64), "embeddings.position_embeddings.weight": (32, 64)}
    shapes |= {"embeddings.token_type_embeddings.weight": (2, 64), "pooler.dense.weight": (64, 64)}
    config = {**LLAMA, "model_type": "bert", "layer_norm_eps": 1e-12}
    source = model(tmp_path / "m", random_weights(shapes, "float32", 1), config)
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    keys, tensors = load(quantize(source, tmp_path / "a.gguf", **NO_TOKENIZER))
    assert keys["bert.pooling_type"] == 1
    assert {n: t.kind for n, t in tensors.items()} == {
        "token_embd.weight": Q8_0,
        "position_embd.weight": F32,
        "token_types.weight": F32,
    }
    assert GgufCheckpoint(tmp_path / "a.gguf").omitted == ("pooler.dense.weight",)


# Diffusion models.

FLUX = {"img_in.weight": (64, 64), "double_blocks.0.img_attn.qkv.weight": (192, 64)}
FLUX |= {"single_blocks.0.linear1.weight": (64, 64), "final_layer.linear.weight": (64, 64)}
WAN = {"patch_embedding.weight": (64, 16, 1, 2, 2), "blocks.0.cross_attn.q.weight": (64, 64)}
WAN |= {"time_projection.1.weight": (64, 64), "blocks.0.modulation": (1, 6, 64)}


@pytest.mark.parametrize(("arch", "shapes"), [("flux", FLUX), ("wan", WAN)])
def test_diffusion_models_keep_their_names(tmp_path: Path, arch: str, shapes: dict[str, tuple[int, ...]]) -> None:
    source = write_safetensors(tmp_path / "m.safetensors", random_weights(shapes, "bfloat16", 2))
    keys, tensors = load(quantize(source, tmp_path / "a.gguf"))
    assert keys["general.architecture"] == arch
    assert tensors.keys() == shapes.keys()
    kept = {"img_in.weight", "final_layer.linear.weight", "patch_embedding.weight", "blocks.0.modulation"}
    assert {n for n, t in tensors.items() if t.kind == BF16} == kept & shapes.keys()
    back = GgufCheckpoint(tmp_path / "a.gguf")
    assert {n: e.info.shape for n, e in back.entries.items()} == shapes
    if arch == "wan":
        name = "patch_embedding.weight"
        assert tensors[name].shape == (64, 16, 1, 4)
        assert keys[f"comfy.gguf.orig_shape.{name}"] == [64, 16, 1, 2, 2]
        ((_, got),) = back.blocks(name)
        assert_bitwise_equal(got.reshape(shapes[name]), weights(source)[name])


def test_names_of_diffusers_are_said_to_be_unread(tmp_path: Path) -> None:
    shapes = {"x_embedder.weight": (64, 64), "transformer_blocks.0.attn.to_q.weight": (64, 64)}
    shapes |= {"single_transformer_blocks.0.attn.to_q.weight": (64, 64)}
    source = write_safetensors(tmp_path / "m.safetensors", random_weights(shapes, "float16", 2))
    plan = quantize_checkpoint(source, tmp_path / "a.gguf", "q8_0", format="gguf", dry_run=True)
    assert "ComfyUI-GGUF reads the names of the model's authors, not those of diffusers." in plan.warnings


# What is refused.

UP = "model.layers.0.mlp.up_proj.weight"
EXPERT = "model.layers.0.block_sparse_moe.experts.{}.w1.weight"
MIXTRAL = {**LLAMA, "model_type": "mixtral", "num_local_experts": 2, "num_experts_per_tok": 1}


@pytest.mark.parametrize(
    ("config", "tensors", "options", "words"),
    [
        ({"model_type": "mamba"}, {UP: (8, 64)}, {}, "architecture mamba has no names.*llama, mistral.*flux"),
        (None, {UP: (8, 64)}, {}, "architecture of this checkpoint"),
        ({"model_type": "llama"}, {UP: (8, 64)}, {}, "config.json has no vocab_size"),
        (LLAMA, {UP: (8, 64), "model.extra.weight": (8, 64)}, {}, "model.extra.weight: llama has no such tensor"),
        (LLAMA, {UP: (8, 64)}, {"scheme": "int4_g32"}, "has the types of ggml, not int4_g32; use f16"),
        (LLAMA, {UP: (8, 64)}, {"scheme": "mxfp4_ceil"}, "has the types of ggml, not mxfp4_ceil"),
        (LLAMA, {UP: (8, 64)}, {"max_shard_size": 1000}, "one file, without shards"),
        (LLAMA, {f"{Q}.weight": (60, 64)}, {}, "60 rows are not pairs of rows of 4 heads"),
        (MIXTRAL, {EXPERT.format(i): (8, 64) for i in (0, 2)}, {}, "ffn_gate_exps.weight: of 2 experts some are"),
        (MIXTRAL, {EXPERT.format(i): (8, 64 + 64 * i) for i in (0, 1)}, {}, "holds all experts and has one type"),
        (
            MIXTRAL,
            {EXPERT.format(i): (8, 64) for i in (0, 1)},
            {"ignore": ["experts.1"]},
            r"experts.1.w1.weight is F32 \[8, 64\] and .*experts.0.w1.weight Q8_0",
        ),
        (
            {**LLAMA, "model_type": "bert", "layer_norm_eps": 1e-12},
            {"embeddings.word_embeddings.weight": (8, 64), "bert.embeddings.word_embeddings.weight": (8, 64)},
            {},
            "are both token_embd.weight",
        ),
    ],
)
def test_what_cannot_be_written(
    tmp_path: Path, config: dict[str, Any] | None, tensors: dict[str, Any], options: dict[str, Any], words: str
) -> None:
    source = model(tmp_path / "m", random_weights(tensors, "float32", 3), config)
    options = {"scheme": "q8_0", **options}
    with pytest.raises(FormatError, match=words):
        quantize(source, tmp_path / "a.gguf", **options, **NO_TOKENIZER)
    assert not (tmp_path / "a.gguf").exists()


def test_names_that_are_too_long(tmp_path: Path) -> None:
    name = f"double_blocks.0.{'x' * 120}.weight"
    shapes = {name: (64, 64), "single_blocks.0.linear1.weight": (64, 64), "img_in.weight": (64, 64)}
    source = write_safetensors(tmp_path / "m.safetensors", random_weights(shapes, "float16", 2))
    with pytest.raises(FormatError, match="over 127 bytes"):
        quantize(source, tmp_path / "a.gguf")


def test_types_that_ggml_does_not_have(tmp_path: Path) -> None:
    tensors = random_weights(FLUX, "float16", 2) | {"steps": np.arange(3, dtype=np.uint32)}
    source = write_safetensors(tmp_path / "m.safetensors", tensors)
    with pytest.raises(FormatError, match="steps: uint32, which ggml has no type for"):
        quantize(source, tmp_path / "a.gguf")


# Reading.


def decoded(checkpoint: GgufCheckpoint, name: str) -> np.ndarray:
    parts = [
        dequantize(b, "float32", device="reference") if isinstance(b, QuantizedTensor) else b
        for _, b in checkpoint.blocks(name)
    ]
    return np.concatenate(parts).reshape(checkpoint.entries[name].info.shape)


@pytest.mark.parametrize("name", list(tiny_models.MODELS))
def test_the_reader_gives_the_model_back(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    file = quantize(folder / name, tmp_path / "a.gguf", "q5_1")
    monkeypatch.setattr(stored_model, "_BLOCK_BYTES", 5000)
    back, w = GgufCheckpoint(file), weights(folder / name)
    assert back.entries.keys() == w.keys()
    for tensor, entry in back.entries.items():
        got, want = decoded(back, tensor), w[tensor]
        if entry.scheme is None:
            assert_bitwise_equal(got, want, tensor)
        else:
            scheme = Scheme.parse("q5_1")
            again = reference.quantize(want, scheme)[:3]
            assert_bitwise_equal(got, reference.dequantize(*again, scheme, want.shape[1]), tensor)
    assert len(list(back.blocks("model.layers.0.self_attn.q_proj.weight"))) > 1


def test_dequantize(folder: Path, tmp_path: Path) -> None:
    file = quantize(folder / "llama", tmp_path / "a.gguf", "q8_0")
    dequantize_checkpoint(file, tmp_path / "back.safetensors", device="reference")
    got, want = weights(tmp_path / "back.safetensors"), weights(folder / "llama")
    assert {n: (x.dtype, x.shape) for n, x in got.items()} == {n: (x.dtype, x.shape) for n, x in want.items()}
    for name, x in want.items():
        error = np.abs(got[name].astype(np.float32) - x.astype(np.float32)).max()
        assert error < np.abs(x.astype(np.float32)).max() / 100, name


def test_verify(folder: Path, tmp_path: Path) -> None:
    """Tied heads are no missing tensors, and nothing else that is omitted passes for one."""
    tensors = weights(folder / "qwen2")
    config = json.loads((folder / "qwen2" / "config.json").read_text())
    source = model(tmp_path / "m", tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}, config)
    file = quantize(source, tmp_path / "a.gguf", "q5_0", **NO_TOKENIZER)
    report = verify_checkpoint(file, source, device="reference")
    report.check()
    assert [f.name for f in report.findings if f.action == "omitted"] == ["lm_head.weight"]
    wrong = file.read_bytes().replace(b'"lm_head.weight": null', b'"xx_head.weight": null')
    (tmp_path / "b.gguf").write_bytes(wrong)
    with pytest.raises(SourceError, match=r"'xx_head\.weight' has no place for it, and it is needed"):
        verify_checkpoint(tmp_path / "b.gguf", source, device="reference")
    data = bytearray(file.read_bytes())
    data[read_header(file).tensors["blk.0.attn_q.weight"].offset + 10] ^= 0x40
    (tmp_path / "b.gguf").write_bytes(data)
    assert verify_checkpoint(tmp_path / "b.gguf", source, device="reference").failed == (
        "model.layers.0.self_attn.q_proj.weight",
    )


def other(tensors: dict[str, Tensor], keys: Any = ()) -> bytes:
    return gguf_by_hand.write([("general.architecture", 8, "llama"), *keys], tensors)


def test_files_of_others(tmp_path: Path) -> None:
    x = RNG.standard_normal((4, 64), np.float32)
    tensors = {
        "output.weight": Tensor(Q4_0, (2, 2, 64), packed(x, "q4_0").tobytes()),
        "norm": Tensor(F32, (64,), x[0].tobytes()),
        "half": Tensor(F16, (4, 64), x.astype(np.float16).tobytes()),
        "conv": Tensor(F16, (16, 16), x.astype(np.float16).tobytes()),
    }
    file = tmp_path / "a.gguf"
    file.write_bytes(other(tensors, [("comfy.gguf.orig_shape.conv", 9, (5, [4, 2, 2, 4, 4]))]))
    found = GgufCheckpoint(file)
    assert (found.config, found.metadata, found.provenance, found.omitted) == (None, {}, {}, ())
    assert {n: (e.info.dtype, e.info.shape, e.scheme and e.scheme.id) for n, e in found.entries.items()} == {
        "output.weight": ("float32", (2, 2, 64), "q4_0"),
        "norm": ("float32", (64,), None),
        "half": ("float16", (4, 64), None),
        "conv": ("float16", (4, 2, 2, 4, 4), None),
    }
    scheme = Scheme.parse("q4_0")
    want = reference.dequantize(*reference.quantize(x, scheme)[:3], scheme, 64)
    assert_bitwise_equal(decoded(found, "output.weight").reshape(4, 64), want)
    assert_bitwise_equal(decoded(found, "half"), x.astype(np.float16))


@pytest.mark.parametrize("scale", ["a.scale", "a.weight.scale"])
def test_global_scales_of_others_are_refused(tmp_path: Path, scale: str) -> None:
    file = tmp_path / "a.gguf"
    tensors = {"a.weight": Tensor(40, (1, 64), bytes(36)), scale: Tensor(F32, (1,), bytes(4))}
    file.write_bytes(other(tensors))
    with pytest.raises(SourceError, match=f"a.weight has a global scale, {scale}, which cannot be read"):
        GgufCheckpoint(file)


RECORD = {"name": "blk.0.attn_q.weight", "heads": 4, "dtype": "bfloat16", "quantized": True}
STACK = {"name": "stack", "expert": 1, "dtype": "float32", "quantized": True}


@pytest.mark.parametrize(
    "record",
    [
        "[]",
        "{",
        '"text"',
        {"a": None},
        {"a": []},
        {"a": {}},
        {"a": {**RECORD, "name": "none"}},
        {"a": {**RECORD, "heads": 3}},
        {"a": {**RECORD, "heads": -1}},
        {"a": {**RECORD, "heads": "4"}},
        {"a": {**RECORD, "expert": 0, "heads": 64}},
        {"a": {**RECORD, "dtype": "float33"}},
        {"a": {**RECORD, "quantized": False}},
        {"a": {**RECORD, "name": "norm"}},
        {"a": {**RECORD, "shape": [64, 63]}},
        {"a": {**RECORD, "shape": [-64, -64]}},
        {"a": {**RECORD, "shape": "ab"}},
        {"a": {**RECORD, "add": "x"}},
        {"a": {**STACK, "expert": 2}},
        {"a": {**STACK, "expert": -1}},
        {"a": {**STACK, "expert": "0"}},
        {"a": {"name": "norm", "dtype": "int8"}},
        {"a": {"name": "norm", "dtype": ["float32"]}},
    ],
)
def test_a_damaged_record_is_refused(tmp_path: Path, record: Any) -> None:
    file = tmp_path / "a.gguf"
    text = record if isinstance(record, str) else json.dumps(record)
    file.write_bytes(other(OWN, [("arrowquant.tensors", 8, text)]))
    with pytest.raises(SourceError, match=r"arrowquant\.tensors|the record of 'a'"):
        GgufCheckpoint(file)


OWN = {
    "blk.0.attn_q.weight": Tensor(Q8_0, (64, 64), RNG.bytes(64 * 68)),
    "norm": Tensor(F32, (64,), bytes(256)),
    "stack": Tensor(Q4_0, (2, 4, 32), RNG.bytes(8 * 18)),
}


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from([*OWN, "x"]),
    fields=st.dictionaries(
        st.sampled_from(["expert", "heads", "add", "dtype", "quantized", "shape"]),
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(-5, 70),
            st.sampled_from(["float32", "bfloat16", "int8", "float6_e2m3fn"]),
            st.lists(st.integers(-1, 64), max_size=3),
        ),
    ),
)
def test_any_record_is_read_or_refused(tmp_path: Path, name: str, fields: dict[str, Any]) -> None:
    file = tmp_path / "a.gguf"
    file.write_bytes(other(OWN, [("arrowquant.tensors", 8, json.dumps({"a": {"name": name, **fields}}))]))
    try:
        found = GgufCheckpoint(file)
    except SourceError:
        return
    with np.errstate(all="ignore"):
        n = sum(
            b.packed.size // b.scheme.row_bytes(32) * 32 if isinstance(b, QuantizedTensor) else b.size
            for _, b in found.blocks("a")
        )
    assert n == np.prod(found.entries["a"].info.shape)


def test_an_info_without_a_home_is_an_error(folder: Path, tmp_path: Path) -> None:
    """A tensor that is left out is not quantized, whoever asks."""
    source = open_checkpoint(folder / "llama")
    names = (*source.tensors, "model.layers.0.self_attn.rotary_emb.inv_freq")
    sink = GgufSink(Output(tmp_path / "a", is_directory=False), source.config, names=names)
    info = TensorInfo(names[-1], "float32", (8, 32), Path("m"), 0, 1024)
    with pytest.raises(FormatError, match="has no such tensor in GGUF files"):
        sink.scheme_for(info, Scheme.parse("q8_0"))
    assert sink.n_bytes(Entry(info, None, "")) == 0
