"""The picture beside each results file, drawn from that file alone.

    python benchmarks/pictures.py benchmarks/results    # draws all of them again

Every picture says on which machine its figures were measured.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

COLORS = {"read": "#4E79A7", "h2d": "#F28E2B", "kernel": "#59A14F", "d2h": "#EDC948", "write": "#B07AA1"}
GREY, DARK = "#BAB0AC", "#404040"

Results = dict[str, Any]


def draw(path: Path, picture: Callable[[Results], Any]) -> None:
    """Draw `picture` of the results in `path` into a PNG of the same name."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams |= {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "arrowquant"}
    results = json.loads(path.read_text())
    figure = picture(results)
    figure.get_layout_engine().set(rect=(0, 0.03, 1, 0.97))
    figure.text(0.995, 0.005, _origin(results["origin"]), ha="right", va="bottom", fontsize=6.5, color="grey")
    figure.savefig(path.with_suffix(".png"), dpi=130, metadata={"Software": None})


def _origin(origin: Results) -> str:
    gpu = (origin["gpu"] or "").partition(",")[0]
    return f"{gpu or origin['cpu']}, {origin['cores']} cores, {origin['date']}, {origin['commit'][:9]}"


def _subplots(**options: Any) -> Any:
    import matplotlib.pyplot as plt

    return plt.subplots(layout="constrained", **options)


def kernels(results: Results) -> Any:
    """Heat maps of the share of the copy: for whole numbers a row for each width and dtype, a column for each other
    part of a scheme; for the other grids a row for each dtype.
    """
    rows = [row for row in results["kernels"] if row["scheme"].startswith("int")]
    others = [row for row in results["kernels"] if row not in rows]
    across = list(dict.fromkeys(row["scheme"].partition("_")[2] for row in rows))
    widths = list(dict.fromkeys(row["scheme"].partition("_")[0] for row in rows))
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    shares = np.full((len(dtypes), len(widths), len(across)), np.nan)
    for row in rows:
        width, _, rest = row["scheme"].partition("_")
        shares[dtypes.index(row["dtype"]), widths.index(width), across.index(rest)] = row["of_copy"]
    heights = [*[2.1] * len(dtypes), 1.1]
    figure, axes = _subplots(nrows=len(heights), figsize=(11, 2 + sum(heights)), height_ratios=heights)
    for axis, dtype, values in zip(axes, dtypes, shares, strict=False):
        _heat_map(axis, values, widths, across)
        copies = results["copy_gb_s"][dtype].values()
        axis.set_title(f"{dtype}: {results['beside']} {np.median(list(copies)):,.0f} GB/s", loc="left", fontsize=9)
    names = list(dict.fromkeys(row["scheme"] for row in others))
    found = {(row["dtype"], row["scheme"]): row["of_copy"] for row in others}
    image = _heat_map(axes[-1], np.array([[found[dtype, name] for name in names] for dtype in dtypes]), dtypes, names)
    axes[-1].set_title("other grids", loc="left", fontsize=9)
    figure.colorbar(image, ax=axes, shrink=0.5, label=f"share of the {results['beside']}")
    figure.suptitle("Rate of the kernels, bytes read and written, beside a copy of as many bytes", fontsize=10)
    return figure


