"""Peak memory of quantizing a large checkpoint on the CPU: a process of its own, watched from outside.

    python benchmarks/bench_memory.py --gib 20 --out benchmarks/results

The source has the shapes of Llama-2-7B, as many layers as make the size, in sparse files: it takes no disk space and
says nothing about speed. Anonymous memory is what a process allocates; pages of mapped files are the kernel's to drop.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.fixtures import sparse_llama  # noqa: E402 - the repository is not on the path of a script
from tests.record import write  # noqa: E402


def anonymous_kib(pid: int) -> int:
    """Resident anonymous memory of a process now; 0 once it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def watch(command: list[str]) -> tuple[int, float]:
    """Run a command; returns (peak anonymous KiB sampled every 5 ms, seconds)."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        peak = 0
        while process.poll() is None:
            peak = max(peak, anonymous_kib(process.pid))
            time.sleep(0.005)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return peak, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=20.0, help="size of the source in GiB")
    parser.add_argument("--work", type=Path, help="folder for source and output; a temporary one by default")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder for the results file")
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=arguments.work))
    try:
        source = sparse_llama(work / "source", arguments.gib)
        size = sum(f.stat().st_size for f in source.glob("*.safetensors"))
        rows = []
        for scheme, target in (("int4_g128", "ct"), ("int8_channel", "ct8"), ("int4_g128_asym", "model.parquet")):
            output = work / target
            file_format = "parquet" if target.endswith(".parquet") else "compressed-tensors"
            options = ["--scheme", scheme, "--format", file_format, "--device", "cpu", "--quiet"]
            command = [sys.executable, "-m", "arrowquant_gpu.cli", "quantize", str(source), str(output), *options]
            peak, seconds = watch(command)
            rows.append({"scheme": scheme, "format": file_format, "peak_anonymous_mb": round(peak * 1024 / 1e6, 1)})
            print(f"{scheme:16} {file_format:20} peak anonymous {peak * 1024 / 1e6:6.1f} MB   ({seconds:.0f} s)")
            shutil.rmtree(output) if output.is_dir() else output.unlink()
        write(arguments.out / "memory.json", {"source_bytes": size, "runs": rows})
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
