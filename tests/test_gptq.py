"""GPTQ output: its words by the text of the format, its config, and the words that GPTQModel's own packer makes."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arrowquant_gpu import reference
from arrowquant_gpu.dtypes import DTYPES
from arrowquant_gpu.errors import SourceError
from arrowquant_gpu.formats import pieces as formats_pieces
from arrowquant_gpu.formats import stored_model
from arrowquant_gpu.formats.gptq import GptqSink
from arrowquant_gpu.formats.gptq_checkpoint import GptqCheckpoint
from arrowquant_gpu.formats.output import Output
from arrowquant_gpu.formats.quantized import open_quantized
from arrowquant_gpu.schemes import Scheme

from . import format_checks
from .bitwise import assert_bitwise_equal
from .model_files import decoded_by, entry_of, load, model, quantize, rewrite, torch_tensor, with_config, with_tensor
from .real_loaders import decoders

RNG = np.random.default_rng(20261122)
V2 = {"checkpoint_format": "gptq_v2"}


def stream_by_hand(words: np.ndarray, bits: int) -> np.ndarray:
    """The codes of each line of int32 words, bit by bit: code i is bits i*bits .. of the line."""
    lines = words.astype(np.int64) & 0xFFFFFFFF
    n = words.shape[1] * 32 // bits
    out = np.zeros((len(words), n), np.uint8)
    for i in range(n):
        for b in range(bits):
            at = i * bits + b
            out[:, i] |= ((lines[:, at // 32] >> (at % 32)) & 1).astype(np.uint8) << b
    return out


# Words.


def test_words_by_hand(tmp_path: Path) -> None:
    # Scale 1: the largest magnitude is 7.5, and every other weight is its own code. All rows but the first are 0.
    weights = np.zeros((32, 32), np.float32)
    weights[0] = np.tile([-7.5, -7, -3, -1, 0, 1, 3, 7], 4)
    out = load(quantize(model(tmp_path / "m", {"a.weight": weights}), tmp_path / "out", "int4_channel", format="gptq"))
    assert {k: (v.dtype.name, v.shape) for k, v in out.items()} == {
        "a.g_idx": ("int32", (32,)),
        "a.qweight": ("int32", (4, 32)),
        "a.qzeros": ("int32", (1, 4)),
        "a.scales": ("float16", (1, 32)),
    }
    words = [[f"{w & 0xFFFFFFFF:08x}" for w in line] for line in out["a.qweight"][:, :2].tolist()]
    assert words == [["fb987510", "88888888"]] * 4
    assert [f"{w & 0xFFFFFFFF:08x}" for w in out["a.qzeros"][0].tolist()] == ["77777777"] * 4
    assert out["a.scales"][0, 0] == 1
    assert not out["a.g_idx"].any()


PARTS = [
    *((f"int{bits}_g32", shape, {}) for bits in (2, 3, 4, 8) for shape in [(32, 32), (96, 64)]),
    *((f"int{bits}_g32_asym", (96, 64), V2) for bits in (2, 3, 4, 8)),
    *((f"int{bits}_channel", (64, 96), V2) for bits in (2, 3, 4, 8)),
]


@pytest.mark.parametrize(("scheme", "shape", "options"), PARTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_part_against_the_reference(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scheme: str,
    shape: tuple[int, int],
    options: dict[str, str],
    dtype: str,
) -> None:
    monkeypatch.setattr(formats_pieces, "PIECE_BYTES", 40 * shape[1] * DTYPES[dtype].bits // 8)
    weights = RNG.standard_normal(shape, np.float32).astype(DTYPES[dtype].numpy)
    # Some zero points are 0, and some the highest there is.
    weights[1], weights[2] = np.abs(weights[1]), -np.abs(weights[2])
    source = model(tmp_path / "m", {"a.weight": weights, "a.bias": np.ones(shape[0], np.float32)})
    target = quantize(source, tmp_path / "out", scheme, format="gptq", format_options=options)
    out = load(target)
    parsed = dataclasses.replace(Scheme.parse(scheme), scale_dtype="float16")
    packed, scales, zeros, _ = reference.quantize(weights, parsed)
    codes = reference.unpack(packed, parsed.bits, shape[1])
    assert_bitwise_equal(stream_by_hand(out["a.qweight"].T, parsed.bits), codes)
    assert_bitwise_equal(out["a.scales"], np.ascontiguousarray(scales.T))
    want = np.full(scales.shape, parsed.offset, np.uint8) if zeros is None else zeros
    less = np.uint8(0 if options else 1)
    assert_bitwise_equal(stream_by_hand(out["a.qzeros"], parsed.bits), np.ascontiguousarray(want.T) - less)
    assert_bitwise_equal(out["a.g_idx"], np.arange(shape[1], dtype=np.int32) // parsed.group_length(shape[1]))
    assert_bitwise_equal(out["a.bias"], np.ones(shape[0], np.float32))

    monkeypatch.setattr(stored_model, "_BLOCK_BYTES", 32 * packed.shape[1])
    checkpoint = open_quantized(target)
    assert isinstance(checkpoint, GptqCheckpoint)
    entry = checkpoint.entries["a.weight"]
    assert (entry.info.dtype, entry.info.shape, entry.scheme) == (dtype, shape, parsed)
    assert set(checkpoint.entries) == {"a.weight", "a.bias"}
    format_checks.blocks(checkpoint, "a.weight", 32, packed, scales, zeros)


@pytest.mark.parametrize(
    ("scheme", "options"), [("int3_g32_asym_f16", V2), ("int4_g64_f16", {}), ("int8_channel_f16", {})]
)
@pytest.mark.parametrize("piece_bytes", [1, 20_000, 1 << 20])
def test_pieces_in_any_order_make_the_same_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str, options: dict[str, str], piece_bytes: int
) -> None:
    weights = RNG.standard_normal((224, 192), np.float32)
    sink = functools.partial(GptqSink, **options)
    format_checks.pieces(tmp_path, monkeypatch, RNG, weights, Scheme.parse(scheme), piece_bytes, sink)


# config.json.


def quantization(target: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((target / "config.json").read_text())["quantization_config"]
    assert json.loads((target / "quantize_config.json").read_text()) == found
    return found


BASIC = {
    "quant_method": "gptq",
    "desc_act": False,
    "lm_head": False,
    "true_sequential": True,
    "damp_percent": 0.01,
    "static_groups": False,
}
LINEAR = np.ones((32, 64), np.float32)
ATTENTION = {f"model.layers.{i}.self_attn.{p}_proj.weight": LINEAR for i in (0, 1) for p in "oq"}


@pytest.mark.parametrize(
    ("tensors", "ignore", "own"),
    [
        ({**ATTENTION, "lm_head.weight": LINEAR}, (), {}),
        (
            {**ATTENTION, "model.layers.0.mlp.gate.weight": LINEAR},
            (),
            {
                "modules_in_block_to_quantize": [["self_attn.o_proj", "self_attn.q_proj"]],
                "dynamic": {"-:^model\\.layers\\.0\\.mlp\\.gate$": {}},
            },
        ),
        (
            ATTENTION,
            ("layers.1.self_attn.o",),
            {
                "modules_in_block_to_quantize": [
                    [n.removesuffix(".weight") for n in ATTENTION if "1.self_attn.o" not in n],
                ],
                "dynamic": {"-:^model\\.layers\\.1\\.self_attn\\.o_proj$": {}},
            },
        ),
        (
            {"encoder.layer.0.output.dense.weight": LINEAR, "pooler.dense.weight": LINEAR},
            (),
            {"block_name_to_quantize": "encoder.layer"},
        ),
    ],
)
def test_config(tmp_path: Path, tensors: dict[str, np.ndarray], ignore: tuple[str, ...], own: dict[str, Any]) -> None:
    source = model(tmp_path / "m", tensors)
    target = quantize(source, tmp_path / "out", "int4_g32", format="gptq", ignore=ignore)
    said = {"bits": 4, "group_size": 32, "sym": True, "checkpoint_format": "gptq"}
    assert quantization(target) == {**BASIC, **said, **own}


def sink_of(folder: Path, **options: str) -> GptqSink:
    return GptqSink(Output(folder / "none", is_directory=True), {"model_type": "llama"}, **options)


def test_several_schemes_are_said_by_name_and_warned_of(tmp_path: Path) -> None:
    entries = [entry_of(f"layers.{i}.w.weight", (64, 128), "int4_g32_f16") for i in (0, 1)]
    entries.append(entry_of("layers.2.w.weight", (64, 128), "int8_channel_f16"))
    sink = sink_of(tmp_path)
    said = sink.quantization(entries)["quantization_config"]
    assert (said["bits"], said["group_size"]) == (4, 32)
    assert said["dynamic"] == {"+:^layers\\.2\\.w$": {"bits": 8, "group_size": -1, "sym": True}}
    (warning,) = sink.warnings(entries)
    assert "transformers loads GPTQ of one scheme only" in warning


@pytest.mark.parametrize(
    ("scheme", "shape", "words"),
    [
        ("int4_g128_f16", (64, 256), []),
        ("int8_channel_f16", (64, 256), []),
        ("int3_g128_f16", (64, 256), ["4 and 8 bits only"]),
        ("int4_g128_asym_f16", (64, 256), ["symmetric GPTQ only"]),
        ("int4_g16_f16", (64, 256), ["vLLM has fast kernels for groups"]),
        ("int4_g96_f16", (64, 384), ["GPTQModel, with which", "vLLM has fast kernels for groups"]),
        ("int4_g32_f16", (32, 256), ["multiples of 64 rows"]),
        ("int4_g32_f16", (64, 96), ["multiples of 64 rows"]),
    ],
)
def test_warnings_name_the_engine_and_the_rule(
    tmp_path: Path, scheme: str, shape: tuple[int, int], words: list[str]
) -> None:
    format_checks.warnings(sink_of(tmp_path, **V2), entry_of("a.weight", shape, scheme), words)


@pytest.mark.parametrize(
    ("scheme", "shape", "options", "words"),
    [
        ("int4_g32_asym", (32, 64), {}, "no place for one that is 0, .*checkpoint_format=gptq_v2"),
        ("int6_g32", (32, 64), {}, "has int2, int3, int4, int8 codes .*use int4_g128"),
        ("nf4_g64", (32, 64), {}, "not nf4_g64; use int4_g128"),
        ("int4_tensor", (32, 64), {}, "not int4_tensor"),
        ("int4_g32_bf16", (32, 64), {}, "scales in float16, not in bfloat16"),
        ("int4_g32", (32, 80), {}, "rows of 80 weights are not whole groups of 32"),
        ("int4_channel", (40, 64), {}, r"\[40, 64\] weights do not fill the words of gptq"),
        ("int4_g16", (32, 48), {}, r"\[32, 48\] weights do not fill the words of gptq"),
        ("int4_g32", (2, 32, 64), {}, "only 2-D weights of linear modules"),
    ],
)
def test_what_it_cannot_carry(
    tmp_path: Path, scheme: str, shape: tuple[int, ...], options: dict[str, str], words: str
) -> None:
    format_checks.not_carried(sink_of(tmp_path, **options), entry_of("a.weight", shape, scheme), words)


# Reading what is not right, and what others write.


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    tensors = {"layers.0.a.weight": RNG.standard_normal((32, 64), np.float32), "norm.weight": np.ones(64, np.float32)}
    return quantize(model(tmp_path / "m", tensors), tmp_path / "out", "int4_g32", format="gptq")


def test_files_of_other_writers(quantized: Path) -> None:
    before = next(GptqCheckpoint(quantized).blocks("layers.0.a.weight"))[1]

    def change(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
        del tensors["layers.0.a.g_idx"], config["arrowquant"]
        config["quantization_config"] = {
            "quant_method": "gptq",
            "bits": 8,
            "group_size": -1,
            "dynamic": {"-:^x": {}, "+:.*a$": {"bits": 4, "group_size": 32}},
        }

    rewrite(quantized, change)
    read = GptqCheckpoint(quantized)
    after = next(read.blocks("layers.0.a.weight"))[1]
    assert read.entries["layers.0.a.weight"].scheme == Scheme.parse("int4_g32_f16")
    assert_bitwise_equal(after.packed, before.packed)
    assert [p.name for p in read.side_files] == ["README.md"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t, c: t.pop("layers.0.a.scales"), "a.scales is missing"),
        (lambda t, c: t.pop("layers.0.a.qzeros"), "a.qzeros is missing; int4_g32_f16 of .32, 64. has int32 .2, 4."),
        (with_tensor("layers.0.a.scales", np.ones((2, 32), np.int8)), "a.scales is int8"),
        (with_tensor("layers.0.a.scales", np.ones((3, 32), np.float16)), "a.scales is float16 .3, 32."),
        (with_tensor("layers.0.a.qweight", np.ones((8, 32), np.int64)), "a.qweight is int64"),
        (with_tensor("layers.0.a.qweight", np.ones((8,), np.int32)), "a.qweight is int32 .8."),
        (with_tensor("layers.0.a.qweight", np.ones((8, 0), np.int32)), "are not whole groups"),
        (with_tensor("layers.0.a.g_idx", np.arange(64, dtype=np.int32) % 2), "activation order"),
        (with_tensor("layers.0.a.g_idx", np.arange(32, dtype=np.int32)), "a.g_idx is int32 .32."),
        (with_config(bits=5), "bits 5"),
        (with_config(bits=8), "a.scales is float16 .2, 32."),
        (with_config(bits="4"), "bits '4'"),
        (with_config(group_size=0), "group size 0"),
        (with_config(group_size="many"), "layers.0.a"),
        (with_config(group_size=64), "a.scales is float16 .2, 32."),
        (with_config(checkpoint_format="marlin"), "checkpoint_format 'marlin'"),
        (with_config(dynamic=3), "dynamic of quantization_config"),
        (with_config(dynamic={"+:((": {}}), "no regular expression"),
    ],
)
def test_a_broken_checkpoint_is_a_clear_error(quantized: Path, change: Any, words: str) -> None:
    format_checks.broken(GptqCheckpoint, quantized, "layers.0.a.weight", "int4_g32_f16", change, words)


def test_other_zero_points_than_said_are_noticed(quantized: Path) -> None:
    rewrite(quantized, with_config(checkpoint_format="gptq_v2"))
    with pytest.raises(SourceError, match="zero points other than 8, but the scheme is symmetric"):
        list(GptqCheckpoint(quantized).blocks("layers.0.a.weight"))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 300)
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["gptq", "gemm"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=80, deadline=None)
@given(
    said=st.dictionaries(
        st.sampled_from(["bits", "group_size", "sym", "checkpoint_format", "format", "dynamic", "desc_act"]), JSON
    ),
    parts=st.dictionaries(
        st.sampled_from(["qweight", "qzeros", "scales", "g_idx"]),
        st.tuples(st.sampled_from([np.int32, np.float16, np.uint8]), st.lists(st.integers(0, 9), max_size=3)),
    ),
)
def test_any_config_and_any_parts_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, said: dict[str, Any], parts: dict[str, tuple[Any, list[int]]]
) -> None:
    folder = tmp_path_factory.mktemp("hostile")
    tensors = {f"a.{part}": np.zeros(shape, dtype) for part, (dtype, shape) in parts.items()}
    model(folder / "m", tensors or {"b.weight": LINEAR}, {"quantization_config": {"quant_method": "gptq", **said}})
    format_checks.read_or_refused(GptqCheckpoint, folder / "m")


# The real packer.


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("options", [{}, V2])
def test_gptqmodel_packs_the_same_words(tmp_path: Path, bits: int, options: dict[str, str]) -> None:
    """What it packs from decoded weights, scales and zero points are these tensors; version 1 by its own converter."""
    import torch
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import FORMAT
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    shape, asym = (96, 128), "_asym" if options else ""
    weights = RNG.standard_normal(shape, np.float32)
    scheme = Scheme.parse(f"int{bits}_g32{asym}_f16")
    packed, scales, zeros, _ = reference.quantize(weights, scheme)
    decoded = reference.dequantize(packed, scales, zeros, scheme, shape[1])
    source = model(tmp_path / "m", {"a.weight": weights})
    out = load(quantize(source, tmp_path / "out", f"int{bits}_g32{asym}", format="gptq", format_options=options))

    linear = torch.nn.Linear(shape[1], shape[0], bias=False)
    linear.weight.data = torch.from_numpy(decoded)
    kind = FORMAT(options.get("checkpoint_format", "gptq"))
    layer = TorchLinear(bits, 32, not options, False, *shape[::-1], bias=False, format=kind)
    all_zeros = np.full(scales.shape, scheme.offset, np.uint8) if zeros is None else zeros
    layer.pack_original(linear, torch_tensor(scales).float(), torch.from_numpy(all_zeros.astype(np.float32)))
    if not options:
        convert_gptq_v2_to_v1_format_module(layer, quantize_config=_QuantizeConfig(bits))
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        assert_bitwise_equal(out[f"a.{part}"], getattr(layer, part).numpy(), part)


@pytest.mark.interop
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("options", [{}, V2])
def test_gptqmodel_decodes_what_dequantize_does(tmp_path: Path, bits: int, options: dict[str, str]) -> None:
    source = model(tmp_path / "m", {"a.weight": RNG.standard_normal((96, 128), np.float32).astype(np.float16)})
    scheme = f"int{bits}_g32{'_asym' if options else ''}"
    target = quantize(source, tmp_path / "out", scheme, format="gptq", format_options=options)
    found = decoders.checkpoint(target, ("qweight",), decoders.gptqmodel)["a.weight"].numpy()
    assert_bitwise_equal(np.ascontiguousarray(found), decoded_by(GptqCheckpoint(target), "a.weight", "float16"))


class _QuantizeConfig:
    """What the converter asks of a configuration."""

    def __init__(self, bits: int) -> None:
        import torch

        self.bits, self.pack_dtype = bits, torch.int32
