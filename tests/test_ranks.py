"""Runs on several ranks, started by torchrun: the same bits on 1, 2 and 4, and what happens when one rank fails."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT, wait_until_trained
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from warm_python import WarmPython

import train
from utils.checkpoints.choose import newest_good
from utils.checkpoints.folder import list_checkpoints
from utils.experiments.bits import compare_logs
from utils.runs.layout import CHECKPOINTS
from utils.runs.log import read_metrics
from utils.runs.run import read_record, read_status
from utils.runs.seal import verify_seal

SECONDS = 240.0  # on a busy machine

Launch = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def launch(tiny_argv: Callable[..., list[str]], tmp_path: Path, warm_python: WarmPython) -> Launch:
    """Starts train.py on ranks, with troubled_rank.py: `launch(2, "--lanes", "4", trouble="raise 1 3")`."""

    def start(
        count: int, *words: str, trouble: str = "none 0 0", own: list[str] | None = None, restarts: int = 0
    ) -> subprocess.Popen[str]:
        python = warm_python.path
        torchrun = [python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        torchrun += [f"--max-restarts={restarts}", "--no-python", python]
        flags = tiny_argv("--device", "cpu", *words) if own is None else own
        flags += ["--callbacks", "troubled_rank:Trouble"] if own is None else []
        path = os.pathsep.join([str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "TROUBLE": trouble, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        environment |= {"TROUBLE_MARK": str(tmp_path / "mark"), "TROUBLE_CALLS": str(tmp_path)}
        return subprocess.Popen(
            [*torchrun, str(ROOT / "train.py"), *flags],
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    return start


def ended(process: subprocess.Popen[str]) -> str:
    """Wait until a command and all its ranks have ended, and return the output."""
    try:
        return process.communicate(timeout=SECONDS)[0]
    finally:
        process.kill()


@pytest.fixture
def no_process_left(tmp_path: Path) -> Iterator[None]:
    """Check after the test that no process has its folder in the command line."""
    yield
    left = [
        process
        for process in psutil.process_iter(["cmdline"])
        if str(tmp_path) in " ".join(process.info["cmdline"] or [])
    ]
    assert not left


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of the newest checkpoint."""
    folder = list_checkpoints(run / CHECKPOINTS)[0][1]
    return {
        f"{kind}/{name}": tensor
        for kind in ("model", "optimizer")
        for name, tensor in load_file(folder / f"{kind}.safetensors").items()
    }


def check_looks_like_one_rank(run: Path, folder: Path, steps: int) -> None:
    """Check that two ranks got the same callbacks, and left a log, TensorBoard's file and a seal as one rank would."""
    calls = [(folder / f"rank{rank}").read_text().splitlines() for rank in range(2)]
    assert calls[0] == calls[1]
    assert [call.split()[2] for call in calls[0]].count("step") == steps
    assert all(call.startswith(f"{run} ") for call in calls[0])
    (events,) = run.glob("events.*")
    found = EventAccumulator(str(events), size_guidance={"scalars": 0}).Reload()
    for name in ("train/loss", "val/loss", "trouble/rank"):
        logged = read_metrics(run / "logs", name)
        assert [(e.step, e.value) for e in found.Scalars(name)] == [(step, pytest.approx(v)) for step, v in logged]
    assert read_metrics(run / "logs", "trouble/rank") == [(step, 0.0) for step in range(steps)]
    assert [step for step, _ in read_metrics(run / "logs", "train/loss")] == list(range(steps))
    assert [view["state"] for view in read_record(run)["views"].values()] == ["complete"]
    assert verify_seal(run).good


