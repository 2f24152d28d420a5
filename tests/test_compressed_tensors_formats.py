"""compressed-tensors beyond packed integers: W8A8, FP8, NVFP4 and MX, by hand, by its own code and in transformers."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arrowquant_gpu import reference
from arrowquant_gpu.dtypes import DTYPES
from arrowquant_gpu.errors import FormatError, SourceError
from arrowquant_gpu.formats import Codes, Entry, TensorInfo, stored_model
from arrowquant_gpu.formats import pieces as formats_pieces
from arrowquant_gpu.formats.checkpoint import open_checkpoint
from arrowquant_gpu.formats.compressed_tensors import CompressedTensorsCheckpoint
from arrowquant_gpu.formats.compressed_tensors_sink import CompressedTensorsSink
from arrowquant_gpu.formats.output import Output
from arrowquant_gpu.pipeline import quantize_checkpoint
from arrowquant_gpu.schemes import Scheme
from arrowquant_gpu.tensor import QuantizedTensor

from .bitwise import assert_bitwise_equal
from .fixtures import tiny_llama, write_safetensors
from .model_files import copied, decoded_by, load, logits, model, quantize, rewrite, torch_tensor, written_in

RNG = np.random.default_rng(20261122)
DYNAMIC = {"format_options": {"activations": "dynamic"}}

# What is asked for, how, what the plan says, and the format that it becomes.
CASES = [
    ("int8_channel", DYNAMIC, "int8_channel", "int-quantized"),
    ("e4m3_tensor", {}, "e4m3_tensor", "float-quantized"),
    ("e4m3_channel", {}, "e4m3_channel", "float-quantized"),
    ("e4m3_channel", DYNAMIC, "e4m3_channel", "float-quantized"),
    ("e4m3_b128", {}, "e4m3_b128", "float-quantized"),
    ("nvfp4", {}, "nvfp4", "nvfp4-pack-quantized"),
    ("mxfp4", {}, "mxfp4_round", "mxfp4-pack-quantized"),
    ("mxfp8", {}, "mxfp8_round", "mxfp8-quantized"),
]
IDS = [f"{scheme}{'-dynamic' if options else ''}" for scheme, options, _, _ in CASES]


def tensors_by_hand(name: str, codes: Codes, scheme: Scheme, shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """What the text of the layout makes of codes, element by element."""
    values, (n, k) = reference.unpack(codes.packed, scheme.bits, shape[1]), shape
    scales = codes.scales.view(DTYPES["float8_e4m3fn"].numpy) if scheme.id == "nvfp4" else codes.scales
    if scheme.grid == "e2m1":
        stored = {f"{name}_packed": np.zeros((n, k // 2), np.uint8), f"{name}_scale": scales}
        for i in range(k):
            stored[f"{name}_packed"][:, i // 2] += values[:, i] * (16 if i % 2 else 1)
    elif scheme.grid == "int":
        stored = {name: (values.astype(np.int16) - 128).astype(np.int8), f"{name}_scale": scales}
    else:
        stored = {name: values.view(DTYPES["float8_e4m3fn"].numpy), f"{name}_scale": scales}
    if scheme.granularity == "tensor":
        stored[f"{name}_scale"] = scales.reshape(1)
    if scheme.id == "nvfp4":
        assert codes.zeros is not None
        stored[f"{name}_global_scale"] = codes.zeros.reshape(1)
    return stored


@pytest.mark.parametrize(("scheme", "options", "stored", "written"), CASES, ids=IDS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_part_against_the_reference(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scheme: str,
    options: dict[str, Any],
    stored: str,
    written: str,
    dtype: str,
) -> None:
    # Pieces of three rows (and of 128 where the scheme wants whole squares).
    monkeypatch.setattr(formats_pieces, "PIECE_BYTES", 3 * 256 * DTYPES[dtype].bits // 8)
    weights = RNG.standard_normal((200, 256), np.float32).astype(DTYPES[dtype].numpy)
    source = model(tmp_path / "m", {"a.weight": weights, "a.bias": weights[0]})
    target = quantize(source, tmp_path / "out", scheme, **options)
    parsed = Scheme.parse(stored)
    packed, scales, zeros, _ = reference.quantize(weights, parsed)
    expected = tensors_by_hand("a.weight", Codes(packed, scales, zeros), parsed, (200, 256)) | {"a.bias": weights[0]}
    out = load(target)
    assert sorted(out) == sorted(expected)
    for name, want in expected.items():
        assert out[name].dtype == want.dtype, name
        assert_bitwise_equal(out[name], np.ascontiguousarray(want), name)

    monkeypatch.setattr(stored_model, "_BLOCK_BYTES", 3 * 256)
    reader = CompressedTensorsCheckpoint(target)
    entry = reader.entries["a.weight"]
    assert (entry.info.dtype, entry.info.shape, entry.scheme) == (dtype, (200, 256), parsed)
    assert reader.entries["a.bias"].scheme is None
    decoded, rows = [], 0
    for row, block in reader.blocks("a.weight"):
        assert isinstance(block, QuantizedTensor)
        assert row == rows
        parts = block.packed, block.scales, block.zeros
        decoded.append(reference.dequantize(*parts, parsed, 256, dtype))
        rows += len(block.packed)
    assert len(decoded) > 1
    want = reference.dequantize(packed, scales, zeros, parsed, 256, dtype)
    assert_bitwise_equal(np.concatenate(decoded), want)


@pytest.mark.parametrize(("scheme", "options", "stored", "written"), CASES, ids=IDS)
def test_pieces_in_any_order_make_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, options: dict[str, Any], stored: str, written: str
) -> None:
    weights = RNG.standard_normal((300, 640), np.float32)
    source = open_checkpoint(model(tmp_path / "m", {"a.weight": weights}))
    parsed = Scheme.parse(stored)
    codes = Codes(*reference.quantize(weights, parsed)[:3])
    files = []
    for name, size in (("one", 1 << 24), ("rows", 3000), ("within", 1000)):
        monkeypatch.setattr(formats_pieces, "PIECE_BYTES", size)
        output = Output(tmp_path / name, is_directory=True)
        sink = CompressedTensorsSink(output, source.config, activations="dynamic" if options else "none")
        entry = Entry(source.tensors["a.weight"], parsed, "")
        assert list(written_in(RNG, sink, output, entry, codes, source)) == []
        files.append((tmp_path / name / "model.safetensors").read_bytes())
    assert files[0] == files[1] == files[2]


# config.json


WEIGHTS: dict[str, dict[str, Any]] = {
    "int8_channel": {"num_bits": 8, "type": "int", "strategy": "channel", "group_size": None},
    "e4m3_tensor": {"num_bits": 8, "type": "float", "strategy": "tensor", "group_size": None},
    "e4m3_channel": {"num_bits": 8, "type": "float", "strategy": "channel", "group_size": None},
    "e4m3_b128": {
        "num_bits": 8,
        "type": "float",
        "strategy": "block",
        "group_size": None,
        "block_structure": [128, 128],
    },
    "nvfp4": {
        "num_bits": 4,
        "type": "float",
        "strategy": "tensor_group",
        "group_size": 16,
        "scale_dtype": "torch.float8_e4m3fn",
    },
    "mxfp4": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    "mxfp8": {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
}
TOKEN = {"num_bits": 8, "symmetric": True, "strategy": "token", "dynamic": True}


@pytest.mark.parametrize(("scheme", "options", "stored", "written"), CASES, ids=IDS)
def test_config(tmp_path: Path, scheme: str, options: dict[str, Any], stored: str, written: str) -> None:
    source = tiny_llama(tmp_path / "source", hidden=256)
    target = quantize(source, tmp_path / "out", scheme, **options)
    quantization = json.loads((target / "config.json").read_text())["quantization_config"]
    activations = None
    if scheme == "e4m3_b128":
        activations = {**TOKEN, "type": "float", "strategy": "group", "group_size": 128}
    elif options:
        activations = {**TOKEN, "type": "int" if scheme == "int8_channel" else "float"}
    assert quantization["format"] == written
    assert quantization["config_groups"] == {
        "group_0": {
            "targets": ["Linear"],
            "format": written,
            "input_activations": activations,
            "output_activations": None,
            "weights": {"symmetric": True, "dynamic": False, **WEIGHTS[scheme]},
        }
    }


def test_several_formats_in_one_model_are_mixed_precision(tmp_path: Path) -> None:
    tensors = {f"{name}.weight": RNG.standard_normal((128, 128), np.float32) for name in "abc"}
    source = open_checkpoint(model(tmp_path / "m", tensors))
    schemes = {"a": "int4_g32", "b": "e4m3_tensor", "c": "nvfp4"}
    output = Output(tmp_path / "out", is_directory=True)
    sink = CompressedTensorsSink(output, source.config)
    entries = [Entry(source.tensors[f"{n}.weight"], Scheme.parse(s), "") for n, s in schemes.items()]
    quantization = sink.quantization(entries)["quantization_config"]
    assert quantization["format"] == "mixed-precision"
    assert {(*g["targets"], g["format"]) for g in quantization["config_groups"].values()} == {
        ("a", "pack-quantized"),
        ("b", "float-quantized"),
        ("c", "nvfp4-pack-quantized"),
    }
    output.begin()
    sink.open(entries, source, {})
    for entry in entries:
        assert entry.scheme is not None
        codes = Codes(*reference.quantize(tensors[entry.info.name], entry.scheme)[:3])
        for piece in sink.pieces(entry):
            for place, array in zip(sink.places(piece), sink.stored(piece, codes), strict=True):
                output.write(place.file, place.offset, np.ascontiguousarray(array))
    sink.commit()
    found = CompressedTensorsCheckpoint(tmp_path / "out").entries
    assert {n.removesuffix(".weight"): e.scheme.id for n, e in found.items() if e.scheme} == schemes


def sink_of(tmp_path: Path, **options: str) -> CompressedTensorsSink:
    return CompressedTensorsSink(
        Output(tmp_path / "out", is_directory=True), {"architectures": ["LlamaModel"]}, **options
    )


def info_of(shape: tuple[int, int], dtype: str = "bfloat16") -> TensorInfo:
    return TensorInfo("a.weight", dtype, shape, Path("m"), 0, 0)


@pytest.mark.parametrize(
    ("scheme", "activations", "words"),
    [
        ("e5m2_channel", "none", "it has no e5m2_channel; use e4m3"),
        ("e4m3_g64", "none", "it has no e4m3_g64"),
        ("nf4_g64", "none", "--format bitsandbytes"),
        ("affine4_g64", "none", "--format mlx"),
        ("q4_k", "none", "use --format gguf"),
        ("nvfp4_local", "none", "it has no nvfp4_local"),
        ("int4_g128", "dynamic", "activations=dynamic goes with int8_channel"),
        ("int8_channel_asym", "dynamic", "not with int8_channel_asym"),
        ("nvfp4", "dynamic", "not with nvfp4"),
        ("e4m3_channel_f16", "none", "stores scales in the weights' dtype bfloat16.*--format safetensors"),
        ("e4m3_b128", "none", "not whole groups of 128.*--format safetensors"),
        ("nvfp4", "none", "not whole groups of 16.*--format safetensors"),
    ],
)
def test_what_it_cannot_carry_is_refused_with_the_way_out(
    tmp_path: Path, scheme: str, activations: str, words: str
) -> None:
    with pytest.raises(FormatError, match=words):
        sink_of(tmp_path, activations=activations).scheme_for(info_of((64, 100)), Scheme.parse(scheme))


def test_an_explicit_rule_for_exponents_is_kept(tmp_path: Path) -> None:
    assert sink_of(tmp_path).scheme_for(info_of((64, 128)), Scheme.parse("mxfp4_ceil")).id == "mxfp4_ceil"


BF16, EXPERT = "bfloat16", "layers.0.experts.3.up.weight"
JOINS = "transformers joins the experts of a layer"


@pytest.mark.parametrize(
    ("scheme", "shape", "dtype", "name", "engines"),
    [
        ("int4_g128", (64, 128), BF16, "a.weight", []),
        ("int4_g128", (64, 128), BF16, EXPERT, []),
        ("int8_channel", (64, 128), "float32", "a.weight", []),
        ("e4m3_channel", (5, 128), "float32", EXPERT, []),
        ("nvfp4", (5, 128), BF16, "a.weight", []),
        ("mxfp4_round", (5, 128), BF16, EXPERT, []),
        ("int2_g128", (64, 128), BF16, "a.weight", ["vLLM and SGLang have packed weights of 4 and 8 bits"]),
        ("int4_g16", (64, 128), BF16, "a.weight", ["vLLM has kernels for groups of 32, 64, 128"]),
        ("int4_g128", (60, 128), BF16, "a.weight", ["vLLM before it padded"]),
        ("int4_g32", (64, 96), BF16, "a.weight", ["vLLM before it padded"]),
        ("int4_g128_asym", (64, 128), BF16, "a.weight", ["transformers with compressed-tensors 0.18 to 0.20"]),
        ("int4_g128_asym", (64, 128), BF16, EXPERT, ["transformers with compressed-tensors", f"{JOINS}, and refuses"]),
        ("nvfp4", (64, 128), "float32", "a.weight", ["transformers decodes 1 tensors"]),
        ("nvfp4", (64, 128), BF16, EXPERT, [f"{JOINS} without their global scales"]),
        ("mxfp8_round", (64, 128), "float16", "a.weight", ["transformers decodes 1 tensors"]),
        ("mxfp8_round", (64, 128), BF16, EXPERT, [f"{JOINS}, and refuses"]),
    ],
)
def test_rules_of_engines_are_warnings(
    tmp_path: Path, scheme: str, shape: tuple[int, int], dtype: str, name: str, engines: list[str]
) -> None:
    info = TensorInfo(name, dtype, shape, Path("m"), 0, 0)
    found = sink_of(tmp_path).warnings([Entry(info, Scheme.parse(scheme), ""), Entry(info, None, "")])
    assert len(found) == len(engines), found
    for warning, words in zip(found, engines, strict=True):
        assert warning.startswith(words)
        assert f"1 tensors (first: {name})" in warning


def test_what_is_not_packed_has_no_rule_of_packed_weights(tmp_path: Path) -> None:
    entry = Entry(info_of((60, 100)), Scheme.parse("int8_channel"), "")
    sink = sink_of(tmp_path, activations="dynamic")
    assert sink.warnings([entry]) == []
    expert = Entry(TensorInfo(EXPERT, BF16, (64, 128), Path("m"), 0, 0), Scheme.parse("int8_channel"), "")
    (warning,) = sink.warnings([entry, expert])
    assert warning.startswith(f"{JOINS}, and refuses those of int-quantized as 1 tensors")


# Reading what is not right.


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("quantized")
    tensors = {"a.weight": RNG.standard_normal((128, 128), np.float32), "norm.weight": np.ones(64, np.float32)}
    source = model(folder / "m", tensors)
    return {
        name: quantize(source, folder / name, scheme, **options)
        for name, (scheme, options, _, _) in zip(IDS, CASES, strict=True)
    }


def changed(folder: Path, tmp_path: Path, change: Any) -> Path:
    """A copy of a quantized model with a change of its tensors and of its only group."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    rewrite(copy, lambda t, c: change(t, c["quantization_config"]["config_groups"]["group_0"]))
    return copy


