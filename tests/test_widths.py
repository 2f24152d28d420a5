"""Widths by what is measured: figures and decisions recomputed here from the stored bytes, with lines of this file."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arrowquant_gpu import trace
from arrowquant_gpu.backends.numpy_reference import ReferenceBackend
from arrowquant_gpu.errors import FormatError, InputError, NonFiniteError, QualityError, TargetError
from arrowquant_gpu.formats import Diffusion, Entry, TensorInfo, diffusion_columns, pieces
from arrowquant_gpu.formats.checkpoint import open_checkpoint
from arrowquant_gpu.formats.compressed_tensors import CompressedTensorsCheckpoint
from arrowquant_gpu.formats.output import Output
from arrowquant_gpu.models import find
from arrowquant_gpu.pipeline import Manifest, Plan, make_plan, quantize_checkpoint, widths
from arrowquant_gpu.pipeline.verify import verify_checkpoint
from arrowquant_gpu.pipeline.widths import Widths, revise
from arrowquant_gpu.schemes import Scheme

from .fixtures import tiny_llama, write_safetensors
from .plain_sink import PlainSink
from .resumed_runs import killed, n_noted, run, run_until, slow
from .snapshots import differences, nothing_changes, snapshot

LENGTH = 4096
RNG = np.random.default_rng(41)


def peaked(height: float, rows: int = 6) -> np.ndarray:
    """Normal weights with two large ones of a row: the higher, the more bits they need."""
    x = RNG.standard_normal((rows, LENGTH), np.float32)
    x[:, 5], x[:, 6] = height, -height
    return x


# What the cosine of each is per channel, asymmetric, at 2, 4 and 8 bits: 0.79, 0.99, 1; 0.25, 0.91, 1; 0.63, 0.68, 1.
NORMAL, SPIKY, PEAKED = peaked(4), peaked(12), peaked(40)

TENSORS = {
    "layers.0.self_attn.q_proj.weight": NORMAL,
    "layers.0.self_attn.k_proj.weight": SPIKY,
    "layers.0.self_attn.v_proj.weight": NORMAL * 2,
    "layers.0.self_attn.o_proj.weight": NORMAL * 3,
    "layers.0.mlp.gate_proj.weight": PEAKED,
    "layers.0.mlp.up_proj.weight": SPIKY * 2,
    "layers.0.mlp.down_proj.weight": SPIKY * 3,
    "layers.1.mlp.down_proj.weight": PEAKED.astype(ml_dtypes.bfloat16),
    "layers.0.norm.weight": np.ones(LENGTH, np.float32),
    "embed_tokens.weight": NORMAL,
    "lm_head.weight": NORMAL,
    "zero.weight": np.zeros((6, LENGTH), np.float32),
    "constant.weight": np.full((6, LENGTH), 3, np.float32),
    "empty.weight": np.zeros((0, LENGTH), np.float32),
}
# The least accuracy that makes the widths below.
LEAST = 0.7
EXPECTED = {
    "layers.0.self_attn.q_proj.weight": 4,
    "layers.0.self_attn.k_proj.weight": 4,
    "layers.0.self_attn.v_proj.weight": 4,
    "layers.0.self_attn.o_proj.weight": 2,
    "layers.0.mlp.gate_proj.weight": 8,
    "layers.0.mlp.up_proj.weight": 8,
    "layers.0.mlp.down_proj.weight": 4,
    "layers.1.mlp.down_proj.weight": 8,
    "zero.weight": 2,
    "constant.weight": 2,
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_safetensors(tmp_path_factory.mktemp("source") / "model.safetensors", TENSORS)


def quantize(source: Path, target: Path, scheme: str = "int2_channel_asym", **options: Any) -> Manifest:
    return quantize_checkpoint(source, target, scheme, **{"device": "cpu", "threads": 2, **options})


def planned(source: Path, scheme: str = "int2_channel_asym", **options: Any) -> Plan:
    """The plan of a dry run to Parquet."""
    options = {"device": "cpu", "threads": 2, "format": "parquet", **options}
    return quantize_checkpoint(source, "nowhere", scheme, dry_run=True, **options)


def schemes(plan: Plan) -> dict[str, str | None]:
    return {e.info.name: e.scheme and e.scheme.id for e in plan.entries}


def reasons(plan: Plan) -> dict[str, str]:
    return {e.info.name: e.reason for e in plan.entries}


# Computed here, from the bytes of the file.


def stored(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of a Parquet file by tensor, for tensors of one row each."""
    rows = pq.read_table(path).to_pylist()
    assert len({row["layer_name"] for row in rows}) == len(rows)
    return {row["layer_name"]: row for row in rows}


