"""AsyncArrowQuantV2: the same results, an event loop that goes on, and cancellation that leaves nothing behind."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arrowquant_gpu import ArrowQuantV2, AsyncArrowQuantV2, DiffusionQuantConfig
from arrowquant_gpu.errors import ArrowQuantError, InputError, SourceError

from .fixtures import write_safetensors


@pytest.fixture
def quantizer() -> AsyncArrowQuantV2:
    return AsyncArrowQuantV2(device="cpu")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    tensors = {f"fc.{i}.weight": rng.standard_normal((64, 256), np.float32) for i in range(4)}
    return write_safetensors(tmp_path / "model.safetensors", tensors, {"modality": "image"})


def without_time(result: Any) -> dict[str, Any]:
    return {k: v for k, v in result.items() if k not in ("quantization_time_s", "quantized_path")}


def test_the_results_are_those_of_the_class(quantizer: AsyncArrowQuantV2, model: Path, tmp_path: Path) -> None:
    config = DiffusionQuantConfig(bit_width=8, group_size=64)
    work = quantizer.quantize_diffusion_model_async(model, tmp_path / "a", config)
    result = asyncio.run(work)
    want = ArrowQuantV2(device="cpu").quantize_diffusion_model(model, tmp_path / "b", config)
    assert without_time(result) == without_time(want)
    quality = asyncio.run(quantizer.validate_quality_async(model, tmp_path / "a"))
    assert quality == ArrowQuantV2(device="cpu").validate_quality(model, tmp_path / "b")
    assert quality["passed"]


@pytest.mark.parametrize("is_async", [True, False])
def test_callbacks_run_in_the_loop_and_are_awaited(
    quantizer: AsyncArrowQuantV2, model: Path, tmp_path: Path, is_async: bool
) -> None:
    seen: list[tuple[str, float]] = []
    threads = set()

    def note(name: str, fraction: float) -> None:
        threads.add(threading.get_ident())
        seen.append((name, fraction))

    async def awaited(name: str, fraction: float) -> None:
        await asyncio.sleep(0)
        note(name, fraction)

    callback = awaited if is_async else note
    asyncio.run(quantizer.quantize_diffusion_model_async(model, tmp_path / "o.parquet", None, callback))
    assert threads == {threading.get_ident()}
    assert [f for _, f in seen] == sorted(f for _, f in seen)
    assert seen[-1][1] == 1.0
    seen.clear()
    asyncio.run(quantizer.validate_quality_async(model, tmp_path / "o.parquet", progress_callback=callback))
    assert seen[-1][1] == 1.0


def test_an_exception_in_a_callback_is_raised(quantizer: AsyncArrowQuantV2, model: Path, tmp_path: Path) -> None:
    async def callback(name: str, fraction: float) -> None:
        raise ZeroDivisionError(name)

    with pytest.raises(ZeroDivisionError):
        asyncio.run(quantizer.quantize_diffusion_model_async(model, tmp_path / "o", progress_callback=callback))
    assert not (tmp_path / "o").exists()


def test_errors_are_those_of_the_class(quantizer: AsyncArrowQuantV2, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such file"):
        asyncio.run(quantizer.quantize_diffusion_model_async(tmp_path / "gone", tmp_path / "o"))
    with pytest.raises(InputError, match="mode 'x'"):
        AsyncArrowQuantV2("x")


@pytest.mark.parametrize("has_callback", [True, False])
@pytest.mark.parametrize("output", ["o.parquet", "o"])
def test_cancelling_stops_the_work_and_leaves_no_output(
    quantizer: AsyncArrowQuantV2,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    output: str,
    has_callback: bool,
) -> None:
    """The work is held in its first piece until it was cancelled."""
    from arrowquant_gpu.backends.cpu import CpuBackend

    began, go_on, calls = threading.Event(), threading.Event(), []
    real = CpuBackend.quantize

    def held(self: CpuBackend, *arguments: Any) -> Any:
        calls.append(1)
        began.set()
        assert go_on.wait(60)
        return real(self, *arguments)

    async def forever(name: str, fraction: float) -> None:
        began.set()
        go_on.set()
        await asyncio.sleep(3600)

    async def main() -> None:
        callback = forever if has_callback else None
        work = quantizer.quantize_diffusion_model_async(model, tmp_path / output, None, callback)
        task = asyncio.create_task(work)
        await asyncio.to_thread(began.wait, 60)
        task.cancel()
        await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()

    if not has_callback:
        monkeypatch.setattr(CpuBackend, "quantize", held)
    asyncio.run(main())
    assert not (tmp_path / output).exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(output)]
    assert not [t for t in threading.enumerate() if t.name.startswith("slot")]
    monkeypatch.undo()
    # The next run finds nothing in its way, and may take what was finished.
    result = asyncio.run(quantizer.quantize_diffusion_model_async(model, tmp_path / output, resume=True))
    assert result["bit_width"] == 4
    assert asyncio.run(quantizer.validate_quality_async(model, tmp_path / output))["passed"]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_several_models_in_order_with_one_failure(quantizer: AsyncArrowQuantV2, model: Path, tmp_path: Path) -> None:
    jobs = [
        (model, tmp_path / "a.parquet", DiffusionQuantConfig(bit_width=2)),
        (tmp_path / "gone.safetensors", tmp_path / "b.parquet"),
        (model, tmp_path / "c.parquet", {"bit_width": 8}),
        (str(model), str(tmp_path / "d.parquet"), None),
    ]
    seen: dict[int, list[float]] = {}

    async def callback(i: int, name: str, fraction: float) -> None:
        seen.setdefault(i, []).append(fraction)

    results = asyncio.run(quantizer.quantize_multiple_models_async(jobs, callback))
    assert [r["bit_width"] if isinstance(r, dict) else type(r) for r in results] == [2, SourceError, 8, 4]
    assert seen.keys() == {0, 2, 3}
    assert all(fractions[-1] == 1.0 for fractions in seen.values())
    assert not (tmp_path / "b.parquet").exists()
    assert asyncio.run(quantizer.quantize_multiple_models_async([])) == []


@pytest.mark.parametrize("most", [1, 3])
def test_no_more_models_at_a_time_than_asked_for(model: Path, tmp_path: Path, most: int) -> None:
    """Those that began wait until no further one has begun for a while."""
    quantizer, release = AsyncArrowQuantV2(device="cpu"), threading.Event()
    running: list[int] = []

    def work(*_: Any, **__: Any) -> dict[str, int]:
        running.append(1)
        assert release.wait(60)
        return {}

    quantizer.quantizer.quantize_diffusion_model = work  # type: ignore[method-assign]
    jobs = [(model, tmp_path / str(i)) for i in range(5)]

    async def main() -> int:
        task = asyncio.create_task(quantizer.quantize_multiple_models_async(jobs, max_concurrent=most))
        while len(running) < most:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        n = len(running)
        release.set()
        await task
        return n

    assert asyncio.run(main()) == most
    assert len(running) == 5


def test_a_callback_does_not_begin_after_the_cancellation(
    quantizer: AsyncArrowQuantV2, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker is held between its look at the cancellation and its call."""
    asked, go_on, called = threading.Event(), threading.Event(), []
    real = asyncio.run_coroutine_threadsafe

    def held(*arguments: Any) -> Any:
        asked.set()
        assert go_on.wait(60)
        return real(*arguments)

    async def main() -> None:
        work = quantizer.quantize_diffusion_model_async(
            model, tmp_path / "o", progress_callback=lambda *x: called.append(x)
        )
        task = asyncio.create_task(work)
        await asyncio.to_thread(asked.wait, 60)
        task.cancel()
        await asyncio.sleep(0)
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", held)
    asyncio.run(main())
    assert called == []
    assert not (tmp_path / "o").exists()


