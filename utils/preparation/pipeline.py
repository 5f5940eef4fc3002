"""A preparation from its sources to its dataset: two passes over parts, and what is decided between them."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from tokenizer import (
    TRAINING_CHARACTERS,
    Tokenizer,
    TokenizerError,
    build_tokenizer,
    load_tokenizer,
    tokenizer_class,
)
from utils.config.settings import DataConfig
from utils.corpora.cleaning import Cleaned, CleaningReport, Pipeline
from utils.corpora.datasets import Dataset, Shard, ShardWriter, Split, is_dataset, read_dataset
from utils.corpora.readers import Reading, Unit, units, where
from utils.corpora.source_files import SourceFile, find_files
from utils.corpora.sources import CorpusError
from utils.errors import UserError
from utils.preparation.documents import Documents, cut_single, load_documents
from utils.preparation.encoding import EncodeJob, encode, encode_jobs, training_sample
from utils.preparation.reading import EXAMPLES, Part, ReadJob, effects, finished_part, read_unit
from utils.preparation.report import write_report
from utils.preparation.work import WorkFolder, work_folder
from utils.preparation.workers import in_order
from utils.terminal.console import Terminal
from utils.terminal.progress import PreparationProgress
from utils.terminal.words import counted, one_line

SHARD_TOKENS = 1 << 27  # from which a shard is full
FORMAT = 1  # of the parts in the work folder, and of what the passes make of a text
END_OF_TEXT = "\0"  # the character that stands for it where tokens are characters
VERSIONS = ("numpy", "tokenizers", "tiktoken")  # packages that decide about ids
SETTINGS = ("tokenizer", "bpe_vocab_size", "special_tokens", "unknown_token", "val_fraction")


@dataclass(frozen=True)
class Preparation:
    """What is asked for.

    target: the folder of the dataset.
    config: its tokenizer, and the share of validation.
    tolerated: how many records without a text may be left out.
    leaks: whether to look for documents for validation that nearly equal one for training.
    notes: what a person says of the dataset: `licence`, `origin`.
    replace: a dataset of this name may be replaced.
    """

    sources: Sequence[str]
    target: Path
    config: DataConfig
    reading: Reading = field(default_factory=Reading)
    tolerated: int = 0
    pipeline: Pipeline | None = None
    leaks: bool = True
    workers: int = 1
    notes: dict[str, str] = field(default_factory=dict)
    replace: bool = False
    dry_run: bool = False

    @property
    def work_target(self) -> Path:
        """The dataset whose work folder is used: a dry run has its own."""
        return self.target.with_name(f"{self.target.name}.dry") if self.dry_run else self.target

    @property
    def fingerprints(self) -> bool:
        return self.leaks or self.threshold is not None or self.exact

    @property
    def exact(self) -> bool:
        return self.pipeline is not None and self.pipeline.exact_duplicates

    @property
    def threshold(self) -> float | None:
        return self.pipeline.near_duplicates if self.pipeline is not None else None

    def settings(self) -> dict[str, Any]:
        """All that decides what becomes of the sources."""
        values = self.config.model_dump(mode="json", include=set(SETTINGS))
        reading = {key: value for key, value in asdict(self.reading).items() if key != "corpora_dir"}
        return {**values, **reading, "tolerated": self.tolerated, "leaks": self.leaks}

    def plan(self, files: Sequence[SourceFile], tokenizer: Tokenizer | None) -> dict[str, Any]:
        """Equal for two preparations that make the same dataset, as far as can be told without reading the files."""
        return {
            "format": FORMAT,
            "settings": self.settings(),
            "notes": self.notes,
            "cleaning": [] if self.pipeline is None else self.pipeline.to_json(),
            "tokenizer_hash": None if tokenizer is None else tokenizer.hash(),
            "sources": [[file.path, file.bytes] for file in files],
            "versions": versions(),
        }


@dataclass
class Outcome:
    """What became of the documents: for the report.

    parts: of the first pass. bases: records of its file that lie before each part.
    left_out: reason -> number of records, and the first places.
    duplicates: documents that repeat an earlier one. single: whether one text was split by position.
    """

    files: Sequence[SourceFile]
    parts: list[Part] = field(default_factory=list)
    bases: list[int] = field(default_factory=list)
    cleaning: CleaningReport | None = None
    duplicates: int = 0
    single: bool = False
    documents: Documents | None = None
    left_out: dict[str, tuple[int, list[str]]] = field(default_factory=dict)

    def place(self, order: Preparation, number: int) -> str:
        """Where a document comes from."""
        assert self.documents is not None
        part, index = self.documents.place(number)
        row = part.documents[index]
        return where(self.files[row["source"]], order.reading, int(row["record"]))

    def summary(self, order: Preparation) -> dict[str, Any]:
        """The content of report.json, as far as it does not depend on tokens."""
        assert self.documents is not None
        train, val = self.documents.kept(False), self.documents.kept(True)
        pairs = list(self.documents.leaks.items())
        return {
            "sources": [{"path": file.path, "kind": file.kind, "bytes": file.bytes} for file in self.files],
            "documents_read": sum(part.found for part in self.parts),
            "documents_kept": 1 if self.single else len(train) + len(val),
            "split": "by position" if self.single else "by the hash of each document",
            "left_out": {
                reason: {"count": count, "examples": examples[:EXAMPLES]}
                for reason, (count, examples) in self.left_out.items()
            },
            "cleaning": [] if self.cleaning is None else self.cleaning.to_json(),
            "duplicates": self.duplicates,
            "leaks": {
                "looked_for": order.leaks and not self.single,
                "documents": len(pairs),
                "share": len(pairs) / len(val) if len(val) else 0.0,
                "examples": [
                    {"val": self.place(order, int(val[a])), "train": self.place(order, int(train[b]))}
                    for a, b in pairs[:EXAMPLES]
                ],
            },
            "notes": order.notes,
        }


def versions() -> dict[str, str]:
    """Of Python and the packages that decide about ids."""
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def prepare(order: Preparation, terminal: Terminal) -> Dataset | Outcome:
    """Make a dataset, or go on with one that was interrupted.

    Returns:
        The dataset; of a dry run, what would become of the documents.

    Raises:
        UserError: a mistake in the sources, or a dataset of this name exists. Nothing is left behind.
        OSError: the disk is full or fails. What is done stays in the work folder.
    """
    found = find_files(order.sources, Path(order.reading.corpora_dir), order.reading.json)
    for note in found.notes:
        terminal.print(note)
    tokenizer = None
    if not tokenizer_class(order.config).learns:
        tokenizer = build_tokenizer(order.config, ())
        check_end_of_text(tokenizer, order.config)
    all_units = units(found.files, order.reading)
    plan = order.plan(found.files, tokenizer)
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
    with work_folder(order.work_target) as work:
        if (finished := existing(order, digest, found.files, work)) is not None:
            work.delete()
            terminal.print(f"{order.target}: prepared already, from these files with these settings")
            return finished
        try:
            if work.begin({"plan": digest, "mtimes": [file.mtime_ns for file in found.files]}):
                terminal.print(f"going on with the parts in {work.path}")
            outcome = read_all(order, work, all_units, found.files, terminal)
            decide(order, outcome, work, terminal)
            if order.dry_run:
                work.delete()
                return outcome
            tokenizer = learned(order, work, outcome, tokenizer, terminal)
            splits = encode_all(order, work, outcome, tokenizer, terminal)
            dataset = described(order, work, outcome, tokenizer, splits, digest)
            write_report(dataset, outcome.summary(order), order.target.name, outcome.cleaning)
            dataset.save()
            work.publish(order.replace)
        except UserError:
            work.delete()
            raise
        except OSError as error:
            reason = f"{error.strerror}; what is done stays there, and the same command goes on with it"
            raise OSError(error.errno, reason, str(work.path)) from error
    dataset = read_dataset(order.target)
    dataset.verify()  # so that the first start of training need not
    return dataset


def existing(order: Preparation, digest: str, files: Sequence[SourceFile], work: WorkFolder) -> Dataset | None:
    """The dataset of this name, if it is the one that is asked for; None if there is none or it may be replaced.

    Raises:
        UserError: it is another one.
    """
    if order.dry_run or not order.target.exists():
        return None
    if is_dataset(order.target):
        try:
            dataset = read_dataset(order.target)
        except UserError as error:
            if order.replace:
                return None
            work.delete_if_new()
            raise UserError(f"{error}; choose another name, or --replace it") from None
        made_ns = (order.target / "dataset.json").stat().st_mtime_ns
        if dataset.facts.get("plan") == digest and all(file.mtime_ns < made_ns for file in files):
            return dataset
        if order.replace:
            return None
    work.delete_if_new()
    if not is_dataset(order.target):
        raise UserError(f"{order.target}: exists already and is no dataset; choose another name")
    raise UserError(
        f"{order.target}: exists already, made from other files or with other settings; "
        "choose another name, or --replace it"
    )


def check_end_of_text(tokenizer: Tokenizer, config: DataConfig) -> None:
    if tokenizer.end_of_text is None:
        raise TokenizerError(
            f"tokenizer {config.tokenizer}: has no token that ends a text, such as <|endoftext|> or </s>; "
            "each document of a dataset begins with it"
        )


# ---------------------------------------------------------------------------------------------------- the first pass


def read_all(
    order: Preparation, work: WorkFolder, all_units: Sequence[Unit], files: Sequence[SourceFile], terminal: Terminal
) -> Outcome:
    """All parts of the first pass, those that are missing by worker processes.

    Raises:
        UserError: a document that must not be there, with its place.
    """
    characters = tokenizer_class(order.config).learns_characters
    rest = (order.reading, order.tolerated, order.pipeline, characters, order.fingerprints)
    jobs = [ReadJob(number, work.texts, unit, *rest) for number, unit in enumerate(all_units)]
    done = {job.number: part for job in jobs if (part := finished_part(job.stem)) is not None}
    missing = [job for job in jobs if job.number not in done]
    outcome = Outcome(files)
    with PreparationProgress(terminal, "reading", sum(unit.bytes for unit in all_units)) as progress:
        progress.skip(sum(all_units[number].bytes for number in done))
        results = in_order(read_unit, missing, order.workers, progress.advance)
        source, base = -1, 0
        for job in jobs:
            part = done[job.number] if job.number in done else next(results)
            first = job.unit.files[0][0]
            base = base + outcome.parts[-1].records if first == source else 0
            source = first
            _check_part(order, outcome, part, base)
            outcome.parts.append(part)
            outcome.bases.append(base)
    shows = order.dry_run and any(part.removed for part in outcome.parts)
    if not any(part.documents for part in outcome.parts) and not shows:
        raise CorpusError(f"{', '.join(map(one_line, order.sources))}: no documents: {_reasons(outcome.parts)}")
    return outcome


def _check_part(order: Preparation, outcome: Outcome, part: Part, base: int) -> None:
    """Note what is left out of a part; raises CorpusError where that must not be."""

    def place(found: Sequence[Any], short: bool = False) -> str:
        source, record, lines, reason = found
        return f"{where(outcome.files[source], order.reading, base + record, lines, short)}: {reason}"

    if part.mistake is not None:
        remedy = "--errors replace puts U+FFFD in its place, --errors skip leaves the document out"
        raise CorpusError(f"{place(part.mistake, short=True)}; {remedy}")
    for reason, count, examples in (
        ("not text", part.n_not_text, part.not_text),
        ("no text in the record", part.n_bad, part.bad),
        ("empty", part.empty, []),
    ):
        if count:
            before, shown = outcome.left_out.get(reason, (0, []))
            outcome.left_out[reason] = (before + count, [*shown, *map(place, examples)][:EXAMPLES])
    n_bad, _ = outcome.left_out.get("no text in the record", (0, []))
    if n_bad > order.tolerated:
        limit = f"; {order.tolerated:,} tolerated" if order.tolerated else ""
        last = part.bad[-1 if part.n_bad > order.tolerated else 0]
        raise CorpusError(f"{place(last, short=True)}{limit} (--tolerate N leaves out as many)")


def _reasons(parts: Sequence[Part]) -> str:
    empty, bad = sum(part.empty for part in parts), sum(part.n_bad + part.n_not_text for part in parts)
    removed = sum(part.removed for part in parts)
    words = [
        (empty, "empty"),
        (bad, "without text"),
        (removed, "removed by the cleaning (--dry-run shows by which step)"),
    ]
    return ", ".join(f"{count:,} {word}" for count, word in words if count) or "there are none"


# -------------------------------------------------------------------------------------------------- between the passes


def decide(order: Preparation, outcome: Outcome, work: WorkFolder, terminal: Terminal) -> None:
    """Which documents stay, and which are for validation."""
    stems = [work.texts / f"{number:05d}" for number in range(len(outcome.parts))]
    documents = outcome.documents = load_documents(stems, outcome.bases)
    if order.pipeline is not None:
        outcome.cleaning = CleaningReport(order.pipeline)
        for stem in stems:
            for effect in effects(stem):
                outcome.cleaning.add(Cleaned(text=None if effect["removed_by"] else "", **effect))
    if order.exact or order.threshold is not None:
        terminal.print(f"comparing {counted(len(documents), 'document')}")
        _remove_duplicates(order, outcome, documents)
    if len(documents.kept()) == 1:
        outcome.single = True
        cut_single(documents, order.config.val_fraction)
    else:
        documents.split(order.config.val_fraction)
        if order.leaks:
            documents.find_leaks()


def _remove_duplicates(order: Preparation, outcome: Outcome, documents: Documents) -> None:
    assert outcome.cleaning is not None
    repeats = documents.find_duplicates(order.threshold)
    documents.remove(repeats)
    outcome.duplicates = len(repeats)
    examples = {"exact_duplicates": 0, "near_duplicates": 0}
    for number, earlier in repeats.items():
        (part, index), (other, other_index) = documents.place(number), documents.place(earlier)
        equal = part.documents["key"][index] == other.documents["key"][other_index]
        step = "exact_duplicates" if order.exact and equal else "near_duplicates"
        examples[step] += 1
        text = documents.compared_text(number) if examples[step] <= EXAMPLES else ""
        outcome.cleaning.add_removed(step, text)


# ---------------------------------------------------------------------------------------------------- the second pass


def learned(
    order: Preparation, work: WorkFolder, outcome: Outcome, tokenizer: Tokenizer | None, terminal: Terminal
) -> Tokenizer:
    """The tokenizer: as given, as an interrupted process has learned it, or learned now.

    Raises:
        OSError: it cannot be written.
    """
    if tokenizer is None and work.tokenizer.is_file():
        return load_tokenizer(work.tokenizer)
    if tokenizer is None:
        assert outcome.documents is not None
        if tokenizer_class(order.config).learns_characters:
            texts = [END_OF_TEXT, *(part.characters for part in outcome.parts)]
        else:
            terminal.print(f"learning the tokenizer {order.config.tokenizer}")
            texts = training_sample(outcome.documents, TRAINING_CHARACTERS)
        tokenizer = build_tokenizer(order.config, texts)
        check_end_of_text(tokenizer, order.config)
    tokenizer.save(work.tokenizer)
    return tokenizer


def encode_all(
    order: Preparation, work: WorkFolder, outcome: Outcome, tokenizer: Tokenizer, terminal: Terminal
) -> dict[str, Split]:
    """The shards of both splits, from parts that worker processes encode.

    Raises:
        TokenizerError: a text has no tokens.
        OSError: a file cannot be written.
    """
    assert outcome.documents is not None
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    cuttable = tokenizer.first_cut(" a. b") is not None
    jobs = encode_jobs(outcome.documents, work.tokens, work.tokenizer, f"<u{np.dtype(dtype).itemsize}", cuttable)
    missing = [job for job in jobs if job.lengths() is None]
    todo = {job.number for job in missing}
    writers = {name: _SplitWriter(work.dataset, name) for name in ("train", "val")}
    with PreparationProgress(terminal, "encoding", sum(job.bytes for job in jobs)) as progress:
        progress.skip(sum(job.bytes for job in jobs if job.number not in todo))
        results = in_order(encode, missing, order.workers, progress.advance)
        for job in jobs:
            if job.number in todo:
                next(results)
            _append(job, writers)
    return {name: writer.close() for name, writer in writers.items()}


def _append(job: EncodeJob, writers: dict[str, _SplitWriter]) -> None:
    """Write the documents of an encoded part into the shards of their splits."""
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
    """The shards of a split."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._shards: list[Shard] = []
        self._writer: ShardWriter | None = None
        self._bytes = 0

    def writer(self, n_bytes: int) -> ShardWriter:
        """The writer for the next documents, which have so many bytes of text."""
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


def described(
    order: Preparation,
    work: WorkFolder,
    outcome: Outcome,
    tokenizer: Tokenizer,
    splits: dict[str, Split],
    digest: str,
) -> Dataset:
    """The dataset in the work folder, which is not saved yet, with its tokenizer."""
    assert tokenizer.end_of_text is not None
    assert outcome.documents is not None
    dataset = Dataset(
        work.dataset,
        tokenizer.hash(),
        tokenizer.end_of_text,
        "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32",
        splits,
        [{"path": file.path, "kind": file.kind, "bytes": file.bytes} for file in outcome.files],
        sorted(outcome.documents.leaks),
        {
            "tokenizer": {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size},
            "settings": order.settings(),
            "cleaning": [] if order.pipeline is None else order.pipeline.to_json(),
            "versions": versions(),
            "plan": digest,
            **order.notes,
        },
    )
    tokenizer.save(dataset.tokenizer_path)
    return dataset
