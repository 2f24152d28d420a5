"""From checkpoint to checkpoint: policy, plan, manifest, verification.

`quantize_checkpoint` puts them together. A plan is made from headers alone; the engine carries it out in pieces.
"""

from ..engine import Progress
from .manifest import Manifest
from .plan import Plan, make_plan
from .quantize import quantize_checkpoint

__all__ = ["Manifest", "Plan", "Progress", "make_plan", "quantize_checkpoint"]
