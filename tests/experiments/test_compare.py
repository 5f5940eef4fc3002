"""Comparing runs: verdicts on planted data, groups of seeds, and metrics at equal steps, tokens and time."""

from __future__ import annotations

import io
import math
import re
import statistics
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_runs import PARENT, RESOLVED, indexed, make_run, training_records, write
from rich.console import Console

from utils.errors import UserError
from utils.experiments.compare import SeedGroup, comparable_metric, compare, judge, metric_direction
from utils.experiments.comparison_tables import comparison_screen, verdict_words
from utils.experiments.curve import Curve, logged_metrics, read_curve
from utils.runs.index import IndexedRun, read_run

FORK = PARENT | {"run": "mother"}
OF_MOTHER = "of mother at step 1 (fork)"
PATCHES = [(0, ""), (1, "diff --git a/model.py b/model.py\n+1\n")]
FILE_PATCH = "diff --git a/{0} b/{0}\n+1\n"


def group(values: Iterable[float], name: str = "a") -> SeedGroup:
    finals = tuple(float(value) for value in values)
    deviation = statistics.stdev(finals) if len(finals) > 1 and all(map(math.isfinite, finals)) else None
    return SeedGroup(name, (), finals, statistics.fmean(finals) if finals else None, deviation)


def seeds(runs_dir: Path, tag: str, finals: Sequence[Any], **facts: Any) -> list[IndexedRun]:
    """Runs that differ only in their seed, with these last losses."""
    settings = facts.pop("settings", {})
    return [
        indexed(
            runs_dir,
            f"{tag}{i}",
            tag=tag,
            settings={**settings, "seed": i},
            metrics=training_records([9, final]),
            **facts,
        )
        for i, final in enumerate(finals)
    ]


@pytest.mark.parametrize(
    ("count", "other_count", "deviation", "other_deviation"),
    [(5, 5, 1.0, 1.0), (4, 8, 1.0, 1.0), (3, 3, 1.0, 10.0), (3, 10, 10.0, 1.0), (10, 3, 10.0, 1.0)],
)
def test_equal_means_give_a_false_alarm_in_about_5_percent_of_cases(
    count: int, other_count: int, deviation: float, other_deviation: float
) -> None:
    random = np.random.default_rng(7)
    verdicts = [
        judge(group(random.normal(2, deviation, count)), group(random.normal(2, other_deviation, other_count))).verdict
        for _ in range(800)
    ]
    alarms = sum(verdict != "within noise" for verdict in verdicts) / len(verdicts)
    assert 0.02 <= alarms <= 0.08
    assert {"better", "worse"} <= {*verdicts}


def test_a_difference_of_several_deviations_is_nearly_always_found() -> None:
    random = np.random.default_rng(7)
    for count, difference in ((3, 8.0), (5, 4.0)):
        verdicts = [
            judge(group(random.normal(0, 1, count)), group(random.normal(difference, 1, count))).verdict
            for _ in range(200)
        ]
        assert verdicts.count("better") >= 190
        assert verdicts.count("worse") == 0


def test_a_verdict_says_which_is_better_and_by_how_much() -> None:
    low, high = group([1.0, 1.1, 0.9], "low"), group([2.0, 2.1, 1.9], "high")
    verdict = judge(low, high)
    assert (verdict.first, verdict.second, verdict.verdict) == ("low", "high", "better")
    assert verdict.difference == pytest.approx(-1.0)
    # Welch's t by hand: t = -1 / sqrt(0.01 / 3 + 0.01 / 3) = -12.25, 4 degrees of freedom
    assert verdict.p == pytest.approx(0.000255, rel=0.01)
    assert judge(high, low).verdict == "worse"
    assert judge(low, high, lower_is_better=False).verdict == "worse"
    assert judge(high, low, lower_is_better=False).verdict == "better"
    assert judge(high, low, lower_is_better=None).verdict == "different"


