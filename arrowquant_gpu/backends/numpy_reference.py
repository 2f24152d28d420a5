"""`ReferenceBackend`: the specification (reference.py) behind the Backend protocol. Slow, and right by definition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import reference
from ..dtypes import from_numpy
from ..reference import Findings
from ..schemes import Scheme
from . import Job


class ReferenceBackend:
    """Plain NumPy on the host; see Backend for the contract of each method."""

    name = "reference"

    def put(self, x: NDArray[Any]) -> NDArray[Any]:
        return x

    def empty(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        return np.empty(shape, dtype)

    def get(self, a: NDArray[Any], out: NDArray[Any]) -> None:
        out[...] = a

    def quantize(
        self,
        x: NDArray[Any],
        scheme: Scheme,
        packed: NDArray[np.uint8],
        scales: NDArray[Any],
        zeros: NDArray[Any] | None,
    ) -> Findings:
        known = zeros if scheme.scale_rule == "global" else None
        packed[...], scales[...], found, findings = reference.quantize(x, scheme, known)
        if zeros is not None and known is None:
            zeros[...] = found
        return findings

    def quantize_all(self, jobs: Sequence[Job]) -> list[Findings]:
        return [self.quantize(*job) for job in jobs]

    def value_range(self, x: NDArray[Any]) -> tuple[float, float, Findings]:
        values = reference.to_float32(x)
        findings = reference.find(values)
        if findings.first >= 0 or values.size == 0:
            return 0.0, 0.0, findings
        lo, hi = reference.group_range(values, Scheme(granularity="tensor"))
        return float(lo[0, 0]), float(hi[0, 0]), findings

    def encode(
        self,
        x: NDArray[Any],
        scheme: Scheme,
        scales: NDArray[Any],
        zeros: NDArray[Any] | None,
        packed: NDArray[np.uint8],
    ) -> None:
        packed[...] = reference.encode_packed(reference.to_float32(x), scales, zeros, scheme)

    def dequantize(
        self,
        packed: NDArray[np.uint8],
        scales: NDArray[Any],
        zeros: NDArray[Any] | None,
        scheme: Scheme,
        out: NDArray[Any],
    ) -> None:
        out[...] = reference.dequantize(packed, scales, zeros, scheme, out.shape[1], from_numpy(out.dtype).name)
