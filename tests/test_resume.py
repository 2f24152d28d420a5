"""An interrupted run, continued, gives the bytes of one that was not interrupted."""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arrowquant_gpu.engine.ring import anonymous_bytes
from arrowquant_gpu.errors import NonFiniteError, TargetError
from arrowquant_gpu.formats import Place
from arrowquant_gpu.formats.model_sink import ModelSink
from arrowquant_gpu.formats.pieces import Piece
from arrowquant_gpu.formats.row_sink import RowSink

from .fixtures import tiny_llama
from .resumed_runs import PIECE_BYTES, killed, leftover, n_noted, run, run_until, slow
from .snapshots import differences, nothing_changes, snapshot

ROOT = Path(__file__).parent.parent
FORMATS = ("compressed-tensors", "parquet", "parquet-tensors", "arrow", "gptq", "awq")
N_TENSORS = 21


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("model") / "source", shards=3, hidden=128)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes | str]]:
    """What lies beside an uninterrupted run's target `out`, by format."""
    made = {}
    for name in FORMATS:
        folder = tmp_path_factory.mktemp(name)
        assert len(run(source, folder / "out", format=name).plan.entries) == N_TENSORS
        made[name] = snapshot(folder)
    return made


def interrupted(source: Path, target: Path, n: int = 5, **options: Any) -> Path:
    """What a run leaves that is interrupted when n tensors are noted as finished."""
    with pytest.raises(KeyboardInterrupt) as caught:
        run_until(source, target, n, KeyboardInterrupt(), **options)
    (note,) = caught.value.__notes__
    noted = n_noted(target)
    assert n <= noted < N_TENSORS
    assert note == f"{noted} of {N_TENSORS} tensors are finished: run the same command with --resume to continue."
    path = leftover(target)
    assert path is not None
    return path


@pytest.mark.parametrize("n", [1, 12])
@pytest.mark.parametrize("name", FORMATS)
def test_an_interrupted_run_is_continued(
    source: Path, tmp_path: Path, whole: dict[str, dict[str, bytes | str]], name: str, n: int
) -> None:
    interrupted(source, tmp_path / "out", n, format=name)
    n_finished = n_noted(tmp_path / "out")
    result = run(source, tmp_path / "out", format=name, resume=True)
    assert result.run.resumed == n_finished
    assert differences(snapshot(tmp_path), whole[name]) == []


@pytest.mark.parametrize("scheme", ["int8_tensor_asym", "int3_g64"])
def test_error_figures_are_those_of_one_run(source: Path, tmp_path: Path, scheme: str) -> None:
    options = {"format": "parquet", "scheme": scheme, "validate": True}
    (tmp_path / "whole").mkdir()
    (tmp_path / "resumed").mkdir()
    run(source, tmp_path / "whole" / "out", **options)
    for n in (3, 9):
        interrupted(source, tmp_path / "resumed" / "out", n, resume=True, **options)
    assert run(source, tmp_path / "resumed" / "out", resume=True, **options).run.resumed >= 9
    assert differences(snapshot(tmp_path / "resumed"), snapshot(tmp_path / "whole")) == []


