"""The text that a run saw in one of its updates, recomputed from its configuration and the step without any log."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from data import BatchSampler, Corpus, load_corpus
from model import LanguageModel
from tokenizer import Tokenizer, load_tokenizer
from utils.checkpoints.choose import choose_checkpoint
from utils.config.loader import ConfigLoader
from utils.config.settings import Config
from utils.corpora.sources import find_source
from utils.errors import UserError
from utils.files import read_bytes
from utils.inference.adapters import without_adapters
from utils.inference.evaluation import evaluating
from utils.nn.targets import IGNORED
from utils.packing.rows import PADDING
from utils.preparation.arithmetic import with_problems
from utils.runs.index import IndexedRun
from utils.runs.layout import CHECKPOINTS, TOKENIZER
from utils.runs.origin import recorded_config
from utils.terminal.words import loss_text, one_line

TOKENS_AT_ONCE = 2048  # in one pass through the model
LONGEST_PATH, NARROWEST = 40, 10  # characters of a column


@dataclass(frozen=True)
class Passage:
    """A stretch of text in a batch: a document or a part of one, or a window of a text.

    sample: index of the sequence that it is in, within the batch.
    source: the file that it comes from.
    line: where the document or window begins in that file, from 1 (its row in Parquet, its number in a text of several
        documents).
    document: its number in the training split of a prepared dataset.
    begin: number of tokens of the document before this stretch.
    tokens: number of tokens in this stretch.
    text: the text of these tokens.
    loss: mean over its targets, in nats, under the checkpoint; None if losses were not asked for, or it has no target.
    """

    sample: int
    source: str
    line: int
    document: int | None
    begin: int
    tokens: int
    text: str
    loss: float | None = None


@dataclass(frozen=True)
class Seen:
    """The passages of an update, by falling loss under the checkpoint of step `checkpoint`; None: in batch order."""

    run: str
    step: int
    checkpoint: int | None
    passages: Sequence[Passage]


def seen(
    run: IndexedRun,
    root: Path,
    step: int,
    top: int | None = None,
    which: str = "latest",
    warn: Callable[[str], None] = lambda message: None,
) -> Seen:
    """Find the passages that update `step` of a run was trained on.

    Args:
        root: the project folder.
        top: return so many passages, those of the highest loss; None: all, in the order of the batch, without losses.
        which: the checkpoint that gives the losses: latest, best or a step.

    Raises:
        UserError: the run has no such step or checkpoint, or its corpus is missing or has changed.
    """
    config = recorded_config(run.path, ConfigLoader(root)).config
    resolved = run.record.get("resolved") or {}
    steps = run.summary().get("steps") if run.status != "running" else None
    last = (resolved.get("max_iters", 0) if steps is None else steps) - 1
    if not 0 <= step <= last:
        made = f"its updates are 0 to {last:,}" if last >= 0 else "it made no update"
        raise UserError(f"{run.id} has no update {step:,}: {made}")
    corpus = _corpus(run, config, root)
    if corpus.hash != resolved.get("corpus_hash", corpus.hash):
        raise UserError(f"{corpus.name}: the corpus is not the one that {run.id} was trained on")
    device, train = torch.device("cpu"), config.train
    sampler = BatchSampler(corpus, config.model.block_size, train.sequences, train.seed, device)
    places = sampler.places("train", train.seed, step * train.sequences, train.sequences)
    found = _of_documents(corpus, places) if corpus.prepared is not None else _of_text(corpus, config, root, places)
    if top is None:
        return Seen(run.id, step, None, [passage for passage, _ in found])
    checkpoint = without_adapters(choose_checkpoint(run.path / CHECKPOINTS, which, strict=False, warn=warn))
    model = LanguageModel(config.model, corpus.tokenizer.vocab_size)
    model.load_state_dict(checkpoint.weights)
    model.document_token = corpus.document_token
    inputs, targets = (torch.from_numpy(part) for part in sampler.update(step))
    losses, counted = target_losses(model, inputs, targets), (targets != IGNORED).numpy()
    ranked = []
    for passage, columns in found:
        of_passage = losses[passage.sample, columns][counted[passage.sample, columns]]
        ranked.append(dataclasses.replace(passage, loss=float(of_passage.mean()) if len(of_passage) else None))
    ranked.sort(key=lambda passage: -np.inf if passage.loss is None else passage.loss, reverse=True)
    return Seen(run.id, step, checkpoint.step, ranked[:top])


def _corpus(run: IndexedRun, config: Config, root: Path) -> Corpus:
    """The corpus of a run, with its tokenizer."""
    path, data = run.path / TOKENIZER, config.data
    tokenizer = load_tokenizer(path) if path.is_file() else None
    places = root / data.corpora_dir, root / data.datasets_dir
    data = with_problems(config, places[0])
    return load_corpus(data, config.model.block_size, places[0], tokenizer, keep=False, datasets_dir=places[1])


def target_losses(model: LanguageModel, inputs: torch.Tensor, targets: torch.Tensor) -> np.ndarray:
    """The loss of each target (B, T), in nats, float32; 0 for targets that are ignored."""
    at_once = max(TOKENS_AT_ONCE // inputs.size(1), 1)
    parts = []
    with evaluating(model):
        for idx, target in zip(inputs.split(at_once), targets.split(at_once), strict=True):
            logits = model(idx)[0].float()  # (b, T, V)
            parts.append(F.cross_entropy(logits.transpose(1, 2), target, reduction="none"))
    return torch.cat(parts).numpy()


Columns = slice  # the positions of a passage in its sequence


def _of_documents(corpus: Corpus, places: np.ndarray) -> list[tuple[Passage, Columns]]:
    """The documents in each sequence of a batch.

    Args:
        places: (B, T), indices of tokens in the training split.
    """
    assert corpus.prepared is not None
    documents, dataset = corpus.prepared.documents["train"], corpus.prepared.dataset
    found = []
    for sample, row in enumerate(places):
        row = row[row != PADDING]  # only the end of a row is padding
        numbers = documents.at(row)
        begins = np.flatnonzero(np.diff(numbers, prepend=-1)).tolist()
        for begin, end in zip(begins, [*begins[1:], len(row)], strict=True):
            number = int(numbers[begin])
            source, line = documents.origin(number)
            ids = documents.tokens.take(row[begin:end])
            text = corpus.tokenizer.decode(ids[ids != dataset.end_of_text])
            known = source < len(dataset.sources)  # false if the sources were removed from dataset.json
            path = str(dataset.sources[source].get("path", source) if known else source)
            before = int(row[begin] - documents.bounds(numbers[begin : begin + 1])[0][0])
            found.append((Passage(sample, path, line, number, before, end - begin, text), slice(begin, end)))
    return found


def _of_text(corpus: Corpus, config: Config, root: Path, places: np.ndarray) -> list[tuple[Passage, Columns]]:
    """The windows of a text in a batch, each with the file and line where it begins; for `places` see above."""
    tokens = np.asarray(corpus.split("train"))
    lines = _lines(corpus.tokenizer, tokens, places[:, 0])
    files = list(_files(config.data.dataset, root / config.data.corpora_dir))
    found = []
    for sample, (row, line) in enumerate(zip(places, lines, strict=True)):
        path, before = next((path, before) for path, before in reversed(files) if before < line)
        text = corpus.tokenizer.decode(tokens[row])
        found.append((Passage(sample, path, line - before, None, 0, len(row), text), slice(len(row))))
    return found


def _lines(tokenizer: Tokenizer, tokens: np.ndarray, offsets: np.ndarray) -> list[int]:
    """The line of the text, from 1, in which the token at each offset begins."""
    breaks = np.array([tokenizer.decode_bytes([token]).count(b"\n") for token in range(tokenizer.vocab_size)])
    lines, before, line = np.empty(len(offsets), dtype=np.int64), 0, 1
    for place in np.argsort(offsets, kind="stable"):
        line += int(breaks[tokens[before : offsets[place]]].sum())
        lines[place], before = line, offsets[place]
    return [int(line) for line in lines]


def _files(dataset: str, corpora_dir: Path) -> Iterator[tuple[str, int]]:
    """Yield the files of a dataset, each with the number of lines of the text before it."""
    source, before = find_source(dataset, corpora_dir), 0
    if dataset == source.name and not source.is_folder and len(source.files) == 1 and not Path(dataset).exists():
        yield dataset, 0  # a registered corpus
        return
    for path in source.files:
        yield str(path), before
        before += read_bytes(path).count(b"\n") + 1  # the files are joined by line breaks


def seen_screen(found: Seen, width: int) -> list[RenderableType]:
    """Show the passages as a table; a long text is cropped to one line.

    Args:
        width: characters in a line of the terminal.
    """
    ranked = found.checkpoint is not None
    table = Table(title=f"Update {found.step:,} of {found.run}", title_justify="left", title_style="bold")
    rows = [
        (
            str(passage.sample),
            *([loss_text(passage.loss)] if ranked else []),
            one_line(f"{os.path.relpath(passage.source) if os.path.isabs(passage.source) else passage.source}"),
            str(passage.line),
            f"{passage.tokens:,}",
        )
        for passage in found.passages
    ]
    place = "line" if all(passage.document is None for passage in found.passages) else "record"
    names = ("sample", *(["loss"] if ranked else []), "file", place, "tokens")
    widths = [min(max(map(len, column)), LONGEST_PATH) for column in zip(names, *rows, strict=True)]
    for name, size in zip(names, widths, strict=True):
        table.add_column(name, justify="left" if name == "file" else "right", min_width=size, max_width=size)
    room = max(width - sum(widths) - 3 * len(widths) - 4, NARROWEST)
    table.add_column("text", no_wrap=True)
    for row, passage in zip(rows, found.passages, strict=True):
        text = one_line(passage.text)
        cropped = text if len(text) <= room else f"{text[: room - 3]}..."
        table.add_row(*(Text(cell, overflow="fold") for cell in row), Text(cropped))
    note = f"loss under the checkpoint of step {found.checkpoint:,}, in nats per token" if ranked else ""
    return [table, *([note] if note else [])]
