"""Checkpoints on disk: their files, frozen weights of adapters, every kind of damage, and disks that fail."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from conftest import in_child
from safetensors.torch import load_file
from some_tensors import WEIGHTS, all_kinds, same
from torch import nn

from utils.checkpoints import folder as folders
from utils.checkpoints.choose import choose_checkpoint
from utils.checkpoints.files import read_checkpoint, weight_differences, write_base, write_checkpoint
from utils.checkpoints.folder import (
    BASE_FILE,
    BEST_FILE,
    FILES,
    MANIFEST_FILE,
    OPTIMIZER_FILE,
    STATE_FILE,
    TOKENIZER_FILE,
    WEIGHTS_FILE,
    CheckpointError,
    best_path,
    folder_name,
    list_checkpoints,
    read_object,
    read_pointer,
)
from utils.errors import UserError, shown

TOKENIZER = {"type": "char", "version": 1, "vocabulary": ["\n", "ü", "🙂"], "unknown_token": None}
MOMENTS = {"a/exp_avg": torch.linspace(0, 1, 6).reshape(2, 3), "a/step": torch.tensor(7.0)}


def write(path: Path, step: int = 10, weights: Mapping[str, torch.Tensor] = WEIGHTS, **facts: Any) -> Path:
    """Write a small checkpoint at `path`."""
    write_checkpoint(path, weights, MOMENTS, TOKENIZER, {"step": step, **facts})
    return path


def regenerate_manifest(path: Path) -> None:
    """Rewrite the manifest for the current content of the files."""
    lines = {name: (path / name).read_bytes() for name in FILES}
    files = {name: {"size": len(data), "crc32": f"{zlib.crc32(data):08x}"} for name, data in lines.items()}
    (path / MANIFEST_FILE).write_text(json.dumps({"format_version": 1, "files": files}))


def refusal(path: Path) -> str:
    """The one-line message with which reading the checkpoint fails."""
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ------------------------------------------------------------------------------------- safetensors


def test_a_checkpoint_is_read_as_it_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "step_000010"
    write(path, 10, all_kinds(), text="über", nested={"a": [1, 2.5, None, True]})
    found = read_checkpoint(path)
    assert (found.path, found.step, found.tokenizer) == (path, 10, TOKENIZER)
    assert same(found.weights, all_kinds())
    assert same(found.optimizer_tensors, MOMENTS)
    assert found.state == {"step": 10, "text": "über", "nested": {"a": [1, 2.5, None, True]}}
    assert list(path.parent.iterdir()) == [path]


def test_a_checkpoint_consists_of_safetensors_json_and_a_manifest(tmp_path: Path) -> None:
    path = write(tmp_path / "step_000010")
    assert sorted(file.name for file in path.iterdir()) == sorted([*FILES, MANIFEST_FILE])
    assert same(load_file(path / WEIGHTS_FILE), WEIGHTS)
    assert same(load_file(path / OPTIMIZER_FILE), MOMENTS)
    assert json.loads((path / TOKENIZER_FILE).read_text(encoding="utf-8")) == TOKENIZER
    assert json.loads((path / STATE_FILE).read_text(encoding="utf-8"))["step"] == 10
    files = json.loads((path / MANIFEST_FILE).read_text())["files"]
    sizes = {name: (path / name).stat().st_size for name in FILES}
    assert {name: line["size"] for name, line in files.items()} == sizes
    checksums = {name: f"{zlib.crc32((path / name).read_bytes()):08x}" for name in FILES}
    assert {name: line["crc32"] for name, line in files.items()} == checksums


@pytest.mark.parametrize("chunk_bytes", [1, 7, 64])
def test_files_do_not_depend_on_the_size_of_a_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    whole = write(tmp_path / "step_000010")
    monkeypatch.setattr(folders, "CHUNK_BYTES", chunk_bytes)
    parts = write(tmp_path / "step_000020")
    for name in (*FILES, MANIFEST_FILE):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()
    assert same(read_checkpoint(parts).weights, WEIGHTS)


def test_a_checkpoint_is_written_to_a_temporary_folder_and_its_manifest_last(tmp_path: Path) -> None:
    path = tmp_path / "step_000010"
    seen: list[tuple[str, list[str]]] = []

    def look() -> None:
        (temporary,) = tmp_path.iterdir()
        seen.append((temporary.name, sorted(file.name for file in temporary.iterdir())))

    write_checkpoint(path, WEIGHTS, MOMENTS, TOKENIZER, {"step": 10}, before_manifest=look)
    assert seen == [(".step_000010.tmp", sorted(FILES))]
    assert list_checkpoints(tmp_path) == [(10, path)]


def test_every_file_and_both_folders_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def note(handle: int) -> None:
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", note)
    write(tmp_path / "step_000010")
    assert sorted(synced[:4]) == sorted(FILES)
    assert synced[4:] == [MANIFEST_FILE, ".step_000010.tmp", tmp_path.name]


def test_a_checkpoint_replaces_a_damaged_one_and_leftovers(tmp_path: Path) -> None:
    path = write(tmp_path / "step_000010", text="old")
    (path / MANIFEST_FILE).unlink()
    leftover = tmp_path / ".step_000010.tmp"
    leftover.mkdir()
    (leftover / "stale").write_text("x")
    write(path, text="new")
    assert read_checkpoint(path).state["text"] == "new"
    assert list(tmp_path.iterdir()) == [path]
    assert not (path / "stale").exists()


def test_checkpoints_are_listed_newest_first_and_other_entries_ignored(tmp_path: Path) -> None:
    for name in (
        "step_000009",
        "step_000100",
        "step_1000000",
        "step_000020_damaged",
        "step_10",
        "step_x",
        ".step_000030.tmp",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "step_000050").write_text("a file")
    (tmp_path / "latest.json").write_text("{}")
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1_000_000, 100, 9]
    assert [path.name for _, path in list_checkpoints(tmp_path)] == [folder_name(s) for s in (1_000_000, 100, 9)]
    assert list_checkpoints(tmp_path / "nowhere") == []


# ------------------------------------------------------------------------------------- frozen weights of adapters

FROZEN = {"frozen": torch.arange(4.0), "a": torch.zeros(2, 3)}


@pytest.fixture
def based(tmp_path: Path) -> Path:
    """A checkpoint whose frozen weights are in a file beside it."""
    path = tmp_path / "step_000010"
    write_checkpoint(path, WEIGHTS, MOMENTS, TOKENIZER, {"step": 10}, base=write_base(tmp_path, FROZEN))
    return path


def test_frozen_weights_are_stored_once_and_read_with_each_checkpoint(based: Path) -> None:
    folder, data = based.parent, (based / BASE_FILE).read_bytes()
    entry = {"size": len(data), "crc32": f"{zlib.crc32(data):08x}"}
    assert sorted(path.name for path in folder.iterdir()) == ["base.safetensors", "step_000010"]
    assert same(load_file(folder / "base.safetensors"), FROZEN)
    found = read_checkpoint(based)
    assert same(found.weights, FROZEN | WEIGHTS)  # trained weights take precedence
    assert found.base == entry
    write_checkpoint(folder / "step_000020", WEIGHTS, MOMENTS, TOKENIZER, {"step": 20}, base=found.base)
    assert read_checkpoint(folder / "step_000020").base == entry
    assert read_checkpoint(write(folder / "step_000030")).base is None
    assert same(read_checkpoint(folder / "step_000030").weights, WEIGHTS)


def test_damaged_frozen_weights_make_the_checkpoint_damaged(based: Path) -> None:
    base = based / BASE_FILE
    flip(base, 1.0)
    assert refusal(based).startswith(f"{base}: damaged: its CRC-32 is ")
    base.unlink()
    assert refusal(based) == f"{base}: missing"


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_of_frozen_weights_keeps_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    write_base(tmp_path, FROZEN)

    def fail(*_arguments: object) -> NoReturn:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(*((os, "fsync") if failing == "fsync" else (Path, "replace")), fail)
    with pytest.raises(OSError, match="Input/output error"):
        write_base(tmp_path, WEIGHTS)
    assert [path.name for path in tmp_path.iterdir()] == ["base.safetensors"]
    assert same(load_file(tmp_path / "base.safetensors"), FROZEN)


def test_frozen_weights_and_their_folder_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))))
    write_base(tmp_path, FROZEN)
    assert synced == [".base.safetensors.tmp", tmp_path.name]


# ------------------------------------------------------------------------------------- damage


def flip(path: Path, place: float) -> None:
    """Change one bit of the byte at `place` (0 first, 1 last)."""
    data = bytearray(path.read_bytes())
    data[round(place * (len(data) - 1))] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0.0, 0.5, 1.0])
def test_a_flipped_bit_is_found_in_every_file(tmp_path: Path, name: str, place: float) -> None:
    path = write(tmp_path / "step_000010")
    flip(path / name, place)
    message = refusal(path)
    assert message.startswith(f"{path / name}: damaged: its CRC-32 is ")
    assert issubclass(CheckpointError, UserError)


def test_a_flipped_bit_is_found_in_every_byte_of_the_manifest(tmp_path: Path) -> None:
    path = write(tmp_path / "step_000010")
    good = (path / MANIFEST_FILE).read_bytes()
    for position in range(len(good)):
        data = bytearray(good)
        data[position] ^= 1 << position % 8
        (path / MANIFEST_FILE).write_bytes(data)
        assert refusal(path).startswith(f"{path}/")  # a damaged manifest, or a file that does not fit it


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "step_000010")
    (path / name).unlink()
    assert refusal(path) == f"{path / name}: missing"


def test_a_checkpoint_without_a_manifest_is_not_complete(tmp_path: Path) -> None:
    path = write(tmp_path / "step_000010")
    (path / MANIFEST_FILE).unlink()
    assert refusal(path) == f"{path / MANIFEST_FILE}: missing: the checkpoint is not complete"


def test_a_missing_checkpoint_is_reported(tmp_path: Path) -> None:
    assert refusal(tmp_path / "step_000010") == f"{tmp_path / 'step_000010'}: no such checkpoint"
    (tmp_path / "step_000020").write_text("")
    assert refusal(tmp_path / "step_000020") == f"{tmp_path / 'step_000020'}: no such checkpoint"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("change", [-1, -8, 1])
def test_a_file_of_another_length_is_named(tmp_path: Path, name: str, change: int) -> None:
    path = write(tmp_path / "step_000010")
    data = (path / name).read_bytes()
    (path / name).write_bytes(data[:change] if change < 0 else data + b"\0" * change)
    expected = f"{path / name}: damaged: {len(data) + change:,} bytes, the manifest says {len(data):,}"
    assert refusal(path) == expected


@pytest.mark.parametrize("name", [*FILES, MANIFEST_FILE])
def test_an_empty_file_is_named(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "step_000010")
    (path / name).write_bytes(b"")
    assert refusal(path).startswith(f"{path / name}: damaged")


@pytest.mark.parametrize("name", [*FILES, MANIFEST_FILE])
def test_a_folder_in_place_of_a_file_is_named(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "step_000010")
    (path / name).unlink()
    (path / name).mkdir()
    assert refusal(path) == f"{path / name}: cannot be read: Is a directory"


@pytest.mark.parametrize(
    "content", ["[]", "null", "{}", '{"files": []}', '{"files": {"model.safetensors": 1}}', "\xff"]
)
def test_a_file_that_is_not_a_manifest_is_reported(tmp_path: Path, content: str) -> None:
    path = write(tmp_path / "step_000010")
    (path / MANIFEST_FILE).write_text(content, encoding="latin-1")
    assert refusal(path) == f"{path / MANIFEST_FILE}: damaged"


@pytest.mark.parametrize("name", [WEIGHTS_FILE, OPTIMIZER_FILE])
@pytest.mark.parametrize("length", [0, 4, 8, 20])
def test_a_truncated_safetensors_header_is_reported_whatever_the_manifest_says(
    tmp_path: Path, name: str, length: int
) -> None:
    path = write(tmp_path / "step_000010")
    (path / name).write_bytes((path / name).read_bytes()[:length])
    assert refusal(path).startswith(f"{path / name}: damaged: {length} bytes")
    regenerate_manifest(path)
    if length == 0:
        assert refusal(path) == f"{path / name}: not a safetensors file: the header is longer than the file"
    else:
        assert refusal(path).startswith(f"{path / name}: not a safetensors file: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "expected an object, got a list"),
        ("\xff", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("{}", "has no step"),
        ('{"step": "10"}', "has no step"),
    ],
)
def test_an_unusable_state_is_reported(tmp_path: Path, content: str, message: str) -> None:
    path = write(tmp_path / "step_000010")
    (path / STATE_FILE).write_text(content, encoding="latin-1")
    regenerate_manifest(path)
    assert refusal(path).startswith(f"{path / STATE_FILE}: {message}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("[" * 100_000, "not JSON: nested too deeply"),
        ("7", "expected an object, got a int"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_a_json_file_without_an_object_is_reported(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CheckpointError) as refusal:
        read_object(path)
    assert str(refusal.value) == f"{path}: {message}"


def test_a_manifest_of_another_format_version_is_reported(tmp_path: Path) -> None:
    path = write(tmp_path / "step_000010")
    manifest = json.loads((path / MANIFEST_FILE).read_text())
    (path / MANIFEST_FILE).write_text(json.dumps({**manifest, "format_version": 2}))
    assert refusal(path).startswith(f"{path / MANIFEST_FILE}: format version 2, this workbench reads 1")


def test_the_state_of_another_checkpoint_does_not_fit_the_manifest(tmp_path: Path) -> None:
    path, other = write(tmp_path / "step_000010"), write(tmp_path / "step_000020", 20)
    (path / STATE_FILE).write_bytes((other / STATE_FILE).read_bytes())
    assert refusal(path).startswith(f"{path / STATE_FILE}: damaged: its CRC-32 is ")


def test_at_most_three_differences_of_weights_are_named() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert weight_differences(weights, model) == ""
    weights["0.bias"] = torch.zeros(4)
    assert weight_differences(weights, model) == "0.bias has shape (4,), expected (3,)"
    del weights["1.bias"]
    weights["extra"] = torch.zeros(1)
    assert weight_differences(weights, model) == (
        "1.bias is missing; extra is unexpected; 0.bias has shape (4,), expected (3,)"
    )
    assert weight_differences({}, model) == ("0.weight is missing; 0.bias is missing; 1.weight is missing (and 1 more)")


# ------------------------------------------------------------------------------------- writes that fail


def with_small_files(limit: int, action: Callable[[], object]) -> Any:
    """What `action` returns or raises in a process whose files cannot grow beyond `limit` bytes."""
    return in_child(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)), action)


@pytest.mark.parametrize("limit", [0, 60, 200, 350, 100_000])
def test_a_failed_write_keeps_earlier_checkpoints(tmp_path: Path, limit: int) -> None:
    good = write(tmp_path / "step_000010")
    large = {"a": torch.zeros(100_000)}
    error = with_small_files(limit, lambda: write(tmp_path / "step_000020", 20, large))
    assert isinstance(error, OSError)
    assert error.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == [good]
    assert same(read_checkpoint(good).weights, WEIGHTS)


def test_a_failed_write_keeps_an_earlier_checkpoint_of_the_same_step(tmp_path: Path) -> None:
    good = write(tmp_path / "step_000010")
    error = with_small_files(60, lambda: write(good, 10, {"a": torch.zeros(100)}))
    assert isinstance(error, OSError)
    assert list(tmp_path.iterdir()) == [good]
    assert same(read_checkpoint(good).weights, WEIGHTS)


def test_a_full_disk_keeps_earlier_checkpoints(small_disk: Path) -> None:
    weights = {"a": torch.randn(80_000)}  # 320 kB, so that the third checkpoint does not fit
    write(small_disk / "step_000010", 10, weights)
    write(small_disk / "step_000020", 20, weights)
    free = os.statvfs(small_disk).f_bavail
    for _ in range(2):
        with pytest.raises(OSError, match="No space left on device"):
            write(small_disk / "step_000030", 30, {**weights, "b": torch.randn(80_000)})
        assert sorted(path.name for path in small_disk.iterdir()) == ["step_000010", "step_000020"]
        assert os.statvfs(small_disk).f_bavail == free
    for step, path in list_checkpoints(small_disk):
        assert read_checkpoint(path).step == step
        assert same(read_checkpoint(path).weights, weights)


def test_a_read_only_disk_keeps_earlier_checkpoints(small_disk: Path, make_read_only: Callable[[], None]) -> None:
    good = write(small_disk / "step_000010")
    make_read_only()
    for path in (small_disk / "step_000020", good):
        with pytest.raises(OSError, match="Read-only file system"):
            write(path, 20)
    assert list(small_disk.iterdir()) == [good]
    assert same(read_checkpoint(good).weights, WEIGHTS)


@pytest.mark.parametrize("step", ["fsync", "rename"])
def test_a_failure_at_any_step_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fail(*_arguments: object) -> NoReturn:
        raise OSError(errno.EIO, "Input/output error")

    good = write(tmp_path / "step_000010")
    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (Path, "rename")), fail)
    with pytest.raises(OSError, match="Input/output error"):
        write(tmp_path / "step_000020", 20)
    assert list(tmp_path.iterdir()) == [good]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_if_the_logs_cannot_be_synced_no_checkpoint_is_left(tmp_path: Path, error: BaseException) -> None:
    def fail() -> NoReturn:
        raise error

    with pytest.raises(type(error)):
        write_checkpoint(tmp_path / "step_000010", WEIGHTS, MOMENTS, TOKENIZER, {"step": 10}, before_manifest=fail)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, torch.zeros(1), {1}])
def test_a_state_that_is_not_json_leaves_no_checkpoint(tmp_path: Path, value: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        write(tmp_path / "step_000010", value=value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [-1, "7", 1.5, None, [7]])
def test_a_manifest_with_an_invalid_size_is_damaged(tmp_path: Path, size: Any) -> None:
    path = write(tmp_path / "step_000010")
    manifest = json.loads((path / MANIFEST_FILE).read_text())
    manifest["files"][FILES[-1]]["size"] = size
    (path / MANIFEST_FILE).write_text(json.dumps(manifest))
    assert refusal(path) == f"{path / MANIFEST_FILE}: damaged"


@pytest.mark.parametrize("which", ["", "\t", "a,b", "-1", "1_0", "१२", "lastest", "9" * 400])
def test_text_that_names_no_checkpoint_is_reported(tmp_path: Path, which: str) -> None:
    with pytest.raises(CheckpointError) as refusal:
        choose_checkpoint(tmp_path, which, strict=False, warn=lambda line: None)
    hint = "; did you mean latest?" if which == "lastest" else ""
    assert str(refusal.value) == f"checkpoint {shown(which)}: expected latest, best or a step{hint}"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{"step": 20}', {"step": 20}),
        ("[]", {}),
        ("20", {}),
        ("{", {}),
        ("[" * 100_000, {}),
        ("\xff", {}),
        (None, {}),
    ],
)
def test_a_damaged_pointer_points_to_no_checkpoint(
    tmp_path: Path, content: str | None, expected: dict[str, Any]
) -> None:
    write(tmp_path / "step_000020", 20)
    if content is not None:
        (tmp_path / BEST_FILE).write_text(content, encoding="latin-1")
    assert read_pointer(tmp_path / BEST_FILE) == expected
    assert best_path(tmp_path) == (tmp_path / "step_000020" if expected else None)


@pytest.mark.parametrize("step", [10, "20", None, [20]])
def test_a_pointer_to_a_missing_checkpoint_points_to_none(tmp_path: Path, step: Any) -> None:
    write(tmp_path / "step_000020", 20)
    (tmp_path / BEST_FILE).write_text(json.dumps({"step": step}))
    assert best_path(tmp_path) is None


@pytest.mark.parametrize("name", [TOKENIZER_FILE, STATE_FILE, MANIFEST_FILE, WEIGHTS_FILE])
def test_a_link_out_of_the_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "step_000010")
    (path / name).rename(tmp_path / name)
    (path / name).symlink_to(tmp_path / name)
    assert refusal(path) == f"{path / name}: cannot be read: leads out of {path}"
