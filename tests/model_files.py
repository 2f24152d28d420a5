"""Model directories for tests of formats: written with any tensors, quantized, and read by nothing of the package."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from arrowquant_gpu import reference
from arrowquant_gpu.dtypes import DTYPES
from arrowquant_gpu.formats import Codes, Entry, Sink, TensorInfo
from arrowquant_gpu.formats.output import Output
from arrowquant_gpu.pipeline import quantize_checkpoint
from arrowquant_gpu.schemes import Scheme

from .fixtures import write_safetensors


def model(folder: Path, tensors: dict[str, np.ndarray], config: dict[str, Any] | None = None) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama", "architectures": ["LlamaModel"]}))
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt", "kept": "yes"})
    return folder


def load(folder: Path) -> dict[str, np.ndarray]:
    """All tensors, read by this test alone: header and bytes."""
    tensors = {}
    for file in sorted([folder] if folder.is_file() else folder.glob("*.safetensors")):
        raw = file.read_bytes()
        n = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + n])
        kinds = {d.safetensors: d.numpy for d in DTYPES.values()}
        for name, t in header.items():
            if name != "__metadata__":
                begin, end = (8 + n + o for o in t["data_offsets"])
                assert begin % kinds[t["dtype"]].itemsize == 0
                tensors[name] = np.frombuffer(raw[begin:end], kinds[t["dtype"]]).reshape(t["shape"])
    return tensors


def quantize(source: Path, target: Path, scheme: str, **options: Any) -> Path:
    quantize_checkpoint(source, target, scheme, device="reference", **options)
    return target


def arrowquant(*args: object) -> str:
    """Run the command line as a user does, in its own process: what it prints on stdout."""
    done = subprocess.run(
        [sys.executable, "-m", "arrowquant_gpu.cli", *map(str, args)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def rewrite(folder: Path, change: Any) -> None:
    """Load a quantized model, change its tensors and its config, and write them again."""
    tensors = dict(load(folder))
    config = json.loads((folder / "config.json").read_text())
    change(tensors, config)
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(config))


def written_in(
    order: np.random.Generator, sink: Sink, output: Output, entry: Entry, codes: Codes, source: Any
) -> Iterator[str]:
    """Write one tensor piece by piece in a random order, each with its part of the codes of the whole; and what is
    wrong with the places, if anything is."""
    assert entry.scheme is not None
    output.begin()
    sink.open([entry], source, {})
    filled: dict[str, list[tuple[int, int]]] = {}
    found, length = sink.pieces(entry), entry.info.shape[-1]
    for i in order.permutation(len(found)):
        p = found[i]
        for place, array in zip(sink.places(p), sink.stored(p, part_of(codes, p, entry.scheme, length)), strict=True):
            if place.n_bytes != array.nbytes:
                yield f"{array.nbytes} bytes for {place}"
            output.write(place.file, place.offset, np.ascontiguousarray(array), place.lines, place.stride)
            line = place.n_bytes // place.lines
            begins = (place.offset + i * place.stride for i in range(place.lines))
            filled.setdefault(place.file, []).extend((begin, begin + line) for begin in begins)
    sink.finish(entry)
    sink.commit()
    for spans in filled.values():
        if not all(a[1] <= b[0] for a, b in itertools.pairwise(sorted(spans))):
            yield "places overlap"


def part_of(codes: Codes, p: Any, scheme: Any, length: int) -> Codes:
    """The codes of one piece, cut out of those of the whole tensor."""
    group = scheme.group_length(length)
    columns = slice(scheme.row_bytes(p.column), scheme.row_bytes(p.column + p.columns))
    packed = codes.packed[p.row : p.row + p.rows, columns]
    if scheme.granularity == "tensor":
        return Codes(packed, codes.scales, codes.zeros)
    unit = group if scheme.granularity == "block" else 1
    rows, groups = (
        slice(p.row // unit, -(-(p.row + p.rows) // unit)),
        slice(p.column // group, -(-(p.column + p.columns) // group)),
    )
    zeros = codes.zeros if codes.zeros is None or scheme.scale_rule == "global" else codes.zeros[rows, groups]
    return Codes(packed, codes.scales[rows, groups], zeros)


def entry_of(name: str, shape: tuple[int, ...], scheme: str) -> Entry:
    """A tensor of the plan that no file has."""
    return Entry(TensorInfo(name, "bfloat16", shape, Path("m"), 0, 0), Scheme.parse(scheme), "")


def with_config(**values: Any) -> Any:
    """For `rewrite`: other values in quantization_config."""
    return lambda tensors, config: config["quantization_config"].update(values)


def with_tensor(name: str, value: np.ndarray) -> Any:
    """For `rewrite`: another tensor."""
    return lambda tensors, config: tensors.update({name: value})


def torch_tensor(x: np.ndarray) -> Any:
    """The same bits as a torch tensor."""
    import torch

    bits = {1: np.uint8, 2: np.int16, 4: np.int32}[x.itemsize]
    return torch.from_numpy(np.ascontiguousarray(x).view(bits).copy()).view(getattr(torch, x.dtype.name))


def decoded_by(reader: Any, name: str, dtype: str) -> np.ndarray:
    """The rows that a reader gives, decoded by the reference."""
    rows, found = 0, []
    for row, q in reader.blocks(name):
        assert row == rows
        found.append(reference.dequantize(q.packed, q.scales, q.zeros, q.scheme, q.shape[1], dtype))
        rows += len(q.packed)
    return np.concatenate(found)


def copied(folder: Path, to: Path) -> Path:
    """A copy of a quantized model, to change."""
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def logits(folder: Path, dtype: str, weights: dict[str, np.ndarray] | None = None) -> Any:
    """What transformers makes of a model on a few tokens; of a float model also with other weights in it. No tensor may
    be missing or left over."""
    import torch
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), output_loading_info=True
        )
        state = found.eval().state_dict()
        for name, values in (weights or {}).items():
            state[name].copy_(torch_tensor(values))
        with torch.no_grad():
            out = found(torch.tensor([[1, 5, 77, 140, 23, 8, 9, 100, 2, 17]])).logits.float()
    assert not any(info.values()), info
    return out
