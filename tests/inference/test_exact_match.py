"""Answers with one right text: greedy answers, computed in batches with a cache, equal those of generate_tokens."""

from __future__ import annotations

import pytest
import torch

from tests.tiny_export import tiny_model
from utils.inference import exact_match as module
from utils.inference.decode import generate_tokens
from utils.inference.exact_match import Question, exact_match, greedy_answers
from utils.inference.sampling import SamplingOptions

LENGTHS = [(1, 3), (5, 2), (12, 4), (3, 1), (16, 1), (7, 10)]  # of prompts and answers


def questions(vocab_size: int) -> list[Question]:
    generator = torch.Generator().manual_seed(0)
    return [
        Question(torch.randint(vocab_size, (prompt,), generator=generator).tolist(), [0] * answer)
        for prompt, answer in LENGTHS
    ]


@pytest.mark.parametrize("position", ["rope", "learned"])
@pytest.mark.parametrize("at_once", [1, 4, 100])
def test_answers_equal_those_of_greedy_generation(position: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_SIZE", at_once)
    model, counts = tiny_model(position=position), []
    asked = questions(model.vocab_size)
    expected = [
        list(generate_tokens(model, prompt, len(answer), SamplingOptions(temperature=0), 0)) for prompt, answer in asked
    ]
    assert greedy_answers(model, asked, counts.append) == expected
    assert sum(counts) == len(asked)
    right = [Question(question.prompt, answer) for question, answer in zip(asked, expected, strict=True)]
    assert exact_match(model, right) == 1
    right[2].answer[-1] += 1
    assert exact_match(model, right) == pytest.approx(5 / 6)


def test_a_question_fits_if_its_last_token_is_predicted_from_the_whole_prompt() -> None:
    assert Question([1] * 12, [1] * 5).fits(16)
    assert not Question([1] * 12, [1] * 6).fits(16)
