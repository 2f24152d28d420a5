"""`ArrowQuantV2`: weights in arrays, tables and files, quantized by one object with one set of options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..backends import pick_device
from ..errors import DeviceError, InputError
from ..schemes import Scheme
from ..tables.quantize import TableQuantizer, as_reader, quantize_table
from . import models
from .batch import from_lists, quantize_in_turn
from .config import DiffusionQuantConfig
from .results import LayerResults, ModelResult, QualityResult
from .scheme import BIT_WIDTH, GROUP_SIZE, scheme_of
from .smart import Choice, choose, quantize_smart

# What a mode does with models; arrays and tables are quantized alike in all of them.
MODES: Mapping[str, str] = {"diffusion": "diffusion", "time_aware": "diffusion", "base": "base"}


class ArrowQuantV2:
    """Quantizes layers and models; holds its options and nothing else, and may be used from several threads.

    mode: "diffusion" stores what a model's modality and calibration call for beside its weights (docs/diffusion.md),
        "base" does not; "time_aware" is another name of diffusion. Weights do not depend on it unless there is
        calibration data of an image or audio model
    scheme: a scheme id for all calls, in place of `bit_width` and `group_size`
    group_size: weights that share a scale, where no scheme is given
    device: "auto", "cpu", "cuda", "cuda:N" or "reference"; every one gives the same bytes
    threads: of the CPU; by default ARROWQUANT_NUM_THREADS, else RAYON_NUM_THREADS, else all cores

    The calls take `scheme` or `group_size`, and `threads`, for one call. What they quantize with is
    `int{bit_width}_g{group_size}_asym`, or the scheme.

        >>> import numpy as np
        >>> quantizer = ArrowQuantV2(mode="diffusion", device="cpu")
        >>> result = quantizer.quantize_batch({"fc": np.ones((2, 256), np.float32)}, bit_width=4)["fc"]
        >>> len(result["quantized_data"]), result["scales"].shape, result["scheme"]
        (256, (2, 2), 'int4_g128_asym')

    Raises InputError for a mode, SchemeError for a scheme, and DeviceError for a device or threads that there are not.
    """

    def __init__(
        self,
        mode: str = "diffusion",
        *,
        scheme: str | Scheme | None = None,
        group_size: int = GROUP_SIZE,
        device: str = "auto",
        threads: int | None = None,
    ) -> None:
        if mode not in MODES:
            raise InputError(f"mode {mode!r}: choose one of {', '.join(MODES)}")
        self.mode = MODES[mode]
        self.scheme = None if scheme is None else Scheme.parse(scheme)
        if self.scheme is not None and group_size not in (GROUP_SIZE, self.scheme.group_size):
            scheme_of(BIT_WIDTH, scheme=self.scheme, group_size=group_size)
        self.group_size = Scheme(group_size=group_size).group_size
        pick_device(device)
        self.device, self.threads = device, _threads(threads)

    def __repr__(self) -> str:
        options = f"scheme={self.scheme.id!r}" if self.scheme is not None else f"group_size={self.group_size}"
        return f"ArrowQuantV2({self.mode!r}, {options}, device={self.device!r}, threads={self.threads})"

    # --- Dicts of arrays ---------------------------------------------------------------------------------------------

    def quantize(
        self,
        weights: Mapping[str, Any],
        bit_width: int = BIT_WIDTH,
        *,
        scheme: str | Scheme | None = None,
        group_size: int | None = None,
        threads: int | None = None,
    ) -> LayerResults:
        """As `quantize_batch`, and lists of Python numbers are taken too: each is copied, as float32.

            >>> result = ArrowQuantV2(device="cpu").quantize({"fc": [[1.0, 2.0], [3.0, 4.0]]}, bit_width=8)
            >>> result["fc"]["shape"], result["fc"]["dtype"]
            ((2, 2), 'float32')

        Raises as `quantize_batch`.
        """
        return self.quantize_batch(
            from_lists(weights), bit_width, scheme=scheme, group_size=group_size, threads=threads
        )

    def quantize_batch(
        self,
        weights: Mapping[str, Any],
        bit_width: int = BIT_WIDTH,
        continue_on_error: bool = False,
        parallel: bool = True,
        *,
        scheme: str | Scheme | None = None,
        group_size: int | None = None,
        threads: int | None = None,
    ) -> LayerResults:
        """Quantize a dict of arrays: NumPy, DLPack (torch, CuPy, JAX), Arrow arrays, buffers.

        Arrays are read in place, whatever their dtype; nothing of their size is allocated but the results.

        bit_width: 2, 3, 4, 5, 6 or 8
        continue_on_error: layers that cannot be quantized are left out and in `errors` of the result, with the reason
        parallel: False computes in the calling thread alone, which changes no byte

        Returns a dict of results by name, see `results.layer_result`; `tensor(name)` is what `dequantize` takes. The
        interpreter's lock is not held while a layer is computed.

        Raises SchemeError, InputError, NonFiniteError, ScaleOverflowError, DeviceError.
        """
        return self._batch(weights, self._scheme(bit_width, scheme, group_size), continue_on_error, parallel, threads)

    def quantize_batch_with_progress(
        self,
        weights: Mapping[str, Any],
        bit_width: int = BIT_WIDTH,
        progress_callback: Callable[[str, float], Any] | None = None,
        continue_on_error: bool = False,
        parallel: bool = True,
        *,
        scheme: str | Scheme | None = None,
        group_size: int | None = None,
        threads: int | None = None,
    ) -> LayerResults:
        """As `quantize_batch`; after each layer `progress_callback(layer_name, fraction)` is called.

        The fraction is that of the layers, over 0 and up to 1. The call comes from the calling thread; an exception in
        it ends the work and is raised as it is.

            >>> import numpy as np
            >>> seen = []
            >>> weights = {"a": np.ones(64, np.float32), "b": np.ones(64, np.float32)}
            >>> quantizer = ArrowQuantV2(device="cpu")
            >>> _ = quantizer.quantize_batch_with_progress(weights, progress_callback=lambda *x: seen.append(x))
            >>> seen
            [('a', 0.5), ('b', 1.0)]
        """
        chosen = self._scheme(bit_width, scheme, group_size)
        return self._batch(weights, chosen, continue_on_error, parallel, threads, progress_callback)

    def _batch(
        self,
        weights: Mapping[str, Any],
        scheme: Scheme,
        continue_on_error: bool,
        parallel: bool,
        threads: int | None,
        progress_callback: Callable[[str, float], Any] | None = None,
    ) -> LayerResults:
        threads = (_threads(threads) or self.threads) if parallel else 1
        options: dict[str, Any] = {"device": self.device, "threads": threads, "continue_on_error": continue_on_error}
        return quantize_in_turn(weights, scheme, progress_callback=progress_callback, **options)

    # --- Tables ------------------------------------------------------------------------------------------------------

    def quantize_arrow(
        self,
        table: Any,
        bit_width: int = BIT_WIDTH,
        *,
        scheme: str | Scheme | None = None,
        group_size: int | None = None,
        threads: int | None = None,
    ) -> pa.Table:
        """Quantize a table of weights into a table of results in the same order; docs/tables.md has their columns.

        table: pyarrow Table, RecordBatch or RecordBatchReader, or any object with `__arrow_c_stream__` or
            `__arrow_c_array__`. Columns layer_name and weights, lists of numbers whose nesting is the shape; or shape
            is a column of its own

            >>> table = pa.table({"layer_name": ["fc"], "weights": [[[1.0, 2.0], [3.0, 4.0]]]})
            >>> ArrowQuantV2(device="cpu").quantize_arrow(table, bit_width=4).select(["shape", "bit_width"]).to_pylist()
            [{'shape': [2, 2], 'bit_width': 4}]

        Raises SchemeError, InputError, NonFiniteError, ScaleOverflowError, DeviceError.
        """
        return self.quantize_batch_arrow(table, bit_width, scheme=scheme, group_size=group_size, threads=threads)

    def quantize_batch_arrow(
        self,
        table: Any,
        bit_width: int = BIT_WIDTH,
        continue_on_error: bool = False,
        parallel: bool = True,
        *,
        scheme: str | Scheme | None = None,
        group_size: int | None = None,
        threads: int | None = None,
    ) -> pa.Table:
        """As `quantize_arrow`; with `continue_on_error` the rows that cannot be quantized are left out.

        They are listed, with their reasons, in the schema metadata `arrowquant.errors` of the result, as JSON.
        """
        return quantize_table(
            table,
            self._scheme(bit_width, scheme, group_size),
            device=self.device,
            threads=(_threads(threads) or self.threads) if parallel else 1,
            continue_on_error=continue_on_error,
        )

    def quantize_arrow_batch(
        self,
        batch: Any,
        bit_width: int = BIT_WIDTH,
        *,
        scheme: str | Scheme | None = None,
        group_size: int | None = None,
        threads: int | None = None,
    ) -> pa.RecordBatch:
        """As `quantize_arrow`, of one record batch into one.

        batch: a pyarrow RecordBatch, or any object with `__arrow_c_array__`

            >>> batch = pa.record_batch({"layer_name": ["fc"], "weights": [[1.0, 2.0]]})
            >>> type(ArrowQuantV2(device="cpu").quantize_arrow_batch(batch)).__name__
            'RecordBatch'
        """
        if not hasattr(batch, "__arrow_c_array__"):
            raise InputError(
                f"{type(batch).__module__}.{type(batch).__qualname__} is no record batch; quantize_arrow takes tables "
                f"and streams"
            )
        chosen, reader = self._scheme(bit_width, scheme, group_size), as_reader(batch)
        threads = _threads(threads) or self.threads
        quantizer = TableQuantizer(reader.schema, chosen, device=self.device, threads=threads)
        batch = reader.read_next_batch()
        if batch.num_rows == 0:
            raise InputError("the record batch of weights has no rows")
        result = quantizer.batch(batch)
        quantizer.finish()
        return result

    # --- Whatever holds weights --------------------------------------------------------------------------------------

    def quantize_batch_smart(
        self,
        weights: Any,
        bit_width: int = BIT_WIDTH,
        *,
        scheme: str | Scheme | None = None,
        group_size: int | None = None,
    ) -> Any:
        """Quantize whatever holds weights, on the device and in the way that cost least here; `explain` says which.

        | weights | result |
        |---|---|
        | dict of arrays or lists; path of safetensors: a file, an index, a model directory | as of `quantize_batch` |
        | Table, or another object with `__arrow_c_stream__` | Table |
        | RecordBatch | RecordBatch |
        | RecordBatchReader, Dataset; path of Parquet, Arrow or a directory of such | RecordBatchReader, lazily |
        | one array: NumPy, DLPack, Arrow | one result, as of `quantize_batch` |

        What it costs was measured on this machine, once in a process. The bytes are the same whatever is chosen. A
        reader is quantized while it is read, and errors come from it then.

            >>> import numpy as np
            >>> ArrowQuantV2().quantize_batch_smart(np.ones((2, 256), np.float32))["shape"]
            (2, 256)

        Raises SchemeError, InputError, NonFiniteError, ScaleOverflowError, SourceError, DeviceError.
        """
        chosen = self._scheme(bit_width, scheme, group_size)
        return quantize_smart(weights, chosen, device=self.device, threads=self.threads)

    def explain(self, weights: Any) -> Choice:
        """How `quantize_batch_smart` would quantize `weights`, and why; nothing is quantized.

        >>> import numpy as np
        >>> ArrowQuantV2(device="cpu", threads=1).explain(np.ones((2, 256), np.float32)).path
        'batch'

        Raises InputError for what holds no weights, and DeviceError.
        """
        return choose(weights, device=self.device, threads=self.threads)

    # --- Models ------------------------------------------------------------------------------------------------------

    def quantize_from_safetensors(
        self,
        safetensors_path: str | Path,
        output_path: str | Path,
        bit_width: int = BIT_WIDTH,
        *,
        profile: str | None = None,
        progress_callback: Callable[[str, float], Any] | None = None,
        overwrite: bool = False,
        resume: bool = False,
        **options: Any,
    ) -> ModelResult:
        """Quantize a safetensors checkpoint, layer by layer, in bounded memory.

        safetensors_path: a file, an index file, or a model directory
        output_path: one file where it ends in .parquet or .arrow, else a directory; `format` says otherwise
        profile: "edge", "local" or "cloud": width, group size, least accuracy (docs/widths.md); what is given beside it
            goes before it
        progress_callback: called with (tensor name, fraction 0 to 1) from the calling thread; an exception in it ends
            the work, and `output_path` is what it was
        overwrite, resume: as of `quantize_checkpoint`
        options: fields of `DiffusionQuantConfig`: group_size, scheme, modality, calibration, min_accuracy, entropy,
            sensitive, fail_fast, format, include, ignore, validate, ...

        Returns a dict of what was measured:

        quantized_path: `output_path`
        compression_ratio: bytes of the files of weights before, over those after
        cosine_similarity: mean of the cosines of all quantized tensors, decoded, to their originals
        model_size_mb: of the files of weights in the output, in 2^20 bytes
        modality: text, code, image or audio; None where it is not known
        bit_width: what was asked for; with min_accuracy or entropy a tensor may have another, see the manifest
        quantization_time_s: seconds until all of it was on the disk

        Raises SchemeError, InputError, SourceError, PolicyError, FormatError, TargetError, QualityError, DeviceError,
        NonFiniteError and ScaleOverflowError; and VerifyError with `validate`.
        """
        given: dict[str, Any] = {**options, "profile": profile}
        if profile is None or type(bit_width) is int:
            given["bit_width"] = bit_width
        return self._model(
            safetensors_path, output_path, DiffusionQuantConfig.of(given), progress_callback, overwrite, resume
        )

    def quantize_diffusion_model(
        self,
        model_path: str | Path,
        output_path: str | Path,
        config: DiffusionQuantConfig | Mapping[str, Any] | None = None,
        progress_callback: Callable[[str, float], Any] | None = None,
        *,
        overwrite: bool = False,
        resume: bool = False,
    ) -> ModelResult:
        """As `quantize_from_safetensors`, with the options in a `DiffusionQuantConfig`, or a dict of its fields."""
        chosen = DiffusionQuantConfig.of(config)
        return self._model(model_path, output_path, chosen, progress_callback, overwrite, resume)

    def _model(
        self,
        source: str | Path,
        target: str | Path,
        config: DiffusionQuantConfig,
        progress_callback: Callable[[str, float], Any] | None,
        overwrite: bool,
        resume: bool,
    ) -> ModelResult:
        return models.quantize_model(
            source,
            target,
            self._scheme(config.bit_width, config.scheme, config.group_size),
            config,
            is_diffusion=self.mode == "diffusion",
            device=self.device,
            threads=self.threads,
            overwrite=overwrite,
            resume=resume,
            progress_callback=progress_callback,
        )

    def validate_quality(
        self,
        original_path: str | Path,
        quantized_path: str | Path,
        *,
        min_accuracy: float | None = None,
        progress_callback: Callable[[str, float], Any] | None = None,
    ) -> QualityResult:
        """Compare a quantized model with its original, every group decoded with its own scale.

        min_accuracy: the least cosine of a tensor; by default that of its scheme (docs/verify.md)

        Returns a dict, whose attribute `problems` says what is wrong with which tensor:

        cosine_similarity: mean of `per_layer_accuracy`
        compression_ratio, model_size_mb: as of `quantize_from_safetensors`
        per_layer_accuracy: cosine of each quantized tensor by name, the worst first
        passed: no tensor is missing, changed, under the least cosine, or further off than rounding explains

        Raises SourceError for a model that cannot be read, InputError (min_accuracy) and DeviceError.
        """
        return models.compare_models(
            original_path,
            quantized_path,
            min_accuracy=min_accuracy,
            device=self.device,
            threads=self.threads,
            progress_callback=progress_callback,
        )

    def _scheme(self, bit_width: int, scheme: str | Scheme | None, group_size: int | None) -> Scheme:
        return scheme_of(
            bit_width,
            scheme=scheme,
            group_size=group_size,
            otherwise=self.scheme,
            otherwise_group_size=self.group_size or GROUP_SIZE,
        )


def _threads(threads: int | None) -> int | None:
    if threads is not None and threads < 1:
        raise DeviceError(f"threads is {threads}: it must be 1 or more")
    return threads
