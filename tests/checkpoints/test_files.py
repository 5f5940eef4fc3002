"""Checkpoints on disk: the safetensors library reads them, optimizers continue bit for bit, damage is found."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from conftest import in_child
from safetensors.torch import load_file, save_file
from torch import nn

from utils.checkpoints import files as checkpoint
from utils.checkpoints.choose import choose_checkpoint
from utils.checkpoints.files import (
    DTYPES,
    Checkpoint,
    map_tensors,
    read_checkpoint,
    weight_differences,
    write_base,
    write_checkpoint,
    write_tensors,
)
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
from utils.checkpoints.optimizer import flatten_optimizer, restore_optimizer
from utils.errors import UserError, shown

Tensors = dict[str, torch.Tensor]
TOKENIZER = {"type": "char", "version": 1, "vocabulary": ["\n", "ü", "🙂"], "unknown_token": None}
WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([True, False])}
MOMENTS = {"a/exp_avg": torch.linspace(0, 1, 6).reshape(2, 3), "a/step": torch.tensor(7.0)}


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Equal names, types, shapes and bits (NaN and -0.0 included)."""

    def facts(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
        return tensor.dtype, tensor.shape, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    return {name: facts(t) for name, t in one.items()} == {name: facts(t) for name, t in other.items()}


def all_kinds() -> Tensors:
    """Tensors of every type and of odd shapes."""
    values = torch.tensor([[0.0, 1.0, 3.0], [7.0, 100.0, 2.0]])
    tensors = {f"{dtype}": values.to(dtype) for dtype in DTYPES.values()}
    return tensors | {
        "0-dim": torch.tensor(3.5, dtype=torch.float64),
        "0-dim bool": torch.tensor(True),
        "empty": torch.empty(0, dtype=torch.int64),
        "empty rows": torch.empty(3, 0, 2, dtype=torch.bfloat16),
        "one byte": torch.tensor([255], dtype=torch.uint8),
        "special": torch.tensor([math.nan, math.inf, -math.inf, -0.0, 1e-45]),
        "bfloat16 special": torch.tensor([math.nan, math.inf, -0.0], dtype=torch.bfloat16),
        "name/with . and ü": torch.ones(5, dtype=torch.int16),
    }


def write(path: Path, step: int = 10, weights: Mapping[str, torch.Tensor] = WEIGHTS, **facts: Any) -> Path:
    """A small checkpoint at `path`."""
    write_checkpoint(path, weights, MOMENTS, TOKENIZER, {"step": step, **facts})
    return path


def regenerate_manifest(path: Path) -> None:
    """Make the manifest say what the files are now."""
    lines = {name: (path / name).read_bytes() for name in FILES}
    files = {name: {"size": len(data), "crc32": f"{zlib.crc32(data):08x}"} for name, data in lines.items()}
    (path / MANIFEST_FILE).write_text(json.dumps({"format_version": 1, "files": files}))


def refusal(path: Path) -> str:
    """The one line that says why a checkpoint is not read."""
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ------------------------------------------------------------------------------------- safetensors


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", all_kinds())
    assert same(load_file(tmp_path / "a.safetensors"), all_kinds())


def test_files_of_the_library_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(all_kinds(), path, metadata={"format": "pt"})
    assert same(map_tensors(path), all_kinds())


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, all_kinds())
    assert same(map_tensors(path), all_kinds())


def test_a_file_may_hold_no_tensors(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {})
    assert load_file(path) == {}
    assert map_tensors(path) == {}


def test_each_tensor_is_aligned_to_its_item_size(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, all_kinds())
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    for entry in json.loads(data[8 : 8 + length]).values():
        assert (8 + length + entry["data_offsets"][0]) % DTYPES[entry["dtype"]].itemsize == 0


def test_the_entry_in_the_manifest_is_size_and_crc(tmp_path: Path) -> None:
    line = write_tensors(tmp_path / "a.safetensors", all_kinds())
    data = (tmp_path / "a.safetensors").read_bytes()
    assert line == {"size": len(data), "crc32": f"{zlib.crc32(data):08x}"}


