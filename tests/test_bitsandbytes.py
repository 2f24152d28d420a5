"""bitsandbytes output: its bytes by the text of the format, its config, and what bitsandbytes writes and reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arrowquant_gpu import reference
from arrowquant_gpu.dtypes import DTYPES
from arrowquant_gpu.errors import FormatError, SourceError
from arrowquant_gpu.formats import Entry, TensorInfo, stored_model
from arrowquant_gpu.formats import pieces as formats_pieces
from arrowquant_gpu.formats.bitsandbytes import BitsAndBytesSink, dynamic_map, nested_codes, nested_values
from arrowquant_gpu.formats.bitsandbytes_checkpoint import BitsAndBytesCheckpoint
from arrowquant_gpu.formats.output import Output
from arrowquant_gpu.formats.quantized import open_quantized
from arrowquant_gpu.pipeline.verify import verify_checkpoint
from arrowquant_gpu.schemes import Scheme
from arrowquant_gpu.tensor import QuantizedTensor

from . import format_checks
from .bitwise import assert_bitwise_equal
from .model_files import load, model, quantize, rewrite, torch_tensor

RNG = np.random.default_rng(20261124)
DOUBLE = {"double_quant": "true"}
DTYPE_NAMES = ["float32", "float16", "bfloat16"]


def weights_of(shape: tuple[int, int], dtype: str = "float32") -> np.ndarray:
    """Weights whose rows have scales of very different size, and some groups of zeros."""
    x = RNG.standard_normal(shape, np.float32) * np.exp(RNG.standard_normal((shape[0], 1)), dtype=np.float32)
    x[-1, : shape[1] // 2] = 0
    return x.astype(DTYPES[dtype].numpy)


def write(folder: Path, weights: np.ndarray, scheme: str, **options: str) -> Path:
    source = model(folder / "m", {"a.weight": weights})
    return quantize(source, folder / "out", scheme, format="bitsandbytes", format_options=options)


def state_of(tensors: dict[str, np.ndarray], grid: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tensors[f"a.weight.quant_state.bitsandbytes__{grid}"].tobytes())
    return found


# Bytes.


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize(("scheme", "shape"), [("nf4_g64", (37, 128)), ("fp4_g32", (5, 96)), ("nf4_g4096", (2, 4096))])
@pytest.mark.parametrize("options", [{}, DOUBLE])
def test_every_part_of_four_bits(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scheme: str,
    shape: tuple[int, int],
    dtype: str,
    options: dict[str, str],
) -> None:
    monkeypatch.setattr(formats_pieces, "PIECE_BYTES", 40 * shape[1] * DTYPES[dtype].bits // 8 // 16)
    weights, parsed = weights_of(shape, dtype), Scheme.parse(scheme)
    out = load(target := write(tmp_path, weights, scheme, **options))
    packed, scales, _, _ = reference.quantize(weights, parsed)
    codes = reference.unpack(packed, 4, shape[1]).reshape(-1)
    assert out["a.weight"].shape == (codes.size // 2, 1)
    assert_bitwise_equal(out["a.weight"][:, 0], codes[0::2] * np.uint8(16) + codes[1::2])
    table = out["a.weight.quant_map"][codes].reshape(scales.size, -1)
    if not options:
        assert_bitwise_equal(out["a.weight.absmax"], scales.reshape(-1))
    want = scales.reshape(-1)
    state = state_of(out, parsed.grid)
    said = {"quant_type": parsed.grid, "blocksize": parsed.group_size, "dtype": dtype, "shape": list(shape)}
    if options:
        said |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": state.get("nested_offset")}
        offset, n = np.float32(state["nested_offset"]), out["a.weight.absmax"].size
        of_block = np.repeat(out["a.weight.nested_absmax"], 256)[:n]
        want = out["a.weight.nested_quant_map"][out["a.weight.absmax"]] * of_block + offset
        # Half of the widest step of the map.
        assert (np.abs(want - scales.reshape(-1)) <= 0.0071 * of_block + 1e-6).all()
    assert state == said

    monkeypatch.setattr(stored_model, "_BLOCK_BYTES", 3 * packed.shape[1])
    checkpoint = open_quantized(target)
    assert isinstance(checkpoint, BitsAndBytesCheckpoint)
    (entry,) = checkpoint.entries.values()
    assert (entry.info.name, entry.info.dtype, entry.info.shape) == ("a.weight", dtype, shape)
    assert entry.scheme == parsed
    decoded = np.concatenate(
        [reference.dequantize(b.packed, b.scales, None, parsed, shape[1]) for _, b in checkpoint.blocks("a.weight")]
    )
    assert_bitwise_equal(decoded.reshape(scales.size, -1), table * want[:, None])


@pytest.mark.parametrize("dtype", DTYPE_NAMES)
def test_every_part_of_eight_bits(tmp_path: Path, dtype: str) -> None:
    weights, parsed = weights_of((21, 70), dtype), Scheme.parse("int8_channel")
    out = load(target := write(tmp_path, weights, "int8_channel"))
    packed, scales, _, _ = reference.quantize(weights, parsed)
    assert {k: (v.dtype.name, v.shape) for k, v in out.items()} == {
        "a.SCB": ("float32", (21,)),
        "a.weight": ("int8", (21, 70)),
        "a.weight_format": ("uint8", ()),
    }
    assert_bitwise_equal(out["a.weight"], (packed.astype(np.int16) - 128).astype(np.int8))
    assert out["a.weight"].min() == -128
    assert_bitwise_equal(out["a.SCB"], scales[:, 0] * np.float32(127))
    assert out["a.weight_format"] == 0
    checkpoint = open_quantized(target)
    ((row, block),) = checkpoint.blocks("a.weight")
    assert isinstance(block, QuantizedTensor)
    assert (row, checkpoint.entries["a.weight"].info.dtype, block.scheme) == (0, dtype, parsed)
    assert_bitwise_equal(block.packed, packed)
    # Times 127 and by 127 again: the last bit of a scale may be another.
    assert np.max(np.abs(block.scales / scales - 1)) <= 2.0**-23


@pytest.mark.parametrize(("scheme", "options"), [("nf4_g64", {}), ("fp4_g64", DOUBLE), ("int8_channel", {})])
@pytest.mark.parametrize("piece_bytes", [1, 5000, 1 << 20])
def test_pieces_in_any_order_make_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, options: dict[str, str], piece_bytes: int
) -> None:
    format_checks.pieces(
        tmp_path,
        monkeypatch,
        RNG,
        weights_of((37, 640)),
        Scheme.parse(scheme),
        piece_bytes,
        lambda output, config: BitsAndBytesSink(output, config, **options),
    )


def test_a_run_that_is_resumed_writes_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `finish` quantized before the interruption stays, and the rest is quantized after it."""
    monkeypatch.setattr(formats_pieces, "PIECE_BYTES", 8192)
    source = model(tmp_path / "m", {f"{i}.weight": weights_of((64, 128)) for i in range(4)})
    how = {"format": "bitsandbytes", "format_options": DOUBLE}

    def stop(done: int, total: int, name: str) -> None:
        if done >= 3 * total // 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(source, tmp_path / "out", "nf4_g64", progress=stop, threads=1, **how)
    assert not (tmp_path / "out").exists()
    quantize(source, tmp_path / "out", "nf4_g64", resume=True, **how)
    quantize(source, tmp_path / "whole", "nf4_g64", **how)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole")]
    assert files[0] == files[1]


