"""Ranges: what a profiler sees of every path, and what a timeline holds.

The profiler is tests/nvtx_injection.cpp, which NVTX loads into a fresh interpreter in place of Nsight Systems.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arrowquant_gpu import trace
from arrowquant_gpu.errors import TargetError

from .fixtures import tiny_llama

ROOT = Path(__file__).parent.parent
INT64 = "2"  # NVTX_PAYLOAD_TYPE_INT64
WEIGHTS = """
import numpy as np
import arrowquant_gpu as aq
x = np.ones((64, 256), np.float32)
"""


class Range(NamedTuple):
    category: str
    name: str
    n_bytes: int
    depth: int
    thread: str


def ranges(log: str) -> list[Range]:
    """Ranges of the domain in the order in which they began, replayed with a stack per thread."""
    found, open_ranges = [], Counter[str]()
    for line in log.splitlines():
        what, thread, domain, *attributes = line.split("\t")
        if domain != "arrowquant":
            continue
        if what == "push":
            category, payload_type, payload, name = attributes
            assert payload_type == INT64, line
            found.append(Range(category, name, int(payload), open_ranges[thread], thread))
            open_ranges[thread] += 1
        elif what == "pop":
            open_ranges[thread] -= 1
            if open_ranges[thread] < 0:
                raise AssertionError(f"thread {thread} closes a range that it has not opened")
        else:
            raise AssertionError(f"not a range with push and pop: {line}")
    if left := +open_ranges:
        raise AssertionError(f"ranges left open: {dict(left)}")
    return found


Profile = Callable[[str], list[Range]]


@pytest.fixture(scope="session")
def injection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("nvtx") / "injection.so"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run(["g++", *flags, str(ROOT / "tests/nvtx_injection.cpp"), "-o", str(library)], check=True)
    return library


@pytest.fixture
def profile(injection: Path, tmp_path: Path) -> Profile:
    """The ranges of a Python program that runs under the profiler."""

    def run(program: str) -> list[Range]:
        log = tmp_path / "log"
        log.write_text("")
        environment = {**os.environ, "NVTX_INJECTION64_PATH": str(injection), "NVTX_LOG": str(log)}
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, check=True)
        return ranges(log.read_text())

    return run


def flat(found: Sequence[Range]) -> list[tuple[str, str, int]]:
    """Without thread, and certain that none lies in another."""
    assert {r.depth for r in found} <= {0}
    return [(r.category, r.name, r.n_bytes) for r in found]


# What a profiler sees.


@pytest.mark.compiler
def test_calls_on_the_cpu_are_ranges(profile: Profile) -> None:
    found = profile(
        WEIGHTS
        + """
q = aq.quantize(x, "int4_g128", device="cpu", name="layer")
aq.quantize(x, "int8_tensor", device="cpu", name="whole")
aq.dequantize(q, device="cpu")
aq.quantize(x.astype(np.float64)[::2], "int4_g128", device="reference", name="strided")
"""
    )
    assert flat(found) == [
        ("kernel", "layer", 64 * 256 * 4),
        ("kernel", "whole", 64 * 256 * 4),
        ("kernel", "whole", 64 * 256 * 4),
        ("kernel", "dequantize", 64 * 256 * 4),
        ("read", "strided", 32 * 256 * 8),
        ("kernel", "strided", 32 * 256 * 4),
    ]


@pytest.mark.compiler
def test_calls_that_move_host_arrays_to_a_device_are_ranges(profile: Profile) -> None:
    """A device whose memory is the host's stands in for a GPU."""
    found = profile(
        WEIGHTS
        + """
from arrowquant_gpu import ops
from arrowquant_gpu.backends.numpy_reference import ReferenceBackend

class Device(ReferenceBackend):
    name = "cuda"

ops.get_backend = lambda device, threads: Device()
q = aq.quantize(x, "int4_g128_asym", device="cuda", name="layer")
aq.dequantize(q, device="cuda")
aq.quantize(x, "int8_tensor", device="cuda", name="whole")
"""
    )
    n, packed, scales, zeros = 64 * 256 * 4, 64 * 128, 64 * 2 * 4, 64 * 2
    assert flat(found) == [
        ("read", "layer", n),
        ("h2d", "layer", n),
        ("kernel", "layer", n),
        *[("d2h", "layer", size) for size in (packed, scales, zeros)],
        *[("h2d", "dequantize", size) for size in (packed, scales, zeros)],
        ("kernel", "dequantize", n),
        ("d2h", "dequantize", n),
        *[(category, "whole", n) for category in ("read", "h2d", "kernel")],
        ("h2d", "whole", 4),
        *[(category, "whole", n) for category in ("read", "h2d", "kernel")],
        ("d2h", "whole", 64 * 256),
    ]


