"""AWQ output: its words by a packer written from AutoAWQ's text, its config, and the words that GPTQModel packs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arrowquant_gpu import reference
from arrowquant_gpu.dtypes import DTYPES
from arrowquant_gpu.errors import FormatError
from arrowquant_gpu.formats import awq, stored_model
from arrowquant_gpu.formats import pieces as formats_pieces
from arrowquant_gpu.formats.awq import AwqCheckpoint, AwqSink
from arrowquant_gpu.formats.output import Output
from arrowquant_gpu.formats.quantized import open_quantized
from arrowquant_gpu.schemes import Scheme

from . import format_checks
from .bitwise import assert_bitwise_equal
from .model_files import decoded_by, entry_of, load, model, quantize, rewrite, torch_tensor, with_config, with_tensor
from .real_loaders import decoders

RNG = np.random.default_rng(20261123)


def packed_as_autoawq(values: np.ndarray) -> np.ndarray:
    """Words [lines, N / 8] of the values [lines, N]: for each column of words, each of 8 in AutoAWQ's order_map."""
    words = np.zeros((values.shape[0], values.shape[1] // 8), np.uint32)
    for column in range(words.shape[1]):
        for i, of_eight in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
            words[:, column] |= values[:, column * 8 + of_eight].astype(np.uint32) << np.uint32(4 * i)
    return words.view(np.int32)


# Words.


def test_words_by_hand(tmp_path: Path) -> None:
    # Scale 1 in every row: 15 steps from -7 to 8. Row n has the code n + 1 in column 0, and is 0 elsewhere but for 8.
    weights = np.zeros((8, 16), np.float32)
    weights[:, 0] = np.arange(8) - 6
    weights[:, 14:] = [-7, 8]
    out = load(quantize(model(tmp_path / "m", {"a.weight": weights}), tmp_path / "out", "int4_g16_asym", format="awq"))
    assert {k: (v.dtype.name, v.shape) for k, v in out.items()} == {
        "a.qweight": ("int32", (16, 1)),
        "a.qzeros": ("int32", (1, 1)),
        "a.scales": ("float16", (1, 8)),
    }
    words = [f"{w & 0xFFFFFFFF:08x}" for w in out["a.qweight"][:, 0].tolist()]
    # From the high nibble down these are the rows 7 5 3 1 6 4 2 0.
    assert words == ["86427531", *["77777777"] * 13, "00000000", "ffffffff"]
    assert out["a.qzeros"].tolist() == [[0x77777777]]
    assert out["a.scales"].tolist() == [[1.0] * 8]


PARTS = [
    *(
        (f"int4_{grain}{asym}", shape)
        for asym in ("", "_asym")
        for grain, shape in [("g32", (40, 64)), ("g16", (72, 48))]
    ),
    ("int4_channel_asym", (8, 90)),
    ("int4_channel", (136, 64)),
]


@pytest.mark.parametrize(("scheme", "shape"), PARTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_part_against_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, shape: tuple[int, int], dtype: str
) -> None:
    monkeypatch.setattr(formats_pieces, "PIECE_BYTES", 40 * shape[1] * DTYPES[dtype].bits // 8)
    # Several strips, and a part of one.
    monkeypatch.setattr(awq, "STRIP_WORDS", 3)
    monkeypatch.setattr(awq, "STRIP_COLUMNS", 5)
    weights = RNG.standard_normal(shape, np.float32).astype(DTYPES[dtype].numpy)
    weights[1], weights[2] = np.abs(weights[1]), -np.abs(weights[2])
    target = quantize(model(tmp_path / "m", {"a.weight": weights}), tmp_path / "out", scheme, format="awq")
    out = load(target)
    parsed = dataclasses.replace(Scheme.parse(scheme), scale_dtype="float16")
    packed, scales, zeros, _ = reference.quantize(weights, parsed)
    zeros = np.full(scales.shape, 8, np.uint8) if zeros is None else zeros
    assert_bitwise_equal(out["a.qweight"], packed_as_autoawq(reference.unpack(packed, 4, shape[1]).T))
    assert_bitwise_equal(out["a.qzeros"], packed_as_autoawq(zeros.T))
    assert_bitwise_equal(out["a.scales"], np.ascontiguousarray(scales.T))

    monkeypatch.setattr(stored_model, "_BLOCK_BYTES", 32 * packed.shape[1])
    checkpoint = open_quantized(target)
    assert isinstance(checkpoint, AwqCheckpoint)
    entry = checkpoint.entries["a.weight"]
    # A file has zero points whether or not all of them are 8.
    asymmetric = dataclasses.replace(parsed, symmetric=False)
    assert (entry.info.dtype, entry.info.shape, entry.scheme) == (dtype, shape, asymmetric)
    format_checks.blocks(checkpoint, "a.weight", 32, packed, scales, zeros)


@pytest.mark.parametrize("scheme", ["int4_g32_asym_f16", "int4_channel_f16"])
@pytest.mark.parametrize("piece_bytes", [1, 20_000, 1 << 20])
def test_pieces_in_any_order_make_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, piece_bytes: int
) -> None:
    weights = RNG.standard_normal((200, 192), np.float32)
    format_checks.pieces(tmp_path, monkeypatch, RNG, weights, Scheme.parse(scheme), piece_bytes, AwqSink)


# config.json.


def sink_of(folder: Path) -> AwqSink:
    return AwqSink(Output(folder / "none", is_directory=True), {"model_type": "llama"})


@pytest.mark.parametrize(
    ("tensors", "scheme", "size", "kept"),
    [
        ({"a.weight": (8, 64), "lm_head.weight": (8, 64)}, "int4_g64_asym", 64, ["lm_head"]),
        ({"a.weight": (8, 64), "b.weight": (8, 48)}, "int4_g32", 32, ["b"]),
        ({"a.weight": (8, 64)}, "int4_channel", -1, None),
    ],
)
def test_config(
    tmp_path: Path, tensors: dict[str, tuple[int, int]], scheme: str, size: int, kept: list[str] | None
) -> None:
    source = model(tmp_path / "m", {name: np.ones(shape, np.float32) for name, shape in tensors.items()})
    target = quantize(source, tmp_path / "out", scheme, format="awq")
    assert json.loads((target / "config.json").read_text())["quantization_config"] == {
        "quant_method": "awq",
        "bits": 4,
        "group_size": size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": kept,
    }


def test_several_group_sizes_are_refused(tmp_path: Path) -> None:
    entries = [entry_of("a.weight", (64, 256), f"int4_g{size}_asym_f16") for size in (128, 32)]
    for use in (sink_of(tmp_path).warnings, sink_of(tmp_path).quantization):
        with pytest.raises(FormatError, match="one group size for all tensors, not 32, 128; use int4_g128_asym_f16"):
            use(entries)


@pytest.mark.parametrize(
    ("name", "scheme", "shape", "words"),
    [
        ("a.weight", "int4_g128_asym_f16", (64, 256), []),
        ("a.weight", "int4_channel_f16", (64, 256), []),
        ("a.weight", "int4_g16_f16", (64, 256), ["vLLM has fast kernels for groups"]),
        ("a.weight", "int4_g256_f16", (64, 256), ["GPTQModel, with which", "vLLM has fast kernels for groups"]),
        ("a.weight", "int4_g32_f16", (32, 256), ["multiples of 64 rows"]),
        ("layers.0.experts.3.w1.weight", "int4_g32_f16", (64, 256), ["transformers 5 loads no experts"]),
    ],
)
def test_warnings_name_the_engine_and_the_rule(
    tmp_path: Path, name: str, scheme: str, shape: tuple[int, int], words: list[str]
) -> None:
    format_checks.warnings(sink_of(tmp_path), entry_of(name, shape, scheme), words)


@pytest.mark.parametrize(
    ("scheme", "shape", "words"),
    [
        ("int8_g32", (32, 64), "has int4 codes .* not int8_g32; use int4_g128"),
        ("int4_tensor", (32, 64), "not int4_tensor"),
        ("int4_g32_bf16", (32, 64), "scales in float16, not in bfloat16"),
        ("int4_g32", (32, 80), "rows of 80 weights are not whole groups of 32"),
        ("int4_channel", (20, 64), r"\[20, 64\] weights do not fill the words of awq"),
        ("int4_channel", (32, 63), r"\[32, 63\] weights do not fill the words of awq"),
        ("int4_g32", (2, 32, 64), "only 2-D weights of linear modules"),
    ],
)
def test_what_it_cannot_carry(tmp_path: Path, scheme: str, shape: tuple[int, ...], words: str) -> None:
    format_checks.not_carried(sink_of(tmp_path), entry_of("a.weight", shape, scheme), words)


# Reading what is not right, and what others write.


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    tensors = {"a.weight": RNG.standard_normal((16, 64), np.float32), "norm.weight": np.ones(64, np.float32)}
    return quantize(model(tmp_path / "m", tensors), tmp_path / "out", "int4_g32_asym", format="awq")


def test_files_of_other_writers(quantized: Path) -> None:
    before = next(AwqCheckpoint(quantized).blocks("a.weight"))[1]
    config = {"quant_method": "awq", "w_bit": 4, "q_group_size": 32, "version": "GEMM"}
    rewrite(quantized, lambda t, c: (c.pop("arrowquant"), c.update(quantization_config=config)))
    assert_bitwise_equal(next(AwqCheckpoint(quantized).blocks("a.weight"))[1].packed, before.packed)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, c: t.pop("a.scales"), "a.scales is missing"),
        (lambda t, c: t.pop("a.qzeros"), "a.qzeros is missing; int4_g32_asym_f16 of .16, 64. has int32 .2, 2."),
        (with_tensor("a.scales", np.ones((2, 8), np.float16)), "a.scales is float16 .2, 8."),
        (with_tensor("a.qzeros", np.ones((2, 2), np.int8)), "a.qzeros is int8"),
        (with_tensor("a.qweight", np.ones((60, 2), np.int32)), "are not whole groups"),
        (with_config(bits=8), "AWQ of 8 bits"),
        (with_config(group_size=0), "group size 0"),
        (with_config(group_size=[1]), "a: "),
        (with_config(version="gemv"), "AWQ version 'gemv'"),
    ],
)
def test_a_broken_checkpoint_is_a_clear_error(quantized: Path, change: Any, words: str) -> None:
    format_checks.broken(AwqCheckpoint, quantized, "a.weight", "int4_g32_asym_f16", change, words)


