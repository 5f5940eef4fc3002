"""prepare.py makes the same dataset from any kind of source, with any number of processes, after any interruption."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT

import prepare
from tokenizer import load_tokenizer
from utils.corpora import readers
from utils.corpora.blocks import blocks
from utils.corpora.datasets import VERIFIED_JSON, Dataset, read_dataset
from utils.corpora.source_files import SourceFile, find_files
from utils.files import read_json
from utils.preparation import encoding, pipeline, reading, shards, workers
from utils.preparation.work import work_folder

TEXTS = [f"document {i}: the quick brown fox jumps über {i * i % 97} lazy dogs 😀\n" * (i % 7 + 1) for i in range(200)]

Run = Callable[..., int]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs prepare.py in this process: `run(source, ..., out="name")`; the dataset is tmp_path/sets/NAME."""

    def call(*words: Any, out: str = "mine") -> int:
        return prepare.main([*map(str, words), "--out", str(tmp_path / "sets" / out), "--workers", "1"])

    return call


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every loop of the passes run several times."""
    monkeypatch.setattr(readers, "UNIT_BYTES", 3000)
    monkeypatch.setattr(encoding, "JOB_BYTES", 1500)
    monkeypatch.setattr(encoding, "BATCH", 500)
    monkeypatch.setattr(shards, "SHARD_TOKENS", 5000)
    monkeypatch.setattr(readers, "LONG_RECORD_BYTES", 2000)


def json_lines(path: Path, texts: Sequence[str] = TEXTS, field: str = "text") -> Path:
    lines = (json.dumps({"id": i, field: text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def dataset_of(tmp_path: Path, name: str = "mine") -> Dataset:
    dataset = read_dataset(tmp_path / "sets" / name)
    dataset.verify(thorough=True)
    return dataset


def texts_of(dataset: Dataset, split: str) -> list[str]:
    """The documents of a split, decoded."""
    tokenizer, found = load_tokenizer(dataset.tokenizer_path), []
    for shard in dataset.splits[split].shards:
        ids = array({"uint16": "H", "uint32": "I"}[dataset.dtype], dataset.path(shard).read_bytes()).tolist()
        begin = 0
        for end in array("Q", dataset.path(shard, "ends").read_bytes()):
            assert ids[begin] == dataset.end_of_text
            found.append(tokenizer.decode(ids[begin + 1 : end]))
            begin = end
    return found


def origins_of(dataset: Dataset, split: str) -> list[tuple[int, int]]:
    values = [
        v for shard in dataset.splits[split].shards for v in array("I", dataset.path(shard, "origins").read_bytes())
    ]
    return list(zip(values[::2], values[1::2], strict=True))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != VERIFIED_JSON}


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the last line on stderr."""
    *_, line = capsys.readouterr().err.splitlines()
    return line


# ------------------------------------------------------------------------------------------------------------- sources


