"""Writes the shards of a dataset from the parts that worker processes encode."""

from __future__ import annotations

from pathlib import Path

from tokenizer import Tokenizer
from utils.corpora.datasets import Shard, ShardWriter, Split
from utils.preparation.documents import Documents
from utils.preparation.encoding import EncodeJob, encode, encode_jobs
from utils.preparation.work import WorkFolder
from utils.preparation.workers import in_order
from utils.terminal.console import Terminal
from utils.terminal.progress import PreparationProgress
from utils.tokenization.protocol import id_dtype

SHARD_TOKENS = 1 << 27  # a shard with so many tokens gets no further documents


def write_shards(
    documents: Documents, work: WorkFolder, tokenizer: Tokenizer, workers: int, terminal: Terminal
) -> dict[str, Split]:
    """Encode the documents in worker processes, and write the shards of both splits.

    Raises:
        TokenizerError: a text cannot be encoded.
        OSError: a file cannot be written.
    """
    dtype = id_dtype(tokenizer.vocab_size)
    cuttable = tokenizer.first_cut(" a. b") is not None
    jobs = encode_jobs(documents, work.tokens, work.tokenizer, f"<u{dtype.itemsize}", cuttable)
    missing = [job for job in jobs if job.lengths() is None]
    todo = {job.number for job in missing}
    writers = {name: _SplitWriter(work.dataset, name) for name in ("train", "val")}
    with PreparationProgress(terminal, "encoding", sum(job.bytes for job in jobs)) as progress:
        progress.skip(sum(job.bytes for job in jobs if job.number not in todo))
        results = in_order(encode, missing, workers, progress.advance)
        for job in jobs:
            if job.number in todo:
                next(results)
            _append(job, writers)
    return {name: writer.close() for name, writer in writers.items()}


def _append(job: EncodeJob, writers: dict[str, _SplitWriter]) -> None:
    """Append the documents of an encoded part to the shards of their splits."""
    lengths, tokens = job.lengths(), job.tokens()
    assert lengths is not None
    begin = 0
    for name, chosen in (("train", slice(0, job.n_train)), ("val", slice(job.n_train, None))):
        if count := int(lengths[chosen].sum()):
            spans, origins = job.spans[chosen], job.origins[chosen]
            writer = writers[name].writer(int((spans[:, 1] - spans[:, 0]).sum()))
            ids = tokens[begin : begin + count].data
            if job.ends and job.begins:
                writer.add_all(ids, lengths[chosen].tolist(), origins.ravel().tolist())
            elif job.ends:
                writer.add(ids, *map(int, origins[0]))
            else:
                writer.add_part(ids)
            if job.ends:
                writers[name].document_ended()
            begin += count


class _SplitWriter:
    """Writes the shards of a split."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._shards: list[Shard] = []
        self._writer: ShardWriter | None = None
        self._bytes = 0

    def writer(self, n_bytes: int) -> ShardWriter:
        """The writer for the next documents, whose text has `n_bytes`."""
        self._bytes += n_bytes
        if self._writer is None:
            self._writer = ShardWriter(self._folder, self._name, len(self._shards))
        return self._writer

    def document_ended(self) -> None:
        if self._writer is not None and self._writer.tokens >= SHARD_TOKENS:
            self._end_shard()

    def _end_shard(self) -> None:
        if self._writer is not None:
            self._shards.append(self._writer.close())
            self._writer = None

    def close(self) -> Split:
        self._end_shard()
        return Split(self._shards, self._bytes)
