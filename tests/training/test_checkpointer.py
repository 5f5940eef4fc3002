"""When checkpoints are saved, which are kept, and which is read; with a real model, disk and thread."""

from __future__ import annotations

import contextlib
import json
import math
import resource
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import in_child

from data import load_corpus
from utils.checkpoints.choose import choose_checkpoint, newest_good, prune, put_aside, remove_leftovers
from utils.checkpoints.files import read_checkpoint, write_checkpoint
from utils.checkpoints.folder import (
    BEST_FILE,
    FILES,
    LATEST_FILE,
    MANIFEST_FILE,
    STATE_FILE,
    WEIGHTS_FILE,
    CheckpointError,
    best_path,
    list_checkpoints,
)
from utils.config.settings import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from utils.runs.log import RunLog
from utils.terminal.console import Terminal
from utils.training import checkpointer as checkpointing
from utils.training.checkpointer import Checkpointer, HostMemory
from utils.training.state import TrainState, build_state
from utils.training.step import clip_gradients, forward_backward, optimizer_step

CPU = torch.device("cpu")

HASH = "0123abcd"


@pytest.fixture
def state(tmp_path: Path, tiny_corpus: Path) -> TrainState:
    """A tiny model on the CPU before its first step."""
    config = Config(
        data=DataConfig(dataset=str(tiny_corpus)),
        model=ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, dropout=0.1),
        optimizer=OptimizerConfig(),
        train=TrainConfig(batch_size=4, max_iters=100),
    )
    torch.manual_seed(0)
    corpus = load_corpus(config.data, config.model.block_size, tmp_path / "corpora")
    return build_state(config, 100, corpus, CPU, torch.float32, Terminal(quiet=True))


@pytest.fixture
def log(tmp_path: Path) -> Iterator[RunLog]:
    (tmp_path / "logs").mkdir()
    log = RunLog(tmp_path / "logs")
    yield log
    log.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The checkpoints folder of a run `a_run`, which does not exist yet."""
    return tmp_path / "a_run" / "artifacts" / "checkpoints"


class Messages(list[str]):
    """Collects warnings."""

    def __call__(self, message: str) -> None:
        self.append(message)


class Large:
    """A callback whose state is too large to be saved."""

    def state_dict(self) -> Any:
        return {"text": "x" * (2 << 20)}

    def load_state_dict(self, state: Any) -> None: ...


@pytest.fixture
def messages() -> Messages:
    return Messages()


def checkpointer(
    folder: Path, log: RunLog, warn: Messages, saved_step: int | None = None, **settings: Any
) -> Checkpointer:
    settings = {"checkpoint_interval": 10, "checkpoint_minutes": None} | settings
    return Checkpointer(folder, TrainConfig(**settings), HASH, log, warn, saved_step)


def save(checkpoints: Checkpointer, state: TrainState, *steps: int, best: int | None = None) -> None:
    """Save checkpoints of these steps, and wait for each."""
    for step in steps:
        state.step = step
        if best is not None:
            state.best_step, state.best_val_loss = best, 2.5
        checkpoints.save(state)
        checkpoints.wait()


def train_step(state: TrainState) -> None:
    forward_backward(state)
    clip_gradients(state)
    optimizer_step(state)


def steps_in(folder: Path) -> list[int]:
    return [step for step, _ in list_checkpoints(folder)]


def make(folder: Path, *steps: int) -> list[Path]:
    """Write small valid checkpoints, which belong to no model."""
    paths = [folder / f"step_{step:06d}" for step in steps]
    for step, path in zip(steps, paths, strict=True):
        write_checkpoint(path, {"a": torch.full((3,), float(step))}, {}, {}, {"step": step})
    return paths


def damage(path: Path) -> None:
    data = bytearray((path / WEIGHTS_FILE).read_bytes())
    data[-1] ^= 1
    (path / WEIGHTS_FILE).write_bytes(data)


class Gate:
    """Blocks each write until `open` is released. `most` is the largest number of writes at once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.began = threading.Semaphore(0), threading.Semaphore(0)
        self.writing = self.most = 0
        write = checkpointing.write_checkpoint

        def gated(*args: Any, **kwargs: Any) -> None:
            self.writing += 1
            self.most = max(self.most, self.writing)
            self.began.release()
            assert self.open.acquire(timeout=60)
            write(*args, **kwargs)
            self.writing -= 1

        monkeypatch.setattr(checkpointing, "write_checkpoint", gated)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


