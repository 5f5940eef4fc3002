"""Mistakes on the command line of sweep.py are reported in one line, with exit status 2, and leave nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

import sweep

RATE = "learning_rate: {log: [1e-4, 1e-1]}\n"


@pytest.mark.parametrize(
    ("space", "flags", "message"),
    [
        (RATE, ["--trials=0"], "--trials must be at least 1, not 0"),
        (RATE, ["--jobs=0"], "--jobs must be at least 1, not 0"),
        (RATE, ["--max-failures=-1"], "--max-failures must be at least 0, not -1"),
        (RATE, ["--trails=3"], "unknown flag --trails; did you mean --trials?"),
        (RATE, ["--sampler=tp"], "expected tpe, random, grid or cmaes, got 'tp'; did you mean tpe?"),
        (RATE, ["--name=a b"], "--name: the name of a sweep is a letter or digit, then"),
        (RATE, ["--name=../x"], "--name: the name of a sweep is a letter or digit, then"),
        (RATE, ["--sampler=grid"], "learning_rate: a grid needs countable values"),
        (RATE, ["--pruner=asha", "--epochs=2"], "--pruner asha compares trials at the same step"),
        (RATE, ["--pruner=asha", "--min-steps=9000"], "--min-steps must be at least 1 and below max_iters"),
        (RATE + "max_iters: {choice: [10, 20]}\n", ["--pruner=median"], "max_iters must be one number"),
        (RATE + "metric: {seconds_to_loss: 2}\n", ["--pruner=asha"], "which seconds to val/loss 2 does not allow"),
        (
            RATE + "n_embd: {choice: [32, 64]}\n",
            ["--pruner=pbt"],
            "n_embd cannot change: expected learning_rate, embedding_lr",
        ),
        (RATE + "warmup_iters: {range: [0, 9]}\n", ["--pruner=pbt"], "during a run, and warmup_iters cannot change"),
        (RATE + "seeds: 2\n", ["--pruner=pbt"], "--pruner pbt trains one run for each member: seeds must be 1, not 2"),
        (RATE + "metric: {seconds_to_loss: 2}\n", ["--pruner=pbt"], "which seconds to val/loss 2 does not allow"),
        (RATE, ["--pruner=pbt", "--sampler=tpe"], "--sampler random or grid"),
        (RATE, ["--pruner=pbt", "--trials=1"], "--trials must be at least 2, not 1"),
        (RATE, ["--pruner=pbt", "--min-steps=1"], "--min-steps 1 makes more than 1,000 generations"),
        (RATE, ["--n-embd=30"], "n_embd (30) must be divisible by n_head"),
        (RATE + "n_layer: 0\n", [], "space.yaml:2: n_layer: expected integer >= 1"),
        (RATE + "warmup_iters: 50\nmax_iters: 10\n", [], "warmup_iters (50) must not exceed max_iters (10)"),
    ],
)
def test_a_mistake_is_reported_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], space: str, flags: list[str], message: str
) -> None:
    (tmp_path / "space.yaml").write_text(space)
    words = [str(tmp_path / "space.yaml"), f"--runs-dir={tmp_path / 'runs'}", *flags]
    assert sweep.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert [path.name for path in tmp_path.iterdir()] == ["space.yaml"]


def test_a_missing_space_and_an_unwritable_folder_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "space.yaml").write_text(RATE)
    assert sweep.main([str(tmp_path / "spaces.yaml")]) == 2
    assert "no such configuration file; did you mean space.yaml?" in capsys.readouterr().err
    assert sweep.main([str(tmp_path / "space.yaml"), f"--sweeps-dir={tmp_path / 'space.yaml'}"]) == 2
    assert "the sweep cannot be written: Not a directory" in capsys.readouterr().err


def test_the_cores_are_divided_among_the_jobs() -> None:
    from utils.sweeps.start import threads_of_job

    assert threads_of_job(10_000) == 1
    assert threads_of_job(1) >= threads_of_job(2) >= 1