def _drop(name: str) -> Any:
    return lambda t, g: t.pop(name)


def _put(name: str, value: np.ndarray) -> Any:
    return lambda t, g: t.update({name: value})


def _weights(**values: Any) -> Any:
    return lambda t, g: g["weights"].update(values)


@pytest.mark.parametrize(
    ("which", "change", "words"),
    [
        ("nvfp4", _drop("a.weight_global_scale"), "a.weight_global_scale is missing"),
        ("nvfp4", _drop("a.weight_scale"), "a.weight_scale is missing; nvfp4 .128, 128. has float8_e4m3fn .128, 8."),
        ("nvfp4", _put("a.weight_packed", np.zeros((128, 56), np.uint8)), "a.weight_scale is float8_e4m3fn .128, 8."),
        ("nvfp4", _put("a.weight_packed", np.zeros(128, np.uint8)), "no matrix"),
        ("nvfp4", _weights(group_size=32), "4 bits in groups of 32 in the format nvfp4"),
        ("mxfp4", _put("a.weight_scale", np.zeros((128, 4), np.int8)), "a.weight_scale is int8"),
        ("mxfp4", lambda t, g: g.update(format="nvfp4-pack-quantized"), "4 bits in groups of 32"),
        ("mxfp8", _weights(num_bits=4), "4 bits in groups of 32"),
        ("e4m3_b128", _weights(block_structure=[64, 64]), "block_structure .64, 64.; .128, 128. is what can be read"),
        ("e4m3_b128", _put("a.weight_scale", np.ones((2, 1), np.float32)), "a.weight_scale is float32 .2, 1."),
        ("e4m3_channel", _weights(strategy="tensor"), "a.weight_scale is float32 .128, 1."),
        ("e4m3_channel", _weights(strategy=["tensor"]), "strategy .*; group, channel, tensor, block"),
        ("e4m3_channel", _weights(type="int"), "type 'int' in the format float-quantized"),
        ("int8_channel-dynamic", _weights(symmetric=False), "zero points in the format int-quantized"),
        ("int8_channel-dynamic", _weights(num_bits=4), "4 bits in the format int-quantized"),
        ("int8_channel-dynamic", lambda t, g: g.update(targets=["b"]), "no group of quantization_config"),
        ("int8_channel-dynamic", lambda t, g: g.update(format="dense"), "compressed-tensors format 'dense'"),
    ],
)
def test_a_broken_checkpoint_is_a_clear_error(
    quantized: dict[str, Path], tmp_path: Path, which: str, change: Any, words: str
) -> None:
    copy = changed(quantized[which], tmp_path, change)
    with pytest.raises(SourceError, match=words):
        CompressedTensorsCheckpoint(copy)


