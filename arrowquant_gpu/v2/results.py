"""Results of whole calls as dicts: of layers by name, of a model, of a comparison."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import arrow_values
from ..errors import ArrowQuantError
from ..schemes import Scheme
from ..tensor import QuantizedTensor


class LayerResults(dict[str, dict[str, Any]]):
    """name -> result of each layer that was quantized, in the order of the input; see `layer_result`.

    errors: name -> error of each that was not; empty unless continue_on_error

        >>> from arrowquant_gpu.ops import quantize
        >>> results = LayerResults(fc=layer_result(quantize(np.ones((2, 64), np.float32), "int8_g32", device="cpu")))
        >>> len(results["fc"]["quantized_data"]), results.tensor("fc").shape, results.errors
        (128, (2, 64), {})
    """

    def __init__(self, *arguments: Any, **results: dict[str, Any]) -> None:
        super().__init__(*arguments, **results)
        self.errors: dict[str, ArrowQuantError] = {}

    def tensor(self, name: str) -> QuantizedTensor:
        """A layer as `dequantize` takes it, over the same memory. Raises KeyError for a name that is not there."""
        result = self[name]
        scheme, shape = Scheme.parse(result["scheme"]), result["shape"]
        packed = np.frombuffer(result["quantized_data"], np.uint8).reshape(scheme.packed_shape(shape))
        return QuantizedTensor(packed, result["scales"], result["zero_points"], shape, scheme, result["dtype"])


def layer_result(q: QuantizedTensor) -> dict[str, Any]:
    """A quantized tensor as a dict over the same memory; one on a GPU is copied down first.

    quantized_data: pyarrow.Buffer with the packed codes as drawn in schemes.py; len() is its bytes
    scales: [rows, groups of a row] in the scheme's scale dtype, float32 by default
    zero_points: uint8 of the same shape, None where the scheme is symmetric
    shape, bit_width, group_size, scheme, dtype: as in tables of results; group_size is None for channel and tensor

    Raises DeviceError where GPU arrays cannot be copied down.
    """
    if not isinstance(q.packed, np.ndarray):
        q = QuantizedTensor.from_arrow(q.to_arrow())
    return {
        "quantized_data": arrow_values.buffer(q.packed),
        "scales": q.scales,
        "zero_points": q.zeros,
        "shape": q.shape,
        "bit_width": q.scheme.bits,
        "group_size": q.scheme.group_size,
        "scheme": q.scheme.id,
        "dtype": q.dtype,
    }


class ModelResult(dict[str, Any]):
    """What became of a model: measured figures by name, see `ArrowQuantV2.quantize_from_safetensors`.

    warnings: sentences on what was not done, and why
    """

    def __init__(self, figures: dict[str, Any], warnings: tuple[str, ...] = ()) -> None:
        super().__init__(figures)
        self.warnings = warnings


class QualityResult(dict[str, Any]):
    """How a quantized model compares with its original, see `ArrowQuantV2.validate_quality`.

    problems: tensor -> what is wrong with it; empty where `passed`
    """

    def __init__(self, figures: dict[str, Any], problems: dict[str, str]) -> None:
        super().__init__(figures)
        self.problems = problems
