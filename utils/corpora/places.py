"""Where the text and the tokenizer of a configuration are: paths that mean the same wherever they are read."""

from __future__ import annotations

import os
from pathlib import Path

from utils.config.loader import LoadedConfig
from utils.corpora.datasets import is_dataset
from utils.corpora.sources import NAMES


def with_absolute_paths(loaded: LoadedConfig, root: Path) -> LoadedConfig:
    """`loaded` with absolute paths for its dataset and tokenizer: the recorded configuration means the same everywhere.

    A path in a file of configs/ starts from `root`, a path in a flag or in code from the current folder.
    """
    data = loaded.config.data

    def absolute(key: str, path: str) -> str:
        """`path` as it is where there is nothing: then the error names what was written.

        What has this name in the current folder instead is not meant, and must not be found there later.
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
