"""Completions of several runs side by side as one self-contained HTML page: tokens coloured by their probability."""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from tokenizer import Tokenizer
from utils.inference.generator import Completion
from utils.inference.scoring import perplexity
from utils.inference.side_by_side import (
    RunCompletions,
    mean_logprob,
    probability,
    prompt_title,
    shown_token,
    summary,
)
from utils.inference.token_text import TokenCharacters
from utils.terminal.html import render
from utils.terminal.words import HEX_COLORS, printable

TEMPLATE = Path(__file__).with_name("page.html.j2")
BOUNDS = (0.01, 0.05, 0.2, 0.5, 0.9)  # probabilities at which the colour changes
LEGEND = ("below 1%", "1 to 5%", "5 to 20%", "20 to 50%", "50 to 90%", "from 90%")
WHITE_SPACE = {" ": "space", "\n": "newline", "\t": "tab"}  # CSS classes


def completion_page(runs: Sequence[RunCompletions], settings: str = "") -> str:
    """Render the page: a table of the runs, then for each prompt a column for each run.

    Args:
        settings: how the texts were sampled, in words.
    """
    described = [
        {
            "name": printable(run.name),
            "color": HEX_COLORS[index % len(HEX_COLORS)],
            "val_loss": "" if run.val_loss is None else f"{run.val_loss:.4f}",
            "mean": f"{mean_logprob(run.completions):.4f}",
            "perplexity": f"{perplexity(-mean_logprob(run.completions)):.2f}",
            "tokens": f"{sum(len(completion.tokens) for completion in run.completions):,}",
        }
        for index, run in enumerate(runs)
    ]
    prompts = [
        {
            "title": prompt_title(of_prompt[0]),
            "seed": of_prompt[0].seed,
            "cells": [_cell(run.tokenizer, completion) for run, completion in zip(runs, of_prompt, strict=True)],
        }
        for of_prompt in zip(*(run.completions for run in runs), strict=True)
    ]
    return render(
        TEMPLATE,
        runs=described,
        prompts=prompts,
        settings=settings,
        legend=LEGEND,
        any_stop=any(completion.finish == "stop" for run in runs for completion in run.completions),
        made=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )


def _cell(tokenizer: Tokenizer, completion: Completion) -> dict[str, Any]:
    """One run's completion of one prompt."""
    tokens, place = [], 0  # place: characters before the token
    texts = _token_texts(tokenizer, completion.tokens)
    for token, text, logprob in zip(completion.tokens, texts, completion.logprobs, strict=True):
        quoted = shown_token(tokenizer, token)
        tokens.append(
            {
                "level": level(logprob),
                "stop": place >= len(completion.text),
                "tip": f"{quoted}  probability {probability(logprob)}, logprob {logprob:.4f}",
                "pieces": pieces(text),
            }
        )
        place += len(text)
    return {"prompt": pieces(completion.prompt), "tokens": tokens, "summary": summary(completion)}


def _token_texts(tokenizer: Tokenizer, tokens: Sequence[int]) -> list[str]:
    """The characters that each token completes; together they are the text of the tokens."""
    characters, texts = TokenCharacters(tokenizer), [""]
    for token in tokens:
        unfinished, text = characters.add(token)
        texts[-1] += unfinished
        texts.append(text)
    texts[-1] += characters.rest()
    return texts[1:]


def level(logprob: float) -> int:
    """The index in LEGEND for a log-probability."""
    return bisect.bisect_right(BOUNDS, math.exp(logprob))


def pieces(text: str) -> list[tuple[str, str]]:
    """Split text into (CSS class, characters): white-space characters, and the text between them with escapes."""
    return [(WHITE_SPACE.get(part, ""), printable(part)) for part in re.findall(r"[ \n\t]|[^ \n\t]+", text)]
