"""`open_checkpoint`: a float checkpoint in safetensors, whichever way it lies on disk, or a refusal in clear words.

One file, an index of shards, or a Hugging Face model directory. All headers are read and checked against each other
and against the index before anything else; weights are mapped when they are looked at.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import re
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..dtypes import DTYPES
from ..errors import SourceError
from . import TensorInfo
from .recognise import (
    DEQUANTIZE,
    MXFP4_COPY,
    REQUANTIZE,
    by_first_bytes,
    by_suffix,
    quantized_config,
    quantized_files,
    quantized_tensors,
)
from .safetensors import Header, read_header
from .side_files import side_files

INDEX = ".safetensors.index.json"
MAX_JSON_BYTES = 100_000_000
MAX_READERS = 16
_NUMBERED = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.safetensors", re.DOTALL)

# Of each file, in its fingerprint.
SAMPLES = 64


class SafetensorsCheckpoint:
    """A float checkpoint in one or more safetensors files; made by `open_checkpoint`. See `Checkpoint`.

    path: the file, or the directory, where an index or a directory was opened
    tensors: sorted by file name, then by place in the file
    metadata: of all files; where two give a key different values, that of the first
    config: config.json of the directory, or None
    side_files: what goes with the weights, as paths under `path`; none for a lone file
    left_out: what does not, with the reason; the shards and their index are in neither
    """

    def __init__(
        self,
        path: Path,
        headers: Mapping[Path, Header],
        config: dict[str, Any] | None,
        side: tuple[tuple[Path, ...], tuple[tuple[Path, str], ...]],
    ):
        self.path = path
        self.config = config
        self.side_files, self.left_out = side
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        for header in headers.values():
            self.tensors |= header.tensors
            self.metadata = header.metadata | self.metadata
        self._headers = headers
        self._maps: dict[Path, NDArray[np.uint8]] = {}
        self._lock = threading.Lock()

    def view(self, name: str) -> NDArray[Any]:
        """Read-only array over the mapped file, in the tensor's dtype and shape; uint8 [n_bytes] for sub-byte types.

        No weights are read until they are looked at, and they need not be aligned to their element. The array keeps
        the mapping alive, also after the checkpoint is gone and the file is deleted. Safe to call from any thread.

        Raises SourceError for a name that is not there, and where the file was changed since its header was read.
        """
        info = self.tensors.get(name)
        if info is None:
            raise SourceError(f"{self.path}: no tensor {name!r}")
        data, dtype = self.mapped(info.file), DTYPES[info.dtype].numpy
        if dtype is None:
            return np.ndarray((info.n_bytes,), np.uint8, data, info.offset)
        return np.ndarray(info.shape, dtype, data, info.offset)

    def descriptor(self, file: Path, flags: int = 0) -> int:
        """A new descriptor, opened O_RDONLY | `flags`, of one of the files; the caller closes it.

        Raises SourceError where the file cannot be opened, with the OSError as its cause, or was changed since its
        header was read.
        """
        header = self._headers[file]
        try:
            fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | flags)
        except OSError as e:
            raise SourceError(f"{file}: cannot be opened: {e.strerror}") from e
        status = os.fstat(fd)
        if (status.st_size, status.st_mtime_ns) != (header.file_size, header.mtime_ns):
            os.close(fd)
            raise SourceError(f"{file}: changed since its header was read; run again")
        return fd

    def mapped(self, file: Path) -> NDArray[np.uint8]:
        """All bytes of one of the files, as a read-only view of its memory map, which all views share.

        The view keeps the mapping alive. That the file is the one whose header was read is checked when it is mapped,
        the first time; a file that is cut shorter later ends the process with SIGBUS.

        Raises SourceError where the file cannot be mapped, or was changed since its header was read.
        """
        with self._lock:
            if file not in self._maps:
                fd = self.descriptor(file)
                try:
                    mapped = mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
                except OSError as e:
                    raise SourceError(f"{file}: cannot be mapped: {e.strerror}") from e
                finally:
                    os.close(fd)
                mapped.madvise(mmap.MADV_SEQUENTIAL)
                self._maps[file] = np.frombuffer(mapped, np.uint8)
            return self._maps[file]

    def fingerprint(self) -> str:
        """BLAKE2b-128 of all headers, which fix the sizes of the files too, and of samples of the weights, as hex.

        The samples are SAMPLES pieces of 4 KiB, evenly spaced in each file: models trained apart from the same start
        have equal headers, and reading all of 400B weights to tell them apart would take as long as quantizing them.
        """
        h = hashlib.blake2b(digest_size=16)
        for file, header in self._headers.items():
            h.update(header.digest)
            data = self.mapped(file)
            for i in range(SAMPLES):
                start = header.data_offset + (header.file_size - header.data_offset) * i // SAMPLES
                h.update(data[start : start + 4096].data)
        return h.hexdigest()


def open_checkpoint(path: Path | str) -> SafetensorsCheckpoint:
    """Open a float checkpoint: a safetensors file, a `*.safetensors.index.json`, or a model directory.

    Of a directory, `model.safetensors` is taken, or what `model.safetensors.index.json` names, or the only other
    index, or the only safetensors file, or a complete set of files numbered -00001-of-0000N. Links to files are
    followed. Nothing is written and no weights are read.

    Raises HeaderError for a file that is not whole and valid, and SourceError, saying what was found and what to do,
    for anything else: nothing there, shards missing or at odds with the index, weights in another format, or already
    quantized. docs/checkpoints.md lists what is accepted and what is refused.

    >>> import tempfile, safetensors.numpy
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder) / "a.safetensors"
    ...     safetensors.numpy.save_file({"w": np.arange(6, dtype=np.float32).reshape(2, 3)}, file)
    ...     w = open_checkpoint(file).view("w")
    >>> w[1], w.flags.writeable
    (array([3., 4., 5.], dtype=float32), False)
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _open_directory(path, None)
        if path.name.endswith(INDEX) and path.is_file():
            return _open_directory(path.parent, path)
        return _open_file(path)
    except OSError as e:
        raise SourceError(f"{e.filename or path}: cannot be read: {e.strerror}") from e


