"""The gate: its comparisons, the runs that it trains, and its ledger. Runs written by hand replace training."""

from __future__ import annotations

import io
import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT, git
from fake_runs import RESOLVED, make_run, training_records

import experiments
from utils.config.fields import FIELDS
from utils.errors import UserError
from utils.experiments import trials
from utils.experiments.gate import GateAnswer, gate
from utils.experiments.ledger import append, read_ledger, trial_lock
from utils.experiments.noise import noise
from utils.experiments.subjects import Subjects, parse_overrides
from utils.machine.signals import StopSignal
from utils.runs.run import change_record

NO_GIT = {"commit": None, "branch": None, "dirty": None, "remote": None, "code": None}
Losses = Callable[[dict[str, str]], float]


class Training:
    """Replaces train.py: writes a run whose loss is a function of its flags."""

    def __init__(
        self, loss: Losses, status: str = "completed", exit_status: int = 0, exit_reason: str | None = None
    ) -> None:
        self.loss, self.status, self.exit_status, self.exit_reason = loss, status, exit_status, exit_reason
        self.commands: list[dict[str, str]] = []

    def __call__(
        self, project: Path, flags: Sequence[str], runs_dir: Path, output: Any, temporary: Path
    ) -> tuple[Path, int]:
        words = [word for flag in flags for word in flag.split("=", 1)]
        named = {w[2:].replace("-", "_"): v for w, v in zip(words, [*words[1:], ""], strict=True) if w.startswith("--")}
        self.commands.append(named)
        known = {key: named[key] for key in ("seed", "learning_rate", "dropout") if key in named}
        settings = {key: type(FIELDS[key].default)(value) for key, value in known.items()}
        run_id = f"trained_{len(self.commands)}_{named['run_tag']}"
        metrics = training_records([3.0, self.loss(named)])
        path = make_run(
            runs_dir, run_id, settings=settings, metrics=metrics, tag=named["run_tag"], git=NO_GIT, status=self.status
        )
        if self.exit_reason:
            change_record(path, exit_reason=self.exit_reason)
        (path / "artifacts").mkdir(exist_ok=True)
        return path, self.exit_status


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Training]:
    def replace(loss: Losses, **outcome: Any) -> Training:
        found = Training(loss, **outcome)
        monkeypatch.setattr(trials, "run_training", found)
        return found

    return replace


def baseline_runs(runs_dir: Path, seeds: Sequence[int] = (1, 2, 3), tag: str = "base") -> None:
    for seed in seeds:
        metrics = training_records([3.0, noisy(2.0, seed)])
        make_run(runs_dir, f"{tag}_{seed}", tag=tag, settings={"seed": seed}, metrics=metrics, git=NO_GIT)


def noisy(loss: float, seed: int | str) -> float:
    return loss + 0.01 * (int(seed) * 7 % 5)


def ask(runs_dir: Path, candidate: str, baseline: str = "base", **options: Any) -> GateAnswer:
    return gate(candidate, baseline, ROOT, runs_dir, output=io.StringIO(), **options)


def loss_of_flags(flags: dict[str, str]) -> float:
    """The loss falls by about 0.2 at the better learning rate, with a little noise."""
    seed = int(flags["seed"])
    better = 0.2 + 0.0001 * (seed % 3) if float(flags.get("learning_rate", 0)) == 0.003 else 0.0
    return noisy(2.0, seed) - better


def test_a_better_candidate_is_trained_with_the_seeds_of_the_baseline_and_kept(
    runs_dir: Path, training: Callable[..., Training]
) -> None:
    baseline_runs(runs_dir)
    trained = training(loss_of_flags)
    answer = ask(runs_dir, "learning_rate=3e-3")
    assert answer.verdict == "keep"
    assert answer.effect == pytest.approx(0.2001)
    assert answer.interval is not None
    assert 0 < answer.interval[0] < answer.effect < answer.interval[1]
    assert [(command["seed"], command["learning_rate"]) for command in trained.commands] == [
        (seed, "0.003") for seed in "123"
    ]
    assert [pair.baseline for pair in answer.pairs] == ["base_1", "base_2", "base_3"]
    assert answer.trained == 3


