"""`detect`: what a model makes: text, code, images or audio; from what it says of itself, in tables.

An architecture is known by whole words, "DiT" in "DiTTransformer2DModel" and not in "audit"; the first row that matches
wins, so that "CodeLlamaForCausalLM" is code. A name that no table has is unknown, and nothing is guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from ..errors import InputError
from ..formats import Checkpoint

MODALITIES = ("text", "code", "image", "audio")


class Modality(NamedTuple):
    """What a model makes, None where that is not known; why; and whether it is a diffusion model."""

    name: str | None
    why: str
    is_diffusion: bool


class Family(NamedTuple):
    """Words that architectures of one modality are named with; `is_diffusion` is None where they do not tell."""

    modality: str
    is_diffusion: bool | None
    words: tuple[str, ...]


FAMILIES: tuple[Family, ...] = (
    Family("audio", True, ("wavegrad", "diffwave", "audioldm", "audioldm2", "stable-audio", "musicldm", "grad-tts")),
    Family("audio", None, ("audio", "speech", "music", "vocoder", "hifigan", "encodec", "snac", "musicgen", "bark")),
    Family("audio", False, ("whisper", "wav2vec2", "hubert")),
    Family("code", True, ("diffucoder", "diffu-coder")),
    Family("code", None, ("code", "coder", "codegen", "starcoder", "starcoder2", "codellama", "codebert")),
    Family("image", True, ("dit", "mmdit", "unet", "vae", "vq-vae", "autoencoder", "vq-model", "flux", "flux2")),
    Family("image", True, ("sd", "sd1", "sd2", "sd3", "sdxl", "stable-diffusion", "pixart", "sana", "hunyuan-dit")),
    Family("image", True, ("hi-dream", "lumina", "aura-flow", "kandinsky", "latent-diffusion", "control-net")),
    Family("image", None, ("image", "img")),
    Family("image", False, ("vit", "vision", "resnet", "swin")),
    Family("text", True, ("mdlm", "sedd", "llada", "dream", "plaid", "diffullama", "bd3lm", "radd")),
    Family("text", False, ("llama", "mistral", "mixtral", "ministral", "qwen", "gpt", "gptj", "gptneox", "gemma")),
    Family("text", False, ("bert", "roberta", "deberta", "distilbert", "electra", "albert", "mpnet", "t5", "mt5")),
    Family("text", False, ("phi", "falcon", "mpt", "opt", "bloom", "deepseek", "olmo", "granite", "mamba", "bart")),
    Family("text", None, ("text",)),
)

# Where no architecture is known: regular expressions over tensor names, the first that matches any of them wins.
NAMES: tuple[Family, ...] = (
    Family("audio", None, (r"\b(?:audio|mel|wav|vocoder|speech|spectrogram)(?=[._0-9])",)),
    Family("text", True, (r"(?:^|\.)(?:vocab_embed|sigma_map)\.",)),
    Family("image", True, (r"(?:^|\.)(?:double_blocks|single_blocks|joint_blocks)\.\d+\.",)),
    Family("image", True, (r"(?:^|\.)(?:img|txt)_(?:attn|mod|mlp|in)\.", r"(?:^|\.)x_embedder\.")),
    Family("image", True, (r"(?:^|\.)adaLN_modulation\.", r"(?:^|\.)(?:down|up|mid|input|output)_blocks?\.\d*\.?")),
    Family("image", True, (r"(?:^|\.)(?:post_)?quant_conv\.",)),
    Family("text", None, (r"(?:^|\.)(?:self_attn|attention\.self)\.(?:q_proj|query)\.", r"(?:^|\.)embed_tokens\.")),
    Family("text", None, (r"(?:^|\.)h\.\d+\.attn\.c_attn\.", r"(?:^|\.)(?:word_embeddings|wte)\.")),
)

# Where an architecture is named, in the metadata of safetensors and in config.json.
METADATA_KEYS = ("architecture", "architectures", "model_type", "_class_name", "modelspec.architecture")
CONFIG_KEYS = ("architectures", "model_type", "_class_name")
# A config that has it was written by the diffusers library.
DIFFUSERS_KEY = "_diffusers_version"


def detect(source: Checkpoint, choice: str | None = None) -> Modality:
    """What the model in `source` makes.

    In this order: `choice`, the user's; `modality` in the metadata of the safetensors header; the architecture in that
    metadata, then in config.json; tensor names.

    Raises InputError for a `choice` that is none of MODALITIES.
    """
    return detect_by(source.metadata, source.config or {}, source.tensors, choice)


def detect_by(
    metadata: Mapping[str, str], config: Mapping[str, Any], names: Iterable[str], choice: str | None = None
) -> Modality:
    """`detect` from the parts of a checkpoint.

    >>> detect_by({}, {"_class_name": "FluxTransformer2DModel"}, [])
    Modality(name='image', why="_class_name 'FluxTransformer2DModel' of config.json", is_diffusion=True)
    >>> detect_by({}, {"model_type": "llama"}, [], choice="code")
    Modality(name='code', why="the user's choice", is_diffusion=False)
    >>> detect_by({"architecture": "audit"}, {}, ["blocks.0.weight"]).name is None
    True
    """
    if choice is not None and choice not in MODALITIES:
        raise InputError(f"modality {choice!r}: choose one of {', '.join(MODALITIES)}")
    said = metadata.get("modality", "").strip().lower()
    family, why = _family(metadata, config, names)
    is_diffusion = None if family is None else family.is_diffusion
    if is_diffusion is None:
        named = any(has_word(text, "diffusion") for _, text, _ in _architectures(metadata, config))
        is_diffusion = True if named or DIFFUSERS_KEY in config else None
    if choice is not None or said in MODALITIES:
        # Those who name a modality want what is done for diffusion models, unless the architecture is none.
        is_diffusion = is_diffusion is not False
    if choice is not None:
        return Modality(choice, "the user's choice", bool(is_diffusion))
    if said in MODALITIES:
        return Modality(said, "modality in the metadata of the safetensors header", bool(is_diffusion))
    if said:
        why += f"; the metadata's modality {said!r} is none of {', '.join(MODALITIES)}"
    return Modality(None if family is None else family.modality, why, bool(is_diffusion))


def _family(metadata: Mapping[str, str], config: Mapping[str, Any], names: Iterable[str]) -> tuple[Family | None, str]:
    """The family, and where it was found."""
    for key, text, place in _architectures(metadata, config):
        for family in FAMILIES:
            if any(has_word(text, word) for word in family.words):
                return family, f"{key} {text!r} of {place}"
    names = list(names)
    for family in NAMES:
        for pattern in family.words:
            if name := next((name for name in names if re.search(pattern, name)), None):
                return family, f"the tensor name {name!r}"
    return None, "neither metadata, config.json nor tensor names tell"


def _architectures(metadata: Mapping[str, str], config: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(key, text, place) of everything that names an architecture."""
    for key in METADATA_KEYS:
        if key in metadata:
            yield key, metadata[key], "the safetensors header"
    for key in CONFIG_KEYS:
        value = config.get(key)
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str):
                yield key, text, "config.json"


def has_word(text: str, word: str) -> bool:
    """Whether `word` stands in `text` as a word of its own, also of a name in camel case.

    >>> [has_word(text, "dit") for text in ("DiTTransformer2DModel", "MMDiT", "x_dit.1", "audit", "EditModel")]
    [True, True, True, False, False]
    """
    pattern = "[-_ ]?".join(re.escape(part) for part in word.split("-"))
    for found in re.finditer(pattern, text, re.IGNORECASE):
        start, end = found.span()
        begins = start == 0 or not text[start - 1].isalpha() or _begins_word(text, start)
        ends = end == len(text) or not text[end].isalpha() or _begins_word(text, end)
        if begins and ends:
            return True
    return False


def _begins_word(text: str, at: int) -> bool:
    """Whether a word in camel case begins there: a capital after a small letter, or before one."""
    return text[at].isupper() and (text[at - 1].islower() or text[at + 1 : at + 2].islower())
