"""Shell completion: the words offered for a command line, and the files that shells source."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from fake_runs import make_run

from utils.terminal.completion import SHELLS, write_completions

CASES = [
    ("train.py --lear", {"--learning-rate"}),
    ("train.py --tokenizer b", {"byte", "bpe"}),
    ("train.py --batch-size ", {"auto"}),
    ("experiments.py sh", {"show"}),
    ("experiments.py show --runs-dir {runs} ba", {"baseline"}),
    ("experiments.py explain --runs-dir {runs} warmup", {"warmup_iters"}),
    ("experiments.py explain --runs-dir {runs} baseline warmup", {"warmup_iters"}),
]


@pytest.mark.parametrize(("line", "expected"), CASES)
def test_flags_values_commands_and_runs_are_completed(line: str, expected: set[str], tmp_path: Path) -> None:
    make_run(tmp_path, "20260131_142501_baseline")
    line, out = f"python {line.format(runs=tmp_path)}", tmp_path / "out"
    asked = {"_ARGCOMPLETE": "2", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
    asked |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(out), "_ARGCOMPLETE_SUPPRESS_SPACE": "1"}
    code = "import sys; sys.modules['torch'] = None; import runpy; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    command = [sys.executable, "-c", code, line.split()[1]]
    subprocess.run(command, cwd=ROOT, env=os.environ | asked, check=True)
    assert {word.strip() for word in out.read_text().split("\n")} == expected


def test_each_shell_has_a_completion_file_that_affects_only_python(tmp_path: Path) -> None:
    write_completions(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(SHELLS)
    bash = (tmp_path / "bash").read_text()
    assert " -D " not in bash
    assert "_python_argcomplete_global python python3" in bash
