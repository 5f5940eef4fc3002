"""Absolute paths for the dataset and the tokenizer of a configuration."""

from __future__ import annotations

import os
from pathlib import Path

from utils.config.loader import LoadedConfig
from utils.corpora.datasets import is_dataset
from utils.corpora.sources import NAMES


def with_absolute_paths(loaded: LoadedConfig, root: Path) -> LoadedConfig:
    """`loaded` with absolute paths for its dataset and tokenizer, so that the recorded configuration is unambiguous.

    A path in a file of configs/ is relative to `root`, a path in a flag or in code to the current folder.
    """
    data = loaded.config.data

    def absolute(key: str, path: str) -> str:
        """The absolute form of `path`, or `path` itself if there is no such file, so that the error message names that.

        If a path relative to `root` is missing there but exists in the current folder, it is still made absolute, so
        that the wrong file is not found later.
        """
        source = loaded.source(key)
        start = Path.cwd() if source.startswith("--") or source == "code" else root
        found = os.path.abspath(start / path)
        return found if os.path.exists(found) or os.path.exists(path) else path

    kind, colon, file = data.tokenizer.partition(":")
    paths = {"tokenizer": kind + colon + absolute("tokenizer", file)} if colon else {}
    if data.dataset not in NAMES and not is_dataset(root / data.datasets_dir / data.dataset):
        paths["dataset"] = absolute("dataset", data.dataset)
    config = loaded.config.model_copy(update={"data": data.model_copy(update=paths)})
    return LoadedConfig(config, loaded.layers)
