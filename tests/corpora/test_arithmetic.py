"""The generated problems are right, unique, and held out in all their forms."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from utils.config.settings import ArithmeticConfig, Config, DataConfig
from utils.corpora.arithmetic import Problem, ProblemSet, problem_set
from utils.corpora.datasets import DatasetError, read_dataset
from utils.corpora.sources import CorpusError
from utils.preparation.arithmetic import arithmetic_dataset, arithmetic_tokenizer, check_block_size, with_problems

EVERYTHING: dict[str, Any] = {
    "arithmetic_operators": ("+", "-", "*", "//", "%"),
    "arithmetic_digits": 3,
    "arithmetic_terms": 4,
    "arithmetic_negatives": True,
    "arithmetic_problems": 1500,
}
SMALL: dict[str, Any] = {"arithmetic_digits": 1}


def problems_of(**settings: Any) -> tuple[ArithmeticConfig, ProblemSet]:
    config = ArithmeticConfig(**settings)
    return config, problem_set(config)


def texts(config: ArithmeticConfig, found: ProblemSet) -> dict[str, list[str]]:
    of = {"train": found.train, "held_out": found.held_out}
    return {name: [p.prompt(config) + p.solution(config) for p in problems] for name, problems in of.items()}


@pytest.mark.parametrize("settings", [SMALL, EVERYTHING])
def test_answers_equal_those_of_python(settings: dict[str, Any]) -> None:
    config, found = problems_of(**settings)
    for text in [*texts(config, found)["train"][:2000], *texts(config, found)["held_out"]]:
        question, _, answer = text.partition("=")
        assert eval(question) == int(answer), text


@pytest.mark.parametrize("settings", [SMALL, EVERYTHING])
def test_every_problem_is_unique_and_no_form_of_a_held_out_one_is_trained_on(settings: dict[str, Any]) -> None:
    config, found = problems_of(**settings)
    everything = texts(config, found)
    both = everything["train"] + everything["held_out"]
    assert len(set(both)) == len(both)
    trained = set(found.train)
    for problem in found.held_out:
        assert not problem.forms() & trained
    # The same by hand for sums of two numbers, in either order.
    trained_on = {tuple(sorted(problem.operands)) for problem in found.train if problem.operators == ("+",)}
    held_out = {tuple(sorted(problem.operands)) for problem in found.held_out if problem.operators == ("+",)}
    assert held_out
    assert not held_out & trained_on


def test_all_problems_of_one_digit_are_generated() -> None:
    config, found = problems_of(**SMALL)
    every = {f"{a}{sign}{b}=" for a in range(10) for b in range(10) for sign in "+-"}
    held_out = {form.prompt(config) for problem in found.held_out for form in problem.forms()}
    assert {problem.prompt(config) for problem in found.train} | held_out == every
    share = len(found.held_out) / (55 + 100)
    assert 0.03 < share < 0.2
    _, once = problems_of(**SMALL, arithmetic_commute=False)
    assert len(once.train) + len(once.held_out) == 55 + 100
    assert once.held_out == found.held_out


def test_other_settings_hold_out_the_same_problems() -> None:
    _, small = problems_of(**SMALL)
    _, large = problems_of(arithmetic_digits=2)
    held_out = {problem.canonical() for problem in large.held_out}
    assert {problem.canonical() for problem in small.held_out} <= held_out
    assert not {problem.canonical() for problem in small.train} & held_out


def test_forms_follow_the_commutative_law_and_keep_the_value() -> None:
    def forms(text: str) -> set[str]:
        operators = tuple(re.findall(r"//|[-+*%]", text))
        problem = Problem(tuple(map(int, re.split(r"//|[-+*%]", text))), operators)
        found = problem.forms()
        assert {form.answer for form in found} == {problem.answer}
        assert {form.canonical() for form in found} == {problem.canonical()}
        return {form.prompt(ArithmeticConfig())[:-1] for form in found}

    assert forms("1+2") == {"1+2", "2+1"}
    assert forms("5-3") == {"5-3"}
    assert forms("7-2+1") == {"7-2+1", "7+1-2", "1-2+7", "1+7-2"}
    assert forms("3+4*5") == {"3+4*5", "3+5*4", "4*5+3", "5*4+3"}
    assert forms("8//3*2") == {"8//3*2"}
    assert forms("8*3//2") == {"8*3//2", "3*8//2"}
    assert forms("4+4") == {"4+4"}


def test_problems_are_written_in_three_formats() -> None:
    def written(form: str, *operands: int, operator: str = "-") -> str:
        config, problem = ArithmeticConfig(arithmetic_format=form), Problem(operands, (operator,))
        return problem.prompt(config) + problem.solution(config)

    assert written("plain", 5, 17) == "5-17=-12"
    assert written("padded", 5, 17) == "05-17=-012"
    assert written("reversed", 5, 17) == "05-17=-210"
    assert written("reversed", 95, 17, operator="+") == "95+17=211"


def test_a_dataset_is_written_once_and_whole(tmp_path: Path) -> None:
    config = ArithmeticConfig(**SMALL, arithmetic_format="reversed")
    folder = arithmetic_dataset(config, tmp_path)
    dataset = read_dataset(folder)
    dataset.verify(thorough=True)
    tokenizer, found = arithmetic_tokenizer(), problem_set(config)
    assert dataset.tokenizer_hash == tokenizer.hash()
    written = texts(config, found)
    for split, name in (("train", "train"), ("val", "held_out")):
        (shard,) = dataset.splits[split].shards
        ids = memoryview(dataset.path(shard).read_bytes()).cast("H").tolist()
        assert tokenizer.decode(ids) == "".join(f"\0{text}" for text in written[name])
        assert dataset.splits[split].documents == len(written[name])
        assert dataset.splits[split].bytes == len("".join(written[name]))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert arithmetic_dataset(config, tmp_path) == folder
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert arithmetic_dataset(ArithmeticConfig(**SMALL), tmp_path) != folder


def test_a_dataset_that_cannot_be_written_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CorpusError, match="the problems cannot be written: Not a directory"):
        arithmetic_dataset(ArithmeticConfig(**SMALL), tmp_path / "file")
    with pytest.raises(CorpusError, match="no problem is left for val: change arithmetic_held_out"):
        arithmetic_dataset(ArithmeticConfig(**SMALL, arithmetic_held_out=1e-9), tmp_path / "corpora")
    assert not list((tmp_path / "corpora").iterdir())
    folder = arithmetic_dataset(ArithmeticConfig(**SMALL), tmp_path / "corpora")
    (folder / "dataset.json").write_text("{")
    with pytest.raises(DatasetError, match="damaged"):
        read_dataset(arithmetic_dataset(ArithmeticConfig(**SMALL), tmp_path / "corpora"))


def test_a_row_that_is_too_short_for_a_problem_is_an_error(tmp_path: Path) -> None:
    config = Config(
        data=DataConfig(dataset="arithmetic", packing="none"),
        arithmetic=ArithmeticConfig(**SMALL, arithmetic_format="padded"),
    )
    data = with_problems(config, tmp_path)
    check_block_size(data, len("0-9=-99") + 1)
    with pytest.raises(CorpusError, match="up to 8 tokens: block_size must be at least that, not 7"):
        check_block_size(data, 7)
    check_block_size(data.model_copy(update={"packing": "random"}), 4)
    assert with_problems(Config(), tmp_path) == DataConfig()


def test_settings_out_of_bounds_are_refused() -> None:
    for settings in ({"arithmetic_operators": ()}, {"arithmetic_operators": ("+", "+")}, {"arithmetic_terms": 1}):
        with pytest.raises(ValueError, match="arithmetic_"):
            ArithmeticConfig(**settings)
