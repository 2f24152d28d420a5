"""What the models of these tests are asked: token ids for language models, sentences for BERT."""

from __future__ import annotations

import json
from pathlib import Path

IDS = [1, 5, 77, 400, 23, 8, 9, 300, 2, 17, 64, 255, 128, 33, 501, 3]
TEXTS = [
    "A man is eating a piece of bread.",
    "Two engineers quantize a language model on a GPU.",
    "The weather in Paris is lovely today.",
    "def softmax(x): return np.exp(x) / np.exp(x).sum()",
    "Stock prices fell sharply after the announcement.",
]


def is_encoder(model: Path) -> bool:
    """Whether the model of this directory gives embeddings of sentences, and no logits."""
    config: dict[str, object] = json.loads((model / "config.json").read_text())
    return config["model_type"] == "bert"
