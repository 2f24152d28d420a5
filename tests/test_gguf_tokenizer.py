"""Tokenizers in GGUF files: keys by hand for each kind, and what is refused of files that are damaged or unknown."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arrowquant_gpu.errors import FormatError, SourceError
from arrowquant_gpu.formats.gguf_tokenizer import tokenizer_keys

from . import tiny_models, tiny_tokenizers

NOT_KNOWN = (None, None)
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


def keys(folder: Path, known: Any = NOT_KNOWN, n: int | None = None, pre: str = "", **config: Any) -> dict[str, Any]:
    found = tokenizer_keys(folder, config, known, n, pre)
    return {
        k.removeprefix("tokenizer.").removeprefix("ggml."): v.tolist() if isinstance(v, np.ndarray) else v
        for k, v in found.items()
    }


def described(folder: Path, tokenizer: Any, config: Any = None) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def bpe(**parts: Any) -> dict[str, Any]:
    model = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
    return {"model": model, "pre_tokenizer": dict(BYTE_LEVEL), **parts}


def added(i: int, text: str, special: bool = True) -> dict[str, Any]:
    return {"id": i, "content": text, "special": special}


# Each kind.


def test_byte_level(tmp_path: Path) -> None:
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": "{{ x }}", "pad_token": None}
    tokenizer = bpe(added_tokens=[added(3, "<s>"), added(5, "</s>"), added(6, "<tool>", special=False)])
    assert keys(described(tmp_path, tokenizer, config), n=8) == {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": ["a", "b", "ab", "<s>", "[PAD4]", "</s>", "<tool>", "[PAD7]"],
        "token_type": [1, 1, 1, 3, 5, 3, 4, 5],
        "merges": ["a b"],
        "bos_token_id": 3,
        "eos_token_id": 5,
        "chat_template": "{{ x }}",
    }


@pytest.mark.parametrize(
    ("merges", "stored"), [([["a", "b"]], ["a b"]), ([["a ", "b"]], ["aĠ b"]), ([], []), (["a b"], ["a b"])]
)
def test_merges_of_both_forms(tmp_path: Path, merges: Any, stored: list[str]) -> None:
    tokenizer = bpe()
    tokenizer["model"]["merges"] = merges
    assert keys(described(tmp_path, tokenizer))["merges"] == stored


@pytest.mark.parametrize(("family", "pre"), [("llama3", "llama-bpe"), ("qwen2", "qwen2"), ("gpt-oss", "gpt-4o")])
def test_the_way_words_are_cut(tmp_path: Path, family: str, pre: str) -> None:
    tiny_tokenizers.byte_level(tmp_path, family, 300, {"bos_token": "<s>"}, ["<s>"])
    found = keys(tmp_path, ("gpt2", "of the architecture"))
    assert found["pre"] == pre
    assert found["add_bos_token"] is True
    assert found["chat_template"] == tiny_tokenizers.CHAT_TEMPLATE
    assert keys(tmp_path, pre="mine")["pre"] == "mine"


def test_cuts_that_are_not_known(tmp_path: Path) -> None:
    """Each of two steps may be known, but not what they do together."""
    digits = {"type": "Split", "pattern": {"Regex": r"\p{N}"}}
    described(tmp_path, bpe(pre_tokenizer={"type": "Sequence", "pretokenizers": [BYTE_LEVEL, digits]}))
    assert keys(tmp_path, ("gpt2", "tekken"))["pre"] == "tekken"
    for known in (NOT_KNOWN, ("llama", "default"), ("gpt2", None)):
        with pytest.raises(FormatError, match="--format-option pre=NAME"):
            keys(tmp_path, known)


def test_byte_fallback(tmp_path: Path) -> None:
    tiny_models.tiny_mixtral(tmp_path)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    found = keys(tmp_path, ("llama", "default"), 512)
    assert (found["model"], found["pre"], found["add_space_prefix"]) == ("llama", "default", True)
    assert found["token_type"][:3] == [2, 3, 3]
    assert found["token_type"][3:259] == [6] * 256
    assert set(found["token_type"][259:]) == {1}
    assert found["tokens"][259] == tokenizer["model"]["merges"][0].replace(" ", "")
    ranks = {"".join(m.split(" ")): n for n, m in reversed([*enumerate(tokenizer["model"]["merges"])])}
    for token, score in zip(found["tokens"], found["scores"], strict=True):
        assert score == -ranks.get(token, 1e6)
    assert (found["bos_token_id"], found["eos_token_id"], found["unknown_token_id"]) == (1, 2, 0)
    assert (found["add_bos_token"], found["add_eos_token"]) == (True, False)


def field(number: int, value: bytes | int | float) -> bytes:
    """A field of a message in protocol buffers."""
    if isinstance(value, float):
        return bytes([number << 3 | 5]) + struct.pack("<f", value)
    if isinstance(value, int):
        return bytes([number << 3]) + varint(value)
    return bytes([number << 3 | 2]) + varint(len(value)) + value


def varint(n: int) -> bytes:
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)


def piece(text: str, score: float, kind: int = 1) -> bytes:
    return field(1, field(1, text.encode()) + field(2, score) + (field(3, kind) if kind != 1 else b""))


PIECES = piece("<unk>", 0.0, 2) + piece("<s>", 0.0, 3) + piece("▁the" * 50, -1.5) + piece("<0x0A>", 0.0, 6)
BPE_MODEL = field(2, field(1, b"text") + field(3, 2))


@pytest.mark.parametrize("prefix", [0, 1])
def test_sentencepiece(tmp_path: Path, prefix: int) -> None:
    (tmp_path / "tokenizer.model").write_bytes(PIECES + BPE_MODEL + field(3, field(1, b"x") + field(3, prefix)))
    found = keys(tmp_path, bos_token_id=1, eos_token_id=[3, 1], pad_token_id=-1, unk_token_id=True)
    assert found == {
        "model": "llama",
        "pre": "default",
        "tokens": ["<unk>", "<s>", "▁the" * 50, "<0x0A>"],
        "token_type": [2, 3, 1, 6],
        "scores": [0.0, 0.0, -1.5, 0.0],
        "add_space_prefix": bool(prefix),
        "bos_token_id": 1,
        "eos_token_id": 3,
    }


def test_what_was_added_to_sentencepiece(tmp_path: Path) -> None:
    """tokenizer.model has the scores, tokenizer.json the tokens that came later."""
    (tmp_path / "tokenizer.model").write_bytes(PIECES + BPE_MODEL)
    vocab = {"<unk>": 0, "<s>": 1, "▁the" * 50: 2, "<0x0A>": 3}
    model = {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": True, "unk_token": "<unk>"}
    described(tmp_path, {"model": model, "added_tokens": [added(1, "<s>"), added(4, "<|im_end|>")]})
    found = keys(tmp_path, n=6)
    assert found["tokens"] == [*vocab, "<|im_end|>", "[PAD5]"]
    assert found["token_type"] == [2, 3, 1, 6, 3, 5]
    assert found["scores"][:4] == [0.0, 0.0, -1.5, 0.0]


WORDPIECE = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "the": 5, "##re": 6, "[unused1]": 7}
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
IDS = {"bos": 2, "eos": 3, "unknown": 1, "seperator": 3, "padding": 0, "cls": 2}


@pytest.mark.parametrize("file", ["vocab.txt", "tokenizer.json"])
def test_wordpiece(tmp_path: Path, file: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(SPECIAL))
    flags = {}
    if file == "vocab.txt":
        (tmp_path / file).write_text("\n".join(WORDPIECE) + "\n")
    else:
        extra = [added(i, text) for text, i in WORDPIECE.items() if i < 5]
        normalizer = {"type": "BertNormalizer", "lowercase": False, "strip_accents": None}
        described(
            tmp_path,
            {"model": {"type": "WordPiece", "vocab": WORDPIECE}, "added_tokens": extra, "normalizer": normalizer},
        )
        flags = {"normalizer.lowercase": False, "normalizer.strip_accents": False}
    assert keys(tmp_path, ("bert", "jina-v2-en"), type_vocab_size=2) == {
        "model": "bert",
        "pre": "jina-v2-en",
        "tokens": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "▁the", "re", "[unused1]"],
        "token_type": [3, 3, 3, 3, 3, 1, 1, 1],
        "token_type_count": 2,
        **{f"{name}_token_id": i for name, i in IDS.items()},
        **flags,
    }


def test_the_default_of_several_templates(tmp_path: Path) -> None:
    several = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    assert keys(described(tmp_path, bpe(), {"chat_template": several}))["chat_template"] == "d"
    assert "chat_template" not in keys(described(tmp_path, bpe(), {"chat_template": several[:1]}))


# What is refused.


def test_none_at_all(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no tokenizer\.json, .*--format-option tokenizer=none"):
        keys(tmp_path)


def test_more_tokens_than_rows(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="the tokenizer has 3 tokens and the embedding 2 rows"):
        keys(described(tmp_path, bpe()), n=2)


@pytest.mark.parametrize(
    ("tokenizer", "error", "words"),
    [
        ([], SourceError, "must be a JSON object"),
        ({}, SourceError, "no model with a vocab"),
        ({"model": {"type": "BPE"}}, SourceError, "no model with a vocab"),
        ({"model": {"type": "Unigram", "vocab": [["a", 0]]}}, FormatError, "of type Unigram"),
        ({"model": {"type": "BPE", "vocab": {"a": "0"}}}, SourceError, "tokens without a number"),
        ({"model": {"type": "BPE", "vocab": {"a": -1}}}, SourceError, "tokens without a number"),
        ({"model": {"type": "BPE", "vocab": {"a": 1 << 40}}}, SourceError, "tokens without a number"),
        (bpe(added_tokens=[{"id": 3}]), SourceError, "tokens without a number"),
        (bpe(added_tokens=["x"]), SourceError, "tokens without a number"),
        (bpe(model={"type": "BPE", "vocab": {"a": 0}, "merges": [["a"]]}), SourceError, "is no merge of two tokens"),
        (bpe(model={"type": "BPE", "vocab": {"a": 0}, "merges": [7]}), SourceError, "is no merge of two tokens"),
    ],
)
def test_a_tokenizer_json_that_cannot_be_read(tmp_path: Path, tokenizer: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        keys(described(tmp_path, tokenizer))


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (b"", SourceError, "it has no pieces"),
        (PIECES[:-1], SourceError, "cut off"),
        (b"\xff" * 30, SourceError, "cut off"),
        (field(1, field(1, b"\xff")), SourceError, "no tokenizer of SentencePiece"),
        (field(1, field(1, b"a") + field(3, 9)), SourceError, "piece 0 is damaged"),
        (field(1, field(1, 5)), SourceError, "piece 0 is damaged"),
        (PIECES + field(2, field(3, 1)), FormatError, "of type 1, as unigram is 1"),
        (PIECES, FormatError, "of type 1"),
        (b"IQ== 0\nIg== 1\n", SourceError, "it has no pieces"),
    ],
)
def test_a_tokenizer_model_that_cannot_be_read(tmp_path: Path, data: bytes, error: Any, words: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(error, match=words):
        keys(tmp_path)


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-9, 9), st.floats(allow_nan=False), st.text(max_size=3)),
    lambda inside: st.one_of(st.lists(inside, max_size=3), st.dictionaries(st.text(max_size=4), inside, max_size=3)),
    max_leaves=6,
)
PARTS = ["model", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "vocab", "merges", "type"]
PARTS += ["pretokenizers", "processors", "single", "pattern", "prepend_scheme", "byte_fallback", "unk_token"]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.dictionaries(st.sampled_from(PARTS), JSON, max_size=3),
    model=st.dictionaries(st.sampled_from(PARTS), JSON, max_size=3),
    config=JSON,
    step=st.dictionaries(st.sampled_from(PARTS), JSON, max_size=2),
)
def test_any_json_is_read_or_refused(tmp_path: Path, parts: Any, model: Any, config: Any, step: Any) -> None:
    tokenizer = bpe(**parts)
    if isinstance(tokenizer["model"], dict):
        tokenizer["model"] |= model
    for name in ("pre_tokenizer", "normalizer", "post_processor"):
        tokenizer.setdefault(name, {})
        if isinstance(tokenizer[name], dict):
            tokenizer[name] |= step
    described(tmp_path, tokenizer, config)
    try:
        found = keys(tmp_path, ("gpt2", "gpt-2"))
    except (FormatError, SourceError):
        return
    assert len(found["tokens"]) == len(found["token_type"])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_tokenizer_model_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    raw = bytearray(PIECES + BPE_MODEL)
    for _ in range(data.draw(st.integers(1, 5))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "tokenizer.model").write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    try:
        found = keys(tmp_path)
    except (FormatError, SourceError):
        return
    assert len(found["tokens"]) == len(found["scores"])
