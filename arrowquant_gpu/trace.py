"""What runs when: ranges for a profiler (NVTX), and the same ranges as a timeline in a file. docs/profiling.md.

A range has a category, the name of a tensor or file, and bytes. Where nobody profiles and no timeline is recorded,
`span` does nothing and costs about a tenth of a microsecond.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

import numpy as np
import nvtx
from numpy.typing import NDArray

from .errors import TargetError

Category = Literal["plan", "read", "h2d", "kernel", "d2h", "write"]
CATEGORIES: tuple[Category, ...] = ("plan", "read", "h2d", "kernel", "d2h", "write")
# A profiler shows one color per category.
_COLORS = {"plan": 0x9E9E9E, "read": 0x4E79A7, "h2d": 0xF28E2B, "kernel": 0x59A14F, "d2h": 0xEDC948, "write": 0xB07AA1}

# A profiler is there from the start of the process or not at all. Without one, nvtx gives a domain that does nothing
# and whose categories have no number.
_domain = nvtx.get_domain("arrowquant")
_IDS = {category: _domain.get_category_id(category) for category in CATEGORIES}
_IS_PROFILED = nvtx.enabled() and None not in _IDS.values()

_NOTHING = contextlib.nullcontext()
_recording: Timeline | None = None
_starting = threading.Lock()


def span(category: Category, name: str | None, n_bytes: int = 0) -> contextlib.AbstractContextManager[None]:
    """A range over the body of a `with`, on the calling thread. Without a name there is none.

    Ranges of one thread nest, so a generator must not yield inside one.
    """
    if name is None or not (_IS_PROFILED or _recording is not None):
        return _NOTHING
    return _Span(category, name, n_bytes, _recording)


def submission(category: Category, name: str, n_bytes: int = 0) -> contextlib.AbstractContextManager[None]:
    """A range around code that only puts work on a stream: for a profiler, which shows where that work ran.

    A timeline has that work from `record`, and so leaves this range out.
    """
    return _Span(category, name, n_bytes, None) if _IS_PROFILED else _NOTHING


def is_recording() -> bool:
    """Whether there is a timeline that `record` adds to, so that what runs elsewhere is worth being timed."""
    return _recording is not None


def record(category: Category, name: str, start: float, end: float, n_bytes: int = 0, *, track: str) -> None:
    """Add to the timeline what ran on a device stream, or wherever else the calling thread did not see it.

    start, end: seconds of time.perf_counter()
    track: the row it is shown in, such as "cuda:0 h2d"; what is in one row must not overlap
    """
    if (recording := _recording) is not None:
        recording.add(category, name, start, end, n_bytes, recording.track(track))


class Row(TypedDict):
    """What one category or one track did in a timeline.

    spans, bytes: how many ranges, and their bytes together
    seconds: the sum of their durations; ranges of several threads at the same time count each
    busy: seconds in which at least one of them ran: the length of their union
    start, end: when the first began and the last ended, seconds since the timeline began
    """

    spans: int
    bytes: int
    seconds: float
    busy: float
    start: float
    end: float


class Summary(TypedDict):
    """Totals of a timeline; `seconds` is how long it was recorded."""

    seconds: float
    categories: dict[str, Row]
    tracks: dict[str, Row]


@contextlib.contextmanager
def timeline(path: str | Path) -> Iterator[Timeline]:
    """Record the ranges of all threads while the body runs, and write them to `path` as a Chrome trace.

    It is written also when the body raises: then it shows what had ended until then. An earlier trace of that name is
    replaced, no other file is. A range takes 33 bytes of memory, and a name its own length once.

        >>> import tempfile
        >>> with timeline(Path(tempfile.mkdtemp()) / "out.json") as recorded:
        ...     with span("read", "model.safetensors", 4096):
        ...         pass
        >>> recorded.summary()["categories"]["read"]["bytes"]
        4096

    Raises TargetError where the file cannot be written, and where another timeline is being recorded.
    """
    global _recording
    path = Path(path)
    _check(path)
    with _starting:
        if _recording is not None:
            raise TargetError(f"{path}: the timeline {_recording.path} is being recorded; there is one at a time")
        recorded = _recording = Timeline(path)
    try:
        yield recorded
    except BaseException as error:
        try:
            _end(recorded)
        except TargetError as e:
            error.add_note(str(e))
        raise
    _end(recorded)


def _end(recorded: Timeline) -> None:
    global _recording
    _recording = None
    recorded.end()
    recorded.write()


# A recorded range; its name, track and category (kind) are numbers.
_EVENT = struct.Struct("=ddqIIB")
_FIELDS = np.dtype([("start", "f8"), ("end", "f8"), ("bytes", "i8"), ("name", "u4"), ("track", "u4"), ("kind", "u1")])
_KINDS = {category: i for i, category in enumerate(CATEGORIES)}


class _Track(NamedTuple):
    number: int
    name: str


class Timeline:
    """The ranges that were recorded. Made by `timeline`; methods may be called from any thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.start = self.stop = time.perf_counter()
        self._events = bytearray()
        self._names: dict[str, int] = {}
        self._numbers = itertools.count()
        self._tracks: list[_Track] = []
        self._by_name: dict[str, _Track] = {}
        self._of_thread = threading.local()
        self._lock = threading.Lock()
        self._ended: NDArray[np.void] | None = None

    def add(self, category: Category, name: str, start: float, end: float, n_bytes: int, track: _Track) -> None:
        """Add a range; one that ends after the timeline did is not in the file."""
        # Each of these is one call, which no other thread comes between.
        if (number := self._names.get(name)) is None:
            number = self._names.setdefault(name, next(self._numbers))
        self._events.extend(_EVENT.pack(start, end, n_bytes, number, track.number, _KINDS[category]))

    def track(self, name: str | None = None) -> _Track:
        """The row of this name, or that of the calling thread. Threads of one name have a row each."""
        if name is None:
            if (of_thread := getattr(self._of_thread, "track", None)) is None:
                with self._lock:
                    of_thread = self._of_thread.track = self._new_track(threading.current_thread().name)
            return of_thread
        if (by_name := self._by_name.get(name)) is None:
            with self._lock:
                by_name = self._by_name.get(name)
                if by_name is None:
                    by_name = self._by_name[name] = self._new_track(name)
        return by_name

    def _new_track(self, name: str) -> _Track:
        taken = {track.name for track in self._tracks}
        number = len(self._tracks) + 1
        self._tracks.append(_Track(number, f"{name} ({number})" if name in taken else name))
        return self._tracks[-1]

    def end(self) -> None:
        """Take no more ranges."""
        self.stop = time.perf_counter()
        self._ended = self._recorded()
        self._events = bytearray()

    def _recorded(self) -> NDArray[np.void]:
        return np.frombuffer(bytes(self._events), _FIELDS) if self._ended is None else self._ended

    def summary(self) -> Summary:
        """Totals per category and per track, of those that have any range."""
        events = self._recorded()
        kinds = {str(c): _row(events[events["kind"] == i], self.start) for i, c in enumerate(CATEGORIES)}
        tracks = {t.name: _row(events[events["track"] == t.number], self.start) for t in list(self._tracks)}
        return {
            "seconds": self.stop - self.start,
            "categories": {name: row for name, row in kinds.items() if row["spans"]},
            "tracks": {name: row for name, row in tracks.items() if row["spans"]},
        }

    def write(self) -> None:
        """Write the file: to a temporary name first, which is renamed when it is complete."""
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            try:
                with temporary.open("w") as f:
                    f.write(_HEAD)
                    f.write(",\n".join(self._metadata()))
                    f.writelines(f",\n{line}" for line in self._lines())
                    f.write("\n]}\n")
                temporary.replace(self.path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as e:
            raise TargetError(f"{self.path}: the timeline cannot be written ({e.strerror})") from e

    def _metadata(self) -> Iterator[str]:
        pid = os.getpid()
        yield json.dumps({"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": "arrowquant"}})
        for track in list(self._tracks):
            named = {"ph": "M", "name": "thread_name", "pid": pid, "tid": track.number, "args": {"name": track.name}}
            yield json.dumps(named)

    def _lines(self) -> Iterator[str]:
        pid, events = os.getpid(), self._recorded()
        # Threads that still run may add names, which no recorded range has.
        names = {number: json.dumps(name) for name, number in list(self._names.items())}
        for at in range(0, len(events), 1 << 14):
            for start, end, n_bytes, name, track, kind in events[at : at + (1 << 14)].tolist():
                ts, duration = (start - self.start) * 1e6, (end - start) * 1e6
                yield (
                    f'{{"ph":"X","name":{names[name]},"cat":"{CATEGORIES[kind]}","pid":{pid},"tid":{track},'
                    f'"ts":{ts:.3f},"dur":{duration:.3f},"args":{{"bytes":{n_bytes}}}}}'
                )


