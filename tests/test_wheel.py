"""The wheel: complete, installable into an empty environment, and working from there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import numpy as np
import pytest

import arrowquant_gpu

from .fixtures import write_safetensors

ROOT = Path(__file__).parent.parent


def run(*command: object, cwd: Path) -> str:
    """stdout of a command that sees neither the checkout nor the caller's Python settings."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    build = "-m pip wheel --quiet --no-deps --no-index --no-build-isolation --disable-pip-version-check"
    run(sys.executable, *build.split(), "--wheel-dir", out, ROOT, cwd=out)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def bin_dir(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of an environment that holds the wheel. The libraries it needs are borrowed from the running environment,
    last on the path, so that nothing is downloaded and nothing of the checkout is in reach."""
    venv = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv)
    install = "install --quiet --no-deps --no-index --disable-pip-version-check"
    run(sys.executable, "-m", "pip", "--python", venv / "bin/python", *install.split(), wheel, cwd=venv)
    (site,) = venv.glob("lib/python3*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return venv / "bin"


def test_wheel_holds_the_package_and_the_kernels(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {f"{f.relative_to(ROOT)}" for f in (ROOT / "arrowquant_gpu").rglob("*.py")}
    kernels = {
        f"arrowquant_gpu/_kernels/{f.relative_to(ROOT / 'kernels')}"
        for f in (ROOT / "kernels").rglob("*")
        if f.suffix in {".cu", ".cuh"}
    }
    assert kernels, "there are no kernels to carry"
    assert modules | kernels | {"arrowquant_gpu/py.typed"} <= names
    assert {n.split("/")[0] for n in names} == {
        "arrowquant_gpu",
        f"arrowquant_gpu-{arrowquant_gpu.__version__}.dist-info",
    }


def test_installed_package_finds_its_kernels(bin_dir: Path, tmp_path: Path) -> None:
    code = "import arrowquant_gpu.backends.nvrtc as n; print(n.kernel_dir())"
    kernels = Path(run(bin_dir / "python", "-c", code, cwd=tmp_path).strip())
    assert kernels.is_relative_to(bin_dir.parent)
    assert (kernels / "common.cuh").is_file()


def test_installed_command_line(bin_dir: Path, tmp_path: Path) -> None:
    info = json.loads(run(bin_dir / "arrowquant", "info", "--json", cwd=tmp_path))
    assert info["version"] == arrowquant_gpu.__version__
    weights = np.random.default_rng(0).standard_normal((8, 256), dtype=np.float32)
    write_safetensors(tmp_path / "in.safetensors", {"layer.weight": weights})
    run(bin_dir / "arrowquant", "quantize", "in.safetensors", "out.parquet", "--device", "cpu", cwd=tmp_path)
    run(bin_dir / "arrowquant", "verify", "out.parquet", "--against", "in.safetensors", cwd=tmp_path)
