"""The start of a run: its directory, the record of its code and configuration, the state that it starts from."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data import Corpus
from utils.checkpoints.choose import choose_checkpoint, newest_good, put_aside
from utils.checkpoints.files import Checkpoint
from utils.config.fields import config_hash
from utils.config.loader import config_files
from utils.config.settings import ModelConfig
from utils.errors import UserError
from utils.files import change_json, read_json, read_json_or_empty, write_json
from utils.formats.finetuning import pretrained_as_checkpoint
from utils.formats.hub import find_pretrained
from utils.inference.export import export_as_checkpoint
from utils.machine.device import device_facts, processor_name
from utils.nn.lora import count_parameters
from utils.runs.code import CodeReader, GitFacts, write_code_and_environment
from utils.runs.find import parent_path
from utils.runs.identity import git_of_last_session, patch_hash
from utils.runs.index import read_settings
from utils.runs.layout import (
    CHECKPOINTS,
    CONFIG,
    CONFIG_SOURCES,
    FLIGHT_RECORDER,
    LOCK,
    LOGS,
    META,
    METRIC_REGISTRY,
    MODEL_SUMMARY,
    NOTES,
    PRETRAINED,
    SEAL,
    TOKENIZER,
    session_meta,
)
from utils.runs.lock import HEARTBEAT_SECONDS
from utils.runs.log import cut_logs
from utils.runs.mend import mend
from utils.runs.metrics import read_registry, write_registry
from utils.runs.origin import PRETRAINED_PREFIX, Relation, parent_facts, pin, put_on_top
from utils.runs.origin_checks import check_checkpoints, check_longer
from utils.runs.run import NO_NOTES, REPRODUCTION, Run, RunError
from utils.runs.trust import made_here
from utils.terminal.console import Terminal
from utils.terminal.words import HASH_LENGTH, counted, fact_lines, ratio_text
from utils.tracking.feeder import cut_progress
from utils.training.agreement import announce_start
from utils.training.setup import Setup, decisive_settings
from utils.training.state import TrainState, build_state, mismatch, start_from
from utils.training.step import Update

BIT_EXACT = "bit-exact: the same configuration, code, torch and processor give the same numbers, also after a resume"
NOT_EXACT = "none: deterministic is off, so numbers may differ in their last bits from run to run"


@dataclass(frozen=True)
class Start:
    """What training starts from: nothing, a checkpoint of the run itself, or one of its parent."""

    checkpoint: Checkpoint | None = None
    relation: Relation = "resume"

    @property
    def own(self) -> bool:
        return self.checkpoint is not None and self.relation == "resume"

    @property
    def step(self) -> int:
        return self.checkpoint.step if self.checkpoint is not None and self.relation != "init" else 0


def open_run(
    setup: Setup, git: GitFacts, argv: Sequence[str], terminal: Terminal, facts: Mapping[str, Any]
) -> tuple[Run, Start]:
    """Make a run directory, or reopen that of a resumed run and cut its logs back to the newest good checkpoint.

    Args:
        facts: extra fields for run.json of a new run.

    Raises:
        UserError: it cannot be made; or the run is being trained, is complete, or has only damaged checkpoints.
    """
    origin = setup.origin
    if origin is None or not setup.resumes:
        record: dict[str, Any] = {"argv": list(argv), "git": git.summary(), "made": made_here(setup.root), **facts}
        if origin is not None and setup.checkpoint is not None:
            record["parent"] = parent_facts(origin, setup.checkpoint.step, setup.checkpoint.state)
        start = Start(setup.checkpoint, origin.relation) if origin else Start()
        run = Run.create(setup.runs_dir, setup.config.tracking.run_tag, **record)
        _warn_without_flock(run, terminal)
        return run, start

    run = Run.resume(origin.run, terminal.print)
    _warn_without_flock(run, terminal)
    try:
        mend(run.path, terminal.warn)
        record, recorded_tag = run.record, read_settings(run.path).get("run_tag")
        check_longer(run.path, record, setup.config, setup.max_iters)
        check_checkpoints(run.path, record)
        check_corpus(run, record, setup)
        folder = run.path / CHECKPOINTS
        problem = functools.partial(mismatch, model=setup.config.model, corpus=setup.corpus)
        checkpoint, unusable = newest_good(folder, strict=origin.strict, warn=terminal.warn, problem=problem)
        start = Start(checkpoint, "resume") if checkpoint else start_of_parent(run.path, record, terminal.warn)
        for what, before, now in changed_facts(run.path, record, setup, git):
            terminal.warn(
                f"{what} was {before} in the previous session of {run.id} and is {now} now: numbers may differ"
            )
        if (original := run.settle()) is not None:
            terminal.warn(f"{run.id} is a copy of {original}: trackers show it as a run of its own")
        cut_logs(run.path / LOGS, checkpoint.state["log_offsets"] if checkpoint else {})
        cut_progress(run.path / LOGS)
        put_aside(unusable)
        for name in (FLIGHT_RECORDER, SEAL):  # of the previous session
            with contextlib.suppress(OSError):  # reported by `mend`
                (run.path / name).unlink(missing_ok=True)
        run.restart(argv, start.step, git=git.summary())
        if origin.trusted:
            run.update(made=made_here(setup.root))
        if (tag := setup.config.tracking.run_tag) != recorded_tag:  # if equal, a tag edited since then stays
            run.update(tag=tag)
    except BaseException:
        run.release()
        raise
    return run, start


def _warn_without_flock(run: Run, terminal: Terminal) -> None:
    if not run.has_flock:
        terminal.warn(
            f"{run.path.parent}: this file system has no flock: a run is locked by the file {LOCK} in its directory "
            f"instead, which the process that trains it touches every {HEARTBEAT_SECONDS:.0f} s"
        )


def evaluate_at_old_end(setup: Setup, run: Run, start: Start) -> Setup:
    """When a run is lengthened, add the evaluation at its previous end to `eval_at`, so that a repetition makes it too.

    Like any other evaluation, it counts for the best weights and for early stopping.
    """
    old = (run.record.get("resolved") or {}).get("max_iters", setup.max_iters)
    settings = setup.config.train
    planned = old % settings.eval_interval == 0 or old in (setup.max_iters, *settings.eval_at)
    if not start.own or start.step != old or planned:
        return setup
    values = {"eval_at": (*settings.eval_at, old)}
    loaded = put_on_top(setup.loaded, values, "--max-iters (the previous end)")
    return dataclasses.replace(setup, loaded=loaded, config=pin(setup.config, values))


def check_corpus(run: Run, record: Mapping[str, Any], setup: Setup) -> None:
    """Raises UserError unless the text and tokenizer are those that the run was started with."""
    resolved, corpus = record.get("resolved") or {}, setup.corpus
    for key, now in (("corpus_hash", corpus.hash), ("tokenizer_hash", corpus.tokenizer.hash())):
        if (before := resolved.get(key, now)) != now:
            raise UserError(
                f"{corpus_name(corpus)}: the corpus is not the one that {run.id} was trained on ({key} was "
                f"{before[:12]}..., is {now[:12]}...); --fork starts a new run from its checkpoint"
            )


def start_of_parent(run: Path, record: Mapping[str, Any], warn: Callable[[str], None]) -> Start:
    """Where a run without a checkpoint of its own starts again: at step 0, or from its parent's checkpoint.

    Raises:
        UserError: the checkpoint of its parent no longer exists.
    """
    parent = record.get("parent")
    if parent is None or parent["relation"] == REPRODUCTION:
        return Start()
    if "pretrained" in parent:
        name = parent["run"].removeprefix(PRETRAINED_PREFIX)
        try:
            path = parent_path(run, parent)
        except RunError:  # the hub's cache has moved
            path = find_pretrained(name).folder
        model = ModelConfig.model_validate(read_json(run / CONFIG, run)["model"])
        return Start(pretrained_as_checkpoint(path, name, None, model, parent["pretrained"]), parent["relation"])
    path = parent_path(run, parent)
    if "export" in parent:
        return Start(export_as_checkpoint(path), parent["relation"])
    return Start(choose_checkpoint(path / CHECKPOINTS, str(parent["step"]), strict=True, warn=warn), parent["relation"])


def changed_facts(run: Path, record: Mapping[str, Any], setup: Setup, git: GitFacts) -> Iterator[tuple[str, Any, Any]]:
    """(what, before, now) of each fact that has changed since the previous session and may change the numbers."""
    resolved, git_before, git_now = record.get("resolved") or {}, git_of_last_session(record), git.summary()
    now = {"torch": torch.__version__, "processor": processor_name(setup.device)}
    for key, value in now.items():
        if resolved.get(key, value) != value:
            yield key, resolved[key], value
    ranks = resolved.get("world_size", 1), setup.ranks.world_size
    if setup.config.train.lanes is None and ranks[0] != ranks[1]:
        yield "the number of ranks", *ranks
    if git_before.get("commit") != git_now["commit"]:
        yield "the commit", git_before.get("commit"), git_now["commit"]
    if "code" not in git_before:  # an older record has only the first session's patch, and no callbacks
        git_now["code"] = dataclasses.replace(git, callbacks={}).fingerprint()
        git_before["code"] = patch_hash(run)
    if git_before["code"] != git_now["code"]:
        code = [hash and f"changes {hash[:HASH_LENGTH]}" for hash in (git_before.get("code"), git_now["code"])]
        yield "the uncommitted code", code[0] or "as committed", code[1] or "as committed"


def read_git(setup: Setup) -> GitFacts:
    """Read the state of the code, leaving out the folders of runs, corpora and trackers."""
    tracking, data = setup.config.tracking, setup.config.data
    excluded = [setup.runs_dir, setup.root / data.corpora_dir, setup.root / data.datasets_dir, Path(data.dataset)]
    if not tracking.aim_repo.startswith("aim://"):
        excluded.append(setup.root / tracking.aim_repo / ".aim")
    modules = [name.partition(":")[0] for name in setup.callbacks]
    modules += [type(callback).__module__ for callback in setup.callbacks.values()]
    named = config_files(setup.loaded) if setup.origin is None or setup.origin.relation == "init" else ()
    return CodeReader(setup.root, excluded=tuple(excluded), callbacks=modules, named=named).git_facts()


def write_meta(setup: Setup, run: Run, git: GitFacts) -> None:
    """Write meta/ and notes.json: code, environment, tokenizer, and the configuration with its sources."""
    meta, tracking = run.path / META, setup.config.tracking
    if not setup.resumes:  # these describe how the run was started
        setup.corpus.tokenizer.save(run.path / TOKENIZER)
        write_code_and_environment(meta, git, device_facts(setup.device))
        if pretrained := pretrained_of(setup):
            write_json(run.path / PRETRAINED, pretrained)
        if tracking.tags or tracking.note:
            said = {"tags": list(tracking.tags), "note": tracking.note}
            change_json(run.path / NOTES, lambda notes: {**NO_NOTES, **notes, **said})
    else:
        number = len(run.record["resumes"]) + 1
        write_code_and_environment(run.path / session_meta(number), git, device_facts(setup.device))
    write_json(run.path / CONFIG_SOURCES, setup.loaded.sources_json())
    # Last: once it exists, the run can be resumed.
    write_json(run.path / CONFIG, setup.loaded.config.model_dump(mode="json"))


def pretrained_of(setup: Setup) -> Mapping[str, Any]:
    """The facts about the published model that a run descends from; empty if there is none."""
    if setup.origin is None or setup.checkpoint is None:
        return {}
    if setup.origin.pretrained is not None:
        facts: Mapping[str, Any] = setup.checkpoint.state["facts"]
        return facts
    return read_json_or_empty(setup.origin.run / PRETRAINED, setup.origin.run)


def prepare_run(setup: Setup, run: Run, start: Start, terminal: Terminal) -> TrainState:
    """Make model and optimizer, restored from a checkpoint if there is one; record and print the resolved values."""
    config, corpus = setup.config, setup.corpus
    state = build_state(config, setup.max_iters, corpus, setup.device, setup.dtype, terminal, setup.ranks)
    state.callbacks = dict(setup.callbacks)
    write_model_and_metrics(run, state, terminal)
    checkpoint = start.checkpoint
    if state.shards is not None:
        checkpoint = announce_start(state, checkpoint, start.relation)
    if checkpoint is not None:
        start_from(state, checkpoint, start.relation)
    decisive = decisive_settings(setup)
    parameters = state.model.num_parameters()
    counts = count_parameters(state.model)
    adapted = config.optimizer.lora_rank is not None
    run.update(
        resolved={
            **decisive,
            "dataset": corpus.name,
            "device": str(setup.device),
            "compiled": state.compiled,
            "compile_seconds": state.compile_seconds and round(state.compile_seconds, 1),
            "vocab_size": corpus.tokenizer.vocab_size,
            "train_tokens": corpus.n_train,
            "val_tokens": corpus.n_val,
            **corpus.facts(config.model.block_size),
            "epochs": round(setup.epochs, 4),
            "parameters": parameters,
            **({"trainable_parameters": counts.trainable} if adapted else {}),
            "torch": torch.__version__,
            "processor": processor_name(setup.device),
            "guarantee": BIT_EXACT if decisive["deterministic"] else NOT_EXACT,
        },
        config_hash=config_hash(config, decisive),
    )
    terminal.print(
        fact_lines(
            [
                ("run", run.id),
                ("device", f"{setup.device}, {decisive['dtype']}, {counted(decisive['threads'], 'CPU thread')}"),
                (
                    "corpus",
                    f"{corpus_name(corpus)}: {corpus.n_train:,} training and {corpus.n_val:,} validation tokens",
                ),
                *packing_fact(setup),
                *ranks_fact(setup),
                (
                    "epochs",
                    f"{ratio_text(setup.epochs)} in {setup.max_iters:,} steps of {state.tokens_per_step:,} tokens",
                ),
                (
                    "parameters",
                    f"{parameters:,}, {ratio_text(corpus.n_train / parameters)} training tokens per parameter",
                ),
                *([("adapters", counts.words)] if adapted else []),
                *([("start", describe_start(setup, start))] if setup.origin else []),
            ]
        )
    )
    return state


def record_ranks(run: Run, state: TrainState, update: Update) -> None:
    """If several ranks train, record how they communicate."""
    ranks = state.ranks
    if not ranks.several:
        return
    facts = {
        "world_size": ranks.world_size,
        "backend": ranks.backend,
        "message_bytes_per_step": update.message_bytes,
    }
    run.update(resolved={**run.record["resolved"], **facts})


def ranks_fact(setup: Setup) -> Iterator[tuple[str, str]]:
    """How the ranks share the work, in words; yields nothing for a single rank without lanes."""
    lanes, ranks = setup.config.train.lanes, setup.ranks
    if setup.config.train.shard != "none":
        yield "shards", f"each rank has 1/{ranks.world_size} of the weights, gradients and optimizer state"
    if not ranks.several and lanes is None:
        return
    how = f"{lanes} lanes, so any number of ranks gives the same numbers"
    if lanes is None:
        how = "--lanes N would make the numbers independent of the number of ranks"
    yield "ranks", f"{ranks.world_size}{f' ({ranks.backend})' if ranks.several else ''}: {how}"


def packing_fact(setup: Setup) -> Iterator[tuple[str, str]]:
    """How documents are packed into rows, in words; yields nothing if they are not."""
    packing, block_size = setup.config.data.packing, setup.config.model.block_size
    facts = setup.corpus.facts(block_size)
    if "rows" in facts:
        what = "cropped" if packing == "none" else "in documents that are cut"
        yield (
            "packing",
            f"{packing}: {facts['rows']:,} rows of {block_size:,} tokens, {facts['padding']:.2%} padding; "
            f"{facts['cut_tokens']:.2%} of the tokens are {what}",
        )


def corpus_name(corpus: Corpus) -> str:
    """The name of the corpus, for pydocs with the version of Python, on which its text depends."""
    return f"{corpus.name} of Python {platform.python_version()}" if corpus.name == "pydocs" else corpus.name


def write_model_and_metrics(run: Run, state: TrainState, terminal: Terminal) -> None:
    """Write the files in meta/ that trackers and readers of the log use; a failure is only a warning."""
    try:
        write_json(run.path / MODEL_SUMMARY, model_summary(state.model))
        read_registry(run.path / METRIC_REGISTRY)  # a resumed run's logs may have metrics that are no longer registered
        write_registry(run.path / METRIC_REGISTRY)
    except OSError as error:
        terminal.warn(f"{error.filename}: cannot be written: {error.strerror}")


def model_summary(model: torch.nn.Module) -> list[dict[str, Any]]:
    """The name, shape and size of each parameter of the model, and which of them are not trained."""
    return [
        {"name": name, "shape": list(parameter.shape), "parameters": parameter.numel()}
        | ({} if parameter.requires_grad else {"trainable": False})
        for name, parameter in model.named_parameters()
    ]


def describe_start(setup: Setup, start: Start) -> str:
    """Where training starts, in words."""
    if start.checkpoint is None:
        return "at step 0 again: there is no checkpoint yet"
    if start.own:
        return f"resumed at step {start.step:,}"
    path, step = start.checkpoint.path, start.checkpoint.step
    state = start.checkpoint.state
    parent = state["run"] if "export" in state or "pretrained" in state else path.parent.parent.parent.name
    words = f"forked from {parent}" if start.relation == "fork" else f"step 0 with the weights of {parent}"
    at = "" if "pretrained" in state else f" at step {step:,}"
    return f"{words}{at}" + (", again: there is no checkpoint yet" if setup.resumes else "")