def decoded(row: dict[str, Any]) -> np.ndarray:
    """The weights of a row in float32, by the description of the file."""
    shape, bits = row["shape"], row["bit_width"]
    packed = np.frombuffer(row["data"], np.uint8).reshape(math.prod(shape[:-1]), -1)
    planes = np.unpackbits(packed, axis=1, bitorder="little")[:, : shape[-1] * bits]
    codes = (planes.reshape(len(packed), shape[-1], bits) << np.arange(bits)).sum(axis=2).astype(np.float32)
    # One line of scales for each row of weights, or one scale in all.
    lines = 1 if row["quant_axis"] is None else len(packed)
    scales = np.array(row["scales"], np.float32).reshape(lines, -1)
    zeros = np.array(row["zero_points"] or [1 << bits - 1] * scales.size, np.float32).reshape(scales.shape)
    group = row["group_size"] or shape[-1]
    spread = np.arange(shape[-1]) // group
    return ((codes - zeros[:, spread]) * scales[:, spread]).reshape(shape)


def cosine(x: np.ndarray, y: np.ndarray) -> float:
    x, y = x.astype(np.float64).ravel(), y.astype(np.float64).ravel()
    if not x.any() and not y.any():
        return 1.0
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


def entropy(x: np.ndarray) -> float:
    x = x.astype(np.float64).ravel()
    counts, _ = np.histogram(x, 256, (x.min(), x.max() if x.max() > x.min() else x.min() + 1))
    p = counts / x.size
    return float(-(p[p > 0] * np.log(p[p > 0])).sum() / np.log(256))


@pytest.fixture(scope="module")
def cosines(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, float]]:
    """Of every tensor at every width, from files that were made without any widths."""
    found = {}
    for bits in (2, 3, 4, 8):
        path = tmp_path_factory.mktemp("plain") / "out.parquet"
        quantize(source, path, f"int{bits}_channel_asym", include=["."], ignore=["norm"])
        rows = {name: row for name, row in stored(path).items() if row["bit_width"]}
        found[bits] = {name: cosine(TENSORS[name], decoded(row)) for name, row in rows.items()}
    return found


@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_the_width_follows_from_the_cosine(
    source: Path, tmp_path: Path, cosines: dict[int, dict[str, float]], device: str
) -> None:
    result = quantize(source, tmp_path / "out.parquet", device=device, widths=Widths(min_accuracy=LEAST), validate=True)
    rows, table = stored(tmp_path / "out.parquet"), {r["name"]: r for r in result.table.to_pylist()}
    got = {name: row["bit_width"] for name, row in rows.items() if row["bit_width"] is not None}
    assert got == EXPECTED
    for name, bits in got.items():
        row = rows[name]
        # The packed width really is another.
        assert len(row["data"]) == TENSORS[name].size * bits // 8
        assert row["scheme"] == f"int{bits}_channel_asym"
        assert row["reason"] == table[name]["reason"]
        assert cosine(TENSORS[name], decoded(row)) == pytest.approx(table[name]["accuracy"], abs=1e-12)
        assert table[name]["accuracy"] == table[name]["cosine"] >= LEAST
    kept = {name for name, row in rows.items() if row["bit_width"] is None}
    assert all(table[name]["accuracy"] is None and table[name]["entropy"] is None for name in kept)
    # A tensor by itself has the first width that is good enough, as the files without widths show.
    for name in ("layers.0.self_attn.o_proj.weight", "layers.0.mlp.down_proj.weight", "layers.1.mlp.down_proj.weight"):
        assert EXPECTED[name] == next(b for b in (2, 4, 8) if cosines[b][name] >= LEAST)
    (manifest,) = tmp_path.glob("*.manifest.parquet")
    assert pq.read_table(manifest).select(["name", "reason", "accuracy", "entropy"]).to_pylist() == [
        {key: row[key] for key in ("name", "reason", "accuracy", "entropy")} for row in result.table.to_pylist()
    ]


def test_reasons_say_what_was_measured(source: Path, cosines: dict[int, dict[str, float]]) -> None:
    found = reasons(planned(source, widths=Widths(min_accuracy=LEAST)))

    def under(name: str, bits: int) -> str:
        return f"cosine {cosines[bits][name]:.6f} at {bits} bits is under 0.7"

    attention, mlp = "layers.0.self_attn.", "layers.0.mlp."
    k, gate, down = f"{attention}k_proj.weight", f"{mlp}gate_proj.weight", "layers.1.mlp.down_proj.weight"
    up = f"{mlp}up_proj.weight"
    assert found[f"{attention}o_proj.weight"] == found["zero.weight"] == "linear weight"
    assert found[k] == f"linear weight; {under(k, 2)}: 4 bits"
    assert found[down] == f"linear weight; {under(down, 2)}; {under(down, 4)}: 8 bits"
    fused = f"linear weight; one scheme with {k}, which is fused with it: 4 bits"
    assert found[f"{attention}q_proj.weight"] == found[f"{attention}v_proj.weight"] == fused
    assert found[gate] == f"linear weight; {under(gate, 2)}; {under(gate, 4)}: 8 bits"
    assert found[up] == f"linear weight; {under(up, 2)}; one scheme with {gate}, which is fused with it: 8 bits"
    assert found["lm_head.weight"] == "output head"
    assert found["empty.weight"] == "empty"


