"""How a run goes: the progress bar (bytes, bytes per second, time left; only on a terminal), and time for compiling."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from .backends import Device


@contextlib.contextmanager
def progress_bar(
    verb: str, *, shown: bool = True, of: str = "bytes"
) -> Iterator[Callable[[int, int | None, str], None] | None]:
    """A callback (bytes done, bytes in all, tensor name) that draws a bar on stderr, or None where nobody looks.

    `of`: "bytes", or "rows" where these are what is counted; how many there are in all may be unknown, None.
    """
    console = Console(stderr=True)
    if not (shown and console.is_terminal):
        yield None
        return
    counted: list[ProgressColumn] = [DownloadColumn(), TransferSpeedColumn()]
    if of == "rows":
        counted = [MofNCompleteColumn(), TextColumn("rows")]
    columns = (
        TextColumn(verb),
        BarColumn(bar_width=30),
        *counted,
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)

        def update(done: int, total: int | None, name: str) -> None:
            bar.update(task, completed=done, total=total, description=name)

        yield update


@contextlib.contextmanager
def compile_time(devices: Sequence[Device]) -> Iterator[Callable[[], float]]:
    """A function that says, after the body, how many seconds of it Numba spent compiling for `devices`.

    Without it, the first run on a machine would look a hundred times slower than all others.
    """
    if all(device.name != "cpu" for device in devices):
        yield lambda: 0.0
        return
    from numba.core import event

    seconds: list[float] = []
    with event.install_timer("numba:compile", seconds.append):
        yield lambda: sum(seconds)
