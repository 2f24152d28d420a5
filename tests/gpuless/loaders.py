"""What the stand-in for CuPy runs when the backend loads a cubin: the same source in the shim, or its PTX.

A cubin has a file of the same stem beside it that says what it was compiled from (arrowquant_gpu/backends/nvrtc.py).
"""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arrowquant_gpu.backends import nvrtc
from arrowquant_gpu.backends.nvrtc import Cubin

from .fake_cupy import Prepare
from .ptx import PtxModule
from .shim import CACHE, FORWARD, Schedule, ShimModule


def facts_of(cubin: Path) -> dict[str, Any]:
    """What a cubin was compiled from: source, defines, arch and flags."""
    facts: dict[str, Any] = json.loads(cubin.with_suffix(".json").read_bytes())
    return facts


@dataclass
class ShimLoader:
    """Runs the source of a cubin in the shim. `loaded` counts the variants that were asked for."""

    schedule: Schedule = FORWARD
    sanitize: bool = False
    loaded: Counter[str] = field(default_factory=Counter)

    def __call__(self, cubin: Path, entry: str) -> Prepare:
        facts = facts_of(cubin)
        source = nvrtc.kernel_dir() / f"{facts['source']}.cu"
        module = ShimModule(source, facts["defines"], sanitize=self.sanitize, arch=facts["arch"])
        self.loaded[cubin.stem] += 1
        return functools.partial(module.get_function(entry).prepare, schedule=self.schedule)


@dataclass
class PtxLoader:
    """Runs the PTX that NVRTC emits for the source of a cubin. `loaded` counts as above; `only_blocks`: see ptx.py."""

    loaded: Counter[str] = field(default_factory=Counter)
    only_blocks: Sequence[int] | None = None

    def __call__(self, cubin: Path, entry: str) -> Prepare:
        facts = facts_of(cubin)
        self.loaded[cubin.stem] += 1
        function = PtxModule(ptx_of(facts["source"], facts["defines"], facts["arch"])).get_function(entry)
        function.only_blocks = self.only_blocks
        return function.prepare


def ptx_of(source: str, defines: Mapping[str, str | int], arch: int) -> str:
    """The PTX of one variant as `nvrtc.build` compiles it, kept in .cache/ptx of the checkout under the same key."""
    path = CACHE.parent / "ptx" / f"{nvrtc.key(source, defines, arch)}.ptx"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, nvrtc.compile_source(source, defines, arch).ptx)
    return path.read_text()


def stub_build(folder: Path, source: str, defines: Mapping[str, str | int], arch: int) -> Cubin:
    """In place of `nvrtc.build`: an empty cubin with the same facts beside it, for machines without NVRTC."""
    facts = {"source": source, "defines": {k: str(v) for k, v in defines.items()}, "arch": arch}
    text = json.dumps(facts)
    path = folder / f"{source}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.cubin"
    path.touch()
    _write(path.with_suffix(".json"), text)
    return Cubin(path, path.stem, 0, 0)


def _write(path: Path, text: str) -> None:
    """Under another name first: the threads of two devices build the same variant at once, and read it."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        fresh = Path(folder, path.name)
        fresh.write_text(text)
        fresh.replace(path)