def test_a_width_between_goes_to_the_next_of_the_ladder(source: Path, cosines: dict[int, dict[str, float]]) -> None:
    name = "layers.0.mlp.down_proj.weight"
    least = (cosines[3][name] + cosines[4][name]) / 2
    widths = Widths(min_accuracy=least)
    assert schemes(planned(source, "int3_channel_asym", widths=widths))[name] == "int4_channel_asym"
    widths = Widths(min_accuracy=cosines[3][name] * 0.999)
    assert schemes(planned(source, "int3_channel_asym", widths=widths))[name] == "int3_channel_asym"


def test_under_the_least_accuracy_at_8_bits_too_it_is_kept(
    source: Path, tmp_path: Path, cosines: dict[int, dict[str, float]]
) -> None:
    """With its original bytes; and with it what it is fused with."""
    least = (cosines[8]["layers.0.mlp.gate_proj.weight"] + cosines[8]["layers.0.mlp.up_proj.weight"]) / 2
    result = quantize(source, tmp_path / "out.parquet", widths=Widths(min_accuracy=least))
    rows, table = stored(tmp_path / "out.parquet"), {r["name"]: r for r in result.table.to_pylist()}
    gate, up = "layers.0.mlp.gate_proj.weight", "layers.0.mlp.up_proj.weight"
    for name in (gate, up, "layers.1.mlp.down_proj.weight"):
        assert (rows[name]["quant_type"], rows[name]["data"]) == ("none", TENSORS[name].tobytes())
        assert table[name]["accuracy"] == pytest.approx(cosines[8][name], abs=1e-12)
        assert table[name]["reason"].endswith(": kept")
    assert f"{cosines[8][gate]:.6f} at 8 bits is under" in table[gate]["reason"]
    assert table[up]["reason"].endswith(f"; one scheme with {gate}, which is fused with it: kept")
    assert rows["layers.0.mlp.down_proj.weight"]["bit_width"] == 8
    assert verify_checkpoint(tmp_path / "out.parquet", source, min_cosine=least, device="cpu").failed == ()


def test_entropy_gives_the_first_width(source: Path, tmp_path: Path) -> None:
    result = quantize(source, tmp_path / "out.parquet", widths=Widths(entropy=True))
    rows, table = stored(tmp_path / "out.parquet"), {r["name"]: r for r in result.table.to_pylist()}
    got = {name: row["bit_width"] for name, row in rows.items() if row["bit_width"] is not None}
    alone = {}
    for name in got:
        h = entropy(TENSORS[name])
        assert table[name]["entropy"] == pytest.approx(h, abs=1e-4)
        assert table[name]["accuracy"] is None
        assert f"linear weight; entropy {table[name]['entropy']:.6f}" in table[name]["reason"]
        alone[name] = 8 if h < 0.5 else 4 if h < 0.7 else 2
        assert len(rows[name]["data"]) == TENSORS[name].size * got[name] // 8
    assert set(alone.values()) == {2, 4, 8}
    assert alone["zero.weight"] == alone["constant.weight"] == 8
    fused = [[n for n in alone if part in n] for part in ("layers.0.self_attn.", "layers.0.mlp.")]
    fused = [[n for n in names if not n.endswith(("o_proj.weight", "down_proj.weight"))] for names in fused]
    assert list(map(len, fused)) == [3, 2]
    for names in fused:
        alone |= dict.fromkeys(names, max(alone[n] for n in names))
    assert got == alone


@pytest.mark.parametrize(("n_values", "bits"), [(1, 8), (15, 8), (16, 4), (48, 4), (49, 2), (256, 2)])
def test_the_bounds_of_entropy(tmp_path: Path, n_values: int, bits: int) -> None:
    """n values that are equally often, each in a bin of its own, have an entropy of log(n) / log(256)."""
    values = np.append(np.arange(n_values - 1), 255 if n_values > 1 else 0).astype(np.float32)
    path = write_safetensors(tmp_path / "m.safetensors", {"a.weight": np.tile(values, (4, 4))})
    plan = planned(path, widths=Widths(entropy=True))
    assert plan.measured["a.weight"].entropy == pytest.approx(math.log(n_values, 256), abs=1e-12)
    assert schemes(plan) == {"a.weight": f"int{bits}_channel_asym"}


@pytest.mark.parametrize("order", ["kqv", "qvk", "vkq"])
def test_the_widest_part_may_be_any(tmp_path: Path, order: str) -> None:
    tensors = dict(zip([f"a.{p}_proj.weight" for p in order], [NORMAL, PEAKED, NORMAL * 2], strict=True))
    path = write_safetensors(tmp_path / "m.safetensors", tensors)
    widest = f"a.{order[1]}_proj.weight"
    plan = planned(path, widths=Widths(entropy=True))
    assert set(schemes(plan).values()) == {"int8_channel_asym"}
    assert {n for n, r in reasons(plan).items() if f"one scheme with {widest}" in r} == tensors.keys() - {widest}


