"""Whole models: quantized and compared, with figures that are measured."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..diffusion import detect
from ..errors import InputError
from ..formats.checkpoint import open_checkpoint
from ..formats.output import ACTIVATIONS, MANIFEST
from ..pipeline import quantize_checkpoint
from ..pipeline.verify import VerifyReport, verify_checkpoint
from ..schemes import Scheme
from .config import DiffusionQuantConfig
from .results import ModelResult, QualityResult

# Called with what is being worked on and the fraction done, 0 to 1, from the thread that asked for the work.
ProgressCallback = Callable[[str, float], Any]
# The format by the suffix of the output; of any other name it is DIRECTORY_FORMAT.
SUFFIXES: Mapping[str, str] = {".parquet": "parquet", ".arrow": "arrow"}
DIRECTORY_FORMAT = "parquet-tensors"
# Weights in the directory of a model, and what else ends like them.
WEIGHT_SUFFIXES = (".safetensors", ".parquet", ".arrow")
NO_WEIGHTS = (MANIFEST, ACTIVATIONS)
MB = 1 << 20


def quantize_model(
    source: str | Path,
    target: str | Path,
    scheme: Scheme,
    config: DiffusionQuantConfig,
    *,
    is_diffusion: bool,
    device: str,
    threads: int | None,
    overwrite: bool,
    resume: bool,
    progress_callback: ProgressCallback | None,
) -> ModelResult:
    """Quantize a checkpoint into `target`; see `ArrowQuantV2.quantize_from_safetensors`."""
    start = time.perf_counter()
    modality = detect(open_checkpoint(source), config.modality).name
    if not is_diffusion and config.calibration is not None:
        raise InputError(f"calibration {config.calibration}: mode base makes no use of it; choose mode diffusion")
    widths = config.widths
    manifest = quantize_checkpoint(
        source,
        target,
        scheme,
        format=config.format or SUFFIXES.get(Path(target).suffix, DIRECTORY_FORMAT),
        compression=config.compression,
        device=device,
        threads=threads,
        include=config.include,
        ignore=config.ignore,
        # The figures of the result come from it.
        validate=True,
        overwrite=overwrite,
        resume=resume,
        widths=widths,
        diffusion=config.diffusion if is_diffusion else None,
        progress=fractions(progress_callback, source, n_passes=2 if widths.is_measured else 1),
    )
    seconds = time.perf_counter() - start
    if config.validate:
        verify_checkpoint(target, source, min_cosine=config.min_accuracy, device=device, threads=threads).check()
    n_bytes = weight_bytes(target)
    figures = {
        "quantized_path": str(target),
        "compression_ratio": weight_bytes(source) / n_bytes,
        "cosine_similarity": mean([cosine for cosine in manifest.table["cosine"].to_pylist() if cosine is not None]),
        "model_size_mb": n_bytes / MB,
        "modality": modality,
        "bit_width": scheme.bits,
        "quantization_time_s": seconds,
    }
    return ModelResult(figures, manifest.plan.warnings)


def compare_models(
    original: str | Path,
    quantized: str | Path,
    *,
    min_accuracy: float | None,
    device: str,
    threads: int | None,
    progress_callback: ProgressCallback | None,
) -> QualityResult:
    """Compare a quantized checkpoint with its original; see `ArrowQuantV2.validate_quality`."""
    report: VerifyReport = verify_checkpoint(
        quantized,
        original,
        min_cosine=min_accuracy,
        device=device,
        threads=threads,
        progress=fractions(progress_callback, quantized),
    )
    cosines = {f.name: f.cosine for f in report.findings if f.cosine is not None}
    n_bytes = weight_bytes(quantized)
    figures = {
        "cosine_similarity": mean(list(cosines.values())),
        "compression_ratio": weight_bytes(original) / n_bytes,
        "model_size_mb": n_bytes / MB,
        "per_layer_accuracy": cosines,
        "passed": not report.failed,
    }
    return QualityResult(figures, {f.name: f.problem for f in report.findings if f.problem is not None})


def weight_bytes(path: str | Path) -> int:
    """Bytes of the files that hold a model's weights, as they lie on disk; float or quantized."""
    path = Path(path)
    if not path.is_dir():
        if path.suffix == ".json":
            return sum(file.stat().st_size for file in {t.file for t in open_checkpoint(path).tensors.values()})
        return path.stat().st_size
    files = [f for f in path.rglob("*") if f.suffix in WEIGHT_SUFFIXES and f.name not in NO_WEIGHTS]
    return sum(file.stat().st_size for file in files)


def mean(values: list[float]) -> float:
    """The mean of the cosines of all quantized tensors; NaN where there is none."""
    return math.fsum(values) / len(values) if values else math.nan


def fractions(
    callback: ProgressCallback | None, model: str | Path, n_passes: int = 1
) -> Callable[[int, int, str], None] | None:
    """`callback` as the progress of work that goes over bytes of a model so many times."""
    if callback is None:
        return None
    last, n_done = (0, -1), 0

    def progress(done: int, total: int, name: str) -> None:
        nonlocal last, n_done
        # Bytes are counted anew in each pass.
        if done < last[0] or last[0] == last[1]:
            n_done = min(n_done + 1, n_passes - 1)
        last = done, total
        callback(name or Path(model).name, (n_done + (done / total if total else 1.0)) / n_passes)

    return progress