def test_a_comparison_is_not_repeated(runs_dir: Path, training: Callable[..., Training]) -> None:
    baseline_runs(runs_dir)
    trained = training(loss_of_flags)
    first = ask(runs_dir, "learning_rate=3e-3")
    again = ask(runs_dir, "learning_rate=0.003", max_seeds=20)
    assert len(trained.commands) == 3
    assert (again.verdict, again.effect, again.pairs) == (first.verdict, first.effect, first.pairs)
    assert again.before is not None
    assert len(read_ledger(runs_dir)) == 1
    other = ask(runs_dir, "learning_rate=3e-3", min_effect=0.5)  # another question about the same runs
    assert other.verdict == "discard"
    assert len(trained.commands) == 3


def test_the_ledger_identifies_configurations(runs_dir: Path, training: Callable[..., Training]) -> None:
    baseline_runs(runs_dir)
    training(loss_of_flags)
    ask(runs_dir, "learning_rate=3e-3")
    ask(runs_dir, "dropout=0.1")
    first, second = (json.loads(line) for line in (runs_dir / "gate.jsonl").read_text().splitlines())
    assert first["candidate"]["config"] != second["candidate"]["config"]
    assert first["baseline"] == second["baseline"]
    assert first["verdict"] == "keep"
    assert "gate.jsonl" not in {run["id"] for run in listed(runs_dir)}


def listed(runs_dir: Path) -> list[dict[str, Any]]:
    from utils.runs.index import read_index

    return [run.row() for run in read_index(runs_dir)]


def test_an_effect_within_the_noise_is_unsure_after_all_seeds(
    runs_dir: Path, training: Callable[..., Training]
) -> None:
    baseline_runs(runs_dir)
    trained = training(lambda flags: noisy(2.0, int(flags["seed"]) * (3 if "dropout" in flags else 1)))
    answer = ask(runs_dir, "dropout=0.1", max_seeds=5)
    assert answer.verdict == "unsure"
    assert [pair.seed for pair in answer.pairs] == [1, 2, 3, 4, 5]
    seeds_of_baseline = [command["seed"] for command in trained.commands if "dropout" not in command]
    assert seeds_of_baseline == ["4", "5"]


def test_a_candidate_with_exactly_the_same_losses_stops_early(
    runs_dir: Path, training: Callable[..., Training]
) -> None:
    baseline_runs(runs_dir)
    training(lambda flags: noisy(2.0, flags["seed"]))
    answer = ask(runs_dir, "dropout=0.1")
    assert answer.verdict == "unsure"
    assert "no difference at all" in answer.reason
    assert len(answer.pairs) == 2


def test_equal_accuracies_do_not_prove_that_nothing_changed(runs_dir: Path, training: Callable[..., Training]) -> None:
    for tag, rate in (("base", 1e-3), ("fast", 3e-3)):
        for seed in range(1, 9):
            records = [{"step": 10, "time": 1.0, "tokens": 1, "val/loss": 2.0 + rate, "val/accuracy": 0.25}]
            settings = {"seed": seed, "learning_rate": rate}
            make_run(runs_dir, f"{tag}_{seed}", tag=tag, settings=settings, metrics=records, git=NO_GIT)
    answer = ask(runs_dir, "fast", metric="val/accuracy", max_seeds=5)
    assert (answer.verdict, answer.reason) == ("unsure", "5 seeds cannot tell the effect from the noise")


def make_runs_on_text(runs_dir: Path, text: str, seeds: Sequence[int], rate: float, tag: str) -> None:
    for seed in seeds:
        settings = {"seed": seed, "learning_rate": rate, "dataset": "notes.txt"}
        metrics = training_records([3.0, noisy(2.0, seed) + rate])
        resolved = RESOLVED | {"corpus_hash": text * 64}
        make_run(runs_dir, f"{tag}_{seed}", settings=settings, metrics=metrics, git=NO_GIT, tag=tag, resolved=resolved)


