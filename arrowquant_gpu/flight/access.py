"""Who may call: the bearer token, the certificates, and the addresses that may be listened on without them."""

from __future__ import annotations

import hmac
import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow.flight as fl

from ..errors import AuthenticationError, ServiceError
from .faults import to_flight

TOKEN_VARIABLE = "ARROWQUANT_TOKEN"
MIN_TOKEN = 16
SCHEMES = ("grpc", "grpc+tcp", "grpc+tls")


@dataclass(frozen=True)
class Access:
    """What a server asks of its clients. `client_roots`: the authority that must have signed their certificates."""

    token: str | None = None
    certificate: bytes | None = None
    key: bytes | None = None
    client_roots: bytes | None = None

    @classmethod
    def read(
        cls,
        token_file: Path | None = None,
        certificate: Path | None = None,
        key: Path | None = None,
        client_roots: Path | None = None,
    ) -> Access:
        """From files of PEM, and the token from a file or else from ARROWQUANT_TOKEN. Raises ServiceError."""
        token = os.environ.get(TOKEN_VARIABLE) if token_file is None else _read(token_file).decode(errors="replace")
        if token is not None:
            token = token.strip()
            if len(token) < MIN_TOKEN or not (token.isascii() and token.isprintable()) or " " in token:
                raise ServiceError(
                    f"{token_file or TOKEN_VARIABLE}: a token is at least {MIN_TOKEN} printable ASCII characters "
                    f"without spaces; `openssl rand -hex 32` makes one"
                )
        if (certificate is None) != (key is None):
            raise ServiceError("a certificate and its key go together: give --tls-cert and --tls-key")
        if client_roots is not None and certificate is None:
            raise ServiceError("clients' certificates are checked over TLS alone: give --tls-cert and --tls-key too")
        return cls(token, *(None if path is None else _read(path) for path in (certificate, key, client_roots)))

    def check(self, location: str) -> None:
        """Raise ServiceError unless a server with this access may listen there."""
        scheme, host, _ = split(location)
        if (scheme == "grpc+tls") != (self.certificate is not None):
            raise ServiceError(
                f"{location}: "
                + (
                    "TLS needs a certificate: give --tls-cert and --tls-key"
                    if self.certificate is None
                    else f"with a certificate it must be grpc+tls://{location.partition('://')[2]}"
                )
            )
        lacking = [
            what
            for what, is_there in (
                ("a token (--token-file, or ARROWQUANT_TOKEN)", self.token),
                ("TLS (--tls-cert and --tls-key, and grpc+tls://)", self.certificate),
            )
            if not is_there
        ]
        if lacking and not is_loopback(host):
            raise ServiceError(
                f"{location} can be reached from other machines, and everyone there could use this service: it needs "
                f"{' and '.join(lacking)}. Without, listen on 127.0.0.1."
            )

    def options(self) -> dict[str, Any]:
        """Arguments of FlightServerBase."""
        options: dict[str, Any] = {}
        if self.certificate is not None:
            options["tls_certificates"] = [(self.certificate, self.key)]
        if self.client_roots is not None:
            options |= {"verify_client": True, "root_certificates": self.client_roots}
        if self.token is not None:
            options["middleware"] = {"token": _TokenCheck(self.token)}
        return options


def split(location: str) -> tuple[str, str, int]:
    """Scheme, host and port of a location. Raises ServiceError.

    >>> split("grpc://127.0.0.1:8815"), split("grpc+tls://[::1]:0")
    (('grpc', '127.0.0.1', 8815), ('grpc+tls', '::1', 0))
    """
    try:
        parts = urlsplit(location)
        scheme, host, port = parts.scheme, parts.hostname, parts.port
    except ValueError as e:
        raise ServiceError(f"location {location!r}: {e}") from e
    if scheme not in SCHEMES or not host or port is None or parts.path or parts.query or parts.username:
        raise ServiceError(f"location {location!r}: write grpc://HOST:PORT or grpc+tls://HOST:PORT")
    return scheme, host, port


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0"), is_loopback("example.org")
    (True, True, False, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def call_options(token: str | None) -> fl.FlightCallOptions:
    """What a client sends with every call."""
    headers = [] if token is None else [(b"authorization", b"Bearer " + token.encode())]
    return fl.FlightCallOptions(headers=headers)


class _TokenCheck(fl.ServerMiddlewareFactory):  # type: ignore[misc]
    """Refuses calls without the token, before any of their data is read."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    def start_call(self, info: Any, headers: dict[str, list[str]]) -> None:
        given = [v.encode(errors="replace") for k, vs in headers.items() if k.lower() == "authorization" for v in vs]
        # Compared in a time that does not tell how much of it was right.
        if len(given) != 1 or not hmac.compare_digest(given[0], self._expected):
            what = "no token was given" if not given else "the token is not this server's"
            raise to_flight(AuthenticationError(f"{what}: pass token=, or set {TOKEN_VARIABLE}"))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise ServiceError(f"{path} cannot be read: {e.strerror}") from e
