"""Runs on a prepared dataset: resumed, forked, evaluated without leaks, and the documents that they saw."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import experiments
import train
from tests.small_dataset import TEXTS, write_dataset
from utils.checkpoints.folder import folder_name
from utils.experiments.bits import compare_logs
from utils.runs.log import METRICS_FILE, read_records
from utils.runs.run import read_record

Argv = Callable[..., list[str]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with datasets/small, a finished packed run, runs/*_whole, and a stopped one, runs/*_parts."""
    folder = tmp_path_factory.mktemp("trained")
    write_dataset(folder / "datasets" / "small", kind="bpe", bpe_vocab_size=300, leaks=[1, 5])
    assert train.main(words(folder, "--run-tag", "whole")) == 0
    assert train.main(words(folder, "--run-tag", "parts", "--stop-at-step", "3", "--checkpoint-interval", "3")) == 0
    return folder


def words(folder: Path, *more: str) -> list[str]:
    settings = {
        "dataset": "small",
        "datasets-dir": folder / "datasets",
        "corpora-dir": folder / "corpora",
        "runs-dir": folder / "runs",
        "packing": "documents",
        "gradient-accumulation-steps": 2,
        **{"n-layer": 1, "n-head": 2, "n-embd": 16, "block-size": 16, "batch-size": 8, "max-iters": 6},
        **{"eval-interval": 3, "eval-iters": 2, "sample-tokens": 8, "threads": 1, "dropout": 0.1},
    }
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return [*flags, "--no-aim-logging", *more]


def run_of(folder: Path, tag: str) -> Path:
    return max((folder / "runs").glob(f"*_{tag}"))


def records(run: Path) -> list[dict[str, object]]:
    return list(read_records(run / "logs" / METRICS_FILE))


def test_the_record_describes_the_dataset(trained: Path) -> None:
    resolved = read_record(run_of(trained, "whole"))["resolved"]
    assert (resolved["dataset"], resolved["tokenizer"]) == ("small", "bpe")
    assert (resolved["train_documents"], resolved["val_documents"]) == (len(TEXTS), 16)
    assert 0 < resolved["padding"] < 0.5
    assert 0 < resolved["cut_tokens"] < 1
    assert resolved["epochs"] == round(6 * 8 / resolved["rows"], 4)


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(trained: Path) -> None:
    whole, parts = run_of(trained, "whole"), run_of(trained, "parts")
    assert train.main(["--resume", str(parts)]) == 0
    found = compare_logs(whole, parts)
    assert (found.identical, found.steps) == (True, 6)
    weights = [(run / "artifacts" / "export" / "model.safetensors").read_bytes() for run in (whole, parts)]
    assert weights[0] == weights[1]


