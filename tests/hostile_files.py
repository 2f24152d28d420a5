"""Mutations of valid safetensors files, one field at a time, and garbage: what tests/hostile.py feeds to the reader.

Every mutator returns the file and the error codes that may come of it, VALID among them where it may stay valid.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from arrowquant_gpu.dtypes import DTYPES

VALID = "valid"
WIDTHS = {d.safetensors: d.bits for d in DTYPES.values()}
BIG = 1 << 63


@dataclass(frozen=True)
class Sample:
    """A valid file as JSON texts, so that a mutation can say what no JSON writer would."""

    entries: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]  # (name, ((key, value), ...)), all JSON texts
    metadata: str | None
    data: bytes
    pad: bytes = b""
    tensors: tuple[tuple[str, tuple[int, ...], int, int], ...] = field(default=())  # (dtype, shape, begin, end)

    def text(self) -> str:
        members = [f'"__metadata__":{self.metadata}'] if self.metadata is not None else []
        members += [f"{name}:{{{','.join(f'{k}:{v}' for k, v in pairs)}}}" for name, pairs in self.entries]
        return "{" + ",".join(members) + "}"

    def file(self, text: str | bytes | None = None) -> bytes:
        raw = self.text() if text is None else text
        raw = (raw.encode("utf-8", "surrogatepass") if isinstance(raw, str) else raw) + self.pad
        return struct.pack("<Q", len(raw)) + raw + self.data

    def with_value(self, i: int, key: str, value: str) -> Sample:
        """The sample with one field of entry `i` replaced by the JSON text `value`."""
        name, pairs = self.entries[i]
        pairs = tuple((k, value if k == f'"{key}"' else v) for k, v in pairs)
        return self.with_entry(i, (name, pairs))

    def with_entry(self, i: int, entry: tuple[str, tuple[tuple[str, str], ...]]) -> Sample:
        return replace(self, entries=(*self.entries[:i], entry, *self.entries[i + 1 :]))


def sample(rng: random.Random) -> Sample:
    """A valid file of one to six tensors of any type, in any order, some of them empty."""
    at = 0
    entries, tensors = [], []
    for i in range(rng.randint(1, 6)):
        dtype = rng.choice(list(WIDTHS))
        shape = [rng.choice((0, 1, 1, 2, 3, 4, 8)) for _ in range(rng.randint(0, 3))]
        if WIDTHS[dtype] < 8:
            shape.append(4)
        n_bits = WIDTHS[dtype]
        for d in shape:
            n_bits *= d
        end = at + n_bits // 8
        pairs = [('"dtype"', f'"{dtype}"'), ('"shape"', json.dumps(shape)), ('"data_offsets"', f"[{at},{end}]")]
        rng.shuffle(pairs)
        entries.append((json.dumps(rng.choice(("w", "größe", "a.b.weight", "\n")) + str(i)), tuple(pairs)))
        tensors.append((dtype, tuple(shape), at, end))
        at = end
    both = list(zip(entries, tensors, strict=True))
    rng.shuffle(both)
    metadata = rng.choice((None, '{"format":"pt"}', '{"a":"","b":"\\u00e9\\ud83d\\ude00"}', "{}"))
    data = bytes(rng.randrange(256) for _ in range(at))
    return Sample(tuple(e for e, _ in both), metadata, data, b" " * rng.randint(0, 8), tuple(t for _, t in both))


Mutation = tuple[bytes, frozenset[str]]
MUTATORS: dict[str, Callable[[random.Random, Sample], Mutation]] = {}


def mutator(f: Callable[[random.Random, Sample], Mutation]) -> Callable[[random.Random, Sample], Mutation]:
    MUTATORS[f.__name__] = f
    return f


def _codes(*names: str) -> frozenset[str]:
    return frozenset(names)


@mutator
def length_field(rng: random.Random, s: Sample) -> Mutation:
    """The u64 at the start: off by a little, past the end, past the cap, in the wrong byte order."""
    raw = s.file()
    n = int.from_bytes(raw[:8], "little")
    m = rng.choice(
        (
            0,
            1,
            n - 1,
            n + 1,
            n - 8,
            n + 8,
            len(raw) - 8,
            len(raw) - 7,
            len(raw),
            99999999,
            100000000,
            100000001,
            BIG - 1,
            BIG,
            2 * BIG - 1,
            int.from_bytes(raw[:8], "big"),
            rng.getrandbits(64),
            rng.getrandbits(20),
        )
    )
    if m == n:
        return raw, _codes(VALID)
    out = (m % (2 * BIG)).to_bytes(8, "little") + raw[8:]
    if m > 100_000_000:
        return out, _codes("header_too_large", "not_safetensors")
    if m > len(raw) - 8:
        return out, _codes("header_past_end")
    if m == 0:
        return out, _codes("not_object")
    # Fewer bytes of padding leave a valid header and too much data; a header that takes in data is no JSON, or,
    # where that data happens to be blank, too little of it is left.
    return out, _codes("json", "utf8", "trailing", "truncated", "entry")


@mutator
def dtype_value(rng: random.Random, s: Sample) -> Mutation:
    """A dtype that the format does not have, or is no string."""
    i = rng.randrange(len(s.entries))
    value = rng.choice(
        (
            '"f32"',
            '"F33"',
            '""',
            '"F32 "',
            '"float32"',
            '"F32\\u0000"',
            '"F\\ud800"',
            "null",
            "5",
            "true",
            '["F32"]',
            '"I4"',
            '"BOOL8"',
            "-1",
            "1e400",
            "[]",
        )
    )
    return s.with_value(i, "dtype", value).file(), _codes("dtype")


@mutator
def dtype_other(rng: random.Random, s: Sample) -> Mutation:
    """Another valid dtype: fits only where the width is the same, or the tensor is empty."""
    i = rng.randrange(len(s.entries))
    _, shape, begin, end = s.tensors[i]
    other = rng.choice(list(WIDTHS))
    n = 1
    for d in shape:
        n *= d
    code = "partial_byte" if n * WIDTHS[other] % 8 else VALID if n * WIDTHS[other] == 8 * (end - begin) else "size"
    return s.with_value(i, "dtype", f'"{other}"').file(), _codes(code)


@mutator
def shape_value(rng: random.Random, s: Sample) -> Mutation:
    """A shape that is no list of counts."""
    i = rng.randrange(len(s.entries))
    dims = [str(d) for d in s.tensors[i][1]]
    bad = rng.choice(
        ("-1", "-0", "-9223372036854775808", "2.0", "1e0", "1e400", "1E-2", "true", "false", "null", '"2"', "[2]", "[]")
    )
    whole = rng.choice(("null", "5", '"[2]"', "true", '"2"', "-0"))
    if rng.random() < 0.2:
        return s.with_value(i, "shape", whole).file(), _codes("shape")
    dims.insert(rng.randint(0, len(dims)), bad)
    return s.with_value(i, "shape", f"[{','.join(dims)}]").file(), _codes("shape")


@mutator
def shape_syntax(rng: random.Random, s: Sample) -> Mutation:
    """A shape that Python's JSON reader may like, and JSON does not."""
    i = rng.randrange(len(s.entries))
    bad = rng.choice(("NaN", "Infinity", "-Infinity", "01", "+1", "1.", ".5", "0x10", "1_0", "[1,]", "\uff11", "{}"))
    return s.with_value(i, "shape", f"[{bad}]").file(), _codes("json")


