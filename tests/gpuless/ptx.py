"""`PtxModule`: the PTX that NVRTC emitted, run on NumPy arrays: no GPU and no driver.

    module = PtxModule(ptx_text)
    quantize = module.get_function("quantize")
    quantize((blocks,), (256,), (x, packed, scales, np.int64(n)))

What the compiler did to the arithmetic (contraction, flushing, another order) shows here, and nowhere else without a
GPU. An instruction that is not modelled is an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from .arguments import Bound, Pointer, bind, dimensions
from .errors import KernelFault
from .ptx_decode import decode
from .ptx_machine import Machine, Triple
from .ptx_memory import GlobalMemory
from .ptx_parse import Entry, parse

THREADS_AT_ONCE = 1 << 16


class PtxModule:
    """The entries of one PTX text."""

    def __init__(self, text: str):
        self.entries = parse(text)

    def get_function(self, entry: str) -> PtxFunction:
        """The kernel `entry`. KernelFault where it is not there or has an instruction that is not modelled."""
        if entry not in self.entries:
            raise KernelFault(f"{entry} is not in this module, which has {', '.join(self.entries)}")
        return PtxFunction(self.entries[entry])


class PtxFunction:
    """One kernel; call it as CuPy's RawKernel is called.

    `issued` counts the warps that came to each instruction in the last call, by its number in `entry.instructions`.
    `only_blocks`, if set, are the numbers of the blocks that are run, of a grid too large to run as a whole; -1 is the
    last one.
    """

    def __init__(self, entry: Entry):
        self.entry = entry
        self.steps = [decode(entry, instruction) for instruction in entry.instructions]
        self.issued: Counter[int] = Counter()
        self.only_blocks: Sequence[int] | None = None

    def __call__(self, grid: Sequence[int], block: Sequence[int], args: Sequence[object], shared_mem: int = 0) -> None:
        """Run the grid on NumPy arrays in place. KernelFault where the launch or the kernel is wrong."""
        self.prepare(grid, block, args, shared_mem)()

    def prepare(
        self, grid: Sequence[int], block: Sequence[int], args: Sequence[object], shared_mem: int = 0
    ) -> Callable[[], None]:
        """Check a launch now, and return the function that runs it: a stream runs kernels later."""
        entry = self.entry
        if shared_mem:
            raise KernelFault(f"{entry.name}: {shared_mem} bytes of dynamic shared memory, and no kernel here has any")
        wide_grid, wide_block = dimensions(grid, block, entry.name)
        per_block = wide_block[0] * wide_block[1] * wide_block[2]
        if entry.max_threads and per_block > entry.max_threads:
            raise KernelFault(f"{entry.name}: blocks of {per_block} threads, compiled for at most {entry.max_threads}")
        bound = bind(args, entry.parameters, entry.name)
        return lambda: self._run(wide_grid, wide_block, bound)

    def _run(self, grid: Triple, block: Triple, bound: Bound) -> None:
        entry = self.entry
        per_block = block[0] * block[1] * block[2]
        memory = GlobalMemory(bound.allocations, entry.constants)
        parameters = {
            parameter.name: memory.address(value.allocation, value.offset).to_bytes(8, "little")
            if isinstance(value, Pointer)
            else value
            for parameter, value in zip(entry.parameters, bound.values, strict=True)
        }
        self.issued = Counter()
        n_blocks = grid[0] * grid[1] * grid[2]
        numbers = np.arange(n_blocks) if self.only_blocks is None else np.array(self.only_blocks) % n_blocks
        at_once = max(1, THREADS_AT_ONCE // (-(-per_block // 32) * 32))
        with np.errstate(all="ignore"):
            for first in range(0, numbers.size, at_once):
                blocks = numbers[first : first + at_once]
                machine = Machine(entry, self.steps, memory, parameters, grid, block, blocks)
                try:
                    machine.run()
                except KernelFault as fault:
                    raise KernelFault(f"{entry.name}: {fault}") from None
                self.issued += machine.issued
