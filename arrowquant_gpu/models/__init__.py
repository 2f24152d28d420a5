"""What is known of model architectures: roles of tensors, fused parts, names in GGUF files, mixes of schemes.

The knowledge is in the TOML files beside this one, the code only reads it. docs/models.md says what each field means.

>>> model = find({"model_type": "llama"}, ["model.layers.0.self_attn.q_proj.weight"])
>>> model.name, model.role("model.layers.0.self_attn.q_proj.weight", (64, 64))
('llama', 'attention')
>>> model.gguf.name("model.layers.0.self_attn.q_proj.weight")
GgufName(name='blk.0.attn_q.weight', expert=None, permute='q', add=0.0, layer=0)
>>> mixes["q4_k_m"].scheme("attention", "blk.0.attn_v.weight", 0, 32)
'q6_k'
"""

from __future__ import annotations

from .gguf import Gguf, GgufName
from .mix import Mix, mixes
from .model import Model, find
from .tables import ROLES, Rule, generic

__all__ = ["ROLES", "Gguf", "GgufName", "Mix", "Model", "Rule", "find", "generic", "mixes"]
