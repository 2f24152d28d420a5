"""gpt-oss as GGUF: experts in parts by hand, what is kept, what is refused; and its logits in llama.cpp."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arrowquant_gpu import dequantize_checkpoint, models, reference, verify_checkpoint
from arrowquant_gpu.errors import FormatError, SourceError
from arrowquant_gpu.formats import pieces as formats_pieces
from arrowquant_gpu.formats.checkpoint import open_checkpoint
from arrowquant_gpu.formats.gguf_file import BY_SCHEME, read_header
from arrowquant_gpu.pipeline import quantize_checkpoint
from arrowquant_gpu.schemes import Scheme

from . import gguf_by_hand, tiny_models
from .bitwise import assert_bitwise_equal
from .fixtures import write_safetensors
from .gguf_by_hand import Tensor
from .model_files import arrowquant
from .resumed_runs import n_noted, run, run_until, small_pieces
from .tiny_models import EXPERTS, LAYERS

F32, BF16 = 0, 30
EXPERTS_OF = "model.layers.{}.mlp.experts."
# Tensors of a layer in the file, and where they come from, of those that are whole matrices.
MATRICES = {f"attn_{p}": f"self_attn.{p}_proj" for p in "qkv"} | {"attn_output": "self_attn.o_proj"}
NORMS = {"attn_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.tiny_gpt_oss(tmp_path_factory.mktemp("gpt-oss") / "model")


def quantize(source: Path, file: Path, scheme: str, **options: Any) -> Path:
    quantize_checkpoint(source, file, scheme, format="gguf", device="reference", **options)
    return file


def weights(source: Path) -> dict[str, np.ndarray]:
    checkpoint = open_checkpoint(source)
    return {name: np.array(checkpoint.view(name)) for name in checkpoint.tensors}


def experts(w: Mapping[str, np.ndarray], layer: int) -> dict[str, np.ndarray]:
    """The parts [experts, rows, columns] and their biases [experts, rows] by name in the file, matrix by matrix."""
    prefix, found = EXPERTS_OF.format(layer), {}
    both, down = w[f"{prefix}gate_up_proj"], w[f"{prefix}down_proj"]
    biases = w[f"{prefix}gate_up_proj_bias"]
    for name, first in (("gate", 0), ("up", 1)):
        columns = range(first, both.shape[2], 2)
        found[f"{name}_exps.weight"] = np.stack([np.stack([both[e, :, c] for c in columns]) for e in range(EXPERTS)])
        found[f"{name}_exps.bias"] = np.stack([biases[:, c] for c in columns], axis=1)
    found["down_exps.weight"] = np.stack([down[e].T for e in range(EXPERTS)])
    return found | {"down_exps.bias": w[f"{prefix}down_proj_bias"]}


@pytest.mark.parametrize("scheme", ["q8_0", "mxfp4", "q5_1"])
def test_every_tensor(source: Path, tmp_path: Path, scheme: str) -> None:
    keys, tensors = gguf_by_hand.read(quantize(source, tmp_path / "a.gguf", scheme).read_bytes())
    w, grid = weights(source), {"mxfp4": "ggml_mxfp4"}.get(scheme, scheme)
    want: dict[str, np.ndarray] = {"token_embd.weight": w["model.embed_tokens.weight"]}
    want |= {"output.weight": w["lm_head.weight"], "output_norm.weight": w["model.norm.weight"]}
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        for names, kinds in ((MATRICES, ("weight", "bias")), (NORMS, ("weight",))):
            for name, origin in names.items():
                want |= {f"blk.{i}.{name}.{k}": w[f"{layer}{origin}.{k}"] for k in kinds}
        want |= {f"blk.{i}.ffn_gate_inp.{k}": w[f"{layer}mlp.router.{k}"] for k in ("weight", "bias")}
        want[f"blk.{i}.attn_sinks.weight"] = w[f"{layer}self_attn.sinks"]
        want |= {f"blk.{i}.ffn_{name}": x for name, x in experts(w, i).items()}
    assert tensors.keys() == want.keys()
    for name, x in want.items():
        if x.ndim == 1 or "bias" in name or "gate_inp" in name:
            assert tensors[name] == Tensor(F32, x.shape, x.astype(np.float32).tobytes()), name
            continue
        packed = reference.quantize(np.ascontiguousarray(x).reshape(-1, x.shape[-1]), Scheme.parse(grid))[0]
        assert (tensors[name].kind, tensors[name].shape) == (BY_SCHEME[grid].id, x.shape), name
        assert_bitwise_equal(tensors[name].rows, packed, name)
    assert keys["general.file_type"] == {"q8_0": 7, "mxfp4": 38, "q5_1": 9}[scheme]
    assert keys["tokenizer.ggml.pre"] == "gpt-4o"


def test_values_of_mxfp4_come_back_exactly(source: Path, tmp_path: Path) -> None:
    """The published weights are MXFP4 by rows of inputs: from a float copy of them the same values are written."""
    rng, w = np.random.default_rng(7), weights(source)
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    for name in [name for name in w if name.endswith(("gate_up_proj", "down_proj"))]:
        n, inputs, outputs = w[name].shape
        x = rng.choice([*values, *-values], (n, outputs, inputs // 32, 32))
        x = (x * np.exp2(rng.integers(-9, -4, (n, outputs, inputs // 32, 1)))).reshape(n, outputs, inputs)
        w[name] = np.ascontiguousarray(x.swapaxes(1, 2)).astype(w[name].dtype)
    again = shutil.copytree(source, tmp_path / "m")
    write_safetensors(again / "model.safetensors", w, {"format": "pt"})
    file = quantize(again, tmp_path / "a.gguf", "q8_0", tensor_schemes=[(r"\.experts\..*weight", "mxfp4")])
    dequantize_checkpoint(file, tmp_path / "back.safetensors", device="reference")
    back = weights(tmp_path / "back.safetensors")
    for i in range(LAYERS):
        for name, x in experts(w, i).items():
            got = back[EXPERTS_OF.format(i) + name.replace("_exps", "_proj")]
            assert got.dtype == x.dtype
            assert np.array_equal(got, x), name


def test_verify(source: Path, tmp_path: Path) -> None:
    file = quantize(source, tmp_path / "a.gguf", "q5_0")
    report = verify_checkpoint(file, source, device="reference")
    report.check()
    counted = [f.action for f in report.findings]
    assert (counted.count("quantized"), counted.count("kept")) == (2 + LAYERS * 7, 1 + LAYERS * (2 + 4 + 1 + 2 + 3))
    data, tensor = bytearray(file.read_bytes()), read_header(file).tensors["blk.1.ffn_up_exps.weight"]
    data[tensor.offset + 10] ^= 0x40
    (tmp_path / "b.gguf").write_bytes(data)
    failed = verify_checkpoint(tmp_path / "b.gguf", source, device="reference").failed
    assert failed == ("model.layers.1.mlp.experts.up_proj.weight",)


def test_pieces_of_any_size_make_the_same_file(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = quantize(source, tmp_path / "a.gguf", "q4_0").read_bytes()
    for size in (100_000, 7_000):
        monkeypatch.setattr(formats_pieces, "PIECE_BYTES", size)
        assert quantize(source, tmp_path / "a.gguf", "q4_0", overwrite=True).read_bytes() == one


def test_an_interrupted_run_is_continued(source: Path, tmp_path: Path) -> None:
    options = {"format": "gguf", "scheme": "q8_0"}
    (tmp_path / "whole").mkdir()
    with small_pieces():
        run(source, tmp_path / "whole" / "a.gguf", **options)
        with pytest.raises(KeyboardInterrupt):
            run_until(source, tmp_path / "a.gguf", 9, KeyboardInterrupt(), **options)
        n = n_noted(tmp_path / "a.gguf")
        assert n >= 9
        assert run(source, tmp_path / "a.gguf", resume=True, **options).run.resumed == n
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "whole" / "a.gguf").read_bytes()


def test_the_plan(source: Path, tmp_path: Path) -> None:
    plan = quantize_checkpoint(source, tmp_path / "a.gguf", "q4_k", format="gguf", dry_run=True)
    by_name = {e.info.name: e for e in plan.entries}
    gate = by_name["model.layers.0.mlp.experts.gate_proj.weight"]
    assert (gate.info.shape, gate.scheme.id) == ((EXPERTS, 320, 288), "q5_0")
    assert "model.layers.0.mlp.experts.gate_up_proj" not in by_name
    said = "rows of 288 weights are not whole blocks of 256"
    assert [w for w in plan.warnings if said in w] == [f"12 tensors are q5_0 instead of q4_k: {said}."]
    assert not [w for w in plan.warnings if "fused" in w or "scheme" in w]


def test_a_format_with_whole_tensors_has_them_whole(source: Path, tmp_path: Path) -> None:
    plan = quantize_checkpoint(source, tmp_path / "a.parquet", "int8_g32", format="parquet", dry_run=True)
    names = {e.info.name for e in plan.entries}
    assert names == set(open_checkpoint(source).tensors)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layer_types": ["full_attention"] * 2}, "layer_types .* built in"),
        ({"num_local_experts": None}, "no num_local_experts or num_experts, which GGUF stores as expert_count"),
    ],
)
def test_a_config_that_llama_cpp_cannot_follow(source: Path, tmp_path: Path, change: Any, words: str) -> None:
    again = shutil.copytree(source, tmp_path / "m")
    config = json.loads((again / "config.json").read_text()) | change
    (again / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=words):
        quantize(again, tmp_path / "a.gguf", "q8_0")


@pytest.mark.parametrize("allow_requantize", [False, True])
def test_the_published_files_are_refused_with_the_way_out(source: Path, tmp_path: Path, allow_requantize: bool) -> None:
    again = mxfp4_files(source, tmp_path / "m")
    words = r"(?s)quant_method '?mxfp4.*a bfloat16 copy.*Mxfp4Config\(dequantize=True\).*save_original_format=False"
    with pytest.raises(SourceError, match=words):
        quantize(again, tmp_path / "a.gguf", "mxfp4", allow_requantize=allow_requantize)


def mxfp4_files(source: Path, target: Path) -> Path:
    """The model with experts as in the published files: codes [experts, rows, blocks, 16], scales, in random."""
    rng, w = np.random.default_rng(3), weights(source)
    for name in [name for name in w if name.endswith(("gate_up_proj", "down_proj"))]:
        n, inputs, outputs = w.pop(name).shape
        w[f"{name}_blocks"] = rng.integers(0, 256, (n, outputs, inputs // 32, 16), np.uint8)
        w[f"{name}_scales"] = rng.integers(117, 121, (n, outputs, inputs // 32), np.uint8)
    shutil.copytree(source, target)
    write_safetensors(target / "model.safetensors", w, {"format": "pt"})
    said = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"],
    }
    said["modules_to_not_convert"] += ["model.embed_tokens", "lm_head"]
    config = json.loads((target / "config.json").read_text()) | {"quantization_config": said}
    (target / "config.json").write_text(json.dumps(config))
    return target


# In llama.cpp.

# Of the largest logit: floats alone, and with quantized activations.
EXACT, QUANTIZED = 2e-3, 6e-2


def joined(file: Path, source: Path, target: Path) -> Path:
    """A directory for transformers: the decoded file, experts put together again by torch."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    arrowquant("dequantize", file, target / "parts.safetensors", "--dtype", "float32", "--device", "cpu")
    w = load_file(target / "parts.safetensors")
    (target / "parts.safetensors").unlink()
    for prefix in map(EXPERTS_OF.format, range(LAYERS)):
        gate, up, down = (w.pop(f"{prefix}{p}_proj.weight").transpose(1, 2) for p in ("gate", "up", "down"))
        w[f"{prefix}gate_up_proj"] = torch.stack([gate, up], dim=3).flatten(2)
        w[f"{prefix}down_proj"] = down.contiguous()
        biases = [w.pop(f"{prefix}{p}_proj.bias") for p in ("gate", "up")]
        w[f"{prefix}gate_up_proj_bias"] = torch.stack(biases, dim=2).flatten(1)
        w[f"{prefix}down_proj_bias"] = w.pop(f"{prefix}down_proj.bias")
    save_file(w, target / "model.safetensors", {"format": "pt"})
    return target


