"""Files are complete or absent: after any failure, the old content stays and nothing is left beside it."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import stat
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest
from conftest import ROOT

from utils.config.loader import ConfigLoader
from utils.corpora.sources import find_source
from utils.errors import UserError
from utils.files import open_named, real_path, write_atomic, write_json
from utils.folders import remove
from utils.inference.prompts import read_prompts, read_text


@pytest.mark.parametrize("data", [b"", b"\x00\xff\n", "", "über\n", "line\r\nline"])
def test_content_is_written_unchanged(tmp_path: Path, data: bytes | str) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old and longer than the new content")
    write_atomic(path, data)
    assert path.read_bytes() == (data.encode("utf-8") if isinstance(data, str) else data)
    assert list(tmp_path.iterdir()) == [path]


def test_written_files_can_be_read_by_everyone(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", b"x")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("old", [None, "old"])
def test_a_failure_at_any_step_leaves_the_old_file_and_no_temporary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, old: str | None
) -> None:
    def fail(*_arguments: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "a.json"
    if old is not None:
        path.write_text(old)
    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"new": True})
    assert (path.read_text() if path.exists() else None) == old
    assert list(tmp_path.iterdir()) == ([path] if old else [])


def test_ctrl_c_while_writing_leaves_no_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_arguments: object) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "a", b"x")
    assert list(tmp_path.iterdir()) == []


def test_a_real_write_past_the_limit_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")
    code = "import sys; from pathlib import Path; from utils.files import write_atomic\n"
    code += "try: write_atomic(Path(sys.argv[1]), b'x' * 100_000)\n"
    code += "except OSError as error: print(error.errno)\n"
    result = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
    )
    assert result.stdout == f"{errno.EFBIG}\n"
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "nowhere" / "a", b"x")


def test_json_is_readable_text_that_ends_in_a_line_break(tmp_path: Path) -> None:
    value = {"name": "über", "list": [1, 2.5, None, True], "nested": {"a": "\n"}}
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert '"name": "über"' in text
    assert text.endswith("}\n")


@pytest.mark.parametrize("value", [math.nan, math.inf, {"a": [-math.inf]}])
def test_json_has_no_nan(tmp_path: Path, value: object) -> None:
    write_json(tmp_path / "a.json", 1)
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(tmp_path / "a.json", value)
    assert (tmp_path / "a.json").read_text() == "1\n"


def test_a_named_file_must_be_a_regular_file_after_following_links(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.txt").write_bytes(b"text")
    (tmp_path / "folder" / "link").symlink_to(tmp_path / "text.txt")
    with open_named(tmp_path / "folder" / "link") as file:
        assert file.read() == b"text"
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to("loop")
    for name, reason in (("pipe", "is a pipe, not a file"), ("zeros", "is a device, not a file"), ("loop", "Too many")):
        with pytest.raises(OSError, match=reason):  # at once
            open_named(tmp_path / name)


def test_a_pipe_that_is_open_already_is_read_to_its_end() -> None:
    reading, writing = os.pipe()
    os.write(writing, b"text")
    os.close(writing)
    with open_named(Path(f"/dev/fd/{reading}")) as file:  # as a shell passes <(...)
        assert file.read() == b"text"
    os.close(reading)


@pytest.mark.parametrize("name", ["pipe.yaml", "zeros.yaml"])
def test_no_script_waits_for_a_pipe_or_reads_a_device(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "zeros.yaml").symlink_to("/dev/zero")
    path = tmp_path / name
    for read in (
        lambda: find_source(str(path), tmp_path).read(),
        lambda: ConfigLoader(tmp_path).load([path]),
        lambda: read_prompts(path),
        lambda: read_text(path),  # for --score
    ):
        with pytest.raises(UserError, match=r"\.yaml: cannot be read: is a (pipe|device), not a file"):
            read()


def test_a_link_to_itself_is_resolved_without_an_error(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert real_path(tmp_path / "loop").name == "loop"
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    assert real_path(tmp_path / "link" / "x") == real_path(tmp_path) / "there" / "x"


def test_any_kind_of_entry_is_removed_and_a_pipe_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "inside").write_text("x")
    (tmp_path / "link").symlink_to("kept")
    (tmp_path / "kept").mkdir()
    for name in ("pipe", "file", "folder", "link", "nothing"):
        remove(tmp_path / name)
    assert os.listdir(tmp_path) == ["kept"]
