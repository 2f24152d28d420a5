"""Opening checkpoints: every way one may lie on disk, and every way one must be refused, each with its words."""

from __future__ import annotations

import errno
import fcntl
import gc
import json
import os
import random
import re
import shutil
import threading
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from arrowquant_gpu.dtypes import DTYPES
from arrowquant_gpu.errors import HeaderError, SourceError
from arrowquant_gpu.formats import checkpoint as checkpoint_module
from arrowquant_gpu.formats.checkpoint import SafetensorsCheckpoint, open_checkpoint
from arrowquant_gpu.formats.recognise import QUANTIZED_FILES, SUFFIXES, TENSOR_MARKS
from arrowquant_gpu.formats.safetensors import HeaderCode

from .bitwise import assert_bitwise_equal
from .fixtures import Raw, llama_shapes, sparse_llama, tiny_llama, write_index, write_safetensors

W = {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}


def numbered(i: int, n: int) -> str:
    return f"model-{i:05d}-of-{n:05d}.safetensors"


def edit_index(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def names(source: SafetensorsCheckpoint) -> set[str]:
    return {p.relative_to(source.path).as_posix() for p in source.side_files}


# --- what is accepted


def test_a_lone_file(tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    source = open_checkpoint(str(tmp_path / "model.safetensors"))
    assert (source.path, source.config) == (tmp_path / "model.safetensors", None)
    assert (source.side_files, source.left_out, source.metadata) == ((), (), {"format": "pt"})
    assert {t.name: t.shape for t in source.tensors.values()} == llama_shapes(2, 64, 128, 4, 2, 160)


def test_views_hold_the_bytes_of_every_dtype_at_any_address(tmp_path: Path) -> None:
    tensors: dict[str, Raw] = {"odd": Raw("int8", (3,), b"abc")}
    for i, row in enumerate(DTYPES.values()):
        tensors[row.name] = Raw(row.name, (2, 4), bytes((7 * i + k) % 256 for k in range(row.bits)))
        tensors["empty " + row.name] = Raw(row.name, (0, 4), b"")
    tensors["scalar"] = Raw("float32", (), b"\0\0\x80\x3f")
    path = write_safetensors(tmp_path / "a.safetensors", tensors)
    # Begun one byte later, so that no tensor is aligned.
    raw = path.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    path.write_bytes((n + 1).to_bytes(8, "little") + raw[8 : 8 + n] + b" " + raw[8 + n :])
    source = open_checkpoint(path)
    for name, want in tensors.items():
        got, numpy = source.view(name), DTYPES[want.dtype].numpy
        if numpy is None:
            assert_bitwise_equal(got, np.frombuffer(want.data, np.uint8), name)
        else:
            assert_bitwise_equal(got, np.frombuffer(want.data, numpy).reshape(want.shape), name)
        assert not got.flags.writeable
        assert got.flags.c_contiguous
    assert not source.view("float64").flags.aligned
    with pytest.raises(SourceError, match="no tensor 'x'"):
        source.view("x")


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_model_directories(shards: int, tmp_path: Path) -> None:
    whole = open_checkpoint(tiny_llama(tmp_path / "whole"))
    source = open_checkpoint(tiny_llama(tmp_path / "model", shards=shards))
    assert source.path == tmp_path / "model"
    assert source.config is not None
    assert source.config["model_type"] == "llama"
    assert source.tensors.keys() == whole.tensors.keys()
    for name in whole.tensors:
        assert source.view(name).dtype == ml_dtypes.bfloat16
        assert_bitwise_equal(source.view(name), whole.view(name), name)
    files = [t.file.name for t in source.tensors.values()]
    assert files == sorted(files)
    assert len(set(files)) == shards
    assert names(source) == {
        *("README.md", "config.json", "generation_config.json"),
        *("special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"),
    }
    assert source.left_out == ()


def test_an_index_opens_its_directory(tmp_path: Path) -> None:
    tiny_llama(tmp_path, shards=2)
    source = open_checkpoint(tmp_path / "model.safetensors.index.json")
    assert source.path == tmp_path
    assert source.config is not None
    assert "tokenizer.json" in names(source)
    assert source.fingerprint() == open_checkpoint(tmp_path).fingerprint()


def test_a_whole_file_goes_before_shards_unless_the_index_is_given(tmp_path: Path) -> None:
    tiny_llama(tmp_path, shards=2)
    write_safetensors(tmp_path / "model.safetensors", W)
    source = open_checkpoint(tmp_path)
    assert set(source.tensors) == {"w"}
    assert {p.name for p, reason in source.left_out if "not part of this checkpoint" in reason} == {
        *(numbered(1, 2), numbered(2, 2), "model.safetensors.index.json")
    }
    source = open_checkpoint(tmp_path / "model.safetensors.index.json")
    assert len(source.tensors) == 21
    assert [p.name for p, _ in source.left_out] == ["model.safetensors"]


def test_an_index_may_name_the_whole_file(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", W)
    write_safetensors(tmp_path / "more.safetensors", {"v": W["w"]})
    write_index(tmp_path, {"w": "model.safetensors", "v": "more.safetensors"}, 48)
    assert set(open_checkpoint(tmp_path).tensors) == {"w", "v"}


def test_an_index_of_another_name(tmp_path: Path) -> None:
    tiny_llama(tmp_path, shards=2)
    index = (tmp_path / "model.safetensors.index.json").rename(tmp_path / "model.fp16.safetensors.index.json")
    assert len(open_checkpoint(tmp_path).tensors) == 21
    shutil.copy(index, tmp_path / "model.fp32.safetensors.index.json")
    with pytest.raises(SourceError, match="several indexes"):
        open_checkpoint(tmp_path)


def test_the_only_file_of_a_directory(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "weights.safetensors", W)
    source = open_checkpoint(tmp_path)
    assert (set(source.tensors), source.config) == ({"w"}, None)


def test_a_numbered_set_needs_no_index(tmp_path: Path) -> None:
    tiny_llama(tmp_path, shards=3)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert len(open_checkpoint(tmp_path).tensors) == 21
    (tmp_path / numbered(2, 3)).unlink()
    with pytest.raises(SourceError, match=r"1 of 3 files of weights are missing: 'model-00002-of-00003.safetensors'"):
        open_checkpoint(tmp_path)
    (tmp_path / numbered(3, 3)).unlink()
    with pytest.raises(SourceError, match="2 of 3 files of weights are missing"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "files",
    [
        ("a.safetensors", "b.safetensors"),
        (numbered(1, 2), numbered(2, 2), "other.safetensors"),
        (numbered(1, 2), numbered(2, 2), numbered(1, 3)),
        (numbered(0, 1), numbered(1, 1)),
        ("x-00001-of-00002.safetensors", "y-00002-of-00002.safetensors"),
    ],
)
def test_which_of_several_files_is_not_guessed(files: tuple[str, ...], tmp_path: Path) -> None:
    for i, file in enumerate(files):
        write_safetensors(tmp_path / file, {f"w{i}": W["w"]})
    with pytest.raises(SourceError, match=r"no index.*not known"):
        open_checkpoint(tmp_path)


def test_a_snapshot_of_the_hub_cache(tmp_path: Path) -> None:
    """Files are links into blobs/, named by hash."""
    model = tiny_llama(tmp_path / "model", shards=2)
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123abcd"
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted(model.iterdir())):
        file.rename(blobs / f"{i:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{i:040x}")
    source = open_checkpoint(snapshot)
    assert len(source.tensors) == 21
    assert {"tokenizer.json", "config.json"} <= names(source)
    assert all(t.file.parent == snapshot for t in source.tensors.values())
    # A blob may be opened itself: it has no suffix.
    blob = (snapshot / numbered(1, 2)).resolve()
    assert open_checkpoint(blob).tensors
    blob.unlink()
    with pytest.raises(SourceError, match=r"1 of 2 files of weights are missing \(links to files that are not there\)"):
        open_checkpoint(snapshot)


def test_metadata_of_all_files(tmp_path: Path) -> None:
    write_safetensors(tmp_path / numbered(1, 2), {"w": W["w"]}, {"format": "pt", "who": "first"})
    write_safetensors(tmp_path / numbered(2, 2), {"v": W["w"]}, {"who": "second", "more": "x"})
    assert open_checkpoint(tmp_path).metadata == {"format": "pt", "who": "first", "more": "x"}


def test_twenty_gigabytes_are_opened_in_little_memory(tmp_path: Path) -> None:
    sparse_llama(tmp_path, 20)
    tracemalloc.start()
    try:
        source = open_checkpoint(tmp_path)
        last = source.view("lm_head.weight")
        assert last.shape == (32000, 4096)
        assert not last[-1].any()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(t.n_bytes for t in source.tensors.values()) > 19.5 * 2**30
    assert peak < 4 << 20


@pytest.mark.interop
def test_a_real_trained_model() -> None:
    from .minilm import model_dir

    source = open_checkpoint(model_dir())
    assert len(source.tensors) == 104
    assert source.tensors["embeddings.position_ids"].dtype == "int64"
    assert {"config.json", "tokenizer.json", "vocab.txt", "modules.json", "1_Pooling/config.json"} <= names(source)


# --- views and their memory


def test_views_outlive_the_checkpoint_and_the_file(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "a.safetensors", W)
    view = open_checkpoint(path).view("w")
    gc.collect()
    path.unlink()
    assert_bitwise_equal(view, W["w"])
    with pytest.raises(ValueError, match="read-only"):
        view[0, 0] = 1


def test_one_mapping_per_file(tmp_path: Path) -> None:
    source = open_checkpoint(tiny_llama(tmp_path, shards=2))
    with ThreadPoolExecutor(8) as pool:
        views = list(pool.map(source.view, [*source.tensors] * 5))
    assert len(views) == 5 * 21
    mapped = Path("/proc/self/maps").read_text()
    assert [mapped.count(str(tmp_path / numbered(i, 2))) for i in (1, 2)] == [1, 1]


@pytest.mark.parametrize("change", ["shorter", "longer", "rewritten", "gone"])
def test_a_file_changed_after_its_header_was_read_is_not_mapped(change: str, tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "a.safetensors", W)
    source = open_checkpoint(path)
    if change == "shorter":
        os.truncate(path, 100)
    elif change == "longer":
        path.write_bytes(path.read_bytes() + b"x")
    elif change == "rewritten":
        write_safetensors(path, {"w": W["w"] + 1})
        os.utime(path, ns=(1, 1))
    else:
        path.unlink()
    with pytest.raises(SourceError, match="No such file" if change == "gone" else "changed since its header was read"):
        source.view("w")


def test_descriptors_and_maps_of_files(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "a.safetensors", W)
    source, raw = open_checkpoint(path), path.read_bytes()
    data = source.mapped(path)
    assert_bitwise_equal(data, np.frombuffer(raw, np.uint8))
    assert not data.flags.writeable
    assert np.shares_memory(data, source.view("w"))
    fd, direct = source.descriptor(path), source.descriptor(path, os.O_NOATIME)
    try:
        assert fd != direct
        assert os.pread(fd, 100, 8) == raw[8:108]
        assert [bool(fcntl.fcntl(f, fcntl.F_GETFL) & os.O_NOATIME) for f in (fd, direct)] == [False, True]
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)
        os.close(direct)


@pytest.mark.parametrize("how", ["descriptor", "mapped"])
@pytest.mark.parametrize("change", ["shorter", "rewritten", "gone"])
def test_a_changed_file_is_not_opened(how: str, change: str, tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "a.safetensors", W)
    source = open_checkpoint(path)
    if change == "shorter":
        os.truncate(path, 100)
        os.utime(path, ns=(path.stat().st_atime_ns, source._headers[path].mtime_ns))
    elif change == "rewritten":
        os.utime(path, ns=(1, 1))
    else:
        path.unlink()
    before = sum(1 for _ in Path("/proc/self/fd").iterdir())
    with pytest.raises(SourceError, match="No such file" if change == "gone" else "changed since its header was read"):
        getattr(source, how)(path)
    assert sum(1 for _ in Path("/proc/self/fd").iterdir()) == before


def test_fingerprint_is_of_headers_and_samples(tmp_path: Path) -> None:
    a = open_checkpoint(tiny_llama(tmp_path / "a", shards=2)).fingerprint()
    assert re.fullmatch("[0-9a-f]{32}", a)
    assert open_checkpoint(tiny_llama(tmp_path / "b", shards=2)).fingerprint() == a
    (tmp_path / "b" / "extra.json").write_text("{}")
    assert open_checkpoint(tmp_path / "b").fingerprint() == a
    assert open_checkpoint(tiny_llama(tmp_path / "c", shards=1)).fingerprint() != a
    assert open_checkpoint(tiny_llama(tmp_path / "d", shards=2, dtype="float16")).fingerprint() != a
    assert open_checkpoint(tiny_llama(tmp_path / "e", shards=2, seed=1)).fingerprint() != a
    lone = [{"w": np.zeros(3, np.uint8)}, {"w": np.zeros(4, np.uint8)}, {"v": np.zeros(3, np.uint8)}]
    files = [write_safetensors(tmp_path / f"{i}.safetensors", tensors) for i, tensors in enumerate(lone)]
    assert len({open_checkpoint(p).fingerprint() for p in files}) == 3


def test_headers_are_read_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_llama(tmp_path, shards=4)
    barrier, real = threading.Barrier(4, timeout=30), checkpoint_module.read_header

    def wait(path: Path) -> Any:
        barrier.wait()  # broken where one is read after the other
        return real(path)

    monkeypatch.setattr(checkpoint_module, "read_header", wait)
    before = threading.active_count()
    assert len(open_checkpoint(tmp_path).tensors) == 21
    assert threading.active_count() == before


# --- indexes that do not fit


@pytest.mark.parametrize(
    "file",
    [
        *("../x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "sub/x.safetensors", "./x.safetensors"),
        *("..\\x.safetensors", "C:\\x.safetensors", "x\0.safetensors", "..", "", "x.bin", "/", 5, None, ["x"], {}),
    ],
)
def test_names_that_leave_the_directory_are_refused(file: object, tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", shards=2)
    write_safetensors(tmp_path / "x.safetensors", W)
    (model / "sub").mkdir()
    write_safetensors(model / "sub" / "x.safetensors", W)
    edit_index(model, lambda weight_map: weight_map.update({"w": file}))
    with pytest.raises(SourceError, match=r"tensor 'w' is in .*(plain name|no safetensors file)"):
        open_checkpoint(model)


def test_missing_shards_are_named(tmp_path: Path) -> None:
    tiny_llama(tmp_path, shards=8)
    for i in range(2, 9):
        (tmp_path / numbered(i, 8)).unlink()
    with pytest.raises(SourceError, match=r"7 of 8 files of weights are missing: 'model-00002.* and 2 more. Download"):
        open_checkpoint(tmp_path)


def test_a_shard_that_is_a_folder(tmp_path: Path) -> None:
    tiny_llama(tmp_path, shards=2)
    (tmp_path / numbered(2, 2)).unlink()
    (tmp_path / numbered(2, 2)).mkdir()
    with pytest.raises(SourceError, match="1 of 2 files of weights are missing"):
        open_checkpoint(tmp_path)


def test_tensors_and_index_at_odds(tmp_path: Path) -> None:
    def fresh() -> Path:
        shutil.rmtree(tmp_path / "m", ignore_errors=True)
        return tiny_llama(tmp_path / "m", shards=2)

    first, last = "model.embed_tokens.weight", "lm_head.weight"
    edit_index(model := fresh(), lambda m: m.update({"ghost": numbered(2, 2)}))
    with pytest.raises(
        SourceError, match=r"1 tensors are in no file: 'ghost'. model-00002-of-00002.safetensors should"
    ):
        open_checkpoint(model)
    edit_index(model := fresh(), lambda m: m.pop(first))
    with pytest.raises(SourceError, match=f"1 tensors of the files are not in the index: '{first}'"):
        open_checkpoint(model)
    edit_index(model := fresh(), lambda m: m.update({first: numbered(2, 2), last: numbered(1, 2)}))
    with pytest.raises(SourceError, match=f"tensor '{last}' is in {numbered(2, 2)}, not in {numbered(1, 2)}"):
        open_checkpoint(model)
    shutil.copy((model := fresh()) / numbered(1, 2), model / numbered(2, 2))
    with pytest.raises(SourceError, match=f"{numbered(2, 2)}: tensor '{first}' is in {numbered(1, 2)} too"):
        open_checkpoint(model)


def test_a_damaged_shard_is_an_error_of_its_header(tmp_path: Path) -> None:
    tiny_llama(tmp_path, shards=3)
    shard = tmp_path / numbered(2, 3)
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(HeaderError, match=r"model-00002-of-00003.safetensors: the file is truncated: 1 of") as e:
        open_checkpoint(tmp_path)
    assert e.value.code == HeaderCode.TRUNCATED
    shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 5\n")
    with pytest.raises(HeaderError, match="git lfs pull"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not valid JSON"),
        ("[]", "must be a JSON object"),
        ("{}", "no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
        ('{"weight_map": []}', "no weight_map"),
        ('{"weight_map": {"w": "a.safetensors", "w": "b.safetensors"}}', "the key 'w' occurs twice"),
        ("[" * 100_000, "not valid JSON"),
        ('{"weight_map": ' + "9" * 10_000 + "}", "not valid JSON"),
        ("\xff", "not valid JSON"),
        ("version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("<!DOCTYPE html>", "HTML page"),
    ],
)
def test_malformed_indexes_and_configs(text: str, words: str, tmp_path: Path) -> None:
    tiny_llama(tmp_path, shards=2)
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="latin-1")
    with pytest.raises(SourceError, match=words):
        open_checkpoint(tmp_path)
    if "weight_map" in words:
        return
    tiny_llama(tmp_path, shards=2)
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(SourceError, match=rf"config\.json: .*{words}"):
        open_checkpoint(tmp_path)


def test_hostile_indexes_give_typed_errors(tmp_path: Path) -> None:
    """A byte of the index or of config.json changed, many times: opened as before, or a SourceError."""
    rng = random.Random(20261121)
    tiny_llama(tmp_path, shards=2, layers=1)
    outcomes = {"opened": 0, "refused": 0}
    for file in ("model.safetensors.index.json", "config.json"):
        good = (tmp_path / file).read_bytes()
        for _ in range(150):
            bad = bytearray(good)
            for _ in range(rng.choice((1, 1, 3))):
                bad[rng.randrange(len(bad))] = rng.choice((*b'{}[]",:\\0u./', 0, 0xFF, rng.randrange(256)))
            (tmp_path / file).write_bytes(bad)
            try:
                open_checkpoint(tmp_path)
            except SourceError as e:
                str(e).encode()  # half a surrogate pair in it could not be printed
                outcomes["refused"] += 1
            else:
                outcomes["opened"] += 1
        (tmp_path / file).write_bytes(good)
    assert min(outcomes.values()) > 20


def test_names_that_cannot_be_printed_are_escaped(tmp_path: Path) -> None:
    tiny_llama(tmp_path, shards=2)
    edit_index(tmp_path, lambda m: m.update({"w": "\ud800\x1b[2J.safetensors"}))
    with pytest.raises(SourceError, match="files of weights are missing") as e:
        open_checkpoint(tmp_path)
    assert str(e.value).isprintable()


# --- what is refused


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config with quant_method gptq"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quant_method bitsandbytes"),
        ({"quantization_config": {"bits": 4}}, "quantization_config as transformers writes"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "`arrowquant dequantize` turns"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "quantization as MLX writes"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "quant_method fp8"),
    ],
)
def test_quantized_by_config(config: dict[str, Any], words: str, tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(SourceError, match=f"already quantized: config.json has .*{words}"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("config", [{"quantization_config": None}, {"quantization_config": {}}, {"quantization": True}])
def test_not_quantized_by_config(config: dict[str, Any], tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(tmp_path).config == config


@pytest.mark.parametrize(("file", "what"), QUANTIZED_FILES)
def test_quantized_by_a_file_beside_it(file: str, what: str, tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    (tmp_path / file).write_text("{}")
    with pytest.raises(SourceError, match=f"already quantized: {file} \\({what}\\)"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("mark", TENSOR_MARKS, ids=lambda m: m.suffix + m.beside)
def test_quantized_by_its_tensors(mark: Any, tmp_path: Path) -> None:
    """Also of a lone file, which has no config."""
    dtype = min(mark.dtypes, default="uint8")
    pair = {
        "model.fc" + mark.suffix: np.zeros((2, 2), np.float32),
        "model.fc" + mark.beside: np.zeros((2, 2), DTYPES[dtype].numpy),
    }
    path = write_safetensors(tmp_path / "model.safetensors", pair | W)
    for source in (path, tmp_path):
        with pytest.raises(SourceError, match=r"already quantized: tensors model.fc") as e:
            open_checkpoint(source)
        assert f"({mark.what})" in str(e.value)
    # Either of the two alone says nothing, nor do float weights beside a scale.
    for name, array in pair.items():
        open_checkpoint(write_safetensors(path, {name: array} | W))
    if mark.dtypes:
        open_checkpoint(write_safetensors(path, dict.fromkeys(pair, np.zeros((2, 2), np.float32))))


@pytest.mark.parametrize(("suffix", "what"), SUFFIXES)
def test_other_formats(suffix: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / f"pytorch_model{suffix}"
    path.write_bytes(b"\1\2\3\4\5\6\7\x08\t")
    for source in (path, tmp_path):
        with pytest.raises(SourceError) as e:
            open_checkpoint(source)
        assert what in str(e.value)
        assert path.name in str(e.value)


def test_content_says_more_than_the_suffix(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"GGUF\3\0\0\0")
    with pytest.raises(SourceError, match="GGUF"):
        open_checkpoint(path)
    path = tmp_path / "config.json"
    path.write_text('{\n "model_type": "llama"}')
    with pytest.raises(SourceError, match=r"JSON text.*model directory"):
        open_checkpoint(path)


def test_directories_without_weights(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="the directory is empty"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SourceError, match=r"no safetensors weights; it holds 'config.json'"):
        open_checkpoint(tmp_path)
    (tmp_path / "unet").mkdir()
    write_safetensors(tmp_path / "unet" / "model.safetensors", W)
    with pytest.raises(SourceError, match=r"its folders do: 'unet'. Give the one"):
        open_checkpoint(tmp_path)
    write_safetensors(tmp_path / "adapter_model.safetensors", W)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(SourceError, match="an adapter, not a model; merge it"):
        open_checkpoint(tmp_path)


def test_an_adapter_beside_a_model_is_left_out(tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    write_safetensors(tmp_path / "adapter_model.safetensors", W)
    (tmp_path / "adapter_config.json").write_text("{}")
    source = open_checkpoint(tmp_path)
    assert {p.name for p, reason in source.left_out if "adapter" in reason} == {
        *("adapter_config.json", "adapter_model.safetensors")
    }


def test_nothing_there(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe.safetensors")
    for name, words in {
        "absent": "no such file",
        "loop": "no such file",
        "n\0l": "no such file",
        "pipe.safetensors": "not a regular file",
        "absent.safetensors.index.json": "no such file",
    }.items():
        with pytest.raises(SourceError, match=words):
            open_checkpoint(tmp_path / name)


def test_no_tensors_at_all(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="holds no tensors"):
        open_checkpoint(write_safetensors(tmp_path / "a.safetensors", {}))


def test_errors_of_the_system_are_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a directory without permission gives; tests may run as root, for whom there is none."""
    tiny_llama(tmp_path)

    def refuse(path: object) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(SourceError, match="cannot be read: Permission denied"):
        open_checkpoint(tmp_path)


# --- what goes with the weights

KEPT = """config.json generation_config.json tokenizer.json tokenizer_config.json tokenizer.model spiece.model vocab.txt
vocab.json merges.txt special_tokens_map.json added_tokens.json chat_template.jinja chat_template.json
preprocessor_config.json processor_config.json README.md LICENSE LICENSE.txt NOTICE USE_POLICY.md
modeling_custom.py configuration_custom.py modules.json sentence_bert_config.json 1_Pooling/config.json
2_Dense/model.safetensors 2_Dense/pytorch_model.bin 2_Dense/config.json params.json tekken.json
additional_chat_templates/tool_use.jinja"""

LEFT_OUT = {
    "pytorch_model.bin": "another format",
    "pytorch_model-00001-of-00002.bin": "another format",
    "pytorch_model.bin.index.json": "index of weights",
    "model.fp16.safetensors.index.json": "index of weights",
    "model.ckpt": "another format",
    "tf_model.h5": "another format",
    "flax_model.msgpack": "another format",
    "model-Q4_0.GGUF": "another format",
    "consolidated.00.pth": "another format",
    "consolidated.safetensors": "not part of this checkpoint",
    "model.onnx": "another format",
    "model.onnx_data": "another format",
    "openvino_model.xml": "another format",
    "arrowquant_manifest.parquet": "another format",
    "optimizer.pt": "training run",
    "scheduler.pt": "training run",
    "rng_state_0.pth": "training run",
    "training_args.bin": "training run",
    "trainer_state.json": "training run",
    "model.safetensors.tmp": "leftover",
    "download.incomplete": "leftover",
    ".gitattributes": "version control",
    ".gitignore": "version control",
    ".DS_Store": "hidden",
    "1_Pooling/.DS_Store": "hidden",
}
LEFT_OUT_FOLDERS = {
    ".git": "version control",
    ".cache": "cache",
    "__pycache__": "cache",
    "onnx": "another format",
    "openvino": "another format",
    "original": "authors' own layout",
    "checkpoint-500": "training run",
    "runs": "training run",
    "figures": "not known to belong",
}


def test_every_file_goes_along_or_is_left_out_with_a_reason(tmp_path: Path) -> None:
    tiny_llama(tmp_path, shards=2)
    for name in (*KEPT.split(), *LEFT_OUT, *(f"{folder}/deep/file.json" for folder in LEFT_OUT_FOLDERS)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if not (tmp_path / name).exists():
            (tmp_path / name).write_text("x")
    source = open_checkpoint(tmp_path)
    assert names(source) == set(KEPT.split())
    left_out = {p.relative_to(tmp_path).as_posix(): reason for p, reason in source.left_out}
    expected = LEFT_OUT | LEFT_OUT_FOLDERS
    assert left_out.keys() == expected.keys()
    for name, words in expected.items():
        assert words in left_out[name], name
    assert list(source.side_files) == sorted(source.side_files)
    read = {t.file for t in source.tensors.values()} | {tmp_path / "model.safetensors.index.json"}
    for file in tmp_path.rglob("*"):
        if file.is_file() and not any(p in {tmp_path / f for f in LEFT_OUT_FOLDERS} for p in file.parents):
            assert (file in read) + (file in source.side_files) + (file in dict(source.left_out)) == 1, file


def test_large_files_of_unknown_kind_are_left_out(tmp_path: Path) -> None:
    tiny_llama(tmp_path)
    for name in ("corpus.txt", "tokenizer.model", "tokenizer.json"):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, (64 << 20) + 1)
    source = open_checkpoint(tmp_path)
    assert {p.name: r for p, r in source.left_out} == {"corpus.txt": "not known to belong to a model, and over 64 MiB"}
    assert {"tokenizer.model", "tokenizer.json"} <= names(source)


def test_links_and_odd_files_beside_the_weights(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "vocab.txt").write_text("x")
    (model / "vocab.txt").symlink_to(tmp_path / "elsewhere" / "vocab.txt")
    (model / "1_Pooling").symlink_to(tmp_path / "elsewhere")
    (model / "merges.txt").symlink_to(tmp_path / "absent")
    os.mkfifo(model / "pipe")
    source = open_checkpoint(model)
    assert "vocab.txt" in names(source)
    assert {p.name: r for p, r in source.left_out} == {
        "1_Pooling": "link to a folder",
        "merges.txt": "link to a file that is not there",
        "pipe": "no regular file",
    }


# --- the builders themselves


@pytest.mark.parametrize("shards", [1, 2, 3, 7, 20, 21])
def test_builders_make_as_many_shards_as_asked(shards: int, tmp_path: Path) -> None:
    tiny_llama(tmp_path, shards=shards)
    assert len(list(tmp_path.glob("*.safetensors"))) == shards
    assert len(open_checkpoint(tmp_path).tensors) == 21