def _heat_map(axis: Any, values: Any, rows: list[str], columns: list[str]) -> Any:
    image = axis.imshow(values, cmap="RdYlGn", vmin=0, vmax=1.2, aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        axis.text(x, y, "" if np.isnan(value) else f"{value:.2f}", ha="center", va="center", fontsize=6)
    axis.set_yticks(range(len(rows)), rows)
    axis.set_xticks(range(len(columns)), columns, rotation=35, ha="right", fontsize=7)
    axis.spines[:].set_visible(False)
    return image


def checkpoint(results: Results) -> Any:
    """Seconds of the parts alone and of the engine; and how long each stage was busy in its run."""
    figure, (left, right) = _subplots(ncols=2, figsize=(10, 4.2), width_ratios=(3, 2))
    _seconds(left, results)
    shares = {name: results["shares"][name] for name in COLORS if name in results["shares"]}
    right.barh([*shares][::-1], [*shares.values()][::-1], color=[COLORS[name] for name in shares][::-1])
    for y, share in enumerate([*shares.values()][::-1]):
        right.text(share, y, f" {share:.0%}", va="center", fontsize=8)
    right.set_xlim(0, 1.15)
    right.set_xticks([0, 0.5, 1], ["0", "50 %", "100 %"])
    right.set_title(f"Share {results['shares_are']}, warm", loc="left", fontsize=9)
    size, target = results["source_bytes"] / 1e9, results["output_bytes"] / 1e9
    what = f"{results['model']}, {results['layers']} layers, {size:.1f} GB bfloat16 to {target:.1f} GB"
    figure.suptitle(f"{what} {results['scheme']}, {results['device']}", fontsize=10)
    return figure


def _seconds(axis: Any, results: Results) -> None:
    parts, engine = results["alone"], results["engine"]
    bars = [(f"{name} alone", row["seconds"], COLORS.get(row["stage"], GREY), 0.0) for name, row in parts.items()]
    bars.append((f"compared with: {results['bar']['name']}", results["bar"]["seconds"], GREY, 0.0))
    bars.append(("engine, warm (+ flush)", engine["warm_s"], DARK, engine["flush_s"]))
    bars.append(("engine, nothing in the page cache (+ flush)", engine["cold_s"], DARK, engine["cold_flush_s"]))
    for y, (name, seconds, color, flush) in enumerate(reversed(bars)):
        axis.barh(y, seconds, height=0.45, color=color)
        axis.barh(y, flush, left=seconds, height=0.45, color="none", edgecolor=DARK, hatch="///", linewidth=0.5)
        label = f" {seconds:.2f} s" + (f" + {flush:.2f}" if flush else "")
        axis.text(seconds + flush, y, label, va="center", fontsize=8)
        axis.text(0, y + 0.25, f" {name}", va="bottom", fontsize=8)
    axis.set_ylim(-0.4, len(bars) - 0.3)
    axis.set_xlim(0, 1.25 * max(seconds + flush for _, seconds, _, flush in bars))
    axis.set_yticks([])
    axis.set_xlabel("seconds, median")


def timeline(results: Results) -> Any:
    """What each track did when, and how long each stage was busy."""
    figure, (top, bottom) = _subplots(nrows=2, figsize=(10, 5), height_ratios=(3, 2))
    tracks = list(dict.fromkeys(event["track"] for event in results["events"]))
    for stage, color in COLORS.items():
        for y, track in enumerate(tracks):
            found = [e for e in results["events"] if e["stage"] == stage and e["track"] == track]
            top.broken_barh([(e["start"], e["seconds"]) for e in found], (y - 0.4, 0.8), color=color, linewidth=0)
    top.set_yticks(range(len(tracks)), tracks, fontsize=7)
    top.invert_yaxis()
    top.set_xlabel("seconds of the run (a part of it)")
    stages = list(results["busy"])
    bottom.barh(stages[::-1], [results["busy"][s] for s in stages[::-1]], color=[COLORS[s] for s in stages[::-1]])
    for y, stage in enumerate(stages[::-1]):
        bottom.text(results["busy"][stage], y, f" {results['busy'][stage]:.1%}", va="center", fontsize=8)
    bottom.set_xlim(0, 1.1)
    bottom.set_xlabel("share of the run in which the stage was busy")
    figure.suptitle(results["title"], fontsize=10)
    return figure


def layers(results: Results) -> Any:
    """For each path: milliseconds per layer of 4 MB, with the kernel's own part, and memory."""
    rows = [*results["single_4mb"].values(), *results["multi_layer"]]
    names = [f"{row['path']}, {row['num_layers']} layer{'s' * (row['num_layers'] > 1)}" for row in rows]
    figure, (left, right) = _subplots(ncols=2, figsize=(10, 1.2 + 0.34 * len(rows)), width_ratios=(3, 1), sharey=True)
    y = np.arange(len(rows))[::-1]
    kernel = np.array([row["kernel_per_layer_ms"] for row in rows])
    whole = np.array([row["per_layer_ms"] for row in rows])
    left.barh(y, kernel, color=COLORS["kernel"], label="kernel")
    left.barh(y, np.maximum(whole - kernel, 0), left=kernel, color=GREY, label="everything else")
    for at, row in zip(y, rows, strict=True):
        label = f" {row['per_layer_ms']:.2f} ms, {row['outside_kernel']:.0%} outside the kernel"
        left.text(row["per_layer_ms"], at, label, va="center", fontsize=7.5)
    left.set_yticks(y, names)
    left.set_xscale("log")
    left.set_xlim(kernel.min() / 2, whole.max() * 20)
    left.set_xlabel("milliseconds per layer of 4 MB")
    left.legend(loc="lower right", fontsize=7.5)
    right.barh(y, [row["extra_memory"] for row in rows], color=COLORS["read"])
    for at, row in zip(y, rows, strict=True):
        right.text(row["extra_memory"], at, f" {row['extra_memory']:.1%}", va="center", fontsize=7.5)
    right.set_xlim(0, max(0.05, 1.3 * max(row["extra_memory"] for row in rows)))
    right.set_xlabel("memory beyond the output / input")
    figure.suptitle(f"Layers of 4 MB float32 to {results['scheme']}", fontsize=10)
    return figure


PICTURES: dict[str, Callable[[Results], Any]] = {
    "kernels_cpu.json": kernels,
    "kernels_gpu.json": kernels,
    "checkpoint.json": checkpoint,
    "checkpoint_gpu.json": checkpoint,
    "simulated_overlap.json": timeline,
    "arrowquant_v2.json": layers,
    "arrowquant_v2_gpu.json": layers,
}


if __name__ == "__main__":
    for name, picture in PICTURES.items():
        if (path := Path(sys.argv[1]) / name).exists():
            draw(path, picture)
