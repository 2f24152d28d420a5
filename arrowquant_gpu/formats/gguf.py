"""`GgufSink`: a model as one GGUF file, with the names, keys and tokenizer that llama.cpp wants. docs/formats/gguf.md.

What an architecture's tensors and sizes are called is known by `models`, the container by gguf_file.py.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import models
from ..dtypes import DTYPES
from ..errors import FormatError
from ..grids import GRIDS
from ..schemes import Scheme, rows_and_length
from . import Checkpoint, Codes, Entry, Place, TensorInfo
from .gguf_file import ALIGNMENT, BY_DTYPE, BY_SCHEME, TYPES, GgmlType, StoredValue, Value, layout, n_bytes
from .gguf_homes import DIFFUSION, RECORD, Home, find_homes, permuted
from .gguf_source import GgufSource, open_source, sizes_of
from .gguf_tokenizer import TOKENIZER_FILES, tokenizer_keys
from .output import Output
from .pieces import PIECE_BYTES, Cut, Piece, pieces

# Names of the same models in diffusers, which ComfyUI-GGUF does not read.
_DIFFUSERS = re.compile(r"(?:^|\.)(?:single_)?transformer_blocks\.0\.|(?:^|\.)blocks\.0\.attn2\.to_q\.")

# ggml rounds and lays out these in its own way.
_GGML = {"mxfp4": "ggml_mxfp4", "nvfp4": "ggml_nvfp4"}
# What llama-quantize takes where rows are not whole blocks; then F16, as it does.
FALLBACK = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
# Matrices that llama.cpp adds, or decides with, in float32: it has no such operation for other types.
FLOAT32 = re.compile(r"(?:^|\.)(?:ffn_gate_inp|ffn_gate_inp_shexp|position_embd|token_types)\.weight$|\.bias$")
# What becomes of kept tensors of types that readers do not compute with.
_CONVERTED = {"float64": "F32", "float8_e4m3fn": "F16", "float8_e5m2": "F16"}

SIDE_FILES = frozenset({"config.json", "chat_template.jinja", *TOKENIZER_FILES})

# general.file_type by the type of most weights; that of mixes is in the table of mixes.
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 11}
FILE_TYPES |= {"Q4_K": 14, "Q5_K": 16, "Q6_K": 18, "IQ4_NL": 25, "BF16": 32, "MXFP4": 38, "NVFP4": 39}
# ggml's limits for names, and those of gguf-py, with which ComfyUI-GGUF reads.
_MAX_NAME, _MAX_NAME_DIFFUSION, _MAX_DIMENSIONS = 63, 127, 4


class GgufSink:
    """Writes one GGUF file. See `Sink`.

    Of a source that is a GGUF file the keys are taken over that do not follow from config.json; all of them where there
    is none, and tensors keep their names.

    config, names: the config.json and the names of all tensors of the source
    tokenizer: "model" writes that of the model directory, or of the GGUF file, "none" leaves it out
    pre: tokenizer.ggml.pre, where tokenizer.json cuts words in a way that is not known here

    Raises FormatError for an architecture that is not in the table, a tensor that has no name there, a config without
    the sizes that GGUF stores, and for shards.
    """

    format = "gguf"
    # llama.cpp does not fuse: parts may have types of their own.
    fused_alike = False
    # What the file holds the content of.
    side_files = SIDE_FILES

    def __init__(
        self,
        output: Output,
        config: Mapping[str, Any] | None,
        *,
        names: Sequence[str] = (),
        max_shard_size: int | None = None,
        tokenizer: str = "model",
        pre: str = "",
    ) -> None:
        if max_shard_size is not None:
            raise FormatError("gguf is one file, without shards (--max-shard-size); llama-gguf-split cuts it")
        self.config, self._output = dict(config or {}), output
        self.model = models.find(config, names)
        self._tokenizer, self._pre = tokenizer, pre
        self._homes, self._sizes = find_homes(self.model, self.config, names)
        self._n_layers = self.model.n_layers(name for name, home in self._homes.items() if home is not None)
        self._has_head = any(home is not None and home.name == "output.weight" for home in self._homes.values())
        # Weights of a diffusion model's embeddings and heads are few, and much depends on them.
        is_diffusion = self.model.gguf is None
        self._has_same_names = self.model.gguf is not None and self.model.gguf.same_names
        self.quantizes = frozenset[str]() if is_diffusion else frozenset({"embedding", "head"})
        self._asked: dict[str, str] = {}
        self._begins: dict[str, int] = {}
        self._sources: dict[Path, GgufSource | None] = {}

    # What the plan asks.

    def scheme_for(self, info: TensorInfo, scheme: Scheme) -> Scheme:
        """The scheme, or the one that llama-quantize falls back to where rows are not whole blocks. See `Sink`."""
        home = self._homes[info.name]
        if home is None:
            raise FormatError(self._why_left_out(info.name))
        if self._has_same_names and self._source(info.file) is None:
            raise FormatError(
                "tensors have the names of a GGUF file, of which the sizes and the tokenizer are missing; quantize the "
                "GGUF file itself"
            )
        grid = _GGML.get(scheme.id, scheme.grid)
        if grid not in BY_SCHEME or scheme.id not in (grid, *_GGML):
            known = ", ".join(name for name, row in GRIDS.items() if row.block and not name.startswith("ggml_"))
            raise FormatError(f"gguf has the types of ggml, not {scheme.id}; use {known}, mxfp4 or nvfp4, or a mix")
        if len(info.shape) < 2 or FLOAT32.search(home.name) or home.add:
            raise FormatError(f"llama.cpp computes with {home.name} in float32")
        if len(info.shape) > _MAX_DIMENSIONS:
            raise FormatError(f"{len(info.shape)} dimensions; ggml has {_MAX_DIMENSIONS}")
        self._asked[info.name] = grid
        stored = Scheme.parse(grid)
        for _ in range(2):
            if stored.misfit(info.shape) is not None:
                stored = Scheme.parse(FALLBACK.get(stored.id, "f16"))
        return stored

    def n_bytes(self, entry: Entry) -> int:
        """Bytes of its blocks or values; 0 for what is left out. See `Sink`."""
        return 0 if self._homes[entry.info.name] is None else n_bytes(self._type(entry), entry.info.shape)

    def warnings(self, entries: Sequence[Entry]) -> list[str]:
        """What is stored otherwise than asked for, what is left out, and what a known reader refuses.

        Raises FormatError and SourceError for what `open` would raise them.
        """
        self._stacks(entries)
        self._tokenizer_keys(entries)
        fallbacks = Counter(
            (self._asked[e.info.name], e.scheme.id, e.info.shape[-1])
            for e in entries
            if e.scheme is not None and self._asked.get(e.info.name, e.scheme.id) != e.scheme.id
        )
        found = [
            f"{n} tensors are {stored} instead of {asked}: rows of {length} weights are not whole blocks of "
            f"{GRIDS[asked].block}."
            for (asked, stored, length), n in fallbacks.items()
        ]
        converted = [e for e in entries if e.scheme is None and e.info.dtype in _CONVERTED]
        if any(self._homes[e.info.name] for e in converted):
            found.append(f"{len(converted)} kept tensors of {converted[0].info.dtype} become F32 or F16.")
        out = [name for name in (e.info.name for e in entries) if self._homes[name] is None]
        if out:
            found.append(f"{len(out)} tensors are not in the file (first: {out[0]}: {self._why_left_out(out[0])}).")
        found += [] if self.model.gguf is None else self.model.gguf.misread(self.config)
        if self.model.name in DIFFUSION and any(_DIFFUSERS.search(e.info.name) for e in entries):
            found.append("ComfyUI-GGUF reads the names of the model's authors, not those of diffusers.")
        return found

    def _why_left_out(self, name: str) -> str:
        if name in self.model.tied:
            return f"tied to {self.model.tied[name]}, which readers take instead"
        return f"{self.model.name} has no such tensor in GGUF files"

    def pieces(self, entry: Entry) -> list[Piece]:
        """Whole heads where their rows change places; nothing of what is left out. See `Sink`."""
        info, home = entry.info, self._homes[entry.info.name]
        if home is None:
            return [Piece(entry, 0, 0, 1, 0, 0, info.offset, 0)]
        if not home.heads:
            return pieces(entry, Cut(within_rows=True))
        rows, length = info.shape[0], math.prod(info.shape[1:])
        if rows % (2 * home.heads):
            raise FormatError(f"{info.name}: {rows} rows are not pairs of rows of {home.heads} heads")
        if entry.scheme is not None:
            return pieces(entry, Cut(rows=rows // home.heads))
        unit = rows // home.heads * length * DTYPES[info.dtype].bits // 8
        step = max(1, PIECE_BYTES // unit) * unit
        spans = [(at, min(step, info.n_bytes - at)) for at in range(0, info.n_bytes, step)]
        return [Piece(entry, i, 0, 1, at, n, info.offset + at, n) for i, (at, n) in enumerate(spans)]

    # What the engine asks.

    def open(self, entries: Sequence[Entry], source: Checkpoint, provenance: dict[str, str]) -> None:
        """Make the file in its final size, all but the weights in their final content. See `Sink`."""
        stacks = self._stacks(entries)
        extra = {} if self.model.gguf is None else self.model.gguf.tensors(self.config)
        tensors = [(name, kind, shape) for name, (kind, shape, _) in stacks.items()]
        tensors += [(name, TYPES["F32"], values.shape) for name, values in extra.items()]
        file = self._output.target.name
        given = self._source(entries[0].info.file) if entries else None
        alignment = ALIGNMENT if given is None else given.alignment
        header, places, size = layout(self._keys(entries, source, provenance), tensors, alignment)
        self._output.create(file, size)
        self._output.write(file, 0, np.frombuffer(header, np.uint8))
        for name, values in extra.items():
            self._output.write(file, places[name][0], values)
        for name, (_, _, members) in stacks.items():
            for i, entry in enumerate(members):
                self._begins[entry.info.name] = places[name][0] + i * self.n_bytes(entry)

    def places(self, piece: Piece) -> list[Place]:
        """See `Sink`."""
        entry, info = piece.entry, piece.entry.info
        if self._homes[info.name] is None:
            return []
        file, begin = self._output.target.name, self._begins[info.name]
        if entry.scheme is not None:
            row_bytes = entry.scheme.row_bytes(rows_and_length(info.shape)[1])
            at = piece.row * row_bytes + entry.scheme.row_bytes(piece.column)
            return [Place(file, begin + at, piece.rows * entry.scheme.row_bytes(piece.columns))]
        before, after = DTYPES[info.dtype].bits // 8, self._type(entry).block_bytes
        return [Place(file, begin + piece.column // before * after, piece.n_bytes // before * after)]

    def stored(self, piece: Piece, codes: Codes | NDArray[np.uint8]) -> list[NDArray[Any]]:
        """Views, but of rows that change places and of kept values that change their type. See `Sink`."""
        info, home = piece.entry.info, self._homes[piece.entry.info.name]
        if home is None:
            return []
        if isinstance(codes, Codes):
            return [permuted(codes.packed, info.shape[0] // home.heads) if home.heads else codes.packed]
        kind, dtype = self._type(piece.entry), DTYPES[info.dtype].numpy
        assert dtype is not None
        values = codes.reshape(-1).view(dtype)
        target = DTYPES[kind.dtype or info.dtype].numpy
        if home.add:
            values = values.astype(np.float32) + np.float32(home.add)
        values = values.astype(target, copy=False)
        if home.heads:
            values = permuted(values.reshape(-1, math.prod(info.shape[1:])), info.shape[0] // home.heads)
        return [values]

    def finish(self, entry: Entry) -> None:
        """See `Sink`. Nothing follows from several pieces."""
        return

    def commit(self) -> tuple[Path, ...]:
        """See `Sink`."""
        return self._output.commit()

    # The file.

    def _type(self, entry: Entry) -> GgmlType:
        """The type of a tensor in the file: kept vectors are F32, kept matrices of the type that they have."""
        info, home = entry.info, self._homes[entry.info.name]
        if entry.scheme is not None:
            return BY_SCHEME[entry.scheme.id]
        is_float = DTYPES[info.dtype].is_float
        if is_float and (len(info.shape) < 2 or (home is not None and (home.add or FLOAT32.search(home.name)))):
            return TYPES["F32"]
        if info.dtype in _CONVERTED:
            return TYPES[_CONVERTED[info.dtype]]
        if info.dtype not in BY_DTYPE:
            raise FormatError(f"{info.name}: {info.dtype}, which ggml has no type for")
        return BY_DTYPE[info.dtype]

    def _stacks(self, entries: Sequence[Entry]) -> dict[str, tuple[GgmlType, tuple[int, ...], list[Entry]]]:
        """The tensors of the file, in order: type, shape, and the entries that they are made of.

        Raises FormatError where experts of one stack are missing or not alike, for a name that is too long and one that
        two tensors would have.
        """
        members: dict[str, list[tuple[int | None, Entry]]] = {}
        for entry in entries:
            home = self._homes[entry.info.name]
            if home is not None:
                members.setdefault(home.name, []).append((home.expert, entry))
        stacks = {}
        longest = _MAX_NAME if self.model.gguf else _MAX_NAME_DIFFUSION
        for name, found in members.items():
            if len(name.encode()) > longest:
                raise FormatError(f"{name}: over {longest} bytes, the longest name that readers take")
            first = found[0][1]
            kind, shape = self._type(first), first.info.shape
            if len(shape) > _MAX_DIMENSIONS:
                shape = (*shape[: _MAX_DIMENSIONS - 1], math.prod(shape[_MAX_DIMENSIONS - 1 :]))
            if found[0][0] is not None:
                found.sort(key=lambda pair: pair[0] or 0)
                if [expert for expert, _ in found] != [*range(len(found))]:
                    raise FormatError(f"{name}: of {len(found)} experts some are missing or there twice")
                unlike = [e for _, e in found if (self._type(e), e.info.shape) != (kind, shape)]
                if unlike:
                    raise FormatError(
                        f"{unlike[0].info.name} is {self._type(unlike[0]).name} {list(unlike[0].info.shape)} and "
                        f"{first.info.name} {kind.name} {list(shape)}; {name} holds all experts and has one type"
                    )
                shape = (len(found), *shape)
            elif len(found) > 1:
                raise FormatError(f"{found[1][1].info.name} and {first.info.name} are both {name} in GGUF files")
            stacks[name] = kind, shape, [e for _, e in found]
        return stacks

    def _keys(
        self, entries: Sequence[Entry], source: Checkpoint, provenance: Mapping[str, str]
    ) -> dict[str, Value | StoredValue]:
        gguf = self.model.gguf
        taken = self._taken(entries)
        own: dict[str, Value] = {"general.quantization_version": 2, "general.file_type": self._file_type(entries)}
        if taken and (gguf is None or self._has_same_names):
            keys = taken | own
        else:
            keys = {
                "general.architecture": DIFFUSION[self.model.name] if gguf is None else gguf.architecture,
                "general.name": taken.get("general.name", provenance.get("source", self.model.name)),
                **own,
            }
            keys |= self._sizes | self._pooling(entries) | self._tokenizer_keys(entries)
            keys |= {key: value for key, value in taken.items() if key not in keys}
        for e in entries:
            if len(e.info.shape) > _MAX_DIMENSIONS:
                keys[f"comfy.gguf.orig_shape.{e.info.name}"] = np.array(e.info.shape, "<i4")
        keys |= {f"{RECORD}{key}": value for key, value in provenance.items()}
        keys[f"{RECORD}metadata"] = json.dumps(source.metadata)
        keys[f"{RECORD}config"] = json.dumps(source.config)
        keys[f"{RECORD}tensors"] = json.dumps({e.info.name: self._record(e) for e in entries})
        return keys

    def _source(self, file: Path) -> GgufSource | None:
        """What the file that a tensor is from says where it is a GGUF file, None where it is none."""
        if file not in self._sources:
            self._sources[file] = open_source(file)
        return self._sources[file]

    def _taken(self, entries: Sequence[Entry]) -> dict[str, Value | StoredValue]:
        """The keys of a source that is a GGUF file, with the tokenizer that is asked for."""
        given = self._source(entries[0].info.file) if entries else None
        if given is None:
            return {}
        taken: dict[str, Value | StoredValue] = dict(given.keys)
        if self._tokenizer == "none":
            taken = {key: value for key, value in taken.items() if not key.startswith("tokenizer.")}
            taken["tokenizer.ggml.model"] = "none"
        elif self._pre:
            taken["tokenizer.ggml.pre"] = self._pre
        return taken

    def _record(self, entry: Entry) -> dict[str, Any] | None:
        """What the reader needs to find a tensor again as it was; None for what is left out."""
        home = self._homes[entry.info.name]
        if home is None:
            return None
        record = home._asdict() | {"dtype": entry.info.dtype, "quantized": entry.scheme is not None}
        if len(entry.info.shape) > _MAX_DIMENSIONS:
            record["shape"] = entry.info.shape
        return {key: value for key, value in record.items() if value or (key == "expert" and value is not None)}

    def _file_type(self, entries: Sequence[Entry]) -> int:
        """That of the mix that gives each tensor what was asked for; else of the type that most weights have."""
        quantized = [e for e in entries if e.scheme is not None]
        homes = {e.info.name: home for e in quantized if (home := self._homes[e.info.name]) is not None}
        for mix in models.mixes.values() if self.model.gguf else ():
            if all(self._asked.get(e.info.name) == self._mixed(mix, e, homes[e.info.name]) for e in quantized):
                return mix.file_type
        counted: Counter[str] = Counter()
        for e in quantized:
            counted[self._type(e).name] += math.prod(e.info.shape)
        return FILE_TYPES[max(counted, key=lambda name: (counted[name], name), default="F32")]

    def _mixed(self, mix: models.Mix, entry: Entry, home: Home) -> str:
        """The scheme that a mix gives a tensor of this model."""
        role, layer = self.model.role(entry.info.name, entry.info.shape), self.model.layer(entry.info.name)
        role = "head" if role == "embedding" and not self._has_head else role
        given = self._source(entry.info.file) if self._has_same_names else None
        architecture = "" if self.model.gguf is None else self.model.gguf.architecture
        sizes = sizes_of({"general.architecture": architecture, **self._sizes}) if given is None else given.sizes
        heads, kv_heads = (sizes.get(f"num_{name}_heads") or 0 for name in ("attention", "key_value"))
        gqa, experts = heads // (kv_heads or heads or 1), sizes.get("num_local_experts") or 0
        return mix.scheme(role, home.name, layer, self._n_layers, experts=experts, gqa=gqa)

    def _pooling(self, entries: Sequence[Entry]) -> dict[str, Value]:
        """How a model of sentences makes one vector of many: the module of sentence-transformers beside it says."""
        file = entries[0].info.file.parent / "1_Pooling" / "config.json" if entries else Path()
        if self.model.gguf is None or not self.config or self.model.gguf.architecture != "bert" or not file.is_file():
            return {}
        if self._source(entries[0].info.file) is not None:
            return {}
        modes = {"pooling_mode_mean_tokens": 1, "pooling_mode_cls_token": 2, "pooling_mode_lasttoken": 3}
        try:
            said = json.loads(file.read_bytes())
            chosen = [n for mode, n in modes.items() if said.get(mode)]
        except (OSError, ValueError, AttributeError) as e:
            raise FormatError(f"{file}: cannot be read: {e}") from e
        return {"bert.pooling_type": chosen[0]} if len(chosen) == 1 else {}

    def _tokenizer_keys(self, entries: Sequence[Entry]) -> dict[str, Value]:
        gguf = self.model.gguf
        if gguf is None or not entries or self._source(entries[0].info.file) is not None:
            return {}
        if self._tokenizer == "none":
            return {"tokenizer.ggml.model": "none"}
        n = next(
            (e.info.shape[0] for e in entries if (h := self._homes[e.info.name]) and h.name == "token_embd.weight"),
            None,
        )
        return tokenizer_keys(entries[0].info.file.parent, self.config, gguf.vocabulary(self.config), n, self._pre)
