"""The task arithmetic: which answers are right, the table, the confusion matrix, the picture."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.tiny_export import char_tokenizer, tiny_model
from utils.config.settings import ArithmeticConfig
from utils.corpora.arithmetic import Problem
from utils.errors import UserError
from utils.evaluation import arithmetic as module
from utils.evaluation.arithmetic import Answer, answer_problems, confusion, task_record, task_screen
from utils.evaluation.picture import arithmetic_picture
from utils.evaluation.weights import Trained
from utils.inference.exact_match import Question
from utils.preparation.arithmetic import arithmetic_tokenizer

SETTINGS = ArithmeticConfig(arithmetic_format="reversed")
PROBLEMS = [Problem((5, 17), ("-",)), Problem((5, 17), ("+",)), Problem((2, 3), ("+",)), Problem((1, 2, 3), ("+", "-"))]
WRITTEN = ["05-17=-210", "05+17=220", "02+03=500", "01+02-03=000"]


def trained(tokenizer: Any = None, **settings: Any) -> Trained:
    tokenizer = tokenizer or arithmetic_tokenizer()
    return Trained(tiny_model(tokenizer, **settings), tokenizer, None, "sums", 3, "float32")


def answering(texts: Sequence[str]) -> Callable[..., list[list[int]]]:
    """A stand-in for greedy_answers that gives these texts, each cut to the length of its answer."""
    tokenizer = arithmetic_tokenizer()

    def answers(model: Any, questions: Sequence[Question], watch: Any) -> list[list[int]]:
        return [tokenizer.encode(text)[: len(q.answer)] for q, text in zip(questions, texts, strict=True)]

    return answers


def answered(texts: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> list[Answer]:
    monkeypatch.setattr(module, "greedy_answers", answering(texts))
    return answer_problems(trained(), SETTINGS, PROBLEMS)


def test_questions_are_problems_between_end_of_text_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Question] = []

    def answer_rightly(model: Any, questions: Sequence[Question], watch: Any) -> list[list[int]]:
        asked.extend(questions)
        return [list(question.answer) for question in questions]

    monkeypatch.setattr(module, "greedy_answers", answer_rightly)
    assert all(answer.right for answer in answer_problems(trained(), SETTINGS, PROBLEMS))
    decode = arithmetic_tokenizer().decode
    assert [decode(question.prompt + question.answer) for question in asked] == [f"\0{text}\0" for text in WRITTEN]
    assert all(decode(question.prompt).endswith("=") for question in asked)


def test_an_answer_is_right_if_all_of_it_and_its_end_are(monkeypatch: pytest.MonkeyPatch) -> None:
    found = answered(["-210\0", "2200", "50\0", "001\0"], monkeypatch)
    assert [answer.right for answer in found] == [True, False, False, False]
    assert [answer.given for answer in found] == ["-210", "2200...", "50", "001"]
    record = task_record(found)
    assert record["accuracy"] == 0.25
    assert record["by_operator_and_digits"] == {
        "+": {"1": [0, 1], "2": [0, 1]},
        "-": {"2": [1, 1]},
        "+ - (3 operands)": {"1": [0, 1]},
    }
    assert record["wrong"] == ["05+17=2200..., not 220", "02+03=50, not 500", "01+02-03=001, not 000"]
    console = Console(file=io.StringIO(), width=100)
    console.print(*task_screen(["sums"], [record]))
    lines = [line.split() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert lines[0][:3] == ["sums", "25.00%", "of"]
    assert lines[1] == ["operator", "1", "digit", "2", "digits", "all"]
    assert lines[2] == ["+", "0.00%", "of", "1", "0.00%", "of", "1", "0.00%", "of", "2"]
    assert lines[3] == ["-", "100.00%", "of", "1", "100.00%", "of", "1"]
    assert lines[5] == ["all", "0.00%", "of", "2", "50.00%", "of", "2", "25.00%", "of", "4"]


def test_the_confusion_matrix_counts_characters_by_position(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = confusion(answered(["-210\0", "230\0", "50\0", "0000"], monkeypatch))
    assert counts["-", "-"] == 1
    assert counts["2", "3"] == 1
    assert counts["0", "end"] == 1  # the last digit of 500 is missing
    assert counts["end", "end"] == 3
    assert counts["end", "0"] == 1  # 000 goes on
    assert sum(counts.values()) == sum(len(text.partition("=")[2]) + 1 for text in WRITTEN)


def test_the_picture_is_a_png(monkeypatch: pytest.MonkeyPatch) -> None:
    found = answered(["-210\0", "230\0", "50\0", "0000"], monkeypatch)
    assert arithmetic_picture("sums", found, task_record(found)).startswith(b"\x89PNG")


def test_problems_that_a_model_cannot_read_are_an_error() -> None:
    with pytest.raises(UserError, match=r"sums: it cannot read the problems: character '0'"):
        answer_problems(trained(char_tokenizer("\0+-=5")), SETTINGS, PROBLEMS)
    with pytest.raises(UserError, match=r"1 of 4 problems do not fit into block_size 11: 01\+02-03=000"):
        answer_problems(trained(block_size=11), SETTINGS, PROBLEMS)


def test_a_run_of_another_corpus_has_no_problems(tmp_path: Path) -> None:
    from fake_runs import make_run

    run = make_run(tmp_path, "words", settings={"dataset": "pydocs"})
    with pytest.raises(UserError, match="words was trained on pydocs, not on arithmetic"):
        module.own_problems(Trained(**{**vars(trained()), "run": run, "name": "words"}), tmp_path)
    run = make_run(tmp_path, "sums", settings={"dataset": "arithmetic", "arithmetic_digits": 1})
    with pytest.raises(UserError, match="sums: its data has changed since it was trained"):
        module.own_problems(Trained(**{**vars(trained()), "run": run}), tmp_path)