ARGUMENTS = [*sorted(WEIGHTS["nvfp4"]), "block_structure"]
NUMBERS = st.one_of(st.integers(-2, 200), st.floats())
JUNK = st.one_of(NUMBERS, st.none(), st.booleans(), st.text(max_size=5), st.just([]), st.just({}))


@given(which=st.sampled_from(IDS), key=st.sampled_from(["targets", "format", "weights"]), junk=JUNK)
def test_junk_in_a_group_is_an_error_or_no_matter(quantized: dict[str, Path], which: str, key: str, junk: Any) -> None:
    _read_with_junk(quantized[which], lambda group: group.update({key: junk}))


@given(which=st.sampled_from(IDS), key=st.sampled_from(ARGUMENTS), junk=JUNK)
def test_junk_in_arguments_is_an_error_or_no_matter(
    quantized: dict[str, Path], which: str, key: str, junk: Any
) -> None:
    _read_with_junk(quantized[which], lambda group: group["weights"].update({key: junk}))


def _read_with_junk(folder: Path, change: Any) -> None:
    text = (folder / "config.json").read_text()
    config = json.loads(text)
    change(config["quantization_config"]["config_groups"]["group_0"])
    try:
        (folder / "config.json").write_text(json.dumps(config))
        reader = CompressedTensorsCheckpoint(folder)
        for name in reader.entries:
            assert list(reader.blocks(name))
    except SourceError:
        pass
    finally:
        (folder / "config.json").write_text(text)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_number_may_be_of_one_dimension_or_of_none(
    quantized: dict[str, Path], tmp_path: Path, shape: tuple[int, ...]
) -> None:
    def change(tensors: dict[str, np.ndarray], group: Any) -> None:
        tensors["a.weight_scale"] = tensors["a.weight_scale"].reshape(shape)
        tensors["a.input_scale"] = np.ones(1, np.float32)

    reader = CompressedTensorsCheckpoint(changed(quantized["e4m3_tensor"], tmp_path, change))
    assert set(reader.entries) == {"a.weight", "norm.weight"}
    ((_, block),) = reader.blocks("a.weight")
    assert isinstance(block, QuantizedTensor)
    assert block.scales.shape == (1, 1)