def test_the_run_that_continues_may_read_and_work_in_another_way(
    source: Path, tmp_path: Path, whole: dict[str, dict[str, bytes | str]]
) -> None:
    interrupted(source, tmp_path / "out", format="parquet")
    options = {"format": "parquet", "device": "cpu", "threads": 1, "read": "buffered"}
    # Over what this process holds of other tests.
    options["memory_limit"] = anonymous_bytes() + (1 << 30)
    assert run(source, tmp_path / "out", resume=True, **options).run.resumed >= 5
    assert differences(snapshot(tmp_path), whole["parquet"]) == []


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_tensor_is_done_again(
    source: Path,
    tmp_path: Path,
    whole: dict[str, dict[str, bytes | str]],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """One bit is flipped in a place of each of three finished tensors, of which the rest stays believed."""
    places: dict[str, list[Place]] = {}
    for sink in (ModelSink, RowSink):
        real = sink.places

        def noting(self: Any, piece: Piece, real: Callable[..., Any] = real) -> Any:
            found = real(self, piece)
            places.setdefault(piece.entry.info.name, []).extend(found)
            return found

        monkeypatch.setattr(sink, "places", noting)
    left = interrupted(source, tmp_path / "out", 8, format=name)
    lines = (left / ".arrowquant_journal.jsonl").read_text("ascii").splitlines()[1:]
    finished = [line.split('"name": "')[1].split('"')[0] for line in lines]
    rng = random.Random(0)
    for tensor in rng.sample(finished, 3):
        place = rng.choice([p for p in places[tensor] if p.n_bytes])
        with (left / place.file).open("r+b") as f:
            at = place.offset + rng.randrange(place.lines) * place.stride
            at += rng.randrange(place.n_bytes // place.lines)
            f.seek(at)
            byte = f.read(1)[0]
            f.seek(at)
            f.write(bytes([byte ^ 1 << rng.randrange(8)]))
    result = run(source, tmp_path / "out", format=name, resume=True)
    assert result.run.resumed == len(finished) - 3
    assert differences(snapshot(tmp_path), whole[name]) == []


def test_without_resume_it_begins_anew(
    source: Path, tmp_path: Path, whole: dict[str, dict[str, bytes | str]], caplog: pytest.LogCaptureFixture
) -> None:
    interrupted(source, tmp_path / "out", format="parquet")
    assert run(source, tmp_path / "out", format="parquet").run.resumed == 0
    assert "would have continued it" in caplog.text
    assert differences(snapshot(tmp_path), whole["parquet"]) == []


@pytest.mark.parametrize("change", ["source", "scheme", "ignore", "validate", "format", "version"])
def test_another_run_is_refused_and_the_first_can_still_go_on(
    source: Path,
    tmp_path: Path,
    whole: dict[str, dict[str, bytes | str]],
    monkeypatch: pytest.MonkeyPatch,
    change: str,
) -> None:
    interrupted(source, tmp_path / "out", format="parquet")
    options: dict[str, Any] = {"format": "parquet"}
    match change:
        case "source":
            other, words = (
                tiny_llama(tmp_path / "source", shards=3, hidden=128, seed=1),
                "source_hash was [0-9a-f]+ and",
            )
        case "version":
            monkeypatch.setattr("arrowquant_gpu.pipeline.quantize.__version__", "9.9")
            other, words = source, r"version was [0-9.a-z]+ and is 9\.9"
        case _:
            new = {"scheme": "int8_g64", "ignore": ["down_proj"], "validate": True, "format": "arrow"}[change]
            options[change] = new
            other, words = source, f"{'include, ignore' if change == 'ignore' else change}.* was .* and is "
    with nothing_changes(tmp_path), pytest.raises(TargetError, match=f"cannot be continued: .*{words}") as caught:
        run(other, tmp_path / "out", resume=True, **options)
    # To run the same command again would not help.
    assert not getattr(caught.value, "__notes__", [])
    monkeypatch.undo()
    assert run(source, tmp_path / "out", format="parquet", resume=True).run.resumed >= 5
    shutil.rmtree(tmp_path / "source", ignore_errors=True)
    assert differences(snapshot(tmp_path), whole["parquet"]) == []


def test_resume_keeps_to_the_rules_of_overwriting(
    source: Path, tmp_path: Path, whole: dict[str, dict[str, bytes | str]]
) -> None:
    run(source, tmp_path / "out", scheme="int8_g64")
    options = {"format": "compressed-tensors", "overwrite": True}
    with nothing_changes(tmp_path / "out"):
        interrupted(source, tmp_path / "out", **options)
    with nothing_changes(tmp_path), pytest.raises(TargetError, match="--overwrite"):
        run(source, tmp_path / "out", resume=True)
    assert run(source, tmp_path / "out", resume=True, **options).run.resumed >= 5
    assert differences(snapshot(tmp_path), whole["compressed-tensors"]) == []


def test_weights_at_fault_leave_nothing(source: Path, tmp_path: Path) -> None:
    with nothing_changes(tmp_path), pytest.raises(NonFiniteError):
        run_until(source, tmp_path / "out", 3, NonFiniteError("w", 1, 0, 0, (1,)))


# Killed with SIGKILL, at any moment, again and again.


def kill_and_resume(source: Path, target: Path, rng: random.Random, seconds: float, **options: Any) -> tuple[int, int]:
    """Kills a few runs one after the other, and lets the last one end: (kills, tensors that it had not to do)."""
    n_kills = 0
    for _ in range(rng.randint(1, 4)):
        moment = rng.uniform(0, seconds)
        n_kills += killed(source, target, seconds=moment, pause=slow, resume=True, **options)
        if target.exists():
            return n_kills, 0
    return n_kills, run(source, target, resume=True, **options).run.resumed


@pytest.mark.parametrize("n", [6, pytest.param(200, marks=pytest.mark.soak)])
def test_kill_9_at_random_moments(
    source: Path,
    tmp_path: Path,
    whole: dict[str, dict[str, bytes | str]],
    record_property: Callable[[str, object], None],
    n: int,
) -> None:
    seconds = {}
    # The first one starts the server.
    for name in (FORMATS[0], *FORMATS):
        start = time.perf_counter()
        assert not killed(source, tmp_path / name, format=name, overwrite=True, pause=slow)
        seconds[name] = time.perf_counter() - start
    rng, n_kills, resumed, n_chains = random.Random(n), 0, [], 0
    while n_kills < n:
        name, folder = FORMATS[n_chains % len(FORMATS)], tmp_path / str(n_chains)
        folder.mkdir()
        kills, n_resumed = kill_and_resume(source, folder / "out", rng, seconds[name], format=name)
        now = {k: v for k, v in snapshot(folder).items() if not k.startswith(".out")}
        assert differences(now, whole[name]) == [], (n_chains, kills, n_resumed)
        shutil.rmtree(folder)
        n_kills, n_chains = n_kills + kills, n_chains + 1
        resumed += [n_resumed] if n_resumed else []
    record_property("kills", n_kills)
    record_property("runs to the end", n_chains)
    record_property("of them continued from a journal", len(resumed))
    record_property("tensors that were not done again", sum(resumed))
    # If nothing was ever continued, nothing was shown.
    assert len(resumed) >= max(1, n_chains // 4)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["compressed-tensors", "parquet"])
def test_kill_9_at_every_change_of_a_commit(
    source: Path,
    tmp_path: Path,
    whole: dict[str, dict[str, bytes | str]],
    record_property: Callable[[str, object], None],
    name: str,
    overwrite: bool,
) -> None:
    n_resumed = 0
    for changes in range(50):
        target = tmp_path / str(changes) / "out"
        target.parent.mkdir()
        if overwrite:
            run(source, target, format=name, scheme="int8_g64")
        old = snapshot(target.parent)
        is_over = not killed(source, target, changes=changes, format=name, overwrite=overwrite)
        if not is_over and (overwrite or not target.exists()):
            n_resumed += run(source, target, format=name, overwrite=overwrite, resume=True).run.resumed > 0
        elif not is_over:
            # Complete; the next run is refused, and the one that may replace it removes what is left beside it.
            with nothing_changes(target.parent), pytest.raises(TargetError, match="exists"):
                run(source, target, format=name, resume=True)
            now = snapshot(target.parent)
            assert {k: v for k, v in now.items() if not k.startswith(".out")} == whole[name]
            run(source, target, format=name, overwrite=True, resume=True)
        assert old.keys() <= whole[name].keys()
        assert differences(snapshot(target.parent), whole[name]) == []
        if is_over:
            break
    else:
        raise AssertionError("the run never came to its end")
    record_property("kills", changes)
    record_property("runs that were continued", n_resumed)
    assert changes >= 2
    assert n_resumed >= 1


# Through the command line.


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_line(
    source: Path, tmp_path: Path, whole: dict[str, dict[str, bytes | str]], number: int, code: int
) -> None:
    target = tmp_path / "out"
    arguments = ["quantize", str(source), str(target), "--scheme", "int4_g64", "--device", "reference"]
    with subprocess.Popen(cli("lambda: 0.03", *arguments), cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        for _ in range(6000):
            if n_noted(target) >= 3 or process.poll() is not None:
                break
            time.sleep(0.01)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    n = n_noted(target)
    assert 3 <= n < N_TENSORS
    if number == signal.SIGINT:
        words = f"interrupted; {n} of {N_TENSORS} tensors are finished: run the same command with --resume to continue."
        assert errors == f"arrowquant: {words}\n"
    with nothing_changes(tmp_path):
        refused = subprocess.run(
            cli("at_once", *arguments[:4], "int8_g64", *arguments[5:], "--resume"), cwd=ROOT, **CAPTURED
        )
        assert refused.returncode == TargetError.exit_code
        assert "scheme was int4_g64_bf16 and is int8_g64_bf16" in refused.stderr
        assert "run the same command" not in refused.stderr
    done = subprocess.run(cli("at_once", *arguments, "--resume"), cwd=ROOT, **CAPTURED)
    assert done.returncode == 0, done.stderr
    assert f"{n} tensors had been finished before" in done.stdout + done.stderr
    assert differences(snapshot(tmp_path), whole["compressed-tensors"]) == []


CAPTURED: Any = {"capture_output": True, "text": True, "check": False}


def cli(pause: str, *arguments: str) -> list[str]:
    """The program, with the small pieces and the journal of resumed_runs.py."""
    code = f"""
        import sys
        from tests.resumed_runs import at_once, small_pieces
        from arrowquant_gpu.cli import main
        sys.argv = ["arrowquant", *{list(arguments)!r}]
        with small_pieces({pause}):
            main()
    """
    return [sys.executable, "-c", textwrap.dedent(code)]


def test_the_pieces_are_small(source: Path) -> None:
    """Or interruptions would come between tensors only."""
    assert 4 * PIECE_BYTES <= 128 * 128 * 2
