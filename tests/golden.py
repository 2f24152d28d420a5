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
OTHERS = [name for name, grid in GRIDS.items() if grid.family in ("ggml", "kquant")]


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
        zeros = np.zeros(0, np.uint8) if zeros is None else zeros
        np.savez(
            GOLDEN / f"{scheme.id}.npz", x=x, packed=packed, scales=scales.view(np.uint8), zeros=zeros, decoded=decoded
        )


if __name__ == "__main__":
    _write()
