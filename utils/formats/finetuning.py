"""--init-from hf:NAME: the settings and weights of a run that starts from a published model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from utils.checkpoints.files import Checkpoint
from utils.config.loader import LoadedConfig, relative_name
from utils.config.settings import ModelConfig
from utils.formats.hub import find_pretrained
from utils.formats.pretrained import TOKENIZER, Pretrained, open_pretrained
from utils.formats.table import FormatError
from utils.runs.origin import PRETRAINED_PREFIX, Origin, put_on_top

CHOSEN = ("dropout", "zero_init", "block_size")  # settings of the model that its weights do not determine
CONTEXT_TOKENS = 1024  # the default context of training


def start_from_pretrained(
    loaded: LoadedConfig,
    name: str,
    files: Iterable[Path],
    root: Path,
    report: Callable[[str], None],
) -> tuple[LoadedConfig, Origin]:
    """The configuration and the origin of a run that starts from a published model.

    Architecture and tokenizer are those of the model. What the command line or a file named on it sets is kept, so that
    a contradiction is found later; block_size is at most CONTEXT_TOKENS unless it is set there.

    Args:
        name: what follows hf:.
        files: those of --config.
        root: the project folder.
        report: prints one line to the user.

    Raises:
        UserError: there is no such model, or it cannot be represented.
    """
    found = find_pretrained(name, report=report)
    report(f"{PRETRAINED_PREFIX}{name}: {found.where}")
    opened = open_pretrained(found.folder)
    if opened.unknown:
        report(f"{PRETRAINED_PREFIX}{name}: keys of config.json that are not used: {', '.join(opened.unknown)}")
    opened.tokenizer()  # raises if it is missing
    named = {relative_name(path, root) for path in files}

    def is_explicit(key: str) -> bool:
        source = loaded.source(key)
        return source.startswith("--") or source == "code" or source.rpartition(":")[0] in named

    values: dict[str, Any] = {
        key: value for key, value in opened.config.model_dump().items() if key not in CHOSEN and not is_explicit(key)
    }
    if not is_explicit("block_size"):
        values["block_size"] = min(opened.config.block_size, CONTEXT_TOKENS)
    if not is_explicit("tokenizer"):
        values["tokenizer"] = f"hf:{os.path.abspath(found.folder / TOKENIZER)}"
        values |= {"unknown_token": None, "special_tokens": ()}
    origin = Origin("init", found.folder, pretrained=name, revision=found.revision)
    return put_on_top(loaded, values, "--init-from"), origin


def pretrained_as_checkpoint(
    folder: Path, name: str, revision: str | None, model: ModelConfig | None = None, sha256: str | None = None
) -> Checkpoint:
    """The weights of a published model as a checkpoint to start from; each tensor is read when it is accessed.

    Args:
        model: the architecture of the run, whose block_size may be smaller; None for that of the model.
        sha256: the expected hash of the weights, if the run has started from them before.

    Raises:
        UserError: the model is damaged, or its weights are not those of `sha256`.
    """
    opened = open_pretrained(folder)
    found = opened.sha256()
    if sha256 is not None and found != sha256:
        raise FormatError(
            f"{folder}: not the weights that the run began with (sha256 {found[:12]}..., not {sha256[:12]}...)"
        )
    context = None if model is None or model.block_size >= opened.config.block_size else model.block_size
    config = opened.with_context(context)
    tokenizer = opened.tokenizer()
    state = {
        "model": config.model_dump(mode="json"),
        "run": f"{PRETRAINED_PREFIX}{name}",
        "pretrained": found,
        "facts": pretrained_facts(opened, name, revision, found),
    }
    return Checkpoint(folder, 0, opened.weights(config), {}, tokenizer.to_json(), state)


def pretrained_facts(opened: Pretrained, name: str, revision: str | None, sha256: str) -> Mapping[str, Any]:
    """What a run records of the model that it started from (meta/pretrained.json), so that its export is complete."""
    place = Path(os.path.abspath(os.path.expanduser(name)))
    return {
        "name": place.name if place.is_dir() else name,
        "published": not place.is_dir(),
        "revision": revision,
        "sha256": sha256,
        **opened.facts(),
    }
