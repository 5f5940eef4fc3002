"""Completion of flags, settings and their values, and names of runs in bash, zsh and fish, by the package argcomplete.

python -m utils.terminal.completion FOLDER   # writes the files that a shell sources (make completion)
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from utils.terminal.cli import Parser

MODELS = "models.json"  # promoted names, in the folder of runs; as in utils/runs/layout.py, not to be imported here
SHELLS = ("bash", "zsh", "fish")
PROGRAM = "lm-workbench"
MOST_RUNS = 500  # the newest; more would be slow and of no help


def complete_if_asked(parser: Parser) -> None:
    """If a shell asks for completions (by the variable _ARGCOMPLETE), print those that fit and end the process."""
    if "_ARGCOMPLETE" not in os.environ:
        return
    try:
        import argcomplete
    except ImportError:
        sys.exit(1)
    for action in actions_of(parser):
        name = str(action.metavar or "")
        if name.startswith("RUN"):
            action.completer = complete_run  # type: ignore[attr-defined]
        elif "|" in name and action.choices is None:
            words = [word for word in name.split("|") if not word.isupper()]  # N stands for a number
            action.completer = argcomplete.ChoicesCompleter(words)  # type: ignore[attr-defined]
        elif name == "KEY":
            action.completer = complete_setting  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser, always_complete_options="long")


def actions_of(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield the arguments of a parser and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from actions_of(command)


def complete_run(parsed_args: argparse.Namespace, **_: Any) -> list[str]:
    """Tags and ids of runs, newest first, promoted names, and `latest`; what cannot be read is left out."""
    from utils.files import read_json
    from utils.terminal.cli import PROJECT_ROOT

    folder = getattr(parsed_args, "runs_dir", None)
    if folder is None:
        from utils.config.loader import ConfigLoader

        with contextlib.suppress(Exception):  # a broken configuration file: its error cannot be shown here
            folder = ConfigLoader(PROJECT_ROOT).load().config.tracking.runs_dir
    runs = PROJECT_ROOT / (folder or "runs")
    found: dict[str, None] = {}
    with contextlib.suppress(OSError):
        ids = sorted(
            (entry.name for entry in os.scandir(runs) if entry.is_dir() and entry.name[0] != "."), reverse=True
        )
        for name in ids[:MOST_RUNS]:
            tag = name.split("_", 2)[2:]  # 20260131_142501_baseline
            found.update(dict.fromkeys([*tag, name]))
    with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
        models = read_json(runs / MODELS)
        found.update(
            {f"{name}@v{number}": None for name, versions in models.items() for number in range(1, 1 + len(versions))}
        )
    return [*found, *(["latest"] if found else [])]


def complete_setting(**_: Any) -> list[str]:
    """The names of all settings."""
    from utils.config.fields import FIELDS

    return list(FIELDS)


def write_completions(folder: Path) -> None:
    """Write a file for each shell that completes `python SCRIPT.py` (bash, zsh) and lm-workbench (all three)."""
    import argcomplete

    common = Path(argcomplete.__file__).with_name("bash_completion.d") / "_python-argcomplete"
    # As shipped, it would complete the arguments of every command that has no completion of its own.
    scripts = common.read_text(encoding="utf-8")
    scripts = scripts.replace("-D -F _python_argcomplete_global", "-F _python_argcomplete_global python python3")
    scripts = scripts.replace(
        "compdef _python_argcomplete_global -default-", "compdef _python_argcomplete_global python python3"
    )
    folder.mkdir(parents=True, exist_ok=True)
    for shell in SHELLS:
        text = argcomplete.shellcode([PROGRAM], shell=shell)
        (folder / shell).write_text(text if shell == "fish" else f"{scripts}\n{text}", encoding="utf-8")


if __name__ == "__main__":
    write_completions(Path(sys.argv[1]))
