"""GGUF files in llama.cpp on a CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .inputs import IDS, TEXTS


def logits(file: Path) -> np.ndarray:
    """Logits [1, tokens, vocabulary]."""
    from llama_cpp import Llama

    model = Llama(str(file), n_ctx=64, logits_all=True, verbose=False, n_threads=2, n_gpu_layers=0)
    try:
        model.eval(IDS)
        return np.array(model.scores[: len(IDS)], np.float32)[None]
    finally:
        model.close()


def embeddings(file: Path) -> np.ndarray:
    """Normalized sentence embeddings [sentences, hidden], pooled as the file says."""
    from llama_cpp import Llama

    model = Llama(str(file), embedding=True, n_ctx=512, verbose=False, n_threads=2, n_gpu_layers=0)
    try:
        x = np.array([model.embed(text) for text in TEXTS], np.float32)
    finally:
        model.close()
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def token_ids(file: Path, texts: list[str]) -> list[list[int]]:
    """How the tokenizer in the file reads texts, with what it puts at their ends."""
    from llama_cpp import Llama

    model = Llama(str(file), vocab_only=True, verbose=False)
    try:
        return [list(model.tokenize(text.encode(), add_bos=True, special=False)) for text in texts]
    finally:
        model.close()
