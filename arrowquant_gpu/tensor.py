"""`QuantizedTensor`: the result of quantizing one tensor."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import InputError
from .schemes import Scheme

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, eq=False, slots=True)
class QuantizedTensor:
    """Packed codes with everything needed to decode them. Holds its arrays; copies nothing.

    packed: uint8 [rows, row bytes], laid out as drawn in schemes.py; of ggml's grids the blocks
    scales: of dtype `scheme.scale_storage` and shape `scheme.scales_shape(shape)`: [rows, groups of a row], (1, 1) for
        granularity tensor, one for each square of granularity block, (rows, 0) for ggml's grids
    zeros: what the grid needs beside scales, of `scheme.zeros_dtype` and `scheme.zeros_shape(shape)`: zero points
        (int), biases (affine), the global scale (nvfp4); None where there is nothing
    shape: shape of the original tensor
    scheme: how it was quantized
    dtype: name of the original element type (see dtypes.py), which `dequantize` returns by default

    The arrays are NumPy arrays, or CuPy arrays where the result stayed on a GPU.

    As a DLPack object the tensor is its packed codes. As an Arrow device array it is a struct of one row with the lists
    `data`, `scales` and, unless the scheme is symmetric, `zero_points`; the schema's metadata say how to decode them.
    Both refer to the arrays where they are, and keep them alive; see docs/arrow.md.
    """

    packed: Any
    scales: Any
    zeros: Any | None
    shape: tuple[int, ...]
    scheme: Scheme
    dtype: str

    def to_arrow(self, layer_name: str = "") -> pa.RecordBatch:
        """One row that holds the whole tensor and says how to decode it; columns: `arrow_columns`.

        Host arrays are referred to without a copy and kept alive by the batch: do not write to them while it is in use.
        (An array that is not row-major is copied.) Arrays on a GPU are copied once, to page-locked memory.

            >>> from arrowquant_gpu.ops import quantize
            >>> q = quantize(np.ones((2, 64), np.float32), "int4_g32", device="reference")
            >>> batch = q.to_arrow("w")
            >>> batch["layer_name"][0].as_py(), batch["shape"][0].as_py(), batch["scheme"][0].as_py()
            ('w', [2, 64], 'int4_g32')
            >>> batch["data"].buffers()[2].address == q.packed.ctypes.data
            True

        Raises DeviceError where GPU arrays cannot be copied down.
        """
        from . import arrow_columns

        return arrow_columns.row(layer_name, self._on_host())

    @classmethod
    def from_arrow(cls, table: Any, row: int = 0) -> QuantizedTensor:
        """The tensor in one row of a record batch or table, or of any object that exports one as Arrow.

        The arrays are read-only views of the Arrow buffers, which they keep alive; nothing is copied, but for scales
        that a file stores as float32 and the scheme calls for in 16 bits. Of a tensor that is cut into several rows it
        is the piece in this row.

            >>> from arrowquant_gpu.ops import quantize
            >>> q = quantize(np.ones((2, 64), np.float32), "int4_g32", device="reference")
            >>> back = QuantizedTensor.from_arrow(q.to_arrow())
            >>> back.scheme == q.scheme, np.shares_memory(back.packed, q.packed)
            (True, True)

        Raises InputError where the row cannot be decoded, or is of a tensor that is not quantized.
        """
        import pyarrow as pa

        from . import arrow_columns

        if not isinstance(table, pa.RecordBatch | pa.Table):
            try:
                table = pa.table(table)
            except (pa.ArrowException, ValueError, TypeError) as e:
                raise InputError(f"{type(table).__module__}.{type(table).__qualname__} is no Arrow table: {e}") from e
        name, tensor = arrow_columns.read(table, row)
        if not isinstance(tensor, QuantizedTensor):
            raise InputError(f"row {row} ({name}): quant_type none, this tensor is not quantized")
        return tensor

    def __dlpack__(self, **options: Any) -> Any:
        """A DLPack capsule of `packed`, without a copy. Options are those of the array API standard."""
        return self.packed.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        """(DLPack device type, device id) of `packed`."""
        kind, index = self.packed.__dlpack_device__()
        return int(kind), int(index)

    def __arrow_c_device_array__(self, requested_schema: Any = None, **options: Any) -> tuple[Any, Any]:
        """Capsules (arrow_schema, arrow_device_array) over the arrays where they are, without a copy.

        `requested_schema` is not followed: the consumer sees what it got in the schema. Other options are refused, as
        the protocol asks for.
        """
        from . import arrow_columns, device_arrow

        if unknown := sorted(k for k, v in options.items() if v is not None):
            raise NotImplementedError(f"__arrow_c_device_array__ options {', '.join(unknown)}")
        arrow_columns.check(self.scheme)
        columns = {"data": self.packed, "scales": self.scales}
        if self.zeros is not None:
            columns["zero_points"] = self.zeros
        metadata = {
            **arrow_columns.metadata(self.scheme.scale_dtype),
            "arrowquant.scheme": self.scheme.id,
            "arrowquant.shape": json.dumps(self.shape),
            "arrowquant.dtype": self.dtype,
        }
        return device_arrow.export(columns, metadata)

    def _on_host(self) -> QuantizedTensor:
        if isinstance(self.packed, np.ndarray):
            return self
        from . import pinned

        packed, scales, *zeros = pinned.to_host([a for a in (self.packed, self.scales, self.zeros) if a is not None])
        return replace(self, packed=packed, scales=scales, zeros=zeros[0] if zeros else None)
