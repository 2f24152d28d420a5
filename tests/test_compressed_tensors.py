"""compressed-tensors output: its bytes by hand, its config, and what the real loader makes of it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from arrowquant_gpu import reference
from arrowquant_gpu.dtypes import DTYPES
from arrowquant_gpu.errors import SourceError
from arrowquant_gpu.formats import Codes, Entry, TensorInfo, stored_model
from arrowquant_gpu.formats import pieces as formats_pieces
from arrowquant_gpu.formats.checkpoint import open_checkpoint
from arrowquant_gpu.formats.compressed_tensors import CompressedTensorsCheckpoint
from arrowquant_gpu.formats.compressed_tensors_sink import CompressedTensorsSink
from arrowquant_gpu.formats.ignored_modules import ignore_list
from arrowquant_gpu.formats.model_card import model_card
from arrowquant_gpu.formats.output import Output
from arrowquant_gpu.pipeline import quantize_checkpoint
from arrowquant_gpu.schemes import Scheme
from arrowquant_gpu.tensor import QuantizedTensor

from .bitwise import assert_bitwise_equal
from .fixtures import llama_shapes, tiny_llama, write_safetensors
from .model_files import load, model, quantize, torch_tensor

RNG = np.random.default_rng(20261121)


def codes_by_hand(words: np.ndarray, bits: int, length: int) -> np.ndarray:
    """Unsigned codes of rows of int32 words, element by element as the format's text says."""
    rows = words.astype(np.int64) & 0xFFFFFFFF
    out = np.empty((len(rows), length), np.uint8)
    for k in range(length):
        out[:, k] = (rows[:, k * bits // 32] >> (k * bits % 32)) & ((1 << bits) - 1)
    return out


# Bytes.


def test_two_rows_by_hand(tmp_path: Path) -> None:
    # Scale 1: the largest magnitude is 7.5, and every other weight is its own code.
    row = np.array([-7.5, -7, -3, -1, 0, 1, 3, 7], np.float32)
    weights = np.stack([row, -row[::-1]])
    out = load(quantize(model(tmp_path / "m", {"a.weight": weights}), tmp_path / "out", "int4_channel"))
    assert sorted(out) == ["a.weight_packed", "a.weight_scale", "a.weight_shape"]
    # Stored codes are 0 1 5 7 8 9 b f and 1 5 7 8 9 b f f, the first in the lowest bits.
    assert [f"{w & 0xFFFFFFFF:08x}" for w in out["a.weight_packed"][:, 0].tolist()] == ["fb987510", "ffb98751"]
    assert out["a.weight_packed"].dtype == np.int32
    assert out["a.weight_scale"].tolist() == [[1.0], [1.0]]
    assert out["a.weight_shape"].tolist() == [2, 8]
    assert out["a.weight_shape"].dtype == np.int64


PARTS = [
    *(("int2_channel", shape) for shape in [(5, 96), (40, 100), (1, 7), (3, 8)]),
    *(("int4_channel_asym", shape) for shape in [(40, 100), (16, 32), (1, 7)]),
    *((f"int{bits}_g4{asym}", shape) for bits in (2, 4, 8) for asym in ("", "_asym") for shape in [(40, 100), (3, 8)]),
    ("int2_g4_asym", (65, 4)),
]


@pytest.mark.parametrize(("scheme", "shape"), PARTS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_part_against_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, dtype: str, shape: tuple[int, int]
) -> None:
    # Blocks of 3 rows or so: words of zero points are shared between blocks.
    monkeypatch.setattr(formats_pieces, "PIECE_BYTES", 3 * shape[1] * DTYPES[dtype].bits // 8)
    weights = RNG.standard_normal(shape, np.float32).astype(DTYPES[dtype].numpy)
    source = model(tmp_path / "m", {"a.weight": weights})
    out = load(quantize(source, tmp_path / "out", scheme))
    parsed = dataclasses.replace(Scheme.parse(scheme), scale_dtype=dtype)
    packed, scales, zeros, _ = reference.quantize(weights, parsed)
    assert_bitwise_equal(
        codes_by_hand(out["a.weight_packed"], parsed.bits, shape[1]), reference.unpack(packed, parsed.bits, shape[1])
    )
    assert_bitwise_equal(out["a.weight_scale"], scales)
    if zeros is None:
        assert "a.weight_zero_point" not in out
    else:
        words = np.ascontiguousarray(out["a.weight_zero_point"].T)
        assert_bitwise_equal(codes_by_hand(words, parsed.bits, shape[0]), np.ascontiguousarray(zeros.T))
    # Unused high bits of the last word of a row are zero.
    used = shape[1] * parsed.bits % 32
    if used:
        assert not (out["a.weight_packed"][:, -1].astype(np.int64) & 0xFFFFFFFF & -(1 << used)).any()

    # Three rows a block, so that blocks of zero points begin within a word.
    monkeypatch.setattr(stored_model, "_BLOCK_BYTES", 3 * out["a.weight_packed"].nbytes // shape[0])
    (entry,) = CompressedTensorsCheckpoint(tmp_path / "out").entries.values()
    assert (entry.info.name, entry.info.dtype, entry.info.shape) == ("a.weight", dtype, shape)
    assert entry.scheme == parsed
    blocks = list(CompressedTensorsCheckpoint(tmp_path / "out").blocks("a.weight"))
    assert len(blocks) == -(-shape[0] // 3)
    for row, block in blocks:
        assert isinstance(block, QuantizedTensor)
        rows = slice(row, row + len(block.packed))
        assert_bitwise_equal(np.ascontiguousarray(block.packed), packed[rows])
        assert_bitwise_equal(block.scales, scales[rows])
        if zeros is not None:
            assert_bitwise_equal(block.zeros, zeros[rows])


@pytest.mark.parametrize("scheme", ["int4_g32_asym", "int4_g32", "int8_g40", "int2_channel_asym"])
@pytest.mark.parametrize("piece_bytes", [1, 1000, 3000, 1 << 20])
def test_pieces_in_any_order_make_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, piece_bytes: int
) -> None:
    """Rows of 440 weights are no whole words of 4-bit codes: their padding belongs to a piece, too."""
    weights = RNG.standard_normal((37, 640 if "g32" in scheme else 440), np.float32)
    source = open_checkpoint(model(tmp_path / "m", {"a.weight": weights}))
    parsed = Scheme.parse(scheme)
    files = []
    for name, size in (("one", 1 << 24), ("many", piece_bytes)):
        monkeypatch.setattr(formats_pieces, "PIECE_BYTES", size)
        output = Output(tmp_path / name, is_directory=True)
        sink = CompressedTensorsSink(output, source.config)
        entry = Entry(source.tensors["a.weight"], parsed, "")
        output.begin()
        sink.open([entry], source, {})
        filled: dict[str, list[tuple[int, int]]] = {}
        for i in RNG.permutation(len(found := sink.pieces(entry))):
            p = found[i]
            part = weights[p.row : p.row + p.rows, p.column : p.column + p.columns]
            codes = Codes(*reference.quantize(np.ascontiguousarray(part), parsed)[:3])
            for place, array in zip(sink.places(p), sink.stored(p, codes), strict=True):
                assert place.n_bytes == array.nbytes
                output.write(place.file, place.offset, np.ascontiguousarray(array))
                filled.setdefault(place.file, []).append((place.offset, place.offset + place.n_bytes))
        sink.commit()
        files.append((tmp_path / name / "model.safetensors").read_bytes())
        for spans in filled.values():
            assert all(a[1] <= b[0] for a, b in itertools.pairwise(sorted(spans))), "places overlap"
        stored = 16 + sum(stop - start for spans in filled.values() for start, stop in spans)
        assert stored == sink.n_bytes(entry)
    assert files[0] == files[1]


def test_the_safetensors_library_reads_it(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source", shards=3, hidden=128)
    target = quantize(source, tmp_path / "out", "int4_g64_asym")
    index = json.loads((target / "model.safetensors.index.json").read_text())
    found, total = {}, 0
    for i in (1, 2, 3):
        with safe_open(target / f"model-0000{i}-of-00003.safetensors", "np") as f:
            assert f.metadata()["format"] == "pt"
            assert f.metadata()["arrowquant.scheme"] == "int4_g64_asym_bf16"
            for name in f.keys():  # noqa: SIM118 - not a dict
                found[name] = f"model-0000{i}-of-00003.safetensors"
    total = sum(t.nbytes for t in load(target).values())
    assert index == {"metadata": {"total_size": total}, "weight_map": found}


def test_what_is_kept_is_kept_bit_for_bit(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source", shards=2, hidden=128)
    before, after = load(source), load(quantize(source, tmp_path / "out", "int4_g64"))
    kept = [n for n in before if "_proj" not in n]
    assert len(kept) == 7
    for name in kept:
        assert_bitwise_equal(after[name], before[name], name)
    reader = CompressedTensorsCheckpoint(tmp_path / "out")
    assert set(reader.entries) == set(before)
    for name in kept:
        blocks = [b for _, b in reader.blocks(name)]
        assert_bitwise_equal(np.concatenate(blocks).reshape(before[name].shape), before[name], name)
    original = json.loads((source / "config.json").read_text())
    assert (reader.config, reader.metadata) == (original, {"format": "pt"})
    assert reader.provenance["scheme"] == "int4_g64_bf16"
    assert {p.name for p in reader.side_files} >= {"tokenizer.json", "generation_config.json", "README.md"}


# config.json and what lies beside.


@pytest.mark.parametrize(
    ("scheme", "weights"),
    [
        ("int4_g64", {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 64}),
        ("int8_channel_asym", {"num_bits": 8, "symmetric": False, "strategy": "channel", "group_size": None}),
    ],
)
def test_config(tmp_path: Path, scheme: str, weights: dict[str, Any]) -> None:
    source = tiny_llama(tmp_path / "source", hidden=128)
    config = json.loads((quantize(source, tmp_path / "out", scheme) / "config.json").read_text())
    assert config.pop("quantization_config") == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": "pack-quantized",
                "input_activations": None,
                "output_activations": None,
                "weights": {"type": "int", "dynamic": False, **weights},
            }
        },
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }
    assert config.pop("arrowquant") == {
        "tool": "arrowquant_gpu",
        "version": "0.1.0",
        "scheme": f"{scheme}_bf16",
        "source": "source",
        "source_hash": open_checkpoint(source).fingerprint(),
    }
    assert config == json.loads((source / "config.json").read_text())


def entries(shapes: dict[str, tuple[int, ...]], quantized: str) -> list[Entry]:
    scheme = Scheme.parse("int4_g32_bf16")
    infos = [TensorInfo(name, "bfloat16", shape, Path("m"), 0, 0) for name, shape in shapes.items()]
    return [Entry(i, scheme if quantized in i.name else None, "") for i in infos]


TIED = "re:(?:.*\\.)?(?:lm_head|predictions|embed_out|vocab_projector|lm_loss|generator_lm_head)(?:\\..*)?$"
BERT = {
    "embeddings.word_embeddings.weight": (100, 32),
    "embeddings.position_embeddings.weight": (50, 32),
    "embeddings.token_type_embeddings.weight": (2, 32),
    "embeddings.LayerNorm.weight": (32,),
    "encoder.layer.0.attention.self.query.weight": (32, 32),
    "pooler.dense.weight": (32, 32),
    "pooler.dense.bias": (32,),
}


@pytest.mark.parametrize(
    ("shapes", "config", "expected"),
    [
        (llama_shapes(1, 64, 96, 4, 2, 100), {"architectures": ["LlamaForCausalLM"]}, ["lm_head"]),
        (llama_shapes(1, 64, 96, 4, 2, 100, tied=True), {"architectures": ["LlamaForCausalLM"]}, [TIED]),
        (BERT, {"architectures": ["BertModel"]}, ["pooler.dense"]),
        (BERT, {"architectures": ["BertForMaskedLM"]}, ["pooler.dense", TIED]),
        (
            {
                "m.layers.0.self_attn.q_proj.weight": (64, 64),
                "m.layers.0.mlp.gate.weight": (8, 64),
                "m.layers.0.mlp.experts.gate_up_proj": (8, 64, 64),
                "m.layers.0.mlp.experts.down_proj": (8, 64, 64),
                "lm_head.weight": (100, 64),
            },
            {"architectures": ["Qwen3MoeForCausalLM"]},
            ["m.layers.0.mlp.gate", "m.layers.0.mlp.experts", "lm_head"],
        ),
    ],
)
def test_ignore_list(shapes: dict[str, tuple[int, ...]], config: dict[str, Any], expected: list[str]) -> None:
    marker = "query" if shapes is BERT else "_proj.weight"
    assert ignore_list(entries(shapes, marker), config) == expected


def test_a_linear_that_is_kept_for_its_rows_is_ignored(tmp_path: Path) -> None:
    tensors = {"a.weight": np.ones((4, 64), np.float32), "b.weight": np.ones((4, 40), np.float32)}
    target = quantize(model(tmp_path / "m", tensors), tmp_path / "out", "int4_g32")
    assert json.loads((target / "config.json").read_text())["quantization_config"]["ignore"] == ["b"]


def test_side_files_are_copied_and_left_outs_are_said(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source", hidden=128)
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text("{}")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    (source / ".git").mkdir()
    target = tmp_path / "out"
    result = quantize_checkpoint(source, target, "int4_g64", device="reference")
    for name in ("tokenizer.json", "special_tokens_map.json", "generation_config.json", "1_Pooling/config.json"):
        assert (target / name).read_bytes() == (source / name).read_bytes()
    assert not (target / "pytorch_model.bin").exists()
    (warning,) = result.plan.warnings
    assert "2 files or folders" in warning
    assert "pytorch_model.bin (weights in another format)" in warning
    assert ".git (version control)" in warning


CARDS = [
    b"",
    b"# Title\n",
    b"---\nlicense: mit\ntags:\n- a\n- b\n---\n\n# Title\n\n---\nnot front matter\n",
    b"---\r\nlicense: mit\r\n---\r\n# Title\r\n",
    b"---\n---\n# Empty\n",
    b"---\nno end of front matter\n",
    b"---\n{license: mit}\n---\n# Flow\n",
    b"\xef\xbb\xbf---\nlicense: mit\n---\n# Mark\n",
    b"---\nmodel-index:\n- name: x\n  results: []\n---\n",
    b"# Latin \xe9\n",
]


@pytest.mark.parametrize("card", CARDS)
def test_model_cards_keep_every_line(card: bytes) -> None:
    out = model_card(card, {"scheme": "int4_g128", "source": 'a "b"'}, "A note.")
    lines = out.splitlines()
    assert b"A note." in lines
    rest = iter(lines)
    assert all(line in rest for line in card.splitlines()), "the lines of the card, in order"
    again = model_card(out, {"scheme": "int8_g32", "source": "c"}, "Another note.")
    assert again.count(b"arrowquant:") == out.count(b"arrowquant:") <= 1
    assert b"A note." not in again
    assert model_card(again, {"scheme": "int4_g128", "source": 'a "b"'}, "A note.") == out


@pytest.mark.interop
def test_front_matter_is_valid_yaml() -> None:
    import yaml

    for card in CARDS:
        out = model_card(card, {"scheme": "int4_g128", "source": 'a: "b"'}, "A note.").decode("utf-8", "replace")
        parts = out.lstrip("\ufeff").split("---", 2)
        front = yaml.safe_load(parts[1])
        assert front.get("license", "mit") == "mit"
        if b"{" not in card:
            assert front["arrowquant"] == {"scheme": "int4_g128", "source": 'a: "b"'}


# Reading what is not right.


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    tensors = {"a.weight": RNG.standard_normal((4, 64), np.float32), "norm.weight": np.ones(64, np.float32)}
    return quantize(model(tmp_path / "m", tensors), tmp_path / "out", "int4_g32_asym")


def rewrite(folder: Path, change: Any) -> None:
    """Load the output, change its tensors and its config, and write them again."""
    tensors = dict(load(folder))
    config = json.loads((folder / "config.json").read_text())
    change(tensors, config, config["quantization_config"]["config_groups"]["group_0"])
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config))


def _drop(name: str) -> Any:
    return lambda t, c, g: t.pop(name)


def _put(name: str, value: np.ndarray) -> Any:
    return lambda t, c, g: t.update({name: value})


def _weights(**values: Any) -> Any:
    return lambda t, c, g: g["weights"].update(values)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_drop("a.weight_scale"), "a.weight_scale is none"),
        (_drop("a.weight_shape"), "a.weight_shape is missing"),
        (_drop("a.weight_zero_point"), "a.weight_zero_point is missing; int4_g32_asym .* has int32 .1, 2."),
        (_put("a.weight_shape", np.array([4, 128])), "a.weight_packed is int32 .4, 8."),
        (_put("a.weight_shape", np.array([-4, 64])), "a.weight_shape is .-4, 64."),
        (_put("a.weight_g_idx", np.zeros(64, np.int32)), "activation order"),
        (_put("a.weight_scale", np.ones((4, 2), np.int8)), "a.weight_scale is int8"),
        (_weights(num_bits=4.0), "4.0-bit codes"),
        (_weights(num_bits=3), "3-bit codes, whose layout depends on what wrote them"),
        (_weights(num_bits=8), "a.weight_packed is int32 .4, 8.; int8_g32_asym .4, 64. has int32 .4, 16."),
        (_weights(strategy="tensor"), "strategy 'tensor'"),
        (_weights(group_size=-3), "group size -3"),
        (_weights(group_size="many"), "a.weight"),
        (_weights(actorder="group"), "activation order"),
        (_weights(type="float"), "type 'float' in the format pack-quantized"),
        (lambda t, c, g: g.update(format="int-quantized"), "zero points in the format int-quantized"),
        (lambda t, c, g: g.update(format="marlin-24"), "format 'marlin-24'; pack-quantized, .* are what can be read"),
        (lambda t, c, g: g.update(targets=["re:b$"]), "no group of quantization_config has it as a target"),
        (lambda t, c, g: g.update(targets=["re:(("]), "no regular expression"),
        (lambda t, c, g: g.update(targets=3), "no targets"),
        (lambda t, c, g: c["quantization_config"].update(config_groups=[1]), "no group"),
        (lambda t, c, g: c["quantization_config"].update(quant_method="gptq"), "quant_method 'gptq'"),
        (lambda t, c, g: c.pop("quantization_config"), "this is no quantized model"),
    ],
)
def test_a_broken_checkpoint_is_a_clear_error(quantized: Path, change: Any, words: str) -> None:
    rewrite(quantized, lambda t, c, g: None)
    assert CompressedTensorsCheckpoint(quantized).entries["a.weight"].scheme == Scheme.parse("int4_g32_asym")
    rewrite(quantized, change)
    with pytest.raises(SourceError, match=words):
        CompressedTensorsCheckpoint(quantized)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("config.json", "{", "config.json cannot be read"),
        ("config.json", "[]", "config.json is no JSON object"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../m/model.safetensors"}}', "not in this directory"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors.* is missing"),
        ("model.safetensors.index.json", "{}", "no weight_map"),
    ],
)
def test_broken_json_is_a_clear_error(quantized: Path, name: str, text: str, words: str) -> None:
    (quantized / name).write_text(text)
    with pytest.raises(SourceError, match=words):
        CompressedTensorsCheckpoint(quantized)


