"""benchmarks.gpu: its dry run, what survives a failure, a hang or a signal, and how nanoGPT's output is read."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from safetensors.torch import save_file

from benchmarks import gpu, gpu_runs, nanogpt
from benchmarks.gpu_figures import figures
from benchmarks.gpu_jobs import JOBS, PARTS, chosen
from benchmarks.gpu_measure import StepClock
from benchmarks.gpu_task import MARK, Task, flags_of, read_report
from utils.checkpoints.folder import WEIGHTS_FILE, folder_name
from utils.config.settings import Config
from utils.errors import UserError
from utils.runs.layout import CHECKPOINTS
from utils.terminal.console import Terminal

DRY = ["--dry-run", "--minutes", "4"]
FAKE_TRAIN = """
meta_vocab_size = None
import sys
assert "config/train_shakespeare_char.py" in sys.argv and "--device=cpu" in sys.argv
print("step 0: train loss 4.2, val loss 4.3")
for i in range(13):
    if i in (4, 8):
        print(f"step {i}: train loss 4.0, val loss 4.1")
    print(f"iter {i}: loss 4.1000, time {10 + i}.50ms, mfu -100.00%")
"""
FAKE_MODEL = """
from dataclasses import dataclass
import torch
@dataclass
class GPTConfig:
    block_size: int; n_layer: int; n_head: int; n_embd: int; vocab_size: int; dropout: float; bias: bool
class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.table = torch.nn.Embedding(config.vocab_size, config.vocab_size)
    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), learning_rate, betas)
    def forward(self, idx, targets):
        logits = self.table(idx)
        return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A stand-in for a checkout of nanoGPT, whose train.py prints lines like the real one's."""
    folder = tmp_path / "checkout"
    (folder / "config").mkdir(parents=True)
    for name, text in {"train.py": FAKE_TRAIN, "model.py": FAKE_MODEL}.items():
        (folder / name).write_text(text)
    for name in ("configurator.py", "config/train_shakespeare_char.py"):
        (folder / name).touch()
    return folder


@pytest.fixture(autouse=True)
def no_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORKBENCH_DATA", raising=False)  # a dry run makes its own


def read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


# ------------------------------------------------------------------------------------------------- dry runs


