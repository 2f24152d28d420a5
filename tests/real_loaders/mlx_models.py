"""Checkpoints of MLX in mlx_lm on a CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .inputs import IDS


def logits(directory: Path) -> np.ndarray:
    """Logits [1, tokens, vocabulary]. mlx_lm raises ValueError for a weight that is missing or not expected."""
    import mlx.core as mx
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    mx.disable_compile()  # it would build kernels with a C++ compiler
    model, _ = load_model(directory)
    return np.array(model(mx.array([IDS])).astype(mx.float32))
