"""The CPU backend on every grid beside the peer that the grid is from, in one run: bits first, then rates.

    python benchmarks/bench_grids.py --out benchmarks/results

Method and words are those of bench_cpu.py: rates are bytes of weights per second of one call on a [4096, 4096] tensor.
llama.cpp takes float32 only. bitsandbytes and MLX allocate their outputs; those of llama.cpp and of this package are
there beforehand. MLX has one stream, and stands beside one thread.

Beside llama.cpp, the share of blocks that have the same bytes, and the errors of both, are in the results too.

Nothing here asserts a speed. It exits with an error if a peer is missing, or if bits or a peer's values are wrong.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from arrowquant_gpu import ops, reference  # noqa: E402 - the repository is not on the path of a script
from arrowquant_gpu.backends.cpu import CpuBackend  # noqa: E402
from arrowquant_gpu.dtypes import DTYPES  # noqa: E402
from arrowquant_gpu.grids import GRIDS as ALL_GRIDS  # noqa: E402
from arrowquant_gpu.schemes import Scheme  # noqa: E402
from benchmarks import cpu_peers  # noqa: E402
from benchmarks.bench_cpu import SHAPE, THREADS, Candidate, make_weights, measure, rounded  # noqa: E402
from tests.bitwise import assert_bitwise_equal  # noqa: E402
from tests.record import write  # noqa: E402

# Scheme -> the peer's name for it; None where no peer has a quantizer for the CPU.
GRIDS: dict[str, str | None] = {
    **{name.lower(): f"llama.cpp {name}" for name in cpu_peers.GGML_TYPES},
    "ggml_mxfp4": None,
    "ggml_nvfp4": None,
    "nf4_g64": "bitsandbytes NF4",
    "fp4_g64": "bitsandbytes FP4",
    "affine4_g64": "mlx affine int4",
    "e4m3_channel": None,
    "e4m3_b128": None,
    "mxfp4": None,
    "mxfp8": None,
    "nvfp4": None,
}
# Rows that the reference is asked for, of the searches too.
CHECKED = np.r_[:8, SHAPE[0] - 8 : SHAPE[0]]


def ours(weights: list[np.ndarray], dtype: str, schemes: list[str]) -> list[Candidate]:
    """The backend itself, after its bits are found equal to the reference's."""
    found = []
    for scheme in map(Scheme.parse, schemes):
        if scheme.family == "affine":
            scheme = Scheme.parse(scheme.id + {"float32": "", "float16": "_f16", "bfloat16": "_bf16"}[dtype])
        packed = np.zeros(scheme.packed_shape(SHAPE), np.uint8)
        scales = np.zeros(scheme.scales_shape(SHAPE), DTYPES[scheme.scale_storage].numpy)
        beside, kind = scheme.zeros_shape(SHAPE), scheme.zeros_dtype
        zeros = None if beside is None or kind is None else np.zeros(beside, DTYPES[kind].numpy)
        if scheme.scale_rule == "global":
            low, high, _ = CpuBackend(1).value_range(weights[0])
            zeros = reference.solve(np.full((1, 1), low, np.float32), np.full((1, 1), high, np.float32), scheme)[1]
        for threads in THREADS:
            backend = CpuBackend(threads)

            def run(i: int, backend: CpuBackend = backend, outputs: Any = (scheme, packed, scales, zeros)) -> None:
                backend.quantize(weights[i], *outputs)

            run(0)
            check_bits(weights[0], scheme, packed, scales, zeros)
            found.append(Candidate(f"arrowquant {scheme}", dtype, threads, weights[0].nbytes, run))
    return found