def test_a_verdict_needs_a_probability_below_the_level(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = group([1.0, 1.1, 0.9]), group([2.0, 2.1, 1.9])
    p = judge(first, second).p
    assert p is not None
    for level, verdict in ((p, "within noise"), (math.nextafter(p, 1), "better")):
        monkeypatch.setattr("utils.experiments.compare.LEVEL", level)
        assert judge(first, second).verdict == verdict


@pytest.mark.parametrize("counts", [(2, 3), (3, 2), (1, 50), (0, 3), (2, 2)])
def test_fewer_than_three_seeds_on_a_side_are_too_few(counts: tuple[int, int]) -> None:
    first, second = (group(range(count), name) for count, name in zip(counts, "ab", strict=True))
    verdict = judge(first, second)
    assert (verdict.first, verdict.second) == (first.name, second.name)
    assert (verdict.verdict, verdict.p) == ("too few seeds", None)
    assert (verdict.difference is None) == (0 in counts)


def test_values_without_variance_are_compared_exactly() -> None:
    same, less, more = (
        judge(group([1, 1, 1]), group([other] * 3))
        for other in (1, 2, 0)  # scipy's p would be NaN for the first
    )
    assert (same.verdict, same.p) == ("within noise", 1.0)
    assert (less.verdict, less.p) == ("better", 0.0)
    assert (more.verdict, more.p) == ("worse", 0.0)


@pytest.mark.parametrize("others", [[1.0, 1.1, 1.2], [2.0, 2.1, 2.2]])
def test_one_side_without_variance_is_judged_without_a_warning(others: list[float]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        verdict = judge(group([1, 1, 1]), group(others))
    assert verdict.verdict == ("better" if others[0] == 2 else "within noise")


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_mean_that_is_not_finite_has_its_own_verdict(broken: float) -> None:
    verdict = judge(group([1, 2, broken], "a"), group([1, 2, 3], "b"))
    assert (verdict.first, verdict.second) == ("a", "b")
    assert (verdict.verdict, verdict.p) == ("not finite", None)
    assert verdict_words(verdict) == ("not finite", "a mean is infinite or not a number")
    assert repr(verdict.difference) == repr(broken)


def test_runs_that_differ_only_in_their_seed_are_one_group(runs_dir: Path) -> None:
    runs = [*seeds(runs_dir, "a", [1, 1.1, 0.9]), *seeds(runs_dir, "b", [2, 2.1, 1.9], settings={"n_embd": 64})]
    comparison = compare(runs)
    assert [(group.name, group.runs, group.finals) for group in comparison.groups] == [
        ("a", ("a0", "a1", "a2"), (1.0, 1.1, 0.9)),
        ("b", ("b0", "b1", "b2"), (2.0, 2.1, 1.9)),
    ]
    (verdict,) = comparison.verdicts
    assert (verdict.first, verdict.second, verdict.verdict) == ("a", "b", "better")
    assert comparison.left_out == []


def test_settings_of_logging_and_folders_do_not_split_a_group(runs_dir: Path) -> None:
    runs = [
        indexed(runs_dir, "a", settings={"seed": 1}, metrics=training_records([1.0])),
        indexed(runs_dir, "b", settings={"seed": 2, "log_interval": 5, "note": "x"}, metrics=training_records([1.0])),
        indexed(runs_dir, "c", settings={"corpora_dir": "y", "run_tag": "c"}, metrics=training_records([1.0])),
    ]
    assert len(compare(runs).groups) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"patch": "diff --git a/model.py b/model.py\n+1\n"}, "uncommitted code in model.py"),
        ({"git": {"commit": "d" * 40}}, "commit dddddddddd, not cccccccccc"),
        ({"resolved": {**RESOLVED, "corpus_hash": "another"}}, "corpus another, not corpus"),
        ({"resolved": {**RESOLVED, "tokenizer_hash": "another"}}, "tokenizer another, not tokenizer"),
        *(
            ({"resolved": {**RESOLVED, f"{kind}_hash": "e" * 64}}, f"{kind} eeeeeeeeee, not {kind}")
            for kind in ("corpus", "tokenizer")
        ),
        (
            {"settings": {"tokenizer": "byte"}, "resolved": {**RESOLVED, "tokenizer_hash": "another"}},
            "tokenizer byte, not char",
        ),
        (
            {"settings": {"dataset": "notes.txt"}, "resolved": {**RESOLVED, "corpus_hash": "another"}},
            "corpus notes.txt, not pydocs",
        ),
        ({"git": None, "patch": ""}, "commit unknown, not cccccccccc"),
        ({"parent": FORK | {"step": 1234}}, f"first weights of mother at step 1,234 (fork), not {OF_MOTHER}"),
        ({"patch": "".join(map(FILE_PATCH.format, "edcba"))}, "uncommitted code in a, b, c and 2 more"),
        ({"patch": "".join(map(FILE_PATCH.format, "cba"))}, "uncommitted code in a, b, c"),
        ({"resolved": {**RESOLVED, "dtype": "bfloat16"}}, "dtype bfloat16, not float32"),
        ({"settings": {"dropout": 0.1, "n_layer": 2}}, "dropout 0.1, not 0; n_layer 2, not 4"),
        ({"parent": None}, "first weights none, not of mother at step 1 (fork)"),
        (
            {"parent": FORK | {"run": "father"}},
            "first weights of father at step 1 (fork), not of mother at step 1 (fork)",
        ),
        ({"parent": FORK | {"step": 2}}, "first weights of mother at step 2 (fork), not of mother at step 1 (fork)"),
        (
            {"parent": FORK | {"relation": "init"}},
            "first weights of mother at step 1 (init), not of mother at step 1 (fork)",
        ),
    ],
    ids=str,
)
def test_runs_with_other_code_corpus_or_settings_are_separate_groups_with_the_reason(
    runs_dir: Path, change: dict[str, Any], words: str
) -> None:
    runs = [
        indexed(runs_dir, "a", tag="x", metrics=training_records([1.0]), parent=FORK),
        indexed(runs_dir, "b", tag="x", metrics=training_records([2.0]), **{"parent": FORK, **change}),
    ]
    assert len(compare([runs[0], indexed(runs_dir, "c", metrics=training_records([1.0]), parent=FORK)]).groups) == 1
    comparison = compare(runs)
    assert [group.runs for group in comparison.groups] == [("a",), ("b",)]
    assert len({group.name for group in comparison.groups}) == 2
    assert [verdict.verdict for verdict in comparison.verdicts] == ["too few seeds"]
    first, second = (group.name for group in comparison.groups)
    assert comparison.splits == [f"{second} differs from {first}: {words}"]


