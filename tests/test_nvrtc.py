"""The compile step: what its key is made of, a cache that survives damage, clear errors, and registers."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from arrowquant_gpu.backends import launches, nvrtc
from arrowquant_gpu.errors import DeviceError

from . import registers

pytestmark = pytest.mark.nvrtc

# The smallest kernel there is.
SOURCE, DEFINES = "value_range", {"IN_T": "float"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ARROWQUANT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the kernels that a test may change."""
    copy = tmp_path / "kernels"
    shutil.copytree(nvrtc.kernel_dir(), copy)
    monkeypatch.setattr(nvrtc, "kernel_dir", lambda: copy)
    return copy


def test_the_key_follows_all_that_decides_the_bits(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [nvrtc.key(SOURCE, DEFINES, 90)]
    assert nvrtc.key(SOURCE, dict(reversed(DEFINES.items())), 90) == keys[0]
    keys.append(nvrtc.key(SOURCE, DEFINES, 100))
    keys.append(nvrtc.key(SOURCE, {"IN_T": "__half"}, 90))
    keys.append(nvrtc.key(SOURCE, {**DEFINES, "BITS": 4}, 90))
    monkeypatch.setattr(nvrtc, "version", lambda: "99.0")
    keys.append(nvrtc.key(SOURCE, DEFINES, 90))
    monkeypatch.setattr(nvrtc, "FLAGS", (*nvrtc.FLAGS, "-lineinfo"))
    keys.append(nvrtc.key(SOURCE, DEFINES, 90))
    for name in (f"{SOURCE}.cu", "weights.cuh", "common.cuh"):  # itself, what it includes, and what that includes
        with (sources / name).open("a") as file:
            file.write("// changed\n")
        keys.append(nvrtc.key(SOURCE, DEFINES, 90))
    assert len(set(keys)) == len(keys)


def test_a_header_that_is_not_included_is_no_part_of_the_key(sources: Path) -> None:
    before = nvrtc.key(SOURCE, DEFINES, 90)
    (sources / "codes.cuh").write_text("#error unused")
    assert nvrtc.key(SOURCE, DEFINES, 90) == before


def test_the_headers_of_cuda_are_part_of_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = nvrtc.key(SOURCE, DEFINES, 90)
    copy = tmp_path / "include"
    copy.mkdir()
    for file in nvrtc.include_dir().glob("cuda_*fp*"):
        shutil.copy(file, copy)
    (copy / "cuda_fp16.hpp").write_text("// another release")
    monkeypatch.setattr(nvrtc, "include_dir", lambda: copy)
    assert nvrtc.key(SOURCE, DEFINES, 90) != before


def test_a_cubin_is_compiled_once_and_described_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    first = nvrtc.build(SOURCE, DEFINES, 90)
    assert first.path.read_bytes()[:4] == b"\x7fELF"
    assert first.registers > 0
    assert first.spill_bytes == 0
    facts = json.loads(first.path.with_suffix(".json").read_text())
    assert (facts["source"], facts["defines"], facts["arch"]) == (SOURCE, DEFINES, 90)
    assert facts["registers"] == first.registers
    assert sorted(p.name for p in first.path.parent.iterdir()) == [f"{first.key}.cubin", f"{first.key}.json"]
    monkeypatch.setattr(nvrtc, "compile_source", None)  # a call would raise
    assert nvrtc.build(SOURCE, DEFINES, 90) == first


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "facts", "no facts", "no cubin"])
def test_a_damaged_cache_is_compiled_again(damage: str) -> None:
    first = nvrtc.build(SOURCE, DEFINES, 90)
    cubin, facts, good = first.path, first.path.with_suffix(".json"), first.path.read_bytes()
    if damage == "truncate":
        cubin.write_bytes(good[: len(good) // 2])
    elif damage == "flip":
        cubin.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
    elif damage == "empty":
        cubin.write_bytes(b"")
    elif damage == "facts":
        facts.write_text('{"sha256": 3')
    else:
        (facts if damage == "no facts" else cubin).unlink()
    assert nvrtc.build(SOURCE, DEFINES, 90) == first
    assert hashlib.sha256(cubin.read_bytes()).hexdigest() == json.loads(facts.read_text())["sha256"]


def test_the_cache_can_be_shared(cache: Path) -> None:
    """Several that build the same kernel at once end with one whole cubin, and leave nothing else behind."""
    built: list[nvrtc.Cubin] = []

    def build(arch: int) -> None:
        built.append(nvrtc.build(SOURCE, DEFINES, arch))

    threads = [threading.Thread(target=build, args=(arch,)) for arch in (80, 80, 90, 90, 90)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == len(threads)
    assert len(list(cache.iterdir())) == 4
    assert all(nvrtc._read_facts(cubin.path) for cubin in built)


def test_a_cache_that_cannot_be_written_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ARROWQUANT_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(DeviceError, match="ARROWQUANT_CACHE_DIR"):
        nvrtc.build(SOURCE, DEFINES, 90)


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARROWQUANT_CACHE_DIR", "/own")
    assert nvrtc.cache_dir() == Path("/own")
    monkeypatch.delenv("ARROWQUANT_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert nvrtc.cache_dir() == Path("/xdg/arrowquant_gpu")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert nvrtc.cache_dir() == Path.home() / ".cache" / "arrowquant_gpu"


def test_missing_headers_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cuda.pathfinder.find_nvidia_header_directory", lambda name: None)
    monkeypatch.setattr(nvrtc, "TOOLKIT", Path("/nowhere"))
    nvrtc.include_dir.cache_clear()
    try:
        with pytest.raises(DeviceError, match=r"cuda_fp16\.h.*cuda13"):
            nvrtc.build(SOURCE, DEFINES, 90)
        assert "cuda_fp16.h" in str(nvrtc.missing())
    finally:
        nvrtc.include_dir.cache_clear()


def test_missing_bindings_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("cuda.bindings", "cuda.bindings.nvrtc"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    nvrtc.version.cache_clear()
    try:
        assert "cuda-bindings is not installed" in str(nvrtc.missing())
    finally:
        nvrtc.version.cache_clear()


def test_an_architecture_that_nvrtc_does_not_know() -> None:
    with pytest.raises(DeviceError, match="sm_20"):
        nvrtc.build(SOURCE, DEFINES, 20)


def test_a_kernel_that_does_not_exist() -> None:
    with pytest.raises(DeviceError, match="no kernel 'quantise'"):
        nvrtc.build("quantise", DEFINES, 90)


def test_a_compile_error_is_shown(sources: Path) -> None:
    (sources / "common.cuh").write_text("#error planted")
    with pytest.raises(DeviceError, match="planted"):
        nvrtc.build(SOURCE, DEFINES, 90)


def test_a_spill_is_an_error(sources: Path) -> None:
    many = "float v[300]; for (int i = 0; i < 300; ++i) v[i] = x[i * n]; float s = 0;"
    total = "for (int i = 0; i < 300; ++i) s += v[i] * v[299 - i]; for (int i = 0; i < 300; ++i) x[i] = v[i] * s;"
    kernel = f"void __launch_bounds__(1024) spills(float* x, int n) {{ {many} {total} }}"
    (sources / "spills.cu").write_text(f'extern "C" __global__ {kernel}')
    with pytest.raises(DeviceError, match="spilled"):
        nvrtc.build("spills", {}, 90)


def test_the_kernels_of_an_installed_package_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "arrowquant_gpu"
    monkeypatch.setattr(nvrtc, "__file__", str(package / "backends" / "nvrtc.py"))
    with pytest.raises(DeviceError, match="reinstall"):
        nvrtc.kernel_dir()
    for folder in (package.parent / "kernels", package / "_kernels"):
        folder.mkdir(parents=True)
        (folder / "common.cuh").touch()
        assert nvrtc.kernel_dir() == folder


def test_variants_are_distinct_and_have_sources() -> None:
    every = list(launches.every())
    assert len(set(every)) == len(every)
    assert {v.source for v in every} == {p.stem for p in nvrtc.kernel_dir().glob("*.cu")}


def test_the_page_of_the_kernels_names_all() -> None:
    text = (Path(__file__).parents[1] / "docs" / "kernels.md").read_text()
    assert f"lists all {len(list(launches.every()))} variants" in text
    for file in nvrtc.kernel_dir().iterdir():
        assert f"`{file.stem if file.suffix == '.cu' else file.name}`" in text, file.name


# ---------------------------------------------------------------------------------------------------------------------
# Registers. A few here; each for two architectures in `make kernels`, for all of them in `make soak`.


@pytest.mark.parametrize("arch", registers.ARCHS)
def test_registers_are_within_their_budget(arch: int) -> None:
    every = list(launches.every())
    sample = [every[i] for i in np.random.default_rng(arch).permutation(len(every))[:4]]
    assert list(registers.over(registers.measure([(v, arch) for v in sample]), registers.budget())) == []


def test_every_kernel_has_a_budget() -> None:
    assert registers.budget().keys() == {registers.shared(v) for v in launches.every()}
    assert all(set(at) == set(map(str, registers.ARCHS)) for at in registers.budget().values())


def test_a_sample_has_every_kernel_twice_and_every_architecture() -> None:
    every = list(launches.every())
    sample = registers.sample(every)
    assert len(set(sample)) == len(sample) == 2 * len(every)
    for source in {v.source for v in every} - {"value_range"}:
        assert {arch for v, arch in sample if v.source == source} == set(registers.ARCHS)


def test_the_budget_is_written_as_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = registers.budget()
    monkeypatch.setattr(registers, "BUDGET", tmp_path / "registers.json")
    registers.BUDGET.write_text(registers.document(budget))
    assert registers.budget() == budget


def test_one_register_too_many_is_seen() -> None:
    assert list(registers.over({"a": {"90": 41}}, {"a": {"90": 40}}))
    assert list(registers.over({"b": {"90": 41}}, {"a": {"90": 40}}))
    assert not list(registers.over({"a": {"90": 40}}, {"a": {"90": 40}}))
