"""`make_plan`: what will happen to every tensor, from headers alone. Nothing is read or written.

The policy says what should be quantized, the sink what its format can carry; the plan records both, with sizes.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from .. import models
from ..dtypes import DTYPES
from ..engine.decoded import DecodedCheckpoint
from ..engine.parted import PartedCheckpoint
from ..errors import FormatError, PolicyError, SchemeError
from ..formats import Checkpoint, Entry, Sink, TensorInfo
from ..formats.targets import TARGETS, carriers
from ..models import Mix, Model
from ..schemes import Scheme
from .policy import RAISED, RAISED_BITS, Decision, Policy
from .recipe import Recipe, tensor_scheme

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

# The format that has mixes of schemes.
MIXED_FORMAT = "gguf"


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

    `scheme` is the one asked for, or that a mix begins with; `entries` hold it as the format stores it, with the width
    that each tensor needs. `warnings` are sentences, `notes` those of them that no entry changes. `measured` is by
    name. `mix` is the mix asked for, if one was; `fixed` are the names of tensors whose scheme a rule names.
    """

    format: str
    scheme: Scheme
    entries: tuple[Entry, ...]
    bytes_after: tuple[int, ...]
    warnings: tuple[str, ...] = ()
    measured: Mapping[str, Measured] = dataclasses.field(default_factory=dict)
    mix: Mix | None = None
    notes: tuple[str, ...] = ()
    fixed: frozenset[str] = frozenset()

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
            "scheme": self.scheme.id if self.mix is None else self.mix.name,
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
    *,
    recipe: Recipe | None = None,
    tensor_schemes: Sequence[tuple[str, str | Scheme]] = (),
) -> Plan:
    """Plan the quantization of a checkpoint; `include` and `ignore` as in `policy.Policy`.

    scheme: a scheme, or the name of a mix, which only GGUF has
    recipe: its rules; those of `tensor_schemes`, pairs of an expression and a scheme, come before them

    A tensor that the policy wants quantized and the format cannot carry is kept, with the format's reason; where
    readers of the format refuse fused parts that are not alike, so are the others. `sensitive` says what becomes of
    matrices that the policy keeps because much depends on them (`policy.RAISED`): "raise" quantizes them with 8 bits.

    Raises SchemeError, PolicyError (a pattern that matches nothing; nothing to quantize) and FormatError (the format
    carries this scheme for none of the tensors).
    """
    mix, scheme = asked_for(scheme, sink.format)
    if sensitive == "raise" and (mix is not None or scheme.grid != "int"):
        name = scheme.id if mix is None else mix.name
        raise SchemeError(f"sensitive matrices are raised to {RAISED_BITS} bits only beside an int scheme, not {name}")
    rules = [tensor_scheme(pattern, own) for pattern, own in tensor_schemes]
    rules += [] if recipe is None else recipe.rules
    quantizes: frozenset[str] = getattr(sink, "quantizes", frozenset())
    policy = Policy(source.tensors, source.config, include, ignore, rules=rules, quantizes=quantizes)
    notes = [*_unknown(policy.model, source), *policy.check(source.tensors.values())]
    mixed = None if mix is None else _Mixed(mix, policy, source)
    entries, refused, fixed, to_quantize = [], Counter[str](), set[str](), set[str]()
    for info in in_file_order(source):
        decision = policy.decide(info)
        wanted, reason = decision.quantize, decision.reason
        stored, asked = None, decision.scheme or (mixed.scheme(decision, info.name) if mixed else scheme)
        if sensitive == "raise" and reason in RAISED and len(info.shape) == 2:
            wanted, reason, asked = True, RAISED[reason], dataclasses.replace(scheme, bits=RAISED_BITS)
        if wanted:
            to_quantize.add(info.name)
            try:
                stored = sink.scheme_for(info, asked)
            except FormatError as e:
                reason = str(e)
                refused[reason] += 1
        if decision.scheme is not None:
            fixed.add(info.name)
        entries.append(Entry(info, stored, reason))
    if not any(e.scheme for e in entries):
        if refused:
            raise FormatError(_none_carried(source, entries, sink.format, scheme, refused))
        raise PolicyError(_none_wanted(entries))
    if getattr(sink, "fused_alike", None):
        entries = _kept_alike(entries, policy.model, refused)
        if not any(e.scheme for e in entries):
            raise FormatError(_none_carried(source, entries, sink.format, scheme, refused))
    notes += _left_in_float(entries, sink, to_quantize)
    plan = Plan(sink.format, scheme, (), (), mix=mix, notes=tuple(notes), fixed=frozenset(fixed))
    return planned(plan, source, sink, entries)