def off(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


@pytest.mark.interop
@pytest.mark.parametrize(
    ("scheme", "most"),
    [
        ("f16", EXACT),
        ("bf16", 1e-2),  # activations are rounded to it
        ("q8_0", QUANTIZED),
        ("mxfp4", QUANTIZED),
        ("q4_0", QUANTIZED),
        ("q4_k_m", QUANTIZED),
    ],
)
def test_llama_cpp_computes_what_the_decoded_weights_do(source: Path, tmp_path: Path, scheme: str, most: float) -> None:
    """The prompt of 16 tokens is longer than the window of 8."""
    from .real_loaders import llama_cpp, transformers_models

    file = tmp_path / "a.gguf"
    arrowquant("quantize", source, file, "--format", "gguf", "--scheme", scheme, "--device", "cpu")
    want = transformers_models.plain(joined(file, source, tmp_path / "joined"), "float32")
    assert off(llama_cpp.logits(file), want) < most


def swapped(one: str, other: str) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        tensors, data = read_header(file).tensors, np.memmap(file, np.uint8, "r+")
        a, b = (slice(t.offset, t.offset + t.n_bytes) for t in (tensors[one], tensors[other]))
        data[a], data[b] = data[b].copy(), data[a].copy()

    return damage


def zeroed(name: str) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        tensor = read_header(file).tensors[name]
        np.memmap(file, np.uint8, "r+")[tensor.offset : tensor.offset + tensor.n_bytes] = 0

    return damage


def said(key: str, value: bytes) -> Callable[[Path], None]:
    """Another value of four bytes of a key."""

    def damage(file: Path) -> None:
        data = bytearray(file.read_bytes())
        at = data.index(key.encode()) + len(key) + 4
        data[at : at + 4] = value
        file.write_bytes(data)

    return damage


DAMAGES = {
    "gate and up": swapped("blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight"),
    "their biases": swapped("blk.1.ffn_gate_exps.bias", "blk.1.ffn_up_exps.bias"),
    "biases of down": zeroed("blk.0.ffn_down_exps.bias"),
    "sinks": zeroed("blk.0.attn_sinks.weight"),
    "router": zeroed("blk.1.ffn_gate_inp.bias"),
    "window": said("gpt-oss.attention.sliding_window", struct.pack("<I", 64)),
    "yarn": said("gpt-oss.rope.scaling.factor", struct.pack("<f", 1)),
    "frequencies": said("gpt-oss.rope.freq_base", struct.pack("<f", 10000)),
    "original length": said("gpt-oss.rope.scaling.original_context_length", struct.pack("<I", 4096)),
}


@pytest.fixture(scope="module")
def exact(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A file in float, and its logits in transformers."""
    from .real_loaders import transformers_models

    folder = tmp_path_factory.mktemp("exact")
    file = quantize(source, folder / "a.gguf", "f16")
    return file, transformers_models.plain(joined(file, source, folder / "joined"), "float32")


@pytest.mark.interop
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_wrong_computes_something_else(
    exact: tuple[Path, np.ndarray], tmp_path: Path, damage: str
) -> None:
    from .real_loaders import llama_cpp

    file = Path(shutil.copy(exact[0], tmp_path / "wrong.gguf"))
    DAMAGES[damage](file)
    assert off(llama_cpp.logits(file), exact[1]) > EXACT


@pytest.mark.interop
def test_llama_cpp_reads_texts_as_transformers_does(exact: tuple[Path, np.ndarray], source: Path) -> None:
    from transformers import AutoTokenizer

    from .real_loaders import llama_cpp
    from .real_loaders.inputs import TEXTS

    tokenizer, texts = AutoTokenizer.from_pretrained(source), [*TEXTS, "HelloWorld isn't 12345\n\n  GPT's a/b"]
    assert llama_cpp.token_ids(exact[0], texts) == [tokenizer(text)["input_ids"] for text in texts]


@pytest.mark.interop
@pytest.mark.parametrize("mix", [name for name in models.mixes if name != "q2_k_s"])
def test_a_mix_has_the_types_of_llama_quantize(
    exact: tuple[Path, np.ndarray], source: Path, tmp_path: Path, mix: str
) -> None:
    from .test_gguf_loaders import llama_quantize

    theirs = read_header(llama_quantize(exact[0], tmp_path / "theirs.gguf", models.mixes[mix].file_type))
    ours = read_header(quantize(source, tmp_path / "ours.gguf", mix))
    types = [{name: t.type.name for name, t in a.tensors.items()} for a in (ours, theirs)]
    assert types[0] == types[1]
    assert ours.keys["general.file_type"] == theirs.keys["general.file_type"]


@pytest.mark.interop
def test_the_way_out_of_the_published_files(source: Path, tmp_path: Path) -> None:
    """The copy that the message tells to make is read, and MXFP4 of it has the published values."""
    from safetensors.torch import load_file
    from transformers import GptOssForCausalLM, Mxfp4Config

    published, copy, file = mxfp4_files(source, tmp_path / "m"), tmp_path / "copy", tmp_path / "a.gguf"
    model = GptOssForCausalLM.from_pretrained(published, quantization_config=Mxfp4Config(dequantize=True))
    model.save_pretrained(copy, save_original_format=False)
    quantize(copy, file, "mxfp4", format_options={"tokenizer": "none"})
    dequantize_checkpoint(file, tmp_path / "back.safetensors", device="reference")
    got, want = load_file(tmp_path / "back.safetensors"), load_file(copy / "model.safetensors")
    for prefix in map(EXPERTS_OF.format, range(LAYERS)):
        both = want[f"{prefix}gate_up_proj"]
        assert got[f"{prefix}gate_proj.weight"].equal(both[:, :, 0::2].transpose(1, 2))
        assert got[f"{prefix}up_proj.weight"].equal(both[:, :, 1::2].transpose(1, 2))
        assert got[f"{prefix}down_proj.weight"].equal(want[f"{prefix}down_proj"].transpose(1, 2))
