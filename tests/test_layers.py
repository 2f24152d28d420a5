"""Imports go one way, and importing the package loads nothing heavy."""

from __future__ import annotations

import ast
import graphlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import arrowquant_gpu

PACKAGE = "arrowquant_gpu"
ROOT = Path(__file__).parent.parent

# A unit is a module or package directly under arrowquant_gpu/. It may import units of lower layers.
LAYERS = (
    ("errors", "dtypes", "grids", "schemes", "trace"),
    ("arrow_values", "dlpack"),
    ("arrow_weights", "device_arrow", "pinned"),
    ("tensor", "reference", "arrow_columns", "models"),
    ("backends", "interchange"),
    ("ops",),
    ("formats",),
    ("tables",),
    ("compute",),
    ("engine", "diffusion"),
    ("pipeline",),
    ("flight",),
    ("v2",),
    ("cli",),
)
LAYER = {unit: n for n, layer in enumerate(LAYERS) for unit in layer}
# The only imports between two units of one layer.
SIDEWAYS = {
    ("dtypes", "errors"),
    ("schemes", "errors"),
    ("schemes", "grids"),
    ("trace", "errors"),
    ("arrow_columns", "tensor"),
    ("tensor", "arrow_columns"),
}
# What the package's own front door offers to every layer.
FROM_ROOT = {"__version__"}

HEAVY = {
    "numba",
    "llvmlite",
    "cupy",
    "cuda",
    "torch",
    "typer",
    "rich",
    "huggingface_hub",
    "nanoarrow",
    "transformers",
    "kvikio",
    "matplotlib",
    "yaml",
    "jsonschema",
    "tomllib",
}


def read_package() -> dict[str, str]:
    """Dotted module name -> source text."""
    files = sorted((ROOT / PACKAGE).rglob("*.py"))
    names = {f: ".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for f in files}
    return {name: f.read_text() for f, name in names.items()}


def unit_of(module: str) -> str:
    """The unit of a dotted module name; files split off the command line belong to it."""
    parts = module.split(".")
    unit = parts[1] if len(parts) > 1 else ""
    return "cli" if unit.startswith("cli_") else unit


def imports(module: str, is_package: bool, tree: ast.AST, modules: set[str]) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported from this package below `tree`."""
    package = module if is_package else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names if a.name.split(".")[0] == PACKAGE)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            base = ".".join([*parents[: len(parents) + 1 - node.level], *filter(None, [node.module])])
            base = base if node.level else node.module or ""
            if base.split(".")[0] == PACKAGE:
                for alias in node.names:
                    full = f"{base}.{alias.name}"
                    yield node.lineno, full if full in modules or base == PACKAGE else base


def violations(sources: dict[str, str]) -> list[str]:
    """Every import that the layers forbid, as `module:line: reason`."""
    modules = set(sources)
    packages = {m for m in modules if any(n.startswith(f"{m}.") for n in modules)} | {PACKAGE}
    found, graph = [], {}
    for module, text in sources.items():
        unit = unit_of(module)
        if unit and unit not in LAYER:
            found.append(f"{module}: {unit} is in no layer")
            continue
        tree = ast.parse(text)
        for line, target in imports(module, module in packages, tree, modules):
            to = unit_of(target)
            if not unit or to == unit or to in FROM_ROOT:
                continue
            if to not in LAYER:
                found.append(f"{module}:{line}: imports {target} from the front door")
            elif LAYER[to] > LAYER[unit] or (LAYER[to] == LAYER[unit] and (unit, to) not in SIDEWAYS):
                way = "up" if LAYER[to] > LAYER[unit] else "sideways"
                found.append(f"{module}:{line}: imports {target}, {way} from layer {LAYER[unit]} to {LAYER[to]}")
        at_import = ast.Module([n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))], [])
        graph[module] = {t for _, t in imports(module, module in packages, at_import, modules)} - {module, PACKAGE}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as e:
        found.append(f"imports in a circle: {' -> '.join(e.args[1])}")
    return found


def loaded_by(statement: str) -> set[str]:
    """Top-level names of the modules that a fresh interpreter has loaded after `statement`."""
    code = f"{statement}\nimport sys, json\nprint(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_imports_go_down() -> None:
    assert violations(read_package()) == []


@pytest.mark.parametrize(
    ("module", "line", "reason"),
    [
        ("ops", "from .formats import checkpoint", "up"),
        ("schemes", "from .tensor import QuantizedTensor", "up"),
        ("formats", "from ..pipeline import quantize_checkpoint", "up"),
        ("formats.planted", "import arrowquant_gpu.cli", "up"),
        ("formats.planted", "def late():\n    from ..pipeline.plan import plan", "up"),
        ("backends.planted", "from ..interchange import as_weights", "sideways"),
        ("errors", "from . import schemes", "sideways"),
        ("ops", "from . import quantize", "front door"),
        ("utils", "", "is in no layer"),
        ("formats", "from . import planted", "circle"),
    ],
)
def test_a_forbidden_import_is_noticed(module: str, line: str, reason: str) -> None:
    sources = read_package()
    if reason == "circle":
        sources["arrowquant_gpu.formats.planted"] = "from . import nothing"
    name = f"{PACKAGE}.{module}"
    sources[name] = sources.get(name, "") + f"\n{line}\n"
    found = violations(sources)
    assert [f for f in found if reason in f and (f.startswith(name) or reason == "circle")], found


def test_every_layer_exists() -> None:
    assert {unit_of(m) for m in read_package()} - {""} == set(LAYER)


@pytest.mark.parametrize("module", [PACKAGE, f"{PACKAGE}.cli"])
def test_import_is_light(module: str) -> None:
    heavy = HEAVY - {"typer", "rich"} if module.endswith("cli") else HEAVY
    assert loaded_by(f"import {module}") & heavy == set()


def test_a_heavy_import_is_noticed() -> None:
    assert loaded_by(f"import {PACKAGE}, llvmlite") & HEAVY == {"llvmlite"}


def test_type_checkers_see_the_public_names() -> None:
    """What the package imports for type checkers is what it hands out at run time, from the same modules."""
    block = next(n for n in ast.parse((ROOT / PACKAGE / "__init__.py").read_text()).body if isinstance(n, ast.If))
    seen = {a.name: n.module for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert seen == arrowquant_gpu._HOME
    for name in arrowquant_gpu.__all__:
        assert hasattr(arrowquant_gpu, name), name


def test_contributing_lists_the_layers() -> None:
    rows = re.findall(r"^\| (`.*?`) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert [tuple(re.findall(r"`(\w+)`", row)) for row in reversed(rows)] == list(LAYERS)
