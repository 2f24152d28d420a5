"""Scaled FP8 for ComfyUI: both layouts by hand, the reader, and ComfyUI's library."""

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
from arrowquant_gpu.formats import Entry, TensorInfo, stored_model
from arrowquant_gpu.formats import pieces as formats_pieces
from arrowquant_gpu.formats.comfyui import ComfyUICheckpoint, ComfyUISink
from arrowquant_gpu.formats.output import Output
from arrowquant_gpu.formats.quantized import open_quantized
from arrowquant_gpu.schemes import Scheme

from .bitwise import assert_bitwise_equal
from .fixtures import write_safetensors
from .model_files import decoded_by, load, quantize, torch_tensor

RNG = np.random.default_rng(20261125)
SCHEME = Scheme.parse("e4m3_tensor")
E4M3 = DTYPES["float8_e4m3fn"].numpy
METADATA = {"layout": "quantization_metadata"}


def source_of(folder: Path, prefix: str = "", dtype: str = "float16") -> Path:
    """A part of a diffusion model, by the names that ComfyUI has."""
    shapes = {
        "double_blocks.0.img_attn.qkv.weight": (48, 32),
        "double_blocks.0.img_attn.qkv.bias": (48,),
        "single_blocks.0.linear1.weight": (40, 32),
        "conv.weight": (4, 3, 2, 2),
        "img_in.weight": (32, 16),
    }
    numpy = DTYPES[dtype].numpy
    tensors = {prefix + n: RNG.standard_normal(s, np.float32).astype(numpy) for n, s in shapes.items()}
    folder.mkdir()
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt", "kept": "yes"})
    return folder / "model.safetensors"


def header_of(file: Path) -> dict[str, Any]:
    raw = file.read_bytes()
    header: dict[str, Any] = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    return header


LAYERS = ("double_blocks.0.img_attn.qkv", "single_blocks.0.linear1")


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize(
    ("options", "scale", "marker"),
    [
        ({}, "scale_weight", 0),
        ({"activations": "none"}, "scale_weight", 2),
        (METADATA, "weight_scale", None),
        ({**METADATA, "activations": "none"}, "weight_scale", None),
    ],
)
def test_every_part_by_hand_and_read_back(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    prefix: str,
    options: dict[str, str],
    scale: str,
    marker: int | None,
) -> None:
    monkeypatch.setattr(formats_pieces, "PIECE_BYTES", 200)
    source = source_of(tmp_path / "m", prefix)
    before, target = load(source), tmp_path / "out.safetensors"
    quantize(source, target, "e4m3_tensor", format="comfyui", format_options=options, include=["linear1|qkv.weight"])
    out = load(target)
    expected = dict(before)
    for name in [f"{prefix}{layer}" for layer in LAYERS]:
        x = before[f"{name}.weight"].astype(np.float32)
        by = np.abs(x).max() / np.float32(448)
        expected[f"{name}.weight"], expected[f"{name}.{scale}"] = (x / by).astype(E4M3), by.reshape(())
    if marker is not None:
        expected[f"{prefix}scaled_fp8"] = np.zeros(marker, E4M3)
    assert sorted(out) == sorted(expected)
    for name, want in expected.items():
        assert (out[name].dtype, out[name].shape) == (want.dtype, want.shape), name
        assert_bitwise_equal(out[name], want, name)
    metadata = header_of(target)["__metadata__"]
    assert (metadata["format"], metadata["kept"]) == ("pt", "yes")
    if marker is None:
        how = {"format": "float8_e4m3fn", **({"full_precision_matrix_mult": True} if "activations" in options else {})}
        layers = {f"{prefix}{layer}": how for layer in LAYERS}
        assert json.loads(metadata["_quantization_metadata"]) == {"format_version": "1.0", "layers": layers}
    else:
        assert "_quantization_metadata" not in metadata

    monkeypatch.setattr(stored_model, "_BLOCK_BYTES", 100)
    reader = open_quantized(target)
    assert isinstance(reader, ComfyUICheckpoint)
    assert set(reader.entries) == set(before)
    assert (reader.config, reader.metadata) == (None, {"format": "pt", "kept": "yes"})
    assert reader.provenance["scheme"] == "e4m3_tensor"
    for name, x in before.items():
        entry = reader.entries[name]
        assert (entry.info.dtype, entry.info.shape) == ("float16", x.shape)
        if entry.scheme is not None:
            want = reference.dequantize(*reference.quantize(x, SCHEME)[:3], SCHEME, x.shape[1], "float16")
            assert_bitwise_equal(decoded_by(reader, name, "float16"), want)
    assert {n for n, e in reader.entries.items() if e.scheme} == {f"{prefix}{layer}.weight" for layer in LAYERS}


