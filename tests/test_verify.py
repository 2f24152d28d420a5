"""Quantized checkpoints against their originals: what is right passes, every planted fault is named."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from arrowquant_gpu import quantize_checkpoint, reference, verify_checkpoint
from arrowquant_gpu.errors import InputError, SourceError, VerifyError
from arrowquant_gpu.formats import pieces as formats_pieces
from arrowquant_gpu.formats.arrow_ipc import ArrowSink
from arrowquant_gpu.formats.checkpoint import open_checkpoint
from arrowquant_gpu.formats.output import Output
from arrowquant_gpu.formats.parquet import ParquetSink
from arrowquant_gpu.pipeline import verify as module
from arrowquant_gpu.pipeline.verify import MIN_COSINE, VerifyReport, steps_off
from arrowquant_gpu.schemes import Scheme
from arrowquant_gpu.tensor import QuantizedTensor

from .cases import SCHEMES, cases, make
from .fixtures import tiny_llama, write_safetensors
from .row_files import Model, write

FORMATS = ("compressed-tensors", "parquet", "parquet-tensors", "arrow")
Q = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama") / "model", "float32", shards=2)


@pytest.fixture(scope="module")
def packed(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed-tensors directory, which has no hashes: what is wrong in it must be found in the weights."""
    target = tmp_path_factory.mktemp("packed") / "model"
    quantize_checkpoint(llama, target, "int4_g32_asym", device="reference")
    return target


def verify(target: Path, against: Path, **options: object) -> VerifyReport:
    return verify_checkpoint(target, against, device="reference", **options)


def quantize(x: np.ndarray, scheme: Scheme, dtype: str = "float32") -> QuantizedTensor:
    packed, scales, zeros, _ = reference.quantize(x, scheme)
    return QuantizedTensor(packed, scales, zeros, x.shape, scheme, dtype)


def decode(q: QuantizedTensor) -> np.ndarray:
    return reference.dequantize(q.packed, q.scales, q.zeros, q.scheme, q.shape[1])


@pytest.mark.parametrize("scheme", ["int4_g32", "int8_channel_asym", "int2_g16_asym"])
@pytest.mark.parametrize("format_name", FORMATS)
def test_what_is_right_passes(llama: Path, tmp_path: Path, format_name: str, scheme: str) -> None:
    target = tmp_path / "m"
    quantize_checkpoint(llama, target, scheme, format=format_name, device="reference")
    report = verify(target, llama)
    report.check()
    assert report.failed == ()
    assert report.sentence.endswith(f"all 21 tensors agree with {llama}")
    assert (report.summary["n_quantized"], report.summary["n_tensors"]) == (14, 21)
    cosines = [f.cosine for f in report.findings if f.action == "quantized"]
    assert cosines == sorted(cosines)
    assert report.summary["worst_cosine"] == cosines[0] == report.findings[0].cosine
    assert report.table.num_rows == 21
    assert report.table["problem"].null_count == 21
    assert {f.action for f in report.findings[14:]} == {"kept"}


def test_figures_are_those_of_their_definitions(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((40, 96), np.float32)
    write_safetensors(tmp_path / "m.safetensors", {"a.q_proj.weight": x})
    quantize_checkpoint(tmp_path / "m.safetensors", tmp_path / "m.parquet", "int3_g32", device="reference")
    found = verify(tmp_path / "m.parquet", tmp_path / "m.safetensors").findings[0]
    q = quantize(x, Scheme.parse("int3_g32"))
    a, b = x.astype(np.float64), decode(q).astype(np.float64)
    assert found.cosine == pytest.approx(np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b), rel=1e-12)
    assert found.sqnr_db == pytest.approx(10 * np.log10(np.sum(a * a) / np.sum((a - b) ** 2)), rel=1e-12)
    assert found.max_error == np.abs(a - b).max()
    steps = np.abs(a - b).reshape(40, 3, 32).max(axis=2) / q.scales
    assert found.max_steps == pytest.approx(steps.max(), rel=1e-6)
    assert 0.45 < found.max_steps < 0.501


