"""`AsyncArrowQuantV2`: models quantized and compared without blocking the event loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..errors import ArrowQuantError, InputError
from .config import DiffusionQuantConfig
from .quantizer import ArrowQuantV2
from .results import ModelResult, QualityResult

# (source, output), or with the config of this model; None is the default one.
Job = Sequence[Any]
T = TypeVar("T")


class AsyncArrowQuantV2:
    """`ArrowQuantV2` for asyncio: the same options and results, the work in threads.

    Callbacks may be functions or coroutine functions; they run in the event loop, and the work waits for them. An
    exception in one ends the work and is raised. Where the awaiting task is cancelled the work ends at its next piece,
    its output is what it was before, and only then is the cancellation raised. What was finished until then is kept
    beside the output for `resume=True`.

        >>> import tempfile, numpy as np, safetensors.numpy
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = safetensors.numpy.save_file({"fc.weight": np.eye(64, dtype=np.float32)}, folder / "m.safetensors")
        >>> quantizer = AsyncArrowQuantV2(device="cpu")
        >>> work = quantizer.quantize_diffusion_model_async(folder / "m.safetensors", folder / "m.parquet")
        >>> asyncio.run(work)["bit_width"]
        4
    """

    def __init__(self, mode: str = "diffusion", **options: Any) -> None:
        """Options as of `ArrowQuantV2`. Raises as that."""
        self.quantizer = ArrowQuantV2(mode, **options)

    async def quantize_diffusion_model_async(
        self,
        model_path: str | Path,
        output_path: str | Path,
        config: DiffusionQuantConfig | Mapping[str, Any] | None = None,
        progress_callback: Callable[[str, float], Any] | None = None,
        *,
        overwrite: bool = False,
        resume: bool = False,
    ) -> ModelResult:
        """As `ArrowQuantV2.quantize_diffusion_model`."""

        def work(report: Callable[..., None]) -> ModelResult:
            return self.quantizer.quantize_diffusion_model(
                model_path, output_path, config, report, overwrite=overwrite, resume=resume
            )

        return await _in_thread(work, progress_callback)

    async def quantize_multiple_models_async(
        self,
        models: Sequence[Job],
        progress_callback: Callable[[int, str, float], Any] | None = None,
        *,
        max_concurrent: int = 2,
        overwrite: bool = False,
        resume: bool = False,
    ) -> list[ModelResult | ArrowQuantError]:
        """Quantize several models, at most `max_concurrent` at a time.

        models: (model path, output path) or (model path, output path, config) of each
        progress_callback: called with (index of the model, tensor name, fraction of that model)

        Returns for each model, in order, its result, or the error that it came to: one that fails ends no other.

        Raises InputError for a job that is none of these, before any work; and what a callback raises.
        """
        if max_concurrent < 1:
            raise InputError(f"max_concurrent {max_concurrent}: at least 1 is needed")
        jobs = [_job(job, i) for i, job in enumerate(models)]
        free = asyncio.Semaphore(max_concurrent)

        async def one(i: int) -> ModelResult | ArrowQuantError:
            report = None if progress_callback is None else _with_index(progress_callback, i)
            async with free:
                try:
                    return await self.quantize_diffusion_model_async(
                        *jobs[i], report, overwrite=overwrite, resume=resume
                    )
                except ArrowQuantError as e:
                    return e

        tasks = [asyncio.create_task(one(i)) for i in range(len(jobs))]
        try:
            return await asyncio.gather(*tasks)
        finally:
            # Where one ended with what is no error of a model, or the whole was cancelled: none goes on unseen.
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def validate_quality_async(
        self,
        original_path: str | Path,
        quantized_path: str | Path,
        *,
        min_accuracy: float | None = None,
        progress_callback: Callable[[str, float], Any] | None = None,
    ) -> QualityResult:
        """As `ArrowQuantV2.validate_quality`."""

        def work(report: Callable[..., None]) -> QualityResult:
            return self.quantizer.validate_quality(
                original_path, quantized_path, min_accuracy=min_accuracy, progress_callback=report
            )

        return await _in_thread(work, progress_callback)


class _Cancelled(BaseException):
    """Raised in a worker's thread where the task that waits for it was cancelled. No error that anyone may catch."""


async def _in_thread(work: Callable[[Callable[..., None]], T], callback: Callable[..., Any] | None) -> T:
    """`work(report)` in a thread; `report` calls and awaits `callback` in this event loop."""
    loop, is_cancelled = asyncio.get_running_loop(), threading.Event()
    calls: set[asyncio.Task[None]] = set()

    async def call(*arguments: Any) -> None:
        assert callback is not None
        task = asyncio.current_task()
        assert task is not None
        # Here and where it is set is the loop's thread: a call is cancelled below, or does not begin.
        if is_cancelled.is_set():
            raise asyncio.CancelledError
        calls.add(task)
        try:
            result = callback(*arguments)
            if inspect.isawaitable(result):
                await result
        finally:
            calls.discard(task)

    def report(*arguments: Any) -> None:
        if is_cancelled.is_set():
            raise _Cancelled
        if callback is None:
            return
        try:
            asyncio.run_coroutine_threadsafe(call(*arguments), loop).result()
        except concurrent.futures.CancelledError:
            raise _Cancelled from None

    def guarded() -> T | _Cancelled:
        # A BaseException that is no Exception would not come out of a thread as it is.
        try:
            return work(report)
        except _Cancelled as e:
            return e

    running = asyncio.ensure_future(asyncio.to_thread(guarded))
    try:
        result = await asyncio.shield(running)
    except asyncio.CancelledError:
        is_cancelled.set()
        for call_task in calls:
            call_task.cancel()
        # Until the output is what it was: the files are being removed.
        while not running.done():
            with contextlib.suppress(asyncio.CancelledError):  # cancelled once more
                await asyncio.wait([running])
        if not running.cancelled() and (error := running.exception()) is not None:
            raise asyncio.CancelledError from error
        raise
    if isinstance(result, _Cancelled):  # a callback cancelled itself
        raise asyncio.CancelledError
    return result


def _with_index(callback: Callable[[int, str, float], Any], i: int) -> Callable[[str, float], Any]:
    return lambda name, fraction: callback(i, name, fraction)


def _job(job: Job, i: int) -> tuple[Any, Any, DiffusionQuantConfig]:
    if isinstance(job, str | Path) or len(job) not in (2, 3):
        raise InputError(f"model {i}: give (model path, output path) or (model path, output path, config)")
    config = job[2] if len(job) == 3 else None
    return job[0], job[1], DiffusionQuantConfig.of(config)
