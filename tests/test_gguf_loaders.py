"""GGUF files in the programs that read them: the gguf package, transformers, llama.cpp; and theirs in ours."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import numpy as np
import pytest

from arrowquant_gpu import dequantize_checkpoint, models
from arrowquant_gpu.formats.gguf_checkpoint import GgufCheckpoint
from arrowquant_gpu.formats.gguf_file import TYPES, read_header
from arrowquant_gpu.ops import dequantize
from arrowquant_gpu.pipeline import quantize_checkpoint
from arrowquant_gpu.tensor import QuantizedTensor

from . import minilm, tiny_models

pytestmark = pytest.mark.interop
LLAMA_CPP = 6e-2  # it quantizes the activations too
MODELS = [*tiny_models.MODELS, *tiny_models.DEEPSEEK, "minilm"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models, and what the tests of this file make of them."""
    folder = tmp_path_factory.mktemp("gguf")
    for name, make in (tiny_models.MODELS | tiny_models.DEEPSEEK).items():
        make(folder / name, "bfloat16")
    shutil.copytree(minilm.model_dir(), folder / "minilm")
    return folder


def written(folder: Path, model: str, scheme: str) -> Path:
    file = folder / f"{model}-{scheme}.gguf"
    if not file.exists():
        quantize_checkpoint(folder / model, file, scheme, format="gguf", device="reference")
    return file


def reference(folder: Path, model: str, file: Path) -> np.ndarray:
    """What transformers computes with the decoded weights."""
    from .real_loaders import transformers_models

    decoded = folder / f"decoded-{file.stem}"
    if not decoded.exists():
        shutil.copytree(folder / model, decoded, ignore=shutil.ignore_patterns("*.safetensors"))
        dequantize_checkpoint(file, decoded / "model.safetensors", dtype="float32", device="reference")
        if model == "minilm":
            add_what_is_left_out(folder / model / "model.safetensors", decoded / "model.safetensors")
        if model in tiny_models.DEEPSEEK:
            join_the_parts(decoded / "model.safetensors")
    return transformers_models.plain(decoded, "float32")


def add_what_is_left_out(source: Path, target: Path) -> None:
    from safetensors.numpy import load_file, save_file

    save_file(load_file(source) | load_file(target), target, {"format": "pt"})