@pytest.mark.parametrize("chunk_bytes", [1, 7, 64])
def test_files_do_not_depend_on_the_size_of_a_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_bytes: int
) -> None:
    whole = write(tmp_path / "step_000010")
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", chunk_bytes)
    parts = write(tmp_path / "step_000020")
    for name in (*FILES, MANIFEST_FILE):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()
    assert same(read_checkpoint(parts).weights, WEIGHTS)


@pytest.mark.parametrize(
    ("header", "body"),
    [
        (b"", b""),
        (b"{", b""),
        (b"[]", b""),
        (b"null", b""),
        (b"[" * 100_000, b""),
        (b'"\xff"', b""),
        (b'{"a": 1}', b""),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', b"123"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}', b"1234"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}', b"1234"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', b"1234"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 3]}}', b"1234"),
        (b'{"a": {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}}', b"1234"),
        (b'{"a": {"dtype": "C64", "shape": [1], "data_offsets": [0, 8]}}', b"12345678"),
        (b'{"a": {"shape": [1], "data_offsets": [0, 4]}}', b"1234"),
    ],
    ids=lambda value: value[:70].decode(errors="replace"),
)
def test_a_file_that_is_not_safetensors_is_refused(tmp_path: Path, header: bytes, body: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + body)
    with pytest.raises(CheckpointError, match=r"a\.safetensors: not a safetensors file"):
        map_tensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("first", "end", "body"),
    [(-4, 0, 4), (-4, 4, 4), (-4, -4, 4), (4, 0, 4), (0, 8, 4), (4, 8, 4), (8, 8, 4), (0, 4, 3), (0, 4, 0)],
)
def test_a_tensor_outside_the_file_is_named(tmp_path: Path, first: int, end: int, body: int) -> None:
    shape = [max(end - first, 0) // 4]  # so that nothing else is wrong
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [first, end]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(body))
    with pytest.raises(CheckpointError, match=r"not a safetensors file: a lies outside the file$"):
        map_tensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"1234567", "the header is longer than the file"),
        (bytes(8), "Expecting value"),  # a header of no bytes
        (bytes([3]) + bytes(7) + b"{}", "the header is longer than the file"),  # JSON, but of a byte less
        (bytes([10]) + bytes(7) + b"{}", "the header is longer than the file"),
    ],
)
def test_a_header_beyond_the_end_of_the_file_is_refused(tmp_path: Path, data: bytes, problem: str) -> None:
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=f"not a safetensors file: {problem}"):
        map_tensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize("data", [b"", b"1234567", b"\xff" * 8, b"\xff" * 100])
def test_a_file_without_a_header_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"a\.safetensors: not a safetensors file"):
        map_tensors(tmp_path / "a.safetensors")


def test_writing_to_what_was_read_does_not_change_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, all_kinds())
    before = path.read_bytes()
    for tensor in map_tensors(path).values():
        tensor.zero_()
    assert path.read_bytes() == before


# ------------------------------------------------------------------------------------- a checkpoint


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "step_000010"
    write(path, 10, all_kinds(), text="über", nested={"a": [1, 2.5, None, True]})
    found = read_checkpoint(path)
    assert (found.path, found.step, found.tokenizer) == (path, 10, TOKENIZER)
    assert same(found.weights, all_kinds())
    assert same(found.optimizer_tensors, MOMENTS)
    assert found.state == {"step": 10, "text": "über", "nested": {"a": [1, 2.5, None, True]}}
    assert list(path.parent.iterdir()) == [path]


def test_a_checkpoint_is_safetensors_and_json(tmp_path: Path) -> None:
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


def test_the_manifest_is_written_last_and_beside_the_place(tmp_path: Path) -> None:
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


