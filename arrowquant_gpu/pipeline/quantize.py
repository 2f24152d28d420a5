"""`quantize_checkpoint`: a float checkpoint in, a quantized one out."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import xxhash

from .. import __version__, trace
from ..backends import pick_devices
from ..diffusion import DiffusionOptions, Prepared, prepare
from ..engine import Device, Progress
from ..engine import run as engine
from ..engine.decoded import DecodedCheckpoint
from ..engine.journal import Journal
from ..engine.parted import in_parts
from ..engine.ring import open_devices
from ..errors import InputError, SourceError
from ..formats import Checkpoint, Sink
from ..formats.checkpoint import open_checkpoint
from ..formats.output import Output, target_errors
from ..formats.quantized import open_quantized
from ..formats.targets import open_sink
from ..formats.targets import target as target_of
from ..schemes import Scheme
from .diffusion import decided, explained, modality_of, write_activations
from .manifest import Manifest, Run, manifest_table, write_manifest
from .plan import Plan, check_share, make_plan
from .recipe import Recipe
from .widths import Widths, revise


@overload
def quantize_checkpoint(
    src: str | Path,
    dst: str | Path,
    scheme: str | Scheme | None = ...,
    *,
    dry_run: Literal[True],
    format: str | None = ...,
    compression: str | None = ...,
    format_options: Mapping[str, str] | None = ...,
    max_shard_size: int | None = ...,
    allow_requantize: bool = ...,
    device: str | Sequence[str] = ...,
    include: Sequence[str] = ...,
    ignore: Sequence[str] = ...,
    recipe: Recipe | str | Path | None = ...,
    tensor_schemes: Sequence[tuple[str, str | Scheme]] = ...,
    expect_quantized: float | None = ...,
    validate: bool = ...,
    overwrite: bool = ...,
    threads: int | None = ...,
    read: str = ...,
    memory_limit: int | None = ...,
    resume: bool = ...,
    timeline: str | Path | None = ...,
    widths: Widths | None = ...,
    diffusion: DiffusionOptions | None = ...,
    progress: Progress | None = ...,
) -> Plan: ...


@overload
def quantize_checkpoint(
    src: str | Path,
    dst: str | Path,
    scheme: str | Scheme | None = ...,
    *,
    dry_run: Literal[False] = ...,
    format: str | None = ...,
    compression: str | None = ...,
    format_options: Mapping[str, str] | None = ...,
    max_shard_size: int | None = ...,
    allow_requantize: bool = ...,
    device: str | Sequence[str] = ...,
    include: Sequence[str] = ...,
    ignore: Sequence[str] = ...,
    recipe: Recipe | str | Path | None = ...,
    tensor_schemes: Sequence[tuple[str, str | Scheme]] = ...,
    expect_quantized: float | None = ...,
    validate: bool = ...,
    overwrite: bool = ...,
    threads: int | None = ...,
    read: str = ...,
    memory_limit: int | None = ...,
    resume: bool = ...,
    timeline: str | Path | None = ...,
    widths: Widths | None = ...,
    diffusion: DiffusionOptions | None = ...,
    progress: Progress | None = ...,
) -> Manifest: ...


def quantize_checkpoint(
    src: str | Path,
    dst: str | Path,
    scheme: str | Scheme | None = None,
    *,
    format: str | None = None,  # noqa: A002 - the word users know
    compression: str | None = None,
    format_options: Mapping[str, str] | None = None,
    max_shard_size: int | None = None,
    allow_requantize: bool = False,
    device: str | Sequence[str] = "auto",
    include: Sequence[str] = (),
    ignore: Sequence[str] = (),
    recipe: Recipe | str | Path | None = None,
    tensor_schemes: Sequence[tuple[str, str | Scheme]] = (),
    expect_quantized: float | None = None,
    validate: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    threads: int | None = None,
    read: str = "auto",
    memory_limit: int | None = None,
    resume: bool = False,
    timeline: str | Path | None = None,
    widths: Widths | None = None,
    diffusion: DiffusionOptions | None = None,
    progress: Progress | None = None,
) -> Manifest | Plan:
    """Quantize the safetensors checkpoint `src` into `dst`, which appears when it is complete.

    src: a file, an index file, or a model directory
    dst: a directory for the formats "compressed-tensors" and "parquet-tensors", a file for "parquet" and "arrow"
    scheme: a scheme id, or for GGUF the name of a mix; by default that of the recipe, else of the format, which may
        store its scales in another type, see `Plan`
    format: by default "compressed-tensors" for a directory with config.json, else "parquet"
    compression: "zstd" makes kept float tensors smaller, and codes hardly, in every format but "compressed-tensors";
        the files are then written a second time at the end of the run, and sizes in the plan are those without it
    format_options: what the format lets one choose, for example {"checkpoint_format": "gptq_v2"}
    max_shard_size: bytes of the tensors in one file, of formats that are model directories; by default the files are as
        in the source
    allow_requantize: read a source that is quantized already, in any format that this package reads: its weights are
        decoded as they are read, and quantized again
    device: as in `quantize`, or several of them ("cuda:0,cuda:1", a list, or "all" GPUs), which share the work;
        every choice gives the same bytes
    threads: of the CPU
    include, ignore: regular expressions over tensor names, see docs/policy.md
    recipe: a `Recipe`, or its YAML file, see docs/recipes.md
    tensor_schemes: pairs of a regular expression over tensor names and a scheme, the first that matches decides; they
        come before the recipe's rules
    expect_quantized: the least share of the float weights, over 0 and up to 1, that must be quantized
    validate: measure the error of every quantized tensor (columns of the manifest)
    overwrite: replace what is at `dst`; only ever what an earlier run wrote, never the source
    dry_run: return the plan; writes nothing, and reads headers only unless `widths` or `diffusion` needs more
    read: how the source is read: "auto", "mapped", "buffered", "direct" (past the page cache) or "gds" (GPUDirect
        Storage, with kvikio)
    memory_limit: bytes of anonymous host memory and of device memory together; the buffers are made to fit
    resume: go on where an interrupted run for the same `dst` ended; the result is the same as without interruption
    timeline: a file for a trace of what ran when, for chrome://tracing or ui.perfetto.dev
    widths: how the width of each tensor follows from what is measured of it, see `Widths` and docs/widths.md; the
        weights are then read once more, before the run
    diffusion: modality and calibration of a diffusion model, see `DiffusionOptions` and docs/diffusion.md; by default
        what the checkpoint says of itself, without calibration
    progress: called with (bytes done, bytes in all, tensor name), where `widths` measures first for that and then for
        the run; an exception from it ends the run

    Returns the Manifest, which also lies beside the output, or the Plan of a dry run; both have `table` and `summary`.
    Memory: some buffers of 16 MiB, however large the model. After any error, KeyboardInterrupt included, `dst` is
    what it was before. What is finished is kept beside it for `resume`, unless the weights themselves are at fault.

        >>> import tempfile, numpy as np, safetensors.numpy
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = safetensors.numpy.save_file({"fc.weight": np.eye(64, dtype=np.float32)}, folder / "m.safetensors")
        >>> result = quantize_checkpoint(folder / "m.safetensors", folder / "m.parquet", "int4_g32", device="cpu")
        >>> result.summary["n_quantized"], result.summary["bits_per_weight"]
        (1, 5.0)

    Raises SchemeError, SourceError, PolicyError, FormatError, TargetError, NonFiniteError, ScaleOverflowError,
    QualityError (`widths`), InputError (`diffusion`) and DeviceError.
    """
    start = time.perf_counter()
    widths = widths or Widths()
    recipe = Recipe.of(recipe)
    source = open_source(src, allow_requantize=allow_requantize)
    format_name = (
        format
        or recipe.format
        or ("compressed-tensors" if source.path.is_dir() and source.config is not None else "parquet")
    )
    source = in_parts(source, format_name)
    scheme = scheme or recipe.scheme or target_of(format_name).scheme
    files = {info.file for info in source.tensors.values()}
    is_directory = target_of(format_name, compression).is_directory
    output = Output(
        dst, is_directory=is_directory, sources=[source.path, *sorted(files)], overwrite=overwrite, resume=resume
    )
    sink = open_sink(
        format_name,
        output,
        source.config,
        tuple(source.tensors),
        compression=compression,
        max_shard_size=max_shard_size,
        options=format_options,
    )
    with contextlib.nullcontext() if timeline is None or dry_run else trace.timeline(timeline):
        with trace.span("plan", source.path.name):
            rules: dict[str, Any] = {"recipe": recipe, "tensor_schemes": tensor_schemes}
            plan = make_plan(source, sink, scheme, include, ignore, widths.sensitive, **rules)
            check_share(plan, expect_quantized)
            if not dry_run:
                output.check()
            prepared = prepare(plan.entries, source, diffusion, plan.format)
            plan = dataclasses.replace(plan, entries=prepared.entries)
        if dry_run and not widths.is_measured:
            return explained(plan, prepared)
        names = [picked.name for picked in pick_devices(device)]
        bounds: dict[str, Any] = {"threads": threads, "memory_limit": memory_limit}
        plan = revise(plan, source, sink, widths, devices=names, progress=progress, **bounds)
        check_share(plan, expect_quantized)
        plan = explained(plan, prepared)
        if dry_run:
            return plan
        pieces = [piece for entry in plan.entries for piece in sink.pieces(entry)]
        options: dict[str, Any] = {**bounds, "read": read}
        with open_devices(names, source, pieces, validate=validate, **options) as devices:
            return _carry_out(plan, prepared, source, sink, output, devices, start, validate, progress)


def _carry_out(
    plan: Plan,
    prepared: Prepared,
    source: Checkpoint,
    sink: Sink,
    output: Output,
    devices: Sequence[Device],
    start: float,
    validate: bool,
    progress: Progress | None,
) -> Manifest:
    origin = {**provenance(source, plan), **modality_of(prepared)}
    try:
        output.begin()
        with contextlib.closing(Journal(output, fingerprint(plan, origin, validate))) as journal:
            with trace.span("plan", "layout"):
                sink.open(plan.entries, source, dict(origin))
            finished = engine.run(plan.entries, sink, output, devices, journal, validate=validate, progress=progress)
            resumed = sum(f is journal.finished.get(f.name) for f in finished)
        write_activations(prepared, output)
        table = manifest_table(plan, finished, [*output.names(), output.manifest], origin)
        with target_errors(output.target):
            write_manifest(table, output.path(output.manifest))
        written = time.perf_counter()
        with trace.span("write", "flush"):
            names = sink.commit()
    except BaseException as e:
        # What the weights themselves are at fault for would only come again.
        n = output.abort(keep=not isinstance(e, InputError))
        if n:
            e.add_note(
                f"{n} of {len(plan.entries)} tensors are finished: run the same command with --resume to continue."
            )
        raise
    notes = tuple(note for device in devices for note in (*device.notes, *device.reader.notes))
    run = Run(written - start, time.perf_counter() - written, tuple(device.name for device in devices), resumed, notes)
    return Manifest(plan, table, names, run)


def fingerprint(plan: Plan, origin: Mapping[str, str], validate: bool) -> dict[str, str]:
    """What must be alike for one run to go on where another was interrupted."""
    decisions = [
        (e.info.name, e.scheme and e.scheme.id, e.reason, e.info.dtype, e.info.shape, *decided(e)) for e in plan.entries
    ]
    return {
        **origin,
        "format": plan.format,
        "tensors (include, ignore, widths, calibration)": xxhash.xxh3_64_hexdigest(json.dumps(decisions).encode()),
        "validate": str(validate),
    }


def open_source(src: str | Path, *, allow_requantize: bool = False) -> Checkpoint:
    """The float checkpoint `src`; with `allow_requantize` a quantized one too, which is decoded as it is read.

    Raises SourceError.
    """
    if not allow_requantize:
        return open_checkpoint(src)
    try:
        return open_checkpoint(src)
    except SourceError as refused:
        try:
            return DecodedCheckpoint(open_quantized(src))
        except SourceError as e:
            raise SourceError(f"{e}. As a float checkpoint: {refused}") from e


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