# The real code.


def decoded(source: Path, scheme: str, dtype: str) -> dict[str, np.ndarray]:
    """What the quantized weights of a tiny Llama stand for, by the reference alone."""
    parsed, out = Scheme.parse(scheme), {}
    for name, x in load(source).items():
        if "_proj" in name:
            packed, scales, zeros, _ = reference.quantize(x, parsed, _global_scale(source, name, parsed))
            out[name] = reference.dequantize(packed, scales, zeros, parsed, x.shape[1], dtype)
    return out


def _global_scale(source: Path, name: str, scheme: Scheme) -> np.ndarray | None:
    """That of all parts of a fused matrix, as engines hold them."""
    if scheme.scale_rule != "global":
        return None
    tensors = load(source)
    fused = next(
        (f for f in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")) if name.split(".")[-2] in f), ()
    )
    parts = [name.replace(name.split(".")[-2], part) for part in fused] or [name]
    largest = max(float(np.abs(tensors[part].astype(np.float32)).max()) for part in parts)
    # torch divides a number by a tensor in two roundings.
    return np.full((1, 1), np.float32(448 * 6) * (np.float32(1) / np.float32(largest)), np.float32)


def arguments_of(target: Path) -> Any:
    from compressed_tensors.quantization import QuantizationConfig

    config = json.loads((target / "config.json").read_text())["quantization_config"]
    return QuantizationConfig.model_validate(config).config_groups["group_0"]


@pytest.mark.interop
@pytest.mark.parametrize(("scheme", "options", "stored", "written"), CASES, ids=IDS)
def test_the_compressor_decodes_the_same_values(
    tmp_path: Path, scheme: str, options: dict[str, Any], stored: str, written: str
) -> None:
    import torch
    from compressed_tensors.compressors import BaseCompressor

    source = tiny_llama(tmp_path / "source", "bfloat16", hidden=256, intermediate=384, layers=1)
    target = quantize(source, tmp_path / "out", scheme, **options)
    compressor, group = BaseCompressor.get_value_from_registry(written), arguments_of(target)
    tensors = load(target)
    expected = decoded(source, stored, "float32")
    assert len(expected) == 7
    for name, want in expected.items():
        module = name.removesuffix("weight")
        parts = {k.removeprefix(module): torch_tensor(v) for k, v in tensors.items() if k.startswith(module)}
        got = compressor.decompress(parts, group)["weight"]
        # It decodes to its scales' type, or to bfloat16.
        exact = torch.from_numpy(np.ascontiguousarray(want)).to(got.dtype)
        if scheme == "nvfp4":
            # It rounds the quotient of both scales to bfloat16 first.
            assert float((got.double() - exact.double()).abs().max()) <= 2**-7 * float(exact.double().abs().max())
        else:
            assert got.equal(exact), name


@pytest.mark.interop
@pytest.mark.parametrize(("scheme", "options", "stored", "written"), CASES, ids=IDS)
def test_its_own_quantizer_writes_the_same_bytes(
    tmp_path: Path, scheme: str, options: dict[str, Any], stored: str, written: str
) -> None:
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    weights = RNG.standard_normal((256, 384), np.float32)
    # Ties and saturation: whole and half steps, and amax where exponents change.
    weights[::3] = np.round(weights[::3] * 8) / 8
    weights[7] *= 0
    target = quantize(model(tmp_path / "m", {"a.weight": weights}), tmp_path / "out", scheme, **options)
    group, x = arguments_of(target), torch.from_numpy(weights)
    args, state = group.weights, {"weight": x}
    if scheme == "e4m3_tensor":
        low, high = x.min().reshape(1), x.max().reshape(1)
    elif scheme == "e4m3_b128":
        squares = x.reshape(2, 128, 3, 128)
        low, high = squares.amin((1, 3)), squares.amax((1, 3))
    else:
        parts = x.reshape(256, -1, args.group_size or 384)
        low, high = parts.amin(-1), parts.amax(-1)
    if scheme == "nvfp4":
        state["weight_global_scale"] = generate_gparam(x.min(), x.max()).reshape(1)
    scale, _ = calculate_qparams(low, high, args, global_scale=state.get("weight_global_scale"))
    made = BaseCompressor.get_value_from_registry(written).compress({**state, "weight_scale": scale}, group)
    found = load(target)
    assert {f"a.{name}" for name in made} == found.keys()
    for name, want in made.items():
        got = torch_tensor(found[f"a.{name}"])
        assert got.dtype == want.dtype, name
        assert got.reshape(want.shape).view(torch.uint8).equal(want.view(torch.uint8)), name


@pytest.mark.interop
@pytest.mark.parametrize("mode", ["dequantize", "default"])
@pytest.mark.parametrize(("scheme", "options", "stored", "written"), CASES, ids=IDS)
def test_transformers_gives_the_logits_of_the_decoded_weights(
    tmp_path: Path, scheme: str, options: dict[str, Any], stored: str, written: str, mode: str
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    # Packed FP4 and MX are decoded to bfloat16, in which a float32 scale would be rounded again.
    dtype = "float32" if written in ("int-quantized", "float-quantized") else "bfloat16"
    source = tiny_llama(tmp_path / "source", dtype, hidden=256, intermediate=384)
    target = quantize(source, tmp_path / "out", scheme, **options)
    torch_dtype = getattr(torch, dtype)
    extra = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if mode == "dequantize" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch_dtype).eval()
        found, info = AutoModelForCausalLM.from_pretrained(target, dtype=torch_dtype, output_loading_info=True, **extra)
        state = plain.state_dict()
        for name, weights in decoded(source, stored, dtype).items():
            state[name].copy_(torch_tensor(weights))
        ids = torch.tensor([[1, 5, 77, 140, 23, 8, 9, 100, 2, 17]])
        with torch.no_grad():
            want, got = plain(ids).logits.float(), found.eval()(ids).logits.float()
    assert not any(info.values()), info
    off = float((want - got).abs().max() / want.abs().max())
    # Activations of 8 bits are another model, whose weights the compressor's test holds.
    rounds_activations = mode == "default" and (options or scheme == "e4m3_b128")
    assert off <= (0.1 if rounds_activations else 0.02 if scheme == "nvfp4" else 1e-6), off


@pytest.mark.interop
@pytest.mark.parametrize(
    ("scheme", "options", "dtype", "loads"),
    [
        ("int4_g32", {}, "float32", "right"),
        ("e4m3_channel", {}, "float32", "right"),
        ("mxfp4", {}, "bfloat16", "right"),
        ("nvfp4", {}, "bfloat16", "wrong"),
        ("mxfp8", {}, "bfloat16", "refused"),
        ("int4_g32_asym", {}, "float32", "refused"),
        ("int8_channel", DYNAMIC, "float32", "refused"),
    ],
)
def test_experts_load_but_where_a_warning_says_otherwise(
    tmp_path: Path, scheme: str, options: dict[str, Any], dtype: str, loads: str
) -> None:
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 300}
    config = MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        MixtralForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(tmp_path / "source")
    target = tmp_path / "out"
    plan = quantize_checkpoint(tmp_path / "source", target, scheme, device="reference", **options).plan
    assert any(warning.startswith(JOINS) for warning in plan.warnings) == (loads != "right")
    if loads == "refused":
        with pytest.raises(RuntimeError, match="conversion"):
            logits(target, dtype)
        return
    reader = CompressedTensorsCheckpoint(target)
    float_model = copied(tmp_path / "source", tmp_path / "decoded")
    decoded_weights = {n: decoded_by(reader, n, dtype) for n, e in reader.entries.items() if e.scheme}
    write_safetensors(float_model / "model.safetensors", load(float_model) | decoded_weights, {"format": "pt"})
    want, got = logits(float_model, dtype), logits(target, dtype)
    off = float((want - got).abs().max() / want.abs().max())
    assert off < 1e-6 if loads == "right" else off > 0.5, off
