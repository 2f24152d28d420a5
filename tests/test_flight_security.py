"""Who may call the Flight service: tokens, certificates, addresses, and names that lead nowhere else."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.flight as fl
import pytest

from arrowquant_gpu.errors import AuthenticationError, InputError, NotFoundError, ServiceError
from arrowquant_gpu.flight import Client, Server
from arrowquant_gpu.flight.access import Access
from arrowquant_gpu.flight.requests import check_name

from .test_flight import put_plainly

TOKEN = "0123456789abcdef-right"
WEIGHTS = {"w": np.ones((4, 64), np.float32)}


class Certificates(NamedTuple):
    """PEM files: an authority, a server's certificate that it signed, and a client's."""

    authority: Path
    server: Path
    server_key: Path
    client: Path
    client_key: Path


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    new = ("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj")
    openssl(*new, "/CN=authority", "-x509", "-days", "2", "-keyout", "ca.key", "-out", "ca.pem")
    for name, extension in (
        ("server", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
        ("client", "keyUsage=digitalSignature"),
    ):
        openssl(*new, f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        (folder / f"{name}.ext").write_text(extension)
        sign = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", f"{name}.ext")
        openssl("x509", "-req", "-in", f"{name}.csr", *sign, "-out", f"{name}.pem")
    return Certificates(*(folder / n for n in ("ca.pem", "server.pem", "server.key", "client.pem", "client.key")))


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    return path


@pytest.fixture
def guarded(token_file: Path, tmp_path: Path) -> Iterator[Server]:
    with Server("grpc://127.0.0.1:0", store=tmp_path / "store", access=Access.read(token_file), device="cpu") as server:
        yield server


# --- Tokens ----------------------------------------------------------------------------------------------------------


def test_the_token_opens_every_call(guarded: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with Client(guarded.location, token=TOKEN) as client:
        client.put("kept", client.quantize(WEIGHTS))
        assert client.list()[0].name == "kept"
        assert client.health()["status"] == "serving"
    monkeypatch.setenv("ARROWQUANT_TOKEN", TOKEN)
    with Client(guarded.location) as client:
        assert client.get("kept").num_rows == 1


@pytest.mark.parametrize("token", [None, TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "wrong" * 1000])
def test_without_it_nothing_is_answered(guarded: Server, token: str | None) -> None:
    with Client(guarded.location, token=token) as client:
        client._limit = 1 << 20  # what a client asks for first would be refused before the call that is meant
        rows = WEIGHTS
        calls = (
            client.health,
            client.info,
            client.schemes,
            client.list,
            lambda: client.get("x"),
            lambda: client.drop("x"),
            lambda: client.quantize(rows),
            lambda: client.put("x", rows, scheme="int8_g32"),
        )
        for call in calls:
            with pytest.raises(AuthenticationError, match="token"):
                call()
    with fl.connect(guarded.location) as plain:
        for header in (b"Basic " + TOKEN.encode(), TOKEN.encode(), b"bearer " + TOKEN.encode(), b""):
            options = fl.FlightCallOptions(headers=[(b"authorization", header)])
            with pytest.raises(fl.FlightUnauthenticatedError):
                list(plain.list_actions(options))
        twice = fl.FlightCallOptions(headers=[(b"authorization", b"Bearer " + TOKEN.encode())] * 2)
        with pytest.raises(fl.FlightUnauthenticatedError):
            list(plain.list_actions(twice))
    assert guarded._calls.list() == []


def test_the_token_is_not_in_what_is_refused(guarded: Server, caplog: pytest.LogCaptureFixture) -> None:
    with Client(guarded.location, token="some-other-token") as client, pytest.raises(AuthenticationError) as caught:
        client.health()
    assert TOKEN not in str(caught.value) + caplog.text
    assert "some-other" not in str(caught.value) + caplog.text


@pytest.mark.parametrize("text", ["", "short", "with a space in the middle", "ümlaut-ümlaut-ümlaut", "x" * 15])
def test_a_token_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "token").write_text(text)
    with pytest.raises(ServiceError, match="at least 16"):
        Access.read(tmp_path / "token")


# --- Addresses -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "192.0.2.1", "example.org", "localhost.example.org"])
def test_other_machines_need_a_token_and_tls(host: str) -> None:
    secret = b"-----BEGIN"
    for access, lacking in (
        (Access(), "a token .* and TLS"),
        (Access(token=TOKEN), "needs TLS"),
        (Access(certificate=secret, key=secret), r"needs a token \(--token-file, or ARROWQUANT_TOKEN\)\."),
    ):
        scheme = "grpc" if access.certificate is None else "grpc+tls"
        with pytest.raises(ServiceError, match=lacking):
            access.check(f"{scheme}://{host}:0")
    Access(TOKEN, secret, secret).check(f"grpc+tls://{host}:0")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "[::1]", "localhost"])
def test_this_machine_needs_neither(host: str) -> None:
    Access().check(f"grpc://{host}:0")


# --- TLS -------------------------------------------------------------------------------------------------------------


@pytest.mark.openssl
def test_tls_and_a_token(certificates: Certificates, token_file: Path) -> None:
    access = Access.read(token_file, certificates.server, certificates.server_key)
    with Server("grpc+tls://127.0.0.1:0", access=access, device="cpu") as server:
        assert server.location.startswith("grpc+tls://127.0.0.1:")
        with Client(server.location, token=TOKEN, tls_roots=certificates.authority) as client:
            assert client.quantize(WEIGHTS, "int8_g32")["scheme"].to_pylist() == ["int8_g32"]
        wrong = Client(server.location, token="another-token-of-20", tls_roots=certificates.authority)
        with wrong, pytest.raises(AuthenticationError):
            wrong.health()
        for location in (server.location, server.location.replace("+tls", "")):
            with Client(location, token=TOKEN) as client, pytest.raises(ServiceError, match=r"no answer|refuse"):
                client.health()


@pytest.mark.openssl
def test_clients_show_certificates_of_their_own(certificates: Certificates) -> None:
    access = Access.read(None, certificates.server, certificates.server_key, certificates.authority)
    with Server("grpc+tls://127.0.0.1:0", access=access, device="cpu") as server:
        shown = {"tls_certificate": certificates.client, "tls_key": certificates.client_key}
        with Client(server.location, tls_roots=certificates.authority, **shown) as client:
            assert client.health()["status"] == "serving"
        with Client(server.location, tls_roots=certificates.authority) as client, pytest.raises(ServiceError):
            client.health()


def test_half_of_a_certificate_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pem").write_bytes(b"x")
    with pytest.raises(ServiceError, match="go together"):
        Access.read(None, tmp_path / "pem")
    with pytest.raises(ServiceError, match="over TLS alone"):
        Access.read(None, None, None, tmp_path / "pem")
    with pytest.raises(ServiceError, match="cannot be read"):
        Access.read(None, tmp_path / "gone", tmp_path / "gone")
    with pytest.raises(ServiceError, match="cannot be read"):
        Client("grpc+tls://localhost:1", tls_roots=tmp_path / "gone")


# --- Names -----------------------------------------------------------------------------------------------------------

EVIL = (
    "../secret",
    "..",
    ".",
    "",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "a\x00b",
    ".hidden",
    "-rf",
    "a\n",
    "n" * 129,
    "ｅ",  # a letter, but not of ASCII
    "%2e%2e%2fsecret",
)


@pytest.mark.parametrize("name", EVIL)
def test_names_lead_nowhere_else(guarded: Server, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.arrow").write_bytes(b"secret")
    with pytest.raises(InputError, match="stored result has a name"):
        check_name(name)
    with Client(guarded.location, token=TOKEN) as client, fl.connect(guarded.location) as plain:
        options = fl.FlightCallOptions(headers=[(b"authorization", b"Bearer " + TOKEN.encode())])
        rows = client.quantize(WEIGHTS)
        raw = name.encode()
        with pytest.raises(InputError):
            client._act("drop", {"name": name})
        with pytest.raises(fl.FlightServerError, match="name"):
            plain.do_get(fl.Ticket(raw), options).read_all()
        descriptor = fl.FlightDescriptor.for_path(raw)
        for ask in (plain.get_flight_info, plain.get_schema):
            with pytest.raises(pa.ArrowException, match="name"):
                ask(descriptor, options)
        assert "name" in put_plainly(plain, descriptor, rows, options=options)
    assert (tmp_path / "secret.arrow").read_bytes() == b"secret"
    assert sorted(p.name for p in tmp_path.rglob("*")) == [".lock", "secret.arrow", "store", "token"]


def test_a_link_in_the_store_is_not_followed_out_of_it(guarded: Server, tmp_path: Path) -> None:
    """Only who can write to the directory can make one; it is no way around the names."""
    with Client(guarded.location, token=TOKEN) as client, pytest.raises(NotFoundError):
        client.get("secret")
