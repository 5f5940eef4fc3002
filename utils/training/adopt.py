"""Make a run from a model that another program trained, as if it had been trained and stopped here."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from data import BatchSampler, Corpus, load_corpus
from model import LanguageModel, outline
from tokenizer import Tokenizer, build_tokenizer, load_tokenizer
from utils.checkpoints.files import weight_differences, write_checkpoint
from utils.checkpoints.folder import LATEST_FILE, folder_name
from utils.config.fields import derived_settings, field_fact
from utils.config.loader import ConfigLoader, LoadedConfig, Setting, load_layer, rule_error
from utils.config.section import TRAJECTORY, RuleError
from utils.config.settings import TOKENIZERS
from utils.corpora.absolute_paths import with_absolute_paths
from utils.errors import UserError, nearest
from utils.files import unwritable, write_json
from utils.folders import remove, sync_folder
from utils.formats.convert import name_of
from utils.formats.foreign import MOMENTS, Foreign
from utils.inference.export import save_export
from utils.nn.roles import declared_roles
from utils.optim.groups import build_optimizer
from utils.preparation.arithmetic import with_problems
from utils.runs.layout import (
    ARTIFACTS,
    CHECKPOINTS,
    CONFIG,
    CONFIG_SOURCES,
    EXPORT,
    LOGS,
    META,
    METRIC_REGISTRY,
    METRICS_LOG,
    MODEL_SUMMARY,
    NOTES,
    RECORD,
    TOKENIZER,
)
from utils.runs.lock import RunLock
from utils.runs.metrics import write_registry
from utils.runs.run import NO_NOTES, new_record, utc_now
from utils.runs.seal import file_sha256, write_seal
from utils.runs.trust import made_here
from utils.terminal.cli import naming
from utils.training.start import model_summary
from utils.training.state import TrainState, capture

CPU = torch.device("cpu")

OF_A_FILE = "hf"  # the kind of tokenizer that is read from a tokenizer.json


@dataclass(frozen=True)
class Adopted:
    """The run that `adopt` has made.

    optimizer: whether it has the state of the optimizer.
    resumes: whether --resume can continue it; otherwise only --fork can.
    """

    run: Path
    program: str
    step: int
    parameters: int
    tokenizer: str
    optimizer: bool
    resumes: bool
    notes: list[str]


def adopt(
    foreign: Foreign,
    place: Path,
    root: Path,
    argv: Sequence[str],
    *,
    tokenizer: str | None = None,
    dataset: str | None = None,
    warn: Callable[[str], None] = lambda message: None,
) -> Adopted:
    """Make the run directory `place` from a foreign model, completely or not at all.

    Args:
        root: the folder of train.py.
        tokenizer: a kind of tokenizer, or a file that a run wrote; None: the tokenizer of the foreign model.
        dataset: the dataset that the model was trained on, with which a resume continues.

    Raises:
        UserError: `place` exists, the tokenizer is unknown, or the model cannot be represented.
    """
    if os.path.lexists(place):
        raise UserError(f"--out {place}: exists already")
    layer = {**_project_settings(root), **foreign.settings}
    if dataset is not None:
        layer["dataset"] = Setting(dataset, "--dataset")
    chosen = _tokenizer(foreign, tokenizer, layer)
    steps = layer.get("max_iters")
    if steps is None or (isinstance(steps.value, int) and steps.value < foreign.step):
        layer["max_iters"] = Setting(max(foreign.step, 1), f"{name_of(foreign.path)}: step")
        layer.pop("epochs", None)
    loaded = with_absolute_paths(load_layer(layer), root)
    corpus = _corpus(loaded, root, chosen, dataset is not None, warn)
    loaded = _with_tokenizer(loaded, corpus.tokenizer, place)
    fit_vocabulary(foreign, corpus.tokenizer)
    model = outline(loaded.config.model, corpus.tokenizer.vocab_size)
    if differences := weight_differences(foreign.weights, model):
        raise UserError(f"{foreign.path}: the model cannot be represented: {differences}")
    state = _state(foreign, loaded, corpus, model)
    return _write(foreign, place, root, argv, loaded, state, has_corpus=dataset is not None)


def _project_settings(root: Path) -> dict[str, Setting]:
    """The settings in configs/ about the machine and about what is recorded, which no other program has."""
    layers = ConfigLoader(root).load().layers
    return {
        key: settings[-1]
        for key, settings in layers.items()
        # except for the dataset: only --dataset says what a foreign model was trained on
        if field_fact(key, "kind") != TRAJECTORY and key != "dataset" and settings[-1].source != "default"
    }


def _tokenizer(foreign: Foreign, named: str | None, layer: dict[str, Setting]) -> Tokenizer | None:
    """The tokenizer, if it is known before the corpus is read, otherwise None; sets its kind in `layer`.

    Raises:
        UserError: the tokenizer is unknown or cannot be read.
    """
    if named is not None and named not in TOKENIZERS and not os.path.lexists(named.removeprefix(f"{OF_A_FILE}:")):
        kinds = ", ".join(TOKENIZERS)
        raise UserError(
            f"--tokenizer {named}: expected {kinds}, hf:PATH or a tokenizer.json of a run{nearest(named, TOKENIZERS)}"
        )
    if named is not None and named.partition(":")[0] not in (*TOKENIZERS, OF_A_FILE):
        with naming("--tokenizer"):
            chosen = load_tokenizer(Path(named))
        layer["tokenizer"] = Setting(_kind(chosen, named), "--tokenizer")
        return chosen
    kind = named or foreign.tokenizer_kind
    if foreign.tokenizer is not None and named is None:
        layer["tokenizer"] = Setting(_kind(foreign.tokenizer, str(foreign.path)), name_of(foreign.path))
        return foreign.tokenizer
    if kind is None:
        raise UserError(
            f"{foreign.path} has no tokenizer that can be read: name it with --tokenizer; a char tokenizer needs the "
            "training text as well: --tokenizer char --dataset FILE"
        )
    layer["tokenizer"] = Setting(kind, "--tokenizer" if named else foreign.program)
    if kind in ("char", "bpe") and "dataset" not in layer:
        raise UserError(f"--tokenizer {kind} is built from the text that the model was trained on: add --dataset FILE")
    return None


def _kind(tokenizer: Tokenizer, file: str) -> str:
    """The value of the setting `tokenizer`."""
    return f"{tokenizer.kind}:{file}" if tokenizer.kind == OF_A_FILE else tokenizer.kind


def _with_tokenizer(loaded: LoadedConfig, tokenizer: Tokenizer, place: Path) -> LoadedConfig:
    """`loaded`, in which a tokenizer of kind hf is the run's own copy, since the original file may be deleted."""
    if tokenizer.kind != OF_A_FILE:
        return loaded
    value = f"hf:{os.path.abspath(place / TOKENIZER)}"
    data = loaded.config.data.model_copy(update={"tokenizer": value})
    layers = {**loaded.layers, "tokenizer": [*loaded.layers["tokenizer"][:-1], Setting(value, "weights.py convert")]}
    return replace(loaded, config=loaded.config.model_copy(update={"data": data}), layers=layers)


