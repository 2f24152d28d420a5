"""Golden files tests/golden/<scheme>.npz, one per scheme id. `python -m tests.golden` writes them; tests only read.

A change of these bytes is a change of the numerics: it needs a note in docs/decisions/ and a CHANGELOG line.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from arrowquant_gpu import reference
from arrowquant_gpu.grids import GRIDS
from arrowquant_gpu.schemes import BITS, Scheme

from .cases import CONTENTS, make

GOLDEN = Path(__file__).parent / "golden"

# Those of grids other than whole numbers.
OTHERS = [
    *(name for name, grid in GRIDS.items() if grid.family in ("ggml", "kquant")),
    *("affine3_g64", "affine4_g32_f16", "affine8_g128_bf16"),
    *("nf4_g5", "nf4_g64", "fp4_g24", "fp4_g64", "mxfp4", "mxfp4_round", "mxfp4_ceil", "nvfp4", "nvfp4_local"),
    *("mxfp8", "mxfp8_round", "mxfp8_ceil", "e4m3_g7_bf16", "e4m3_g32_f16", "e4m3_g128", "e4m3_channel_bf16"),
    *("e4m3_tensor", "e4m3_b128", "e4m3_b128_bf16", "e5m2_g128", "e5m2_channel_f16", "e5m2_tensor_bf16"),
    "e5m2_b128_f16",
]


def golden_schemes() -> list[Scheme]:
    """Each width, symmetric and not, with one granularity and one scale type each so that all of them occur; others."""
    grains = [("group", 16), ("group", 5), ("channel", None), ("group", 32), ("tensor", None), ("group", 24)]
    types = ["float32", "bfloat16", "float16", "float32", "bfloat16", "float32"]
    whole = [
        Scheme(bits, *grains[(i + asym) % 6], not asym, types[(i + asym) % 6])
        for i, bits in enumerate(BITS)
        for asym in (0, 1)
    ]
    return whole + [Scheme.parse(name) for name in OTHERS]


def load(scheme: Scheme) -> dict[str, np.ndarray]:
    """The arrays of one golden file. A missing file is an error, never written on the way."""
    with np.load(GOLDEN / f"{scheme.id}.npz") as f:
        return dict(f)


def _write() -> None:
    GOLDEN.mkdir(exist_ok=True)
    for scheme in golden_schemes():
        length = 53 if scheme.misfit((1, 53)) is None else 256
        rows = [make(c, (1, length), "float32") for c in CONTENTS]
        x = np.concatenate([row for row in rows if reference.quantize(row, scheme)[3] == reference.Findings()])
        packed, scales, zeros, findings = reference.quantize(x, scheme)
        if findings != reference.Findings():
            raise SystemExit(f"{scheme}: {findings}")
        decoded = reference.dequantize(packed, scales, zeros, scheme, x.shape[1])
        beside = np.zeros(0, np.uint8) if zeros is None else zeros.view(np.uint8)
        path = GOLDEN / f"{scheme.id}.npz"
        np.savez(path, x=x, packed=packed, scales=scales.view(np.uint8), zeros=beside, decoded=decoded)


if __name__ == "__main__":
    _write()