def test_a_mixed_checkpoint_of_another_writer(tmp_path: Path) -> None:
    """Two groups: one by module names, one by class; the names go first whatever the order."""
    tensors = {f"{n}.weight": RNG.standard_normal((8, 64), np.float32) for n in ("layers.0.q", "layers.1.q")}
    source = model(tmp_path / "m", tensors)
    wide, narrow = (load(quantize(source, tmp_path / s, s)) for s in ("int8_channel", "int4_g32"))
    mixed = {n: t for n, t in wide.items() if n.startswith("layers.0")}
    mixed |= {n: t for n, t in narrow.items() if n.startswith("layers.1")}
    config = json.loads((tmp_path / "int4_g32" / "config.json").read_text())
    other = json.loads((tmp_path / "int8_channel" / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    groups["group_1"] = other["quantization_config"]["config_groups"]["group_0"] | {"targets": ["re:layers\\.0\\."]}
    (tmp_path / "int4_g32" / "config.json").write_text(json.dumps(config))
    write_safetensors(tmp_path / "int4_g32" / "model.safetensors", mixed)
    schemes = {
        n: e.scheme.id for n, e in CompressedTensorsCheckpoint(tmp_path / "int4_g32").entries.items() if e.scheme
    }
    assert schemes == {"layers.0.q.weight": "int8_channel", "layers.1.q.weight": "int4_g32"}


# The real loaders.


def decoded(source: Path, scheme: str, dtype: str) -> dict[str, np.ndarray]:
    """What the quantized weights of a tiny Llama stand for, by the reference alone."""
    parsed = dataclasses.replace(Scheme.parse(scheme), scale_dtype=dtype)
    out = {}
    for name, x in load(source).items():
        if "_proj" in name:
            packed, scales, zeros, _ = reference.quantize(x, parsed)
            out[name] = reference.dequantize(packed, scales, zeros, parsed, x.shape[1], dtype)
    return out


INTEROP = [
    ("int4_g128", "bfloat16"),
    ("int4_g128", "float32"),
    ("int4_g32_asym", "bfloat16"),
    ("int8_channel", "float16"),
    ("int8_g64_asym", "float32"),
    ("int2_g32", "float32"),
]


@pytest.mark.interop
@pytest.mark.parametrize(("scheme", "dtype"), INTEROP)
def test_the_compressor_decodes_the_same_bits(tmp_path: Path, scheme: str, dtype: str) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file

    source = tiny_llama(tmp_path / "source", dtype, shards=2, hidden=256, intermediate=384, layers=1)
    target = quantize(source, tmp_path / "out", scheme)
    config = json.loads((target / "config.json").read_text())["quantization_config"]
    group = QuantizationConfig.model_validate(config).config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    stored = {k: v for f in sorted(target.glob("*.safetensors")) for k, v in load_file(f).items()}
    expected = decoded(source, scheme, dtype)
    assert len(expected) == 7
    for name, want in expected.items():
        parts = {k.removeprefix(name[:-6]): v for k, v in stored.items() if k.startswith(f"{name}_")}
        got = compressor.decompress(parts, group)["weight"]
        assert got.dtype == torch_tensor(want).dtype
        assert got.equal(torch_tensor(want)), name


@pytest.mark.interop
@pytest.mark.parametrize(
    ("scheme", "dtype", "mode"),
    [
        *((scheme, dtype, "dequantize") for scheme, dtype in INTEROP[:5]),
        # In its default mode transformers cannot load packed zero points since compressed-tensors 0.18.
        *((scheme, dtype, "default") for scheme, dtype in INTEROP[:5] if "asym" not in scheme),
    ],
)
def test_transformers_gives_the_logits_of_the_decoded_weights(
    tmp_path: Path, scheme: str, dtype: str, mode: str
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    source = tiny_llama(tmp_path / "source", dtype, shards=2, hidden=256, intermediate=384)
    target = quantize(source, tmp_path / "out", scheme)
    extra = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if mode == "dequantize" else {}
    torch_dtype = getattr(torch, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch_dtype)
        found, info = AutoModelForCausalLM.from_pretrained(target, dtype=torch_dtype, output_loading_info=True, **extra)
        state = plain.state_dict()
        for name, weights in decoded(source, scheme, dtype).items():
            state[name].copy_(torch_tensor(weights))
        ids = torch.tensor([[1, 5, 77, 140, 23, 8, 9, 100, 2, 17]])
        with torch.no_grad():
            want, got = plain.eval()(ids).logits, found.eval()(ids).logits
    assert not any(info.values()), info
    assert got.equal(want)


def _families() -> dict[str, Any]:
    import transformers as t

    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    decoder = {**small, "vocab_size": 300, "num_key_value_heads": 2}
    return {
        "tied": lambda: t.LlamaForCausalLM(t.LlamaConfig(**decoder, tie_word_embeddings=True)),
        "masked": lambda: t.BertForMaskedLM(t.BertConfig(**small, vocab_size=300)),
        "classifier": lambda: t.BertForSequenceClassification(t.BertConfig(**small, vocab_size=300)),
        "experts": lambda: t.MixtralForCausalLM(t.MixtralConfig(**decoder, num_local_experts=4)),
        "stacked experts": lambda: t.GptOssForCausalLM(t.GptOssConfig(**decoder, head_dim=16, num_local_experts=4)),
    }


@pytest.mark.interop
@pytest.mark.parametrize("family", ["tied", "masked", "classifier", "experts", "stacked experts"])
def test_the_ignore_list_is_right_for(tmp_path: Path, family: str) -> None:
    """Every tensor finds its place: one wrong name in the ignore list is a missing or an unexpected one."""
    import torch

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = _families()[family]().eval()
        made.save_pretrained(tmp_path / "source")
        target = quantize(tmp_path / "source", tmp_path / "out", "int8_g32")
        found, info = type(made).from_pretrained(target, dtype=torch.float32, output_loading_info=True)
        ids = torch.tensor([[1, 2, 3, 4, 5]])
        with torch.no_grad():
            want, got = made(ids).logits, found.eval()(ids).logits
    assert not any(info.values()), info
    assert float((want - got).abs().max()) < 0.02 * float(want.abs().max())