def test_a_checkpoint_takes_the_place_of_a_damaged_one_and_of_leftovers(tmp_path: Path) -> None:
    path = write(tmp_path / "step_000010", text="old")
    (path / MANIFEST_FILE).unlink()
    leftover = tmp_path / ".step_000010.tmp"
    leftover.mkdir()
    (leftover / "stale").write_text("x")
    write(path, text="new")
    assert read_checkpoint(path).state["text"] == "new"
    assert list(tmp_path.iterdir()) == [path]
    assert not (path / "stale").exists()


def test_checkpoints_are_listed_newest_first_and_strangers_are_not(tmp_path: Path) -> None:
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
    """A checkpoint whose frozen weights lie beside it."""
    path = tmp_path / "step_000010"
    write_checkpoint(path, WEIGHTS, MOMENTS, TOKENIZER, {"step": 10}, base=write_base(tmp_path, FROZEN))
    return path


def test_frozen_weights_lie_once_beside_the_checkpoints_and_are_read_with_them(based: Path) -> None:
    folder, data = based.parent, (based / BASE_FILE).read_bytes()
    entry = {"size": len(data), "crc32": f"{zlib.crc32(data):08x}"}
    assert sorted(path.name for path in folder.iterdir()) == ["base.safetensors", "step_000010"]
    assert same(load_file(folder / "base.safetensors"), FROZEN)
    found = read_checkpoint(based)
    assert same(found.weights, FROZEN | WEIGHTS)  # what was trained wins
    assert found.base == entry
    write_checkpoint(folder / "step_000020", WEIGHTS, MOMENTS, TOKENIZER, {"step": 20}, base=found.base)
    assert read_checkpoint(folder / "step_000020").base == entry
    assert read_checkpoint(write(folder / "step_000030")).base is None
    assert same(read_checkpoint(folder / "step_000030").weights, WEIGHTS)


def test_damage_of_frozen_weights_is_damage_of_the_checkpoint(based: Path) -> None:
    base = based / BASE_FILE
    flip(base, 1.0)
    assert refusal(based).startswith(f"{base}: damaged: its CRC-32 is ")
    base.unlink()
    assert refusal(based) == f"{base}: missing"


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_frozen_weights_that_cannot_be_written_leave_those_before(
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


@pytest.mark.parametrize("place", [0.0, 1.0])
def test_a_flipped_bit_is_found_in_the_manifest(tmp_path: Path, place: float) -> None:
    path = write(tmp_path / "step_000010")
    flip(path / MANIFEST_FILE, place)
    assert refusal(path) == f"{path / MANIFEST_FILE}: damaged"


def test_no_flipped_bit_of_the_manifest_changes_what_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "step_000010")
    good = (path / MANIFEST_FILE).read_bytes()
    refused = 0
    for position in range(len(good)):
        data = bytearray(good)
        data[position] ^= 1 << position % 8
        (path / MANIFEST_FILE).write_bytes(data)
        try:
            found = read_checkpoint(path)
        except CheckpointError:
            refused += 1
        else:
            assert same(found.weights | found.optimizer_tensors, WEIGHTS | MOMENTS)
    assert refused > 0.9 * len(good)  # the rest is the manifest's own version number


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "step_000010")
    (path / name).unlink()
    assert refusal(path) == f"{path / name}: missing"


def test_without_a_manifest_a_checkpoint_is_not_complete(tmp_path: Path) -> None:
    path = write(tmp_path / "step_000010")
    (path / MANIFEST_FILE).unlink()
    assert refusal(path) == f"{path / MANIFEST_FILE}: missing: the checkpoint is not complete"


