"""The CUDA backend over the stand-in for CuPy, as it is or with a fault planted in a copy of a source."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import shutil
import sys
import types
from collections.abc import Mapping
from pathlib import Path

import pytest

from arrowquant_gpu.backends import Backend, nvrtc

from .device import Host
from .fake_cupy import BACKEND, Loader, install
from .loaders import stub_build

# (what is replaced, what it is replaced with): the first must occur in the source.
Edit = tuple[str, str]


def backend_over(
    loader: Loader,
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    *,
    arch: int = 90,
    n_devices: int = 1,
    max_blocks: int | None = None,
    edit: Edit | None = None,
) -> tuple[Backend, Host]:
    """The backend of device 0 and the host it runs on, until the test ends.

    Cubins are stubs in `folder`, so that no NVRTC is needed. `max_blocks` bounds the grid, so that kernels loop. `edit`
    plants a fault in a copy of backends/cuda.py.
    """
    host = install(monkeypatch, loader, n_devices, arch)
    monkeypatch.setattr(nvrtc, "build", functools.partial(stub_build, folder))
    monkeypatch.setattr(nvrtc, "missing", lambda: None)
    module = importlib.import_module(BACKEND) if edit is None else edited_module(BACKEND, edit)
    if max_blocks is not None:
        monkeypatch.setattr(module, "BLOCKS_PER_SM", max_blocks)
    backend: Backend = module.CudaBackend(0)
    return backend, host


def edit_kernels(monkeypatch: pytest.MonkeyPatch, folder: Path, edits: Mapping[str, Edit]) -> None:
    """Let kernels be compiled from a copy of kernels/ in `folder`, with one edit in each of the files named."""
    shutil.copytree(nvrtc.kernel_dir(), folder / "kernels")
    for name, edit in edits.items():
        path = folder / "kernels" / name
        path.write_text(_applied(path.read_text(), edit, name))
    monkeypatch.setattr(nvrtc, "kernel_dir", lambda: folder / "kernels")


def edited_module(name: str, edit: Edit | None = None) -> types.ModuleType:
    """A fresh copy of a module of the package, with a fault planted in it, in place of the module itself."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    path, module = Path(spec.origin), types.ModuleType(name)
    module.__file__, module.__package__ = str(path), name.rpartition(".")[0]
    sys.modules[name] = module  # a NamedTuple looks its module up
    text = path.read_text()
    exec(compile(text if edit is None else _applied(text, edit, path.name), str(path), "exec"), vars(module))
    return module


def _applied(text: str, edit: Edit, name: str) -> str:
    old, new = edit
    if old not in text:
        raise ValueError(f"{name} has no {old!r} to plant a fault in")
    return text.replace(old, new)