@mutator
def shape_dimension(rng: random.Random, s: Sample) -> Mutation:
    """One dimension changed, added or dropped, or all of them permuted."""
    i = rng.randrange(len(s.entries))
    dtype, shape, begin, end = s.tensors[i]
    dims = list(shape)
    at = rng.randint(0, len(dims))
    how = rng.randrange(4)
    if how == 0 or not dims:
        dims.insert(at, rng.choice((0, 1, 2, 3, 7, 1000)))
    elif how == 1:
        dims[at % len(dims)] += rng.choice((1, 8, 1 << 20))
    elif how == 2:
        del dims[at % len(dims)]
    else:
        rng.shuffle(dims)
    n_bits = WIDTHS[dtype]
    for d in dims:
        n_bits *= d
    code = "partial_byte" if n_bits % 8 else VALID if n_bits == 8 * (end - begin) else "size"
    return s.with_value(i, "shape", json.dumps(dims)).file(), _codes(code)


@mutator
def shape_huge(rng: random.Random, s: Sample) -> Mutation:
    """Over 63 bits, also where an empty dimension makes the product 0; thousands of digits; many dimensions."""
    i = rng.randrange(len(s.entries))
    text, codes = rng.choice(
        (
            (json.dumps([BIG, 2]), _codes("overflow")),
            (json.dumps([BIG - 1, 0]), _codes("overflow")),
            (json.dumps([0, BIG]), _codes("overflow")),
            (json.dumps([1 << 32, 1 << 32]), _codes("overflow")),
            (json.dumps([1 << 32, 0, 1 << 32]), _codes("overflow")),
            (json.dumps([2 * BIG, 1]), _codes("overflow")),
            (json.dumps([3] * 41), _codes("overflow")),
            (f"[{'9' * 3900}]", _codes("overflow")),
            (f"[{'9' * 5001}]", _codes("entry")),
            (f"[-{'9' * 3900}]", _codes("shape")),
            (json.dumps([1] * 65), _codes("shape")),
            (json.dumps([1] * 64 + [0]), _codes("shape")),
            ("[" * 900 + "]" * 900, _codes("shape", "json")),
            ("[" * 2000 + "]" * 1900, _codes("json")),
            ("[" * 100_000, _codes("entry")),
            (" " * 5000 + "[]", _codes("entry")),
        )
    )
    return s.with_value(i, "shape", text).file(), codes


