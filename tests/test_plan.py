"""Plans: sizes, order, reasons, and what is refused before a byte of weights is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from arrowquant_gpu.dtypes import DTYPES
from arrowquant_gpu.errors import FormatError, PolicyError
from arrowquant_gpu.formats import TensorInfo
from arrowquant_gpu.formats.compressed_tensors_sink import CompressedTensorsSink
from arrowquant_gpu.formats.output import Output
from arrowquant_gpu.formats.parquet import ParquetSink
from arrowquant_gpu.formats.targets import TARGETS
from arrowquant_gpu.pipeline import Plan, make_plan, quantize_checkpoint

from .fixtures import llama_shapes, tiny_llama

LLAMA = llama_shapes(layers=2, hidden=256, intermediate=384, heads=4, kv_heads=2, vocab=1000)


class Headers:
    """A source of names, shapes and dtypes only: what a plan may look at. Reading weights fails."""

    metadata: dict[str, str] = {}  # noqa: RUF012
    side_files = left_out = ()

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: str = "bfloat16", config: Any = None) -> None:
        self.path = Path("model")
        self.config = {"model_type": "llama"} if config is None else config
        self.tensors, offset = {}, 8
        for name, shape in shapes.items():
            n_bytes = DTYPES[dtype].bits // 8
            for n in shape:
                n_bytes *= n
            self.tensors[name] = TensorInfo(name, dtype, shape, Path("model/model.safetensors"), offset, n_bytes)
            offset += n_bytes


def plan(source: Headers, scheme: str, **options: Any) -> Plan:
    sink = CompressedTensorsSink(Output("/nonexistent/out", is_directory=True), source.config)
    return make_plan(source, sink, scheme, **options)


def test_llama_by_hand() -> None:
    result = plan(Headers(LLAMA), "int4_g128")
    rows = {r["name"]: r for r in result.table.to_pylist()}
    q = rows["model.layers.1.self_attn.q_proj.weight"]
    assert (q["action"], q["scheme"], q["shape"]) == ("quantized", "int4_g128_bf16", [256, 256])
    # 256*256/2 bytes of codes, 256*2 scales of 2 bytes, 2 shape entries of 8 bytes.
    assert (q["bytes_before"], q["bytes_after"]) == (131072, 32768 + 1024 + 16)
    assert q["bits_per_weight"] == 8 * 33808 / 65536
    assert rows["lm_head.weight"] | {"bits_per_weight": 0} == {
        "name": "lm_head.weight",
        "action": "kept",
        "reason": "output head",
        "scheme": None,
        "dtype": "bfloat16",
        "shape": [1000, 256],
        "bytes_before": 512000,
        "bytes_after": 512000,
        "bits_per_weight": 0,
        "accuracy": None,
        "entropy": None,
    }
    assert [e.info.name for e in result.entries if e.scheme] == [n for n in LLAMA if "_proj" in n]
    weights = sum(r["shape"][0] * r["shape"][1] for r in rows.values() if r["action"] == "quantized")
    summary = result.summary
    assert (summary["n_tensors"], summary["n_quantized"]) == (21, 14)
    assert summary["bytes_after"] == sum(r["bytes_after"] for r in rows.values())
    quantized = sum(r["bytes_after"] for r in rows.values() if r["action"] == "quantized")
    assert summary["bits_per_weight"] == 8 * quantized / weights
    assert summary["stored_schemes"] == ["int4_g128_bf16"]
    assert summary["warnings"] == []


def test_asymmetric_zero_points_are_packed_down_the_columns() -> None:
    row = plan(Headers({"a.weight": (10, 64)}), "int4_g32_asym").table.to_pylist()[0]
    # 10 rows of 8 words, 10*2 scales, shape, 2 words (of 8 zero points) for each of 2 groups.
    assert row["bytes_after"] == 10 * 8 * 4 + 10 * 2 * 2 + 16 + 2 * 2 * 4


def test_rows_that_are_no_whole_groups_are_kept_with_the_reason() -> None:
    result = plan(Headers({"a.weight": (8, 256), "b.weight": (8, 200)}), "int4_g128")
    reasons = {e.info.name: e.reason for e in result.entries if e.scheme is None}
    assert list(reasons) == ["b.weight"]
    assert reasons["b.weight"].startswith("rows of 200 weights are not whole groups of 128")
    assert "parquet" in reasons["b.weight"]


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        ("int3_g128", "the readers disagree on the layout of 3-bit codes"),
        ("int5_g128", "5-bit"),
        ("int6_channel", "6-bit"),
        ("int8_tensor", "not per tensor"),
        ("int4_g100", "not whole groups of 100"),
        ("int4_g512", "not whole groups of 512"),
        ("int4_g128_f16", "stores scales in the weights' dtype bfloat16, not in float16"),
    ],
)
def test_a_scheme_that_the_format_carries_for_no_tensor_is_refused(scheme: str, words: str) -> None:
    with pytest.raises(FormatError, match=words) as caught:
        plan(Headers(LLAMA), scheme)
    assert "safetensors" in str(caught.value).rpartition("Formats that carry")[2]
    assert "none of the 14 tensors" in str(caught.value)


@pytest.mark.parametrize(
    "scheme",
    [
        *("int3_g64", "int4_g128_asym", "int8_channel", "int8_tensor", "int4_g100", "affine4_g64", "nf4_g64"),
        *("e4m3_tensor", "e4m3_b128", "e5m2_g64", "mxfp4", "nvfp4", "q8_0", "q4_k"),
    ],
)
def test_a_refusal_names_all_formats_that_carry_the_scheme(tmp_path: Path, scheme: str) -> None:
    source, able, refusals = tiny_llama(tmp_path / "model", hidden=256, intermediate=512), [], {}
    for name in TARGETS:
        options = {"tokenizer": "none"} if name == "gguf" else {}
        how: dict[str, Any] = {"format": name, "format_options": options, "device": "reference"}
        try:
            quantize_checkpoint(source, tmp_path / "out", scheme, dry_run=True, **how)
            able.append(name)
        except FormatError as e:
            refusals[name] = str(e)
    assert "safetensors" in able
    for name, text in refusals.items():
        assert text.startswith(f"{name} can carry {scheme} for none of the "), text
        assert text.endswith(f"Formats that carry {scheme}: {', '.join(able)}")


def test_an_explicit_suffix_that_is_the_dtype_is_the_same_scheme() -> None:
    assert plan(Headers(LLAMA), "int4_g128_bf16").entries == plan(Headers(LLAMA), "int4_g128").entries


def test_stacked_experts_are_kept_and_said() -> None:
    moe = {"m.layers.0.mlp.experts.gate_up_proj": (8, 256, 128), "m.layers.0.self_attn.q_proj.weight": (128, 128)}
    rows = {r["name"]: r for r in plan(Headers(moe), "int4_g128").table.to_pylist()}
    experts = rows["m.layers.0.mlp.experts.gate_up_proj"]
    assert experts["action"] == "kept"
    assert "stacked experts" in experts["reason"]
    assert "parquet or arrow" in experts["reason"]
    with pytest.raises(FormatError, match="stacked experts"):
        plan(Headers({"m.layers.0.mlp.experts.gate_up_proj": (8, 256, 128)}), "int4_g128")


def test_conv1d_weights_are_not_linear_modules() -> None:
    gpt2 = {"h.0.attn.c_attn.weight": (128, 384)}
    with pytest.raises(FormatError, match="Conv1D"):
        plan(Headers(gpt2, config={"model_type": "gpt2"}), "int4_g128")
    assert plan(Headers(gpt2, config={"model_type": "gpt_bigcode"}), "int4_g128").summary["n_quantized"] == 1


def test_nothing_to_quantize_is_an_error_with_the_reasons() -> None:
    with pytest.raises(PolicyError, match=r"all 2 tensors are kept.*embedding \(1\)"):
        plan(Headers({"embed.weight": (8, 256), "norm.weight": (8,)}), "int4_g128")


def test_an_included_tensor_that_cannot_be_carried_says_so() -> None:
    result = plan(Headers({"a.weight": (8, 128), "norm.weight": (128,)}), "int4_g128", include=["norm"])
    reasons = {e.info.name: e.reason for e in result.entries}
    assert reasons["norm.weight"].startswith(
        "compressed-tensors has only 2-D weights of linear modules, named MODULE.weight; --format safetensors, parquet"
    )


def test_unequal_parts_of_a_fused_matrix_are_a_warning() -> None:
    (warning,) = plan(Headers(LLAMA), "int4_g128", ignore=[r"layers\.1\..*k_proj"]).warnings
    assert warning.startswith("q_proj, k_proj, v_proj have different schemes in 1 layers (first: model.layers.1.")
    assert plan(Headers(LLAMA), "int4_g128", ignore=[r"layers\.1\..*[qkv]_proj"]).warnings == ()


def test_order_is_that_of_the_files() -> None:
    source = Headers({"b.weight": (8, 128), "a.weight": (8, 128), "c.weight": (8, 128)})
    info = source.tensors["a.weight"]
    source.tensors["a.weight"] = TensorInfo(
        info.name, info.dtype, info.shape, Path("model/0.safetensors"), 8, info.n_bytes
    )
    assert [e.info.name for e in plan(source, "int4_g128").entries] == ["a.weight", "b.weight", "c.weight"]


def test_config_json_is_needed() -> None:
    with pytest.raises(FormatError, match=r"needs a model directory with config\.json"):
        CompressedTensorsSink(Output("out", is_directory=True), None)


def test_one_file_has_no_place_for_the_tokenizer_and_the_plan_says_so() -> None:
    source = Headers(LLAMA)
    source.side_files = (Path("model/config.json"), Path("model/tokenizer.json"))
    assert plan(source, "int4_g128").warnings == ()
    sink = ParquetSink(Output("/nonexistent/out.parquet", is_directory=False))
    assert make_plan(source, sink, "int4_g128").warnings == (
        "parquet is one file: 1 files of the model directory are not in it (tokenizer.json).",
    )
