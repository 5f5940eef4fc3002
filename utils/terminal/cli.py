"""Command-line parsing: flags, help, and errors reported in one line. The flags of settings are in config_flags.py."""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import itertools
import os
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Protocol, TypeVar

from utils.errors import (
    SHOWN,
    OutOfMemoryError,
    RankError,
    UserError,
    cut,
    is_out_of_memory,
    nearest,
    number_text,
    shown,
)
from utils.files import DISK_ERRORS, expand_home
from utils.machine.process import begin_script, tune_process
from utils.terminal.completion import complete_if_asked
from utils.terminal.streams import drop, prepare_streams, why_lost
from utils.terminal.words import one_line, printable

CODE_ROOT = Path(__file__).resolve().parents[2]  # the folder of the scripts
INSTALLED = CODE_ROOT.name == "lm_workbench" and (CODE_ROOT / "__init__.py").is_file()  # from a wheel
PROJECT_ROOT = Path.cwd() if INSTALLED else CODE_ROOT  # contains configs/; relative paths in files start here
if INSTALLED:
    sys.path.append(os.fspath(PROJECT_ROOT))  # for callbacks; last, so that no file there shadows our modules
ERROR_LENGTH = 3000  # the most characters of an error message that are printed
Number = TypeVar("Number", int, float)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports mistakes as UserErrors, which name the nearest valid flag."""

    def __init__(self, **kwargs: Any) -> None:
        width = min(shutil.get_terminal_size().columns, 110)
        super().__init__(
            allow_abbrev=False,
            formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, width=width, max_help_position=32),
            **kwargs,
        )

    def error(self, message: str) -> NoReturn:
        if message.endswith("expected one argument"):
            message += "; a value that begins with a dash is written --FLAG=VALUE"
        if switch := re.fullmatch(r"argument (\S+): ignored explicit argument (.*)", message, re.DOTALL):
            message = f"{_without_value(switch[1].split('/'))}, got {cut(switch[2], SHOWN)}"
        raise UserError(f"{message} (see {self.prog} --help)")

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """Reject `--limit=--`: argparse would drop the `--` and return an empty list."""
        if action.option_strings and action.nargs is None and arg_strings == ["--"]:
            raise argparse.ArgumentError(action, "expected a value, got --")
        return super()._get_values(action, arg_strings)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Raise ArgumentError for a value or command that is not a choice, worded as for a setting with choices."""
        if action.choices is not None and value not in action.choices:
            *others, last = map(str, action.choices)
            words = f"{', '.join(others)} or {last}" if others else last
            near = nearest(str(value), [*others, last])
            raise argparse.ArgumentError(action, f"expected {words}, got {shown(value)}{near}")

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print the help; unlike argparse's own method, raise an error if it cannot be written."""
        print(message, end="", file=file)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse all of `argv`; `--batch_size` is accepted for `--batch-size`.

        Raises:
            UserError: an unknown flag, a missing value, or an unexpected argument.
        """
        complete_if_asked(self)
        flags = self._flags(argv)
        words = [dashed(word, flags) for word in argv]
        args, unknown = self.parse_known_args(words)
        if unknown:
            raise UserError(self._unknown(unknown[0], words, flags))
        return args

    def _unknown(self, word: str, words: Sequence[str], flags: Mapping[str, argparse.Action]) -> str:
        """The message for a word that no flag and no argument accepts."""
        flag = word.split("=")[0]
        near = nearest(flag, [name for name, action in flags.items() if action.help != argparse.SUPPRESS])
        if flag.startswith("-"):
            return f"unknown flag {flag}{near}"
        before = [flags[first] for first, second in itertools.pairwise(words) if second == word and first in flags]
        if before and before[0].nargs == 0:
            return f"unknown argument {word}: {_without_value(before[0].option_strings)}"
        return f"unknown argument {word}{near if dashed(f'--{flag}', flags) in flags else ''}"

    def _flags(self, argv: Sequence[str]) -> dict[str, argparse.Action]:
        """The flags that `argv` may contain: those of this parser and those of the command that it names."""
        parsers: list[argparse.ArgumentParser] = [self]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += [action.choices[word] for word in argv if word in action.choices][:1]
        return {flag: action for parser in parsers for flag, action in parser._option_string_actions.items()}


def _without_value(switch: Sequence[str]) -> str:
    """The part of a message that says how to write a switch with these names."""
    return f"expected {' or '.join(switch)} without a value"


def dashed(word: str, flags: Collection[str]) -> str:
    """`word` with the underscores of its name replaced by dashes, if that makes it a flag; other words unchanged."""
    name, equals, value = word.partition("=")
    flag = name.replace("_", "-")
    return flag + equals + value if flag in flags else word


def place(text: str) -> Path:
    """Argument type for a path; expands `~`, which a shell leaves as it is in `--flag=~/x`."""
    try:
        return Path(expand_home(text))
    except UserError as error:  # a ValueError, whose message argparse would not show
        raise argparse.ArgumentTypeError(str(error)) from None


def script_file(project: Path, name: str) -> Path:
    """The file of a script, or of a module that is run as a script, in the code of a project folder."""
    return CODE_ROOT / name if project == PROJECT_ROOT else project / name


def whole(least: int, most: int) -> Callable[[str], int]:
    """Argument type for a whole number from `least` to `most`."""

    def number(text: str) -> int:
        if not text.isdecimal() or len(text) > 9 or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} to {most:,}, got {text!r}")
        return int(text)

    return number


TIME_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def timespan(text: str) -> float:
    """Argument type for a duration such as 90s, 5m, 1.5h or 2d, in seconds."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]+)?)([smhd])", text.strip())
    if match is None or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"expected a time like 90s, 5m or 1.5h, got {shown(text)}")
    return float(match[1]) * TIME_UNITS[match[2]]


