"""What cannot run here is a counted skip, or a failure where it is required; soak runs only when asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PLANTED = """
import pytest

@pytest.mark.gpu
def test_on_a_gpu(): pass

@pytest.mark.soak
def test_long(record_property): record_property("cases", 7)

def test_anywhere(): pass
"""


def run_planted(folder: Path, *options: str, require: str = "") -> tuple[int, str]:
    """Run the planted tests under this conftest, on a machine whose CUDA library finds no device."""
    (folder / "test_planted.py").write_text(PLANTED)
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider", *options]
    environment = {**os.environ, "ARROWQUANT_REQUIRE": require, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--config-file", ROOT / "pyproject.toml", "--rootdir", folder, folder],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_skips_are_counted_with_their_reason(tmp_path: Path) -> None:
    code, text = run_planted(tmp_path)
    assert code == 0, text
    account = text.partition("not run here")[2]
    assert "     1  gpu: " in account
    assert "     1  soak: " in account
    assert "1 passed, 1 skipped, 1 deselected" in account.splitlines()[-1]


def test_what_is_required_fails(tmp_path: Path) -> None:
    code, text = run_planted(tmp_path, require="gpu")
    assert code == 1
    assert "required here, but gpu: " in text


def test_an_unknown_requirement_is_an_error(tmp_path: Path) -> None:
    code, text = run_planted(tmp_path, require="gpus")
    assert code == pytest.ExitCode.USAGE_ERROR
    assert "gpus" in text


def test_soak_runs_when_asked_for_and_is_recorded(tmp_path: Path) -> None:
    record = tmp_path / "out" / "record.json"
    code, text = run_planted(tmp_path, "-m", "soak", "--record", str(record))
    assert code == 0, text
    written = json.loads(record.read_text())
    (test,) = written["tests"].values()
    assert (test["outcome"], test["cases"]) == ("passed", 7)
    assert written["totals"]["passed"] == 1
    assert {"date", "commit", "cpu", "cores", "gpu", "versions"} <= written["origin"].keys()
    assert str(tmp_path) not in record.read_text()
