"""Every format in the real loaders on a CPU: what they compute is what the decoded weights do.

The reference is transformers on the float checkpoint that `arrowquant dequantize` makes of the file. What is written
and what reads it is the table of tests/interop_matrix.py; the loaders and their tolerances are tests/real_loaders/.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from typer.testing import CliRunner

from arrowquant_gpu import cli

from . import damaged_checkpoints as damage
from .interop_matrix import ENCODER, LANGUAGE, MIXTURE, ROWS, Row
from .minilm import model_dir
from .model_files import arrowquant
from .real_loaders import LOADERS, decoders, llama_cpp, reference
from .real_loaders.inputs import TEXTS
from .tiny_models import MODELS

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore"),  # the loaders' own deprecations are not ours to fix
]

# Linear weights of each model: none of them may be left in float without a word.
N_LINEAR = {"llama": 14, "qwen2": 14, MIXTURE: 32, ENCODER: 36}
CASES = [(row, model) for row in ROWS for model in (*LANGUAGE, MIXTURE, ENCODER) if row.of(model)]
# The first row of each format runs the command in its own process, with one model; the others run it in this one.
BY_PROCESS = {(next(row for row in ROWS if row.format == name), LANGUAGE[0]) for name in {row.format for row in ROWS}}
FILE_SUFFIXES = {"gguf": ".gguf", "comfyui": ".safetensors"}  # of formats that are one file


Case = tuple[Row, str]  # the name of a model


class Written(NamedTuple):
    """A checkpoint of one row, the directory it was made from, and what its decoded weights compute."""

    row: Row
    path: Path
    model: Path
    want: np.ndarray


@pytest.fixture(autouse=True, scope="module")
def _offline() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        yield


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The directory of a model with weights of a dtype, made once. MiniLM has its own."""
    made: dict[tuple[str, str], Path] = {}

    def get(model: str, dtype: str) -> Path:
        if model == ENCODER:
            return model_dir()
        if (model, dtype) not in made:
            made[model, dtype] = MODELS[model](tmp_path_factory.mktemp(f"{model}-{dtype}"), dtype)
        return made[model, dtype]

    return get


def write(row: Row, model: str, source: Path, written: Path, decoded: Path) -> None:
    """Quantize a model by the command line, and decode it again."""
    run = arrowquant if (row, model) in BY_PROCESS else invoked
    options = itertools.chain.from_iterable(("--format-option", f"{k}={v}") for k, v in row.options)
    asked = ("--format", row.format, "--scheme", row.scheme, *options)
    done = json.loads(run("quantize", source, written, *asked, "--device", "cpu", "--json"))
    assert [tensor["action"] for tensor in done["tensors"]].count("quantized") >= N_LINEAR[model]
    run("dequantize", written, decoded, "--dtype", "float32", "--device", "cpu")


