"""evaluate.py scores whole texts with one or several runs, records the results and shows them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import one_error
from fake_runs import held_lock, make_run

import evaluate
import experiments
from data import load_corpus
from tests.small_dataset import write_dataset
from tests.tiny_export import TOKENIZER, tiny_model
from tokenizer import build_tokenizer
from utils.config.settings import Config, DataConfig
from utils.corpora.datasets import Dataset
from utils.inference.export import save_export
from utils.inference.generator import Generator
from utils.inference.scoring import score, token_losses
from utils.runs.evaluations import append_evaluation, read_evaluations
from utils.runs.layout import EVALUATIONS, EXPORT

BYTES = build_tokenizer(DataConfig(tokenizer="byte"), ())
TEXT = "the quick brown fox jumps over the lazy dog. " * 6 + "ü: äh"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two runs with different tokenizers."""
    for name, tokenizer in (("chars", TOKENIZER), ("bytes", BYTES)):
        run = make_run(tmp_path / "runs", name)
        save_export(run / EXPORT, tiny_model(tokenizer), tokenizer, {"run": name, "step": 100})
    (tmp_path / "notes.txt").write_text(TEXT.replace("ä", "a"), encoding="utf-8")
    return tmp_path / "runs"


@pytest.fixture
def run_evaluate(runs: Path) -> Callable[..., int]:
    return lambda *words: evaluate.main([*map(str, words), "--runs-dir", str(runs), "--device", "cpu"])