def test_a_cosine_raises_what_entropy_gave(source: Path, cosines: dict[int, dict[str, float]]) -> None:
    name = "layers.0.self_attn.o_proj.weight"
    least = (cosines[2][name] + cosines[4][name]) / 2
    plan = planned(source, "int8_channel_asym", widths=Widths(min_accuracy=least, entropy=True))
    assert schemes(plan)[name] == "int4_channel_asym"
    h = plan.measured[name].entropy
    words = f"linear weight; entropy {h:.6f}; cosine {cosines[2][name]:.6f} at 2 bits is under {least:g}: 4 bits"
    assert reasons(plan)[name] == words


# Sensitive matrices.


def test_sensitive_matrices_are_raised(source: Path) -> None:
    widths = Widths(sensitive="raise")
    plan = planned(source, ignore=["lm_head"], widths=widths)
    assert schemes(plan)["embed_tokens.weight"] == "int8_channel_asym"
    assert schemes(plan)["layers.0.self_attn.o_proj.weight"] == "int2_channel_asym"
    assert schemes(plan)["lm_head.weight"] is schemes(plan)["layers.0.norm.weight"] is None
    found = reasons(plan)
    assert found["embed_tokens.weight"] == "embedding, raised to 8 bits"
    assert found["lm_head.weight"] == "ignored by --ignore lm_head"
    assert found["layers.0.norm.weight"].startswith("0-D or 1-D")
    assert schemes(planned(source))["embed_tokens.weight"] is None


def test_entropy_does_not_lower_them_and_a_least_accuracy_holds_for_them(source: Path) -> None:
    plan = planned(source, widths=Widths(min_accuracy=0.9, entropy=True, sensitive="raise"))
    assert schemes(plan)["embed_tokens.weight"] == schemes(plan)["lm_head.weight"] == "int8_channel_asym"
    assert plan.measured["embed_tokens.weight"].entropy is None
    assert plan.measured["embed_tokens.weight"].accuracy > 0.999
    best = planned(source, widths=Widths(min_accuracy=0.999999999, sensitive="raise"))
    assert schemes(best)["embed_tokens.weight"] is None
    assert reasons(best)["embed_tokens.weight"].startswith("embedding, raised to 8 bits; cosine 0.99")


def test_only_matrices_are_raised(tmp_path: Path) -> None:
    tensors = {"pos_embed.weight": NORMAL[None], "embed.bias": NORMAL, "embed.weight": NORMAL, "norm.weight": NORMAL[0]}
    plan = planned(write_safetensors(tmp_path / "m.safetensors", tensors), widths=Widths(sensitive="raise"))
    assert {n for n, s in schemes(plan).items() if s is not None} == {"embed.weight"}


def test_a_model_of_nothing_else_has_something_to_quantize(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "m.safetensors", {"embed.weight": NORMAL, "pooler.dense.weight": NORMAL})
    assert set(schemes(planned(path, widths=Widths(sensitive="raise"))).values()) == {"int8_channel_asym"}


# Errors.


@pytest.mark.parametrize("least", [0, -0.5, 1.0001, math.nan, math.inf])
def test_a_least_accuracy_is_a_cosine(least: float) -> None:
    with pytest.raises(InputError, match="min_accuracy"):
        Widths(min_accuracy=least)


def test_other_words_and_half_a_choice_are_refused() -> None:
    with pytest.raises(InputError, match="'sometimes': choose keep or raise"):
        Widths(sensitive="sometimes")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="it needs a min_accuracy"):
        Widths(fail_fast=True)
    assert not Widths(sensitive="raise").is_measured


@pytest.mark.parametrize("threads", [1, 4])
def test_fail_fast_is_the_first_tensor_of_the_plan(
    source: Path, tmp_path: Path, cosines: dict[int, dict[str, float]], threads: int
) -> None:
    first = next(n for n in schemes(planned(source)) if cosines[2].get(n, 1) < LEAST and EXPECTED.get(n))
    with nothing_changes(tmp_path), pytest.raises(QualityError) as caught:
        quantize(source, tmp_path / "o", widths=Widths(min_accuracy=LEAST, fail_fast=True), threads=threads)
    assert (caught.value.name, caught.value.min_accuracy) == (first, LEAST)
    assert caught.value.cosine == pytest.approx(cosines[2][first], abs=1e-12)
    for word in (first, f"{cosines[2][first]:.6f}", "0.7", "int2_channel_asym", "--min-accuracy"):
        assert word in str(caught.value)


def test_fail_fast_lets_good_tensors_pass(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "o", "int8_channel", widths=Widths(min_accuracy=0.9, fail_fast=True))
    assert stored(tmp_path / "o")["layers.0.mlp.gate_proj.weight"]["bit_width"] == 8


