"""A GGUF file made into another one: what is taken over as it is, what is quantized, and what is refused."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from arrowquant_gpu import dequantize_checkpoint, models, reference
from arrowquant_gpu.errors import FormatError, SourceError
from arrowquant_gpu.formats.gguf_checkpoint import GgufCheckpoint
from arrowquant_gpu.formats.gguf_file import layout, read_header
from arrowquant_gpu.pipeline import quantize_checkpoint
from arrowquant_gpu.schemes import Scheme

from . import gguf_by_hand, tiny_models
from .bitwise import assert_bitwise_equal
from .fixtures import write_safetensors
from .gguf_by_hand import Tensor

RNG = np.random.default_rng(20261124)
F32, F16, Q4_0, Q8_0, BF16 = 0, 1, 2, 8, 30
AGAIN: dict[str, Any] = {"format": "gguf", "device": "reference", "allow_requantize": True}
TOKENS = ["<s>", "a", "\u2581b", "é", ""]
KEYS = [
    ("general.architecture", 8, "mamba9"),
    ("general.name", 8, "A model"),
    ("general.file_type", 4, 1),
    ("mamba9.block_count", 4, 1),
    ("mamba9.attention.head_count", 4, 4),
    ("u8", 0, 200),
    ("i8", 1, -3),
    ("u16", 2, 40000),
    ("i16", 3, -4),
    ("i32", 5, -5),
    ("f32", 6, 1e-5),
    ("yes", 7, True),
    ("no", 7, False),
    ("u64", 10, 7),
    ("i64", 11, -(1 << 40)),
    ("f64", 12, 1e-300),
    ("arrays.strings", 9, (8, TOKENS)),
    ("arrays.bools", 9, (7, [True, False])),
    ("arrays.i32", 9, (5, [1, -1])),
    ("arrays.f32", 9, (6, [0.5, -1e6])),
    ("arrays.u64", 9, (10, [1 << 60])),
    ("arrays.none", 9, (8, [])),
    ("tokenizer.ggml.model", 8, "gpt2"),
    ("tokenizer.ggml.pre", 8, "qwen2"),
    ("tokenizer.ggml.tokens", 9, (8, TOKENS)),
]


def floats(kind: int, *shape: int) -> Tensor:
    dtype = {F32: np.float32, F16: np.float16, BF16: ml_dtypes.bfloat16}[kind]
    return Tensor(kind, shape, RNG.standard_normal(shape).astype(dtype).tobytes())


QUANTIZED = {
    "token_embd.weight": floats(F16, 5, 64),
    "output.weight": floats(F32, 5, 64),
    "blk.0.attn_q.weight": floats(F16, 64, 64),
    "blk.0.attn_k.weight": floats(BF16, 32, 64),
    "blk.0.ffn_up_exps.weight": floats(F16, 4, 96, 64),
    "blk.0.ffn_down_shexp.weight": floats(F16, 64, 96),
    "blk.0.ssm_in.weight": floats(F16, 64, 64),
}
KEPT = {
    "output_norm.weight": floats(F32, 64),
    "rope_freqs.weight": floats(F32, 8),
    "position_embd.weight": floats(F32, 10, 64),
    "token_types.weight": floats(F32, 2, 64),
    "blk.0.attn_q.bias": floats(F32, 64),
    "blk.0.attn_q_norm.weight": floats(F32, 4, 64),
    "blk.0.ffn_gate_inp.weight": floats(F32, 4, 64),
    "blk.0.ssm_conv1d.weight": floats(F32, 64, 32),
    "blk.0.altup_proj.weight": floats(F16, 3, 32, 32),
    "blk.0.ssm_a": floats(F32, 64, 32),
    "blk.0.ids": Tensor(27, (3,), np.arange(3).tobytes()),
}


def foreign(file: Path, tensors: dict[str, Tensor], keys: Any = KEYS, alignment: int = 32) -> Path:
    file.write_bytes(gguf_by_hand.write(keys, tensors, alignment=alignment))
    return file


def again(source: Path, scheme: str = "q4_0", name: str = "again", **options: Any) -> Path:
    target = source.parent / f"{name}.gguf"
    quantize_checkpoint(source, target, scheme, **AGAIN, **options)
    return target


def values(tensor: Tensor) -> np.ndarray:
    dtype = {F32: np.float32, F16: np.float16, BF16: ml_dtypes.bfloat16}[tensor.kind]
    return np.frombuffer(tensor.data, dtype).reshape(-1, tensor.shape[-1])


def packed(x: np.ndarray, scheme: str) -> np.ndarray:
    return reference.quantize(np.ascontiguousarray(x), Scheme.parse(scheme))[0]


def stored(file: Path) -> dict[str, bytes]:
    """Types and bytes of all keys but those of the record, in their order."""
    return {k: v.raw for k, v in read_header(file).stored.items() if not k.startswith("arrowquant.")}


def stripped(source: Path, target: Path) -> Path:
    """The file as another program would have written it: without the record of what it was made from."""
    header = read_header(source)
    keys = {k: v for k, v in header.stored.items() if not k.startswith("arrowquant.")}
    head, places, size = layout(keys, [(t.name, t.type, t.shape) for t in header.tensors.values()])
    raw, data = source.read_bytes(), bytearray(head + bytes(size - len(head)))
    for name, t in header.tensors.items():
        data[slice(*places[name])] = raw[t.offset : t.offset + t.n_bytes]
    target.write_bytes(data)
    return target


# Files of other programs.


def test_keys_are_taken_over_as_they_are(tmp_path: Path) -> None:
    """Every type of value, in the order of the file; of two the content is new."""
    raw = again(foreign(tmp_path / "a.gguf", QUANTIZED)).read_bytes()
    at = 24
    for name, kind, value in KEYS:
        own = 2 if name == "general.file_type" else value
        want = gguf_by_hand.string(name) + struct.pack("<I", kind) + gguf_by_hand.value(kind, own)
        assert raw[at : at + len(want)] == want, name
        at += len(want)
    keys, _ = gguf_by_hand.read(raw)
    assert set(keys) - {name for name, _, _ in KEYS} == {"general.quantization_version"} | {
        f"arrowquant.{k}"
        for k in ("tool", "version", "scheme", "source", "source_hash", "metadata", "config", "tensors")
    }


def test_tensors_keep_names_order_and_shapes(tmp_path: Path) -> None:
    source = foreign(tmp_path / "a.gguf", QUANTIZED | KEPT)
    plan = quantize_checkpoint(source, tmp_path / "b.gguf", "q4_0", dry_run=True, **AGAIN)
    assert plan.warnings == ()
    _, tensors = gguf_by_hand.read(again(source).read_bytes())
    assert list(tensors) == [*QUANTIZED, *KEPT]
    for name, tensor in QUANTIZED.items():
        assert (tensors[name].kind, tensors[name].shape) == (Q4_0, tensor.shape), name
        assert_bitwise_equal(tensors[name].rows, packed(values(tensor), "q4_0"), name)
    for name, tensor in KEPT.items():
        assert tensors[name] == tensor, name


def test_another_alignment_stays(tmp_path: Path) -> None:
    source = foreign(tmp_path / "a.gguf", QUANTIZED | KEPT, [*KEYS, ("general.alignment", 4, 256)], 256)
    target = again(source)
    found, raw = read_header(target), target.read_bytes()
    assert (found.alignment, found.keys["general.alignment"]) == (256, 256)
    assert all(t.offset % 256 == 0 for t in found.tensors.values())
    t = found.tensors["output_norm.weight"]
    assert raw[t.offset : t.offset + t.n_bytes] == KEPT["output_norm.weight"].data


def test_blocks_are_decoded_with_a_warning(tmp_path: Path) -> None:
    x = RNG.standard_normal((64, 64), np.float32)
    up = Tensor(Q8_0, (64, 64), packed(x, "q8_0").tobytes())
    source = foreign(tmp_path / "a.gguf", QUANTIZED | {"blk.0.ffn_up.weight": up})
    plan = quantize_checkpoint(source, tmp_path / "b.gguf", "q4_0", dry_run=True, **AGAIN)
    assert [w.partition(":")[0] for w in plan.warnings] == ["a.gguf is quantized already (gguf"]
    assert "(gguf: q8_0)" in plan.warnings[0]
    scheme = Scheme.parse("q8_0")
    back = reference.dequantize(*reference.quantize(x, scheme)[:3], scheme, 64)
    _, tensors = gguf_by_hand.read(again(source).read_bytes())
    assert_bitwise_equal(tensors["blk.0.ffn_up.weight"].rows, packed(back, "q4_0"))


def test_what_was_made_of_one_is_made_into_another(tmp_path: Path) -> None:
    """The second file has a record, and still no config; the third has no other record than its own."""
    source = foreign(tmp_path / "a.gguf", QUANTIZED | KEPT, [*KEYS, ("arrowquant.note", 8, "of another time")])
    first = again(source, "q8_0", "first")
    second = again(first, "q4_0", "second")
    assert stored(second) == stored(again(source, "q4_0", "straight"))
    assert "arrowquant.note" not in read_header(second).keys
    found = read_header(second).tensors
    assert {n: t.type.name for n, t in found.items() if n in QUANTIZED} == dict.fromkeys(QUANTIZED, "Q4_0")
    assert GgufCheckpoint(second).entries.keys() == (QUANTIZED | KEPT).keys()


@pytest.mark.parametrize(
    ("mix", "sizes", "want"),
    [
        ("q2_k_s", [("head_count", 4, 8), ("head_count_kv", 4, 2)], {"attn_v": "Q4_K", "attn_k": "Q2_K"}),
        ("q2_k_s", [("head_count", 4, 8), ("head_count_kv", 4, 4)], {"attn_v": "Q2_K", "attn_k": "Q2_K"}),
        ("q2_k_s", [("head_count", 9, (4, [8, 8])), ("head_count_kv", 9, (5, [2, 8]))], {"attn_v": "Q4_K"}),
        ("q4_k_m", [("expert_count", 4, 8)], {"attn_v": "Q8_0", "attn_k": "Q8_0", "attn_output": "Q5_K"}),
        ("q4_k_m", [], {"attn_v": "Q6_K", "attn_k": "Q4_K", "attn_output": "Q4_K"}),
    ],
)
def test_mixes_know_the_sizes_from_the_keys(tmp_path: Path, mix: str, sizes: Any, want: dict[str, str]) -> None:
    own = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_down")
    names = ["token_embd", "output_norm", *(f"blk.0.{n}" for n in own)]
    tensors = {f"{name}.weight": floats(F16, 4, 256) for name in names}
    keys = [("general.architecture", 8, "new")]
    keys += [(f"new.{'' if n == 'expert_count' else 'attention.'}{n}", kind, v) for n, kind, v in sizes]
    target = again(foreign(tmp_path / "a.gguf", tensors, keys), mix)
    found = read_header(target)
    assert {n: found.tensors[f"blk.0.{n}.weight"].type.name for n in want} == want
    assert found.keys["general.file_type"] == models.mixes[mix].file_type
    # There is no output.weight: llama.cpp multiplies with the embedding.
    assert found.tensors["token_embd.weight"].type.name == "Q6_K"


@pytest.mark.parametrize("name", tiny_models.MODELS)
@pytest.mark.parametrize("scheme", ["q4_0", "q4_k_m"])
def test_the_same_as_from_safetensors(tmp_path: Path, name: str, scheme: str) -> None:
    """Weights that F16 holds exactly: every byte but the record is that of the file made without a detour."""
    tiny_models.MODELS[name](tmp_path / "m", "float16")
    quantize_checkpoint(tmp_path / "m", tmp_path / "own.gguf", "f16", format="gguf", device="cpu")
    quantize_checkpoint(tmp_path / "m", tmp_path / "want.gguf", scheme, format="gguf", device="cpu")
    stripped(tmp_path / "own.gguf", tmp_path / "other.gguf")
    want = (tmp_path / "want.gguf").read_bytes()
    for source in ("own", "other"):
        target = tmp_path / f"from-{source}.gguf"
        result = quantize_checkpoint(
            tmp_path / f"{source}.gguf", target, scheme, format="gguf", allow_requantize=True, device="cpu"
        )
        assert result.plan.warnings == ()
        assert list(stored(target).items()) == list((stored(tmp_path / "want.gguf") | changed(target, source)).items())
        assert gguf_by_hand.read(target.read_bytes())[1] == gguf_by_hand.read(want)[1]


def changed(target: Path, source: str) -> dict[str, bytes]:
    """general.name is that of the first file, which was called after the model."""
    return {"general.name": stored(target.parent / f"{source}.gguf")["general.name"]}


# Files of this package.


@pytest.fixture
def alone(tmp_path: Path) -> Path:
    """A model whose tokenizer is in its file alone, quantized."""
    tiny_models.tiny_llama_gqa(tmp_path / "m", "bfloat16")
    quantize_checkpoint(tmp_path / "m", tmp_path / "m.gguf", "q8_0", format="gguf", device="cpu")
    folder = tmp_path / "alone"
    folder.mkdir()
    return Path(shutil.move(tmp_path / "m.gguf", folder / "m.gguf"))


def test_the_tokenizer_is_that_of_the_file(tmp_path: Path, alone: Path) -> None:
    """As from the decoded model with its tokenizer beside it."""
    target = again(alone)
    shutil.copytree(tmp_path / "m", tmp_path / "d", ignore=shutil.ignore_patterns("*.safetensors"))
    dequantize_checkpoint(alone, tmp_path / "d" / "model.safetensors", device="reference")
    quantize_checkpoint(tmp_path / "d", tmp_path / "want.gguf", "q4_0", format="gguf", device="reference")
    want = stored(tmp_path / "want.gguf") | {"general.name": stored(alone)["general.name"]}
    assert list(stored(target).items()) == list(want.items())
    assert len([key for key in want if key.startswith("tokenizer.")]) > 5
    assert gguf_by_hand.read(target.read_bytes())[1] == gguf_by_hand.read((tmp_path / "want.gguf").read_bytes())[1]
    # Its names are those of the model.
    assert GgufCheckpoint(target).entries.keys() == GgufCheckpoint(alone).entries.keys()
    assert GgufCheckpoint(target).config == json.loads((tmp_path / "m" / "config.json").read_text())


def test_pooling_is_that_of_the_file(tmp_path: Path) -> None:
    shapes = {"embeddings.word_embeddings.weight": (50, 64), "encoder.layer.0.intermediate.dense.weight": (64, 64)}
    shapes |= {"encoder.layer.0.attention.self.query.weight": (64, 64), "pooler.dense.weight": (64, 64)}
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "layer_norm_eps": 1e-12}
    sizes |= {"intermediate_size": 64, "max_position_embeddings": 16}
    folder, beside = tmp_path / "m", tmp_path / "1_Pooling"
    for pooling, mode in ((folder / "1_Pooling", "mean_tokens"), (beside, "cls_token")):
        pooling.mkdir(parents=True)
        (pooling / "config.json").write_text(f'{{"pooling_mode_{mode}": true}}')
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", **sizes}))
    tensors = {name: RNG.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    write_safetensors(folder / "model.safetensors", tensors)
    # What lies beside it is of another model.
    source, none = tmp_path / "a.gguf", {"format_options": {"tokenizer": "none"}}
    quantize_checkpoint(folder, source, "f16", format="gguf", device="reference", **none)
    keys = read_header(again(source)).keys
    assert (keys["bert.pooling_type"], keys["tokenizer.ggml.model"]) == (1, "none")


@pytest.mark.parametrize("is_own", [True, False])
def test_options_for_the_tokenizer(tmp_path: Path, alone: Path, is_own: bool) -> None:
    source = alone if is_own else stripped(alone, alone.parent / "other.gguf")
    keys = read_header(source).keys
    without = read_header(again(source, name="none", format_options={"tokenizer": "none"})).keys
    assert {k: v for k, v in without.items() if k.startswith("tokenizer.")} == {"tokenizer.ggml.model": "none"}
    other = read_header(again(source, name="pre", format_options={"pre": "olmo"})).keys
    assert (other["tokenizer.ggml.pre"], other["tokenizer.ggml.tokens"]) == ("olmo", keys["tokenizer.ggml.tokens"])


# What is refused.


def test_it_has_to_be_allowed_in_words_that_are_true_of_floats(tmp_path: Path) -> None:
    source = foreign(tmp_path / "a.gguf", QUANTIZED)
    with pytest.raises(SourceError, match=r"--allow-requantize reads it, and decodes what is quantized in it") as e:
        quantize_checkpoint(source, tmp_path / "b.gguf", "q4_0", format="gguf")
    assert "quantized already" not in str(e.value)
    assert "already quantized" not in str(e.value)


@pytest.mark.parametrize(("kind", "n"), [(2, 3), (4, 2), (2, 1), (2, 0)])
def test_one_of_several_files(tmp_path: Path, kind: int, n: int) -> None:
    source = foreign(tmp_path / "a-00001-of-00003.gguf", QUANTIZED, [*KEYS, ("split.count", kind, n)])
    if n < 2:
        assert read_header(again(source)).keys["split.count"] == n
        return
    with pytest.raises(SourceError, match=rf"one of {n} files of a model; .*llama-gguf-split --merge"):
        again(source)


def test_names_without_the_keys(tmp_path: Path) -> None:
    """Of a GGUF file that was decoded to safetensors."""
    dequantize_checkpoint(foreign(tmp_path / "a.gguf", QUANTIZED), tmp_path / "d.safetensors", device="reference")
    with pytest.raises(FormatError, match="names of a GGUF file, of which the sizes and the tokenizer are missing"):
        again(tmp_path / "d.safetensors")
    plan = quantize_checkpoint(tmp_path / "d.safetensors", tmp_path / "b.parquet", "int4_g32", dry_run=True)
    assert {e.info.name for e in plan.entries if e.scheme} == QUANTIZED.keys() - {"token_embd.weight", "output.weight"}


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    source = foreign(tmp_path / "a.gguf", {"blk.0.attn_q.weight.lora_a": floats(F16, 64, 64)})
    with pytest.raises(FormatError, match="architecture of this checkpoint has no names for GGUF here"):
        again(source)


def test_diffusion_models_keep_all_keys(tmp_path: Path) -> None:
    tensors = {"double_blocks.0.img_attn.qkv.weight": floats(F16, 64, 64), "img_in.weight": floats(F16, 64, 64)}
    tensors["single_blocks.0.linear1.weight"] = floats(F16, 64, 64)
    keys = [("general.architecture", 8, "chroma"), ("general.file_type", 4, 1), ("own.key", 5, -7)]
    found, tensors = gguf_by_hand.read(again(foreign(tmp_path / "a.gguf", tensors, keys)).read_bytes())
    assert (found["own.key"], found["general.file_type"], found["general.architecture"]) == (-7, 2, "chroma")
    assert {n: t.kind for n, t in tensors.items()} == {
        "double_blocks.0.img_attn.qkv.weight": Q4_0,
        "img_in.weight": F16,
        "single_blocks.0.linear1.weight": Q4_0,
    }