def test_cancelling_several_models_stops_all(quantizer: AsyncArrowQuantV2, model: Path, tmp_path: Path) -> None:
    jobs = [(model, tmp_path / f"{i}.parquet") for i in range(4)]

    async def main() -> None:
        began = asyncio.Event()

        async def callback(i: int, name: str, fraction: float) -> None:
            began.set()
            await asyncio.sleep(3600)

        task = asyncio.create_task(quantizer.quantize_multiple_models_async(jobs, callback))
        await began.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())
    assert not list(tmp_path.glob("*.parquet"))


@pytest.mark.parametrize("job", [("a",), "ab", ("a", "b", "c", "d"), ("a", "b", {"bits": 4})])
def test_bad_jobs_are_refused_before_any_work(quantizer: AsyncArrowQuantV2, job: Any) -> None:
    with pytest.raises(InputError):
        asyncio.run(quantizer.quantize_multiple_models_async([job]))
    with pytest.raises(InputError, match="max_concurrent 0"):
        asyncio.run(quantizer.quantize_multiple_models_async([], max_concurrent=0))
    assert issubclass(InputError, ArrowQuantError)


def test_the_loop_goes_on_meanwhile(quantizer: AsyncArrowQuantV2, model: Path, tmp_path: Path) -> None:
    """The work waits in a thread for what only the loop can do."""
    loop_did = threading.Event()

    def work(*_: Any, **__: Any) -> dict[str, Any]:
        assert loop_did.wait(60)
        return {"done": True}

    quantizer.quantizer.quantize_diffusion_model = work  # type: ignore[method-assign]

    async def main() -> Any:
        task = asyncio.create_task(quantizer.quantize_diffusion_model_async(model, tmp_path / "o"))
        await asyncio.sleep(0)
        loop_did.set()
        return await task

    assert asyncio.run(main()) == {"done": True}