def test_an_accuracy_that_nothing_reaches_names_the_best(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "m.safetensors", {"a.weight": SPIKY, "b.weight": NORMAL, "c.weight": PEAKED})
    with nothing_changes(tmp_path), pytest.raises(QualityError, match=r"^b\.weight: .* best of 3 tensors") as caught:
        quantize(path, tmp_path / "o", widths=Widths(min_accuracy=1.0))
    assert 0.9999 < caught.value.cosine < 1


@pytest.mark.parametrize("asked", [Widths(entropy=True), Widths(min_accuracy=0.5)])
@pytest.mark.parametrize("scheme", ["int2_channel_asym", "int4_tensor"])
def test_weights_that_are_not_finite_are_the_error_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: Widths, scheme: str
) -> None:
    monkeypatch.setattr(widths, "BLOCK_WEIGHTS", LENGTH)
    x = NORMAL.copy()
    x[1, 7] = x[3, 9] = np.nan
    x[2, 0] = -np.inf
    path = write_safetensors(tmp_path / "m.safetensors", {"a.weight": NORMAL, "b.weight": x})
    with nothing_changes(tmp_path), pytest.raises(NonFiniteError) as of_run:
        quantize(path, tmp_path / "o", scheme)
    with pytest.raises(NonFiniteError) as of_plan:
        planned(path, scheme, widths=asked)
    assert str(of_plan.value) == str(of_run.value)
    assert "b.weight: 2 NaN and 1 infinite values" in str(of_plan.value)
    assert f"flat index {LENGTH + 7} of" in str(of_plan.value)


def test_a_tensor_of_zeros_is_good_at_any_width(source: Path) -> None:
    plan = planned(source, widths=Widths(min_accuracy=LEAST))
    assert plan.measured["zero.weight"].accuracy == 1.0
    assert plan.measured["constant.weight"].accuracy == pytest.approx(1, abs=1e-12)
    assert planned(source, widths=Widths(entropy=True)).measured["zero.weight"].entropy == 0.0


# One plan, however it is measured.


def test_backends_threads_and_blocks_give_the_same_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = Widths(min_accuracy=LEAST, entropy=True, sensitive="raise")
    made = []
    runs: list[dict[str, Any]] = [
        {"device": "cpu", "threads": 1},
        {"device": "cpu", "threads": 3},
        {"device": "reference"},
        {"device": "reference,cpu", "threads": 2},
        {"device": "cpu", "memory_limit": 1 << 31},
    ]
    for i, options in enumerate([*runs, runs[0]]):
        if i == len(runs):
            monkeypatch.setattr(widths, "BLOCK_WEIGHTS", 2 * LENGTH + 1)
        (tmp_path / str(i)).mkdir()
        quantize(source, tmp_path / str(i) / "out", widths=chosen, **options)
        made.append(snapshot(tmp_path / str(i)))
    assert len(made[0]) == 2
    for other in made[1:]:
        assert differences(made[0], other) == []


class Remote(ReferenceBackend):
    """Computes like a GPU: away from the host's arrays, and for one thread at a time."""

    name = "cuda"

    def __init__(self) -> None:
        self.n_calls, self._is_busy = 0, threading.Lock()

    def put(self, x: np.ndarray) -> np.ndarray:
        return x.copy()

    def quantize(self, *args: Any) -> Any:
        if not self._is_busy.acquire(blocking=False):
            raise RuntimeError("two threads at once")
        try:
            self.n_calls += 1
            time.sleep(0.002)
            return super().quantize(*args)
        finally:
            self._is_busy.release()


