"""Population-based training: which members forks replace, and that a killed study ends like an undisturbed one."""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from utils.errors import UserError
from utils.runs.find import list_run_paths
from utils.runs.run import read_record
from utils.sweeps.driver import Driver
from utils.sweeps.folder import Sweep
from utils.sweeps.population import CHANGEABLE, check_population, forks, perturbed
from utils.sweeps.pruning import Pruner, make_pruner
from utils.sweeps.space import Dimension, Space
from utils.sweeps.study import NoWork, Study, Work

ROOT = Path(__file__).resolve().parents[2]
RATE = Dimension("learning_rate", "log", (1e-4, 1e-1))
BATCH = Dimension("batch_size", "choice", (8, 16, 32))
MakeSweep = Callable[..., Sweep]


def test_the_worst_quarter_is_replaced_by_forks_of_the_best() -> None:
    values = {number: {"learning_rate": 0.01, "batch_size": 8} for number in range(8)}
    members, losses = {number: number for number in range(8)}, {number: 8.0 - number for number in range(8)}
    space = Space((RATE, BATCH))
    found = forks(space, 0, 3, members, losses, values)
    assert [(fork.member, fork.replaced) for fork in found] == [(0, 0), (1, 1)]
    assert {fork.parent for fork in found} <= {6, 7}
    assert all(fork.values["learning_rate"] in (0.008, 0.0125) for fork in found)
    assert {fork.values["batch_size"] for fork in found} == {16}
    assert forks(space, 0, 3, members, losses, values) == found
    many = [
        str(forks(space, seed, generation, members, losses, values)) for seed in range(4) for generation in range(4)
    ]
    assert len(set(many)) > 8
    assert {fork.replaced for fork in forks(space, 0, 3, members, losses, values, maximize=True)} == {6, 7}


def test_lost_members_are_replaced_first() -> None:
    values = {number: {"learning_rate": 0.01} for number in range(4)}
    members = {number: number for number in range(4)}
    replaced = [
        [fork.replaced for fork in forks(Space((RATE,)), 0, 0, members, reached, values)]
        for reached in ({0: 1.0, 1: 2.0, 3: 9.0}, {3: 1.0}, {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0})
    ]
    assert replaced == [[2], [0, 1, 2], [3]]


@pytest.mark.parametrize(
    ("dimension", "value", "expected"),
    [
        (RATE, 0.01, {0.008, 0.0125}),
        (RATE, 0.1, {0.08, 0.1}),
        (Dimension("weight_decay", "range", (0.0, 0.3)), 0.1, {0.08, 0.125}),
        (Dimension("beta2", "range", (0.9, 0.99, 0.03)), 0.93, {0.9, 0.96}),
        (Dimension("batch_size", "log", (4, 64), whole=True), 10, {8, 12}),
        (Dimension("batch_size", "log", (1, 64), whole=True), 2, {1, 3}),
        (Dimension("batch_size", "log", (1, 64), whole=True), 1, {1, 2}),
        (BATCH, 8, {16}),
        (BATCH, 16, {8, 32}),
        (Dimension("batch_size", "choice", (8,)), 8, {8}),
    ],
)
def test_a_perturbed_value_is_close_to_the_old_one(dimension: Dimension, value: Any, expected: set[Any]) -> None:
    assert {perturbed(dimension, value, random.Random(seed)) for seed in range(30)} == expected


def test_population_training_has_evenly_spaced_rungs_and_a_fixed_population() -> None:
    pruner = make_pruner("pbt", 100, 30, None, 8)
    assert pruner == Pruner("pbt", (30, 60, 90, 100), population=8)
    assert Pruner.from_json(pruner.as_json()) == pruner
    assert len(make_pruner("pbt", 1000, None, None, 8).rungs) == 10
    with pytest.raises(UserError, match="--eta is for --pruner asha"):
        make_pruner("pbt", 100, 30, 3, 8)
    with pytest.raises(UserError, match="the population has 8 members, which cannot change to 9"):
        check_population(Space((RATE,)), "random", pruner, 9)
    when = Dimension("momentum", "range", (0.8, 0.99), {"learning_rate": (0.1,)})
    with pytest.raises(UserError, match="momentum has a condition"):
        check_population(Space((RATE, when)), "random", pruner, 8)
    assert "learning_rate" in CHANGEABLE


POPULATION = Pruner("pbt", (10, 20, 30, 40), population=8)


def end(study: Study, work: Work) -> None:
    """Record the result of a trial: some diverge, and the loss is lowest at a learning rate of 0.01."""
    rate = float(work.values["learning_rate"])  # type: ignore[arg-type]
    loss = abs(math.log10(rate) + 2) + 1 / (work.step or 40)
    if rate > 0.07 or (rate < 2e-4 and work.step == 20):
        study.finish(work.number, reason="diverged", pruned=True, runs=[f"run-{work.number}"])
    elif work.step is None:
        study.finish(work.number, loss, runs=[f"run-{work.number}"])
    else:
        study.report(work.number, work.step, loss, [f"run-{work.number}"])


def facts(study: Study) -> list[Any]:
    return [(t.number, t.state, t.params, t.value, t.intermediate_values, t.user_attrs) for t in study.trials()]


