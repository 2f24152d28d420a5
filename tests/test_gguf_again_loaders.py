"""GGUF files of other programs made into quantized ones, in the programs that read them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from arrowquant_gpu import models
from arrowquant_gpu.formats.gguf_file import read_header
from arrowquant_gpu.pipeline import quantize_checkpoint

from . import minilm, tiny_models
from .test_gguf_loaders import llama_quantize, outputs

pytestmark = pytest.mark.interop
MODELS = [*tiny_models.MODELS, "minilm"]
# llama-quantize makes this one only with an importance matrix.
MIXES = [name for name in models.mixes if name != "q2_k_s"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of float16 weights, which an F16 file holds exactly."""
    folder = tmp_path_factory.mktemp("again")
    for name, make in tiny_models.MODELS.items():
        make(folder / name, "float16")
    shutil.copytree(minilm.model_dir(), folder / "minilm")
    weights = folder / "minilm" / "model.safetensors"
    halves = {n: x.astype(np.float16) if x.dtype == np.float32 else x for n, x in load_file(weights).items()}
    weights.unlink()
    save_file(halves, weights, {"format": "pt"})
    return folder


def made(folder: Path, source: str, scheme: str) -> Path:
    file = folder / f"{Path(source).stem}-{scheme}.gguf"
    if not file.exists():
        options = {"format": "gguf", "device": "cpu", "allow_requantize": source.endswith(".gguf")}
        plan = quantize_checkpoint(folder / source, file, scheme, **options).plan
        assert not [w for w in plan.warnings if "quantized already" in w]
    return file


def others(folder: Path, model: str) -> str:
    """The F16 file of a model, written by the gguf package: names, keys and their types, without our record."""
    import gguf

    source = made(folder, model, "f16")
    reader, name = gguf.GGUFReader(source), f"{model}.other.gguf"
    if (folder / name).exists():
        return name
    writer = gguf.GGUFWriter(folder / name, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if key.startswith(("GGUF.", "arrowquant.")) or key == "general.architecture":
            continue
        inner = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), field.types[0], sub_type=inner)
    # As other programs do: types that this package does not write.
    writer.add_uint8("test.small", 200)
    writer.add_int32("test.negative", -3)
    writer.add_float64("test.exact", 1e-300)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return name


def content(file: Path) -> tuple[dict[str, Any], dict[str, tuple[Any, ...]]]:
    """Keys with their types, and tensors, as the gguf package reads them; not our record."""
    import gguf

    reader = gguf.GGUFReader(file)
    keys = {k: (f.types, f.contents()) for k, f in reader.fields.items() if not k.startswith(("GGUF.", "arrowquant."))}
    return keys, {t.name: (t.tensor_type.name, t.shape.tolist(), t.data.tobytes()) for t in reader.tensors}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("scheme", ["q4_0", "q4_k_m"])
def test_the_file_is_that_of_the_model(folder: Path, model: str, scheme: str) -> None:
    source = others(folder, model)
    keys, tensors = content(made(folder, source, scheme))
    want_keys, want = content(made(folder, model, scheme))
    assert tensors == want
    added = {name for name in keys if name.startswith("test.")}
    assert len(added) == 3
    before = content(folder / source)[0]
    assert {k: v for k, v in keys.items() if k not in added} == want_keys | {"general.name": before["general.name"]}
    assert keys == before | {"general.file_type": want_keys["general.file_type"]}
    # So llama.cpp computes the same.
    got = outputs(model, made(folder, source, scheme))
    assert got.tobytes() == outputs(model, made(folder, model, scheme)).tobytes()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("mix", MIXES)
def test_the_types_and_keys_of_llama_quantize(folder: Path, model: str, mix: str) -> None:
    source = others(folder, model)
    theirs = llama_quantize(folder / source, folder / "theirs.gguf", models.mixes[mix].file_type)
    a, b = read_header(made(folder, source, mix)), read_header(theirs)
    assert {n: (t.type.name, t.shape) for n, t in a.tensors.items()} == {
        n: (t.type.name, t.shape) for n, t in b.tensors.items()
    }
    assert {k: v for k, v in a.stored.items() if not k.startswith("arrowquant.")} == b.stored