@pytest.mark.parametrize(("chosen", "words"), [(2, "n_head 2, not 1"), (1, "head_dim 2, not 1")])
def test_a_derived_setting_is_named_only_if_nothing_else_differs(runs_dir: Path, chosen: int, words: str) -> None:
    runs = [
        indexed(
            runs_dir,
            str(n),
            tag="x",
            metrics=training_records([1.0]),
            settings={"n_head": n_head, "head_dim": None},
            resolved={"head_dim": n},
        )
        for n, n_head in ((1, 1), (2, chosen))
    ]
    assert [split.split(": ")[1] for split in compare(runs).splits] == [words]


def test_a_reproduction_belongs_to_the_group_of_the_run_that_it_repeats(runs_dir: Path) -> None:
    again = {"run": "a", "path": "/a", "step": 0, "relation": "reproduction"}
    runs = [
        indexed(runs_dir, "a", metrics=training_records([1.0])),
        indexed(runs_dir, "b", metrics=training_records([1.0]), parent=again),
    ]
    assert [group.runs for group in compare(runs).groups] == [("a", "b")]


def test_groups_of_the_same_tag_are_named_by_their_settings(runs_dir: Path) -> None:
    runs = [
        indexed(runs_dir, "a", tag="x", settings={"n_layer": 1, "seed": 1}, metrics=training_records([1.0])),
        indexed(runs_dir, "b", tag="x", settings={"n_layer": 2, "seed": 2}, metrics=training_records([2.0])),
    ]
    assert [group.name for group in compare(runs).groups] == ["x n_layer=1", "x n_layer=2"]


def test_a_group_name_has_at_most_three_settings_and_a_number_if_still_ambiguous(runs_dir: Path) -> None:
    settings = [{"n_layer": 1, "n_head": 2, "dropout": 0.1, "beta1": beta1} for beta1 in (0.5, 0.6)]
    changes: list[dict[str, Any]] = [{"settings": {**one, "seed": i}} for i, one in enumerate(settings)]
    changes.append({"settings": {"n_layer": 2, "n_head": 1, "dropout": 0.2, "seed": 7}})
    runs = [
        indexed(runs_dir, f"run{i}", tag="x", metrics=training_records([1.0]), **change)
        for i, change in enumerate(changes)
    ]
    names = [group.name for group in compare(runs).groups]
    words = " ".join(names[0].split()[1:4]), " ".join(names[2].split()[1:])
    assert {*words[0].split()} == {"n_layer=1", "n_head=2", "dropout=0.1"}
    assert {*words[1].split()} == {"n_layer=2", "n_head=1", "dropout=0.2"}
    assert names == [f"x {words[0]} (1)", f"x {words[0]} (2)", f"x {words[1]}"]
    alike = [
        indexed(runs_dir, f"a{i}", tag="y", metrics=training_records([1.0]), git=None, patch=p) for i, p in PATCHES
    ]
    assert [group.name for group in compare(alike).groups] == ["y (1)", "y (2)"]


