"""Kinds of damage to the files of a run directory, and the commands to run on it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from utils.runs.layout import (
    CONFIG_SOURCES,
    CURVES,
    METRIC_REGISTRY,
    MODEL_SUMMARY,
    MODELS,
    NOTES,
    SEAL,
    TRAIN_LOG,
    fed_note,
)

WRONG: tuple[Any, ...] = (
    None,
    True,
    -1,
    1e308,
    2**70,
    "",
    "x\n\x1b[31m\x9b",
    [],
    {},
    [[1]],
    {"a": {"b": 1}},
    "9" * 5000,
    ["x"] * 3,
)
CORPUS = "../../corpora/"  # prefix of the paths, relative to a run, of damaged files
PREPARED = "../../datasets/"
GOOD, BAD = "good", "bad"  # the tags of the two runs
DATASET = "sentences"  # the name of the prepared dataset


def truncate(path: Path, rng: random.Random) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: rng.randrange(len(data) or 1)])


def empty(path: Path, rng: random.Random) -> None:
    path.write_bytes(b"")


def flip(path: Path, rng: random.Random) -> None:
    """Flip a few bits, as a bad disk does."""
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 8)) if data else 0):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def nuls(path: Path, rng: random.Random) -> None:
    """Overwrite the whole file with NULs, as a lost page or a crash of the machine does."""
    path.write_bytes(bytes(path.stat().st_size))


def replace_value(path: Path, rng: random.Random) -> None:
    """Replace one value of a JSON file, or of one line of a log, by one of another type."""
    data = path.read_bytes()
    lines = data.split(b"\n") if path.suffix == ".jsonl" else [data]
    number = rng.randrange(len(lines))
    try:
        value = json.loads(lines[number])
    except ValueError:
        return flip(path, rng)
    lines[number] = json.dumps(_replaced(value, rng)).encode()
    path.write_bytes(b"\n".join(lines))


def _replaced(value: Any, rng: random.Random) -> Any:
    if isinstance(value, dict | list) and value and rng.random() < 0.85:
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        value[key] = _replaced(value[key], rng)
        return value
    return rng.choice(WRONG)


def drop_key(path: Path, rng: random.Random) -> None:
    """Remove a key from a JSON object."""
    try:
        value = json.loads(path.read_bytes())
        value.pop(rng.choice(list(value)))
        path.write_text(json.dumps(value))
    except (ValueError, AttributeError, IndexError, TypeError):
        truncate(path, rng)


def nested(path: Path, rng: random.Random) -> None:
    path.write_text(rng.choice(("[", '{"a":')) * 100_000)


def no_unicode(path: Path, rng: random.Random) -> None:
    path.write_bytes(b'{"a": "\xff\xfe"}\n' + path.read_bytes())


def _instead(make: Callable[[Path], object]) -> Callable[[Path, random.Random], None]:
    def damage(path: Path, rng: random.Random) -> None:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
        make(path)

    return damage


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(3 << 30)  # more than fits into the memory of a process here


def _long_line(path: Path) -> None:
    path.write_bytes(b'{"step": "' + b"9" * (20 << 20))


Damage = Callable[[Path, random.Random], None]
ENTRY_DAMAGE: dict[str, Damage] = {
    "missing": _instead(lambda path: None),
    "a directory": _instead(Path.mkdir),
    "a pipe": _instead(os.mkfifo),
    "a link to itself": _instead(lambda path: path.symlink_to(path.name)),
    "a link to nothing": _instead(lambda path: path.symlink_to("nowhere")),
    "a link out of the run": _instead(lambda path: path.symlink_to("/etc/hostname")),
    "an endless device": _instead(lambda path: path.symlink_to("/dev/zero")),
}
FILE_DAMAGE: dict[str, Damage] = {
    "truncated": truncate,
    "empty": empty,
    "flipped bits": flip,
    "NULs": nuls,
    "another type": replace_value,
    "a missing key": drop_key,
    "nested": nested,
    "not Unicode": no_unicode,
    "3 GiB": _instead(_sparse),
    "a long line": _instead(_long_line),
}
SERVING = tuple(  # a damaged one of these is never a reason to fail training: see utils/runs/mend.py
    map(str, (NOTES, METRIC_REGISTRY, MODEL_SUMMARY, CONFIG_SOURCES, SEAL, CURVES, TRAIN_LOG, fed_note("tensorboard")))
)


def targets(run: Path) -> list[tuple[str, str]]:
    """All pairs (path relative to the run, kind of damage), always in the same order.

    The entries are those of the run, the names of promoted runs beside it, the encoded corpus and the prepared dataset.
    """
    work = run.parent.parent
    encoded, prepared = work / "corpora" / "encoded", work / "datasets" / DATASET
    paths = sorted([*run.rglob("*"), run.parent / MODELS, *encoded.rglob("*"), *prepared.rglob("*")])
    found = [(path, damage) for path in paths for damage in (*ENTRY_DAMAGE, *(FILE_DAMAGE if path.is_file() else ()))]
    return [(os.path.relpath(path, run), damage) for path, damage in found]


def apply(run: Path, name: str, damage: str, rng: random.Random) -> None:
    with contextlib.suppress(FileNotFoundError):  # the names of event files differ from run to run
        (ENTRY_DAMAGE | FILE_DAMAGE)[damage](run / name, rng)


# Commands to run on the damaged run: script, words (TRAIN: flags of a tiny training), expected exit statuses.
READS = "reads"  # marks a command that must change nothing
TRAIN, TRAIN_PREPARED = "TRAIN", "TRAIN_PREPARED"  # the second trains on the prepared dataset
Command = tuple[str, tuple[str, ...], tuple[int, ...], str]
COMMANDS: list[Command] = [
    ("experiments", ("list",), (0,), READS),
    ("experiments", ("list", "--sort", "val_loss", "--columns", "all"), (0,), READS),
    ("experiments", ("show", BAD), (0, 2), READS),
    ("experiments", ("show", BAD, "--json"), (0, 2), READS),
    ("experiments", ("show", GOOD), (0,), READS),
    ("experiments", ("diff", GOOD, BAD), (0, 2), READS),
    ("experiments", ("compare", GOOD, BAD), (0, 2), READS),
    ("experiments", ("explain", BAD, "n_embd"), (0, 2), READS),
    ("experiments", ("plot", GOOD, BAD), (0, 2), READS),
    ("experiments", ("plot", BAD, "--out", "out/curves.svg"), (0, 2), ""),
    ("experiments", ("report", GOOD, BAD, "--out", "out/report.html"), (0, 2), ""),
    ("experiments", ("sql", "SELECT run, count(*) FROM metrics GROUP BY run"), (0,), READS),
    ("experiments", ("sql", "SELECT * FROM runs", "--json"), (0,), READS),
    ("experiments", ("check", BAD), (0, 1, 2), READS),
    ("experiments", ("edit", BAD, "--note", "changed", "--add-tag", "x"), (0, 2), ""),
    ("experiments", ("promote", BAD, "name"), (0, 2), ""),
    ("experiments", ("prune", "--keep-last", "1", "--whole-runs", "--unfinished"), (0,), READS),
    ("experiments", ("prune", "--keep-last", "1", "--unfinished", "--yes"), (0, 1), ""),
    ("experiments", ("prune", "--keep-last", "1", "--whole-runs", "--unfinished", "--yes"), (0, 1), ""),
    ("experiments", ("seal", BAD), (0, 2), ""),
    ("experiments", ("rebuild", BAD), (0, 1, 2), ""),
    ("experiments", ("finish", BAD), (0, 1, 2), ""),
    ("train", ("--resume", BAD), (0, 2), ""),
    ("train", ("--resume", BAD), (0, 2), ""),
    ("train", ("--resume", "auto", "--run-tag", BAD, TRAIN), (0, 2), ""),
    ("train", ("--resume", BAD, "--fork"), (0, 2), ""),
    ("train", ("--init-from", BAD, TRAIN), (0, 2), ""),
    ("train", ("--run-tag", "new", TRAIN), (0,), ""),
    ("inference", (BAD, "--prompt", "a", "--max-new-tokens", "3"), (0, 2), READS),
    ("inference", (BAD, "--show-info"), (0, 2), READS),
    ("inference", (GOOD, "--max-new-tokens", "3"), (0,), READS),
    ("evaluate", (BAD,), (0, 2), ""),
    ("evaluate", (BAD, "--data", "notes.txt", "--json"), (0, 2), ""),
    ("weights", ("inspect", BAD), (0, 2), READS),
    ("weights", ("inspect", BAD, "--stats", "--json"), (0, 2), READS),
    ("weights", ("diff", GOOD, BAD), (0, 2), READS),
]
DATASET_COMMANDS: list[Command] = [  # commands to run on the damaged dataset
    ("prepare", ("list",), (0,), READS),
    ("prepare", ("show", DATASET), (0, 2), READS),
    ("prepare", ("verify", DATASET), (0, 1, 2), ""),
    ("prepare", ("notes.txt", "--out", DATASET, "--workers", "1"), (0, 2), ""),
    ("prepare", ("notes.txt", "--out", DATASET, "--workers", "1", "--replace"), (0, 2), ""),
    ("train", ("--run-tag", "new", TRAIN_PREPARED), (0, 2), ""),
    ("train", ("--run-tag", "new", "--packing", "documents", TRAIN_PREPARED), (0, 2), ""),
    ("evaluate", (BAD, "--data", DATASET), (0, 2), ""),
]
