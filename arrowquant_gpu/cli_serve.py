"""The command `arrowquant serve`: the Flight service until a signal ends it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_run import Debug, Device, Json, Quiet, Threads, Verbose, run
from .cli_size import parse_size

if TYPE_CHECKING:
    from .flight.server import Server


def serve(
    location: Annotated[
        str,
        typer.Option(metavar="URI", help="grpc://HOST:PORT or grpc+tls://HOST:PORT; port 0 takes a free one."),
    ] = "grpc://127.0.0.1:8815",
    store: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Keep results that clients put here. [default: keep none]")
    ] = None,
    max_clients: Annotated[
        int, typer.Option(min=1, metavar="N", help="Streams at a time; others are told to try again.")
    ] = 8,
    memory_limit: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="For all streams; bounds what one message may hold. [default: 2GiB]"),
    ] = None,
    idle_timeout: Annotated[
        float, typer.Option(min=0.1, metavar="SECONDS", help="Disconnect a client from which nothing comes.")
    ] = 300.0,
    grace: Annotated[
        float, typer.Option(min=0.0, metavar="SECONDS", help="Time for running calls when a signal comes.")
    ] = 30.0,
    token_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="The token that clients must have. [default: ARROWQUANT_TOKEN, else none]"),
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(metavar="FILE", help="Certificate chain, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="FILE", help="Its private key, PEM.")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Clients need a certificate of this authority, PEM.")
    ] = None,
    device: Device = "auto",
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
    debug: Debug = False,
) -> None:
    """Quantize for others over Arrow Flight, until Ctrl-C or SIGTERM.

    A location that other machines reach needs a token and TLS. Running calls are finished at the end, up to --grace;
    a second signal ends them at once.
    """
    with run("serve", json, quiet, verbose, debug):
        from .flight.access import Access
        from .flight.server import Server

        server = Server(
            location,
            store=store,
            access=Access.read(token_file, tls_cert, tls_key, tls_client_ca),
            max_clients=max_clients,
            memory_limit=parse_size(memory_limit),
            idle_timeout=idle_timeout,
            device=device,
            threads=threads,
        )
        with _closing(server, grace):
            limits = {"max_clients": server.max_clients, "message_bytes": server.message_bytes}
            if json:
                ready = {"command": "serve", "location": server.location, "device": server.device._asdict(), **limits}
                print(dumps(ready), flush=True)
            elif not quiet:
                print(f"serving at {server.location} on {server.device.name} ({server.device.reason})", flush=True)
            # A signal raises here.
            threading.Event().wait()


@contextlib.contextmanager
def _closing(server: Server, grace: float) -> Iterator[None]:
    """Closes the server at the end of the body, and notes on its exception what was not finished."""
    try:
        yield
    except BaseException as e:
        unfinished: list[dict[str, Any]] = server.close(grace)
        ended = ", ".join(f"{call['call']} of {call['peer']} after {call['rows']} rows" for call in unfinished)
        e.add_note("every call was finished" if not unfinished else f"ended before they were finished: {ended}")
        raise
