"""What a gate raises when a kernel or its launch is wrong."""

from __future__ import annotations


class KernelFault(AssertionError):  # noqa: N818 - a fault is what a gate looks for, not an error of the gate
    """A kernel, its arguments or its launch are wrong: what a GPU would report, or worse, would not."""