@pytest.mark.compiler
def test_every_category_has_its_name_and_ranges_of_a_thread_nest(profile: Profile) -> None:
    found = profile(
        """
import threading
import numpy as np
from arrowquant_gpu import trace

def work(k):
    for _ in range(50):
        with trace.span(trace.CATEGORIES[k], f"outer {k}", 2**40 + k):
            with trace.span("write", "inner"), trace.submission("h2d", "submitted", 7):
                pass

threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
for t in threads: t.start()
for t in threads: t.join()
with trace.span("read", None, 1): pass
with trace.span("read", "weights-\\udcff-ü.safetensors", np.int64(1)): pass
"""
    )
    of_threads, last = found[:-1], found[-1]
    assert last[:4] == ("read", "weights-?-ü.safetensors", 1, 0)
    assert len(of_threads) == 6 * 50 * 3
    for k, category in enumerate(trace.CATEGORIES):
        outer = [r for r in of_threads if r.name == f"outer {k}"]
        assert {r[:4] for r in outer} == {(category, f"outer {k}", 2**40 + k, 0)}
        assert len(outer) == 50
        assert len({r.thread for r in outer}) == 1
    inner = Counter((r.category, r.name, r.n_bytes, r.depth) for r in of_threads if r.depth)
    assert inner == {("write", "inner", 0, 1): 300, ("h2d", "submitted", 7, 2): 300}


@pytest.mark.compiler
def test_an_error_closes_its_ranges(profile: Profile) -> None:
    found = profile(
        WEIGHTS
        + """
from arrowquant_gpu import ops, trace
from arrowquant_gpu.backends.numpy_reference import ReferenceBackend

class Broken(ReferenceBackend):
    def quantize(self, *arguments):
        raise MemoryError

def failing(run):
    try:
        with trace.span("plan", "outer"):
            run()
    except (MemoryError, aq.errors.InputError):
        return
    raise SystemExit("no error")

failing(lambda: aq.quantize(x * np.nan, "int4_g128", device="reference", name="nan"))
ops.get_backend = lambda device, threads: Broken()
failing(lambda: aq.quantize(x, "int4_g128", name="broken"))
with trace.span("plan", "after"):
    pass
"""
    )
    assert [(r.name, r.depth) for r in found] == [("outer", 0), ("nan", 1), ("outer", 0), ("broken", 1), ("after", 0)]


@pytest.mark.compiler
@pytest.mark.parametrize("device", ["cpu", "reference"])
def test_a_checkpoint_is_ranges(profile: Profile, tmp_path: Path, device: str) -> None:
    model = tiny_llama(tmp_path / "model")
    arguments = f"{str(model)!r}, {str(tmp_path / 'out')!r}, 'int4_g32', device={device!r}, threads=2"
    found = profile(f"from arrowquant_gpu import quantize_checkpoint; quantize_checkpoint({arguments})")
    assert_covers_checkpoint(flat(found), model)


def assert_covers_checkpoint(found: Sequence[tuple[str, str, int]], model: Path) -> None:
    """Every source byte read once, every quantized weight in a kernel once, and every tensor written."""
    totals: dict[str, Counter[str]] = {category: Counter() for category in trace.CATEGORIES}
    for category, name, n_bytes in found:
        totals[category][name] += n_bytes
    tensors, sizes = {}, {}
    for file in model.glob("*.safetensors"):
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        tensors |= {name: t["data_offsets"][1] - t["data_offsets"][0] for name, t in header.items()}
        sizes[file.name] = len(data) - 8 - length
    assert totals["read"] == sizes
    quantized = {name for name in tensors if name.endswith("_proj.weight")}
    assert totals["kernel"] == {name: tensors[name] for name in quantized}
    assert totals["write"].pop("flush") == 0
    assert totals["write"].keys() == tensors.keys()
    for name, n_bytes in totals["write"].items():
        assert 0 < n_bytes < tensors[name] if name in quantized else n_bytes == tensors[name]
    assert {name for category, name, _ in found if category == "plan"} == {"model", "layout"}


IMPORT_NVTX, IMPORT_TRACE = "import nvtx; ", "from arrowquant_gpu import trace; "


