"""CUDA kernels without a GPU: the .cu files on the CPU, their PTX in a simulator, and cuda.py over a stand-in for CuPy.

docs/kernel_gates.md says what each of them proves and what it does not.
"""
