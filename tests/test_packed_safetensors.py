"""Plain safetensors of packed tensors: every scheme and shape there and back, and what is not right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from arrowquant_gpu import reference
from arrowquant_gpu.dtypes import DTYPES
from arrowquant_gpu.errors import FormatError, SourceError
from arrowquant_gpu.formats import Codes, Entry, stored_model
from arrowquant_gpu.formats import pieces as formats_pieces
from arrowquant_gpu.formats.checkpoint import open_checkpoint
from arrowquant_gpu.formats.output import Output
from arrowquant_gpu.formats.packed_safetensors import PackedSafetensorsCheckpoint, PackedSafetensorsSink
from arrowquant_gpu.formats.quantized import open_quantized
from arrowquant_gpu.formats.quantized import pieces as read_pieces
from arrowquant_gpu.schemes import NAMED, Scheme
from arrowquant_gpu.tensor import QuantizedTensor

from .bitwise import assert_bitwise_equal
from .fixtures import tiny_llama, write_safetensors
from .model_files import copied, load, model, quantize, rewrite, written_in

RNG = np.random.default_rng(20261126)

SCHEMES = [
    *("int4_g128", "int3_g100_asym_bf16", "int5_channel", "int8_tensor_asym", "int6_g7", "int2_tensor"),
    *("affine4_g64", "affine3_g32_bf16", "nf4_g64", "fp4_g32"),
    *("e4m3_tensor", "e4m3_channel_f16", "e4m3_b128", "e5m2_g32", "e5m2_b128_bf16"),
    *NAMED,
]


def random_codes(scheme: Scheme, shape: tuple[int, ...]) -> Codes:
    """Random bytes of the right shapes: the format looks at none of them."""

    def array(dtype: str, wanted: tuple[int, ...]) -> np.ndarray:
        n = int(np.prod(wanted)) * DTYPES[dtype].bits // 8
        return RNG.integers(0, 256, n, np.uint8).view(DTYPES[dtype].numpy).reshape(wanted)

    beside = scheme.zeros_shape(shape)
    zeros = None if beside is None or scheme.zeros_dtype is None else array(scheme.zeros_dtype, beside)
    return Codes(
        array("uint8", scheme.packed_shape(shape)), array(scheme.scale_storage, scheme.scales_shape(shape)), zeros
    )


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(300, 768), (3, 256, 256), (512,), (0, 256)])
def test_every_scheme_and_shape_there_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, shape: tuple[int, ...]
) -> None:
    parsed = Scheme.parse(scheme)
    file = tmp_path / "source.safetensors"
    write_safetensors(file, {"some.tensor": np.zeros(shape, np.float16), "kept": np.arange(5)}, {"kept": "yes"})
    source = open_checkpoint(file)
    entries = [Entry(source.tensors["some.tensor"], parsed, ""), Entry(source.tensors["kept"], None, "")]
    codes, outputs = random_codes(parsed, shape), []
    for name, size in (("one", 1 << 24), ("rows", 3000), ("within", 200)):
        monkeypatch.setattr(formats_pieces, "PIECE_BYTES", size)
        sink = PackedSafetensorsSink(Output(tmp_path / name, is_directory=True), None)
        assert sink.scheme_for(entries[0].info, parsed) == parsed
        assert list(written_in(RNG, sink, sink._output, entries[0], codes, source)) == []
        outputs.append((tmp_path / name / "model.safetensors").read_bytes())
    assert outputs[0] == outputs[1] == outputs[2]

    monkeypatch.setattr(stored_model, "_BLOCK_BYTES", 3000)
    reader = open_quantized(tmp_path / "one")
    assert isinstance(reader, PackedSafetensorsCheckpoint)
    (entry,) = reader.entries.values()
    assert (entry.info.name, entry.info.dtype, entry.info.shape) == ("some.tensor", "float16", shape)
    assert entry.scheme == parsed
    assert (reader.config, reader.metadata) == (None, {"kept": "yes", "format": "pt"})
    parts = [q for _, q in reader.blocks("some.tensor")]
    assert all(isinstance(q, QuantizedTensor) for q in parts)
    if 0 not in shape:
        assert len(parts) == 1 or len(shape) > 1
        assert_bitwise_equal(np.concatenate([q.packed for q in parts]), codes.packed)
        whole = parsed.granularity == "tensor"
        scales = parts[0].scales if whole else np.concatenate([q.scales for q in parts])
        assert_bitwise_equal(scales, codes.scales)
        if codes.zeros is not None:
            once = whole or parsed.scale_rule == "global"
            zeros = parts[0].zeros if once else np.concatenate([q.zeros for q in parts])
            assert_bitwise_equal(zeros, codes.zeros)
        assert sum(np.prod(q.shape) for _, q in read_pieces(reader, "some.tensor", 1000)) == np.prod(shape)


def test_a_model_keeps_what_lies_beside_it(tmp_path: Path) -> None:
    source = tiny_llama(tmp_path / "source", shards=2, hidden=128)
    target = quantize(source, tmp_path / "out", "int4_g100_asym", format="safetensors")
    original = json.loads((source / "config.json").read_text())
    config = json.loads((target / "config.json").read_text())
    assert config.pop("quantization_config") == {"quant_method": "arrowquant"}
    assert config.pop("arrowquant")["scheme"] == "int4_g100_asym"
    assert config == original
    assert (target / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    index = json.loads((target / "model.safetensors.index.json").read_text())["weight_map"]
    assert index["model.layers.0.mlp.up_proj.weight.packed"] == index["model.layers.0.mlp.up_proj.weight.zeros"]
    before, reader = load(source), open_quantized(target)
    assert (set(reader.entries), reader.config) == (set(before), original)
    for name, x in before.items():
        if (scheme := reader.entries[name].scheme) is not None:
            packed, scales, zeros, _ = reference.quantize(x, scheme)
            ((_, q),) = reader.blocks(name)
            assert isinstance(q, QuantizedTensor)
            for got, want in ((q.packed, packed), (q.scales, scales), (q.zeros, zeros)):
                assert_bitwise_equal(got, want, name)


def test_the_safetensors_library_reads_the_description(tmp_path: Path) -> None:
    tensors = {"a.weight": RNG.standard_normal((4, 64), np.float32)}
    target = quantize(model(tmp_path / "m", tensors), tmp_path / "out", "nvfp4", format="safetensors")
    with safe_open(target / "model.safetensors", "np") as f:
        described = json.loads(f.metadata()["arrowquant.tensor.a.weight"])
        assert described == {"scheme": "nvfp4", "shape": [4, 64], "dtype": "float32"}
        assert f.get_tensor("a.weight.packed").shape == (4, 32)
        assert (f.get_tensor("a.weight.scales").dtype, f.get_tensor("a.weight.zeros").dtype) == (np.uint8, np.float32)


def test_a_row_that_blocks_do_not_divide_is_refused(tmp_path: Path) -> None:
    source = open_checkpoint(model(tmp_path / "m", {"a.weight": np.ones((4, 40), np.float32)}))
    sink = PackedSafetensorsSink(Output(tmp_path / "out", is_directory=True), None)
    with pytest.raises(FormatError, match="not whole blocks of 256"):
        sink.scheme_for(source.tensors["a.weight"], Scheme.parse("q4_k"))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    tensors = {"a.weight": RNG.standard_normal((4, 64), np.float32), "norm.weight": np.ones(64, np.float32)}
    return quantize(model(folder / "m", tensors), folder / "out", "int4_g32_asym", format="safetensors")


def rewritten(folder: Path, change: Any, **described: Any) -> None:
    """The same with other tensors and another description."""
    record = {"scheme": "int4_g32_asym", "shape": [4, 64], "dtype": "float32", **described}
    tensors = dict(load(folder))
    change(tensors)
    write_safetensors(folder / "model.safetensors", tensors, {"arrowquant.tensor.a.weight": json.dumps(record)})


@pytest.mark.parametrize(
    ("change", "described", "words"),
    [
        (lambda t: t.pop("a.weight.packed"), {}, "a.weight.packed is missing, though the metadata describe a.weight"),
        (
            lambda t: t.pop("a.weight.scales"),
            {},
            "a.weight.scales is missing; int4_g32_asym .4, 64. has float32 .4, 2.",
        ),
        (lambda t: t.pop("a.weight.zeros"), {}, "a.weight.zeros is missing"),
        (lambda t: None, {"scheme": "int9_g32"}, "the metadata of a.weight cannot be read: SchemeError"),
        (lambda t: None, {"scheme": "int8_g32_asym"}, "a.weight.packed is uint8 .4, 32."),
        (lambda t: None, {"scheme": "q4_k"}, "not whole blocks of 256"),
        (lambda t: None, {"shape": [4, -64]}, "shape .4, -64., no list of sizes"),
        (lambda t: None, {"shape": "4"}, "no list of sizes"),
        (lambda t: None, {"dtype": "int4"}, "dtype 'int4'; expected one of"),
    ],
)
def test_a_broken_checkpoint_is_a_clear_error(
    written: Path, tmp_path: Path, change: Any, described: dict[str, Any], words: str
) -> None:
    copy = copied(written, tmp_path / "copy")
    rewritten(copy, lambda t: None)
    assert PackedSafetensorsCheckpoint(copy).entries["a.weight"].scheme == Scheme.parse("int4_g32_asym")
    rewritten(copy, change, **described)
    with pytest.raises(SourceError, match=words):
        PackedSafetensorsCheckpoint(copy)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@given(key=st.sampled_from(["scheme", "shape", "dtype"]), junk=JUNK)
def test_junk_in_the_description_is_an_error(
    written: Path, tmp_path_factory: pytest.TempPathFactory, key: str, junk: Any
) -> None:
    copy = tmp_path_factory.getbasetemp() / "junk"
    if not copy.exists():
        copied(written, copy)
    rewritten(copy, lambda t: None, **{key: junk})
    with pytest.raises(SourceError):
        PackedSafetensorsCheckpoint(copy)


def test_another_method_is_not_read_as_this_one(written: Path, tmp_path: Path) -> None:
    copy = copied(written, tmp_path / "copy")
    rewrite(copy, lambda t, c: c["quantization_config"].update(quant_method="unknown"))
    with pytest.raises(SourceError, match="quant_method 'unknown'"):
        open_quantized(copy)
