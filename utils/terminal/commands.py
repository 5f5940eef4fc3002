"""The commands of a script.

Each command declares its flags and computes an Answer. The command line, --json, printing and the exit status are
handled here for all commands.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from utils.terminal.cli import Parser, place
from utils.terminal.streams import is_unicode
from utils.terminal.words import json_text

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


class Answer(NamedTuple):
    """The result of a command.

    data: what --json prints; dataclasses, paths and non-finite numbers are allowed.
    render: returns what is printed without --json, given the console.
    status: the exit status.
    """

    data: Any
    render: Callable[[Console], Iterable[RenderableType]]
    status: int = 0


class Flag(NamedTuple):
    """The arguments of one call of `add_argument`."""

    names: tuple[str, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class Command:
    """One command: `python SCRIPT NAME FLAGS`.

    help: one line, without a full stop.
    compute: computes the answer from the parsed command line; raises UserError for a mistake in it.
    note: a sentence that is shown below the help of the command.
    """

    name: str
    help: str
    flags: Sequence[Flag]
    compute: Callable[[argparse.Namespace], Answer]
    note: str | None = None

    def add_to(self, commands: argparse._SubParsersAction[Parser]) -> None:
        """Add the parser of this command, with the flags that all commands have."""
        description = f"{self.help[0].upper()}{self.help[1:]}."
        parser = commands.add_parser(self.name, help=self.help, description=description, epilog=self.note)
        for names, options in self.flags:
            parser.add_argument(*names, **options)
        parser.add_argument("--runs-dir", type=place, metavar="DIR", help="folder of the runs (default: as configured)")
        parser.add_argument("--json", action="store_true", help="print JSON")
        parser.set_defaults(command=self)

    def run(self, args: argparse.Namespace) -> int:
        """Compute the answer and print it.

        Returns:
            The exit status.
        """
        answer = self.compute(args)
        if args.json:
            print_json(answer.data)
            return answer.status
        from utils.terminal.console import Terminal, print_to  # imports rich: a fifth of the time of --help

        console = Terminal().console
        for part in answer.render(console):
            print_to(console, part)
        return answer.status


def flag(*names: str, **options: Any) -> Flag:
    """A flag or argument of a command; takes the arguments of `add_argument`."""
    return Flag(names, options)


class Commands(list[Command]):
    """The commands of one script, in the order in which its file declares them."""

    def declare(
        self, name: str, help: str, *flags: Flag, note: str | None = None
    ) -> Callable[[Callable[[argparse.Namespace], Answer]], Callable[[argparse.Namespace], Answer]]:
        """Decorator: the function becomes the command `name`."""

        def declare(compute: Callable[[argparse.Namespace], Answer]) -> Callable[[argparse.Namespace], Answer]:
            self.append(Command(name, help, flags, compute, note))
            return compute

        return declare

    def run(self, parser: Parser, argv: Sequence[str]) -> int:
        """Parse a command line and run the command that it names.

        Returns:
            The exit status.
        """
        commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
        for declared in self:
            declared.add_to(commands)
        args = parser.parse(argv)
        return int(args.command.run(args))


def print_json(value: Any, indent: int | None = 2) -> None:
    """Print `value` as JSON (see `as_plain`); as ASCII, with escapes, if stdout cannot encode Unicode."""
    print(json_text(as_plain(value), indent=indent, ensure_ascii=not is_unicode(sys.stdout)))


def as_plain(value: Any) -> Any:
    """Convert `value` to the types of JSON; NaN and infinities become strings, as in the logs."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return as_plain(fields_of(value))
    if isinstance(value, dict):
        return {str(key): as_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | None) else str(value)


def fields_of(value: Any) -> dict[str, Any]:
    """The fields of a dataclass by name."""
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
