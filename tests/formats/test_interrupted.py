"""Exports and conversions that are stopped leave a complete result, an older one or nothing, and can be repeated."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import foreign_models as foreign
import pytest

from tests.formats.conftest import LLAMA_LIKE
from tests.tiny_export import char_tokenizer, save_tiny_run
from utils.folders import replace_folder
from weights import main

ENDED = char_tokenizer("\0 \nabcdefghijklmnopqrstuvwxyz")
SLOW = (pytest.mark.slow, pytest.mark.xdist_group("transformers"))  # where the package gguf is installed
WRITERS = {  # the function that writes the weights, by format
    "hf": "utils.formats.huggingface.write_shards",
    "gguf": "utils.formats.gguf._write",
    "onnx": "utils.formats.onnx_export.write_graph",
}


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    save_tiny_run(tmp_path, "base", ENDED, **LLAMA_LIKE)
    for package in ("transformers", "xllamacpp", "onnxruntime"):  # the certificate takes seconds
        monkeypatch.setitem(sys.modules, package, None)
    return tmp_path


def export(runs: Path, format: str, *flags: str) -> int:
    return main(["export", "base", "--format", format, "--runs-dir", str(runs), *flags])


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def full_disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def terminated() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


STOPS = {"full disk": (full_disk, 1), "SIGTERM": (terminated, 143)}


def half_written(stop: Callable[[], None]) -> Callable[..., None]:
    """A stand-in for a function that writes: it begins a file at its first path, then stops."""

    def write(*arguments: object) -> None:
        path = next(argument for argument in arguments if isinstance(argument, Path))
        path = path / "model.safetensors" if path.is_dir() else path
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
        stop()

    return write


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("format", ["hf", "onnx", pytest.param("gguf", marks=SLOW)])
def test_a_stopped_export_leaves_nothing_or_the_older_one(
    format: str, stop: str, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("utils.formats.onnx_export._check_packages", lambda: None)
    artifacts, (how, status) = runs / "base" / "artifacts", STOPS[stop]
    if format != "onnx":  # that export takes seconds
        assert export(runs, format) == 0
    before = content(artifacts / format) if format != "onnx" else None
    with monkeypatch.context() as patch:
        patch.setattr(WRITERS[format], half_written(how))
        assert export(runs, format) == status
    error = capsys.readouterr().err
    words = "interrupted\n" if status == 143 else f"error: {artifacts / format}: No space left on device\n"
    assert error.endswith(words)
    assert {path.name for path in artifacts.iterdir()} == {"export"} | ({format} if before else set())
    if before:
        assert content(artifacts / format) == before
        assert export(runs, format) == 0


@SLOW[0]
@SLOW[1]
def test_an_error_of_writing_gguf_is_reported(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("utils.formats.gguf.MODEL", "/dev/full")
    assert export(runs, "gguf") == 1
    assert capsys.readouterr().err.endswith(f"{runs}/base/artifacts/gguf: No space left on device\n")


KILLED = """
import os, signal, sys
from pathlib import Path
import weights

def rename(self, target, rename=Path.rename):
    rename(self, target)
    if Path(target).name == ".hf.old":  # the new folder is not in its place yet
        os.kill(os.getpid(), signal.SIGKILL)

Path.rename = rename
sys.modules["transformers"] = None
weights.main(sys.argv[1:])
"""


def test_the_export_after_a_killed_one_restores_the_older_one(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = runs / "base" / "artifacts" / "hf"
    assert export(runs, "hf") == 0
    before = content(place)
    words = ["export", "base", "--format", "hf", "--runs-dir", str(runs)]
    killed = subprocess.run([sys.executable, "-c", KILLED, *words], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not place.exists()
    with monkeypatch.context() as patch:
        patch.setattr(WRITERS["hf"], half_written(full_disk))
        assert export(runs, "hf") == 1
    assert content(place) == before
    assert export(runs, "hf") == 0
    assert {path.name for path in place.parent.iterdir()} == {"export", "hf"}


def test_a_folder_is_restored_if_its_replacement_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("place", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    rename, moves = Path.rename, []

    def interrupted(self: Path, target: Path) -> Path:
        moves.append(target)
        if len(moves) == 2:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        replace_folder(tmp_path / "place", tmp_path / "new")
    assert [path.name for path in (tmp_path / "place").iterdir()] == ["place"]


@pytest.mark.parametrize("stop", STOPS)
def test_a_stopped_conversion_leaves_nothing(
    stop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    how, status = STOPS[stop]
    p = foreign.llama()
    foreign.write_llama2_c(tmp_path / "model.bin", p, 1)
    foreign.write_llama2_c_tokenizer(tmp_path / "tokenizer.bin")
    words = ["convert", str(tmp_path / "model.bin"), "--out", str(tmp_path / "runs" / "new")]
    for writer in ("write_checkpoint", "save_export"):
        with monkeypatch.context() as patch:
            patch.setattr(f"utils.training.adopt.{writer}", half_written(how))
            assert main(words) == status
        assert not list((tmp_path / "runs").iterdir())
    assert status == 143 or f"error: {tmp_path}/runs/new: No space left on device" in capsys.readouterr().err
    assert main(words) == 0
