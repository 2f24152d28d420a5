"""Quantization over Arrow Flight: weights in, quantized rows out, in bounded memory; docs/flight.md.

`Server` answers, `Client` asks. Importing this package loads pyarrow.flight; `import arrowquant_gpu` does not.

    >>> import numpy as np, pyarrow as pa
    >>> with Server("grpc://127.0.0.1:0", device="cpu") as server, Client(server.location) as client:
    ...     rows = client.quantize({"fc": np.ones((2, 64), np.float32)}, "int8_g32")
    >>> rows["layer_name"].to_pylist(), rows["shape"].to_pylist(), rows["scheme"].to_pylist()
    (['fc'], [[2, 64]], ['int8_g32'])
"""

from __future__ import annotations

from .client import Client as Client
from .server import Server as Server

__all__ = ["Client", "Server"]