@pytest.mark.compiler
@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (IMPORT_NVTX + "nvtx.Domain.pop_range = lambda self: None", "left open"),
        (IMPORT_NVTX + "pop = nvtx.Domain.pop_range; nvtx.Domain.pop_range = lambda d: (pop(d), pop(d))", "not opened"),
        (IMPORT_NVTX + "get = nvtx.get_domain; nvtx.get_domain = lambda name: get('other')", "=="),
        (IMPORT_TRACE + "trace._IDS['kernel'] = trace._IDS['read']", "=="),
        (IMPORT_TRACE + "trace._IS_PROFILED = False", "=="),
        (IMPORT_TRACE + "span = trace.span; trace.span = lambda kind, name, n: span(kind, name, n - 1)", "=="),
        ("", None),
    ],
    ids=["no pop", "two pops", "other domain", "other category", "no ranges", "other bytes", "none"],
)
def test_a_fault_is_noticed(profile: Profile, fault: str, error: str | None) -> None:
    call = 'aq.quantize(x, "int4_g128", device="reference", name="layer")'
    with pytest.raises(AssertionError, match=error) if error else contextlib.nullcontext():
        assert flat(profile(f"{fault}\n{WEIGHTS}{call}")) == [("kernel", "layer", 64 * 256 * 4)]


NOTHING = 'from arrowquant_gpu import trace as t; assert t.span("read", "a") is t.span("write", "b", 1)'


def test_without_a_profiler_a_range_is_nothing() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "NVTX_INJECTION64_PATH"}
    subprocess.run([sys.executable, "-c", NOTHING], cwd=ROOT, env=environment, check=True)


@pytest.mark.compiler
def test_ranges_can_be_turned_off(profile: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVTX_DISABLE", "1")
    assert profile(NOTHING) == []
    monkeypatch.delenv("NVTX_DISABLE")
    with pytest.raises(subprocess.CalledProcessError):
        profile(NOTHING)


# A timeline.


def events(path: Path) -> list[dict[str, Any]]:
    """The complete events of a trace, with the name of their track."""
    found = json.loads(path.read_text())["traceEvents"]
    named = {e["tid"]: e["args"]["name"] for e in found if e["ph"] == "M" and e["name"] == "thread_name"}
    assert len({e["pid"] for e in found}) == 1
    complete = [e for e in found if e["ph"] != "M"]
    assert {e["ph"] for e in complete} <= {"X"}
    return [{**e, "track": named[e["tid"]]} for e in complete]


def test_a_timeline_has_every_range_of_every_thread(tmp_path: Path) -> None:
    def work(k: int) -> None:
        for i in range(500):
            with trace.span("kernel", f"{k}.{i}", 1000 * k + i):
                pass

    path = tmp_path / "out.json"
    with trace.timeline(path) as recorded:
        threads = [threading.Thread(target=work, args=(k,), name=f"slot {k // 2}") for k in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert not path.exists()
    found = events(path)
    assert {(e["name"], e["args"]["bytes"]) for e in found} == {
        (f"{k}.{i}", 1000 * k + i) for k in range(8) for i in range(500)
    }
    assert len(found) == 4000
    assert {e["cat"] for e in found} == {"kernel"}
    # Each thread has a row of its own, also where two have one name.
    rows = {(e["track"], e["name"].partition(".")[0]) for e in found}
    assert len(rows) == len({track for track, _ in rows}) == 8
    assert all(track.startswith(f"slot {int(k) // 2}") for track, k in rows)
    end = recorded.summary()["seconds"] * 1e6
    assert all(e["dur"] >= 0 and 0 <= e["ts"] <= end for e in found)
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]


def test_ranges_of_a_thread_nest_in_a_timeline(tmp_path: Path) -> None:
    with trace.timeline(tmp_path / "out.json"), trace.span("plan", "outer"):
        with trace.span("read", "first \udcff"):
            pass
        with trace.span("write", "second"), trace.submission("h2d", "for a profiler"):
            pass
    first, second, outer = events(tmp_path / "out.json")
    assert (first["name"], second["name"], outer["name"]) == ("first \udcff", "second", "outer")
    ends = [round(e["ts"] + e["dur"], 3) for e in (first, second, outer)]
    assert outer["ts"] <= first["ts"] <= ends[0] <= second["ts"] <= ends[1] <= ends[2]


def test_what_ran_elsewhere_has_its_own_row(tmp_path: Path) -> None:
    trace.record("h2d", "lost", 0.0, 1.0, track="cuda:0 h2d")
    with trace.timeline(tmp_path / "out.json") as recorded:
        t = recorded.start
        trace.record("h2d", "a", t + 1, t + 2, 10, track="cuda:0 h2d")
        trace.record("kernel", "a", t + 2, t + 2.5, 10, track="cuda:0 kernel")
        trace.record("h2d", "b", t + 2, t + 4, 20, track="cuda:0 h2d")
        trace.record("h2d", "c", t + 3, t + 5, 20, track="cuda:1 h2d")
    found = [(e["track"], e["name"], e["ts"], e["dur"]) for e in events(tmp_path / "out.json")]
    assert found == [
        ("cuda:0 h2d", "a", pytest.approx(1e6), pytest.approx(1e6)),
        ("cuda:0 kernel", "a", pytest.approx(2e6), pytest.approx(5e5)),
        ("cuda:0 h2d", "b", pytest.approx(2e6), pytest.approx(2e6)),
        ("cuda:1 h2d", "c", pytest.approx(3e6), pytest.approx(2e6)),
    ]
    summary = recorded.summary()
    h2d = {"spans": 3, "bytes": 50, "seconds": 5.0, "busy": 4.0, "start": 1.0, "end": 5.0}
    first = {"spans": 2, "bytes": 30, "seconds": 3.0, "busy": 3.0, "start": 1.0, "end": 4.0}
    assert summary["categories"]["h2d"] == pytest.approx(h2d)
    assert summary["tracks"]["cuda:0 h2d"] == pytest.approx(first)
    assert list(summary["categories"]) == ["h2d", "kernel"]
    assert list(summary["tracks"]) == ["cuda:0 h2d", "cuda:0 kernel", "cuda:1 h2d"]


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 12)), min_size=1, max_size=12))
def test_busy_is_the_length_of_the_union(intervals: list[tuple[int, int]]) -> None:
    timeline = trace.Timeline(Path("unwritten"))
    for start, length in intervals:
        timeline.add("read", "x", float(start), float(start + length), 1, timeline.track())
    covered = {second for start, length in intervals for second in range(start, start + length)}
    row = timeline.summary()["categories"]["read"]
    assert row["busy"] == len(covered)
    assert row["seconds"] == sum(length for _, length in intervals)