def test_gpus_share_the_tensors_one_thread_each(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = {f"cuda:{i}": Remote() for i in range(2)}
    monkeypatch.setattr(widths, "get_backend", lambda name, threads: remote[name])
    sink, checkpoint = Narrow(set()), open_checkpoint(source)
    plan = make_plan(checkpoint, sink, "int2_channel_asym")
    got = revise(plan, checkpoint, sink, Widths(min_accuracy=LEAST), devices=list(remote))
    monkeypatch.undo()
    want = revise(plan, checkpoint, sink, Widths(min_accuracy=LEAST))
    assert (got.entries, got.measured) == (want.entries, want.measured)
    assert all(backend.n_calls for backend in remote.values())


@pytest.mark.parametrize("scheme", ["int2_tensor", "int3_g40_asym", "int4_tensor_asym_f16", "int2_g128_bf16"])
def test_the_accuracy_is_the_cosine_that_validation_finds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """For every granularity and dtype, for tensors in several pieces, and for rows that are cut."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1 << 13)
    monkeypatch.setattr(widths, "BLOCK_WEIGHTS", 1 << 10)
    tensors = {
        "a.weight": RNG.standard_t(4, (40, 300)).astype(np.float32),
        "b.weight": RNG.standard_normal((3, 5000)),
        "c.weight": RNG.standard_normal((30, 129)).astype(ml_dtypes.bfloat16),
        "d.weight": RNG.standard_normal((33, 64)).astype(ml_dtypes.float8_e4m3fn),
        "m.experts.w1": RNG.standard_normal((4, 32, 96)).astype(np.float16),
    }
    path = write_safetensors(tmp_path / "m.safetensors", tensors)
    table = quantize(path, tmp_path / "o", scheme, widths=Widths(min_accuracy=1e-9), validate=True).table
    assert table["accuracy"].null_count == 0
    assert table["accuracy"].to_pylist() == table["cosine"].to_pylist()
    assert table["scheme"].unique().to_pylist() == [scheme]


def test_progress_is_of_the_measuring_and_then_of_the_run(source: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    quantize(source, tmp_path / "o", widths=Widths(min_accuracy=LEAST), progress=lambda *a: seen.append(a))
    measured, total = seen[: len(EXPECTED)], sum(TENSORS[n].nbytes for n in EXPECTED)
    assert sorted(name for _, _, name in measured) == sorted(EXPECTED)
    done = [d for d, _, _ in measured]
    assert (done, done[-1]) == (sorted(done), total)
    assert {t for _, t, _ in measured} == {total}
    whole = sum(t.nbytes for t in TENSORS.values())
    assert seen[-1][:2] == (whole, whole)
    seen.clear()
    planned(source, widths=Widths(entropy=True), progress=lambda *a: seen.append(a))
    assert seen[-1][:2] == (total, total)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_measuring_is_interrupted_by_progress(source: Path, tmp_path: Path, error: type[BaseException]) -> None:
    def progress(done: int, total: int, name: str) -> None:
        raise error

    with nothing_changes(tmp_path), pytest.raises(error):
        quantize(source, tmp_path / "o", widths=Widths(min_accuracy=LEAST), progress=progress)
    assert not [t for t in threading.enumerate() if t.name.startswith("arrowquant-widths")]


def test_an_interrupted_measuring_ends_within_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    n_rows, n_read, real = 400, 0, widths.block_of

    def slow_block(*args: Any) -> Any:
        nonlocal n_read
        n_read += 1
        time.sleep(0.003)
        return real(*args)

    def progress(done: int, total: int, name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(widths, "BLOCK_WEIGHTS", 8)
    monkeypatch.setattr(widths, "block_of", slow_block)
    tensors = {"a.weight": np.ones((1, 8), np.float32), "b.weight": np.ones((n_rows, 8), np.float32)}
    path = write_safetensors(tmp_path / "m.safetensors", tensors)
    with pytest.raises(KeyboardInterrupt):
        planned(path, widths=Widths(min_accuracy=LEAST), progress=progress)
    assert n_read < n_rows


def test_measuring_is_planning_in_a_timeline(source: Path, tmp_path: Path) -> None:
    with trace.timeline(tmp_path / "t.json") as recorded:
        planned(source, widths=Widths(min_accuracy=LEAST))
    assert recorded.summary()["categories"].keys() == {"plan"}
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert {e["name"] for e in events if e["ph"] == "X"} >= EXPECTED.keys()


# Interrupted runs.


def test_a_killed_run_is_continued(source: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"format": "parquet", "widths": Widths(min_accuracy=LEAST), "scheme": "int2_channel_asym"}
    for name in ("whole", "killed", "stopped"):
        (tmp_path / name).mkdir()
    run(source, tmp_path / "whole" / "out", **options)
    want, target = snapshot(tmp_path / "whole"), tmp_path / "killed" / "out"
    # Each a little later than the one before, until one had finished a tensor.
    for i in range(1, 100):
        assert killed(source, target, seconds=i / 10, pause=slow, resume=True, **options)
        if n_noted(target):
            break
    assert 1 <= run(source, target, resume=True, **options).run.resumed < len(TENSORS)
    assert differences(snapshot(tmp_path / "killed"), want) == []
    with pytest.raises(KeyboardInterrupt):
        run_until(source, tmp_path / "stopped" / "out", 3, KeyboardInterrupt(), **options)
    with nothing_changes(tmp_path), pytest.raises(TargetError, match=r"cannot be continued: .*widths"):
        run(source, tmp_path / "stopped" / "out", resume=True, **{**options, "widths": Widths(min_accuracy=0.95)})
    assert run(source, tmp_path / "stopped" / "out", resume=True, **options).run.resumed >= 3
    assert differences(snapshot(tmp_path / "stopped"), want) == []


def test_the_choice_travels_to_another_process() -> None:
    chosen = Widths(0.5, entropy=True, sensitive="raise", fail_fast=True)
    assert pickle.loads(pickle.dumps(chosen)) == chosen


# compressed-tensors.


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of which some matrices have a few large weights."""
    path = tiny_llama(tmp_path_factory.mktemp("model") / "llama", dtype="float32", hidden=128, vocab=512)
    file = path / "model.safetensors"
    raw = bytearray(file.read_bytes())
    checkpoint = open_checkpoint(file)
    for name, height in (("layers.0.self_attn.k_proj", 0.5), ("layers.1.mlp.down_proj", 0.5)):
        info = checkpoint.tensors[f"model.{name}.weight"]
        x = np.frombuffer(raw, np.float32, math.prod(info.shape), info.offset).reshape(info.shape)
        x[:, 3] = height
    file.write_bytes(raw)
    return path


def test_compressed_tensors_names_the_modules_of_each_width(model: Path, tmp_path: Path) -> None:
    plan = quantize(model, tmp_path / "out", "int2_g32", widths=Widths(min_accuracy=0.85)).plan
    assert plan.summary["stored_schemes"] == ["int2_g32", "int4_g32"]
    wider = [f"model.layers.0.self_attn.{p}_proj" for p in "kqv"] + ["model.layers.1.mlp.down_proj"]
    assert [n for n, s in schemes(plan).items() if s == "int4_g32"] == [f"{name}.weight" for name in wider]
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert [g["weights"]["num_bits"] for g in groups.values()] == [2, 4]
    assert groups["group_1"]["targets"] == wider
    assert len(groups["group_0"]["targets"]) == 10
    checkpoint = CompressedTensorsCheckpoint(tmp_path / "out")
    assert {n: e.scheme and e.scheme.id for n, e in checkpoint.entries.items()} == schemes(plan)
    # Words of 32 bits hold 16 codes, or 8.
    for name, per_word in (("model.layers.0.self_attn.o_proj", 16), ("model.layers.0.self_attn.q_proj", 8)):
        assert checkpoint.headers[f"{name}.weight_packed"].shape == (128, 128 // per_word)
    assert verify_checkpoint(tmp_path / "out", model, min_cosine=0.85, device="cpu").failed == ()


def test_an_embedding_is_kept_where_its_readers_decode_none(model: Path, tmp_path: Path) -> None:
    plan = quantize(model, tmp_path / "out", "int4_g32", widths=Widths(sensitive="raise")).plan
    assert schemes(plan)["lm_head.weight"] == "int8_g32"
    assert schemes(plan)["model.embed_tokens.weight"] is None
    assert "embedding" in reasons(plan)["model.embed_tokens.weight"]


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scheme", ["int2_g32", "int2_g64"])
def test_transformers_reads_several_widths(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    from arrowquant_gpu import dequantize_checkpoint

    from .real_loaders.transformers_models import plain

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    chosen = Widths(min_accuracy=0.85, sensitive="raise")
    assert len(quantize(model, tmp_path / "out", scheme, widths=chosen).plan.summary["stored_schemes"]) == 3
    dequantize_checkpoint(tmp_path / "out", tmp_path / "back", device="cpu")
    np.testing.assert_array_equal(plain(tmp_path / "out", "float32"), plain(tmp_path / "back", "float32"))


# Sinks and entries of other kinds.


class Narrow(PlainSink):
    """A sink that refuses some widths."""

    def __init__(self, refused: set[int]) -> None:
        super().__init__(Output("/nonexistent/out", is_directory=True))
        self.refused = refused

    def scheme_for(self, info: TensorInfo, scheme: Scheme) -> Scheme:
        if scheme.bits in self.refused:
            raise FormatError(f"no {scheme.bits} bits here")
        return scheme


def revised(path: Path, sink: PlainSink, chosen: Widths, scheme: str = "int2_channel_asym") -> Plan:
    source = open_checkpoint(path)
    return revise(make_plan(source, sink, scheme), source, sink, chosen)


def test_a_width_that_the_sink_refuses_is_passed_over(source: Path) -> None:
    plan = revised(source, Narrow({4}), Widths(min_accuracy=LEAST))
    name = "layers.0.mlp.down_proj.weight"
    assert schemes(plan)[name] == "int8_channel_asym"
    assert reasons(plan)[name].endswith("; not with 4 bits: no 4 bits here: 8 bits")
    kept = revised(source, Narrow({4, 8}), Widths(min_accuracy=LEAST))
    assert schemes(kept)[name] is None
    assert reasons(kept)[name].endswith("no 4 bits here; not with 8 bits: no 8 bits here: kept")
    assert schemes(kept)["zero.weight"] == "int2_channel_asym"


def test_where_the_sink_refuses_every_width_that_entropy_gives(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "m.safetensors", {"a.weight": np.zeros((4, 64), np.float32)})
    with pytest.raises(FormatError, match=r"plain can carry none of the 1 tensors to quantize.*no 8 bits here"):
        revised(path, Narrow({8}), Widths(entropy=True))


def test_fused_groups() -> None:
    names = [f"l.{i}.{p}.weight" for i in (0, 1) for p in ("q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3")]
    names += [f"m.experts.{i}.{p}.weight" for i in (0, 1) for p in ("w1", "w2")] + ["m.w1", "q_proj.weight"]
    want = [[0, 1, 2], [3], [4, 6], [5], [7, 8, 9], [10], [11, 13], [12], [14, 15, 16, 17], [18], [19]]
    assert find(None, names).fused_groups(names) == [[names[i] for i in group] for group in want]


def divided(source: Any, sink: PlainSink, divisors: np.ndarray) -> Plan:
    """A plan whose one tensor has divisors."""
    plan = make_plan(source, sink, "int2_channel_asym")
    spatial = diffusion_columns.to_json(diffusion_columns.Spatial(divisors))
    (entry,) = plan.entries
    entry = dataclasses.replace(entry, diffusion=Diffusion("image", divisors, spatial=spatial))
    return dataclasses.replace(plan, entries=(entry,))


def test_divided_weights_are_measured_as_they_are_recovered(tmp_path: Path) -> None:
    x, divisors = NORMAL * np.linspace(1, 40, LENGTH, dtype=np.float32), np.linspace(1, 40, LENGTH, dtype=np.float32)
    source = open_checkpoint(write_safetensors(tmp_path / "m.safetensors", {"a.weight": x}))
    sink = Narrow(set())
    plan = revise(divided(source, sink, divisors), source, sink, Widths(min_accuracy=0.5, entropy=True))
    quotients = write_safetensors(tmp_path / "q.safetensors", {"a.weight": x / divisors})
    quantize(quotients, tmp_path / "q.parquet")
    y = decoded(stored(tmp_path / "q.parquet")["a.weight"]) * divisors
    assert plan.measured["a.weight"].accuracy == pytest.approx(cosine(x, y), abs=1e-9)
    assert plan.measured["a.weight"].entropy == pytest.approx(entropy(x / divisors), abs=1e-4)
    assert plan.entries[0].diffusion is not None
    assert plan.entries[0].diffusion.divisors is divisors


def test_what_is_kept_is_not_divided(tmp_path: Path) -> None:
    tensors = {"a.weight": PEAKED, "b.weight": np.zeros((6, LENGTH), np.float32)}
    source = open_checkpoint(write_safetensors(tmp_path / "m.safetensors", tensors))
    sink = Narrow(set())
    plan = make_plan(source, sink, "int2_channel_asym")
    divisors = np.full(LENGTH, 2, np.float32)
    spatial = diffusion_columns.to_json(diffusion_columns.Spatial(divisors))
    entries = tuple(dataclasses.replace(e, diffusion=Diffusion("image", divisors, "t", spatial)) for e in plan.entries)
    a, b = revise(dataclasses.replace(plan, entries=entries), source, sink, Widths(min_accuracy=0.99999)).entries

    def of(entry: Entry) -> Diffusion:
        assert entry.diffusion is not None
        assert entry.diffusion.spatial is not None
        return entry.diffusion

    assert (a.scheme, of(a).divisors, diffusion_columns.divisors_of(of(a).spatial)) == (None, None, None)
    assert (of(a).time_aware, of(a).modality) == ("t", "image")
    assert b.scheme is not None
    assert of(b).divisors is divisors


# Against a search by hand.


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 1 << 32),
    heights=st.lists(st.floats(0, 200), min_size=1, max_size=4),
    least=st.floats(0.2, 1),
    bits=st.sampled_from([2, 3, 4, 5, 8]),
    grain=st.sampled_from(["g16", "channel_asym", "tensor"]),
)
def test_any_tensors(
    tmp_path_factory: pytest.TempPathFactory, seed: int, heights: list[float], least: float, bits: int, grain: str
) -> None:
    """The first width of the ladder whose cosine is enough, by files of every width."""
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("any")
    tensors = {f"t{i}.weight": rng.standard_normal((3, 96), np.float32) for i in range(len(heights))}
    for x, height in zip(tensors.values(), heights, strict=True):
        x[0, 0] = height
    path = write_safetensors(folder / "m.safetensors", tensors)
    ladder = [bits, *(b for b in (2, 4, 8) if b > bits)]
    found: dict[str, list[float]] = {name: [] for name in tensors}
    for b in ladder:
        quantize(path, folder / str(b), f"int{b}_{grain}", threads=1)
        for name, row in stored(folder / str(b)).items():
            found[name].append(cosine(tensors[name], decoded(row)))
    want = {
        name: next((f"int{b}_{grain}" for b, c in zip(ladder, of, strict=True) if c >= least), None)
        for name, of in found.items()
    }
    # A cosine that is the threshold but for its last bits is anybody's.
    near = {name for name, of in found.items() if min(abs(c - least) for c in of) < 1e-12}
    try:
        got = schemes(planned(path, f"int{bits}_{grain}", widths=Widths(min_accuracy=least), threads=1))
    except QualityError:
        got = dict.fromkeys(want)
    assert {n: s for n, s in got.items() if n not in near} == {n: s for n, s in want.items() if n not in near}
    shutil.rmtree(folder)