@settings(max_examples=60, deadline=None)
@given(
    size=st.sampled_from([None, -1, 0, 1, 2, 3, 8, True, 2.0, "8", [], {}]),
    parts=st.dictionaries(
        st.sampled_from(["qweight", "qzeros", "scales"]),
        st.tuples(st.sampled_from([np.int32, np.float16]), st.lists(st.integers(0, 9), max_size=3)),
        min_size=1,
    ),
)
def test_any_config_and_any_parts_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, size: Any, parts: dict[str, tuple[Any, list[int]]]
) -> None:
    folder = tmp_path_factory.mktemp("hostile")
    tensors = {f"a.{part}": np.zeros(shape, dtype) for part, (dtype, shape) in parts.items()}
    model(folder / "m", tensors, {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": size}})
    format_checks.read_or_refused(AwqCheckpoint, folder / "m")


# The real packer.


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scheme", ["int4_g32_asym", "int4_g64"])
def test_gptqmodel_packs_the_same_words(tmp_path: Path, scheme: str) -> None:
    """What it packs from decoded weights, scales and zero points are these tensors."""
    import torch
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    shape, parsed = (96, 128), Scheme.parse(f"{scheme}_f16")
    weights = RNG.standard_normal(shape, np.float32)
    packed, scales, zeros, _ = reference.quantize(weights, parsed)
    decoded = reference.dequantize(packed, scales, zeros, parsed, shape[1])
    out = load(quantize(model(tmp_path / "m", {"a.weight": weights}), tmp_path / "out", scheme, format="awq"))

    linear = torch.nn.Linear(shape[1], shape[0], bias=False)
    linear.weight.data = torch.from_numpy(decoded)
    layer = AwqTorchLinear(4, parsed.group_size, False, False, *shape[::-1], bias=False, register_buffers=True)
    all_zeros = np.full(scales.shape, 8, np.uint8) if zeros is None else zeros
    layer.pack(linear, torch_tensor(scales).float(), torch.from_numpy(all_zeros.astype(np.float32)))
    for part in ("qweight", "qzeros", "scales"):
        assert_bitwise_equal(out[f"a.{part}"], getattr(layer, part).numpy(), part)


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("scheme", ["int4_g32_asym", "int4_channel"])
def test_gptqmodel_decodes_what_dequantize_does(tmp_path: Path, scheme: str) -> None:
    source = model(tmp_path / "m", {"a.weight": RNG.standard_normal((96, 128), np.float32).astype(np.float16)})
    target = quantize(source, tmp_path / "out", scheme, format="awq")
    found = decoders.checkpoint(target, ("qweight",), decoders.awq)["a.weight"].numpy()
    assert_bitwise_equal(np.ascontiguousarray(found), decoded_by(AwqCheckpoint(target), "a.weight", "float16"))