def test_verify_knows_scales_that_are_quantized(tmp_path: Path) -> None:
    """Codes must be those of the original; a scale may be off as far as 8 bits take it."""
    target = write(tmp_path, weights_of((16, 128)), "nf4_g64", **DOUBLE)
    assert verify_checkpoint(target, tmp_path / "m", device="reference").table["problem"].to_pylist() == [None]

    def change(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
        tensors["a.weight"] = tensors["a.weight"].copy()
        tensors["a.weight"][5] ^= 0x10

    rewrite(target, change)
    (problem,) = verify_checkpoint(target, tmp_path / "m", device="reference").table["problem"].to_pylist()
    assert problem == "row 0 is not what nf4_g64 makes of the original"


# Scales that are quantized.


def test_nested_codes_are_the_nearest_of_all() -> None:
    absmax = np.abs(RNG.standard_normal(1000, np.float32))
    absmax[:256] = 0.5
    codes, largest, offset = nested_codes(absmax)
    assert offset == float(np.float32(np.mean(absmax, dtype=np.float64)))
    values = dynamic_map()
    for block in range(4):
        part = slice(256 * block, 256 * block + 256)
        rest = absmax[part] - np.float32(offset)
        assert largest[block] == np.abs(rest).max()
        x = rest / np.float64(largest[block])
        assert_bitwise_equal(codes[part], np.abs(x[:, None] - values).argmin(axis=1).astype(np.uint8))
    assert np.abs(nested_values(codes, largest, offset) - absmax).max() <= 0.0071 * largest.max()


@pytest.mark.parametrize("n", [256, 300, 3])
@pytest.mark.parametrize("value", [0.0, 1.0, 1e-38, 2.0**-149])
def test_equal_absmax_values_stay_what_they_are(value: float, n: int) -> None:
    absmax = np.full(n, value, np.float32)
    codes, largest, offset = nested_codes(absmax)
    assert (codes == 127).all()
    assert_bitwise_equal(nested_values(codes, largest, offset), absmax)


@given(offset=st.floats(width=32, allow_nan=False, allow_infinity=False))
@settings(max_examples=300)
def test_the_state_has_one_length_whatever_the_mean_is(offset: float) -> None:
    sink = BitsAndBytesSink(Output(Path("none"), is_directory=True), {"model_type": "llama"}, double_quant="true")
    entry = entry_of("a.weight", (64, 256), "nf4_g64")
    assert entry.scheme is not None
    state = sink._state(entry, entry.scheme, offset)
    assert len(state) == len(sink._state(entry, entry.scheme, 0.0))
    assert json.loads(state.tobytes())["nested_offset"] == offset


# config.json.


def entry_of(name: str, shape: tuple[int, ...], scheme: str, dtype: str = "bfloat16") -> Entry:
    return Entry(TensorInfo(name, dtype, shape, Path("m"), 0, 0), Scheme.parse(scheme), "")


def sink_of(folder: Path, **options: str) -> BitsAndBytesSink:
    return BitsAndBytesSink(Output(folder / "none", is_directory=True), {"model_type": "llama"}, **options)


@pytest.mark.parametrize(
    ("scheme", "options", "own"),
    [
        ("nf4_g64", {}, {"bnb_4bit_quant_type": "nf4"}),
        ("fp4_g32", DOUBLE, {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True}),
        (
            "int8_channel",
            {},
            {"load_in_4bit": False, "_load_in_4bit": False, "load_in_8bit": True, "_load_in_8bit": True},
        ),
    ],
)
def test_config(tmp_path: Path, scheme: str, options: dict[str, str], own: dict[str, Any]) -> None:
    weights = weights_of((8, 64), "bfloat16")
    source = model(tmp_path / "m", {"a.weight": weights, "lm_head.weight": weights})
    target = quantize(source, tmp_path / "out", scheme, format="bitsandbytes", format_options=options)
    assert json.loads((target / "config.json").read_text())["quantization_config"] == {
        "quant_method": "bitsandbytes",
        "_load_in_4bit": True,
        "_load_in_8bit": False,
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": ["lm_head"],
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        **own,
    }


def test_two_kinds_of_codes_are_refused(tmp_path: Path) -> None:
    entries = [entry_of("a.weight", (64, 256), scheme) for scheme in ("nf4_g64", "int8_channel")]
    for use in (sink_of(tmp_path).warnings, sink_of(tmp_path).quantization):
        with pytest.raises(FormatError, match="not int and nf4 beside each other"):
            use(entries)
    (warning,) = sink_of(tmp_path).warnings([entry_of("experts.0.w1.weight", (64, 256), "nf4_g64")])
    assert "transformers 5 loads no experts" in warning


@pytest.mark.parametrize(
    ("scheme", "shape", "options", "words"),
    [
        ("int4_g64", (32, 64), {}, "not int4_g64; use nf4_g64"),
        ("int8_channel_asym", (32, 64), {}, "not int8_channel_asym"),
        ("int8_channel_bf16", (32, 64), {}, "not int8_channel_bf16"),
        ("nf4_g16", (32, 64), {}, "not nf4_g16"),
        ("nf4_g48", (32, 48), {}, "not nf4_g48"),
        ("int8_channel", (32, 64), DOUBLE, "double_quant is for nf4 and fp4"),
        ("nf4_g64", (32, 96), {}, "rows of 96 weights are not whole groups of 64.*use a smaller group"),
        ("nf4_g64", (2, 32, 64), {}, "only 2-D weights of linear modules"),
    ],
)
def test_what_it_cannot_carry(
    tmp_path: Path, scheme: str, shape: tuple[int, ...], options: dict[str, str], words: str
) -> None:
    with pytest.raises(FormatError, match=words):
        sink_of(tmp_path, **options).scheme_for(entry_of("a.weight", shape, scheme).info, Scheme.parse(scheme))


# Reading what is not right.


@pytest.fixture
def four_bits(tmp_path: Path) -> Path:
    return write(tmp_path, weights_of((8, 128)), "nf4_g64", **DOUBLE)


def test_files_of_other_writers(tmp_path: Path) -> None:
    """Codes that are stored as float32, JSON that is not padded, no record, no weight_format."""
    target = write(tmp_path, weights_of((8, 128)), "nf4_g64")
    block = next(BitsAndBytesCheckpoint(target).blocks("a.weight"))[1]
    packed, scales = block.packed.copy(), block.scales.copy()

    def change(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
        del config["arrowquant"]
        tensors["a.weight"] = tensors["a.weight"].reshape(-1, 4).view(np.float32)
        state = json.dumps(state_of(tensors, "nf4"), separators=(",", ":"))
        tensors["a.weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(state.encode(), np.uint8)

    rewrite(target, change)
    after = next(BitsAndBytesCheckpoint(target).blocks("a.weight"))[1]
    assert_bitwise_equal(after.packed, packed)
    assert_bitwise_equal(after.scales, scales)


def _state(**values: Any) -> Any:
    def change(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
        text = json.dumps({**state_of(tensors, "nf4"), **values})
        tensors["a.weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(text.encode(), np.uint8)

    return change


def _put(part: str, value: np.ndarray) -> Any:
    return lambda t, c: t.update({f"a.weight{part}": value})


def _drop(part: str) -> Any:
    return lambda t, c: t.pop(f"a.weight{part}")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_drop(""), "a.weight is missing; nf4 of .8, 128. has 512 bytes"),
        (_drop(".absmax"), "a.weight.absmax is missing; expected uint8 .16."),
        (_drop(".nested_absmax"), "a.weight.nested_absmax is missing; expected float32 .1."),
        (_drop(".quant_map"), "a.weight.quant_map is missing"),
        (_put("", np.zeros(100, np.uint8)), "a.weight is uint8 .100."),
        (_put(".absmax", np.ones(16, np.float32)), "a.weight.absmax is float32"),
        (_put(".quant_map", np.zeros(16, np.float32)), "a.weight.quant_map has other values"),
        (_put(".nested_quant_map", np.zeros(256, np.float32)), "nested_quant_map has other values"),
        (_put(".quant_state.bitsandbytes__nf4", np.zeros(9, np.uint8)), "is no JSON"),
        (_put(".quant_state.bitsandbytes__nf4", np.frombuffer(b"[1]", np.uint8)), "is no JSON object"),
        (_put(".quant_state.bitsandbytes__int2", np.frombuffer(b"{}", np.uint8)), "int2 of bitsandbytes"),
        (_state(blocksize=65), "is not understood"),
        (_state(blocksize=256), "which go from one row to the next"),
        (_state(dtype="float8"), "is not understood"),
        (_state(dtype=["float32"]), "is not understood"),
        (_state(shape=[8]), "is not understood"),
        (_state(shape=[8, "128"]), "is not understood"),
        (_state(shape=[-8, -128]), "is not understood"),
        (_state(shape=[16, 128]), "a.weight is uint8 .512, 1.; nf4 of .16, 128. has 1024 bytes"),
        (_state(quant_type="fp4"), "is not understood"),
        (_state(nested_offset=float("nan")), "mean nan"),
        (_state(nested_offset="1"), "mean '1'"),
        (_state(nested_blocksize=64), "blocks of 64 absmax values"),
    ],
)
def test_a_broken_checkpoint_is_a_clear_error(four_bits: Path, change: Any, words: str) -> None:
    rewrite(four_bits, lambda t, c: None)
    assert BitsAndBytesCheckpoint(four_bits).entries["a.weight"].scheme == Scheme.parse("nf4_g64")
    rewrite(four_bits, change)
    with pytest.raises(SourceError, match=words):
        BitsAndBytesCheckpoint(four_bits)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_drop(""), "a.weight is missing; beside a.SCB it is int8"),
        (_put("", np.zeros((8, 64), np.uint8)), "a.weight is uint8 .8, 64."),
        (_put("", np.zeros(8, np.int8)), "a.weight is int8 .8."),
        (lambda t, c: t.update({"a.SCB": np.ones(7, np.float32)}), "a.SCB is float32 .7.; expected float32 .8."),
        (_put("_format", np.ones((), np.uint8)), "only format 0"),
        (_put("_format", np.zeros((0,), np.uint8)), "only format 0"),
    ],
)
def test_a_broken_checkpoint_of_eight_bits_is_a_clear_error(tmp_path: Path, change: Any, words: str) -> None:
    target = write(tmp_path, weights_of((8, 64)), "int8_channel")
    rewrite(target, change)
    with pytest.raises(SourceError, match=words):
        BitsAndBytesCheckpoint(target)


