"""Wrapping long lines on a terminal."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from utils.terminal.console import PrintableConsole, print_to
from utils.terminal.words import fact_lines

COMMAND = "python train.py --resume baseline --set 'a (long; one)' --batch-size 4"
SHORT = [("corpus", "python: 1,000 tokens")]


def printed(renderable: RenderableType, width: int = 30, terminal: bool = True) -> list[str]:
    console = PrintableConsole(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None)
    print_to(console, renderable)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


@pytest.mark.parametrize("make", [str, Text, Group])
def test_sentences_are_wrapped_between_words_only_on_a_terminal(make: Callable[[str], RenderableType]) -> None:
    text = "this configuration and code were run already"
    assert printed(make(text)) == ["this configuration and code", "were run already"]
    assert printed(make(text), terminal=False) == [text]
    assert printed(make(text), width=44) == [text]


def test_long_facts_continue_below_their_value() -> None:
    rows = [("best val loss", "1.2 at step 3, the last"), *SHORT]
    assert printed(fact_lines(rows, title="A title")) == [
        "A title",
        "best val loss  1.2 at step 3,",
        "               the last",
        "corpus         python: 1,000",
        "               tokens",
    ]


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("a run: 20261128_022101_baseline (completed)", ["a run:", "20261128_022101_baseline", "(completed)"]),
        (f"it is off; later: {COMMAND}; so it is", ["it is off; later:", f"{COMMAND};", "so it is"]),
        (f"not fed (later: {COMMAND})", ["not fed (later:", f"{COMMAND})"]),
        ("the folder '/home/a b/c d e f g'/run is long", ["the folder", "'/home/a b/c d e f g'/run is", "long"]),
        ("step 5/60  train 6.2  1 s elapsed", ["step 5/60  train 6.2", "1 s elapsed"]),
        ("a  one field of more than thirty characters", ["a  one field of more than", "thirty characters"]),
        ("see 'a  b' and what  follows it here", ["see 'a  b' and what", "follows it here"]),
        ("x" * 50 + " is kept", ["x" * 50, "is kept"]),
    ],
)
def test_commands_paths_ids_and_fields_are_not_broken(text: str, lines: list[str]) -> None:
    assert printed(text) == lines


def test_a_table_in_a_file_has_no_trailing_blanks() -> None:
    table = Table("a", "note", box=None)
    table.add_row("1", "")
    table.add_row("2", "x" * 20)
    assert printed(table, terminal=False) == [" a  note", " 1", f" 2  {'x' * 20}"]
    assert printed(table)[1].endswith("  ")


def test_text_to_be_copied_is_not_wrapped() -> None:
    value = "a value of several words, longer than the line"
    assert printed(fact_lines([("name", value)], copied=True)) == [f"name  {value}"]
    assert printed(Text(value, no_wrap=True)) == [value]
    assert printed(fact_lines([("directory", "/a/path/" + "x" * 40)])) == ["directory  /a/path/" + "x" * 40]


def test_wide_characters_count_twice_and_colours_are_kept() -> None:
    console = PrintableConsole(file=io.StringIO(), force_terminal=True, width=30, color_system="standard")
    print_to(console, Text.assemble(("warning: ", "yellow"), "語語語語語語語語語語語 語 語"))
    assert console.file.getvalue() == "\x1b[33mwarning:\x1b[0m\n語語語語語語語語語語語 語 語\n"  # type: ignore[attr-defined]


def test_a_table_in_a_group_keeps_the_width_of_the_terminal() -> None:
    table = Table()
    table.add_column()
    table.add_row("many words " * 10)
    assert max(map(len, printed(Group(fact_lines(SHORT), table)))) == 30
