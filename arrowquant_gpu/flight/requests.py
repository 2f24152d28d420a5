"""What a client asks for: the JSON of a descriptor's command, and the names of stored results."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from typing import Any

import pyarrow.flight as fl

from ..dtypes import KERNEL_DTYPES
from ..errors import InputError
from ..schemes import Scheme

QUANTIZE, DEQUANTIZE, PUT = "quantize", "dequantize", "put"
# Which members each action may have, beside "action".
MEMBERS = {
    QUANTIZE: ("scheme", "continue_on_error"),
    DEQUANTIZE: ("dtype",),
    PUT: ("name", "scheme", "continue_on_error", "overwrite"),
}
DEFAULT_SCHEME = "int4_g128_asym"
GRAMMAR = "int{2,3,4,5,6,8}_{gN,channel,tensor}[_asym][_f16|_bf16]"
MOST_BYTES = 1 << 16
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


@dataclass(frozen=True)
class Request:
    """A descriptor, read.

    action: QUANTIZE, DEQUANTIZE or PUT
    scheme: for PUT None where quantized rows come
    dtype: element type of what DEQUANTIZE gives
    name: under which PUT stores
    is_counted: the stream ends with the number of its rows; see `count`
    """

    action: str
    scheme: str | None = None
    continue_on_error: bool = False
    dtype: str = "float32"
    name: str = ""
    overwrite: bool = False
    is_counted: bool = False

    def command(self) -> bytes:
        """The JSON that `parse` reads.

        >>> Request("dequantize", dtype="float16").command()
        b'{"action": "dequantize", "dtype": "float16"}'
        """
        mine = {k: v for k, v in asdict(self).items() if k in MEMBERS[self.action]}
        return json.dumps({"action": self.action, **mine}).encode()


def parse(descriptor: fl.FlightDescriptor) -> Request:
    """A command of JSON, or a path of one name, which is a PUT of quantized rows.

    >>> parse(fl.FlightDescriptor.for_command(b'{"action": "quantize", "scheme": "int8_g32"}')).scheme
    'int8_g32'

    Raises InputError and SchemeError.
    """
    if descriptor.descriptor_type == fl.DescriptorType.PATH:
        return Request(PUT, name=name_of(descriptor))
    said = members(descriptor.command, "a descriptor's command")
    action = said.pop("action", None)
    if not isinstance(action, str) or action not in MEMBERS:
        raise InputError(f"action {action!r}: a descriptor asks for one of {', '.join(MEMBERS)}")
    if unknown := sorted(said.keys() - set(MEMBERS[action])):
        raise InputError(f"{action}: {', '.join(unknown)} is unknown; it takes {', '.join(MEMBERS[action])}")
    kinds = {f.name: bool if f.type == "bool" else str for f in fields(Request)}
    for key, value in said.items():
        if not isinstance(value, kinds[key]) and not (action == PUT and key == "scheme" and value is None):
            raise InputError(f"{action}: {key} is {value!r}; it must be a {kinds[key].__name__}")
    if action == QUANTIZE:
        said.setdefault("scheme", DEFAULT_SCHEME)
    if said.get("scheme") is not None:
        Scheme.parse(said["scheme"])
    if action == PUT:
        check_name(said.get("name", ""))
    if said.get("dtype", "float32") not in KERNEL_DTYPES:
        raise InputError(f"dtype {said['dtype']!r}: dequantize gives {', '.join(KERNEL_DTYPES)}")
    return Request(action, is_counted=action == PUT, **said)


def name_of(descriptor: fl.FlightDescriptor) -> str:
    """The name in a descriptor of a stored result, a path of one part. Raises InputError."""
    if descriptor.descriptor_type != fl.DescriptorType.PATH or len(descriptor.path) != 1:
        raise InputError("a stored result is named by a descriptor that is a path of one part: its name")
    return check_name(_text(descriptor.path[0], "a name"))


def ticket_name(ticket: fl.Ticket) -> str:
    """The name in a ticket. Raises InputError."""
    return check_name(_text(ticket.ticket, "a ticket"))


def check_name(name: str) -> str:
    """Raise InputError unless this can be the name of a stored result, and nowhere else than in the store.

    >>> check_name("llama-7b.int4")
    'llama-7b.int4'
    """
    if not _NAME.fullmatch(name):
        raise InputError(
            f"name {name[:80]!r}: a stored result has a name of at most 128 letters, digits, '_', '-' and '.', "
            f"and it does not begin with '-' or '.'"
        )
    return name


def members(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object. Raises InputError."""
    if len(data) > MOST_BYTES:
        raise InputError(f"{what} has {len(data)} bytes; at most {MOST_BYTES} are read")
    try:
        said = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise InputError(f"{what} is not JSON: {e}") from e
    if not isinstance(said, dict):
        raise InputError(f"{what} is not a JSON object but {type(said).__name__}")
    return said


def count(n_rows: int) -> bytes:
    """The metadata that ends a counted stream: one that was cut off does not pass for a whole one."""
    return json.dumps({"rows": n_rows}).encode()


def _text(data: bytes, what: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as e:
        raise InputError(f"{what} is not UTF-8: {data[:80]!r}") from e
