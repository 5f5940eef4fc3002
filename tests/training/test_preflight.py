"""The findings of the preflight before a run starts, and --strict."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_runs import indexed

import train
from tests.small_dataset import write_dataset
from utils.config.fields import config_hash
from utils.config.loader import ConfigLoader, LoadedConfig
from utils.errors import UserError
from utils.runs.code import GitFacts
from utils.runs.index import IndexedRun
from utils.runs.origin import pin
from utils.terminal.console import Terminal
from utils.training import preflight as preflight_module
from utils.training.preflight import preflight, report_noise
from utils.training.setup import decisive_settings, make_setup

Argv = Callable[..., list[str]]


@pytest.fixture
def load(tiny_argv: Argv, tmp_path: Path) -> Callable[..., LoadedConfig]:
    def loaded(**overrides: str | bool) -> LoadedConfig:
        words = [word for word in tiny_argv() if word != "--no-aim-logging"]
        flags = dict(zip(words[::2], words[1::2], strict=True))
        given = {flag.removeprefix("--").replace("-", "_"): value for flag, value in flags.items()}
        return ConfigLoader(tmp_path).load((), {**given, **overrides})

    return loaded


def findings(loaded: LoadedConfig, root: Path, git: GitFacts) -> list[str]:
    return preflight(make_setup(loaded, root), git)


CLEAN = GitFacts(commit="c" * 40)


def test_a_first_run_has_no_findings(load: Callable[..., LoadedConfig], tmp_path: Path) -> None:
    assert findings(load(aim_logging=True), tmp_path, CLEAN) == []


def test_uncommitted_and_unrecorded_code_is_reported(load: Callable[..., LoadedConfig], tmp_path: Path) -> None:
    patch = b"diff --git a/a b/a\n+1\ndiff --git a/b b/b\n+2\n"
    left_out = ["a.bin (not a source file)", ".env (looks like a secret)", "b.bin (not a source file)"]
    git = GitFacts(commit="c", dirty=True, patch=patch, left_out=left_out)
    first, second = findings(load(aim_logging=True), tmp_path, git)
    assert first == "uncommitted changes, recorded in meta/code.patch: a, b"
    assert second == "not recorded: 2 files that are not source files, such as a.bin, .env (looks like a secret)"
    one = GitFacts(commit="c", left_out=left_out[:1])
    seven = GitFacts(commit="c", left_out=[f"{i} (x)" for i in range(7)])
    assert findings(load(aim_logging=True), tmp_path, one) == ["not recorded: a.bin (not a source file)"]
    assert findings(load(aim_logging=True), tmp_path, seven)[0].endswith("4 (x) and 2 more")
    nine = GitFacts(commit="c", left_out=[*seven.left_out, "a.bin (not a source file)", "b.bin (not a source file)"])
    (finding,) = findings(load(aim_logging=True), tmp_path, nine)
    assert finding.startswith("not recorded: 2 files that are not source files, such as a.bin, 0 (x), ")
    assert finding.endswith("3 (x) and 3 more")
    (finding,) = findings(load(aim_logging=True), tmp_path, GitFacts(problem="not a git repository"))
    assert finding == "the code is not recorded: not a git repository"


def test_settings_that_a_prepared_dataset_decides_are_reported(
    load: Callable[..., LoadedConfig], tmp_path: Path
) -> None:
    dataset = write_dataset(tmp_path / "datasets" / "small", kind="bpe", bpe_vocab_size=300)
    made = {"bpe_vocab_size": 300, "special_tokens": [], "unknown_token": None, "val_fraction": 0.2}
    replace(dataset, facts={"settings": made}).save()

    def found(**asked: str) -> list[str]:
        return findings(load(dataset="small", aim_logging=True, **asked), tmp_path, CLEAN)

    assert found(bpe_vocab_size="300", tokenizer="bpe") == []  # as it was prepared
    assert found(bpe_vocab_size="4096", val_fraction="0.1") == [  # even if the value is the default
        "--bpe-vocab-size: bpe_vocab_size has no effect: the prepared dataset has its own: 300",
        "--val-fraction: val_fraction has no effect: the prepared dataset has its own: 0.2",
    ]
    with pytest.raises(UserError, match="prepared with tokenizer bpe, 300 tokens, not char: leave --tokenizer out"):
        found(tokenizer="char")


def test_settings_without_effect_are_reported_with_the_reason(
    load: Callable[..., LoadedConfig], tmp_path: Path
) -> None:
    printed = findings(load(rope_theta="500", min_lr="1e-5", schedule="constant", experiment="x"), tmp_path, CLEAN)
    assert printed == [
        "--rope-theta: rope_theta has no effect: position is learned",
        "--min-lr: min_lr has no effect: schedule is constant",
        "--aim-repo: aim_repo has no effect: aim_logging is off",
        "--experiment: experiment has no effect: neither Aim nor Weights & Biases is on",
    ]
    assert findings(load(rope_theta="500", position="rope", aim_logging=True), tmp_path, CLEAN) == []


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"bpe_vocab_size": "300"}, "tokenizer is not bpe"),
        ({"arithmetic_digits": "3"}, "dataset is not arithmetic"),
        ({"rope_factor": "8", "position": "rope"}, "rope_scaling is none"),
        ({"rope_original_context": "8", "position": "rope"}, "rope_scaling is neither llama3 nor yarn"),
        (
            {"rope_high_freq": "32", "position": "rope", "rope_scaling": "linear"},
            "rope_scaling is neither llama3 nor yarn",
        ),
        ({"full_attention_layers": "1"}, "sliding_window is none"),
    ],
    ids=str,
)
def test_a_setting_of_an_option_that_is_not_chosen_has_no_effect(
    settings: dict[str, str], reason: str, load: Callable[..., LoadedConfig], tmp_path: Path
) -> None:
    key = next(iter(settings))
    expected = f"--{key.replace('_', '-')}: {key} has no effect: {reason}"
    assert findings(load(**settings, aim_logging=True), tmp_path, CLEAN) == [expected]


@pytest.mark.parametrize(
    "settings",
    [
        {"bpe_vocab_size": "260", "tokenizer": "bpe"},
        {"rope_factor": "8", "position": "rope", "rope_scaling": "linear"},
        {"rope_original_context": "8", "rope_high_freq": "32", "position": "rope", "rope_scaling": "yarn"},
        {"full_attention_layers": "1", "sliding_window": "3"},
    ],
    ids=str,
)
def test_a_setting_of_a_chosen_option_is_not_reported(
    settings: dict[str, str], load: Callable[..., LoadedConfig], tmp_path: Path
) -> None:
    assert findings(load(**settings, aim_logging=True), tmp_path, CLEAN) == []


@pytest.mark.parametrize(
    ("device", "dtype", "kernel", "count"),
    [
        ("cuda", torch.bfloat16, "", 1),
        ("cuda", torch.bfloat16, "flash", 0),
        ("cuda", torch.float32, "", 0),
        ("cpu", torch.bfloat16, "", 0),
    ],
)
def test_slow_attention_on_a_gpu_is_reported_with_the_reason(
    load: Callable[..., LoadedConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    dtype: torch.dtype,
    kernel: str,
    count: int,
) -> None:
    monkeypatch.setattr(preflight_module, "fused_attention", lambda *_: (kernel, "flash: a head is too wide"))
    setup = replace(make_setup(load(aim_logging=True), tmp_path), device=torch.device(device), dtype=dtype)
    expected = "attention uses a slower kernel than FlashAttention or cuDNN's: flash: a head is too wide"
    assert preflight(setup, CLEAN) == [expected] * count


def test_a_disk_that_is_too_small_is_reported(
    load: Callable[..., LoadedConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 40_000})
    monkeypatch.setattr(preflight_module.shutil, "disk_usage", lambda folder: usage)
    (printed,) = findings(load(aim_logging=True), tmp_path, CLEAN)
    assert re.match(
        r"the disk cannot hold the planned checkpoints: 4 of 0\.0 MB take 0\.2 MB, and 0\.0 MB are free", printed
    )


def test_a_configuration_and_code_that_were_run_before_are_reported(
    tiny_argv: Argv, only_run: Callable[[], Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert train.main(tiny_argv("--run-tag", "one")) == 0
    run = only_run()
    assert "were run already" not in capsys.readouterr().out
    assert train.main(tiny_argv("--run-tag", "two")) == 0  # a tag changes no number
    printed = capsys.readouterr().out
    assert f"preflight: this configuration and code were run already: {run.name} (completed, best val/loss " in printed
    assert train.main(tiny_argv("--seed", "2")) == 0
    assert "were run already" not in capsys.readouterr().out
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**record, "git": {**record["git"], "code": "another"}}))
    other = next(path for path in run.parent.iterdir() if path.name.endswith("two"))
    record = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps({**record, "git": {"commit": "0" * 40}}))
    assert train.main(tiny_argv()) == 0  # neither of the two has this code
    assert "were run already" not in capsys.readouterr().out


def test_the_noise_is_reported_when_further_seeds_are_planned(
    tmp_path: Path, load: Callable[..., LoadedConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    setup = make_setup(load(seed="3"), tmp_path)
    decisive = decisive_settings(setup)

    def of_seed(seed: int, loss: float) -> IndexedRun:
        config = pin(setup.config, {"seed": seed})
        facts = {"summary": {"val/loss": loss}, "config_hash": config_hash(config, decisive), "git": CLEAN.summary()}
        return indexed(tmp_path / "others", f"seed_{seed}", settings={"seed": seed}, **facts)

    runs = [of_seed(1, 2.0), of_seed(2, 2.2), of_seed(3, 9.0)]  # the last is this run itself, made before
    report_noise(setup, CLEAN, runs[::2], Terminal())
    report_noise(setup, GitFacts(commit="another"), runs, Terminal())
    assert not capsys.readouterr().out
    report_noise(setup, CLEAN, runs, Terminal())
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "noise: over 2 other seeds, the last val/loss of this configuration has a standard deviation of 0.14" in printed
    )
    assert "3 seeds, against as many other runs, can show a difference of about 0.32" in printed


def test_strict_turns_findings_into_an_error(
    tiny_argv: Argv, runs_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(tiny_argv("--strict", "--rope-theta", "500")) == 2
    assert "error: --strict: --rope-theta: rope_theta has no effect" in capsys.readouterr().err
    assert not runs_dir.exists() or not list(runs_dir.iterdir())


def test_a_run_stops_at_stop_at_step_and_can_be_resumed(tiny_argv: Argv, only_run: Callable[[], Path]) -> None:
    assert train.main(tiny_argv("--stop-at-step", "4", "--run-tag", "x")) == 0
    run = only_run()
    record = json.loads((run / "run.json").read_text())
    assert (record["status"], record["last_step"]) == ("interrupted", 4)
    assert record["exit_reason"] == "stop_at_step (4) is reached"
    assert (run / "artifacts" / "seal.json").exists()
    assert train.main(["--resume", str(run)]) == 0
    assert json.loads((run / "run.json").read_text())["status"] == "completed"