def test_a_population_trains_to_the_end(make_sweep: MakeSweep) -> None:
    study = Study(make_sweep(pruner=POPULATION, max_iters=40))
    while isinstance(work := study.claim(8), Work):
        parent = study.trials()[work.number].user_attrs.get("parent")
        assert work.parent == (None if parent is None else f"run-{parent['trial']}:{parent['step']}")
        end(study, work)
        work.release()
    assert work.finished
    ended = study.trials()
    complete = study.best()
    assert sorted(trial.user_attrs.get("member", trial.number) for trial in complete) == list(range(8))
    assert {trial.user_attrs["rung"] for trial in complete} == {3}
    first = [trial.params["learning_rate"] for trial in ended[:8]]
    nearest = min(abs(math.log10(rate) + 2) for rate in first)
    assert (complete[0].value or 0) - 1 / 40 < nearest
    replaced = [trial for trial in ended if trial.state.name == "PRUNED"]
    assert len(ended) == 8 + len(replaced)
    reasons = {trial.user_attrs["reason"].split(" of ")[0] for trial in replaced}
    assert reasons == {"replaced by a fork", "diverged"}


def test_a_population_of_a_grid_with_fewer_points_trains_to_the_end(make_sweep: MakeSweep) -> None:
    space = Space((Dimension("learning_rate", "choice", (0.001, 0.01, 0.02)),))
    study = Study(make_sweep(space=space, sampler="grid", pruner=POPULATION, max_iters=40))
    while isinstance(work := study.claim(8), Work):
        end(study, work)
        work.release()
    assert work.finished
    assert sorted(trial.user_attrs.get("member", trial.number) for trial in study.best()) == [0, 1, 2]


def test_a_killed_study_ends_like_an_undisturbed_one(make_sweep: MakeSweep, tmp_path: Path) -> None:
    """Each process has several trials at a time, and dies before a random line of the journal."""
    straight = Study(make_sweep(pruner=POPULATION, max_iters=40, folder=tmp_path / "straight"))
    while isinstance(work := straight.claim(8), Work):
        end(straight, work)
        work.release()
    sweep = make_sweep(pruner=POPULATION, max_iters=40, folder=tmp_path / "killed")
    codes = []
    for seed in range(100):
        process = multiprocessing.get_context("fork").Process(target=work_and_die, args=(sweep, seed))
        process.start()
        process.join()
        codes.append(process.exitcode)
        if codes[-1] == 0:
            break
    assert codes[-1] == 0
    assert set(codes[:-1]) == {-signal.SIGKILL}
    assert len(codes) > 5
    assert facts(Study(sweep)) == facts(straight)


def work_and_die(sweep: Sweep, seed: int) -> None:
    moments = random.Random(seed)
    study, lines = Study(sweep), moments.randrange(1, 14)
    backend = study._storage._backend
    append = backend.append_logs

    def append_or_die(logs: Any) -> None:
        nonlocal lines
        lines -= 1
        if lines == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        append(logs)

    backend.append_logs = append_or_die  # type: ignore[method-assign]
    held: list[Work] = []
    while True:
        found = study.claim(8)
        if isinstance(found, Work):
            held.append(found)
        if held and (isinstance(found, NoWork) or moments.random() < 0.4):
            work = held.pop(moments.randrange(len(held)))
            end(study, work)
            work.release()
        elif isinstance(found, NoWork):
            assert found.finished
            return


def test_a_member_waits_for_the_forks_that_need_its_checkpoint(make_sweep: MakeSweep) -> None:
    study = Study(make_sweep(pruner=Pruner("pbt", (10, 20), population=4), max_iters=20))
    for number in range(4):
        work = study.claim(4)
        assert isinstance(work, Work)
        study.report(number, 10, float(number), [f"run-{number}"])
        work.release()
    works = [study.claim(4) for _ in range(3)]
    assert [work.number for work in works if isinstance(work, Work)] == [1, 2, 4]
    assert study.claim(4) == NoWork(finished=False)  # trial 4 is a fork of trial 0
    fork = works[2]
    assert isinstance(fork, Work)
    assert fork.parent == "run-0:10"
    study.finish(4, 1.0)
    fork.release()
    last = study.claim(4)
    assert isinstance(last, Work)
    assert last.number == 0


@pytest.mark.usefixtures("stand_in")
def test_forks_record_their_parent_run_and_step(make_sweep: MakeSweep) -> None:
    """Two members train for two generations."""
    space = Space((Dimension("learning_rate", "choice", (0.1, 0.01)),))
    sweep = make_sweep(space=space, sampler="grid", pruner=Pruner("pbt", (2, 4), population=2), max_iters=4)
    sweep = replace(sweep, root=ROOT)
    study = Study(sweep)
    assert Driver(sweep, study, 2, 2, 0).run().exit_status == 0
    bad, good, fork = study.trials()
    assert (bad.state.name, bad.user_attrs["reason"]) == ("PRUNED", "replaced by a fork of trial 1")
    assert (good.state.name, fork.state.name, fork.params) == ("COMPLETE", "COMPLETE", {"learning_rate": 0.1})
    assert fork.user_attrs["member"] == 0
    runs = {record["sweep"]["number"]: record for record in map(read_record, list_run_paths(sweep.runs_dir))}
    parent = {key: runs[2]["parent"][key] for key in ("relation", "run", "step")}
    assert parent == {"relation": "fork", "run": good.user_attrs["runs"][0], "step": 2}
    assert [(runs[n]["last_step"], runs[n]["tag"], len(runs[n]["resumes"])) for n in range(3)] == [
        (2, "lr-0", 0),
        (4, "lr-1", 1),
        (4, "lr-2", 0),
    ]
