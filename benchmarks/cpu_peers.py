"""The peers that bench_cpu.py and bench_checkpoint.py measure: each one's own CPU quantizer behind one call.

Every peer gets the weights in its own array type beforehand, and is called in its fastest documented way. `decode` of
what it made is compared with the weights, so that a peer which did nothing is not measured.
"""

from __future__ import annotations

import ctypes
import importlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from arrowquant_gpu import ops
from arrowquant_gpu.schemes import Scheme
from arrowquant_gpu.tensor import QuantizedTensor

MODULES = {
    "llama-cpp-python": "llama_cpp",
    "compressed-tensors": "compressed_tensors",
    "torchao": "torchao",
    "bitsandbytes": "bitsandbytes",
    "mlx": "mlx.core",
    "hqq": "hqq.core.quantize",
}


class Peer(NamedTuple):
    """`run(i)` quantizes weights number i; `decode(result of run(i))` gives float32 weights back."""

    name: str
    threads: int | None  # None where the library decides
    run: Callable[[int], Any]
    decode: Callable[[Any], np.ndarray]


def versions() -> dict[str, str]:
    """Versions of all peers. Exits with the names of those that are not installed."""
    absent = []
    for package, module in MODULES.items():
        try:
            importlib.import_module(module)
        except ImportError as e:
            absent.append(f"{package} ({e})")
    if absent:
        raise SystemExit(
            f"the peers are measured too, and all of them are needed (extra bench); not importable: {'; '.join(absent)}"
        )
    return {package: metadata.version(package) for package in [*MODULES, "torch"]}


def peers(weights: list[np.ndarray], dtype: str, threads: int) -> list[Peer]:
    """The peers that take `dtype`, at so many threads (mlx has one stream of its own and is measured once)."""
    found = [*compressed_tensors(weights, threads), torchao(weights, threads), bitsandbytes(weights, threads)]
    if dtype == "float32":
        found += [llama_cpp(weights, threads, name) for name in GGML]
    if threads == 1:
        found.append(mlx(weights))
    return found


def layer(weights: list[np.ndarray], threads: int) -> dict[str, float]:
    """GB/s of every peer on the bfloat16 matrices of a layer, one after the other, in bytes of bfloat16.

    llama.cpp gets them as float32. HQQ's search would take minutes for a layer, and is measured on 256 rows.
    """
    times: dict[str, list[float]] = {}
    for x in weights:
        made = [*peers([x], "bfloat16", threads), hqq([x], threads, optimized=False)]
        made.append(llama_cpp([x.astype(np.float32)], threads, "Q4_0"))
        if threads > 1:
            made.append(mlx([x]))
        for peer in made:
            if peer.name not in times:
                peer.run(0)  # the first call of all does not count
            start = time.perf_counter()
            peer.run(0)
            times.setdefault(peer.name, []).append(time.perf_counter() - start)
    n_bytes = sum(x.nbytes for x in weights)
    rates = {name: n_bytes / sum(seen) / 1e9 for name, seen in times.items()}
    part = weights[0][:256]
    hqq([part[:8]], threads, optimized=True).run(0)
    start = time.perf_counter()
    hqq([part], threads, optimized=True).run(0)
    return rates | {"HQQ, 256 rows": part.nbytes / (time.perf_counter() - start) / 1e9}


# --- llama-cpp-python: libggml, called as llama-quantize does, rows shared among threads -----------------------------