def numbers(text: str, flag: str, kind: Callable[[str], Number], least: Number) -> list[Number]:
    """Parse the comma-separated numbers of a flag.

    Raises:
        UserError: a value is not a number or is below `least`, or the list is empty.
    """
    try:
        values = [kind(word) for word in text.split(",") if word.strip()]
    except ValueError:
        values = []
    if not values or min(values) < least:
        raise UserError(f"{flag}: expected numbers >= {number_text(least)}, separated by commas, got {text!r}")
    return values


@contextlib.contextmanager
def naming(flag: str) -> Iterator[None]:
    """Begin the message of a UserError that the block raises with the flag that it concerns."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{flag}: {error}") from None


class Main(Protocol):
    """The `main` of a script: `main()` reads sys.argv; `main(argv)` is for tests and notebooks."""

    def __call__(self, argv: Sequence[str] | None = None) -> int: ...


def _lines(message: str, argv: Sequence[str]) -> list[str]:
    """Split a message into lines, but not at a line break that comes from an argument, such as a file name."""
    for word in argv:
        for part in (word, word.partition("=")[2]):
            if "\n" in part:
                message = message.replace(part, one_line(part))
    return message.splitlines()


def _bounded(line: str) -> str:
    """Cut out the middle of a long message: it begins with the place of the error and often ends with the reason."""
    if len(line) <= ERROR_LENGTH:
        return line
    return f"{line[: ERROR_LENGTH // 2]}... ({len(line):,} characters) ...{line[-ERROR_LENGTH // 2 :]}"


def _path_mistake(error: OSError | ValueError) -> str:
    """The message, on one line, for a path that no system call accepts; empty for any other error."""
    if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return f"{cut(one_line(str(error.filename)), SHOWN)}: {error.strerror}"
    return "a path contains a NUL character" if "embedded null" in str(error) else ""


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a traceback as Python does, but through `printable`: the message may contain text from a run."""
    print(printable("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


def script(main: Callable[[Sequence[str]], int]) -> Main:
    """Decorator of a script's `main(argv)`: prepares its streams and reports user errors in one line, with status 2.

    Other exit statuses: 130 after Ctrl-C, 128 + n after another stop signal n, 141 without a message after a closed
    pipe (`... | head`), and 1 with one line if memory runs out or stdout or a file cannot be written to the disk.
    """

    @functools.wraps(main)
    def wrapper(argv: Sequence[str] | None = None) -> int:
        prepare_streams()
        sys.excepthook = _print_traceback
        tune_process()
        if main.__module__ == "__main__":
            begin_script()
        try:
            try:
                return main(sys.argv[1:] if argv is None else argv)
            except UserError as error:
                for line in _lines(str(error), sys.argv[1:] if argv is None else argv):
                    print(f"error: {_bounded(one_line(line))}", file=sys.stderr)
                return 2
            except (OSError, ValueError) as error:
                if not (mistake := _path_mistake(error)):
                    raise
                print(f"error: {mistake}", file=sys.stderr)
                return 2
            finally:
                sys.stdout.flush()  # now, because at exit it would be too late to report an error
        except KeyboardInterrupt as interruption:
            print("interrupted", file=sys.stderr)
            return 128 + getattr(interruption, "signum", signal.SIGINT)
        except RankError as error:
            print(f"error: {_bounded(one_line(str(error)))}", file=sys.stderr)
            return 1
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            words = [] if isinstance(error, OutOfMemoryError) else ["out of memory"]
            words += [printable(line) for line in str(error).strip().splitlines()[:1]]
            print(f"error: {': '.join(words)}", file=sys.stderr)
            return 1
        except BrokenPipeError:
            drop(sys.stdout)
            return 141
        except OSError as error:
            if why_lost(sys.stdout) is None:
                if error.errno not in DISK_ERRORS:
                    raise
                where = f"{error.filename}: " if error.filename else ""
                print(f"error: {one_line(f'{where}{error.strerror}')}", file=sys.stderr)
                return 1
            drop(sys.stdout)
            print(f"error: output: cannot be written: {error.strerror}", file=sys.stderr)
            return 1

    return wrapper
