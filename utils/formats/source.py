"""The source of an export: the weights of a run, its tokenizer, and the facts that are recorded about them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from model import LanguageModel
from tokenizer import Tokenizer
from utils.errors import UserError
from utils.files import read_json_or_empty
from utils.inference.export import load_export
from utils.runs.find import find_export
from utils.runs.layout import ARTIFACTS, CONFIG, EXPORT, PRETRAINED, RECORD


@dataclass(frozen=True)
class Source:
    """A trained model, ready to be written in another format.

    name: of the run, or of the folder of an export without a run.
    run: the directory of the run; None for an export without one.
    training: step, losses and corpus, from the export.
    record, settings: run.json and the configuration; empty without a run.
    pretrained: architecture, config, generation_config, tokenizer_config, name and revision of the published model
        that training started from, if any.
    """

    name: str
    model: LanguageModel
    tokenizer: Tokenizer
    run: Path | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    pretrained: Mapping[str, Any] = field(default_factory=dict)


def open_source(name: str, runs_dir: Path) -> Source:
    """The exported weights of the run that `name` names, or of the export at that path, in float32 on the CPU.

    Raises:
        UserError: there is no such run, or its export is missing or damaged.
    """
    folder = find_export(name, runs_dir)
    export = load_export(folder, torch.device("cpu"))
    run = Path(os.path.abspath(folder)).parent.parent
    if run / EXPORT != Path(os.path.abspath(folder)) or not (run / RECORD).is_file():
        return Source(folder.name, export.model, export.tokenizer, None, export.training)
    record, settings, pretrained = (read_json_or_empty(run / name, run) for name in (RECORD, CONFIG, PRETRAINED))
    return Source(run.name, export.model, export.tokenizer, run, export.training, record, settings, pretrained)


def default_folder(source: Source, format: str) -> Path:
    """The folder in the run directory that an export in `format` is written to by default.

    Raises:
        UserError: the source is an export without a run.
    """
    if source.run is None:
        raise UserError(f"{source.name} is an export without its run: --out DIR says where to write")
    return source.run / ARTIFACTS / format
