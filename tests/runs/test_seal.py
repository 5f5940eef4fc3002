"""The seal of a run detects one changed byte, and ignores files that can be made again."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_runs import make_run, write

from utils.checkpoints.folder import FILES
from utils.runs import seal as seal_module
from utils.runs.layout import CHECKPOINTS, SEAL
from utils.runs.run import RunError
from utils.runs.seal import checksums, file_sha256, sealed_files, verify_seal, write_seal


def make_checkpoint(path: Path) -> None:
    """A checkpoint with its manifest."""
    content = b"\0" * 100
    facts = {"size": len(content), "crc32": f"{zlib.crc32(content):08x}"}
    for name in FILES:
        write(path / name, content)
    write(path / "manifest.json", {"format_version": 1, "files": {name: facts for name in FILES}})


@pytest.fixture
def run(runs_dir: Path) -> Path:
    """A sealed run."""
    path = make_run(runs_dir, "run", patch="diff --git a b\n", metrics=[{"step": 1}])
    make_checkpoint(path / CHECKPOINTS / "step_000005")
    write(path / "artifacts" / "export" / "model.safetensors", b"\0" * 1000)
    write(path / "artifacts" / "export" / "config.json", "{}")
    write(path / "artifacts" / "curves.png", b"png")
    write(path / "logs" / "tensorboard" / "events.1", b"events")
    write(path / "logs" / "fed_tensorboard.json", "{}")
    write(path / "logs" / "train.log", "step 1\n")
    write_seal(path)
    return path


def flip(path: Path) -> None:
    """Change one bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_an_unchanged_run_passes_verification(run: Path) -> None:
    result = verify_seal(run)
    assert result.good
    assert (result.changed, result.missing, result.added, result.damaged) == ([], [], [], [])
    assert result.checkpoints == 1
    assert result.files == len(list(sealed_files(run))) == 10
    assert result.sealed == json.loads((run / SEAL).read_text())["time"]


def test_meta_logs_and_export_are_sealed_in_order(run: Path) -> None:
    assert list(sealed_files(run)) == [
        *("meta/code.patch", "meta/config_sources.json", "meta/env.txt", "meta/full_config.json"),
        *("logs/histograms.jsonl", "logs/metrics.jsonl", "logs/samples.jsonl", "logs/train.log"),
        *("artifacts/export/config.json", "artifacts/export/model.safetensors"),
    ]
    assert list(checksums(run, file_sha256)) == list(sealed_files(run))


@pytest.mark.parametrize(
    "name",
    ["meta/code.patch", "meta/full_config.json", "logs/metrics.jsonl", "artifacts/export/model.safetensors"],
)
def test_one_changed_bit_is_named(run: Path, name: str) -> None:
    flip(run / name)
    result = verify_seal(run)
    assert not result.good
    assert (result.changed, result.missing, result.added) == ([name], [], [])


def test_one_byte_more_or_less_is_named(run: Path) -> None:
    for name, content in (("meta/code.patch", b"diff --git a b"), ("logs/metrics.jsonl", b'{"step": 1}\n\n')):
        write(run / name, content)
    assert verify_seal(run).changed == ["meta/code.patch", "logs/metrics.jsonl"]


def test_missing_and_added_files_are_named(run: Path) -> None:
    (run / "meta" / "code.patch").unlink()
    write(run / "meta" / "deep" / "new.txt", "")
    (run / "artifacts" / "export" / "config.json").rename(run / "artifacts" / "export" / "renamed.json")
    result = verify_seal(run)
    assert result.missing == ["meta/code.patch", "artifacts/export/config.json"]
    assert result.added == ["meta/deep/new.txt", "artifacts/export/renamed.json"]
    assert result.changed == []


