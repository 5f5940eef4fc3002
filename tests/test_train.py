"""One experiment from the command line or a notebook: what it leaves behind, and how it ends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.io_wrapper import GetLogdirSubdirectories

import train
import utils.training.step
from benchmarks.run_equality import is_system_record
from utils.config.loader import ConfigLoader
from utils.config.settings import Config
from utils.runs.log import read_metrics, read_records
from utils.runs.run import read_record, read_status
from utils.terminal.cli import Parser
from utils.terminal.config_flags import parse_experiment
from utils.terminal.words import counted

Argv = Callable[..., list[str]]
TIMINGS = {"time", "tokens_per_second", "step_ms"}


def numbers(run: Path) -> list[dict[str, object]]:
    """The records of metrics.jsonl, without timings and system metrics."""
    records = [record for record in read_records(run / "logs" / "metrics.jsonl") if not is_system_record(record)]
    return [{key: value for key, value in record.items() if key not in TIMINGS} for record in records]


def tiny_config(argv: list[str]) -> Config:
    return parse_experiment(argv, Parser(prog="train.py")).load().config


def test_a_run_directory_has_all_records_of_the_experiment(tiny_argv: Argv, only_run: Callable[[], Path]) -> None:
    assert train.main(tiny_argv("--run-tag", "first", "--tags", "a,b", "--note", "why")) == 0
    run = only_run()
    expected = [
        "run.json",
        "lock",
        "notes.json",
        "meta/git.txt",
        "meta/env.txt",
        "meta/full_config.json",
        "meta/config_sources.json",
        "logs/metrics.jsonl",
        "logs/histograms.jsonl",
        "logs/samples.jsonl",
        "logs/train.log",
        "artifacts/export/model.safetensors",
        "artifacts/export/config.json",
        "artifacts/export/tokenizer.json",
    ]
    assert [name for name in expected if not (run / name).is_file()] == []
    assert len(list(run.glob("events.*"))) == 1
    assert list(GetLogdirSubdirectories(str(run.parent))) == [str(run)]  # TensorBoard calls the run by its id
    record = read_record(run)
    assert (record["status"], record["tag"], record["last_step"]) == ("completed", "first", 6)
    assert record["argv"][0] == "train.py"
    assert record["resolved"]["device"] == "cpu"
    assert len(record["config_hash"]) == 64
    assert record["views"]["tensorboard"]["state"] == "complete"
    assert json.loads((run / "notes.json").read_text())["tags"] == ["a", "b"]
    sources = json.loads((run / "meta" / "config_sources.json").read_text())
    assert sources["n_layer"]["source"] == "--n-layer"
    assert [shadow["source"] for shadow in sources["n_layer"]["shadowed"]] == ["configs/model.yaml:3", "default"]
    terminal = (run / "logs" / "train.log").read_text()
    assert "Settings that differ" in terminal
    assert f"cpu, float32, {counted(record['resolved']['threads'], 'CPU thread')}\n" in terminal
    assert f"inference.py {run}" in terminal
    assert "\x1b" not in terminal


def test_the_log_has_every_step_and_evaluation(tiny_argv: Argv, only_run: Callable[[], Path]) -> None:
    train.main(tiny_argv())
    logs = only_run() / "logs"
    assert [step for step, _ in read_metrics(logs, "train/loss")] == [0, 1, 2, 3, 4, 5]
    assert [step for step, _ in read_metrics(logs, "val/loss")] == [0, 3, 6]
    assert [value for _, value in read_metrics(logs, "tokens")] == [0, 0, 32, 64, 96, 96, 128, 160, 192]
    assert [record["step"] for record in read_records(logs / "samples.jsonl")] == [0, 3, 6]
    histograms = list(read_records(logs / "histograms.jsonl"))
    assert {record["step"] for record in histograms} == {0, 3}
    assert {record["name"].split("/")[0] for record in histograms} == {"params", "grads"}


def test_the_same_experiment_gives_the_same_bits(tiny_argv: Argv, runs_dir: Path) -> None:
    train.main(tiny_argv("--dropout", "0.1", "--run-tag", "a"))
    train.main(tiny_argv("--dropout", "0.1", "--run-tag", "b", "--sample-tokens", "0", "--log-interval", "1"))
    first, second = sorted(runs_dir.iterdir(), key=lambda path: path.name[-1])
    assert numbers(first) == numbers(second)
    weights = [load_file(run / "artifacts" / "export" / "model.safetensors") for run in (first, second)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert read_record(first)["config_hash"] == read_record(second)["config_hash"]


def test_full_config_repeats_the_experiment(tiny_argv: Argv, runs_dir: Path, tmp_path: Path) -> None:
    train.main(tiny_argv("--run-tag", "a", "--learning-rate", "0.01"))
    (first,) = runs_dir.iterdir()
    assert train.main(["--config", str(first / "meta" / "full_config.json"), "--run-tag", "b"]) == 0
    second = next(path for path in runs_dir.iterdir() if path != first)
    assert numbers(first) == numbers(second)


def test_accumulation_does_not_change_the_batch(tiny_argv: Argv, runs_dir: Path) -> None:
    train.main(tiny_argv("--run-tag", "whole"))
    train.main(tiny_argv("--run-tag", "split", "--gradient-accumulation-steps", "4"))
    losses = {run.name[16:]: [v for _, v in read_metrics(run / "logs", "train/loss")] for run in runs_dir.iterdir()}
    assert losses["split"] == pytest.approx(losses["whole"], rel=1e-5)


def test_activation_checkpointing_changes_no_number(tiny_argv: Argv, runs_dir: Path) -> None:
    flags = ("--dropout", "0.2", "--sample-tokens", "5")
    train.main(tiny_argv(*flags, "--run-tag", "kept"))
    train.main(tiny_argv(*flags, "--run-tag", "again", "--activation-checkpointing"))
    losses = {run.name[16:]: [v for _, v in read_metrics(run / "logs", "val/loss")] for run in runs_dir.iterdir()}
    assert losses["kept"] == losses["again"] != []


def test_epochs_decide_the_number_of_steps(tiny_argv: Argv, only_run: Callable[[], Path], tiny_text: str) -> None:
    argv = [*tiny_argv(), "--epochs", "0.1"]
    max_iters = argv.index("--max-iters")
    train.main(argv[:max_iters] + argv[max_iters + 2 :])
    steps = read_record(only_run())["last_step"]
    assert steps == -(-len(tiny_text) * 9 // 100 // 32)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_mixed_precision_trains(dtype: str, tiny_argv: Argv, only_run: Callable[[], Path]) -> None:
    assert train.main(tiny_argv("--dtype", dtype)) == 0
    losses = [value for _, value in read_metrics(only_run() / "logs", "train/loss")]
    assert all(0 < loss < 10 for loss in losses)


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_model_variants_train_and_export(mlp: str, tiny_argv: Argv) -> None:
    flags = ["--position", "rope", "--norm", "rmsnorm", "--mlp", mlp, "--n-kv-head", "1", "--no-bias"]
    assert train.main(tiny_argv(*flags)) == 0


def test_the_features_of_the_speedrun_repeat_and_resume_to_the_same_numbers(
    tiny_argv: Argv, runs_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--optimizer-name", "muon", "--ngram-rows", "64,32", "--no-tie-embeddings", "--zero-init", "--qk-norm"]
    flags += ["--mlp", "relu2", "--position", "rope", "--embedding-lr", "0.05", "--momentum-warmup-iters", "3"]
    flags += ["--weight-decay-schedule", "linear", "--logit-softcap", "15"]
    for tag in ("one", "other"):
        assert train.main(tiny_argv(*flags, "--run-tag", tag)) == 0
    one, other = sorted(runs_dir.iterdir(), key=lambda path: path.name[16:])
    assert numbers(one) == numbers(other)
    argv = tiny_argv(*flags, "--run-tag", "stopped", "--stop-at-step", "4")
    assert train.main(argv) == 0
    assert train.main(["--resume", "stopped", "--runs-dir", str(runs_dir)]) == 0
    stopped = next(path for path in runs_dir.iterdir() if path.name.endswith("stopped"))
    assert numbers(stopped) == numbers(one)


def test_a_failing_compiler_falls_back_to_eager(
    tiny_argv: Argv, runs_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train.main(tiny_argv("--dropout", "0.1", "--run-tag", "eager"))

    def broken(_part: object, **_options: object) -> Callable[..., None]:
        def call(*_args: object) -> None:
            torch.rand(3)  # consume random numbers before failing
            raise RuntimeError("no C++ compiler\ndetails")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    assert train.main(tiny_argv("--dropout", "0.1", "--run-tag", "fallback", "--compile")) == 0
    assert capsys.readouterr().out.count("torch.compile failed, continuing in eager mode") == 1
    eager, fallback = sorted(runs_dir.iterdir(), key=lambda path: path.name[16:])
    assert numbers(eager) == numbers(fallback)
    assert read_record(fallback)["resolved"]["compiled"] is False


def test_a_non_finite_loss_is_diverged(
    tiny_argv: Argv, only_run: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward_backward = utils.training.step.forward_backward

    def explode(state: utils.training.step.TrainState, phase: Any) -> torch.Tensor:
        loss = forward_backward(state, phase)
        return loss * float("nan") if state.step == 4 else loss

    monkeypatch.setattr(utils.training.step, "forward_backward", explode)
    assert train.main(tiny_argv()) == 1
    record = read_record(only_run())
    assert record["status"] == "diverged"
    assert record["exit_reason"] == "the loss at step 4 is nan"
    values = dict(read_metrics(only_run() / "logs", "train/loss"))
    assert list(values) == [0, 1, 2, 3, 4, 5]
    assert values[4] != values[4]
    assert not (only_run() / "artifacts" / "export").exists()


@pytest.mark.parametrize(
    ("error", "status"),
    [(RuntimeError("out of memory"), "failed"), (KeyboardInterrupt(), "interrupted")],
)
def test_an_exception_sets_the_status_and_leaves_complete_logs(
    error: BaseException, status: str, tiny_argv: Argv, only_run: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer_step = utils.training.step.optimizer_step

    def fail(state: utils.training.step.TrainState, *grad_norms: torch.Tensor) -> None:
        if state.step == 4:
            raise error
        optimizer_step(state, *grad_norms)

    monkeypatch.setattr(utils.training.step, "optimizer_step", fail)
    config = tiny_config(tiny_argv())
    if status == "failed":
        with pytest.raises(RuntimeError, match="out of memory"):
            train.train(config, quiet=True)
        assert "Traceback" in (only_run() / "logs" / "train.log").read_text()
    else:
        assert train.train(config, quiet=True).status == "interrupted"
    assert read_status(only_run()) == status
    assert [step for step, _ in read_metrics(only_run() / "logs", "train/loss")] == [0, 1, 2, 3, 4]
    assert read_record(only_run())["views"]["tensorboard"]["state"] == "complete"


def test_a_failure_before_training_sets_the_status_too(
    tiny_argv: Argv,
    only_run: Callable[[], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("utils.training.session.write_meta", full)
    assert train.main(tiny_argv()) == 1
    assert capsys.readouterr().err == "error: No space left on device\n"
    assert read_status(only_run()) == "failed"
    assert "No space left on device" in (only_run() / "logs" / "train.log").read_text()


def test_the_printed_commands_name_the_run_by_its_path(
    tiny_argv: Argv, tmp_path: Path, only_run: Callable[[], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    places = tmp_path / "places.yaml"
    places.write_text(f"runs_dir: {tmp_path / 'runs'}\n")
    words = tiny_argv("--run-tag", "elsewhere")
    del words[words.index("--runs-dir") : words.index("--runs-dir") + 2]
    assert train.main([*words, "--config", str(places)]) == 0
    assert f"inference.py {only_run()}" in capsys.readouterr().out


def test_train_from_a_notebook_is_quiet(
    tiny_argv: Argv, only_run: Callable[[], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    result = train.train(tiny_config(tiny_argv()), quiet=True)
    assert capsys.readouterr() == ("", "")
    assert (result.run_dir, result.status, result.steps) == (only_run(), "completed", 6)
    assert result.val_loss is not None
    assert result.best_val_loss is not None
    assert result.best_val_loss <= result.val_loss
    sources = json.loads((only_run() / "meta" / "config_sources.json").read_text())
    assert sources["n_layer"]["source"] == "code"


def test_without_aim_one_warning_is_printed(
    tiny_argv: Argv, only_run: Callable[[], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("utils.training.session.is_installed", lambda name: name != "aim")
    assert train.main(tiny_argv("--aim-logging")) == 0
    assert capsys.readouterr().out.count("aim is not installed") == 1
    assert read_record(only_run())["views"]["aim"] == {"state": "off", "reason": "not installed"}


def test_the_flags_of_a_large_model_are_understood() -> None:
    sizes = ["--n-embd", "256", "--n-head", "8", "--n-layer", "6", "--block-size", "128"]
    loop = ["--batch-size", "8", "--learning-rate", "0.001", "--max-iters", "5000", "--run-tag", "large-model"]
    config = tiny_config([*sizes, *loop])
    assert (config.model.n_embd, config.model.n_head, config.model.n_layer, config.model.block_size) == (256, 8, 6, 128)
    assert (config.train.batch_size, config.train.max_iters, config.optimizer.learning_rate) == (8, 5000, 0.001)
    assert config.tracking.run_tag == "large-model"


def test_the_default_experiment_is_about_0_8_million_parameters() -> None:
    from model import LanguageModel

    config = ConfigLoader(train.PROJECT_ROOT).load().config
    assert config.data.dataset == "pydocs"
    assert (config.train.max_iters, config.train.eval_interval, config.train.eval_iters) == (2000, 250, 20)
    assert config.tracking.aim_logging
    assert 0.75e6 < LanguageModel(config.model, 103).num_parameters() < 0.85e6