def every_source(folder: Path) -> dict[str, list[Any]]:
    """The same texts in each kind of source, with the flags that read it."""
    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet
    import zstandard

    lines = json_lines(folder / "plain.jsonl")
    table = pyarrow.table({"id": range(len(TEXTS)), "text": TEXTS})
    pyarrow.parquet.write_table(table, folder / "table.parquet", row_group_size=30)
    texts = pyarrow.array(TEXTS)
    for name, column in {"view": texts.cast(pyarrow.string_view()), "dictionary": texts.dictionary_encode()}.items():
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), folder / f"{name}.parquet", row_group_size=30)
    saved = folder / "saved" / "train"
    saved.mkdir(parents=True)
    (folder / "saved" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    (saved / "state.json").write_text("{}")
    with pyarrow.ipc.new_stream(saved / "data-00000-of-00001.arrow", table.schema) as stream:
        stream.write_table(table, 40)
    (folder / "plain.jsonl.gz").write_bytes(
        gzip.compress(lines.read_bytes()[:9000]) + gzip.compress(lines.read_bytes()[9000:])
    )
    (folder / "plain.jsonl.zst").write_bytes(zstandard.compress(lines.read_bytes()))
    (folder / "separated.txt").write_text("<|endoftext|>".join(f"\n{text}" for text in TEXTS), encoding="utf-8")
    (folder / "files").mkdir()
    for number, text in enumerate(TEXTS):
        (folder / "files" / f"{number:03d}.txt").write_text(text, encoding="utf-8")
    return {
        "json lines": [lines],
        "gzip": [folder / "plain.jsonl.gz"],
        "zstd": [folder / "plain.jsonl.zst"],
        "parquet": [folder / "table.parquet"],
        "parquet, views": [folder / "view.parquet"],
        "parquet, a dictionary": [folder / "dictionary.parquet"],
        "saved dataset": [folder / "saved"],
        "folder": [folder / "files"],
        "glob": [folder / "files" / "*.txt"],
        "separator": [folder / "separated.txt", "--separator", "<|endoftext|>"],
        ".json": [lines.rename(folder / "lines.json"), "--field", "text"],
    }


def test_the_same_texts_from_any_kind_of_source_are_the_same_dataset(
    tmp_path: Path, run: Run, small_parts: None
) -> None:
    stripped = {}
    sources = every_source(tmp_path)
    sources["json lines"] = [json_lines(tmp_path / "plain.jsonl")]
    for number, (name, words) in enumerate(sources.items()):
        assert run(*words, "--tokenizer", "byte", "--no-leaks", out=str(number)) == 0
        dataset = dataset_of(tmp_path, str(number))
        texts = {split: texts_of(dataset, split) for split in ("train", "val")}
        stripped[name] = {split: [text.strip() for text in found] for split, found in texts.items()}
        if name != "separator":  # its documents lack line breaks around them, so their hashes differ
            assert sorted(texts["train"] + texts["val"]) == sorted(TEXTS), name
            assert stripped[name] == stripped["json lines"], name
            assert len(dataset.splits["train"].shards) > 1
    found = stripped["separator"]
    assert sorted(found["train"] + found["val"]) == sorted(text.strip() for text in TEXTS)


@pytest.mark.parametrize("separator", ["\n", "--", "\n\n", "<|x|>"])
def test_ranges_of_a_file_contain_each_record_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, separator: str
) -> None:
    monkeypatch.setattr("utils.corpora.blocks.BLOCK", 5)
    monkeypatch.setattr(readers, "LONG_RECORD_BYTES", 6)
    generator = random.Random(separator)
    for size in range(1, 12):
        monkeypatch.setattr(readers, "UNIT_BYTES", size)
        text = "".join(generator.choices(["a", "bcd", "-", "\n", "<", separator], k=30))
        (tmp_path / "a.txt").write_text(text)
        file = SourceFile(str(tmp_path / "a.txt"), "text", len(text))
        found = []
        for unit in readers.units([file], readers.Reading(separator=separator)):
            ranged = readers.records(
                tmp_path / "a.txt", separator.encode(), unit.start, unit.end, tmp_path, lambda count: None
            )
            found += [bytes(record).decode() for record in ranged]
        assert sum(unit.bytes for unit in readers.units([file], readers.Reading(separator=separator))) == len(text)
        expected = text.split(separator)
        assert found == (expected if expected[-1] else expected[:-1])


def test_origins_are_files_and_lines(tmp_path: Path, run: Run, small_parts: None) -> None:
    first, second = json_lines(tmp_path / "a.jsonl"), json_lines(tmp_path / "b.jsonl", TEXTS[:20], field="text")
    with first.open("a") as file:
        file.write("\n\n")
    assert run(first, second, "--tokenizer", "byte", "--no-leaks") == 0
    dataset = dataset_of(tmp_path)
    assert [Path(source["path"]).name for source in dataset.sources] == ["a.jsonl", "b.jsonl"]
    for split in ("train", "val"):
        for text, (source, record) in zip(texts_of(dataset, split), origins_of(dataset, split), strict=True):
            line = (first, second)[source].read_text(encoding="utf-8").splitlines()[record - 1]
            assert json.loads(line)["text"] == text


def test_one_text_is_split_by_position(tmp_path: Path, run: Run, small_parts: None) -> None:
    text = "".join(TEXTS)
    (tmp_path / "novel.txt").write_text(text, encoding="utf-8")
    for kind in ("char", "byte", "bpe"):
        words = ["--tokenizer", kind, "--bpe-vocab-size", "300"] if kind == "bpe" else ["--tokenizer", kind]
        assert run(tmp_path / "novel.txt", *words, out=kind) == 0
        dataset = dataset_of(tmp_path, kind)
        (train,), (val,) = texts_of(dataset, "train"), texts_of(dataset, "val")
        assert train + val == text
        assert train.endswith("\n")
        assert len(val.encode()) / len(text.encode()) == pytest.approx(0.1, abs=0.01)
        assert dataset.splits["train"].bytes == len(train.encode())


def test_a_long_text_encoded_in_pieces_has_the_ids_of_the_whole(tmp_path: Path, run: Run, small_parts: None) -> None:
    (tmp_path / "novel.txt").write_text("".join(TEXTS), encoding="utf-8")
    assert run(tmp_path / "novel.txt", "--tokenizer", "bpe", "--bpe-vocab-size", "400") == 0
    dataset = dataset_of(tmp_path)
    tokenizer = load_tokenizer(dataset.tokenizer_path)
    (text,) = texts_of(dataset, "train")
    (shard,) = dataset.splits["train"].shards
    ids = array("H", dataset.path(shard).read_bytes()).tolist()
    assert ids == [dataset.end_of_text, *tokenizer.encode(text)]


