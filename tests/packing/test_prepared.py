"""A prepared dataset used as a corpus: read in place, checked when training starts, and cut into rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data import BatchSampler, Corpus, load_corpus
from tests.small_dataset import TEXTS, VALIDATION, write_dataset
from tokenizer import CharTokenizer, Tokenizer
from utils.config.settings import DataConfig
from utils.corpora.datasets import DatasetError, read_dataset
from utils.corpora.sources import CorpusError
from utils.errors import UserError
from utils.evaluation.texts import named_data
from utils.nn.targets import IGNORED
from utils.preparation.commands import verify_dataset

CPU = torch.device("cpu")
T = 32


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "datasets" / "small", leaks=[1, 5])
    return tmp_path / "datasets" / "small"


def load(folder: Path, of_model: Tokenizer | None = None, block_size: int = T, **settings: Any) -> Corpus:
    config = DataConfig.model_validate({"dataset": folder.name, "datasets_dir": str(folder.parent), **settings})
    return load_corpus(config, block_size, folder.parent.parent / "corpora", of_model)


def sampler(corpus: Corpus, batch_size: int = 8) -> BatchSampler:
    return BatchSampler(corpus, T, batch_size, 3, CPU)


def text_of(texts: list[str]) -> bytes:
    return b"".join(b"\0" + text.encode() for text in texts)


@pytest.mark.parametrize("shards", [1, 2, 7])
def test_shards_are_one_sequence_and_the_dataset_has_its_own_split(tmp_path: Path, shards: int) -> None:
    dataset = write_dataset(tmp_path / "datasets" / "small", shards=shards)
    corpus = load(tmp_path / "datasets" / "small", val_fraction=0.5)
    assert bytes(np.asarray(corpus.tokens).astype(np.uint8)) == text_of([*TEXTS, *VALIDATION])
    assert bytes(np.asarray(corpus.split("train")).astype(np.uint8)) == text_of(TEXTS)
    assert bytes(np.asarray(corpus.split("val")).astype(np.uint8)) == text_of(VALIDATION)
    assert (corpus.n_val, corpus.hash) == (len(text_of(VALIDATION)), dataset.hash)
    assert corpus.bytes_per_token == sum(map(len, TEXTS)) / len(text_of(TEXTS))


def test_batches_do_not_depend_on_the_number_of_shards(tmp_path: Path) -> None:
    batches = []
    for shards in (1, 4):
        write_dataset(tmp_path / str(shards), shards=shards)
        for packing in ("none", "documents", "random"):
            corpus = load(tmp_path / str(shards), packing=packing)
            batches.append([part.tolist() for part in sampler(corpus).train_batch(3)])
    assert batches[:3] == batches[3:]


@pytest.mark.parametrize("packing", ["none", "documents", "random"])
def test_a_pass_shows_every_target_once(folder: Path, packing: str) -> None:
    corpus = load(folder, packing=packing)
    one = sampler(corpus)
    seen = np.zeros(corpus.n_train + 1, dtype=int)
    samples = corpus.tokens_of_pass(T) // T - (packing == "random")
    for step in range(-(-samples // 8)):
        places, (_, targets) = one.places("train", 3, step * 8, 8), one.update(step)
        left = samples - step * 8  # in the pass
        np.add.at(seen, (places + 1)[:left][(targets != IGNORED)[:left]], 1)
    starts, lengths = corpus.prepared.documents["train"].bounds(np.arange(len(TEXTS)))  # type: ignore[union-attr]
    kept = np.minimum(lengths, T) if packing == "none" else lengths
    expected = np.zeros_like(seen)
    for start, length in zip(starts, kept, strict=True):
        expected[start + 1 : start + length + 1] += 1
    if packing == "random":  # except for less than a window at either end
        assert seen.max() == 1
        assert seen.sum() >= corpus.n_train - 2 * T
    else:
        assert seen.tolist() == expected.tolist()


@pytest.mark.parametrize("packing", ["none", "documents"])
def test_parts_of_a_batch_make_up_the_global_batch(folder: Path, packing: str) -> None:
    corpus = load(folder, packing=packing)
    whole = sampler(corpus).train_batch(7)
    for micro_steps, world_size in ((2, 1), (4, 2), (1, 8)):
        parts = [
            sampler(corpus).train_batch(7, micro_step, micro_steps, rank, world_size)
            for micro_step in range(micro_steps)
            for rank in range(world_size)
        ]
        for index in range(2):
            assert torch.equal(torch.cat([part[index] for part in parts]), whole[index])


def test_a_row_is_padded_and_the_last_token_of_a_document_predicts_the_next(folder: Path) -> None:
    corpus = load(folder, packing="none")
    rows = corpus.rows("train", T)
    assert rows is not None
    inputs, targets = rows.batch(rows.places(np.array([0, 2, len(TEXTS) - 1])))
    text = TEXTS[0].encode()
    assert inputs[0].tolist() == [0, *text, *[0] * (T - 1 - len(text))]
    assert targets[0].tolist() == [*text, 0, *[IGNORED] * (T - 1 - len(text))]
    assert bytes([*inputs[1].tolist(), targets[1, -1]]) == b"\0" + TEXTS[2].encode()[:T]  # cropped
    last = (b"\0" + TEXTS[-1].encode())[:T]
    assert bytes(inputs[2][: len(last)].tolist()) == last


def test_the_very_last_token_predicts_the_end(tmp_path: Path) -> None:
    write_dataset(tmp_path / "d", ["abc", "de"], ["x"], shards=1)
    rows = load(tmp_path / "d", packing="documents").rows("train", T)
    assert rows is not None
    inputs, targets = rows.batch(rows.places(np.array([0])))
    assert bytes(inputs[0, :7].tolist()) == b"\0abc\0de"
    assert bytes(targets[0, :7].tolist()) == b"abc\0de\0"
    assert set(targets[0, 7:].tolist()) == {IGNORED}


def test_leaks_have_no_targets_if_they_are_left_out(folder: Path) -> None:
    lost = sum(len(VALIDATION[number]) + 1 for number in (1, 5))
    for packing in ("documents", "random"):
        one = sampler(load(folder, packing=packing))
        counts = []
        for leaks in (True, False):
            targets = torch.cat([part for _, part in one.evaluation_batches("val", 50, leaks=leaks)])
            counts.append(int((targets != IGNORED).sum()))
        if packing == "documents":
            assert counts[0] - counts[1] == lost
        else:  # a window at either end is not reached
            assert 0 < counts[0] - counts[1] <= lost


def test_a_plan_is_made_once_and_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from utils.packing import prepared

    config = DataConfig(dataset=str(folder), packing="documents")
    plans = folder.parent.parent / "corpora" / "plans"
    corpus = load_corpus(config, T, folder.parent.parent / "corpora", keep=False)
    assert not plans.exists()  # so a mistake found later leaves nothing
    expected = sampler(corpus).update(5)
    corpus.stored()
    assert len(list(plans.iterdir())) == 2
    monkeypatch.setattr(prepared, "best_fit", None)
    for found, own in zip(sampler(load(folder, packing="documents")).update(5), expected, strict=True):
        assert np.array_equal(found, own)
    (damaged, *_) = plans.iterdir()
    damaged.write_bytes(damaged.read_bytes()[:-1])
    monkeypatch.undo()
    for found, own in zip(sampler(load(folder, packing="documents")).update(5), expected, strict=True):
        assert np.array_equal(found, own)


def _edit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


MISTAKES: list[tuple[Callable[[Path], object], dict[str, Any], str]] = [
    (lambda folder: _edit(folder / "train_00001.bin"), {}, r"small/train_00001\.bin: edited or damaged"),
    (lambda folder: (folder / "val_00000.ends").unlink(), {}, r"val_00000\.ends: cannot be read"),
    (lambda folder: (folder / "dataset.json").unlink(), {}, r"small: not a dataset: it has no dataset\.json"),
    (lambda folder: CharTokenizer("\0a").save(folder / "tokenizer.json"), {}, "not the tokenizer that the dataset was"),
    (lambda folder: replace(read_dataset(folder), end_of_text=300).save(), {}, r"its end_of_text is token 300"),
    (lambda folder: None, {"tokenizer": "bpe"}, r"prepared with tokenizer byte, 256 tokens, not bpe"),
    (lambda folder: None, {"block_size": 5000}, r"small: too short: its training split has .* needs at least 5,001"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "settings", "message"), MISTAKES)
def test_a_mistake_is_reported_in_one_line_that_names_the_place(
    folder: Path, damage: Callable[[Path], object], settings: dict[str, Any], message: str
) -> None:
    load(folder)
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        load(folder, **settings)
    assert "\n" not in str(caught.value)


def test_ids_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "d", ["abcabc" * 20], ["abc" * 20], kind="char")
    small = CharTokenizer("\0ab")
    small.save(dataset.folder / "tokenizer.json")
    replace(dataset, tokenizer_hash=small.hash()).save()
    for read in (
        lambda: verify_dataset(read_dataset(dataset.folder)),
        lambda: named_data(str(dataset.folder), DataConfig(), tmp_path),
        lambda: load(dataset.folder),
    ):
        with pytest.raises(DatasetError, match=r"d/train_00000\.bin: token id 3 is beyond the vocabulary of 3 tokens"):
            read()


def test_a_model_keeps_its_tokenizer(folder: Path) -> None:
    own = load(folder).tokenizer
    assert load(folder, own).tokenizer.hash() == own.hash()
    with pytest.raises(
        DatasetError, match="prepared with tokenizer byte, 256 tokens; the model has another one: char, 3"
    ):
        load(folder, CharTokenizer("abc"))
    with pytest.raises(DatasetError, match=r"char, 3 tokens; prepare\.py \.\.\. --tokenizer hf:models/a prepares"):
        load(folder, CharTokenizer("abc"), tokenizer="hf:models/a")


def test_only_a_dataset_is_packed(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("some notes " * 50)
    config = DataConfig(dataset=str(tmp_path / "notes.txt"), packing="documents")
    with pytest.raises(CorpusError, match=r"packing documents needs documents, .* prepare\.py .*notes\.txt --out NAME"):
        load_corpus(config, T, tmp_path / "corpora")


def test_an_unknown_name_is_an_error_that_lists_the_datasets(folder: Path) -> None:
    with pytest.raises(CorpusError, match=r"dataset smal: no .* expected pydocs, .*, small, .* mean small"):
        load(folder.with_name("smal"))
    with pytest.raises(CorpusError, match="dataset smal: no "):
        load(folder.with_name("smal"), packing="documents")


def test_a_path_is_a_dataset_too_and_a_registered_corpus_comes_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpora = folder.parent.parent / "corpora"
    assert load_corpus(DataConfig(dataset=str(folder)), T, corpora).hash == load(folder).hash
    monkeypatch.chdir(folder.parent)
    assert load_corpus(DataConfig(dataset="small", datasets_dir="none"), T, corpora).hash == load(folder).hash
    folder.rename(folder.with_name("pydocs"))
    assert load(folder.with_name("pydocs")).prepared is None


@pytest.mark.parametrize("packing", ["none", "documents", "random"])
def test_evaluations_show_the_documents_of_their_own_split(folder: Path, packing: str) -> None:
    corpus = load(folder, packing=packing)
    one = sampler(corpus)
    for stream, texts in (("val", VALIDATION), ("train_eval", TEXTS)):
        rows = [bytes(row.tolist()) for part, _ in one.evaluation_batches(stream, 99) for row in part]
        shown = {part for row in rows for part in row.split(b"\0")}
        assert all(part in text_of(texts) for part in shown)
        assert len(shown) > 5


def test_the_record_of_a_run_has_documents_and_rows(folder: Path) -> None:
    facts = load(folder, packing="none").facts(T)
    assert facts["train_documents"] == len(TEXTS)
    assert facts["val_documents"] == len(VALIDATION)
    assert facts.items() >= load(folder, packing="none").prepared.packing_facts(T).items()  # type: ignore[union-attr]


@pytest.mark.parametrize("packing", ["none", "documents"])
@pytest.mark.parametrize("micro_steps", [1, 2, 8])
def test_micro_steps_are_weighted_by_their_targets(folder: Path, packing: str, micro_steps: int) -> None:
    one = sampler(load(folder, packing=packing))
    for step in (0, 5):
        counts = [int((one.train_batch(step, m, micro_steps)[1] != IGNORED).sum()) for m in range(micro_steps)]
        expected = [count / sum(counts) for count in counts]
        assert one.target_shares(step, micro_steps) == pytest.approx(expected)
        found = [one.target_share(step, m, micro_steps) for m in range(micro_steps)]
        assert [(share.dtype, share.shape, share.item()) for share in found if share is not None] == [
            (torch.float32, (), pytest.approx(share)) for share in expected
        ]


def test_bytes_per_token_ignore_tokens_without_a_target(folder: Path) -> None:
    one = sampler(load(folder, packing="none"))
    object.__setattr__(one.corpus, "byte_counts", np.arange(256))
    targets = torch.cat([part.flatten() for _, part in one.evaluation_batches("val", 9)])
    assert (targets == IGNORED).any()
    assert one.evaluation_bytes("val", 9) == pytest.approx(targets[targets != IGNORED].double().mean().item())
