"""Tables on disk to tables on disk: every source and target, the same rows, bounded memory, nothing half-written."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from arrowquant_gpu import cli, cli_run, ops
from arrowquant_gpu.errors import InputError, NonFiniteError, SourceError, TargetError
from arrowquant_gpu.tables import sources, targets
from arrowquant_gpu.tables.dequantize import dequantize_stream, dequantize_table
from arrowquant_gpu.tables.files import quantize_file
from arrowquant_gpu.tables.quantize import quantize_stream, quantize_table
from arrowquant_gpu.tables.sources import open_source

from . import weight_rows
from .bitwise import assert_bitwise_equal
from .weight_rows import layers, make, table

ROOT = Path(__file__).parent.parent
SCHEME = "int4_g32_asym"
ARRAYS = layers([(3, 40), (7,), (2, 130), (0, 4)])


def ipc(t: pa.Table, path: Path, new: Any = pa.ipc.new_file, **options: Any) -> Path:
    with new(path, t.schema, **options) as writer:
        writer.write_table(t)
    return path


def stream_bytes(t: pa.Table) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, t.schema) as writer:
        writer.write_table(t)
    return sink.getvalue()


def parquet(t: pa.Table, path: Path, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(t, path, **options)
    return path


def partitioned(t: pa.Table, folder: Path) -> Path:
    """One file per tensor, whose name is in the path only."""
    for i, name in enumerate(t["layer_name"].to_pylist()):
        parquet(t.slice(i, 1).drop_columns("layer_name"), folder / f"layer_name={name}" / "part.parquet")
    return folder


def several(t: pa.Table, folder: Path, suffix: str) -> Path:
    folder.mkdir()
    for i in range(t.num_rows):
        write = parquet if suffix == "parquet" else ipc
        write(t.slice(i, 1), folder / f"{i}.{suffix}")
    return folder


SOURCES: dict[str, Callable[[pa.Table, Path], Any]] = {
    "arrow": lambda t, p: ipc(t, p / "w.arrow"),
    "arrow of any name": lambda t, p: ipc(t, p / "weights"),
    "arrow, zstd": lambda t, p: ipc(t, p / "w.arrow", options=pa.ipc.IpcWriteOptions(compression="zstd")),
    "stream": lambda t, p: ipc(t, p / "w.arrows", pa.ipc.new_stream),
    "file object": lambda t, p: io.BytesIO(stream_bytes(t)),
    "parquet": lambda t, p: parquet(t, p / "w.parquet", row_group_size=2, compression="zstd"),
    "parquet directory": lambda t, p: several(t, p / "w", "parquet"),
    "arrow directory": lambda t, p: several(t, p / "w", "arrow"),
    "partitions": lambda t, p: partitioned(t, p / "w"),
    "dataset": lambda t, p: ds.dataset(str(several(t, p / "w", "parquet"))),
    "dataset in memory": lambda t, p: ds.dataset(t),
    "dataset of datasets": lambda t, p: ds.dataset(
        [
            ds.dataset(str(parquet(t.slice(0, 2), p / "a.parquet"))),
            ds.dataset(str(ipc(t.slice(2), p / "b.arrow")), format="ipc"),
        ]
    ),
}
READERS: dict[str, Callable[[Path], pa.Table]] = {
    "q.arrow": lambda p: pa.ipc.open_file(p).read_all(),
    "q.feather": lambda p: pa.ipc.open_file(p).read_all(),
    "q.arrows": lambda p: pa.ipc.open_stream(p.read_bytes()).read_all(),
    "q.parquet": lambda p: pq.read_table(p),
    "q": lambda p: ds.dataset(str(p)).to_table(),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source(kind: str, tmp_path: Path) -> None:
    wide = table(ARRAYS).append_column("note", pa.array(["x"] * len(ARRAYS)))
    source = open_source(given := SOURCES[kind](wide, tmp_path))
    assert sorted(source.schema.names) == ["layer_name", "shape", "weights"]
    assert source.n_rows in (None, len(ARRAYS))
    done = quantize_file(
        io.BytesIO(stream_bytes(wide)) if kind == "file object" else given, tmp_path / "q.arrow", SCHEME, device="cpu"
    )
    result = READERS["q.arrow"](tmp_path / "q.arrow")
    weight_rows.check(result, ARRAYS, SCHEME)
    assert (done.n_rows, done.paths, done.problems) == (len(ARRAYS), (tmp_path / "q.arrow",), [])
    assert done.weight_bytes >= sum(a.nbytes for a in ARRAYS.values())


@pytest.mark.parametrize("name", READERS)
def test_every_target(name: str, tmp_path: Path) -> None:
    source = parquet(table(ARRAYS), tmp_path / "w.parquet")
    quantize_file(source, tmp_path / name, SCHEME, device="cpu")
    weight_rows.check(READERS[name](tmp_path / name), ARRAYS, SCHEME)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["w.parquet", name])


def test_a_stream_to_a_file_object() -> None:
    target = io.BytesIO()
    done = quantize_file(io.BytesIO(stream_bytes(table(ARRAYS))), target, SCHEME, device="cpu")
    weight_rows.check(pa.ipc.open_stream(target.getvalue()).read_all(), ARRAYS, SCHEME)
    assert done.paths == ()


@pytest.mark.parametrize("suffix", ["arrow", "parquet"])
@pytest.mark.parametrize("dtype", weight_rows.DTYPES)
def test_every_dtype_through_files(dtype: str, suffix: str, tmp_path: Path) -> None:
    """bfloat16 among them, whose mark is in the file."""
    arrays = layers([(3, 40), (7,)], dtype)
    source = several(table(arrays), tmp_path / "w", suffix)
    quantize_file(source, tmp_path / "q.parquet", "int8_g32_bf16", device="cpu")
    weight_rows.check(pq.read_table(tmp_path / "q.parquet"), arrays, "int8_g32_bf16")


def test_a_filter_of_a_dataset_is_followed(tmp_path: Path) -> None:
    dataset = ds.dataset(str(several(table(ARRAYS), tmp_path / "w", "parquet")))
    quantize_file(dataset.filter(ds.field("layer_name") != "layer.1"), tmp_path / "q.arrow", SCHEME, device="cpu")
    rest = {name: a for name, a in ARRAYS.items() if name != "layer.1"}
    weight_rows.check(READERS["q.arrow"](tmp_path / "q.arrow"), rest, SCHEME)


def test_files_of_other_types_in_one_dataset(tmp_path: Path) -> None:
    parquet(table(layers([(3, 40)], prefix="a")), tmp_path / "w" / "a.parquet")
    parquet(table(layers([(2, 5)], "float16", "b"), "large_list"), tmp_path / "w" / "b.parquet")
    nested = pa.table({"layer_name": ["c"], "weights": pa.array([[1.0, 2.0]], pa.list_(pa.float32()))})
    parquet(nested, tmp_path / "w" / "c.parquet")
    quantize_file(tmp_path / "w", tmp_path / "q.arrow", SCHEME, device="cpu")
    result = READERS["q.arrow"](tmp_path / "q.arrow")
    assert result["layer_name"].to_pylist() == ["a.0", "b.0", "c"]
    assert result["shape"].to_pylist() == [[3, 40], [2, 5], [2]]


def test_a_tensor_in_small_rows(tmp_path: Path) -> None:
    arrays = layers([(9, 64), (5,), (4, 64)])
    source = parquet(table(arrays), tmp_path / "w.parquet")
    row = 32 + 2 * 5  # of 64 weights: codes, and two scales and zero points
    quantize_file(source, tmp_path / "q.arrow", SCHEME, device="cpu", max_row_bytes=4 * row)
    result = READERS["q.arrow"](tmp_path / "q.arrow")
    assert result["layer_name"].to_pylist() == ["layer.0"] * 3 + ["layer.1", "layer.2"]
    assert result["chunk"].to_pylist() == [0, 1, 2, 0, 0]
    assert result["n_chunks"].to_pylist() == [3, 3, 3, 1, 1]
    whole = dequantize_table(result)
    want = ops.dequantize(ops.quantize(arrays["layer.0"], SCHEME, device="reference"), device="reference")
    assert_bitwise_equal(np.concatenate([w.values.to_numpy() for w in whole["weights"][:3]]), want.reshape(-1))
    # What is in rows already stays so; one row of weights is the least; one scale for all cannot be cut.
    again = quantize_table(dequantize_table(result), SCHEME, device="cpu")
    ipc(dequantize_table(result), tmp_path / "cut.arrow")
    quantize_file(tmp_path / "cut.arrow", tmp_path / "q2.arrow", SCHEME, device="cpu", max_row_bytes=1)
    assert READERS["q.arrow"](tmp_path / "q2.arrow")["chunk"].to_pylist()[:4] == [0, 1, 2, 0]
    assert again["n_chunks"].to_pylist() == [3, 3, 3, 1, 1]
    ipc(dequantize_table(result).slice(0, 2), tmp_path / "part.arrow")
    with pytest.raises(InputError, match=r"layer\.0: 2 of its 3 chunks"):
        quantize_file(tmp_path / "part.arrow", tmp_path / "q3.arrow", SCHEME, device="cpu")
    assert not (tmp_path / "q3.arrow").exists()
    with pytest.raises(InputError, match=r"layer\.0: int8_tensor has one scale"):
        quantize_file(source, tmp_path / "q3.arrow", "int8_tensor", device="cpu", max_row_bytes=100)
    with pytest.raises(InputError, match="max_row_bytes 0"):
        quantize_file(source, tmp_path / "q3.arrow", SCHEME, device="cpu", max_row_bytes=0)


def test_files_and_row_groups_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "BATCH_BYTES", 2000)
    monkeypatch.setattr(targets, "GROUP_BYTES", 1)
    monkeypatch.setattr(targets, "FILE_BYTES", 1000)
    arrays = layers([(2, 200)] * 9)
    ipc(table(arrays).combine_chunks(), tmp_path / "w.arrow")
    parquet(table(arrays), tmp_path / "w.parquet")
    seen: list[tuple[int, int | None, str]] = []
    for name, n_rows in (("w.arrow", None), ("w.parquet", 9)):
        target = tmp_path / name.removeprefix("w.")
        seen.clear()
        done = quantize_file(tmp_path / name, target, SCHEME, device="cpu", progress=lambda *args: seen.append(args))
        assert [p.name for p in done.paths] == [f"part-{i:05d}.parquet" for i in range(len(done.paths))]
        assert len(done.paths) > 2
        assert pq.read_metadata(done.paths[0]).num_row_groups > 1
        assert seen[-1] == (9, n_rows, "layer.8")
        assert len(seen) == 9
        weight_rows.check(READERS["q"](target), arrays, SCHEME)


# --- Memory ----------------------------------------------------------------------------------------------------------

_PEAK = """
import sys, threading, time
from pathlib import Path
from arrowquant_gpu.tables.files import quantize_file