def test_a_run_given_twice_counts_once(runs_dir: Path) -> None:
    one = seeds(runs_dir, "a", [1.0])
    other = seeds(runs_dir, "b", [1.01], settings={"n_embd": 64})
    comparison = compare([*one * 3, *other * 3])
    assert [group.finals for group in comparison.groups] == [(1.0,), (1.01,)]
    assert comparison.verdicts[0].verdict == "too few seeds"


def test_repetitions_with_the_same_seed_count_as_one_seed(runs_dir: Path) -> None:
    runs = [
        indexed(runs_dir, f"{tag}{i}", tag=tag, settings={"n_embd": width}, metrics=training_records([9, final]))
        for tag, width, final in (("a", 64, 1.0), ("b", 128, 1.01))
        for i in range(3)
    ]
    assert compare(runs).verdicts[0].verdict == "too few seeds"


def test_the_interval_around_the_mean_is_that_of_students_t(runs_dir: Path) -> None:
    (group,) = compare(seeds(runs_dir, "a", [1.0, 2.0, 3.0])).groups
    assert (group.mean, group.deviation) == (2.0, 1.0)
    half = 4.302653 / math.sqrt(3)  # the 97.5% point of t with 2 degrees of freedom
    assert group.interval == pytest.approx((2 - half, 2 + half))


def test_one_or_no_result_has_no_interval(runs_dir: Path) -> None:
    runs = [*seeds(runs_dir, "a", [1.0]), *seeds(runs_dir, "b", [2.0], settings={"n_layer": 1}, status="failed")]
    one, none = compare(runs).groups
    assert (one.mean, one.deviation, one.interval) == (1.0, None, None)
    assert (none.finals, none.mean, none.interval) == ((), None, None)


def test_a_run_that_did_not_complete_has_no_result(runs_dir: Path) -> None:
    complete = seeds(runs_dir, "a", [1.0, 2.0])
    failed = indexed(runs_dir, "f", status="failed", settings={"seed": 9}, metrics=training_records([9.0, 5.0]))
    comparison = compare([*complete, failed])
    assert comparison.groups[0].finals == (1.0, 2.0)
    assert comparison.left_out == ["f: failed, so its last value is not a result"]


def test_a_group_with_a_loss_that_is_not_finite_has_no_interval(runs_dir: Path) -> None:
    (group,) = compare(seeds(runs_dir, "a", [1.0, "nan", 3.0])).groups
    assert math.isnan(group.finals[1])
    assert group.interval is None


def test_a_run_without_the_metric_is_left_out_with_the_reason(runs_dir: Path) -> None:
    runs = [
        *seeds(runs_dir, "a", [1.0, 2.0]),
        indexed(runs_dir, "silent", metrics=[{"step": 1, "time": 1.0, "lr": 0.1}]),
    ]
    (runs_dir / "empty").mkdir()
    comparison = compare([read_run(runs_dir / "empty"), *runs])
    assert comparison.groups[0].runs == ("a0", "a1")
    assert sorted(comparison.left_out, reverse=True) == ["silent: no val/loss in its log", "empty: an empty folder"]


def test_fewer_than_two_runs_with_the_metric_are_reported(runs_dir: Path) -> None:
    run = seeds(runs_dir, "a", [1.0])
    with pytest.raises(UserError, match=r"a comparison needs two runs with val/loss; silent: no val/loss"):
        compare([*run, indexed(runs_dir, "silent")])
    with pytest.raises(UserError, match="two runs with nonsense"):
        compare(run, "nonsense")