def test_runs_on_different_texts_of_the_same_name_are_not_compared(
    runs_dir: Path, training: Callable[..., Training]
) -> None:
    make_runs_on_text(runs_dir, "a", (1, 2, 3), 1e-3, "base")
    trained = training(loss_of_flags)  # on the text of RESOLVED, as if notes.txt had been replaced
    with pytest.raises(UserError, match=r"the text of notes\.txt is not the one that base_1 was trained on"):
        ask(runs_dir, "dropout=0.1", "base")
    with pytest.raises(UserError, match=r"the text of notes\.txt is not the one"):
        noise("base", ROOT, runs_dir, seeds=5, output=io.StringIO())
    assert len(trained.commands) == 2
    assert not read_ledger(runs_dir)
    make_runs_on_text(runs_dir, "b", (1, 2, 3), 3e-3, "other")
    with pytest.raises(UserError, match=r"base_1 was trained on another text of notes\.txt than other_1"):
        ask(runs_dir, "other", "base")


def test_only_existing_runs_on_the_newest_text_are_used(runs_dir: Path, tmp_path: Path) -> None:
    make_runs_on_text(runs_dir, "a", (1, 2, 3), 1e-3, "2025")
    make_runs_on_text(runs_dir, "b", (3, 4), 1e-3, "2026")
    subjects = Subjects(ROOT, runs_dir, tmp_path)
    experiment = replace(subjects.pair("2025_1", "2026_3")[1], run=None)
    [found] = trials.Trials(ROOT, runs_dir, tmp_path, io.StringIO()).existing(experiment)
    assert {seed: run.id for seed, run in found.items()} == {3: "2026_3", 4: "2026_4"}


def test_two_names_of_one_configuration_get_no_verdict(runs_dir: Path, training: Callable[..., Training]) -> None:
    baseline_runs(runs_dir)
    baseline_runs(runs_dir, (4, 5), "other")
    training(loss_of_flags)
    assert ask(runs_dir, "other").verdict == "unsure"
    assert ask(runs_dir, "base_1", "base_2").reason.startswith("both are the same")


def test_a_candidate_that_diverges_is_discarded(runs_dir: Path, training: Callable[..., Training]) -> None:
    baseline_runs(runs_dir)
    training(loss_of_flags, status="diverged", exit_status=1)
    answer = ask(runs_dir, "learning_rate=3e-3")
    assert answer.verdict == "discard"
    assert "diverged" in answer.reason


@pytest.mark.parametrize(
    ("status", "reason", "verdict"),
    [
        ("failed", "ValueError: no such layer", "discard"),
        ("failed", "OSError: [Errno 28] No space left on device", "unsure"),
        ("failed", "OutOfMemoryError: out of memory: a micro-step of 8 x 64 tokens does not fit", "unsure"),
        ("running", None, "unsure"),  # its process was killed
    ],
)
def test_a_failure_of_the_machine_does_not_discard_a_candidate(
    runs_dir: Path, training: Callable[..., Training], status: str, reason: str | None, verdict: str
) -> None:
    baseline_runs(runs_dir)
    training(loss_of_flags, status=status, exit_status=1, exit_reason=reason)
    assert ask(runs_dir, "learning_rate=3e-3").verdict == verdict
    training(loss_of_flags)
    again = ask(runs_dir, "learning_rate=3e-3")
    assert again.verdict == ("discard" if verdict == "discard" else "keep")


def test_a_later_gate_begins_with_the_pairs_of_the_earlier_one(
    runs_dir: Path, training: Callable[..., Training], monkeypatch: pytest.MonkeyPatch
) -> None:
    baseline_runs(runs_dir, (50,))
    training(lambda flags: noisy(2.0, int(flags["seed"]) * (3 if "dropout" in flags else 1)))
    with monkeypatch.context() as patch:
        patch.setattr(trials.Trials, "seconds", property(lambda self: 3600.0 * len(self.trained)))
        first = ask(runs_dir, "dropout=0.1", budget=3600 * 3.5)
    assert [pair.seed for pair in first.pairs] == [50, 1]
    assert [pair.seed for pair in ask(runs_dir, "dropout=0.1").pairs][:4] == [50, 1, 2, 3]