@pytest.mark.slow
def test_a_dry_run_measures_and_writes_but_does_not_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gpu.json"
    assert gpu.main([*DRY, "--parts", "limits,tracking", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    written = read(out)
    assert {name: job["status"] for name, job in written["jobs"].items()} == {"limits": "done", "steps": "done"}
    assert written["complete"]
    assert written["dry_run"]
    by_name = {figure["name"]: figure for figure in written["figures"]}
    assert all(by_name["all tracking against none"][side] > 0 for side in ("ours", "reference"))
    assert by_name["bf16 matrix product, median"]["ours"] > 0
    assert by_name["GPT-2, 12x1024"]["ours"] is None
    assert all(figure["reached"] is None for figure in written["figures"])
    assert "reached" not in printed
    assert "missed" not in printed
    assert "the numbers mean nothing" in printed


@pytest.mark.slow
@pytest.mark.usefixtures("warm_processes")
def test_a_dry_run_of_everything_has_every_figure_that_a_cpu_can_measure(tmp_path: Path, checkout: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", *DRY, "--out", str(out), "--nanogpt", str(checkout)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    written = read(out)
    assert {job["status"] for job in written["jobs"].values()} == {"done"}, written["jobs"]
    assert "error" not in json.dumps([job["results"] for name, job in written["jobs"].items() if name != "limits"])
    blank = {figure["name"] for figure in written["figures"] if figure["ours"] is None}
    only_on_a_gpu = {"attention, cudnn", "attention, efficient", "peak memory, 64x1024", "transformers, compiled"}
    only_on_a_gpu |= {"its peak memory, against the least of the others"}
    not_built = {
        "without CUDA graphs",
        "fp8 against bf16, 64x1024",
        "the same: loss of the last step",
        "with activation checkpointing",
        "compiling, cold",
    }
    assert blank <= only_on_a_gpu | not_built
    with_reference = {figure["name"] for figure in written["figures"] if figure["reference"] is not None}
    assert {"GPT-2, 12x1024", "GPT-2, 64x1024", "shakespeare_gpu to 1.47, training"} <= with_reference
    assert written["jobs"]["resume"]["results"]["identical"] is True


# --------------------------------------------------------------------------------- failures, hangs, signals


def with_jobs(monkeypatch: pytest.MonkeyPatch, code: Callable[[str], str]) -> None:
    """Replace the process of each job by one that runs `code(name)`."""
    monkeypatch.setattr(gpu, "job_command", lambda name, task_file: [sys.executable, "-c", code(name)])


def test_a_job_that_fails_or_hangs_keeps_its_results_and_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    endings = {
        "limits": "raise SystemExit('torch: no kernel image')",
        "steps": "import time; time.sleep(600)",
        "decode": "",
    }
    with_jobs(
        monkeypatch, lambda name: f"print('noise'); print('{MARK} {{\"of\": \"{name}\"}}', flush=True); {endings[name]}"
    )
    monkeypatch.setattr(gpu, "LEAST", 0.0)
    monkeypatch.setattr(gpu, "POLL_SECONDS", 0.05)
    real = gpu.run_job
    monkeypatch.setattr(
        gpu, "run_job", lambda job, bench, limit: real(job, bench, 0.5 if job.name == "steps" else limit)
    )
    out = tmp_path / "gpu.json"
    assert gpu.main([*DRY, "--parts", "limits,tracking,decode", "--out", str(out)]) == 0
    jobs = read(out)["jobs"]
    assert {name: job["status"] for name, job in jobs.items()} == {
        "limits": "failed",
        "steps": "timed out",
        "decode": "done",
    }
    assert all(job["results"] == {"of": name} for name, job in jobs.items())
    assert jobs["limits"]["error"] == "torch: no kernel image"
    assert "limits: failed" in capsys.readouterr().out


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_prints_the_table_and_keeps_the_results(
    signum: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = f'print(\'{MARK} {{"gemm": {{"flops": 7e14}}}}\', flush=True)'
    stop = f"import os, time; os.kill(os.getppid(), {int(signum)}); time.sleep(600)"
    with_jobs(monkeypatch, lambda name: f"{report}; {stop}")
    out = tmp_path / "gpu.json"
    before = signal.getsignal(signum)
    assert gpu.main([*DRY, "--parts", "limits,decode", "--out", str(out)]) == 128 + signum
    assert signal.getsignal(signum) == before
    written = read(out)
    assert not written["complete"]
    assert list(written["jobs"]) == ["limits"]
    assert written["jobs"]["limits"]["status"] == "stopped"
    printed = capsys.readouterr().out
    assert f"stopped: {signum.name}" in printed
    assert "700" in printed


def test_a_second_signal_does_not_lose_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_jobs(
        monkeypatch, lambda name: f"import os, time; os.kill(os.getppid(), {int(signal.SIGINT)}); time.sleep(600)"
    )
    real = Terminal.print

    def print_and_interrupt(terminal: Terminal, *words: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        real(terminal, *words, **options)

    monkeypatch.setattr(Terminal, "print", print_and_interrupt)
    out = tmp_path / "gpu.json"
    assert gpu.main([*DRY, "--parts", "limits", "--out", str(out)]) == 130
    assert "written:" in capsys.readouterr().out
    assert read(out)["jobs"]["limits"]["status"] == "stopped"


def test_a_signal_before_the_first_measurement_is_reported_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "make_task", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert gpu.main([*DRY, "--out", str(tmp_path / "gpu.json")]) == 143
    assert capsys.readouterr().out == "stopped: SIGTERM, before the first measurement\n"


def test_the_json_file_exists_before_the_first_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "gpu.json"
    with_jobs(monkeypatch, lambda name: f"open({str(out)!r})")
    assert gpu.main([*DRY, "--parts", "limits", "--out", str(out)]) == 0
    assert read(out)["jobs"]["limits"]["status"] == "done"


def test_jobs_without_time_left_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with_jobs(monkeypatch, lambda name: "")
    out = tmp_path / "gpu.json"
    assert gpu.main(["--dry-run", "--minutes", "0.1", "--parts", "limits", "--out", str(out)]) == 0
    assert read(out)["jobs"]["limits"] == {"status": "skipped", "error": "no time left"}
    assert "no time was left for: limits" in capsys.readouterr().out


def test_results_are_read_from_complete_lines_only() -> None:
    assert read_report(f'{MARK} {{"a": 1}}') == {"a": 1}
    assert read_report(f'{MARK} {{"a": NaN}}') == {"a": None}
    assert read_report(f'{MARK} {{"a": 1') is None
    assert read_report('{"a": 1}') is None


# ------------------------------------------------------------------------------------------------- the plan


def test_every_part_has_jobs_and_nanogpt_only_with_a_checkout() -> None:
    for part in PARTS:
        assert chosen([part], with_nanogpt=False, dry=False)
    assert not any(job.nanogpt for job in chosen(PARTS, with_nanogpt=False, dry=False))
    assert [job.name for job in chosen(["step"], with_nanogpt=True, dry=False)] == [
        "nanogpt_step",
        "steps",
        "nanogpt_step_again",
    ]
    assert "nanogpt_step_again" not in [job.name for job in chosen(["step", "loss"], with_nanogpt=True, dry=False)]
    assert len({job.name for job in JOBS}) == len(JOBS)


def test_settings_become_flags_and_a_setting_of_another_version_is_left_out(tmp_path: Path) -> None:
    task = Task(str(tmp_path), "text", "words", None, 1, dry=False)
    overrides = task.overrides({"compile": False, "eval_iters": "3", "fp8": True})
    assert overrides["device"] == "cuda"
    assert ("fp8" in overrides) == hasattr(Config().train, "fp8")
    assert flags_of({"compile": False, "deterministic": True, "eval_iters": "3"}) == [
        "--no-compile",
        "--deterministic",
        "--eval-iters=3",
    ]


# ------------------------------------------------------------------------------------------------- figures


def test_without_results_every_figure_is_blank() -> None:
    assert all(figure.ours is figure.reference is figure.compared is figure.reached is None for figure in figures({}))


def test_an_arm_that_failed_counts_as_not_measured_and_the_others_are_judged() -> None:
    arms = {"tracked": [{"step_ms": 3.0}, {"error": "out of memory"}], "untracked": [{"error": "out of memory"}]}
    results = {
        "steps": {"arms": arms},
        "nanogpt_step": {"step_ms": 8.0},
        "nanogpt_loss": {"step_ms": 5.0, "reached": None},
        "loss": {"reached": {"seconds": 7.0}},
        "speedrun": {"runs": [{"seed": 1, "seconds": 5.0, "split_loss": 1.4}, {"seed": 2, "error": "x"}]},
        "decode": {"124M bfloat16": {"tokens_per_second": 1600.0, "first_token_ms": 31.0}},
    }
    by_name = {figure.name: figure for figure in figures(results)}
    step = by_name["step, 10.7M, 64x256, tracked, against nanoGPT"]
    assert (step.ours, step.reference, step.compared, step.reached) == (
        3.0,
        5.0,
        0.6,
        False,
    )  # its faster run
    assert by_name["the same in milliseconds"].reached is True
    assert by_name["all tracking against none"].reached is None
    assert by_name["shakespeare_gpu to 1.47, training"].reached is None  # nanoGPT did not get there
    assert by_name["speedrun_gpu, mean of 3 seeds"].ours is None
    assert by_name["124M, one sequence, bf16"].reached is True
    assert by_name["124M, first token after 200"].reached is False


def test_a_start_is_warm_only_after_a_cold_one() -> None:
    def seconds(results: dict[str, Any]) -> list[float | None]:
        return [figure.ours for figure in figures(results) if figure.part == "start"][:4]

    cold, warm = ({"seconds": s, "first_gradients_seconds": s - 3} for s in (20.0, 9.0))
    assert seconds({"start_cold": cold, "start_warm": warm}) == [20, 9, 17, 6]
    assert seconds({"start_warm": warm}) == [None] * 4


def test_the_clock_measures_windows_after_the_warmup_and_then_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("benchmarks.gpu_measure.time.perf_counter", lambda: now)
    clock = StepClock(torch.device("cpu"), warmup=2, steps=8, window=4)
    for seconds in (1.0, 1.0, *[0.001] * 4, *[0.003] * 3):
        now += seconds
        clock.step_done()
    now += 0.003
    with pytest.raises(KeyboardInterrupt):
        clock.step_done()
    assert clock.windows == pytest.approx([1.0, 3.0])
    assert clock.results() == pytest.approx({"step_ms": 2.0, "median_ms": 2.0, "host_ms": 2.0})


# ------------------------------------------------------------------------------------------------- nanoGPT


def test_the_copy_of_nanogpt_has_the_corpus_and_the_checkout_is_unchanged(tmp_path: Path, checkout: Path) -> None:
    before = sorted(path.name for path in checkout.rglob("*"))
    copy = nanogpt.prepare(checkout, tmp_path / "work", "abcabcabca")
    assert sorted(path.name for path in checkout.rglob("*")) == before
    data = copy / "data" / "shakespeare_char"
    assert np.fromfile(data / "train.bin", np.uint16).tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2]
    assert np.fromfile(data / "val.bin", np.uint16).tolist() == [0]
    assert not list(data.glob("*.pkl"))
    assert "meta_vocab_size = 3\n" in (copy / "train.py").read_text()
    (checkout / "train.py").write_text("meta_vocab_size = find()\n")
    with pytest.raises(UserError, match="of another version"):
        nanogpt.prepare(checkout, tmp_path / "again", "abc")


def test_nanogpts_lines_become_times_and_losses() -> None:
    progress = nanogpt.Progress(began=100.0)
    lines = [
        (103.0, "step 0: train loss 4.2874, val loss 4.2823"),
        (113.0, "iter 0: loss 4.2654, time 9999.00ms, mfu -100.00%"),  # it compiles
        (113.1, "iter 10: loss 3.2, time 9.00ms, mfu 1.00%"),
        (113.2, "iter 20: loss 3.1, time 11.00ms, mfu 1.00%"),
        (115.0, "step 25: train loss 1.4, val loss 1.60"),
        (115.1, "iter 30: loss 3.0, time 10.00ms, mfu 1.00%"),
        (115.3, "iter 40: loss 3.0, time 10.00ms, mfu 1.00%"),
        (118.0, "step 50: train loss 1.2, val loss 1.4697"),
    ]
    for moment, line in lines:
        progress.add(line, moment)
    assert progress.mean_ms == pytest.approx(15.0)  # the mean of 10 and 20, without the evaluations
    results = progress.loss_results(1.47)
    assert results["reached"] == {"step": 50, "val_loss": 1.4697, "seconds": 5.0, "process_seconds": 18.0}
    assert progress.loss_results(1.4)["reached"] is None
    assert results["best"]["step"] == 50


def test_the_target_is_given_up_once_the_loss_rises() -> None:
    assert not nanogpt.given_up([1.6, 1.5, 1.49, 1.50, 1.51, 1.52])
    assert nanogpt.given_up([1.6, 1.5, 1.49, 1.50, 1.51, 1.52, 1.53])


def test_a_run_of_nanogpt_is_read_and_its_failure_is_reported_in_one_line(tmp_path: Path, checkout: Path) -> None:
    copy = nanogpt.prepare(checkout, tmp_path / "work", "abcabcabca")
    task = Task(str(tmp_path), "", "", str(copy), 1, dry=True)
    progress = nanogpt.run(task, {}, lambda progress: len(progress.iterations) == 6)
    assert [step for step, *_ in progress.evaluations] == [0, 4]
    assert [ms for _, ms, _ in progress.iterations] == [10.5, 11.5, 12.5, 13.5, 14.5, 15.5]
    (copy / "train.py").write_text("raise ValueError('no GPU')")
    with pytest.raises(UserError, match=r"nanoGPT's train\.py: ValueError: no GPU"):
        nanogpt.run(task, {}, lambda progress: False)


def test_the_hash_covers_the_tensors_and_not_the_name_of_the_run(tmp_path: Path) -> None:
    def run(name: str, value: float) -> str:
        folder = tmp_path / name / CHECKPOINTS / folder_name(120)
        folder.mkdir(parents=True)
        save_file({"weight": torch.full((3,), value)}, folder / WEIGHTS_FILE, {"run": name})
        return gpu_runs.weights_hash(tmp_path / name)

    assert run("a", 1.0) == run("b", 1.0) != run("c", 1.5)
