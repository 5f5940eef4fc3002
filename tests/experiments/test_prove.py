"""train.py --prove: planted faults are found and named, and a clean configuration passes.

Most sessions are forks of this process, which take half a second. Only new processes differ in the hashes of texts.
"""

from __future__ import annotations

import contextlib
import io
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from conftest import FORK, ROOT

import train
from utils.config.loader import LoadedConfig
from utils.config.settings import Config
from utils.experiments import prove as module
from utils.experiments.prove import Proof, Prover, proof_lines, prove, without_prove
from utils.training import witness
from utils.training.callbacks import Callback, TrainingRun

Argv = Callable[..., list[str]]
STEPS = 12


def nudge(run: TrainingRun, amount: float) -> None:
    """Change the weights."""
    with torch.no_grad():
        next(run.state.model.parameters()).mul_(1 + amount)


class Remembers(Callback):
    """A callback that saves its state, and has an attribute that varies but changes nothing."""

    def __init__(self) -> None:
        self.count, self.seen = 0, 0.0

    def on_step(self, run: TrainingRun) -> None:
        self.count, self.seen = self.count + 1, random.SystemRandom().random()
        nudge(run, 1e-4 * self.count)

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


class Forgets(Remembers):
    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


class Dice(Callback):
    def on_step(self, run: TrainingRun) -> None:
        nudge(run, 1e-3 * random.random())


class SeededDice(Callback):
    """Draws the same numbers in every undisturbed training, but starts again at a resume."""

    def __init__(self) -> None:
        random.seed(5)

    def on_step(self, run: TrainingRun) -> None:
        nudge(run, 1e-3 * random.random())


class Race(Callback):
    """The last bits vary, as with an operator whose threads add in any order."""

    def on_step(self, run: TrainingRun) -> None:
        nudge(run, 1e-6 * os.urandom(1)[0])


class Order(Callback):
    """Depends on the order of a set, like a loader that iterates over one."""

    NAMES = frozenset(f"document {number}" for number in range(20))

    def on_step(self, run: TrainingRun) -> None:
        nudge(run, 1e-3 * list(self.NAMES).index("document 3"))


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork a process for each session, with fresh random numbers like a new process."""

    def session(
        self: Prover, place: Path, words: Sequence[str], hash_seed: int, kill_at: int | None, complain: bool
    ) -> tuple[int, str]:
        spec = {"record": str(place / "record.jsonl"), "kill_at": kill_at, "interval": self.interval}

        def work() -> None:
            random.seed()
            with open(place / "output", "w") as output, contextlib.redirect_stdout(output):
                witness.main({**spec, "complain": complain}, list(words))

        process = FORK.Process(target=work)
        process.start()
        process.join()
        assert process.exitcode is not None
        return process.exitcode, (place / "output").read_text()

    monkeypatch.setattr(Prover, "_session", session)


@pytest.fixture
def proof_of(tiny_argv: Argv) -> Callable[[str], Proof]:
    def found(callback: str) -> Proof:
        words = tiny_argv("--max-iters", "40", "--callbacks", f"{__name__}:{callback}")
        config = LoadedConfig.from_config(Config()).config
        return prove(words, config, ROOT, STEPS, io.StringIO())

    return found


@pytest.mark.usefixtures("forked")
class TestForked:
    def test_a_clean_configuration_is_proven(self, proof_of: Callable[[str], Proof]) -> None:
        found = proof_of("Remembers")
        assert found.proven
        assert len(found.kills) == 2
        assert not found.forgotten  # `seen` also varies without a kill
        assert "have the same bits as undisturbed" in next(proof_lines(found))

    def test_state_that_a_callback_does_not_save_is_named(
        self, proof_of: Callable[[str], Proof], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "KILLS", 1)
        found = proof_of("Forgets")
        assert found.deterministic
        assert str(found.difference).startswith("weights token_embedding.weight after step ")
        assert found.causes == ["state of a callback that its state_dict does not save: Forgets.count"]

    def test_random_numbers_without_a_seed_are_named(self, proof_of: Callable[[str], Proof]) -> None:
        found = proof_of("Dice")
        assert not found.deterministic
        assert found.difference == "weights token_embedding.weight after step 1"
        (cause,) = found.causes
        assert cause.startswith("a generator without a seed: random.random (test_prove.py:")

    def test_a_seeded_generator_whose_state_is_not_saved_is_named(
        self, proof_of: Callable[[str], Proof], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "KILLS", 1)
        (cause,) = proof_of("SeededDice").causes
        assert cause.startswith("a generator whose state no checkpoint keeps: random.random (test_prove.py:")

    def test_an_operator_that_is_not_deterministic_is_suspected(self, proof_of: Callable[[str], Proof]) -> None:
        found = proof_of("Race")
        assert not found.deterministic
        assert found.causes[0].startswith("an operator that is not deterministic")


@pytest.mark.slow
def test_dependence_on_the_order_of_a_set_is_named_as_the_likely_cause(
    tiny_argv: Argv, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}:{ROOT / 'tests'}")
    argv = tiny_argv("--callbacks", "test_prove:Order", "--max-iters", "40", "--prove", "8")
    assert train.main(argv) == 1
    printed = capsys.readouterr().out
    assert "not proven: two undisturbed trainings differ, first in weights token_embedding.weight after" in printed
    assert "likely cause: the order of a set" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prove", "7"], "--prove: expected at least 8 steps, got 7"),
        (["--prove", "many"], "--prove: expected a number of steps >= 8, got many"),
        (["--prove", "--resume", "x"], "--prove is about a new run: leave --resume out"),
    ],
)
def test_a_mistake_on_the_command_line_is_reported(
    tiny_argv: Argv, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert train.main([*tiny_argv("--max-iters", "40"), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_configuration_error_is_printed_once_as_training_prints_it(
    tiny_argv: Argv, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def session(*_: object) -> tuple[int, str]:
        return 2, "error: --dataset gone.txt: no such file\n"

    monkeypatch.setattr(Prover, "_session", session)
    assert train.main([*tiny_argv("--max-iters", "40"), "--prove=10"]) == 2
    assert capsys.readouterr().err == "error: --dataset gone.txt: no such file\n"


@pytest.mark.parametrize(
    "words",
    ["--prove 8 --seed 2", "--prove --seed 2", "--seed 2 --prove=8", "--prove 8 --seed 2 --prove 8"],
)
def test_the_trainings_get_the_command_line_without_the_flag(words: str) -> None:
    assert without_prove(words.split()) == ["--seed", "2"]


def test_the_first_difference_of_two_steps_is_named() -> None:
    line = {"step": 1, "loss": "0x1p+0", "weights": {"a": "1", "b": "2"}, "optimizer": {"a/exp_avg": "3"}}
    assert module.first_difference(line, line) is None
    assert module.first_difference(line, {**line, "loss": "0x1p+1"}) == "the loss (1, 2)"
    assert module.first_difference(line, {**line, "weights": {"a": "1", "b": "9"}}) == "weights b"
    assert module.first_difference(line, {**line, "optimizer": {}}) == "optimizer a/exp_avg"


def test_values_of_plain_types_and_tensors_have_fingerprints() -> None:
    assert witness.fingerprint({"a": [1, torch.ones(2)]}) == witness.fingerprint({"a": [1, torch.ones(2)]})
    assert witness.fingerprint({"a": [1, torch.ones(2)]}) != witness.fingerprint({"a": [1, torch.zeros(2)]})
    assert witness.fingerprint(object()) is None
    assert witness.digest(torch.tensor(0.0)) != witness.digest(torch.tensor(-0.0))