def test_a_baseline_that_fails_is_an_error(runs_dir: Path, training: Callable[..., Training]) -> None:
    baseline_runs(runs_dir, (1,))
    training(loss_of_flags, status="failed", exit_status=1)
    with pytest.raises(UserError, match=r"trained_1_dropout-0\.1-1 failed"):
        ask(runs_dir, "base", "dropout=0.1")


def test_a_gate_that_ran_out_of_budget_continues_with_its_number_of_seeds(
    runs_dir: Path, training: Callable[..., Training], monkeypatch: pytest.MonkeyPatch
) -> None:
    baseline_runs(runs_dir)
    trained = training(loss_of_flags)
    answer = ask(runs_dir, "learning_rate=3e-3", budget=1e-9, max_seeds=6)
    assert (answer.verdict, answer.pairs) == ("unsure", [])
    assert not trained.commands
    again = ask(runs_dir, "learning_rate=3e-3", budget=3600)
    assert (again.verdict, again.max_seeds) == ("keep", 6)
    assert all(0 < float(command["max_minutes"]) <= 60 for command in trained.commands)


def test_a_signal_ends_the_gate_without_a_verdict(runs_dir: Path, training: Callable[..., Training]) -> None:
    baseline_runs(runs_dir)
    training(loss_of_flags, status="interrupted", exit_status=143)
    with pytest.raises(StopSignal) as stopped:
        ask(runs_dir, "learning_rate=3e-3")
    assert stopped.value.signum == 15
    assert not read_ledger(runs_dir)


def test_the_gate_knows_metrics_where_higher_is_better(runs_dir: Path, training: Callable[..., Training]) -> None:
    for tag, rate, shift in (("base", 1e-3, 0.0), ("fast", 3e-3, 0.2)):
        for seed in (1, 2, 3):
            records = [
                {
                    "step": 10,
                    "time": 1.0,
                    "tokens": 1,
                    "val/loss": 2.0,
                    "val/accuracy": noisy(0.1, seed) + shift * (1 + seed / 100),
                }
            ]
            settings = {"seed": seed, "learning_rate": rate}
            make_run(runs_dir, f"{tag}_{seed}", tag=tag, settings=settings, metrics=records, git=NO_GIT)
    assert ask(runs_dir, "fast", metric="val/accuracy").verdict == "keep"
    assert ask(runs_dir, "base", "fast", metric="val/accuracy").verdict == "discard"


