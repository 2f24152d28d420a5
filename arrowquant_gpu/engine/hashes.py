"""The hash of a stored tensor: what the journal and the manifest say of it. Defined here and nowhere else.

The digest of a piece is XXH3-128 of its stored bytes, its places one after the other; the hash of a tensor is XXH3-128
of its pieces' digests, in the order of the pieces. Pieces depend on the plan and the format alone, so the hash does
not depend on devices, threads or the order in which they finish. It tells damage, not intent: XXH3 is no signature.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray


def piece_digest(arrays: Iterable[NDArray[Any]]) -> bytes:
    """16 bytes: the digest of a piece whose places hold these row-major arrays. Nothing is copied.

    >>> piece_digest([np.zeros((2, 2), np.uint8)]) == piece_digest([np.zeros(3, np.uint8), np.zeros(1, np.uint8)])
    True
    """
    digest = xxhash.xxh3_128()
    for array in arrays:
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.digest()


def tensor_hash(digests: Iterable[bytes]) -> str:
    """32 hex digits: the hash of a tensor whose pieces have these digests.

    >>> tensor_hash([piece_digest([np.arange(4, dtype=np.uint8)])])
    'caeb833cf3d464d0332068575f6d7127'
    """
    return xxhash.xxh3_128_hexdigest(b"".join(digests))
