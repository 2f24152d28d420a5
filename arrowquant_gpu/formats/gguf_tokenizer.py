"""The keys tokenizer.* of a GGUF file, from the files of a model: tokenizer.json, tokenizer.model or vocab.txt.

llama.cpp has tokenizers of its own, and a file says which one and gives it its tables:

    gpt2   bytes as printable characters, merged within the words that a regular expression cuts: `pre` names that
    llama  SentencePiece: characters, merged by the highest score, with a token for each byte beside them
    bert   WordPiece: the longest piece first; pieces that begin a word have a mark before them

Source: ggml-org/ggml, docs/gguf.md; ggml-org/llama.cpp, src/llama-vocab.cpp; google/sentencepiece,
sentencepiece_model.proto.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import FormatError, SourceError
from .gguf_file import Value

# Files of a model directory that say how it cuts texts; some say the same.
TOKENIZER_FILES: tuple[str, ...] = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)
TOKENIZER_FILES += ("special_tokens_map.json", "added_tokens.json")

# Types of tokens, in SentencePiece and in GGUF.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

# The expression that cuts words, as tokenizer.json has it -> tokenizer.ggml.pre. "" is that of ByteLevel itself.
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_HEAD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_ENDS, _UPPER, _LOWER = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?", r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_ENDS}|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_ENDS}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE: Mapping[str, str] = {
    "": "gpt-2",
    rf"{_HEAD}\p{{N}}{{1,3}}{_TAIL}": "llama-bpe",
    rf"{_HEAD}\p{{N}}{_TAIL}": "qwen2",
    _O200K: "gpt-4o",
}

# What transformers calls the special tokens, and the key of each.
_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "cls": "cls"}
_SPECIAL |= {"mask": "mask"}
# A score below that of every merge: SentencePiece never makes such a piece of two others.
_NEVER = -1e6
MAX_BYTES = 100_000_000
# Kinds of SentencePiece models; the first is what a file means that does not say.
_UNIGRAM, _BPE = 1, 2


class Vocabulary(NamedTuple):
    """The tokens of a tokenizer: id -> (token, type), with what `model` needs beside them.

    scores: of the llama tokenizer, by id
    merges: of gpt2
    flags: further keys
    """

    model: str
    tokens: dict[int, tuple[str, int]]
    scores: dict[int, float]
    merges: list[str]
    flags: dict[str, Value]


def tokenizer_keys(
    folder: Path, config: Mapping[str, Any], known: tuple[str | None, str | None], n_tokens: int | None, pre: str = ""
) -> dict[str, Value]:
    """The keys of the tokenizer of a model directory.

    known: (tokenizer.ggml.model, tokenizer.ggml.pre) of its architecture, where that tells
    n_tokens: rows of the embedding, each of which must have a token: those that nobody uses are named [PADn]
    pre: tokenizer.ggml.pre, where the caller knows it

    Raises SourceError for files that are not there or damaged, and FormatError for a tokenizer that llama.cpp does not
    have.
    """
    described = _json(folder / "tokenizer.json")
    options = _json(folder / "tokenizer_config.json") or {}
    found = _vocabulary(folder, described)
    size = max(found.tokens, default=-1) + 1
    if n_tokens is not None and size > n_tokens:
        raise FormatError(f"{folder}: the tokenizer has {size} tokens and the embedding {n_tokens} rows")
    ids = {text: i for i, (text, _) in sorted(found.tokens.items(), reverse=True)}
    rows = [found.tokens.get(i, (f"[PAD{i}]", UNUSED)) for i in range(size if n_tokens is None else n_tokens)]
    special = _special_ids(options, config, ids, len(rows))
    keys: dict[str, Value] = {
        "tokenizer.ggml.model": found.model,
        "tokenizer.ggml.pre": pre or _pre(found.model, described or {}, known, folder),
        "tokenizer.ggml.tokens": [_as_stored(found.model, *row) for row in rows],
        "tokenizer.ggml.token_type": np.array([kind for _, kind in rows], "<i4"),
    }
    if found.model == "llama":
        scores = [found.scores.get(i, _NEVER) for i in range(len(rows))]
        keys["tokenizer.ggml.scores"] = np.array(scores, "<f4")
    if found.model == "gpt2":
        keys["tokenizer.ggml.merges"] = found.merges
    if found.model == "bert":
        keys["tokenizer.ggml.token_type_count"] = int(config.get("type_vocab_size", 2))
        special = {"bos": special["cls"], "eos": special["sep"], **special} if "cls" in special else special
    keys |= {f"tokenizer.ggml.{_SPECIAL[name]}_token_id": i for name, i in special.items()}
    keys |= found.flags | _added(options, described or {})
    template = _template(folder, options)
    return keys if template is None else {**keys, "tokenizer.chat_template": template}


def _vocabulary(folder: Path, described: dict[str, Any] | None) -> Vocabulary:
    model, vocab = folder / "tokenizer.model", folder / "vocab.txt"
    if described is not None:
        found = _from_json(folder / "tokenizer.json", described)
        if found.model == "llama" and model.is_file():
            pieces = _from_sentencepiece(model)
            # What was added later is in tokenizer.json alone.
            return pieces._replace(tokens=pieces.tokens | {i: t for i, t in found.tokens.items() if i in found.scores})
        return found
    if model.is_file():
        return _from_sentencepiece(model)
    if vocab.is_file():
        lines = _bytes(vocab).decode("utf-8", "surrogateescape").splitlines()
        special = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}
        tokens = {i: (t, CONTROL if t in special else NORMAL) for i, t in enumerate(lines)}
        return Vocabulary("bert", tokens, {}, [], {})
    raise SourceError(
        f"{folder}: no tokenizer.json, tokenizer.model or vocab.txt, which a GGUF file holds for llama.cpp; "
        "AutoTokenizer.from_pretrained(folder).save_pretrained(folder) of transformers writes tokenizer.json, and "
        "--format-option tokenizer=none goes without"
    )


def _from_json(file: Path, described: dict[str, Any]) -> Vocabulary:
    """The tokenizer of a tokenizer.json."""
    model = described.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(vocab, dict | list):
        raise SourceError(f"{file}: no model with a vocab")
    kind = model.get("type") or ("WordPiece" if "continuing_subword_prefix" in model else "BPE")
    if kind not in ("BPE", "WordPiece") or not isinstance(vocab, dict):
        raise FormatError(f"{file}: a tokenizer of type {kind}; llama.cpp is told of BPE and WordPiece")
    added, merged = _listed(file, described, "added_tokens"), _listed(file, model, "merges")
    if not all(isinstance(i, int) and 0 <= i < 1 << 24 for i in vocab.values()) or not all(map(_is_added, added)):
        raise SourceError(f"{file}: tokens without a number")
    tokens = {i: (text, NORMAL) for text, i in vocab.items()}
    later = {t["id"]: (t["content"], CONTROL if t.get("special") else USER_DEFINED) for t in added}
    if kind == "WordPiece":
        return Vocabulary("bert", tokens | later, {}, [], _normalizer(described))
    pairs = [_pair(file, merge) for merge in merged]
    if not model.get("byte_fallback"):
        merges = [" ".join(part.replace(" ", "Ġ") for part in pair) for pair in pairs]
        return Vocabulary("gpt2", tokens | later, {}, merges, {})
    # SentencePiece merges by score what tokenizer.json merges in order.
    scores = {vocab["".join(pair)]: -float(n) for n, pair in reversed([*enumerate(pairs)]) if "".join(pair) in vocab}
    tokens = {i: (text, _sentencepiece_type(text, model.get("unk_token"))) for i, (text, _) in tokens.items()}
    # A piece that is also listed as added keeps what SentencePiece has it for.
    later = {i: row for i, row in later.items() if tokens.get(i, ("", NORMAL))[1] != UNKNOWN}
    only_added = {i: 0.0 for i in later if i not in tokens}
    return Vocabulary("llama", tokens | later, scores | only_added, [], _spaces(described))


def _listed(file: Path, part: Mapping[str, Any], name: str) -> list[Any]:
    """A list that need not be there."""
    found = part.get(name) or []
    if not isinstance(found, list):
        raise SourceError(f"{file}: {name} is no list")
    return found


def _is_added(token: Any) -> bool:
    return (
        isinstance(token, dict)
        and isinstance(token.get("id"), int)
        and 0 <= token["id"] < 1 << 24
        and isinstance(token.get("content"), str)
    )


def _pair(file: Path, merge: Any) -> tuple[str, str]:
    parts = merge.split(" ", 1) if isinstance(merge, str) else merge
    if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(p, str) for p in parts):
        raise SourceError(f"{file}: {str(merge)[:100]!r} is no merge of two tokens")
    return parts[0], parts[1]


def _sentencepiece_type(text: str, unknown: str | None) -> int:
    if text == unknown:
        return UNKNOWN
    return BYTE if len(text) == 6 and text.startswith("<0x") and text.endswith(">") else NORMAL


def _spaces(described: dict[str, Any]) -> dict[str, Value]:
    """Whether a text gets a space before its first word."""
    is_prepended = False
    for step in _steps(described.get("normalizer"), "normalizers"):
        is_prepended |= step.get("type") == "Prepend"
    for step in _steps(described.get("pre_tokenizer"), "pretokenizers"):
        if step.get("type") == "Metaspace":
            is_prepended |= step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space", True)
    return {"tokenizer.ggml.add_space_prefix": is_prepended}


def _normalizer(described: dict[str, Any]) -> dict[str, Value]:
    """What WordPiece does to letters; llama.cpp takes the lower case, without accents, where nothing is said."""
    for step in _steps(described.get("normalizer"), "normalizers"):
        if step.get("type") == "BertNormalizer":
            lower, strip = bool(step.get("lowercase", True)), step.get("strip_accents")
            return {
                "tokenizer.ggml.normalizer.lowercase": lower,
                "tokenizer.ggml.normalizer.strip_accents": lower if strip is None else bool(strip),
            }
    return {}


def _steps(part: Any, key: str) -> Iterator[dict[str, Any]]:
    """A part of tokenizer.json that is one step, or a sequence of them."""
    if isinstance(part, dict):
        inside = part.get(key)
        if isinstance(inside, list):
            for step in inside:
                yield from _steps(step, key)
        else:
            yield part


def _pre(model: str, described: dict[str, Any], known: tuple[str | None, str | None], folder: Path) -> str:
    """tokenizer.ggml.pre: by the expression that cuts words, else what is known of the architecture."""
    if model == "gpt2":
        cuts: list[str] = []
        for step in _steps(described.get("pre_tokenizer"), "pretokenizers"):
            pattern = step.get("pattern")
            if step.get("type") == "Split" and isinstance(pattern, dict):
                cuts.append(str(pattern.get("Regex")))
            elif step.get("type") == "ByteLevel" and step.get("use_regex", True):
                cuts.append("")
        if len(cuts) == 1 and cuts[0] in PRE:
            return PRE[cuts[0]]
    if known[0] == model and known[1] is not None:
        return known[1]
    if model != "gpt2":
        return {"llama": "default", "bert": "jina-v2-en"}[model]
    raise FormatError(
        f"{folder}: how tokenizer.json cuts words is none of the ways that are known ({', '.join(PRE.values())}); say "
        "which of llama.cpp's it is with --format-option pre=NAME"
    )


def _as_stored(model: str, text: str, kind: int) -> str:
    """WordPiece marks pieces inside a word; llama.cpp marks those at the beginning of one."""
    if model != "bert" or kind != NORMAL or (text.startswith("[") and text.endswith("]")):
        return text
    return text[2:] if text.startswith("##") else f"\u2581{text}"


def _special_ids(
    options: Mapping[str, Any], config: Mapping[str, Any], ids: Mapping[str, int], size: int
) -> dict[str, int]:
    """The ids of special tokens: by their text in tokenizer_config.json, else as config.json says."""
    found = {}
    for name in _SPECIAL:
        entry = options.get(f"{name}_token")
        text = entry.get("content") if isinstance(entry, dict) else entry
        number = ids.get(text) if isinstance(text, str) else config.get(f"{name}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < size:
            found[name] = number
    return found


def _added(options: Mapping[str, Any], described: Mapping[str, Any]) -> dict[str, Value]:
    """Which special tokens a text gets at its ends: what tokenizer_config.json says, else the template."""
    first = last = None
    for step in _steps(described.get("post_processor"), "processors"):
        single = step.get("single")
        if step.get("type") == "TemplateProcessing" and isinstance(single, list) and single:
            first, last = ("SpecialToken" in part for part in (single[0], single[-1]))
    said = {"bos": options.get("add_bos_token", first), "eos": options.get("add_eos_token", last)}
    return {f"tokenizer.ggml.add_{name}_token": flag for name, flag in said.items() if isinstance(flag, bool)}


def _template(folder: Path, options: Mapping[str, Any]) -> str | None:
    """The chat template; of several, the default one."""
    if (folder / "chat_template.jinja").is_file():
        return _bytes(folder / "chat_template.jinja").decode("utf-8", "replace")
    found = options.get("chat_template")
    if isinstance(found, list):
        named = [t for t in found if isinstance(t, dict) and t.get("name") == "default"]
        found = named[0].get("template") if named else None
    return found if isinstance(found, str) else None


def _from_sentencepiece(file: Path) -> Vocabulary:
    """The pieces of a tokenizer.model."""
    tokens: dict[int, tuple[str, int]] = {}
    scores: dict[int, float] = {}
    is_prepended: bytes | int | float = True
    kind_of_model: bytes | int | float = _UNIGRAM
    try:
        for field, value in _fields(_bytes(file)):
            if field == 1 and isinstance(value, bytes):
                piece = dict(_fields(value))
                text, kind = piece.get(1, b""), piece.get(3, NORMAL)
                if not isinstance(text, bytes) or kind not in range(NORMAL, BYTE + 1):
                    raise ValueError(f"piece {len(tokens)} is damaged")
                scores[len(tokens)] = float(piece.get(2, 0.0))
                tokens[len(tokens)] = text.decode(), int(kind)
            elif field == 2 and isinstance(value, bytes):
                kind_of_model = dict(_fields(value)).get(3, kind_of_model)
            elif field == 3 and isinstance(value, bytes):
                is_prepended = dict(_fields(value)).get(3, 1)
    except (ValueError, TypeError, OverflowError) as e:
        raise SourceError(f"{file}: no tokenizer of SentencePiece: {e}") from e
    if not tokens:
        raise SourceError(f"{file}: no tokenizer of SentencePiece: it has no pieces")
    if kind_of_model != _BPE:
        raise FormatError(
            f"{file}: a tokenizer of type {kind_of_model!r}, as unigram is {_UNIGRAM}; llama.cpp is told of BPE"
        )
    return Vocabulary("llama", tokens, scores, [], {"tokenizer.ggml.add_space_prefix": bool(is_prepended)})


def _fields(data: bytes) -> Iterator[tuple[int, bytes | int | float]]:
    """The fields of a message in protocol buffers, (number, value). Raises ValueError where it is cut off."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            if at >= len(data) or shift > 63:
                raise ValueError(f"cut off at byte {at}")
            byte = data[at]
            value |= (byte & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if byte < 0x80:
                return value

    while at < len(data):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        n = {1: 8, 2: None, 5: 4}[key & 7] if key & 7 in (1, 2, 5) else -1
        n = varint() if n is None else n
        if not 0 <= n <= len(data) - at:
            raise ValueError(f"cut off at byte {at}")
        raw, at = data[at : at + n], at + n
        yield key >> 3, struct.unpack("<f", raw)[0] if key & 7 == 5 else raw


def _json(file: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is no such file."""
    if not file.is_file():
        return None
    try:
        value = json.loads(_bytes(file).decode())
    except (ValueError, RecursionError) as e:
        raise SourceError(f"{file}: not valid JSON: {e}") from e
    if not isinstance(value, dict):
        raise SourceError(f"{file}: must be a JSON object")
    return value


def _bytes(file: Path) -> bytes:
    try:
        if file.stat().st_size > MAX_BYTES:
            raise SourceError(f"{file}: over {MAX_BYTES:,} bytes, too large for what it should be")
        return file.read_bytes()
    except OSError as e:
        raise SourceError(f"{file}: cannot be read: {e.strerror}") from e
