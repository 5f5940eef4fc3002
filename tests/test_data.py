"""Corpora, token files, the split into train and val, and batches as pure functions of the step."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import data
import tokenizer
from data import BatchSampler, Corpus, TokenFile, load_corpus, sample_offsets
from tests.tiny_export import char_tokenizer
from tokenizer import CharTokenizer, Tokenizer, build_tokenizer
from utils.config.settings import DataConfig
from utils.corpora import sources
from utils.corpora.sources import CorpusError
from utils.tokenization.subwords import HuggingFaceTokenizer

CPU = torch.device("cpu")

# ------------------------------------------------------------- token files and the split


def load(path: Path, corpora: Path, block_size: int = 8, **settings: object) -> Corpus:
    return load_corpus(DataConfig.model_validate({"dataset": str(path), **settings}), block_size, corpora)


def token_file(corpora: Path) -> Path:
    (path,) = (corpora / "encoded").glob("*.uint*")
    return path


def test_a_corpus_is_its_encoded_text(tiny_corpus: Path, tiny_text: str, tmp_path: Path) -> None:
    corpus = load(tiny_corpus, tmp_path / "corpora")
    assert corpus.tokenizer.decode(corpus.tokens) == tiny_text
    assert corpus.tokenizer.decode(range(corpus.tokenizer.vocab_size)) == "".join(sorted(set(tiny_text)))
    assert corpus.hash == hashlib.sha256(tiny_text.encode()).hexdigest()
    assert corpus.name == str(tiny_corpus)


def test_tokens_are_memory_mapped(tiny_corpus: Path, tiny_text: str, tmp_path: Path) -> None:
    tokens = load(tiny_corpus, tmp_path / "corpora").tokens
    assert isinstance(tokens.base, np.memmap)
    assert tokens.dtype == np.uint16
    assert token_file(tmp_path / "corpora").stat().st_size == 2 * len(tiny_text)
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1


def test_a_token_file_is_made_once(
    monkeypatch: pytest.MonkeyPatch, tiny_corpus: Path, tiny_text: str, tmp_path: Path
) -> None:
    load(tiny_corpus, tmp_path / "corpora")

    def refuse(*_args: object) -> None:
        raise AssertionError("encoded again")

    monkeypatch.setattr(data, "write_atomic", refuse)
    corpus = load(tiny_corpus, tmp_path / "corpora", block_size=16)
    assert corpus.tokenizer.decode(corpus.tokens) == tiny_text


@pytest.mark.parametrize("damage", [b"", b"\0\0", b"\0" * 100_000])
def test_a_token_file_of_the_wrong_size_is_made_again(
    damage: bytes, tiny_corpus: Path, tiny_text: str, tmp_path: Path
) -> None:
    load(tiny_corpus, tmp_path / "corpora")
    token_file(tmp_path / "corpora").write_bytes(damage)
    corpus = load(tiny_corpus, tmp_path / "corpora")
    assert corpus.tokenizer.decode(corpus.tokens) == tiny_text


def test_each_text_and_tokenizer_has_its_own_token_file(tiny_corpus: Path, tiny_text: str, tmp_path: Path) -> None:
    corpora = tmp_path / "corpora"
    load(tiny_corpus, corpora)
    load(tiny_corpus, corpora, unknown_token="\0")
    tiny_corpus.write_text(tiny_text.swapcase(), encoding="utf-8")
    load(tiny_corpus, corpora)
    assert len(list((corpora / "encoded").glob("*.uint16"))) == 3


def test_texts_with_equal_characters_and_length_have_their_own_token_files(
    tiny_corpus: Path, tiny_text: str, tmp_path: Path
) -> None:
    first = load(tiny_corpus, tmp_path / "corpora")
    tiny_corpus.write_text(tiny_text[::-1], encoding="utf-8")
    second = load(tiny_corpus, tmp_path / "corpora")
    assert first.tokenizer.hash() == second.tokenizer.hash()
    names = sorted(path.name for path in (tmp_path / "corpora" / "encoded").glob("*.uint16"))
    assert names == sorted(f"{one.hash[:16]}-{one.tokenizer.hash()[:16]}.uint16" for one in (first, second))
    assert load(tiny_corpus, tmp_path / "corpora").tokenizer.decode(second.tokens) == tiny_text[::-1]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1, np.uint16), (1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)])
def test_ids_take_the_smallest_type_that_holds_them(vocab_size: int, dtype: type) -> None:
    tokenizer: Any = SimpleNamespace(vocab_size=vocab_size)  # the largest id is vocab_size - 1
    assert TokenFile(Path(), "", tokenizer, 0).dtype == dtype


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 5 << 19])
def test_the_checksum_covers_the_whole_file(size: int, tmp_path: Path) -> None:
    tokenizer: Any = SimpleNamespace(vocab_size=5, hash=lambda: "h")
    file = TokenFile(tmp_path, "c", tokenizer, 0)
    content = np.arange(size, dtype=np.uint32).astype(np.uint8).tobytes()
    file.path.write_bytes(content)
    assert file.crc32() == zlib.crc32(content)


def test_a_large_vocabulary_takes_uint32(tmp_path: Path) -> None:
    text = "".join(map(chr, range(0x10000, 0x10000 + (1 << 16) + 1)))
    (tmp_path / "many.txt").write_text(text, encoding="utf-8")
    corpus = load(tmp_path / "many.txt", tmp_path)
    assert corpus.tokens.dtype == np.uint32
    assert corpus.tokens[-1] == 1 << 16


def test_a_corpora_folder_that_cannot_be_made_is_an_error(tiny_corpus: Path) -> None:
    with pytest.raises(CorpusError, match="token file cannot be written"):
        load(tiny_corpus, tiny_corpus)  # a file where the folder should be


@pytest.mark.parametrize(("val_fraction", "n_train"), [(0.1, 900), (0.25, 750), (0.5, 500)])
def test_the_first_part_is_train_and_the_rest_is_val(val_fraction: float, n_train: int, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("abcdefghij" * 100)
    corpus = load(tmp_path / "text", tmp_path, val_fraction=val_fraction)
    assert (corpus.n_train, corpus.n_val) == (n_train, 1000 - n_train)
    np.testing.assert_array_equal(corpus.split("train"), corpus.tokens[:n_train])
    np.testing.assert_array_equal(corpus.split("train_eval"), corpus.tokens[:n_train])
    np.testing.assert_array_equal(corpus.split("val"), corpus.tokens[n_train:])


@pytest.mark.parametrize(
    ("val_fraction", "block_size", "split"), [(0.1, 9, None), (0.1, 10, "validation"), (0.9, 10, "training")]
)
def test_each_split_must_be_longer_than_block_size(
    val_fraction: float, block_size: int, split: str | None, tmp_path: Path
) -> None:
    (tmp_path / "text").write_text("abcdefghij" * 10)
    if split is None:
        assert load(tmp_path / "text", tmp_path, block_size, val_fraction=val_fraction).n_val == 10
        return
    with pytest.raises(CorpusError, match=rf"too short: its {split} split has .* of 100 tokens, .* at least 11"):
        load(tmp_path / "text", tmp_path, block_size, val_fraction=val_fraction)
    assert not (tmp_path / "encoded").exists()


# ------------------------------------------------------------------ records of token files

LONG_AGO = 1_000_000_000  # an mtime; a file that was modified just now may change again within the same mtime


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every text file that is read, in order."""
    paths: list[Path] = []
    read = sources._read_bytes

    def counted(path: Path) -> bytes:
        paths.append(path)
        return read(path)

    monkeypatch.setattr(sources, "_read_bytes", counted)
    return paths


