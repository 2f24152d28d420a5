"""`DiffusionQuantConfig`: how a model is quantized, as one value."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..diffusion import DiffusionOptions
from ..errors import InputError
from ..pipeline.profiles import profile as find_profile
from ..pipeline.widths import Widths
from ..schemes import Scheme
from .scheme import BIT_WIDTH


@dataclass(frozen=True, slots=True)
class DiffusionQuantConfig:
    """The options of a model; what is None is left to the quantizer or to the model.

    bit_width, group_size, scheme: as in the calls of ArrowQuantV2
    min_accuracy, entropy, sensitive, fail_fast: how each tensor gets its width, see `Widths` and docs/widths.md
    modality, calibration, timesteps, time_groups, calibration_samples: see `DiffusionOptions` and docs/diffusion.md
    format: by default "parquet" or "arrow" for an output with that suffix, else "parquet-tensors", a directory
    compression: None or "zstd", see docs/parquet.md
    include, ignore: regular expressions over tensor names, see docs/policy.md
    validate: read the output back and compare it with the original when it is written

        >>> DiffusionQuantConfig.from_profile("edge", modality="text").bit_width
        2
    """

    bit_width: int = BIT_WIDTH
    group_size: int | None = None
    scheme: str | Scheme | None = None
    min_accuracy: float | None = None
    entropy: bool = False
    sensitive: Literal["keep", "raise"] = "keep"
    fail_fast: bool = False
    modality: str | None = None
    calibration: str | Path | None = None
    timesteps: int | None = None
    time_groups: int = 10
    calibration_samples: int = 128
    format: str | None = None
    compression: str | None = None
    include: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    validate: bool = False

    @classmethod
    def from_profile(cls, name: str, **options: Any) -> DiffusionQuantConfig:
        """That of a deployment profile: edge, local or cloud (docs/widths.md); `options` go before it.

        Raises SchemeError for a profile that does not exist, InputError for an option that does not.
        """
        found = find_profile(name)
        width = {} if "scheme" in options else {"bit_width": found.bits, "group_size": found.group_size}
        row = {
            "min_accuracy": found.min_accuracy,
            "time_groups": found.time_groups,
            "calibration_samples": found.calibration_samples,
        }
        return cls.of({**width, **row, **options})

    @classmethod
    def of(cls, config: DiffusionQuantConfig | Mapping[str, Any] | None) -> DiffusionQuantConfig:
        """A config as it is, or from a dict of its fields, which may have a `profile` too.

        >>> DiffusionQuantConfig.of({"profile": "cloud", "group_size": 32}).group_size
        32

        Raises InputError for a field that does not exist, and SchemeError for a profile that does not.
        """
        if isinstance(config, cls):
            return config
        if config is not None and not isinstance(config, Mapping):
            raise InputError(f"config is {type(config).__qualname__}: give a DiffusionQuantConfig, or a dict")
        options = dict(config or {})
        if (name := options.pop("profile", None)) is not None:
            return cls.from_profile(name, **options)
        names = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(options) - set(names)):
            raise InputError(f"{', '.join(map(str, unknown))}: no such option; there are profile, {', '.join(names)}")
        return cls(**options)

    @property
    def widths(self) -> Widths:
        """What it says about widths. Raises InputError."""
        return Widths(self.min_accuracy, self.entropy, self.sensitive, self.fail_fast)

    @property
    def diffusion(self) -> DiffusionOptions:
        """What it says about diffusion models. Raises InputError."""
        return DiffusionOptions(
            modality=self.modality,
            calibration=self.calibration,
            time_groups=self.time_groups,
            n_timesteps=self.timesteps,
            calibration_samples=self.calibration_samples,
        )
