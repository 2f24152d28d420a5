"""Which tensors are weights of linear modules, and which modules stay in float: what formats of serving engines ask.

These engines build the quantized layout for every linear module of a model but those on an ignore list.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..dtypes import KERNEL_DTYPES
from ..schemes import Scheme
from . import Entry, TensorInfo

# Linear layers of these models are transformers' Conv1D modules, [in, out], which the readers do not match.
CONV1D_MODELS = frozenset({"gpt2", "imagegpt", "decision_transformer", "openai-gpt", "clvp"})
_CONV1D = re.compile(r"(?:^|\.)(?:c_attn|c_fc|c_proj|q_attn)\.weight$")

# Modules that are embeddings for certain; every other kept matrix goes on the ignore list.
_EMBEDDING = re.compile(
    r"(?:^|\.)(?:embed_tokens|word_embeddings?|position_embeddings?|token_type_embeddings|tok_embeddings|wte|wpe"
    r"|embed_positions|embed_in|shared|relative_attention_bias)\.weight$"
)
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|lm_head\.decoder|predictions\.decoder|embed_out|proj_out|lm_loss)\.weight$")
# An output head that is tied to the embedding is a linear module with no tensor of its own.
TIED_HEAD = r"re:(?:.*\.)?(?:lm_head|predictions|embed_out|vocab_projector|lm_loss|generator_lm_head)(?:\..*)?$"
# The same where a list has names only.
TIED_HEADS = ("lm_head", "cls.predictions", "predictions", "embed_out", "vocab_projector", "lm_loss")

# What carries every shape, and whole numbers of every scheme, for errors.
ANY_SCHEME = "--format safetensors, parquet or arrow"


def misfit(info: TensorInfo, config: Mapping[str, Any], format_name: str) -> str | None:
    """Why this tensor cannot be quantized in a format that has linear modules only, with the formats that can; None
    where it can.

    >>> from pathlib import Path
    >>> misfit(TensorInfo("norm.weight", "float32", (64,), Path("m"), 0, 256), {}, "fp8")[:41]
    'fp8 has only 2-D weights of linear module'
    """
    if len(info.shape) > 2 and re.search(r"experts|moe", info.name):
        return f"stacked experts: {format_name} has linear modules, not stacks of them; {ANY_SCHEME} carries them"
    if len(info.shape) != 2 or not info.name.endswith(".weight"):
        return f"{format_name} has only 2-D weights of linear modules, named MODULE.weight; {ANY_SCHEME} carries others"
    if _EMBEDDING.search(info.name):
        return f"an embedding, whose codes the readers of {format_name} do not decode; {ANY_SCHEME} carries it"
    if config.get("model_type") in CONV1D_MODELS and _CONV1D.search(info.name):
        return (
            f"a Conv1D module with transposed weights, which the readers of {format_name} do not know; {ANY_SCHEME} "
            f"carries it"
        )
    if info.dtype not in KERNEL_DTYPES:
        return f"{format_name} has weights of {', '.join(KERNEL_DTYPES)}, not of {info.dtype}"
    return None


def any_shape(scheme: Scheme) -> str:
    """The formats that carry this scheme for tensors of every shape, for errors."""
    return ANY_SCHEME if scheme.grid == "int" else "--format safetensors"


def module_of(entry: Entry) -> str:
    """The name of the module whose `.weight` a tensor is."""
    return entry.info.name.removesuffix(".weight")


def ignore_list(
    entries: Sequence[Entry], config: Mapping[str, Any], tied_heads: Sequence[str] = (TIED_HEAD,)
) -> list[str]:
    """Names of the modules that stay in float: the readers build the quantized layout for every other Linear.

    Names of modules that are not linear do no harm, so a matrix is listed unless it is an embedding for certain.
    `tied_heads` are added where the model has an output head that is tied to the embedding.
    """
    ignored: dict[str, None] = {}
    for entry in entries:
        name = entry.info.name
        if entry.scheme is not None or len(entry.info.shape) < 2:
            continue
        experts = re.match(r"(.*\bexperts)\.[^.\d][^.]*(?:\.weight)?$", name)
        if experts and len(entry.info.shape) == 3:
            ignored[experts[1]] = None
        elif name.endswith(".weight") and len(entry.info.shape) == 2 and not _EMBEDDING.search(name):
            ignored[module_of(entry)] = None
    quantized = [module_of(e) for e in entries if e.scheme is not None]
    is_base = all(name.endswith("Model") for name in config.get("architectures") or ())
    has_head = any(_HEAD.search(e.info.name) for e in entries)
    if not is_base and not has_head and not any(re.match(TIED_HEAD[3:], name) for name in quantized):
        ignored |= dict.fromkeys(tied_heads)
    return list(ignored)
