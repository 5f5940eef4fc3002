"""Which run a command line asks for: a new one, or one that resumes, forks or fine-tunes another."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.config.fields import field_fact, flat, get_value
from utils.config.loader import ConfigLoader, LoadedConfig, flag_name
from utils.config.section import MACHINE
from utils.config.settings import Config
from utils.errors import UserError, shown
from utils.runs.lock import wait_until_free
from utils.runs.origin import (
    PRETRAINED_PREFIX,
    Origin,
    config_of_fork,
    find_origin,
    keep_batch,
    recorded_config,
    resumable_runs,
    without_foreign_places,
)
from utils.runs.origin_checks import check_callbacks, check_overrides
from utils.runs.run import read_record
from utils.terminal.cli import CODE_ROOT, PROJECT_ROOT, Parser, timespan
from utils.terminal.config_flags import ExperimentArguments, parse_experiment
from utils.terminal.words import printable
from utils.training.notify import add_notify_flag

WAIT_SECONDS = 60.0  # how long to wait for a process that has stopped training to release its run directory


def add_origin_flags(parser: Parser) -> None:
    """Add the flags that `launches` reads, and --strict."""
    group = parser.add_argument_group("stop, resume, fork, fine-tune", "RUN: path, id, tag, part of an id, or latest")
    origin = group.add_mutually_exclusive_group()
    origin.add_argument(
        "--resume",
        metavar="RUN",
        help="continue a run from its newest checkpoint; auto: the newest interrupted, crashed or failed run of this "
        "--run-tag, or a new one",
    )
    origin.add_argument(
        "--init-from",
        metavar="RUN[:WHICH]",
        help="start a new run with the weights of a checkpoint: latest (default), best, or a step; hf:NAME: those of a "
        "model on the Hugging Face hub or in a folder, with its architecture and tokenizer",
    )
    group.add_argument(
        "--fork",
        action="store_true",
        help="with --resume RUN[:WHICH]: continue from that checkpoint in a new run, with any other setting",
    )
    add_trust_flag(group)
    group.add_argument(
        "--budget",
        type=timespan,
        metavar="TIME",
        help="train for 90s, 5m or 2h: the number of steps that fit is measured before the run is made, and becomes "
        "max_iters",
    )
    add_notify_flag(parser)
    group.add_argument("--trial", help=argparse.SUPPRESS)  # SWEEP:ID:NUMBER:PLACE, given by a sweep to its runs
    group.add_argument("--json", action="store_true", help="print nothing but warnings, and the result as JSON")
    group.add_argument("--strict", action="store_true", help="refuse to start if the preflight finds anything")
    group.add_argument(
        "--prove",
        nargs="?",
        const="40",
        metavar="STEPS",
        help="test whether a resume gives the same bits: train STEPS (40) steps in a temporary folder, with kills and "
        "without",
    )
    group.add_argument(
        "--strict-resume",
        action="store_true",
        help="refuse a damaged newest checkpoint instead of using the one before it",
    )


def add_multirun_flags(parser: Parser) -> None:
    """Add --multirun and --jobs."""
    group = parser.add_argument_group("several runs")
    group.add_argument(
        "--multirun",
        nargs="+",
        metavar="SETTING=A,B",
        help="a run for each combination: --multirun learning_rate=1e-3,3e-3 seed=1,2,3",
    )
    group.add_argument("--jobs", type=int, default=1, metavar="N", help="how many of them train at a time (default: 1)")


def with_budget(
    own: argparse.Namespace, loaded: LoadedConfig, origin: Origin | None
) -> tuple[LoadedConfig, Mapping[str, Any]]:
    """The configuration with as many steps as --budget allows, and extra fields for run.json.

    A run that --resume auto continues keeps the number of steps that it was started with.

    Raises:
        UserError: --budget does not fit other flags, or is too short for a step.
    """
    facts = trial_facts(own.trial)
    if own.budget is None or (own.resume == "auto" and origin is not None):
        return loaded, facts
    if own.resume is not None and own.resume != "auto" and not own.fork:
        raise UserError("--budget is for new runs: a resumed run goes on to the end that it was started with")
    for key, other in (("max_iters", "epochs"), ("epochs", "max_iters")):
        if loaded.source(key) == flag_name(key) and get_value(loaded.config, other) is None:
            raise UserError(f"--budget and {flag_name(key)} both say when the run ends: leave one of them out")
    from utils.terminal.console import Terminal
    from utils.training.budget import fit_to_budget  # imports torch

    found, measured = fit_to_budget(loaded, own.budget, PROJECT_ROOT, origin, Terminal())
    return found, {**facts, **measured}


def trial_facts(trial: str | None) -> dict[str, Any]:
    """The field of run.json about the sweep that a run belongs to; empty without --trial.

    Raises:
        UserError: the value does not have the form that a sweep writes.
    """
    if trial is None:
        return {}
    try:
        name, sweep_id, number, place = trial.split(":")
        return {"sweep": {"name": name, "id": sweep_id, "number": int(number), "place": int(place)}}
    except ValueError:
        raise UserError(f"--trial: expected SWEEP:ID:NUMBER:PLACE, got {shown(trial)}") from None


def launch_facts(argv: Sequence[str]) -> dict[str, Any]:
    """The facts that must be the same on all ranks of a run: the code, torch, and the settings of its command line.

    Raises:
        UserError: a mistake on the command line or in a configuration file.
    """
    parser = Parser(prog="train.py")
    add_origin_flags(parser)
    parsed = parse_experiment(argv, parser)
    own = {name: str(getattr(parsed.own, name)) for name in ("resume", "init_from", "fork")}
    return facts_of(parsed.load().config, own)


def facts_of(config: Config, own: Mapping[str, str]) -> dict[str, Any]:
    """The facts about this rank and its configuration that `launch_facts` returns.

    Args:
        own: the script's own flags that must be the same as well, by name.
    """
    decisive = {key: value for key, value in flat(config).items() if field_fact(key, "kind") != MACHINE}
    return {
        "host": socket.gethostname(),
        "code": code_hash(config.train.callbacks),
        "torch": importlib.metadata.version("torch"),
        "settings": {**json.loads(json.dumps(decisive)), **own},
    }


def code_hash(callbacks: Iterable[str]) -> str:
    """sha256 of the code that trains: the files of the project and of `callbacks`, which are named module:Class."""
    files = {*CODE_ROOT.glob("*.py"), *(CODE_ROOT / "utils").rglob("*.py")}
    for name in callbacks:
        with contextlib.suppress(ImportError, ValueError, AttributeError):  # reported when the callback is loaded
            found = importlib.util.find_spec(name.partition(":")[0])
            if found is not None and found.origin is not None:
                files.add(Path(found.origin))
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def add_trust_flag(parser: argparse._ActionsContainer) -> None:
    """Add --trust."""
    parser.add_argument("--trust", action="store_true", help="run the code that a run made elsewhere names")


def launches(parsed: ExperimentArguments) -> Iterator[tuple[LoadedConfig, Origin | None]]:
    """Yield configuration and origin of the run to train, as the flags of `add_origin_flags` decide.

    This is a single run, except for `--resume auto`: that yields each run that can be resumed, newest first, and then
    a new run, because another process may take a run between the decision and the lock.

    Raises:
        UserError: flags contradict each other, there is no such run or checkpoint, or a resume refuses an override.
    """
    own = parsed.own
    if own.fork and own.resume in (None, "auto"):
        raise UserError("--fork needs --resume RUN: the run that the new one continues from")
    if own.strict_resume and own.resume is None:
        raise UserError("--strict-resume needs --resume RUN")
    loaded = without_foreign_places(parsed.load(), parsed.files, PROJECT_ROOT, own.trust)
    for line in loaded.ignored:
        print(f"warning: {printable(line)}", file=sys.stderr)
    runs_dir = PROJECT_ROOT / loaded.config.tracking.runs_dir
    options = {"strict": own.strict_resume, "trusted": own.trust}
    if own.resume == "auto":
        for origin in automatic_origins(loaded.config.tracking.run_tag, runs_dir, **options):
            yield config_of_resume(origin, parsed.loader, parsed.files, parsed.overrides), origin
        yield loaded, None
    elif own.fork:
        origin = find_origin("fork", own.resume, runs_dir, **options)
        forked = config_of_fork(origin.run, parsed.loader, parsed.files, parsed.overrides)
        check_callbacks(origin, forked, parsed.loader)
        yield forked, origin
    elif own.resume is not None:
        origin = find_origin("resume", own.resume, runs_dir, **options)
        yield config_of_resume(origin, parsed.loader, parsed.files, parsed.overrides), origin
    elif own.init_from is not None and own.init_from.startswith(PRETRAINED_PREFIX):
        from utils.formats.finetuning import start_from_pretrained  # imports torch

        name = own.init_from.removeprefix(PRETRAINED_PREFIX)
        yield start_from_pretrained(loaded, name, parsed.files, PROJECT_ROOT, lambda line: note(line, "--init-from"))
    elif own.init_from is not None:
        yield loaded, find_origin("init", own.init_from, runs_dir)
    else:
        yield loaded, None


def automatic_origins(tag: str | None, runs_dir: Path, *, strict: bool, trusted: bool) -> Iterator[Origin]:
    """Yield the runs of a tag that can be resumed, newest first, each after its last process has released it.

    Prints a note about each newer run that cannot be resumed.

    Raises:
        UserError: `tag` is None.
    """
    if tag is None:
        raise UserError("--resume auto needs --run-tag: it continues the newest unfinished run of that tag")
    for path in resumable_runs(runs_dir, tag, note):
        if read_record(path)["status"] != "running":  # its process may still be feeding the views
            wait_until_free(path, WAIT_SECONDS)
        yield Origin("resume", Path(os.path.abspath(path)), strict=strict, trusted=trusted)


def note(line: str, flag: str = "--resume auto") -> None:
    """Print one line about what a flag decides, on stderr."""
    print(f"note: {flag}: {printable(line)}", file=sys.stderr)


def config_of_resume(
    origin: Origin,
    loader: ConfigLoader,
    files: Iterable[Path] = (),
    overrides: Mapping[str, str | bool] | None = None,
) -> LoadedConfig:
    """The configuration that a run was started with, with the overrides that a resume allows on top.

    Raises:
        UserError: the recorded configuration cannot be read, an override is refused, or code of a run that was made
            elsewhere would run.
    """
    from utils.corpora.absolute_paths import with_absolute_paths  # takes 30 ms, and --help does not need it

    recorded = recorded_config(origin.run, loader)
    loaded = keep_batch(recorded, loader.load_onto(recorded, files, overrides or {}))
    loaded = with_absolute_paths(loaded, PROJECT_ROOT)
    check_overrides(origin.run, recorded, loaded, read_record(origin.run).get("resolved") or {})
    check_callbacks(origin, loaded, loader)
    return loaded