@mutator
def offsets_value(rng: random.Random, s: Sample) -> Mutation:
    """data_offsets that are not two counts in order."""
    i = rng.randrange(len(s.entries))
    _, _, b, e = s.tensors[i]
    text = rng.choice(
        (
            f"[{b}]",
            f"[{b},{e},{e}]",
            "[]",
            "null",
            f'"{b},{e}"',
            f"[{b}.0,{e}]",
            f'["{b}",{e}]',
            f"[{b},null]",
            "0",
            f"[{e + 1},{b}]",
            "[-1,0]",
            "[-0,0]",
            "[true,true]",
            f"[[{b}],{e}]",
            f"[{b},1e400]",
            f"[{2 * BIG},0]",
        )
    )
    return s.with_value(i, "data_offsets", text).file(), _codes("offsets")


@mutator
def offsets_moved(rng: random.Random, s: Sample) -> Mutation:
    """One end, or both, moved: the tensor has the wrong size, or the tiling breaks."""
    i = rng.randrange(len(s.entries))
    _, _, b, e = s.tensors[i]
    step = rng.choice((1, 1, 8, 1 << 20, 1 << 40))
    how = rng.randrange(5)
    if how == 0:
        return s.with_value(i, "data_offsets", f"[{b},{e + step}]").file(), _codes("size")
    if how == 1:
        return s.with_value(i, "data_offsets", f"[{b + step},{e}]").file(), _codes("size", "offsets")
    if how == 2:
        text = f"[{BIG - 1 - (e - b)},{BIG - 1}]"
        return s.with_value(i, "data_offsets", text).file(), _codes("overflow")
    if how == 3 and b >= step:
        moved, codes = (b - step, e - step), _codes("overlap", "hole", VALID)
    else:
        # An empty tensor may land on another seam, where it is as valid as before.
        moved, codes = (b + step, e + step), _codes("overlap", "hole", VALID)
    out = s.with_value(i, "data_offsets", f"[{moved[0]},{moved[1]}]").file()
    return out, codes if b == e else codes - {VALID}


@mutator
def offsets_swapped(rng: random.Random, s: Sample) -> Mutation:
    """begin and end exchanged."""
    i = rng.randrange(len(s.entries))
    _, _, b, e = s.tensors[i]
    code = VALID if b == e else "offsets"
    return s.with_value(i, "data_offsets", f"[{e},{b}]").file(), _codes(code)


@mutator
def key_missing(rng: random.Random, s: Sample) -> Mutation:
    i = rng.randrange(len(s.entries))
    name, pairs = s.entries[i]
    drop = rng.sample(range(3), rng.randint(1, 3))
    return s.with_entry(i, (name, tuple(p for j, p in enumerate(pairs) if j not in drop))).file(), _codes("keys")


@mutator
def key_unknown(rng: random.Random, s: Sample) -> Mutation:
    """A key too many, or misspelt."""
    i = rng.randrange(len(s.entries))
    name, pairs = s.entries[i]
    key = rng.choice(('"strides"', '"Dtype"', '"shape "', '""', '"data_offset"', '"\\ud800"'))
    value = rng.choice(("null", "[0,0]", '"F32"', "1"))
    changed = (*pairs, (key, value)) if rng.random() < 0.5 else ((key, pairs[0][1]), *pairs[1:])
    return s.with_entry(i, (name, changed)).file(), _codes("keys")