@pytest.mark.parametrize(
    "line", ["{\n", "[1]\n", '{"val/loss": 1}\n', '{"step": 1, "time": 1.0, "val/loss": "low"}\n', b"\xff\n"]
)
def test_a_run_with_a_damaged_log_is_left_out_of_the_comparison(runs_dir: Path, line: str | bytes) -> None:
    runs = seeds(runs_dir, "a", [1.0, 2.0])
    bad = make_run(runs_dir, "bad")
    write(bad / "logs" / "metrics.jsonl", line)
    comparison = compare([read_run(bad), *runs])
    assert comparison.groups[0].runs == ("a0", "a1")
    assert [text.partition(":")[0] for text in comparison.left_out] == ["bad"]


def curve_records(losses: Sequence[float], tokens: int, seconds: float) -> list[dict[str, Any]]:
    """A val/loss every 10 steps, with other records in between, and this many tokens and seconds per step."""
    records = []
    for i, loss in enumerate(losses):
        for step, facts in ((10 * i, {"val/loss": loss}), (10 * i + 5, {"train/loss": 0.5})):
            records.append({"step": step, "time": 500 + seconds * step, "tokens": tokens * step, **facts})
    return records


def test_metrics_are_compared_at_equal_steps_tokens_and_time(runs_dir: Path) -> None:
    one = indexed(runs_dir, "a", metrics=curve_records([5, 4, 3, 2, 1], tokens=100, seconds=1))
    other = indexed(
        runs_dir, "b", settings={"batch_size": 48}, metrics=curve_records([6, 5.5, 5], tokens=400, seconds=2)
    )
    at = compare([one, other]).at
    assert at["step"] == [(10, [4.0, 5.5]), (20, [3.0, 5.0])]  # the steps at which both were evaluated
    interpolated = [(1000.0, [4.0, 5.875]), (2000.0, [3.0, 5.75]), (3000.0, [2.0, 5.625]), (4000.0, [1.0, 5.5])]
    assert at["tokens"] == interpolated  # only at 4000 were both evaluated
    assert at["time"] == [(20.0, [3.0, 5.5]), (40.0, [1.0, 5.0])]


def test_a_group_shows_the_mean_of_its_runs_at_each_place(runs_dir: Path) -> None:
    runs = seeds(runs_dir, "a", [1.0, 2.0])
    assert compare(runs).at["step"] == [(3, [6.75]), (5, [5.25]), (8, [pytest.approx(3.0)]), (10, [1.5])]


def test_a_run_without_a_value_yet_leaves_the_place_empty(runs_dir: Path) -> None:
    runs = [
        indexed(runs_dir, "a", settings={"seed": 1}, metrics=training_records([3.0, 2.0, 1.0])),
        indexed(runs_dir, "b", settings={"seed": 2}, metrics=training_records([3.0, 2.0, 1.0])[2:]),
    ]
    assert compare(runs).at["step"] == [(5.0, [None]), (10.0, [None]), (15.0, [None]), (20.0, [1.0])]


def test_a_curve_leaves_out_pauses_between_sessions(runs_dir: Path) -> None:
    records = training_records([3.0, 2.0, 1.0])
    records[2]["time"] += 86_400  # resumed the next day
    resumed = [{"time": datetime.fromtimestamp(records[2]["time"] - 5, UTC).isoformat()}]
    run = make_run(runs_dir, "run", metrics=records, resumes=resumed)
    assert read_curve(run, "val/loss") == Curve([0, 10, 20], [0, 1000, 2000], [0.0, 10.0, 10.0], [3.0, 2.0, 1.0])
    at_once = [{"time": datetime.fromtimestamp(records[2]["time"], UTC).isoformat()}]  # at the time of the next record
    assert read_curve(make_run(runs_dir, "b", metrics=records, resumes=at_once), "val/loss").time == [0.0, 10.0, 10.0]


def test_a_clock_that_was_set_back_takes_no_time_from_a_curve(runs_dir: Path) -> None:
    times = (1000.0, 1010.0, 500.0, 520.0)
    metrics = [{"step": i, "time": time, "val/loss": 3.0} for i, time in enumerate(times)]
    assert read_curve(make_run(runs_dir, "run", metrics=metrics), "val/loss").time == [0.0, 10.0, 10.0, 30.0]


def test_a_record_without_tokens_counts_zero_tokens(runs_dir: Path) -> None:
    run = make_run(runs_dir, "run", metrics=[{"step": 1, "time": 1.0, "val/loss": 3.0}])
    assert read_curve(run, "val/loss").tokens == [0]


