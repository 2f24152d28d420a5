"""Tensors in parts: what is cut, what is read of it, what is refused, and what becomes of it in a GGUF file."""

from __future__ import annotations

import contextlib
import copy
import json
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arrowquant_gpu import dequantize_checkpoint, models, reference, verify_checkpoint
from arrowquant_gpu.engine import Load
from arrowquant_gpu.engine.computed import ComputedReader
from arrowquant_gpu.engine.decoded import DecodedCheckpoint
from arrowquant_gpu.engine.parted import PartedCheckpoint, in_parts
from arrowquant_gpu.errors import FormatError, InputError, SourceError
from arrowquant_gpu.formats import gguf as sink_module
from arrowquant_gpu.formats import pieces as formats_pieces
from arrowquant_gpu.formats.checkpoint import open_checkpoint
from arrowquant_gpu.formats.gguf_file import TYPES, read_header
from arrowquant_gpu.formats.quantized import open_quantized
from arrowquant_gpu.models.parts import Part, Rule, Span, parse_rules
from arrowquant_gpu.models.tables import read
from arrowquant_gpu.pipeline import quantize_checkpoint
from arrowquant_gpu.schemes import Scheme

from . import gguf_by_hand, resumed_runs, tiny_models
from .bitwise import assert_bitwise_equal
from .fixtures import Raw, write_safetensors

RNG = np.random.default_rng(20261122)
KV_B = "model.layers.{}.self_attn.kv_b_proj.weight"
K_B, V_B = KV_B.replace("kv_b", "k_b"), KV_B.replace("kv_b", "v_b")


def by_loops(part: Part, whole: np.ndarray, n: int) -> np.ndarray:
    """The part of a tensor [n * rows, columns] or [n, rows, columns], value by value; always [n, rows, columns]."""
    rows, columns = whole.size // n // whole.shape[-1], whole.shape[-1]
    flat = whole.reshape(-1).tolist()
    kept_rows = [r for r in range(rows) if is_kept(part.rows, r)]
    kept_columns = [c for c in range(columns) if is_kept(part.columns, c)]
    found = []
    for m in range(n):
        for a in kept_columns if part.transposed else kept_rows:
            for b in kept_rows if part.transposed else kept_columns:
                r, c = (b, a) if part.transposed else (a, b)
                found.append(flat[m * rows * columns + r * columns + c])
    inner = (len(kept_columns), len(kept_rows)) if part.transposed else (len(kept_rows), len(kept_columns))
    return np.array(found, whole.dtype).reshape(n, *inner)


def is_kept(span: slice, i: int) -> bool:
    begin, end = span.start or 0, span.stop
    return i >= begin and (end is None or i < end) and (i - begin) % (span.step or 1) == 0


SPANS = st.builds(slice, st.integers(0, 6), st.one_of(st.none(), st.integers(4, 9)), st.integers(1, 3))


@st.composite
def cuts(draw: st.DrawFn) -> tuple[Part, tuple[int, ...], int]:
    """A part, the shape of a tensor that it is of, and of how many matrices."""
    n, rows, columns = draw(st.integers(1, 4)), draw(st.integers(4, 9)), draw(st.integers(4, 9))
    stack, ndim = draw(st.sampled_from([(n, 2), (None, 3), (None, 2)]))
    n = n if stack or ndim == 3 else 1
    part = Part("part", stack, draw(SPANS), draw(SPANS), draw(st.booleans()))
    return part, (n, rows, columns) if ndim == 3 else (n * rows, columns), n


