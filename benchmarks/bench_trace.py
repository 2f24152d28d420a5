"""What a range costs: where nobody profiles, and while a timeline is recorded.

    python benchmarks/bench_trace.py --out benchmarks/results

Medians over many batches of ranges, and of calls of `quantize` on a 4 MB layer, which are first checked against the
reference. The share is computed, ranges per call times cost of a range over the time of a call: the difference of two
measured calls would be noise. Nothing here asserts a speed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import timeit
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import arrowquant_gpu as aq  # noqa: E402 - the repository is not on the path of a script
from arrowquant_gpu import reference, trace  # noqa: E402
from arrowquant_gpu.schemes import Scheme  # noqa: E402
from tests.bitwise import assert_bitwise_equal  # noqa: E402
from tests.record import write  # noqa: E402

SCHEME = Scheme.parse("int4_g128")
SHAPE = (1024, 1024)  # 4 MB of float32
BATCH, BATCHES, CALLS = 2000, 201, 301
NAME = "model.layers.0.mlp.down_proj.weight"


def ns_per_range() -> float:
    """Median over batches of the time of one `with span(...): pass`."""
    timer = timeit.Timer(f"with span('kernel', {NAME!r}, 4194304): pass", globals={"span": trace.span})
    timer.timeit(BATCH)
    return statistics.median(timer.repeat(BATCHES, BATCH)) / BATCH * 1e9


def ns_per_call(call: Callable[[], object]) -> float:
    times = []
    for _ in range(CALLS):
        start = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - start)
    return statistics.median(times)


def ranges_per_call(call: Callable[[], object], folder: Path) -> int:
    with trace.timeline(folder / "call.json") as recorded:
        call()
    return sum(row["spans"] for row in recorded.summary()["categories"].values())


def seconds_to_write(folder: Path) -> tuple[float, float, int]:
    """(ns per range while a timeline is recorded, seconds to write it, its number of ranges)."""
    with trace.timeline(folder / "many.json") as recorded:
        cost = ns_per_range()
        end = time.perf_counter()
    return cost, time.perf_counter() - end, recorded.summary()["categories"]["kernel"]["spans"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder for the results file")
    arguments = parser.parse_args()
    if trace._IS_PROFILED:
        raise SystemExit("a profiler listens to this process; run the benchmark without it")
    x = np.random.default_rng(1).standard_normal(SHAPE, np.float32) * np.float32(0.02)

    def call() -> aq.QuantizedTensor:
        return aq.quantize(x, SCHEME, device="cpu", threads=1, name=NAME)

    got, want = call(), reference.quantize(x, SCHEME)
    assert_bitwise_equal(got.packed, want[0], "packed")
    assert_bitwise_equal(got.scales, want[1], "scales")
    with tempfile.TemporaryDirectory() as folder:
        n_ranges = ranges_per_call(call, Path(folder))
        off = ns_per_range()
        on, seconds, n_written = seconds_to_write(Path(folder))
    one_call = ns_per_call(call)
    shares = {name: n_ranges * cost / one_call for name, cost in (("unprofiled", off), ("timeline", on))}
    write(
        arguments.out / "trace.json",
        {
            "ns_per_range": {"unprofiled": round(off, 1), "timeline": round(on, 1)},
            "write_us_per_range": round(seconds / n_written * 1e6, 3),
            "call": {"bytes": x.nbytes, "scheme": SCHEME.id, "ns": round(one_call), "ranges": n_ranges},
            "share_of_call": {name: round(share, 8) for name, share in shares.items()},
        },
    )
    print(f"a range: {off:.0f} ns where nobody profiles, {on:.0f} ns while a timeline is recorded")
    print(f"writing the timeline: {seconds / n_written * 1e6:.2f} us per range")
    print(f"{n_ranges} range in a call of {one_call / 1e3:.0f} us on {x.nbytes / 1e6:.1f} MB: ", end="")
    print(f"{shares['unprofiled']:.4%} of it, {shares['timeline']:.4%} with a timeline")


if __name__ == "__main__":
    main()
