"""The TensorBoard view: event files in the run directory, whose name is the name of the run in TensorBoard."""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

from utils.config.fields import FIELDS, field_fact
from utils.config.section import TRAJECTORY
from utils.files import regular_fd
from utils.runs.log import HISTOGRAMS_FILE, METRICS_FILE
from utils.runs.metrics import shown_metrics
from utils.tracking import RunEnd, RunFacts

SESSION_METRICS = ("val/loss", "train/eval_loss")  # shown beside the hyperparameters
# Settings that the HParams page shows at first: five columns, marked as differing. It reads the marks of one run only.
SESSION_COLUMNS = frozenset(("learning_rate", "max_iters", "n_embd", "n_layer", "run_tag"))
CHARTS = {  # custom scalars: category, title, tags
    "loss": {
        "train and val": ["Multiline", ["train/eval_loss", "val/loss"]],
        "every step and val": ["Multiline", ["train/loss", "val/loss"]],
    },
    "speed": {"tokens per second": ["Multiline", ["tokens_per_second"]]},
}
SESSION_END_TAG = b"_hparams_/session_end_info"


class TensorBoardView:
    """Scalars, histograms, sample texts, configuration and model, hyperparameters with status and losses.

    Each session writes one event file. Readers keep the first hyperparameter records that they find, so a resumed
    session first removes the record of how the previous session ended.
    """

    name = "tensorboard"
    rolls_back = True

    def __init__(self, facts: RunFacts, log_dir: Path) -> None:
        self.facts = facts
        self.log_dir = log_dir
        self.starts_empty = False
        self._events: EventFile | None = None

    @property
    def events(self) -> EventFile:
        assert self._events is not None, "open() comes first"
        return self._events

    def open(self, first_step: int) -> Mapping[str, Any]:
        if self._events is None:  # a second attempt continues the file of the first
            self.log_dir.mkdir(exist_ok=True)
            self.starts_empty = not event_files(self.log_dir)
            for path in event_files(self.log_dir)[-1:]:  # the files before it were cut when it was created
                cut_session_end(path)
            self._events = EventFile(self.log_dir, purge_step=0 if self.starts_empty else first_step)
        if first_step == 0 or self.starts_empty:
            self._describe()
        return {"path": self.events.path.name}

    def _describe(self) -> None:
        """Write the texts of step 0, the hyperparameters of a running session, and the layout of the custom scalars."""
        from torch.utils.tensorboard.summary import custom_scalars

        facts = self.facts
        self._text("config", _settings_table(facts.hparams), 0)
        sizes = ("parameters", "vocab_size", "train_tokens", "val_tokens", "epochs", "device", "dtype", "dataset")
        overview = _table(("fact", "value"), [(key, facts.resolved[key]) for key in sizes if key in facts.resolved])
        modules = [(m["name"], " x ".join(map(str, m["shape"])), m["parameters"]) for m in facts.modules]
        table = _table(("parameter", "shape", "elements"), modules)
        self._text("model", f"{overview}\n\n### Parameters\n\n{table}" if modules else overview, 0)
        self._text("git", _table(("fact", "value"), facts.git.items()), 0)
        if facts.note:
            self._text("note", facts.note, 0)
        experiment, start, _ = self._session_records()
        for summary in (experiment, start, custom_scalars(CHARTS)):
            self.events.add(summary)

    def _text(self, tag: str, text: str, step: int, when: float | None = None) -> None:
        from torch.utils.tensorboard.summary import text as text_summary

        self.events.add(text_summary(tag, text), step, when)

    def _session_records(self) -> tuple[Any, Any, Any]:
        """Summaries for the HParams page: the experiment, the start of a session, and its (successful) end."""
        from torch.utils.tensorboard.summary import hparams

        flat = {
            f"{section}.{key}": _cell(key, value)
            for section, values in self.facts.hparams.items()
            for key, value in values.items()
            if field_fact(key, "kind") == TRAJECTORY or key in SESSION_COLUMNS or key == "dataset"
        }
        _, start, end = hparams(flat, {})  # it leaves out settings that are None
        columns = {name: 0 if cell is None else cell for name, cell in flat.items()}
        experiment, *_ = hparams(columns, dict.fromkeys(SESSION_METRICS, 0.0))
        return _with_columns(experiment), start, end

    def feed(self, log_file: str, record: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard.summary import scalar

        step, when = record["step"], record["time"]
        if log_file == METRICS_FILE:
            for metric, value in shown_metrics(record, self.name):
                self.events.add(scalar(metric.name, value), step, when)
        elif log_file == HISTOGRAMS_FILE:
            self._histogram(record)
        else:
            self._text("sample", _fenced(record["text"]), step, when)

    def _histogram(self, record: Mapping[str, Any]) -> None:
        """Write the logged bins; SummaryWriter.add_histogram would copy whole tensors to float64 and bin them."""
        from torch.utils.tensorboard.summary import histogram_raw

        counts, low, high = record["counts"], record["min"], record["max"]
        total = sum(counts)
        if not total:
            return
        width = (high - low) / len(counts) or 1e-12
        limits = [low + width * (i + 1) for i in range(len(counts))]
        centers = [limit - width / 2 for limit in limits]
        summary = histogram_raw(
            record["name"],
            min=low,
            max=high,
            num=total,
            sum=sum(c * x for c, x in zip(counts, centers, strict=True)),
            sum_squares=sum(c * x * x for c, x in zip(counts, centers, strict=True)),
            bucket_limits=limits,
            bucket_counts=counts,
        )
        self.events.add(summary, record["step"], record["time"])

    def flush(self) -> None:
        self.events.flush()

    def background_seconds(self) -> float:
        return 0.0  # it has no threads of its own

    def clear(self) -> Mapping[str, Any]:
        if self._events is not None:
            self._events.close()
            self._events = None
        for path in event_files(self.log_dir):
            path.unlink()
        return self.open(0)

    def close(self, end: RunEnd) -> None:
        self._text("status", end.status, end.step)  # at the last step, so that a resume purges it
        *_, session_end = self._session_records()
        self.events.add(_with_status(session_end, end.status))
        self.events.flush()
        self.events.close()

    def abandon(self) -> None:
        """Nothing to release."""


class EventFile:
    """A new event file, written by the calling thread.

    torch's SummaryWriter writes in a thread of its own, whose errors and processor time do not reach the caller. A
    feeder is already such a thread.

    Args:
        folder: the folder of the event files of one run.
        purge_step: readers drop the events of this and later steps in earlier files. TensorBoard's Python reader
            ignores the first event of this kind, so even the first file of a run has one.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        # Readers sort files by name, so the names must increase even if the clock goes backwards.
        stamps = [int(path.name.split(".")[3]) for path in event_files(folder)]
        stamp = max([int(time.time()), *(stamp + 1 for stamp in stamps)])
        self.path = folder / f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{os.getpid()}"
        self._file = self.path.open("xb")
        self._event = Event
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._write(Event(wall_time=time.time(), step=purge_step, session_log=SessionLog(status=SessionLog.START)))
        self.flush()

    def _write(self, event: Any) -> None:
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        self._file.write(length + _masked_checksum(length) + data + _masked_checksum(data))

    def add(self, summary: Any, step: int = 0, when: float | None = None) -> None:
        """Append a Summary. `when` is in seconds since 1970, by default now."""
        self._write(self._event(wall_time=time.time() if when is None else when, step=step, summary=summary))

    def flush(self) -> None:
        """Pass all buffered data to the operating system.

        Raises:
            OSError: the disk is full, or the file has been deleted.
        """
        self._file.flush()
        if not self.path.exists():  # writing to the open file still succeeds
            raise FileNotFoundError(f"{self.path.name} was deleted")

    def close(self) -> None:
        self._file.close()


def event_files(folder: Path) -> list[Path]:
    """The event files of a run, oldest first."""
    return sorted(folder.glob("events.out.tfevents.[0-9]*"))


def _cell(key: str, value: Any) -> float | str | None:
    """The value of a setting for the HParams page, which cannot sort a column of both numbers and texts."""
    if get_origin(annotation := FIELDS[key].annotation) is not tuple:
        members = {getattr(member, "__origin__", member) for member in get_args(annotation) or (annotation,)}
        if members & {int, float}:
            return value if type(value) in (int, float) else None
    return str(value)  # a bool would be shown as 1.0000


def _with_columns(experiment: Any) -> Any:
    """torch's record of an experiment, with the columns marked that are shown at first."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    plugin_data = experiment.value[0].metadata.plugin_data
    content = HParamsPluginData.FromString(plugin_data.content)
    for info in content.experiment.hparam_infos:
        info.differs = info.name.partition(".")[2] in SESSION_COLUMNS
    plugin_data.content = content.SerializeToString()
    return experiment


def _with_status(session_end: Any, status: str) -> Any:
    """torch's record of a successful session, with the actual status of the run."""
    from tensorboard.plugins.hparams.api_pb2 import Status
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    names = {"completed": "SUCCESS", "failed": "FAILURE", "diverged": "FAILURE", "crashed": "FAILURE"}
    plugin_data = session_end.value[0].metadata.plugin_data
    content = HParamsPluginData.FromString(plugin_data.content)
    content.session_end_info.status = Status.Value(f"STATUS_{names.get(status, 'UNKNOWN')}")  # interrupted is neither
    plugin_data.content = content.SerializeToString()
    return session_end


def cut_session_end(path: Path) -> None:
    """Truncate an event file before the record that ends its session, or before the first damaged or torn record.

    Format of a record: https://www.tensorflow.org/tutorials/load_data/tfrecord
    """
    end = 0
    fd = regular_fd(path, flags=os.O_RDWR)
    try:
        for length, data in _event_records(fd):
            if SESSION_END_TAG in data:
                break
            end += length
        os.ftruncate(fd, end)
    finally:
        os.close(fd)


def _masked_checksum(data: bytes) -> bytes:
    """CRC-32C as the format of a record requires it: rotated by 15 bits, plus a constant.

    The package google-crc32c takes half a microsecond. Without it, TensorBoard's own code computes the checksum in a
    Python loop, which takes 0.2 ms for a histogram and competes with the training thread for the interpreter.
    """
    try:
        from google_crc32c import value as crc32c
    except ImportError:
        from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import crc32c  # type: ignore[no-redef]
    checksum = crc32c(data)
    return struct.pack("<I", ((checksum >> 15 | checksum << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _event_records(fd: int) -> Iterator[tuple[int, bytes]]:
    """(bytes in the file, data) of each complete record, up to the first whose length does not match its checksum.

    The data is empty if it is too long for the record that ends a session.
    """
    offset, size = 0, os.fstat(fd).st_size
    while offset + 12 <= size:
        header = os.pread(fd, 12, offset)
        (length,) = struct.unpack_from("<Q", header)
        total = 8 + 4 + length + 4  # length, its checksum, data, their checksum
        if offset + total > size or _masked_checksum(header[:8]) != header[8:]:
            return
        yield total, os.pread(fd, length, offset + 12) if length < 4096 else b""
        offset += total


def _fenced(text: str) -> str:
    """Markdown that shows `text` unchanged."""
    return "\n".join("    " + line for line in text.splitlines() or [""])


def _settings_table(hparams: Mapping[str, Any]) -> str:
    """A Markdown table of all settings; those that differ from their defaults come first."""
    changed: list[tuple[str, str, str]] = []
    others: list[tuple[str, str, str]] = []
    for section, values in hparams.items():
        for key, value in values.items():
            shown, default = (json.dumps(v, ensure_ascii=False) for v in (value, FIELDS[key].default))
            rows = others if shown == default else changed
            rows.append((f"{section}.{key}", f"`{shown}`", "" if shown == default else f"`{default}`"))
    return _table(("setting", "value", "default, if it differs"), [*changed, *others])


def _table(header: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> str:
    """A Markdown table."""
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(f"{x:,}" if type(x) is int else str(x) for x in line) + " |" for line in lines)
