"""Damaged tables of weights, and the judgement of what becomes of them.

Valid Arrow IPC streams and files and Parquet files with bytes turned, cut out, doubled or cut off. Each must be a typed
error, or give what the reference makes of the rows that pyarrow itself reads. `python -m tests.hostile_tables 1000 1`
prints figures; it is run in a process of its own, which a crash would end.
"""

from __future__ import annotations

import io
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from arrowquant_gpu import ops
from arrowquant_gpu.errors import ArrowQuantError
from arrowquant_gpu.tables.dequantize import dequantize_table
from arrowquant_gpu.tables.files import quantize_file
from arrowquant_gpu.tables.quantize import quantize_table
from arrowquant_gpu.tensor import QuantizedTensor

from .weight_rows import layers, nested, same, table

SCHEME = "int4_g32_asym"
VALID = "valid"

Run = Callable[..., Any]


def _sink(t: pa.Table, new: Any, **options: Any) -> bytes:
    sink = io.BytesIO()
    with new(sink, t.schema, **options) as writer:
        writer.write_table(t)
    return sink.getvalue()


def _parquet(t: pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(t, sink, row_group_size=2, **options)
    return sink.getvalue()


def samples() -> dict[str, bytes]:
    """Small valid tables, of every kind of file and with every column."""
    flat = table(layers([(3, 20), (7,), (2, 9)]))
    deep = list(layers([(2, 5), (3, 4)], "float16").values())
    nest = pa.table({"layer_name": pa.array(["a", "b"]).dictionary_encode(), "weights": nested(deep, "large_list")})
    cut = flat.append_column("chunk", pa.array([0] * 3)).append_column("n_chunks", pa.array([1] * 3))
    lz4 = pa.ipc.IpcWriteOptions(compression="lz4")
    return {
        "a.arrows": _sink(flat, pa.ipc.new_stream),
        "b.arrows": _sink(nest, pa.ipc.new_stream),
        "c.arrows": _sink(cut.combine_chunks(), pa.ipc.new_stream, options=lz4),
        "a.arrow": _sink(flat, pa.ipc.new_file),
        "b.arrow": _sink(nest, pa.ipc.new_file),
        "a.parquet": _parquet(flat),
        "b.parquet": _parquet(cut, compression="zstd", use_dictionary=False, write_page_checksum=True),
    }


def damaged(data: bytes, rng: random.Random) -> bytes:
    """One to four bytes turned, or a part left out, doubled or cut off."""
    changed, at = bytearray(data), rng.randrange(len(data))
    match rng.randrange(8):
        case 0:
            return data[:at]
        case 1:
            del changed[at : at + rng.choice((1, 8, 64))]
        case 2:
            changed[at:at] = changed[at : at + rng.choice((1, 8, 64))]
        case 3:
            changed[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f", b"\0\0\0\x80"))
        case _:
            for _ in range(rng.randrange(1, 5)):
                changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def rows_by_pyarrow(path: Path) -> list[tuple[str, np.ndarray]]:
    """Names and tensors as pyarrow and Python lists have them, with nothing of this package.

    A column whose name was damaged is none of the three, and a file without its first bytes is a stream.
    """
    wanted = ("layer_name", "weights", "shape")
    if path.suffix == ".parquet":
        names = pq.read_schema(path).names
        found = pq.read_table(path, columns=[c for c in wanted if c in names])
    else:
        data = path.read_bytes()
        found = (pa.ipc.open_file if data.startswith(b"ARROW1") else pa.ipc.open_stream)(data).read_all()
        found = found.select([c for c in wanted if c in found.column_names])
    found.validate(full=True)
    rows = []
    for row in found.to_pylist():
        inner = found.schema.field("weights").type
        while hasattr(inner, "value_type"):
            inner = inner.value_type
        a = np.array(row["weights"], inner.to_pandas_dtype())
        rows.append((row["layer_name"], a if row.get("shape") is None else a.reshape(row["shape"])))
    return rows


def judge(path: Path, target: Path, run: Run = quantize_file) -> str:
    """The name of the typed error, or VALID. Raises AssertionError where a result or an error is not right."""
    try:
        run(path, target, SCHEME, device="cpu", overwrite=True)
    except ArrowQuantError as e:
        if not str(e) or len(str(e)) > 3000:
            raise AssertionError(f"an error without words, or with too many: {str(e)[:200]}") from e
        return type(e).__name__
    except Exception as e:
        raise AssertionError(f"{type(e).__name__} in place of a typed error: {e}") from e
    result = pa.ipc.open_file(target).read_all()
    try:
        rows = rows_by_pyarrow(path)
    except (pa.ArrowException, ValueError, OSError) as e:
        raise AssertionError(f"{result.num_rows} rows of what pyarrow refuses: {e}") from e
    if result["layer_name"].to_pylist() != [name for name, _ in rows]:
        raise AssertionError(f"{result['layer_name'].to_pylist()} of {[name for name, _ in rows]}")
    for i, (name, a) in enumerate(rows):
        same(QuantizedTensor.from_arrow(result, i), ops.quantize(a, SCHEME, device="reference"), name)
    return VALID


def judge_in_memory(data: bytes, run: Run, **options: Any) -> str:
    """The name of the typed error, or VALID, of a stream that pyarrow opens. Raises AssertionError for other errors."""
    try:
        reader = pa.ipc.open_stream(data)
    except (pa.ArrowException, OSError, ValueError):
        return "not opened"
    try:
        run(reader, device="cpu", **options)
    except ArrowQuantError as e:
        return type(e).__name__
    except Exception as e:
        raise AssertionError(f"{type(e).__name__} in place of a typed error: {e}") from e
    return VALID


def cases(n: int, seed: int, folder: Path) -> Any:
    """`n` damaged files, one after the other under names that tell what they are: (number, path)."""
    given = samples()
    names = list(given)
    for i in range(n):
        rng = random.Random(f"{seed}/{i}")
        path = folder / names[i % len(names)]
        path.write_bytes(damaged(given[path.name], rng))
        yield i, path


def run(n: int, seed: int) -> dict[str, Any]:
    """Judge `n` files; figures, with the first ten failures in words. The number of the last case is on stderr."""
    found: Counter[str] = Counter()
    failures: list[str] = []
    results = _sink(quantize_table(table(layers([(3, 20), (7,)])), SCHEME, device="cpu"), pa.ipc.new_stream)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, data in samples().items():
            (folder / file).write_bytes(data)
            if judge(folder / file, folder / "q.arrow") != VALID:
                raise AssertionError(f"{file}: the sample itself is refused")
        for i, path in cases(n, seed, folder):
            print(f"\r{seed}/{i} {path.name}", end="", file=sys.stderr, flush=True)
            try:
                found[f"{path.suffix} {judge(path, folder / 'q.arrow')}"] += 1
                if path.suffix == ".arrows":
                    what = judge_in_memory(path.read_bytes(), quantize_table, continue_on_error=True)
                    found[f"weights in memory {what}"] += 1
                    data = damaged(results, random.Random(f"{seed}/{i}"))
                    found[f"results in memory {judge_in_memory(data, dequantize_table)}"] += 1
            except AssertionError as e:
                failures.append(f"{seed}/{i} {path.name}: {str(e)[:400]}")
    return {
        "n": n,
        "seed": seed,
        "n_failures": len(failures),
        "failures": failures[:10],
        "found": dict(sorted(found.items())),
    }


if __name__ == "__main__":
    print(json.dumps(run(int(sys.argv[1]), int(sys.argv[2])), indent=1))