def test_the_dtype_of_the_weights_is_noted_in_the_file(tmp_path: Path) -> None:
    """A directory's config.json says it too, and does not travel with one file."""
    source = source_of(tmp_path / "m").parent
    (source / "config.json").write_text(json.dumps({"torch_dtype": "float16", "_class_name": "FluxTransformer2DModel"}))
    target = tmp_path / "out.safetensors"
    quantize(source, target, "e4m3_tensor", format="comfyui", include=["linear1"])
    assert ComfyUICheckpoint(target).entries[f"{LAYERS[1]}.weight"].info.dtype == "float16"


def sink_of(tmp_path: Path, names: tuple[str, ...] = (), **options: Any) -> ComfyUISink:
    return ComfyUISink(Output(tmp_path / "out", is_directory=False), None, names=names, **options)


@pytest.mark.parametrize(
    ("name", "shape", "scheme", "words"),
    [
        ("a.weight", (8, 8), "e4m3_channel", "comfyui has e4m3_tensor only"),
        ("a.weight", (8, 8), "q4_0", "comfyui has e4m3_tensor only, not q4_0"),
        ("a.weight", (8, 8, 3, 3), "e4m3_tensor", "linear modules only"),
        ("a.bias", (8, 8), "e4m3_tensor", "linear modules only"),
        ("cond_stage_model.q.weight", (8, 8), "e4m3_tensor", "not under model.diffusion_model"),
    ],
)
def test_what_it_cannot_carry_is_refused(
    tmp_path: Path, name: str, shape: tuple[int, ...], scheme: str, words: str
) -> None:
    sink = sink_of(tmp_path, ("model.diffusion_model.x.weight",) if "cond" in name else ())
    with pytest.raises(FormatError, match=words):
        sink.scheme_for(TensorInfo(name, "float16", shape, Path("m"), 0, 0), Scheme.parse(scheme))


def test_shards_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="leave out --max-shard-size"):
        sink_of(tmp_path, max_shard_size=1000)


def test_names_of_diffusers_are_a_warning(tmp_path: Path) -> None:
    infos = [
        TensorInfo(n, "float16", (8, 8), Path("m"), 0, 0) for n in ("a.attn.to_q.weight", "double_blocks.0.weight")
    ]
    (warning,) = sink_of(tmp_path).warnings([Entry(info, SCHEME, "") for info in infos])
    assert warning.startswith("ComfyUI renames the weights of diffusers, but no scales of them; 1 tensors")


# Reading.


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comfyui")
    options = {"format": "comfyui", "include": ["linear1"]}
    return quantize(source_of(folder / "m"), folder / "out.safetensors", "e4m3_tensor", **options)


def changed(file: Path, to: Path, change: Any, metadata: dict[str, str] | None = None) -> Path:
    tensors = dict(load(file))
    change(tensors)
    write_safetensors(to, tensors, metadata)
    return to


def without_scales(tensors: dict[str, np.ndarray]) -> None:
    for name in [n for n in tensors if n.endswith(".scale_weight")]:
        del tensors[name]


NAME = "single_blocks.0.linear1"
HOW = np.frombuffer(b'{"format": "float8_e4m3fn", "full_precision_matrix_mult": true}', np.uint8)


