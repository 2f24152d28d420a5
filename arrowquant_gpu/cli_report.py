"""What the command line prints on stdout: tables for people, or one JSON document. Quiet prints nothing."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from .backends import Device

if TYPE_CHECKING:
    from pathlib import Path

    from .pipeline import Manifest, Plan
    from .pipeline.dequantize import Dequantized
    from .pipeline.verify import VerifyReport

# (key of a row, heading, justified right)
Column = tuple[str, str, bool]

_PLAN: tuple[Column, ...] = (
    ("name", "tensor", False),
    ("action", "action", False),
    ("scheme", "scheme", False),
    ("dtype", "dtype", False),
    ("shape", "shape", False),
    ("bytes_before", "before", True),
    ("bytes_after", "after", True),
    ("bits_per_weight", "bits/weight", True),
    ("accuracy", "accuracy", True),
    ("entropy", "entropy", True),
    ("reason", "reason", False),
)
# Of a plan, shown where they were measured.
_MEASURED = ("accuracy", "entropy")
_FIGURES: tuple[Column, ...] = (
    ("name", "tensor", False),
    ("scheme", "scheme", False),
    ("cosine", "cosine", True),
    ("sqnr_db", "SQNR dB", True),
    ("max_error", "max error", True),
)
_FINDINGS: tuple[Column, ...] = (*_FIGURES, ("max_steps", "steps", True), ("problem", "problem", False))
_TENSORS: tuple[Column, ...] = (
    ("name", "tensor", False),
    ("scheme", "scheme", False),
    ("dtype", "dtype", False),
    ("shape", "shape", False),
    ("bytes", "bytes", True),
)

# Of a run that validated, this many of the worst tensors are shown; the manifest has all.
N_WORST = 5

FORMATS: tuple[Column, ...] = (
    ("format", "format", False),
    ("target", "target", False),
    ("scheme", "default scheme", False),
    ("options", "options", False),
)


class Report:
    """Collects what one command found and prints it once, at its end."""

    def __init__(self, command: str, *, json: bool, quiet: bool) -> None:
        self.document: dict[str, Any] = {"command": command}
        self._json, self._quiet = json, quiet
        self._parts: list[Table | str] = []
        self._filled = False

    def add(self, *parts: Table | str, **document: Any) -> None:
        """Text and tables for people, and the same as members of the JSON document."""
        self._parts.extend(parts)
        self.document.update(document)
        self._filled = True

    def flush(self) -> None:
        """Print, once."""
        if self._filled and self._json:
            print(json.dumps(_plain(self.document), indent=1))
        elif self._filled and not self._quiet:
            terminal = sys.stdout.isatty()
            # A file or pipe has no width to wrap to, and wants no padding.
            console = Console(width=None if terminal else 1000, highlight=False)
            with console.capture() as capture:
                for part in self._parts:
                    console.print(part, soft_wrap=isinstance(part, str), markup=False)
            lines = capture.get().splitlines()
            print("\n".join(lines if terminal else [line.rstrip() for line in lines]))
        sys.stdout.flush()
        self._filled = False

    def plan(self, plan: Plan) -> None:
        """The plan of a dry run: every tensor, then the totals."""
        rows, summary = plan.table.to_pylist(), plan.summary
        absent = [key for key in _MEASURED if all(row[key] is None for row in rows)]
        columns = [column for column in _PLAN if column[0] not in absent]
        self.add(table(rows, columns), _totals(summary, "would be"), *_warnings(summary), summary=summary, tensors=rows)

    def quantized(self, manifest: Manifest, src: str, dst: object, devices: Sequence[Device], compiling: float) -> None:
        """A finished run: totals, speed, and the worst tensors where they were measured. `compiling`: seconds of it."""
        rows, summary = manifest.table.to_pylist(), manifest.summary
        device = Device(", ".join(d.name for d in devices), devices[0].reason)
        worst = sorted((r for r in rows if r["cosine"] is not None), key=lambda r: r["cosine"])[:N_WORST]
        measured: list[Table | str] = [f"worst {len(worst)} by cosine:", table(worst, _FIGURES)] if worst else []
        self.add(
            f"{src} -> {dst} ({summary['format']})",
            _totals(summary, "were"),
            _speed(summary["bytes_before"], summary["seconds"], device, compiling)
            + f", then {summary['flush_seconds']:.2f} s until all was on the disk",
            *([f"{summary['resumed']} tensors had been finished before"] if summary["resumed"] else []),
            *measured,
            *summary["notes"],
            *_warnings(summary),
            source=src,
            target=str(dst),
            device=device._asdict(),
            summary=summary,
            compile_seconds=compiling,
            tensors=rows,
        )

    def inspected(self, path: Path, format_name: str, rows: list[dict[str, Any]], notes: Mapping[str, str]) -> None:
        """The tensors of a checkpoint, and what it says of itself."""
        total, n_quantized = sum(r["bytes"] for r in rows), sum(r["scheme"] is not None for r in rows)
        self.add(
            table(rows, _TENSORS),
            f"{path} ({format_name}): {len(rows)} tensors, {n_quantized} quantized, {size(total)}",
            *(f"{key}: {value}" for key, value in notes.items()),
            path=str(path),
            format=format_name,
            n_tensors=len(rows),
            n_quantized=n_quantized,
            bytes=total,
            notes=dict(notes),
            tensors=rows,
        )

    def dequantized(self, result: Dequantized, src: str, dst: object, device: Device, compiling: float) -> None:
        """Totals and speed of a decoding run."""
        summary = result.summary
        self.add(
            f"{src} -> {dst} (safetensors)",
            f"{summary['n_decoded']} of {summary['n_tensors']} tensors were decoded: {size(summary['bytes'])}",
            _speed(summary["bytes"], summary["seconds"], device, compiling),
            source=src,
            target=str(dst),
            device=device._asdict(),
            summary=summary,
            compile_seconds=compiling,
            tensors=result.table.to_pylist(),
        )

    def verified(self, result: VerifyReport, device: Device) -> None:
        """Every quantized tensor and every one with a problem, worst first."""
        rows, summary = [f._asdict() for f in result.findings], result.summary
        worst = summary["worst_cosine"]
        shown = [r for r in rows if r["cosine"] is not None or r["problem"] is not None]
        n_kept = sum(r["action"] == "kept" and r["problem"] is None for r in rows)
        self.add(
            table(shown, _FINDINGS),
            f"{result.path} against {result.against}: {summary['n_quantized']} quantized tensors, {n_kept} kept ones "
            f"equal to the original, {summary['n_failed']} problems",
            *([f"worst cosine {worst:.6f}: {summary['worst_tensor']}"] if worst is not None else []),
            f"{summary['seconds']:.2f} s on {device.name} ({device.reason})",
            path=str(result.path),
            against=str(result.against),
            device=device._asdict(),
            summary=summary,
            tensors=rows,
        )

    def info(
        self, versions: Mapping[str, str | None], devices: Sequence[Mapping[str, Any]], compiler: str, auto: Device
    ) -> None:
        """Versions, devices, what compiles the kernels, and the choice that auto makes."""
        width = max(map(len, versions))
        self.add(
            *(f"{name:{width}}  {version or 'not installed'}" for name, version in versions.items()),
            "",
            *(f"{d['name']:{width}}  {d['description']}" for d in devices),
            f"{'kernels':{width}}  {compiler}",
            "",
            f"{'auto':{width}}  {auto.name} ({auto.reason})",
            version=versions["arrowquant_gpu"],
            versions=dict(versions),
            devices=list(devices),
            kernel_compiler=compiler,
            auto=auto._asdict(),
        )

    def formats(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """The output formats; of each option the default first."""
        shown = [
            {**row, "options": "; ".join(f"{key}={'|'.join(values)}" for key, values in row["options"].items())}
            for row in rows
        ]
        self.add(table(shown, FORMATS), formats=list(rows))


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> Table:
    """Rows as a plain table, numbers to the right, nothing cut off."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for _, heading, right in columns:
        shown.add_column(heading, justify="right" if right else "left", overflow="fold")
    for row in rows:
        shown.add_row(*(_cell(key, row[key]) for key, _, _ in columns))
    return shown


