"""SafeTensorsLoader and ShardedSafeTensorsLoader: every dtype of the format, views, conversions, shards, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from arrowquant_gpu import SafeTensorsLoader, ShardedSafeTensorsLoader
from arrowquant_gpu.dtypes import DTYPES
from arrowquant_gpu.errors import DeviceError, HeaderError, InputError, SourceError

from .bitwise import assert_bitwise_equal
from .fixtures import Raw, tiny_llama, write_safetensors

# Of the format, with the dtype that NumPy or ml_dtypes has for each.
TYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def example(kind: type, shape: tuple[int, ...] = (3, 4)) -> np.ndarray:
    values = np.arange(int(np.prod(shape)), dtype=np.float64).reshape(shape)
    return (values % 2 if kind is np.bool_ else values - 5 if np.dtype(kind).kind != "u" else values).astype(kind)


@pytest.fixture
def every_type(tmp_path: Path) -> Path:
    tensors = {name: example(kind) for name, kind in TYPES.items()}
    return write_safetensors(tmp_path / "all.safetensors", tensors, {"modality": "text", "origin": "test"})


@pytest.mark.parametrize("name", TYPES)
def test_every_dtype_as_it_is(every_type: Path, name: str) -> None:
    header = json.loads(every_type.read_bytes()[8:].split(b"}}", 1)[0] + b"}}")
    assert header[name]["dtype"] == name
    x = SafeTensorsLoader(every_type).get_tensor(name)
    assert_bitwise_equal(x, example(TYPES[name]))
    assert not x.flags.writeable
    assert not x.flags.owndata


@pytest.mark.parametrize("target", ["float32", "float16", "bfloat16", "float64"])
@pytest.mark.parametrize("name", TYPES)
def test_every_dtype_converted(every_type: Path, name: str, target: str) -> None:
    loader = SafeTensorsLoader(every_type)
    x = loader.get_tensor(name, target)
    assert x.dtype == DTYPES[target].numpy
    assert x.astype(np.float64).tolist() == example(TYPES[name]).astype(np.float64).tolist()
    is_same = loader.get_tensor(name).dtype == x.dtype
    assert np.shares_memory(x, loader.get_tensor(name)) == is_same


def test_bfloat16_is_the_high_half_of_float32(tmp_path: Path) -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    file = write_safetensors(tmp_path / "m.safetensors", {"w": bits.view(ml_dtypes.bfloat16)})
    x = SafeTensorsLoader(file).get_tensor("w", "float32")
    want = (bits.astype(np.uint32) << 16).view(np.float32)
    finite = np.isfinite(want)
    assert_bitwise_equal(x[finite], want[finite])
    assert (np.isnan(x) == np.isnan(want)).all()


def test_too_large_for_the_type_is_infinite(tmp_path: Path) -> None:
    file = write_safetensors(tmp_path / "m.safetensors", {"w": np.array([1e300, 1e5])})
    loader = SafeTensorsLoader(file)
    assert loader.get_tensor("w", "float32").tolist() == [np.inf, 1e5]
    assert loader.get_tensor("w", "float16").tolist() == [np.inf, np.inf]


def test_files_of_the_safetensors_library(tmp_path: Path) -> None:
    tensors = {"a": np.eye(3, dtype=np.float32), "b": np.arange(4, dtype=np.int64)}
    safetensors.numpy.save_file(tensors, tmp_path / "m.safetensors", metadata={"k": "v"})
    loader = SafeTensorsLoader(str(tmp_path / "m.safetensors"))
    assert loader.metadata == {"k": "v"}
    assert sorted(loader.tensor_names()) == ["a", "b"]
    for name, x in loader.get_all_tensors().items():
        assert_bitwise_equal(x, tensors[name])


def test_no_metadata(tmp_path: Path) -> None:
    file = write_safetensors(tmp_path / "m.safetensors", {"w": np.ones(3, np.float32)})
    loader = SafeTensorsLoader(file)
    assert loader.metadata == {}
    assert loader.detect_modality() is None
    assert "modality: not known" in loader.summary()


def test_missing_tensor(every_type: Path) -> None:
    loader = SafeTensorsLoader(every_type)
    for call in (loader.get_tensor, loader.tensor_info, lambda name: loader.get_all_tensors(names=[name])):
        with pytest.raises(SourceError, match=r"all\.safetensors: no tensor 'gone'; it has 'F64'"):
            call("gone")
    assert "gone" not in loader
    assert "F32" in loader


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "f32", ""])
def test_types_that_nothing_is_converted_to(every_type: Path, dtype: str) -> None:
    with pytest.raises(InputError, match=f"F32: dtype {dtype!r}: tensors are converted to float32"):
        SafeTensorsLoader(every_type).get_tensor("F32", dtype)


def test_elements_under_one_byte_are_bytes(tmp_path: Path) -> None:
    file = write_safetensors(tmp_path / "m.safetensors", {"w": Raw("float4_e2m1fn", (2, 4), b"\1\2\3\4")})
    loader = SafeTensorsLoader(file)
    assert loader.get_tensor("w").tolist() == [1, 2, 3, 4]
    with pytest.raises(InputError, match="w: float4_e2m1fn cannot be converted"):
        loader.get_tensor("w", "float32")


@pytest.mark.parametrize(("shape", "rows"), [((), (1, 1)), ((5,), (1, 5)), ((3, 4), (3, 4)), ((2, 3, 4), (6, 4))])
def test_all_tensors_as_rows(tmp_path: Path, shape: tuple[int, ...], rows: tuple[int, int]) -> None:
    x = example(np.float16, shape)
    file = write_safetensors(tmp_path / "m.safetensors", {"w": x})
    loader = SafeTensorsLoader(file)
    got = loader.get_all_tensors_2d()["w"]
    assert got.shape == rows
    assert np.shares_memory(got, loader.get_tensor("w"))
    assert_bitwise_equal(loader.get_all_tensors_2d("float32")["w"], x.astype(np.float32).reshape(rows))


def test_sizes_and_summary(every_type: Path) -> None:
    loader = SafeTensorsLoader(every_type)
    assert len(loader) == len(TYPES) == 12
    assert loader.total_parameters == 12 * 12
    assert loader.total_bytes == 12 * (8 + 4 + 2 + 2 + 1 + 1 + 8 + 4 + 2 + 1 + 1 + 1)
    assert loader.tensor_info("BF16") == {"dtype": "bfloat16", "shape": (3, 4), "n_bytes": 24, "file": every_type}
    text = loader.summary()
    for part in ("12 tensors in 1 file", "parameters: 144", "modality: text", "metadata: origin = test", "F8_E4M3  f"):
        assert part in text
    many = {f"w{i}": np.ones(1, np.float32) for i in range(25)}
    assert "and 5 more" in SafeTensorsLoader(write_safetensors(every_type, many)).summary()


@pytest.mark.parametrize(
    ("metadata", "modality"),
    [
        ({"modality": "audio"}, "audio"),
        ({"architecture": "MDLM"}, "text"),
        ({"architecture": "DiTTransformer2DModel"}, "image"),
        ({"architecture": "wavegrad"}, "audio"),
        ({"architecture": "audit"}, None),
    ],
)
def test_modality(tmp_path: Path, metadata: dict[str, str], modality: str | None) -> None:
    file = write_safetensors(tmp_path / "m.safetensors", {"w": np.ones(3, np.float32)}, metadata)
    assert SafeTensorsLoader(file).detect_modality() == modality


def test_views_outlive_the_loader_and_the_file(tmp_path: Path) -> None:
    file = write_safetensors(tmp_path / "m.safetensors", {"w": np.arange(5, dtype=np.float32)})
    x = SafeTensorsLoader(file).get_tensor("w")
    file.unlink()
    assert x.tolist() == [0, 1, 2, 3, 4]


def test_nothing_is_read_before_it_is_looked_at(tmp_path: Path) -> None:
    """Weights of 64 GiB in a sparse file."""
    head = json.dumps({"w": {"dtype": "F32", "shape": [1 << 17, 1 << 17], "data_offsets": [0, 1 << 36]}}).encode()
    file = tmp_path / "m.safetensors"
    with file.open("wb") as f:
        f.write(len(head).to_bytes(8, "little") + head)
        f.truncate(8 + len(head) + (1 << 36))
    loader = SafeTensorsLoader(file)
    assert loader.total_bytes == 1 << 36
    assert loader.get_all_tensors()["w"][-1, -1] == 0


def test_what_is_no_file_of_weights(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such file"):
        SafeTensorsLoader(tmp_path / "gone.safetensors")
    with pytest.raises(SourceError, match="ShardedSafeTensorsLoader reads directories"):
        SafeTensorsLoader(tmp_path)
    file = write_safetensors(tmp_path / "m.safetensors", {"w": np.ones(3, np.float32)})
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(HeaderError, match="truncated"):
        SafeTensorsLoader(file)


# --- Shards ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return tiny_llama(tmp_path / "llama", shards=3)


@pytest.mark.parametrize("threads", [None, 1, 3])
@pytest.mark.parametrize("dtype", [None, "float32"])
def test_shards_are_one_model(shards: Path, dtype: str | None, threads: int | None) -> None:
    index = shards / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    for path in (shards, index):
        loader = ShardedSafeTensorsLoader(path)
        assert {name: file for file, names in loader.shards.items() for name in names} == weight_map
        assert len(loader.files) == len(loader.shards) == 3
        found = loader.get_all_tensors(dtype, threads=threads)
        assert list(found) == loader.tensor_names()
        for file in loader.files:
            alone = SafeTensorsLoader(file)
            for name in alone.tensor_names():
                assert_bitwise_equal(found[name], alone.get_tensor(name, dtype))
    assert loader.detect_modality() == "text"
    assert "in 3 files" in loader.summary()


def test_some_tensors_of_a_model(shards: Path) -> None:
    loader = ShardedSafeTensorsLoader(shards)
    names = loader.tensor_names()[3:5]
    assert list(loader.get_all_tensors_2d("float32", names=names, threads=2)) == names


def test_one_file_is_a_model_of_one_shard(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "llama")
    for path in (folder, folder / "model.safetensors"):
        assert list(ShardedSafeTensorsLoader(path).shards) == ["model.safetensors"]


def test_a_missing_shard(shards: Path) -> None:
    (shards / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(SourceError, match=r"1 of 3 files of weights are missing.*model-00002-of-00003"):
        ShardedSafeTensorsLoader(shards)


def test_wrong_threads(shards: Path) -> None:
    with pytest.raises(DeviceError, match="threads is 0"):
        ShardedSafeTensorsLoader(shards).get_all_tensors("float32", threads=0)
