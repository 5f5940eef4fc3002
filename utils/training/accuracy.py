"""The questions of val/accuracy: validation documents, in which the answer follows the text `loss_after`."""

from __future__ import annotations

import numpy as np

from data import Corpus
from utils.inference.exact_match import Question

MAX_QUESTIONS = 500  # an evaluation should take no longer than a few steps


def held_out_questions(corpus: Corpus, block_size: int) -> list[Question]:
    """The first MAX_QUESTIONS validation documents that have such an answer and fit into `block_size`.

    Empty without a prepared dataset and `loss_after`.
    """
    if corpus.prepared is None or not corpus.prepared.loss_after:
        return []
    documents, loss_after = corpus.prepared.documents["val"], list(corpus.prepared.loss_after)
    found: list[Question] = []
    for number in range(len(documents)):
        (start,), (length,) = documents.bounds(np.array([number]))
        if length <= block_size:
            tokens = documents.tokens.take(np.arange(start, start + length)).tolist()
            if (end := _end_of(loss_after, tokens)) is not None:
                question = Question(tokens[:end], [*tokens[end:], corpus.prepared.dataset.end_of_text])
                if question.fits(block_size):
                    found.append(question)
        if len(found) == MAX_QUESTIONS:
            break
    return found


def _end_of(text: list[int], tokens: list[int]) -> int | None:
    """The position after the first occurrence of `text` in `tokens`; None if there is none."""
    ends = range(len(text), len(tokens) + 1)
    return next((end for end in ends if tokens[end - len(text) : end] == text), None)
