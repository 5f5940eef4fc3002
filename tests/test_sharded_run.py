"""A sharded run on two ranks, whose disk is full once; its second half is repeated on one rank and on four."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT
from safetensors.torch import load_file
from warm_python import WarmPython

import experiments
import train
import weights
from utils.checkpoints.choose import newest_good
from utils.checkpoints.files import read_checkpoint
from utils.checkpoints.folder import folder_name, list_checkpoints
from utils.experiments.bits import compare_logs
from utils.runs.layout import CHECKPOINTS
from utils.runs.run import read_record


def train_on(python: Path, count: int, trouble: str, *words: str) -> str:
    """Train on `count` ranks, and return their output in one line."""
    path = os.pathsep.join([str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "TROUBLE": trouble, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    torchrun = [python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "--no-python"]
    process = subprocess.run(
        [*torchrun, python, ROOT / "train.py", *words], env=environment, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return " ".join((process.stdout + process.stderr).split())


def check_equal_from_step_3(whole: Path, forked: Path) -> None:
    """Compare metrics, weights, optimizer state and export of a run with those of its fork at step 3."""
    assert compare_logs(whole, forked, 3).identical
    expected, found = (read_checkpoint(run / CHECKPOINTS / folder_name(9)) for run in (whole, forked))
    for kind in ("weights", "optimizer_tensors"):
        tensors, others = getattr(expected, kind), getattr(found, kind)
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensors[name], others[name]) for name in tensors)
    exports = [load_file(run / "artifacts" / "export" / "model.safetensors") for run in (whole, forked)]
    assert exports[0].keys() == exports[1].keys() == expected.weights.keys()
    assert all(torch.equal(tensor, exports[1][name]) for name, tensor in exports[0].items())


@pytest.mark.slow
def test_sharded_training_on_two_ranks_equals_training_on_one_and_on_four(
    tiny_argv: Callable[..., list[str]],
    runs_dir: Path,
    warm_python: WarmPython,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Muon and AdamW, dropout, accumulation; rank 1 finds no space for its files of step 6."""
    words = ["--shard", "fsdp", "--lanes", "4", "--gradient-accumulation-steps", "8", "--batch-size", "16"]
    words += ["--optimizer-name", "muon", "--dropout", "0.2", "--max-iters", "9", "--keep-last", "5"]
    words += ["--device", "cpu", "--callbacks", "troubled_rank:Trouble", "--activation-checkpointing"]
    printed = train_on(warm_python.path, 2, "full 1 5", *tiny_argv(*words, "--run-tag", "two"))
    (two,) = runs_dir.glob("*_two")
    assert read_record(two)["resolved"]["message_bytes_per_step"] > 0
    assert (
        "the checkpoint of step 6 was not written: rank 1: No space left on device; the newest is of step 3" in printed
    )
    assert [step for step, _ in list_checkpoints(two / CHECKPOINTS)] == [9, 3]
    newest, unusable = newest_good(two / CHECKPOINTS, strict=True, warn=print)
    assert newest is not None
    assert not unusable
    assert (newest.path / "optimizer-00002-of-00002.safetensors").is_file()

    monkeypatch.syspath_prepend(str(ROOT / "tests"))
    monkeypatch.setenv("TROUBLE", "none 0 0")
    try:
        assert train.main(["--resume", f"{two}:3", "--fork", "--run-tag", "one"]) == 0
    finally:
        dist.destroy_process_group()
    train_on(warm_python.path, 4, "none 0 0", "--resume", f"{two}:3", "--fork", "--run-tag", "four")
    for tag in ("one", "four"):
        check_equal_from_step_3(two, next(runs_dir.glob(f"*_{tag}")))

    capsys.readouterr()
    assert experiments.main(["check", str(two)]) == 0
    assert weights.main(["diff", f"{two}:latest", str(two)]) == 0
    assert "equal" in capsys.readouterr().out
    damaged = newest.path / "model-00002-of-00002.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x00")
    assert experiments.main(["check", str(two)]) == 1
    assert damaged.name in capsys.readouterr().out