def test_the_split_stays_when_data_is_added(tmp_path: Path, run: Run) -> None:
    assert run(json_lines(tmp_path / "a.jsonl", TEXTS[100:]), "--tokenizer", "byte", "--no-leaks", out="a") == 0
    assert run(json_lines(tmp_path / "b.jsonl", TEXTS), "--tokenizer", "byte", "--no-leaks", out="b") == 0
    fewer, more = (set(texts_of(dataset_of(tmp_path, name), "val")) for name in "ab")
    assert fewer == more & set(TEXTS[100:])
    assert 0.02 < len(more) / len(TEXTS) < 0.25


def test_cache_files_of_a_saved_dataset_are_not_data(tmp_path: Path) -> None:
    for name in ("data-00000-of-00001.arrow", "cache-0123456789abcdef.arrow"):
        (tmp_path / name).touch()
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
    found = find_files([str(tmp_path)], tmp_path / "corpora").files
    assert [Path(file.path).name for file in found] == ["data-00000-of-00001.arrow"]


def test_a_range_without_a_record_is_read_to_its_end_only(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * (5 << 20) + b"--y")
    for end, found, most in ((2 << 20, [], 3 << 20), (None, [b"y"], 5 << 20)):
        read: list[int] = []
        assert list(readers.records(tmp_path / "a.txt", b"--", 1 << 20, end, tmp_path, read.append)) == found
        assert sum(read) <= most


@pytest.mark.parametrize("log", [27, 31])
def test_zstd_with_the_largest_windows_is_read(log: int, tmp_path: Path) -> None:
    import zstandard

    parameters = zstandard.ZstdCompressionParameters(window_log=log, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(compressor.compress(b"a text\n" * 1000) + compressor.flush())
    assert b"".join(blocks(path)) == b"a text\n" * 1000


@pytest.mark.parametrize("fraction", ["0.0001", "0.9999"])
def test_equal_documents_stay_together_even_if_a_split_would_be_empty(tmp_path: Path, run: Run, fraction: str) -> None:
    texts = ["the same text"] * 3 + ["another text"] * 2
    assert run(json_lines(tmp_path / "a.jsonl", texts), "--tokenizer", "byte", "--val-fraction", fraction) == 0
    dataset = dataset_of(tmp_path)
    train, val = (texts_of(dataset, split) for split in ("train", "val"))
    assert sorted(train + val) == sorted(texts)
    assert train
    assert val
    assert not set(train) & set(val)


@pytest.mark.parametrize(("newline", "warned"), [("\n", False), ("\r\n", True)])
def test_a_separator_that_no_file_has_is_reported(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str], newline: str, warned: bool
) -> None:
    (tmp_path / "a.txt").write_bytes((newline * 2).join(["a paragraph", "another one", "the last"]).encode())
    assert run(tmp_path / "a.txt", "--separator", "\\n\\n", "--tokenizer", "byte") == 0
    captured = capsys.readouterr()
    hint = r"no file has the separator '\n\n', so each is one document; lines end with \r\n: --separator '\r\n\r\n'"
    assert (hint in captured.out + captured.err) == warned


def test_of_two_documents_each_split_gets_one(tmp_path: Path, run: Run) -> None:
    assert run(json_lines(tmp_path / "a.jsonl", TEXTS[:2]), "--tokenizer", "byte") == 0
    dataset = dataset_of(tmp_path)
    assert [dataset.splits[name].documents for name in ("train", "val")] == [1, 1]


def test_a_registered_corpus_is_a_source(tmp_path: Path, run: Run) -> None:
    assert run("pydocs") == 0
    assert dataset_of(tmp_path).splits["train"].tokens > 100_000


# ------------------------------------------------------------------------------------------------------------ cleaning


