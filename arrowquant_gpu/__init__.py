"""GPU-accelerated weight quantizer: the same bytes on CPU and GPU, Arrow in and out."""