@pytest.mark.slow
def test_one_two_and_four_ranks_give_the_same_bits_and_resume_each_other(
    launch: Launch, tiny_argv: Callable[..., list[str]], runs_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout, accumulation, Muon and AdamW; stopped on 2 ranks by a callback of rank 1, resumed on 1 and 4."""
    words = ["--batch-size", "16", "--lanes", "4", "--gradient-accumulation-steps", "8", "--dropout", "0.2"]
    words += ["--optimizer-name", "muon", "--max-iters", "9", "--eval-iters", "3"]
    process = launch(2, *words, trouble="stop 1 5")
    printed = ended(process)
    assert process.returncode == 0, printed
    (two,) = runs_dir.iterdir()
    record = read_record(two)
    assert (record["status"], record["exit_reason"], record["last_step"]) == ("interrupted", "rank 1: enough", 5)
    assert record["resolved"]["world_size"] == 2
    assert printed.count("run directory") == 1
    assert printed.count("ranks  ") == 1
    check_looks_like_one_rank(two, tmp_path, 5)

    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    monkeypatch.setenv("TROUBLE", "none 0 0")
    one = runs_dir / "one"
    shutil.copytree(two, one)
    assert train.main(["--resume", str(one)]) == 0
    process = launch(4, own=["--resume", str(two)])
    printed = ended(process)
    assert process.returncode == 0, printed
    argv = tiny_argv("--device", "cpu", *words, "--callbacks", "troubled_rank:Trouble", "--run-tag", "undisturbed")
    assert train.main(argv) == 0
    (undisturbed,) = runs_dir.glob("*_undisturbed")
    expected = tensors_of(undisturbed)
    for run in (one, two):
        tensors = tensors_of(run)
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
        assert compare_logs(undisturbed, run).identical
        assert read_record(run)["config_hash"] == read_record(undisturbed)["config_hash"]
        assert verify_seal(run).good


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "reason", "checkpoint"),
    [
        ("raise 1 3", "rank 1: ValueError: boom", 2),
        ("end 1 0", "rank 1: ValueError: boom", 6),  # in on_end, after the checkpoint of the last step
        ("kill 1 3", "rank 1 died", 2),
    ],
)
def test_a_rank_that_fails_ends_the_run_and_is_named(
    launch: Launch, only_run: Callable[[], Path], no_process_left: None, trouble: str, reason: str, checkpoint: int
) -> None:
    process = launch(2, "--checkpoint-interval", "2", trouble=trouble)
    printed = ended(process)
    run = only_run()
    record = read_record(run)
    assert process.returncode == 1
    assert record["status"] == "failed", printed
    assert record["exit_reason"].startswith(reason)
    assert printed.count(f"error: {reason}") == 1
    assert list_checkpoints(run / CHECKPOINTS)[0][0] == checkpoint
    if not trouble.startswith("kill"):
        assert 'raise ValueError("boom")' in (run / "logs" / "train.log").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_frozen_rank_is_ended_and_the_run_goes_on(
    launch: Launch, only_run: Callable[[], Path], no_process_left: None
) -> None:
    words = ["--checkpoint-interval", "2", "--lanes", "2", "--rank-timeout", "2", "--max-iters", "8"]
    words += ["--resume", "auto", "--run-tag", "elastic"]
    process = launch(2, *words, trouble="freeze 1 5", restarts=3)  # SIGSTOP: the rank cannot end itself
    printed = ended(process)
    assert process.returncode == 0, printed
    assert printed.count("error: ") == 1
    assert re.search("error: rank 1 (gave no sign of life|did not get as far)", printed)
    record = read_record(only_run())
    assert (record["status"], len(record["resumes"])) == ("completed", 1)
    assert [step for step, _ in read_metrics(only_run() / "logs", "train/loss")] == list(range(8))
    assert (only_run() / "artifacts" / "seal.json").is_file()


@pytest.mark.slow
def test_a_full_disk_on_rank_0_ends_all_and_keeps_the_checkpoint(
    launch: Launch, small_disk: Path, no_process_left: None
) -> None:
    words = ["--runs-dir", str(small_disk), "--checkpoint-interval", "2", "--flush-interval", "1"]
    process = launch(2, *words, "--max-iters", "100000", trouble="fill 0 5")
    printed = ended(process)
    assert process.returncode == 1, printed
    assert printed.count("error: ") == 1
    assert "error: rank 0: OSError: [Errno 28] No space left on device" in printed
    (run,) = (path for path in small_disk.iterdir() if path.is_dir())
    warnings: list[str] = []
    _, unusable = newest_good(run / CHECKPOINTS, strict=True, warn=warnings.append, problem=lambda checkpoint: "")
    assert not unusable
    assert list_checkpoints(run / CHECKPOINTS)[0][0] >= 2


def test_sigterm_stops_all_ranks_at_one_step(launch: Launch, runs_dir: Path) -> None:
    process = launch(2, "--max-iters", "1000000", "--eval-interval", "1000000", "--flush-interval", "5")
    run = wait_until_trained(process, runs_dir, seconds=SECONDS)
    process.send_signal(signal.SIGTERM)
    printed = ended(process)
    record = read_record(run)
    assert (read_status(run), record["exit_reason"]) == ("interrupted", "SIGTERM"), printed
    assert [step for step, _ in list_checkpoints(run / CHECKPOINTS)] == [record["last_step"]]
    assert [step for step, _ in read_metrics(run / "logs", "train/loss")] == list(range(record["last_step"]))
    assert "Traceback" not in printed.split("Received 15")[0]
    assert json.loads((run / "run.json").read_text())["resolved"]["message_bytes_per_step"] > 0


def test_a_signal_to_one_rank_while_it_waits_for_the_others_stops_all_after_the_next_step(
    launch: Launch, only_run: Callable[[], Path], no_process_left: None
) -> None:
    printed = ended(launch(2, "--max-iters", "20", "--eval-interval", "20", trouble="lateSIGTERM 1 3"))
    record = read_record(only_run())
    assert (record["status"], record["exit_reason"], record["last_step"]) == ("interrupted", "SIGTERM", 4), printed
    assert [step for step, _ in list_checkpoints(only_run() / CHECKPOINTS)] == [4]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_checkpoint_requested_while_a_rank_waits_for_the_others_is_saved(
    launch: Launch, only_run: Callable[[], Path], no_process_left: None, rank: int
) -> None:
    words = ["--max-iters", "8", "--eval-interval", "8", "--checkpoint-interval", "100"]
    printed = ended(launch(2, *words, trouble=f"lateSIGUSR1 {rank} 3"))
    assert read_record(only_run())["status"] == "completed", printed
    assert sorted(step for step, _ in list_checkpoints(only_run() / CHECKPOINTS)) == [4, 8]
