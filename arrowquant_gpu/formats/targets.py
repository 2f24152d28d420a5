"""The output formats that there are: a table."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import FormatError
from ..schemes import Scheme
from . import TensorInfo


class Target(NamedTuple):
    """One format.

    is_directory: whether it is a directory, which has place for the side files
    sink: module of formats/ and class that write it
    scheme: the default: what the strictest engine accepts
    is_model: whether it needs the config.json of a model, and takes `names` and `max_shard_size`
    options: what can be chosen with --format-option, with the values that there are, the default first; () for any
    compressions: what it can be compressed with
    """

    is_directory: bool
    sink: str
    scheme: str = "int4_g128"
    is_model: bool = False
    options: Mapping[str, tuple[str, ...]] = {}
    compressions: tuple[str, ...] = ()


TARGETS: Mapping[str, Target] = {
    "compressed-tensors": Target(
        True,
        "compressed_tensors_sink:CompressedTensorsSink",
        is_model=True,
        options={"activations": ("none", "dynamic")},
    ),
    "fp8": Target(True, "fp8:Fp8Sink", "e4m3_b128", is_model=True),
    "modelopt": Target(True, "modelopt:ModelOptSink", "nvfp4", is_model=True),
    "comfyui": Target(
        False,
        "comfyui:ComfyUISink",
        "e4m3_tensor",
        is_model=True,
        options={"activations": ("dynamic", "none"), "layout": ("scaled_fp8", "quantization_metadata")},
    ),
    "safetensors": Target(True, "packed_safetensors:PackedSafetensorsSink", is_model=True),
    "mlx": Target(True, "mlx:MlxSink", scheme="affine4_g64", is_model=True),
    "gptq": Target(True, "gptq:GptqSink", is_model=True, options={"checkpoint_format": ("gptq", "gptq_v2")}),
    "awq": Target(True, "awq:AwqSink", "int4_g128_asym", is_model=True),
    "bitsandbytes": Target(
        True, "bitsandbytes:BitsAndBytesSink", "nf4_g64", is_model=True, options={"double_quant": ("false", "true")}
    ),
    "gguf": Target(
        False, "gguf:GgufSink", "q4_k_m", is_model=True, options={"tokenizer": ("model", "none"), "pre": ()}
    ),
    "parquet": Target(False, "parquet:ParquetSink", compressions=("zstd",)),
    "parquet-tensors": Target(True, "parquet_tensors:ParquetTensorsSink", compressions=("zstd",)),
    "arrow": Target(False, "arrow_ipc:ArrowSink", compressions=("zstd",)),
}


def target(format_name: str, compression: str | None = None) -> Target:
    """The row of a format.

    >>> target("parquet", "zstd").is_directory
    False

    Raises FormatError for a format that does not exist, and for a compression that it does not have.
    """
    if format_name not in TARGETS:
        raise FormatError(f"format {format_name!r}: choose one of {', '.join(TARGETS)}")
    found = TARGETS[format_name]
    if compression is not None and compression not in found.compressions:
        able = ", ".join(name for name, row in TARGETS.items() if compression in row.compressions)
        known = sorted({c for row in TARGETS.values() for c in row.compressions})
        way_out = f"--format {able} can" if able else f"choose {' or '.join(known)}"
        raise FormatError(f"{format_name} cannot be written with compression {compression!r}; {way_out}")
    return found


def open_sink(
    format_name: str,
    output: Any,
    config: Mapping[str, Any] | None,
    names: Sequence[str] = (),
    *,
    compression: str | None = None,
    max_shard_size: int | None = None,
    options: Mapping[str, str] | None = None,
) -> Any:
    """The sink of a format, writing into `output`; see `Sink`. Nothing is written yet.

    config, names: the config.json and the names of the tensors of the source

    Raises FormatError for a format, an option or a value that does not exist, and where the format cannot do what is
    asked for.
    """
    row = target(format_name, compression)
    chosen = _chosen(format_name, row, options or {})
    module, name = row.sink.split(":")
    sink = getattr(importlib.import_module(f".{module}", __package__), name)
    if row.is_model:
        return sink(output, config, names=names, max_shard_size=max_shard_size, **chosen)
    if max_shard_size is not None:
        able = ", ".join(n for n, t in TARGETS.items() if t.is_model)
        raise FormatError(f"{format_name} is not written in shards (--max-shard-size); {able} can be")
    return sink(output, compression=compression, **chosen) if row.compressions else sink(output, **chosen)


def carriers(
    infos: Sequence[TensorInfo], scheme: Scheme, config: Mapping[str, Any] | None, names: Sequence[str] = ()
) -> list[str]:
    """The formats that carry any of these tensors of a model with this scheme, their options being the defaults.

    >>> from pathlib import Path
    >>> info = TensorInfo("fc.weight", "float16", (64, 128), Path("m.safetensors"), 0, 16384)
    >>> carriers([info], Scheme.parse("nf4_g64"), {}, ["fc.weight"])
    ['safetensors', 'bitsandbytes']
    """

    def is_able(name: str) -> bool:
        with contextlib.suppress(FormatError):
            sink = open_sink(name, None, config, names)
            return any(_takes(sink, info, scheme) for info in infos)
        return False

    return [name for name in TARGETS if is_able(name)]


def _takes(sink: Any, info: TensorInfo, scheme: Scheme) -> bool:
    try:
        sink.scheme_for(info, scheme)
    except FormatError:
        return False
    return True


def _chosen(format_name: str, row: Target, options: Mapping[str, str]) -> dict[str, str]:
    """Every option of the format, by default its first value."""
    for key, value in options.items():
        if key not in row.options:
            known = f"; it has {', '.join(row.options)}" if row.options else ", nor any other"
            raise FormatError(f"{format_name} has no option {key!r}{known}")
        if row.options[key] and value not in row.options[key]:
            raise FormatError(f"{format_name} option {key}={value!r}: choose one of {', '.join(row.options[key])}")
    return {key: options.get(key, values[0] if values else "") for key, values in row.options.items()}
