"""A run that is stopped at any moment continues as if it had not been: bit for bit, in one directory and one view."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import experiments
import train
import utils.training.step
from benchmarks.run_equality import differences, last_checkpoint
from utils.checkpoints.folder import list_checkpoints
from utils.runs.log import read_metrics
from utils.runs.run import Run, read_record, read_status
from utils.training.state import TrainState

pytestmark = pytest.mark.usefixtures("prompt_writes", "warm_processes")
Argv = Callable[..., list[str]]
ROOT = Path(__file__).resolve().parents[2]
SAME = {"weight bits": 0, "optimizer bits": 0, "export bits": 0, "log records": 0, "state facts": 0}
SIXTY = ("--max-iters", "60", "--eval-interval", "20", "--checkpoint-interval", "10", "--dropout", "0.2")
HARD = (*SIXTY, "--gradient-accumulation-steps", "2", "--patience", "50", "--min-delta", "0.001")


@pytest.fixture
def run_of(runs_dir: Path) -> Callable[[str], Path]:
    """The newest run with a tag."""

    def find(tag: str) -> Path:
        return max(path for path in runs_dir.iterdir() if path.name.endswith(tag))

    return find


def checkpoints(run: Path) -> Path:
    return run / "artifacts" / "checkpoints"


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], None]) -> None:
    """Do something when update `step` is done, once."""
    optimizer_step = utils.training.step.optimizer_step
    done: list[int] = []

    def patched(state: TrainState, *grad_norms: torch.Tensor) -> None:
        optimizer_step(state, *grad_norms)
        if state.step == step and not done:
            done.append(step)
            action()

    monkeypatch.setattr(utils.training.step, "optimizer_step", patched)


def send(signum: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), signum)


# ------------------------------------------------------------------------------------------ killed


def killed(words: list[str], moment: str, step: int) -> None:
    """Train in a process that kills itself at the moment."""
    script = [sys.executable, os.fspath(ROOT / "tests" / "killed_training.py"), moment, str(step)]
    result = subprocess.run([*script, *words], capture_output=True, text=True, timeout=120)
    assert result.returncode == -signal.SIGKILL, result.stderr


@pytest.mark.slow
def test_kills_in_a_micro_step_a_write_and_after_an_evaluation_change_nothing(
    tiny_argv: Argv, run_of: Callable[[str], Path]
) -> None:
    settings = (*SIXTY, "--gradient-accumulation-steps", "2")
    assert train.main(tiny_argv(*settings, "--run-tag", "straight")) == 0
    killed(tiny_argv(*settings, "--run-tag", "killed"), "micro_step", 7)
    run = run_of("killed")
    assert read_status(run) == "crashed"
    assert not list_checkpoints(checkpoints(run))
    for moment, step in (("micro_step", 13), ("evaluation", 20), ("checkpoint", 30), ("step", 47)):
        killed(["--resume", str(run)], moment, step)
    assert train.main(["--resume", str(run)]) == 0
    assert differences(run_of("straight"), run) == SAME
    record = read_record(run)
    assert [resume["step"] for resume in record["resumes"]] == [0, 10, 10, 20, 40]
    assert {resume["before"]["status"] for resume in record["resumes"]} == {"crashed"}
    assert (record["status"], record["last_step"]) == ("completed", 60)
    assert record["resolved"]["guarantee"].startswith("bit-exact")
    assert not list(checkpoints(run).glob(".*"))  # what was half written is gone


@pytest.mark.slow
def test_a_compiled_run_resumes_bit_for_bit(tiny_argv: Argv, run_of: Callable[[str], Path]) -> None:
    compiled = (*SIXTY, "--compile")
    assert train.main(tiny_argv(*compiled, "--run-tag", "straight")) == 0
    killed(tiny_argv(*compiled, "--run-tag", "killed"), "step", 33)
    assert train.main(["--resume", str(run_of("killed"))]) == 0
    assert read_record(run_of("killed"))["resolved"]["compiled"] is True
    assert differences(run_of("straight"), run_of("killed")) == SAME


# ------------------------------------------------------------------------------------------ stopped


@pytest.mark.parametrize(("signum", "exit_status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_resume_ends_as_if_it_had_not_come(
    signum: signal.Signals,
    exit_status: int,
    tiny_argv: Argv,
    run_of: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train.main(tiny_argv(*HARD, "--run-tag", "straight")) == 0
    stop_after(monkeypatch, 33, send(signum))
    assert train.main(tiny_argv(*HARD, "--run-tag", "stopped")) == exit_status
    run = run_of("stopped")
    assert last_checkpoint(run).step == 33
    assert (read_record(run)["status"], read_record(run)["exit_reason"]) == ("interrupted", signum.name)
    assert f"train.py --resume {run}" in capsys.readouterr().out.replace("\n", "")
    assert train.main(["--resume", str(run)]) == 0
    assert differences(run_of("straight"), run) == SAME


def test_sigusr1_saves_and_training_goes_on(
    tiny_argv: Argv, only_run: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(monkeypatch, 23, send(signal.SIGUSR1))
    assert train.main(tiny_argv("--max-iters", "30", "--checkpoint-interval", "0", "--no-keep-best")) == 0
    assert [step for step, _ in list_checkpoints(checkpoints(only_run()))] == [30, 23]
    assert read_record(only_run())["status"] == "completed"


def test_a_second_signal_stops_at_once_and_leaves_nothing_half(
    tiny_argv: Argv, only_run: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice() -> None:
        send(signal.SIGINT)()
        send(signal.SIGINT)()

    stop_after(monkeypatch, 13, twice)
    assert train.main(tiny_argv(*SIXTY)) == 130
    record = read_record(only_run())
    assert (record["status"], record["exit_reason"]) == ("interrupted", "SIGINT, at once")
    assert last_checkpoint(only_run()).step == 10
    monkeypatch.undo()
    assert train.main(["--resume", str(only_run())]) == 0


@pytest.mark.slow
def test_max_minutes_stops_in_time_with_a_checkpoint(
    tiny_argv: Argv, only_run: Callable[[], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    long = ("--max-iters", "1000000", "--eval-interval", "1000000", "--max-minutes", "0.1")
    assert train.main(tiny_argv(*long)) == 0
    record = read_record(only_run())
    assert record["status"] == "interrupted"
    assert "max_minutes" in record["exit_reason"]
    assert last_checkpoint(only_run()).step == record["last_step"] > 0


def test_the_time_limit_is_that_of_one_process(
    tiny_argv: Argv, only_run: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 3, send(signal.SIGTERM))
        assert train.main(tiny_argv("--max-minutes", "0.001")) == 0
    assert train.main(["--resume", str(only_run())]) == 0
    assert read_record(only_run())["status"] == "completed"


# ------------------------------------------------------------------------------------------ which run


@pytest.mark.slow
def test_resume_auto_is_one_command_for_a_job_that_is_stopped_again_and_again(
    tiny_argv: Argv, runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = tiny_argv(*SIXTY, "--run-tag", "job", "--resume", "auto")
    for step in (15, 37):
        with monkeypatch.context() as patch:
            stop_after(patch, step, send(signal.SIGTERM))
            assert train.main(command) == 143
    assert train.main(command) == 0
    (run,) = runs_dir.iterdir()
    assert [resume["step"] for resume in read_record(run)["resumes"]] == [15, 37]
    assert train.main(command) == 0  # it is complete: the next call starts the next run
    assert len(list(runs_dir.iterdir())) == 2


def test_resume_auto_never_takes_a_run_that_is_being_trained(
    tiny_argv: Argv, runs_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = tiny_argv(*SIXTY, "--run-tag", "job", "--resume", "auto")
    stop_after(monkeypatch, 15, send(signal.SIGTERM))
    assert train.main(command) == 143
    (first,) = runs_dir.iterdir()
    other = Run.resume(first)
    monkeypatch.setattr("utils.training.launch.WAIT_SECONDS", 1.0)
    try:
        assert train.main(command) == 0
    finally:
        other.release()
    assert len(list(runs_dir.iterdir())) == 2
    assert last_checkpoint(first).step == 15


def test_a_run_that_is_being_trained_is_refused_with_process_and_host(
    tiny_argv: Argv, only_run: Callable[[], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(tiny_argv()) == 0
    before = (only_run() / "run.json").read_text()
    other = Run.resume(only_run())
    try:
        assert train.main(["--resume", str(only_run()), "--max-iters", "9"]) == 2
    finally:
        other.release()
    error = capsys.readouterr().err
    assert f"is being trained by process {os.getpid()} on " in error
    assert (only_run() / "run.json").read_text() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning-rate", "0.5"], "--learning-rate: learning_rate changes the numbers of a run"),
        (["--n-embd", "32"], "--n-embd: n_embd changes the numbers of a run"),
        (["--max-iters", "3"], "may grow, not shrink, from 6 to 3"),
        (["--max-iters", "12"], "would change lr_decay_iters from 6 to 12"),
        ([], "is complete (6 steps)"),
    ],
)
def test_what_would_make_it_another_experiment_is_refused_with_the_reason(
    words: list[str],
    message: str,
    tiny_argv: Argv,
    only_run: Callable[[], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train.main(tiny_argv()) == 0
    before = (only_run() / "run.json").read_text()
    assert train.main(["--resume", str(only_run()), *words]) == 2
    assert message in capsys.readouterr().err
    assert (only_run() / "run.json").read_text() == before
    assert Run.resume(only_run()).release() is None  # the lock is free again


def test_observation_settings_may_be_overridden_and_stay(
    tiny_argv: Argv, only_run: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(monkeypatch, 15, send(signal.SIGTERM))
    assert train.main(tiny_argv(*SIXTY)) == 143
    assert train.main(["--resume", str(only_run()), "--log-interval", "5"]) == 0
    steps = [step for step, _ in read_metrics(only_run() / "logs", "train/loss")]
    assert steps == [*range(15), *range(15, 60, 5)]
    config = json.loads((only_run() / "meta" / "full_config.json").read_text())
    assert config["tracking"]["log_interval"] == 5


@pytest.mark.slow
def test_max_iters_may_grow_where_the_schedule_does_not_depend_on_it(
    tiny_argv: Argv, run_of: Callable[[str], Path]
) -> None:
    constant = (*HARD, "--schedule", "constant", "--warmup-iters", "3")
    assert train.main(tiny_argv(*constant, "--run-tag", "long")) == 0
    assert train.main(tiny_argv(*constant, "--max-iters", "40", "--run-tag", "short")) == 0
    assert train.main(["--resume", str(run_of("short")), "--max-iters", "60"]) == 0
    assert differences(run_of("long"), run_of("short")) == SAME


@pytest.mark.parametrize(
    ("first", "again"),
    [
        (("--stop-at-step", "4"), ()),
        (("--warmup-iters", "1", "--lr-decay-iters", "20"), ("--max-iters", "9")),
    ],
)
def test_a_run_whose_checkpoints_were_pruned_keeps_its_log(
    first: tuple[str, ...],
    again: tuple[str, ...],
    tiny_argv: Argv,
    runs_dir: Path,
    run_of: Callable[[str], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train.main(tiny_argv(*first, "--run-tag", "kept")) == 0
    run = run_of("kept")
    log = (run / "logs" / "metrics.jsonl").read_bytes()
    prune = ["prune", "--older-than", "0h", "--unfinished", "--yes", "--runs-dir", str(runs_dir)]
    assert experiments.main(prune) == 0
    capsys.readouterr()
    assert train.main(["--resume", str(run), *again]) == 2
    assert "kept no longer has checkpoints: it could only start again at step 0" in capsys.readouterr().err
    assert (run / "logs" / "metrics.jsonl").read_bytes() == log
    assert experiments.main(["check", str(run)]) == 0
    if not again:  # a complete run is not resumed anyway
        assert train.main(tiny_argv(*first, "--run-tag", "kept", "--resume", "auto")) == 0
        assert f"{run.name} is not resumed: its checkpoints were deleted" in capsys.readouterr().err
        assert len(list(runs_dir.iterdir())) == 2


def test_a_missing_configuration_or_a_changed_corpus_is_a_mistake(
    tiny_argv: Argv,
    tiny_corpus: Path,
    only_run: Callable[[], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stop_after(monkeypatch, 3, send(signal.SIGTERM))
    assert train.main(tiny_argv()) == 143
    text = tiny_corpus.read_text()
    tiny_corpus.write_text(text + "one line more\n")
    before = (only_run() / "run.json").read_text()
    assert train.main(["--resume", str(only_run())]) == 2
    assert "the corpus is not the one that" in capsys.readouterr().err
    assert (only_run() / "run.json").read_text() == before
    tiny_corpus.write_text(text)
    (only_run() / "meta" / "full_config.json").unlink()
    assert train.main(["--resume", str(only_run())]) == 2
    assert "ended before its configuration was written" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [["--fork"], ["--resume", "auto", "--fork"], ["--strict-resume"], ["--resume", "a", "--init-from", "b"]],
)
def test_flags_that_do_not_go_together_are_a_mistake(words: list[str], tiny_argv: Argv, runs_dir: Path) -> None:
    assert train.main(tiny_argv(*words)) == 2
    assert not runs_dir.exists()


# ------------------------------------------------------------------------------------------ damage


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(
    tiny_argv: Argv,
    run_of: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train.main(tiny_argv(*HARD, "--run-tag", "straight")) == 0
    stop_after(monkeypatch, 33, send(signal.SIGTERM))
    assert train.main(tiny_argv(*HARD, "--run-tag", "stopped")) == 143
    run = run_of("stopped")
    weights = checkpoints(run) / "step_000033" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    capsys.readouterr()
    assert train.main(["--resume", str(run), "--strict-resume"]) == 2
    assert "model.safetensors: damaged: its CRC-32" in capsys.readouterr().err
    assert train.main(["--resume", str(run)]) == 0
    assert "model.safetensors: damaged: its CRC-32" in capsys.readouterr().out.replace("\n", " ")
    assert [resume["step"] for resume in read_record(run)["resumes"]] == [30]
    assert (checkpoints(run) / "step_000033_damaged").is_dir()
    assert differences(run_of("straight"), run) == SAME


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_reported_and_nothing_is_lost(
    tiny_argv: Argv, run_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(tiny_argv(*SIXTY, "--run-tag", "straight")) == 0
    assert train.main(tiny_argv(*SIXTY, "--n-embd", "32", "--run-tag", "other")) == 0
    stop_after(monkeypatch, 33, send(signal.SIGTERM))
    assert train.main(tiny_argv(*SIXTY, "--run-tag", "stopped")) == 143
    run = run_of("stopped")
    shutil.copytree(checkpoints(run_of("other")) / "step_000060", checkpoints(run) / "step_000060")
    assert train.main(["--resume", str(run)]) == 0
    assert "it is of another model: n_embd: trying the checkpoint before it" in capsys.readouterr().out
    assert (checkpoints(run) / "step_000060_damaged").is_dir()
    assert differences(run_of("straight"), run) == SAME


def test_a_kill_before_the_pointer_is_written_loses_no_best_weights(
    tiny_argv: Argv, run_of: Callable[[str], Path]
) -> None:
    best = (*SIXTY, "--export-weights", "best")
    assert train.main(tiny_argv(*best, "--run-tag", "straight")) == 0
    killed(tiny_argv(*best, "--run-tag", "killed"), "pointer", 60)
    run = run_of("killed")
    assert json.loads((checkpoints(run) / "best.json").read_text())["step"] < 60
    assert train.main(["--resume", str(run)]) == 0
    assert json.loads((checkpoints(run) / "best.json").read_text())["step"] == 60
    assert differences(run_of("straight"), run) == SAME


def test_a_checkpoint_that_cannot_be_written_does_not_end_training(
    tiny_argv: Argv, only_run: Callable[[], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import utils.checkpoints.files

    write = utils.checkpoints.files.write_tensors

    def full(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        if ".step_000010.tmp" < path.parent.name < ".step_000025.tmp":
            raise OSError(28, "No space left on device")
        return write(path, tensors)

    monkeypatch.setattr(utils.checkpoints.files, "write_tensors", full)
    assert train.main(tiny_argv(*SIXTY, "--max-iters", "25", "--no-keep-best")) == 0
    out = capsys.readouterr().out.replace("\n", " ")
    assert "the checkpoint of step 20 was not written: No space left on device; the newest is of step 10" in out
    assert [step for step, _ in list_checkpoints(checkpoints(only_run()))] == [25, 10]
    assert not list(checkpoints(only_run()).glob(".*"))


def test_the_steps_of_the_session_are_told_from_all_steps(
    tiny_argv: Argv, only_run: Callable[[], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(tiny_argv("--max-iters", "6", "--stop-at-step", "4")) == 0
    assert "4 of 6 in " in capsys.readouterr().out
    assert train.main(["--resume", str(only_run()), "--stop-at-step", "none"]) == 0
    assert "6 of 6, 2 of them in " in capsys.readouterr().out


def test_a_last_checkpoint_that_could_not_be_written_is_in_the_summary(
    tiny_argv: Argv, only_run: Callable[[], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import utils.checkpoints.files

    write = utils.checkpoints.files.write_tensors

    def full(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        if path.parent.name.startswith(".step_000025.tmp"):
            raise OSError(28, "No space left on device")
        return write(path, tensors)

    monkeypatch.setattr(utils.checkpoints.files, "write_tensors", full)
    monkeypatch.setattr("utils.training.session.is_best", lambda state: state.step == 25)  # it is tried twice
    assert train.main(tiny_argv(*SIXTY, "--max-iters", "25")) == 0
    captured = capsys.readouterr()
    printed = " ".join((captured.out + captured.err).split())
    assert "checkpoint of step 20, not 25: No space left on device" in printed
    assert printed.count("the checkpoint of step 25 was not written") == 1
    assert train.main(["--resume", str(only_run())]) == 2
    assert "starts a new run from its checkpoint of step 20" in " ".join(capsys.readouterr().err.split())


# ------------------------------------------------------------------------------------------ fork, fine-tune


def test_a_fork_goes_on_from_a_checkpoint_with_other_settings(
    tiny_argv: Argv, runs_dir: Path, run_of: Callable[[str], Path]
) -> None:
    assert train.main(tiny_argv(*SIXTY, "--keep-last", "9", "--run-tag", "first")) == 0
    parent = run_of("first")
    words = ["--resume", f"{parent}:30", "--fork", "--learning-rate", "0.01", "--weight-decay", "0.3"]
    assert train.main(words) == 0
    fork = run_of("first-fork")
    record = read_record(fork)
    assert record["parent"] == {"run": parent.name, "path": str(parent), "step": 30, "relation": "fork"}
    steps = [step for step, _ in read_metrics(fork / "logs", "train/loss")]
    assert steps == [*range(30, 60)]
    assert last_checkpoint(fork).state["optimizer"]["groups"][0]["settings"]["weight_decay"] == 0.3
    assert read_record(parent)["resumes"] == []
    assert (fork / "meta" / "git.txt").read_text() != ""


def test_a_fork_without_another_setting_repeats_its_parent(tiny_argv: Argv, run_of: Callable[[str], Path]) -> None:
    assert train.main(tiny_argv(*SIXTY, "--keep-last", "9", "--run-tag", "first")) == 0
    assert train.main(["--resume", f"{run_of('first')}:30", "--fork"]) == 0
    one, other = last_checkpoint(run_of("first")), last_checkpoint(run_of("first-fork"))
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)


def test_a_fork_with_another_batch_counts_on_the_tokens_of_its_parent(
    tiny_argv: Argv, run_of: Callable[[str], Path]
) -> None:
    assert train.main(tiny_argv("--run-tag", "small")) == 0  # 6 steps of 4 x 8 tokens
    fork = ["--resume", f"{run_of('small')}:3", "--fork", "--batch-size", "8", "--max-iters", "8", "--run-tag", "large"]
    assert train.main([*fork, "--stop-at-step", "5"]) == 0
    assert train.main(["--resume", str(run_of("large"))]) == 0
    tokens = dict(read_metrics(run_of("large") / "logs", "tokens"))
    assert tokens == {step: 3 * 32 + (step - 3) * 64 for step in range(3, 9)}
    assert json.loads((checkpoints(run_of("large")) / "step_000008" / "state.json").read_text())["tokens"] == tokens[8]


def test_fine_tuning_starts_at_step_0_with_the_best_weights_of_another_run(
    tiny_argv: Argv, tmp_path: Path, tiny_text: str, run_of: Callable[[str], Path]
) -> None:
    assert train.main(tiny_argv(*SIXTY, "--run-tag", "base")) == 0
    base = run_of("base")
    best = json.loads((checkpoints(base) / "best.json").read_text())
    other = tmp_path / "other.txt"
    other.write_text(tiny_text[::-1], encoding="utf-8")  # the same characters
    words = ("--init-from", f"{base}:best", "--dataset", str(other), "--learning-rate", "1e-5", "--run-tag", "tuned")
    assert train.main(tiny_argv(*words)) == 0
    tuned = run_of("tuned")
    record = read_record(tuned)
    assert record["parent"] == {"run": base.name, "path": str(base), "step": best["step"], "relation": "init"}
    assert read_metrics(tuned / "logs", "train/loss")[0][0] == 0
    weights = load_file(checkpoints(base) / best["folder"] / "model.safetensors")
    tuned_weights = load_file(tuned / "artifacts" / "export" / "model.safetensors")
    assert all(torch.allclose(weights[name], tuned_weights[name], atol=1e-3) for name in weights)


@pytest.mark.slow
def test_fine_tuning_and_forks_that_die_before_their_first_checkpoint_begin_again_where_they_began(
    tiny_argv: Argv, tmp_path: Path, tiny_text: str, run_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train.main(tiny_argv(*SIXTY, "--keep-last", "9", "--run-tag", "base")) == 0
    base = run_of("base")
    other = tmp_path / "other.txt"
    other.write_text(tiny_text.replace("z", "Z"), encoding="utf-8")  # with a character that is not in the vocabulary
    tuned = ("--init-from", str(base), "--dataset", str(other), "--unknown-token", " ", "--run-tag")
    fork = ("--resume", f"{base}:30", "--fork", "--learning-rate", "0.01", "--checkpoint-interval", "0", "--run-tag")
    for words, tag in ((tiny_argv(*tuned, "tuned"), "tuned"), ([*fork, "forked"], "forked")):
        assert train.main(words) == 0
        straight = run_of(tag)
        killed([*words[:-1], f"{tag}-killed"], "step", 33 if tag == "forked" else 2)
        run = run_of(f"{tag}-killed")
        assert not list_checkpoints(checkpoints(run))
        assert train.main(["--resume", str(run)]) == 0
        assert differences(straight, run) == SAME


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--n-embd", "32"), "n_embd 16, not 32; fitting: --n-embd 16"),
        (("--block-size", "16"), "block_size 8, not 16; fitting: --block-size 8"),
        (("--mlp", "swiglu"), "mlp gelu, not swiglu, ffn_dim none, not none"),
    ],
)
def test_weights_of_another_model_are_refused_with_the_flags_that_fit(
    words: tuple[str, ...], message: str, tiny_argv: Argv, runs_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(tiny_argv("--run-tag", "base")) == 0
    (base,) = runs_dir.iterdir()
    assert train.main(tiny_argv("--init-from", str(base), *words)) == 2
    assert message.split(", ffn_dim")[0] in capsys.readouterr().err
    assert list(runs_dir.iterdir()) == [base]


def test_a_longer_context_takes_the_weights_with_rope(tiny_argv: Argv, run_of: Callable[[str], Path]) -> None:
    assert train.main(tiny_argv("--position", "rope", "--run-tag", "base")) == 0
    words = ("--init-from", str(run_of("base")), "--position", "rope", "--block-size", "16", "--run-tag", "longer")
    assert train.main(tiny_argv(*words)) == 0
    assert read_record(run_of("longer"))["parent"]["relation"] == "init"


def test_characters_that_the_model_does_not_know_are_named(
    tiny_argv: Argv, tmp_path: Path, tiny_text: str, run_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(tiny_argv("--run-tag", "base")) == 0
    other = tmp_path / "other.txt"
    other.write_text(tiny_text + "Ω and €\n", encoding="utf-8")
    words = tiny_argv("--init-from", str(run_of("base")), "--dataset", str(other))
    assert train.main(words) == 2
    error = capsys.readouterr().err
    assert "2 characters that the vocabulary of the model" in error
    assert "'Ω', '€'" in error
    assert train.main([*words, "--unknown-token", " "]) == 0


# ------------------------------------------------------------------------------------------ early stopping, divergence


def test_early_stopping_exports_the_best_weights_and_says_so(
    tiny_argv: Argv, only_run: Callable[[], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--max-iters", "200", "--eval-interval", "5", "--patience", "2", "--learning-rate", "2", "--min-lr", "2")
    assert train.main(tiny_argv(*words, "--warmup-iters", "10", "--grad-clip", "0")) == 0
    record = read_record(only_run())
    assert record["status"] == "completed"
    assert record["exit_reason"].startswith("early stopping: val/loss did not improve")
    assert record["last_step"] < 200
    assert record["best_step"] == record["last_step"] - 10
    config = json.loads((only_run() / "artifacts" / "export" / "config.json").read_text())
    assert (config["training"]["weights"], config["training"]["step"]) == ("best", record["best_step"])
    assert config["training"]["val/loss"] == record["summary"]["best_val_loss"]
    exported = load_file(only_run() / "artifacts" / "export" / "model.safetensors")
    best = load_file(checkpoints(only_run()) / f"step_{record['best_step']:06d}" / "model.safetensors")
    assert all(torch.equal(exported[name], best[name]) for name in best)
    assert f"(best weights, of step {record['best_step']})" in capsys.readouterr().out


def poison(monkeypatch: pytest.MonkeyPatch, step: int, where: str) -> None:
    """A loss or gradient of update `step` becomes NaN."""
    forward_backward = utils.training.step.forward_backward

    def patched(state: TrainState, phase: Any) -> torch.Tensor:
        loss = forward_backward(state, phase)
        if state.step == step:
            if where == "loss":
                return loss * float("nan")
            next(p for p in state.model.parameters() if p.grad is not None).grad.fill_(float("nan"))
        return loss

    monkeypatch.setattr(utils.training.step, "forward_backward", patched)


@pytest.mark.parametrize(("where", "named"), [("loss", "the loss"), ("gradient", "the gradient norm")])
def test_divergence_keeps_the_last_good_checkpoint_and_dumps_the_last_steps(
    where: str, named: str, tiny_argv: Argv, only_run: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 79, where)
    words = ("--max-iters", "100", "--checkpoint-interval", "10", "--eval-interval", "100", "--flush-interval", "7")
    assert train.main(tiny_argv(*words)) == 1
    record = read_record(only_run())
    assert (record["status"], record["exit_reason"]) == ("diverged", f"{named} at step 79 is nan")
    assert last_checkpoint(only_run()).step == 70
    assert all(tensor.isfinite().all() for tensor in last_checkpoint(only_run()).weights.values())
    flight = json.loads((only_run() / "artifacts" / "flight_recorder.json").read_text())
    assert flight["reason"] == record["exit_reason"]
    steps = flight["steps"]
    assert len(steps) == 64
    assert steps[-1]["step"] >= 79
    bad = next(step for step in steps if step["step"] == 79)
    assert set(bad["grad_norms"]) == {"matrices", "embeddings", "vectors"}
    assert len(bad["sample_offsets"]) == 4
    assert bad["memory_bytes"] > 1_000_000
    assert "nan" in (bad["loss"], *bad["grad_norms"].values())


def test_an_exception_dumps_the_last_steps_too(
    tiny_argv: Argv, only_run: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("the cat pulled the plug")

    stop_after(monkeypatch, 4, fail)
    with pytest.raises(RuntimeError):
        train.main(tiny_argv())
    flight = json.loads((only_run() / "artifacts" / "flight_recorder.json").read_text())
    assert flight["reason"] == "RuntimeError: the cat pulled the plug"
    assert [step["step"] for step in flight["steps"]] == [0, 1, 2, 3]


def test_float16_steps_in_a_row_may_be_bad(
    tiny_argv: Argv, only_run: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, 5, "gradient")
    half = ("--dtype", "float16", "--max-iters", "20")
    assert train.main(tiny_argv(*half, "--skip-nonfinite", "1")) == 0
    assert (
        dict(read_metrics(only_run() / "logs", "grad_norm"))[5]
        != dict(read_metrics(only_run() / "logs", "grad_norm"))[5]
    )  # NaN
    assert all(tensor.isfinite().all() for tensor in last_checkpoint(only_run()).weights.values())


# ------------------------------------------------------------------------------------------ views


@pytest.mark.slow
def test_a_resumed_run_is_one_continuous_curve_and_one_aim_run(
    tiny_argv: Argv, tmp_path: Path, run_of: Callable[[str], Path]
) -> None:
    from aim import Repo
    from aim.sdk.index_manager import RepoIndexManager

    watched = (*HARD, "--max-iters", "300", "--eval-interval", "50", "--checkpoint-interval", "100", "--aim-logging")
    assert train.main(tiny_argv(*watched, "--no-aim-logging", "--run-tag", "straight")) == 0
    words = tiny_argv(*watched, "--run-tag", "killed", "--tracking-budget", "1")
    killed([*words, "--flush-interval", "5"], "fed", 160)
    run = run_of("killed")
    first_hash = read_record(run)["views"]["aim"]["hash"]
    fed = json.loads((run / "logs" / "fed_tensorboard.json").read_text())
    assert fed["last_step"] > 100  # beyond the checkpoint that the resume starts from
    assert train.main(["--resume", str(run)]) == 0
    assert differences(run_of("straight"), run) == SAME

    events = EventAccumulator(str(run), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    for tag in ("train/loss", "val/loss", "grad_norm"):
        expected = [(step, pytest.approx(value, rel=1e-6)) for step, value in read_metrics(run / "logs", tag)]
        assert [(event.step, event.value) for event in events.Scalars(tag)] == expected
    assert [event.step for event in events.Tensors("status/text_summary")] == [300]

    assert read_record(run)["views"]["aim"]["hash"] == first_hash
    repo = Repo(str(tmp_path))
    RepoIndexManager.get_index_manager(repo).index(first_hash)
    assert [r.hash for r in repo.iter_runs()] == [first_hash]
    (aim_run,) = repo.iter_runs()
    assert aim_run["status"] == "completed"
    metric = next(m for m in aim_run.metrics() if (m.name, m.context.to_dict()) == ("loss", {"subset": "val"}))
    steps, values = metric.data.items_list()
    assert list(steps) == [step for step, _ in read_metrics(run / "logs", "val/loss")]
    assert list(values[0]) == pytest.approx([value for _, value in read_metrics(run / "logs", "val/loss")])


@pytest.mark.slow
def test_aim_shows_no_steps_that_a_shorter_resume_never_reached(
    tiny_argv: Argv, tmp_path: Path, only_run: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from aim import Repo
    from aim.sdk.index_manager import RepoIndexManager

    words = tiny_argv(*SIXTY, "--max-iters", "400", "--aim-logging", "--tracking-budget", "1", "--flush-interval", "5")
    killed([*words, "--checkpoint-interval", "100", "--eval-interval", "400"], "fed", 160)
    run = only_run()
    stale = read_record(run)["views"]["aim"]["hash"]
    stop_after(monkeypatch, 110, send(signal.SIGTERM))
    assert train.main(["--resume", str(run)]) == 143
    fresh = read_record(run)["views"]["aim"]["hash"]
    assert fresh != stale
    repo = Repo(str(tmp_path))
    RepoIndexManager.get_index_manager(repo).index(fresh)
    (aim_run,) = repo.iter_runs()
    assert aim_run.hash == fresh
    metric = next(m for m in aim_run.metrics() if m.name == "lr")
    assert list(metric.data.items_list()[0]) == list(range(110))