def invoked(*args: object) -> str:
    """The command line in this process: what it prints on stdout."""
    done = CliRunner().invoke(cli.app, [*map(str, args)])
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def written(source: Callable[[str, str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Written]:
    """A case of the matrix, written and decoded. Those of their own process are kept, and otherwise the last one: the
    tests of a case follow each other."""
    kept: dict[Case, Written] = {}

    def get(case: Case) -> Written:
        if case not in kept:
            for old in kept.keys() - BY_PROCESS:
                shutil.rmtree(kept.pop(old).path.parent)
            row, model = case
            folder, origin, suffix = tmp_path_factory.mktemp("written"), source(model, row.source), ""
            if row.format in FILE_SUFFIXES:
                suffix = FILE_SUFFIXES[row.format]
            path, decoded = folder / f"quantized{suffix}", folder / ("decoded.safetensors" if suffix else "decoded")
            write(row, model, origin, path, decoded)
            kept[case] = Written(row, path, origin, reference(decoded, origin, row.dtype))
        return kept[case]

    return get


def assert_close(got: np.ndarray, want: np.ndarray, tolerance: float) -> None:
    """Raise AssertionError if they differ by more than this share of the largest value of `want`."""
    assert got.shape == want.shape
    share = float(np.abs(got - want).max() / np.abs(want).max())
    assert share <= tolerance, f"they differ by {share:.2e} of the largest value; {tolerance:.0e} is allowed"


@pytest.mark.parametrize(
    ("case", "loader"),
    [
        pytest.param(case, loader, id=f"{case[0].id}-{case[1]}-{loader}")
        for case in CASES
        for loader in case[0].of(case[1])
    ],
)
def test_the_loader_computes_what_the_decoded_weights_do(
    written: Callable[[Case], Written], case: Case, loader: str
) -> None:
    got, (outputs, tolerance) = written(case), LOADERS[loader]
    assert_close(outputs(got.path, got.model, got.row.dtype), got.want, tolerance)


def first(name: str, scheme: str, model: str) -> Case:
    """The first case of the matrix with this format, scheme and model."""
    return next(case for case in CASES if (case[0].format, case[0].scheme, case[1]) == (name, scheme, model))


DAMAGES = [
    ("compressed-tensors", "int4_g128", partial(damage.safetensors, "weight_packed", damage.swapped_nibbles)),
    ("compressed-tensors", "int4_g128", partial(damage.safetensors, "weight_packed", damage.without_offset)),
    ("compressed-tensors", "nvfp4", partial(damage.safetensors, "weight_packed", damage.swapped_nibbles)),
    ("compressed-tensors", "nvfp4", partial(damage.safetensors, "weight_global_scale", damage.reciprocal)),
    ("compressed-tensors", "mxfp4", partial(damage.safetensors, "weight_packed", damage.swapped_nibbles)),
    ("compressed-tensors", "e4m3_channel", partial(damage.safetensors, "weight_scale", damage.reciprocal)),
    ("gptq", "int4_g128", partial(damage.safetensors, "qweight", damage.swapped_nibbles)),
    ("gptq", "int4_g128", partial(damage.safetensors, "qzeros", damage.one_more)),
    ("awq", "int4_g128_asym", partial(damage.safetensors, "qweight", damage.swapped_nibbles)),
    ("awq", "int4_g128_asym", partial(damage.safetensors, "qzeros", damage.one_more)),
    ("bitsandbytes", "nf4_g64", partial(damage.safetensors, "weight", damage.swapped_nibbles)),
    ("bitsandbytes", "nf4_g64", partial(damage.safetensors, "weight", damage.reversed_codes)),
    ("fp8", "e4m3_b128", partial(damage.safetensors, "weight_scale_inv", damage.reciprocal)),
    ("modelopt", "nvfp4", partial(damage.safetensors, "weight", damage.swapped_nibbles)),
    ("modelopt", "nvfp4", partial(damage.safetensors, "weight_scale_2", damage.reciprocal)),
    ("comfyui", "e4m3_tensor", partial(damage.safetensors, "scale_weight", damage.reciprocal)),
    ("mlx", "affine4_g64", partial(damage.safetensors, "weight", damage.swapped_nibbles)),
    ("mlx", "affine4_g64", partial(damage.safetensors, "biases", damage.zeroed)),
    ("gguf", "q4_0", partial(damage.gguf_q4_0, damage.swapped_nibbles)),
    ("gguf", "q4_0", partial(damage.gguf_q4_0, damage.without_offset)),
]


@pytest.mark.parametrize(
    ("case", "harm"),
    [
        pytest.param(
            first(name, scheme, "llama"),
            harm,
            id=f"{name}-{scheme}-{'-'.join(map(str, harm.args[:-1]))}-{harm.args[-1].__name__}",
        )
        for name, scheme, harm in DAMAGES
    ],
)
def test_damage_to_one_weight_is_noticed(
    written: Callable[[Case], Written], tmp_path: Path, case: Case, harm: Callable[[Path], None]
) -> None:
    whole = written(case)
    copy = tmp_path / whole.path.name
    (shutil.copytree if whole.path.is_dir() else shutil.copyfile)(whole.path, copy)
    harm(copy)
    for loader in whole.row.loaders:
        outputs, tolerance = LOADERS[loader]
        with pytest.raises(AssertionError, match="they differ by"):
            assert_close(outputs(copy, whole.model, whole.row.dtype), whole.want, tolerance)


@pytest.mark.parametrize("model", [*LANGUAGE, MIXTURE, ENCODER])
def test_the_tokenizer_in_a_gguf_file_reads_as_the_one_of_the_model(
    written: Callable[[Case], Written], model: str
) -> None:
    from transformers import AutoTokenizer

    file = written(first("gguf", "q8_0", model))
    texts = [*TEXTS, "  two  spaces\n\tand 12345 ünïcode 日本 it's"]
    tokenizer = AutoTokenizer.from_pretrained(file.model)
    assert llama_cpp.token_ids(file.path, texts) == [tokenizer(text)["input_ids"] for text in texts]


def test_a_weight_that_is_missing_is_noticed(source: Callable[[str, str], Path]) -> None:
    from safetensors.torch import load_file

    model = source("llama", "float32")
    tensors = load_file(model / "model.safetensors")
    assert decoders.run(tensors, model, "float32").shape == (1, 16, 512)
    with pytest.raises(AssertionError, match=r"missing_keys.*model\.norm\.weight"):
        decoders.run({n: t for n, t in tensors.items() if n != "model.norm.weight"}, model, "float32")
    with pytest.raises(AssertionError, match=r"unexpected_keys.*model\.norm\.extra"):
        decoders.run(tensors | {"model.norm.extra": tensors["model.norm.weight"].clone()}, model, "float32")
