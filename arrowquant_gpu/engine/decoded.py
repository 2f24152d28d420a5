"""`DecodedCheckpoint`: a quantized checkpoint as a source of float weights, decoded as they are read."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from .. import ops
from ..backends import Backend, get_backend
from ..dtypes import DTYPES, KERNEL_DTYPES
from ..formats import QuantizedCheckpoint
from ..formats.checkpoint import SAMPLES
from ..formats.quantized import pieces
from ..grids import GRIDS
from ..tensor import QuantizedTensor
from .computed import ComputedCheckpoint, in_order
from .converted import columns_of, recover


class DecodedCheckpoint(ComputedCheckpoint):
    """See `Checkpoint`. `stored` is what is decoded; every tensor has its original dtype, so that the bytes read are
    those that `arrowquant dequantize` would write. `sizes` are those that it tells where it has no config."""

    why = "quantized weights are decoded as they are read"

    def __init__(self, stored: QuantizedCheckpoint) -> None:
        self.stored, self.path = stored, stored.path
        self.metadata, self.config, self.side_files = stored.metadata, stored.config, stored.side_files
        self.sizes: Mapping[str, int] = getattr(stored, "sizes", {})
        self.left_out = ()
        self.tensors = in_order(dataclasses.replace(e.info, name=name) for name, e in stored.entries.items())

    @property
    def schemes(self) -> tuple[str, ...]:
        """Ids of the schemes that it is quantized with; f16 and bf16, which are plain floats, are none."""
        found = {e.scheme for e in self.stored.entries.values() if e.scheme is not None}
        return tuple(sorted(scheme.id for scheme in found if GRIDS[scheme.grid].block != 1))

    def fingerprint(self) -> str:
        """BLAKE2b-128 of names, sizes and samples of the files, as hex. See `Checkpoint`."""
        h = hashlib.blake2b(digest_size=16)
        for file in sorted({info.file for info in self.tensors.values()}):
            data = np.memmap(file, np.uint8, "r")
            h.update(f"{file.name} {data.size} {self.stored.format} ".encode())
            for i in range(SAMPLES):
                start = data.size * i // SAMPLES
                h.update(data[start : start + 4096].data)
        return h.hexdigest()

    def read(self, name: str, begin: int, out: NDArray[np.uint8]) -> None:
        """The bytes of the decoded tensor. See `ComputedCheckpoint`."""
        backend, dtype = get_backend("cpu", 1), self.tensors[name].dtype
        end = begin + out.size
        for at, data in decoded(self.stored, name, dtype, backend, begin, end):
            raw = data.reshape(-1).view(np.uint8)
            first, last = max(at, begin), min(at + raw.size, end)
            if first < last:
                out[first - begin : last - begin] = raw[first - at : last - at]


def decoded(
    stored: QuantizedCheckpoint,
    name: str,
    dtype: str,
    backend: Backend,
    begin: int = 0,
    end: int | None = None,
) -> Iterator[tuple[int, NDArray[Any]]]:
    """A tensor in `dtype` in order: (position of the first byte, elements), each of which is used before the next.

    Of a tensor that is not quantized they have the dtype that they have. What has no byte from `begin` up to `end` is
    left out.
    """
    for at, piece in pieces(stored, name):
        width = DTYPES[dtype].bits // 8 if isinstance(piece, QuantizedTensor) else piece.itemsize
        if end is not None and at * width >= end:
            return
        if (at + math.prod(piece.shape)) * width <= begin:
            continue
        if not isinstance(piece, QuantizedTensor):
            yield at * width, piece
            continue
        divisors = columns_of(stored.entries[name], at, piece.shape[1])
        # What is multiplied again is rounded to its dtype after that.
        kernel_dtype = dtype if dtype in KERNEL_DTYPES and divisors is None else "float32"
        out = np.empty(piece.shape, DTYPES[kernel_dtype].numpy)
        ops.dequantize_rows(piece.packed, piece.scales, piece.zeros, piece.scheme, out, backend=backend, name=name)
        recover(out, divisors)
        yield at * width, out if dtype == kernel_dtype else narrow(out, dtype)


def narrow(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Decoded weights in another dtype than kernels wrote them in: one rounding, saturating as far as they do not.

    Saturating, because the lowest code stands for a value slightly beyond the largest weight, for which
    float8_e4m3fn has no infinity and an integer no value. float16 and bfloat16 have one, as of kernels.

    >>> narrow(np.array([-480, 1.3], np.float32), "float8_e4m3fn").astype(float).tolist()
    [-448.0, 1.25]
    """
    row = DTYPES[dtype]
    if not row.is_float:
        # Half of the 64-bit range ends at 2**63 - 1, which no float64 is.
        limits = np.iinfo(row.numpy)
        highest = np.nextafter(np.float64(limits.max), 0) if limits.bits == 64 else np.float64(limits.max)
        return np.clip(np.rint(values.astype(np.float64)), limits.min, highest).astype(row.numpy)
    if row.bits == 8:
        largest = np.float32(ml_dtypes.finfo(row.numpy).max)  # type: ignore[no-untyped-call]
        values = np.clip(values, -largest, largest)
    with np.errstate(over="ignore"):
        return values.astype(row.numpy)
