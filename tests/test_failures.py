"""Whatever goes wrong, nothing of the user's is lost and nothing partial appears under the final name."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from arrowquant_gpu.errors import NonFiniteError, TargetError
from arrowquant_gpu.formats.output import MANIFEST, Output
from arrowquant_gpu.pipeline import Manifest, quantize_checkpoint

from .fixtures import tiny_llama, write_safetensors
from .snapshots import differences, nothing_changes, snapshot

ROOT = Path(__file__).parent.parent


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "source", shards=2, hidden=128)


def quantize(source: Path, target: Path, **options: object) -> Manifest:
    return quantize_checkpoint(source, target, "int4_g64", device="reference", **options)  # type: ignore[call-overload]


def test_the_check_itself_notices_a_leftover(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="leftover"), nothing_changes(tmp_path):
        (tmp_path / "leftover").touch()


# Targets that must not be written.


def test_an_existing_target_is_refused(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    quantize(source, target)
    with nothing_changes(tmp_path), pytest.raises(TargetError, match=r"out exists; .*--overwrite"):
        quantize(source, target)
    (tmp_path / "file").write_text("mine")
    with nothing_changes(tmp_path), pytest.raises(TargetError, match="exists and is not a directory"):
        quantize(source, tmp_path / "file", overwrite=True)


def test_an_empty_directory_is_a_target(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert quantize(source, tmp_path / "out").files[0].parent == tmp_path / "out"


def test_overwrite_replaces_an_earlier_output_only(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    quantize(source, target)
    old = snapshot(target)
    quantize_checkpoint(source, target, "int8_g64", device="reference", overwrite=True)
    assert snapshot(target).keys() == old.keys()
    assert snapshot(target) != old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


@pytest.mark.parametrize("name", ["notes.txt", "sub/notes.txt", ".hidden"])
def test_overwrite_refuses_where_the_user_added_a_file(source: Path, tmp_path: Path, name: str) -> None:
    quantize(source, tmp_path / "out")
    (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "out" / name).write_text("mine")
    with nothing_changes(tmp_path), pytest.raises(TargetError, match=f"would lose: {name}"):
        quantize(source, tmp_path / "out", overwrite=True)


def test_overwrite_refuses_a_foreign_directory(source: Path, tmp_path: Path) -> None:
    other = tiny_llama(tmp_path / "other", seed=1)
    with nothing_changes(tmp_path), pytest.raises(TargetError, match="did not write"):
        quantize(source, other, overwrite=True)
    (other / MANIFEST).write_bytes(b"PAR1 but not really")
    with nothing_changes(tmp_path), pytest.raises(TargetError, match="did not write"):
        quantize(source, other, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_source_is_never_the_target(source: Path, tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "back").symlink_to(source)
    cases = {
        source: "is the source itself",
        tmp_path / "link": "is the source itself",
        tmp_path / "empty" / ".." / "source": "is the source itself",
        tmp_path / "empty" / "back" / "inside": "lies in the source",
        source / "int4": "lies in the source",
        tmp_path: "holds the source",
    }
    for target, words in cases.items():
        with nothing_changes(tmp_path), pytest.raises(TargetError, match=words):
            quantize(source, target, overwrite=overwrite)


def test_a_target_that_holds_what_the_source_links_to_is_refused(source: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for shard in source.glob("*.safetensors"):
        shard.rename(blobs / shard.name)
        shard.symlink_to(blobs / shard.name)
    with nothing_changes(tmp_path), pytest.raises(TargetError, match="holds the source"):
        quantize(source, blobs, overwrite=True)


def test_a_file_that_is_the_source_by_another_name_is_refused(tmp_path: Path) -> None:
    weights = write_safetensors(tmp_path / "m.safetensors", {"a.weight": np.ones((4, 64), np.float32)})
    (tmp_path / "soft").symlink_to(weights)
    os.link(weights, tmp_path / "hard")
    for name in ("m.safetensors", "soft", "hard"):
        with nothing_changes(tmp_path), pytest.raises(TargetError, match="is the source itself"):
            quantize(weights, tmp_path / name, overwrite=True)


def test_a_missing_folder_is_named(source: Path, tmp_path: Path) -> None:
    with nothing_changes(tmp_path), pytest.raises(TargetError, match=r"the folder .*nowhere does not exist"):
        quantize(source, tmp_path / "nowhere" / "out")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_directory_that_cannot_be_made(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(path: Path, *args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with nothing_changes(tmp_path), pytest.raises(TargetError, match="not writable") as caught:
        quantize(source, tmp_path / "out")
    assert isinstance(caught.value.__cause__, OSError)


# Runs that end early.


def test_a_full_disk_is_noticed_before_the_work(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    seen: list[str] = []
    with nothing_changes(tmp_path), pytest.raises(TargetError, match=r"disk is full: [0-9,]+ bytes are needed"):
        quantize(source, tmp_path / "out", progress=lambda done, total, name: seen.append(name))
    assert seen == []


def test_a_file_size_limit_of_the_process(source: Path, tmp_path: Path) -> None:
    code = f"""
        import resource
        from pathlib import Path
        from arrowquant_gpu.errors import TargetError
        from arrowquant_gpu.pipeline import quantize_checkpoint
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
        try:
            quantize_checkpoint({str(source)!r}, {str(tmp_path / "out")!r}, "int4_g64", device="reference")
        except TargetError as e:
            print(e)
    """
    with nothing_changes(tmp_path):
        assert "ulimit -f" in run_python(code).stdout


def test_the_disk_fills_while_writing(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.pwrite, []

    def fills(fd: int, data: memoryview, offset: int) -> int:
        calls.append(offset)
        if len(calls) > 30:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", fills)
    with nothing_changes(tmp_path), pytest.raises(TargetError, match="disk is full"):
        quantize(source, tmp_path / "out")


def test_short_writes_are_continued(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize(source, tmp_path / "whole")
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[: max(1, len(data) // 3)], offset))
    quantize(source, tmp_path / "pieces")
    assert differences(snapshot(tmp_path / "whole"), snapshot(tmp_path / "pieces")) == []


def test_weights_that_are_not_finite_leave_no_output(tmp_path: Path) -> None:
    good = np.ones((64, 64), np.float32)
    bad = good.copy()
    bad[40, 3], bad[41, 0], bad[50, 50] = np.nan, np.inf, np.nan
    source = write_safetensors(tmp_path / "m.safetensors", {"a.weight": good, "b.weight": bad, "c.weight": good})
    with nothing_changes(tmp_path), pytest.raises(NonFiniteError) as caught:
        quantize(source, tmp_path / "out.parquet")
    error = caught.value
    assert (error.name, error.n_nan, error.n_inf, error.first) == ("b.weight", 2, 1, 40 * 64 + 3)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_leaves_no_output(source: Path, tmp_path: Path, error: type[BaseException]) -> None:
    def stop(done: int, total: int, name: str) -> None:
        raise error("stop")

    with nothing_changes(tmp_path), pytest.raises(error, match="stop"):
        quantize(source, tmp_path / "out", progress=stop)
    quantize(source, tmp_path / "out")
    with nothing_changes(tmp_path), pytest.raises(error, match="stop"):
        quantize_checkpoint(source, tmp_path / "out", "int8_g64", device="reference", overwrite=True, progress=stop)


def test_interrupted_by_a_signal(source: Path, tmp_path: Path) -> None:
    with nothing_changes(tmp_path):
        done = run_python(killed_by(source, tmp_path / "out", signal.SIGINT), check=False)
        assert "KeyboardInterrupt" in done.stderr


def test_a_killed_run_leaves_only_what_the_next_one_removes(source: Path, tmp_path: Path) -> None:
    done = run_python(killed_by(source, tmp_path / "out", signal.SIGKILL), check=False)
    assert done.returncode == -signal.SIGKILL
    left = [p.name for p in tmp_path.iterdir() if p.name != "source"]
    assert len(left) == 1
    assert left[0].startswith(".out.arrowquant-")
    assert left[0].endswith(".tmp")
    # A run for another target leaves it alone, the next one for the same target does not.
    quantize(source, tmp_path / "out2")
    assert (tmp_path / left[0]).is_dir()
    quantize(source, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out2", "source"]


def test_a_run_killed_while_replacing_loses_nothing(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    quantize(source, target)
    old = snapshot(target)
    # Killed between the two renames: the old output has been set aside, the new one is not in its place yet.
    code = f"""
        import os, signal
        from pathlib import Path
        from arrowquant_gpu.pipeline import quantize_checkpoint
        rename = Path.rename
        def die(self, target):
            result = rename(self, target)
            if str(target).endswith(".previous"):
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        Path.rename = die
        quantize_checkpoint({str(source)!r}, {str(target)!r}, "int8_g64", device="reference", overwrite=True)
    """
    assert run_python(code, check=False).returncode == -signal.SIGKILL
    assert not target.exists()
    with pytest.raises(TargetError, match="exists"):
        quantize(source, target)
    assert snapshot(target) == old
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


def test_the_old_output_is_put_back_where_the_new_one_cannot_be_placed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize(source, tmp_path / "out")
    real = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp" and target.name == "out":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with nothing_changes(tmp_path), pytest.raises(TargetError, match="Input/output error"):
        quantize(source, tmp_path / "out", overwrite=True)


def test_what_was_set_aside_is_not_removed_beside_a_new_output(source: Path, tmp_path: Path) -> None:
    aside = tmp_path / ".out.arrowquant-0123456789ab.previous"
    quantize(source, tmp_path / "out")
    (tmp_path / "out").rename(aside)
    quantize(source, tmp_path / "elsewhere")
    (tmp_path / "elsewhere").rename(tmp_path / "out")
    with nothing_changes(tmp_path), pytest.raises(TargetError, match=r"\.previous is what .*out was before"):
        quantize(source, tmp_path / "out", overwrite=True)


def test_two_runs_for_one_target(source: Path, tmp_path: Path) -> None:
    first = Output(tmp_path / "out", is_directory=True)
    first.begin()
    with nothing_changes(tmp_path), pytest.raises(TargetError, match="being written by another run"):
        quantize(source, tmp_path / "out")
    first.abort()
    quantize(source, tmp_path / "out")


def test_a_foreign_file_under_the_name_of_the_manifest_is_not_replaced(tmp_path: Path) -> None:
    weights = write_safetensors(tmp_path / "m.safetensors", {"a.weight": np.ones((4, 64), np.float32)})
    (tmp_path / "m.parquet.manifest.parquet").write_text("mine")
    with nothing_changes(tmp_path), pytest.raises(TargetError, match="is not a manifest"):
        quantize(weights, tmp_path / "m.parquet", overwrite=True)


def killed_by(source: Path, target: Path, number: int) -> str:
    """A program that sends itself a signal in the middle of a run."""
    return f"""
        import os
        from arrowquant_gpu.pipeline import quantize_checkpoint
        def progress(done, total, name):
            os.kill(os.getpid(), {int(number)})
        quantize_checkpoint({str(source)!r}, {str(target)!r}, "int4_g64", device="reference", progress=progress)
    """


def run_python(code: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(program, cwd=ROOT, capture_output=True, text=True, check=check)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_wait_for_the_end_of_what_must_be_whole(number: signal.Signals) -> None:
    """Also one that another thread than the main one receives: NumPy's are there before any of ours."""
    code = f"""
        import os, signal, sys, threading, time
        from arrowquant_gpu.engine.interrupts import no_interrupt

        class Told(BaseException):
            pass

        def tell(number, frame):
            raise Told

        signal.signal({number:d}, tell)
        idle = threading.Event()
        threading.Thread(target=idle.wait, daemon=True).start()
        is_whole = False
        try:
            with no_interrupt():
                os.kill(os.getpid(), {number:d})
                time.sleep(0.1)
                is_whole = True
            sys.exit("the signal was lost")
        except Told:
            assert is_whole
        assert signal.getsignal({number:d}) is tell
    """
    run_python(code)
