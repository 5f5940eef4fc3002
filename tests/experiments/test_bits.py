"""Comparing two logs bit by bit: what counts as a difference, and the first one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from fake_runs import make_run, write

from utils.experiments.bits import Difference, LogComparison, compare_logs

HISTOGRAM = {"step": 3, "time": 1.0, "name": "params/w", "min": -1.0, "max": 1.0, "counts": [1, 2, 3]}
SAMPLE = {"step": 3, "time": 1.0, "text": "to be"}


def records(count: int = 6, **changes: Any) -> list[dict[str, Any]]:
    """Records of `count` steps, with `changes` in that of step 4."""
    found = [
        {
            "step": step,
            "time": 100.0 + step,
            "tokens": 8 * step,
            "train/loss": 4.0 - step / 7,
            "grad_norm": 0.1 * step,
            "tokens_per_second": 50.0,
        }
        for step in range(count)
    ]
    if changes:
        found[4] |= changes
    return found


def compared(tmp_path: Path, before: dict[str, Any], after: dict[str, Any], first: int = 0) -> LogComparison:
    """The comparison of two runs with these logs."""
    paths = [make_run(tmp_path, name, **logs) for name, logs in (("before", before), ("after", after))]
    return compare_logs(paths[0], paths[1], first)


def test_equal_logs_are_identical(tmp_path: Path) -> None:
    logs = {"metrics": records(), "histograms": [HISTOGRAM], "samples": [SAMPLE]}
    comparison = compared(tmp_path, logs, logs)
    assert comparison == LogComparison(6, None)
    assert comparison.identical


def test_the_first_difference_is_reported_with_step_name_and_values(tmp_path: Path) -> None:
    after = records(**{"grad_norm": 9.0})
    after[5]["train/loss"] = 7.0
    comparison = compared(tmp_path, {"metrics": records()}, {"metrics": after})
    assert comparison == LogComparison(4, Difference(4, "grad_norm", 0.4, 9.0))
    assert not comparison.identical
    assert str(comparison.difference) == "first difference at step 4: grad_norm 0.4 vs 9.0"


def test_the_last_bit_of_a_number_counts(tmp_path: Path) -> None:
    loss = records()[4]["train/loss"]
    other = math.nextafter(loss, 9)
    comparison = compared(tmp_path, {"metrics": records()}, {"metrics": records(**{"train/loss": other})})
    assert comparison.difference == Difference(4, "train/loss", loss, other)


def test_the_sign_of_zero_is_a_bit(tmp_path: Path) -> None:
    comparison = compared(
        tmp_path, {"metrics": records(**{"train/loss": 0.0})}, {"metrics": records(**{"train/loss": -0.0})}
    )
    assert comparison.difference is not None


@pytest.mark.parametrize("name", ["time", "tokens_per_second", "step_ms", "system/process_cpu", "system/disk_free"])
def test_times_speeds_and_measurements_of_the_machine_do_not_count(tmp_path: Path, name: str) -> None:
    comparison = compared(tmp_path, {"metrics": records(**{name: 1.0})}, {"metrics": records(**{name: 2.0})})
    assert comparison.identical


@pytest.mark.parametrize("name", ["train/loss", "lr", "grad_norm", "tokens", "val/loss", "of_a_callback"])
def test_every_other_metric_counts(tmp_path: Path, name: str) -> None:
    comparison = compared(tmp_path, {"metrics": records(**{name: 1.0})}, {"metrics": records(**{name: 2.0})})
    assert comparison.difference == Difference(4, name, 1.0, 2.0)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_numbers_that_are_not_finite_equal_themselves(tmp_path: Path, value: str) -> None:
    logs = {"metrics": records(**{"train/loss": value})}
    assert compared(tmp_path, logs, logs).identical
    difference = compared(tmp_path, logs, {"metrics": records(**{"train/loss": 1.0})}).difference
    assert difference == Difference(4, "train/loss", value, 1.0)


def test_steps_that_only_one_run_logged_do_not_count(tmp_path: Path) -> None:
    sparse = records()[::2]
    assert compared(tmp_path, {"metrics": records()}, {"metrics": sparse}) == LogComparison(3, None)
    assert compared(tmp_path, {"metrics": sparse}, {"metrics": records()}) == LogComparison(3, None)
    assert compared(tmp_path, {"metrics": records()[:2]}, {"metrics": records()[3:]}) == LogComparison(0, None)


def test_a_shorter_log_is_identical_as_far_as_it_goes(tmp_path: Path) -> None:
    comparison = compared(tmp_path, {"metrics": records(6)}, {"metrics": records(3)})
    assert comparison == LogComparison(3, None)
    assert comparison.identical


def test_a_torn_last_line_does_not_count(tmp_path: Path) -> None:
    one, other = (make_run(tmp_path, name, metrics=records()) for name in ("one", "other"))
    log = other / "logs" / "metrics.jsonl"
    write(log, log.read_text()[:-10])
    assert compare_logs(one, other) == LogComparison(5, None)


def test_the_records_of_a_step_are_merged(tmp_path: Path) -> None:
    evaluated = {"step": 4, "time": 1.0, "tokens": 32, "val/loss": 2.0}
    split = [*records()[:4], evaluated, *records()[4:]]
    joined = records(**{"val/loss": 2.0})
    assert compared(tmp_path, {"metrics": split}, {"metrics": joined}) == LogComparison(6, None)
    difference = compared(tmp_path, {"metrics": split}, {"metrics": records(**{"val/loss": 2.5})}).difference
    assert difference == Difference(4, "val/loss", 2.0, 2.5)


def test_a_resumed_run_is_compared_from_the_step_of_its_resume(tmp_path: Path) -> None:
    after = records()
    after[1]["train/loss"] = 9.0
    logs = ({"metrics": records()}, {"metrics": after})
    assert compared(tmp_path, *logs).difference == Difference(1, "train/loss", records()[1]["train/loss"], 9.0)
    assert compared(tmp_path, *logs, first=2) == LogComparison(4, None)


@pytest.mark.parametrize("change", [{"min": -1.5}, {"counts": [1, 2, 4]}, {"counts": [1, 2]}])
def test_histograms_are_compared(tmp_path: Path, change: dict[str, Any]) -> None:
    before = {"metrics": records(), "histograms": [HISTOGRAM]}
    after = {"metrics": records(), "histograms": [HISTOGRAM | change | {"time": 9.0}]}
    difference = compared(tmp_path, before, after).difference
    assert difference is not None
    assert (difference.step, difference.name) == (3, "histogram of params/w")


def test_a_difference_of_long_values_is_reported_without_them(tmp_path: Path) -> None:
    one, other = HISTOGRAM | {"counts": [1] * 100}, HISTOGRAM | {"counts": [2] * 100}
    difference = compared(tmp_path, {"histograms": [one]}, {"histograms": [other]}).difference
    assert str(difference) == "first difference at step 3: histogram of params/w"


def test_the_time_of_a_histogram_or_sample_does_not_count(tmp_path: Path) -> None:
    before = {"metrics": records(), "histograms": [HISTOGRAM], "samples": [SAMPLE]}
    later = {"time": 99.0}
    after = {"metrics": records(), "histograms": [HISTOGRAM | later], "samples": [SAMPLE | later]}
    assert compared(tmp_path, before, after).identical


def test_sample_texts_are_compared(tmp_path: Path) -> None:
    before = {"metrics": records(), "samples": [SAMPLE]}
    after = {"metrics": records(), "samples": [SAMPLE | {"text": "not to be"}]}
    assert compared(tmp_path, before, after).difference == Difference(3, "sample text", "to be", "not to be")


def test_the_earliest_difference_of_all_logs_is_reported(tmp_path: Path) -> None:
    before = {"metrics": records(), "samples": [SAMPLE]}
    after = {"metrics": records(**{"train/loss": 9.0}), "samples": [SAMPLE | {"text": "not"}]}
    difference = compared(tmp_path, before, after).difference
    assert difference is not None
    assert (difference.step, difference.name) == (3, "sample text")


def test_steps_are_counted_up_to_the_first_difference_of_any_log(tmp_path: Path) -> None:
    before = {"metrics": records(), "samples": [SAMPLE]}
    after = {"metrics": records(), "samples": [SAMPLE | {"text": "not"}]}
    assert compared(tmp_path, before, after).steps == 3


def test_runs_without_logs_are_not_identical(tmp_path: Path) -> None:
    comparison = compare_logs(tmp_path / "one", tmp_path / "other")
    assert comparison == LogComparison(0, None)
    assert not comparison.identical


@pytest.mark.parametrize("name", ["metrics", "histograms", "samples"])
@pytest.mark.parametrize("line", ["no JSON", "[1]", "{}", '{"step": "x"}', '"step"'])
def test_a_damaged_log_is_a_problem_but_raises_nothing(tmp_path: Path, name: str, line: str) -> None:
    logs = {"metrics": records(), "histograms": [HISTOGRAM], "samples": [SAMPLE]}
    one, other = (make_run(tmp_path, run_id, **logs) for run_id in ("one", "other"))
    log = other / "logs" / f"{name}.jsonl"
    write(log, log.read_text() + line + "\n")
    comparison = compare_logs(one, other)
    assert "damaged" in (comparison.problem or "")
    assert not comparison.identical