def size(n_bytes: float) -> str:
    """Bytes for people, decimal as disks are sold.

    >>> size(999), size(90_868_376)
    ('999 B', '90.9 MB')
    """
    if n_bytes < 1000:
        return f"{n_bytes:.0f} B"
    power = min(int(math.log10(n_bytes) // 3), 4)
    return f"{n_bytes / 1000**power:.1f} {' kMGT'[power]}B"


def _cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if key.startswith("bytes"):
        return size(value)
    if key == "shape":
        return "x".join(map(str, value)) or "scalar"
    if key in ("cosine", *_MEASURED):
        return f"{value:.6f}"
    if key in ("sqnr_db", "bits_per_weight"):
        return f"{value:.2f}"
    if key in ("max_error", "max_steps"):
        return f"{value:.3g}"
    return str(value)


def _totals(summary: Mapping[str, Any], verb: str) -> str:
    before, after = summary["bytes_before"], summary["bytes_after"]
    stored = ", ".join(summary["stored_schemes"])
    return (
        f"{summary['n_quantized']} of {summary['n_tensors']} tensors {verb} quantized to {stored}: "
        f"{size(before)} -> {size(after)} ({after / max(before, 1):.0%}), "
        f"{_cell('bits_per_weight', summary['bits_per_weight'])} bits per quantized weight, "
        f"{_cell('bits_per_weight', summary['bits_per_weight_model'])} over the whole model"
    )


def _speed(n_bytes: int, seconds: float, device: Device, compiling: float) -> str:
    work = max(seconds - compiling, 1e-9)
    first = f", {compiling:.2f} s of them compiling kernels that are cached now" if compiling > 0.05 else ""
    return f"{seconds:.2f} s on {device.name} ({device.reason}){first}; {size(n_bytes / work)}/s"


def _warnings(summary: Mapping[str, Any]) -> list[str]:
    return [f"warning: {w}" for w in summary["warnings"]]


def _plain(value: Any) -> Any:
    """JSON has no infinities (the SQNR of a tensor without error): they become null."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