def test_a_folder_without_checkpoints_is_reported(tmp_path: Path) -> None:
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
def test_a_file_that_is_no_manifest_is_reported(tmp_path: Path, content: str) -> None:
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
        ("{}", "names no step"),
        ('{"step": "10"}', "names no step"),
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
def test_a_file_without_an_object_is_reported(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CheckpointError) as refusal:
        read_object(path)
    assert str(refusal.value) == f"{path}: {message}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest | {"format_version": 2}, "format version 2, this workbench reads 1"),
        (lambda manifest: manifest["files"][WEIGHTS_FILE].update(size="12") or manifest, "damaged"),
        (lambda manifest: manifest["files"][WEIGHTS_FILE].update(size=None) or manifest, "damaged"),
        (lambda manifest: [], "damaged"),
    ],
)
def test_an_unusable_manifest_is_reported(
    tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    path = write(tmp_path / "step_000010")
    manifest = json.loads((path / MANIFEST_FILE).read_text())
    (path / MANIFEST_FILE).write_text(json.dumps(change(manifest)))
    assert refusal(path).startswith(f"{path / MANIFEST_FILE}: {message}")


def test_the_state_of_another_checkpoint_does_not_fit_the_manifest(tmp_path: Path) -> None:
    path, other = write(tmp_path / "step_000010"), write(tmp_path / "step_000020", 20)
    (path / STATE_FILE).write_bytes((other / STATE_FILE).read_bytes())
    assert refusal(path).startswith(f"{path / STATE_FILE}: damaged: its CRC-32 is ")


def test_differences_of_weights_are_named_three_at_a_time() -> None:
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


# ------------------------------------------------------------------------------------- disks that refuse


def with_small_files(limit: int, action: Callable[[], object]) -> Any:
    """What `action` returns or raises in a process whose files cannot grow beyond `limit` bytes."""
    return in_child(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)), action)


@pytest.mark.parametrize("limit", [0, 60, 200, 350, 100_000])
def test_a_file_that_cannot_grow_leaves_earlier_checkpoints(tmp_path: Path, limit: int) -> None:
    good = write(tmp_path / "step_000010")
    large = {"a": torch.zeros(100_000)}
    error = with_small_files(limit, lambda: write(tmp_path / "step_000020", 20, large))
    assert isinstance(error, OSError)
    assert error.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == [good]
    assert same(read_checkpoint(good).weights, WEIGHTS)


def test_a_failure_leaves_a_checkpoint_of_the_same_step_alone(tmp_path: Path) -> None:
    good = write(tmp_path / "step_000010")
    error = with_small_files(60, lambda: write(good, 10, {"a": torch.zeros(100)}))
    assert isinstance(error, OSError)
    assert list(tmp_path.iterdir()) == [good]
    assert same(read_checkpoint(good).weights, WEIGHTS)


def test_a_full_disk_leaves_earlier_checkpoints(small_disk: Path) -> None:
    weights = {"a": torch.randn(80_000)}  # 320 kB: the third has no room
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


def test_a_read_only_folder_leaves_earlier_checkpoints(small_disk: Path, make_read_only: Callable[[], None]) -> None:
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
def test_logs_that_cannot_be_synced_leave_no_checkpoint(tmp_path: Path, error: BaseException) -> None:
    def fail() -> NoReturn:
        raise error

    with pytest.raises(type(error)):
        write_checkpoint(tmp_path / "step_000010", WEIGHTS, MOMENTS, TOKENIZER, {"step": 10}, before_manifest=fail)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, torch.zeros(1), {1}])
