"""What every command has: options of one spelling, a log, a report at its end, and errors as an exit code."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from typing import Annotated, NoReturn

import typer

from .cli_report import Report
from .errors import ArrowQuantError

INTERRUPTED, TERMINATED, BROKEN_PIPE, BUG = 130, 143, 141, 70

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Verbose = Annotated[
    int, typer.Option("--verbose", "-v", count=True, show_default=False, help="Say more on stderr; -vv for everything.")
]
Debug = Annotated[bool, typer.Option("--debug", help="On an error, print the traceback too.")]
Device = Annotated[
    str, typer.Option(metavar="DEVICE", help="auto (a usable GPU, else the CPU), cpu, cuda or cuda:N. Same bytes.")
]
Threads = Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="CPU threads. [default: ARROWQUANT_NUM_THREADS, else all cores]"),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run left at DST.")]


@contextlib.contextmanager
def run(command: str, json: bool, quiet: bool, verbose: int, debug: bool) -> Iterator[Report]:
    """The body of a command: its report is printed at the end, its errors are one paragraph and an exit code."""
    with _logging(verbose):
        try:
            report = Report(command, json=json, quiet=quiet)
            yield report
            report.flush()
        except ArrowQuantError as e:
            # What was found out before the error (verify: the figures) is still worth printing.
            report.flush()
            _fail(" ".join([str(e), *_notes(e)]), e.exit_code, debug)
        except KeyboardInterrupt as e:
            _fail(" ".join(["interrupted;", *_notes(e, "nothing was left behind")]), INTERRUPTED, debug)
        except SystemExit as e:
            print(" ".join(["arrowquant: terminated;", *_notes(e, "nothing was left behind")]), file=sys.stderr)
            raise
        except BrokenPipeError:
            # The reader of stdout (head, less) has gone. Python would complain once more when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(BROKEN_PIPE) from None
        except Exception as e:
            _fail(f"a bug in arrowquant, please report it with the output of --debug: {e!r}", BUG, debug)


def _notes(error: BaseException, otherwise: str = "") -> list[str]:
    """What was added to an error on its way: how much is finished, and how to go on."""
    return getattr(error, "__notes__", None) or ([otherwise] if otherwise else [])


def _fail(message: str, exit_code: int, debug: bool) -> NoReturn:
    if debug:
        traceback.print_exc()
    print(f"arrowquant: {message}", file=sys.stderr)
    raise typer.Exit(exit_code)


@contextlib.contextmanager
def _logging(verbose: int) -> Iterator[None]:
    """The package's log on stderr while a command runs: warnings, with -v information, with -vv everything."""
    log, handler = logging.getLogger(__package__), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    before = log.level
    log.addHandler(handler)
    log.setLevel((logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)])
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)
