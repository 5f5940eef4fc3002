"""Weights & Biases, offline, with its real package: its files contain exactly what the log contains."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import wandb
from wandb.proto.wandb_internal_pb2 import Record

import experiments
import train
from utils.config.settings import Config, TrackingConfig
from utils.runs.log import read_metrics, read_records
from utils.runs.run import read_record
from utils.tracking import RunEnd, RunFacts
from utils.tracking.wandb import WandbView

ROOT = Path(__file__).resolve().parents[2]
KEY = 2 * "0123456789abcdef" + "01234567"  # in pieces, or this file would be left out of code.patch as a secret
BLOCK = 32_768

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("wandb"),  # with --dist loadgroup the run of these tests is trained once
]


def records(path: Path) -> Iterator[Record]:
    """The records of a .wandb file: LevelDB's log format after a header of seven bytes."""
    data, at, part = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:  # too little for a header: padding
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(part)
            part = b""


def decoded(items: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


class Shown:
    """What would be sent to W&B for one session: history, configuration, last summary, exit code."""

    def __init__(self, path: Path) -> None:
        self.history: list[dict[str, Any]] = []
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        for record in records(path):
            if record.HasField("history"):
                self.history.append(decoded(record.history.item))
            elif record.HasField("run"):
                self.config = decoded(record.run.config.update)
                self.name, self.tags, self.notes = record.run.display_name, list(record.run.tags), record.run.notes
                self.project, self.id = record.run.project, record.run.run_id
            elif record.HasField("summary"):
                self.summary |= decoded(record.summary.update)
            elif record.HasField("exit"):
                self.exit_code = record.exit.exit_code

    def metric(self, name: str) -> list[tuple[int, float]]:
        return [(record["step"], record[name]) for record in self.history if name in record]


def sessions(run: Path) -> list[Shown]:
    return [Shown(path) for path in sorted((run / "logs" / "wandb").glob("offline-run-*/*.wandb"))]


def wandb_processes_of(pid: int) -> list[psutil.Process]:
    """The processes of W&B that the process `pid` started, which have it as an argument."""
    found = psutil.process_iter(["name", "cmdline"])
    return [p for p in found if "wandb" in p.info["name"] and str(pid) in (p.info["cmdline"] or ())]


def train_in_a_process(words: list[str]) -> subprocess.CompletedProcess[str]:
    """Run train.py with a key but no server, and assert that the process of W&B ends with it."""
    env = {**os.environ, "WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    command = [sys.executable, os.fspath(ROOT / "train.py"), *words]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()  # no effect once it has ended
    _, alive = psutil.wait_procs(wandb_processes_of(process.pid), timeout=10)
    assert [found for found in alive if found.status() != psutil.STATUS_ZOMBIE] == []
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def printed_by_wandb(result: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in (result.stdout + result.stderr).splitlines() if line.startswith("wandb")]


@contextlib.contextmanager
def wandb_in_this_process() -> Iterator[None]:
    """Use W&B in this process with a key in the environment, and end its process on exit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_API_KEY", KEY)
        try:
            yield
        finally:
            wandb.teardown()


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str], list[str]]:
    """A run that was interrupted and resumed: its directory, the process of its first session, its command line."""
    from conftest import TINY_FLAGS

    folder = tmp_path_factory.mktemp("offline")
    text = "".join(f"line {i}: the quick brown fox jumps über {i * i % 97} lazy dogs.\n" for i in range(100))
    (folder / "tiny.txt").write_text(text, encoding="utf-8")
    (folder / "stopper.py").write_text(
        "from workbench import Callback\n\n\nclass Stopper(Callback):\n"
        "    def on_step(self, run):\n        if run.state.step == 4:\n            run.stop('enough')\n"
    )
    places = {"--dataset": folder / "tiny.txt", "--corpora-dir": folder / "corpora", "--runs-dir": folder / "runs"}
    flags = TINY_FLAGS | {key: os.fspath(path) for key, path in places.items()}
    words = [word for pair in flags.items() for word in pair] + ["--no-aim-logging", "--wandb-mode", "offline"]
    words += ["--tags", "x,y", "--note", "why", "--run-tag", "off", "--callbacks", "stopper:Stopper"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.fspath(folder))
        first = train_in_a_process(words)
        assert first.returncode == 0, first.stderr
        (run,) = (folder / "runs").iterdir()
        patch.syspath_prepend(folder)
        with wandb_in_this_process():
            assert train.main(["--resume", os.fspath(run)]) == 0
    return run, first, words


Offline = tuple[Path, subprocess.CompletedProcess[str], list[str]]


def test_both_sessions_together_contain_every_step_of_the_log(offline: Offline) -> None:
    run, *_ = offline
    first, second = sessions(run)
    assert [step for step, _ in first.metric("train/loss")] == [0, 1, 2, 3]
    assert [step for step, _ in second.metric("train/loss")] == [4, 5]
    for name in ("train/loss", "val/loss", "train/eval_loss", "lr", "grad_norm", "tokens_per_second"):
        assert first.metric(name) + second.metric(name) == read_metrics(run / "logs", name)
    assert not first.metric("step_ms")  # this metric is not for W&B
    times = {record["_timestamp"] for record in first.history + second.history if "train/loss" in record}
    assert times == {record["time"] for record in read_records(run / "logs" / "metrics.jsonl") if "lr" in record}


def test_histograms_and_sample_texts_are_sent(offline: Offline) -> None:
    run, *_ = offline
    first, second = sessions(run)
    history = first.history + second.history
    for record in read_records(run / "logs" / "histograms.jsonl"):
        name = record["name"]
        (shown,) = [line for line in history if line["step"] == record["step"] and f"{name}/values" in line]
        assert shown[f"{name}/values"] == record["counts"]
        edges = shown[f"{name}/bins"]
        assert (edges[0], edges[-1], len(edges)) == (record["min"], record["max"], 65)
    files = sorted((run / "logs" / "wandb").glob("offline-run-*/files/media/html/*.html"))
    texts = [record["text"] for record in read_records(run / "logs" / "samples.jsonl")]
    assert len(files) == len(texts) == 3


def test_configuration_status_and_name_are_sent(offline: Offline) -> None:
    run, *_ = offline
    first, second = sessions(run)
    for session in (first, second):
        assert session.config["optimizer"]["learning_rate"] == 1e-3
        assert session.config["model"]["n_embd"] == 16
        assert session.config["git"].keys() == {"commit", "branch", "dirty"}
        assert (session.id, session.name, session.project) == (run.name, run.name, "workbench")
        assert (session.notes, sorted(session.tags)) == ("why", ["off", "x", "y"])
    assert (first.summary["status"], second.summary["status"]) == ("interrupted", "completed")
    assert (first.exit_code, second.exit_code) == (1, 0)
    summary = read_record(run)["summary"]
    assert {name: second.summary[name] for name in summary} == summary
    assert read_record(run)["views"]["wandb"] == {
        "state": "complete",
        "reason": None,
        "id": run.name,
        "mode": "offline",
    }


def test_wandb_prints_nothing_and_no_key_is_stored(offline: Offline) -> None:
    run, first, _ = offline
    assert printed_by_wandb(first) == []
    assert first.stderr == ""
    assert [path for path in run.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()] == []


def test_a_rebuild_makes_one_session_of_the_whole_run(
    offline: Offline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(offline[0], tmp_path / offline[0].name)
    with wandb_in_this_process():
        assert experiments.main(["rebuild", os.fspath(run), "--wandb"]) == 0
    assert capsys.readouterr().out == f"rebuilt from the logs of {run.name}: Weights & Biases\n"
    (session,) = sessions(run)
    assert session.metric("train/loss") == read_metrics(run / "logs", "train/loss")
    assert session.summary["status"] == "completed"


def test_names_that_wandb_refuses_are_adapted(tmp_path: Path) -> None:
    tracking = TrackingConfig(experiment="size: 1/2 " + "x" * 128)
    hparams = Config(tracking=tracking).model_dump(mode="json")
    facts = RunFacts("one", tmp_path, ("t" * 70, "short"), "", hparams, {}, {}, ())
    (tmp_path / "logs").mkdir()
    with wandb_in_this_process():
        view = WandbView(facts, "offline")
        view.open(0)
        view.close(RunEnd("completed"))
    (session,) = sessions(tmp_path)
    assert session.project == "size- 1-2 " + "x" * 118
    assert sorted(session.tags) == ["short", "t" * 64]


def test_without_the_package_wandb_there_is_one_warning(
    tiny_argv: Callable[..., list[str]],
    only_run: Callable[[], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("utils.training.session.is_installed", lambda name: name != "wandb")
    assert train.main(tiny_argv("--wandb-mode", "offline")) == 0
    out = capsys.readouterr().out
    assert out.count("wandb is not installed: this run is not sent to it") == 1
    assert "--wandb)" in out
    assert read_record(only_run())["views"]["wandb"] == {"state": "off", "reason": "not installed"}


def test_an_unreachable_wandb_server_does_not_delay_the_end_of_training(
    tiny_argv: Callable[..., list[str]], only_run: Callable[[], Path]
) -> None:
    result = train_in_a_process(tiny_argv("--wandb-mode", "online", "--closing-seconds", "1"))  # else 90 s and more
    assert result.returncode == 0
    assert result.stdout.count("warning: wandb is incomplete") == 1
    assert printed_by_wandb(result) == []
    record = read_record(only_run())
    assert (record["status"], record["views"]["wandb"]["state"]) == ("completed", "incomplete")