def test_a_state_that_is_no_json_is_refused_before_it_can_be_read(tmp_path: Path, value: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        write(tmp_path / "step_000010", value=value)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------- optimizers


class FullPrecisionMomentum(torch.optim.Optimizer):
    """Momentum that keeps what it knows in float32, with a master copy, whatever the type of the weights."""

    def __init__(self, params: Iterable[Any], lr: float) -> None:
        super().__init__(params, {"lr": lr, "name": "all"})

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor]) -> torch.Tensor:  # type: ignore[override]
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["master"], state["momentum"] = p.float(), torch.zeros_like(p, dtype=torch.float32)
                    state["signs"] = torch.zeros_like(p, dtype=torch.int8)
                state["momentum"].mul_(0.9).add_(p.grad.float())
                state["signs"] += p.grad.sign().to(torch.int8)
                state["master"].sub_(group["lr"] * (state["momentum"] + 0.01 * state["signs"]))
                p.copy_(state["master"])
        return loss


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "AdamW fused": lambda m: torch.optim.AdamW(groups_of(m), lr=0.01, betas=(0.8, 0.95), fused=True),
    "AdamW one by one": lambda m: torch.optim.AdamW(groups_of(m), lr=0.01, foreach=False),
    "Adam amsgrad": lambda m: torch.optim.Adam(groups_of(m), lr=0.01, amsgrad=True),
    "Adam with a tensor as rate": lambda m: torch.optim.Adam(m.parameters(), lr=torch.tensor(0.01), foreach=False),
    "Adamax": lambda m: torch.optim.Adamax(groups_of(m), lr=0.01),
    "NAdam": lambda m: torch.optim.NAdam(groups_of(m), lr=0.01),
    "RAdam": lambda m: torch.optim.RAdam(groups_of(m), lr=0.01),
    "SGD": lambda m: torch.optim.SGD(groups_of(m), lr=0.1),
    "SGD momentum": lambda m: torch.optim.SGD(groups_of(m), lr=0.1, momentum=0.9, nesterov=True),
    "RMSprop centered": lambda m: torch.optim.RMSprop(groups_of(m), lr=0.01, momentum=0.9, centered=True),
    "Rprop": lambda m: torch.optim.Rprop(groups_of(m), lr=0.01),
    "ASGD": lambda m: torch.optim.ASGD(groups_of(m), lr=0.1, t0=2),
    "Adagrad": lambda m: torch.optim.Adagrad(groups_of(m), lr=0.1),
    "Adadelta": lambda m: torch.optim.Adadelta(groups_of(m), lr=1.0),
    "Adafactor": lambda m: torch.optim.Adafactor(groups_of(m), lr=0.1),
    "Muon": lambda m: torch.optim.Muon([p for p in m.parameters() if p.dim() == 2], lr=0.01),
    "LBFGS": lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=2, history_size=3),
    "LBFGS with a line search": lambda m: torch.optim.LBFGS(m.parameters(), max_iter=3, line_search_fn="strong_wolfe"),
    "float32 state": lambda m: FullPrecisionMomentum(groups_of(m), lr=0.01),
}


def groups_of(model: nn.Module) -> list[dict[str, Any]]:
    """Vectors first: an order that is not the model's."""
    parameters = list(model.parameters())
    return [{"params": [p for p in parameters if p.dim() < 2]}, {"params": [p for p in parameters if p.dim() == 2]}]