def check_bits(x: np.ndarray, scheme: Scheme, packed: np.ndarray, scales: np.ndarray, zeros: Any) -> None:
    """Raise unless a sample of rows equals the reference; of squares, the first and the last row of squares."""
    rows, scale_rows = CHECKED, CHECKED
    if scheme.granularity == "block":
        side = scheme.group_size or 1
        rows, scale_rows = np.r_[:side, SHAPE[0] - side : SHAPE[0]], np.r_[0, SHAPE[0] // side - 1]
    known = zeros if scheme.scale_rule == "global" else None
    want_packed, want_scales, want_zeros, _ = reference.quantize(x[rows], scheme, known)
    assert_bitwise_equal(packed[rows], want_packed, f"{scheme} packed")
    assert_bitwise_equal(scales[scale_rows], want_scales, f"{scheme} scales")
    if want_zeros is not None and known is None:
        assert_bitwise_equal(zeros[scale_rows], want_zeros, f"{scheme} zeros")


def peers(weights: list[np.ndarray], dtype: str, schemes: list[str]) -> list[Candidate]:
    """The peers of these schemes that take the dtype."""
    x, found = weights[0].astype(np.float32), []
    for scheme in schemes:
        owner, _, name = (GRIDS[scheme] or "").partition(" ")
        for threads in THREADS:
            if owner == "llama.cpp" and dtype == "float32":
                peer = cpu_peers.llama_cpp(weights, threads, name)
            elif owner == "bitsandbytes":
                peer = cpu_peers.bitsandbytes(weights, threads, name)
            elif owner == "mlx" and threads == 1:
                peer = cpu_peers.mlx(weights, 64)
            else:
                continue
            error = float(np.sqrt(np.mean((peer.decode(peer.run(0)) - x) ** 2)) / x.std())
            if not 1e-4 < error < 0.6:
                raise SystemExit(f"{peer.name}: a relative error of {error:.3g} says that it was called wrongly")
            found.append(Candidate(peer.name, dtype, peer.threads, weights[0].nbytes, peer.run))
    return found


def agreement(weights: list[np.ndarray], schemes: list[str]) -> list[dict[str, Any]]:
    """What llama.cpp makes of the same weights: the share of blocks with the same bytes, and the errors of both."""
    x, rows = weights[0], []
    for name in schemes:
        owner, _, peer_name = (GRIDS[name] or "").partition(" ")
        if owner != "llama.cpp":
            continue
        scheme, peer = Scheme.parse(name), cpu_peers.llama_cpp([x], 1, peer_name)
        ours, theirs = ops.quantize(x, scheme, device="cpu"), peer.run(0)
        size = ALL_GRIDS[scheme.grid].block_bytes
        same = (ours.packed.reshape(-1, size) == theirs.reshape(-1, size)).all(1)
        errors = [
            float(np.sqrt(np.mean((y - x) ** 2))) for y in (ops.dequantize(ours, device="cpu"), peer.decode(theirs))
        ]
        row = {"scheme": name, "identical_blocks": float(same.mean()), "rmse": errors[0], "rmse_of_peer": errors[1]}
        rows.append(row)
        ratio = errors[0] / errors[1]
        print(f"{name:8} {same.mean():9.5f} of the blocks identical; error {ratio:.6f} of its peer's")
    return rows


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """Each of our rates beside that of its peer at as many threads (of MLX: one)."""
    rates = {(row["name"], row["threads"] or 1): row["gb_s"] for row in rows}
    for row in rows:
        scheme = row["name"].removeprefix("arrowquant ").removesuffix("_bf16")
        peer = rates.get((GRIDS.get(scheme), row["threads"]))
        if peer:
            row["of_peer"] = row["gb_s"] / peer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder for the results file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--schemes", nargs="*", choices=GRIDS, default=list(GRIDS), help="only these")
    arguments = parser.parse_args()
    results: dict[str, Any] = {"peers": cpu_peers.versions(), "shape": SHAPE, "rounds": arguments.rounds}
    results |= {"load_before": os.getloadavg()[0], "rates": []}
    print(f"{'':28} {'':9} threads    GB/s  (   min -    max)   of its peer")
    for dtype in ("float32", "bfloat16"):
        weights = make_weights(dtype)
        if dtype == "float32":
            results["agreement"] = agreement(weights, arguments.schemes)
        candidates = [*ours(weights, dtype, arguments.schemes), *peers(weights, dtype, arguments.schemes)]
        rows = measure(candidates, len(weights), arguments.rounds)
        add_ratios(rows)
        for row in sorted(rows, key=lambda row: row["name"].split()[-1].lower()):
            threads, ratio = row["threads"] or "own", row.get("of_peer")
            print(
                f"{row['name']:28} {dtype:9} {threads!s:>7} {row['gb_s']:7.3f}  ({row['min']:6.2f} - {row['max']:6.2f})"
                + (f"   {ratio:6.1f}" if ratio else "")
            )
        results["rates"] += rows
    write(arguments.out / "grids.json", rounded(results))


if __name__ == "__main__":
    main()