def test_slow_steps_within_a_session_are_not_pauses(runs_dir: Path) -> None:
    run = make_run(runs_dir, "run", metrics=[{**r, "time": 9.0 * r["time"]} for r in training_records([3, 2, 1])])
    assert read_curve(run, "val/loss").time == [0.0, 90.0, 180.0]


def test_a_curve_has_no_value_before_its_start_and_may_be_empty(runs_dir: Path) -> None:
    assert read_curve(runs_dir / "nowhere", "val/loss").values == []
    curve = Curve([10], [100], [1.0], [3.0])
    assert (curve.at("step", 9), curve.at("step", 10), curve.at("step", 99)) == (None, 3.0, 3.0)


def test_the_metrics_of_a_log_are_its_names_without_step_and_time(runs_dir: Path) -> None:
    records = [{"step": 1, "time": 1.0, "tokens": 3, "lr": 0.1}, {"step": 2, "time": 2.0, "val/loss": 1.0}]
    assert logged_metrics(make_run(runs_dir, "run", metrics=records)) == {"tokens", "lr", "val/loss"}


def test_a_higher_value_is_better_if_the_metric_says_so(runs_dir: Path) -> None:
    assert [metric_direction(name, []) for name in ("val/loss", "tokens_per_second", "lr")] == [
        "lower",
        "higher",
        "none",
    ]
    runs = []
    for tag, width, base in (("slow", 64, 10.0), ("fast", 32, 99.0)):
        for i in range(3):
            records = [{"step": 1, "time": 1.0, "tokens": 1, "tokens_per_second": base + i / 10}]
            runs.append(indexed(runs_dir, f"{tag}{i}", tag=tag, settings={"seed": i, "n_embd": width}, metrics=records))
    assert compare(runs, "tokens_per_second").verdicts[0].verdict == "worse"


def test_a_metric_of_a_callback_has_the_direction_in_the_registry_of_the_run(runs_dir: Path) -> None:
    runs = []
    for tag, width, base in (("bad", 64, 0.1), ("good", 32, 0.9)):
        for i in range(3):
            records = [{"step": 1, "time": 1.0, "tokens": 1, "planted_accuracy": base + i / 100}]
            path = make_run(runs_dir, f"{tag}{i}", tag=tag, settings={"seed": i, "n_embd": width}, metrics=records)
            registry = [{"name": "planted_accuracy", "unit": "1", "direction": "higher", "views": []}]
            write(path / "meta" / "metrics.json", registry)
            runs.append(read_run(path))
    assert compare(runs, "planted_accuracy").verdicts[0].verdict == "worse"


def test_three_groups_have_three_verdicts(runs_dir: Path) -> None:
    runs = [run for i in range(3) for run in seeds(runs_dir, "abc"[i], [i, i], settings={"n_layer": i + 1})]
    assert [(v.first, v.second) for v in compare(runs).verdicts] == [("a", "b"), ("a", "c"), ("b", "c")]


@pytest.mark.parametrize(
    "registry", ["{", 7, [7], [{"direction": "higher"}], [{"name": "val/loss"}], {"name": "val/loss"}]
)
def test_a_damaged_registry_does_not_change_known_directions(runs_dir: Path, registry: Any) -> None:
    path = make_run(runs_dir, "run")
    write(path / "meta" / "metrics.json", registry)
    assert metric_direction("val/loss", [read_run(path)]) == "lower"
    assert metric_direction("of_a_callback", [read_run(path)]) == "none"


def test_a_group_of_several_tags_is_named_after_its_first_complete_run(runs_dir: Path) -> None:
    runs = [
        indexed(runs_dir, tag, tag=tag, settings={"seed": i}, metrics=training_records([1.0]))
        for i, tag in enumerate(("wide-seed2", "wide-seed10", "wide", "thin"))
    ]
    assert [group.name for group in compare(runs).groups] == ["wide-seed2"]
    unfinished = indexed(runs_dir, "first", settings={"seed": 9}, metrics=training_records([1.0]), status="interrupted")
    assert [group.name for group in compare([unfinished, *runs]).groups] == ["wide-seed2"]


