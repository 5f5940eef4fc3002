"""No command prints a control character that comes from a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_runs import GIT, RESOLVED, make_run, training_records, write

import experiments
import inference
import train
from utils.runs.seal import write_seal

EVIL = "x\x1b[2J\x9b31m\r\x07\u202ey\x7f"
ESCAPED = r"x\x1b[2J\x9b31m"
COMMANDS = (
    *(["list"], ["list", "--columns", "all"], ["list", "--where", f"note = '{EVIL}'"], ["list", "--columns", EVIL]),
    *(
        ["sql", "SELECT id, note, tags, exit_reason FROM runs"],
        ["sql", f'SELECT 1 AS "{EVIL}"'],
        ["sql", EVIL],
    ),
    *(
        ["show", "a"],
        ["show", EVIL],
        ["diff", "a", "b"],
        ["compare", "a", "b"],
        ["compare", "a", "b", "--metric", EVIL],
    ),
    *(["explain", "a", "note"], ["explain", "a", EVIL], ["explain", EVIL], ["plot", "a", "b"], ["check", "a"]),
    *(["plot", "a", "--metric", EVIL], ["plot", "a", "--out", EVIL], ["report", "a", "--out", f"{EVIL}/{EVIL}"]),
    *(["edit", "a", "--note", EVIL], ["edit", "a", "--tag", EVIL], ["edit", "a", "--add-tag", EVIL]),
    *(["promote", "a", EVIL], ["prune", "--keep-last", "1"], ["prune", "--max-size", EVIL], ["seal", "a"]),
    *(["reproduce", "a"], ["rebuild", "b"], ["seal", EVIL], ["list", f"--{EVIL}"]),
)


@pytest.fixture
def runs(runs_dir: Path) -> Path:
    """Two runs with control characters in all their texts, and a damaged one with such a name."""
    record: dict[str, Any] = {
        "exit_reason": EVIL,
        "argv": ["train.py", EVIL],
        "git": {**GIT, "branch": EVIL, "remote": EVIL, "commit": EVIL},
        "parent": {"run": EVIL, "path": EVIL, "step": 1, "relation": EVIL},
        "resolved": {**RESOLVED, **dict.fromkeys(("torch", "processor", "device", "dtype", "dataset"), EVIL)},
        "views": {EVIL: {"state": EVIL, "reason": EVIL}},
        "resumes": [{"time": EVIL, "step": 1, "git": {"commit": EVIL, "code": EVIL}}],
        "start": EVIL,
        "status": "failed",
    }
    notes = {"tags": [EVIL], "note": EVIL}
    settings = {"note": EVIL, "tags": (EVIL,), "experiment": EVIL, "dataset": EVIL, "aim_logging": False}
    metrics = [{**line, EVIL: 1.0} for line in training_records([3.0, 2.0])]
    for name, tag in (("a", EVIL), ("b", None)):
        run = make_run(runs_dir, name, tag=tag, notes=notes, settings=settings, metrics=metrics, **record)
        write(run / "meta" / "env.txt", f"python: {EVIL}\n{EVIL}: {EVIL}\npackages:\n  {EVIL}=={EVIL}\n")
        write(run / "artifacts" / EVIL, "x")
        write_seal(run)
        write(run / "logs" / EVIL, "added")
        write(run / "artifacts" / "checkpoints" / "step_000001" / "manifest.json", {EVIL: [1, 1]})
    write(runs_dir / EVIL / "run.json", EVIL)
    write(runs_dir / "b" / "logs" / "metrics.jsonl", EVIL)
    write(runs_dir / "models.json", {EVIL: [{"run": EVIL, "checkpoint": EVIL, "sha256": EVIL}]})
    return runs_dir


def controls(text: str) -> set[str]:
    return {character for character in text if not character.isprintable() and character not in "\n\t"}


def test_no_command_prints_a_control_character(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(runs.parent)
    escaped = 0
    for words in COMMANDS:
        experiments.main([*words, "--runs-dir", str(runs)])
        output = capsys.readouterr()
        assert (words[0], controls(output.out + output.err)) == (words[0], set())
        escaped += ESCAPED in output.out + output.err
    assert escaped > len(COMMANDS) // 2


def test_json_output_escapes_control_characters_and_keeps_the_value(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["list"], ["show", "a"], ["diff", "a", "b"], ["explain", "a", "note"], ["edit", "a", "--pin"]):
        experiments.main([*words, "--json", "--runs-dir", str(runs)])
        output = capsys.readouterr().out
        assert (words[0], controls(output)) == (words[0], set())
        assert (repr(EVIL)[1:-1] in repr(json.loads(output))) == (words[0] != "diff")  # the runs do not differ


def test_no_script_prints_a_control_character(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = write(tmp_path / "x.yaml", '"a\\e[2J": 1\n')
    value = write(tmp_path / "y.yaml", 'device: "a\\e[2J"\nnote: "\\x9b"\n')
    broken = write(tmp_path / "z.json", '{"a\x1b[2J": 1}')
    for main, words in (
        *(
            (train.main, [flag, EVIL])
            for flag in ("--resume", "--init-from", "--dataset", "--config", "--device", "--run-tag")
        ),
        *((train.main, ["--config", str(path)]) for path in (file, value, broken)),
        (train.main, ["--resume", "a", "--runs-dir", str(runs)]),
        (train.main, [EVIL]),
        (inference.main, [EVIL]),
        (inference.main, ["a", "--runs-dir", str(runs)]),
    ):
        assert main(words) == 2, words
        output = capsys.readouterr()
        assert (words, controls(output.out + output.err)) == (words, set())