# ------------------------------------------------------------------------------------- host memory


def test_host_copies_reuse_their_memory() -> None:
    memory = HostMemory()
    tensors = {"a": torch.randn(3, 4), "b": torch.tensor(True), "c": torch.randn(4, 3, dtype=torch.bfloat16).t()}
    first = memory.copy(tensors)
    places = {name: copy.data_ptr() for name, copy in first.items()}
    tensors["a"] += 1
    second = memory.copy(tensors)
    assert {name: copy.data_ptr() for name, copy in second.items()} == places
    for name, copy in second.items():
        assert torch.equal(copy, tensors[name])
        assert copy.dtype == tensors[name].dtype
        assert copy.is_contiguous()


def test_host_copies_are_independent_of_the_tensors_and_require_no_grad() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    copy = HostMemory().copy({"a": weight})["a"]
    with torch.no_grad():
        weight.zero_()
    assert copy.tolist() == [1.0, 1.0, 1.0]
    assert not copy.requires_grad


def test_host_memory_adapts_to_new_names_shapes_and_types() -> None:
    memory = HostMemory()
    memory.copy({"a": torch.zeros(3), "b": torch.zeros(3), "gone": torch.zeros(3)})
    copies = memory.copy({"a": torch.ones(4), "b": torch.ones(3, dtype=torch.int64), "new": torch.ones(0)})
    assert {name: (copy.shape, copy.dtype) for name, copy in copies.items()} == {
        "a": ((4,), torch.float32),
        "b": ((3,), torch.int64),
        "new": ((0,), torch.float32),
    }


# ------------------------------------------------------------------------------------- when


def test_a_checkpoint_is_due_from_a_multiple_of_the_interval_until_it_is_saved(
    folder: Path, log: RunLog, messages: Messages
) -> None:
    checkpoints = checkpointer(folder, log, messages)
    assert [step for step in range(21) if checkpoints.due(step)] == list(range(10, 21))


def test_after_a_save_the_next_multiple_is_due(
    folder: Path, log: RunLog, messages: Messages, state: TrainState
) -> None:
    checkpoints = checkpointer(folder, log, messages)
    due = []
    for step in (9, 10, 10, 11, 19, 23, 24, 29, 30, 57):  # 20 was missed
        if checkpoints.due(step):
            due.append(step)
            save(checkpoints, state, step)
    assert due == [10, 23, 30, 57]
    assert messages == []


def test_the_step_that_was_resumed_from_is_neither_due_nor_saved_again(
    folder: Path, log: RunLog, messages: Messages, state: TrainState
) -> None:
    checkpoints = checkpointer(folder, log, messages, saved_step=20)
    assert [step for step in range(20, 31) if checkpoints.due(step)] == [30]
    save(checkpoints, state, 20)
    assert steps_in(folder) == []


def test_a_new_run_can_save_step_0_and_saves_each_step_once(
    folder: Path, log: RunLog, messages: Messages, state: TrainState
) -> None:
    checkpoints = checkpointer(folder, log, messages)
    assert not checkpoints.due(0)  # but a run that is stopped there saves it
    save(checkpoints, state, 0)
    first = (folder / "step_000000" / STATE_FILE).stat().st_mtime_ns
    save(checkpoints, state, 0)
    assert steps_in(folder) == [0]
    assert (folder / "step_000000" / STATE_FILE).stat().st_mtime_ns == first
    assert read_checkpoint(folder / "step_000000").optimizer_tensors == {}


def test_without_an_interval_in_steps_or_minutes_none_is_due(folder: Path, log: RunLog, messages: Messages) -> None:
    checkpoints = checkpointer(folder, log, messages, checkpoint_interval=0)
    assert not any(checkpoints.due(step) for step in range(5000))


def test_a_checkpoint_is_due_after_checkpoint_minutes(
    folder: Path, log: RunLog, messages: Messages, state: TrainState, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=1000.0)
    fake = SimpleNamespace(monotonic=lambda: clock.now, time=lambda: 0.0)
    monkeypatch.setattr(checkpointing, "time", fake)
    checkpoints = checkpointer(folder, log, messages, checkpoint_interval=0, checkpoint_minutes=2)
    clock.now += 119
    assert not checkpoints.due(5)
    clock.now += 1
    assert checkpoints.due(5)
    save(checkpoints, state, 5)
    assert not checkpoints.due(6)
    clock.now += 120
    assert checkpoints.due(6)


