"""The command line: options reach the library, results are printed, errors are one paragraph and an exit code."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

import arrowquant_gpu
from arrowquant_gpu import backends, cli, cli_report, cli_run, pipeline
from arrowquant_gpu.errors import ArrowQuantError
from arrowquant_gpu.formats import hub
from arrowquant_gpu.pipeline.widths import Widths

from .fixtures import sparse_llama, tiny_llama, write_safetensors

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
COMMAND = [sys.executable, "-m", "arrowquant_gpu.cli"]


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def succeed(*arguments: object) -> str:
    """stdout of a command that must work and keep stderr clean."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout


def document(*arguments: object) -> dict[str, Any]:
    return json.loads(succeed(*arguments, "--json"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny sharded Llama directory."""
    return tiny_llama(tmp_path_factory.mktemp("model") / "llama", dtype="bfloat16", shards=2)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A lone file with one matrix and one vector."""
    rng = np.random.default_rng(5)
    tensors = {"fc.weight": rng.standard_normal((16, 256), np.float32), "fc.bias": rng.standard_normal(16, np.float32)}
    return write_safetensors(tmp_path / "weights.safetensors", tensors)


def test_a_model_goes_round(model: Path, tmp_path: Path) -> None:
    quantized, decoded = tmp_path / "quantized", tmp_path / "decoded"
    made = document("quantize", model, quantized, "--scheme", "int8_g32", "--device", "cpu", "--validate")
    assert made["device"] == {"name": "cpu", "reason": "asked for"}
    assert made["summary"]["n_quantized"] == sum(t["action"] == "quantized" for t in made["tensors"]) > 0
    assert made["summary"]["worst_cosine"] > 0.999
    assert {t["name"] for t in made["tensors"]} == {t["name"] for t in document("inspect", model)["tensors"]}
    seen = document("inspect", quantized)
    assert seen["format"] == "compressed-tensors"
    assert seen["n_quantized"] == made["summary"]["n_quantized"]
    assert seen["bytes"] == sum(t["bytes"] for t in seen["tensors"])
    verified = document("verify", quantized, "--against", model, "--device", "cpu")
    cosines = [t["cosine"] for t in verified["tensors"] if t["cosine"] is not None]
    assert cosines == sorted(cosines)
    assert verified["summary"]["n_failed"] == 0
    back = document("dequantize", quantized, decoded, "--device", "cpu")
    assert back["summary"]["n_decoded"] == made["summary"]["n_quantized"]
    assert document("inspect", decoded)["n_tensors"] == seen["n_tensors"]


def test_a_directory_of_parquet_files_goes_round(model: Path, tmp_path: Path) -> None:
    quantized = tmp_path / "quantized"
    options = ("--format", "parquet-tensors", "--compression", "zstd", "--device", "cpu")
    made = document("quantize", model, quantized, "--scheme", "int8_g32", *options)
    seen = document("inspect", quantized)
    assert (seen["format"], seen["n_quantized"]) == ("parquet-tensors", made["summary"]["n_quantized"])
    assert len(list((quantized / "tensors").iterdir())) == seen["n_tensors"]
    assert document("verify", quantized, "--against", model, "--device", "cpu")["summary"]["n_failed"] == 0
    back = document("dequantize", quantized, tmp_path / "decoded", "--device", "cpu")
    assert back["summary"]["n_decoded"] == made["summary"]["n_quantized"]
    refused = run("quantize", model, tmp_path / "other", "--compression", "zstd", "--device", "cpu")
    assert refused.exit_code == 7
    assert "compressed-tensors cannot be written with compression 'zstd'" in refused.stderr


def test_text_names_what_was_done(model: Path, weights: Path, tmp_path: Path) -> None:
    text = succeed("quantize", weights, tmp_path / "q.parquet", "--device", "cpu", "--validate")
    assert "(parquet)" in text
    assert "1 of 2 tensors were quantized to int4_g128" in text
    assert "on cpu (asked for)" in text
    assert "fc.weight" in text.partition("worst 1 by cosine")[2]
    text = succeed("verify", tmp_path / "q.parquet", "--against", weights, "--device", "cpu")
    assert "1 quantized tensors, 1 kept ones equal to the original, 0 problems" in text
    assert "fc.weight" in succeed("inspect", tmp_path / "q.parquet")
    assert "2 tensors, 0 quantized" in succeed("inspect", weights)
    text = succeed("dequantize", tmp_path / "q.parquet", tmp_path / "d.safetensors", "--dtype", "float16")
    assert "1 of 2 tensors were decoded" in text
    assert all(line == line.rstrip() for line in succeed("inspect", model).splitlines())


def test_a_dry_run_shows_every_tensor_and_writes_nothing(model: Path, tmp_path: Path) -> None:
    # A dry run needs no device, so that a plan can be made where there is no GPU.
    arguments = ("quantize", model, tmp_path / "out", "--dry-run", "--device", "cuda", "--scheme", "int4_g32")
    text, planned = succeed(*arguments), document(*arguments)
    for t in planned["tensors"]:
        (line,) = [line for line in text.splitlines() if line.split()[:1] == [t["name"]]]
        assert t["action"] in line
        assert t["reason"] in line
    assert planned["summary"]["bytes_after"] == sum(t["bytes_after"] for t in planned["tensors"])
    assert "would be quantized" in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "scheme"),
    [
        ([], "int4_g128"),
        (["--bits", "3"], "int3_g128"),
        (["--group-size", "64", "--asymmetric"], "int4_g64_asym"),
        (["--bits", "8", "--group-size", "channel"], "int8_channel"),
        (["--group-size", "tensor"], "int4_tensor"),
        (["--scheme", "int6_g32_asym_bf16"], "int6_g32_asym_bf16"),
        (["--profile", "edge"], "int2_g256_asym"),
        (["--profile", "local"], "int4_g128_asym"),
        (["--profile", "cloud"], "int8_g64_asym"),
        (["--profile", "edge", "--bits", "3", "--group-size", "channel"], "int3_channel_asym"),
    ],
)
def test_scheme_options(weights: Path, tmp_path: Path, options: list[str], scheme: str) -> None:
    assert document("quantize", weights, tmp_path / "q", "--dry-run", *options)["summary"]["scheme"] == scheme


