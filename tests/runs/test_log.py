"""The append-only logs: records are read back, a torn last line is ignored, and truncation is exact."""

from __future__ import annotations

import contextlib
import json
import math
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from utils.runs import log as run_log
from utils.runs import metrics
from utils.runs.log import (
    LOG_FILES,
    LogWriter,
    RunLog,
    RunLogError,
    _lines_before,
    cut_logs,
    last_record,
    offset_of_step,
    read_from,
    read_lines,
    read_metrics,
    read_records,
    record_at,
    truncate,
)
from utils.runs.metrics import (
    Metric,
    decode_number,
    encode_number,
    metric,
    metric_record,
    read_registry,
    register_metric,
    shown_metrics,
    write_registry,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def append(path: Path, *records: dict[str, object]) -> int:
    """Append in a new session and return the size of the file."""
    writer = LogWriter(path)
    writer.write(records)
    writer.sync()
    offset = writer.offset
    writer.close()
    return offset


def test_the_records_of_all_sessions_are_read_in_order(log: Path) -> None:
    append(log, {"step": 0}, {"step": 1, "text": "a"})
    append(log)
    append(log, {"step": 2})
    assert list(read_records(log)) == [{"step": 0}, {"step": 1, "text": "a"}, {"step": 2}]
    assert log.read_text() == '{"step":0}\n{"step":1,"text":"a"}\n{"step":2}\n'


def test_offset_counts_bytes_of_all_sessions(log: Path) -> None:
    assert append(log, {"text": "ü"}) == len('{"text":"ü"}\n'.encode())
    assert append(log, {"a": 1}) == log.stat().st_size


@pytest.mark.parametrize(
    "text", ["über", "\u2028 \u2029 \x85", "line\nbreak\r\n", "\x00\x1f", "🙂", '"\\', "\ufeff", "\ufffe"]
)
def test_any_text_survives_on_one_line(log: Path, text: str) -> None:
    append(log, {"text": text}, {"step": 1})
    assert list(read_records(log)) == [{"text": text}, {"step": 1}]
    assert log.read_bytes().count(b"\n") == 2


def test_an_absent_log_has_no_records(log: Path) -> None:
    assert list(read_records(log)) == []
    with pytest.raises(FileNotFoundError):
        read_from(log)


@pytest.mark.parametrize("torn", [b"{", b'{"step": 2', b'{"step": 2}', b'{"text": "\xc3'])
def test_a_torn_last_line_waits_until_it_is_complete(log: Path, torn: bytes) -> None:
    offset = append(log, {"step": 0}, {"step": 1})
    with log.open("ab") as file:
        file.write(torn)
    assert list(read_records(log)) == [{"step": 0}, {"step": 1}]
    assert read_from(log) == ([{"step": 0}, {"step": 1}], offset)
    assert read_from(log, offset) == ([], offset)


def test_reading_continues_where_it_stopped(log: Path) -> None:
    first = append(log, {"step": 0})
    assert read_from(log) == ([{"step": 0}], first)
    second = append(log, {"step": 1})
    assert read_from(log, first) == ([{"step": 1}], second)
    assert read_from(log, second) == ([], second)


@pytest.mark.parametrize("max_bytes", [1, 7, 16, 17, 18, 100, 4096])
def test_lines_of_any_length_are_read_whole_across_chunk_borders(log: Path, max_bytes: int) -> None:
    records = [{"text": "ü" * (3 * i % 50), "step": i} for i in range(60)]
    append(log, *records)
    read, offset = [], 0
    while True:
        part, end = read_from(log, offset, max_bytes)
        assert (end > offset) == bool(part)
        if not part:
            break
        read += part
        offset = end
    assert read == records
    assert offset == log.stat().st_size


def test_a_chunk_has_the_requested_length(log: Path) -> None:
    log.write_bytes(b'{"step": 0}\n' * 1000)
    assert len(read_from(log, 0, 120)[0]) == 10
    assert read_lines(log) == read_lines(log, 0, 1 << 20) == [b'{"step": 0}\n'] * 1000


def test_a_long_torn_line_is_left_for_later(log: Path) -> None:
    log.write_bytes(b'{"text": "' + b"x" * 100)
    assert read_from(log, 0, max_bytes=10) == ([], 0)


def test_a_line_longer_than_the_default_chunk_is_read(log: Path) -> None:
    records = [{"step": 0}, {"text": "x" * (3 << 20)}, {"step": 2}]
    append(log, *records)
    assert list(read_records(log)) == records


def test_a_complete_line_that_is_not_json_is_an_error(log: Path) -> None:
    log.write_bytes(b'{"step": 0}\nnonsense\n')
    with pytest.raises(ValueError, match="is not a record"):
        read_from(log)


@pytest.mark.parametrize("good_lines", [0, 1, 2, 70_000])  # 70,000 lines are longer than a chunk
def test_a_damaged_line_is_named_by_its_number_in_the_file(log: Path, good_lines: int) -> None:
    good = b'{"step": 0, "x": "..."}\n'
    log.write_bytes(good * good_lines + b"[]\n")
    for offset in {0, len(good) * (good_lines // 2), len(good) * good_lines}:
        with pytest.raises(RunLogError, match=rf"metrics\.jsonl:{good_lines + 1}: the log is damaged: this line is no"):
            read_from(log, offset, 1 << 24)


def test_neither_readers_nor_writers_follow_a_link_out_of_the_run(tmp_path: Path) -> None:
    outside, log = tmp_path / "outside.jsonl", tmp_path / "run" / "logs" / "metrics.jsonl"
    outside.write_bytes(b'{"step": 1}\n[]\n')
    log.parent.mkdir(parents=True)
    log.symlink_to(outside)
    for read in (read_from, last_record, _lines_before, offset_of_step, truncate, LogWriter):
        with pytest.raises(PermissionError, match="leads out of"):
            read(log) if read not in (_lines_before, offset_of_step) else read(log, 1)
    log.unlink()
    (tmp_path / "run" / "linked").symlink_to(tmp_path)  # a linked folder of logs
    for read in (read_from, _lines_before, LogWriter):
        with pytest.raises(PermissionError, match="leads out of"):
            (read(tmp_path / "run" / "linked" / "outside.jsonl", *((1,) if read is _lines_before else ())))
    log.symlink_to(tmp_path / "run" / "real.jsonl")  # a link within the run
    append(log, {"step": 3})
    assert last_record(log) == {"step": 3}


def test_truncate_to_an_offset_removes_exactly_what_follows(log: Path) -> None:
    offset = append(log, {"step": 0}, {"text": "ü"})
    append(log, {"step": 2})
    truncate(log, offset)
    assert log.stat().st_size == offset
    append(log, {"step": 3})
    assert list(read_records(log)) == [{"step": 0}, {"text": "ü"}, {"step": 3}]


@pytest.mark.parametrize("torn", [b"", b'{"step"', b"x" * 5000])
def test_truncate_without_an_offset_cuts_the_torn_line(log: Path, torn: bytes) -> None:
    offset = append(log, {"step": 0})
    with log.open("ab") as file:
        file.write(torn)
    truncate(log)
    assert log.stat().st_size == offset


@pytest.mark.parametrize(("content", "kept"), [(b"", 0), (b"\n", 1), (b"x", 0), (b"\nx", 1), (b"\n\n", 2), (b"x\n", 2)])
def test_truncate_keeps_even_the_shortest_complete_lines(log: Path, content: bytes, kept: int) -> None:
    log.write_bytes(content)
    truncate(log)
    assert log.read_bytes() == content[:kept]


def test_truncate_of_a_log_without_a_complete_line_empties_it(log: Path) -> None:
    log.write_bytes(b"{")
    truncate(log)
    assert log.read_bytes() == b""


def test_truncate_of_an_absent_log_does_nothing(log: Path) -> None:
    truncate(log)
    truncate(log, 100)
    assert not log.exists()


def test_truncate_never_makes_a_log_longer(log: Path) -> None:
    offset = append(log, {"step": 0})
    with contextlib.suppress(ValueError, OSError):
        truncate(log, offset + 10)
    assert log.stat().st_size == offset


@pytest.mark.parametrize(
    ("value", "encoded"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf"), (1.5, 1.5), (3, 3), (-0.0, -0.0)]
)
def test_non_finite_numbers_are_logged_as_words(log: Path, value: float, encoded: float | str) -> None:
    assert encode_number(value) == encoded
    decoded = decode_number(encode_number(value))
    assert math.isnan(decoded) if math.isnan(value) else decoded == value
    append(log, metric_record(1, 2.0, {"train/loss": value}))
    ((step, read),) = read_metrics(log.parent, "train/loss")
    assert step == 1
    assert str(read) == str(float(value))


def test_a_writer_refuses_what_is_not_json_before_it_writes_anything(log: Path) -> None:
    writer = LogWriter(log)
    with pytest.raises(TypeError, match="not JSON serializable"):
        writer.write([{"step": 0}, {"a": object()}])
    writer.close()
    assert log.read_bytes() == b""


def test_a_metric_record_has_step_time_and_registered_names() -> None:
    record = metric_record(500, 1769869501.34567, {"train/loss": 1.9812, "lr": 0.00071})
    assert record == {"step": 500, "time": 1769869501.3457, "train/loss": 1.9812, "lr": 0.00071}
    assert list(record)[:2] == ["step", "time"]
    with pytest.raises(KeyError, match=r"no/such.*not registered.*register_metric"):
        metric_record(0, 0.0, {"no/such": 1.0})


def test_read_metrics_returns_one_metric_in_the_order_of_the_log(log: Path) -> None:
    append(log, {"step": 0, "val/loss": 4.0}, {"step": 0, "train/loss": 3.0}, {"step": 1, "train/loss": "nan"})
    assert read_metrics(log.parent, "val/loss") == [(0, 4.0)]
    assert [step for step, _ in read_metrics(log.parent, "train/loss")] == [0, 1]
    assert read_metrics(log.parent, "lr") == []
    assert read_metrics(log.parent / "nowhere", "lr") == []


@pytest.mark.parametrize(
    ("name", "subset", "short_name"),
    [("train/loss", "train", "loss"), ("val/loss", "val", "loss"), ("train/eval_loss", "train", "eval_loss")]
    + [("lr", None, "lr")],
)
def test_a_metric_name_is_split_into_subset_and_short_name(name: str, subset: str | None, short_name: str) -> None:
    assert (metric(name).subset, metric(name).short_name) == (subset, short_name)


def test_losses_are_nats_and_better_when_lower() -> None:
    for name in ("train/loss", "val/loss", "train/eval_loss"):
        assert (metric(name).unit, metric(name).direction) == ("nats", "lower")
    assert metric("tokens_per_second").direction == "higher"


def test_a_metric_is_known_once_registered_and_cannot_be_redefined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_REGISTRY", dict(metrics._REGISTRY))
    with pytest.raises(KeyError):
        metric("val/taste")
    accuracy = register_metric(Metric("val/taste", "1", "higher"))
    assert metric("val/taste") is accuracy
    assert register_metric(Metric("val/taste", "1", "higher")) == accuracy
    with pytest.raises(ValueError, match="val/taste is registered already"):
        register_metric(Metric("val/taste", "%", "higher"))
    assert metric("val/taste") is accuracy


def test_a_registry_read_from_a_file_adds_metrics_but_redefines_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, before = tmp_path / "metrics.json", dict(metrics._REGISTRY)
    monkeypatch.setattr(metrics, "_REGISTRY", dict(before))
    register_metric(Metric("mine/über", "%", "higher", views=("aim",)))
    register_metric(Metric("mine/quiet", "1", views=()))
    whole = dict(metrics._REGISTRY)
    write_registry(path)

    monkeypatch.setattr(metrics, "_REGISTRY", dict(before))
    read_registry(path)  # as in a process that has not imported the callback
    assert whole == metrics._REGISTRY
    assert metric("mine/über") == Metric("mine/über", "%", "higher", views=("aim",))
    assert register_metric(Metric("mine/über", "%", "higher", views=("aim",)))  # its module is imported later

    monkeypatch.setattr(metrics, "_REGISTRY", {**before, "mine/quiet": Metric("mine/quiet", "s")})
    read_registry(path)  # the definition in the code takes precedence
    assert metric("mine/quiet") == Metric("mine/quiet", "s")


def test_without_a_registry_file_nothing_is_added(tmp_path: Path) -> None:
    before = dict(metrics._REGISTRY)
    read_registry(tmp_path / "metrics.json")
    assert before == metrics._REGISTRY


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (Metric("step", "steps"), "no metric can be named step"),
        (Metric("time", "s"), "no metric can be named time"),
        (Metric("sample", "1"), "no metric in Aim can be named sample: that name is used for another part of a run"),
        (Metric("x/y", "1", views=("tensorbord",)), "unknown view tensorbord; the views are tensorboard, aim, wandb"),
        (Metric("x/y", "1", "up"), "direction 'up' is not one of"),  # type: ignore[arg-type]
    ],
)
def test_an_invalid_metric_is_rejected(metric: Metric, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        register_metric(metric)


def test_only_the_first_part_of_a_metric_name_is_its_subset() -> None:
    names = [
        (facts.subset, facts.short_name) for facts in (Metric("a/b/c", "1"), Metric("a/d/c", "1"), Metric("c", "1"))
    ]
    assert names == [("a", "b/c"), ("a", "d/c"), (None, "c")]


@pytest.mark.parametrize(
    ("view", "names"),
    [
        ("tensorboard", ["train/loss", "step_ms", "val/loss"]),
        ("aim", ["train/loss", "val/loss"]),
        ("wandb", ["train/loss", "val/loss"]),
        ("another", []),
    ],
)
def test_a_view_shows_only_its_metrics(view: str, names: list[str]) -> None:
    record = metric_record(3, 1.0, {"tokens": 96, "train/loss": 2.0, "step_ms": 1.5, "val/loss": math.inf})
    shown = dict(shown_metrics(record, view))
    assert [facts.name for facts in shown] == names
    assert [shown[facts] for facts in shown] == [{"step_ms": 1.5, "train/loss": 2.0}.get(n, math.inf) for n in names]


def test_a_record_with_an_unregistered_metric_cannot_be_shown() -> None:
    with pytest.raises(KeyError, match="'no/such' is not registered"):
        list(shown_metrics({"step": 0, "time": 0.0, "no/such": 1.0}, "aim"))


def test_run_log_makes_all_three_logs_and_appends_in_a_second_session(tmp_path: Path) -> None:
    for step in range(2):
        log = RunLog(tmp_path)
        log.metrics.write([{"step": step}])
        log.samples.write([{"step": step, "text": "a"}])
        log.sync()
        log.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(LOG_FILES)
    assert [record["step"] for record in read_records(tmp_path / "metrics.jsonl")] == [0, 1]
    assert list(read_records(tmp_path / "histograms.jsonl")) == []


def test_a_batch_that_does_not_fit_on_the_disk_is_dropped_whole(log: Path) -> None:
    """A limit on the file size simulates the full disk."""
    code = "import sys; from pathlib import Path; from utils.runs.log import LogWriter\n"
    code += "writer = LogWriter(Path(sys.argv[1]))\n"
    code += "try: writer.write({'step': step} for step in range(1000))\n"
    code += "except OSError as error: print(error.filename)\n"
    result = subprocess.run(
        [sys.executable, "-c", code, str(log)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
    )
    assert result.stdout == f"{log}\n"
    records = list(read_records(log))
    assert records == []  # the whole batch is dropped
    truncate(log)
    assert [json.loads(line) for line in log.read_text().splitlines()] == records


# ------------------------------------------------------------------------------------- cutting back to a checkpoint


@pytest.mark.parametrize(
    ("step", "kept"), [(0, 0), (1, 2), (2, 3), (3, 3), (4, 3), (5, 5), (6, 5), (7, 6), (8, 6), (1000, 6)]
)
def test_the_offset_of_a_step_is_before_its_first_record(log: Path, step: int, kept: int) -> None:
    steps = [0, 0, 1, 4, 4, 6]  # an evaluation and an update may share a step
    append(log, *({"step": number, "text": "ü" * number} for number in steps))
    offset = offset_of_step(log, step)
    lines = log.read_bytes().splitlines(keepends=True)
    assert offset == sum(map(len, lines[:kept]))
    truncate(log, offset)
    assert [record["step"] for record in read_records(log)] == [number for number in steps if number < step]


def test_the_offset_of_any_step_is_found_in_a_long_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_log, "SCANNED_BYTES", 100)
    path, starts = tmp_path / "metrics.jsonl", {}
    with path.open("w") as file:
        for number in range(500):
            starts.setdefault(number // 3 * 2, file.tell())  # three records a step, odd steps missing
            file.write(json.dumps({"step": number // 3 * 2, "text": "x" * (number * 37 % 90)}) + "\n")
        end = file.tell()
        file.write('{"step": 1000, "to')
    for step in range(340):
        later = [start for logged, start in starts.items() if logged >= step]
        assert offset_of_step(path, step) == (min(later) if later else end)


def test_the_offset_of_a_step_stops_before_a_torn_line(log: Path) -> None:
    offset = append(log, {"step": 0}, {"step": 1})
    with log.open("ab") as file:
        file.write(b'{"step": 2')
    assert offset_of_step(log, 1000) == offset
    assert offset_of_step(log, 1) == len(b'{"step":0}\n')


def test_the_offset_of_a_step_in_an_empty_or_missing_log_is_0(log: Path) -> None:
    assert offset_of_step(log, 5) == 0
    log.touch()
    assert offset_of_step(log, 5) == 0


def filled_logs(folder: Path) -> dict[str, int]:
    """Write the logs of three sessions and return the offsets after the first."""
    offsets: dict[str, int] = {}
    for session in range(3):
        log = RunLog(folder)
        log.metrics.write({"step": 10 * session + step} for step in range(5))
        log.histograms.write([{"step": session}])
        if session:
            log.samples.write([{"step": session, "text": "ü"}])
        offsets = offsets or log.offsets()
        log.close()
    return offsets


def test_logs_are_cut_back_to_the_offsets_of_a_checkpoint(tmp_path: Path) -> None:
    offsets = filled_logs(tmp_path)
    assert offsets["samples.jsonl"] == 0
    cut_logs(tmp_path, offsets)
    assert {name: (tmp_path / name).stat().st_size for name in LOG_FILES} == offsets
    assert [record["step"] for record in read_records(tmp_path / "metrics.jsonl")] == list(range(5))
    assert append(tmp_path / "metrics.jsonl", {"step": 5}) > offsets["metrics.jsonl"]
    assert [record["step"] for record in read_records(tmp_path / "metrics.jsonl")] == list(range(6))
    cut_logs(tmp_path, offsets)
    assert {name: (tmp_path / name).stat().st_size for name in LOG_FILES} == offsets


def test_cutting_back_removes_a_torn_line_after_the_checkpoint(tmp_path: Path) -> None:
    offsets = filled_logs(tmp_path)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 3')
    cut_logs(tmp_path, offsets)
    assert len(list(read_records(tmp_path / "metrics.jsonl"))) == 5


def test_without_a_checkpoint_the_logs_are_emptied(tmp_path: Path) -> None:
    filled_logs(tmp_path)
    (tmp_path / "train.log").write_text("what the terminal showed")
    cut_logs(tmp_path, {})
    assert [(tmp_path / name).stat().st_size for name in LOG_FILES] == [0, 0, 0]
    assert (tmp_path / "train.log").read_text() == "what the terminal showed"


def test_cutting_back_missing_logs_creates_none(tmp_path: Path) -> None:
    cut_logs(tmp_path, {})
    cut_logs(tmp_path, dict.fromkeys(LOG_FILES, 0))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", LOG_FILES)
@pytest.mark.parametrize("there", [True, False])
def test_if_a_log_is_shorter_than_at_the_checkpoint_none_is_cut(tmp_path: Path, name: str, there: bool) -> None:
    offsets = filled_logs(tmp_path)
    size = (tmp_path / name).stat().st_size
    if not there:
        (tmp_path / name).unlink()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RunLogError) as caught:
        cut_logs(tmp_path, offsets | {name: size + 1000})
    found = f"{size if there else 0:,}"
    assert str(caught.value) == (
        f"{tmp_path / name}: has {found} bytes, but had {size + 1000:,} when the checkpoint was saved"
    )
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_last_record_is_the_last_complete_one(log: Path) -> None:
    assert run_log.last_record(log) is None
    append(log)
    assert run_log.last_record(log) is None
    log.write_text('{"step": 1')
    assert run_log.last_record(log) is None
    log.write_text('{"step": 1}\n')
    assert run_log.last_record(log) == {"step": 1}
    append(log, {"step": 2}, {"step": 3})
    assert run_log.last_record(log) == {"step": 3}
    with log.open("a") as file:
        file.write('{"step": 4}')  # no newline yet
    assert run_log.last_record(log) == {"step": 3}


@pytest.mark.parametrize("length", [-40, -1, 0, 1, 3])
@pytest.mark.parametrize("torn", ["", '{"step": 9, "text": "' + "y" * 200_000])
def test_the_last_record_of_any_length_is_found(log: Path, length: int, torn: str) -> None:
    last = {"step": 2, "text": "x" * (run_log.SCANNED_BYTES - len('{"step":2,"text":""}\n') + length)}
    append(log, {"step": 1}, last)
    with log.open("a") as file:
        file.write(torn)
    assert run_log.last_record(log) == last


def test_the_last_of_many_records_is_found(log: Path) -> None:
    append(log, *({"step": step, "text": "ü" * 50} for step in range(5000)))
    assert run_log.last_record(log) == {"step": 4999, "text": "ü" * 50}


def test_measurements_of_time_and_of_the_machine_are_not_reproducible() -> None:
    for name in ("train/loss", "val/loss", "lr", "grad_norm", "tokens", "of_a_callback"):
        assert metrics.is_reproducible(name)
    for name in metrics.registered_metrics():
        assert metrics.is_reproducible(name) != (name.startswith("system/") or name in ("tokens_per_second", "step_ms"))


def test_registered_metrics_are_listed_once_and_accepted_by_the_log() -> None:
    names = metrics.registered_metrics()
    assert {"train/loss", "val/loss", "lr", "tokens"} <= {*names}
    assert len(names) == len({*names})
    assert all(metric(name).name == name for name in names)
    names.append("nonsense")
    assert "nonsense" not in metrics.registered_metrics()


def test_the_registry_file_records_whether_a_metric_is_reproducible(tmp_path: Path) -> None:
    write_registry(tmp_path / "metrics.json")
    facts = {entry["name"]: entry for entry in json.loads((tmp_path / "metrics.json").read_text())}
    assert (facts["step_ms"]["reproducible"], facts["val/loss"]["reproducible"]) == (False, True)


def test_a_registry_file_of_an_older_version_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_REGISTRY", dict(metrics._REGISTRY))
    entry = {"name": "older", "unit": "1", "direction": "none", "views": ["aim"]}
    (tmp_path / "metrics.json").write_text(json.dumps([entry]))
    read_registry(tmp_path / "metrics.json")
    assert metrics.is_reproducible("older")


def test_the_offset_of_a_step_is_found_without_reading_the_log(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append(log, *({"step": step} for step in range(5000)))
    monkeypatch.setattr(run_log, "SCANNED_BYTES", 100)
    parsed: list[bytes] = []
    monkeypatch.setattr(run_log, "orjson", SimpleNamespace(loads=lambda line: parsed.append(line) or json.loads(line)))
    for step in (0, 1234, 4999, 9999):
        parsed.clear()
        assert offset_of_step(log, step) == sum(len(f'{{"step":{number}}}\n') for number in range(min(step, 5000)))
        assert len(parsed) < 30


@pytest.mark.parametrize(
    ("line", "good"),
    [
        (b'{"step":3,"time":1}\n', True),
        (b'{"step":3,"time":1.5,"lr":0.1}\n', True),
        (b'{"step":3}\n', False),
        (b'{"time":1.5}\n', False),
        (b'{"step":"3","time":1.5}\n', False),
        (b'{"step":3,"time":"now"}\n', False),
        (b"[3]\n", False),
        (b"{\n", False),
    ],
)
def test_a_line_is_a_record_if_it_has_a_numeric_step_and_time(log: Path, line: bytes, good: bool) -> None:
    before = append(log, {"step": 0}, {"step": 1})
    with log.open("ab") as file:
        file.write(line)
    if good:
        assert record_at(log, before, line) == json.loads(line)
    else:
        with pytest.raises(RunLogError) as caught:
            record_at(log, before, line)
        assert str(caught.value) == f"{log}:3: the log is damaged: this line is not a record"
