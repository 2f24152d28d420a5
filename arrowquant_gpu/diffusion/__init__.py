"""What is known of diffusion models beside their weights: modality, activations by time step, equalized columns.

Weights do not change with the time step. Nothing here assigns weights to time steps; docs/diffusion.md says what each
strategy means and what is stored.
"""

from .modality import MODALITIES, Modality, detect
from .prepare import DiffusionOptions, Prepared, prepare

__all__ = ["MODALITIES", "DiffusionOptions", "Modality", "Prepared", "detect", "prepare"]
