"""Typed errors over the wire: the name, message and values of an error of errors.py in a Flight error's extra_info."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pyarrow.flight as fl

from .. import errors
from ..errors import ArrowQuantError, AuthenticationError, BusyError, ServiceError

# Errors travel in the trailers of an HTTP/2 stream: gRPC throws all of them away where they are over 8 KB together.
# The text is in them three times, once percent-encoded.
MOST_TEXT, MOST_INFO = 300, 2000
_KINDS: dict[type[ArrowQuantError], type[fl.FlightError]] = {
    AuthenticationError: fl.FlightUnauthenticatedError,
    BusyError: fl.FlightUnavailableError,
}


def to_flight(error: ArrowQuantError) -> fl.FlightError:
    """The Flight error that carries `error`: Unauthenticated, Unavailable, or else a failed call.

    >>> from arrowquant_gpu.errors import InputError
    >>> to_flight(InputError("fc: no weights")).extra_info
    b'{"error": "InputError", "message": "fc: no weights", "values": {}}'
    """
    kind = next((k for c, k in _KINDS.items() if isinstance(error, c)), fl.FlightServerError)
    text = _short(str(error), MOST_TEXT).encode("ascii", "backslashreplace").decode()
    return kind(_short(text, 2 * MOST_TEXT), _info(error))


def from_flight(error: BaseException, location: str) -> ArrowQuantError:
    """The error that a server raised with `to_flight`, of the same class; a ServiceError for what Flight itself says.

    >>> from arrowquant_gpu.errors import InputError
    >>> from_flight(to_flight(InputError("fc: no weights")), "grpc://host:1")
    InputError('fc: no weights')
    """
    info = getattr(error, "extra_info", None)
    if info and (restored := _restored(info)) is not None:
        return restored
    # pyarrow appends what gRPC found, which is for those who debug gRPC.
    text = str(error).partition(". gRPC client debug context")[0]
    if isinstance(error, fl.FlightUnauthenticatedError):
        return AuthenticationError(f"{location}: {text}")
    if isinstance(error, fl.FlightUnavailableError):
        return ServiceError(
            f"{location}: no answer ({text}); is `arrowquant serve` running there, with or without TLS?"
        )
    if isinstance(error, fl.FlightTimedOutError):
        return ServiceError(f"{location}: no answer in time ({text})")
    return ServiceError(f"{location}: {text}")


# What Flight calls raise: errors of the service, of Arrow's reading of the stream, and of gRPC.
FLIGHT_ERRORS = (pa.ArrowException, OSError, KeyError, NotImplementedError, EOFError, ValueError)


def _info(error: ArrowQuantError) -> bytes:
    values = {k: v for k, v in vars(error).items() if not k.startswith("_")}
    said: dict[str, Any] = {"error": type(error).__name__, "message": str(error), "values": values}
    if len(text := json.dumps(said, default=str)) > MOST_INFO:
        # Escapes take up to twelve bytes for a character.
        said |= {"message": _short(str(error), MOST_INFO // 14), "values": {}}
        text = json.dumps(said)
    return text.encode()


def _restored(info: bytes) -> ArrowQuantError | None:
    try:
        said = json.loads(info)
        error = restored(said["error"], said["message"])
        vars(error).update({k: tuple(v) if isinstance(v, list) else v for k, v in dict(said["values"]).items()})
    except (ValueError, KeyError, TypeError):
        return None
    return error


def restored(kind: str, message: str) -> ArrowQuantError:
    """The error of errors.py with this class name and message; a ServiceError that names an unknown class.

    >>> restored("SchemeError", "9 bits")
    SchemeError('9 bits')
    """
    found = vars(errors).get(kind)
    if not (isinstance(found, type) and issubclass(found, ArrowQuantError)):
        return ServiceError(f"{kind}: {message}")
    error = found.__new__(found)
    error.args = (message,)
    return error


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 40]} [{len(text) - most + 40} more characters]"
