"""Views fed from the log show exactly its contents, and their failures never affect training."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.plugins.hparams.api_pb2 import DataType
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import scalar

import train
from utils.config.loader import ConfigLoader
from utils.runs.log import METRICS_FILE, RunLog, offset_of_step, read_metrics, read_records, truncate
from utils.runs.metrics import metric_record
from utils.runs.run import read_record
from utils.tracking import RunEnd, RunFacts, feeder
from utils.tracking.aim import AimView
from utils.tracking.feeder import Budget, Feeder, Feeders
from utils.tracking.tensorboard import EventFile, TensorBoardView, cut_session_end, event_files

Argv = Callable[..., list[str]]


class RecordingView:
    """A view that records what it is fed; it raises or hangs on request."""

    name = "recording"
    rolls_back = False
    starts_empty = False

    def __init__(self, failures: int = 0, hang: threading.Event | None = None) -> None:
        self.fed: list[tuple[str, int]] = []
        self.end: RunEnd | None = None
        self.failures, self.hang = failures, hang

    def open(self, first_step: int) -> Mapping[str, Any]:
        self.first_step = first_step
        return {"id": "abc"}

    def clear(self) -> Mapping[str, Any]:
        self.fed.clear()
        return {"id": "def"}

    def background_seconds(self) -> float:
        return 0.0

    def abandon(self) -> None:
        self.abandoned = True

    def feed(self, log_file: str, record: Mapping[str, Any]) -> None:
        if self.hang is not None:
            self.hang.wait()
        if self.failures > 0:
            self.failures -= 1
            raise ConnectionError("locked")
        self.fed.append((log_file, record["step"]))

    def flush(self) -> None: ...

    def close(self, end: RunEnd) -> None:
        self.end = end


@pytest.fixture
def log(tmp_path: Path) -> RunLog:
    """A log of 1,000 metric records and one sample text."""
    log = RunLog(tmp_path)
    log.metrics.write(metric_record(step, 0.0, {"train/loss": 1.0}) for step in range(1000))
    log.samples.write([{"step": 7, "time": 0.0, "text": "hello"}])
    return log


@pytest.fixture(autouse=True)
def fast_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeder, "RETRY_SECONDS", (0.001, 0.001, 0.001))


def feed(view: RecordingView, logs_dir: Path, seconds: float = 20.0) -> tuple[dict[str, Any], list[str]]:
    """Feed a complete log, and return the recorded state of the view and the warnings."""
    facts: dict[str, Any] = {}
    warnings: list[str] = []

    def record(name: str, **news: Any) -> None:
        facts.update(news)

    fed_by = Feeder(view, logs_dir, Budget(0.02), record, warnings.append, "rebuild it")
    Feeders([fed_by], warnings.append, record).finish(RunEnd("completed"), print, seconds)
    return facts, warnings


def test_all_records_are_fed_once_and_in_order(log: RunLog, tmp_path: Path) -> None:
    view = RecordingView()
    facts, warnings = feed(view, tmp_path)
    assert [step for name, step in view.fed if name == METRICS_FILE] == list(range(1000))
    assert view.fed.count(("samples.jsonl", 7)) == 1
    assert view.end == RunEnd("completed")
    assert (facts["state"], facts["id"], warnings) == ("complete", "abc", [])


def test_temporary_failures_are_retried_without_loss_or_repetition(log: RunLog, tmp_path: Path) -> None:
    view = RecordingView(failures=3)
    facts, warnings = feed(view, tmp_path)
    assert [step for name, step in view.fed if name == METRICS_FILE] == list(range(1000))
    assert (facts["state"], warnings) == ("complete", [])


def test_a_permanent_failure_switches_the_view_off_with_one_warning(log: RunLog, tmp_path: Path) -> None:
    facts, warnings = feed(RecordingView(failures=10**9), tmp_path)
    assert facts["state"] == "off"
    assert warnings == ["recording is off: ConnectionError: locked; to feed it later: rebuild it"]


def test_a_view_that_hangs_at_the_end_is_abandoned_with_a_warning(log: RunLog, tmp_path: Path) -> None:
    release = threading.Event()
    facts, warnings = feed(RecordingView(hang=release), tmp_path, seconds=0.2)
    release.set()
    assert facts["state"] == "incomplete"
    assert len(warnings) == 1
    assert "not fed within 0.2 s" in warnings[0]


def test_a_torn_last_line_is_not_fed(log: RunLog, tmp_path: Path) -> None:
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 1000, "ti')
    view = RecordingView()
    facts, _ = feed(view, tmp_path)
    assert facts["state"] == "complete"
    assert ("metrics.jsonl", 999) in view.fed
    assert ("metrics.jsonl", 1000) not in view.fed


class Clock:
    """Replaces the time module; processor time passes only in `work`."""

    now = worked = 0.0

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic

    def thread_time(self) -> float:
        return self.worked

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def work(self, seconds: float) -> None:
        self.now += seconds
        self.worked += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(feeder, "time", clock)
    return clock


def test_feeders_rest_in_proportion_to_their_work(clock: Clock) -> None:
    budget = Budget(0.02)
    budget.spend(0.1)
    assert budget.seconds_to_rest() == pytest.approx(5)
    clock.now += 4
    assert budget.seconds_to_rest() == pytest.approx(1)
    clock.now += 100  # unused budget expires
    budget.spend(0.1)
    assert budget.seconds_to_rest() == pytest.approx(5 - feeder.BURST_SECONDS)
    budget.lift()
    assert budget.seconds_to_rest() == 0
    budget.spend(10)
    assert budget.seconds_to_rest() == 0


@pytest.mark.parametrize("background", [0.0, 0.7])
def test_feeders_share_one_budget(
    background: float, log: RunLog, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two views that take 2 ms per record, with or without background threads, during 60 s of training."""

    class Working(RecordingView):
        def feed(self, log_file: str, record: Mapping[str, Any]) -> None:
            super().feed(log_file, record)
            clock.work(0.002)

        def background_seconds(self) -> float:
            return background * 0.002 * len(self.fed)

    budget, views = Budget(0.02), (Working(), Working())
    feeders = [Feeder(v, tmp_path, budget, lambda *a, **k: None, lambda line: None, "") for v in views]

    def rest(self: Feeder, seconds: float) -> None:
        clock.now += seconds
        raise SystemExit  # ends this feeder's slice

    monkeypatch.setattr(Feeder, "rest", rest)
    while clock.now < 60:
        for one in feeders:
            with contextlib.suppress(SystemExit):
                one._tail()
    worked = clock.worked * (1 + background)
    assert 0.5 * 0.02 * 60 < worked < 1.1 * 0.02 * 60 + 2 * feeder.SLICE_SECONDS


