"""Checkpoints we write, in the real loader: transformers with compressed-tensors on a CPU.

The judge is what the loader computes with: its embeddings or logits must equal those of the float model in which each
quantized weight is replaced by its decoded value, which `arrowquant dequantize` gives.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from .fixtures import tiny_llama
from .minilm import model_dir

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore"),  # the loaders' own deprecations are not ours to fix
]

TEXTS = [
    "A man is eating a piece of bread.",
    "Two engineers quantize a language model on a GPU.",
    "The weather in Paris is lovely today.",
    "def softmax(x): return np.exp(x) / np.exp(x).sum()",
    "Stock prices fell sharply after the announcement.",
]
IDS = [[1, 5, 77, 40, 23, 8, 9, 30, 2, 17, 64, 55, 28, 33, 51, 3]]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


def arrowquant(*args: object) -> None:
    """Run the command line as a user does: in its own process."""
    done = subprocess.run(
        [sys.executable, "-m", "arrowquant_gpu.cli", *map(str, args)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout


def embed(directory: Path) -> np.ndarray:
    """Mean-pooled, normalized sentence embeddings [5, 384]."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state.float()
    mask = batch["attention_mask"][..., None].float()
    mean = (hidden * mask).sum(1) / mask.sum(1)
    return torch.nn.functional.normalize(mean, dim=1).numpy()


def logits(directory: Path, dtype: str) -> np.ndarray:
    """Logits of the tiny Llama; every weight of the checkpoint must be used, and none be missing."""
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype), output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        return model.eval()(torch.tensor(IDS)).logits.float().numpy()


# Smallest cosine of the five embeddings to the float model's: measured once with an independent writer.
@pytest.mark.parametrize(("scheme", "cosine"), [("int4_g128", 0.927), ("int8_g128", 0.9997), ("int8_channel", 0.999)])
def test_minilm_embeddings_equal_those_of_the_decoded_weights(tmp_path: Path, scheme: str, cosine: float) -> None:
    source, quantized, decoded = model_dir(), tmp_path / "quantized", tmp_path / "decoded"
    arrowquant("quantize", source, quantized, "--scheme", scheme)
    arrowquant("dequantize", quantized, decoded)
    config = json.loads((quantized / "config.json").read_text())["quantization_config"]
    assert "pooler.dense" in config["ignore"]
    got, want, original = embed(quantized), embed(decoded), embed(source)
    assert np.abs(got - want).max() < 1e-4
    worst = float((got * original).sum(1).min())
    if scheme == "int8_channel":
        assert worst > cosine
    else:
        assert worst == pytest.approx(cosine, abs=5e-4)


@pytest.mark.parametrize("scheme", ["int4_g32", "int8_g32", "int8_channel", "int2_g32"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_sharded_llama_logits_are_exact(tmp_path: Path, scheme: str, dtype: str) -> None:
    source, quantized, decoded = tmp_path / "source", tmp_path / "quantized", tmp_path / "decoded"
    tiny_llama(source, dtype=dtype, shards=3)
    arrowquant("quantize", source, quantized, "--scheme", scheme)
    arrowquant("dequantize", quantized, decoded)
    assert len(list(quantized.glob("*.safetensors"))) > 1
    got, want = logits(quantized, dtype), logits(decoded, dtype)
    assert np.abs(want).max() > 0
    np.testing.assert_array_equal(got, want)


def test_a_swapped_nibble_changes_the_logits(tmp_path: Path) -> None:
    """The comparison above can fail: swap the two codes of each byte of one layer."""
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    source, quantized = tmp_path / "source", tmp_path / "quantized"
    tiny_llama(source, dtype="float32", shards=1)
    arrowquant("quantize", source, quantized, "--scheme", "int4_g32")
    before = logits(quantized, "float32")
    file = next(quantized.glob("*.safetensors"))
    with safe_open(file, "np") as f:
        metadata = f.metadata()
    tensors = load_file(file)
    name = next(n for n in sorted(tensors) if n.endswith("weight_packed"))
    codes = tensors[name].view(np.uint8)
    tensors[name] = ((codes << 4) | (codes >> 4)).view(np.int32)
    save_file(tensors, file, metadata=metadata)
    assert np.abs(logits(quantized, "float32") - before).max() > 1e-3