def asked_for(scheme: str | Scheme, format_name: str) -> tuple[Mix | None, Scheme]:
    """(the mix, if the text names one; the scheme, or that with which the mix begins).

    >>> asked_for("int4_g128", "parquet")[1].id, asked_for("q4_k_m", "gguf")[1].id
    ('int4_g128', 'q4_k')

    Raises SchemeError for what is neither, and FormatError for a mix in a format that has none.
    """
    mix = models.mixes.get(scheme) if isinstance(scheme, str) else None
    if mix is None:
        return None, Scheme.parse(scheme)
    if format_name != MIXED_FORMAT:
        raise FormatError(f"{mix.name} is a mix of schemes, which only --format {MIXED_FORMAT} has, not {format_name}")
    return mix, Scheme.parse(mix.base)


def planned(
    plan: Plan,
    source: Checkpoint,
    sink: Sink,
    entries: Sequence[Entry],
    measured: Mapping[str, Measured] | None = None,
) -> Plan:
    """The same plan with these entries, with their sizes and with warnings about them."""
    model = models.find(source.config, source.tensors)
    entries = _with_shared(entries, model)
    sizes = tuple(sink.n_bytes(e) for e in entries)
    # Readers that do not fuse at all take parts of any kind; a mix gives them different ones on purpose.
    is_fused = plan.mix is None and getattr(sink, "fused_alike", None) is not False
    warnings = (*(_unequal_fused(entries, model) if is_fused else ()), *_loses_twice(source), *_left_out(source))
    own: Callable[[Sequence[Entry]], Iterable[str]] | None = getattr(sink, "warnings", None)
    warnings = (*plan.notes, *warnings, *(() if own is None else own(entries)), *_without_side_files(source, sink))
    return dataclasses.replace(
        plan, entries=tuple(entries), bytes_after=sizes, warnings=warnings, measured=measured or {}
    )


def check_share(plan: Plan, expected: float | None) -> None:
    """Raise PolicyError where less than this share of the float weights would be quantized; None checks nothing.

    expected: over 0 and up to 1

    The message lists the largest tensors that are kept, with their reasons.
    """
    if expected is None:
        return
    if not 0 < expected <= 1:
        raise PolicyError(f"expect_quantized {expected:g}: a share of the weights is over 0 and up to 1 (100%)")
    weights = [(math.prod(e.info.shape), e) for e in plan.entries if DTYPES[e.info.dtype].is_float]
    total, quantized = sum(n for n, _ in weights), sum(n for n, e in weights if e.scheme is not None)
    if quantized >= expected * total:
        return
    kept = sorted(((n, e) for n, e in weights if e.scheme is None), key=lambda pair: -pair[0])
    listed = "; ".join(f"{e.info.name} ({n / total:.1%}): {e.reason}" for n, e in kept[:5])
    raise PolicyError(
        f"{quantized / total:.1%} of the weights would be quantized, and {expected:.1%} were expected. The largest of "
        f"the {len(kept)} tensors that are kept: {listed}"
    )


def in_file_order(source: Checkpoint) -> list[TensorInfo]:
    """The tensors as their bytes lie: by file name, then by offset."""
    return sorted(source.tensors.values(), key=lambda info: (info.file.name, str(info.file), info.offset, info.name))


def _bits(n_bytes: int, n_weights: int) -> float | None:
    return 8 * n_bytes / n_weights if n_weights else None


def _none_carried(
    source: Checkpoint, entries: Sequence[Entry], format_name: str, scheme: Scheme, refused: Counter[str]
) -> str:
    """Why, and the formats that carry any of these tensors with this scheme."""
    reasons = "; ".join(f"{reason} ({n} tensors)" for reason, n in refused.most_common(3))
    wanted = [e.info for e in entries if e.reason in refused]
    able = ", ".join(carriers(wanted, scheme, source.config, tuple(source.tensors)))
    return (
        f"{format_name} can carry {scheme.id} for none of the {refused.total()} tensors to quantize: {reasons}. "
        f"Formats that carry {scheme.id}: {able}"
    )


def _none_wanted(entries: list[Entry]) -> str:
    reasons = Counter(e.reason for e in entries)
    listed = "; ".join(f"{reason} ({n})" for reason, n in reasons.most_common(5))
    return (
        f"nothing to quantize: all {len(entries)} tensors are kept. Reasons: {listed}. "
        f"Choose tensors by name with include (--include REGEX)."
    )


def _loses_twice(source: Checkpoint) -> list[str]:
    """A warning where weights that are quantized already are quantized again."""
    source = source.source if isinstance(source, PartedCheckpoint) else source
    if not isinstance(source, DecodedCheckpoint) or not source.schemes:
        return []
    return [
        f"{source.path.name} is quantized already ({source.stored.format}: {', '.join(source.schemes)}): its decoded "
        f"weights are quantized once more, and the errors of both add up. Start from the original where there is one."
    ]


def _left_out(source: Checkpoint) -> list[str]:
    """A warning that lists the files beside the weights that will not be in the output."""
    if not source.left_out:
        return []
    listed = "; ".join(f"{file.name} ({reason})" for file, reason in source.left_out)
    return [f"{len(source.left_out)} files or folders beside the weights are left out: {listed}."]


