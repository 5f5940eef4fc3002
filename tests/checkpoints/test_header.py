"""Headers of safetensors files: read as the library reads them, and refused in one line where they lie."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import save_file

from utils.checkpoints import files
from utils.checkpoints.crc32 import joined
from utils.checkpoints.files import map_tensors, read_tensors
from utils.checkpoints.folder import CheckpointError
from utils.checkpoints.header import HEADER_BYTES, read_header


def write(path: Path, header: Any, body: int = 0, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + bytes(body))
    return path


def entry(first: int, end: int, dtype: Any = "F32", shape: Any = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - first) // 4] if shape is None else shape, "data_offsets": [first, end]}


def test_a_file_of_the_library_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    tensors = {
        "a.weight": torch.arange(6.0).view(2, 3),
        "b": torch.ones(3, dtype=torch.bfloat16),
        "none": torch.zeros(0, 4),
        "one": torch.tensor(True),
        "eight": torch.zeros(5).to(torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "pt") as library:
        assert set(header.tensors) == set(library.keys())
        assert header.metadata == library.metadata()
        for name, found in header.tensors.items():
            assert list(found.shape) == library.get_slice(name).get_shape()
            assert found.dtype == library.get_slice(name).get_dtype()
    read = map_tensors(tmp_path / "a.safetensors")
    assert all(torch.equal(read[name].float(), tensors[name].float()) for name in tensors)


def test_tensors_at_odd_addresses_are_read(tmp_path: Path) -> None:
    header = {"byte": entry(0, 1, "U8", [1]), "number": entry(1, 5)}
    text = json.dumps(header).encode()
    path = write(tmp_path / "a.safetensors", text)
    with path.open("ab") as file:
        file.write(b"\x07" + torch.tensor(2.5).numpy().tobytes())
    assert map_tensors(path)["number"].tolist() == [2.5]


MALICIOUS: dict[str, tuple[Any, int, str]] = {
    "no tensors, but bytes": ({}, 4, "the last 4 bytes of the file belong to no tensor"),
    "bytes after the last": ({"a": entry(0, 4)}, 5, "the last 1 bytes of the file belong to no tensor"),
    "a hole": ({"a": entry(0, 4), "b": entry(8, 12)}, 12, "4 bytes before b belong to no tensor"),
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "b overlaps a"),
    "the same bytes twice": ({"a": entry(0, 4), "b": entry(0, 4)}, 4, "b overlaps a"),
    "beyond the file": ({"a": entry(0, 1 << 40)}, 4, "a lies outside the file"),
    "negative": ({"a": entry(-4, 0, shape=[1])}, 4, "a lies outside the file"),
    "backwards": ({"a": entry(4, 0, shape=[1])}, 4, "a lies outside the file"),
    "offsets that are no numbers": ({"a": {**entry(0, 4), "data_offsets": [0, True]}}, 4, "expected two numbers"),
    "shape beyond its bytes": ({"a": entry(0, 4, shape=[2])}, 4, "F32 of shape (2,) needs 8 bytes, it has 4"),
    "an enormous shape": ({"a": entry(0, 4, shape=[2**62] * 9)}, 4, "a: F32 of shape"),
    "a shape below zero": ({"a": entry(0, 4, shape=[-1, -1])}, 4, "a: shape: expected at most 64 sizes"),
    "a shape of many sizes": ({"a": entry(0, 4, shape=[1] * 65)}, 4, "a: shape: expected at most 64 sizes"),
    "a shape that is no list": ({"a": entry(0, 4, shape={"0": 1})}, 4, "a: shape: expected at most 64 sizes"),
    "an unknown dtype": ({"a": entry(0, 4, "F33")}, 4, "a: unknown dtype 'F33'"),
    "a dtype that is no text": ({"a": entry(0, 4, ["F32"])}, 4, "a: unknown dtype ['F32']"),
    "another key": ({"a": {**entry(0, 4), "code": "import os"}}, 4, "a: expected dtype, shape and data_offsets"),
    "a name twice": (b'{"a": {}, "a": {}}', 0, "a is in the header twice"),
    "a long name twice": (b'{"%s": {}, "%s": {}}' % (b"x" * 5000, b"x" * 5000), 0, "x... (5,000 characters) is in"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, 0, "__metadata__ is not an object of texts"),
    "a list": ([1, 2], 0, "the header is not an object"),
    "nested deeply": (b'{"a":' * 200_000 + b"1" + b"}" * 200_000, 0, "the header is nested too deeply"),
    "many values": (b"[" + b"0," * 5_000_000 + b"0]", 0, "the header has more values than any model needs"),
    "a number of a million digits": (b'{"a": ' + b"9" * 1_000_000 + b"}", 0, "Exceeds the limit"),
    "not UTF-8": (b'{"\xff": 1}', 0, "the header is not UTF-8"),
}


@pytest.mark.parametrize("case", MALICIOUS)
def test_a_header_that_lies_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    header, body, problem = MALICIOUS[case]
    path = write(tmp_path / "a.safetensors", header, body)
    for read in (read_header, map_tensors):
        with pytest.raises(CheckpointError) as refusal:
            read(path)
        assert str(refusal.value).startswith(f"{path}: not a safetensors file: ")
        assert problem in str(refusal.value)
        assert "\n" not in str(refusal.value)
        assert len(str(refusal.value)) < 1000


@pytest.mark.parametrize("length", [HEADER_BYTES + 1, 1 << 40, (1 << 64) - 1])
def test_a_length_that_lies_allocates_nothing(tmp_path: Path, length: int) -> None:
    """Read with 600 MB of address space: a header of 100 MB could be read, one of a terabyte not."""
    path = write(tmp_path / "a.safetensors", b"{}", length=length)
    with path.open("r+b") as file:
        file.truncate(min(length + 8, 1 << 41))  # sparse: the file is as long as it says
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (600 << 20,) * 2)\n"
        "from pathlib import Path\nfrom utils.checkpoints.header import read_header\n"
        "try: read_header(Path(sys.argv[1]))\nexcept ValueError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, text=True, check=True)
    expected = "than the file" if length > 1 << 41 else f"{length:,} bytes, more than the 100,000,000"
    assert expected in result.stdout


def test_tensors_are_read_one_at_a_time_with_the_checksum_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "READ_BYTES", 4096)
    tensors = {
        "parts": torch.randn(3, 1001),  # read by two threads, in several pieces each
        "a": torch.randn(3, 1000),
        "b": torch.randn(7).bfloat16(),
        "none": torch.zeros(0),
        "one": torch.tensor(2),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    crc32 = f"{zlib.crc32((tmp_path / 'a.safetensors').read_bytes()):08x}"
    read = dict(read_tensors(tmp_path / "a.safetensors", crc32=crc32))
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in read.values() if tensor.numel())
    with pytest.raises(CheckpointError, match="damaged: its CRC-32 is"):
        dict(read_tensors(tmp_path / "a.safetensors", crc32="00000000"))
    assert len(dict(read_tensors(tmp_path / "a.safetensors"))) == 5
    with (tmp_path / "a.safetensors").open("r+b") as file:  # in the part of the second thread
        file.seek(-9000, 2)
        file.write(b"?")
    with pytest.raises(CheckpointError, match="damaged: its CRC-32 is"):
        dict(read_tensors(tmp_path / "a.safetensors", crc32=crc32))


def test_torch_load_is_called_in_one_place_only() -> None:
    """Another one could run what is in a file."""
    calls = [
        path.relative_to(ROOT).as_posix()
        for path in [*ROOT.glob("*.py"), *ROOT.glob("utils/**/*.py"), *ROOT.glob("benchmarks/*.py")]
        if re.search(r"\btorch\.load\(|\bpickle\.loads?\(|allow_pickle=True", path.read_text(encoding="utf-8"))
    ]
    assert calls == ["utils/formats/pickles.py"]


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (1, 1), (1000, 4097), (3, 1 << 20)])
def test_the_checksum_of_parts_is_that_of_the_whole(lengths: tuple[int, int]) -> None:
    first, second = (bytes(7 * place % 251 for place in range(length)) for length in lengths)
    assert joined(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)
