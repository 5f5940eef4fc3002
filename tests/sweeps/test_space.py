"""SPACE.yaml: what it may contain, and one line for each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from utils.config.parse import ConfigError
from utils.sweeps.space import Dimension, Goal, Space, read_space

GOOD = """
metric: val/loss
seeds: 2
max_iters: 500
optimizer:
  learning_rate: {log: [1e-4, 1e-2]}
momentum: {range: [0.8, 0.99], when: {optimizer_name: muon}}
n_embd: {range: [64, 500, 64]}
optimizer_name: {choice: [adamw, muon]}
"""


def read(folder: Path, text: str) -> Space:
    path = folder / "space.yaml"
    path.write_text(text, encoding="utf-8")
    return read_space(path, folder)


def test_conditional_settings_are_ordered_after_those_that_they_depend_on(tmp_path: Path) -> None:
    space = read(tmp_path, GOOD)
    assert space.dimensions == (
        Dimension("learning_rate", "log", (1e-4, 1e-2)),
        Dimension("n_embd", "range", (64, 500, 64), whole=True),
        Dimension("optimizer_name", "choice", ("adamw", "muon")),
        Dimension("momentum", "range", (0.8, 0.99), {"optimizer_name": ("muon",)}),
    )
    assert {key: setting.value for key, setting in space.fixed.items()} == {"max_iters": 500}
    assert space.seeds_from(7) == [7, 8]
    assert space.goal == Goal("val/loss")
    assert Space.from_json(space.as_json()).dimensions == space.dimensions


@pytest.mark.parametrize(
    ("text", "goal", "maximize"),
    [
        ("metric: val/accuracy", Goal("val/accuracy"), True),
        ("metric: val/bits_per_byte", Goal("val/bits_per_byte"), False),
        ("metric: {seconds_to_loss: 2.5}", Goal(seconds_to_loss=2.5), False),
        ("", Goal("val/loss"), False),
    ],
)
def test_the_metric_of_a_space_determines_its_goal(tmp_path: Path, text: str, goal: Goal, maximize: bool) -> None:
    space = read(tmp_path, f"{text}\nn_layer: {{range: [1, 4]}}\n")
    assert (space.goal, space.goal.maximize) == (goal, maximize)
    assert Space.from_json(space.as_json()).goal == goal


def test_none_is_a_choice_of_some_settings_and_a_missing_value_of_others(tmp_path: Path) -> None:
    text = "position: rope\nrope_scaling: {choice: [none, linear]}\nlogit_softcap: {choice: [none, 30]}\n"
    space = read(tmp_path, f"{text}rope_factor: {{range: [1, 4], when: {{rope_scaling: none}}}}\n")
    assert [one.values for one in space.dimensions] == [("none", "linear"), (None, 30), (1.0, 4.0)]
    assert space.dimensions[-1].when == {"rope_scaling": ("none",)}


def test_ranges_with_a_step_and_integers_have_countable_values(tmp_path: Path) -> None:
    space = read(tmp_path, "n_layer: {range: [1, 3]}\ndropout: {range: [0, 0.3, 0.1]}\nlearning_rate: {log: [1e-4, 1]}")
    assert [dimension.countable_values() for dimension in space.dimensions] == [[1, 2, 3], [0.0, 0.1, 0.2, 0.3], None]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: {log: [1, 2]}", "unknown setting learning_rat; did you mean learning_rate?"),
        (
            "model:\n  n_embed: {range: [1, 2]}",
            "space.yaml:2: unknown key n_embed in section model; did you mean n_embd?",
        ),
        ("n_layer: {range: [4, 1]}", "space.yaml:1: n_layer: range: the range is empty: 4 is above 1"),
        ("n_layer: {range: [4, 4]}", "has one value only: write n_layer: 4"),
        ("learning_rate: {log: [-1, 1]}", "learning_rate: log: expected bounds above 0, got -1"),
        ("dropout: {log: [0, 0.5]}", "dropout: log: expected bounds above 0, got 0"),
        ("n_layer: {range: [1, 4, 0]}", "the step must be above 0, not 0"),
        ("n_layer: {range: [1, 4, 9]}", "the step 9 is wider than the range, 1 to 4"),
        ("n_layer: [1, 2]", "n_layer: expected {choice: [1, 2]} for a search, or one value, got a list"),
        ("n_layer: {range: [1, 2.5]}", "expected whole numbers, got [1, 2.5]"),
        ("n_layer: {range: [0, 4]}", "n_layer: expected integer >= 1"),
        ("n_layer: {range: [a, 4]}", "expected [LOW, HIGH] or [LOW, HIGH, STEP], got ['a', 4]"),
        ("n_layer: {range: [1]}", "expected [LOW, HIGH] or [LOW, HIGH, STEP], got [1]"),
        ("learning_rate: {log: [1e-4, .inf]}", "log: expected [LOW, HIGH]"),
        ("learning_rate: {log: 3}", "log: expected a list, got 3"),
        ("n_layer: {choice: []}", "choice: expected at least one value, got an empty list"),
        ("n_layer: {choice: [1, 1]}", "choice: a value is given twice"),
        ("n_layer: {choice: [[1]]}", "choice: expected numbers, texts, true, false or none"),
        ("optimizer_name: {choice: [adam]}", "got 'adam'; did you mean adamw?"),
        ("optimizer_name: {range: [1, 2]}", "range: is for numbers, but the setting takes adamw or muon: use choice"),
        ("n_layer: {rang: [1, 2]}", "expected one of log, range, choice, got rang; did you mean range?"),
        ("n_layer: {range: [1, 2], choice: [1]}", "expected one of log, range, choice, got range, choice"),
        ("n_layer: {}", "expected one of log, range, choice, got nothing"),
        ("n_layer: {range: [1, 2], when: {optimiser: x}}", "when: unknown setting optimiser; did you mean optimizer"),
        ("n_layer: {range: [1, 2], when: {n_head: 1}}", "when: n_head is neither searched nor fixed here"),
        (
            "n_layer: {range: [1, 2], when: {optimizer_name: muon}}\noptimizer_name: {choice: [adamw]}",
            "when: optimizer_name is never muon",
        ),
        ("n_layer: {range: [1, 2], when: {n_layer: 1}}", "n_layer: when: depends on itself"),
        ("n_layer: {range: [1, 2], when: 3}", "when: expected a mapping, SETTING: VALUE, got 3"),
        ("metric: val/los\nn_layer: {range: [1, 2]}", "got 'val/los'; did you mean val/loss?"),
        ("metric: tokens\nn_layer: {range: [1, 2]}", "space.yaml:1: metric: expected val/loss"),
        ("metric: {seconds_to_loss: -1}\nn_layer: {range: [1, 2]}", "seconds_to_loss: expected a loss above 0, got -1"),
        ("seeds: 0\nn_layer: {range: [1, 2]}", "seeds: expected a number of runs >= 1 or a list of different seeds"),
        ("seeds: [1, 1]\nn_layer: {range: [1, 2]}", "a list of different seeds, got [1, 1]"),
        ("seeds: 1000\nn_layer: {range: [1, 2]}", "seeds: 1,000 runs of each trial are more than 100"),
        ("seeds: 2\nseed: {choice: [1, 2]}", "seed: is searched, so seeds (the runs of each trial) must be 1"),
        ("run_tag: x\nn_layer: {range: [1, 2]}", "run_tag: is set for each trial by the sweep itself"),
        ("n_layer: 3", "space.yaml:1: nothing is searched"),
        ("", "space.yaml:1: expected settings and what to search for each, got nothing"),
        ("- 1", "expected settings and what to search for each, got a list"),
        ("n_layer: {choice: [1, 2]}\nn_layer: 3", "space.yaml:2: n_layer is set twice in this file"),
    ],
)
def test_a_mistake_in_a_space_is_reported_in_one_line_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(tmp_path, text)
    (line,) = str(error.value).splitlines()
    assert line.startswith("space.yaml:")
    assert message in line


def test_all_mistakes_in_a_space_are_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        read(tmp_path, "n_layers: {range: [1, 2]}\nn_head: {log: [0, 2]}\n")
    assert [line.split(": ")[0] for line in str(error.value).splitlines()] == ["space.yaml:1", "space.yaml:2"]