@settings(max_examples=200, deadline=None)
@given(cuts())
def test_a_part_is_what_loops_find(cut: tuple[Part, tuple[int, ...], int]) -> None:
    part, shape, n = cut
    whole = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    want = by_loops(part, whole, n)
    assert part.matrices(shape) == (n, whole.size // n // shape[-1], shape[-1])
    assert_bitwise_equal(part.cut(whole.reshape(part.matrices(shape))), want)
    rows, columns = part.matrices(shape)[1:]
    if want.size and (part.rows.stop or 0) <= rows and (part.columns.stop or 0) <= columns:
        # One matrix that nobody counts stays one.
        assert part.shape(shape) == (want.shape if part.stack or len(shape) == 3 else want.shape[1:])
    else:
        with pytest.raises(FormatError, match=rf"part is rows .* of matrices of {rows} rows and {columns} columns"):
            part.shape(shape)


@pytest.mark.parametrize(
    ("stack", "shape", "words"),
    [
        (3, (64, 8), r"part is a part of a tensor \[64, 8\], which is not 3 matrices"),
        (4, (4, 16, 8), r"\[4, 16, 8\], which is not 4 matrices"),
        (None, (64,), r"\[64\], which is not 1 matrices"),
        (None, (2, 3, 4, 5), r"\[2, 3, 4, 5\]"),
    ],
)
def test_a_shape_that_does_not_fit(stack: int | None, shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(FormatError, match=words):
        Part("part", stack, slice(None), slice(None), False).shape(shape)


RULE = Rule("l.{layer}.a", "heads", Span(begin="nope", end="all", step=2), Span(), True)


def test_sizes_come_from_the_config() -> None:
    want = Part("l.7.a", 4, slice(2, 10, 2), slice(0, None, 1), True)
    assert RULE.part("7", {"heads": 4, "nope": 2, "all": 10}) == want
    assert RULE.part("7", {"text_config": {"heads": 4, "nope": 2, "all": 10}}) == want


@pytest.mark.parametrize("missing", ["heads", "nope", "all"])
@pytest.mark.parametrize("value", [None, 0, -1, True, "4", 2.0])
def test_a_size_that_is_missing(missing: str, value: object) -> None:
    with pytest.raises(FormatError, match=f"config.json has no {missing}, by which tensors are cut into parts"):
        RULE.part("7", {"heads": 4, "nope": 2, "all": 10, missing: value})


def test_rules_of_one_table_are_alike_for_every_architecture_that_has_them() -> None:
    rows = [{"name": "a", "rows": {"end": "n"}, "columns": {"begin": 1, "step": 2}, "stack": "h", "transposed": True}]
    before = copy.deepcopy(rows)
    want = (Rule("a", "h", Span(end="n"), Span(1, None, 2), True),)
    assert parse_rules("x", rows) == parse_rules("x", rows) == want
    assert rows == before
    with pytest.raises(ValueError, match=r"x: rows: .*'stop'"):
        parse_rules("x", [{"name": "a", "rows": {"stop": 1}}])
    with pytest.raises(ValueError, match=r"x: .*'row'"):
        parse_rules("x", [{"name": "a", "row": {"end": 1}}])
    assert "latent_attention" in read("gguf.toml")["parts"]


# The checkpoint.

SHAPES = {"first": (3, 5), "a": (6, 7), "stacked": (2, 5, 4), "last": (9,)}
PARTS = {
    "a": (Part("a0", 2, slice(1, None), slice(None), True), Part("a1", 2, slice(0, 1), slice(0, None, 2), False)),
    "stacked": (Part("s0", None, slice(None, None, 2), slice(None), False),),
}


@pytest.fixture(scope="module", params=["float32", "bfloat16", "uint8"])
def whole(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> tuple[Path, dict[str, Any]]:
    dtype = {"bfloat16": ml_dtypes.bfloat16}.get(request.param, request.param)
    tensors = {n: RNG.integers(0, 200, s).astype(dtype) for n, s in SHAPES.items()}
    folder = tmp_path_factory.mktemp("parted")
    return write_safetensors(folder / "m.safetensors", tensors, {"kept": "yes"}), tensors


def expected(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    found = {}
    for name, x in tensors.items():
        for part in PARTS.get(name, ()):
            found[part.name] = by_loops(part, x, 2)
        if name not in PARTS:
            found[name] = x
    return found


def test_the_parts_are_in_the_place_of_the_tensor(whole: tuple[Path, dict[str, Any]]) -> None:
    source = open_checkpoint(whole[0])
    parted, want = PartedCheckpoint(source, PARTS), expected(whole[1])
    order = [p.name for n in source.tensors for p in PARTS.get(n, (Part(n, None, slice(0), slice(0), False),))]
    assert list(parted.tensors) == order
    at = 0
    for name, info in parted.tensors.items():
        assert (info.name, info.shape, info.n_bytes, info.offset) == (name, want[name].shape, want[name].nbytes, at)
        at += info.n_bytes
        assert_bitwise_equal(parted.view(name), want[name], name)
    assert parted.fingerprint() == source.fingerprint()
    assert (parted.metadata, parted.config, parted.side_files) == (source.metadata, None, source.side_files)
    with pytest.raises(SourceError, match="no tensor 'a'"):
        parted.view("a")
    file = next(iter(parted.tensors.values())).file
    for read_all in (parted.mapped, parted.descriptor):
        with pytest.raises(SourceError, match="its tensors are cut into parts as they are read; choose --read auto"):
            read_all(file)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_of_any_part(whole: tuple[Path, dict[str, Any]], data: st.DataObject) -> None:
    parted, want = PartedCheckpoint(open_checkpoint(whole[0]), PARTS), expected(whole[1])
    name = data.draw(st.sampled_from(sorted(want)))
    n = want[name].nbytes
    begin = data.draw(st.integers(0, n))
    end = data.draw(st.integers(begin, n))
    out = np.full(end - begin, 0xA5, np.uint8)
    parted.read(name, begin, out)
    assert out.tobytes() == want[name].tobytes()[begin:end]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_load_goes_over_the_ends_of_parts(whole: tuple[Path, dict[str, Any]], data: st.DataObject) -> None:
    parted, tensors = PartedCheckpoint(open_checkpoint(whole[0]), PARTS), expected(whole[1])
    everything = b"".join(tensors[name].tobytes() for name in parted.tensors)
    begin = data.draw(st.integers(0, len(everything) - 1))
    n = data.draw(st.integers(1, len(everything) - begin))
    load = Load(next(iter(parted.tensors.values())).file, begin, n, ())
    assert ComputedReader(parted).read(load, np.zeros(n + 7, np.uint8)).tobytes() == everything[begin : begin + n]


def test_values_of_less_than_a_byte_are_not_cut(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "m.safetensors", {"a": Raw("float4_e2m1fn", (6, 8), bytes(24))})
    with pytest.raises(FormatError, match="a is float4_e2m1fn, and cannot be cut into a0"):
        PartedCheckpoint(open_checkpoint(path), PARTS)


def test_a_tensor_of_another_shape(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "m.safetensors", {"a": np.zeros((5, 8), np.float32)})
    with pytest.raises(FormatError, match=r"a0 is a part of a tensor \[5, 8\], which is not 2 matrices"):
        PartedCheckpoint(open_checkpoint(path), PARTS)


# DeepSeek.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deepseek")
    for name, make in tiny_models.DEEPSEEK.items():
        make(folder / name, "bfloat16")
    return folder


def quantize(source: Path, file: Path, scheme: str = "q8_0", device: str = "cpu", **options: Any) -> Path:
    quantize_checkpoint(source, file, scheme, format="gguf", device=device, **options)
    return file


def test_only_where_the_format_wants_it(folder: Path) -> None:
    source = open_checkpoint(folder / "deepseek_v3")
    assert in_parts(source, "compressed-tensors") is source
    names = in_parts(source, "gguf").tensors.keys()
    assert source.tensors.keys() - names == {KV_B.format(i) for i in range(tiny_models.LAYERS)}
    assert names - source.tensors.keys() == {n.format(i) for n in (K_B, V_B) for i in range(tiny_models.LAYERS)}
    # What only predicts further tokens is left out whole.
    assert KV_B.format(tiny_models.LAYERS) in names


def per_head(kv_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """k_b [heads, rank, nope] and v_b [heads, value, rank], row by row."""
    keys, values = [], []
    height = tiny_models.NOPE + tiny_models.VALUE
    for h in range(tiny_models.HEADS):
        rows = [kv_b[h * height + r] for r in range(height)]
        keys.append(np.stack(rows[: tiny_models.NOPE], axis=1))
        values.append(np.stack(rows[tiny_models.NOPE :]))
    return np.stack(keys), np.stack(values)


@pytest.mark.parametrize("model", tiny_models.DEEPSEEK)
@pytest.mark.parametrize("scheme", ["q8_0", "f16"])
def test_a_deepseek(folder: Path, tmp_path: Path, model: str, scheme: str) -> None:
    file = quantize(folder / model, tmp_path / "a.gguf", scheme, device="reference")
    keys, tensors = gguf_by_hand.read(file.read_bytes())
    source = open_checkpoint(folder / model)
    for i in range(tiny_models.LAYERS):
        parts = per_head(np.array(source.view(KV_B.format(i))))
        for name, x in zip(("attn_k_b", "attn_v_b"), parts, strict=True):
            got = tensors[f"blk.{i}.{name}.weight"]
            assert (got.kind, got.shape) == (TYPES[scheme.upper()].id, x.shape)
            packed = reference.quantize(np.ascontiguousarray(x).reshape(-1, x.shape[2]), Scheme.parse(scheme))[0]
            assert got.data == packed.tobytes()
    assert not [name for name in tensors if name.startswith(f"blk.{tiny_models.LAYERS}.") or "kv_b" in name]
    pre = {"deepseek_v2": "deepseek-llm", "deepseek_v3": "deepseek-v3"}[model]
    assert (keys["general.architecture"], keys["tokenizer.ggml.pre"]) == ("deepseek2", pre)
    if model == "deepseek_v3":
        bias = np.array(source.view("model.layers.1.mlp.gate.e_score_correction_bias"))
        assert tensors["blk.1.exp_probs_b.bias"].data == bias.astype(np.float32).tobytes()


def test_small_pieces_and_another_device_make_the_same_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = folder / "deepseek_v3"
    want = quantize(source, tmp_path / "a.gguf", "q4_k_m").read_bytes()
    assert quantize(source, tmp_path / "b.gguf", "q4_k_m", device="reference").read_bytes() == want
    for module in (formats_pieces, sink_module):
        monkeypatch.setattr(module, "PIECE_BYTES", 20_000)
    assert quantize(source, tmp_path / "c.gguf", "q4_k_m").read_bytes() == want


def test_an_interrupted_run_is_continued(folder: Path, tmp_path: Path) -> None:
    options = {"format": "gguf", "scheme": "q8_0"}
    want = resumed_runs.run(folder / "deepseek_v3", tmp_path / "whole.gguf", **options)
    for n in (3, 20):
        with contextlib.suppress(KeyboardInterrupt):
            target = tmp_path / "resumed.gguf"
            resumed_runs.run_until(folder / "deepseek_v3", target, n, KeyboardInterrupt(), resume=True, **options)
    result = resumed_runs.run(folder / "deepseek_v3", tmp_path / "resumed.gguf", resume=True, **options)
    assert want.run.resumed == 0 < 20 <= result.run.resumed
    assert (tmp_path / "resumed.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


@pytest.mark.parametrize("read", ["mapped", "buffered", "direct"])
def test_it_is_read_in_its_own_way_only(folder: Path, tmp_path: Path, read: str) -> None:
    words = f"reader {read}: its tensors are cut into parts as they are read; choose --read auto"
    with pytest.raises(InputError, match=re.escape(words)):
        quantize(folder / "deepseek_v2", tmp_path / "a.gguf", read=read)


@pytest.mark.parametrize("model", tiny_models.DEEPSEEK)
def test_verify_finds_a_part_that_changed(folder: Path, tmp_path: Path, model: str) -> None:
    file = quantize(folder / model, tmp_path / "a.gguf", "q4_k_m")
    report = verify_checkpoint(file, folder / model, device="cpu")
    report.check()
    last = f"model.layers.{tiny_models.LAYERS}."
    omitted = {f.name for f in report.findings if f.action == "omitted"}
    assert omitted == {n for n in open_checkpoint(folder / model).tensors if n.startswith(last)}
    assert bool(omitted) == (model == "deepseek_v3")
    for name, part in (("attn_k_b", K_B), ("attn_v_b", V_B)):
        data = bytearray(file.read_bytes())
        data[read_header(file).tensors[f"blk.1.{name}.weight"].offset + 10] ^= 0x40
        (tmp_path / "b.gguf").write_bytes(data)
        assert verify_checkpoint(tmp_path / "b.gguf", folder / model, device="cpu").failed == (part.format(1),)


def test_only_what_comes_after_the_layers_may_be_left_out(folder: Path, tmp_path: Path) -> None:
    file = quantize(folder / "deepseek_v3", tmp_path / "a.gguf")
    record = json.loads(gguf_by_hand.read(file.read_bytes())[0]["arrowquant.tensors"])
    left_out = next(name for name, row in record.items() if row is None)
    data = file.read_bytes()
    wrong = left_out.replace(f"layers.{tiny_models.LAYERS}.", "layers.1.")
    assert len(wrong) == len(left_out)
    (tmp_path / "b.gguf").write_bytes(data.replace(f'"{left_out}": null'.encode(), f'"{wrong}": null'.encode()))
    with pytest.raises(SourceError, match="has no place for it, and it is needed"):
        open_quantized(tmp_path / "b.gguf")


def test_the_plan_says_what_is_left_out(folder: Path, tmp_path: Path) -> None:
    plan = quantize_checkpoint(folder / "deepseek_v3", tmp_path / "a.gguf", "q8_0", format="gguf", dry_run=True)
    (said,) = (w for w in plan.warnings if "are not in the file" in w)
    assert re.match(r"32 tensors are not in the file \(first: model\.layers\.2\.", said)
    config = json.loads((folder / "deepseek_v2" / "config.json").read_text()) | {"topk_method": "group_limited_greedy"}
    tiny_models.tiny_deepseek_v2(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    plan = quantize_checkpoint(tmp_path / "m", tmp_path / "a.gguf", "q8_0", format="gguf", dry_run=True)
    assert [w for w in plan.warnings if "topk_method" in w] == [
        "config.json has topk_method 'group_limited_greedy': llama.cpp chooses groups by their two best experts, not "
        "by the best."
    ]


@pytest.mark.parametrize("mix", ["q4_k_m", "q3_k_m"])
def test_layers_that_are_left_out_do_not_count_for_a_mix(folder: Path, tmp_path: Path, mix: str) -> None:
    """Without the last layer every tensor has the type that it has with it, and the file is still one of that mix."""
    files = [quantize(folder / "deepseek_v3", tmp_path / "a.gguf", mix)]
    tiny_models.tiny_deepseek_v3(tmp_path / "m")
    source, last = open_checkpoint(tmp_path / "m"), f"model.layers.{tiny_models.LAYERS}."
    tensors = {n: np.array(source.view(n)) for n in source.tensors if not n.startswith(last)}
    write_safetensors(tmp_path / "m" / "model.safetensors", tensors, {"format": "pt"})
    files.append(quantize(tmp_path / "m", tmp_path / "b.gguf", mix))
    (a_keys, a), (b_keys, b) = (gguf_by_hand.read(file.read_bytes()) for file in files)
    assert a == b
    assert a_keys["general.file_type"] == b_keys["general.file_type"] == models.mixes[mix].file_type


@pytest.mark.parametrize("model", tiny_models.DEEPSEEK)
@pytest.mark.parametrize("piece_bytes", [1 << 24, 20_000])
def test_a_deepseek_in_fp8(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, piece_bytes: int
) -> None:
    """As they are published: parts of what is decoded are those of the decoded model."""
    quantize_checkpoint(folder / model, tmp_path / "fp8", "e4m3_b128", format="fp8", device="cpu")
    dequantize_checkpoint(tmp_path / "fp8", tmp_path / "plain", device="cpu")
    monkeypatch.setattr(formats_pieces, "PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(sink_module, "PIECE_BYTES", piece_bytes)
    assert open_quantized(tmp_path / "fp8").entries[KV_B.format(1)].scheme is not None
    source = in_parts(DecodedCheckpoint(open_quantized(tmp_path / "fp8")), "gguf")
    assert isinstance(source, PartedCheckpoint)
    again = quantize(tmp_path / "fp8", tmp_path / "a.gguf", "q4_k", allow_requantize=True)
    plain = quantize(tmp_path / "plain", tmp_path / "b.gguf", "q4_k")
    (a_keys, a), (b_keys, b) = (gguf_by_hand.read(file.read_bytes()) for file in (again, plain))
    assert a == b
    own = ("arrowquant.", "general.name")
    assert {k: v for k, v in a_keys.items() if not k.startswith(own)} == {
        k: v for k, v in b_keys.items() if not k.startswith(own)
    }
    plan = quantize_checkpoint(
        tmp_path / "fp8", tmp_path / "c.gguf", "q4_k", format="gguf", dry_run=True, allow_requantize=True
    )
    assert any("quantized already (fp8: e4m3_b128" in w for w in plan.warnings)


SIZES_AT_ODDS = {
    "qk_nope_head_dim": r"k_b_proj.weight is rows 0 to 1000 and columns .* of matrices of 160 rows and 256 columns",
    "num_attention_heads": r"k_b_proj.weight is a part of a tensor \[640, 256\], which is not 1000 matrices",
}


@pytest.mark.parametrize("missing", SIZES_AT_ODDS)
def test_a_config_without_the_sizes(folder: Path, tmp_path: Path, missing: str) -> None:
    tiny_models.tiny_deepseek_v2(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != missing}))
    with pytest.raises(FormatError, match=f"config.json has no {missing}, by which tensors are cut into parts"):
        quantize(tmp_path / "m", tmp_path / "a.gguf")
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {missing: 1000}))
    with pytest.raises(FormatError, match=SIZES_AT_ODDS[missing]):
        quantize(tmp_path / "m", tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()