def test_cleaning_is_applied_and_reported(
    tmp_path: Path, run: Run, small_parts: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "steps.yaml").write_text(
        "- emails: {mask: <EMAIL>}\n- document_length: {min_characters: 20}\n- near_duplicates: {threshold: 0.8}\n"
    )
    texts = [f"{hashlib.sha256(str(i).encode()).hexdigest() * 4} mail me at jo{i}@example.com" for i in range(80)]
    planted = [texts[3], texts[4] + "!", "short", "tiny", "few", "little", "", " "]
    source = json_lines(tmp_path / "a.jsonl", texts + planted)
    words = [source, "--clean", tmp_path / "steps.yaml"]
    assert run(*words, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "88 documents read, 80 would stay" in shown
    assert run(*words) == 0
    dataset = dataset_of(tmp_path)
    found = texts_of(dataset, "train") + texts_of(dataset, "val")
    assert sorted(found) == sorted(re.sub(r"jo\d+@example.com", "<EMAIL>", text) for text in texts)
    report = read_json(dataset.folder / "report.json")
    steps = {step["step"]: step for step in report["cleaning"]}
    assert steps["emails"]["documents_changed"] == 82
    assert steps["document_length"]["documents_removed"] == 4
    assert len(steps["document_length"]["examples"]) == 3
    assert steps["near_duplicates"]["documents_removed"] == report["duplicates"] == 2
    assert report["left_out"]["empty"]["count"] == 2
    assert dataset.facts["cleaning"][1]["settings"]["min_characters"] == 20
    card = (dataset.folder / "CARD.md").read_text()
    for line in ("- near_duplicates (threshold 0.8): 2 documents removed", "short"):
        assert line in card
        assert line in shown


def test_a_copy_of_a_near_duplicate_counts_as_an_exact_duplicate(tmp_path: Path, run: Run) -> None:
    (tmp_path / "steps.yaml").write_text("- exact_duplicates\n- near_duplicates\n")
    text = hashlib.sha256(b"text").hexdigest() * 4
    source = json_lines(tmp_path / "a.jsonl", [text, f"{text}!", f"{text}!", text, "another text", "one more"])
    assert run(source, "--clean", tmp_path / "steps.yaml") == 0
    report = read_json(dataset_of(tmp_path).folder / "report.json")
    assert {step["step"]: step["documents_removed"] for step in report["cleaning"]} == {
        "exact_duplicates": 2,
        "near_duplicates": 1,
    }


def test_a_long_document_is_cleaned_in_pieces(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "LONG_CHARACTERS", 500)
    monkeypatch.setattr(reading, "CLEANED_TOGETHER", 300)
    (tmp_path / "steps.yaml").write_text("- emails: {mask: <EMAIL>}\n")
    text = "".join(f"paragraph {i} of jo{i}@example.com\n\n" for i in range(100))
    (tmp_path / "a.txt").write_text(text)
    assert run(tmp_path / "a.txt", "--clean", tmp_path / "steps.yaml") == 0
    dataset = dataset_of(tmp_path)
    (train,), (val,) = texts_of(dataset, "train"), texts_of(dataset, "val")
    assert train + val == re.sub(r"jo\d+@example.com", "<EMAIL>", text)
    assert "Nothing, apart from what the cleaning removed." in (dataset.folder / "CARD.md").read_text()


def test_a_long_document_is_kept_or_removed_as_a_whole(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "LONG_CHARACTERS", 500)
    monkeypatch.setattr(reading, "CLEANED_TOGETHER", 300)
    (tmp_path / "steps.yaml").write_text("- emails\n- document_length: {min_characters: 100, max_characters: 1000}\n")
    long, longer = ("".join(f"paragraph {i}\n\n" for i in range(n)) for n in (60, 100))
    texts = [f"jo@example.com {long}", f"jo@example.com {longer}", " " * 600, *TEXTS[8:20:7]]
    source = json_lines(tmp_path / "a.jsonl", texts)
    assert run(source, "--clean", tmp_path / "steps.yaml") == 0
    dataset = dataset_of(tmp_path)
    kept = texts_of(dataset, "train") + texts_of(dataset, "val")
    assert sorted(kept) == sorted([f"<EMAIL> {long}", *texts[3:]])
    report = read_json(dataset.folder / "report.json")
    steps = {step["step"]: step for step in report["cleaning"]}
    assert (steps["document_length"]["documents_removed"], steps["document_length"]["count"]) == (1, 1)
    assert steps["document_length"]["examples"][0].startswith("1,396 characters: <EMAIL> paragraph 0")
    assert steps["emails"]["documents_changed"] == 2
    assert report["left_out"]["empty"]["count"] == 1


# ----------------------------------------------------------------------------------------------- processes and kills


def test_the_number_of_workers_changes_nothing(tmp_path: Path, run: Run, small_parts: None) -> None:
    source = json_lines(tmp_path / "a.jsonl")
    assert run(source, "--tokenizer", "bpe", "--bpe-vocab-size", "300", out="one") == 0
    words = ["--tokenizer", "bpe", "--bpe-vocab-size", "300", "--workers", "2"]
    assert prepare.main([str(source), "--out", str(tmp_path / "sets" / "two"), *words]) == 0
    one, two = (contents(tmp_path / "sets" / name) for name in ("one", "two"))
    for name in ("report.json", "CARD.md"):
        two[name] = two[name].replace(b"two", b"one")
    assert one == two


KILLED = """
import sys
from utils.corpora import readers
from utils.corpora.blocks import blocks
from utils.preparation import encoding
import prepare
readers.UNIT_BYTES, encoding.JOB_BYTES = 3000, 2000
sys.exit(prepare.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_killed_preparation_continues(tmp_path: Path) -> None:
    source = json_lines(tmp_path / "a.jsonl", TEXTS * 3)
    target = tmp_path / "sets" / "mine"
    words = [str(source), "--out", str(target), "--tokenizer", "bpe", "--bpe-vocab-size", "300", "--workers", "1"]
    command = [sys.executable, "-c", KILLED, *words]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    expected = contents(target)
    for path in target.iterdir():
        path.unlink()
    target.rmdir()
    work = target.with_name(".mine.preparing")
    for condition in (
        lambda: len(list(work.glob("texts/*.json"))) > 5,
        lambda: len(list(work.glob("tokens/*.lengths"))) > 5,
    ):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
        while not condition() and process.poll() is None:
            time.sleep(0.002)
        process.kill()
        process.communicate()
        if target.exists():  # it was faster than this test
            break
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert "continuing with the parts" in done.stdout or "already prepared" in done.stdout
    assert contents(target) == expected
    assert [path.name for path in target.parent.iterdir()] == ["mine"]


def test_parts_of_other_settings_or_files_are_not_used(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = json_lines(tmp_path / "a.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "learn_tokenizer", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(source, "--tokenizer", "byte") == 130
    assert list(tmp_path.glob("sets/.mine.preparing/texts/*.json"))
    json_lines(source, [text.upper() for text in TEXTS])
    assert run(source, "--tokenizer", "byte") == 0
    dataset = dataset_of(tmp_path)
    assert sorted(texts_of(dataset, "train") + texts_of(dataset, "val")) == sorted(text.upper() for text in TEXTS)


def test_a_killed_worker_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="a worker process was killed"):
        list(workers.in_order(_dies, [1, 2, 3], 2, lambda amount: None))


def _dies(job: int, report: Callable[[int], None]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_name_that_another_process_prepares_is_refused(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    source = json_lines(tmp_path / "a.jsonl")
    with work_folder(tmp_path / "sets" / "mine"):
        assert run(source) == 2
        assert re.search(r"sets/mine: is being prepared by process \d+ on ", error_of(capsys))
        assert prepare.main(["show", "mine", "--datasets-dir", str(tmp_path / "sets")]) == 2
        assert re.search(r"mine: is being prepared by process \d+ on ", error_of(capsys))
    assert run(source) == 0


def test_the_same_command_again_has_nothing_to_do(tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    source = json_lines(tmp_path / "a.jsonl")
    os.utime(source, (1, 1))
    assert run(source) == 0
    before = contents(tmp_path / "sets" / "mine")
    assert run(source) == 0
    assert "already prepared" in capsys.readouterr().out
    assert run(source, "--tokenizer", "byte") == 2
    assert "already exists, made from other files or with other settings" in error_of(capsys)
    assert contents(tmp_path / "sets" / "mine") == before
    assert run(source, "--tokenizer", "byte", "--replace") == 0
    assert read_json(tmp_path / "sets" / "mine" / "tokenizer.json")["type"] == "byte"
    assert [path.name for path in (tmp_path / "sets").iterdir()] == ["mine"]


def test_a_folder_that_is_not_a_dataset_is_never_replaced(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sets" / "mine").mkdir(parents=True)
    (tmp_path / "sets" / "mine" / "letters.txt").write_text("dear")
    assert run(json_lines(tmp_path / "a.jsonl"), "--replace") == 2
    assert "already exists and is not a dataset" in error_of(capsys)
    assert contents(tmp_path / "sets" / "mine") == {"letters.txt": b"dear"}


def test_a_damaged_dataset_is_replaced_only_on_request(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    source = json_lines(tmp_path / "a.jsonl")
    assert run(source) == 0
    facts = tmp_path / "sets" / "mine" / "dataset.json"
    facts.write_bytes(facts.read_bytes()[:100])
    assert run(source) == 2
    line = error_of(capsys)
    assert "dataset.json: damaged" in line
    assert "--replace it" in line
    assert [path.name for path in facts.parents[1].iterdir()] == ["mine"]
    assert run(source, "--replace") == 0
    assert texts_of(dataset_of(tmp_path), "train")


# ----------------------------------------------------------------------------------------------------------- bad input


def bad_sources(folder: Path) -> dict[str, tuple[list[Any], str]]:
    """Sources and flags, each with a pattern of the expected error line."""
    import pyarrow
    import pyarrow.parquet
    import zstandard

    good = json_lines(folder / "good.jsonl")

    def file(name: str, data: bytes) -> Path:
        path = folder / name
        path.write_bytes(data)
        return path

    packed = gzip.compress(good.read_bytes())
    lines = good.read_bytes().splitlines()
    pyarrow.parquet.write_table(pyarrow.table({"body": TEXTS, "n": range(len(TEXTS))}), folder / "t.parquet")
    (folder / "none").mkdir()
    return {
        "not UTF-8": ([file("latin.txt", b"abc\nd\xe9f\n")], r"latin.txt:2: not UTF-8 text \(byte 5 is 0xe9\)"),
        "binary": ([file("b.txt", b"abc\n\0")], r"b.txt:2: a binary file \(NUL at byte 4\)"),
        "empty": ([file("e.txt", b" \n\t\n")], r"e.txt: no documents: 1 empty"),
        "no lines": ([file("no.jsonl", b"")], r"no.jsonl: no documents$"),
        "not JSON": ([file("x.jsonl", b"\n".join([*lines[:90], b"{oops", *lines]))], r"x.jsonl:91: not JSON"),
        "not UTF-8 in JSON": ([file("y.jsonl", lines[0] + b'\n{"text": "\xff"}')], r"y.jsonl:2: not UTF-8 text"),
        "no field": ([good, "--field", "txt"], r"good.jsonl:1: no field 'txt': it has id, text; did you mean text\?"),
        "no text": ([file("n.jsonl", b'{"text": 5}\n')], r"n.jsonl:1: field 'text' is a number, expected a text"),
        "no object": ([file("l.jsonl", b"[1]\n")], r"l.jsonl:1: expected a JSON object, got a list"),
        "NUL in JSON": ([file("z.jsonl", b'{"text": "a\\u0000"}\n')], r"z.jsonl:1: binary data \(NUL at character 1"),
        "half a pair": ([file("s.jsonl", b'{"text": "a\\ud800"}\n')], r"s.jsonl:1: half a surrogate pair"),
        "truncated gz": ([file("t.jsonl.gz", packed[:-20])], r"t.jsonl.gz: truncated or damaged gzip data"),
        "damaged gz": ([file("d.jsonl.gz", packed[:99] + b"zzzz" + packed[103:])], r"d.jsonl.gz: truncated or damaged"),
        "no gz": ([file("n.txt.gz", b"plain")], r"n.txt.gz: truncated or damaged gzip data"),
        "no zst": ([file("n.txt.zst", b"plain")], r"n.txt.zst: damaged zstd data"),
        "truncated zst": (
            [file("u.txt.zst", zstandard.compress(bytes(range(1, 99)) * 99)[:-5])],
            "truncated zstd data",
        ),
        "no column": ([folder / "t.parquet"], r"t.parquet: no column 'text': its columns are body, n"),
        "no text column": ([folder / "t.parquet", "--field", "n"], r"t.parquet: column 'n' is int64, expected text"),
        "no parquet": ([file("p.parquet", b"PAR1 no")], r"p.parquet: (damaged|cannot be read)"),
        "no file": ([folder / "nothing.txt"], r"nothing.txt: no such file or folder"),
        "no glob": ([folder / "*.nothing"], r"\*.nothing: no file matches"),
        "empty folder": ([folder / "none"], r"none: no files in this folder that can be read"),
        "hub": (["someone/texts"], r"someone/texts: no such file or folder; .*pip install datasets"),
        "one tolerated": (
            [file("v.jsonl", b"\n".join([*lines[:50], b"1", *lines[:50], b"2"])), "--tolerate", "1"],
            r"v.jsonl:102: expected a JSON object, got a number; 1 tolerated",
        ),
        "no end": (["good.jsonl", "--tokenizer", f"hf:{no_end_of_text(folder)}"], "has no end-of-text token"),
        "no separator": ([good, "--separator", "\\x"], r"--separator '\\\\x'"),
    }


def no_end_of_text(folder: Path) -> Path:
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0})).save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def test_bad_input_is_reported_in_one_line_and_leaves_nothing(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str], small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    for name, (words, expected) in bad_sources(tmp_path).items():
        assert run(*words, "--no-leaks") == 2, name
        line = error_of(capsys)
        assert line.startswith("error: "), name
        assert re.search(expected, line), name
        assert not (tmp_path / "sets").exists() or not os.listdir(tmp_path / "sets"), name


def test_bytes_that_are_not_text_are_replaced_or_left_out(tmp_path: Path, run: Run, small_parts: None) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.txt").write_bytes("grüße".encode() + b"\xff\0 end")
    (tmp_path / "a" / "2.txt").write_text("fine")
    (tmp_path / "a" / "3.txt").write_text("good")
    (tmp_path / "a" / "4.jsonl").write_bytes(b'{"text": "a\\u0000"}\n{"text": "b\\ud800c"}\n{"text": "d\xff"}\n')
    assert run(tmp_path / "a", "--errors", "replace", out="replace") == 0
    dataset = dataset_of(tmp_path, "replace")
    found = sorted(texts_of(dataset, "train") + texts_of(dataset, "val"))
    assert found == sorted(["fine", "good", "grüße\ufffd\ufffd end", "a\ufffd", "b\ufffdc", "d\ufffd"])
    assert run(tmp_path / "a", "--errors", "skip", out="skip") == 0
    dataset = dataset_of(tmp_path, "skip")
    assert sorted(texts_of(dataset, "train") + texts_of(dataset, "val")) == ["fine", "good"]
    left_out = read_json(dataset.folder / "report.json")["left_out"]["not text"]
    assert left_out["count"] == 4
    assert left_out["examples"][0].endswith("1.txt:1: a binary file (NUL at byte 8)")


def test_some_records_without_text_are_tolerated(tmp_path: Path, run: Run, small_parts: None) -> None:
    path = json_lines(tmp_path / "a.jsonl")
    with path.open("a") as file:
        file.write('{"id": 1}\nnonsense\n')
    assert run(path, "--tolerate", "2", "--tokenizer", "byte") == 0
    dataset = dataset_of(tmp_path)
    assert dataset.splits["train"].documents + dataset.splits["val"].documents == len(TEXTS)
    card = (dataset.folder / "CARD.md").read_text()
    assert "no text in the record: 2" in card
    assert f"a.jsonl:{len(TEXTS) + 1}: no field 'text'" in card


def test_a_long_record_is_read_in_pieces(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lines that do not fit into memory, here of thousands of bytes, give the same texts."""
    monkeypatch.setattr(readers, "LONG_RECORD_BYTES", 1000)
    monkeypatch.setattr(readers, "BLOCK", 700)
    monkeypatch.setattr("utils.corpora.blocks.BLOCK", 700)
    monkeypatch.setattr("utils.corpora.json_lines.PIECE", 97)
    monkeypatch.setattr(reading, "LONG_CHARACTERS", 1000)
    monkeypatch.setattr(encoding, "JOB_BYTES", 600)
    generator = random.Random(1)
    letters = ["a", "\n", "\\", '"', "é", "😀", "\t", "\u2028", "ሴ", "b ", "u"]
    texts = ["".join(generator.choices(letters, k=generator.choice((10, 3000, 9000)))) for _ in range(30)]
    assert run(json_lines(tmp_path / "a.jsonl", texts), "--tokenizer", "byte", "--no-leaks") == 0
    dataset = dataset_of(tmp_path)
    assert sorted(texts_of(dataset, "train") + texts_of(dataset, "val")) == sorted(texts)
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "' + b"y" * 1500 + b"\xff" + b"y" * 1500 + b'"}\n{"text": "z"}\n')
    assert run(tmp_path / "b.jsonl", "--errors", "replace", "--tokenizer", "byte", out="b") == 0
    dataset = dataset_of(tmp_path, "b")
    found = sorted(texts_of(dataset, "train") + texts_of(dataset, "val"))
    assert found == ["y" * 1500 + "\ufffd" + "y" * 1500, "z"]
    assert run(tmp_path / "b.jsonl", "--tokenizer", "byte", out="c") == 2
    assert "b.jsonl:1: not UTF-8 text (0xff)" in error_of(capsys)
    long = "x" * 3000
    for line, expected in (
        (f'{{"a": {{"text": "no"}}, "b": "{long}"}}', "no field 'text': it has a, b"),
        (f'{{"text": ["{long}"]}}', "field 'text' is not a text"),
        (f'{{"text": "{long}"', "not JSON: it ends within an object"),
        (f'["{long}"]', "not a JSON object"),
    ):
        (tmp_path / "bad.jsonl").write_text(line)
        with pytest.raises(pipeline.CorpusError, match=re.escape(expected)):
            pipeline.prepare(options(tmp_path / "bad.jsonl", tmp_path), pipeline.Terminal(quiet=True))


