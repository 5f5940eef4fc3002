"""A driver and the processes of its trials, which a stand-in trains."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from utils.config.settings import Config, TrackingConfig, TrainConfig
from utils.experiments.sql import choose_runs
from utils.files import write_json
from utils.runs.find import list_run_paths
from utils.runs.index import read_index
from utils.runs.layout import CONFIG, LOGS
from utils.runs.log import RunLog
from utils.runs.run import Run, read_record
from utils.sweeps.driver import Driver
from utils.sweeps.folder import Sweep, open_sweep
from utils.sweeps.pruning import Pruner
from utils.sweeps.results import seconds_to_loss
from utils.sweeps.space import Dimension, Goal, Space
from utils.sweeps.study import Study, Work
from utils.sweeps.trial import Activity, TrialRunner

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = "tests/sweeps/stand_in.py"
MakeSweep = Callable[..., Sweep]


def rooted(sweep: Sweep) -> Sweep:
    """The sweep with this project as its root, whose scripts can be run."""
    return replace(sweep, root=ROOT)


def choices(*rates: float) -> Space:
    return Space((Dimension("learning_rate", "choice", rates),))


@pytest.mark.usefixtures("stand_in")
def test_failed_and_diverged_trials_do_not_end_a_sweep(make_sweep: MakeSweep) -> None:
    """In the stand-in, 0.25 fails and 0.6 diverges; n_embd must be a multiple of n_head, 4."""
    space = Space((Dimension("learning_rate", "choice", (0.25, 0.6, 0.01)), Dimension("n_embd", "choice", (30, 32))))
    sweep = rooted(make_sweep(space=space, sampler="grid", max_iters=2))
    study, ended = Study(sweep), []
    ending = Driver(sweep, study, 9, 2, 5, lambda number, outcome: ended.append(number)).run()
    assert (ending.exit_status, ending.problem) == (0, None)
    assert sorted(ended) == [0, 1, 2, 3, 4, 5]
    states = {
        (t.params["learning_rate"], t.params["n_embd"]): (t.state.name, t.user_attrs.get("reason"))
        for t in study.trials()
    }
    multiple = "--n-embd: n_embd (30) must be divisible by n_head (4), or head_dim must be set"
    assert {states[rate, 30] for rate in (0.25, 0.6, 0.01)} == {("FAIL", multiple)}
    assert states[0.25, 32] == ("FAIL", "ValueError: planted")
    assert states[0.6, 32] == ("PRUNED", "diverged: train/loss is nan at step 0")
    assert states[0.01, 32] == ("COMPLETE", None)
    runs = choose_runs(read_index(sweep.runs_dir), "sweep = 'lr' and trial = 5")
    assert [run.record["tag"] for run in runs] == ["lr-5"]
    assert runs[0].record["sweep"] == {"name": "lr", "id": sweep.id, "number": 5, "place": 0}


def test_too_many_failures_in_a_row_end_a_sweep(make_sweep: MakeSweep) -> None:
    """Incompatible values fail before a process is started."""
    space = Space((Dimension("n_embd", "range", (33, 63, 2), whole=True),))
    sweep = rooted(make_sweep(space=space, sampler="grid"))
    ending = Driver(sweep, Study(sweep), 9, 1, 2).run()
    assert ending.exit_status == 1
    beginning = "3 trials in a row have failed (--max-failures); the last one: --n-embd: n_embd (37) must be divisible"
    assert ending.problem is not None
    assert ending.problem.startswith(beginning)
    assert len(Study(sweep).trials()) == 3


@pytest.mark.parametrize("status", ["running", "interrupted"])
def test_a_run_that_cannot_be_resumed_fails_its_trial_without_another_attempt(
    make_sweep: MakeSweep, monkeypatch: pytest.MonkeyPatch, status: str
) -> None:
    """The status in run.json is still `running` after a kill."""
    sweep = rooted(make_sweep())
    study = Study(sweep)
    work = study.claim(1)
    assert isinstance(work, Work)
    facts = {"name": sweep.name, "id": sweep.id, "number": 0, "place": 0}
    run = Run.create(sweep.runs_dir, sweep.tag(0), sweep=facts)
    (run.path / CONFIG).write_text("{}")
    run.update(status=status)
    run.release()
    commands: list[list[str]] = []

    def refuse(_: TrialRunner, command: list[str], _work: Work, _place: int, _activity: object, output: Path) -> tuple:
        commands.append(command)
        assert len(commands) == 1, "the trial was started again"
        output.write_text("error: no checkpoint can be read\n")
        return 2, False

    monkeypatch.setattr(TrialRunner, "_run", refuse)
    outcome = TrialRunner(sweep, study).carry_out(work)
    assert f"--resume={run.path}" in commands[0]
    assert (outcome.failed, outcome.reason) == (True, "no checkpoint can be read")


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("pruner", [Pruner("asha", (2, 4), 2), Pruner("pbt", (2, 4), population=2)])
def test_a_trial_that_stops_early_before_its_rung_counts_as_complete(
    make_sweep: MakeSweep, tmp_path: Path, pruner: Pruner
) -> None:
    train, tracking = TrainConfig(max_iters=4, patience=1), TrackingConfig(runs_dir=str(tmp_path / "runs"))
    config = Config(train=train, tracking=tracking)
    sweep = rooted(make_sweep(space=choices(0.1, 0.01), sampler="grid", pruner=pruner, config=config))
    study = Study(sweep)
    assert Driver(sweep, study, 2, 1, 0).run().exit_status == 0
    assert [(trial.state.name, trial.value) for trial in study.trials()] == [("COMPLETE", 3.46), ("COMPLETE", 2.46)]


@pytest.mark.parametrize(
    ("reason", "done"),
    [("enough, says a callback", True), ("max_minutes (1) are almost over", True), ("SIGTERM, at once", False),
     ("SIGHUP", False), ("stop_at_step (5) is reached", False)],
)  # fmt: skip
def test_a_run_is_continued_only_if_a_signal_or_the_sweep_stopped_it(
    make_sweep: MakeSweep, reason: str, done: bool
) -> None:
    sweep = rooted(make_sweep())
    run = Run.create(sweep.runs_dir, "x")
    run.finish("interrupted", reason, last_step=7)
    run.release()
    runner = TrialRunner(sweep, Study(sweep))
    assert runner._is_done(run.path, None) == done
    assert runner._is_done(run.path, 7)
    assert runner._is_done(run.path, 8) == done


def test_the_median_rule_does_not_stop_a_trial_at_its_last_evaluation(
    make_sweep: MakeSweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = rooted(make_sweep(pruner=Pruner("median", (10,)), max_iters=20))
    study = Study(sweep)
    work = study.claim(1)
    assert isinstance(work, Work)
    run = Run.create(sweep.runs_dir, sweep.tag(0))
    log = RunLog(run.path / LOGS)
    monkeypatch.setattr(Study, "should_stop", lambda *_: True)
    ends = TrialRunner(sweep, study)._watch(work, 0, Activity(), os.getpid())
    found = []
    for step in (10, 20):
        log.metrics.write([{"step": step, "val/loss": 9.0}])
        found.append(next(ends))
    assert found == [True, False]
    assert study.trials()[0].intermediate_values == {10: 9.0, 20: 9.0}
    run.release()


@pytest.mark.slow
@pytest.mark.usefixtures("stand_in")
def test_all_seeds_of_a_promoted_trial_continue_from_their_checkpoints(make_sweep: MakeSweep) -> None:
    """Of two trials with two seeds, the better one continues after the rung, in the same run directories."""
    sweep = make_sweep(space=Space((Dimension("learning_rate", "choice", (0.1, 0.01)),), seeds=2), sampler="grid",
                       pruner=Pruner("asha", (2, 4), 2), max_iters=4)  # fmt: skip
    sweep = rooted(sweep)
    study = Study(sweep)
    assert Driver(sweep, study, 9, 1, 0).run().exit_status == 0
    bad, good = study.trials()
    assert (bad.state.name, bad.user_attrs["reason"], bad.intermediate_values.keys()) == ("PRUNED", "not promoted", {2})
    assert good.state.name == "COMPLETE"
    records = [read_record(path) for path in list_run_paths(sweep.runs_dir)]
    assert sorted((r["sweep"]["number"], r["sweep"]["place"], r["last_step"], len(r["resumes"])) for r in records) == [
        (0, 0, 2, 0),
        (0, 1, 2, 0),
        (1, 0, 4, 1),
        (1, 1, 4, 1),
    ]
    configs = [json.loads((path / CONFIG).read_text()) for path in list_run_paths(sweep.runs_dir)]
    seeds = {config["train"]["seed"] for config in configs}
    assert seeds == {1337, 1338}


@pytest.mark.slow
def test_a_driver_stops_on_a_signal_and_another_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainings of the first driver save checkpoints, which the one with --resume continues."""
    monkeypatch.setenv("SWEEP_STEP_SECONDS", "0.1")
    (tmp_path / "lr.yaml").write_text("learning_rate: {log: [1e-4, 1e-1]}\n")
    words = [sys.executable, STAND_IN, "sweep", str(tmp_path / "lr.yaml"), f"--runs-dir={tmp_path / 'runs'}"]
    words += ["--max-iters=30", "--eval-interval=10", "--trials=2", "--sampler=random"]
    driver = subprocess.Popen([*words, "--jobs=2"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while driver.poll() is None and len(list(tmp_path.glob("runs/*/artifacts/step.json"))) < 2:
        time.sleep(0.05)
    driver.send_signal(signal.SIGTERM)
    _, errors = driver.communicate()
    assert driver.returncode == 128 + signal.SIGTERM
    assert b"stopped: --resume continues lr" in errors
    assert {read_record(path)["status"] for path in list_run_paths(tmp_path / "runs")} == {"interrupted"}
    monkeypatch.setenv("SWEEP_STEP_SECONDS", "0")
    refused = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert (refused.returncode, len(refused.stderr.splitlines())) == (2, 1)
    assert "exists: --resume continues this sweep, --name NAME starts another one" in refused.stderr
    done = subprocess.run([*words, "--resume", "--json"], cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert [trial["state"] for trial in found["trials"]] == ["complete", "complete"]
    assert [len(read_record(path)["resumes"]) for path in list_run_paths(tmp_path / "runs")] == [1, 1]
    longer = found["train_longer"]
    flags = "--run-tag lr-best --max-iters 300 --threads none"
    assert re.search(rf"train\.py --config \S+/meta/full_config\.json {flags}$", longer)


def test_seconds_to_a_loss_exclude_the_time_between_sessions(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    start = "2026-01-31T12:00:00+00:00"
    record = {"schema_version": 1, "status": "completed", "start": start}
    record["resumes"] = [{"time": "2026-01-31T13:00:00+00:00"}]
    (tmp_path / "run.json").write_text(json.dumps(record))
    noon = 1769860800.0
    entries = [(0, noon + 1, 4.0), (10, noon + 11, 3.0), (20, noon + 3602, 2.5), (30, noon + 3610, 2.0)]
    lines = [json.dumps({"step": step, "time": moment, "val/loss": loss}) for step, moment, loss in entries]
    (tmp_path / "logs" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert seconds_to_loss(tmp_path, 3.5) == 11
    assert seconds_to_loss(tmp_path, 2.5) == 11 + 2
    assert seconds_to_loss(tmp_path, 1.0) is None


def test_a_moved_sweep_keeps_its_id_trials_and_runs(make_sweep: MakeSweep, tmp_path: Path) -> None:
    """The runs are found by the id and the name that the sweep had at first."""
    sweep = make_sweep()
    Study(sweep).claim(1).release()  # type: ignore[union-attr]
    run = Run.create(sweep.runs_dir, sweep.tag(0), sweep={"name": "lr", "id": sweep.id, "number": 0, "place": 0})
    write_json(run.path / CONFIG, {})
    run.release()
    os.rename(sweep.path, tmp_path / "sweeps" / "moved")
    moved = open_sweep(tmp_path / "sweeps" / "moved", sweep.plan, tmp_path, resume=True)
    assert moved.id == sweep.id
    assert len(Study(moved).trials()) == 1
    assert TrialRunner(moved, Study(moved))._find_run(0, 0) == run.path
    assert Goal().as_json() == "val/loss"
    assert choices(0.1).as_json()["settings"] == {"learning_rate": {"choice": [0.1]}}