def _without_side_files(source: Checkpoint, sink: Sink) -> list[str]:
    """A warning where a model directory becomes one file: it lists the files that it has no place for."""
    held: frozenset[str] = getattr(sink, "side_files", frozenset({"config.json"}))
    files = [file.name for file in source.side_files if file.name not in held]
    if not files or sink.format not in TARGETS or TARGETS[sink.format].is_directory:
        return []
    listed = ", ".join(files[:4]) + (", ..." if len(files) > 4 else "")
    return [f"{sink.format} is one file: {len(files)} files of the model directory are not in it ({listed})."]


def _unknown(model: Model, source: Checkpoint) -> list[str]:
    """A warning where config.json names an architecture that is not in the table."""
    if model.is_known or not model.name:
        return []
    return [
        f"architecture {model.name} is not in the table of models: generic rules decide which tensors are quantized."
    ]


def _left_in_float(entries: Sequence[Entry], sink: Sink, wanted: Collection[str]) -> list[str]:
    """A warning where tensors that the policy wants quantized are kept, since the format cannot carry them."""
    kept = [e for e in entries if e.scheme is None and e.info.name in wanted and sink.n_bytes(e)]
    if not kept:
        return []
    reasons = Counter(e.reason for e in kept).most_common()
    listed = "; ".join(f"{reason} ({n} tensors)" for reason, n in reasons[:2])
    more = f"; and {len(reasons) - 2} other reasons, which the plan has" if len(reasons) > 2 else ""
    return [
        f"{len(kept)} tensors that were to be quantized stay in float (first: {kept[0].info.name}): {listed}{more}."
    ]


class _Mixed:
    """The schemes that a mix gives the tensors of one model."""

    def __init__(self, mix: Mix, policy: Policy, source: Checkpoint) -> None:
        self.mix, self.policy, self.model = mix, policy, policy.model
        config = source.config or getattr(source, "sizes", {})
        heads, kv_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
        self.gqa = heads // kv_heads if isinstance(heads, int) and isinstance(kv_heads, int) and kv_heads > 0 else 1
        experts = (config.get(key) for key in ("num_local_experts", "num_experts", "n_routed_experts"))
        self.experts = next((n for n in experts if isinstance(n, int)), 0)
        gguf = self.model.gguf
        names = [n for n in source.tensors if gguf is None or not gguf.omits(n, config)]
        self.n_layers = self.model.n_layers(names)
        # llama.cpp multiplies with the embedding where there is no head.
        named = {found.name for n in names if n not in self.model.tied and gguf and (found := gguf.name(n))}
        self.is_tied = "output.weight" not in named

    def scheme(self, decision: Decision, name: str) -> Scheme:
        """The scheme of one tensor."""
        found = None if self.model.gguf is None else self.model.gguf.name(name)
        role = "head" if decision.role == "embedding" and self.is_tied else decision.role
        named, layer = None if found is None else found.name, self.model.layer(name)
        return Scheme.parse(self.mix.scheme(role, named, layer, self.n_layers, experts=self.experts, gqa=self.gqa))


def _kept_alike(entries: Sequence[Entry], model: Model, refused: Counter[str]) -> list[Entry]:
    """The same, but that of a fused matrix of which the format refuses one part all parts are kept."""
    by_name = {e.info.name: e for e in entries}
    kept: dict[str, str] = {}
    for group in model.fused_groups(by_name):
        bad = next((name for name in group if by_name[name].scheme is None and by_name[name].reason in refused), None)
        if bad is not None:
            kept |= {n: f"fused with {bad}, which is kept: {by_name[bad].reason}" for n in group if by_name[n].scheme}
    return [
        e if e.info.name not in kept else dataclasses.replace(e, scheme=None, reason=kept[e.info.name]) for e in entries
    ]


def _with_shared(entries: Sequence[Entry], model: Model) -> list[Entry]:
    """The same, with `shared` where parts of a fused matrix must have one global scale."""
    return [
        e
        if e.scheme is None or e.scheme.scale_rule != "global"
        else dataclasses.replace(e, shared=model.shared(e.info.name) or "")
        for e in entries
    ]


def _unequal_fused(entries: Sequence[Entry], model: Model) -> list[str]:
    """A warning for each kind of fused matrices whose parts would not have one scheme."""
    groups: dict[tuple[str, str], list[Entry]] = {}
    for entry in entries:
        fused = model.fused(entry.info.name)
        if fused is not None:
            groups.setdefault(fused, []).append(entry)
    unequal: dict[str, list[str]] = {}
    for (parts, _), group in groups.items():
        if len({e.scheme for e in group}) > 1:
            unequal.setdefault(parts, []).append(group[0].info.name)
    return [
        f"{parts} have different schemes in {len(names)} layers (first: {names[0]}); vLLM and "
        f"SGLang fuse them and refuse that. Quantize or ignore all of them alike."
        for parts, names in unequal.items()
    ]
