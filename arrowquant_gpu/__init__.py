"""GPU-accelerated weight quantizer: the same bytes on CPU and GPU, Arrow in and out."""

__version__ = "0.1.0"