def test_a_checkpoint_is_postponed_while_one_is_being_written(
    folder: Path, log: RunLog, messages: Messages, state: TrainState, gate: Gate
) -> None:
    checkpoints = checkpointer(folder, log, messages, checkpoint_interval=1)
    state.step = 1
    checkpoints.save(state)
    assert gate.began.acquire(timeout=60)
    assert not checkpoints.due(2)
    gate.open.release()
    checkpoints.wait()
    assert checkpoints.due(2)
    assert not checkpoints.due(1)


def test_saving_waits_for_the_previous_write(
    folder: Path, log: RunLog, messages: Messages, state: TrainState, gate: Gate
) -> None:
    checkpoints = checkpointer(folder, log, messages)

    def open_later() -> None:
        for _ in range(3):
            assert gate.began.acquire(timeout=60)
            gate.open.release()

    opener = threading.Thread(target=open_later)
    opener.start()
    for step in (1, 2, 3):
        state.step = step
        checkpoints.save(state)
    checkpoints.wait()
    opener.join()
    assert gate.most == 1
    assert steps_in(folder) == [3, 2]
    assert messages == []


def test_an_abandoned_checkpoint_is_not_completed(
    folder: Path, log: RunLog, messages: Messages, state: TrainState, gate: Gate
) -> None:
    checkpoints = checkpointer(folder, log, messages)
    checkpoints.save(state)
    gate.began.acquire()
    checkpoints.abandon()
    gate.open.release()
    checkpoints.wait()
    assert [*folder.iterdir()] == []
    assert messages == []


