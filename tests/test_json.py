"""Every command that prints a result has --json."""

from __future__ import annotations

import importlib

import pytest
from conftest import ROOT

import experiments
import weights
from utils.experiments.commands import COMMANDS

# A script that is not listed here, and a command of one that is, fail this test until they have --json, too.
SCRIPTS = ("train", "inference", "evaluate", "profile_model", "prepare", "sweep")
WITH_COMMANDS = {
    "experiments": [command.name for command in COMMANDS],
    "weights": [command.name for command in weights.COMMANDS],
    "prepare": ["list", "show", "verify"],
}
WITHOUT = {"workbench", "model", "data", "tokenizer"}  # they are imported


def test_no_script_is_left_out() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} == {*SCRIPTS, *WITH_COMMANDS, *WITHOUT, "serve"}
    assert "gate" in WITH_COMMANDS["experiments"]
    assert experiments.COMMANDS is COMMANDS


@pytest.mark.parametrize(
    "words",
    [[script] for script in SCRIPTS] + [[script, name] for script, names in WITH_COMMANDS.items() for name in names],
    ids=" ".join,
)
def test_every_command_has_json(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        importlib.import_module(words[0]).main([*words[1:], "--help"])
    assert "--json" in capsys.readouterr().out
