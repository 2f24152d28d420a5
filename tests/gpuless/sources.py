"""The kernels that the gates themselves are tested on, and inputs that try every special value."""

from __future__ import annotations

from pathlib import Path

import numpy as np

SOUND = Path(__file__).parent / "kernels" / "sound.cu"
FAULTY = Path(__file__).parent / "kernels" / "faulty.cu"

# Both zeros, both infinities, NaN of both signs, subnormals, the largest, halves, and around the limits of int32.
SPECIAL_BITS = (
    *(0x00000000, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFFFFFFF, 0x7F800001),
    *(0x00000001, 0x80000001, 0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x3F000000, 0x3FC00000, 0x40200000),
    *(0x4EFFFFFF, 0x4F000000, 0xCF000000, 0xCF000001, 0x4F7FFFFF, 0x4F800000, 0x477FEFFF, 0x477FF000, 0x33000000),
)


def random_words(n: int, seed: int) -> np.ndarray:
    """[n] uint32: a third special values, a third random bits, a third floats of ordinary size."""
    rng = np.random.default_rng(seed)
    ordinary = (rng.standard_normal(n) * rng.choice([1e-3, 1.0, 7.0, 1e5, 1e-38], n)).astype(np.float32)
    bits = rng.integers(0, 1 << 32, n, dtype=np.uint64).astype(np.uint32)
    special = rng.choice(np.array(SPECIAL_BITS, np.uint32), n)
    return np.choose(rng.integers(0, 3, n), [ordinary.view(np.uint32), bits, special])


def special_floats(n: int) -> np.ndarray:
    """[n] float32 for conversions: `random_words`, and many around the range of float16."""
    words = random_words(n, seed=1)
    near_half = np.random.default_rng(2).integers(0x32000000, 0x48000000, n // 2, dtype=np.uint32)
    words[: n // 2] = near_half | (words[: n // 2] & np.uint32(0x80000000))
    return words.view(np.float32)
