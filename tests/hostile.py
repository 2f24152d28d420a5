"""Hostile safetensors files, and the judgement of what the reader makes of them.

At least half of the cases are valid files with one field mutated; each of those says which error codes may come of it,
or that the file stays valid. The rest are byte flips, splices and structured garbage. For every case the reader must
raise a typed error, or return what the safetensors library returns. `python -m tests.hostile 10000 1` prints figures.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors

from arrowquant_gpu.dtypes import DTYPES

from .hostile_files import GARBAGE, GARBAGE_SHARES, MUTATORS, VALID, Sample, sample

PARSER = "arrowquant_gpu/formats/safetensors.py"

# Where the reader refuses on purpose what the library lets pass.
STRICTER = {
    "duplicate": "of two equal names the library keeps the last",
    "entry": "the library reads an array in place of an object, and entries of any length",
    "json": "a closing brace inside a string of an entry",
    "keys": "the library drops unknown keys",
    "metadata": "null in place of an object",
    "not_object": "white space before the first brace",
    "overflow": "an enormous dimension beside an empty one",
    "shape": "over 64 dimensions",
    "too_many": "over 2^18 names",
}


@dataclass(frozen=True)
class Case:
    """One file. `expect` holds the codes that may come of it (VALID among them), or is None where any may."""

    label: str
    data: bytes
    expect: frozenset[str] | None = None
    is_mutation: bool = False


def too_many() -> Case:
    """More names than one header may have; costly, so once in a run."""
    text = '{"__metadata__":{' + ",".join(f'"{i}":""' for i in range((1 << 18) + 1)) + "}}"
    return Case("too_many", Sample((), None, b"").file(text), frozenset({"too_many"}), True)


def cases(n: int, seed: int) -> Iterator[Case]:
    """`n` files: three fifths of them single mutations, every mutator in turn, the rest garbage."""
    yield too_many()
    names = list(MUTATORS)
    for i in range(1, n):
        rng = random.Random(f"{seed}/{i}")
        s = sample(rng)
        if i % 5 < 3:
            name = names[(i // 5 * 3 + i % 5) % len(names)]
            data, expect = MUTATORS[name](rng, s)
            yield Case(name, data, expect, True)
        else:
            (name,) = rng.choices(list(GARBAGE), GARBAGE_SHARES)
            yield Case(name, GARBAGE[name](rng, s))


def library(data: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """What the safetensors library reads: name -> (dtype, shape, bytes); None where it refuses."""
    try:
        found = safetensors.deserialize(data)
    except Exception:  # its own error type is private, and any refusal is a refusal
        return None
    return {name: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in found}


def judge(case: Case, path: Path, read: Callable[[Path], Any]) -> str:
    """The code that `read` gives for this file, or VALID. Raises AssertionError where that is not right."""
    from arrowquant_gpu.errors import HeaderError
    from arrowquant_gpu.formats.safetensors import HeaderCode

    path.write_bytes(case.data)
    theirs = library(case.data)
    what = f"{case.label} {case.data[:300]!r}"
    try:
        header = read(path)
    except HeaderError as e:
        if e.code not in set(HeaderCode) or str(path) not in str(e) or len(str(e)) > 2000:
            raise AssertionError(f"{what}: error without code or file, or too long: {e.code!r} {str(e)[:200]}") from e
        if case.expect is not None and e.code not in case.expect:
            raise AssertionError(f"{what}: {e.code} ({e}), expected {sorted(case.expect)}") from e
        if theirs is not None and e.code not in STRICTER:
            raise AssertionError(f"{what}: {e.code}, but the safetensors library reads it") from e
        return str(e.code) + (" (stricter)" if theirs is not None else "")
    except Exception as e:
        raise AssertionError(f"{what}: {type(e).__name__} in place of a typed error: {e}") from e
    if case.expect is not None and VALID not in case.expect:
        raise AssertionError(f"{what}: accepted, expected {sorted(case.expect)}")
    ours = {
        t.name: (DTYPES[t.dtype].safetensors, t.shape, case.data[t.offset : t.offset + t.n_bytes])
        for t in header.tensors.values()
    }
    if ours != theirs:
        raise AssertionError(f"{what}: accepted as {ours}, the safetensors library reads {theirs}")
    return VALID


def _odd_paths(folder: Path, read: Callable[[Path], Any]) -> int:
    """Things that are no files: a typed error for each, and no wait for a named pipe."""
    from arrowquant_gpu.errors import SourceError

    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to(folder / "loop")
    odd = (folder, folder / "absent", folder / "pipe", folder / "loop", folder / "n\0l", Path("/dev/null"))
    for path in odd:
        try:
            read(path)
        except SourceError as e:
            if not str(e):
                raise AssertionError(f"{path}: an error without words") from e
        else:
            raise AssertionError(f"{path}: accepted")
    return len(odd)


def _bad_layouts() -> int:
    """What the writer of headers must refuse."""
    from arrowquant_gpu.errors import FormatError
    from arrowquant_gpu.formats import safetensors as ours

    f = ("a", "float32", (2,))
    odd: tuple[tuple[list[Any], dict[str, str] | None], ...] = (
        ([f, f], None),
        ([("__metadata__", "int8", (1,))], None),
        ([("a", "F32", (1,))], None),
        ([("a", "float32", (-1,))], None),
        ([("a", "float32", (1,) * 65)], None),
        ([("a", "float64", (1 << 60,))], None),
        ([("a", "float4_e2m1fn", (3,))], None),
        ([("\ud800", "int8", (1,))], None),
        ([f], {"a": "\ud800"}),
        ([f], {"a": "x" * 100_000_001}),
    )
    for tensors, metadata in odd:
        try:
            ours.layout(tensors, metadata)
        except FormatError as e:
            if not str(e):
                raise AssertionError("an error without words") from e
        else:
            raise AssertionError(f"{tensors}: laid out")
    head, places = ours.layout([f, ("b", "int64", (2,))], keep_order=True)
    if places["a"] != (len(head), len(head) + 8):
        raise AssertionError(f"{places}: not in the order given")
    return len(odd)


def run(n: int, seed: int) -> dict[str, Any]:
    """Judge `n` files in this process; figures, with the first ten failures in words."""
    from arrowquant_gpu.formats.safetensors import HeaderCode, read_header

    codes: Counter[str] = Counter()
    labels: Counter[str] = Counter()
    failures: list[str] = []
    n_mutated = n_failures = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "hostile.safetensors"
        for case in cases(n, seed):
            labels[case.label] += 1
            n_mutated += case.is_mutation
            try:
                codes[judge(case, path, read_header)] += 1
            except AssertionError as e:
                n_failures += 1
                failures += [str(e)[:600]] if len(failures) < 10 else []
        n_odd = _odd_paths(Path(folder), read_header) + _bad_layouts()
    reached = {c.removesuffix(" (stricter)") for c in codes}
    return {
        "n": n,
        "seed": seed,
        "n_mutated_fields": n_mutated,
        "n_odd_paths_and_layouts": n_odd,
        "n_failures": n_failures,
        "failures": failures,
        "codes": dict(sorted(codes.items())),
        "codes_not_reached": sorted(set(HeaderCode) - reached),
        "cases": dict(sorted(labels.items())),
    }


def run_soak(n: int, seed: int) -> dict[str, Any]:
    """`run` in a process of its own, with the branch coverage of the parser: `coverage` in the figures returned."""
    command = [sys.executable, "-m", "tests.hostile", str(n), str(seed)]
    env = os.environ | {"PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=3600, check=False)
    if done.returncode:
        raise AssertionError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def main(n: int, seed: int) -> dict[str, Any]:
    # Started before the package is imported, so that the lines of definitions count as run.
    import coverage

    loaded = [m for m in sys.modules if m.startswith("arrowquant_gpu.formats")]
    if loaded:
        raise RuntimeError(f"{loaded} imported before coverage began")
    measured = coverage.Coverage(branch=True, include=[f"*/{PARSER}"], data_file=None, config_file=False)
    with measured.collect():
        figures = run(n, seed)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "coverage.json"
        with contextlib.redirect_stdout(sys.stderr):
            measured.json_report(outfile=str(report))
        files = json.loads(report.read_text())["files"]
    (found,) = files.values()
    total = found["summary"]
    return figures | {
        "coverage": {
            "file": PARSER,
            "branches": total["num_branches"],
            "branches_covered": total["covered_branches"],
            "branch_percent": round(100 * total["covered_branches"] / total["num_branches"], 2),
            "branches_missed": found["missing_branches"],
            "lines": total["num_statements"],
            "lines_covered": total["covered_lines"],
        }
    }


if __name__ == "__main__":
    print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2])), indent=1))
