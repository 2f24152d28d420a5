"""The threads of a batch of blocks, advanced together: the lowest program counter goes first, so that branches join."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from .errors import KernelFault
from .ptx_decode import Step
from .ptx_memory import GlobalMemory, SharedMemory
from .ptx_parse import Entry, width
from .ptx_race import Epochs, Threads
from .ptx_warp import lanes_of

Triple = tuple[int, int, int]

RUNNING, AT_BARRIER, AT_MEETING, DONE = range(4)


class Machine:
    """Runs one batch of blocks. Each has a whole number of warps; lanes beyond its threads are done from the start."""

    def __init__(
        self,
        entry: Entry,
        steps: list[Step],
        memory: GlobalMemory,
        parameters: dict[str, bytes],
        grid: Triple,
        block: Triple,
        blocks: np.ndarray,
    ):
        self.entry, self.steps, self.memory, self.parameters = entry, steps, memory, parameters
        self.issued: Counter[int] = Counter()
        per_block = block[0] * block[1] * block[2]
        padded = self.padded = -(-per_block // 32) * 32
        self.n_threads = padded * blocks.size
        self.thread = np.tile(np.arange(padded), blocks.size)
        self.block = np.repeat(np.arange(blocks.size), padded)
        self.warp = np.arange(self.n_threads) // 32
        self.lane = self.thread % 32
        self.global_thread = np.repeat(blocks, padded) * padded + self.thread
        self.existing = lanes_of(self.thread < per_block)
        self.mask = np.zeros(self.n_threads, np.uint32)
        self.pc = np.zeros(self.n_threads, np.int64)
        self.state = np.where(self.thread < per_block, RUNNING, DONE)
        self.epochs = Epochs(blocks.size, self.warp[-1] + 1)
        self.shared = SharedMemory(blocks.size, entry.shared_bytes, self.epochs, padded // 32)
        self.registers: dict[str, np.ndarray] = {}
        self._set_special(grid, block, np.repeat(blocks, padded))

    def _set_special(self, grid: Triple, block: Triple, block_number: np.ndarray) -> None:
        t, b = self.thread, block_number
        per_thread = {
            "%tid.x": t % block[0], "%tid.y": t // block[0] % block[1], "%tid.z": t // (block[0] * block[1]),
            "%ctaid.x": b % grid[0], "%ctaid.y": b // grid[0] % grid[1], "%ctaid.z": b // (grid[0] * grid[1]),
            "%laneid": self.lane,
        }  # fmt: skip
        self.special = {name: values.astype(np.uint32) for name, values in per_thread.items()}
        for axis, n_threads, n_blocks in zip("xyz", block, grid, strict=True):
            self.special[f"%ntid.{axis}"] = np.full(self.n_threads, n_threads, np.uint32)
            self.special[f"%nctaid.{axis}"] = np.full(self.n_threads, n_blocks, np.uint32)
        for symbols in (self.entry.shared, self.memory.symbols):
            for name, place in symbols.items():
                self.special[name] = np.full(self.n_threads, place, np.uint64)

    def read(self, name: str) -> np.ndarray:
        """The register, special register or symbol `name` of all threads."""
        found = self.registers.get(name)
        if found is None:
            found = self.special.get(name)
        if found is None:
            raise KernelFault(f"{name} is read before it is written, or not modelled")
        return found

    def target(self, name: str) -> np.ndarray:
        """The register `name` of all threads, for writing."""
        if name not in self.registers:
            kind = self.entry.registers[name]
            self.registers[name] = np.zeros(self.n_threads, bool if kind == "pred" else f"u{width(kind) // 8}")
        return self.registers[name]

    def load(self, space: str, places: np.ndarray, n_bytes: int, count: int, select: np.ndarray | slice) -> np.ndarray:
        """[threads, count] unsigned values from one state space."""
        if space == "shared":
            return self.shared.load(self.block[select], places, n_bytes, count, self.thread[select])
        return self.memory.load(places, n_bytes, count, self._threads(select))

    def store(self, space: str, places: np.ndarray, values: np.ndarray, select: np.ndarray | slice) -> None:
        """Store [threads, count] unsigned values to one state space."""
        if space == "shared":
            self.shared.store(self.block[select], places, values, self.thread[select])
        else:
            self.memory.store(places, values, self._threads(select))

    def _threads(self, select: np.ndarray | slice) -> Threads:
        epochs = self.epochs
        return Threads(
            self.global_thread[select], self.padded, epochs.block[self.block[select]], epochs.warp[self.warp[select]]
        )

    def run(self) -> None:
        """Run all threads to their end. KernelFault with the line of the instruction at fault."""
        while True:
            running = self.state == RUNNING
            if not running.any():
                if (self.state == DONE).all():
                    return
                raise KernelFault(f"deadlock: threads wait for ever at {self._waiting_lines()}")
            pcs = np.where(running, self.pc, np.iinfo(np.int64).max)
            here = pcs == pcs.min()
            others = pcs[~here]
            self._advance(np.flatnonzero(here), int(pcs.min()), int(others.min()) if others.size else 1 << 62)

    def _advance(self, threads: np.ndarray, pc: int, limit: int) -> None:
        """Run `threads`, which stand together at `pc`, until they part, wait, or reach others at `limit`."""
        everyone = threads.size == self.n_threads
        while pc < limit:
            if pc == len(self.steps):
                self.state[threads] = DONE
                return
            step = self.steps[pc]
            select = slice(None) if everyone else threads
            active = threads
            if step.guard is not None:
                holds = self._at(step, step.guard, select)
                if not holds.all():
                    active = select = threads[holds]
            self.issued[pc] += 1 + np.count_nonzero(np.diff(self.warp[threads]))
            if step.kind == "plain":
                if active.size:
                    assert step.act is not None
                    self._at(step, step.act, select)
                pc += 1
            elif active.size == 0:
                pc += 1
            elif step.kind == "branch" and active.size == threads.size:
                pc = step.target
            else:
                self.pc[threads] = pc + 1
                self._leave(step, active, pc)
                return
        self.pc[threads] = pc

    def _at(self, step: Step, function: Callable[[Machine, Any], Any], select: np.ndarray | slice) -> Any:
        """Call `function` for a step, and name the step in what it raises."""
        try:
            return function(self, select)
        except KernelFault as fault:
            raise KernelFault(f"PTX line {step.instruction.line}: {step.instruction.text}: {fault}") from None

    def _leave(self, step: Step, active: np.ndarray, pc: int) -> None:
        """Let `active` branch, end or wait."""
        if step.kind == "branch":
            self.pc[active] = step.target
        elif step.kind == "exit":
            self.state[active] = DONE
            self._release_barriers()
        elif step.kind == "barrier":
            self.pc[active] = pc
            self.state[active] = AT_BARRIER
            self._release_barriers()
        else:
            assert step.mask is not None
            self.pc[active] = pc
            self.state[active] = AT_MEETING
            self.mask[active] = step.mask(self, active)
            self._at(step, self._meet, active)

    def _release_barriers(self) -> None:
        """Let the blocks go on whose threads that have not ended all wait at one barrier."""
        waiting = self.state == AT_BARRIER
        if not waiting.any():
            return
        n_blocks = self.epochs.block.size
        n_waiting = np.bincount(self.block[waiting], minlength=n_blocks)
        n_alive = np.bincount(self.block[self.state != DONE], minlength=n_blocks)
        complete = (n_waiting == n_alive) & (n_waiting > 0)
        released = waiting & complete[self.block]
        if not released.any():
            return
        highest = np.full(n_blocks, -1)
        np.maximum.at(highest, self.block[released], self.pc[released])
        if (self.pc[released] != highest[self.block[released]]).any():
            raise KernelFault(f"divergent barrier: threads of one block wait at {self._waiting_lines()}")
        self.state[released] = RUNNING
        self.pc[released] += 1
        self.epochs.block[complete] += 1

    def _meet(self, machine: Machine, arrived: np.ndarray) -> None:
        """Run the warp instruction for the masks whose lanes are all here now."""
        pc = self.pc[arrived[0]]
        here = (self.state == AT_MEETING) & (self.pc == pc)
        lanes_here = lanes_of(here)
        lanes_done = lanes_of(self.state == DONE) & self.existing
        threads = np.flatnonzero(here)
        warp = self.warp[threads]
        named = self.mask[threads] & self.existing[warp]
        if not (named >> self.lane[threads].astype(np.uint32) & np.uint32(1)).all():
            raise KernelFault("the calling lane is not in its mask")
        if (named & lanes_done[warp]).any():
            raise KernelFault("the mask names a lane that has returned")
        complete = named & ~lanes_here[warp] == 0
        together = threads[complete]
        if together.size == 0:
            return
        for lane in range(32):
            members = together[named[complete] >> np.uint32(lane) & np.uint32(1) == 1]
            if (self.mask[members - self.lane[members] + lane] != self.mask[members]).any():
                raise KernelFault("lanes that meet name different masks")
        act = self.steps[int(pc)].act
        assert act is not None
        act(self, together)
        self.state[together] = RUNNING
        self.pc[together] = pc + 1

    def _waiting_lines(self) -> str:
        waiting = (self.state == AT_BARRIER) | (self.state == AT_MEETING)
        lines = {self.steps[pc].instruction.line for pc in np.unique(self.pc[waiting])}
        return f"PTX lines {', '.join(map(str, sorted(lines)))}"
