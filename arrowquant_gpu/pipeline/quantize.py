"""`quantize_checkpoint`: a float checkpoint in, a quantized one out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, overload

from .. import __version__
from ..backends import get_backend
from ..errors import FormatError
from ..formats import Checkpoint, Sink
from ..formats.checkpoint import open_checkpoint
from ..formats.compressed_tensors_sink import CompressedTensorsSink
from ..formats.output import Output
from ..schemes import Scheme
from . import engine
from .engine import Progress
from .manifest import Manifest
from .plan import Plan, make_plan

FORMATS = ("compressed-tensors", "parquet", "arrow")


@overload
def quantize_checkpoint(
    src: str | Path,
    dst: str | Path,
    scheme: str | Scheme = ...,
    *,
    dry_run: Literal[True],
    format: str | None = ...,
    device: str = ...,
    include: Sequence[str] = ...,
    ignore: Sequence[str] = ...,
    validate: bool = ...,
    overwrite: bool = ...,
    threads: int | None = ...,
    progress: Progress | None = ...,
) -> Plan: ...


@overload
def quantize_checkpoint(
    src: str | Path,
    dst: str | Path,
    scheme: str | Scheme = ...,
    *,
    dry_run: Literal[False] = ...,
    format: str | None = ...,
    device: str = ...,
    include: Sequence[str] = ...,
    ignore: Sequence[str] = ...,
    validate: bool = ...,
    overwrite: bool = ...,
    threads: int | None = ...,
    progress: Progress | None = ...,
) -> Manifest: ...


def quantize_checkpoint(
    src: str | Path,
    dst: str | Path,
    scheme: str | Scheme = "int4_g128",
    *,
    format: str | None = None,  # noqa: A002 - the word users know
    device: str = "auto",
    include: Sequence[str] = (),
    ignore: Sequence[str] = (),
    validate: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Manifest | Plan:
    """Quantize the safetensors checkpoint `src` into `dst`, which appears when it is complete.

    src: a file, an index file, or a model directory
    dst: a directory for format "compressed-tensors", a file for "parquet" and "arrow"
    scheme: a scheme id; the format may store its scales in another type, see `Plan`
    format: by default "compressed-tensors" for a directory with config.json, else "parquet"
    device, threads: as in `quantize`; every device gives the same bytes
    include, ignore: regular expressions over tensor names, see docs/policy.md
    validate: measure the error of every quantized tensor (columns of the manifest)
    overwrite: replace what is at `dst`; only ever what an earlier run wrote, never the source
    dry_run: return the plan; reads headers only and writes nothing
    progress: called with (bytes done, bytes in all, tensor name); an exception from it ends the run

    Returns the Manifest, which also lies beside the output, or the Plan of a dry run; both have `table` and `summary`.
    Memory: a few blocks of 16 MiB, however large the model. After any error, KeyboardInterrupt included, `dst` is
    what it was before.

        >>> import tempfile, numpy as np, safetensors.numpy
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = safetensors.numpy.save_file({"fc.weight": np.eye(64, dtype=np.float32)}, folder / "m.safetensors")
        >>> result = quantize_checkpoint(folder / "m.safetensors", folder / "m.parquet", "int4_g32", device="cpu")
        >>> result.summary["n_quantized"], result.summary["bits_per_weight"]
        (1, 5.0)

    Raises SchemeError, SourceError, PolicyError, FormatError, TargetError, NonFiniteError, ScaleOverflowError and
    DeviceError.
    """
    scheme = Scheme.parse(scheme)
    source = open_checkpoint(src)
    format_name = format or ("compressed-tensors" if source.path.is_dir() and source.config is not None else "parquet")
    files = {info.file for info in source.tensors.values()}
    is_directory = format_name == "compressed-tensors"
    output = Output(dst, is_directory=is_directory, sources=[source.path, *sorted(files)], overwrite=overwrite)
    sink = open_sink(format_name, output, source)
    plan = make_plan(source, sink, scheme, include, ignore)
    if dry_run:
        return plan
    output.check()
    backend = get_backend(device, threads)
    return engine.run(
        plan, source, sink, output, backend, provenance(source, plan), validate=validate, progress=progress
    )


def open_sink(format_name: str, output: Output, source: Checkpoint) -> Sink:
    """The sink of a format, writing into `output`. Nothing is written yet.

    Raises FormatError for a format that does not exist.
    """
    if format_name == "compressed-tensors":
        return CompressedTensorsSink(output, source.config)
    if format_name == "parquet":
        from ..formats.parquet import ParquetSink

        return ParquetSink(output)
    if format_name == "arrow":
        from ..formats.arrow_ipc import ArrowSink

        return ArrowSink(output)
    raise FormatError(f"format {format_name!r}: choose one of {', '.join(FORMATS)}")


def provenance(source: Checkpoint, plan: Plan) -> dict[str, str]:
    """What an output says about how it was made. The same input and options give the same words."""
    stored = plan.summary["stored_schemes"]
    name, folder = source.path.name, source.path.parent
    # In the Hub's cache a model is models--ORG--NAME/snapshots/REVISION.
    if folder.name == "snapshots" and folder.parent.name.startswith("models--"):
        name = f"{folder.parent.name.removeprefix('models--').replace('--', '/')}@{name}"
    return {
        "tool": "arrowquant_gpu",
        "version": __version__,
        "scheme": ", ".join(stored),
        "source": name,
        "source_hash": source.fingerprint(),
    }
