"""Deployment profiles: the widths, groups and accuracy that suit a kind of machine. docs/widths.md has the table.

>>> profile("edge").scheme.id, profile("edge").min_accuracy
('int2_g256_asym', 0.65)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import SchemeError
from ..schemes import Scheme


@dataclass(frozen=True, slots=True)
class Profile:
    """One row of the table.

    bits, group_size: of the scheme that weights get first
    min_accuracy: the least cosine of a quantized tensor; see `Widths`
    time_groups, calibration_samples: of a diffusion model that is calibrated
    """

    name: str
    bits: int
    group_size: int
    min_accuracy: float
    time_groups: int
    calibration_samples: int

    @property
    def scheme(self) -> Scheme:
        """The scheme that weights get first: int{bits}_g{group_size}_asym."""
        return Scheme(self.bits, "group", self.group_size, symmetric=False)


PROFILES: Mapping[str, Profile] = {
    row.name: row
    for row in (
        Profile("edge", 2, 256, 0.65, 5, 32),
        Profile("local", 4, 128, 0.85, 10, 128),
        Profile("cloud", 8, 64, 0.95, 20, 512),
    )
}


def profile(name: str) -> Profile:
    """The profile of this name. Raises SchemeError, listing the names."""
    found = PROFILES.get(name)
    if found is None:
        raise SchemeError(f"profile {name!r}: choose one of {', '.join(PROFILES)}")
    return found