CHANGES: dict[str, Callable[[Path], object]] = {
    "a new event file": lambda run: write(run / "logs" / "tensorboard" / "events.2", "new"),
    "a deleted event file": lambda run: (run / "logs" / "tensorboard" / "events.1").unlink(),
    "another offset of a view": lambda run: write(run / "logs" / "fed_tensorboard.json", '{"offset": 3}'),
    "an offset of another view": lambda run: write(run / "logs" / "fed_aim.json", "{}"),
    "other notes": lambda run: write(run / "notes.json", '{"pinned": true}'),
    "another run.json": lambda run: write(run / "run.json", "{}"),
    "no picture": lambda run: (run / "artifacts" / "curves.png").unlink(),
    "a deleted checkpoint": lambda run: shutil.rmtree(run / CHECKPOINTS / "step_000005"),
    "another checkpoint": lambda run: make_checkpoint(run / CHECKPOINTS / "step_000010"),
    "a heartbeat": lambda run: os.utime(run / "lock", (0, 0)),
    "another file time": lambda run: os.utime(run / "meta" / "code.patch", (0, 0)),
    "a temporary file of an offset": lambda run: write(run / "logs" / ".fed_aim.json.abc.tmp", ""),
    "an older temporary file of an offset": lambda run: write(run / "logs" / "fed_aim.tmp", ""),
    "files of Weights & Biases": lambda run: write(run / "logs" / "wandb" / "run-1.wandb", "new"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_derived_or_editable_files_are_accepted(run: Path, change: str) -> None:
    CHANGES[change](run)
    assert verify_seal(run).good


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_damaged_checkpoint_is_named(run: Path, name: str) -> None:
    place = run / CHECKPOINTS / "step_000005" / name
    if name == "manifest.json":
        write(place, "{")
    else:
        flip(place)
    result = verify_seal(run)
    assert not result.good
    assert (result.changed, result.missing, result.added) == ([], [], [])
    (damage,) = result.damaged
    assert damage.startswith(f"artifacts/checkpoints/step_000005/{name}: ")


def test_an_edited_manifest_and_a_file_outside_it_are_named(run: Path) -> None:
    place = run / CHECKPOINTS / "step_000005"
    write(place / "extra.tmp", "x")
    manifest = json.loads((place / "manifest.json").read_text())
    write(place / "manifest.json", {**manifest, "edited": True})
    assert verify_seal(run).damaged == [
        "artifacts/checkpoints/step_000005/extra.tmp: not in its manifest",
        "artifacts/checkpoints/step_000005/manifest.json: not as sealed",
    ]
    sealed = json.loads((run / SEAL).read_text())
    del sealed["manifests"]
    write(run / SEAL, sealed)  # a seal of an older version
    assert len(verify_seal(run).damaged) == 1


@pytest.mark.parametrize("name", ["meta/x.tmp", "logs/.train.log.abc.tmp", "artifacts/export/new", "logs/folder/new"])
def test_any_added_file_is_named(run: Path, name: str) -> None:
    write(run / name, "")
    assert verify_seal(run).added == [name]


def test_an_added_link_or_pipe_is_named(run: Path) -> None:
    (run / "meta" / "link").symlink_to("/etc")
    (run / "logs" / "file").symlink_to("/etc/passwd")
    os.mkfifo(run / "meta" / "pipe")
    assert verify_seal(run).added == ["meta/link", "meta/pipe", "logs/file"]


def test_a_checkpoint_that_lacks_a_file_is_named(run: Path) -> None:
    (run / CHECKPOINTS / "step_000005" / "model.safetensors").unlink()
    (damage,) = verify_seal(run).damaged
    assert "step_000005/model.safetensors" in damage


def test_sealing_again_replaces_the_old_seal(run: Path) -> None:
    flip(run / "meta" / "code.patch")
    write_seal(run)
    assert verify_seal(run).good


def test_a_moved_run_passes_verification(run: Path) -> None:
    run.rename(run.with_name("moved"))
    assert verify_seal(run.with_name("moved")).good


def test_odd_file_names_are_sealed(run: Path) -> None:
    for name in ("ü \n.txt", os.fsdecode(b"\xff.txt")):
        write(run / "meta" / name, "")
    write_seal(run)
    assert verify_seal(run).good
    write(run / "meta" / os.fsdecode(b"\xff.txt"), "x")
    assert len(verify_seal(run).changed) == 1


def test_a_missing_seal_is_reported(run: Path) -> None:
    (run / SEAL).unlink()
    with pytest.raises(RunError, match="run has no seal: it has not ended yet, or was killed"):
        verify_seal(run)


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"\xff\xfe", b"[]", b"null", b"3", b"{}", b'{"time": "now"}', b'{"files": {}}'),
        *(b'{"time": "now", "files": 3}', b'{"time": "now", "files": null}', b'{"time": "now", "files": [1]}'),
        *(b"[" * 100_000, b'{"time": "now", "files": []}', b'{"time": "now", "files": ""}'),
    ],
    ids=lambda content: repr(content[:32]),
)
def test_a_damaged_seal_is_reported(run: Path, content: bytes) -> None:
    write(run / SEAL, content)
    with pytest.raises(RunError, match=r"seal\.json cannot be read"):
        verify_seal(run)


def test_an_edited_seal_names_the_files_that_no_longer_match(run: Path) -> None:
    recorded = json.loads((run / SEAL).read_text())
    recorded["files"]["meta/code.patch"] = "0" * 64
    recorded["files"]["meta/env.txt"] = 5
    write(run / SEAL, recorded)
    assert verify_seal(run).changed == ["meta/code.patch", "meta/env.txt"]


def test_a_file_that_became_a_broken_link_or_a_pipe_is_missing(run: Path) -> None:
    (run / "meta" / "env.txt").unlink()
    (run / "meta" / "env.txt").symlink_to("nowhere")
    (run / "meta" / "code.patch").unlink()
    os.mkfifo(run / "meta" / "code.patch")
    assert verify_seal(run).missing == ["meta/code.patch", "meta/env.txt"]


def test_a_file_that_cannot_be_read_counts_as_changed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(seal_module, "file_sha256", refuse)
    assert len(verify_seal(run).changed) == 10
