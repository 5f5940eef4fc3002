"""Flags for all settings, help by section, and mistakes in one line with exit status 2, all without torch."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import experiments
from utils.config.fields import FIELDS, SECTIONS, flat
from utils.config.loader import LoadedConfig
from utils.config.settings import Config
from utils.errors import UserError
from utils.machine.signals import StopSignal
from utils.terminal.cli import Parser, script
from utils.terminal.config_flags import add_config_flags, parse_experiment

ROOT = Path(__file__).resolve().parents[2]
SWITCHES = [key for key in FIELDS if bool in (FIELDS[key].annotation, *getattr(FIELDS[key].annotation, "__args__", ()))]
VALUES = [key for key in FIELDS if key not in SWITCHES]
HEAVY = ("torch", "numpy", "aim", "tensorboard", "safetensors", "git")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A project folder with one shared file."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "shared.yaml").write_text("n_layer: 3\naim_logging: true\n")
    return tmp_path


def parse(root: Path, *argv: str) -> LoadedConfig:
    return parse_experiment(argv, Parser(prog="train.py"), root).load()


def values(root: Path, *argv: str) -> dict[str, Any]:
    return flat(parse(root, *argv).config)


def flags_only(*argv: str) -> dict[str, Any]:
    """The flags as parsed, before validation."""
    parser = Parser(prog="train.py")
    add_config_flags(parser, Config())
    return vars(parser.parse(argv))


@pytest.mark.parametrize("key", VALUES)
def test_every_setting_with_a_value_has_a_flag_with_dashes_or_underscores(key: str) -> None:
    dashed = "--" + key.replace("_", "-")
    for words in ([dashed, "a_b"], [f"{dashed}=a_b"], [f"--{key}", "a_b"], [f"--{key}=a_b"]):
        assert flags_only(*words) == {key: "a_b"}


@pytest.mark.parametrize("key", SWITCHES)
def test_every_switch_can_be_turned_on_and_off(key: str) -> None:
    dashed = key.replace("_", "-")
    assert flags_only(f"--{dashed}") == flags_only(f"--{key}") == {key: True}
    assert flags_only(f"--no-{dashed}") == flags_only(f"--no_{key}") == {key: False}
    without = f"expected --{dashed} or --no-{dashed} without a value"
    for flag in (f"--{dashed}", f"--no-{dashed}", f"--{key}"):
        with pytest.raises(UserError, match=f"^{without}, got 'true'"):
            flags_only(f"{flag}=true")
        with pytest.raises(UserError, match=f"^unknown argument true: {without}$"):
            flags_only(flag, "true")


def test_flags_that_are_not_given_set_nothing() -> None:
    assert flags_only() == {}


def test_the_flags_of_a_large_model_work_together(root: Path) -> None:
    line = "--batch-size 8 --learning-rate 0.001 --max-iters 5000 --n-embd 256 --n-head 8 --n-layer 6 --block-size 128"
    loaded = parse(root, *line.split(), "--run-tag", "large-model")
    expected = {"batch_size": 8, "learning_rate": 0.001, "max_iters": 5000, "n_embd": 256, "n_head": 8, "n_layer": 6}
    expected |= {"block_size": 128, "run_tag": "large-model"}
    got = flat(loaded.config)
    assert {key: got[key] for key in expected} == expected
    assert loaded.source("n_layer") == "--n-layer"


def test_flags_override_config_files_and_these_override_the_shared_ones(root: Path) -> None:
    (root / "a.yaml").write_text("n_layer: 5\nseed: 5\nn_head: 2\n")
    (root / "b.yaml").write_text("seed: 6\n")
    files = ("--config", str(root / "a.yaml"), "--config", str(root / "b.yaml"))
    got = values(root, *files, "--n-head", "1", "--no-aim-logging")
    assert (got["n_layer"], got["seed"], got["n_head"], got["aim_logging"]) == (5, 6, 1, False)


def test_config_dir_replaces_the_shared_folder(root: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    assert values(root, "--config-dir", str(tmp_path / "other"))["n_layer"] == 4
    assert values(root, f"--config_dir={tmp_path / 'other'}")["n_layer"] == 4


def test_lists_are_split_at_commas_and_none_unsets_a_value(root: Path) -> None:
    got = values(root, "--tags", "a, b,c", "--threads", "none", "--run-tag", "None", "--note", "none")
    assert (got["tags"], got["threads"], got["run_tag"], got["note"]) == (("a", "b", "c"), None, None, "none")


def test_the_last_of_repeated_flags_wins(root: Path) -> None:
    assert values(root, "--seed", "1", "--seed", "2")["seed"] == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--batch-sise", "8"], "unknown flag --batch-sise; did you mean --batch-size?"),
        (["--batch_sise=8"], "unknown flag --batch_sise; did you mean --batch-size?"),
        (["--no-aim-loging"], "unknown flag --no-aim-loging; did you mean --no-aim-logging?"),
        (["--zzzzzzzz"], "unknown flag --zzzzzzzz"),
        (["--batch", "8"], "unknown flag --batch"),  # not an abbreviation: a new setting could make it ambiguous
        (["large"], "unknown argument large"),
        (["n_layer=3"], "unknown argument n_layer=3; did you mean --n-layer?"),
        (["--batch-size"], "argument --batch-size: expected one argument; a value that begins with a dash is"),
        (["--batch-size", "--seed", "1"], "argument --batch-size: expected one argument; a value"),
        (["--batch-size", "0"], "--batch-size: expected integer >= 1 or auto, got '0'"),
        (["--learning-rate", "nan"], "--learning-rate: expected number > 0 and <= 10, got 'nan'"),
        (["--run-tag", "a/b"], "--run-tag: a tag is 1 to 64 letters"),
        (["--run-tag", "latest"], "--run-tag: the tag 'latest' is reserved"),
        (["--run-tag", "x" * 65], "--run-tag: a tag is 1 to 64 letters"),
        (["--config", "/no/such.yaml"], "/no/such.yaml: no such configuration file"),
        (["--config-dir", "/no/such"], "--config-dir /no/such: no such folder"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_flag(root: Path, argv: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(root, *argv)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def help_text(capsys: pytest.CaptureFixture[str], root: Path, *argv: str) -> str:
    with pytest.raises(SystemExit) as caught:
        parse(root, *argv, "--help")
    assert caught.value.code == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def entry(text: str, flag: str) -> str:
    """The help of one flag on one line."""
    found = re.search(rf"^  {flag}(?=[ ,]).*?(?=\n(  -|\S|\n|$))", text, re.MULTILINE | re.DOTALL)
    assert found, f"{flag} has no help"
    return " ".join(found[0].split())


def test_help_has_every_flag_under_its_section(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    text = help_text(capsys, root)
    positions = [text.index(f"\n{section}:\n") for section in SECTIONS]
    assert positions == sorted(positions)
    for (section, model), start, end in zip(SECTIONS.items(), positions, [*positions[1:], len(text)], strict=True):
        for key in model.model_fields:
            assert f"\n  --{key.replace('_', '-')}" in text[start:end], f"{key} is missing in {section}"


def test_help_has_no_doctests_and_no_trailing_blanks(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    text = help_text(capsys, root)
    assert (
        "\nmodel:\n  A decoder-only transformer; settings left at none are derived from the others.\n\n  --n-layer N"
        in text
    )
    assert ">>>" not in text
    assert not re.search(" $", text, re.MULTILINE)


def test_help_shows_meaning_unit_choices_and_default(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    text = help_text(capsys, root)
    assert entry(text, "--block-size") == "--block-size N context length (T) (>= 1 and <= 65536, tokens, default: 64)"
    assert entry(text, "--ngram-rows").endswith("no such tables (>= 1, default: none)")
    assert entry(text, "--norm").startswith("--norm layernorm|rmsnorm normalisation")
    assert "default: none" in entry(text, "--threads")
    assert "default: none" in entry(text, "--tags")
    assert "default: on" in entry(text, "--keep-best")
    assert "default: none" in entry(text, "--deterministic")
    assert "default: 0.001" in entry(text, "--learning-rate")
    assert entry(text, "--aim-logging").startswith("--aim-logging, --no-aim-logging")


def test_help_shows_the_merged_values(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    (root / "a.yaml").write_text("n_head: 2\nnote: 100%\n")
    text = help_text(capsys, root, "--config", str(root / "a.yaml"))
    assert "default: 3" in entry(text, "--n-layer")
    assert "default: 2" in entry(text, "--n-head")
    assert "default: on" in entry(text, "--aim-logging")
    assert "default: 100%" in entry(text, "--note")


def test_help_is_printed_even_if_a_configuration_file_is_broken(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    (root / "configs" / "bad.yaml").write_text("n_layr: 2\n")
    text = help_text(capsys, root)
    assert "default: 4" in entry(text, "--n-layer")
    assert "configs/bad.yaml:1: unknown key n_layr; did you mean n_layer?" in text


@pytest.mark.parametrize(
    ("error", "status", "stderr"),
    [
        (UserError("a.yaml:1: wrong"), 2, "error: a.yaml:1: wrong\n"),
        (UserError("one\ntwo"), 2, "error: one\nerror: two\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (StopSignal(signal.SIGTERM), 143, "interrupted\n"),
    ],
)
def test_script_turns_errors_into_lines_and_an_exit_status(
    capsys: pytest.CaptureFixture[str], error: BaseException, status: int, stderr: str
) -> None:
    @script
    def main(argv: Sequence[str]) -> int:
        raise error

    assert main([]) == status
    assert capsys.readouterr() == ("", stderr)


def test_script_returns_the_status_and_reads_sys_argv(monkeypatch: pytest.MonkeyPatch) -> None:
    @script
    def main(argv: Sequence[str]) -> int:
        return len(argv)

    monkeypatch.setattr(sys, "argv", ["train.py", "a", "b", "c"])
    assert main() == 3
    assert main(["a"]) == 1


def test_script_does_not_catch_other_exceptions() -> None:
    @script
    def main(argv: Sequence[str]) -> int:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        main([])


def run_without(*argv: str, hidden: Sequence[str] = HEAVY) -> subprocess.CompletedProcess[str]:
    """Run a script in a process in which importing any of `hidden` fails."""
    code = f"import runpy, sys; sys.modules.update(dict.fromkeys({tuple(hidden)!r})); sys.argv = {list(argv)!r}\n"
    code += f"sys.path[0] = {str(ROOT)!r}; runpy.run_path({str(ROOT / argv[0])!r}, run_name='__main__')"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["train.py", "inference.py", "profile_model.py"])
def test_help_needs_neither_torch_nor_trackers(name: str) -> None:
    result = run_without(name, "--help", hidden=(*HEAVY, "rich"))
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("usage: ")
    assert name in result.stdout


@pytest.mark.parametrize("name", ["experiments.py", "evaluate.py", "weights.py"])  # they have no flags for settings
def test_help_of_other_scripts_needs_no_large_package(name: str) -> None:
    result = run_without(name, "--help", hidden=("torch", "numpy", "pydantic", "rich", "yaml"))
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("name", ["train.py", "inference.py", "profile_model.py"])
def test_mistakes_are_found_without_torch(name: str) -> None:
    result = run_without(name, "--sead", "1")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: unknown flag --sead; did you mean --seed?\n"


def test_a_closed_pipe_ends_quietly() -> None:
    command = f'"{sys.executable}" train.py --help | true; echo "${{PIPESTATUS[0]}}"'
    result = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True, env={**os.environ, "LC_ALL": "C"}
    )
    assert result.stderr == ""
    assert result.stdout.strip() in ("0", "141")  # 0 if all of it fits into the buffer of the pipe


@pytest.mark.parametrize("argv", [["--limit=--"], ["--limit", "--"]])
def test_two_dashes_are_not_a_value(argv: list[str]) -> None:
    parser = Parser(prog="x")
    parser.add_argument("--limit", type=int)
    with pytest.raises(UserError, match="argument --limit: expected"):
        parser.parse(argv)


def test_the_suggested_flag_belongs_to_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert experiments.main(["gate", "a", "b", "--max-siz", "3"]) == 2  # prune has --max-size
    assert capsys.readouterr().err == "error: unknown flag --max-siz; did you mean --max-seeds?\n"