def join_the_parts(file: Path) -> None:
    """Keys and values of each head, one below the other, as transformers has them."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    for name in [n for n in tensors if n.endswith(".k_b_proj.weight")]:
        values = tensors.pop(name.replace("k_b_proj", "v_b_proj"))
        heads = [torch.cat([k.T, v]) for k, v in zip(tensors.pop(name), values, strict=True)]
        tensors[name.replace("k_b_proj", "kv_b_proj")] = torch.cat(heads)
    save_file(tensors, file, {"format": "pt"})


def off(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


def outputs(model: str, file: Path) -> np.ndarray:
    from .real_loaders import llama_cpp

    return llama_cpp.embeddings(file) if model == "minilm" else llama_cpp.logits(file)


@pytest.mark.parametrize(("model", "scheme"), [(m, s) for m in MODELS for s in ("q8_0", "q4_k_m")])
def test_llama_cpp_computes_what_the_decoded_weights_do(folder: Path, model: str, scheme: str) -> None:
    file = written(folder, model, scheme)
    assert off(outputs(model, file), reference(folder, model, file)) < LLAMA_CPP


SCHEMES = [row.scheme.removeprefix("ggml_") for row in TYPES.values() if row.scheme]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_type_in_llama_cpp_and_transformers(folder: Path, scheme: str) -> None:
    from .real_loaders import transformers_models

    file = written(folder, "qwen2", scheme)
    want = reference(folder, "qwen2", file)
    assert off(outputs("qwen2", file), want) < LLAMA_CPP
    assert off(transformers_models.gguf(file, "float32"), want) < 1e-6


@pytest.mark.parametrize("model", MODELS)
def test_llama_cpp_reads_texts_as_transformers_does(folder: Path, model: str) -> None:
    from transformers import AutoTokenizer

    from .real_loaders import llama_cpp
    from .real_loaders.inputs import TEXTS

    file, tokenizer = written(folder, model, "q8_0"), AutoTokenizer.from_pretrained(folder / model)
    texts = [*TEXTS, "One line\n\nand (and) 12345 others: ünïcode, 日本 it's"]
    assert llama_cpp.token_ids(file, texts) == [tokenizer(text)["input_ids"] for text in texts]


@pytest.mark.parametrize("model", MODELS)
def test_the_gguf_package_reads_keys_and_shapes(folder: Path, model: str) -> None:
    import gguf

    file = written(folder, model, "q4_k_m")
    reader, header = gguf.GGUFReader(file), read_header(file)
    for key, value in header.keys.items():
        got = reader.fields[key].contents()
        assert got == (value.tolist() if isinstance(value, np.ndarray) else value), key
    assert {t.name: tuple(reversed(t.shape.tolist())) for t in reader.tensors} == {
        name: tensor.shape for name, tensor in header.tensors.items()
    }


def llama_quantize(source: Path, target: Path, file_type: int) -> Path:
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = file_type
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(options)) == 0
    return target


# llama-quantize makes this one only with an importance matrix.
MIXES = [name for name in models.mixes if name != "q2_k_s"]


@pytest.mark.parametrize(("model", "mix"), [(m, x) for m in MODELS for x in MIXES])
def test_a_mix_has_the_types_of_llama_quantize(folder: Path, model: str, mix: str) -> None:
    theirs = llama_quantize(written(folder, model, "f16"), folder / "theirs.gguf", models.mixes[mix].file_type)
    a, b = read_header(written(folder, model, mix)), read_header(theirs)
    assert {name: t.type.name for name, t in a.tensors.items()} == {name: t.type.name for name, t in b.tensors.items()}
    assert a.keys["general.file_type"] == b.keys["general.file_type"]


@pytest.mark.parametrize("file_type", [2, 3, 7, 8, 9, 10, 12, 15, 17, 18, 25])
def test_files_of_llama_quantize_are_decoded_as_the_gguf_package_does(folder: Path, file_type: int) -> None:
    import gguf

    theirs = llama_quantize(written(folder, "llama", "f16"), folder / "theirs.gguf", file_type)
    # Without the record of what they were made from, which llama-quantize copies, names are those of the file.
    ours = GgufCheckpoint(unsigned(theirs, folder / "unsigned.gguf"))
    for tensor in gguf.GGUFReader(theirs).tensors:
        want = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        got = [
            dequantize(b, "float32", device="reference") if isinstance(b, QuantizedTensor) else b
            for b in blocks(ours, tensor.name)
        ]
        assert np.concatenate(got).astype(np.float32).tobytes() == want.astype(np.float32).tobytes(), tensor.name


def blocks(checkpoint: GgufCheckpoint, name: str) -> list[object]:
    return [block for _, block in checkpoint.blocks(name)]


def unsigned(source: Path, target: Path) -> Path:
    target.write_bytes(source.read_bytes().replace(b"arrowquant.tensors", b"another.program.xx"))
    return target


def swap_nibbles(file: Path) -> None:
    tensor = read_header(file).tensors["blk.0.ffn_up.weight"]
    data = np.memmap(file, np.uint8, "r+", tensor.offset, tensor.n_bytes)
    blocks = data.reshape(-1, tensor.type.block_bytes)[:, 2:]
    blocks[:] = blocks >> 4 | blocks << 4


def forget_the_heads(file: Path) -> None:
    """Rows of queries as transformers has them."""
    tensor = read_header(file).tensors["blk.0.attn_q.weight"]
    rows = np.memmap(file, np.uint8, "r+", tensor.offset, tensor.n_bytes).reshape(tensor.shape[0], -1)
    head = tensor.shape[0] // tiny_models.HEADS
    rows[:] = rows.reshape(-1, head // 2, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


@pytest.mark.parametrize("damage", [swap_nibbles, forget_the_heads])
def test_a_file_that_is_wrong_computes_something_else(folder: Path, tmp_path: Path, damage: object) -> None:
    file = written(folder, "llama", "q4_0")
    want = reference(folder, "llama", file)
    wrong = Path(shutil.copy(file, tmp_path / "wrong.gguf"))
    damage(wrong)
    assert off(outputs("llama", file), want) < LLAMA_CPP < off(outputs("llama", wrong), want)


SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 512, "pad_token_id": 0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 4, "moe_intermediate_size": 256}
WINDOW = {"head_dim": 64, "sliding_window": 64, "query_pre_attn_scalar": 64}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LATENT = {"kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 96}
LATENT |= {"num_key_value_heads": 4, "rms_norm_eps": 1e-6, "first_k_dense_replace": 1, "n_shared_experts": 2}
LATENT |= {"n_routed_experts": 16, "num_experts_per_tok": 3, "moe_intermediate_size": 256, "num_hidden_layers": 3}
SCALED = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "rope_theta": 10000.0}
KINDS: dict[str, dict[str, object]] = {
    "Mistral": {},
    "Qwen3": {"head_dim": 64},
    "Gemma": {"head_dim": 64},
    "Gemma2": WINDOW,
    "Gemma3Text": WINDOW,
    "Phi": {"num_key_value_heads": 4},
    "Phi3": {},
    "Qwen2Moe": {"shared_expert_intermediate_size": 256, **EXPERTS},
    "Qwen3Moe": {"head_dim": 64, "norm_topk_prob": True, **EXPERTS},
    "Llama": {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64}},
    "Qwen2": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}},
    # Every token goes to some of the experts: in the first by softmax, in the second by sigmoids of the best groups.
    "DeepseekV2": {
        **LATENT,
        "q_lora_rank": None,
        "rope_parameters": {**SCALED, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "DeepseekV3": {
        **LATENT,
        "q_lora_rank": 192,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "num_mtp_layers": 0,
        "rope_parameters": {**SCALED, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_in_llama_cpp(tmp_path: Path, kind: str) -> None:
    """F16 models, which llama.cpp computes almost exactly: names, row order, norms, keys."""
    import torch
    import transformers

    from .real_loaders import transformers_models

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(SIZES | KINDS[kind]), bos_token_id=1, eos_token_id=2)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.normal_(0.0 if "bias" in name or "Gemma" in kind else 1.0, 0.1)
            elif "embed" not in name:
                p.normal_(0, p.shape[-1] ** -0.5)
        for name, p in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                p.normal_(0, 0.1)
    model.save_pretrained(tmp_path / "m")
    file, none = tmp_path / "a.gguf", {"tokenizer": "none"}
    quantize_checkpoint(tmp_path / "m", file, "f16", format="gguf", device="reference", format_options=none)
    assert off(outputs(kind, file), transformers_models.plain(tmp_path / "m", "float32")) < 1e-2


def test_the_shape_that_ggml_does_not_have_is_where_comfyui_looks(tmp_path: Path) -> None:
    import gguf

    from .fixtures import random_weights, write_safetensors

    shapes = {"patch_embedding.weight": (64, 16, 1, 2, 2), "blocks.0.cross_attn.q.weight": (64, 64)}
    shapes["time_projection.1.weight"] = (64, 64)
    source = write_safetensors(tmp_path / "m.safetensors", random_weights(shapes, "float16", 2))
    quantize_checkpoint(source, tmp_path / "a.gguf", "q8_0", format="gguf", device="reference")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    assert reader.fields["general.architecture"].contents() == "wan"
    field = reader.get_field("comfy.gguf.orig_shape.patch_embedding.weight")
    assert field.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32]
    assert field.contents() == list(shapes["patch_embedding.weight"])
    tensor = next(t for t in reader.tensors if t.name == "patch_embedding.weight")
    want = random_weights(shapes, "float16", 2)["patch_embedding.weight"]
    assert tensor.data.reshape(want.shape).tobytes() == want.tobytes()
