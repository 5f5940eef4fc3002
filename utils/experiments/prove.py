"""train.py --prove: does this configuration continue after SIGKILL as if nothing had happened?

The configuration is trained twice undisturbed, and once with kills at random steps, each followed by a resume. Weights,
the optimizer's tensors and the loss are compared bit by bit after each step, and the logs at the end. If the two
undisturbed runs already differ, something is not deterministic; if only the killed one differs, some state is missing
from the checkpoints.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from utils.config.settings import Config
from utils.errors import UserError
from utils.experiments.bits import compare_logs
from utils.experiments.reproduce import UNTRACKED, flags_of
from utils.experiments.trials import SIGNALS
from utils.machine.signals import StopSignal, raise_on_signals
from utils.machine.watchdog import watched
from utils.runs.layout import RECORD
from utils.terminal.cli import PROJECT_ROOT, script_file
from utils.terminal.commands import print_json
from utils.terminal.config_flags import ExperimentArguments
from utils.terminal.words import printable

FLAG = "--prove"
LEAST_STEPS = 8
KILLS = 2
FORGETFUL = "state of a callback that its state_dict does not save"
WITNESS = "utils/training/witness.py"
Line = Mapping[str, Any]


@dataclass(frozen=True)
class Proof:
    """The result of a proof.

    kills: the steps after which the killed run was killed.
    difference: the first difference, such as "weights blocks.0.mlp.up.weight after step 13"; None if there is none.
    deterministic: whether the two undisturbed runs are identical.
    causes: likely causes, the likeliest first.
    forgotten: attributes of callbacks that a resume did not restore, if that changed no number.
    """

    steps: int
    kills: list[int]
    difference: str | None
    deterministic: bool
    causes: list[str] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)

    @property
    def proven(self) -> bool:
        return self.difference is None


class SessionError(Exception):
    """A session did not end as planned; its output says why."""

    def __init__(self, status: int, output: str) -> None:
        super().__init__(output)
        self.status, self.output = status, output


def prove(words: Sequence[str], config: Config, root: Path, steps: int, output: IO[str]) -> Proof:
    """Train with kills and without, and compare.

    Args:
        words: the command line of train.py, without --prove.
        config: the configuration that it results in.
        steps: the most steps to train.
        output: where progress is printed.

    Raises:
        UserError: there are too few steps.
        SessionError: a training did not end as planned.
    """
    with raise_on_signals(), tempfile.TemporaryDirectory(prefix="prove-") as folder:
        return Prover(words, config, root, steps, Path(folder), output).run()


class Prover:
    """The trainings of one proof, in a temporary folder."""

    def __init__(
        self, words: Sequence[str], config: Config, root: Path, steps: int, folder: Path, output: IO[str]
    ) -> None:
        planned = config.train.max_iters
        self.steps = min(steps, planned) if planned is not None else steps
        if self.steps < LEAST_STEPS:
            raise UserError(f"--prove: expected at least {LEAST_STEPS} steps, got {self.steps}")
        self.words, self.root, self.folder, self.output = list(words), root, folder, output
        self.interval = max(2, self.steps // 8)
        shorter = {
            "eval_interval": min(config.train.eval_interval, max(1, self.steps // 4)),
            "checkpoint_interval": self.interval,
            "stop_at_step": None if self.steps == planned else self.steps,
        }
        self.flags = list(flags_of({**UNTRACKED, **shorter}))
        self._count = 0

    def run(self) -> Proof:
        self._say(f"two undisturbed trainings of {self.steps} steps")
        first = self._train("first", hash_seed=1)
        second = self._train("second", hash_seed=2)
        if (difference := self._difference(first, second)) is not None:
            return Proof(self.steps, [], difference, False, self._causes_of_randomness(first))
        kills = sorted(random.sample(range(self.interval + 1, self.steps), KILLS))
        self._say(f"one that is killed after steps {', '.join(map(str, kills))}, and resumed")
        killed = self._train("killed", hash_seed=3, kills=kills)
        difference = self._difference(first, killed)
        unstable = _differing_state(first, second)  # clocks, for example
        lost = sorted(_differing_state(first, killed) - unstable)  # not restored by a resume
        if difference is None:
            return Proof(self.steps, kills, None, True, forgotten=lost)
        if lost:
            return Proof(self.steps, kills, difference, True, [f"{FORGETFUL}: {', '.join(lost)}"])
        *_, last = record_of(killed)
        causes = [f"a generator whose state no checkpoint keeps: {place}" for place in last["draws"]]
        causes = causes or ["state outside of model, optimizer and callbacks that no checkpoint keeps"]
        return Proof(self.steps, kills, difference, True, causes)

    def _say(self, line: str) -> None:
        print(f"prove: {line}", file=self.output, flush=True)

    # ---------------------------------------------------------------------------------------------- training

    def _train(self, name: str, hash_seed: int, kills: Sequence[int] = (), complain: bool = False) -> Path:
        """Train, in one session more than there are kills; returns the folder of the run and of the record."""
        place = self.folder / name
        place.mkdir()
        words = [*self.words, *self.flags, f"--runs-dir={place}", "--run-tag=prove"]
        for kill_at in (*kills, None):
            status, printed = self._session(place, words, hash_seed, kill_at, complain)
            if status != (-signal.SIGKILL if kill_at is not None else 0):
                if status in SIGNALS:
                    raise StopSignal(SIGNALS[status])
                raise SessionError(status, printed)
            words = ["--resume", str(run_of(place)), *self.flags[-1:]]
        return place

    def _session(
        self, place: Path, words: Sequence[str], hash_seed: int, kill_at: int | None, complain: bool
    ) -> tuple[int, str]:
        """Run one training process; returns its exit status and output."""
        spec = {"record": str(place / "record.jsonl"), "kill_at": kill_at, "interval": self.interval}
        (place / "spec.json").write_text(json.dumps({**spec, "complain": complain}), encoding="utf-8")
        command = [sys.executable, str(script_file(self.root, WITNESS)), str(place / "spec.json"), *words]
        environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=environment
        )
        try:
            with watched(process.pid, self.folder):
                printed, _ = process.communicate()
        except BaseException:
            process.kill()
            process.wait()
            raise
        return process.returncode, printed

    # --------------------------------------------------------------------------------------------- comparing

    def _difference(self, one: Path, other: Path) -> str | None:
        """The first difference between two trainings, in words; None if there is none."""
        expected = {line["step"]: line for line in record_of(one)}
        for line in record_of(other):
            if (name := first_difference(expected[line["step"]], line)) is not None:
                return f"{name} after step {line['step']}"
        logs = compare_logs(run_of(one), run_of(other))
        if logs.difference is not None:
            return f"metric {logs.difference.name} at step {logs.difference.step}"
        return logs.problem

    def _causes_of_randomness(self, first: Path) -> list[str]:
        """The likely causes why two undisturbed trainings differ; trains a third time to find out."""
        self._say("they differ; a third one finds out why")
        third = self._train("third", hash_seed=1, complain=True)
        if self._difference(first, third) is None:
            return ["the order of a set or of hashes of texts: it changes with PYTHONHASHSEED; sort before you iterate"]
        last = list(record_of(third))[-1]
        draws = [place for place in last["draws"] if place.split(" ")[0].rpartition(".")[0] not in last["seeded"]]
        if draws:
            return [f"a generator without a seed: {place}" for place in draws]
        complaints = [f"an operator that is not deterministic: {complaint}" for complaint in last["complaints"]]
        return complaints or ["an operator that is not deterministic, or code that reads a clock or unset memory"]


def run_of(place: Path) -> Path:
    """The only run directory in a folder."""
    (path,) = place.glob(f"*/{RECORD}")
    return path.parent


def record_of(place: Path) -> Iterator[Line]:
    """Yield the lines that the sessions of a training have recorded, one for each step."""
    for text in (place / "record.jsonl").read_text(encoding="utf-8").splitlines():
        yield json.loads(text)


def _differing_state(one: Path, other: Path) -> set[str]:
    """The attributes of callbacks that differ after any step."""
    expected = {line["step"]: line["callbacks"] for line in record_of(one)}
    return {
        key
        for line in record_of(other)
        for key, value in expected[line["step"]].items()
        if line["callbacks"].get(key) != value
    }


def first_difference(expected: Line, line: Line) -> str | None:
    """The first of loss, weights and optimizer state that differs after a step, in words; None if none differs."""
    if expected["loss"] != line["loss"]:
        values = (float.fromhex(one["loss"]) for one in (expected, line))
        return "the loss ({:.9g}, {:.9g})".format(*values)
    for part in ("weights", "optimizer"):
        names = dict.fromkeys((*expected[part], *line[part]))
        if name := next((name for name in names if expected[part].get(name) != line[part].get(name)), None):
            return f"{part} {name}"
    return None


def proof_lines(proof: Proof) -> Iterator[str]:
    """The proof in words."""
    if proof.proven:
        kills = " and ".join(f"{kill}" for kill in proof.kills)
        yield f"proven: {proof.steps} steps, killed after steps {kills} and resumed, have the same bits as undisturbed"
        if proof.forgotten:
            yield f"note: a resume does not restore {', '.join(proof.forgotten)}, but that changed no number"
        return
    what = "two undisturbed trainings differ" if not proof.deterministic else "a killed and resumed training differs"
    yield f"not proven: {what}, first in {proof.difference}"
    for cause in proof.causes:
        yield f"likely cause: {cause}"


def without_prove(words: Sequence[str]) -> list[str]:
    """A command line without --prove and its value, however often it is given."""
    before = ("", *words)
    return [
        word
        for word, previous in zip(words, before, strict=False)
        if word.partition("=")[0] != FLAG and not (previous == FLAG and not word.startswith("-"))
    ]


def prove_command(argv: Sequence[str], parsed: ExperimentArguments) -> int:
    """`train.py --prove`: prove the configuration of a command line.

    Returns:
        The exit status: 0 if proven, 1 if not; if a training did not end as planned, its status.

    Raises:
        UserError: a mistake on the command line.
    """
    own = parsed.own
    if own.resume is not None:
        raise UserError("--prove is about a new run: leave --resume out")
    if not own.prove.isascii() or not own.prove.isdigit():
        raise UserError(f"--prove: expected a number of steps >= {LEAST_STEPS}, got {own.prove}")
    config = parsed.load().config
    try:
        proof = prove(without_prove(argv), config, PROJECT_ROOT, int(own.prove), sys.stderr if own.json else sys.stdout)
    except SessionError as error:
        print(printable(error.output.strip()), file=sys.stderr)
        return error.status if error.status in (1, 2) else 1
    if own.json:
        print_json(proof)
    else:
        print(*map(printable, proof_lines(proof)), sep="\n")
    return 0 if proof.proven else 1