def test_a_description_in_a_tensor_is_read(written: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[f"{NAME}.weight_scale"] = tensors.pop(f"{NAME}.scale_weight").reshape(1)
        tensors[f"{NAME}.comfy_quant"], tensors[f"{NAME}.input_scale"] = HOW, np.ones((), np.float32)
        del tensors["scaled_fp8"]

    reader = ComfyUICheckpoint(changed(written, tmp_path / "f.safetensors", change))
    before = ComfyUICheckpoint(written)
    assert reader.entries.keys() == before.entries.keys()
    # Nothing says what type the weights had.
    assert reader.entries[f"{NAME}.weight"].info.dtype == "bfloat16"
    got, want = (decoded_by(r, f"{NAME}.weight", "float32") for r in (reader, before))
    assert_bitwise_equal(got, want)


@pytest.mark.parametrize(
    ("change", "metadata", "words"),
    [
        (without_scales, None, "no quantized checkpoint but a safetensors file"),
        (lambda t: t.update({f"{NAME}.scale_weight": np.ones(2, np.float32)}), None, "scale_weight is float32 .2."),
        (lambda t: t.update({f"{NAME}.scale_weight": np.ones((), np.int32)}), None, "scale_weight is int32"),
        (lambda t: t.update({f"{NAME}.comfy_quant": HOW[:9]}), None, "comfy_quant is no JSON"),
        (lambda t: t.update({f"{NAME}.comfy_quant": np.frombuffer(b"[]", np.uint8)}), None, "is described as"),
        (lambda t: None, {"_quantization_metadata": "{"}, "of its metadata cannot be read"),
        (lambda t: None, {"_quantization_metadata": "3"}, "of its metadata cannot be read"),
        (lambda t: None, {"_quantization_metadata": json.dumps({"layers": {NAME: {"format": "nvfp4"}}})}, "'nvfp4'"),
    ],
)
def test_a_broken_file_is_a_clear_error(
    written: Path, tmp_path: Path, change: Any, metadata: dict[str, str] | None, words: str
) -> None:
    with pytest.raises(SourceError, match=words):
        ComfyUICheckpoint(changed(written, tmp_path / "f.safetensors", change, metadata))


@given(
    text=st.text(max_size=30) | st.recursive(st.none() | st.text(max_size=3), st.lists, max_leaves=3).map(json.dumps)
)
def test_junk_in_the_metadata_is_an_error_or_no_matter(
    written: Path, tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    file = tmp_path_factory.getbasetemp() / "junk.safetensors"
    try:
        reader = ComfyUICheckpoint(changed(written, file, lambda t: None, {"_quantization_metadata": text}))
        assert list(reader.blocks(f"{NAME}.weight"))
    except SourceError:
        pass


# ComfyUI's library.


@pytest.mark.interop
@pytest.mark.parametrize("options", [{}, METADATA])
def test_the_library_of_comfyui_decodes_the_same_values(tmp_path: Path, options: dict[str, str]) -> None:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from comfy_kitchen.tensor import QuantizedTensor, TensorCoreFP8Layout

    source = source_of(tmp_path / "m", dtype="float32")
    target = tmp_path / "out.safetensors"
    quantize(source, target, "e4m3_tensor", format="comfyui", format_options=options, include=["linear1|qkv.weight"])
    tensors, reader = load(target), ComfyUICheckpoint(target)
    for layer in LAYERS:
        codes = torch_tensor(tensors[f"{layer}.weight"])
        scale = torch_tensor(tensors[f"{layer}.weight_scale" if options else f"{layer}.scale_weight"])
        params = TensorCoreFP8Layout.Params(scale=scale, orig_dtype=torch.float32, orig_shape=tuple(codes.shape))
        got = QuantizedTensor(codes, "TensorCoreFP8Layout", params).dequantize()
        assert_bitwise_equal(got.numpy(), decoded_by(reader, f"{layer}.weight", "float32"))
        # And what it makes of the weights itself, with the scale that we have.
        x = torch_tensor(load(source)[f"{layer}.weight"])
        own, _ = TensorCoreFP8Layout.quantize(x)
        assert float((own.view(torch.uint8) == codes.view(torch.uint8)).float().mean()) > 0.99
