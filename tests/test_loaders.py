"""Checkpoints we write, in the real loader: transformers with compressed-tensors on a CPU.

The judge is what the loader computes with: its embeddings or logits must equal those of the float model in which each
quantized weight is replaced by its decoded value, which `arrowquant dequantize` gives. That this comparison notices a
damaged weight is shown in test_interop_matrix.py, which has all formats.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from .fixtures import tiny_llama
from .minilm import model_dir
from .model_files import arrowquant
from .real_loaders.transformers_models import plain

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore"),  # the loaders' own deprecations are not ours to fix
]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


# Smallest cosine of the five embeddings to the float model's: measured once with an independent writer.
@pytest.mark.parametrize(("scheme", "cosine"), [("int4_g128", 0.927), ("int8_g128", 0.9997), ("int8_channel", 0.999)])
def test_minilm_embeddings_equal_those_of_the_decoded_weights(tmp_path: Path, scheme: str, cosine: float) -> None:
    source, quantized, decoded = model_dir(), tmp_path / "quantized", tmp_path / "decoded"
    arrowquant("quantize", source, quantized, "--scheme", scheme)
    arrowquant("dequantize", quantized, decoded)
    config = json.loads((quantized / "config.json").read_text())["quantization_config"]
    assert "pooler.dense" in config["ignore"]
    got, want, original = (plain(directory, "float32") for directory in (quantized, decoded, source))
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
    tiny_llama(source, dtype=dtype, shards=3, vocab=512)
    arrowquant("quantize", source, quantized, "--scheme", scheme)
    arrowquant("dequantize", quantized, decoded)
    assert len(list(quantized.glob("*.safetensors"))) > 1
    got, want = plain(quantized, dtype), plain(decoded, dtype)
    assert np.abs(want).max() > 0
    np.testing.assert_array_equal(got, want)
