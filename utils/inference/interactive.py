"""A conversation: a person and the model write one text in turns, and options can be changed between turns."""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

from tokenizer import Tokenizer, TokenizerError
from utils.errors import UserError, nearest
from utils.inference.decode import Window, start_tokens
from utils.inference.generator import SEEDS, Generator, Request
from utils.inference.prompts import banned_tokens, stop_strings
from utils.inference.stats import GenerationStats
from utils.terminal.console import say
from utils.terminal.words import fact_lines, printable

OFF = "none"
ACTIONS = {"/reset": "forget the text so far", "/help": "show this list", "/quit": "leave, as Ctrl-D does"}


@dataclass(frozen=True)
class Option:
    """A part of a request that a command changes.

    expected: what may be typed, in words.
    apply: returns the request with the value that was typed; raises ValueError if it is not a value of the option.
    show: returns the current value in words.
    """

    expected: str
    apply: Callable[[Request, str, Tokenizer], Request]
    show: Callable[[Request, Tokenizer], str]


def _number(key: str, kind: Callable[[str], Any], expected: str, may_be_off: bool = False) -> Option:
    """The option for a field of a request or of its sampling options."""

    def apply(request: Request, text: str, _: Tokenizer) -> Request:
        change: dict[str, Any] = {key: None if may_be_off and text == OFF else kind(text)}
        if hasattr(request, key):
            return replace(request, **change)
        return replace(request, options=replace(request.options, **change))

    def show(request: Request, _: Tokenizer) -> str:
        value = getattr(request if hasattr(request, key) else request.options, key)
        return OFF if value is None else str(value)

    return Option(f"{expected} or {OFF}" if may_be_off else expected, apply, show)


def _window(text: str) -> str:
    if text not in get_args(Window):
        raise ValueError
    return text


def _add_stop(request: Request, text: str, tokenizer: Tokenizer) -> Request:
    return replace(request, stops=() if text == OFF else (*request.stops, *stop_strings(tokenizer, [text])))


def _add_ban(request: Request, text: str, tokenizer: Tokenizer) -> Request:
    banned = () if text == OFF else banned_tokens(tokenizer, [text], request.options.banned)
    return replace(request, options=replace(request.options, banned=banned))


OPTIONS: Mapping[str, Option] = {
    "/temperature": _number("temperature", float, "a number"),
    "/top-k": _number("top_k", int, "a whole number", may_be_off=True),
    "/top-p": _number("top_p", float, "a number", may_be_off=True),
    "/min-p": _number("min_p", float, "a number", may_be_off=True),
    "/repetition-penalty": _number("repetition_penalty", float, "a number"),
    "/ban": Option(
        f"text, or {OFF} for no banned tokens",
        _add_ban,
        lambda request, tokenizer: repr(tokenizer.decode(request.options.banned)) if request.options.banned else OFF,
    ),
    "/stop": Option(
        f"text, or {OFF} for no stop strings",
        _add_stop,
        lambda request, _: ", ".join(map(repr, request.stops)) or OFF,
    ),
    "/max-new-tokens": _number("max_new_tokens", int, "a whole number"),
    "/seed": _number("seed", int, "a whole number"),
    "/window": _number("window", _window, " or ".join(get_args(Window))),
}


class Conversation:
    """One text that a person and the model write in turns.

    Turn i since the last /reset or /seed draws from the random stream of seed + i.

    Args:
        asks: whether each line is a question, to be put into qa_template.
        report: called after each turn with its request; generator.stats then covers that turn alone.
    """

    def __init__(
        self,
        generator: Generator,
        request: Request,
        asks: bool = False,
        report: Callable[[Request], None] | None = None,
    ) -> None:
        self.generator, self.request, self.asks, self.report = generator, request, asks, report
        self.text = ""
        self._turns = 0
        self._length_noted = False
        self._between = generator.settings.qa_stop if asks else "\n"  # separates the model's text from the next line
        try:
            generator.tokenizer.encode(self._between)
        except TokenizerError:
            self._between = ""

    def run(self) -> int:
        """Read lines until there are no more; returns the exit status.

        Ctrl-C stops the generation, or drops the line that is being typed.
        """
        typed = sys.stdin.isatty()
        if typed:
            importlib.import_module("readline")  # gives input() a history
            print("/help lists the commands, Ctrl-D leaves", file=sys.stderr)
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are not text become an unknown character
        while True:
            try:
                line = input("> " if typed else "")
                if line.partition(" ")[0] == "/quit":
                    return 0
                self.answer(line)
            except EOFError:
                if typed:
                    print()
                return 0
            except KeyboardInterrupt:
                print()
            except UserError as error:
                print(printable(f"error: {error}"), file=sys.stderr)

    def answer(self, line: str) -> None:
        """Carry out one line: a command, or a part of the text.

        Raises:
            UserError: an unknown command, a value out of bounds, or text without a token.
        """
        if not line.startswith("/"):
            self._turn(line)
            return
        name, _, value = line.partition(" ")
        if name == "/help":
            print(printable(fact_lines(self._help()).plain))
        elif name == "/reset":
            self.text, self._turns, self._length_noted = "", 0, False
        elif name in OPTIONS:
            self._set(name, value)
        else:
            raise UserError(f"unknown command {name}{nearest(name, [*OPTIONS, *ACTIONS])}; /help lists all")

    def _set(self, name: str, value: str) -> None:
        option, tokenizer = OPTIONS[name], self.generator.tokenizer
        if value:
            try:
                self.request = option.apply(self.request, value, tokenizer)
            except UserError:
                raise
            except ValueError:
                raise UserError(f"{name}: expected {option.expected}, got {value!r}") from None
            if name == "/seed":
                self._turns = 0
        print(printable(f"{name[1:]} {option.show(self.request, tokenizer)}"))

    def _help(self) -> list[tuple[str, str]]:
        tokenizer = self.generator.tokenizer
        values = [
            (name, f"{option.show(self.request, tokenizer)}  (takes {option.expected})")
            for name, option in OPTIONS.items()
        ]
        return [*values, *ACTIONS.items(), ("an empty line", "let the model continue")]

    def _turn(self, line: str) -> None:
        """Append the line, and then the model's continuation, to the text."""
        generator = self.generator
        if self.asks and not line:
            return
        generator.tokenizer.encode(line)  # so that an error gives the position in the line
        new = generator.qa_prompt(line) if self.asks else line
        text = self.text + (self._between if self.text and line else "") + new
        request = replace(self.request, seed=(self.request.seed + self._turns) % SEEDS)
        if self.asks:
            request = generator.qa_request(request)
        self._note_length(text)
        self.text, self._turns = text, self._turns + 1
        generator.stats = GenerationStats()
        for piece in generator.stream(text, request):
            self.text += piece
            say(piece)
        print(flush=True)
        if self.report is not None:
            self.report(request)

    def _note_length(self, text: str) -> None:
        """Print a note when the text first becomes longer than the context."""
        length = len(start_tokens(self.generator.tokenizer, text))
        block_size = self.generator.model.config.block_size
        if length > block_size and not self._length_noted:
            self._length_noted = True
            print(f"note: the model sees only the last {block_size} of the text's {length} tokens", file=sys.stderr)