def test_a_text_is_scored_by_several_runs_recorded_and_shown(
    run_evaluate: Callable[..., int], runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = runs.parent / "notes.txt"
    assert run_evaluate("chars", "bytes", "--data", notes, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    by_run = {record["run"]: record for record in found["evaluations"]}
    for name, tokenizer in (("chars", TOKENIZER), ("bytes", BYTES)):
        expected = score(tiny_model(tokenizer), tokenizer, notes.read_text(encoding="utf-8"))
        assert by_run[name]["loss"] == pytest.approx(expected.loss, rel=1e-6)
        assert by_run[name]["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-6)
        assert by_run[name]["perplexity"] == pytest.approx(math.exp(expected.loss), rel=1e-6)
        assert (by_run[name]["tokens"], by_run[name]["bytes"]) == (expected.tokens, expected.bytes)
        (recorded,), problem = read_evaluations(runs / name)
        assert {"run": name, **recorded} == by_run[name]
        assert problem is None
    assert by_run["chars"]["data_hash"] == by_run["bytes"]["data_hash"]
    assert any("compare bits per byte" in line for line in found["notes"])

    run_evaluate("chars", "bytes", "--data", notes, "--no-record")
    assert "compare bits per byte" in (table := capsys.readouterr().out)
    assert f"{by_run['bytes']['bits_per_byte']:.4f}" in table
    assert len(read_evaluations(runs / "chars")[0]) == 1
    experiments.main(["show", "chars", "--runs-dir", str(runs)])
    shown = capsys.readouterr().out
    assert "Evaluations" in shown
    assert f"{by_run['chars']['perplexity']:.4f}" in shown
    experiments.main(["list", "--columns", "id,evaluated", "--runs-dir", str(runs)])
    assert f"notes.txt {by_run['chars']['bits_per_byte']:.4f}" in capsys.readouterr().out


def test_the_list_has_a_column_of_evaluations_only_if_there_are_any(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path, "one")
    experiments.main(["list", "--runs-dir", str(tmp_path)])
    assert "evaluated" not in capsys.readouterr().out
    append_evaluation(run, {"time": "2026-01-31T14:25:01", "data": "a.txt", "bits_per_byte": 1.5, "loss": 1.0})
    append_evaluation(run, {"time": "2026-01-31T14:26:01", "data": "sums", "task": "arithmetic", "accuracy": 0.995})
    experiments.main(["list", "--runs-dir", str(tmp_path)])
    output = capsys.readouterr().out
    assert "evaluated" in output
    assert "sums 99.50%, a.txt 1.5000" in output


def test_without_data_each_run_is_evaluated_on_its_whole_validation_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "own.txt"
    text.write_text(TEXT * 3, encoding="utf-8")
    corpus = load_corpus(DataConfig(dataset=str(text)), 16, tmp_path / "corpora")
    run = make_run(
        tmp_path / "runs",
        "own",
        settings={"dataset": str(text), "block_size": 16},
        resolved={"corpus_hash": corpus.hash},
    )
    save_export(run / EXPORT, tiny_model(corpus.tokenizer), corpus.tokenizer, {"run": "own", "step": 3})
    words = ["own", "--runs-dir", str(tmp_path / "runs"), "--device", "cpu", "--json"]
    assert evaluate.main(words) == 0
    (found,) = json.loads(capsys.readouterr().out)["evaluations"]
    ids = corpus.split("val").tolist()
    expected = score(tiny_model(corpus.tokenizer), corpus.tokenizer, corpus.tokenizer.decode(ids))
    assert found["loss"] == pytest.approx(expected.loss, rel=1e-6)
    assert (found["tokens"], found["bytes"]) == (len(ids) - 1, expected.bytes)
    text.write_text(TEXT * 4, encoding="utf-8")
    assert evaluate.main(words) == 2
    assert "its data has changed since it was trained" in one_error(capsys)


def test_a_smaller_stride_gives_each_token_more_context(
    run_evaluate: Callable[..., int], runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = []
    for stride in (1, 16):
        run_evaluate("chars", "--data", runs.parent / "notes.txt", "--stride", stride, "--json", "--no-record")
        (found,) = json.loads(capsys.readouterr().out)["evaluations"]
        assert (found["stride"], found["block_size"]) == (stride, 16)
        losses.append(found["loss"])
    assert losses[0] != losses[1]


def test_a_run_in_training_is_evaluated_from_its_checkpoint_and_not_disturbed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from train import train

    (tmp_path / "text.txt").write_text(TEXT * 4, encoding="utf-8")
    settings: dict[str, Any] = {
        "data": {"dataset": str(tmp_path / "text.txt"), "corpora_dir": str(tmp_path / "corpora")},
        "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8},
        "train": {"max_iters": 2, "batch_size": 2, "eval_interval": 2, "eval_iters": 1, "threads": 1, "device": "cpu"},
        "tracking": {"runs_dir": str(tmp_path / "runs"), "histogram_interval": 0, "sample_tokens": 0},
    }
    run = train(Config.model_validate(settings), quiet=True).run_dir
    (run / EXPORT).rename(tmp_path / "export")
    files = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    words = [run.name, "--runs-dir", str(run.parent), "--device", "cpu", "--json", "--data", str(tmp_path / "text.txt")]
    with held_lock(run):
        assert evaluate.main(words) == 0
    captured = capsys.readouterr()
    (found,) = json.loads(captured.out)["evaluations"]
    assert found["step"] == 2
    assert "has no export yet" in captured.err
    assert {path: path.stat().st_mtime_ns for path in files} == files
    assert {path for path in run.rglob("*") if path.is_file()} - files.keys() == {run / EVALUATIONS}
    assert evaluate.main([*words, "--checkpoint", "7"]) == 2
    assert "no checkpoint of step 7" in one_error(capsys)
    assert evaluate.main(words[:6]) == 0  # its own validation split
    experiments.main(["check", run.name, "--runs-dir", str(run.parent)])  # a seal does not cover evaluations
    assert EVALUATIONS.name not in capsys.readouterr().out


def test_mistakes_are_reported_in_one_line(
    run_evaluate: Callable[..., int], runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = runs.parent / "bad.txt"
    bad.write_text("ab\na€", encoding="utf-8")
    (runs.parent / "short.txt").write_text("a", encoding="utf-8")
    (runs.parent / "export").mkdir()
    for name in os.listdir(runs / "chars" / EXPORT):
        (runs.parent / "export" / name).write_bytes((runs / "chars" / EXPORT / name).read_bytes())
    for words, message in (
        (["nothing"], "no run nothing"),
        (["chars", "--data", bad], "bad.txt:2: character '€'"),
        (["chars", "--data", runs.parent / "short.txt"], "short.txt: a text of 1 tokens has nothing to predict"),
        (["chars", "--data", runs.parent / "gone.txt"], "gone.txt"),
        (["chars", "--data", bad, "--stride", "17"], "--stride must be from 1 to 16"),
        (["chars", "--task", "arithmetic", "--data", bad], "--task brings its own data"),
        (["chars", "--picture", "x.png"], "--picture is for --task"),
        ([runs.parent / "export"], "an export without its run has no data of its own"),
    ):
        assert run_evaluate(*words) == 2, words
        assert message in one_error(capsys)
    assert not (runs / "chars" / EVALUATIONS).exists()


def test_damaged_lines_and_links_are_reported_and_other_evaluations_are_kept(tmp_path: Path) -> None:
    run = make_run(tmp_path, "one")
    good = {"time": "2026-01-31T14:25:01", "data": "a", "loss": math.nan, "bits_per_byte": math.inf}
    append_evaluation(run, good)
    with (run / EVALUATIONS).open("ab") as file:
        file.write(b'[1]\n{"time": 3}\n\xff\n{"torn": ')
    append_evaluation(run, {**good, "data": "b"})
    found, problem = read_evaluations(run)
    assert [evaluation["data"] for evaluation in found] == ["a", "b"]
    assert math.isnan(found[0]["loss"])
    assert problem == f"{EVALUATIONS} is damaged: 3 of its lines are not evaluations"
    (run / EVALUATIONS).rename(tmp_path / "elsewhere")
    (run / EVALUATIONS).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="leads out"):
        append_evaluation(run, good)
    found, problem = read_evaluations(run)
    assert (found, problem) == ([], f"{EVALUATIONS} cannot be read: leads out of {run}")


DOCUMENTS = ["the lazy dog", "ab", "the quick brown fox jumps over the lazy dog", "over it", "a fox. and a dog"]


@pytest.fixture
def dataset(runs: Path) -> Dataset:
    return write_dataset(runs.parent / "animals", ["a"] * 3, DOCUMENTS, leaks=[1, 2])


def test_the_dataset_of_a_run_is_found_in_the_folder_that_the_run_names(
    run_evaluate: Callable[..., int], runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write_dataset(runs.parent / "sets" / "notes")
    settings = {"dataset": "notes", "datasets_dir": str(dataset.folder.parent), "block_size": 16}
    run = make_run(runs, "own", settings=settings, resolved={"corpus_hash": dataset.hash})
    save_export(run / EXPORT, tiny_model(BYTES), BYTES, {"run": "own", "step": 3})
    assert run_evaluate("own", "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)["evaluations"]
    assert (found["data"], found["data_hash"]) == ("val of notes", dataset.hash)


def test_validation_documents_of_a_dataset_are_scored_with_and_without_leaks(
    run_evaluate: Callable[..., int], runs: Path, dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_evaluate("bytes", "chars", "--data", dataset.folder, "--json") == 0
    by_run = {record["run"]: record for record in json.loads(capsys.readouterr().out)["evaluations"]}
    texts = {"bytes": "".join("\0" + document for document in DOCUMENTS), "chars": "".join(DOCUMENTS)}
    for name, tokenizer in (("bytes", BYTES), ("chars", TOKENIZER)):
        text, found = texts[name], by_run[name]
        ids = tokenizer.encode_array(text)
        losses = np.concatenate([*token_losses(tiny_model(tokenizer), ids)])
        assert found["loss"] == pytest.approx(losses.mean(), rel=1e-6)
        assert found["bytes"] == len("".join(DOCUMENTS)) - (name == "chars")  # the first token is not predicted
        is_leak = np.concatenate(
            [np.full(len(text) + (name == "bytes"), place in (1, 2)) for place, text in enumerate(DOCUMENTS)]
        )[1:]
        kept = losses[~is_leak]
        assert found["loss_without_leaks"] == pytest.approx(kept.mean(), rel=1e-6)
        n_bytes = len(DOCUMENTS[0] + DOCUMENTS[3] + DOCUMENTS[4]) - (name == "chars")
        bits = kept.sum() / math.log(2) / n_bytes
        assert found["bits_per_byte_without_leaks"] == pytest.approx(bits, rel=1e-6)
        assert (found["data"], found["data_hash"]) == ("val of animals", dataset.hash)
    run_evaluate("bytes", "--data", dataset.folder)
    assert "without leaks" in capsys.readouterr().out


def test_a_model_trained_on_rows_of_documents_sees_each_document_alone(
    runs: Path, dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    """The windows are those of the whole text; within them, each document is scored as if it were alone."""
    run = make_run(runs, "rows")
    save_export(run / EXPORT, tiny_model(BYTES), BYTES, {"run": "rows", "step": 3, "packing": "documents"})
    words = ["rows", "--runs-dir", str(runs), "--device", "cpu", "--data", str(dataset.folder), "--json"]
    assert evaluate.main(words) == 0
    (found,) = json.loads(capsys.readouterr().out)["evaluations"]
    model = tiny_model(BYTES)
    plain = np.concatenate([*token_losses(model, BYTES.encode_array("".join("\0" + d for d in DOCUMENTS)))]).mean()
    assert found["loss"] != pytest.approx(plain, rel=1e-3)
    first = np.concatenate([*token_losses(model, BYTES.encode_array("\0" + DOCUMENTS[0] + "\0"))])
    second = np.concatenate([*token_losses(model, BYTES.encode_array("\0" + DOCUMENTS[1] + "\0"))])
    words[-2] = str(runs.parent / "notes.txt")  # a text begins as a document does
    assert evaluate.main(words) == 0
    (found,) = json.loads(capsys.readouterr().out)["evaluations"]
    text = (runs.parent / "notes.txt").read_text(encoding="utf-8")
    assert found["loss"] == pytest.approx(score(tiny_model(BYTES), BYTES, "\0" + text).loss, rel=1e-6)
    assert found["loss"] == pytest.approx(Generator.from_run("rows", runs, "cpu").score(text).loss, rel=1e-6)
    assert found["bytes"] == len(text.encode())
    short = write_dataset(runs.parent / "short", ["a"] * 3, DOCUMENTS[:2])
    words[-2] = str(short.folder)
    assert evaluate.main(words) == 0
    (found,) = json.loads(capsys.readouterr().out)["evaluations"]
    expected = np.concatenate([first, second[:-1]])  # nothing follows the last document
    assert found["loss"] == pytest.approx(expected.mean(), rel=1e-5)