def small_model(dtype: torch.dtype, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def update(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Update `step`: its data and learning rate are functions of the step."""
    generator = torch.Generator().manual_seed(step)
    dtype = next(model.parameters()).dtype
    inputs, targets = torch.randn(8, 4, generator=generator).to(dtype), torch.randn(8, 3, generator=generator).to(dtype)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model(inputs) - targets).square().mean()
        loss.backward()
        return loss

    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(0.01 / (step + 1))
        else:
            group["lr"] *= 0.9
    optimizer.step(closure)


def through_disk(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Checkpoint:
    tensors, structure = flatten_optimizer(model, optimizer)
    write_checkpoint(path, model.state_dict(), tensors, TOKENIZER, {"step": 3, "optimizer": structure})
    return read_checkpoint(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_continues_bit_for_bit(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    model = small_model(dtype)
    optimizer = OPTIMIZERS[name](model)
    for step in range(3):
        update(model, optimizer, step)
    checkpoint = through_disk(tmp_path / "step_000003", model, optimizer)
    assert json.loads(json.dumps(checkpoint.state["optimizer"])) == flatten_optimizer(model, optimizer)[1]

    resumed = small_model(dtype, seed=1)
    again = OPTIMIZERS[name](resumed)
    resumed.load_state_dict(checkpoint.weights)
    restore_optimizer(resumed, again, checkpoint.optimizer_tensors, checkpoint.state["optimizer"])
    assert same(flatten_optimizer(resumed, again)[0], flatten_optimizer(model, optimizer)[0])
    assert flatten_optimizer(resumed, again)[1] == flatten_optimizer(model, optimizer)[1]
    for step in range(3, 7):
        update(model, optimizer, step)
        update(resumed, again, step)
    assert same(resumed.state_dict(), model.state_dict())
    assert same(flatten_optimizer(resumed, again)[0], flatten_optimizer(model, optimizer)[0])
    assert flatten_optimizer(resumed, again)[1] == flatten_optimizer(model, optimizer)[1]
    assert same(read_checkpoint(checkpoint.path).weights, checkpoint.weights)  # training on changed no file


def test_float32_state_of_bfloat16_weights_keeps_its_type(tmp_path: Path) -> None:
    model = small_model(torch.bfloat16)
    optimizer = OPTIMIZERS["float32 state"](model)
    update(model, optimizer, 0)
    tensors = load_file(through_disk(tmp_path / "step_000003", model, optimizer).path / OPTIMIZER_FILE)
    assert tensors["0.weight/master"].dtype == torch.float32
    assert tensors["0.weight/signs"].dtype == torch.int8
    assert not torch.equal(tensors["0.weight/master"], tensors["0.weight/master"].bfloat16().float())


def test_an_optimizer_before_its_first_step_comes_back(tmp_path: Path) -> None:
    model = small_model(torch.float32)
    checkpoint = through_disk(tmp_path / "step_000003", model, OPTIMIZERS["AdamW fused"](model))
    assert checkpoint.optimizer_tensors == {}
    again = OPTIMIZERS["AdamW fused"](model)
    restore_optimizer(model, again, checkpoint.optimizer_tensors, checkpoint.state["optimizer"])
    assert not again.state


def test_parameters_without_a_gradient_need_no_state(tmp_path: Path) -> None:
    def build(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = small_model(torch.float32, seed)
        next(model.parameters()).requires_grad_(False)
        return model, OPTIMIZERS["AdamW fused"](model)

    model, optimizer = build(0)
    update(model, optimizer, 0)
    checkpoint = through_disk(tmp_path / "step_000003", model, optimizer)
    assert not any(name.startswith("0.weight/") for name in checkpoint.optimizer_tensors)
    resumed, again = build(1)
    resumed.load_state_dict(checkpoint.weights)
    restore_optimizer(resumed, again, checkpoint.optimizer_tensors, checkpoint.state["optimizer"])
    update(model, optimizer, 1)
    update(resumed, again, 1)
    assert same(resumed.state_dict(), model.state_dict())


def test_tensors_are_named_by_parameter_and_key() -> None:
    model = small_model(torch.float32)
    optimizer = OPTIMIZERS["AdamW fused"](model)
    update(model, optimizer, 0)
    tensors, structure = flatten_optimizer(model, optimizer)
    names = [name for name, _ in model.named_parameters()]
    assert sorted(tensors) == sorted(f"{name}/{key}" for name in names for key in ("exp_avg", "exp_avg_sq", "step"))
    assert structure["class"] == "AdamW"
    assert [group["params"] for group in structure["groups"]] == [["0.bias", "2.bias"], ["0.weight", "2.weight"]]
    assert structure["groups"][0]["settings"]["betas"] == [0.8, 0.95]
    assert structure["state"]["0.bias"]["step"] == {"tensor": "0.bias/step"}
    assert tensors["0.bias/exp_avg"].data_ptr() == optimizer.state[model[0].bias]["exp_avg"].data_ptr()  # no copy


@pytest.mark.parametrize("keep", [False, True])
def test_settings_are_those_of_the_checkpoint_or_kept(keep: bool) -> None:
    model = small_model(torch.float32)
    optimizer = torch.optim.AdamW(groups_of(model), lr=0.01, betas=(0.8, 0.9), weight_decay=0.5)
    update(model, optimizer, 0)
    tensors, structure = flatten_optimizer(model, optimizer)
    again = torch.optim.AdamW(groups_of(model), lr=0.02, betas=(0.5, 0.6), weight_decay=0.1)
    restore_optimizer(model, again, tensors, structure, keep_settings=keep)
    facts = [(group["lr"], group["betas"], group["weight_decay"]) for group in again.param_groups]
    assert facts == [(0.02, (0.5, 0.6), 0.1) if keep else (0.01 * 0.9, (0.8, 0.9), 0.5)] * 2
    assert same(flatten_optimizer(model, again)[0], tensors)


def test_another_optimizer_or_other_groups_are_refused() -> None:
    model = small_model(torch.float32)
    tensors, structure = flatten_optimizer(model, OPTIMIZERS["AdamW fused"](model))
    with pytest.raises(CheckpointError, match="has the state of AdamW, this run trains with SGD"):
        restore_optimizer(model, OPTIMIZERS["SGD"](model), tensors, structure)
    for other in (torch.optim.AdamW(model.parameters()), torch.optim.AdamW(groups_of(model)[::-1])):
        with pytest.raises(CheckpointError, match="the parameter groups of the optimizer are not those"):
            restore_optimizer(model, other, tensors, structure)


def test_what_a_checkpoint_cannot_hold_is_refused() -> None:
    model = small_model(torch.float32)
    optimizer = OPTIMIZERS["AdamW fused"](model)
    optimizer.state[model[0].bias]["odd"] = object()
    with pytest.raises(ValueError, match=r"the optimizer's 0\.bias/odd is a object, which a checkpoint cannot hold"):
        flatten_optimizer(model, optimizer)
    with pytest.raises(ValueError, match="a parameter that is not the model's"):
        flatten_optimizer(nn.Linear(1, 1), OPTIMIZERS["SGD"](model))


@pytest.mark.parametrize("size", [-1, "7", 1.5, None, [7]])
def test_a_size_that_is_no_number_of_bytes_is_a_damaged_manifest(tmp_path: Path, size: Any) -> None:
    path = write(tmp_path / "step_000010")
    manifest = json.loads((path / MANIFEST_FILE).read_text())
    manifest["files"][FILES[-1]]["size"] = size
    (path / MANIFEST_FILE).write_text(json.dumps(manifest))
    assert refusal(path) == f"{path / MANIFEST_FILE}: damaged"


@pytest.mark.parametrize("which", ["", "\t", "a,b", "-1", "1_0", "१२", "lastest", "9" * 400])
def test_what_names_no_checkpoint_is_one_error(tmp_path: Path, which: str) -> None:
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
def test_a_damaged_pointer_names_nothing(tmp_path: Path, content: str | None, expected: dict[str, Any]) -> None:
    write(tmp_path / "step_000020", 20)
    if content is not None:
        (tmp_path / BEST_FILE).write_text(content, encoding="latin-1")
    assert read_pointer(tmp_path / BEST_FILE) == expected
    assert best_path(tmp_path) == (tmp_path / "step_000020" if expected else None)


@pytest.mark.parametrize("step", [10, "20", None, [20]])
def test_a_pointer_to_no_checkpoint_names_nothing(tmp_path: Path, step: Any) -> None:
    write(tmp_path / "step_000020", 20)
    (tmp_path / BEST_FILE).write_text(json.dumps({"step": step}))
    assert best_path(tmp_path) is None


@pytest.mark.parametrize("name", [TOKENIZER_FILE, STATE_FILE, MANIFEST_FILE, WEIGHTS_FILE])
def test_a_file_that_leads_out_of_the_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "step_000010")
    (path / name).rename(tmp_path / name)
    (path / name).symlink_to(tmp_path / name)
    assert refusal(path) == f"{path / name}: cannot be read: leads out of {path}"
