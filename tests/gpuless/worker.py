"""The process that runs shim kernels: a crash, or a sanitizer's report, ends it and not the tests.

Started by launcher.py as a script without NumPy. It reads pickled requests from standard input and writes pickled
replies to standard output. Device memory is allocated here, so that a pointer of the caller's process means nothing.
"""

from __future__ import annotations

import ctypes
import pickle
import signal
import sys

ALIGNMENT = 256
CANARY = b"\xc9" * (64 * ALIGNMENT)  # wide, so that a kernel that writes too much meets nothing else
PATIENCE_S = 300  # a kernel that spins for ever is a fault, not a hang


class Library:
    """One compiled kernel."""

    def __init__(self, path: str):
        self.handle = ctypes.CDLL(path)
        self.handle.shim_error.restype = ctypes.c_char_p

    def signature(self) -> list[tuple[str, int]]:
        """(kind, bytes) of each parameter; kind is p, f, i, or s for a struct."""
        kinds, sizes = ctypes.create_string_buffer(64), (ctypes.c_int * 64)()
        n = self.handle.shim_signature(kinds, sizes)
        return [(kinds.raw[i : i + 1].decode(), sizes[i]) for i in range(n)]

    def launch(
        self,
        dimensions: list[int],
        order: int,
        fill: int,
        values: list[bytes | tuple[int, int]],
        allocations: list[bytes],
    ) -> list[bytes]:
        """Copy the allocations in, run the grid, and return them. RuntimeError with the shim's message."""
        memory = [Allocation(contents) for contents in allocations]
        cells: list[ctypes.Array[ctypes.c_char] | ctypes.c_void_p] = []
        for value in values:
            if isinstance(value, bytes):
                cells.append(ctypes.create_string_buffer(value, len(value)))
            else:
                number, offset = value
                cells.append(ctypes.c_void_p(memory[number].address + offset if number >= 0 else None))
        pointers = (ctypes.c_void_p * len(cells))(*map(ctypes.addressof, cells))
        signal.alarm(PATIENCE_S)
        failed = self.handle.shim_launch(
            (ctypes.c_uint * 6)(*dimensions), ctypes.c_uint(order), ctypes.c_uint(fill), pointers
        )
        signal.alarm(0)
        error = self.handle.shim_error().decode() if failed else ""
        results = []
        for number, allocation in enumerate(memory):
            contents, intact = allocation.release()
            results.append(contents)
            if not intact and not error:
                error = f"write out of bounds of allocation {number} ({allocation.size} bytes)"
        if error:
            raise RuntimeError(error)
        return results


class Allocation:
    """Memory aligned like a device allocation: exact under AddressSanitizer, between canaries otherwise."""

    libc = ctypes.CDLL(None)
    margin = len(CANARY)

    def __init__(self, contents: bytes):
        self.size = len(contents)
        start = ctypes.c_void_p()
        wanted = ctypes.c_size_t(self.size + 2 * self.margin)
        if self.libc.posix_memalign(ctypes.byref(start), ctypes.c_size_t(ALIGNMENT), wanted) or start.value is None:
            raise MemoryError(f"{self.size} bytes")
        self.start = start.value
        self.address = self.start + self.margin
        ctypes.memmove(self.address, contents, self.size)
        for zone in (self.start, self.address + self.size):
            ctypes.memmove(zone, CANARY, self.margin)

    def release(self) -> tuple[bytes, bool]:
        """Free the memory; the contents, and whether the canaries were left alone."""
        zones = (self.start, self.address + self.size)
        intact = all(ctypes.string_at(zone, self.margin) == CANARY[: self.margin] for zone in zones)
        contents = ctypes.string_at(self.address, self.size)
        self.libc.free(ctypes.c_void_p(self.start))
        return contents, intact


def main() -> None:
    libraries: dict[str, Library] = {}
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    if "--sanitized" in sys.argv:
        Allocation.margin = 0  # the red zones then begin at the first byte beyond
    while True:
        try:
            path, method, arguments = pickle.load(requests)
        except EOFError:
            return
        try:
            if path not in libraries:
                libraries[path] = Library(path)
            reply: tuple[object, str | None] = (getattr(libraries[path], method)(*arguments), None)
        except RuntimeError as error:
            reply = (None, str(error))
        pickle.dump(reply, replies, protocol=pickle.HIGHEST_PROTOCOL)
        replies.flush()


if __name__ == "__main__":
    main()
