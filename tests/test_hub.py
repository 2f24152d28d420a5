"""Hub ids, against an endpoint on this machine that answers as the Hub does where a download asks it."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from arrowquant_gpu.errors import SourceError
from arrowquant_gpu.formats.checkpoint import open_checkpoint
from arrowquant_gpu.formats.hub import resolve

from .bitwise import assert_bitwise_equal
from .fixtures import tiny_llama

# Resolves every id in turn and prints path or error; a process of its own, because the Hub's library reads its
# environment when it is imported.
CHILD = """
import json, sys, threading
from arrowquant_gpu.errors import SourceError
from arrowquant_gpu.formats.hub import resolve
results = []
for src in sys.argv[1:]:
    try:
        results.append(["path", str(resolve(src))])
    except SourceError as e:
        results.append(["error", str(e)])
print(json.dumps(results))
"""


class Hub:
    """Repositories on an HTTP endpoint: id -> revision -> folder. `asked` lists the paths of the files served."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Path]] = {}
        self.gated: set[str] = set()
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = False  # so that server_close waits for them
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def sha(self, repo: str, revision: str) -> str:
        return hashlib.sha1(f"{repo}/{revision}".encode()).hexdigest()

    def folder(self, repo: str, revision: str) -> tuple[str, Path] | None:
        """(commit, folder) of a branch or commit."""
        for name, folder in self.repos.get(repo, {}).items():
            if revision in (name, self.sha(repo, name)):
                return self.sha(repo, name), folder
        return None

    def answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        parts = [unquote(p) for p in urlsplit(request.path).path.strip("/").split("/")]
        is_api = parts[:2] == ["api", "models"]
        repo, rest = "/".join(parts[2:4] if is_api else parts[:2]), parts[4:] if is_api else parts[2:]
        if repo in self.gated:
            return self.send(request, 403, b"gated", {"X-Error-Code": "GatedRepo"}, body)
        if repo not in self.repos:
            return self.send(request, 404, b"none", {"X-Error-Code": "RepoNotFound"}, body)
        revision = rest[1] if len(rest) > 1 else "main"
        found = self.folder(repo, revision)
        if found is None:
            return self.send(request, 404, b"none", {"X-Error-Code": "RevisionNotFound"}, body)
        commit, folder = found
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        names = [p.relative_to(folder).as_posix() for p in files]
        if not is_api:
            return self.send_file(request, commit, folder, "/".join(rest[2:]), body)
        if rest[:1] == ["tree"]:
            rows = [
                {"type": "file", "path": n, "size": p.stat().st_size, "oid": hashlib.sha1(p.read_bytes()).hexdigest()}
                for n, p in zip(names, files, strict=True)
            ]
            return self.send(request, 200, json.dumps(rows).encode(), {}, body)
        info = {"id": repo, "sha": commit, "private": False, "tags": [], "downloads": 0, "likes": 0}
        info["siblings"] = [{"rfilename": n} for n in names]
        return self.send(request, 200, json.dumps(info).encode(), {}, body)

    def send_file(self, request: BaseHTTPRequestHandler, commit: str, folder: Path, name: str, body: bool) -> None:
        data = (folder / name).read_bytes()
        if body:
            self.asked.append(name)
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        self.send(request, 200, data, headers, body)

    def send(self, request: BaseHTTPRequestHandler, status: int, data: bytes, more: dict[str, str], body: bool) -> None:
        request.send_response(status)
        kind = "application/json" if data[:1] in (b"{", b"[") else "application/octet-stream"
        for key, value in {"Content-Length": str(len(data)), "Content-Type": kind, **more}.items():
            request.send_header(key, value)
        request.end_headers()
        if body:
            request.wfile.write(data)


@pytest.fixture
def hub() -> Iterator[Hub]:
    before = set(threading.enumerate())
    server = Hub()
    try:
        yield server
    finally:
        server.close()
    assert set(threading.enumerate()) <= before


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def ask(hub: Hub, cache: Path, *sources: str, **more: str) -> list[list[str]]:
    env = {
        k: v for k, v in os.environ.items() if not k.upper().startswith(("HF_", "HUGGING")) and "PROXY" not in k.upper()
    }
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    env |= {"PYTHONPATH": str(Path(__file__).parent.parent), "NO_PROXY": "127.0.0.1", **more}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *sources], capture_output=True, text=True, env=env, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results: list[list[str]] = json.loads(done.stdout)
    return results