def test_a_state_too_large_to_be_read_again_is_not_written(
    folder: Path, log: RunLog, messages: Messages, state: TrainState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("utils.checkpoints.files.JSON_BYTES", 1 << 20)
    checkpoints = checkpointer(folder, log, messages)
    save(checkpoints, state, 10)
    state.callbacks = {"own": Large()}
    save(checkpoints, state, 20)
    assert steps_in(folder) == [10]
    assert messages == [
        "the checkpoint of step 20 was not written: state.json has 2 MiB, and at most 1 can be read: does a callback's "
        "state_dict return whole tensors?; the newest is of step 10"
    ]


def test_a_checkpoint_is_written_even_if_pruning_fails(
    folder: Path, log: RunLog, messages: Messages, state: TrainState, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(*_: Any) -> None:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(checkpointing, "prune", stale)
    save(checkpointer(folder, log, messages), state, 10)
    assert messages == [f"{folder}: the older checkpoints were not deleted: Stale file handle"]
    assert json.loads((folder / LATEST_FILE).read_text())["step"] == 10


def test_waiting_without_a_write_returns_at_once(folder: Path, log: RunLog, messages: Messages) -> None:
    checkpointer(folder, log, messages).wait()


def test_seconds_to_save_are_estimated_from_the_previous_save(
    folder: Path, log: RunLog, messages: Messages, state: TrainState, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = checkpointer(folder, log, messages)
    assert 1.0 < checkpoints.seconds_to_save(state) < 1.1
    ticks = iter((0.0, 10.0, 13.0))
    monkeypatch.setattr(checkpointing, "time", SimpleNamespace(monotonic=lambda: next(ticks), time=lambda: 0.0))
    save(checkpoints, state, 1)
    assert checkpoints.seconds_to_save(state) == 7.0
    ticks = iter((20.0, 30.0, 75.0))
    monkeypatch.setattr(log, "sync", checkpoints.continued)  # a pause between SIGSTOP and SIGCONT does not count
    save(checkpoints, state, 2)
    assert checkpoints.seconds_to_save(state) == 7.0


# ------------------------------------------------------------------------------------- what


def test_a_checkpoint_holds_the_state_at_the_time_of_the_save(
    folder: Path, log: RunLog, messages: Messages, state: TrainState, gate: Gate
) -> None:
    checkpoints = checkpointer(folder, log, messages)
    train_step(state)
    weights = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    moments = {
        f"{name}/exp_avg": state.optimizer.state[parameter]["exp_avg"].clone()
        for name, parameter in state.model.named_parameters()
    }
    checkpoints.save(state)
    for _ in range(3):  # training goes on before anything is written
        train_step(state)
    gate.open.release()
    checkpoints.wait()
    found = read_checkpoint(folder / "step_000001")
    assert found.step == 1
    assert all(torch.equal(found.weights[name], tensor) for name, tensor in weights.items())
    assert all(torch.equal(found.optimizer_tensors[name], tensor) for name, tensor in moments.items())
    assert not torch.equal(weights["token_embedding.weight"], state.model.state_dict()["token_embedding.weight"])
    assert messages == []


def test_the_state_names_its_step_configuration_corpus_and_tokenizer(
    folder: Path, log: RunLog, messages: Messages, state: TrainState
) -> None:
    log.metrics.write([{"step": 0, "text": "ü"}])
    log.samples.write([{"step": 0}])
    save(checkpointer(folder, log, messages), state, 7)
    found = read_checkpoint(folder / "step_000007")
    facts = {key: found.state[key] for key in ("step", "tokens", "config_hash", "world_size", "corpus_hash", "seed")}
    assert facts == {
        "step": 7,
        "tokens": 7 * 4 * 8,
        "config_hash": HASH,
        "world_size": 1,
        "corpus_hash": state.corpus.hash,
        "seed": 1337,
    }
    assert found.state["log_offsets"] == log.offsets()
    assert found.state["log_offsets"]["metrics.jsonl"] > 0
    assert found.state["tokenizer_hash"] == state.corpus.tokenizer.hash()
    assert found.tokenizer == state.corpus.tokenizer.to_json()
    assert found.state["model"] == state.config.model.model_dump(mode="json")
    assert (
        "Infinity" not in (found.path / STATE_FILE).read_text()
    )  # without an evaluation the best loss is the string "inf"


def test_the_logs_are_on_disk_before_the_manifest(
    folder: Path, log: RunLog, messages: Messages, state: TrainState, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(
        log, "sync", lambda: seen.append(sorted(path.name for path in folder.glob(".step_*/*"))), raising=True
    )
    save(checkpointer(folder, log, messages), state, 1)
    assert seen == [sorted(FILES)]


def test_latest_and_best_are_pointers_in_json(folder: Path, log: RunLog, messages: Messages, state: TrainState) -> None:
    checkpoints = checkpointer(folder, log, messages)
    save(checkpoints, state, 5)
    assert not (folder / BEST_FILE).exists()
    assert best_path(folder) is None
    save(checkpoints, state, 6, best=6)
    save(checkpoints, state, 7)
    latest = json.loads((folder / LATEST_FILE).read_text())
    best = json.loads((folder / BEST_FILE).read_text())
    assert (latest["step"], latest["folder"]) == (7, "step_000007")
    assert (best["step"], best["folder"], best["val/loss"]) == (6, "step_000006", 2.5)
    assert best_path(folder) == folder / "step_000006"
    assert not any(path.is_symlink() for path in folder.iterdir())


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"step": 9}', '{"step": null}', '{"step": "5"}', '{"step": 5.5}', '{"step": "../x"}', "\xff"],
)
def test_an_unusable_pointer_is_ignored(folder: Path, content: str) -> None:
    make(folder, 5)
    (folder / BEST_FILE).write_text(content, encoding="latin-1")
    assert best_path(folder) is None


# ------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize(
    ("keep_last", "kept"), [(1, [50]), (2, [50, 40]), (4, [50, 40, 30, 20]), (9, [50, 40, 30, 20, 10])]
)
def test_the_newest_checkpoints_are_kept(
    folder: Path, log: RunLog, messages: Messages, state: TrainState, keep_last: int, kept: list[int]
) -> None:
    save(checkpointer(folder, log, messages, keep_last=keep_last), state, 10, 20, 30, 40, 50)
    assert steps_in(folder) == kept
    assert all(read_checkpoint(path).step == step for step, path in list_checkpoints(folder))


def test_the_best_is_kept_beside_the_newest_until_there_is_a_better_one(
    folder: Path, log: RunLog, messages: Messages, state: TrainState
) -> None:
    checkpoints = checkpointer(folder, log, messages)
    save(checkpoints, state, 10, best=10)
    save(checkpoints, state, 20, 30, 40)
    assert steps_in(folder) == [40, 30, 10]
    save(checkpoints, state, 50, best=50)
    assert steps_in(folder) == [50, 40]
    save(checkpoints, state, 60, 70)
    assert steps_in(folder) == [70, 60, 50]
    assert sorted(path.name for path in folder.iterdir()) == [
        "best.json",
        "latest.json",
        *(f"step_{step:06d}" for step in (50, 60, 70)),
    ]


def test_pruning_touches_nothing_else(folder: Path) -> None:
    make(folder, 10, 20, 30)
    for name in ("step_000005_damaged", "mine"):
        (folder / name).mkdir()
    prune(folder, 1, None)
    assert sorted(path.name for path in folder.iterdir()) == ["mine", "step_000005_damaged", "step_000030"]
    prune(folder / "nowhere", 1, 10)


@pytest.mark.parametrize(("best", "kept"), [(20, [40, 20]), (10, [40, 10]), (15, [40, 20]), (None, [40]), (40, [40])])
def test_pruning_keeps_the_best_or_the_earlier_best_if_it_was_not_written(
    folder: Path, best: int | None, kept: list[int]
) -> None:
    make(folder, 10, 20, 30, 40)
    (folder / BEST_FILE).write_text('{"step": 20}')
    prune(folder, 1, best)
    assert steps_in(folder) == kept


def test_a_checkpoint_that_cannot_be_deleted_is_no_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stuck(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            raise OSError(16, "Device or resource busy")

    make(folder, 10, 20)
    monkeypatch.setattr("shutil.rmtree", stuck)
    prune(folder, 1, None)
    assert [step for step, _ in list_checkpoints(folder)] == [20]


def test_leftovers_of_a_killed_process_are_removed(folder: Path, log: RunLog, messages: Messages) -> None:
    make(folder, 10)
    for name in (".step_000020.tmp", ".step_000005.old"):
        (folder / name).mkdir()
        (folder / name / WEIGHTS_FILE).write_bytes(b"half")
    (folder / ".base.safetensors.tmp").write_bytes(b"half")
    checkpointer(folder, log, messages)
    assert [path.name for path in folder.iterdir()] == ["step_000010"]
    remove_leftovers(folder / "nowhere")


# ------------------------------------------------------------------------------------- failures


def test_a_failed_write_is_reported_once_and_training_goes_on(
    folder: Path, log: RunLog, messages: Messages, state: TrainState, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = checkpointer(folder, log, messages)
    with monkeypatch.context() as patch:
        patch.setattr(checkpointing, "capture", lambda state: capture_with(state, {"best_step": None, "odd": math.nan}))
        save(checkpoints, state, 1000)
    assert messages == [
        "the checkpoint of step 1,000 was not written: Out of range float values are not JSON compliant: nan; "
        "there is none"
    ]
    save(checkpoints, state, 1010)
    assert steps_in(folder) == [1010]
    assert len(messages) == 1


def capture_with(state: TrainState, facts: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any], Any]:
    return dict(state.model.state_dict()), {}, dict(facts)


def test_a_full_disk_is_reported_and_the_checkpoint_before_it_stays_good(
    small_disk: Path, log: RunLog, messages: Messages, state: TrainState
) -> None:
    folder = small_disk / "checkpoints"
    checkpoints = checkpointer(folder, log, messages)
    for _ in range(2):
        train_step(state)
    checkpoints.save(state)
    checkpoints.wait()
    before = read_checkpoint(folder / "step_000002")
    filler = small_disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 4096)
    train_step(state)
    checkpoints.save(state)
    checkpoints.wait()
    assert messages == ["the checkpoint of step 3 was not written: No space left on device; the newest is of step 2"]
    assert sorted(path.name for path in folder.iterdir()) == ["latest.json", "step_000002"]
    found, _ = newest_good(folder, strict=True, warn=messages)
    assert found is not None
    assert all(torch.equal(found.weights[name], tensor) for name, tensor in before.weights.items())
    filler.unlink()  # there is room again
    train_step(state)
    checkpoints.save(state)
    checkpoints.wait()
    assert steps_in(folder) == [4, 2]
    assert json.loads((folder / LATEST_FILE).read_text())["step"] == 4
    assert len(messages) == 1


def test_a_read_only_folder_is_reported_and_the_checkpoint_before_it_stays_good(
    small_disk: Path, make_read_only: Callable[[], None], log: RunLog, messages: Messages, state: TrainState
) -> None:
    checkpoints = checkpointer(small_disk, log, messages)
    save(checkpoints, state, 10)
    make_read_only()
    save(checkpoints, state, 20, 30)
    assert messages == [
        f"the checkpoint of step {step} was not written: Read-only file system; the newest is of step 10"
        for step in (20, 30)
    ]
    found, _ = newest_good(small_disk, strict=True, warn=messages)
    assert found is not None
    assert found.step == 10


def test_a_checkpoints_folder_that_cannot_be_created_is_reported(
    folder: Path, log: RunLog, messages: Messages, state: TrainState
) -> None:
    folder.parent.mkdir(parents=True)
    folder.write_text("a file in its place")
    save(checkpointer(folder, log, messages), state, 10)
    assert messages == ["the checkpoint of step 10 was not written: File exists; there is none"]


def test_files_that_cannot_grow_are_reported_and_the_checkpoint_before_it_stays_good(
    folder: Path, log: RunLog, messages: Messages, state: TrainState
) -> None:
    train_step(state)
    checkpoints = checkpointer(folder, log, messages)
    save(checkpoints, state, 10)

    def save_another() -> list[str]:
        save(checkpoints, state, 20)
        checkpoints.due(30)
        return [*messages]

    found = in_child(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)), save_another)
    assert found == ["the checkpoint of step 20 was not written: File too large; the newest is of step 10"]
    assert sorted(path.name for path in folder.iterdir()) == ["latest.json", "step_000010"]
    assert read_checkpoint(folder / "step_000010").step == 10