def test_a_piece_of_a_long_document_may_have_no_tokens(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer such as BERT's drops white space, and a document may have megabytes of it."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr(encoding, "JOB_BYTES", 1500)
    monkeypatch.setattr(encoding, "CUT_WINDOW", 500)
    source = json_lines(tmp_path / "a.jsonl", ["a b " * 700 + " " * 6000 + "b " * 600, "a", "b"])
    assert run(source, "--tokenizer", f"hf:{tmp_path / 'tokenizer.json'}") == 0
    splits = dataset_of(tmp_path).splits
    assert splits["train"].tokens + splits["val"].tokens == 2000 + 1 + 1 + 3


def options(source: Path, folder: Path) -> pipeline.Preparation:
    words = [str(source), "--out", str(folder / "sets" / "other"), "--tokenizer", "byte"]
    return prepare.preparation_options(prepare.parse(words))


def test_a_full_disk_is_reported_in_one_line_and_finished_parts_stay(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = json_lines(tmp_path / "a.jsonl")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shards.ShardWriter, "add_all", full)
        assert run(source) == 1
    assert re.search(
        r"error: .*/\.mine\.preparing: No space left on device; finished parts stay there", error_of(capsys)
    )
    assert not (tmp_path / "sets" / "mine").exists()
    assert run(source) == 0
    assert "continuing with the parts" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------------- output


def test_list_show_and_verify(tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(json_lines(tmp_path / "a.jsonl"), "--licence", "CC0", "--origin", "a test", "--json") == 0
    made = json.loads(capsys.readouterr().out)
    (tmp_path / "sets" / ".other.preparing").mkdir()
    folder = ["--datasets-dir", str(tmp_path / "sets")]
    assert prepare.main(["show", "mine", *folder, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == made
    assert prepare.main(["list", *folder, "--json"]) == 0
    mine, other = json.loads(capsys.readouterr().out)
    assert (mine["name"], mine["documents"], mine["tokenizer"], other["status"]) == ("mine", 200, "char", "interrupted")
    assert prepare.main(["list", *folder]) == 0
    assert "mine" in capsys.readouterr().out
    assert prepare.main(["show", "mine", *folder]) == 0
    shown = capsys.readouterr().out
    assert "Licence: CC0" in shown
    assert "Origin: a test" in shown
    assert prepare.main(["verify", "mine", *folder]) == 0
    assert "all checksums match" in capsys.readouterr().out
    path = tmp_path / "sets" / "mine" / "train_00000.bin"
    path.write_bytes(b"\1" + path.read_bytes()[1:])
    assert prepare.main(["verify", "mine", *folder]) == 2
    assert "train_00000.bin: edited or damaged" in error_of(capsys)
    assert prepare.main(["show", "mein", *folder]) == 2
    assert re.search(r"no dataset mein in .*: there is mine, other; did you mean mine\?", error_of(capsys))


def test_the_printed_training_command_finds_the_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A name is enough only in the folder that train.py searches without further flags."""
    words = [str(json_lines(tmp_path / "a.jsonl")), "--workers", "1", "--datasets-dir", str(tmp_path / "my sets")]
    assert prepare.main([*words, "--out", "mine"]) == 0
    assert capsys.readouterr().out.endswith(f"python train.py --dataset '{tmp_path / 'my sets' / 'mine'}'\n")
    for name in ("shakespeare", "arithmetic"):  # --dataset means the corpus
        assert prepare.main([*words, "--out", name]) == 2
        assert f"--dataset {name} means the registered corpus" in error_of(capsys)


def test_a_dry_run_makes_nothing(tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(json_lines(tmp_path / "a.jsonl"), "--dry-run") == 0
    assert "200 documents read, 200 would stay" in capsys.readouterr().out
    assert run(json_lines(tmp_path / "a.jsonl"), "--dry-run", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["documents_read"], found["documents_kept"]) == (200, 200)
    assert not any((tmp_path / "sets").iterdir())


def test_a_dry_run_shows_which_step_would_remove_everything(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    source, steps = json_lines(tmp_path / "a.jsonl", ["Short.", "Shorter."]), tmp_path / "steps.yaml"
    steps.write_text("- document_length\n- near_duplicates\n")
    assert run(source, "--clean", str(steps), "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "2 documents read, 0 would stay" in printed
    assert "max_characters none): 2 documents removed" in " ".join(printed.split())
    assert run(source, "--clean", str(steps)) == 2
    assert "2 removed by the cleaning (--dry-run shows by which step)" in error_of(capsys)


def test_text_from_elsewhere_is_not_markdown_on_the_card(tmp_path: Path, run: Run) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "one"}\n{"text": "two"}\n{"![](http://x)<b>": 1}\n')
    order = ("--tolerate", "1", "--licence", "![](http://y) <i>", "--separator", "|")
    assert run(str(source), *order) == 0
    card = (dataset_of(tmp_path).folder / "CARD.md").read_text()
    assert re.search(r"    - `[^`]*a\.jsonl:3: no field 'text': it has !\[\]\(http://x\)<b>`", card)
    assert r"- Licence: \!\[](http://y) \<i>" in card
    assert r"| separator | \| |" in card


def test_leaks_are_in_the_dataset_and_on_its_card(tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    generator = random.Random(0)
    texts = ["".join(generator.choices("abcdefghij ", k=400)) for _ in range(60)]
    texts += [text[:-1] + "!" for text in texts]  # each nearly equals another, which may be in the other split
    assert run(json_lines(tmp_path / "a.jsonl", texts), "--val-fraction", "0.3") == 0
    dataset = dataset_of(tmp_path)
    train, val = texts_of(dataset, "train"), texts_of(dataset, "val")
    known = {text[:-1] for text in train}
    assert list(dataset.leaks) == [number for number, text in enumerate(val) if text[:-1] in known]
    assert dataset.leaks
    assert "val/loss looks better than it is" in capsys.readouterr().out
    assert re.search(r"is like .*a\.jsonl:\d+", (dataset.folder / "CARD.md").read_text())


def test_the_first_start_on_a_new_dataset_computes_no_checksum(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(json_lines(tmp_path / "a.jsonl")) == 0
    monkeypatch.setattr("utils.corpora.datasets.checksum", lambda path: pytest.fail(f"{path} was read"))
    read_dataset(tmp_path / "sets" / "mine").verify()


def test_a_dropped_document_leaves_no_characters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.preparation.reading.LOOKED_UP_CHARACTERS", 4)
    job = SimpleNamespace(stem=tmp_path / "part", characters=True, fingerprints=False)
    writer = reading._PartWriter(job)  # type: ignore[arg-type]
    writer.write("abca")
    writer.end(readers.Document(0, 1, ""))
    for piece in ("axyz", "xyzé"):
        writer.write(piece)
    writer.drop()
    writer.write("bz")
    writer.end(readers.Document(0, 3, ""))
    assert writer.characters() == "abcz"
