"""Completions of several runs for the same prompts, side by side in the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from tokenizer import Tokenizer
from utils.inference.generator import Completion
from utils.inference.scoring import perplexity
from utils.inference.text_stream import INCOMPLETE
from utils.inference.token_text import token_text
from utils.terminal.tables import plain_table
from utils.terminal.words import printable

NARROWEST = 36  # characters in a column; if there is less room, the runs are shown below each other
GAP = 3  # characters between columns
TITLE_LENGTH = 80  # characters shown of a prompt


class RunCompletions(NamedTuple):
    """The completions of one run, one for each prompt, in the same order for all runs that are compared.

    val_loss: nats per token; None if it is not known.
    """

    name: str
    val_loss: float | None
    completions: Sequence[Completion]
    tokenizer: Tokenizer


def mean_logprob(completions: Sequence[Completion]) -> float:
    """Mean log-probability of all generated tokens, in nats; nan if there are none."""
    logprobs = [logprob for completion in completions for logprob in completion.logprobs]
    return math.fsum(logprobs) / len(logprobs) if logprobs else math.nan


def probability(logprob: float) -> str:
    """A probability in percent; below 0.01% as a power of ten."""
    chance = math.exp(logprob)
    return f"{chance:.2%}" if not chance < 1e-4 else f"{chance:.1e}"


def completion_tables(runs: Sequence[RunCompletions], width: int, logprobs: bool = False) -> Iterator[RenderableType]:
    """Yield the completions of the runs for each prompt: side by side if they fit, otherwise below each other.

    Args:
        width: characters in a line of the terminal.
        logprobs: whether to list each token with its log-probability.
    """
    side_by_side = (width + GAP) // len(runs) >= NARROWEST + GAP
    for of_prompt in zip(*(run.completions for run in runs), strict=True):
        cells = [_cell(run, completion, logprobs) for run, completion in zip(runs, of_prompt, strict=True)]
        title = Text.assemble((prompt_title(of_prompt[0]), "bold"), (f"  seed {of_prompt[0].seed}", "dim"))
        yield Rule(title, align="left", style="dim")
        if side_by_side:
            grid = Table.grid(padding=(0, GAP, 0, 0), expand=True)
            for _ in runs:
                grid.add_column(ratio=1, overflow="fold")
            for parts in zip(*cells, strict=True):  # a row for each part, so that the texts begin on the same line
                grid.add_row(*parts)
            yield grid
        else:
            for cell in cells:
                yield Group(*cell, "")


def prompt_title(completion: Completion) -> str:
    """The prompt as a heading, shortened if it is long."""
    title = repr(completion.prompt) if completion.prompt else "no prompt"
    return title if len(title) <= TITLE_LENGTH else f"{title[: TITLE_LENGTH - 3]}..."


def _cell(run: RunCompletions, completion: Completion, logprobs: bool) -> list[RenderableType]:
    """One run's completion of one prompt, in parts: heading, text, summary, tokens."""
    loss = "" if run.val_loss is None else f"  val loss {run.val_loss:.4f}"
    head = Text.assemble((printable(run.name), "bold cyan"), (loss, "dim"))
    text = Text.assemble((printable(completion.prompt), "dim"), printable(completion.text))
    parts: list[RenderableType] = [head, text, Text(summary(completion), style="dim")]
    if logprobs:
        parts.append(_token_table(run.tokenizer, completion))
    return parts


def summary(completion: Completion) -> str:
    """The mean log-probability, perplexity and length of a completion, in one line."""
    mean, count = mean_logprob([completion]), len(completion.tokens)
    end = ", ended by a stop string or end-of-text" if completion.finish == "stop" else ""
    return f"mean logprob {mean:.4f}, perplexity {perplexity(-mean):.2f}, {count:,} tokens{end}"


def shown_token(tokenizer: Tokenizer, token: int) -> str:
    """The text of a token in quotes, or its bytes if it is part of a character."""
    text = tokenizer.decode([token])
    return token_text(tokenizer, token) if INCOMPLETE in text else repr(text)


def _token_table(tokenizer: Tokenizer, completion: Completion) -> RenderableType:
    table = plain_table(["token"], ["logprob", "probability"])
    for token, logprob in zip(completion.tokens, completion.logprobs, strict=True):
        table.add_row(Text(shown_token(tokenizer, token)), f"{logprob:.4f}", probability(logprob))
    return table