def _open_file(path: Path) -> SafetensorsCheckpoint:
    if not path.exists():
        raise SourceError(f"{path}: no such file or directory")
    if path.is_file() and (other := by_suffix(path.name)) is not None:
        with path.open("rb") as f:
            raise SourceError(f"{path}: this is {by_first_bytes(f.read(64)) or other}.")
    headers = {path: read_header(path)}
    _refuse_quantized(path, quantized_tensors(headers[path].tensors))
    return _checkpoint(path, headers, None, ((), ()))


def _open_directory(directory: Path, index: Path | None) -> SafetensorsCheckpoint:
    names = sorted(entry.name for entry in os.scandir(directory))
    config = _read_object(directory / "config.json") if "config.json" in names else None
    _refuse_quantized(directory, quantized_config(config or {}) or quantized_files(names))
    weights = _weights(directory, names, index)
    missing = [f for f in weights.files if not f.is_file()]
    if missing:
        links = " (links to files that are not there)" if any(f.is_symlink() for f in missing) else ""
        raise SourceError(
            f"{directory}: {len(missing)} of {len(weights.files)} files of weights are missing{links}: "
            f"{_some([f.name for f in missing])}. Download or copy the model again."
        )
    headers = _read_headers(weights.files)
    _check_index(weights, headers)
    _refuse_quantized(directory, quantized_tensors({n: t for h in headers.values() for n, t in h.tensors.items()}))
    read = {*weights.files, *([weights.index] if weights.index else [])}
    return _checkpoint(directory, headers, config, side_files(directory, read))


def _checkpoint(
    path: Path,
    headers: Mapping[Path, Header],
    config: dict[str, Any] | None,
    side: tuple[tuple[Path, ...], tuple[tuple[Path, str], ...]],
) -> SafetensorsCheckpoint:
    if not any(h.tensors for h in headers.values()):
        raise SourceError(f"{path}: holds no tensors")
    return SafetensorsCheckpoint(path, headers, config, side)


def _read_headers(files: Sequence[Path]) -> dict[Path, Header]:
    """Headers of all files, in their order; read at once, because each may be on a disk far away."""
    with ThreadPoolExecutor(min(MAX_READERS, len(files)), thread_name_prefix="headers") as pool:
        return dict(zip(files, pool.map(read_header, files), strict=True))


@dataclass(frozen=True)
class Weights:
    """The files that hold the weights of a directory; `names` is tensor -> file name where there is an index."""

    files: tuple[Path, ...]
    index: Path | None = None
    names: dict[str, str] | None = None


def _weights(directory: Path, names: Sequence[str], index: Path | None) -> Weights:
    """Decide which files hold the weights. They may be missing."""
    whole = directory / "model.safetensors"
    is_given = index is not None
    if index is None:
        indexes = [n for n in names if n.endswith(INDEX)]
        if whole.name + ".index.json" in indexes:
            index = directory / (whole.name + ".index.json")
        elif len(indexes) == 1 and whole.name not in names:
            index = directory / indexes[0]
        elif len(indexes) > 1 and whole.name not in names:
            raise SourceError(f"{directory}: several indexes of weights: {_some(indexes)}. Give the one that is meant.")
    if index is not None:
        weight_map = _read_index(index)
        shards = sorted(set(weight_map.values()))
        # As transformers does: a whole file goes before shards, unless it is one of them.
        if is_given or whole.name not in names or whole.name in shards:
            return Weights(tuple(directory / s for s in shards), index, weight_map)
    found = [n for n in names if n.endswith(".safetensors") and not n.startswith("adapter_")]
    if not found:
        raise SourceError(f"{directory}: {_why_no_weights(directory, names)}")
    if whole.name in found:
        return Weights((whole,))
    return Weights(tuple(directory / n for n in _one_set(directory, found)))


