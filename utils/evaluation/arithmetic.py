"""The task arithmetic: a run's greedy answers to its held-out problems, by operator and number of digits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from tokenizer import NUL, TokenizerError
from utils.config.settings import ArithmeticConfig
from utils.corpora.arithmetic import Problem
from utils.corpora.datasets import read_dataset
from utils.corpora.sources import ARITHMETIC
from utils.errors import UserError
from utils.evaluation.weights import Trained
from utils.inference.exact_match import Question, greedy_answers
from utils.preparation.arithmetic import arithmetic_dataset
from utils.terminal.tables import plain_table
from utils.terminal.words import counted, one_line

WRONG_SHOWN = 8  # wrong answers of a run that are recorded
END = "end"  # stands for the end of an answer in the confusion matrix


@dataclass(frozen=True)
class Answer:
    """A held-out problem, its right answer, and the model's answer."""

    problem: Problem
    prompt: str
    expected: str
    given: str

    @property
    def right(self) -> bool:
        return self.given == self.expected


def own_problems(trained: Trained, corpora_dir: Path) -> tuple[ArithmeticConfig, str]:
    """The settings of the problems that a run was trained on, and the hash of its dataset.

    Raises:
        UserError: the run was trained on something else, or on problems that this version no longer generates.
    """
    known = trained.settings()
    if known.get("dataset") != ARITHMETIC:
        raise UserError(f"{trained.name} was trained on {known.get('dataset')}, not on {ARITHMETIC}")
    fields = ArithmeticConfig.model_fields.keys() & known.keys()
    settings = ArithmeticConfig.model_validate({key: known[key] for key in fields})
    found = read_dataset(arithmetic_dataset(settings, corpora_dir)).hash
    trained.check_corpus(found, "it is not known which problems were held out")
    return settings, found


def answer_problems(
    trained: Trained,
    settings: ArithmeticConfig,
    problems: Sequence[Problem],
    watch: Callable[[int], None] = lambda count: None,
) -> list[Answer]:
    """The answers of a model to problems.

    Args:
        settings: how the problems are written.
        watch: called with the number of problems that were just answered.

    Raises:
        UserError: the model has no token for a character of a problem, or a problem does not fit into its context.
    """
    tokenizer = trained.tokenizer
    texts = [(problem.prompt(settings), problem.solution(settings)) for problem in problems]
    block_size, end = trained.model.config.block_size, tokenizer.end_of_text
    try:
        questions = [
            Question(tokenizer.encode(NUL + prompt), [*tokenizer.encode(solution), end or 0])
            for prompt, solution in texts
        ]
    except TokenizerError as error:
        raise UserError(f"{trained.name}: it cannot read the problems: {error}") from None
    if too_long := [text for text, question in zip(texts, questions, strict=True) if not question.fits(block_size)]:
        longest = max(too_long, key=lambda text: len("".join(text)))
        raise UserError(
            f"{trained.name}: {len(too_long):,} of {len(texts):,} problems do not fit into block_size {block_size}: "
            f"{''.join(longest)}"
        )
    tokens = greedy_answers(trained.model, questions, watch)
    return [
        Answer(problem, prompt, expected, _text(trained, given))
        for problem, (prompt, expected), given in zip(problems, texts, tokens, strict=True)
    ]


def _text(trained: Trained, given: Sequence[int]) -> str:
    """The text of an answer up to its end; "..." is appended if it does not end."""
    text = trained.tokenizer.decode(given)
    return text.partition(NUL)[0] if NUL in text else text + "..."


def task_record(answers: Sequence[Answer]) -> dict[str, Any]:
    """The record of the results: accuracy, right answers by operator and digits, and the first wrong answers."""
    counts: dict[str, dict[str, list[int]]] = {}
    for answer in answers:
        cell = counts.setdefault(answer.problem.kind, {}).setdefault(str(answer.problem.digits), [0, 0])
        cell[0] += answer.right
        cell[1] += 1
    wrong = [answer for answer in answers if not answer.right]
    return {
        "task": ARITHMETIC,
        "accuracy": 1 - len(wrong) / len(answers),
        "problems": len(answers),
        "by_operator_and_digits": {
            kind: dict(sorted(cells.items(), key=lambda cell: int(cell[0])))
            for kind, cells in sorted(counts.items(), key=lambda row: (len(row[0]), row[0]))
        },
        "wrong": [f"{answer.prompt}{answer.given}, not {answer.expected}" for answer in wrong[:WRONG_SHOWN]],
    }


def task_screen(names: Sequence[str], records: Sequence[Mapping[str, Any]]) -> Iterator[RenderableType]:
    """For each run, a table of right answers by operator and number of digits, and some wrong answers."""
    for name, record in zip(names, records, strict=True):
        right = round(record["accuracy"] * record["problems"])
        yield Text.assemble(
            (one_line(name), "bold cyan"),
            f"  {record['accuracy']:.2%} of the held-out problems are right: {right:,} of {record['problems']:,}",
        )
        by = record["by_operator_and_digits"]
        digits = sorted({int(number) for cells in by.values() for number in cells})
        table = plain_table(["operator"], [*(counted(number, "digit") for number in digits), "all"])
        for kind, cells in by.items():
            found = [cells.get(str(number), [0, 0]) for number in digits]
            table.add_row(Text(kind, style="cyan"), *(_cell(*cell) for cell in (*found, _sum(found))))
        if len(by) > 1:
            columns = [[cells[str(number)] for cells in by.values() if str(number) in cells] for number in digits]
            sums = [_sum(column) for column in columns]
            table.add_row("all", *(_cell(*cell) for cell in (*sums, _sum(sums))))
        yield table
        if record["wrong"]:
            yield Text(f"wrong: {'; '.join(map(one_line, record['wrong']))}", style="dim")


def _sum(cells: Sequence[Sequence[int]]) -> list[int]:
    return [sum(right for right, _ in cells), sum(count for _, count in cells)]


def _cell(right: int, count: int) -> str:
    return f"{right / count:.2%} of {count:,}" if count else ""


def confusion(answers: Sequence[Answer]) -> Counter[tuple[str, str]]:
    """The confusion matrix of characters: (right, given) at the same position of an answer -> how often."""
    found: Counter[tuple[str, str]] = Counter()
    for answer in answers:
        given = [*answer.given.removesuffix("..."), END]
        for place, character in enumerate([*answer.expected, END]):
            found[character, given[place] if place < len(given) else END] += 1
    return found
