"""Which tests run here, and a closing account of those that did not.

Markers name what a test needs (tests/needs.py). What is missing is a skip with its reason, or a failure where
`ARROWQUANT_REQUIRE` (a comma list of markers) says that it must be there: continuous integration sets it, so that
nothing vanishes in silence. Tests marked soak are deselected unless `-m` asks for them. `--record FILE` writes what
ran, for how long, and the counts that tests report through `record_property`, as JSON.
"""

from __future__ import annotations

import functools
import os
import re
import signal
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from . import record
from .needs import NEEDS

_N_SOAK = pytest.StashKey[int]()
_REQUIRED = pytest.StashKey[frozenset[str]]()

# Tests time nothing, so a slow machine is no failure; a sample is the same on every machine and in every run.
_UNTIMED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "database": None}
settings.register_profile("sample", derandomize=True, **_UNTIMED)
settings.register_profile("soak", max_examples=5000, print_blob=True, **_UNTIMED)


@functools.cache
def _missing(marker: str) -> str | None:
    return NEEDS[marker]()


def _asks_for_soak(config: pytest.Config) -> bool:
    return "soak" in config.getoption("markexpr").replace("not soak", "")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, metavar="FILE", help="write outcomes and reported counts as JSON")


def pytest_configure(config: pytest.Config) -> None:
    # A shell ignores Ctrl-C for what it starts with `&`, and every process that a test starts would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    settings.load_profile("soak" if _asks_for_soak(config) else "sample")
    required = frozenset(filter(None, os.environ.get("ARROWQUANT_REQUIRE", "").split(",")))
    if unknown := required - NEEDS.keys():
        raise pytest.UsageError(f"ARROWQUANT_REQUIRE names {sorted(unknown)}; the markers are {sorted(NEEDS)}")
    config.stash[_REQUIRED] = required
    config.stash[_N_SOAK] = 0
    config.pluginmanager.register(_Doctests(), "doctests-of-optional-modules")


class _Doctests:
    """Leaves out the doctests of modules that import a library which is not there: backends/cuda.py without CuPy.

    A plugin and not a plain hook, since those of this file see only what lies in tests/.
    """

    def __init__(self) -> None:
        self.left_out: Counter[str] = Counter()

    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        if collection_path.suffix != ".py" or collection_path.is_relative_to(Path(__file__).parent):
            return None
        imported = re.findall(r"^(?:import|from) (cupy|cuda)\b", collection_path.read_text(), re.MULTILINE)
        if not (absent := sorted({name for name in imported if find_spec(name) is None})):
            return None
        self.left_out[f"doctests of modules that import {', '.join(absent)}, not installed"] += 1
        return True


@pytest.hookimpl(trylast=True)  # after -m and -k, so that only what they would have run is counted
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if _asks_for_soak(config):
        return
    soak = [i for i in items if i.get_closest_marker("soak")]
    if soak:
        config.stash[_N_SOAK] = len(soak)
        config.hook.pytest_deselected(items=soak)
        items[:] = [i for i in items if not i.get_closest_marker("soak")]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in NEEDS:
        if item.get_closest_marker(marker) and (reason := _missing(marker)):
            if marker in item.config.stash[_REQUIRED]:
                pytest.fail(f"required here, but {marker}: {reason}", pytrace=False)
            pytest.skip(f"{marker}: {reason}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if path := config.getoption("record"):
        _write_record(path, terminalreporter.stats)
    reasons = config.pluginmanager.get_plugin("doctests-of-optional-modules").left_out.copy()
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons[reason.removeprefix("Skipped: ")] += 1
    if n := config.stash.get(_N_SOAK, 0):
        reasons["soak: full counts, run by make soak"] = n
    if not reasons:
        return
    terminalreporter.section("not run here")
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"{count:6d}  {reason}")


def _write_record(path: Path, stats: dict[str, list[pytest.TestReport]]) -> None:
    """One entry per test that ran: outcome, seconds, and its reported counts. Skipped ones as a number."""
    tests = {
        report.nodeid: {"outcome": outcome, "seconds": round(report.duration, 1), **dict(report.user_properties)}
        for outcome in ("passed", "failed", "error")
        for report in stats.get(outcome, [])
    }
    totals = {outcome: len(stats.get(outcome, [])) for outcome in ("passed", "failed", "error", "skipped")}
    record.write(path, {"totals": totals, "tests": dict(sorted(tests.items()))})
