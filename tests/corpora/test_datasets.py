"""The folder of a prepared dataset is written shard by shard, read back and verified."""

from __future__ import annotations

import json
import shutil
from array import array
from pathlib import Path

import pytest

from utils.corpora.datasets import Dataset, DatasetError, ShardWriter, Split, is_dataset, read_dataset

DOCUMENTS = [[0, 5, 6], [0, 7], [0, 8, 9, 10]]


def write(folder: Path) -> Dataset:
    folder.mkdir()
    splits = {}
    for split, documents in (("train", DOCUMENTS), ("val", DOCUMENTS[:1])):
        writer = ShardWriter(folder, split, 0)
        for number, ids in enumerate(documents):
            writer.add(memoryview(array("H", ids)), 0, number + 1)
        splits[split] = Split([writer.close()], bytes=9)
    dataset = Dataset(folder, "1234", 0, "uint16", splits, [{"path": "notes.txt"}], [0], {"made_with": {"python": "3"}})
    dataset.save()
    return dataset


def test_a_written_dataset_is_read_back(tmp_path: Path) -> None:
    dataset = write(tmp_path / "mine")
    assert is_dataset(tmp_path / "mine")
    assert not is_dataset(tmp_path)
    assert read_dataset(tmp_path / "mine") == dataset
    train = dataset.splits["train"]
    assert (train.tokens, train.documents) == (9, 3)
    assert array("Q", dataset.path(train.shards[0], "ends").read_bytes()).tolist() == [3, 5, 9]
    assert array("I", dataset.path(train.shards[0], "origins").read_bytes()).tolist() == [0, 1, 0, 2, 0, 3]


def test_the_hash_of_a_dataset_does_not_depend_on_its_name(tmp_path: Path) -> None:
    dataset = write(tmp_path / "mine")
    shutil.copytree(tmp_path / "mine", tmp_path / "copy")
    assert read_dataset(tmp_path / "copy").hash == dataset.hash


@pytest.mark.parametrize("name", ["train_00000.bin", "val_00000.ends", "train_00000.origins"])
def test_an_edited_short_or_missing_file_is_named(tmp_path: Path, name: str) -> None:
    dataset = write(tmp_path / "mine")
    dataset.verify()
    path = dataset.folder / name
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    with pytest.raises(DatasetError, match=f"{name}: edited or damaged"):
        dataset.verify()
    path.write_bytes(b"12")
    with pytest.raises(DatasetError, match=f"{name}: 2 bytes, not the"):
        dataset.verify()
    path.unlink()
    with pytest.raises(DatasetError, match=f"{name}: cannot be read"):
        dataset.verify()


def test_unchanged_files_are_verified_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = write(tmp_path / "mine")
    dataset.verify()
    monkeypatch.setattr("utils.corpora.datasets.checksum", lambda path: pytest.fail(f"{path} was read again"))
    dataset.verify()


@pytest.mark.parametrize(
    "damage",
    [
        *({"dtype": "uint8"}, {"splits": {}}, {"splits": None}, {"schema_version": 99}, {"tokenizer_hash": None}),
        *({"end_of_text": "a"}, {"end_of_text": -1}, {"leaks": [99]}, {"leaks": ["a"]}, {"leaks": 1}),
        *({"sources": ["a.txt"]}, {"sources": 1}),
    ],
)
def test_a_damaged_description_is_an_error_that_names_it(tmp_path: Path, damage: dict[str, object]) -> None:
    dataset = write(tmp_path / "mine")
    path = dataset.folder / "dataset.json"
    content = {key: value for key, value in (json.loads(path.read_text()) | damage).items() if value is not None}
    path.write_text(json.dumps(content))
    with pytest.raises(DatasetError, match=str(path)):
        read_dataset(dataset.folder)


def test_a_description_that_is_not_a_mapping_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text("[1]")
    with pytest.raises(DatasetError, match="damaged"):
        read_dataset(tmp_path)
