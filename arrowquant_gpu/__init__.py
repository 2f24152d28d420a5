"""GPU-accelerated weight quantizer: the same bytes on CPU and GPU, Arrow in and out.

    >>> import numpy as np
    >>> import arrowquant_gpu as aq
    >>> weights = np.random.default_rng(0).standard_normal((64, 256), dtype=np.float32)
    >>> q = aq.quantize(weights, "int4_g128", device="cpu")
    >>> q.packed.shape, q.scales.shape
    ((64, 128), (64, 2))
    >>> bool(np.abs(aq.dequantize(q, device="cpu") - weights).max() <= 0.5001 * q.scales.max())
    True

The public names are in `__all__`. Each is imported when it is first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import errors as errors

if TYPE_CHECKING:
    from .diffusion import DiffusionOptions as DiffusionOptions
    from .ops import dequantize as dequantize
    from .ops import quantize as quantize
    from .pinned import pinned_table as pinned_table
    from .pipeline import quantize_checkpoint as quantize_checkpoint
    from .pipeline.dequantize import dequantize_checkpoint as dequantize_checkpoint
    from .pipeline.verify import verify_checkpoint as verify_checkpoint
    from .pipeline.widths import Widths as Widths
    from .schemes import Scheme as Scheme
    from .tensor import QuantizedTensor as QuantizedTensor
    from .v2.asynchronous import AsyncArrowQuantV2 as AsyncArrowQuantV2
    from .v2.config import DiffusionQuantConfig as DiffusionQuantConfig
    from .v2.loaders import SafeTensorsLoader as SafeTensorsLoader
    from .v2.loaders import ShardedSafeTensorsLoader as ShardedSafeTensorsLoader
    from .v2.quantizer import ArrowQuantV2 as ArrowQuantV2
    from .v2.weights_table import numpy_to_arrow_table as numpy_to_arrow_table

__version__ = "0.1.0"

# The module of each public name. The imports above say the same to type checkers.
_HOME = {
    "ArrowQuantV2": "v2.quantizer",
    "AsyncArrowQuantV2": "v2.asynchronous",
    "DiffusionOptions": "diffusion",
    "DiffusionQuantConfig": "v2.config",
    "QuantizedTensor": "tensor",
    "SafeTensorsLoader": "v2.loaders",
    "Scheme": "schemes",
    "ShardedSafeTensorsLoader": "v2.loaders",
    "Widths": "pipeline.widths",
    "dequantize": "ops",
    "dequantize_checkpoint": "pipeline.dequantize",
    "numpy_to_arrow_table": "v2.weights_table",
    "pinned_table": "pinned",
    "quantize": "ops",
    "quantize_checkpoint": "pipeline",
    "verify_checkpoint": "pipeline.verify",
}
__all__ = ["errors", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
