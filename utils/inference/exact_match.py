"""Exact match on questions with one right answer: the share of greedy answers that are right to the last token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from model import LanguageModel
from utils.inference.decode import decode_one_token, make_room, new_cache, padded, prefill
from utils.nn.lean import lean

BATCH_SIZE = 512  # questions in one pass; more are hardly faster on a CPU


class Question(NamedTuple):
    """The token ids of a prompt and of its answer, which ends with the end-of-text token."""

    prompt: list[int]
    answer: list[int]

    def fits(self, block_size: int) -> bool:
        """Whether the model still sees the whole prompt at the end of the answer."""
        return len(self.prompt) + len(self.answer) - 1 <= block_size


def exact_match(model: LanguageModel, questions: Sequence[Question]) -> float:
    """The share of the questions that the model, in eval mode, answers exactly with greedy decoding."""
    given = greedy_answers(model, questions)
    right = sum(tokens == question.answer for tokens, question in zip(given, questions, strict=True))
    return right / len(questions)


def greedy_answers(
    model: LanguageModel, questions: Sequence[Question], watch: Callable[[int], None] = lambda count: None
) -> list[list[int]]:
    """The greedy continuation of each prompt, of the length of its answer.

    Args:
        model: in eval mode.
        watch: called after each batch with its number of questions.
    """
    assert all(question.fits(model.config.block_size) for question in questions)
    found: list[list[int]] = []
    for first in range(0, len(questions), BATCH_SIZE):
        part = questions[first : first + BATCH_SIZE]
        count = max(len(question.answer) for question in part)
        tokens = greedy_tokens(model, [question.prompt for question in part], count)
        found += [row[: len(question.answer)] for row, question in zip(tokens, part, strict=True)]
        watch(len(part))
    return found


@torch.inference_mode()
def greedy_tokens(model: LanguageModel, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """Decode `count` tokens greedily after each prompt, with a key-value cache."""
    assert not model.training
    idx, lengths = padded(prompts, next(model.parameters()).device)
    longest = min(max(lengths) + count - 1, model.config.block_size)  # the last token is not attended to
    lean_model, cache = lean(model), new_cache(model, len(prompts), longest)
    logits = prefill(lean_model, idx, cache, None if len(set(lengths)) == 1 else lengths)  # (B, V)
    steps = [logits.argmax(-1)]
    while len(steps) < count:
        if model.config.position == "learned":
            make_room(model, cache)  # affects only rows whose own answer is shorter than `count`
        steps.append(decode_one_token(lean_model, steps[-1], cache).argmax(-1))
    return torch.stack(steps, dim=1).tolist()  # (B, count)
