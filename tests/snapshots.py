"""What lies in a folder, byte for byte, and a check that nothing of it changes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def snapshot(folder: Path) -> dict[str, bytes | str]:
    """Every path below `folder`, hidden ones too: its bytes, or what it links to."""
    return {
        str(p.relative_to(folder)): f"-> {p.readlink()}" if p.is_symlink() else p.read_bytes() if p.is_file() else b""
        for p in sorted(folder.rglob("*"))
    }


def differences(a: dict[str, bytes | str], b: dict[str, bytes | str]) -> list[str]:
    """Names that only one of two snapshots has, or that differ."""
    return sorted({n for n in a | b if a.get(n) != b.get(n)})


@contextmanager
def nothing_changes(folder: Path) -> Iterator[None]:
    before = snapshot(folder)
    yield
    if changed := differences(before, snapshot(folder)):
        raise AssertionError(f"changed, added or removed: {changed}")