def test_figures_depend_on_nothing_else(
    llama: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither device, threads nor the cutting of the file into rows."""
    findings = {
        verify_checkpoint(packed, llama, device=d, threads=t).findings for d in ("reference", "cpu") for t in (1, 4)
    }
    assert len(findings) == 1
    quantize_checkpoint(llama, tmp_path / "whole.parquet", "int4_g32_asym", format="parquet", device="reference")
    monkeypatch.setattr(formats_pieces, "PIECE_BYTES", 512)
    quantize_checkpoint(llama, tmp_path / "cut.arrow", "int4_g32_asym", format="arrow", device="reference")
    findings |= {verify(tmp_path / name, llama).findings for name in ("whole.parquet", "cut.arrow")}
    assert len(findings) == 1


@pytest.mark.gpu
def test_the_gpu_gives_the_same_figures(llama: Path, packed: Path) -> None:
    gpu = verify_checkpoint(packed, llama, device="cuda", threads=4)
    assert gpu.findings == verify(packed, llama).findings


def test_min_max_keeps_every_weight_within_its_step() -> None:
    """The bound holds for every scheme, dtype and content that is finite when decoded, and it is tight."""
    n, most = 0, 0.0
    for scheme, dtype, shape, content in cases(every=61):
        x = make(content, shape, dtype)
        q, findings = quantize(x, scheme), reference.quantize(x, scheme)[3]
        if findings.n_overflow or not np.isfinite(decode(q)).all():
            continue
        with np.errstate(all="ignore"):
            in_steps, excess = steps_off(x, decode(q), q)
        assert excess.shape == in_steps.shape
        assert not (excess > 0).any(), (scheme.id, dtype, shape, content, in_steps.max(), excess.max())
        n += 1
        most = max(most, float(excess.max(initial=-1.0)))
    assert n > 1500
    assert most > -0.1


@pytest.mark.parametrize("scheme", [s.id for s in SCHEMES[::5]])
def test_one_code_that_is_one_off_is_over_the_bound(scheme: str) -> None:
    s, x = Scheme.parse(scheme), make("normal", (6, 133), "float32")
    q, rng = quantize(x, s), np.random.default_rng(1)
    codes = reference.unpack(q.packed, s.bits, 133)
    bound = steps_off(x, decode(q), q)
    assert not (bound[1] > 0).any()
    signed = (x - decode(q)) / reference.spread(q.scales.astype(np.float32), x.shape, s)
    # Half of a step away in the other direction is as good a code, so take weights that are near their own.
    near = np.argwhere((np.abs(signed) < 0.2) & (codes > 0) & (codes < s.n_levels))
    for row, k in rng.permutation(near)[:5]:
        wrong = codes.copy()
        wrong[row, k] += rng.choice([-1, 1])
        bad = QuantizedTensor(reference.pack(wrong, s.bits), q.scales, q.zeros, x.shape, s, "float32")
        bound = 0.5 + (s.n_levels if q.zeros is not None else s.n_levels / 2) * module.ROUNDOFF[s.scale_dtype]
        if bound < 0.79:
            assert (steps_off(x, decode(bad), bad)[1] > 0).sum() == 1


def edit(model: Path, tensor: str, change: Callable[[np.ndarray], None]) -> None:
    """Change one stored tensor of a safetensors directory in place."""
    for file in model.glob("*.safetensors"):
        with safetensors.safe_open(file, "numpy") as f:
            metadata, tensors = f.metadata(), {k: f.get_tensor(k).copy() for k in f.keys()}  # noqa: SIM118
        if tensor in tensors:
            change(tensors[tensor])
            safetensors.numpy.save_file(tensors, file, metadata)
            return
    raise KeyError(tensor)


def _flip_code(a: np.ndarray) -> None:
    a[17, 3] ^= 1 << 14


def _swap_nibbles(a: np.ndarray) -> None:
    b = a.view(np.uint8)
    b[...] = (b >> 4) | (b << 4)


def _swap_rows(a: np.ndarray) -> None:
    a[[4, 90]] = a[[90, 4]]


def _one_scale(a: np.ndarray) -> None:
    a[100, 1] *= 1.25


def _zero_point(a: np.ndarray) -> None:
    a[2, 1] ^= 1 << 9


FAULTS: tuple[tuple[str, str, Callable[[np.ndarray], None], int], ...] = (
    ("one code", "_packed", _flip_code, 17),
    ("order of the codes of a byte", "_packed", _swap_nibbles, 0),
    ("two rows of codes", "_packed", _swap_rows, 4),
    ("two rows of scales", "_scale", _swap_rows, 4),
    ("one scale", "_scale", _one_scale, 100),
    ("one zero point", "_zero_point", _zero_point, 18),
)


@pytest.mark.parametrize(("part", "fault", "row"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_a_wrong_weight_is_found(
    llama: Path, packed: Path, tmp_path: Path, part: str, fault: Callable[[np.ndarray], None], row: int
) -> None:
    target = Path(shutil.copytree(packed, tmp_path / "m"))
    edit(target, Q + part, lambda a: None)
    verify(target, llama).check()
    edit(target, Q + part, fault)
    report = verify(target, llama)
    assert report.failed == (Q,)
    found = report.findings[0]
    assert found.name == Q
    if found.cosine > MIN_COSINE[4]["group"]:
        assert found.problem.startswith(f"row {row} has a weight further off than rounding explains")
        assert verify(target, llama, within_step=False).failed == ()
    with pytest.raises(VerifyError, match=r"1 of 21 tensors do not agree"):
        report.check()


def test_the_cosine_alone_misses_a_single_code(llama: Path, packed: Path, tmp_path: Path) -> None:
    """Why `within_step` exists."""
    target = Path(shutil.copytree(packed, tmp_path / "m"))
    edit(target, Q + "_packed", _flip_code)
    assert verify(target, llama, within_step=False).failed == ()


@pytest.mark.parametrize("bit", [0, 31])
def test_one_bit_of_a_kept_tensor_is_found(llama: Path, packed: Path, tmp_path: Path, bit: int) -> None:
    target = Path(shutil.copytree(packed, tmp_path / "m"))

    def flip(a: np.ndarray) -> None:
        a.view(np.uint32).reshape(-1)[37] ^= np.uint32(1 << bit)

    edit(target, "model.norm.weight", flip)
    report = verify(target, llama)
    assert report.failed == ("model.norm.weight",)
    assert report.findings[0].problem == "1 of its bytes are not the original's, the first in element 37"


def test_negative_zero_is_not_zero(tmp_path: Path) -> None:
    zeros = {"n": np.zeros(8, np.float32), "a.q_proj.weight": np.eye(64, dtype=np.float32)}
    for name, sign in (("a", 1.0), ("b", -1.0)):
        write_safetensors(tmp_path / f"{name}.safetensors", {**zeros, "n": zeros["n"] * np.float32(sign)})
    quantize_checkpoint(tmp_path / "a.safetensors", tmp_path / "m.parquet", "int4_g32", device="reference")
    assert verify(tmp_path / "m.parquet", tmp_path / "a.safetensors").failed == ()
    assert verify(tmp_path / "m.parquet", tmp_path / "b.safetensors").failed == ("n",)


def test_missing_extra_and_renamed_tensors_are_named(tmp_path: Path) -> None:
    eye, wide = np.eye(64, dtype=np.float32), np.ones((2, 64), np.float32)
    write_safetensors(tmp_path / "a.safetensors", {"a.q_proj.weight": eye, "b.weight": wide, "c": wide[0]})
    quantize_checkpoint(tmp_path / "a.safetensors", tmp_path / "m.parquet", "int8_g32", device="reference")
    original = {"a.q_proj.weight": eye, "x.weight": wide, "y": np.ones(7, np.float32)}
    write_safetensors(tmp_path / "b.safetensors", original)
    report = verify(tmp_path / "m.parquet", tmp_path / "b.safetensors")
    problems = {f.name: (f.action, f.problem) for f in report.findings if f.problem}
    assert problems == {
        "x.weight": ("missing", "it is missing; b.weight has its dtype and shape, was it renamed?"),
        "y": ("missing", "it is missing"),
        "b.weight": (
            "extra",
            "the original has no such tensor; x.weight has its dtype and shape, was it renamed?",
        ),
        "c": ("extra", "the original has no such tensor"),
    }
    assert report.failed == tuple(f.name for f in report.findings[:4])
    assert "4 of 5 tensors do not agree" in report.sentence
    assert "; and 1 more" in report.sentence


def test_another_dtype_or_shape_is_named(tmp_path: Path) -> None:
    tensors = {"a.q_proj.weight": np.eye(64, dtype=np.float32), "n": np.ones((2, 3), np.float32)}
    write_safetensors(tmp_path / "a.safetensors", tensors)
    quantize_checkpoint(
        tmp_path / "a.safetensors", tmp_path / "m.arrow", "int4_g32", format="arrow", device="reference"
    )
    changed = {"a.q_proj.weight": tensors["a.q_proj.weight"].astype(np.float16), "n": tensors["n"].reshape(3, 2)}
    write_safetensors(tmp_path / "b.safetensors", changed)
    report = verify(tmp_path / "m.arrow", tmp_path / "b.safetensors")
    assert {f.name: (f.action, f.problem) for f in report.findings} == {
        "a.q_proj.weight": ("quantized", "its dtype is float32, the original's float16"),
        "n": ("kept", "its shape is [2, 3], the original's [3, 2]"),
    }


def test_thresholds(llama: Path, packed: Path) -> None:
    default = verify(packed, llama)
    assert {f.min_cosine for f in default.findings if f.action == "quantized"} == {MIN_COSINE[4]["group"]}
    strict = verify(packed, llama, min_cosine=0.9999)
    assert len(strict.failed) == 14
    assert strict.findings[0].problem == f"its cosine {strict.findings[0].cosine:.6f} is under 0.9999"
    assert verify(packed, llama, min_cosine=-1).failed == ()
    for wrong in (1.5, math.nan):
        with pytest.raises(InputError, match="a cosine is from -1 to 1"):
            verify(packed, llama, min_cosine=wrong)


@pytest.mark.parametrize("bits", MIN_COSINE)
@pytest.mark.parametrize(
    ("granularity", "size", "shape"),
    [("group", 256, (64, 4096)), ("channel", None, (64, 4096)), ("tensor", None, (512, 4096))],
)
def test_default_thresholds_have_a_margin(
    bits: int, granularity: str, size: int | None, shape: tuple[int, int]
) -> None:
    """Laplace weights, whose tails are heavier than trained layers' usually are, pass; another tensor does not."""
    rng = np.random.default_rng(bits)
    least, f = MIN_COSINE[bits][granularity], np.float64
    for draw in (rng.standard_normal, rng.laplace):
        x = draw(size=shape).astype(np.float32)
        y = decode(quantize(x, Scheme(bits, granularity, size, True, "bfloat16")))
        assert np.vdot(x.astype(f), y.astype(f)) / np.linalg.norm(x.astype(f)) / np.linalg.norm(y.astype(f)) > least
    z = rng.permutation(y.reshape(-1)).reshape(shape)
    assert np.vdot(x.astype(f), z.astype(f)) / np.linalg.norm(x.astype(f)) / np.linalg.norm(z.astype(f)) < least


def test_weights_that_are_not_finite_are_a_problem(tmp_path: Path) -> None:
    x = np.random.default_rng(0).standard_normal((40, 64)).astype(np.float32)
    write_safetensors(tmp_path / "a.safetensors", {"a.q_proj.weight": x})
    quantize_checkpoint(tmp_path / "a.safetensors", tmp_path / "m.parquet", "int4_g32", device="reference")
    for bad in (np.nan, np.inf, -np.inf):
        y = x.copy()
        y[30, 5] = bad
        write_safetensors(tmp_path / "b.safetensors", {"a.q_proj.weight": y})
        report = verify(tmp_path / "m.parquet", tmp_path / "b.safetensors")
        assert report.failed == ("a.q_proj.weight",)
        assert report.findings[0].problem == "row 30 is not finite, in the original or decoded"
        assert math.isnan(report.summary["worst_cosine"])
        report.table.validate(full=True)


def test_a_decoded_infinity_is_a_problem(tmp_path: Path) -> None:
    """The lowest code of weights near the largest float32 is beyond it."""
    x = np.full((1, 64), -3.4e38, np.float32)
    write_safetensors(tmp_path / "a.safetensors", {"a.q_proj.weight": x})
    quantize_checkpoint(tmp_path / "a.safetensors", tmp_path / "m.parquet", "int4_g64", device="reference")
    report = verify(tmp_path / "m.parquet", tmp_path / "a.safetensors")
    assert report.failed == ("a.q_proj.weight",)
    assert report.findings[0].problem == "row 0 is not finite, in the original or decoded"
    assert report.findings[0].sqnr_db == -math.inf


def test_zeros_and_empty_tensors_pass(tmp_path: Path) -> None:
    model = Model()
    for scheme in ("int4_g32", "int8_tensor_asym", "int3_channel_asym"):
        for shape in ((3, 64), (0, 64), (3, 0), (), (5,)):
            model.quantized(f"{scheme} {shape}", np.zeros(shape, np.float32), scheme)
    model.copied("empty", np.empty(0, np.float32), (0,), "float32")
    shapes = {e.info.name: np.zeros(e.info.shape, np.float32) for e in model.entries}
    write_safetensors(tmp_path / "m.safetensors", shapes)
    for sink in (ParquetSink, ArrowSink):
        report = verify(
            write(sink(Output(tmp_path / sink.format, is_directory=False)), model), tmp_path / "m.safetensors"
        )
        assert report.failed == ()
        assert {f.cosine for f in report.findings if f.action == "quantized"} == {1.0}


def test_one_long_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of more weights than a piece holds is compared in parts of whole groups."""
    rng, model = np.random.default_rng(0), Model()
    x = rng.standard_normal(3_000_001).astype(np.float32)
    for scheme in ("int3_g100_asym", "int4_channel", "int5_tensor"):
        model.quantized(scheme, x, scheme)
    model.copied("copied", x, x.shape, "float32")
    write_safetensors(tmp_path / "m.safetensors", {e.info.name: x for e in model.entries})
    monkeypatch.setattr(formats_pieces, "PIECE_BYTES", 1 << 20)
    file = write(ArrowSink(Output(tmp_path / "m.arrow", is_directory=False)), model)
    report = verify(file, tmp_path / "m.safetensors", min_cosine=0.5)
    report.check()
    y = x.copy()
    y[2_900_000] += 1
    write_safetensors(tmp_path / "m.safetensors", {e.info.name: y for e in model.entries})
    report = verify(file, tmp_path / "m.safetensors", min_cosine=0.5)
    assert len(report.failed) == 4


def test_what_cannot_be_read_is_a_source_error(llama: Path, packed: Path, tmp_path: Path) -> None:
    quantize_checkpoint(llama, tmp_path / "m.arrow", "int4_g32", format="arrow", device="reference")
    weights = open_checkpoint(llama).view("model.embed_tokens.weight").tobytes()
    whole = (tmp_path / "m.arrow").read_bytes()
    at = whole.index(weights) + 1000
    (tmp_path / "m.arrow").write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
    with pytest.raises(SourceError, match=r"tensor model\.embed_tokens\.weight: row [0-9]+ is damaged"):
        verify(tmp_path / "m.arrow", llama)
    with pytest.raises(SourceError):
        verify(llama, llama)
    with pytest.raises(SourceError, match="already quantized"):
        verify(packed, packed)


def test_progress_ends_with_everything(llama: Path, packed: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    verify(packed, llama, progress=lambda *call: calls.append(call))
    total = sum(info.n_bytes for info in open_checkpoint(llama).tensors.values())
    assert calls[-1][:2] == (total, total)
    assert len(calls) == 21

    def stop(done: int, total: int, name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify(packed, llama, progress=stop)