def _one_set(directory: Path, found: Sequence[str]) -> Sequence[str]:
    """The files of one model where there is no index: a single one, or all of 1 to N where names are numbered so."""
    numbered = _NUMBERED.fullmatch(found[0])
    if numbered is not None:
        stem, total = numbered[1], int(numbered[3])
        whole_set = [f"{stem}-{i:05d}-of-{total:05d}.safetensors" for i in range(1, total + 1)]
        if set(found) <= set(whole_set):
            return whole_set
    elif len(found) == 1:
        return found
    raise SourceError(
        f"{directory}: {len(found)} safetensors files and no index: {_some(found)}. Which of them make up the model is "
        f"not known: give one file, or add model{INDEX}."
    )


def _why_no_weights(directory: Path, names: Sequence[str]) -> str:
    """What a directory without safetensors weights holds, and what to do."""
    if not names:
        return "the directory is empty."
    if "adapter_config.json" in names:
        return (
            "holds an adapter, not a model; merge it into its base model first (PEFT: merge_and_unload, then "
            "save_pretrained)."
        )
    for name in names:
        if (other := by_suffix(name)) is not None and (directory / name).is_file():
            return f"holds no safetensors weights; {name} is {other}."
    inside = [n for n in names if (directory / n).is_dir() and next((directory / n).glob("*.safetensors"), None)]
    if inside:
        return f"holds no safetensors weights itself, but its folders do: {_some(inside)}. Give the one that is meant."
    return f"holds no safetensors weights; it holds {_some(names)}."


def _check_index(weights: Weights, headers: Mapping[Path, Header]) -> None:
    """Every tensor lies in one file, and in the one that the index names."""
    home: dict[str, str] = {}
    for file, header in headers.items():
        for name in header.tensors:
            if name in home:
                raise SourceError(f"{file}: tensor {name[:100]!r} is in {home[name]} too; which one holds is not known")
            home[name] = file.name
    if weights.names is None or weights.names == home:
        return
    absent = sorted(n for n in weights.names if n not in home)
    if absent:
        raise SourceError(
            f"{weights.index}: {len(absent)} tensors are in no file: {_some(absent)}. "
            f"{weights.names[absent[0]]} should hold the first: download or copy it again."
        )
    unnamed = sorted(n for n in home if n not in weights.names)
    if unnamed:
        raise SourceError(
            f"{weights.index}: {len(unnamed)} tensors of the files are not in the index: {_some(unnamed)}. The index "
            f"belongs to other files: download or copy it again."
        )
    name = min(n for n in home if home[n] != weights.names[n])
    raise SourceError(f"{weights.index}: tensor {name[:100]!r} is in {home[name]}, not in {weights.names[name]}")


def _read_index(path: Path) -> dict[str, str]:
    """weight_map of an index, tensor -> file name: each a plain name, so that nothing outside is opened."""
    weight_map = _read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{path}: no weight_map, which maps tensors to files")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise SourceError(f"{path}: tensor {name[:100]!r} is in {str(file)[:100]!r}, which is no safetensors file")
        if file != os.path.basename(file) or "\\" in file or "\0" in file:  # noqa: PTH119 (Path would normalise)
            raise SourceError(
                f"{path}: tensor {name[:100]!r} is in {file[:100]!r}; a file of weights must be a plain name in the "
                f"directory of the index"
            )
    return weight_map


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file, no key of it twice."""
    if not path.is_file():
        raise SourceError(f"{path}: not a file, or a link to one that is not there")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise SourceError(f"{path}: over {MAX_JSON_BYTES} bytes, too large for what it should be")
    raw = path.read_bytes()
    what = by_first_bytes(raw[:64]) if raw[:1] != b"{" else None
    if what is not None:
        raise SourceError(f"{path}: this is {what}.")
    try:
        value = json.loads(raw.decode(), object_pairs_hook=_no_key_twice)
    except (ValueError, RecursionError) as e:
        raise SourceError(f"{path}: not valid JSON: {e}") from e
    if not isinstance(value, dict):
        raise SourceError(f"{path}: must be a JSON object")
    return value


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:100]!r} occurs twice")
        found[key] = value
    return found


def _refuse_quantized(path: Path, found: str | None) -> None:
    if found is not None:
        is_read = "compressed-tensors" in found or "parquet-tensors" in found
        way_out = f"{REQUANTIZE}; {DEQUANTIZE}" if is_read else REQUANTIZE
        way_out = MXFP4_COPY if "mxfp4" in found.lower() else way_out
        raise SourceError(f"{path}: already quantized: {found}; {way_out}.")


def _some(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(n[:100]) for n in names[:most]) + more
