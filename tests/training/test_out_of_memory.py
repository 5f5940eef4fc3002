"""A batch that does not fit is reported in one line that says what to do, in every script that trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

import profile_model
import train
from utils.errors import is_out_of_memory
from utils.runs.layout import TRAIN_LOG
from utils.runs.run import read_record
from utils.terminal.cli import script
from utils.training import state, step

Argv = Callable[..., list[str]]
TOO_MANY = 1 << 50
REMEDY = (
    "error: out of memory: a micro-step of 2 x 8 tokens does not fit on cpu: --batch-size auto finds what fits; "
    "--gradient-accumulation-steps N splits an update into N micro-steps\n"
)


def too_large(*_: object) -> torch.Tensor:
    return torch.empty(TOO_MANY)


@pytest.mark.parametrize(
    "fail",
    [too_large, lambda: np.empty(TOO_MANY), lambda: [0] * TOO_MANY],
    ids=["torch", "numpy", "python"],
)
def test_a_failed_allocation_is_reported_in_one_line_by_every_script(
    fail: Callable[[], object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert script(lambda argv: 0 if fail() else 1)([]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("error: out of memory")
    assert printed.count("\n") == 1


def test_out_of_memory_errors_are_told_from_other_errors() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert is_out_of_memory(RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(OSError(12, "Cannot allocate memory"))


def test_a_batch_is_refused_if_only_its_inputs_would_fit(
    tiny_argv: Argv, runs_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("utils.training.batch_size.available_memory", lambda device: 2_000_000)
    assert train.main(tiny_argv("--batch-size", "1000")) == 2  # the inputs of the blocks take 256 kB
    assert "a micro-step of 1,000 x 8 tokens does not fit on cpu" in capsys.readouterr().err
    assert not runs_dir.exists()


def test_a_batch_that_cannot_fit_is_refused_before_a_run_is_created(
    tiny_argv: Argv, runs_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(tiny_argv("--batch-size", "100000000000")) == 2
    expected = REMEDY.replace("out of memory", "--batch-size").replace("2 x", "100,000,000,000 x")
    assert capsys.readouterr().err == expected
    assert not runs_dir.exists()


def test_a_batch_that_does_not_fit_names_the_remedies(
    tiny_argv: Argv, only_run: Callable[[], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    argv = tiny_argv("--gradient-accumulation-steps", "2", "--max-iters", "2")
    monkeypatch.setattr(step, "autocast", too_large)
    assert train.main(argv) == 1
    assert capsys.readouterr().err.endswith(REMEDY)
    run = only_run()
    record = read_record(run)
    assert (record["status"], record["exit_reason"]) == ("failed", f"OutOfMemoryError{REMEDY[5:].rstrip()}")
    assert "DefaultCPUAllocator" in (run / TRAIN_LOG).read_text(encoding="utf-8")
    assert profile_model.main([*argv, "--steps", "1", "--warmup", "0"]) == 1
    assert capsys.readouterr().err == REMEDY


def test_a_batch_that_does_not_fit_during_compilation_names_the_remedies(
    tiny_argv: Argv, only_run: Callable[[], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(state, "compiled_loss", fail)
    assert train.main(tiny_argv("--gradient-accumulation-steps", "2", "--compile")) == 1
    assert capsys.readouterr().err.endswith(REMEDY)
    assert read_record(only_run())["status"] == "failed"