def watched(view: RecordingView, logs_dir: Path) -> tuple[Feeders, list[object], list[str]]:
    """Feed a view during a training of 0.4 s; returns its feeders, the states that were recorded, and the warnings."""
    states: list[object] = []
    warnings: list[str] = []

    def record(name: str, **news: Any) -> None:
        states.append(news.get("state"))

    one = Feeder(view, logs_dir, Budget(1.0), record, warnings.append, "rebuild it")
    feeders = Feeders([one], warnings.append, record)
    for _ in range(20):
        feeders.watch()
        time.sleep(0.02)
    return feeders, states, warnings


def test_a_view_that_hangs_during_training_is_reported_once(
    log: RunLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeder, "HANGING_SECONDS", 0.05)
    release = threading.Event()
    feeders, states, warnings = watched(RecordingView(hang=release), tmp_path)
    assert warnings == ["recording hangs (no answer for 0.05 s); training continues without it"]
    release.set()
    feeders.finish(RunEnd("completed"), print, 20)
    assert states == ["on", "hangs", "complete"]


def test_a_view_that_is_off_is_not_reported_as_hanging(
    log: RunLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeder, "HANGING_SECONDS", 0.05)
    _, states, warnings = watched(RecordingView(failures=10**9), tmp_path)
    assert states == ["on", "off"]
    assert warnings == ["recording is off: ConnectionError: locked; to feed it later: rebuild it"]


