"""The command line `arrowquant`: parse, call the library, report. Exit codes are those of errors.py; docs/cli.md."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import __version__
from .cli_progress import compile_time, progress_bar
from .cli_run import TERMINATED, Debug, Device, Json, Overwrite, Quiet, Threads, Verbose, run
from .cli_serve import serve
from .cli_size import parse_size
from .cli_tables import quantize_table
from .errors import FormatError, InputError, PolicyError, SchemeError
from .schemes import Scheme

if TYPE_CHECKING:
    from .diffusion import DiffusionOptions
    from .pipeline.profiles import Profile

app = typer.Typer(
    name="arrowquant",
    help="Quantize model weights: the same bytes on CPU and GPU, checkpoints that serving engines load.",
    epilog="Example: arrowquant quantize ./Llama-2-7b ./Llama-2-7b-int4 --scheme int4_g128",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Source = Annotated[
    str, typer.Argument(metavar="SRC", help="A safetensors file, its index, a model directory, or org/name[@revision].")
]


@app.command(epilog="Example: arrowquant quantize model/ model-int4/ --scheme int4_g128 --ignore 'layers\\.0\\.'")
def quantize(
    src: Source,
    dst: Annotated[Path, typer.Argument(metavar="DST", help="The directory or file to write.")],
    scheme: Annotated[
        str | None,
        typer.Option(metavar="ID", help="int{2,3,4,5,6,8}_{gN,channel,tensor}[_asym]. [default: int4_g128]"),
    ] = None,
    bits: Annotated[int | None, typer.Option(metavar="B", help="Bits of a code; instead of --scheme.")] = None,
    group_size: Annotated[
        str | None, typer.Option(metavar="N", help="Weights that share a scale: a number, channel or tensor.")
    ] = None,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="With zero points.")] = False,
    profile: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="edge, local or cloud: scheme, --min-accuracy and the defaults of a calibration, instead of --scheme. "
            "--bits, --group-size and --min-accuracy beside it override that part.",
        ),
    ] = None,
    min_accuracy: Annotated[
        float | None,
        typer.Option(
            metavar="C",
            help="Give a tensor whose measured cosine is under C the next of 2, 4 and 8 bits, or keep it. Reads the "
            "weights once more.",
        ),
    ] = None,
    entropy: Annotated[
        bool, typer.Option("--entropy", help="Begin with 2, 4 or 8 bits by the entropy of each tensor. Reads them.")
    ] = False,
    sensitive: Annotated[
        str, typer.Option(metavar="HOW", help="keep embeddings, output heads and the like, or raise them to 8 bits.")
    ] = "keep",
    fail_fast: Annotated[
        bool, typer.Option("--fail-fast", help="A tensor under the least accuracy is an error.")
    ] = False,
    modality: Annotated[
        str | None,
        typer.Option(metavar="M", help="text, code, image or audio. [default: what the checkpoint says of itself]"),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Activations of a diffusion model: JSON lines, Parquet or Arrow."),
    ] = None,
    timesteps: Annotated[
        int | None, typer.Option(metavar="T", help="Time steps of the model. [default: those of --calibration]")
    ] = None,
    time_groups: Annotated[
        int | None,
        typer.Option(metavar="G", help="Groups of time steps with activation scales of their own. [default: 10]"),
    ] = None,
    format: Annotated[  # noqa: A002 - the parameter is the option's name
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="One of the formats that `arrowquant formats` lists, such as compressed-tensors, awq, mlx or gguf. "
            "[default: compressed-tensors for a model directory, parquet for a lone file]",
        ),
    ] = None,
    format_option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="An option of the format, see `arrowquant formats`; may be repeated."),
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Largest file of a model directory, like 5GB. [default: as in SRC]"),
    ] = None,
    allow_requantize: Annotated[
        bool,
        typer.Option("--allow-requantize", help="SRC may be quantized already: decode it, with the errors of both."),
    ] = False,
    compression: Annotated[
        str | None,
        typer.Option(metavar="C", help="zstd, for every format but compressed-tensors. [default: none]"),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            metavar="DEVICE",
            help="auto (a usable GPU, else the CPU), cpu, cuda:N, several with commas, or all GPUs. Same bytes.",
        ),
    ] = "auto",
    include: Annotated[
        list[str] | None, typer.Option(metavar="RE", help="Quantize tensors whose name matches; may be repeated.")
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(metavar="RE", help="Keep tensors whose name matches; may be repeated, wins.")
    ] = None,
    tensor_scheme: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RE=SCHEME",
            help="Another scheme for the matrices whose name matches; may be repeated, the first that matches decides.",
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Ordered rules by name, role or layer, in YAML: see recipe-schema."),
    ] = None,
    expect_quantized: Annotated[
        str | None,
        typer.Option(metavar="SHARE", help="Fail, before anything is written, if less of the weights would be: 90%."),
    ] = None,
    validate: Annotated[bool, typer.Option("--validate", help="Measure the error of every tensor on the way.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop; writes nothing.")] = False,
    overwrite: Overwrite = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an interrupted run for the same DST ended. Same bytes.")
    ] = False,
    memory_limit: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Host and device memory together, like 500MB or 8GiB. [default: no limit]"),
    ] = None,
    read: Annotated[
        str,
        typer.Option(
            metavar="HOW",
            help="mapped, buffered, direct (past the page cache) or gds (GPUDirect, with kvikio), or auto.",
        ),
    ] = "auto",
    timeline: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write what ran when as a trace for ui.perfetto.dev or chrome://tracing."),
    ] = None,
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
    debug: Debug = False,
) -> None:
    """Quantize a float checkpoint.

    SRC may be a safetensors file, a sharded index, a Hugging Face model directory or, with the hub extra, a Hub id.
    Linear weights are quantized; embeddings, output heads, norms, biases and routers are kept, unless --include says
    otherwise. --dry-run shows what would happen to each tensor and why, from headers alone unless --profile,
    --min-accuracy, --entropy or --calibration needs the weights.
    """
    with run("quantize", json, quiet, verbose, debug) as report:
        from .backends import pick_devices
        from .formats.hub import resolve
        from .pipeline import quantize_checkpoint
        from .pipeline.profiles import profile as find_profile
        from .pipeline.recipe import split_tensor_scheme
        from .pipeline.widths import Widths

        of_profile = None if profile is None else find_profile(profile)
        chosen = _scheme(scheme, bits, group_size, asymmetric, of_profile)
        if min_accuracy is None and of_profile is not None:
            min_accuracy = of_profile.min_accuracy
        widths: dict[str, Any] = {"min_accuracy": min_accuracy, "entropy": entropy, "sensitive": sensitive}
        source = resolve(src)
        options: dict[str, Any] = {
            "format": format,
            "format_options": _format_options(format_option),
            "max_shard_size": parse_size(max_shard_size),
            "allow_requantize": allow_requantize,
            "compression": compression,
            "include": include or (),
            "ignore": ignore or (),
            "tensor_schemes": [split_tensor_scheme(text) for text in tensor_scheme or ()],
            "recipe": recipe,
            "expect_quantized": _share(expect_quantized),
            "overwrite": overwrite,
            "widths": Widths(**widths, fail_fast=fail_fast),
            "diffusion": _diffusion(modality, calibration, timesteps, time_groups, of_profile),
            "threads": threads,
            "memory_limit": parse_size(memory_limit),
        }
        if dry_run:
            with progress_bar("measuring", shown=not quiet) as progress:
                options |= {"device": device, "progress": progress}
                report.plan(quantize_checkpoint(source, dst, chosen, dry_run=True, **options))
            return
        picked = pick_devices(device)
        options |= {"device": [p.name for p in picked], "validate": validate, "read": read}
        options |= {"resume": resume, "timeline": timeline}
        with progress_bar("quantizing", shown=not quiet) as progress, compile_time(picked) as compiling:
            result = quantize_checkpoint(source, dst, chosen, progress=progress, **options)
        report.quantized(result, src, dst, picked, compiling())


@app.command(epilog="Example: arrowquant inspect model/")
def inspect(
    src: Annotated[str, typer.Argument(metavar="SRC", help="A float or a quantized checkpoint.")],
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
    debug: Debug = False,
) -> None:
    """List the tensors of a checkpoint, float or quantized, from its headers."""
    with run("inspect", json, quiet, verbose, debug) as report:
        from .cli_inspect import describe, open_any
        from .formats.hub import resolve

        checkpoint = open_any(resolve(src))
        report.inspected(checkpoint.path, *describe(checkpoint))


@app.command(epilog="Example: arrowquant dequantize model-int4/ model-float/")
def dequantize(
    src: Annotated[str, typer.Argument(metavar="SRC", help="A checkpoint that arrowquant wrote, in any format.")],
    dst: Annotated[Path, typer.Argument(metavar="DST", help="The directory or safetensors file to write.")],
    dtype: Annotated[
        str | None,
        typer.Option(metavar="DTYPE", help="float32, float16 or bfloat16. [default: the original dtype of each]"),
    ] = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
    debug: Debug = False,
) -> None:
    """Decode a quantized checkpoint back to float safetensors. What was kept is copied bit for bit."""
    with run("dequantize", json, quiet, verbose, debug) as report:
        from .backends import pick_device
        from .formats.hub import resolve
        from .pipeline.dequantize import dequantize_checkpoint

        picked = pick_device(device)
        with progress_bar("decoding", shown=not quiet) as progress, compile_time([picked]) as compiling:
            result = dequantize_checkpoint(
                resolve(src),
                dst,
                dtype=dtype,
                device=picked.name,
                overwrite=overwrite,
                threads=threads,
                progress=progress,
            )
        report.dequantized(result, src, dst, picked, compiling())


@app.command(epilog="Example: arrowquant verify model-int4/ --against model/ --min-cosine 0.98")
def verify(
    dst: Annotated[str, typer.Argument(metavar="DST", help="The quantized checkpoint.")],
    against: Annotated[str, typer.Option(metavar="SRC", help="The float checkpoint it was made from.")],
    min_cosine: Annotated[
        float | None,
        typer.Option(min=-1.0, max=1.0, metavar="C", help="Fail under this cosine. [default: by scheme]"),
    ] = None,
    within_step: Annotated[
        bool,
        typer.Option(help="Every weight must also be as close as min-max rounding promises: finds a single bad code."),
    ] = True,
    device: Device = "auto",
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
    debug: Debug = False,
) -> None:
    """Compare a quantized checkpoint with its original: cosine, SQNR and largest error of each tensor, worst first.

    Fails with exit code 8 where a tensor is under the threshold, a kept tensor is not the original, or one is missing.
    """
    with run("verify", json, quiet, verbose, debug) as report:
        from .backends import pick_device
        from .formats.hub import resolve
        from .pipeline.verify import verify_checkpoint

        picked = pick_device(device)
        with progress_bar("verifying", shown=not quiet) as progress:
            result = verify_checkpoint(
                resolve(dst),
                resolve(against),
                min_cosine=min_cosine,
                within_step=within_step,
                device=picked.name,
                threads=threads,
                progress=progress,
            )
        report.verified(result, picked)
        result.check()


@app.command(epilog="Example: arrowquant info --json")
def info(json: Json = False, debug: Debug = False) -> None:
    """Show versions, devices, and which backend auto would take and why."""
    with run("info", json, False, 0, debug) as report:
        from .backends import pick_device
        from .cli_info import devices, kernel_compiler, versions

        report.info(versions(), devices(), kernel_compiler(), pick_device())


@app.command(epilog="Example: arrowquant formats")
def formats(json: Json = False, debug: Debug = False) -> None:
    """List the output formats: what each is, its default scheme, and its options."""
    with run("formats", json, False, 0, debug) as report:
        from .cli_info import formats as known

        report.formats(known())


@app.command(epilog="Example: arrowquant recipe-schema > recipe.schema.json")
def recipe_schema() -> None:
    """Print the JSON schema of the files that quantize --recipe reads, for editors that check YAML."""
    from .pipeline.recipe import schema_text

    print(schema_text(), end="")


app.command(epilog="Example: arrowquant quantize-table weights.parquet int4.arrow --scheme int4_g128_asym")(
    quantize_table
)
app.command(epilog="Example: arrowquant serve --location grpc://127.0.0.1:8815 --store results/")(serve)


def _version(value: bool) -> None:
    if value:
        print(f"arrowquant {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def _diffusion(
    modality: str | None,
    calibration: Path | None,
    timesteps: int | None,
    time_groups: int | None,
    profile: Profile | None,
) -> DiffusionOptions | None:
    """What the options say of a diffusion model; None where they say nothing."""
    from .diffusion import DiffusionOptions

    if modality is None and calibration is None:
        if timesteps is not None or time_groups is not None:
            raise InputError("--timesteps and --time-groups say how activations are grouped: give --calibration too")
        return None
    options: dict[str, Any] = {"modality": modality, "calibration": calibration, "n_timesteps": timesteps}
    if profile is not None:
        options |= {"time_groups": profile.time_groups, "calibration_samples": profile.calibration_samples}
    if time_groups is not None:
        options["time_groups"] = time_groups
    return DiffusionOptions(**options)


def _scheme(
    scheme: str | None, bits: int | None, group_size: str | None, asymmetric: bool, profile: Profile | None
) -> str | Scheme | None:
    """The scheme that the options name, by id or by parts, of which a profile gives those that are left out.

    None where they name none: it is then that of the recipe, or of the format.
    """
    if profile is not None:
        if scheme is not None:
            raise SchemeError(
                "give --scheme or --profile, not both; --bits and --group-size change a part of a profile"
            )
        bits = profile.bits if bits is None else bits
        group_size, asymmetric = group_size or str(profile.group_size), True
    if scheme is not None:
        if bits is not None or group_size is not None or asymmetric:
            raise SchemeError("give --scheme, or --bits, --group-size and --asymmetric, not both")
        return scheme
    if bits is None and group_size is None and not asymmetric:
        return None
    if group_size in ("channel", "tensor"):
        return Scheme(4 if bits is None else bits, group_size, None, not asymmetric)
    if group_size is not None and not group_size.isdecimal():
        raise SchemeError(f"--group-size {group_size!r}: give a number, channel or tensor")
    return Scheme(4 if bits is None else bits, "group", int(group_size or 128), not asymmetric)


def _format_options(texts: list[str] | None) -> dict[str, str]:
    """The pairs of KEY=VALUE. Raises FormatError."""
    pairs = [text.partition("=") for text in texts or ()]
    for key, equals, value in pairs:
        if not (key and equals and value):
            raise FormatError(f"--format-option {key}{equals}{value}: it is KEY=VALUE, for example double_quant=true")
    return {key: value for key, _, value in pairs}


def _share(text: str | None) -> float | None:
    """A share of the weights: 90% or 0.9.

    >>> _share("90%"), _share("0.5")
    (0.9, 0.5)
    """
    if text is None:
        return None
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise PolicyError(f"--expect-quantized {text!r}: give a share over 0 and up to 100%, like 90% or 0.9")
    return share


def _terminated(signum: int, frame: FrameType | None) -> Any:
    # An exception, so that what was written so far is removed on the way out.
    raise SystemExit(TERMINATED)


def main() -> None:
    """Entry point of the program."""
    signal.signal(signal.SIGTERM, _terminated)
    app(prog_name="arrowquant")


if __name__ == "__main__":
    main()
