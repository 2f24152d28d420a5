"""What a model makes: architectures known by their words, the order of what is believed, names that tell nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arrowquant_gpu.diffusion.modality import FAMILIES, MODALITIES, NAMES, detect, detect_by, has_word
from arrowquant_gpu.errors import InputError
from arrowquant_gpu.formats.checkpoint import open_checkpoint

from .diffusion_models import flux, llada
from .fixtures import llama_shapes, tiny_llama, write_safetensors

# Class names as model directories have them: (architecture, modality, is a diffusion model).
ARCHITECTURES = [
    ("FluxTransformer2DModel", "image", True),
    ("SD3Transformer2DModel", "image", True),
    ("UNet2DConditionModel", "image", True),
    ("AutoencoderKL", "image", True),
    ("DiTTransformer2DModel", "image", True),
    ("HunyuanDiT2DModel", "image", True),
    ("PixArtTransformer2DModel", "image", True),
    ("vae", "image", True),
    ("image", "image", False),
    ("ViTForImageClassification", "image", False),
    ("WaveGrad", "audio", True),
    ("wavegrad", "audio", True),
    ("AudioLDM2UNet2DConditionModel", "audio", True),
    ("StableAudioDiTModel", "audio", True),
    ("Qwen2AudioForConditionalGeneration", "audio", False),
    ("WhisperForConditionalGeneration", "audio", False),
    ("LLaDAModelLM", "text", True),
    ("DreamModel", "text", True),
    ("MDLM", "text", True),
    ("sedd", "text", True),
    ("text", "text", False),
    ("LlamaForCausalLM", "text", False),
    ("MistralForCausalLM", "text", False),
    ("Qwen2ForCausalLM", "text", False),
    ("GPT2LMHeadModel", "text", False),
    ("BertModel", "text", False),
    ("XLMRobertaModel", "text", False),
    ("CodeLlamaForCausalLM", "code", False),
    ("CodeGenForCausalLM", "code", False),
    ("starcoder2", "code", False),
]
UNKNOWN = ["audit", "EditModel", "Conduit", "Encoder", "EncoderDecoderModel", "Dreamer", "MyModel", "unetwork"]


@pytest.mark.parametrize(("architecture", "modality", "is_diffusion"), ARCHITECTURES)
def test_architectures(architecture: str, modality: str, is_diffusion: bool) -> None:
    for metadata, config in (
        ({"architecture": architecture}, {}),
        ({"modelspec.architecture": architecture}, {}),
        ({}, {"architectures": [architecture]}),
        ({}, {"model_type": architecture}),
        ({}, {"_class_name": architecture}),
    ):
        found = detect_by(metadata, config, ["fc.weight"])
        assert (found.name, found.is_diffusion) == (modality, is_diffusion)
        assert repr(architecture) in found.why


@pytest.mark.parametrize("architecture", UNKNOWN)
def test_a_part_of_a_word_is_no_word(architecture: str) -> None:
    found = detect_by({"architecture": architecture}, {"architectures": [architecture]}, ["blocks.0.weight"])
    assert found.name is None
    assert not found.is_diffusion


@pytest.mark.parametrize(
    ("name", "modality", "is_diffusion"),
    [
        ("double_blocks.0.img_attn.qkv.weight", "image", True),
        ("joint_blocks.3.x_block.attn.qkv.weight", "image", True),
        ("model.diffusion_model.input_blocks.1.0.in_layers.2.weight", "image", True),
        ("down_blocks.0.resnets.0.conv1.weight", "image", True),
        ("blocks.0.adaLN_modulation.1.weight", "image", True),
        ("vocab_embed.embedding", "text", True),
        ("model.layers.0.self_attn.q_proj.weight", "text", False),
        ("bert.encoder.layer.0.attention.self.query.weight", "text", False),
        ("transformer.h.0.attn.c_attn.weight", "text", False),
        ("audio_encoder.conv1.weight", "audio", False),
        ("audio.conv1.weight", "audio", False),
        ("blocks.0.fc.weight", None, False),
        ("melody.weight", None, False),
    ],
)
def test_tensor_names(name: str, modality: str | None, is_diffusion: bool) -> None:
    found = detect_by({}, {}, ["first.weight", name])
    assert (found.name, found.is_diffusion) == (modality, is_diffusion)


def test_the_order_of_what_is_believed(tmp_path: Path) -> None:
    """The user, then modality of the header, its architecture, config.json, tensor names."""
    config: dict[str, Any] = {"_class_name": "UNet2DConditionModel"}
    names = ["model.layers.0.self_attn.q_proj.weight"]
    metadata = {"modality": "audio", "architecture": "mdlm"}
    assert detect_by(metadata, config, names, "code")[:2] == ("code", "the user's choice")
    assert detect_by(metadata, config, names).name == "audio"
    del metadata["modality"]
    assert detect_by(metadata, config, names).name == "text"
    assert detect_by({}, config, names).name == "image"
    assert detect_by({}, {}, names).name == "text"
    assert detect_by({}, {}, []) == (None, "neither metadata, config.json nor tensor names tell", False)


def test_a_modality_that_is_none_of_them() -> None:
    assert detect_by({"modality": " Image "}, {}, []).name == "image"
    found = detect_by({"modality": "video"}, {"model_type": "mdlm"}, [])
    assert found.name == "text"
    assert "'video' is none of" in found.why
    assert "'video' is none of" in detect_by({"modality": "video"}, {}, []).why
    with pytest.raises(InputError, match="'video': choose one of text, code, image, audio"):
        detect_by({}, {}, [], "video")


def test_who_names_a_modality_wants_it_unless_the_architecture_is_known() -> None:
    assert detect_by({}, {}, [], "image").is_diffusion
    assert detect_by({"modality": "image"}, {}, []).is_diffusion
    assert not detect_by({"modality": "text"}, {"model_type": "llama"}, []).is_diffusion
    assert not detect_by({}, {"model_type": "llama"}, [], "text").is_diffusion


def test_who_writes_it_tells_too() -> None:
    assert not detect_by({}, {"model_type": "image"}, []).is_diffusion
    assert detect_by({}, {"model_type": "image", "_diffusers_version": "0.30"}, []).is_diffusion
    assert detect_by({}, {"architectures": ["TextDiffusionModel"]}, []).is_diffusion


def test_real_directories(tmp_path: Path) -> None:
    found = {build.__name__: detect(open_checkpoint(build(tmp_path / build.__name__))) for build in (flux, llada)}
    assert {name: (f.name, f.is_diffusion) for name, f in found.items()} == {
        "flux": ("image", True),
        "llada": ("text", True),
    }
    llama = detect(open_checkpoint(tiny_llama(tmp_path / "llama")))
    assert (llama.name, llama.is_diffusion) == ("text", False)
    assert not detect_by({}, {}, llama_shapes(2, 64, 128, 4, 2, 100)).is_diffusion
    lone = write_safetensors(tmp_path / "m.safetensors", {"w": np.eye(2)}, {"modality": "audio"})
    assert detect(open_checkpoint(lone)).name == "audio"


def test_the_tables_name_modalities_that_exist() -> None:
    assert {family.modality for family in (*FAMILIES, *NAMES)} <= set(MODALITIES)
    words = [word for family in FAMILIES for word in family.words]
    assert len(words) == len(set(words)), "a word that the second row of two would never see"
    assert all(word == word.lower() for word in words)


@given(st.text(max_size=12), st.text(max_size=12), st.sampled_from([w for f in FAMILIES for w in f.words]))
def test_a_word_by_itself_is_found_and_nothing_raises(before: str, after: str, word: str) -> None:
    assert has_word(f"{before} {word}_{after}", word)
    has_word(f"{before}{word}{after}", word)


@given(
    st.dictionaries(
        st.sampled_from(["architectures", "model_type", "_class_name"]),
        st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.text() | st.integers()),
    )
)
def test_any_config_is_looked_at(config: dict[str, Any]) -> None:
    """Values of any type, as a config.json may have them."""
    assert detect_by({}, config, []).name in (None, *MODALITIES)