def test_an_error_leaves_the_trace_of_what_happened(tmp_path: Path) -> None:
    def run(path: Path, *, replaced: bool) -> BaseException:
        def body() -> None:
            with trace.timeline(path), trace.span("read", "file", 1):
                if replaced:
                    path.mkdir()
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt) as caught:
            body()
        return caught.value

    run(tmp_path / "out.json", replaced=False)
    assert [e["name"] for e in events(tmp_path / "out.json")] == ["file"]
    assert not trace.is_recording()
    # The error stays the error, and says what else went wrong.
    error = run(tmp_path / "folder", replaced=True)
    assert "the timeline cannot be written" in error.__notes__[0]
    assert {p.name for p in tmp_path.iterdir()} == {"out.json", "folder"}


def test_a_range_that_outlives_its_timeline_is_left_out(tmp_path: Path) -> None:
    outer = trace.span("read", "before")
    with outer, trace.timeline(tmp_path / "a.json") as first:
        late = trace.span("read", "late")
        late.__enter__()
    with trace.timeline(tmp_path / "b.json"):
        late.__exit__(None, None, None)
        with trace.span("read", "own"):
            pass
    assert events(tmp_path / "a.json") == []
    assert [e["name"] for e in events(tmp_path / "b.json")] == ["own"]
    assert first.summary()["categories"] == {}


def test_there_is_one_timeline_at_a_time(tmp_path: Path) -> None:
    with trace.timeline(tmp_path / "a.json"):
        assert trace.is_recording()
        with pytest.raises(TargetError, match=r"a\.json is being recorded"), trace.timeline(tmp_path / "b.json"):
            pass
        with trace.span("read", "file"):
            pass
    assert [e["name"] for e in events(tmp_path / "a.json")] == ["file"]
    assert not (tmp_path / "b.json").exists()


def test_only_a_timeline_is_replaced(tmp_path: Path) -> None:
    path, weights = tmp_path / "out.json", tmp_path / "model.safetensors"
    weights.write_bytes(b"weights")
    for name in ("first", "second"):
        with trace.timeline(path), trace.span("read", name):
            pass
    assert [e["name"] for e in events(path)] == ["second"]
    for target, reason in (
        (weights, "not a timeline"),
        (tmp_path / "no" / "a.json", "not exist"),
        (tmp_path, "directory"),
    ):
        with pytest.raises(TargetError, match=reason), trace.timeline(target):
            pytest.fail("the body must not run")
    assert weights.read_bytes() == b"weights"
    assert not trace.is_recording()


def test_a_range_takes_33_bytes() -> None:
    timeline = trace.Timeline(Path("unwritten"))
    for i in range(1000):
        timeline.add("read", "x", float(i), float(i + 1), i, timeline.track())
    assert len(timeline._events) == 33 * 1000