def test_options_reach_the_library(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def spy(src: Path, dst: Path, scheme: object, **options: Any) -> None:
        seen.update(options, src=src, dst=dst)
        raise ArrowQuantError("enough")

    monkeypatch.setattr(pipeline, "quantize_checkpoint", spy)
    given = "--format arrow --compression zstd --device cpu,reference --threads 2 --include a --include b --ignore c"
    more = "--validate --overwrite --resume --memory-limit 1.5GiB --read direct --timeline t.json"
    more += " --min-accuracy 0.5 --entropy --sensitive raise --fail-fast"
    more += " --tensor-scheme a=b=int8_channel --recipe r.yaml --expect-quantized 90%"
    more += " --format-option a=b --format-option c=d=e --max-shard-size 5GB --allow-requantize"
    assert run("quantize", weights, tmp_path / "q", *given.split(), *more.split()).exit_code == 1
    paths = {"src": weights, "dst": tmp_path / "q", "timeline": Path("t.json")}
    choices = {"format": "arrow", "device": ["cpu", "reference"], "threads": 2, "include": ["a", "b"], "ignore": ["c"]}
    widths = Widths(0.5, entropy=True, sensitive="raise", fail_fast=True)
    flags = {"validate": True, "overwrite": True, "resume": True, "progress": None, "widths": widths}
    others = {"memory_limit": 3 << 29, "read": "direct", "compression": "zstd", "diffusion": None}
    rules = {"tensor_schemes": [("a=b", "int8_channel")], "recipe": Path("r.yaml"), "expect_quantized": 0.9}
    written = {"format_options": {"a": "b", "c": "d=e"}, "max_shard_size": 5 * 10**9, "allow_requantize": True}
    assert seen == paths | choices | flags | others | rules | written


def test_two_devices_share_one_run(model: Path, tmp_path: Path) -> None:
    succeed("quantize", model, tmp_path / "one", "--device", "reference", "--scheme", "int4_g32")
    told = document("quantize", model, tmp_path / "two", "--device", "reference,cpu", "--scheme", "int4_g32")
    assert told["device"]["name"] == "reference, cpu"
    assert told["summary"]["devices"] == ["reference", "cpu"]
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two


def test_a_memory_limit_that_is_too_small_says_what_is_needed(weights: Path, tmp_path: Path) -> None:
    result = run("quantize", weights, tmp_path / "q", "--device", "cpu", "--memory-limit", "1MB")
    assert result.exit_code == 3
    assert re.search(r"memory limit 1 MB: this model needs at least \d+ MB", result.stderr)
    assert not (tmp_path / "q").exists()
    needed = int(re.findall(r"at least (\d+) MB", result.stderr)[0]) + 20
    succeed("quantize", weights, tmp_path / "q", "--device", "cpu", "--memory-limit", f"{needed} MB")


def test_a_timeline_is_written(weights: Path, tmp_path: Path) -> None:
    succeed("quantize", weights, tmp_path / "q", "--device", "cpu", "--timeline", tmp_path / "t.json")
    events = json.loads((tmp_path / "t.json").read_text())
    events = events["traceEvents"] if isinstance(events, dict) else events
    assert {e["cat"] for e in events if e["ph"] == "X"} == {"plan", "read", "kernel", "write"}


def test_include_and_ignore(model: Path, tmp_path: Path) -> None:
    options = ("--include", "embed_tokens", "--ignore", r"layers\.0\.", "--format", "parquet", "--dry-run")
    planned = document("quantize", model, tmp_path / "q", *options)
    actions = {t["name"]: t["action"] for t in planned["tensors"]}
    assert actions["model.embed_tokens.weight"] == "quantized"
    assert {a for n, a in actions.items() if ".layers.0." in n} == {"kept"}


def test_a_hub_id_is_a_source(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every place where a checkpoint is read. What ids mean is tested in test_hub.py."""
    known = {"org/name": weights, "org/small@v1": tmp_path / "q.parquet"}
    monkeypatch.setattr(hub, "resolve", lambda src: known.get(src, Path(src)))
    succeed("quantize", "org/name", tmp_path / "q.parquet", "--device", "cpu")
    assert document("inspect", "org/name")["n_tensors"] == 2
    succeed("verify", "org/small@v1", "--against", "org/name", "--device", "cpu")
    succeed("dequantize", "org/small@v1", tmp_path / "d.safetensors", "--device", "cpu")


def _nan(folder: Path) -> Path:
    return write_safetensors(folder / "nan.safetensors", {"fc.weight": np.full((4, 64), np.nan, np.float32)})


# (exit code, command line with MODEL, WEIGHTS, NAN and OUT replaced, what the message must name)
ERRORS = [
    (2, "quantize WEIGHTS OUT --scheme int9_g128", "9 bits"),
    (2, "quantize WEIGHTS OUT --scheme int4_g128 --bits 4", "--scheme"),
    (2, "quantize WEIGHTS OUT --group-size many", "many"),
    (3, "quantize WEIGHTS OUT --device cpu --memory-limit much", "much"),
    (3, "quantize WEIGHTS OUT --device cpu --read tape", "tape"),
    (3, "quantize WEIGHTS OUT --device cpu --read gds", "GPU memory"),
    (4, "quantize WEIGHTS OUT --device cpu,cpu", "different"),
    (4, "quantize WEIGHTS OUT --device all", "every GPU"),
    (2, "quantize WEIGHTS OUT --profile desert", "edge, local, cloud"),
    (2, "quantize WEIGHTS OUT --profile edge --scheme int4_g64", "--group-size"),
    (3, "quantize NAN OUT --device cpu", "fc.weight"),
    (3, "quantize NAN OUT --device cpu --profile edge", "fc.weight"),
    (3, "quantize WEIGHTS OUT --min-accuracy 1.5", "1.5"),
    (3, "quantize WEIGHTS OUT --sensitive often", "often"),
    (3, "quantize WEIGHTS OUT --fail-fast", "min_accuracy"),
    (4, "quantize WEIGHTS OUT --device cuda", "cuda"),
    (4, "quantize WEIGHTS OUT --device tpu", "tpu"),
    (5, "quantize OUT/none WEIGHTS", "none"),
    (5, "inspect MODEL/config.json", "config.json"),
    (5, "verify WEIGHTS --against WEIGHTS --device cpu", "weights.safetensors"),
    (6, "quantize WEIGHTS WEIGHTS --device cpu", "source"),
    (6, "quantize WEIGHTS MODEL --device cpu --overwrite", "llama"),
    (7, "quantize MODEL OUT --scheme int3_g32 --device cpu", "int3_g32"),
    (7, "quantize WEIGHTS OUT --format onnx --device cpu", "onnx"),
    (9, "quantize WEIGHTS OUT --ignore fc --device cpu", "--include"),
    (10, "quantize WEIGHTS OUT --min-accuracy 1 --device cpu", "fc.weight"),
    (10, "quantize WEIGHTS OUT --profile edge --min-accuracy 0.95 --fail-fast --device cpu", "fc.weight"),
    (10, "quantize WEIGHTS OUT --min-accuracy 1 --device cpu --dry-run", "--ignore"),
    (9, "quantize WEIGHTS OUT --include nothing --device cpu", "nothing"),
]


@pytest.mark.parametrize(("code", "line", "names"), ERRORS, ids=[e[1].replace("/", "-") for e in ERRORS])
def test_an_error_is_one_paragraph_and_an_exit_code(
    code: int, line: str, names: str, model: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_cuda_usable", lambda: (False, "there is none in this test"))
    before = sorted(p.name for p in tmp_path.iterdir())
    words = {"WEIGHTS": weights, "MODEL": model, "OUT": tmp_path / "out"}
    if "NAN" in line:
        words["NAN"] = _nan(tmp_path)
        before.append("nan.safetensors")
    for word, path in words.items():
        line = line.replace(word, str(path))
    result = run(*line.split(" "))
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("arrowquant: ")
    assert result.stderr.count("\n") == 1
    assert names in result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(before)


def test_verify_fails_under_the_threshold_and_still_prints(weights: Path, tmp_path: Path) -> None:
    succeed("quantize", weights, tmp_path / "q.parquet", "--scheme", "int2_g128", "--device", "cpu")
    arguments = ("verify", tmp_path / "q.parquet", "--against", weights, "--device", "cpu", "--min-cosine", "0.9999")
    result = run(*arguments)
    assert result.exit_code == 8
    assert "fc.weight" in result.stdout
    assert "fc.weight" in result.stderr
    failed = run(*arguments, "--json")
    assert failed.exit_code == 8
    assert json.loads(failed.stdout)["summary"]["n_failed"] == 1


def test_verify_finds_one_wrong_code(weights: Path, tmp_path: Path) -> None:
    """The check of steps sees what a cosine does not, and can be turned off."""
    succeed("quantize", weights, tmp_path / "q.parquet", "--scheme", "int8_g128", "--device", "cpu")
    tensors = load_file(weights)
    tensors["fc.weight"][3, 7] += np.float32(0.05)
    changed = write_safetensors(tmp_path / "changed.safetensors", tensors)
    assert run("verify", tmp_path / "q.parquet", "--against", changed, "--device", "cpu").exit_code == 8
    succeed("verify", tmp_path / "q.parquet", "--against", changed, "--device", "cpu", "--no-within-step")


def test_a_bug_is_no_traceback_unless_asked_for(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(pipeline, "quantize_checkpoint", broken)
    arguments = ("quantize", weights, tmp_path / "q", "--device", "cpu")
    result = run(*arguments)
    assert result.exit_code == cli_run.BUG
    assert "planted" in result.stderr
    assert "Traceback" not in result.stderr
    assert "Traceback" in run(*arguments, "--debug").stderr


def test_quiet_prints_nothing_and_verbose_more(weights: Path, tmp_path: Path) -> None:
    assert succeed("quantize", weights, tmp_path / "a.parquet", "--device", "cpu", "--quiet") == ""
    loud = run("quantize", weights, tmp_path / "b.parquet", "--device", "cpu", "-vv")
    assert loud.exit_code == 0
    assert "device cpu" in loud.stderr


def test_json_has_no_infinity() -> None:
    assert cli_report._plain({"a": [float("inf"), -float("inf"), float("nan"), 1.5], "b": (1, None)}) == {
        "a": [None, None, None, 1.5],
        "b": [1, None],
    }


def test_info_names_versions_devices_and_the_choice() -> None:
    told = document("info")
    assert told["version"] == arrowquant_gpu.__version__
    assert told["versions"]["numpy"] == np.__version__
    assert told["devices"][0]["name"] == "cpu"
    assert told["auto"]["name"] in {d["name"] for d in told["devices"]}
    assert told["auto"]["reason"] in succeed("info")


@pytest.mark.parametrize("command", [[], ["quantize"], ["inspect"], ["dequantize"], ["verify"], ["info"]])
def test_help_teaches(command: list[str]) -> None:
    text = succeed(*command, "--help")
    assert "Example: arrowquant" in text
    assert run("--version").stdout == f"arrowquant {arrowquant_gpu.__version__}\n"


def test_progress_is_drawn_on_a_terminal_only(tmp_path: Path) -> None:
    """The source is large enough for more than one report of progress: a rate takes two."""
    source = sparse_llama(tmp_path / "source", 0.25)
    arguments = [*COMMAND, "quantize", source, tmp_path / "a", "--device", "cpu"]
    piped = subprocess.run(arguments, env=ENVIRONMENT, capture_output=True, check=True)
    assert piped.stderr == b""
    assert b"\x1b" not in piped.stdout
    ours, theirs = pty.openpty()
    arguments[5] = tmp_path / "b"
    process = subprocess.Popen(
        arguments, env={**ENVIRONMENT, "TERM": "xterm"}, stdout=subprocess.DEVNULL, stderr=theirs
    )
    os.close(theirs)
    drawn = b""
    try:
        while chunk := os.read(ours, 4096):
            drawn += chunk
    except OSError:  # Linux reports the other side's end as an error
        pass
    finally:
        os.close(ours)
    assert process.wait() == 0
    assert b"quantizing" in drawn
    assert b"/s" in drawn


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, cli_run.INTERRUPTED), (signal.SIGTERM, cli_run.TERMINATED)])
def test_an_interrupted_run_leaves_nothing(tmp_path: Path, sent: signal.Signals, code: int) -> None:
    source = sparse_llama(tmp_path / "source", 0.5)
    target = tmp_path / "target"
    target.mkdir()
    arguments = [*COMMAND, "quantize", source, target / "out", "--device", "reference", "--quiet"]
    process = subprocess.Popen(arguments, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not list(target.iterdir()):
        time.sleep(0.005)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert list(target.iterdir()) == []


def test_a_reader_that_goes_away_is_no_error(model: Path, tmp_path: Path) -> None:
    arguments = [*COMMAND, "quantize", model, tmp_path / "out", "--dry-run", "--scheme", "int4_g32"]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(arguments, env=ENVIRONMENT, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert done.returncode == cli_run.BROKEN_PIPE
    assert done.stderr == ""


def test_the_manifest_is_what_was_printed(weights: Path, tmp_path: Path) -> None:
    made = document("quantize", weights, tmp_path / "q.parquet", "--device", "cpu")
    table = pq.read_table(tmp_path / "q.parquet.manifest.parquet")
    assert table.to_pylist() == made["tensors"]
