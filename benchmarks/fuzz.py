"""Does anything break? Odd command lines, configuration files and damaged run directories, by the thousand.

python -m benchmarks.fuzz --cases 5000           # about an hour on 1 CPU core
python -m benchmarks.fuzz --only 1234            # one of them again, with what it printed

Half of the cases damage one entry of a run directory in one way, then run one command on it, and `list`; every entry is
damaged in every way before a case repeats. The other cases are odd command lines and configuration files. Each command
runs in a forked process. These faults are counted:

    traceback   a Python traceback or a signal instead of an error in one line
    hang        no end after --seconds
    status      an unexpected exit status, or status 2 without an error message
    leftover    temporary files; anything made or changed by a rejected command or by one that only reads
    hidden      a good run that `list` no longer shows as before, or whose files have changed
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import evaluate
import experiments
import inference
import prepare
import profile_model
import train
import weights
from benchmarks import common, fuzz_damage, fuzz_words
from benchmarks.fuzz_damage import (
    BAD,
    COMMANDS,
    CORPUS,
    DATASET,
    DATASET_COMMANDS,
    GOOD,
    PREPARED,
    READS,
    SERVING,
    TRAIN,
    TRAIN_PREPARED,
)
from benchmarks.fuzz_process import Ended, Main, import_all, run
from utils.errors import UserError
from utils.runs.find import list_run_paths
from utils.runs.layout import LOCK, MODELS
from utils.runs.run import read_record
from utils.terminal.cli import PROJECT_ROOT, Parser, script
from utils.terminal.console import Terminal
from utils.terminal.words import duration, printable

SCRIPTS: dict[str, Main] = {
    "train": train.main,
    "inference": inference.main,
    "profile_model": profile_model.main,
    "experiments": experiments.main,
    "prepare": prepare.main,
    "evaluate": evaluate.main,
    "weights": weights.main,
}
TRAINING_SCRIPTS = ("train", "profile_model")  # take all settings
FAULTS = ("traceback", "hang", "status", "leftover", "hidden")
TEMPORARY = re.compile(r"\..*\.(tmp|old|pruned)|\.checkpoints\.pruned")
MACHINE = ("--n-layer=1", "--n-head=2", "--n-embd=16", "--block-size=8", "--batch-size=4", "--eval-interval=3")
SMALL = (*MACHINE, "--eval-iters=2", "--histogram-interval=3", "--sample-tokens=8", "--threads=1", "--max-iters=6")
PATIENCE_SECONDS = 60.0  # for commands other than that of the case: a busy machine must not fail them
Snapshot = dict[str, tuple[int, int, int]]  # path -> mode, size, mtime


@dataclass(frozen=True)
class Case:
    """One command in a folder of its own.

    statuses: the expected exit statuses.
    reads: the command must not change anything.
    damage: (path relative to the bad run, kind of damage).
    """

    name: str
    script: str
    argv: Sequence[str]
    statuses: Sequence[int]
    reads: bool = False
    damage: tuple[str, str] | None = None


@dataclass
class Fuzzer:
    """Makes the folder of a case, runs its command, and compares the folder before and after.

    good: the row of the good run in `list --json`.
    ids: tag -> id of the two runs.
    wrong: all pairs (path relative to the bad run, kind of damage), in random order.
    """

    folder: Path
    seconds: float
    seed: int = 0
    good: dict[str, Any] = field(default_factory=dict)
    ids: dict[str, str] = field(default_factory=dict)
    wrong: list[tuple[str, str]] = field(default_factory=list)

    @property
    def work(self) -> Path:
        """The same path for all cases."""
        return self.folder / "work"

    def prepare(self) -> None:
        """Train the two runs that every case begins with: the older one was interrupted, the other is complete."""
        self.work.mkdir()
        text = "".join(f"line {i}: the quick brown fox jumps über {i * i % 97} dogs.\n" for i in range(60))
        (self.work / "notes.txt").write_text(text, encoding="utf-8")
        os.utime(self.work / "notes.txt", (1e9, 1e9))  # old enough that its record is trusted
        (self.work / "out").mkdir()
        for tag, words in ((BAD, ("--stop-at-step=4", "--checkpoint-interval=2")), (GOOD, ())):
            ended = run(train.main, self.training(f"--run-tag={tag}", *words), self.work, PATIENCE_SECONDS)
            if ended.status:
                raise UserError(f"a tiny training failed: {ended.err}")
        for path in list_run_paths(self.work / "runs"):
            self.ids[str(read_record(path)["tag"])] = path.name
        run(experiments.main, ["promote", GOOD, "best", *self.places("experiments")], self.work, PATIENCE_SECONDS)
        source = [str(self.work / "notes.txt"), f"--out={DATASET}", "--workers=1", r"--separator=\n"]
        run(prepare.main, [*source, *self.places("prepare")], self.work, PATIENCE_SECONDS)
        if not (self.work / "datasets" / DATASET).is_dir():
            raise UserError("a tiny dataset was not made")
        fuzz_words.odd_files(self.work)
        self.wrong = fuzz_damage.targets(self.work / "runs" / self.ids[BAD])
        random.Random(self.seed).shuffle(self.wrong)
        self.work.rename(self.folder / "template")
        self.copy()
        self.good = self.rows()[self.ids[GOOD]]

    def places(self, script: str) -> list[str]:
        runs, datasets = f"--runs-dir={self.work / 'runs'}", f"--datasets-dir={self.work / 'datasets'}"
        if script == "prepare":
            return [datasets]
        if script not in TRAINING_SCRIPTS:
            return [runs]
        return [runs, datasets, f"--corpora-dir={self.work / 'corpora'}", f"--aim-repo={self.work}"]

    def training(self, *words: str, dataset: str = "notes.txt") -> list[str]:
        return [f"--dataset={self.work / dataset}", *SMALL, *self.places("train"), "--no-aim-logging", *words]

    def filled_in(self, script: str, words: Sequence[str]) -> list[str]:
        """The words of a command with placeholders such as TRAIN filled in, and with the folders of this case."""
        stands_for = {
            TRAIN: self.training(),
            TRAIN_PREPARED: self.training(dataset=f"datasets/{DATASET}"),
            DATASET: [str(self.work / "datasets" / DATASET) if script == "evaluate" else DATASET],
        }
        argv = [word for given in words for word in stands_for.get(given, [given])]
        return argv if {TRAIN, TRAIN_PREPARED} & set(words) else argv + self.places(script)

    def copy(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.folder / "template", self.work, symlinks=True, copy_function=_copy)

    def rows(self) -> dict[str, dict[str, Any]]:
        """`list --json`, by id.

        Raises:
            ValueError: it is not JSON.
        """
        ended = run(experiments.main, ["list", "--json", *self.places("experiments")], self.work, PATIENCE_SECONDS)
        return {row["id"]: {key: row[key] for key in row if key != "age"} for row in json.loads(ended.out)}

    def case(self, index: int) -> Case:
        """Case `index`, always the same for a seed."""
        rng = random.Random(f"{self.seed} {index}")
        if index % 2 == 0:
            name, damage = self.wrong[index // 2 % len(self.wrong)]
            script, words, statuses, kind = rng.choice(DATASET_COMMANDS if name.startswith(PREPARED) else COMMANDS)
            argv = self.filled_in(script, words)
            outside = damage in ("a link out of the run", "an endless device")  # nothing is written through a link
            if words[:2] == ("--resume", BAD) and len(words) == 2 and name in SERVING and not outside:
                statuses = (0,)
            if name.startswith(CORPUS) or (name == f"../{MODELS}" and words[0] == "prune"):
                statuses = (*statuses, 2)  # the text cannot be encoded there; a promoted run must not be deleted
            return Case(f"{name}: {damage}", script, argv, statuses, kind == READS, (name, damage))
        often = ("training", "experiments", "file")
        kind = rng.choice((*often, *often, "inference", "profiling", "prepare", "evaluate", "weights"))
        if kind == "file":
            return Case("a configuration file", "train", [*self.training(), "--config=odd"], (0, 2))
        script = {"training": "train", "profiling": "profile_model"}.get(kind, kind)
        words, statuses = getattr(fuzz_words, f"{kind}_words")(rng)
        own = self.training() if script in TRAINING_SCRIPTS else self.places(script)
        place = [*own, *words] if script in TRAINING_SCRIPTS else [*words[:1], *own, *words[1:]]
        return Case("words", script, place, statuses)

    def try_case(self, index: int) -> tuple[Case, Ended, list[tuple[str, str]]]:
        """Run a case; returns it, how its command ended, and its faults: (kind, what happened)."""
        self.copy()
        case, rng = self.case(index), random.Random(f"{self.seed} {index} damage")
        argv = list(case.argv)
        if argv[-1] == "--config=odd":
            argv[-1] = f"--config={fuzz_words.configuration_file(self.work, rng)}"
        if case.damage:
            fuzz_damage.apply(self.work / "runs" / self.ids[BAD], *case.damage, rng)
        ended, faults = self.attempt(dataclasses.replace(case, argv=argv))
        return case, ended, faults

    def attempt(self, case: Case) -> tuple[Ended, list[tuple[str, str]]]:
        """Run the command of a case in the folder as it is."""
        before = snapshot(self.work)
        ended = run(SCRIPTS[case.script], case.argv, self.work, self.seconds)
        faults = [*self.process_faults(case, ended), *self.file_faults(case, ended, before, snapshot(self.work))]
        if case.damage:
            faults += self.list_faults("--whole-runs" in case.argv and "--yes" in case.argv)
        return ended, faults

    def process_faults(self, case: Case, ended: Ended) -> Iterator[tuple[str, str]]:
        last = (ended.err.strip().splitlines() or [""])[-1][:200]
        if ended.status is None:
            yield "hang", last
        elif "Traceback (most recent call last)" in ended.err + ended.out or ended.status < 0:
            yield "traceback", last or f"signal {-ended.status}"
        elif ended.status not in case.statuses:
            yield "status", f"{ended.status}: {last}"
        elif ended.status == 2 and not any(line.startswith("error: ") for line in ended.err.splitlines()):
            yield "status", "2 without an error"

    def file_faults(self, case: Case, ended: Ended, before: Snapshot, after: Snapshot) -> Iterator[tuple[str, str]]:
        bad, good = f"runs/{self.ids[BAD]}/", f"runs/{self.ids[GOOD]}/"
        new = [path for path in after if path not in before]
        if ended.status is not None:  # leftovers of a killed process are removed by the next one
            yield from (("leftover", path) for path in new if TEMPORARY.fullmatch(Path(path).name))
        if ended.status == 2 or case.reads:
            outside = [path for path in new if not path.startswith((bad, "out/")) or case.reads]
            yield from (("leftover", f"{path} after status {ended.status}") for path in outside[:1])
        changed = [path for path in before if after.get(path) != before[path]]
        if case.reads:
            files = [path for path in changed if path in after and not Path(path).name.startswith("runs")]
            yield from (("leftover", f"{path} is changed") for path in files[:1])
        lock = f"{good}{LOCK}"  # names its last holder
        changed_good = [path for path in changed if path.startswith(good) and path != lock]
        if case.damage or case.script != "experiments":
            yield from (("hidden", f"{path} is changed") for path in changed_good[:1])

    def list_faults(self, deleted: bool) -> Iterator[tuple[str, str]]:
        try:
            rows = self.rows()
        except (ValueError, KeyError) as error:
            yield "hidden", f"list gives no rows: {error}"
            return
        shown = rows.get(self.ids[GOOD], {})
        if differing := [key for key in self.good if shown.get(key) != self.good[key]]:
            yield "hidden", f"the good run's {', '.join(differing[:3])}" if shown else "the good run is not listed"
        if self.ids[BAD] not in rows and not deleted:
            yield "hidden", "the bad run is not listed"


def _copy(source: str, target: str) -> str:
    """Copy a regular file; make another pipe for a pipe."""
    if os.path.isfile(source):
        return str(shutil.copy2(source, target))
    os.mkfifo(target)
    return target


def snapshot(folder: Path) -> Snapshot:
    """Every path below `folder` with facts that change when it is written to."""
    found: Snapshot = {}
    for root, folders, names in os.walk(folder):
        for name in (*folders, *names):
            facts = os.lstat(os.path.join(root, name))
            size = 0 if name in folders else facts.st_size
            written = 0 if name in folders else facts.st_mtime_ns
            found[os.path.relpath(os.path.join(root, name), folder)] = facts.st_mode, size, written
    return found


def shown(words: Sequence[str], fuzzer: Fuzzer) -> str:
    """A command line, short enough for one line; TINY stands for the flags of the tiny training."""
    text = " ".join(word if len(word) < 80 else f"{word[:70]}...({len(word)})" for word in words)
    return printable(text.replace(" ".join(fuzzer.training()), "TINY").replace(f"{fuzzer.work}/", ""))


@script
def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m benchmarks.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=5000, metavar="N", help="number of cases (default: 5000)")
    parser.add_argument("--only", type=int, metavar="I", help="run only case I, and show its output")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the cases (default: 0)")
    parser.add_argument("--seconds", type=float, default=20, metavar="X", help="time limit of a command (default: 20)")
    args = parser.parse(argv)
    common.at_least(1, cases=args.cases)
    began, terminal = time.monotonic(), Terminal()
    import_all()
    os.environ["OMP_NUM_THREADS"] = "1"
    faults: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory(prefix="fuzz_") as name:
        fuzzer = Fuzzer(Path(name).resolve(), args.seconds, args.seed)
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ |= {"HOME": str(fuzzer.folder / "home"), "MPLCONFIGDIR": str(fuzzer.folder / "matplotlib")}
        fuzzer.prepare()
        before = set(os.listdir(PROJECT_ROOT))
        for index in range(args.cases) if args.only is None else (args.only,):
            case, ended, found = fuzzer.try_case(index)
            for kind, what in found:
                faults[kind] += 1
                words = shown([case.script, *case.argv], fuzzer)
                terminal.print(f"{kind:<10} case {index}, {case.name}: {words}: {printable(what)}")
            if args.only is not None:
                terminal.print(shown([case.script, *case.argv], fuzzer), ended.out, ended.err, f"{ended.status}")
        if new := sorted(set(os.listdir(PROJECT_ROOT)) - before):
            faults["leftover"] += len(new)
            terminal.print(f"leftover   in the project's folder: {', '.join(new)}")
        shutil.rmtree(fuzzer.work, ignore_errors=True)
    counts = ", ".join(f"{faults[kind]} {kind}" for kind in FAULTS)
    cases = args.cases if args.only is None else 1
    terminal.print(f"{cases:,} cases, seed {args.seed}: {counts}; {duration(time.monotonic() - began)}")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
