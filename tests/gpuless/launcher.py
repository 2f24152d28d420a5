"""Runs compiled shim kernels in a worker process, plain or under AddressSanitizer and UBSan; see worker.py."""

from __future__ import annotations

import atexit
import functools
import os
import pickle
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import IO, Any

from .errors import KernelFault

WORKER = Path(__file__).with_name("worker.py")
SANITIZER_OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1:exitcode=99:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1:exitcode=99",
}

_ADDRESS_ERROR = re.compile(r"ERROR: AddressSanitizer:? (?P<what>[^\n]*)")
_ACCESS = re.compile(r"^(?P<access>(?:READ|WRITE) of size \d+)", re.M)
_REGION = re.compile(r"is located (?P<where>\d+ bytes (?:to the right|to the left|inside|after|before)[^\n]*?region)")
_UNDEFINED = re.compile(r"(?P<where>[^\s:]+:\d+):\d+: runtime error: (?P<what>[^\n]*)")
_FRAME = re.compile(r"#\d+ 0x[0-9a-f]+ in [^\n]*?(?P<where>[^\s/]+\.cuh?:\d+)")


def summarize(report: str) -> str:
    """One line from a sanitizer's report: what, which access, and where in the .cu or .cuh file."""
    undefined = _UNDEFINED.search(report)
    if undefined:
        return f"{Path(undefined['where']).name}: {undefined['what']}"
    error = _ADDRESS_ERROR.search(report)
    if error is None:
        return ""
    parts = [error["what"].split(" on address")[0]]
    parts += [match[1] for pattern in (_ACCESS, _REGION) if (match := pattern.search(report))]
    frame = _FRAME.search(report)
    return ", ".join(parts) + (f" at {frame['where']}" if frame else "")


@functools.cache
def _runtime(name: str) -> str:
    """Path of one of g++'s sanitizer runtimes, which must be loaded before anything else."""
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return str(Path(found.stdout.strip()).resolve())


class Launcher:
    """One worker process, started when first used and again after a crash. Calls from several threads take turns."""

    def __init__(self, *, sanitize: bool):
        self.sanitize = sanitize
        self._turn = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._report: IO[bytes] | None = None
        atexit.register(self.close)

    def call(self, library: Path, method: str, *arguments: Any) -> Any:
        """Run `method` of worker.Library; KernelFault with the shim's, the sanitizer's or the system's word."""
        with self._turn:
            return self._call(library, method, *arguments)

    def _call(self, library: Path, method: str, *arguments: Any) -> Any:
        process = self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            pickle.dump((str(library), method, arguments), process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
            process.stdin.flush()
            reply, error = pickle.load(process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            raise KernelFault(self._bury()) from None
        if error is not None:
            raise KernelFault(error)
        return reply

    def close(self) -> None:
        """End the worker and wait for it."""
        if self._process is not None:
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    pipe.close()
            self._process.wait()
            self._process = None
        if self._report is not None:
            self._report.close()
            self._report = None

    def _start(self) -> subprocess.Popen[bytes]:
        if self._process is not None:
            return self._process
        environment = dict(os.environ)
        options = []
        if self.sanitize:
            environment |= SANITIZER_OPTIONS
            environment["LD_PRELOAD"] = f"{_runtime('libasan.so')}:{_runtime('libubsan.so')}"
            options = ["--sanitized"]
        self._report = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process that writes to it
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(WORKER), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._report,
            env=environment,
        )
        return self._process

    def _bury(self) -> str:
        """Why the worker died."""
        assert self._process is not None
        assert self._report is not None
        code = self._process.wait()
        self._report.seek(0)
        report = self._report.read().decode(errors="replace")
        self.close()
        if summary := summarize(report):
            return summary
        return f"the kernel's process ended with {code}: {report.strip()[-1000:] or 'no message'}"


@functools.cache
def launcher(sanitize: bool) -> Launcher:
    """The worker process of this Python process, plain or sanitized."""
    return Launcher(sanitize=sanitize)
