"""Completions side by side in the terminal."""

from __future__ import annotations

import io
import math
import re

import pytest
from rich.console import Console

from tests.tiny_export import char_tokenizer
from utils.inference.generator import Completion
from utils.inference.side_by_side import NARROWEST, RunCompletions, completion_tables, mean_logprob, prompt_title
from utils.tokenization.byte_tokens import ByteTokenizer

TOKENIZER = char_tokenizer("ab \n\x1b")


def completion(text: str, logprobs: list[float], prompt: str = "a b", finish: str = "length") -> Completion:
    return Completion(prompt, text, TOKENIZER.encode(text), logprobs, finish, 7)


def two_runs() -> list[RunCompletions]:
    first = [completion("ab", [-0.5, -1.5]), completion("b\n", [-0.1, -0.1], "b")]
    second = [completion("ba", [-3.0, -1.0]), completion(" a", [-0.25, -0.25], "b")]
    return [RunCompletions("baseline", 1.5, first, TOKENIZER), RunCompletions("[bold]", None, second, TOKENIZER)]


def shown(runs: list[RunCompletions], width: int, logprobs: bool = False) -> str:
    console = Console(file=io.StringIO(), width=width)
    for part in completion_tables(runs, width, logprobs):
        console.print(part, emoji=False)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_mean_is_over_all_tokens() -> None:
    assert mean_logprob([completion("ab", [-0.5, -1.5]), completion("a", [-4.0])]) == pytest.approx(-2)
    assert math.isnan(mean_logprob([]))


def test_runs_are_side_by_side_if_there_is_room() -> None:
    text = shown(two_runs(), 2 * NARROWEST + 3)
    assert re.search(r"baseline  val loss 1\.5000 +\[bold\]", text)
    assert re.search(r"a bab +a bba", text)
    wide = shown(two_runs(), 120)
    assert re.search(
        r"mean logprob -1\.0000, perplexity 2\.72, 2 tokens +mean logprob -2\.0000, perplexity 7\.39, 2 tokens", wide
    )


def test_the_texts_begin_on_the_same_line_even_if_names_are_long() -> None:
    first, second = two_runs()
    lines = shown([first._replace(name="a long name " * 5), second], 80).splitlines()
    assert any(re.search(r"a bab +a bba", line) for line in lines)


def test_runs_are_one_below_the_other_if_there_is_no_room() -> None:
    lines = shown(two_runs(), 2 * NARROWEST + 2).splitlines()
    assert lines.index("baseline  val loss 1.5000") < lines.index("[bold]")
    assert "a bab" in lines


def test_each_prompt_has_its_heading() -> None:
    text = shown(two_runs(), 100)
    assert text.index("'a b'  seed 7") < text.index("'b'  seed 7")


def test_tokens_are_listed_with_their_logprobs_on_request() -> None:
    assert "-1.5000" not in shown(two_runs(), 100)
    lines = shown(two_runs()[:1], 100, logprobs=True).splitlines()
    rows = [line.split() for line in lines]
    assert ["'a'", "-0.5000", "60.65%"] in rows
    assert [r"'\n'", "-0.1000", "90.48%"] in rows


def test_a_token_that_is_part_of_a_character_is_listed_as_its_bytes() -> None:
    tokenizer = ByteTokenizer()
    made = Completion("", "aß", tokenizer.encode("aß"), [-0.5, -1.5, -0.1], "length", 7)
    rows = [line.split()[:2] for line in shown([RunCompletions("run", 1.0, [made], tokenizer)], 100, True).splitlines()]
    for row in (["'a'", "-0.5000"], [r"bytes:\xc3", "-1.5000"], [r"bytes:\x9f", "-0.1000"]):
        assert row in rows


def test_control_characters_never_reach_the_terminal() -> None:
    run = RunCompletions("\x1b[2Jname", 1.0, [completion("\x1ba", [-1.0, -1.0], "\x1b")], TOKENIZER)
    text = shown([run], 100, logprobs=True)
    assert "\x1b" not in text
    assert r"\x1b\x1ba" in text


def test_a_stop_string_and_an_empty_prompt_are_mentioned() -> None:
    run = RunCompletions("run", 1.0, [completion("a", [-1.0], "", "stop")], TOKENIZER)
    text = shown([run], 100)
    assert "no prompt" in text
    assert "1 tokens, ended by a stop string" in text


def test_a_long_prompt_is_cut_in_its_heading() -> None:
    assert prompt_title(completion("a", [-1.0], "b" * 78)) == repr("b" * 78)
    assert prompt_title(completion("a", [-1.0], "b" * 79)) == "'" + "b" * 76 + "..."


def test_runs_of_different_prompts_cannot_be_compared() -> None:
    runs = two_runs()
    with pytest.raises(ValueError):
        list(completion_tables([runs[0], runs[1]._replace(completions=[])], 100))
