"""environment.yml and pyproject.toml name the same packages with the same bounds, and pip adds nothing to conda's."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())

# PyPI name -> conda-forge name, for every requirement of the base package and of the extras the environment covers.
CONDA_NAME = {
    "numpy": "numpy",
    "pyarrow": "pyarrow",
    "safetensors": "safetensors",
    "ml_dtypes": "ml_dtypes",
    "numba": "numba",
    "nvtx": "nvtx",
    "xxhash": "python-xxhash",
    "typer": "typer",
    "rich": "rich",
    "cupy-cuda13x": "cupy",
    "cuda-bindings": "cuda-bindings",
    "cuda-pathfinder": "cuda-pathfinder",
    "nvidia-cuda-nvrtc": "cuda-nvrtc",
    "nvidia-cuda-runtime": "cuda-cudart-dev",
    "huggingface_hub": "huggingface_hub",
    "pytest": "pytest",
    "hypothesis": "hypothesis",
    "nanoarrow": "nanoarrow",
    "PyYAML": "pyyaml",
    "jsonschema": "jsonschema",
    "coverage": "coverage",
    "pandas": "pandas",
    "duckdb": "python-duckdb",
    "hatchling": "hatchling",
}
EXTRAS = ("cuda13", "hub", "test")

# conda-forge builds these in step with the metapackage cuda-version, which therefore carries their bounds.
BOUND_BY_CUDA_VERSION = {"cuda-nvrtc", "cuda-cudart-dev"}

# In the environment without a counterpart on PyPI: the interpreter, its installer, and the C header of DLPack (PyPI's
# `dlpack` is an empty placeholder).
CONDA_ONLY = {"python", "pip", "cuda-version", "dlpack"}


def split(requirement: str) -> tuple[str, str]:
    """(name, bounds without spaces) of `name >=1,<2`, in conda's or pip's spelling."""
    name, bounds = re.fullmatch(r"([\w.-]+)\s*(.*)", requirement).groups()
    return name, bounds.replace(" ", "")


def conda_packages(environment: dict) -> dict[str, str]:
    return dict(split(d) for d in environment["dependencies"] if isinstance(d, str))


def pip_lines(environment: dict) -> list[str]:
    return [line for d in environment["dependencies"] if isinstance(d, dict) for line in d["pip"]]


def wanted(project: dict) -> dict[str, str]:
    """conda name -> bounds, as pyproject.toml asks for them."""
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *(r for e in EXTRAS for r in extras[e])]
    own = [split(r) for r in requirements if not r.startswith(project["name"])]
    conda = {CONDA_NAME[name]: bounds for name, bounds in own}
    bounds = {conda[name] for name in BOUND_BY_CUDA_VERSION}
    assert len(bounds) == 1, f"{sorted(BOUND_BY_CUDA_VERSION)} have different bounds in pyproject.toml: {bounds}"
    return conda | dict.fromkeys(BOUND_BY_CUDA_VERSION, "") | {"cuda-version": bounds.pop()}


def check(environment: dict, project: dict) -> None:
    have = conda_packages(environment)
    want = wanted(project)
    assert {n: b for n, b in have.items() if n in want} == want
    assert have.keys() - want.keys() == CONDA_ONLY - want.keys()


def test_names_and_bounds_agree() -> None:
    check(ENVIRONMENT, PROJECT)


def test_python_versions_agree() -> None:
    minors = [int(m[1]) for c in PROJECT["classifiers"] if (m := re.search(r"Python :: 3\.(\d+)", c))]
    low, high = min(minors), max(minors)
    assert PROJECT["requires-python"] == f">=3.{low}"
    assert conda_packages(ENVIRONMENT)["python"] == f">=3.{low},<3.{high + 1}"


@pytest.mark.parametrize(
    ("section", "old", "new"),
    [
        ("environment", "numpy >=2.1", "numpy >=2.0"),
        ("environment", "cuda-version >=13.0,<14", "cuda-version >=12.9,<13"),
        ("environment", "  - rich >=13.9\n", ""),
        ("environment", "  - dlpack\n", "  - dlpack\n  - cudatoolkit\n"),
        ("project", '"nvtx>=0.2.13"', '"nvtx>=0.2.14"'),
        ("project", '"rich>=13.9",', '"rich>=13.9", "requests>=2",'),
    ],
)
def test_a_difference_is_noticed(section: str, old: str, new: str) -> None:
    path = ROOT / ("environment.yml" if section == "environment" else "pyproject.toml")
    text = path.read_text()
    assert old in text
    changed = text.replace(old, new)
    environment = yaml.safe_load(changed) if section == "environment" else ENVIRONMENT
    project = tomllib.loads(changed)["project"] if section == "project" else PROJECT
    with pytest.raises((AssertionError, KeyError)):
        check(environment, project)


def test_base_package_requires_no_cupy() -> None:
    assert not [r for r in PROJECT["dependencies"] if r.startswith(("cupy", "cuda", "nvidia"))]


def test_kvikio_is_in_its_own_extras_only() -> None:
    extras = PROJECT["optional-dependencies"]
    assert (extras["gds12"], extras["gds13"]) == (["kvikio-cu12>=26.8"], ["kvikio-cu13>=26.8"])
    rest = [*PROJECT["dependencies"], *(r for e in extras if not e.startswith("gds") for r in extras[e])]
    assert not [r for r in [*rest, *conda_packages(ENVIRONMENT)] if "kvikio" in r or "gds" in r]


def test_pip_installs_this_package_and_nothing_else(tmp_path: Path) -> None:
    """conda hands the pip section to pip as a requirements file. Here pip may reach no index: that it plans the install
    of one package shows that it reads every line and finds every dependency present."""
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("\n".join(pip_lines(ENVIRONMENT)) + "\n")
    install = "-m pip install --dry-run --upgrade --no-index --no-build-isolation --disable-pip-version-check"
    done = subprocess.run(
        [sys.executable, *install.split(), "--requirement", requirements],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (plan,) = [line for line in done.stdout.splitlines() if line.startswith("Would install")]
    assert re.fullmatch(r"Would install arrowquant_gpu-\S+", plan), plan
