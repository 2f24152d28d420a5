"""Sources named by a Hub id: `resolve` turns `org/name[@revision]` into the directory of a downloaded snapshot.

The Hub's own library does the work, with its cache, its token and its environment (HF_HOME, HF_TOKEN, HF_ENDPOINT,
HF_HUB_OFFLINE). It is optional and imported only for an id.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import SourceError
from .recognise import SUFFIXES, by_suffix
from .side_files import FOLDERS

_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?", re.ASCII)

# Not downloaded: weights in formats that are not read. `.bin` only by the names of whole models, because the further
# modules of sentence-transformers have such files too.
IGNORED: tuple[str, ...] = (
    *(f"*{suffix}" for suffix, _ in SUFFIXES if suffix != ".bin"),
    *(
        "pytorch_model*.bin",
        "model*.bin",
        "openvino_*",
        "*.onnx_data",
        "*.onnx.data",
        "optimizer*",
        "training_args.bin",
    ),
    *(f"{folder}/*" for folder, reason in FOLDERS if reason is not None and folder not in ("*", ".*")),
)
# The same weights a second time in most repositories, and the only ones in a few.
IGNORED_FIRST = ("consolidated*.safetensors",)

# What the errors of the Hub's library mean, by the name of the class; the first that fits.
_MEANING = {
    "GatedRepoError": "its owner asks you to accept terms first: see its page, then log in with `hf auth login`",
    "RepositoryNotFoundError": "neither a path nor a model on the Hub; if it is a private model, log in with "
    "`hf auth login` or set HF_TOKEN",
    "RevisionNotFoundError": "the model has no such revision",
    "LocalEntryNotFoundError": "not in the local cache, and the Hub cannot be reached",
    "OfflineModeIsEnabled": "not in the local cache, and HF_HUB_OFFLINE is set",
    "HFValidationError": "neither a path nor a valid Hub id",
}


def resolve(src: str | Path) -> Path:
    """The path that `src` means: an existing path as it is, or the local snapshot of the Hub id `org/name[@revision]`.

    Downloads what is not in the Hub library's cache yet: config, tokenizer and the like, and safetensors weights, not
    those in other formats. `revision` is a branch, tag or commit; without one, the main branch.

    Raises SourceError where nothing of that name is found, the Hub cannot be reached, the optional `huggingface_hub`
    is not installed, or the repository has no safetensors.

    >>> resolve(".")
    PosixPath('.')
    """
    path, m = Path(src), _ID.fullmatch(str(src))
    if path.exists():
        return path
    if m is None:
        raise SourceError(f"{src}: no such file or directory")
    try:
        import huggingface_hub
    except ImportError as e:
        raise SourceError(
            f"{src}: no such file or directory. If it is a model on the Hugging Face Hub, the optional huggingface_hub "
            f"is needed: pip install 'arrowquant_gpu[hub]'"
        ) from e
    try:
        for ignored in ((*IGNORED, *IGNORED_FIRST), IGNORED):
            folder = Path(
                huggingface_hub.snapshot_download(
                    m["id"], revision=m["revision"], ignore_patterns=list(ignored), library_name="arrowquant_gpu"
                )
            )
            if any(folder.glob("*.safetensors")):
                return folder
        names = sorted(huggingface_hub.HfApi().list_repo_files(m["id"], revision=m["revision"]))
    except Exception as e:  # the library's errors have no common base, and differ between its releases
        meaning = next((_MEANING[c.__name__] for c in type(e).__mro__ if c.__name__ in _MEANING), None)
        words = meaning or f"the download failed: {type(e).__name__}: {str(e).strip().splitlines()[:1]}"
        raise SourceError(f"{src}: {words}") from e
    other = next((f"{n} is {what}" for n in names if (what := by_suffix(n)) is not None), f"it holds {names[:5]}")
    raise SourceError(f"{src}: the repository has no safetensors weights; {other}.")
