"""SPACE.yaml: the settings that a sweep searches, those that it fixes, and its goal.

    metric: val/loss                       # or another metric of the log, or {seconds_to_loss: 2.5}
    seeds: 1                               # runs per trial, whose values are averaged; or a list of seeds
    max_iters: 500                         # a fixed setting
    learning_rate: {log: [1e-4, 1e-2]}
    n_embd: {range: [64, 512, 64]}         # from, to, and an optional step
    optimizer_name: {choice: [adamw, muon]}
    momentum: {range: [0.8, 0.99], when: {optimizer_name: muon}}

Like a configuration file, it may have sections. A setting whose condition (`when`) does not hold keeps its fixed or
configured value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_origin

from utils.config.fields import FIELDS, SECTION_OF, SECTIONS, expected
from utils.config.loader import Setting, check_values, is_none, relative_name, unknown_key
from utils.config.parse import ConfigError, Lines, parse_file
from utils.errors import nearest, shown
from utils.runs.metrics import metric, registered_metrics

Value = bool | int | float | str | None
Kind = Literal["log", "range", "choice"]
KINDS: tuple[Kind, ...] = ("log", "range", "choice")
METRIC, SEEDS, WHEN = "metric", "seeds", "when"
SECONDS_TO_LOSS = "seconds_to_loss"
VAL_LOSS = "val/loss"
MOST_SEEDS = 100
SET_BY_SWEEP = ("run_tag", "stop_at_step", "eval_at")  # settings that the sweep sets for each trial


@dataclass(frozen=True)
class Dimension:
    """One setting that is searched.

    values: for `log`, the smallest and largest value; for `range`, these and an optional step; for `choice`, all.
    when: for each setting of the condition, its values with which this one is searched; all of them must match.
    whole: whether the setting takes whole numbers only.
    """

    key: str
    kind: Kind
    values: tuple[Value, ...]
    when: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)
    whole: bool = False

    def applies(self, values: Mapping[str, Value]) -> bool:
        """Whether the condition holds for the values of the other settings."""
        return all(values.get(key) in allowed for key, allowed in self.when.items())

    def countable_values(self) -> list[Value] | None:
        """All values, or None if they cannot be counted."""
        if self.kind == "choice":
            return list(self.values)
        low, high, *step = (float(value) for value in self.values if isinstance(value, int | float))
        if self.kind == "log" or not (step or self.whole):
            return None
        width = step[0] if step else 1.0
        values = [low + number * width for number in range(math.floor((high - low) / width + 1e-9) + 1)]
        return [int(value) if self.whole else float(f"{value:.12g}") for value in values]

    def as_json(self) -> dict[str, Any]:
        when = {WHEN: {key: list(values) for key, values in self.when.items()}} if self.when else {}
        return {self.kind: list(self.values), **when}


@dataclass(frozen=True)
class Goal:
    """What a sweep optimises.

    metric: the name of the metric in the log.
    seconds_to_loss: if set, the time until val/loss reaches this value is minimised instead.
    """

    metric: str = VAL_LOSS
    seconds_to_loss: float | None = None

    @property
    def maximize(self) -> bool:
        return self.seconds_to_loss is None and metric(self.metric).direction == "higher"

    def __str__(self) -> str:
        return self.metric if self.seconds_to_loss is None else f"seconds to {VAL_LOSS} {self.seconds_to_loss:g}"

    def as_json(self) -> Any:
        return self.metric if self.seconds_to_loss is None else {SECONDS_TO_LOSS: self.seconds_to_loss}


@dataclass(frozen=True)
class Space:
    """A search space.

    dimensions: the settings that are searched, each after those that its condition names.
    fixed: settings that are the same in all trials, with the place where each is set.
    seeds: the number of runs for each trial, whose seeds count up from the configured one; or the seeds themselves.
    """

    dimensions: tuple[Dimension, ...]
    fixed: Mapping[str, Setting] = field(default_factory=dict)
    seeds: int | tuple[int, ...] = 1
    goal: Goal = Goal()

    def as_json(self) -> dict[str, Any]:
        """The space as sweep.json records it; the fixed settings are in full_config.json instead."""
        return {
            METRIC: self.goal.as_json(),
            SEEDS: list(self.seeds) if isinstance(self.seeds, tuple) else self.seeds,
            "settings": {dimension.key: dimension.as_json() for dimension in self.dimensions},
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Space:
        """The space that `as_json` describes."""
        goal = data[METRIC]
        seeds = data[SEEDS]
        dimensions = []
        for key, spec in data["settings"].items():
            kind = next(kind for kind in KINDS if kind in spec)
            when = {other: tuple(values) for other, values in spec.get(WHEN, {}).items()}
            dimensions.append(Dimension(key, kind, tuple(spec[kind]), when, is_whole(key)))
        return cls(
            tuple(dimensions),
            seeds=tuple(seeds) if isinstance(seeds, list) else seeds,
            goal=Goal(goal) if isinstance(goal, str) else Goal(seconds_to_loss=goal[SECONDS_TO_LOSS]),
        )

    def seeds_from(self, configured: int) -> list[int]:
        """The seeds of the runs of a trial."""
        return list(self.seeds) if isinstance(self.seeds, tuple) else [configured + n for n in range(self.seeds)]


def is_whole(key: str) -> bool:
    return expected(key).startswith("integer")


def read_space(path: Path, root: Path) -> Space:
    """Read and check SPACE.yaml.

    Args:
        root: the folder to which file names in messages are relative.

    Raises:
        ConfigError: one line for each mistake, with its place and the nearest valid name.
    """
    return _Reader(path, relative_name(path, root)).read()


class _Reader:
    """Reads one file and collects its mistakes, each with its line number."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self.mistakes: list[str] = []
        self.lines: dict[str, int] = {}

    def read(self) -> Space:
        document, lines = parse_file(self.path, self.name)
        if not isinstance(document, dict) or not document:
            found = "nothing" if not document else f"a {type(document).__name__}"
            raise ConfigError(f"{self.name}:1: expected settings and what to search for each, got {found}")
        specs: dict[str, Mapping[Any, Any]] = {}
        fixed: dict[str, Setting] = {}
        for key, value, line in self._settings(document, lines):
            self.lines[key] = line
            if key in SET_BY_SWEEP or (key == "runs_dir" and isinstance(value, dict)):
                self._mistake(key, "is set for each trial by the sweep itself")
            elif isinstance(value, dict):
                specs[key] = value
            elif isinstance(value, list) and get_origin(FIELDS[key].annotation) is not tuple:
                self._mistake(key, f"expected {{choice: {shown(value)}}} for a search, or one value, got a list")
            else:
                fixed[key] = Setting(value, f"{self.name}:{line}")
        goal = self._goal(document.get(METRIC, VAL_LOSS), lines[id(document)].get(METRIC, 1))
        seeds = self._seeds(document.get(SEEDS, 1), lines[id(document)].get(SEEDS, 1))
        self._check(fixed)
        dimensions = [one for key, spec in specs.items() if (one := self._dimension(key, spec)) is not None]
        if not specs and not self.mistakes:
            self.mistakes.append(f"{self.name}:1: nothing is searched: expected a setting with {_one_of(KINDS)}")
        if seeds != 1 and "seed" in specs:
            self._mistake("seed", "is searched, so seeds (the runs of each trial) must be 1")
        ordered = self._in_order(dimensions, fixed) if not self.mistakes else dimensions
        if self.mistakes:
            raise ConfigError("\n".join(self.mistakes))
        return Space(tuple(ordered), fixed, seeds, goal)

    def _settings(self, document: Mapping[str, Any], lines: Lines) -> Iterator[tuple[str, Any, int]]:
        """(key, value, line) of each setting, flat or in a section."""
        for key, value in document.items():
            line = lines[id(document)][key]
            if key in (METRIC, SEEDS):
                continue
            if key in SECTIONS and isinstance(value, dict):
                for leaf, spec in value.items():
                    leaf_line = lines[id(value)][leaf]
                    if SECTION_OF.get(leaf) == key:
                        yield leaf, spec, leaf_line
                    else:
                        self.mistakes.append(f"{self.name}:{leaf_line}: {unknown_key(leaf, key)}")
            elif key in FIELDS:
                yield key, value, line
            else:
                hint = nearest(key, [*FIELDS, *SECTIONS, METRIC, SEEDS])
                self.mistakes.append(f"{self.name}:{line}: unknown setting {shown(key)[1:-1]}{hint}")

    def _mistake(self, key: str, words: str) -> None:
        self.mistakes.append(f"{self.name}:{self.lines[key]}: {key}: {words}")

    def _check(self, layer: Mapping[str, Setting]) -> bool:
        """Whether each value is valid by itself; records the mistakes otherwise."""
        try:
            check_values(layer)
        except ConfigError as error:
            self.mistakes += str(error).splitlines()
            return False
        return True

    def _dimension(self, key: str, spec: Mapping[Any, Any]) -> Dimension | None:
        kinds = [kind for kind in spec if kind != WHEN]
        if len(kinds) != 1 or kinds[0] not in KINDS:
            wrong = next((kind for kind in kinds if kind not in KINDS), None)
            hint = nearest(str(wrong), [*KINDS, WHEN]) if wrong is not None else ""
            got = ", ".join(map(str, kinds)) or "nothing"
            self._mistake(key, f"expected one of {', '.join(KINDS)}, got {got}{hint}")
            return None
        kind, given = kinds[0], spec[kinds[0]]
        if not isinstance(given, list):
            self._mistake(key, f"{kind}: expected a list, got {shown(given)}")
            return None
        values = self._choices(key, given) if kind == "choice" else self._bounds(key, kind, given)
        when = self._conditions(key, spec.get(WHEN, {}))
        if values is None or when is None:
            return None
        return Dimension(key, kind, tuple(values), when, is_whole(key))

    def _choices(self, key: str, given: Sequence[Any]) -> list[Value] | None:
        if not given:
            self._mistake(key, "choice: expected at least one value, got an empty list")
            return None
        values = [plain_value(key, value) for value in given]
        for value in values:
            if isinstance(value, list | dict):
                self._mistake(key, f"choice: expected numbers, texts, true, false or none, got {shown(value)}")
                return None
            if value is None and bool in getattr(FIELDS[key].annotation, "__args__", ()):
                self._mistake(key, "choice: expected true or false, got none")
                return None
            if not self._check({key: Setting(value, f"{self.name}:{self.lines[key]}")}):
                return None
        if len({repr(value) for value in values}) < len(values):
            self._mistake(key, f"choice: a value is given twice: {', '.join(map(str, values))}")
            return None
        return values

    def _bounds(self, key: str, kind: str, given: Sequence[Any]) -> list[Value] | None:
        shape = "[LOW, HIGH]" if kind == "log" else "[LOW, HIGH] or [LOW, HIGH, STEP]"
        whole = is_whole(key)
        if not whole and not expected(key).startswith("number"):
            self._mistake(key, f"{kind}: is for numbers, but the setting takes {expected(key)}: use choice")
            return None
        numbers = [plain_value(key, value) for value in given]
        if len(given) not in ((2,) if kind == "log" else (2, 3)) or not all(map(_is_number, numbers)):
            self._mistake(key, f"{kind}: expected {shape}, got {shown(given)}")
            return None
        low, high, *step = numbers
        if whole and any(value != int(value) for value in numbers):
            self._mistake(key, f"{kind}: expected whole numbers, got {shown(given)}")
        elif low > high:
            self._mistake(key, f"{kind}: the range is empty: {low} is above {high}")
        elif low == high:
            self._mistake(key, f"{kind}: the range has one value only: write {key}: {low}")
        elif kind == "log" and low <= 0:
            self._mistake(key, f"log: expected bounds above 0, got {low}")
        elif step and step[0] <= 0:
            self._mistake(key, f"range: the step must be above 0, not {step[0]}")
        elif step and step[0] > high - low:
            self._mistake(key, f"range: the step {step[0]} is wider than the range, {low} to {high}")
        elif all(self._check({key: Setting(bound, f"{self.name}:{self.lines[key]}")}) for bound in (low, high)):
            return [int(value) if whole else float(value) for value in numbers]
        return None

    def _conditions(self, key: str, given: Any) -> dict[str, tuple[Value, ...]] | None:
        if not isinstance(given, dict):
            self._mistake(key, f"when: expected a mapping, SETTING: VALUE, got {shown(given)}")
            return None
        conditions = {}
        for other, wanted in given.items():
            if other not in FIELDS:
                self._mistake(key, f"when: unknown setting {shown(other)[1:-1]}{nearest(other, FIELDS)}")
                return None
            if isinstance(wanted, dict) or wanted == []:
                self._mistake(key, f"when: expected a value of {other} or a list of values, got {shown(wanted)}")
                return None
            values = [plain_value(other, value) for value in (wanted if isinstance(wanted, list) else [wanted])]
            if not all(self._check({other: Setting(value, f"{self.name}:{self.lines[key]}")}) for value in values):
                return None
            conditions[other] = tuple(values)
        return conditions

    def _in_order(self, dimensions: Sequence[Dimension], fixed: Mapping[str, Setting]) -> list[Dimension]:
        """The dimensions, each after those that its condition names."""
        searched = {dimension.key: dimension for dimension in dimensions}
        for dimension in dimensions:
            for other, wanted in dimension.when.items():
                if other not in searched and other not in fixed:
                    near = nearest(other, [*searched, *fixed])
                    self._mistake(dimension.key, f"when: {other} is neither searched nor fixed here{near}")
                elif other in searched and (known := searched[other].countable_values()) is not None:
                    for value in wanted:
                        if value not in known:
                            self._mistake(
                                dimension.key, f"when: {other} is never {value}{nearest(str(value), map(str, known))}"
                            )
        ordered: list[Dimension] = []
        waiting = list(dimensions)
        while waiting and not self.mistakes:
            placed = {dimension.key for dimension in ordered}
            ready = [one for one in waiting if not (one.when.keys() & searched.keys()) - placed]
            if not ready:
                self._mistake(waiting[0].key, f"when: depends on itself: {' -> '.join(one.key for one in waiting)}")
            ordered += ready[:1]
            waiting = [one for one in waiting if one not in ready[:1]]
        return ordered

    def _goal(self, given: Any, line: int) -> Goal:
        if isinstance(given, dict) and list(given) == [SECONDS_TO_LOSS]:
            loss = _number(given[SECONDS_TO_LOSS])
            if _is_number(loss) and loss > 0:
                return Goal(seconds_to_loss=float(loss))
            self.mistakes.append(
                f"{self.name}:{line}: {METRIC}: {SECONDS_TO_LOSS}: expected a loss above 0, got {shown(loss)}"
            )
        elif given not in registered_metrics() or metric(str(given)).direction == "none":
            good = [name for name in registered_metrics() if metric(name).direction != "none"]
            self.mistakes.append(
                f"{self.name}:{line}: {METRIC}: expected {VAL_LOSS}, val/bits_per_byte, val/accuracy or "
                f"{{{SECONDS_TO_LOSS}: LOSS}}, got {shown(given)}{nearest(str(given), good)}"
            )
        else:
            return Goal(str(given))
        return Goal()

    def _seeds(self, given: Any, line: int) -> int | tuple[int, ...]:
        many = given if isinstance(given, list) else [given]
        whole = all(isinstance(seed, int) and not isinstance(seed, bool) and seed >= 0 for seed in many)
        if not whole or not many or given == 0 or len(set(many)) < len(many):
            words = f"expected a number of runs >= 1 or a list of different seeds, got {shown(given)}"
            self.mistakes.append(f"{self.name}:{line}: {SEEDS}: {words}")
            return 1
        if isinstance(given, int) and given > MOST_SEEDS:
            self.mistakes.append(
                f"{self.name}:{line}: {SEEDS}: {given:,} runs of each trial are more than {MOST_SEEDS}"
            )
        return tuple(given) if isinstance(given, list) else int(given)


def plain_value(key: str, value: Any) -> Any:
    """Convert a YAML value to the type of the setting: for YAML, `1e-4` without a point is a text."""
    if is_none(key, value):
        return None
    numeric = expected(key).startswith(("integer", "number"))
    if numeric and isinstance(value, str):
        value = _number(value)
    if is_whole(key) and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _number(value: Any) -> Any:
    """Convert a text to a number if it denotes one; return anything else unchanged."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _one_of(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"