class _Span:
    """A range for the profiler, and for a timeline where one was recorded when it was made."""

    __slots__ = ("_category", "_n_bytes", "_name", "_start", "_timeline")

    def __init__(self, category: Category, name: str, n_bytes: int, recording: Timeline | None) -> None:
        self._category, self._name, self._n_bytes, self._timeline = category, name, n_bytes, recording

    def __enter__(self) -> None:
        if _IS_PROFILED:
            # Names of files need not be Unicode.
            message = self._name if self._name.isascii() else self._name.encode(errors="replace")
            color, number = _COLORS[self._category], _IDS[self._category]
            _domain.push_range(_domain.get_event_attributes(message, color, number, int(self._n_bytes)))
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if (recording := self._timeline) is not None:
            end = time.perf_counter()
            recording.add(self._category, self._name, self._start, end, self._n_bytes, recording.track())
        if _IS_PROFILED:
            _domain.pop_range()


# A file that begins like this is a timeline, and may be replaced by another.
_HEAD = '{"otherData":{"writer":"arrowquant"},"displayTimeUnit":"ns","traceEvents":[\n'


def _check(path: Path) -> None:
    """Find out before the work, not after it, that the file cannot be written."""
    try:
        if path.exists():
            with path.open("rb") as f:
                if f.read(len(_HEAD)) != _HEAD.encode():
                    raise TargetError(f"{path} exists and is not a timeline; choose another name")
        if not path.parent.is_dir():
            raise TargetError(f"{path}: the folder {path.parent} does not exist; create it first")
        if not os.access(path.parent, os.W_OK):
            raise TargetError(f"{path}: the folder {path.parent} is not writable")
    except TargetError:
        raise
    except OSError as e:
        raise TargetError(f"{path}: the timeline cannot be written ({e.strerror})") from e


def _row(events: NDArray[Any], zero: float) -> Row:
    if not len(events):
        return {"spans": 0, "bytes": 0, "seconds": 0.0, "busy": 0.0, "start": 0.0, "end": 0.0}
    start, end = events["start"], events["end"]
    return {
        "spans": len(events),
        "bytes": int(events["bytes"].sum()),
        "seconds": float((end - start).sum()),
        "busy": _union(start, end),
        "start": float(start.min()) - zero,
        "end": float(end.max()) - zero,
    }


def _union(start: NDArray[np.float64], end: NDArray[np.float64]) -> float:
    """Length of the union of the intervals from `start` to `end`, one or more."""
    order = np.argsort(start)
    start, end = start[order], end[order]
    covered = np.maximum.accumulate(end)
    new = end[1:] - np.maximum(start[1:], covered[:-1])
    return float(end[0] - start[0] + np.maximum(new, 0).sum())