def test_models_are_downloaded_without_what_is_not_read(hub: Hub, cache: Path, tmp_path: Path) -> None:
    main = tiny_llama(tmp_path / "main", shards=2)
    other = tiny_llama(tmp_path / "other", layers=1, seed=1)
    for name in ("pytorch_model.bin", "model.gguf", "onnx/model.onnx", "original/params.json", "model.h5"):
        (main / name).parent.mkdir(exist_ok=True)
        (main / name).write_bytes(b"not to be downloaded")
    (main / "consolidated.safetensors").write_bytes(b"not to be downloaded")
    (main / "2_Dense").mkdir()
    (main / "2_Dense" / "pytorch_model.bin").write_bytes(b"a module of its own")
    hub.repos["org/tiny.llama-1"] = {"main": main, "v1.0": other}
    got = ask(
        hub,
        cache,
        "org/tiny.llama-1",
        "org/tiny.llama-1@v1.0",
        f"org/tiny.llama-1@{hub.sha('org/tiny.llama-1', 'main')}",
    )
    assert [kind for kind, _ in got] == ["path"] * 3, got
    assert got[0] == got[2]
    folder = Path(got[0][1])
    assert folder.is_relative_to(cache)
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert names == {
        *("README.md", "config.json", "generation_config.json", "special_tokens_map.json", "tokenizer.json"),
        *("tokenizer_config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        *("model.safetensors.index.json", "2_Dense/pytorch_model.bin"),
    }
    assert set(hub.asked) == names | {"model.safetensors"}
    # The snapshot is made of links into the cache; it is read like any directory.
    assert any(p.is_symlink() for p in folder.iterdir())
    ours, theirs = open_checkpoint(folder), open_checkpoint(main)
    assert ours.tensors.keys() == theirs.tensors.keys()
    for tensor in theirs.tensors:
        assert_bitwise_equal(ours.view(tensor), theirs.view(tensor), tensor)
    assert ours.fingerprint() == theirs.fingerprint() != open_checkpoint(got[1][1]).fingerprint()

    # What was downloaded once is found again without the Hub; what was not is an error that says so.
    hub.asked.clear()
    got = ask(hub, cache, "org/tiny.llama-1", "org/never", HF_HUB_OFFLINE="1")
    assert got[0] == ["path", str(folder)]
    assert got[1][0] == "error"
    assert "local cache" in got[1][1]
    assert hub.asked == []


def test_what_the_hub_does_not_give_is_said(hub: Hub, cache: Path, tmp_path: Path) -> None:
    only_bin = tmp_path / "bin"
    only_bin.mkdir()
    (only_bin / "pytorch_model.bin").write_bytes(b"PK")
    (only_bin / "config.json").write_text("{}")
    mistral = tiny_llama(tmp_path / "mistral")
    (mistral / "model.safetensors").rename(mistral / "consolidated.safetensors")
    hub.repos |= {"org/bin": {"main": only_bin}, "org/consolidated": {"main": mistral}}
    hub.gated.add("org/gated")
    got = ask(hub, cache, "org/absent", "org/bin", "org/bin@v9", "org/gated", "org/consolidated", "org/a..b")
    words = [text for _, text in got]
    assert [kind for kind, _ in got] == ["error", "error", "error", "error", "path", "error"]
    assert "org/absent" in words[0]
    assert "neither a path nor a model on the Hub" in words[0]
    assert "pytorch_model.bin is a PyTorch checkpoint; convert it first" in words[1]
    assert "no such revision" in words[2]
    assert "accept terms" in words[3]
    assert len(open_checkpoint(words[4]).tensors) == 21
    assert "neither a path nor a valid Hub id" in words[5]


def test_the_hub_out_of_reach(hub: Hub, cache: Path) -> None:
    hub.close()
    ((kind, words),) = ask(hub, cache, "org/name")
    assert kind == "error"
    assert "cannot be reached" in words


def test_a_path_goes_before_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert resolve("org/name") == Path("org/name")
    assert resolve(tmp_path) == tmp_path


@pytest.mark.parametrize("src", ["absent", "/absent/model", "./absent", "a/b/c", "org/name@", "org/na me", "../x@y"])
def test_what_is_no_id_is_a_missing_path(src: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(SourceError, match=r"no such file or directory$"):
        resolve(src)


@pytest.mark.parametrize("src", ["org/name", "org/name@main", "o-r_g/na.me@refs/pr/1"])
def test_the_extra_is_named_where_it_is_missing(src: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(SourceError, match=r"pip install 'arrowquant_gpu\[hub\]'"):
        resolve(src)
