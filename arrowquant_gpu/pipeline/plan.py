"""`make_plan`: what will happen to every tensor, from headers alone. Nothing is read or written.

The policy says what should be quantized, the sink what its format can carry; the plan records both, with sizes.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from ..errors import FormatError, PolicyError
from ..formats import Checkpoint, Entry, Sink, TensorInfo
from ..formats.targets import TARGETS
from ..schemes import Scheme
from .policy import RAISED, RAISED_BITS, Policy

COLUMNS = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("action", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("scheme", pa.string()),
        pa.field("dtype", pa.string(), nullable=False),
        # "element" is what Parquet calls it, so that a manifest that is read back has this very schema.
        pa.field("shape", pa.list_(pa.field("element", pa.int64())), nullable=False),
        pa.field("bytes_before", pa.int64(), nullable=False),
        pa.field("bytes_after", pa.int64(), nullable=False),
        pa.field("bits_per_weight", pa.float64()),
        pa.field("accuracy", pa.float64()),
        pa.field("entropy", pa.float64()),
    ]
)

# Serving engines fuse these into one matrix: all of them must have one scheme.
FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
# And all experts of a layer.
_EXPERT = re.compile(r"^(.*\bexperts)\.\d+\.")


class Measured(NamedTuple):
    """What was measured of a tensor to choose its width; None where nothing was.

    accuracy: cosine of the weights that its scheme gives, decoded, to the original ones; where that was too low and the
        tensor is kept, of the last scheme that was tried
    entropy: of its values, from 0 to 1
    """

    accuracy: float | None = None
    entropy: float | None = None


_NOTHING = Measured()


@dataclass(frozen=True, slots=True)
class Plan:
    """Every tensor of a checkpoint in file order, what happens to it, and the bytes it will take.

    `scheme` is the one asked for; `entries` hold it as the format stores it, with the width that each tensor needs.
    `warnings` are sentences. `measured` is by name.
    """

    format: str
    scheme: Scheme
    entries: tuple[Entry, ...]
    bytes_after: tuple[int, ...]
    warnings: tuple[str, ...] = ()
    measured: Mapping[str, Measured] = dataclasses.field(default_factory=dict)

    @property
    def table(self) -> pa.Table:
        """One row per tensor, with the columns of `COLUMNS`; `action` is quantized or kept, the last are `Measured`."""
        rows = [
            {
                "name": e.info.name,
                "action": "kept" if e.scheme is None else "quantized",
                "reason": e.reason,
                "scheme": None if e.scheme is None else e.scheme.id,
                "dtype": e.info.dtype,
                "shape": list(e.info.shape),
                "bytes_before": e.info.n_bytes,
                "bytes_after": n_bytes,
                "bits_per_weight": _bits(n_bytes, math.prod(e.info.shape)),
                **self.measured.get(e.info.name, _NOTHING)._asdict(),
            }
            for e, n_bytes in zip(self.entries, self.bytes_after, strict=True)
        ]
        return pa.Table.from_pylist(rows, COLUMNS)

    @property
    def summary(self) -> dict[str, Any]:
        """Totals: tensors, bytes, and effective bits per weight, of the quantized tensors and of the whole model."""
        quantized = [
            (math.prod(e.info.shape), n) for e, n in zip(self.entries, self.bytes_after, strict=True) if e.scheme
        ]
        return {
            "format": self.format,
            "scheme": self.scheme.id,
            "stored_schemes": sorted({e.scheme.id for e in self.entries if e.scheme}),
            "n_tensors": len(self.entries),
            "n_quantized": len(quantized),
            "bytes_before": sum(e.info.n_bytes for e in self.entries),
            "bytes_after": sum(self.bytes_after),
            "bits_per_weight": _bits(sum(n for _, n in quantized), sum(w for w, _ in quantized)),
            "bits_per_weight_model": _bits(sum(self.bytes_after), sum(math.prod(e.info.shape) for e in self.entries)),
            "warnings": list(self.warnings),
        }


def make_plan(
    source: Checkpoint,
    sink: Sink,
    scheme: str | Scheme,
    include: Sequence[str] = (),
    ignore: Sequence[str] = (),
    sensitive: Literal["keep", "raise"] = "keep",
) -> Plan:
    """Plan the quantization of a checkpoint; `include` and `ignore` as in `policy.Policy`.

    A tensor that the policy wants quantized and the format cannot carry is kept, with the format's reason. `sensitive`
    says what becomes of matrices that the policy keeps because much depends on them (`policy.RAISED`): "raise"
    quantizes them with 8 bits.

    Raises SchemeError, PolicyError (a pattern that matches nothing; nothing to quantize) and FormatError (the format
    carries this scheme for none of the tensors).
    """
    scheme = Scheme.parse(scheme)
    policy = Policy(source.tensors, source.config, include, ignore)
    entries, refused = [], Counter[str]()
    for info in in_file_order(source):
        wanted, reason = policy.decide(info)
        stored, asked = None, scheme
        if sensitive == "raise" and reason in RAISED and len(info.shape) == 2:
            wanted, reason, asked = True, RAISED[reason], dataclasses.replace(scheme, bits=RAISED_BITS)
        if wanted:
            try:
                stored = sink.scheme_for(info, asked)
            except FormatError as e:
                reason = str(e)
                refused[reason] += 1
        entries.append(Entry(info, stored, reason))
    if not any(e.scheme for e in entries):
        if refused:
            raise FormatError(_none_carried(sink.format, scheme, refused))
        raise PolicyError(_none_wanted(entries))
    return planned(source, sink, scheme, entries)


def planned(
    source: Checkpoint,
    sink: Sink,
    scheme: Scheme,
    entries: Sequence[Entry],
    measured: Mapping[str, Measured] | None = None,
) -> Plan:
    """The plan that these entries make, with its sizes and warnings."""
    sizes = tuple(sink.n_bytes(e) for e in entries)
    warnings = [*_unequal_fused(entries), *_left_out(source), *_without_side_files(source, sink)]
    return Plan(sink.format, scheme, tuple(entries), sizes, tuple(warnings), measured or {})


def fused_groups(names: Iterable[str]) -> list[list[str]]:
    """The names, in order, in groups of those that serving engines fuse; one that is not fused is a group by itself.

    >>> fused_groups(["a.q_proj.weight", "a.o_proj.weight", "a.k_proj.weight", "b.q_proj.weight"])
    [['a.q_proj.weight', 'a.k_proj.weight'], ['a.o_proj.weight'], ['b.q_proj.weight']]
    """
    groups: dict[tuple[str, object], list[str]] = {}
    for name in names:
        module, _, part = name.removesuffix(".weight").rpartition(".")
        fused = next((parts for parts in FUSED if part in parts and name.endswith(".weight")), None)
        expert = _EXPERT.match(name)
        key = (expert[1], "experts") if expert else (module, fused) if fused else (name, None)
        groups.setdefault(key, []).append(name)
    return list(groups.values())


def in_file_order(source: Checkpoint) -> list[TensorInfo]:
    """The tensors as their bytes lie: by file name, then by offset."""
    return sorted(source.tensors.values(), key=lambda info: (info.file.name, str(info.file), info.offset, info.name))


def _bits(n_bytes: int, n_weights: int) -> float | None:
    return 8 * n_bytes / n_weights if n_weights else None


def _none_carried(format_name: str, scheme: Scheme, refused: Counter[str]) -> str:
    reasons = "; ".join(f"{reason} ({n} tensors)" for reason, n in refused.most_common(3))
    return f"{format_name} can carry {scheme.id} for none of the {refused.total()} tensors to quantize: {reasons}"


def _none_wanted(entries: list[Entry]) -> str:
    reasons = Counter(e.reason for e in entries)
    listed = "; ".join(f"{reason} ({n})" for reason, n in reasons.most_common(5))
    return (
        f"nothing to quantize: all {len(entries)} tensors are kept. Reasons: {listed}. "
        f"Choose tensors by name with include (--include REGEX)."
    )


def _left_out(source: Checkpoint) -> list[str]:
    """A warning that lists the files beside the weights that will not be in the output."""
    if not source.left_out:
        return []
    listed = "; ".join(f"{file.name} ({reason})" for file, reason in source.left_out)
    return [f"{len(source.left_out)} files or folders beside the weights are left out: {listed}."]


def _without_side_files(source: Checkpoint, sink: Sink) -> list[str]:
    """A warning where a model directory becomes one file, which has no place for the tokenizer."""
    files = [file.name for file in source.side_files if file.name != "config.json"]
    if not files or sink.format not in TARGETS or TARGETS[sink.format].is_directory:
        return []
    listed = ", ".join(files[:4]) + (", ..." if len(files) > 4 else "")
    return [f"{sink.format} is one file: {len(files)} files of the model directory are not in it ({listed})."]


def _unequal_fused(entries: Sequence[Entry]) -> list[str]:
    """A warning for each kind of fused matrices whose parts would not have one scheme."""
    schemes = {e.info.name: e.scheme for e in entries}
    warnings = []
    for parts in FUSED:
        marker = f".{parts[0]}.weight"
        unequal = [
            name
            for name in schemes
            if name.endswith(marker)
            and len({schemes[n] for p in parts if (n := name.removesuffix(marker) + f".{p}.weight") in schemes}) > 1
        ]
        if unequal:
            warnings.append(
                f"{', '.join(parts)} have different schemes in {len(unequal)} layers (first: {unequal[0]}); vLLM and "
                f"SGLang fuse them and refuse that. Quantize or ignore all of them alike."
            )
    return warnings