@mutator
def key_twice(rng: random.Random, s: Sample) -> Mutation:
    """A key twice, as it is or spelt with an escape, with the same value or another."""
    i = rng.randrange(len(s.entries))
    name, pairs = s.entries[i]
    key, value = rng.choice(pairs)
    if rng.random() < 0.3:
        key = f'"\\u{ord(key[1]):04x}{key[2:]}'
    twice = [*pairs, (key, rng.choice((value, "null", '"U8"')))]
    rng.shuffle(twice)
    return s.with_entry(i, (name, tuple(twice))).file(), _codes("duplicate")


@mutator
def name_twice(rng: random.Random, s: Sample) -> Mutation:
    """The same tensor twice, as it is or spelt with an escape, or the metadata twice."""
    i = rng.randrange(len(s.entries))
    name, pairs = s.entries[i]
    if rng.random() < 0.3 and name[1] != "\\":
        name = f'"\\u{ord(name[1]):04x}{name[2:]}'
    if rng.random() < 0.2:
        text = s.text().replace("{", '{"__metadata__":{},"__metadata__":{},', 1)
        return s.file(text), _codes("duplicate")
    return replace(s, entries=(*s.entries, (name, pairs))).file(), _codes("duplicate")


@mutator
def name_text(rng: random.Random, s: Sample) -> Mutation:
    """Strange names: some are valid, some have no UTF-8 form, some are no JSON string."""
    i = rng.randrange(len(s.entries))
    text, code = rng.choice(
        (
            ('""', VALID),
            ('"\\u0000"', VALID),
            ('"' + "x" * 70_000 + '"', VALID),
            ('"../../etc/passwd"', VALID),
            ('"\\ud83d\\ude00"', VALID),
            ('"}{\\""', VALID),
            ('"\\ud800"', "surrogate"),
            ('"\\ude00\\ud83d"', "surrogate"),
            ('"\\ud83dx"', "surrogate"),
            ('"\ud800"', "utf8"),
            ('"a\nb"', "json"),
            ('"a\x00"', "json"),
            ('"\\x41"', "json"),
            ('"\\u12"', "json"),
            ("w", "json"),
            ("5", "json"),
            ("null", "json"),
            ("'w'", "json"),
        )
    )
    return s.with_entry(i, (text, s.entries[i][1])).file(), _codes(code)


@mutator
def name_reserved(rng: random.Random, s: Sample) -> Mutation:
    """A tensor under the name of the metadata."""
    i = rng.randrange(len(s.entries))
    code = "metadata" if s.metadata is None else "duplicate"
    return s.with_entry(i, ('"__metadata__"', s.entries[i][1])).file(), _codes(code)