def test_the_gate_prints_json_and_sets_the_exit_status(
    runs_dir: Path, training: Callable[..., Training], capsys: pytest.CaptureFixture[str]
) -> None:
    baseline_runs(runs_dir)
    training(loss_of_flags)
    words = ["base", "--runs-dir", str(runs_dir)]
    assert experiments.main(["gate", "learning_rate=3e-3", *words, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["verdict"], answer["trained"]) == ("keep", 3)
    assert experiments.main(["gate", "dropout=0.1", *words]) == 3
    assert "unsure" in capsys.readouterr().out
    assert experiments.main(["gate", "learning_rate=3e-3", *words, "--min-effect", "0.5"]) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["learning_rat=1", "base"], "unknown setting learning_rat; did you mean learning_rate?"),
        (["learning_rate=fast", "base"], "--learning-rate: expected number"),
        (["seed=3", "base"], "seed=3: seeds and names of the runs are chosen by the comparison"),
        (["nothing", "base"], "no run nothing in .*, nor a commit of that name; expected RUN or tag, commit"),
        (["gone.patch", "base"], "gone.patch: cannot be read: No such file"),
        (["dropout=0.1", "base", "--max-seeds", "2"], "--max-seeds must be from 3 to 1000, not 2"),
        (["dropout=0.1", "base", "--min-effect", "nan"], "--min-effect must be at least 0, not nan"),
        (["dropout=0.1", "base", "--budget", "5"], "--budget: expected a time like 90s, 5m or 1.5h, got '5'"),
        (["dropout=0.1", "base", "--metric", "val/los"], "--metric: no metric val/los; did you mean val/loss?"),
        (["dropout=0.1", "base", "--set", "dropout=0.2"], "--set is for commits, patches and settings"),
    ],
)
def test_a_mistake_is_reported_in_one_line_and_not_in_the_ledger(
    runs_dir: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    baseline_runs(runs_dir)
    assert experiments.main(["gate", *words, "--runs-dir", str(runs_dir)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)
    assert not (runs_dir / "gate.jsonl").exists()


def test_runs_of_a_tag_that_are_different_experiments_are_refused(runs_dir: Path) -> None:
    baseline_runs(runs_dir)
    make_run(runs_dir, "other", tag="base", settings={"seed": 4, "dropout": 0.5}, git=NO_GIT)
    with pytest.raises(UserError, match="its runs differ in more than the seed"):
        ask(runs_dir, "dropout=0.1")


# ------------------------------------------------------------------------------------------------ code


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A repository with two commits that differ in code and configuration; it cannot train."""
    folder = tmp_path / "project"
    (folder / "configs").mkdir(parents=True)
    for number in (1, 2):
        (folder / "train.py").write_text(f"# version {number}\n")
        (folder / "configs" / "optimizer.yaml").write_text(f"learning_rate: {number}e-3\n")
        git(folder, "init", "-q")
        git(folder, "add", "-A")
        git(folder, "commit", "-qm", f"version {number}")
    return folder


def test_each_subject_has_its_own_code_and_configuration(project: Path, tmp_path: Path) -> None:
    patch = tmp_path / "faster.patch"
    (project / "train.py").write_text("# version 3\n")
    patch.write_text(git(project, "diff"))
    git(project, "checkout", "-q", "train.py")
    (tmp_path / "trees").mkdir()
    subjects = Subjects(project, tmp_path / "runs", tmp_path / "trees")
    old, new = subjects.pair("HEAD~1", "HEAD")
    assert [one.loaded.config.optimizer.learning_rate for one in (old, new)] == [1e-3, 2e-3]
    assert (old.project / "train.py").read_text() == "# version 1\n"
    patched, base = subjects.pair(str(patch), "HEAD", "dropout=0.25")
    assert (patched.project / "train.py").read_text() == "# version 3\n"
    assert base.loaded.config.model.dropout == 0.25
    assert base.settings == patched.settings
    assert base.key != patched.key
    with pytest.raises(UserError, match=r"faster.patch cannot be applied to the code of HEAD~1: patch failed"):
        subjects.pair(str(patch), "HEAD~1")


def test_the_checkout_is_copied_with_its_uncommitted_changes(project: Path, tmp_path: Path) -> None:
    (project / "train.py").write_text("# not committed\n")
    (tmp_path / "trees").mkdir()
    subjects = Subjects(project, tmp_path / "runs", tmp_path / "trees")
    found = subjects.one("dropout=0.5")
    assert (found.project / "train.py").read_text() == "# not committed\n"
    assert found.code[0] == git(project, "rev-parse", "HEAD").strip()
    assert found.code[1] is not None


# ---------------------------------------------------------------------------------------------- ledger


def test_a_truncated_line_of_the_ledger_hides_no_other(runs_dir: Path) -> None:
    runs_dir.mkdir()
    append(runs_dir, {"key": "a", "verdict": "keep"})
    with (runs_dir / "gate.jsonl").open("a") as file:
        file.write('{"key": "b", "ver')
    append(runs_dir, {"key": "c", "verdict": "unsure"})
    assert [entry["key"] for entry in read_ledger(runs_dir)] == ["a", "c"]


def test_only_one_process_at_a_time_makes_a_comparison(runs_dir: Path) -> None:
    runs_dir.mkdir()
    with (
        trial_lock(runs_dir, "a" * 64),
        trial_lock(runs_dir, "b" * 64),
        pytest.raises(UserError, match="another process is comparing these two already"),
        trial_lock(runs_dir, "a" * 64),
    ):
        pass
    assert not list(runs_dir.iterdir())


def test_overrides_may_have_lists_and_spaces() -> None:
    assert parse_overrides("learning_rate=3e-3,dropout=0.1") == {"learning_rate": "3e-3", "dropout": "0.1"}
    assert parse_overrides("--n-layer=3 eval_at=1,2") == {"n_layer": "3", "eval_at": "1,2"}


# ----------------------------------------------------------------------------------------------- noise


def test_noise_trains_the_missing_seeds_and_estimates_the_deviation(
    runs_dir: Path, training: Callable[..., Training]
) -> None:
    baseline_runs(runs_dir)
    trained = training(loss_of_flags)
    found = noise("base", ROOT, runs_dir, seeds=5, effects=[0.01, 0.1], output=io.StringIO())
    assert [command["seed"] for command in trained.commands] == ["4", "5"]
    assert found.values == pytest.approx({1: 2.02, 2: 2.04, 3: 2.01, 4: 2.03, 5: 2.0})
    assert found.deviation == pytest.approx(0.0158, abs=1e-4)
    small, large = found.needed
    assert small.unpaired is not None
    assert large.unpaired is not None
    assert small.unpaired > large.unpaired


def test_noise_prints_how_many_runs_it_trains(
    runs_dir: Path, training: Callable[..., Training], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "time", SimpleNamespace(monotonic=itertools.count(0, 100).__next__))
    training(loss_of_flags)
    output = io.StringIO()
    noise("learning_rate=3e-3", ROOT, runs_dir, seeds=3, output=output)
    assert output.getvalue().splitlines() == [
        "training learning_rate=3e-3 with seed 1 (1 of 3)",
        "training learning_rate=3e-3 with seed 2 (2 of 3, about 1:40 min each)",
        "training learning_rate=3e-3 with seed 3 (3 of 3, about 1:40 min)",
    ]


@pytest.mark.parametrize("words", [["noise", "base", "--seeds", "5"], ["gate", "dropout=0.1", "base"]])
def test_an_interrupted_command_prints_how_to_continue(
    words: list[str], runs_dir: Path, training: Callable[..., Training], capsys: pytest.CaptureFixture[str]
) -> None:
    baseline_runs(runs_dir)
    training(loss_of_flags, status="interrupted", exit_status=130)
    assert experiments.main([*words, "--runs-dir", str(runs_dir)]) == 130
    out = capsys.readouterr().out
    assert out.endswith("complete runs are kept; the same command continues with the others\n")
    if words[0] == "noise":
        assert "training base with seed 4 (1 of 2, about 10 s each)" in out


def test_noise_prints_how_many_seeds_an_effect_needs(runs_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    baseline_runs(runs_dir)
    assert experiments.main(["noise", "base", "--seeds", "3", "--runs-dir", str(runs_dir), "--effect", "0.02"]) == 0
    out = capsys.readouterr().out
    assert "from seed to seed" in out
    assert "Pairs of seeds that find an effect in 80% of cases" in out


@pytest.mark.parametrize(("status", "verdict"), [(1, "discard"), (2, "discard"), (-9, "unsure"), (137, "unsure")])
def test_a_candidate_that_made_no_run_is_tried_again(
    runs_dir: Path, training: Callable[..., Training], monkeypatch: pytest.MonkeyPatch, status: int, verdict: str
) -> None:
    baseline_runs(runs_dir)
    with monkeypatch.context() as patch:
        patch.setattr(trials, "run_training", lambda *_: (None, status))
        answer = ask(runs_dir, "learning_rate=3e-3")
    assert answer.verdict == verdict
    assert "made no run with seed 1" in answer.reason
    training(loss_of_flags)
    assert ask(runs_dir, "learning_rate=3e-3").verdict == "keep"


def test_arithmetic_with_other_digits_is_compared_although_its_corpus_differs(
    runs_dir: Path, training: Callable[..., Training]
) -> None:
    for tag, digits in (("base", 2), ("more", 3)):
        for seed in (1, 2, 3):
            settings = {"seed": seed, "dataset": "arithmetic", "arithmetic_digits": digits}
            metrics = training_records([3.0, noisy(2.0, seed) + digits + seed * digits / 1000])
            resolved = RESOLVED | {"corpus_hash": str(digits) * 64}
            make_run(
                runs_dir, f"{tag}_{seed}", settings=settings, metrics=metrics, git=NO_GIT, tag=tag, resolved=resolved
            )
    assert ask(runs_dir, "more", "base", max_seeds=3).verdict == "discard"