# ------------------------------------------------------------------------------------- which one is read


@pytest.mark.parametrize("strict", [False, True])
def test_the_newest_checkpoint_is_read(folder: Path, messages: Messages, strict: bool) -> None:
    make(folder, 10, 20)
    found, _ = newest_good(folder, strict=strict, warn=messages)
    assert found is not None
    assert (found.step, messages) == (20, [])


@pytest.mark.parametrize("strict", [False, True])
def test_without_checkpoints_there_is_none(folder: Path, messages: Messages, strict: bool) -> None:
    assert newest_good(folder, strict=strict, warn=messages) == (None, [])
    folder.mkdir(parents=True)
    assert newest_good(folder, strict=strict, warn=messages) == (None, [])
    assert messages == []


def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(folder: Path, messages: Messages) -> None:
    _, _, middle, newest = make(folder, 10, 20, 30, 40)
    damage(newest)
    (middle / MANIFEST_FILE).unlink()
    found, _ = newest_good(folder, strict=False, warn=messages)
    assert found is not None
    assert found.step == 20
    assert [message.split(": ")[0] for message in messages] == [f"{newest / WEIGHTS_FILE}", f"{middle / MANIFEST_FILE}"]
    assert all(message.endswith(": trying the checkpoint before it") for message in messages)