@mutator
def name_bytes(rng: random.Random, s: Sample) -> Mutation:
    """Bytes that are not UTF-8, inside a string."""
    raw = s.text().encode()
    at = raw.index(s.entries[rng.randrange(len(s.entries))][0].encode()) + 1
    bad = rng.choice((b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xc3", b"\x80"))
    return s.file(raw[:at] + bad + raw[at:]), _codes("utf8")


@mutator
def dtype_bytes(rng: random.Random, s: Sample) -> Mutation:
    """Bytes that are not UTF-8, inside the entry of a tensor; or a brace that ends it early."""
    bad, code = rng.choice(((b"\xff", "utf8"), (b"\xf0\x9f", "utf8"), (b"}", "json"), (b"\\u007d", "dtype")))
    raw = s.text().encode()
    at = raw.index(b'"dtype":"') + 9
    return s.file(raw[:at] + bad + raw[at:]), _codes(code)


@mutator
def entry_value(rng: random.Random, s: Sample) -> Mutation:
    """Something else in place of a tensor's object."""
    i = rng.randrange(len(s.entries))
    name, _ = s.entries[i]
    dtype, shape, b, e = s.tensors[i]
    text, code = rng.choice(
        (
            ("null", "entry"),
            ("5", "entry"),
            ('"x"', "entry"),
            ("true", "entry"),
            ("[]", "entry"),
            (json.dumps([dtype, shape, [b, e]]), "entry"),
            ("{}", "keys"),
            ('{"a":{}}', "json"),
            ('{"dtype"}', "json"),
            ("{,}", "json"),
            ("{" + " " * 9000 + "}", "entry"),
        )
    )
    whole = "{" + ",".join(f"{n}:{{{','.join(f'{k}:{v}' for k, v in p)}}}" for n, p in s.entries if n != name)
    return s.file(f"{whole}{',' if len(s.entries) > 1 else ''}{name}:{text}}}"), _codes(code)


@mutator
def metadata_value(rng: random.Random, s: Sample) -> Mutation:
    """Metadata that maps strings to strings only in part, or is no object."""
    text, code = rng.choice(
        (
            ("null", "metadata"),
            ("[]", "metadata"),
            ('"pt"', "metadata"),
            ("5", "metadata"),
            ('{"a":5}', "metadata"),
            ('{"a":null}', "metadata"),
            ('{"a":{"b":"c"}}', "metadata"),
            ('{"a":["b"]}', "metadata"),
            ('{"a":"b","c":true}', "metadata"),
            ('{"a":"b","a":"b"}', "duplicate"),
            ('{"a":"\\ud800"}', "surrogate"),
            ('{"a":"b",}', "json"),
            ('{"a" "b"}', "json"),
            ('{"a":"b" "c":"d"}', "json"),
            ('{"a":"b\t"}', "json"),
            ('{"a":"b', "json"),
            ('{5:"b"}', "json"),
            ('{ "a" : "b" , "c":"" }', VALID),
            ('{"":""}', VALID),
        )
    )
    return replace(s, metadata=text).file(), _codes(code)


@mutator
def file_end(rng: random.Random, s: Sample) -> Mutation:
    """Cut short, or with bytes left over."""
    raw = s.file()
    if rng.random() < 0.4:
        return raw + bytes(rng.choice((1, 7, 8, 4096))), _codes("trailing")
    n = rng.randrange(len(raw))
    begin = len(raw) - len(s.data)
    code = "truncated" if n >= begin else "header_past_end" if n >= 8 else "file_too_small"
    return raw[:n], _codes(code)


@mutator
def entry_dropped(rng: random.Random, s: Sample) -> Mutation:
    """A tensor that the header no longer names: its bytes are a hole, or left over; an empty one is not missed."""
    i = rng.randrange(len(s.entries))
    _, _, b, e = s.tensors[i]
    # Dropping the last one leaves bytes over, or a hole before the empty ones that stand at the end.
    codes = _codes(VALID) if b == e else _codes("trailing", "hole") if e == len(s.data) else _codes("hole")
    return replace(s, entries=(*s.entries[:i], *s.entries[i + 1 :])).file(), codes


@mutator
def entry_aliased(rng: random.Random, s: Sample) -> Mutation:
    """Two names for the same bytes."""
    i = rng.randrange(len(s.entries))
    _, _, b, e = s.tensors[i]
    code = VALID if b == e else "overlap"
    return replace(s, entries=(*s.entries, ('"alias"', s.entries[i][1]))).file(), _codes(code)


@mutator
def header_begin(rng: random.Random, s: Sample) -> Mutation:
    """Something before the first brace."""
    first = rng.choice((b" ", b"\n", b"\xef\xbb\xbf", b"\x00", b"[", b'"', b"//\n", b"\xff\xfe"))
    return s.file(first + s.text().encode()), _codes("not_object")


@mutator
def header_end(rng: random.Random, s: Sample) -> Mutation:
    """Something after the last brace, or no last brace."""
    raw = replace(s, pad=b"")
    text = s.text().encode()
    last, code = rng.choice(
        (
            (b" ", VALID),
            (b"\n\t \r", VALID),
            (b"\x00", "json"),
            (b"}", "json"),
            (b",", "json"),
            (b"{}", "json"),
            (b"\xc2\xa0", "json"),
        )
    )
    if rng.random() < 0.3:
        return raw.file(text[:-1]), _codes("json")
    return raw.file(text + last), _codes(code)


@mutator
def header_punctuation(rng: random.Random, s: Sample) -> Mutation:
    """Punctuation between the members of the header: missing, doubled, or another."""
    raw = s.text()
    old, new = rng.choice(
        (
            ("},", "}"),
            ("},", "},,"),
            ("}}", "},}"),
            ("}}", "}"),
            (":{", "{"),
            (":{", "::{"),
            (":{", "={"),
            ("},", "};"),
            (":{", ":"),
            ("{", "{,"),
        )
    )
    if old not in raw:
        old, new = "}}", "},}"
    # A comma less between two tensors, a colon less after a name: never valid, but what is missed first differs.
    return s.file(raw.replace(old, new, 1)), _codes("json", "entry", "metadata", "duplicate")


@mutator
def white_space(rng: random.Random, s: Sample) -> Mutation:
    """White space wherever JSON allows it: still valid."""
    raw = s.text()
    blank = rng.choice((" ", "\n", "\t", "\r\n  "))
    for mark in (":{", "},", ":[", "}}"):
        raw = raw.replace(mark, blank.join(("", *mark, "")))
    return s.file(raw), _codes(VALID)


@mutator
def file_kind(rng: random.Random, s: Sample) -> Mutation:
    """Something else under the name of a safetensors file."""
    first = rng.choice(
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
            b"<!DOCTYPE html><html>",
            b"<html>",
            b"\n <HTML lang=en>",
            b"<?xml version='1.0'?>",
            b"GGUF\x03\x00\x00\x00",
            b"PK\x03\x04\x00\x00\x08\x08",
            b"\x80\x02\x8a\nl\xfc\x9cF",
            b"\x89HDF\r\n\x1a\n",
            b"ARROW1\x00\x00",
            b"PAR1",
            b'{"error":"x"}',
            b"\x1f\x8b",
        )
    )
    # Eight such bytes and then a brace could be a length and a header, and are judged as that.
    return first + (s.file()[8:] if rng.random() < 0.5 else b""), _codes("not_safetensors", "header_too_large")


def _flip(rng: random.Random, s: Sample) -> bytes:
    """Bits, bytes and runs of the header changed at random."""
    raw = bytearray(s.file())
    end = len(raw) - len(s.data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(end)
        how = rng.randrange(4)
        if how == 0:
            raw[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            raw[at] = rng.choice(b'{}[]",:0123456789-.eE \\\x00\xff')
        elif how == 2:
            del raw[at : at + rng.randint(1, 4)]
        else:
            raw[at:at] = rng.choice(
                (b"}", b"{", b'"', b",", b"9", b"[", b"]", b"\\", b"null", bytes([rng.randrange(256)]))
            )
        end = min(end, len(raw))
    if rng.random() < 0.7:  # the length made right again, so that the change reaches the JSON
        n = max(0, len(raw) - len(s.data) - 8)
        raw[:8] = n.to_bytes(8, "little")
    return bytes(raw)


def _splice(rng: random.Random, s: Sample) -> bytes:
    """The beginning of one file and the end of another."""
    a, b = s.file(), sample(rng).file()
    return a[: rng.randrange(len(a) + 1)] + b[rng.randrange(len(b) + 1) :]


_WORDS = (
    "{",
    "}",
    "[",
    "]",
    ":",
    ",",
    '"dtype"',
    '"shape"',
    '"data_offsets"',
    '"F32"',
    "[0,0]",
    "0",
    "1",
    "-1",
    "null",
)
_WORDS += ('"__metadata__"', '"a"', '"b"', "true", "1e999", '"\\ud800"', " ", "NaN")


def _words(rng: random.Random, s: Sample) -> bytes:
    """A header of JSON words in any order."""
    return s.file("{" + "".join(rng.choice(_WORDS) for _ in range(rng.randint(0, 40))))


def _tree(rng: random.Random, s: Sample) -> bytes:
    """Valid JSON of any shape, with the format's own keys here and there."""

    def node(depth: int) -> Any:
        how = rng.randrange(8 if depth < 4 else 5)
        if how < 5:
            return (None, rng.random() < 0.5, rng.randint(-2, 70), rng.choice(("F32", "U8", "x")), [0, 0])[how]
        if how == 5:
            return [node(depth + 1) for _ in range(rng.randrange(4))]
        keys = rng.sample(("dtype", "shape", "data_offsets", "a", "b", "__metadata__"), rng.randrange(5))
        return {k: node(depth + 1) for k in keys}

    return s.file(json.dumps({rng.choice(("a", "b", "__metadata__")): node(0) for _ in range(rng.randint(1, 3))}))


def _noise(rng: random.Random, s: Sample) -> bytes:
    """Random bytes, under a plausible length or none."""
    raw = rng.randbytes(rng.randint(0, 64))
    return raw if rng.random() < 0.3 else struct.pack("<Q", rng.randint(0, len(raw) + 2)) + raw


GARBAGE = {"flip": _flip, "splice": _splice, "words": _words, "tree": _tree, "noise": _noise}
GARBAGE_SHARES = (4, 2, 2, 2, 1)