# Types and their numbers in ggml.h; those of bench_cpu.py first.
GGML = {"Q4_0": 2, "Q8_0": 8}
GGML_TYPES = (
    GGML
    | {"Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14}
    | {"IQ4_NL": 20}
)


def llama_cpp(weights: list[np.ndarray], threads: int, name: str) -> Peer:
    import llama_cpp as package

    library = ctypes.CDLL(str(next(Path(package.__file__).parent.glob("lib/libggml-base.so*"))))
    quantize_chunk = library.ggml_quantize_chunk
    quantize_chunk.restype = ctypes.c_size_t
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    number_of_type, scheme = GGML_TYPES[name], Scheme.parse(name.lower())
    library.ggml_quantize_init(number_of_type)
    rows, length = weights[0].shape
    out = np.zeros(scheme.packed_shape((rows, length)), np.uint8)
    pool = ThreadPoolExecutor(max(threads - 1, 1))
    edges = [rows * i // threads for i in range(threads + 1)]

    def part(i: int, worker: int) -> None:
        first, last = edges[worker], edges[worker + 1]
        x = weights[i].ctypes.data
        quantize_chunk(number_of_type, x, out.ctypes.data, first * length, last - first, length, None)

    def run(i: int) -> np.ndarray:
        helpers = [pool.submit(part, i, worker) for worker in range(1, threads)]
        part(i, 0)
        for helper in helpers:
            helper.result()
        return out

    def decode(blocks: np.ndarray) -> np.ndarray:
        scales = np.empty((rows, 0), np.float16)
        return ops.dequantize(QuantizedTensor(blocks, scales, None, (rows, length), scheme, "float32"), device="cpu")

    return Peer(f"llama.cpp {name}", threads, run, decode)


# --- The three built on torch ----------------------------------------------------------------------------------------


def _torch(weights: list[np.ndarray]) -> list[Any]:
    import torch

    if weights[0].itemsize == 4:
        return [torch.from_numpy(x) for x in weights]
    kind = torch.float16 if weights[0].dtype == np.float16 else torch.bfloat16
    return [torch.from_numpy(x.view(np.int16)).view(kind) for x in weights]


def _with_threads(threads: int, run: Callable[[int], Any]) -> Callable[[int], Any]:
    import torch

    def call(i: int) -> Any:
        torch.set_num_threads(threads)
        with torch.inference_mode():
            return run(i)

    return call


def compressed_tensors(weights: list[np.ndarray], threads: int) -> list[Peer]:
    """Its min-max quantizer for W4A16 g128, which llm-compressor runs; without and with packing."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=128)
    tensors = _torch(weights)

    def run(i: int) -> Any:
        groups = tensors[i].unflatten(-1, (-1, 128))
        scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
        return quantize(tensors[i], scale, zero, args), scale

    def pack(i: int) -> Any:
        import torch

        codes, scale = run(i)
        pack_to_int32(codes.to(torch.int8), 4)
        return codes, scale

    def decode(result: Any) -> np.ndarray:
        codes, scale = result
        return (codes.float().unflatten(-1, (-1, 128)) * scale.float()[..., None]).flatten(1).numpy()

    return [
        Peer("compressed-tensors W4A16", threads, _with_threads(threads, run), decode),
        Peer("compressed-tensors W4A16 packed", threads, _with_threads(threads, pack), decode),
    ]


def torchao(weights: list[np.ndarray], threads: int) -> Peer:
    """Affine 4-bit g128, one code per byte."""
    import torch
    from torchao.quantization import quant_primitives as q

    block, tensors = (1, 128), _torch(weights)

    def run(i: int) -> Any:
        x = tensors[i]
        scale, zero = q.choose_qparams_affine(x, q.MappingType.ASYMMETRIC, block, torch.uint8, 0, 15)
        return q.quantize_affine(x, block, scale, zero, torch.uint8, 0, 15), scale, zero

    def decode(result: Any) -> np.ndarray:
        return q.dequantize_affine(result[0], block, result[1], result[2], torch.uint8, 0, 15).float().numpy()

    return Peer("torchao affine int4", threads, _with_threads(threads, run), decode)


def bitsandbytes(weights: list[np.ndarray], threads: int, name: str = "NF4") -> Peer:
    from bitsandbytes import functional

    tensors = _torch(weights)

    def decode(result: Any) -> np.ndarray:
        return functional.dequantize_4bit(*result).float().numpy()

    run = _with_threads(threads, lambda i: functional.quantize_4bit(tensors[i], blocksize=64, quant_type=name.lower()))
    return Peer(f"bitsandbytes {name}", threads, run, decode)


def hqq(weights: list[np.ndarray], threads: int, *, optimized: bool) -> Peer:
    """HQQ's 4-bit g128: its search for the zero point, or only round-to-nearest. Not in `peers`: it takes long."""
    import torch
    from hqq.core.quantize import Quantizer

    tensors = _torch(weights)
    options = {"nbits": 4, "group_size": 128, "axis": 1, "compute_dtype": torch.float32, "device": "cpu"}

    def decode(result: Any) -> np.ndarray:
        return Quantizer.dequantize(*result).float().numpy()

    run = _with_threads(threads, lambda i: Quantizer.quantize(tensors[i], optimize=optimized, **options))
    return Peer("HQQ" if optimized else "HQQ without its search", threads, run, decode)


# --- mlx -------------------------------------------------------------------------------------------------------------


def mlx(weights: list[np.ndarray], group_size: int = 128) -> Peer:
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    kind = getattr(mx, weights[0].dtype.name)
    arrays = [mx.array(x.astype(np.float32)).astype(kind) for x in weights]
    mx.eval(arrays)

    def run(i: int) -> Any:
        result = mx.quantize(arrays[i], group_size=group_size, bits=4)
        mx.eval(result)
        return result

    def decode(result: Any) -> np.ndarray:
        return np.array(mx.dequantize(*result, group_size=group_size, bits=4).astype(mx.float32))

    return Peer("mlx affine int4", None, run, decode)