def test_strict_refuses_a_damaged_newest_checkpoint(folder: Path, messages: Messages) -> None:
    _, newest = make(folder, 10, 20)
    damage(newest)
    with pytest.raises(CheckpointError, match=r"step_000020/model\.safetensors: damaged"):
        newest_good(folder, strict=True, warn=messages)
    assert messages == []


def test_strict_checks_only_the_newest_checkpoint(folder: Path, messages: Messages) -> None:
    oldest, _ = make(folder, 10, 20)
    damage(oldest)
    found, _ = newest_good(folder, strict=True, warn=messages)
    assert found is not None
    assert found.step == 20


def test_if_all_are_damaged_the_error_names_the_newest(folder: Path, messages: Messages) -> None:
    for path in make(folder, 10, 20):
        damage(path)
    with pytest.raises(CheckpointError) as caught:
        newest_good(folder, strict=False, warn=messages)
    newest = messages[0].removesuffix(": trying the checkpoint before it")
    assert newest.startswith(f"{folder / 'step_000020' / WEIGHTS_FILE}: damaged: ")
    assert str(caught.value) == f"{folder}: no checkpoint can be used; the newest: {newest}"


def test_damaged_checkpoints_are_put_aside_and_no_longer_found(folder: Path) -> None:
    make(folder, 10, 20, 30)
    put_aside([folder / "step_000020", folder / "step_000030"])
    assert steps_in(folder) == [10]
    assert sorted(path.name for path in folder.iterdir()) == [
        "step_000010",
        "step_000020_damaged",
        "step_000030_damaged",
    ]
    make(folder, 20)
    put_aside([folder / "step_000020"])  # replaces the one that was put aside before
    assert steps_in(folder) == [10]


