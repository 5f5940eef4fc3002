"""The journal of a sweep: claims, promotions, and the trials of killed processes."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from utils.errors import UserError
from utils.sweeps.folder import JOURNAL, RECORD, Sweep, read_sweep
from utils.sweeps.pruning import Pruner, rung_steps
from utils.sweeps.space import Dimension, Space
from utils.sweeps.study import NoWork, Study, Work

MakeSweep = Callable[..., Sweep]


def claimed(study: Study, total: int = 9) -> Work:
    work = study.claim(total)
    assert isinstance(work, Work)
    return work


def test_trials_are_numbered_and_each_is_claimed_once(make_sweep: MakeSweep) -> None:
    one, two = Study(make_sweep()), Study(make_sweep())
    first, second = claimed(one, 2), claimed(two, 2)
    assert [first.number, second.number] == [0, 1]
    assert one.claim(2) == NoWork(finished=False)  # the other process still has a trial
    one.finish(0, 1.5, runs=["a"])
    first.release()
    two.finish(1, reason="ValueError: x")
    second.release()
    assert one.claim(2) == NoWork(finished=True)
    assert [(trial.value, trial.user_attrs) for trial in one.trials()] == [
        (1.5, {"runs": ["a"]}),
        (None, {"reason": "ValueError: x"}),
    ]
    assert [trial.number for trial in one.best()] == [0]
    assert claimed(two, 3).number == 2  # the total of --trials may grow


def test_a_trial_claimed_by_a_killed_process_is_continued(make_sweep: MakeSweep) -> None:
    sweep = make_sweep()
    claim_and_die = multiprocessing.get_context("fork").Process(target=_claim_and_die, args=(sweep,))
    claim_and_die.start()
    claim_and_die.join()
    assert claim_and_die.exitcode == -signal.SIGKILL
    study = Study(sweep)
    (trial,) = study.trials()
    assert study.is_unfinished(trial)
    again = claimed(study)
    assert (again.number, again.values) == (0, trial.params)
    assert claimed(study).number == 1


def _claim_and_die(sweep: Sweep) -> None:
    Study(sweep).claim(9)
    os.kill(os.getpid(), signal.SIGKILL)


def test_random_values_do_not_depend_on_which_trials_end_first_or_fail(make_sweep: MakeSweep, tmp_path: Path) -> None:
    """With the sampler `random`, values depend only on the seed and the number of the trial."""
    study = Study(make_sweep())
    works = [claimed(study, 5) for _ in range(5)]
    straight = [work.values for work in works]
    for work in works:
        work.release()
    (tmp_path / "sweeps" / "lr" / JOURNAL).unlink()
    study = Study(make_sweep())
    again = []
    for number in range(5):
        work = claimed(Study(make_sweep()), 5)
        again.append(work.values)
        study.finish(number, None if number % 2 else 1.0, reason="x")
        work.release()
    assert again == straight


def test_a_torn_line_of_the_journal_is_cut_off(make_sweep: MakeSweep) -> None:
    sweep = make_sweep()
    claimed(Study(sweep)).release()
    with (sweep.path / JOURNAL).open("ab") as file:
        file.write(b'{"op_code":4,"wor')
    study = Study(sweep)
    work = claimed(study)
    study.finish(work.number, 1.0)
    assert [trial.value for trial in Study(sweep).trials()] == [1.0]


@pytest.mark.parametrize("line", [b"not JSON\n", b"{}\n", b"[]\n"])
def test_a_damaged_journal_is_reported(make_sweep: MakeSweep, line: bytes) -> None:
    sweep = make_sweep()
    claimed(Study(sweep)).release()
    content = (sweep.path / JOURNAL).read_bytes()
    (sweep.path / JOURNAL).write_bytes(line + content)
    with pytest.raises(UserError, match="the journal is damaged"):
        Study(sweep)


def test_asha_finds_the_best_recorded_trial_with_half_of_the_steps(make_sweep: MakeSweep) -> None:
    """The curves of 27 trials of 540 steps on Tiny Shakespeare; curves.json says how they were made."""
    curves = json.loads((Path(__file__).parent / "curves.json").read_text())["val/loss"]
    rungs = rung_steps(20, 540, 3)
    study = Study(make_sweep(pruner=Pruner("asha", rungs)))
    steps, reached = 0, dict.fromkeys(range(len(curves)), 0)
    while isinstance(work := study.claim(len(curves)), Work):
        step = work.step or rungs[-1]
        steps += step - reached[work.number]
        reached[work.number] = step
        value = curves[work.number][str(step)]
        if work.step is None:
            study.finish(work.number, value)
        else:
            study.report(work.number, step, value)
            assert study.is_paused(study.trials()[work.number])
        work.release()
    assert work.finished
    best = min(range(len(curves)), key=lambda number: curves[number]["540"])
    assert study.best()[0].number == best
    assert steps <= len(curves) * rungs[-1] / 2
    ended = [trial for trial in study.trials() if trial.state.name == "PRUNED"]
    assert {trial.user_attrs["reason"] for trial in ended} == {"not promoted"}
    assert len(ended) + len(study.best()) == len(curves)


@pytest.mark.parametrize("diverges_at", [10, 30, None])
def test_asha_trains_another_trial_to_the_end_if_the_best_one_diverges(
    make_sweep: MakeSweep, diverges_at: int | None
) -> None:
    study = Study(make_sweep(pruner=Pruner("asha", (10, 30, 90))))
    while isinstance(work := study.claim(3), Work):
        if work.number == 0 and work.step == diverges_at:
            study.finish(work.number, reason="diverged", pruned=True)
        elif work.step is None:
            study.finish(work.number, float(work.number))
        else:
            study.report(work.number, work.step, float(work.number))
        work.release()
    assert work.finished
    assert [trial.number for trial in study.best()] == [1]


def test_asha_trains_another_trial_even_if_one_stopped_before_the_first_rung(make_sweep: MakeSweep) -> None:
    study = Study(make_sweep(pruner=Pruner("asha", (10, 30, 90))))
    while isinstance(work := study.claim(3), Work):
        if work.number == 0 or work.step is None:
            study.finish(work.number, 9.0 - work.number)
        else:
            study.report(work.number, work.step, 9.0 - work.number)
        work.release()
    assert [trial.number for trial in study.best()] == [2, 0]


def test_the_median_rule_compares_trials_at_the_same_step(make_sweep: MakeSweep) -> None:
    study = Study(make_sweep(pruner=Pruner("median", (10,))))
    for number in range(5):
        work = claimed(study)
        for step in (10, 20):
            study.report(number, step, 1.0 + number / 10)
            assert not study.should_stop(number)  # the first five are never stopped
        study.finish(number, 1.0)
        work.release()
    bad, good = claimed(study), claimed(study)
    study.report(bad.number, 5, 9.0)
    assert not study.should_stop(bad.number)  # before min_steps
    study.report(bad.number, 10, 1.3)
    study.report(good.number, 10, 1.1)
    assert (study.should_stop(bad.number), study.should_stop(good.number)) == (True, False)


def test_a_sweep_is_not_continued_with_other_settings(make_sweep: MakeSweep, tmp_path: Path) -> None:
    make_sweep()
    with pytest.raises(UserError, match="exists: --resume continues this sweep, --name NAME starts another one"):
        make_sweep(resume=False)
    wider = Space((Dimension("learning_rate", "log", (1e-4, 1.0)), Dimension("n_layer", "choice", (1, 2))))
    with pytest.raises(UserError) as error:
        make_sweep(space=wider, sampler="tpe", pruner=Pruner("median", (10,)), max_iters=10)
    lines = [line.partition("is a different sweep: ")[2] for line in str(error.value).splitlines()]
    assert lines == [
        "learning_rate was log [0.0001, 0.1], is now log [0.0001, 1.0]",
        "sampler was random, is now tpe",
        "pruner was none, is now median min_steps 10 startup_trials 5",
        "n_layer was not searched, is now choice [1, 2]",
        "max_iters was 540, is now 10",
    ]


@pytest.mark.parametrize("content", ["x", "[]", "{}", '{"schema_version": 2}', '{"schema_version": 1, "space": 3}'])
def test_a_damaged_sweep_record_is_reported(make_sweep: MakeSweep, tmp_path: Path, content: str) -> None:
    sweep = make_sweep()
    (sweep.path / RECORD).write_text(content)
    with pytest.raises(UserError, match=f"{RECORD}"):
        read_sweep(sweep.path, tmp_path)


def test_after_a_full_disk_the_journal_can_be_continued(make_sweep: MakeSweep, small_disk: Path) -> None:
    """A line that was written in part is cut off."""
    study = Study(make_sweep(folder=small_disk))
    claimed(study).release()
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 1000):
            pass

    def report() -> None:
        for number in range(100):
            study.report(0, number, 1.0)

    with pytest.raises(OSError, match="No space left"):
        report()
    filler.unlink()
    study.report(0, 1000, 1.0)
    assert 1000 in Study(make_sweep(folder=small_disk)).trials()[0].intermediate_values