def _corpus(
    loaded: LoadedConfig, root: Path, tokenizer: Tokenizer | None, has_text: bool, warn: Callable[[str], None]
) -> Corpus:
    """The corpus that the model was trained on; without a dataset, an empty corpus with the tokenizer."""
    config = loaded.config
    if has_text:
        folder, datasets = root / config.data.corpora_dir, root / config.data.datasets_dir
        data = with_problems(config, folder)
        with naming("--dataset"):
            corpus = load_corpus(
                data, config.model.block_size, folder, tokenizer, warn, warn, keep=False, datasets_dir=datasets
            )
        return replace(corpus, name=config.data.dataset)
    if tokenizer is None:
        data = config.data.model_copy(update={"corpora_dir": str(root / config.data.corpora_dir)})
        tokenizer = build_tokenizer(data, ())
    return Corpus("", "", tokenizer, np.zeros(0, dtype=np.uint16), 0)


def fit_vocabulary(foreign: Foreign, tokenizer: Tokenizer) -> None:
    """Remove the rows that belong to no token, with which programs pad the vocabulary to a rounder number.

    Raises:
        UserError: the tokenizer has more tokens than the model.
    """
    size, rows = tokenizer.vocab_size, foreign.vocab_size
    if size > rows:
        raise UserError(
            f"{foreign.path}: the model has {rows:,} tokens, its tokenizer ({tokenizer.kind}) {size:,}: they do not "
            "belong together"
        )
    if size == rows:
        return
    foreign.notes.append(
        f"{rows - size:,} of {rows:,} rows of the vocabulary were left out: the tokenizer {tokenizer.kind} has "
        f"{size:,} tokens; the loss is lower, since these rows no longer take a share of the probability"
    )
    for tensors in (foreign.weights, *(foreign.moments or {}).values()):
        for name in ("token_embedding.weight", "head.weight", "head.bias"):
            if name in tensors and len(tensors[name]) == rows:
                tensors[name] = tensors[name][:size]
    foreign.vocab_size = size


def _state(foreign: Foreign, loaded: LoadedConfig, corpus: Corpus, model: LanguageModel) -> TrainState:
    """The state of training after the last update of the foreign program."""
    config = loaded.config
    model.load_state_dict({name: float32_copy(tensor) for name, tensor in foreign.weights.items()}, assign=True)
    model.initialised = declared_roles(model)
    optimizer = build_optimizer(model, config.optimizer)
    if foreign.moments is not None:
        if config.optimizer.optimizer_name != "adamw":
            raise UserError(f"{foreign.path}: its optimizer is AdamW, not {config.optimizer.optimizer_name}")
        for name, parameter in model.named_parameters():
            moments = [foreign.moments[kind].get(name) for kind in MOMENTS]
            optimizer.state[parameter] = {
                "step": torch.tensor(float(foreign.updates)),
                **{
                    kind: torch.zeros_like(parameter) if moment is None else float32_copy(moment)
                    for kind, moment in zip(MOMENTS, moments, strict=True)
                },
            }
    return TrainState(
        config=config,
        max_iters=config.train.max_iters or foreign.step,
        device=CPU,
        dtype=torch.float32,
        corpus=corpus,
        sampler=cast(BatchSampler, None),  # not used
        model=model,
        loss=model.loss,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        step=foreign.step,
    )


