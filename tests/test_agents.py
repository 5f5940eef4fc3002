"""AGENTS.md is short, and its commands, flags and pages exist."""

from __future__ import annotations

import importlib
import re

import pytest
from conftest import ROOT

AGENTS = (ROOT / "AGENTS.md").read_text(encoding="utf-8")
COMMANDS = [line.split("#")[0].split()[1:] for line in AGENTS.splitlines() if line.startswith("    python ")]


def test_agents_md_has_at_most_forty_lines() -> None:
    assert len(AGENTS.splitlines()) <= 40


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_each_command_has_the_flags_it_is_shown_with(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    script, *rest = words
    command = rest[:1] if script == "experiments.py" else []
    with pytest.raises(SystemExit):
        importlib.import_module(script.removesuffix(".py")).main([*command, "--help"])
    helped = capsys.readouterr().out
    flags = [word.strip("[]") for word in rest if word.strip("[]").startswith("--")]
    assert [flag for flag in flags if not re.search(rf"{flag}\b", helped)] == []


@pytest.mark.parametrize("link", re.findall(r"docs/\w+\.md", AGENTS))
def test_each_page_it_links_to_exists(link: str) -> None:
    assert (ROOT / link).is_file()
