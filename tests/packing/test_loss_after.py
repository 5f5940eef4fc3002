"""loss_after: only the tokens after a text in each document are targets and the answers of val/accuracy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data import Corpus, load_corpus
from tests.small_dataset import write_dataset
from tokenizer import TokenizerError
from utils.config.settings import DataConfig
from utils.corpora.datasets import DatasetError
from utils.errors import UserError
from utils.nn.targets import IGNORED
from utils.packing.rows import follows
from utils.training.accuracy import held_out_questions

SUMS = [f"{a}+{b}={a + b}" for a in range(1, 12) for b in range(7, 12)]
T = 12


def load(folder: Path, packing: str, loss_after: str | None, texts: list[str] = SUMS, block_size: int = T) -> Corpus:
    if not (folder / "sums").exists():
        write_dataset(folder / "sums", texts, texts[::3])
    config = DataConfig(dataset=str(folder / "sums"), packing=packing, loss_after=loss_after)
    return load_corpus(config, block_size, folder / "corpora", datasets_dir=folder)


def targets_of(text: str, loss_after: str) -> str:
    """The targets of a document as text: all that follows `loss_after`, and the end."""
    return text.partition(loss_after)[2] + "\0" if loss_after in text else ""


@pytest.mark.parametrize("packing", ["none", "documents"])
@pytest.mark.parametrize("loss_after", ["=", "1=", "+8="])
def test_targets_are_the_tokens_after_the_text_in_each_document(tmp_path: Path, packing: str, loss_after: str) -> None:
    corpus = load(tmp_path, packing, loss_after)
    rows, decode = corpus.rows("train", T), corpus.tokenizer.decode
    assert rows is not None
    inputs, targets = rows.batch(rows.places(np.arange(len(rows))))
    assert (len(rows) < len(SUMS)) == (packing == "documents")
    found = []
    for row, target in zip(inputs, targets, strict=True):
        documents = [text for text in decode(row).split("\0") if text]
        expected = "".join(targets_of(text, loss_after) for text in documents)
        assert decode(target[target != IGNORED]) == expected
        found += documents
    assert sorted(found) == sorted(SUMS)


def test_the_text_may_end_anywhere_in_the_document() -> None:
    rows = np.array([[0, 5, 9, 5, 0, 5, 9, 7], [9, 5, 0, 7, 5, 5, 9, 9]])
    assert follows(rows, [9], 0).astype(int).tolist() == [[0, 0, 1, 1, 0, 0, 1, 1], [1, 1, 0, 0, 0, 0, 1, 1]]
    assert follows(rows, [5, 9], 0).astype(int).tolist() == [[0, 0, 1, 1, 0, 0, 1, 1], [0, 0, 0, 0, 0, 0, 1, 1]]
    assert not follows(rows, [1] * 9, 0).any()


def test_questions_are_the_validation_documents_that_fit(tmp_path: Path) -> None:
    corpus = load(tmp_path, "none", "=", block_size=7)
    decode = corpus.tokenizer.decode
    found = held_out_questions(corpus, 7)
    fitting = [text for text in SUMS[::3] if len(text) + 1 <= 7]
    assert 0 < len(fitting) < len(SUMS[::3])
    assert [decode(question.prompt) for question in found] == ["\0" + text.partition("=")[0] + "=" for text in fitting]
    assert [decode(question.answer) for question in found] == [text.partition("=")[2] + "\0" for text in fitting]
    assert held_out_questions(load(tmp_path, "none", None), T) == []


def test_a_text_that_no_document_has_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"loss_after '\?' is in none of the first rows of its training split"):
        load(tmp_path, "none", "?")
    with pytest.raises(ValueError, match="loss_after needs packing none or documents, not random"):
        DataConfig(loss_after="=")


def test_a_text_without_tokens_is_an_error_that_names_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_token(tokenizer: object, text: str) -> list[int]:
        raise TokenizerError(f"{text} is not in the vocabulary")

    load(tmp_path, "none", "=")
    monkeypatch.setattr("utils.tokenization.byte_tokens.ByteTokenizer.encode", no_token)
    with pytest.raises(DatasetError, match="loss_after '#' has characters that no document contains"):
        load(tmp_path, "none", "#")
