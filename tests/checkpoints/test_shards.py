"""Sharded checkpoints: ranks write them together, and any other number of ranks reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from utils.checkpoints.files import Checkpoint, read_checkpoint, weight_differences, write_folder, write_object
from utils.checkpoints.folder import INDEX_FILE, MANIFEST_FILE, CheckpointError, read_manifest
from utils.checkpoints.index import rows_of
from utils.checkpoints.shards import JoinedTensors, index_of, write_shards
from utils.formats.numbers import difference, statistics
from utils.formats.stored import find_weights, read_stored

WEIGHTS = {"a.weight": torch.randn(7, 3), "b.weight": torch.randn(1, 5), "c.bias": torch.randn(4).bfloat16()}
MOMENTS = {"a.weight/step": torch.tensor(3.0), "a.weight/exp_avg": torch.randn(7, 3)}


def write(path: Path, world_size: int, change: Callable[[Path], None] = lambda folder: None) -> None:
    """Write a checkpoint of step 5 as `world_size` ranks would."""

    def own(tensors: dict[str, torch.Tensor], rank: int) -> dict[str, torch.Tensor]:
        return {
            name: tensor[slice(*rows_of(len(tensor), rank, world_size))].clone() if tensor.dim() else tensor
            for name, tensor in tensors.items()
        }

    def files(folder: Path) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for rank in range(world_size):
            found |= write_shards(
                folder, rank, world_size, {"model": own(WEIGHTS, rank), "optimizer": own(MOMENTS, rank)}
            )
        outlines = [{name: (t.dtype, t.shape) for name, t in kind.items()} for kind in (WEIGHTS, MOMENTS)]
        index = index_of(world_size, {"model": outlines[0], "optimizer": outlines[1]})
        found[INDEX_FILE] = write_object(folder / INDEX_FILE, index)
        change(folder)
        return found

    write_folder(path, files, {"kind": "char"}, {"step": 5})


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_whole_tensors_and_any_rows_are_read_from_the_shards(tmp_path: Path, world_size: int) -> None:
    path = tmp_path / "step_000005"
    write(path, world_size)
    found: Checkpoint = read_checkpoint(path)
    for tensors, expected in ((found.weights, WEIGHTS), (found.optimizer_tensors, MOMENTS)):
        assert list(tensors) == list(expected)
        assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
        assert all(tensors[name].dtype == tensor.dtype for name, tensor in expected.items())
    assert isinstance(found.weights, JoinedTensors)
    for name, tensor in WEIGHTS.items():
        for first in range(len(tensor) + 1):
            for end in range(first, len(tensor) + 1):
                rows = found.weights.rows(name, first, end)
                assert torch.equal(rows, tensor[first:end])
                assert rows.dtype == tensor.dtype
    assert sorted(read_manifest(path)) == sorted(p.name for p in path.iterdir() if p.name != MANIFEST_FILE)
    assert "a.weight is unexpected" in weight_differences(found.weights, torch.nn.Linear(2, 2))


def test_rows_are_mapped_only_from_the_files_that_contain_them(tmp_path: Path) -> None:
    write(tmp_path / "step_000005", 3)
    found = JoinedTensors(tmp_path / "step_000005", "model")
    found.rows("a.weight", 0, 3)
    assert [file.name for file in found._mapped] == ["model-00001-of-00003.safetensors"]
    found.rows("a.weight", 2, 7)
    assert len(found._mapped) == 3


def test_the_weight_tools_read_whole_tensors_from_shards(tmp_path: Path) -> None:
    stored = []
    for world_size in (1, 3):
        write(path := tmp_path / f"of_{world_size}", world_size)
        files = find_weights(str(path), lambda: tmp_path)
        assert len(files) == world_size
        stored.append(read_stored(f"of {world_size}", files))
    assert {name: place.entry.shape for name, place in stored[1].tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in WEIGHTS.items()
    }
    assert sum(place.entry.bytes for place in stored[1].tensors.values()) == sum(t.nbytes for t in WEIGHTS.values())
    assert difference(*stored).equal
    norms = {name: found["norm"] for name, found in statistics(stored[1]).items()}
    assert norms == {name: pytest.approx(float(tensor.double().norm())) for name, tensor in WEIGHTS.items()}


def change_index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def changed(path: Path) -> None:
        index = json.loads((path / INDEX_FILE).read_text())
        change(index)
        (path / INDEX_FILE).write_text(json.dumps(index))

    return changed


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no file": (lambda path: (path / "model-00002-of-00002.safetensors").unlink(), "missing"),
    "a byte": (
        lambda path: (path / "optimizer-00001-of-00002.safetensors").open("r+b").write(b"1"),
        "optimizer-00001-of-00002.safetensors: damaged",
    ),
    "fewer ranks": (lambda path: drop(path, "model-00002-of-00002.safetensors"), "manifest.json: damaged"),
}


def drop(path: Path, name: str) -> None:
    manifest = json.loads((path / MANIFEST_FILE).read_text())
    del manifest["files"][name]
    (path / MANIFEST_FILE).write_text(json.dumps(manifest))


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_refused(tmp_path: Path, kind: str) -> None:
    damage, message = DAMAGES[kind]
    write(path := tmp_path / "step_000005", 2)
    damage(path)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda index: index.pop("optimizer"), "index.json: damaged"),
        (lambda index: index["model"]["a.weight"].pop("shape"), "index.json: damaged"),
        (lambda index: index["model"]["a.weight"]["files"].pop(), "4 of 7 rows"),
        (lambda index: index["model"]["a.weight"]["files"].reverse(), "do not follow row 0"),
        (
            lambda index: index["model"]["a.weight"]["files"][0].__setitem__(0, "../x.safetensors"),
            "not a file of model",
        ),
        (
            lambda index: index["model"]["a.weight"]["files"][1].__setitem__(0, "model-00002-of-00003.safetensors"),
            "index.json: damaged .*model-00002-of-00003.safetensors is not in manifest.json",
        ),
        (lambda index: index["model"]["a.weight"].update(dtype="F16"), "rows 0 to 4 of a.weight are missing"),
        (lambda index: index["model"].update(d=index["model"]["a.weight"]), "of d are missing"),
        (lambda index: index["model"]["a.weight"]["files"][0].__setitem__(1, False), "expected row numbers"),
        (lambda index: index["model"]["a.weight"]["files"][1].__setitem__(2, 7.0), "expected row numbers"),
        (lambda index: index["model"]["a.weight"].update(shape=[2**70, 3]), "expected a dtype and a shape"),
        *(
            (lambda index, shape=shape: index["model"].update(d={"dtype": "F32", "shape": shape, "files": []}), "shape")
            for shape in ([0, 2**63 - 1, 2**62], [0, 2**70], [0] * 65, "", {})
        ),
    ],
)
def test_an_index_that_does_not_describe_the_files_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    write(tmp_path / "step_000005", 2)
    change_index(change)(tmp_path / "step_000005")
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / "step_000005", checked=True)


def test_a_shard_that_is_not_in_the_manifest_is_not_read(tmp_path: Path) -> None:
    """The file of another checkpoint may have the same rows, but only the manifest names the files of this one."""
    path, other = tmp_path / "step_000005", "model-00002-of-00003.safetensors"
    write(path, 2)
    (path / other).write_bytes((path / "model-00002-of-00002.safetensors").read_bytes())
    change_index(lambda index: index["model"]["a.weight"]["files"][1].__setitem__(0, other))(path)
    for read in (
        lambda: read_checkpoint(path, checked=True),
        lambda: find_weights(str(path), lambda: tmp_path),
        lambda: JoinedTensors(path, "model"),
    ):
        with pytest.raises(CheckpointError, match=f"{other} is not in manifest.json"):
            read()


def test_a_failed_write_of_shards_leaves_nothing_behind(tmp_path: Path) -> None:
    def full(folder: Path) -> None:
        assert (folder / "model-00002-of-00002.safetensors").is_file()
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write(tmp_path / "step_000005", 2, full)
    assert not list(tmp_path.iterdir())
