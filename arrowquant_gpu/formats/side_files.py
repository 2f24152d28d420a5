"""What lies beside the weights of a model directory: what a quantized copy needs too, and what is left out, and why.

One table for files, one for folders, read from the top; the first pattern that matches decides. Patterns are those of
fnmatch, in lower case; for files against the path from the model directory, for folders against their name.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from .recognise import SUFFIXES

LARGE = 64 << 20

OTHER_FORMAT = "weights in another format"
TRAINING = "state of a training run"
CACHE = "cache or leftover"
VERSION_CONTROL = "version control"
ADAPTER = "adapter, not part of the base weights"


class Rule(NamedTuple):
    """Files of more than `over` bytes that match `pattern` are left out for `reason`, or kept where that is None."""

    pattern: str
    reason: str | None
    over: int = -1


FILES: tuple[Rule, ...] = (
    # Further modules of sentence-transformers, in folders like 2_Dense: the model is not whole without them.
    Rule("[0-9]*_*/*.safetensors", None),
    Rule("[0-9]*_*/pytorch_model.bin", None),
    Rule("adapter_*", ADAPTER),
    Rule("*.safetensors", "safetensors weights that are not part of this checkpoint"),
    Rule("*.index.json", "index of weights that are not part of this checkpoint"),
    Rule("optimizer*", TRAINING),
    Rule("scheduler.*", TRAINING),
    Rule("rng_state*", TRAINING),
    Rule("random_states*", TRAINING),
    Rule("trainer_state.json", TRAINING),
    Rule("training_args.bin", TRAINING),
    Rule("*tfevents*", TRAINING),
    Rule("*.distcp", TRAINING),
    *(Rule(f"*{suffix}", OTHER_FORMAT) for suffix, _ in SUFFIXES),
    Rule("*.onnx_data", OTHER_FORMAT),
    Rule("*.onnx.data", OTHER_FORMAT),
    Rule("openvino_*", OTHER_FORMAT),
    Rule("*.mlmodel", OTHER_FORMAT),
    Rule("*.engine", OTHER_FORMAT),
    Rule("*.nemo", OTHER_FORMAT),
    Rule("*.tmp", CACHE),
    Rule("*.lock", CACHE),
    Rule("*.incomplete", CACHE),
    Rule("*.part", CACHE),
    Rule("*~", CACHE),
    Rule(".git*", VERSION_CONTROL),
    Rule(".*", "hidden file"),
    Rule("*/.*", "hidden file"),
    # Everything else belongs to the model: config*.json, tokenizer*, vocab*, merges*, chat_template*, *.model, *.py,
    # README.md, LICENSE, ... Of a size that none of these has, it is something else.
    Rule("tokenizer*", None),
    Rule("*.model", None),
    Rule("*", f"not known to belong to a model, and over {LARGE >> 20} MiB", over=LARGE),
)

# Folders that are looked into, with reason None, and those that are left out whole.
FOLDERS: tuple[tuple[str, str | None], ...] = (
    (".git", VERSION_CONTROL),
    (".hg", VERSION_CONTROL),
    (".svn", VERSION_CONTROL),
    (".*", CACHE),
    ("__pycache__", CACHE),
    ("[0-9]*_*", None),
    ("additional_chat_templates", None),
    ("chat_templates", None),
    ("original", "checkpoint in its authors' own layout"),
    ("onnx*", OTHER_FORMAT),
    ("openvino*", OTHER_FORMAT),
    ("coreml*", OTHER_FORMAT),
    ("gguf*", OTHER_FORMAT),
    ("metal", OTHER_FORMAT),
    ("checkpoint-*", TRAINING),
    ("global_step*", TRAINING),
    ("runs", TRAINING),
    ("logs", TRAINING),
    ("*", "folder not known to belong to a model; copy it yourself if it does"),
)


def reason_left_out(path: str, n_bytes: int) -> str | None:
    """Why the file at `path`, from the model directory, is left out; None where it goes with the weights.

    >>> reason_left_out("tokenizer.json", 1000), reason_left_out("pytorch_model.bin", 1000)
    (None, 'weights in another format')
    """
    lower = path.lower()
    return next((r.reason for r in FILES if n_bytes > r.over and fnmatchcase(lower, r.pattern)), None)


def side_files(directory: Path, read: Collection[Path]) -> tuple[tuple[Path, ...], tuple[tuple[Path, str], ...]]:
    """All of `directory` but the files in `read`, which are the weights: (what goes with them, what is left out).

    Links to files are followed, as the Hub's cache is made of them; links to folders are not. Folders that are left
    out are named as a whole. Raises OSError where a folder cannot be listed.
    """
    kept: list[Path] = []
    left_out: list[tuple[Path, str]] = []
    folders = [directory]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                path = Path(entry.path)
                if path in read:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    reason = next(r for p, r in FOLDERS if fnmatchcase(entry.name.lower(), p))
                    if reason is None:
                        folders.append(path)
                        continue
                elif entry.is_dir():
                    reason = "link to a folder"
                elif entry.is_file():
                    reason = reason_left_out(path.relative_to(directory).as_posix(), entry.stat().st_size)
                else:
                    reason = "link to a file that is not there" if entry.is_symlink() else "no regular file"
                if reason is None:
                    kept.append(path)
                else:
                    left_out.append((path, reason))
    return tuple(sorted(kept)), tuple(sorted(left_out))
