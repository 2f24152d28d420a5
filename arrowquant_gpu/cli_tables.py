"""The command `arrowquant quantize-table`: tables of weights from files and streams to files and streams."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from .cli_progress import compile_time, progress_bar
from .cli_report import size
from .cli_run import Debug, Device, Json, Overwrite, Quiet, Threads, Verbose, run
from .cli_size import parse_size
from .errors import InputError


def quantize_table(
    src: Annotated[
        str,
        typer.Argument(
            metavar="SRC",
            help="An Arrow IPC file or stream, a Parquet file, a directory of such files, or - for a stream on stdin.",
        ),
    ],
    dst: Annotated[
        str,
        typer.Argument(
            metavar="DST",
            help="NAME.arrow, NAME.arrows (a stream), NAME.parquet, a directory, or - for a stream on stdout.",
        ),
    ],
    scheme: Annotated[
        str, typer.Option(metavar="ID", help="int{2,3,4,5,6,8}_{gN,channel,tensor}[_asym].")
    ] = "int4_g128_asym",
    continue_on_error: Annotated[
        bool, typer.Option("--continue-on-error", help="Leave out what cannot be quantized, and say what and why.")
    ] = False,
    max_row: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Cut tensors whose result is larger, like 64MB, into rows. [default: never]"),
    ] = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
    debug: Debug = False,
) -> None:
    """Quantize a table of weights: columns layer_name, weights (lists of numbers) and, where it is not nested, shape.

    Memory does not grow with the table. Files appear when they are complete. Where DST is - nothing but the stream is
    printed on stdout.
    """
    with run("quantize-table", json, quiet, verbose, debug) as report:
        from .backends import pick_device
        from .tables.files import quantize_file

        if json and dst == "-":
            raise InputError("--json prints on stdout, which is the stream where DST is -; give one of the two")
        picked = pick_device(device)
        options: dict[str, Any] = {"continue_on_error": continue_on_error, "overwrite": overwrite}
        options |= {"device": picked.name, "threads": threads, "max_row_bytes": parse_size(max_row)}
        with (
            progress_bar("quantizing", shown=not quiet, of="rows") as progress,
            compile_time([picked]) as compiling,
        ):
            done = quantize_file(
                sys.stdin.buffer if src == "-" else src,
                sys.stdout.buffer if dst == "-" else dst,
                scheme,
                progress=progress,
                **options,
            )
        for problem in done.problems if dst == "-" and not quiet else ():
            print(f"arrowquant: left out: {problem.error}", file=sys.stderr)
        if dst == "-":
            sys.stdout.buffer.flush()
            return
        work = max(done.seconds - compiling(), 1e-9)
        report.add(
            f"{src} -> {dst}",
            f"{done.n_rows} rows: {size(done.weight_bytes)} -> {size(done.result_bytes)}",
            *(f"left out: {problem.error}" for problem in done.problems),
            f"{done.seconds:.2f} s on {picked.name} ({picked.reason}); {size(done.weight_bytes / work)}/s",
            source=src,
            target=dst,
            scheme=scheme,
            device=picked._asdict(),
            files=[str(path) for path in done.paths],
            n_rows=done.n_rows,
            weight_bytes=done.weight_bytes,
            result_bytes=done.result_bytes,
            seconds=done.seconds,
            compile_seconds=compiling(),
            problems=[
                {"layer": p.layer, "error": type(p.error).__name__, "message": str(p.error)} for p in done.problems
            ],
        )
