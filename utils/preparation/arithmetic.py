"""The problems of section `arithmetic` as a prepared dataset: each document is a problem with its answer."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from tokenizer import NUL, Tokenizer, build_tokenizer
from utils.config.settings import OPERATORS, ArithmeticConfig, Config, DataConfig
from utils.corpora.arithmetic import EQUALS, Problem, problem_set
from utils.corpora.datasets import TOKENIZER_JSON, Dataset, ShardWriter, Split, is_dataset, read_dataset
from utils.corpora.sources import ARITHMETIC, CorpusError
from utils.folders import remove

VERSION = 1  # to be raised when the same settings give other problems; part of a dataset's name
DTYPE = "uint16"


def arithmetic_tokenizer() -> Tokenizer:
    """A tokenizer for the characters of all possible problems, so that a model can be trained further on others."""
    characters = sorted({*"0123456789", *EQUALS, *"".join(OPERATORS)})
    return build_tokenizer(DataConfig(tokenizer="char"), [NUL, *characters])


def arithmetic_dataset(settings: ArithmeticConfig, corpora_dir: Path) -> Path:
    """The folder of the dataset with the problems of `settings`, which is written unless it exists already.

    Raises:
        CorpusError: the dataset cannot be written, or a split would have no problems.
    """
    text = json.dumps([VERSION, settings.model_dump(mode="json")], sort_keys=True)
    folder = corpora_dir / f"arithmetic-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if is_dataset(folder):
        return folder
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.mkdir(parents=True)
        _write(temporary, settings)
        with contextlib.suppress(OSError):  # another process has written the same dataset meanwhile
            os.rename(temporary, folder)
    except OSError as error:
        raise CorpusError(f"{folder}: the problems cannot be written: {error.strerror}") from None
    finally:
        remove(temporary)
    if not is_dataset(folder):
        raise CorpusError(f"{folder}: the problems cannot be written: the folder holds something else")
    return folder


def with_problems(config: Config, corpora_dir: Path) -> DataConfig:
    """Section `data`, in which `dataset: arithmetic` is replaced by the folder of the problems.

    Raises:
        CorpusError: the problems cannot be written.
    """
    if config.data.dataset != ARITHMETIC:
        return config.data
    return config.data.model_copy(update={"dataset": str(arithmetic_dataset(config.arithmetic, corpora_dir))})


def check_block_size(data: DataConfig, block_size: int) -> None:
    """Raises CorpusError if a row is too short for the longest problem with its answer, which would be cropped.

    Args:
        data: the result of `with_problems`.
    """
    longest = read_dataset(Path(data.dataset)).facts.get("longest", 0)
    if data.packing != "random" and longest > block_size:
        raise CorpusError(
            f"arithmetic: a problem with its answer has up to {longest} tokens: block_size must be at least that, not "
            f"{block_size}"
        )


def _write(folder: Path, settings: ArithmeticConfig) -> None:
    """Write the dataset into `folder`."""
    problems, tokenizer = problem_set(settings), arithmetic_tokenizer()
    splits = {"train": problems.train, "val": problems.held_out}
    if empty := [name for name, of_split in splits.items() if not of_split]:
        raise CorpusError(f"arithmetic: no problem is left for {' and '.join(empty)}: change arithmetic_held_out")
    tokenizer.save(folder / TOKENIZER_JSON)
    end_of_text = tokenizer.end_of_text
    assert end_of_text is not None
    written = {name: _write_split(folder, name, of, settings, tokenizer) for name, of in splits.items()}
    sources = [{"path": "arithmetic", "settings": settings.model_dump(mode="json")}]
    longest = 1 + max(len(p.prompt(settings) + p.solution(settings)) for of in splits.values() for p in of)
    Dataset(folder, tokenizer.hash(), end_of_text, DTYPE, written, sources, facts={"longest": longest}).save()


def _write_split(
    folder: Path, name: str, problems: Sequence[Problem], settings: ArithmeticConfig, tokenizer: Tokenizer
) -> Split:
    texts = [NUL + problem.prompt(settings) + problem.solution(settings) for problem in problems]
    ids = tokenizer.encode_array("".join(texts)).astype(DTYPE)  # each character is one token
    writer, begin = ShardWriter(folder, name, 0), 0
    try:
        for number, text in enumerate(texts, start=1):
            writer.add(ids[begin : begin + len(text)].data, 0, number)
            begin += len(text)
    finally:
        shard = writer.close()
    return Split([shard], len(ids) - len(texts))