def test_a_feeder_rests_while_the_run_is_closed(log: RunLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[float] = []
    feed_slice = Feeder.feed_slice

    def counted(self: Feeder) -> bool:
        looks.append(time.monotonic())
        return feed_slice(self)

    monkeypatch.setattr(Feeder, "feed_slice", counted)
    one = Feeder(RecordingView(), tmp_path, Budget(1.0), lambda *a, **k: None, print, "")
    feeders = Feeders([one])
    feeders.lift_budget()
    time.sleep(0.3)
    assert len(looks) < 20  # it looks every POLL_SECONDS once everything is fed
    feeders.finish(RunEnd("completed"), print, 20)
    assert not one.is_alive()


def test_the_saved_offsets_of_views_are_cut_back_with_the_logs(log: RunLog, tmp_path: Path) -> None:
    size = (tmp_path / METRICS_FILE).stat().st_size
    offsets = {METRICS_FILE: size, "histograms.jsonl": 0, "samples.jsonl": 10}
    (tmp_path / "fed_aim.json").write_text(json.dumps({"offsets": offsets, "last_step": 999}))
    (tmp_path / "fed_wandb.json").write_text("[1]")
    truncate(tmp_path / METRICS_FILE, offset_of_step(tmp_path / METRICS_FILE, 50))
    feeder.cut_progress(tmp_path)
    note = json.loads((tmp_path / "fed_aim.json").read_text())
    assert note["offsets"][METRICS_FILE] == (tmp_path / METRICS_FILE).stat().st_size < size
    assert (note["offsets"]["samples.jsonl"], note["last_step"]) == (10, 999)
    assert not (tmp_path / "fed_wandb.json").exists()


def test_tensorboard_equals_the_log(tiny_argv: Argv, only_run: Callable[[], Path]) -> None:
    assert train.main(tiny_argv("--run-tag", "tb")) == 0
    logs = only_run() / "logs"
    events = EventAccumulator(str(only_run()), size_guidance=dict.fromkeys(("scalars", "tensors", "histograms"), 0))
    events.Reload()
    for name in ("train/loss", "val/loss", "train/eval_loss", "lr", "grad_norm", "tokens_per_second", "step_ms"):
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        assert shown == [(step, pytest.approx(value, rel=1e-6)) for step, value in read_metrics(logs, name)]
    records = list(read_records(logs / "histograms.jsonl"))
    for record in records[:3]:
        (event,) = [e for e in events.Histograms(record["name"]) if e.step == record["step"]]
        assert event.histogram_value.bucket == record["counts"]
    texts = events.Tensors("sample/text_summary")
    assert [event.step for event in texts] == [0, 3, 6]
    assert {"config/text_summary", "git/text_summary", "model/text_summary"} <= set(events.Tags()["tensors"])
    assert len(list(only_run().rglob("events.*"))) == 1


def test_a_column_of_the_hparams_page_has_values_of_one_type(tmp_path: Path) -> None:
    """TensorBoard fails with 500 when a column of mixed types is sorted; a missing value is an empty cell."""
    kinds: dict[str, set[str]] = {}
    overrides: tuple[dict[str, str | bool], ...] = (
        {"epochs": "1.5", "ngram_rows": "64", "qkv_bias": True, "lora_rank": "4", "lora_targets": "attention"},
        {"max_iters": "100", "n_kv_head": "2", "min_lr": "1e-4", "unknown_token": "?"},
    )
    for settings in overrides:
        hparams = ConfigLoader(tmp_path).load((), settings).config.model_dump(mode="json")
        facts = RunFacts("a", tmp_path, (), "", hparams, {}, {}, ())
        experiment, start, _ = (
            HParamsPluginData.FromString(summary.value[0].metadata.plugin_data.content)
            for summary in TensorBoardView(facts, tmp_path)._session_records()
        )
        for column in experiment.experiment.hparam_infos:
            kinds.setdefault(column.name, set()).add(DataType.Name(column.type))
        for name, cell in start.session_start_info.hparams.items():
            kinds[name].add({"number_value": "DATA_TYPE_FLOAT64"}.get(cell.WhichOneof("kind"), "DATA_TYPE_STRING"))
    assert kinds["train.max_iters"] == kinds["model.n_kv_head"] == {"DATA_TYPE_FLOAT64"}
    assert kinds["model.ngram_rows"] == kinds["model.qkv_bias"] == {"DATA_TYPE_STRING"}
    assert all(len(of_column) == 1 for of_column in kinds.values()), kinds


def test_trailing_zeros_of_an_event_file_are_cut_quickly(tmp_path: Path) -> None:
    events = EventFile(tmp_path, purge_step=0)
    events.close()
    whole = events.path.stat().st_size
    os.truncate(events.path, 3 << 30)  # takes a minute if the checksums of empty records are not checked
    began = time.monotonic()
    cut_session_end(events.path)
    assert events.path.stat().st_size == whole
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("package", ["google_crc32c", None], ids=["google_crc32c", "without it"])
def test_event_records_equal_those_that_tensorboard_writes(
    package: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if package is None:
        monkeypatch.setitem(sys.modules, "google_crc32c", None)
    events = EventFile(tmp_path, purge_step=0)
    events.add(scalar("x", 1.0), step=1, when=2.0)
    events.close()
    records = list(RawEventFileLoader(str(events.path)).Load())
    assert len(records) == 3
    expected = io.BytesIO()
    for record in records:
        RecordWriter(expected).write(record)
    assert events.path.read_bytes() == expected.getvalue()


def test_aim_equals_the_log(tiny_argv: Argv, only_run: Callable[[], Path], tmp_path: Path) -> None:
    from aim import Repo
    from aim.sdk.index_manager import RepoIndexManager
    from aim.storage.context import Context

    assert train.main(tiny_argv("--aim-logging", "--run-tag", "aimed", "--tags", "x", "--note", "a note")) == 0
    run_dir, repo = only_run(), Repo(str(tmp_path))
    run_hash = read_record(run_dir)["views"]["aim"]["hash"]
    RepoIndexManager.get_index_manager(repo).index(run_hash)  # what `aim up` does in the background
    (run,) = repo.iter_runs()
    assert run.hash == run_hash
    assert (run.name, run.description, set(run.tags)) == (run_dir.name, "a note", {"aimed", "x"})
    assert (run["hparams", "model", "n_embd"], run["status"]) == (16, "completed")
    assert "commit" in run["git"]
    for name in ("train/loss", "val/loss", "train/eval_loss", "lr", "grad_norm"):
        subset, _, short = name.rpartition("/")
        sequence = run.get_metric(short, Context({"subset": subset} if subset else {}))
        steps, (values, *_) = sequence.data.items_list()
        assert list(zip(steps, values, strict=True)) == read_metrics(run_dir / "logs", name)
    assert [text.data for text in run.get_text_sequence("sample", Context({})).data.items_list()[1][0]] == [
        record["text"] for record in read_records(run_dir / "logs" / "samples.jsonl")
    ]
    record = next(read_records(run_dir / "logs" / "histograms.jsonl"))
    kind, _, name = record["name"].partition("/")
    sequence = run.get_distribution_sequence(name, Context({"kind": kind}))
    assert sequence.data.items_list()[1][0][0].weights.tolist() == record["counts"]
    found = repo.query_metrics("run.hparams.model.n_embd == 16 and metric.context.subset == 'val'")
    assert {m.name for group in found.iter_runs() for m in group} == {"loss", "bits_per_byte"}


def test_a_resume_feeds_the_whole_run_to_a_view_that_has_lost_it(
    tiny_argv: Argv, only_run: Callable[[], Path], tmp_path: Path
) -> None:
    from aim import Repo, Run
    from aim.sdk.index_manager import RepoIndexManager
    from aim.storage.context import Context

    assert train.main(tiny_argv("--aim-logging", "--stop-at-step", "3")) == 0
    (event_file,) = event_files(only_run())
    event_file.unlink()
    assert train.main(["--resume", str(only_run()), "--aim-repo", str(tmp_path / "elsewhere")]) == 0
    logged = read_metrics(only_run() / "logs", "train/loss")
    assert [step for step, _ in logged] == [0, 1, 2, 3, 4, 5]

    events = EventAccumulator(str(only_run()), size_guidance={"scalars": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [0, 1, 2, 3, 4, 5]
    assert {"config/text_summary", "_hparams_/session_start_info"} <= {
        *events.Tags()["tensors"],
        *events.summary_metadata,
    }
    repo, run_hash = Repo(str(tmp_path / "elsewhere")), read_record(only_run())["views"]["aim"]["hash"]
    RepoIndexManager.get_index_manager(repo).index(run_hash)
    sequence = Run(run_hash, repo=repo, read_only=True).get_metric("loss", Context({"subset": "train"}))
    steps, (values, *_) = sequence.data.items_list()
    assert list(zip(steps, values, strict=True)) == logged


def test_aim_leaves_no_thread_running(tmp_path: Path, tiny_argv: Argv, only_run: Callable[[], Path]) -> None:
    assert train.main(tiny_argv()) == 0
    before = set(threading.enumerate())
    view = AimView(RunFacts.read(only_run()), str(tmp_path))
    view.open(0)
    assert set(threading.enumerate()) <= before
    view.close(RunEnd("completed"))
    assert set(threading.enumerate()) <= before


def test_a_broken_view_does_not_change_training(
    tiny_argv: Argv, runs_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(tiny_argv("--run-tag", "a")) == 0

    def broken(self: object, first_step: int) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr("utils.tracking.aim.AimView.open", broken)
    monkeypatch.setattr("utils.tracking.tensorboard.TensorBoardView.open", broken)
    assert train.main(tiny_argv("--run-tag", "b", "--aim-logging")) == 0
    assert capsys.readouterr().out.count("is off: PermissionError: read-only") == 2
    good, bad = sorted(runs_dir.iterdir(), key=lambda path: path.name[-1])
    assert read_metrics(good / "logs", "train/loss") == read_metrics(bad / "logs", "train/loss")
    assert read_record(bad)["status"] == "completed"
    assert {view["state"] for view in read_record(bad)["views"].values()} == {"off"}