@pytest.mark.parametrize("other", ["tokenizer", "another"])
@pytest.mark.parametrize("asked", [None, "val/loss", "train/loss", "lr"])
@pytest.mark.parametrize("logged", [True, False])
def test_losses_of_different_tokenizers_are_compared_by_bits_per_byte(
    runs_dir: Path, other: str, asked: str | None, logged: bool
) -> None:
    summary = {"val/loss": 2.0, **({"val/bits_per_byte": 1.0} if logged else {})}
    runs = [
        indexed(runs_dir, "a", summary={"val/loss": 2.0, "val/bits_per_byte": 1.0}),
        indexed(runs_dir, "b", summary=summary, resolved={**RESOLVED, "tokenizer_hash": other}),
        indexed(runs_dir, "c", summary={}),  # without any loss
    ]
    differ = "the tokenizers differ"
    if other == "tokenizer" or asked == "lr":
        expected = (asked or "val/loss", None)
    elif asked is not None:
        bits = {"val/loss": "val/bits_per_byte", "train/loss": "train/bits_per_byte"}[asked]
        expected = (asked, f"{differ}, and {asked} is per token: only {bits} is comparable")
    elif logged:
        expected = (
            "val/bits_per_byte",
            f"{differ}, so the runs are compared by val/bits_per_byte: val/loss is per token",
        )
    else:
        expected = ("val/loss", f"{differ}, and val/loss is per token, but b has not logged val/bits_per_byte")
    assert comparable_metric(runs, asked) == expected


def test_an_unfinished_run_does_not_shorten_the_tables(runs_dir: Path) -> None:
    for seed, losses in ((1, [9, 5, 3]), (2, [9, 6, 4])):
        make_run(runs_dir, f"base{seed}", settings={"seed": seed}, metrics=training_records(losses), tag="base")
        make_run(
            runs_dir,
            f"fast{seed}",
            settings={"seed": seed, "dropout": 0.1},
            metrics=training_records(losses),
            tag="fast",
        )
    indexed(runs_dir, "base3", settings={"seed": 3}, metrics=training_records([9]), tag="base", status="interrupted")
    found = compare([read_run(path) for path in sorted(runs_dir.iterdir())])
    assert found.at["step"] == [(10.0, [5.5, 5.5]), (20.0, [3.5, 3.5])]


def test_a_repeated_seed_counts_once_in_the_tables_too(runs_dir: Path) -> None:
    runs = [
        indexed(runs_dir, name, settings={"seed": seed}, metrics=training_records([9, loss]), tag="base")
        for name, seed, loss in (("a", 1, 2.0), ("b", 2, 4.0), ("c", 1, 8.0))
    ]
    found = compare(runs)
    assert found.groups[0].mean == 3.0
    assert found.at["step"][-1] == (10.0, [3.0])


def test_runs_with_the_same_id_in_different_folders_keep_their_numbers(runs_dir: Path, tmp_path: Path) -> None:
    first = indexed(runs_dir, "run", settings={"seed": 1}, metrics=training_records([9, 2.0]), tag="a")
    other = indexed(
        tmp_path / "other", "run", settings={"seed": 1, "dropout": 0.1}, metrics=training_records([9, 3.0]), tag="b"
    )
    found = compare([first, other])
    assert [group.finals for group in found.groups] == [(2.0,), (3.0,)]
    assert found.at["step"][-1] == (10.0, [2.0, 3.0])


@pytest.mark.parametrize(("direction", "green"), [("lower", ["0.5000"]), ("higher", ["0.9000"]), ("none", [])])
def test_the_better_value_is_green(runs_dir: Path, direction: str, green: list[str]) -> None:
    runs = []
    for name, value in (("a", 0.9), ("b", 0.5)):
        records = [{"step": 10, "time": 1.0, "tokens": 1, "mine": value}]
        run = indexed(runs_dir, name, settings={"learning_rate": value}, metrics=records)
        write(run.path / "meta" / "metrics.json", [{"name": "mine", "direction": direction}])
        runs.append(run)
    found = compare(runs, "mine")
    console = Console(record=True, width=100, color_system="standard", file=io.StringIO(), force_terminal=True)
    for part in comparison_screen(replace(found, verdicts=[], groups=[])):
        console.print(part)
    text = console.export_text(styles=True)
    assert sorted(set(re.findall("\x1b\\[32m([0-9.]+)", text))) == green
