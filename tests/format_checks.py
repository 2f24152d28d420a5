"""What tests of several formats ask of a sink and of a reader in the same words. Each raises where it is not so."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arrowquant_gpu import reference
from arrowquant_gpu.errors import FormatError, SourceError
from arrowquant_gpu.formats import Codes, Entry, Sink
from arrowquant_gpu.formats import pieces as formats_pieces
from arrowquant_gpu.formats.checkpoint import open_checkpoint
from arrowquant_gpu.formats.output import Output
from arrowquant_gpu.schemes import Scheme
from arrowquant_gpu.tensor import QuantizedTensor

from .bitwise import assert_bitwise_equal
from .model_files import load, model, rewrite, written_in


def pieces(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    order: np.random.Generator,
    weights: np.ndarray,
    scheme: Scheme,
    piece_bytes: int,
    open_sink: Callable[[Output, Any], Sink],
) -> None:
    """Pieces of `piece_bytes` in any order make the file that large ones make, of the size that the sink says."""
    source = open_checkpoint(model(folder / "m", {"a.weight": weights}))
    entry = Entry(source.tensors["a.weight"], scheme, "")
    codes = Codes(*reference.quantize(weights, scheme)[:3])
    files = []
    for name, size in (("one", 1 << 24), ("many", piece_bytes)):
        monkeypatch.setattr(formats_pieces, "PIECE_BYTES", size)
        output = Output(folder / name, is_directory=True)
        sink = open_sink(output, source.config)
        assert list(written_in(order, sink, output, entry, codes, source)) == []
        files.append((folder / name / "model.safetensors").read_bytes())
    assert files[0] == files[1]
    assert sum(t.nbytes for t in load(folder / "one").values()) == sink.n_bytes(entry)


def blocks(
    checkpoint: Any, name: str, n_rows: int, packed: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None
) -> None:
    """A reader gives these arrays, `n_rows` rows at a time."""
    blocks = list(checkpoint.blocks(name))
    assert [row for row, _ in blocks] == list(range(0, len(packed), n_rows))
    for row, block in blocks:
        assert isinstance(block, QuantizedTensor)
        rows = slice(row, row + n_rows)
        assert_bitwise_equal(block.packed, packed[rows])
        assert_bitwise_equal(block.scales, scales[rows])
        if zeros is None:
            assert block.zeros is None
        else:
            assert_bitwise_equal(block.zeros, zeros[rows])


def warnings(sink: Any, entry: Entry, words: Sequence[str]) -> None:
    """As many warnings of the entry as there are words, each with its word and the name of the tensor."""
    found = sink.warnings([entry])
    assert len(found) == len(words)
    for warning, word in zip(found, words, strict=True):
        assert word in warning
        assert entry.info.name in warning


def not_carried(sink: Any, entry: Entry, words: str) -> None:
    """The sink refuses the tensor with these words, and names a way out."""
    with pytest.raises(FormatError, match=words) as caught:
        sink.scheme_for(entry.info, entry.scheme)
    assert re.search(r"use |--format ", str(caught.value))


def broken(reader: Callable[[Path], Any], folder: Path, name: str, scheme: str, change: Any, words: str) -> None:
    """A quantized model is read as `scheme` when it is written again, and refused with these words when changed."""
    rewrite(folder, lambda tensors, config: None)
    assert reader(folder).entries[name].scheme == Scheme.parse(scheme)
    rewrite(folder, change)
    with pytest.raises(SourceError, match=words):
        reader(folder)


def read_or_refused(reader: Callable[[Path], Any], folder: Path) -> None:
    """All blocks of a directory are read, or a SourceError says why not."""
    try:
        for name in (read := reader(folder)).entries:
            list(read.blocks(name))
    except SourceError:
        pass
