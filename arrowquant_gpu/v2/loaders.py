"""`SafeTensorsLoader` and `ShardedSafeTensorsLoader`: the tensors of a checkpoint as arrays."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..backends import get_backend
from ..diffusion import detect
from ..dtypes import DTYPES
from ..errors import InputError, SourceError
from ..formats.checkpoint import SafetensorsCheckpoint, open_checkpoint
from ..schemes import rows_and_length

# What a tensor can be converted to.
CONVERTED_TO: Sequence[str] = ("float32", "float16", "bfloat16", "float64")
# Lines of a summary.
MAX_LISTED = 20


class SafeTensorsLoader:
    """One safetensors file, memory-mapped: nothing is read before it is looked at.

    path: as it was given
    metadata: strings of the header's `__metadata__`; empty where it has none

        >>> import tempfile, safetensors.numpy
        >>> file = Path(tempfile.mkdtemp()) / "model.safetensors"
        >>> _ = safetensors.numpy.save_file({"fc": np.ones((2, 4), np.float16)}, file, metadata={"modality": "text"})
        >>> loader = SafeTensorsLoader(file)
        >>> loader.tensor_names(), loader.get_tensor("fc").dtype, loader.get_tensor("fc", "float32").dtype
        (['fc'], dtype('float16'), dtype('float32'))
        >>> loader.detect_modality(), loader.total_bytes
        ('text', 16)

    Raises HeaderError for a file that is not whole and valid, SourceError for what is none.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._checkpoint = self._open(self.path)
        self.metadata = dict(self._checkpoint.metadata)

    @staticmethod
    def _open(path: Path) -> SafetensorsCheckpoint:
        if path.is_dir() or path.suffix == ".json":
            raise SourceError(
                f"{path}: not one safetensors file; ShardedSafeTensorsLoader reads directories and indexes"
            )
        return open_checkpoint(path)

    def __len__(self) -> int:
        return len(self._checkpoint.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._checkpoint.tensors

    def tensor_names(self) -> list[str]:
        """Names, by file and then by place in the file."""
        return list(self._checkpoint.tensors)

    def tensor_info(self, name: str) -> dict[str, Any]:
        """dtype (its name as in NumPy), shape, bytes and file of a tensor. Raises SourceError."""
        info = self._info(name)
        return {"dtype": info.dtype, "shape": info.shape, "n_bytes": info.n_bytes, "file": info.file}

    def get_tensor(self, name: str, dtype: str | None = None) -> NDArray[Any]:
        """A tensor: a read-only view of the mapped file, which it keeps open; or converted, in new memory.

        dtype: "float32", "float16", "bfloat16" or "float64"; by default, and where it is that already, nothing is
            copied. Any numeric type is converted, as NumPy does; bool counts as 0 and 1

        bfloat16 and the 8-bit floats are types of ml_dtypes. A tensor with elements under one byte is its bytes, uint8.

        Raises SourceError for a name that is not there, InputError for a dtype, or a tensor, that cannot be converted.
        """
        view = self._checkpoint.view(self._info(name).name)
        return view if dtype is None else _converted(view, dtype, name, self._info(name).dtype)

    def get_all_tensors(
        self, dtype: str | None = None, *, names: Iterable[str] | None = None, threads: int | None = None
    ) -> dict[str, NDArray[Any]]:
        """All tensors, or those of `names`, as `get_tensor` gives them, `threads` at a time; by default all cores.

        Raises as `get_tensor`, and DeviceError for threads under 1.
        """
        chosen = self.tensor_names() if names is None else list(names)
        if dtype is None:
            return {name: self.get_tensor(name) for name in chosen}
        n = getattr(get_backend("cpu", threads), "threads", 1)
        with ThreadPoolExecutor(n, thread_name_prefix="arrowquant-load") as pool:
            try:
                return dict(zip(chosen, pool.map(lambda name: self.get_tensor(name, dtype), chosen), strict=True))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def get_all_tensors_2d(
        self, dtype: str | None = None, *, names: Iterable[str] | None = None, threads: int | None = None
    ) -> dict[str, NDArray[Any]]:
        """As `get_all_tensors`, each as rows and columns as they are quantized: all axes but the last are the rows.

        A vector is one row. Views stay views.
        """
        tensors = self.get_all_tensors(dtype, names=names, threads=threads)
        return {name: x.reshape(rows_and_length(x.shape)) for name, x in tensors.items()}

    def detect_modality(self) -> str | None:
        """text, code, image or audio, by metadata, config.json, or tensor names; None where they do not tell."""
        return detect(self._checkpoint).name

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.n_bytes for info in self._checkpoint.tensors.values())

    @property
    def total_parameters(self) -> int:
        """Elements of all tensors."""
        return sum(math.prod(info.shape) for info in self._checkpoint.tensors.values())

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return list(dict.fromkeys(info.file for info in self._checkpoint.tensors.values()))

    def summary(self) -> str:
        """Text: path, size, dtypes, modality, metadata, and the first tensors."""
        infos = list(self._checkpoint.tensors.values())
        dtypes = sorted({info.dtype for info in infos})
        lines = [
            f"{self.path}: {len(infos)} tensors in {len(self.files)} file{'s'[: len(self.files) > 1]}",
            f"parameters: {self.total_parameters:,}; size: {self.total_bytes / (1 << 20):,.2f} MB",
            f"dtypes: {', '.join(dtypes)}; modality: {self.detect_modality() or 'not known'}",
            *(f"metadata: {key} = {value}" for key, value in self.metadata.items()),
            *(f"  {info.name}  {info.dtype} {list(info.shape)}" for info in infos[:MAX_LISTED]),
        ]
        if len(infos) > MAX_LISTED:
            lines.append(f"  and {len(infos) - MAX_LISTED} more")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, {len(self)} tensors)"

    def _info(self, name: str) -> Any:
        info = self._checkpoint.tensors.get(name)
        if info is None:
            raise SourceError(f"{self.path}: no tensor {name!r}; it has {_some(self.tensor_names())}")
        return info


class ShardedSafeTensorsLoader(SafeTensorsLoader):
    """A checkpoint of one or more safetensors files: a model directory, or an index of shards.

    All headers are read when it is made, and checked against each other and the index; see `open_checkpoint`.

    Raises HeaderError and SourceError, as that does.
    """

    @staticmethod
    def _open(path: Path) -> SafetensorsCheckpoint:
        return open_checkpoint(path)

    @property
    def shards(self) -> dict[str, list[str]]:
        """File name -> names of the tensors in it."""
        found: dict[str, list[str]] = {}
        for name, info in self._checkpoint.tensors.items():
            found.setdefault(info.file.name, []).append(name)
        return found


def _converted(x: NDArray[Any], dtype: str, name: str, source: str) -> NDArray[Any]:
    if dtype not in CONVERTED_TO:
        raise InputError(f"{name}: dtype {dtype!r}: tensors are converted to {', '.join(CONVERTED_TO)}")
    if DTYPES[source].numpy is None or DTYPES[source].numpy == np.complex64:
        raise InputError(f"{name}: {source} cannot be converted to {dtype}; get_tensor without dtype gives its bytes")
    target = DTYPES[dtype].numpy
    if x.dtype == target:
        return x
    with np.errstate(over="ignore"):  # what is too large for the type is infinite in it, as the standard says
        return x.astype(target)


def _some(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(name[:100]) for name in names[:most]) + more
