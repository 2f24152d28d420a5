"""Small tokenizers of the two kinds that language models have, with the files that transformers reads.

`byte_level` is the one of Llama 3 and Qwen2: bytes as printable characters, merged within the words that a regular
expression cuts. `byte_fallback` is the one of Llama 2 and Mixtral: characters, a space being ▁, with one token for each
byte that no character covers. Both learn their merges from one text, so they are the same in every run.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

TEXT = """
The weights of a layer are cut into groups, and each group has a scale of its own. A reader of the file must find the
codes, the scales and the zero points where the writer left them, in the order and the width that both agreed upon.
Then every answer of the model is the answer of the decoded weights, and the difference is rounding and nothing else.
There are other ways to read the same text: word by word, letter by letter, or in the pieces that are met most often.
Whoever serves a language for many people wants small files, quick answers and the least memory that will do; whoever
measures it wants exact numbers, known before the experiment begins, and a second program that disagrees when something
is broken. Both should be able to open this checkpoint, compare its logits and go home early on a Friday afternoon.
"""
CHAT_TEMPLATE = """{%- for message in messages -%}
{{ '<|' + message['role'] + '|>\\n' + message['content'] + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}
"""
# The expressions that cut words, as the tokenizer.json of each family has them, one after the other; of deepseek2's
# letters this is the part of the first.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CUTS = {
    "llama3": (_WORDS % r"\p{N}{1,3}",),
    "qwen2": (_WORDS % r"\p{N}",),
    "deepseek2": (
        "[\r\n]",
        r"\s?[A-Za-zµÀ-ÖØ-öø-ƺ]+",
        r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
        r"\s+$",
        "[一-龥ࠀ-一가-퟿]+",
        r"\p{N}",
    ),
    "deepseek3": (
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
    "gpt-oss": (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
}
# Merges by which the families of DeepSeek differ: two line ends, and a bracket with the word behind it.
ACROSS_CUTS = (("Ċ", "Ċ"), ("(", "a"))
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte, as GPT-2 has them."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (chr(256 + i) for i in range(256))
    return [chr(b) if b in printable else next(others) for b in range(256)]


def learned_merges(words: Sequence[Sequence[str]], n: int) -> list[tuple[str, str]]:
    """The `n` merges that byte pair encoding learns from these words: the most frequent pair first, ties by order."""
    counted = Counter(tuple(word) for word in words)
    merges: list[tuple[str, str]] = []
    while len(merges) < n:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, times in counted.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += times
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        counted = Counter({_merged(word, best): times for word, times in counted.items()})
    return merges


def _merged(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    out: list[str] = []
    for part in word:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return tuple(out)


def _unique(merges: Sequence[tuple[str, str]], known: Sequence[str]) -> list[tuple[str, str]]:
    """Without merges whose result is there already: a piece has one id."""
    seen, out = set(known), []
    for pair in merges:
        if "".join(pair) not in seen:
            seen.add("".join(pair))
            out.append(pair)
    return out


def _special(ids: Mapping[str, int]) -> list[dict[str, object]]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return [{"id": i, "content": content, **flags} for content, i in ids.items()]


def _begin(token: str, i: int) -> dict[str, object]:
    """The step that puts one token before a text."""
    first, text = {"SpecialToken": {"id": token, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    second = [{"SpecialToken": {"id": token, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}]
    named = {token: {"id": token, "ids": [i], "tokens": [token]}}
    kind = {"type": "TemplateProcessing", "special_tokens": named}
    return {**kind, "single": [first, text], "pair": [first, text, *second]}


def _write(directory: Path, tokenizer: Mapping[str, object], config: Mapping[str, object]) -> None:
    whole = {"version": "1.0", "truncation": None, "padding": None, **tokenizer}
    named = {k: v for k, v in config.items() if k in ("bos_token", "eos_token", "pad_token", "unk_token")}
    files = {"tokenizer.json": whole, "tokenizer_config.json": config, "special_tokens_map.json": named}
    for name, value in files.items():
        (directory / name).write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def byte_level(directory: Path, family: str, vocab: int, config: Mapping[str, object], special: Sequence[str]) -> None:
    """tokenizer.json, its config and a chat template: 256 bytes, merges, and the `special` tokens at the end.

    config: of the tokenizer: its class and which special token is which
    """
    characters = _byte_characters()
    words = [[characters[b] for b in word.encode()] for word in re.findall(r" ?\w+|[^\w\s]+|\s+", TEXT)]
    n = vocab - 256 - len(special)
    more = ACROSS_CUTS if len(CUTS[family]) > 1 else ()
    merges = [*_unique(learned_merges(words, n + 20), characters)[: n - len(more)], *more]
    order = [*sorted(characters), *("".join(pair) for pair in merges)]
    pieces = {piece: i for i, piece in enumerate(order)}
    ids = {content: len(pieces) + i for i, content in enumerate(special)}
    bos = config.get("bos_token")
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    isolated = {"type": "Split", "behavior": "Isolated", "invert": False}
    splits = [{**isolated, "pattern": {"Regex": text}} for text in CUTS[family]]
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "", "fuse_unk": False}
    model |= {"end_of_word_suffix": "", "byte_fallback": False, "ignore_merges": False}
    tokenizer = {
        "added_tokens": _special(ids),
        "normalizer": {"type": "NFC"} if family == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, level]},
        "post_processor": {"type": "Sequence", "processors": [level, _begin(bos, ids[bos])]} if bos else level,
        "decoder": level,
        "model": {**model, "vocab": pieces, "merges": [" ".join(pair) for pair in merges]},
    }
    _write(directory, tokenizer, config)


def byte_fallback(directory: Path, vocab: int, config: Mapping[str, object]) -> None:
    """tokenizer.json, its config and a chat template: <unk> <s> </s>, 256 bytes, merged pieces, single characters."""
    special = {"<unk>": 0, "<s>": 1, "</s>": 2}
    text = "▁" + "▁".join(TEXT.split())
    words = [list(word) for word in re.findall(r"▁?[^\W_]+|[^\w▁]+|▁+", text)]
    characters = sorted({*LETTERS, *text})
    n = vocab - len(special) - 256 - len(characters)
    merges = _unique(learned_merges(words, n + 20), characters)[:n]
    order = [*special, *(f"<0x{b:02X}>" for b in range(256)), *("".join(pair) for pair in merges), *characters]
    model = {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None, "fuse_unk": True}
    model |= {"end_of_word_suffix": None, "byte_fallback": True, "ignore_merges": False}
    space, mark = {"String": " "}, {"String": "▁"}
    tokenizer = {
        "added_tokens": _special(special),
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": space, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": _begin("<s>", 1),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": mark, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            **model,
            "vocab": {piece: i for i, piece in enumerate(order)},
            "merges": [" ".join(pair) for pair in merges],
        },
    }
    _write(directory, tokenizer, config)
