"""Safetensors files: the library and this project read each other's, and files that are too short are refused."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from some_tensors import all_kinds, same

from utils.checkpoints.folder import (
    CheckpointError,
)
from utils.checkpoints.tensors import DTYPES, map_tensors, write_tensors


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", all_kinds())
    assert same(load_file(tmp_path / "a.safetensors"), all_kinds())


def test_files_written_by_the_library_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(all_kinds(), path, metadata={"format": "pt"})
    assert same(map_tensors(path), all_kinds())


def test_written_tensors_are_read(tmp_path: Path) -> None:
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


def test_writing_returns_the_size_and_crc32_for_the_manifest(tmp_path: Path) -> None:
    line = write_tensors(tmp_path / "a.safetensors", all_kinds())
    data = (tmp_path / "a.safetensors").read_bytes()
    assert line == {"size": len(data), "crc32": f"{zlib.crc32(data):08x}"}


@pytest.mark.parametrize(
    ("first", "end", "body"),
    [(-4, 0, 4), (-4, 4, 4), (-4, -4, 4), (4, 0, 4), (0, 8, 4), (4, 8, 4), (8, 8, 4), (0, 4, 3), (0, 4, 0)],
)
def test_a_tensor_outside_the_file_is_named(tmp_path: Path, first: int, end: int, body: int) -> None:
    shape = [max(end - first, 0) // 4]  # a valid shape, so that only the offsets are wrong
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [first, end]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(body))
    with pytest.raises(CheckpointError, match=r"not a safetensors file: a lies outside the file$"):
        map_tensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "the header is longer than the file"),
        (b"1234567", "the header is longer than the file"),
        (b"\xff" * 8, "the header is longer than the file"),
        (b"\xff" * 100, "the header is longer than the file"),
        (bytes(8), "Expecting value"),  # an empty header
        (bytes([3]) + bytes(7) + b"{}", "the header is longer than the file"),  # valid JSON, but too short
        (bytes([10]) + bytes(7) + b"{}", "the header is longer than the file"),
    ],
)
def test_a_header_beyond_the_end_of_the_file_is_refused(tmp_path: Path, data: bytes, problem: str) -> None:
    (tmp_path / "a.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=f"not a safetensors file: {problem}"):
        map_tensors(tmp_path / "a.safetensors")


def test_changing_mapped_tensors_does_not_change_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, all_kinds())
    before = path.read_bytes()
    for tensor in map_tensors(path).values():
        tensor.zero_()
    assert path.read_bytes() == before
