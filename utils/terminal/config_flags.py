"""The flags of settings, one for each, with help by section; and the configuration that flags and files result in."""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args, get_origin

from utils.config.fields import FIELDS, SECTION_OF, SECTIONS, expected, field_fact, get_value
from utils.config.loader import ConfigError, ConfigLoader, LoadedConfig, flag_name
from utils.config.settings import TOKENIZERS, Config
from utils.terminal.cli import PROJECT_ROOT, Parser, dashed, place
from utils.terminal.words import setting_text


def add_config_flags(
    parser: argparse.ArgumentParser,
    defaults: Config,
    sections: Iterable[str] = SECTIONS,
    keys: Collection[str] = FIELDS,
) -> None:
    """Add a flag for every setting among `keys`, grouped by section; the help shows the value in `defaults`."""
    for section in sections:
        model = SECTIONS[section]
        group = parser.add_argument_group(section, str(model.__doc__).partition("\n")[0])  # without the example
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
    bounds = re.search(r"[<>].*?(?= or | \(|$)", expected(key))
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
    own: all arguments, including the script's own.
    """

    loader: ConfigLoader
    files: Sequence[Path] = ()
    overrides: Mapping[str, str | bool] = field(default_factory=dict)
    own: argparse.Namespace = field(default_factory=argparse.Namespace)

    def load(self) -> LoadedConfig:
        """Merge and validate the configuration.

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
        parser: already has the script's own flags.
        root: the project folder.
        sections: the sections whose settings become flags.
        keys: the settings that become flags.

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
    """The configuration in the files, for the help; if they cannot be merged, the built-in one and the reason."""
    files_only = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files_only.add_argument("--config", action="append", default=[], type=place)
    files_only.add_argument("--config-dir", type=place)
    try:
        args, _ = files_only.parse_known_args([dashed(word, ["--config-dir"]) for word in argv])
        return ConfigLoader(root, args.config_dir).load(args.config).config, None
    except (ConfigError, SystemExit) as error:
        return Config(), str(error)