def test_the_last_evaluation_is_also_made_without_leaks(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(trained, "whole")
    without = [
        (record["step"], record["val/loss_without_leaks"])
        for record in records(run)
        if "val/loss_without_leaks" in record
    ]
    ((step, loss),) = without
    (val,) = (record["val/loss"] for record in records(run) if record["step"] == 6 and "val/loss" in record)
    assert step == 6
    assert loss != val
    assert loss == pytest.approx(val, rel=0.05)
    assert read_record(run)["summary"]["val/loss_without_leaks"] == loss


@pytest.mark.parametrize("origin", [("--fork",), ()])
def test_forks_and_fine_tuning_keep_the_tokenizer_of_the_dataset(
    trained: Path, origin: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run_of(trained, "whole")
    if origin:
        argv = ["--resume", f"{whole}:6", "--fork", "--max-iters", "7", "--run-tag", "forked"]
    else:
        argv = words(trained, "--init-from", str(whole), "--max-iters", "1", "--run-tag", "tuned")
    assert train.main(argv) == 0
    out = capsys.readouterr()
    assert "2 of 16 validation documents (12.5%) nearly equal a training document" in " ".join(
        (out.out + out.err).split()
    )
    assert train.main([*words(trained, "--init-from", str(whole)), "--dataset", "pydocs", "--packing", "random"]) == 2
    assert "fitting: --tokenizer bpe" in capsys.readouterr().err


def test_an_edited_shard_is_named_when_training_starts(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = trained / "datasets" / "small" / "train_00001.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-2] + b"\x07\x00")
    try:
        assert train.main(words(trained)) == 2
        assert "train_00001.bin: edited or damaged since it was prepared" in capsys.readouterr().err
    finally:
        path.write_bytes(content)


def seen(folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, object]:
    capsys.readouterr()
    assert experiments.main(["seen", str(run_of(folder, "whole")), "--json", *more]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_the_documents_of_an_update_are_named_without_its_log(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(trained, "whole")
    log = run / "logs" / METRICS_FILE
    log.rename(log.with_name("elsewhere"))
    try:
        found = seen(trained, capsys, "--step", "4")
    finally:
        log.with_name("elsewhere").rename(log)
    passages = found["passages"]
    assert isinstance(passages, list)
    assert {passage["sample"] for passage in passages} == set(range(8))
    for passage in passages:
        assert passage["source"] == "train.txt"
        assert passage["text"] in TEXTS[passage["line"] - 1]
        assert passage["document"] == passage["line"] - 1
        assert (passage["begin"] == 0) == TEXTS[passage["document"]].startswith(passage["text"])
    assert len({passage["line"] for passage in passages}) > 1


def test_the_hardest_documents_of_an_update_come_first(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = seen(trained, capsys, "--step", "4", "--top", "3", "--checkpoint", "6")
    passages = found["passages"]
    assert isinstance(passages, list)
    losses = [passage["loss"] for passage in passages]
    assert losses == sorted(losses, reverse=True)
    assert (len(losses), found["checkpoint"]) == (3, 6)
    everything = seen(trained, capsys, "--step", "4", "--top", "1000")["passages"]
    assert isinstance(everything, list)
    train_loss = next(record["train/loss"] for record in records(run_of(trained, "whole")) if record["step"] == 4)
    total = sum(passage["loss"] * passage["tokens"] for passage in everything)
    assert total / sum(passage["tokens"] for passage in everything) == pytest.approx(train_loss, rel=0.05)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--step", "6"), "has no update 6: its updates are 0 to 5"),
        (("--step", "-1"), "has no update -1"),
        (("--step", "0", "--top", "0"), "--top must be at least 1"),
        (("--step", "0", "--top", "1", "--checkpoint", "lates"), "or a step; did you mean latest"),
        (("--step", "0", "--top", "1", "--checkpoint", "5"), "no checkpoint of step 5"),
        (("--step", "0", "--checkpoint", "6"), "--checkpoint is of use only with --top N"),
    ],
)
def test_a_missing_update_or_checkpoint_is_refused(
    trained: Path, more: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert experiments.main(["seen", str(run_of(trained, "whole")), *more]) == 2
    assert message in capsys.readouterr().err


def test_the_table_fits_the_terminal(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert experiments.main(["seen", str(run_of(trained, "whole")), "--step", "0", "--top", "5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[-1] == f"loss under the checkpoint of step {int(folder_name(6).split('_')[1])}, in nats per token"


def test_a_window_of_plain_text_is_named_by_file_and_line(
    tmp_path: Path, tiny_argv: Argv, only_run: Callable[[], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    texts = {name: "".join(f"{name} line {i}\n" for i in range(1, 60)) for name in ("a.txt", "b.txt", "c.txt")}
    for name, text in texts.items():
        (folder / name).write_text(text)
    flags = ("--dataset", str(folder), "--max-iters", "1", "--batch-size", "16", "--sample-tokens", "0")
    assert train.main(tiny_argv(*flags)) == 0
    capsys.readouterr()
    assert experiments.main(["seen", str(only_run()), "--step", "0", "--json"]) == 0
    passages = json.loads(capsys.readouterr().out)["passages"]
    assert len(passages) == 16
    for passage in passages:
        lines = texts[Path(passage["source"]).name].split("\n")
        first = passage["text"].split("\n")[0]
        assert first in lines[passage["line"] - 1]
    assert len({passage["source"] for passage in passages}) > 1


def test_a_prompt_begins_like_a_document_in_training(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import utils.inference.generator as generation
    from workbench import Generator, Request

    prompts: list[list[int]] = []
    own = generation.generate_blocks
    monkeypatch.setattr(generation, "generate_blocks", lambda m, p, *rest: (prompts.extend(p), own(m, p, *rest))[1])
    generator = Generator.from_export(run_of(trained, "whole") / "artifacts" / "export")
    generator.generate_batch(["brown", ""], Request(max_new_tokens=2))
    assert prompts == [[0, *generator.tokenizer.encode("brown")], [0]]