def float32_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous float32 copy of a tensor."""
    return torch.empty(tensor.shape).copy_(tensor.detach())


def _write(
    foreign: Foreign,
    place: Path,
    root: Path,
    argv: Sequence[str],
    loaded: LoadedConfig,
    state: TrainState,
    has_corpus: bool,
) -> Adopted:
    config, tokenizer, step = loaded.config, state.corpus.tokenizer, foreign.step
    resumes = has_corpus and foreign.moments is not None and step < state.max_iters
    source, resolved = _source(foreign), _resolved(loaded, state, has_corpus)
    weights, tensors, facts = _captured(state)
    with _new_run(place) as folder:
        lock = RunLock(folder)
        try:
            lock.sign()
            record = new_record(
                folder,
                None,
                id=place.name,
                status="interrupted" if resumes else "completed",
                exit_reason=f"converted from {foreign.program}",
                end=utc_now(),
                last_step=step,
                argv=list(argv),
                made=made_here(root),
                resolved=resolved,
                converted=source,
            )
            record["place"]["path"] = os.path.abspath(place)
            for name in (META, LOGS, ARTIFACTS):
                (folder / name).mkdir()
            (folder / METRICS_LOG).touch()
            tokenizer.save(folder / TOKENIZER)
            write_json(folder / MODEL_SUMMARY, model_summary(state.model))
            write_registry(folder / METRIC_REGISTRY)
            write_json(folder / CONFIG_SOURCES, loaded.sources_json())
            write_json(folder / CONFIG, config.model_dump(mode="json"))
            (folder / CHECKPOINTS).mkdir()
            path = folder / CHECKPOINTS / folder_name(step)
            write_checkpoint(path, weights, tensors, tokenizer.to_json(), facts)
            write_json(folder / CHECKPOINTS / LATEST_FILE, {"step": step, "folder": path.name})
            training = {"run": place.name, "weights": "last", "step": step, "converted": source}
            save_export(folder / EXPORT, state.model, tokenizer, training)
            write_json(folder / NOTES, NO_NOTES)
            write_json(folder / RECORD, record)
            write_seal(folder)
        finally:
            lock.release()
    moments = foreign.moments is not None
    kind = f"{tokenizer.kind}, {tokenizer.vocab_size:,} tokens"
    return Adopted(place, foreign.program, step, resolved["parameters"], kind, moments, resumes, foreign.notes)


def _source(foreign: Foreign) -> dict[str, Any]:
    """The origin of the run, for its record and its export."""
    source = {"program": foreign.program, "file": name_of(foreign.path), "notes": foreign.notes}
    if foreign.path.is_file():
        source["sha256"] = file_sha256(foreign.path)
    if foreign.best_val_loss is not None:
        source["best_val_loss"] = f"{foreign.best_val_loss:.6g}"
    return source


def _resolved(loaded: LoadedConfig, state: TrainState, has_corpus: bool) -> dict[str, Any]:
    """The values that follow from the run's settings, model and tokenizer, for its record.

    Raises:
        UserError: settings contradict each other.
    """
    tokenizer = state.corpus.tokenizer
    try:
        return {
            **derived_settings(loaded.config, state.max_iters),
            "parameters": state.model.num_parameters(),
            "vocab_size": tokenizer.vocab_size,
            "tokenizer": tokenizer.kind,
            "tokenizer_hash": tokenizer.hash(),
            **({"dataset": state.corpus.name, "corpus_hash": state.corpus.hash} if has_corpus else {}),
        }
    except RuleError as error:
        raise rule_error(error, loaded) from None


def _captured(state: TrainState) -> tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor], dict[str, Any]]:
    """Weights, optimizer tensors and facts of a checkpoint of the state, with random streams that begin at the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(state.config.train.seed)
        weights, tensors, facts = capture(state)
    return weights, tensors, {**facts, "config_hash": None, "log_offsets": {}, "time": round(time.time(), 4)}


@contextlib.contextmanager
def _new_run(place: Path) -> Iterator[Path]:
    """Yield a hidden folder that becomes the run directory `place` on exit, or is deleted after an error.

    Raises:
        UserError: it cannot be written.
        OSError: the disk is full or fails.
    """
    folder = place.with_name(f".{place.name}.tmp")
    try:
        remove(folder)
        folder.mkdir(parents=True)
        yield folder
        if os.path.lexists(place):
            raise UserError(f"--out {place}: exists already")
        folder.rename(place)
        sync_folder(place.parent)
    except OSError as error:
        raise unwritable(place, error) from None
    finally:
        remove(folder)
