"""Command lines: flags generated from the configuration, help by section, mistakes reported in one line."""

from __future__ import annotations

import argparse
import errno
import functools
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NoReturn, Protocol, TypeVar, get_args, get_origin

from utils.config.fields import FIELDS, SECTION_OF, SECTIONS, expected, field_fact, get_value
from utils.config.loader import ConfigError, ConfigLoader, LoadedConfig, flag_name
from utils.config.settings import TOKENIZERS, Config
from utils.errors import SHOWN, OutOfMemoryError, RankError, UserError, cut, is_out_of_memory, nearest, number_text
from utils.files import expand_home
from utils.machine.process import tune_process
from utils.terminal.streams import drop, prepare_streams, why_lost
from utils.terminal.words import one_line, printable, setting_text

PROJECT_ROOT = Path(__file__).resolve().parents[2]
ERROR_LENGTH = 3000  # characters of a message
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
            message += "; one that begins with a dash is given as --FLAG=VALUE"
        raise UserError(f"{message} (see {self.prog} --help)")

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print the help; unlike argparse's own method, it does not hide that it could not."""
        print(message, end="", file=file)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse all of `argv`; `--batch_size` is `--batch-size`.

        Raises:
            UserError: an unknown flag, a missing value, or an argument too many.
        """
        flags = self._flags()
        args, unknown = self.parse_known_args([_dashed(word, flags) for word in argv])
        if unknown:
            flag = unknown[0].split("=")[0]
            kind = "flag" if flag.startswith("-") else "argument"
            raise UserError(f"unknown {kind} {flag}{nearest(flag, flags)}")
        return args

    def _flags(self) -> list[str]:
        """All flags, including those of commands."""
        commands = [a for a in self._actions if isinstance(a, argparse._SubParsersAction)]
        parsers = [self, *(parser for action in commands for parser in action.choices.values())]
        return [flag for parser in parsers for flag in parser._option_string_actions]


def _dashed(word: str, flags: Sequence[str]) -> str:
    """`word` with dashes for underscores in its name if that makes it a flag; any other word may be a text."""
    name, equals, value = word.partition("=")
    dashed = name.replace("_", "-")
    return dashed + equals + value if dashed in flags else word


def place(text: str) -> Path:
    """The type of a flag that takes a path; `~` is the home folder, which a shell leaves as it is in `--flag=~/x`."""
    try:
        return Path(expand_home(text))
    except UserError as error:  # of a ValueError argparse would hide the words
        raise argparse.ArgumentTypeError(str(error)) from None


def numbers(text: str, flag: str, kind: Callable[[str], Number], least: Number) -> list[Number]:
    """The value of a flag that takes a comma-separated list.

    Raises:
        UserError: a value is not a number or is below `least`, or there are none.
    """
    try:
        values = [kind(word) for word in text.split(",") if word.strip()]
    except ValueError:
        values = []
    if not values or min(values) < least:
        raise UserError(f"{flag}: expected numbers >= {number_text(least)}, separated by commas, got {text!r}")
    return values


def add_config_flags(
    parser: argparse.ArgumentParser,
    defaults: Config,
    sections: Iterable[str] = SECTIONS,
    keys: Collection[str] = FIELDS,
) -> None:
    """One flag for every setting among `keys`, grouped by section; the help shows the value in `defaults`."""
    for section in sections:
        model = SECTIONS[section]
        group = parser.add_argument_group(section, model.__doc__)
        for key in filter(keys.__contains__, model.model_fields):
            help_text = f"{FIELDS[key].description} ({_limits(key, defaults)})".replace("%", "%%")
            if FIELDS[key].annotation in (bool, bool | None):
                group.add_argument(
                    flag_name(key), action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=help_text
                )
            else:
                group.add_argument(flag_name(key), metavar=_metavar(key), default=argparse.SUPPRESS, help=help_text)


def _limits(key: str, defaults: Config) -> str:
    """Bounds, unit and default of one setting, for its help."""
    value = get_value(defaults, key)
    default = setting_text(None if value == () else value)
    if not default.strip() or not default.isprintable():
        default = repr(value)
    bounds = re.search(r"[<>].*?(?= or |$)", expected(key))
    parts = (bounds and bounds.group(), field_fact(key, "unit"), f"default: {default}")
    return ", ".join(part for part in parts if part)


def _metavar(key: str) -> str:
    annotation = FIELDS[key].annotation
    if key == "tokenizer":
        return "|".join((*TOKENIZERS, "hf:PATH"))
    if get_origin(annotation) is Literal:
        return "|".join(get_args(annotation))
    name = {"integer": "N", "number": "X", "list": "A,B"}.get(expected(key).split(" ")[0], "TEXT")
    words = [word for member in get_args(annotation) if get_origin(member) is Literal for word in get_args(member)]
    return "|".join([name, *words])


@dataclass(frozen=True)
class ExperimentArguments:
    """The parsed command line of a script that takes a whole configuration.

    files: the configuration files of --config.
    overrides: settings given as flags.
    own: all arguments, the script's own ones among them.
    """

    loader: ConfigLoader
    files: Sequence[Path] = ()
    overrides: Mapping[str, str | bool] = field(default_factory=dict)
    own: argparse.Namespace = field(default_factory=argparse.Namespace)

    def load(self) -> LoadedConfig:
        """The merged, validated configuration.

        Raises:
            ConfigError: a mistake on the command line or in a configuration file.
        """
        return self.loader.load(self.files, self.overrides)


def parse_experiment(
    argv: Sequence[str],
    parser: Parser,
    root: Path = PROJECT_ROOT,
    sections: Collection[str] = SECTIONS,
    keys: Collection[str] = FIELDS,
) -> ExperimentArguments:
    """Parse the command line of a script that takes a whole configuration, or sections of it.

    Args:
        argv: the arguments of the script.
        parser: has the script's own flags already.
        root: the project folder.
        sections: whose settings become flags, if they are among `keys`.

    Raises:
        UserError: a mistake on the command line.
        SystemExit: after `--help`.
    """
    files = parser.add_argument_group("configuration files")
    files.add_argument(
        "--config",
        metavar="FILE",
        action="append",
        default=[],
        type=place,
        help="settings on top of configs/ (repeatable)",
    )
    files.add_argument("--config-dir", metavar="DIR", type=place, help="folder of the shared files (default: configs)")
    parser.usage = parser.usage or f"python {parser.prog} [--config FILE ...] [--FLAG VALUE ...]"
    wants_help = "-h" in argv or "--help" in argv
    defaults, broken = _merged_defaults(argv, root) if wants_help else (Config(), None)
    if broken:
        parser.epilog = f"The defaults shown are the built-in ones, because the files cannot be merged: {broken}"
    add_config_flags(parser, defaults, sections, keys)
    args = parser.parse(argv)
    overrides = {k: v for k, v in vars(args).items() if SECTION_OF.get(k) in sections and k in keys}
    return ExperimentArguments(ConfigLoader(root, args.config_dir), args.config, overrides, args)


def _merged_defaults(argv: Sequence[str], root: Path) -> tuple[Config, str | None]:
    """The configuration in the files, for the help; the built-in defaults and the reason if they cannot be merged."""
    files_only = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files_only.add_argument("--config", action="append", default=[], type=place)
    files_only.add_argument("--config-dir", type=place)
    try:
        args, _ = files_only.parse_known_args([_dashed(word, ["--config-dir"]) for word in argv])
        return ConfigLoader(root, args.config_dir).load(args.config).config, None
    except (ConfigError, SystemExit) as error:
        return Config(), str(error)


class Main(Protocol):
    """`main()` reads sys.argv; `main(argv)` is for tests and notebooks."""

    def __call__(self, argv: Sequence[str] | None = None) -> int: ...


def _lines(message: str, argv: Sequence[str]) -> list[str]:
    """The lines of a message; a line break in a name from the command line ends none."""
    for word in argv:
        for part in (word, word.partition("=")[2]):
            if "\n" in part:
                message = message.replace(part, one_line(part))
    return message.splitlines()


def _bounded(line: str) -> str:
    """A message without the middle of a long one: its place is at the beginning, the reason often at the end."""
    if len(line) <= ERROR_LENGTH:
        return line
    return f"{line[: ERROR_LENGTH // 2]}... ({len(line):,} characters) ...{line[-ERROR_LENGTH // 2 :]}"


def _path_mistake(error: OSError | ValueError) -> str:
    """What is wrong with a path that no system call takes, as one line; empty for any other error."""
    if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return f"{cut(one_line(str(error.filename)), SHOWN)}: {error.strerror}"
    return "a path contains a NUL character" if "embedded null" in str(error) else ""


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """As Python does at the end of a script, but `printable`: the message may be text of a run."""
    print(printable("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


# Of the machine, not of the program: one line.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE)


def script(main: Callable[[Sequence[str]], int]) -> Main:
    """Decorator of a script's `main(argv)`: prepares its streams, and reports mistakes in one line, with status 2.

    Other endings: 130 after Ctrl-C, 128 + its number after another stop signal, 141 without a message after a
    closed pipe (`... | head`), and 1 with one line if memory is too small, or the disk lets stdout or a file not be
    written.
    """

    @functools.wraps(main)
    def wrapper(argv: Sequence[str] | None = None) -> int:
        prepare_streams()
        sys.excepthook = _print_traceback
        tune_process()
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
                sys.stdout.flush()  # at exit it would be too late to report an error
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
