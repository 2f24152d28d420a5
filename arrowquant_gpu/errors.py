"""Every error this package raises on purpose: typed, with the offending name and value in the message.

All derive from `ArrowQuantError`. `exit_code` is what the command line returns for that kind of error.
"""

from __future__ import annotations


class ArrowQuantError(Exception):
    """Base of all errors raised on purpose by arrowquant_gpu."""

    exit_code = 1


class SchemeError(ArrowQuantError, ValueError):
    """A scheme id or combination of scheme options that does not exist."""

    exit_code = 2


class InputError(ArrowQuantError, ValueError):
    """An input array or table that cannot be read as weights: dtype, shape, nulls, layout."""

    exit_code = 3


class NonFiniteError(InputError):
    """NaN or infinity in the weights, or a value that overflows float32."""

    def __init__(self, name: str, n_nan: int, n_inf: int, first: int, shape: tuple[int, ...]):
        self.name, self.n_nan, self.n_inf, self.first, self.shape = name, n_nan, n_inf, first, shape
        super().__init__(
            f"{name}: {n_nan} NaN and {n_inf} infinite values (counted as float32); the first is at flat index "
            f"{first} of shape {list(shape)}. Repair the weights, or keep this tensor in float."
        )


class ScaleOverflowError(InputError):
    """A group scale that is too large for the scheme's scale storage type."""

    def __init__(self, name: str, scale_dtype: str, count: int, first: int):
        self.name, self.scale_dtype, self.count, self.first = name, scale_dtype, count, first
        super().__init__(
            f"{name}: {count} scales do not fit {scale_dtype}; the first is scale number {first}. "
            f"Store the scales as bfloat16 or float32 where the scheme has the choice (suffix _bf16 or none), or keep "
            f"this tensor in float (--ignore)."
        )


class DeviceError(ArrowQuantError, RuntimeError):
    """The device asked for is not there or cannot be used, or a kernel could not be compiled or run."""

    exit_code = 4


class DeviceMemoryError(DeviceError):
    """A device, or page-locked memory of the host, has too little room for what is asked for."""


class SourceError(ArrowQuantError, ValueError):
    """A checkpoint that cannot be read: missing, truncated, malformed, or already quantized."""

    exit_code = 5


class HeaderError(SourceError):
    """A safetensors header that is not valid, or does not match its file; `code` is a HeaderCode and stays the same."""

    def __init__(self, message: str, code: str = ""):
        self.code = code
        super().__init__(message)


class TargetError(ArrowQuantError, OSError):
    """An output that cannot be written: it exists, is the source, is not writable, or the disk is full."""

    exit_code = 6


class FormatError(ArrowQuantError, ValueError):
    """A scheme or tensor that the output format asked for cannot carry."""

    exit_code = 7


class VerifyError(ArrowQuantError):
    """A quantized checkpoint whose error against the original is over the threshold."""

    exit_code = 8


class PolicyError(ArrowQuantError, ValueError):
    """A choice of tensors that selects nothing: a pattern that matches no name, or a plan with nothing to quantize."""

    exit_code = 9


class QualityError(ArrowQuantError):
    """A tensor whose quantized weights are further from the original ones than was allowed."""

    exit_code = 10

    def __init__(self, name: str, cosine: float, min_accuracy: float, scheme: str):
        self.name, self.cosine, self.min_accuracy = name, cosine, min_accuracy
        super().__init__(
            f"{name}: its cosine to the original is {cosine:.6f} with {scheme}, and the least accuracy asked for is "
            f"{min_accuracy:g}. Lower --min-accuracy, ask for more bits or smaller groups, or --ignore this tensor."
        )


class ServiceError(ArrowQuantError, RuntimeError):
    """A service that cannot be reached, cannot be started, or gives no answer; or a call that it refuses."""

    exit_code = 11


class AuthenticationError(ServiceError):
    """A call without the token that the service asks for, or a certificate that one side does not accept."""


class BusyError(ServiceError):
    """A service that already has as many clients as it serves at a time, or is closing; nothing was done."""


class NotFoundError(ServiceError, LookupError):
    """A stored result or an action that the service does not have."""
