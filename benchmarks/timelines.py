"""What a timeline says: how long each stage was at work, and which events a picture shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

STAGES = ("read", "h2d", "kernel", "d2h", "write")


class Event(NamedTuple):
    """One range: `start` and `seconds` on the clock of the timeline."""

    stage: str
    name: str
    track: str
    start: float
    seconds: float
    n_bytes: int


def load(path: Path) -> list[Event]:
    """The events of the stages, without planning and without the final flush."""
    events = json.loads(path.read_text())["traceEvents"]
    tracks = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    return [
        Event(e["cat"], e["name"], tracks[e["tid"]], e["ts"] / 1e6, e["dur"] / 1e6, e["args"]["bytes"])
        for e in events
        if e["ph"] == "X" and e["cat"] in STAGES and e["name"] != "flush"
    ]


def stages(events: list[Event]) -> dict[str, dict[str, Any]]:
    """For each stage its bytes; the seconds that all its ranges add up to; the share of the run, from the first event
    to the last, in which at least one of them was under way (`busy`); and the mean number of them (`at_once`)."""
    begin, end = min(e.start for e in events), max(e.start + e.seconds for e in events)
    found = {}
    for stage in STAGES:
        mine = sorted((e.start, e.start + e.seconds) for e in events if e.stage == stage)
        if mine:
            starts, stops = np.array(mine).T
            covered = np.maximum.accumulate(stops)
            union = covered[0] - starts[0] + np.maximum(stops[1:] - np.maximum(starts[1:], covered[:-1]), 0).sum()
            seconds = float((stops - starts).sum())
            found[stage] = {
                "bytes": sum(e.n_bytes for e in events if e.stage == stage),
                "seconds": seconds,
                "busy": float(union) / (end - begin),
                "at_once": seconds / (end - begin),
            }
    return found


def excerpt(events: list[Event], seconds: float) -> list[dict[str, Any]]:
    """The events in the middle of the run, for so long, with times from the beginning of the run."""
    begin, end = min(e.start for e in events), max(e.start + e.seconds for e in events)
    first = max(begin, (begin + end - seconds) / 2)
    return [
        {"stage": e.stage, "track": e.track, "start": round(e.start - begin, 6), "seconds": round(e.seconds, 6)}
        for e in sorted(events, key=lambda e: (e.track, e.start))
        if e.start + e.seconds > first and e.start < first + seconds
    ]
