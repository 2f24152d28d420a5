"""ggml's blocks on the CPU: which kernels of cpu_ggml_encode.py and cpu_ggml_decode.py do a scheme.

Rows are whole blocks, so a tensor is one run of blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from numpy.typing import NDArray

from ..dtypes import from_numpy
from ..grids import GRIDS
from ..schemes import Scheme
from . import cpu_ggml_decode as decode
from . import cpu_ggml_encode as encode
from .cpu_tasks import Task, address
from .cpu_vectors import BLOCK, KINDS

# Grid -> its kernels, and what they take between the addresses and the element type.
KERNELS: Mapping[str, tuple[Callable[[], Any], Callable[[], Any], tuple[int, ...]]] = {
    "q8_0": (encode.q8, decode.q8, ()),
    "q4_0": (encode.signed, decode.signed, (4,)),
    "q5_0": (encode.signed, decode.signed, (5,)),
    "q4_1": (encode.ranged, decode.ranged, (4,)),
    "q5_1": (encode.ranged, decode.ranged, (5,)),
    "iq4_nl": (encode.nl, decode.nl, ()),
    "ggml_mxfp4": (encode.mxfp4, decode.mxfp4, ()),
    "ggml_nvfp4": (encode.nvfp4, decode.nvfp4, ()),
}
CASTS = {"f16": KINDS["float16"], "bf16": KINDS["bfloat16"]}


def coding(
    x: NDArray[Any],
    scheme: Scheme,
    packed: NDArray[Any],
    scales: NDArray[Any],
    zeros: NDArray[Any] | None,
    *,
    known: bool,
) -> Task:
    """Write blocks. `known` scales there are none of: NotImplementedError."""
    if known:
        raise NotImplementedError(f"{scheme.id} has no granularity tensor")
    return _task(scheme, False, address(x), address(packed), x.size, KINDS[from_numpy(x.dtype).name])


def decoding(
    packed: NDArray[Any],
    scales: NDArray[Any],
    zeros: NDArray[Any] | None,
    scheme: Scheme,
    out: NDArray[Any],
) -> Task:
    """Decode blocks."""
    return _task(scheme, True, address(packed), address(out), out.size, KINDS[from_numpy(out.dtype).name])


def _task(scheme: Scheme, is_decoding: bool, source: int, target: int, n: int, kind: int) -> Task:
    if scheme.grid in CASTS:
        kernel, unit = decode.cast() if is_decoding else encode.cast(), BLOCK
        arguments: tuple[int, ...] = (source, target, n, CASTS[scheme.grid], kind)
    else:
        encoder, decoder, constants = KERNELS[scheme.grid]
        kernel, unit = decoder() if is_decoding else encoder(), GRIDS[scheme.grid].block
        arguments = (source, target, *constants, kind)
    return Task(-(-n // unit), unit, lambda begin, end: kernel(*arguments, begin, end))