@pytest.fixture
def settled_corpus(tiny_corpus: Path) -> Path:
    os.utime(tiny_corpus, (LONG_AGO, LONG_AGO))
    return tiny_corpus


def records(corpora: Path) -> list[Path]:
    return sorted((corpora / "encoded").glob("*.json"))


def test_an_unchanged_corpus_is_neither_read_nor_hashed_again(
    reads: list[Path], settled_corpus: Path, tiny_text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(settled_corpus, tmp_path / "corpora")
    monkeypatch.setattr(data, "build_tokenizer", None)
    monkeypatch.setattr(data, "_encode", None)
    again = load(settled_corpus, tmp_path / "corpora", block_size=16)
    resumed = load_corpus(DataConfig(dataset=str(settled_corpus)), 8, tmp_path / "corpora", first.tokenizer)
    assert reads == [settled_corpus]
    for corpus in (again, resumed):
        assert (corpus.hash, corpus.n_train) == (first.hash, first.n_train)
        assert corpus.tokenizer.to_json() == first.tokenizer.to_json()
        assert corpus.tokenizer.decode(corpus.tokens) == tiny_text


def test_an_encoded_file_is_verified_once_after_it_was_touched(
    settled_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(settled_corpus, tmp_path / "corpora")
    os.utime(token_file(tmp_path / "corpora"), (LONG_AGO, LONG_AGO))
    checked: list[Path] = []
    original = TokenFile.crc32

    def counted(self: TokenFile) -> int:
        checked.append(self.path)
        return original(self)

    monkeypatch.setattr(TokenFile, "crc32", counted)
    for _ in range(3):
        load(settled_corpus, tmp_path / "corpora")
    assert len(checked) == 1
    os.utime(token_file(tmp_path / "corpora"), (LONG_AGO + 1, LONG_AGO + 1))
    load(settled_corpus, tmp_path / "corpora")
    assert len(checked) == 2


@pytest.mark.parametrize(("shift", "accepted"), [(0, True), (1, False), (-1, False)])
def test_ids_outside_the_vocabulary_are_refused(
    shift: int, accepted: bool, tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = CharTokenizer.encode_parts
    shifted = lambda self, text: (part.astype(np.int64) + shift for part in parts(self, text))  # noqa: E731
    monkeypatch.setattr(CharTokenizer, "encode_parts", shifted)
    if accepted:
        load(tiny_corpus, tmp_path)
    else:
        with pytest.raises(CorpusError, match="its tokenizer gives ids outside its vocabulary of"):
            load(tiny_corpus, tmp_path)


def test_settings_that_do_not_affect_the_tokens_reuse_the_token_file(
    reads: list[Path], settled_corpus: Path, tmp_path: Path
) -> None:
    sizes = [load(settled_corpus, tmp_path / "corpora", val_fraction=part).n_val for part in (0.1, 0.5)]
    assert sizes[0] < sizes[1]
    elsewhere = {"corpora_dir": "as it is called elsewhere", "datasets_dir": "too"}
    load(settled_corpus, tmp_path / "corpora", **elsewhere)
    assert len(reads) == 1


def test_a_corpus_that_was_just_modified_is_read_again(reads: list[Path], tiny_corpus: Path, tmp_path: Path) -> None:
    for _ in range(2):
        load(tiny_corpus, tmp_path / "corpora")
    assert len(reads) == 2
    assert records(tmp_path / "corpora") == []


@pytest.mark.parametrize("seconds", [-1, 1])
def test_a_touched_corpus_is_read_again_and_keeps_its_hash(
    seconds: int, reads: list[Path], settled_corpus: Path, tmp_path: Path
) -> None:
    first = load(settled_corpus, tmp_path / "corpora")
    os.utime(settled_corpus, (LONG_AGO, LONG_AGO + seconds))
    assert load(settled_corpus, tmp_path / "corpora").hash == first.hash
    assert load(settled_corpus, tmp_path / "corpora").hash == first.hash
    assert len(reads) == 2


def test_a_changed_corpus_is_encoded_again(settled_corpus: Path, tiny_text: str, tmp_path: Path) -> None:
    first = load(settled_corpus, tmp_path / "corpora")
    settled_corpus.write_text(tiny_text.replace("lazy", "idle"), encoding="utf-8")  # the size stays the same
    os.utime(settled_corpus, (LONG_AGO, LONG_AGO + 1))
    changed = load(settled_corpus, tmp_path / "corpora")
    assert changed.hash != first.hash
    assert "idle" in changed.tokenizer.decode(changed.tokens)


def test_a_new_file_in_a_folder_is_noticed(reads: list[Path], tiny_text: str, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()

    def add(name: str) -> None:
        (folder / name).write_text(tiny_text, encoding="utf-8")
        os.utime(folder / name, (LONG_AGO, LONG_AGO))

    add("a.txt")
    first = load(folder, tmp_path / "corpora")
    assert load(folder, tmp_path / "corpora").hash == first.hash
    assert len(reads) == 1
    add("b.txt")
    assert load(folder, tmp_path / "corpora").n_train > first.n_train


DAMAGES = {
    "not JSON": lambda text: text[: len(text) // 2],
    "a list": lambda text: "[]",
    "a missing key": lambda text: text.replace('"n_tokens"', '"tokens"'),
    "another hash": lambda text: text.replace('"corpus_hash": "', '"corpus_hash": "0'),
    "not a number": lambda text: text.replace('"n_tokens": ', '"n_tokens": "x", "y": '),
    "another number of tokens": lambda text: text.replace('"n_tokens": ', '"n_tokens": 1'),
    "another kind of tokenizer": lambda text: text.replace('"char"', '"bpe"'),
    "another vocabulary": lambda text: text.replace('"q"', '"Q"'),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_corpus_with_a_damaged_record_is_read_again(
    damage: Callable[[str], str], reads: list[Path], settled_corpus: Path, tiny_text: str, tmp_path: Path
) -> None:
    first = load(settled_corpus, tmp_path / "corpora")
    for path in records(tmp_path / "corpora"):
        text = damage(path.read_text(encoding="utf-8"))
        assert text != path.read_text(encoding="utf-8")
        path.write_text(text, encoding="utf-8")
    corpus = load(settled_corpus, tmp_path / "corpora")
    assert len(reads) == 2
    assert (corpus.hash, corpus.tokenizer.decode(corpus.tokens)) == (first.hash, tiny_text)


@pytest.mark.parametrize("place", ["a pipe", "/dev/zero", "too large", "nested"])
def test_a_record_that_we_cannot_have_written_is_ignored(place: str, settled_corpus: Path, tmp_path: Path) -> None:
    first = load(settled_corpus, tmp_path / "corpora")
    for path in records(tmp_path / "corpora"):
        path.unlink()
        if place == "a pipe":
            os.mkfifo(path)
        elif place == "/dev/zero":
            path.symlink_to(place)
        elif place == "nested":
            path.write_text("[" * 100_000)
        else:
            with path.open("wb") as file:
                file.truncate(1 << 40)
    assert load(settled_corpus, tmp_path / "corpora").hash == first.hash


@pytest.mark.parametrize("content", [None, b"\0\0"])
def test_a_corpus_without_a_complete_token_file_is_read_again(
    content: bytes | None, reads: list[Path], settled_corpus: Path, tiny_text: str, tmp_path: Path
) -> None:
    load(settled_corpus, tmp_path / "corpora")
    path = token_file(tmp_path / "corpora")
    path.unlink() if content is None else path.write_bytes(content)
    corpus = load(settled_corpus, tmp_path / "corpora")
    assert corpus.tokenizer.decode(corpus.tokens) == tiny_text
    assert len(reads) == 2


def test_models_that_share_a_tokenizer_share_tokens_but_not_their_number_of_rows(
    reads: list[Path], settled_corpus: Path, tmp_path: Path
) -> None:
    config = DataConfig(tokenizer="bpe", bpe_vocab_size=300, dataset=str(settled_corpus))
    specification = build_tokenizer(config, [settled_corpus.read_text()]).huggingface()
    for rows in (320, 310, 320):
        corpus = load_corpus(config, 8, tmp_path / "corpora", HuggingFaceTokenizer(specification, rows))
        assert corpus.tokenizer.vocab_size == rows
    assert len(reads) == 1


def test_each_unknown_token_has_its_own_record(reads: list[Path], settled_corpus: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert load(settled_corpus, tmp_path / "corpora").tokenizer.special_tokens == {}
        assert load(settled_corpus, tmp_path / "corpora", unknown_token="?").tokenizer.special_tokens != {}
    assert len(reads) == 2


def test_a_record_that_cannot_be_written_is_no_error(
    settled_corpus: Path, tiny_text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data, "write_record", full)
    corpus = load(settled_corpus, tmp_path / "corpora")
    assert corpus.tokenizer.decode(corpus.tokens) == tiny_text


def test_the_language_reference_is_not_imported_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_corpus(DataConfig(), 8, tmp_path)
    monkeypatch.setattr(sources, "_read_pydocs", None)
    assert load_corpus(DataConfig(), 8, tmp_path).hash == first.hash


# ---------------------------------------------------------------------------- batches


def philox_4x64(counter: list[int], key: tuple[int, int]) -> list[int]:
    """Four words of Philox4x64-10 as in the paper."""
    mask = 2**64 - 1
    c, (k0, k1) = counter, key
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [(second >> 64) ^ c[1] ^ k0, second & mask, (first >> 64) ^ c[3] ^ k1, first & mask]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return c


@pytest.mark.parametrize("seed", [0, 1337, 2**63 - 1])
@pytest.mark.parametrize(("stream", "number"), [("train", 0), ("train_eval", 1), ("val", 2)])
@pytest.mark.parametrize("epoch", [0, 1, 2**40])
def test_the_order_of_a_pass_comes_from_philox_words(seed: int, stream: str, number: int, epoch: int) -> None:
    n_windows = 19  # of 10 tokens each, out of 205: the phase is one of 15
    first, *words = [w for i in range(1, 6) for w in philox_4x64([i, 0, 0, epoch], (seed, number))][: n_windows + 1]
    expected = [first % 15 + 10 * window for window in sorted(range(n_windows), key=words.__getitem__)]
    assert sample_offsets(seed, stream, epoch * n_windows, n_windows, 205, 10).tolist() == expected


def test_offsets_do_not_depend_on_how_samples_are_sliced() -> None:
    whole = sample_offsets(7, "train", 0, 100, 123, 4)
    for first in range(40):
        for count in range(1, 60):
            part = sample_offsets(7, "train", first, count, 123, 4)
            np.testing.assert_array_equal(part, whole[first : first + count])


@pytest.mark.parametrize(("n_tokens", "block_size"), [(9, 8), (15, 8), (16, 8), (17, 8), (1000, 8), (1007, 1)])
def test_a_pass_visits_each_window_once_and_stays_inside(n_tokens: int, block_size: int) -> None:
    n_windows = max(n_tokens // block_size - 1, 1)
    for epoch in range(20):
        offsets = np.sort(sample_offsets(3, "train", epoch * n_windows, n_windows, n_tokens, block_size))
        assert (np.diff(offsets) == block_size).all()
        assert offsets[0] >= 0
        assert offsets[-1] + block_size + 1 <= n_tokens


def test_passes_start_at_every_phase() -> None:
    assert {int(sample_offsets(1, "train", 9 * epoch, 9, 100, 10).min()) for epoch in range(200)} == set(range(10))


def test_each_seed_and_stream_has_its_own_offsets() -> None:
    rows = [sample_offsets(seed, name, 0, 8, 10**6, 8) for seed in (1, 2) for name in ("train", "train_eval", "val")]
    assert len({tuple(row) for row in rows}) == 6


def counting_corpus(n: int = 100, n_train: int = 80) -> Corpus:
    """A corpus in which token i is i, so a batch shows its own offsets."""
    return Corpus("counting", "", char_tokenizer(map(chr, range(n))), np.arange(n, dtype=np.uint16), n_train)


def sampler(batch_size: int = 12, block_size: int = 8, seed: int = 5) -> BatchSampler:
    return BatchSampler(counting_corpus(), block_size, batch_size, seed, CPU)


def test_targets_are_the_inputs_shifted_by_one() -> None:
    inputs, targets = sampler().train_batch(3)
    assert inputs.shape == targets.shape == (12, 8)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.is_contiguous()
    assert targets.is_contiguous()
    torch.testing.assert_close(targets, inputs + 1)
    torch.testing.assert_close(inputs, inputs[:, :1] + torch.arange(8))


def test_on_a_gpu_the_next_batch_is_made_ahead_and_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, int]] = []
    original = BatchSampler._batch

    def on_cpu(self: BatchSampler, stream: str, seed: int, first: int, count: int) -> Any:
        made.append((first, count))
        return original(replace(self, device=CPU), stream, seed, first, count)

    monkeypatch.setattr(BatchSampler, "_batch", on_cpu)
    ahead = replace(sampler(), device=torch.device("cuda"))
    ahead.prefetch(3, 1, 2)
    ahead.prefetch(3, 1, 2)
    made.clear()
    assert torch.equal(ahead.train_batch(3, 1, 2)[0], sampler().train_batch(3, 1, 2)[0])
    assert made == [(42, 6)]  # by the other sampler
    assert torch.equal(ahead.train_batch(3, 1, 2)[0], sampler().train_batch(3, 1, 2)[0])
    assert len(made) == 3
    made.clear()
    ahead.prefetch(4)
    assert torch.equal(ahead.train_batch(4)[0], sampler().train_batch(4)[0])
    assert made == [(48, 12), (48, 12)]  # ahead, and by the other sampler
    ahead.prefetch(4)
    assert torch.equal(ahead.train_batch(5)[0], sampler().train_batch(5)[0])  # not the batch that was prefetched


def test_a_batch_is_on_the_device_of_the_sampler() -> None:
    inputs, targets = replace(sampler(), device=torch.device("meta")).train_batch(0)
    assert (inputs.device.type, targets.device.type) == ("meta", "meta")


def test_on_a_cpu_nothing_is_made_ahead() -> None:
    one = sampler()
    one.prefetch(3)
    assert not one._ahead


def test_batches_start_at_the_offsets_of_their_step() -> None:
    inputs, _ = sampler().train_batch(3)
    assert inputs[:, 0].tolist() == sample_offsets(5, "train", 3 * 12, 12, 80, 8).tolist()
    assert sampler().train_offsets(3) == inputs[:, 0].tolist()


@pytest.mark.parametrize(("micro_steps", "world_size"), [(1, 1), (3, 1), (1, 4), (2, 2), (3, 4)])
def test_parts_of_a_batch_make_up_the_global_batch(micro_steps: int, world_size: int) -> None:
    whole = sampler().train_batch(7)
    parts = [
        sampler().train_batch(7, micro_step, micro_steps, rank, world_size)
        for micro_step in range(micro_steps)
        for rank in range(world_size)
    ]
    for index in range(2):
        assert torch.equal(torch.cat([part[index] for part in parts]), whole[index])


def test_a_batch_is_a_pure_function_of_the_step() -> None:
    one = sampler()
    first = one.train_batch(0)[0]
    later = one.train_batch(9)[0]
    assert torch.equal(sampler().train_batch(9)[0], later)
    assert torch.equal(one.train_batch(0)[0], first)
    assert not torch.equal(first, later)


def test_train_batches_depend_on_the_seed_and_evaluation_batches_do_not() -> None:
    one, other = sampler(seed=1), sampler(seed=2)
    assert not torch.equal(one.train_batch(0)[0], other.train_batch(0)[0])
    for stream in ("train_eval", "val"):
        for a, b in zip(one.evaluation_batches(stream, 3), other.evaluation_batches(stream, 3), strict=True):
            assert torch.equal(a[0], b[0])
            assert torch.equal(a[1], b[1])


def test_evaluation_batches_use_seed_0_in_every_version() -> None:
    ((inputs, _),) = sampler(seed=9).evaluation_batches("train_eval", 1)  # so losses are comparable
    assert inputs[:, 0].tolist() == sample_offsets(0, "train_eval", 0, len(inputs), 80, 8).tolist()
    assert len(inputs) > 4
    assert sample_offsets(0, "val", 0, 12, 20, 8).tolist() == [8, 2, 6, 9, 10, 6, 7, 6, 11, 6, 7, 7]


def test_evaluation_batches_differ_from_each_other() -> None:
    one = BatchSampler(counting_corpus(1000, 500), 8, 12, 0, CPU)
    batches = [inputs for inputs, _ in one.evaluation_batches("val", 3)]
    assert [batch.shape for batch in batches] == [(12, 8)] * 3
    assert len({tuple(batch.flatten().tolist()) for batch in batches}) == 3


def test_samples_stay_inside_their_split_and_reach_all_of_it() -> None:
    one = sampler()
    train = torch.cat([torch.cat(one.train_batch(step)) for step in range(100)])
    assert (train.min(), train.max()) == (0, 79)
    for stream, low, high in (("train_eval", 0, 79), ("val", 80, 99)):
        tokens = torch.cat([torch.cat(pair) for pair in one.evaluation_batches(stream, 100)])
        assert low <= tokens.min() < tokens.max() <= high


@pytest.mark.parametrize("micro_steps", [1, 3])
def test_an_evaluation_reads_a_split_at_most_once(micro_steps: int) -> None:
    one = BatchSampler(counting_corpus(1000, 500), 8, 12, 0, CPU)
    for stream in ("train_eval", "val"):
        batches = [inputs for inputs, _ in one.evaluation_batches(stream, 1000, micro_steps)]
        assert one.evaluation_windows(stream, 1000) == 500 // 8 - 1 == sum(map(len, batches))
        tokens = torch.cat(batches).flatten()
        assert len(tokens.unique()) == len(tokens)
        assert {len(batch) for batch in batches[:-1]} == {12 // micro_steps}
        assert len(list(one.evaluation_batches(stream, 2, micro_steps))) == 2 * micro_steps


def test_a_split_of_one_window_gives_that_window() -> None:
    one = BatchSampler(counting_corpus(100, 91), 8, 2, 0, CPU)
    ((inputs, targets),) = one.evaluation_batches("val", 1)
    assert inputs.tolist() == [list(range(91, 99))]
    assert targets.tolist() == [list(range(92, 100))]


# ------------------------------------------------------------------------ the tokenizer of a model


def corpus_of(text: str, tmp_path: Path, tokenizer: Tokenizer | None, **settings: str) -> Corpus:
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    return load_corpus(DataConfig(dataset=str(path), **settings), 4, tmp_path / "corpora", tokenizer)


def test_a_corpus_is_encoded_with_the_tokenizer_of_the_model(tmp_path: Path) -> None:
    tokenizer = char_tokenizer("zyx cba")  # other ids than those of the corpus itself
    corpus = corpus_of("abc cba " * 20, tmp_path, tokenizer)
    assert corpus.tokenizer is tokenizer
    assert corpus.tokens[:8].tolist() == [6, 5, 4, 3, 4, 5, 6, 3]
    assert tokenizer.decode(corpus.tokens) == "abc cba " * 20


def test_token_files_of_two_tokenizers_are_kept_apart(tmp_path: Path) -> None:
    text = "abc cba " * 20
    own = corpus_of(text, tmp_path, None)
    other = corpus_of(text, tmp_path, char_tokenizer("zyx cba"))
    assert own.tokens[:4].tolist() == [1, 2, 3, 0]
    assert own.hash == other.hash
    assert len(list((tmp_path / "corpora" / "encoded").glob("*.uint16"))) == 2
    assert corpus_of(text, tmp_path, char_tokenizer("zyx cba")).tokens[:4].tolist() == [6, 5, 4, 3]


def test_characters_unknown_to_the_model_are_named_with_the_flag_that_helps(tmp_path: Path) -> None:
    with pytest.raises(CorpusError) as caught:
        corpus_of("abcü é🙂 " * 20, tmp_path, char_tokenizer("abc "))
    assert str(caught.value) == (
        f"{tmp_path / 'text.txt'}: has 3 characters that the vocabulary of the model (4 characters) lacks: "
        "'é', 'ü', '🙂'; --unknown-token ' ' reads each of them as ' '"
    )
    assert not (tmp_path / "corpora").exists()


def test_of_many_unknown_characters_eight_are_shown(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"has 9 characters .*lacks: 'b', .*'i', \.\.\.; --unknown-token 'a' reads"):
        corpus_of("abcdefghij" * 20, tmp_path, char_tokenizer("a"))


def test_an_unknown_token_of_the_vocabulary_stands_for_all_others(tmp_path: Path) -> None:
    tokenizer = char_tokenizer("abc ")
    corpus = corpus_of("abcü" * 20, tmp_path, tokenizer, unknown_token=" ")
    assert corpus.tokens[:4].tolist() == [0, 1, 2, 3]
    assert corpus.tokenizer.to_json() == char_tokenizer("abc ", " ").to_json()
    assert tokenizer.special_tokens == {}  # the parent's tokenizer has not changed


def test_the_vocabulary_of_a_model_does_not_grow(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"--unknown-token '\?' is not among the 4 characters of the model"):
        corpus_of("abc " * 20, tmp_path, char_tokenizer("abc "), unknown_token="?")


def test_the_unknown_token_of_the_model_is_used(tmp_path: Path) -> None:
    corpus = corpus_of("abcü" * 20, tmp_path, char_tokenizer("abc", "?"))
    assert corpus.tokens[:4].tolist() == [0, 1, 2, 3]
    assert corpus.tokenizer.special_tokens == {"unknown": 3}


def test_a_tokenizer_that_needs_no_texts_is_built_from_the_corpora_folder(
    tiny_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[DataConfig] = []

    def build(config: DataConfig, texts: Any) -> Tokenizer:
        built.append(config)
        assert list(texts) == []
        return tokenizer.build_tokenizer(config, texts)

    monkeypatch.setattr(data, "build_tokenizer", build)
    config = DataConfig(dataset=str(tiny_corpus), tokenizer="byte", corpora_dir="another")
    load_corpus(config, 8, tmp_path / "corpora")
    assert built == [config.model_copy(update={"corpora_dir": str(tmp_path / "corpora")})]


def test_bytes_per_token_are_averaged_over_the_targets() -> None:
    one = sampler()
    object.__setattr__(one.corpus, "byte_counts", np.arange(1000))  # token i stands for i bytes
    assert one.corpus.bytes_per_token == np.arange(80).mean()
    for stream, count in (("val", 1), ("val", 99), ("train_eval", 2)):
        targets = torch.cat([batch[1].flatten() for batch in one.evaluation_batches(stream, count)])
        assert one.evaluation_bytes(stream, count) == pytest.approx(targets.double().mean().item())
    assert one.evaluation_bytes("val", 0) == 0


def test_a_plain_text_has_no_document_facts_or_target_shares() -> None:
    one = sampler()
    assert one.corpus.facts(8) == {}
    assert one.target_shares(3, 2) is one.target_share(3, 0, 2) is None
    assert one.corpus.tokens_of_pass(8) == one.corpus.n_train
