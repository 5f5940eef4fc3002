"""Headers of safetensors files: they are read as the library reads them, and invalid ones are refused in one line."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import save_file

from utils import crc32 as crc32_module
from utils.checkpoints import header as header_module
from utils.checkpoints import tensors as reading
from utils.checkpoints.folder import CheckpointError
from utils.checkpoints.header import HEADER_BYTES, TensorEntry, read_header, tensors_sha256
from utils.checkpoints.tensors import map_entries, map_tensors, open_tensors, write_tensors
from utils.crc32 import joined, part_crc32
from utils.errors import cut, shown


def write(path: Path, header: Any, body: int = 0, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + bytes(body))
    return path


def entry(first: int, end: int, dtype: Any = "F32", shape: Any = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - first) // 4] if shape is None else shape, "data_offsets": [first, end]}


def test_a_header_written_by_the_library_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
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


SIZES, OFFSETS = "a: shape: expected at most 64 sizes, got", "a: data_offsets: expected two numbers, got"
LONG = cut("x" * 5000, 200)
DIGITS = (
    "Exceeds the limit (4300 digits) for integer string conversion: value has 1000000 digits; "
    "use sys.set_int_max_str_digits() to increase the limit"
)
MALICIOUS: dict[str, tuple[Any, int, str]] = {
    "no tensors, but bytes": ({}, 4, "the last 4 bytes of the file belong to no tensor"),
    "bytes after the last": ({"a": entry(0, 4)}, 5, "the last 1 bytes of the file belong to no tensor"),
    "a hole": ({"a": entry(0, 4), "b": entry(8, 12)}, 12, "4 bytes before b belong to no tensor"),
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "b overlaps a"),
    "the same bytes twice": ({"a": entry(0, 4), "b": entry(0, 4)}, 4, "b overlaps a"),
    "beyond the file": ({"a": entry(0, 1 << 40)}, 4, "a lies outside the file"),
    "negative": ({"a": entry(-4, 0, shape=[1])}, 4, "a lies outside the file"),
    "backwards": ({"a": entry(4, 0, shape=[1])}, 4, "a lies outside the file"),
    "offsets that are not numbers": ({"a": {**entry(0, 4), "data_offsets": [0, True]}}, 4, f"{OFFSETS} [0, True]"),
    "shape beyond its bytes": ({"a": entry(0, 4, shape=[2])}, 4, "a: F32 of shape (2,) needs 8 bytes, it has 4"),
    "half a byte": ({"a": entry(0, 4, "F4", [9])}, 4, "a: F4 of shape (9,) needs 5 bytes, it has 4"),
    "an enormous shape": (
        {"a": entry(0, 4, shape=[2**62] * 9)},
        4,
        f"a: F32 of shape {shown((2**62,) * 9)} needs {2**560} bytes, it has 4",
    ),
    "a size below zero": ({"a": entry(0, 4, shape=[-1])}, 4, f"{SIZES} [-1]"),
    "a size beyond 63 bits": ({"a": entry(0, 4, shape=[2**63])}, 4, f"{SIZES} [{2**63}]"),
    "a size that is not a number": ({"a": entry(0, 4, shape=[True])}, 4, f"{SIZES} [True]"),
    "a shape of many sizes": ({"a": entry(0, 4, shape=[1] * 65)}, 4, f"{SIZES} {shown([1] * 65)}"),
    "a shape that is not a list": ({"a": entry(0, 4, shape={"0": 1})}, 4, f"{SIZES} {{'0': 1}}"),
    "three offsets": ({"a": {**entry(0, 4), "data_offsets": [0, 4, 4]}}, 4, f"{OFFSETS} [0, 4, 4]"),
    "offsets that are not a list": ({"a": {**entry(0, 4), "data_offsets": "04"}}, 4, f"{OFFSETS} '04'"),
    "an empty shape beyond all memory": (
        {"a": {"dtype": "F32", "shape": [0, 2**63 - 1, 2**62], "data_offsets": [0, 0]}},
        0,
        f"a: shape {[0, 2**63 - 1, 2**62]}: too large, even for an empty tensor",
    ),
    "an unknown dtype": ({"a": entry(0, 4, "F33")}, 4, "a: unknown dtype 'F33'"),
    "a dtype that is not text": ({"a": entry(0, 4, ["F32"])}, 4, "a: unknown dtype ['F32']"),
    "an unknown key": ({"a": {**entry(0, 4), "code": "import os"}}, 4, "a: expected dtype, shape and data_offsets"),
    "a name twice": (b'{"a": {}, "a": {}}', 0, "a is in the header twice"),
    "a long name twice": (b'{"%s": {}, "%s": {}}' % (b"x" * 5000, b"x" * 5000), 0, f"{LONG} is in the header twice"),
    "a name twice among others": (b'{"b": {}, "a": {}, "c": {}, "a": {}, "b": {}}', 0, "a is in the header twice"),
    "long names": (
        {"x" * 5000: entry(0, 4), "y" * 5000: entry(0, 4)},
        4,
        f"{LONG.replace('x', 'y')} overlaps {LONG}",
    ),
    "a long name after a hole": (
        {"x" * 5000: entry(1234, 1238)},
        1238,
        f"1,234 bytes before {LONG} belong to no tensor",
    ),
    "thousands of extra bytes": ({"a": entry(0, 4)}, 5004, "the last 5,000 bytes of the file belong to no tensor"),
    "an entry that is not an object": ({"a": 1}, 0, "a: expected dtype, shape and data_offsets"),
    "an entry without dtype": (
        {"a": {"shape": [1], "data_offsets": [0, 4]}},
        4,
        "a: expected dtype, shape and data_offsets",
    ),
    "a file that is too short": ({"a": entry(0, 4)}, 3, "a lies outside the file"),
    "too few bytes for the shape": ({"a": entry(0, 3, shape=[1])}, 3, "a: F32 of shape (1,) needs 4 bytes, it has 3"),
    "metadata that is not an object": ({"__metadata__": ["a"]}, 0, "__metadata__ is not an object of texts"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, 0, "__metadata__ is not an object of texts"),
    "a list": ([1, 2], 0, "the header is not an object"),
    "null": (None, 0, "the header is not an object"),
    "nested deeply": (b'{"a":' * 200_000 + b"1" + b"}" * 200_000, 0, "the header is nested too deeply"),
    "many values": (b"[" + b"0," * 5_000_000 + b"0]", 0, "the header has more values than any model needs"),
    "a number of a million digits": (b'{"a": ' + b"9" * 1_000_000 + b"}", 0, DIGITS),
    "not JSON": (b'{"a": }', 0, "Expecting value: char 6 of the header"),
    "not UTF-8": (b'{"\xff": 1}', 0, "the header is not UTF-8"),
}


@pytest.mark.parametrize("case", MALICIOUS)
def test_an_invalid_header_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    header, body, problem = MALICIOUS[case]
    path = write(tmp_path / "a.safetensors", header, body)
    for read in (read_header, map_tensors):
        with pytest.raises(CheckpointError) as refusal:
            read(path)
        assert str(refusal.value) == f"{path}: not a safetensors file: {problem}"
    assert "\n" not in problem
    assert len(problem) < 1000


def test_headers_are_read_up_to_the_limits_of_the_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = {
        "b": entry(0, 4, shape=[1] * 64),
        "a": entry(4, 4, shape=[2**63 - 1, 0]),
        "packed": entry(4, 7, "F6_E2M3", [2, 2]),
        "c": entry(7, 8, "F4", [2]),
    }
    path = write(tmp_path / "a.safetensors", {**tensors, "__metadata__": {}}, 8)
    start = path.stat().st_size - 8
    values = sum(path.read_bytes()[8:start].count(mark) for mark in (b",", b"[", b"{"))
    monkeypatch.setattr(header_module, "HEADER_BYTES", start - 8)
    monkeypatch.setattr(header_module, "HEADER_VALUES", values)
    header = read_header(path)
    assert list(header.tensors) == ["b", "a", "packed", "c"]  # in the order of their offsets
    assert [found.elements for found in header.tensors.values()] == [1, 0, 4, 2]
    assert [found.bytes for found in header.tensors.values()] == [4, 0, 3, 1]
    assert [found.begin - start for found in header.tensors.values()] == [0, 4, 4, 7]
    assert header.metadata == {}

    monkeypatch.setattr(header_module, "HEADER_VALUES", values - 1)
    with pytest.raises(CheckpointError, match=r"the header has more values than any model needs$"):
        read_header(path)
    monkeypatch.setattr(header_module, "HEADER_BYTES", 99)
    with pytest.raises(CheckpointError, match=f"the header has {start - 8} bytes, more than the 99 that the format "):
        read_header(path)


def read_tensors(path: Path, expected: str) -> dict[str, torch.Tensor]:
    with open_tensors(path, expected) as tensors:
        return tensors


def test_a_link_that_leads_elsewhere_is_followed_only_if_the_user_named_it(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    path, link = tmp_path / "a.safetensors", tmp_path / "run" / "a.safetensors"
    save_file({"a": torch.tensor([1.0])}, path)
    link.symlink_to(path)
    with pytest.raises(CheckpointError, match=f"^{link}: cannot be read: leads out of {link.parent}$"):
        read_tensors(link, "")
    readers: list[Callable[..., Any]] = [read_header, map_tensors]
    for read in readers:
        with pytest.raises(CheckpointError, match=f"^{link}: cannot be read: leads out of {link.parent}$"):
            read(link)
        assert read(link, named=True) == read(path)
        with pytest.raises(CheckpointError, match=f"^{tmp_path / 'none'}: cannot be read: No such file or directory$"):
            read(tmp_path / "none", named=True)


def test_entries_map_tensors_at_given_offsets_of_a_file(tmp_path: Path) -> None:
    path, link = tmp_path / "a.bin", tmp_path / "b" / "a.bin"
    path.write_bytes(b"head" + torch.arange(6.0).numpy().tobytes())
    link.parent.mkdir()
    link.symlink_to(path)
    places = {"a": TensorEntry("F32", (2, 2), 12, 28), "b": TensorEntry("F32", (2,), 4, 12)}
    found = map_entries(link, places)
    assert {name: tensor.tolist() for name, tensor in found.items()} == {"a": [[2.0, 3.0], [4.0, 5.0]], "b": [0.0, 1.0]}
    with pytest.raises(CheckpointError, match=f"^{path}: .*buffer"):
        map_entries(path, {"a": TensorEntry("F32", (3, 2), 12, 36)})
    with pytest.raises(CheckpointError, match=f"^{path}: x: dtype C64 is not supported$"):
        map_entries(path, {"x": TensorEntry("C64", (1,), 0, 8)})
    with pytest.raises(CheckpointError, match=f"^{tmp_path / 'none'}: cannot be read: No such file or directory$"):
        map_entries(tmp_path / "none", places)


@pytest.mark.parametrize("length", [HEADER_BYTES + 1, 1 << 40, (1 << 64) - 1])
def test_a_false_header_length_allocates_no_memory(tmp_path: Path, length: int) -> None:
    """Reads with 600 MB of address space, which is enough for a header of 100 MB but not of a terabyte."""
    path = write(tmp_path / "a.safetensors", b"{}", length=length)
    with path.open("r+b") as file:
        file.truncate(min(length + 8, 1 << 41))  # a sparse file of the claimed length
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (600 << 20,) * 2)\n"
        "from pathlib import Path\nfrom utils.checkpoints.header import read_header\n"
        "try: read_header(Path(sys.argv[1]))\nexcept ValueError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, text=True, check=True)
    expected = "than the file" if length > 1 << 41 else f"{length:,} bytes, more than the 100,000,000"
    assert expected in result.stdout


def test_tensors_are_mapped_while_the_file_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "PART_BYTES", 10_000)
    monkeypatch.setattr(crc32_module, "READ_BYTES", 4096)
    path = tmp_path / "a.safetensors"
    tensors = {
        "parts": torch.randn(3, 1001),
        "a": torch.randn(3, 1000),
        "b": torch.randn(7).bfloat16(),
        "none": torch.zeros(0),
        "one": torch.tensor(2),
    }
    for write_file in (functools.partial(save_file, filename=path), functools.partial(write_tensors, path)):
        write_file(tensors)
        crc32 = f"{zlib.crc32(path.read_bytes()):08x}"
        read = read_tensors(path, crc32)
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[name], tensors[name]) for name in tensors)
        assert all(tensor.data_ptr() % 64 == 0 for tensor in read.values() if tensor.numel())
        with pytest.raises(CheckpointError, match="damaged: its CRC-32 is"):
            read_tensors(path, "00000000")
        read["a"].zero_()
        with path.open("r+b") as file:  # `zero_` has not changed the file
            file.seek(-9000, 2)
            file.write(b"?")
        with pytest.raises(CheckpointError, match="damaged: its CRC-32 is"):
            read_tensors(path, crc32)


def test_written_tensors_begin_at_multiples_of_64_bytes(tmp_path: Path) -> None:
    for name in ("a", "a" * 60):
        write_tensors(tmp_path / "a.safetensors", {name: torch.zeros(3)}, {"format": "pt"})
        assert read_header(tmp_path / "a.safetensors").tensors[name].begin % 64 == 0


@pytest.mark.parametrize("read_bytes", [1, 7, 64, 1 << 22])
@pytest.mark.parametrize("tensors", [{}, {"a": torch.arange(9.0), "b": torch.tensor([7], dtype=torch.uint8)}])
def test_a_flipped_bit_is_found_after_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_bytes: int, tensors: dict[str, torch.Tensor]
) -> None:
    monkeypatch.setattr(crc32_module, "READ_BYTES", read_bytes)
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, metadata={"note": "text"})
    content = path.read_bytes()
    crc32 = f"{zlib.crc32(content):08x}"
    read = read_tensors(path, crc32)
    assert {name: tensor.tolist() for name, tensor in read.items()} == {n: t.tolist() for n, t in tensors.items()}
    body = len(content) - sum(tensor.nbytes for tensor in tensors.values())
    for position in {content.index(b"text"), *range(body, len(content), 9)}:
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        message = f"{path}: damaged: its CRC-32 is {zlib.crc32(path.read_bytes()):08x}, not {crc32}"
        with pytest.raises(CheckpointError, match=f"^{message}$"):
            read_tensors(path, crc32)


def test_a_file_that_shrinks_while_it_is_checked_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": torch.zeros(100_000)})
    with path.open("rb") as file:
        os.truncate(path, path.stat().st_size - 100_000)
        with pytest.raises(ValueError, match="it became shorter while it was read"):
            part_crc32(file.fileno(), 0, 400_000)


def test_the_hash_of_tensors_does_not_depend_on_the_header(tmp_path: Path) -> None:
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write_tensors(first, {"a": torch.arange(3.0), "b": torch.zeros(1)})
    save_file({"a": torch.arange(3.0), "b": torch.zeros(1)}, second, metadata={"format": "pt"})
    assert first.read_bytes() != second.read_bytes()
    assert tensors_sha256(first) == tensors_sha256(second)
    others = [{"a": torch.arange(3.0), "b": torch.ones(1)}, {"a": torch.arange(3.0), "c": torch.zeros(1)}]
    for tensors in (*others, {"a": torch.arange(4.0)}, {"a": torch.arange(3.0).view(3, 1), "b": torch.zeros(1)}):
        write_tensors(second, tensors)
        assert tensors_sha256(first) != tensors_sha256(second)


def test_an_unsupported_dtype_is_reported(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"a": entry(0, 1, "F4", [2])}, 1)
    for read in (map_tensors, lambda path: read_tensors(path, "")):
        with pytest.raises(CheckpointError, match=f"^{path}: not a safetensors file: a: dtype F4 is not supported$"):
            read(path)


def test_pickles_are_loaded_in_only_one_place() -> None:
    """A pickle loaded anywhere else could run code from a file."""
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