JSON = (
    st.none() | st.booleans() | st.integers(-9, 300) | st.floats() | st.text(max_size=3) | st.lists(st.integers(-2, 9))
)


@settings(max_examples=80, deadline=None)
@given(
    state=st.dictionaries(
        st.sampled_from(["quant_type", "blocksize", "dtype", "shape", "nested_offset", "nested_blocksize"]), JSON
    ),
    parts=st.dictionaries(
        st.sampled_from([".weight", ".weight.absmax", ".weight.quant_map", ".SCB", ".weight_format"]),
        st.tuples(st.sampled_from([np.uint8, np.int8, np.float32]), st.lists(st.integers(0, 9), max_size=3)),
    ),
)
def test_any_state_and_any_parts_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, state: dict[str, Any], parts: dict[str, tuple[Any, list[int]]]
) -> None:
    folder = tmp_path_factory.mktemp("hostile")
    whole = {"quant_type": "nf4", "blocksize": 32, "dtype": "float32", "shape": [2, 32], **state}
    tensors = {f"a{part}": np.zeros(shape, dtype) for part, (dtype, shape) in parts.items()}
    tensors["a.weight.quant_state.bitsandbytes__nf4"] = np.frombuffer(json.dumps(whole).encode(), np.uint8)
    model(folder / "m", tensors, {"quantization_config": {"quant_method": "bitsandbytes"}})
    try:
        for name in (read := BitsAndBytesCheckpoint(folder / "m")).entries:
            list(read.blocks(name))
    except SourceError:
        pass