def test_a_run_continues_after_damaged_checkpoints_were_put_aside(
    folder: Path, log: RunLog, messages: Messages, state: TrainState
) -> None:
    save(checkpointer(folder, log, messages), state, 10, 20, best=20)
    damage(folder / "step_000020")
    found, unusable = newest_good(folder, strict=False, warn=messages)
    assert found is not None
    put_aside(unusable)
    assert best_path(folder) is None  # it was damaged
    save(checkpointer(folder, log, messages, saved_step=10), state, 20, 30)
    assert steps_in(folder) == [30, 20]
    assert read_checkpoint(folder / "step_000020").step == 20
    assert (folder / "step_000020_damaged").is_dir()


@pytest.mark.parametrize(("which", "step"), [("latest", 30), ("best", 20), ("10", 10), ("000020", 20)])
def test_a_checkpoint_is_chosen_as_latest_best_or_by_step(
    folder: Path, messages: Messages, which: str, step: int
) -> None:
    make(folder, 10, 20, 30)
    (folder / BEST_FILE).write_text('{"step": 20}')
    assert choose_checkpoint(folder, which, strict=False, warn=messages).step == step
    assert messages == []


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ("15", "a_run has no checkpoint of step 15; there are: 10, 20"),
        ("best", "a_run has no best checkpoint (keep_best was off); there are: 10, 20"),
    ],
)
def test_a_missing_checkpoint_is_refused_with_a_list_of_the_others(
    folder: Path, messages: Messages, which: str, message: str
) -> None:
    make(folder, 20, 10)
    with pytest.raises(CheckpointError) as caught:
        choose_checkpoint(folder, which, strict=False, warn=messages)
    assert str(caught.value) == message


@pytest.mark.parametrize("which", ["latest", "best", "10"])
def test_a_run_without_checkpoints_is_reported(folder: Path, messages: Messages, which: str) -> None:
    with pytest.raises(CheckpointError, match="a_run has no checkpoints"):
        choose_checkpoint(folder, which, strict=False, warn=messages)


def test_a_damaged_choice_is_refused_but_latest_falls_back_to_an_older_one(folder: Path, messages: Messages) -> None:
    _, newest = make(folder, 10, 20)
    (folder / BEST_FILE).write_text('{"step": 20}')
    damage(newest)
    for which in ("best", "20"):
        with pytest.raises(CheckpointError, match=r"step_000020/model\.safetensors: damaged"):
            choose_checkpoint(folder, which, strict=False, warn=messages)
    with pytest.raises(CheckpointError, match=r"step_000020/model\.safetensors: damaged"):
        choose_checkpoint(folder, "latest", strict=True, warn=messages)
    assert messages == []
    assert choose_checkpoint(folder, "latest", strict=False, warn=messages).step == 10
    assert len(messages) == 1


def test_a_checkpoint_in_a_folder_of_another_step_is_skipped(folder: Path, messages: Messages) -> None:
    make(folder, 10, 20)
    (folder / "step_000020").rename(folder / "step_000030")
    problem = f"{folder / 'step_000030'}: it holds the checkpoint of step 20 instead"
    with pytest.raises(CheckpointError, match=f"^{problem}$"):
        choose_checkpoint(folder, "30", strict=False, warn=messages)
    found, unusable = newest_good(folder, strict=False, warn=messages)
    assert found is not None
    assert (found.step, unusable) == (10, [folder / "step_000030"])
    assert messages == [f"{problem}: trying the checkpoint before it"]


def test_a_problem_found_by_the_caller_is_reported_with_the_path(folder: Path) -> None:
    make(folder, 10)
    with pytest.raises(CheckpointError, match=r"the newest: .*step_000010: of another model$"):
        newest_good(folder, strict=False, warn=lambda line: None, problem=lambda checkpoint: "of another model")
    with pytest.raises(CheckpointError, match=r"^[^:]*step_000010: of another model$"):
        newest_good(folder, strict=True, warn=lambda line: None, problem=lambda checkpoint: "of another model")