def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))

def watch():
    global peak
    while not over:
        peak = max(peak, anonymous())
        time.sleep(0.001)

small, large, target = sys.argv[1:]
quantize_file(small, target, device="cpu", overwrite=True)
before, peak, over = anonymous(), 0, False
thread = threading.Thread(target=watch)
thread.start()
done = quantize_file(large, target, device="cpu", overwrite=True)
over = True
thread.join()
print((peak - before) >> 20, done.weight_bytes >> 20)
"""


def peak_megabytes(small: Path, large: Path, target: Path) -> tuple[int, int]:
    """(anonymous memory over what it was, what was quantized) of a run in a process of its own, in MiB."""
    command = [sys.executable, "-c", _PEAK, str(small), str(large), str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    peak, size = map(int, done.stdout.split())
    return peak, size


@pytest.mark.parametrize("kind", ["arrow", "parquet", "directory"])
def test_memory_does_not_grow_with_the_table(kind: str, tmp_path: Path) -> None:
    """Weights that are all alike, which take no room in a Parquet file, and one record batch of all rows."""
    field = pa.list_(pa.field("item", pa.float32()))
    values = pa.array(np.full(64 << 20, 0.5, np.float32))
    rows = pa.ListArray.from_arrays(np.arange(0, (64 << 20) + 1, 1 << 20, dtype=np.int32), values).cast(field)
    large = pa.table({"layer_name": [f"layer.{i}" for i in range(64)], "weights": rows})
    small = parquet(large.slice(0, 1), tmp_path / "small.parquet")
    if kind == "arrow":
        path = ipc(large, tmp_path / "large.arrow")
    elif kind == "parquet":
        path = parquet(large, tmp_path / "large.parquet", row_group_size=32)
    else:
        path = tmp_path / "large"
        for i in range(2):
            parquet(large.slice(32 * i, 32), path / f"{i}.parquet")
    peak, size = peak_megabytes(small, path, tmp_path / "q.arrow")
    assert size >= 256
    assert peak < 120


# --- What goes wrong -------------------------------------------------------------------------------------------------


def cut_off(path: Path, share: float = 0.5) -> Path:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    return path


def text_file(path: Path) -> Path:
    path.write_text("layer_name,weights\n")
    return path


def between_batches(path: Path) -> Path:
    """A stream whose writer was killed after the second of three batches."""
    with path.open("wb") as file:
        writer = pa.ipc.new_stream(file, table(ARRAYS).schema)
        for batch in table(ARRAYS).to_batches()[:2]:
            writer.write_batch(batch)
    return path


def mixed(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(b"")
    return folder


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "absent": (lambda p: p / "absent.arrow", "absent.arrow: there is no such"),
    "text": (lambda p: text_file(p / "w.csv"), "neither Parquet nor Arrow IPC"),
    "empty": (lambda p: cut_off(text_file(p / "w.arrow"), 0), "neither Parquet nor Arrow IPC"),
    "arrow": (lambda p: cut_off(ipc(table(ARRAYS), p / "w.arrow")), "w.arrow: cannot be read"),
    "parquet": (lambda p: cut_off(parquet(table(ARRAYS), p / "w.parquet")), "w.parquet: cannot be read"),
    "stream": (lambda p: cut_off(ipc(table(ARRAYS), p / "w.arrows", pa.ipc.new_stream)), "w.arrows: cannot be read"),
    "stream between batches": (lambda p: between_batches(p / "w.arrows"), "w.arrows: ends without the mark"),
    "file object": (lambda p: io.BytesIO(stream_bytes(table(ARRAYS))[:600]), "the stream: cannot be read"),
    "file object between batches": (
        lambda p: io.BytesIO(between_batches(p / "x").read_bytes()),
        "the stream: ends without the mark",
    ),
    "directory without": (lambda p: mixed(p / "w", "a.csv"), "no Parquet or Arrow IPC files"),
    "empty directory": (lambda p: mixed(p / "w"), "no Parquet or Arrow IPC files"),
    "directory of both": (lambda p: mixed(p / "w", "a.arrow", "a.parquet"), "both Parquet and Arrow IPC"),
    "directory with others": (
        lambda p: mixed(p / "w", "a.parquet", "b.csv", "c"),
        "no part of a dataset .without.*csv",
    ),
    "file of a directory": (
        lambda p: (several(table(ARRAYS), p / "w", "parquet"), cut_off(p / "w" / "2.parquet"), p / "w")[2],
        r"2\.parquet",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_source_that_cannot_be_read(case: str, tmp_path: Path) -> None:
    made, text = BROKEN[case]
    source = made(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(SourceError, match=text):
        quantize_file(source, tmp_path / "q.arrow", SCHEME, device="cpu")
    assert sorted(tmp_path.iterdir()) == before


def test_bad_weights_leave_nothing(tmp_path: Path) -> None:
    arrays = layers([(3, 40)] * 3)
    arrays["layer.1"][0, 0] = np.nan
    source = several(table(arrays), tmp_path / "w", "parquet")
    for name in READERS:
        with pytest.raises(NonFiniteError, match=r"layer\.1"):
            quantize_file(source, tmp_path / name, SCHEME, device="cpu")
    with pytest.raises(ZeroDivisionError):
        quantize_file(source, tmp_path / "q", SCHEME, device="cpu", progress=lambda *_: 1 // 0)
    assert [p.name for p in tmp_path.iterdir()] == ["w"]
    done = quantize_file(source, tmp_path / "q.arrow", SCHEME, device="cpu", continue_on_error=True)
    assert [p.layer for p in done.problems] == ["layer.1"]
    assert done.n_rows == 2
    broken = io.BytesIO()
    with pytest.raises(NonFiniteError):
        quantize_file(source, broken, SCHEME, device="cpu")
    assert broken.getvalue()
    assert not broken.getvalue().endswith(sources._END)


def test_no_rows_and_no_columns(tmp_path: Path) -> None:
    parquet(table(ARRAYS).slice(0, 0), tmp_path / "none.parquet")
    with pytest.raises(InputError, match=r"none\.parquet: the table of weights has no rows"):
        quantize_file(tmp_path / "none.parquet", tmp_path / "q.arrow")
    parquet(pa.table({"layer_name": ["a"], "x": [1]}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match="'weights' is missing"):
        quantize_file(tmp_path / "x.parquet", tmp_path / "q.arrow")
    assert not (tmp_path / "q.arrow").exists()


def test_targets_that_must_not_be_written(tmp_path: Path) -> None:
    source = parquet(table(ARRAYS), tmp_path / "w.parquet")
    for target, text in (
        (tmp_path / "q.csv", ".csv says nothing"),
        (source, "is the source itself"),
        (tmp_path / "absent" / "q.arrow", "does not exist"),
        (tmp_path, "holds the source"),
    ):
        with pytest.raises(TargetError, match=text):
            quantize_file(source, target, SCHEME, device="cpu", overwrite=True)
    (tmp_path / "q.arrow").write_text("mine")
    with pytest.raises(TargetError, match="exists; choose another"):
        quantize_file(source, tmp_path / "q.arrow", SCHEME, device="cpu")
    assert (tmp_path / "q.arrow").read_text() == "mine"
    quantize_file(source, tmp_path / "q.arrow", SCHEME, device="cpu", overwrite=True)
    weight_rows.check(READERS["q.arrow"](tmp_path / "q.arrow"), ARRAYS, SCHEME)


def test_a_full_disk_is_a_target_error(tmp_path: Path) -> None:
    command = 'ulimit -f 8; exec "$0" -m arrowquant_gpu.cli quantize-table --device cpu "$@"'
    source = parquet(table(layers([(300, 400)])), tmp_path / "w.parquet")
    arguments = ["bash", "-c", command, sys.executable, str(source), str(tmp_path / "q.arrow")]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, [p.name for p in tmp_path.iterdir()]) == (6, ["w.parquet"]), done.stderr
    assert "larger than this process or file system may write" in done.stderr


# --- Back to weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("scheme", ["int4_g32_asym", "int3_channel_bf16", "int8_tensor"])
def test_results_back_to_weights(scheme: str, dtype: str) -> None:
    arrays = layers([(3, 40), (7,), (), (0, 4)], dtype)
    result = quantize_table(table(arrays), scheme, device="cpu")
    back = dequantize_table(result, device="cpu")
    assert back["layer_name"].to_pylist() == list(arrays)
    assert back["shape"].to_pylist() == [list(a.shape) for a in arrays.values()]
    again = {x.name: x for x in _layers(back)}
    for name, a in arrays.items():
        want = ops.dequantize(ops.quantize(a, scheme, device="reference"), device="reference")
        assert again[name].dtype == dtype
        assert_bitwise_equal(again[name].weights.reshape(a.shape), want, name)


def _layers(t: pa.Table) -> list[Any]:
    from arrowquant_gpu.tables.weights import Rows

    rows = Rows(t.schema)
    return [x for b in t.to_batches() for x in rows.layers(b)]


def test_the_dtype_of_decoded_weights() -> None:
    both = pa.concat_tables(
        [quantize_table(table(layers([(3,)], d, d)), SCHEME, device="cpu") for d in ("float16", "float32")]
    )
    assert dequantize_table(both)["weights"].type.value_type == pa.float32()
    assert dequantize_table(both, "float16")["weights"].type.value_type == pa.float16()
    wide = quantize_table(table(layers([(3,)], "float64")), SCHEME, device="cpu")
    assert dequantize_table(wide)["weights"].type.value_type == pa.float32()
    with pytest.raises(InputError, match="dtype 'float64'"):
        dequantize_table(wide, "float64")


def test_decoded_batches_are_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    from arrowquant_gpu.tables import dequantize

    monkeypatch.setattr(dequantize, "BATCH_BYTES", 1000)
    arrays = layers([(3, 40), (3, 40), (10, 40), (1, 4)])
    stream, _ = quantize_stream(table(arrays).combine_chunks(), SCHEME, device="cpu")
    batches = list(dequantize_stream(stream, device="cpu"))
    assert [b["layer_name"].to_pylist() for b in batches] == [["layer.0", "layer.1"], ["layer.2"], ["layer.3"]]


def test_results_that_cannot_be_decoded() -> None:
    result = quantize_table(table(ARRAYS), SCHEME, device="cpu")
    with pytest.raises(InputError, match="columns scales are missing"):
        dequantize_table(result.drop_columns("scales"))
    short = result.set_column(1, "quantized_data", pa.array([b"x"] * len(ARRAYS), pa.large_binary()))
    with pytest.raises(InputError, match=r"row 0 \(layer\.0\): data has 1 items"):
        dequantize_table(short)


# --- The command -----------------------------------------------------------------------------------------------------


def run(*arguments: object, **options: Any) -> Any:
    return CliRunner().invoke(cli.app, ["quantize-table", *map(str, arguments)], **options)


def test_the_command(tmp_path: Path) -> None:
    source = parquet(table(ARRAYS), tmp_path / "w.parquet")
    done = run(source, tmp_path / "q.arrow", "--scheme", SCHEME, "--device", "cpu", "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    said = json.loads(done.stdout)
    assert (said["n_rows"], said["problems"], said["files"]) == (4, [], [str(tmp_path / "q.arrow")])
    weight_rows.check(READERS["q.arrow"](tmp_path / "q.arrow"), ARRAYS, SCHEME)
    done = run(source, tmp_path / "q.parquet", "--device", "cpu", "--threads", "1", "--max-row", "60")
    assert "w.parquet -> " in done.stdout
    assert "on cpu (asked for)" in done.stdout
    assert pq.read_table(tmp_path / "q.parquet")["n_chunks"].to_pylist()[:3] == [2, 2, 1]
    assert run(source, tmp_path / "q2.arrow", "--quiet", "--device", "cpu").stdout == ""


def test_streams_of_the_command() -> None:
    command = [sys.executable, "-m", "arrowquant_gpu.cli", "quantize-table", "-", "-", "--scheme", SCHEME]
    given = stream_bytes(table(ARRAYS))
    done = subprocess.run(command, cwd=ROOT, input=given, capture_output=True, check=True)
    assert done.stderr == b""
    weight_rows.check(pa.ipc.open_stream(done.stdout).read_all(), ARRAYS, SCHEME)
    cut_short = subprocess.run(command, cwd=ROOT, input=given[:-8], capture_output=True, check=False)
    assert cut_short.returncode == 5
    assert b"<stdin>: ends without the mark" in cut_short.stderr
    reader, writer = os.pipe()
    os.close(reader)
    gone = subprocess.run(command, cwd=ROOT, input=given, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (gone.returncode, gone.stderr) == (cli_run.BROKEN_PIPE, b"")


def test_exit_codes_of_the_command(tmp_path: Path) -> None:
    arrays = layers([(3, 40)] * 2)
    arrays["layer.0"][0, 0] = np.inf
    source = parquet(table(arrays), tmp_path / "w.parquet")
    for arguments, code, text in (
        ((source, tmp_path / "q.arrow"), 3, "layer.0: 0 NaN and 1 infinite"),
        ((tmp_path / "absent", tmp_path / "q.arrow"), 5, "no such file"),
        ((source, source), 6, "the source itself"),
        ((source, tmp_path / "q.arrow", "--scheme", "int9_g3"), 2, "9 bits"),
        ((source, "-", "--json"), 3, "--json prints on stdout"),
        ((source, tmp_path / "q.arrow", "--max-row", "much"), 3, "'much' is not a size"),
    ):
        done = run(*arguments, "--device", "cpu")
        assert (done.exit_code, done.stdout) == (code, "")
        assert text in done.stderr
    done = run(source, tmp_path / "q.arrow", "--device", "cpu", "--continue-on-error")
    assert done.exit_code == 0
    assert "left out: layer.0: 0 NaN and 1 infinite" in done.stdout


def test_the_comparison_of_files_sees_an_exchange(tmp_path: Path) -> None:
    other = {"layer.0": make((3, 40), seed=9), **{n: a for n, a in ARRAYS.items() if n != "layer.0"}}
    quantize_file(parquet(table(other), tmp_path / "w.parquet"), tmp_path / "q.arrow", SCHEME, device="cpu")
    with pytest.raises(AssertionError, match=r"layer\.0"):
        weight_rows.check(READERS["q.arrow"](tmp_path / "q.arrow"), ARRAYS, SCHEME)