# bitsandbytes itself.


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", DTYPE_NAMES)
@pytest.mark.parametrize("grid", ["nf4", "fp4"])
def test_bitsandbytes_writes_the_same_tensors(tmp_path: Path, grid: str, dtype: str) -> None:
    from bitsandbytes import functional

    weights = weights_of((64, 192), dtype)
    out = load(write(tmp_path, weights, f"{grid}_g64"))
    packed, state = functional.quantize_4bit(torch_tensor(weights), quant_type=grid)
    assert_bitwise_equal(out.pop("a.weight"), packed.numpy())
    for part, tensor in state.as_dict(packed=True).items():
        assert_bitwise_equal(out.pop(f"a.weight.{part}"), tensor.numpy(), part)
    assert not out


def definition(monkeypatch: pytest.MonkeyPatch, name: str) -> Callable[..., Any]:
    """A function of bitsandbytes as it is defined for every device, where the CPU has one of its own."""
    import importlib.util

    import bitsandbytes._ops
    from bitsandbytes.backends.default import ops

    found: dict[str, Callable[..., Any]] = {}
    monkeypatch.setattr(bitsandbytes._ops, "register_kernel", lambda name, _: lambda f: found.setdefault(name, f))
    spec = importlib.util.spec_from_file_location("bitsandbytes.backends.default.again", ops.__file__)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    return found[f"bitsandbytes::{name}"]


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape", [(512, 512), (100, 192), (3, 64)])
def test_bitsandbytes_quantizes_scales_to_the_same_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]
) -> None:
    """Its mean is a float32 sum in an order that hangs on the processor, so it is given ours. What it then defines is
    met bit for bit; its code for CPUs, which looks codes up in 65,536 places, is met but for their width."""
    import torch
    from bitsandbytes import functional

    weights = weights_of(shape)
    out = load(write(tmp_path, weights, "nf4_g64", **DOUBLE))
    _, scales, _, _ = reference.quantize(weights, Scheme.parse("nf4_g64"))
    _, whole = functional.quantize_4bit(torch_tensor(weights), quant_type="nf4", compress_statistics=True)
    offset = state_of(out, "nf4")["nested_offset"]
    assert float(whole.offset) == pytest.approx(offset, rel=1e-6)
    values = functional.create_dynamic_map()
    assert_bitwise_equal(out["a.weight.nested_quant_map"], values.numpy())
    rest = torch.from_numpy(scales.reshape(-1) - np.float32(offset))
    codes, largest = definition(monkeypatch, "quantize_blockwise")(rest, values, 256)
    assert_bitwise_equal(out["a.weight.absmax"], codes.numpy())
    assert_bitwise_equal(out["a.weight.nested_absmax"], largest.numpy())
    on_cpu = functional.quantize_blockwise(rest, blocksize=256)[0].numpy()
    x = rest.numpy() / np.repeat(largest.numpy(), 256)[: rest.numel()]
    error, theirs = (np.abs(x - values.numpy()[c]) for c in (codes.numpy(), on_cpu))
    # Never nearer, and at the most one place of 2 / 65535 further.
    assert (theirs >= error - 1e-7).all()
    assert (theirs <= error + 4e-5).all()


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("grid", ["nf4", "fp4"])
@pytest.mark.parametrize("options", [{}, DOUBLE])
def test_bitsandbytes_decodes_what_dequantize_does(tmp_path: Path, grid: str, options: dict[str, str]) -> None:
    import torch
    from bitsandbytes import functional

    target = write(tmp_path, weights_of((64, 192)), f"{grid}_g64", **options)
    parts = {k: torch_tensor(v) for k, v in load(target).items()}
    state = functional.QuantState.from_dict({k: v for k, v in parts.items() if k != "a.weight"}, torch.device("cpu"))
    ((_, block),) = BitsAndBytesCheckpoint(target).blocks("a.weight")
    assert isinstance(block, QuantizedTensor)
    want = reference.dequantize(block.packed, block.scales, None, block.scheme, 192)
    assert_bitwise_equal(functional.dequantize_4bit(parts["a.weight"], state).numpy(), want)


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("grid", ["nf4", "fp4"])
@pytest.mark.parametrize("is_double", [False, True])
def test_what_a_layer_of_bitsandbytes_saves_is_read(tmp_path: Path, grid: str, is_double: bool) -> None:
    from bitsandbytes import functional, nn

    weights = weights_of((64, 192), "bfloat16")
    layer = nn.Linear4bit(192, 64, bias=False)
    layer.weight = nn.Params4bit(torch_tensor(weights), False, compress_statistics=is_double, quant_type=grid)
    layer = layer.to("cpu")
    tensors = {f"a.{k}": v.numpy() for k, v in layer.state_dict().items()}
    target = model(tmp_path / "m", tensors, {"quantization_config": {"quant_method": "bitsandbytes"}})
    checkpoint = BitsAndBytesCheckpoint(target)
    assert checkpoint.entries["a.weight"].info.dtype == "bfloat16"
    ((_, block),) = checkpoint.blocks("a.weight")
    assert isinstance(block, QuantizedTensor)
    got = reference.dequantize(block.packed, block.scales, None, block.scheme, 192, "bfloat16")
    want = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert_bitwise_equal(got.view(np.int16), want.view(_int16()).numpy())


def _int16() -> Any:
    import torch

    return torch.int16


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
def test_bitsandbytes_decodes_eight_bits(tmp_path: Path) -> None:
    from bitsandbytes import functional

    weights = weights_of((64, 192))
    out = load(write(tmp_path, weights, "int8_channel"))
    got = functional.int8_vectorwise_dequant(torch_tensor(out["a.weight"]), torch_tensor(out["a.SCB"])).numpy()
    scheme = Scheme.parse("int8_channel")
    want = reference.dequantize(*reference.quantize(weights, scheme)[:3], scheme, 192)
    np.testing.assert_allclose(got, want, rtol=2.0**-21)
