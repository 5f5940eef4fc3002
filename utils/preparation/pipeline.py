"""A preparation from its sources to its dataset: two passes over the documents, and the decisions between them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizer import NUL, Tokenizer, TokenizerError, build_tokenizer, load_tokenizer, tokenizer_class
from utils.config.settings import DataConfig
from utils.corpora.blocks import blocks
from utils.corpora.cleaning import Cleaned, CleaningReport
from utils.corpora.datasets import Dataset, Split, is_dataset, read_dataset
from utils.corpora.readers import Unit, units, where
from utils.corpora.source_files import SourceFile, find_files
from utils.corpora.sources import CorpusError
from utils.errors import UserError
from utils.packing.prepared import verify_shards
from utils.preparation.documents import Documents, cut_single, load_documents
from utils.preparation.encoding import training_sample
from utils.preparation.options import Outcome, Preparation, versions
from utils.preparation.reading import EXAMPLES, Part, ReadJob, effects, finished_part, read_unit
from utils.preparation.report import write_report
from utils.preparation.shards import write_shards
from utils.preparation.work import WorkFolder, work_folder
from utils.preparation.workers import in_order
from utils.terminal.console import Terminal
from utils.terminal.progress import PreparationProgress
from utils.terminal.words import counted, one_line
from utils.tokenization.protocol import id_dtype
from utils.tokenization.subwords import TRAINING_CHARACTERS


def prepare(options: Preparation, terminal: Terminal) -> Dataset | Outcome:
    """Make a dataset, or continue a preparation that was interrupted.

    Returns:
        The dataset, or the outcome of a dry run.

    Raises:
        UserError: there is a mistake in the sources, or a dataset of this name exists. Nothing is left behind.
        OSError: the disk is full or fails. Finished parts stay in the work folder.
    """
    found = find_files(options.sources, Path(options.reading.corpora_dir), options.reading.json)
    for note in found.notes:
        terminal.print(note)
    tokenizer = None
    if not tokenizer_class(options.config).learns:
        tokenizer = build_tokenizer(options.config, ())
        check_end_of_text(tokenizer, options.config)
    all_units = units(found.files, options.reading)
    plan = options.plan(found.files, tokenizer)
    digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()
    with work_folder(options.work_target) as work:
        if (finished := existing_dataset(options, digest, found.files, work)) is not None:
            work.delete()
            terminal.print(f"{options.target}: already prepared from these files with these settings")
            return finished
        try:
            if work.begin({"plan": digest, "mtimes": [file.mtime_ns for file in found.files]}):
                terminal.print(f"continuing with the parts in {work.path}")
            outcome = read_all(options, work, all_units, found.files, terminal)
            _note_absent_separator(options, outcome, terminal)
            decide(options, outcome, work, terminal)
            if options.dry_run:
                work.delete()
                return outcome
            tokenizer = learn_tokenizer(options, work, outcome, tokenizer, terminal)
            assert outcome.documents is not None
            splits = write_shards(outcome.documents, work, tokenizer, options.workers, terminal)
            dataset = describe_dataset(options, work, outcome, tokenizer, splits, digest)
            write_report(dataset, outcome.summary(options), options.target.name, outcome.cleaning)
            dataset.save()
            work.publish(options.replace)
        except UserError:
            work.delete()
            raise
        except OSError as error:
            reason = f"{error.strerror}; finished parts stay there; run the same command again to continue"
            raise OSError(error.errno, reason, str(work.path)) from error
    dataset = read_dataset(options.target)
    verify_shards(dataset, tokenizer.vocab_size)  # so that the first training need not do it
    return dataset


def existing_dataset(
    options: Preparation, digest: str, files: Sequence[SourceFile], work: WorkFolder
) -> Dataset | None:
    """The dataset of this name if it is the requested one; None if there is none, or if it may be replaced.

    Raises:
        UserError: there is a different dataset, or something else, with this name.
    """
    if options.dry_run or not options.target.exists():
        return None
    if is_dataset(options.target):
        try:
            dataset = read_dataset(options.target)
        except UserError as error:
            if options.replace:
                return None
            work.delete_if_new()
            raise UserError(f"{error}; choose another name, or --replace it") from None
        made_ns = (options.target / "dataset.json").stat().st_mtime_ns
        if dataset.facts.get("plan") == digest and all(file.mtime_ns < made_ns for file in files):
            return dataset
        if options.replace:
            return None
    work.delete_if_new()
    if not is_dataset(options.target):
        raise UserError(f"{options.target}: already exists and is not a dataset; choose another name")
    raise UserError(
        f"{options.target}: already exists, made from other files or with other settings; "
        "choose another name, or --replace it"
    )


def check_end_of_text(tokenizer: Tokenizer, config: DataConfig) -> None:
    """Raises TokenizerError unless the tokenizer has an end-of-text token."""
    if tokenizer.end_of_text is None:
        raise TokenizerError(
            f"tokenizer {config.tokenizer}: has no end-of-text token, such as <|endoftext|> or </s>, with which each "
            "document of a dataset begins"
        )


# ---------------------------------------------------------------------------------------------------- the first pass


def read_all(
    options: Preparation, work: WorkFolder, all_units: Sequence[Unit], files: Sequence[SourceFile], terminal: Terminal
) -> Outcome:
    """Run the first pass. Worker processes read the parts that the work folder does not have yet.

    Raises:
        UserError: a document is not text, more records than tolerated have no text, or there are no documents.
    """
    characters = tokenizer_class(options.config).learns_characters
    rest = (options.reading, options.tolerated, options.pipeline, characters, options.fingerprints)
    jobs = [ReadJob(number, work.texts, unit, *rest) for number, unit in enumerate(all_units)]
    done = {job.number: part for job in jobs if (part := finished_part(job.stem)) is not None}
    missing = [job for job in jobs if job.number not in done]
    outcome = Outcome(files)
    with PreparationProgress(terminal, "reading", sum(unit.bytes for unit in all_units)) as progress:
        progress.skip(sum(all_units[number].bytes for number in done))
        results = in_order(read_unit, missing, options.workers, progress.advance)
        source, base = -1, 0
        for job in jobs:
            part = done[job.number] if job.number in done else next(results)
            first = job.unit.files[0][0]
            base = base + outcome.parts[-1].records if first == source else 0
            source = first
            _check_part(options, outcome, part, base)
            outcome.parts.append(part)
            outcome.bases.append(base)
    shows = options.dry_run and any(part.removed for part in outcome.parts)
    if not any(part.documents for part in outcome.parts) and not shows:
        raise CorpusError(f"{', '.join(map(one_line, options.sources))}: no documents{_reasons(outcome.parts)}")
    return outcome


def _note_absent_separator(options: Preparation, outcome: Outcome, terminal: Terminal) -> None:
    """Warn if a separator was given that no file contains, so that each file is one document."""
    separator, files = options.reading.separator, outcome.files
    if not separator or any(file.kind != "text" for file in files):
        return
    if sum(part.found for part in outcome.parts) > len(files):
        return
    hint = ""
    if "\n" in separator and any(map(_has_windows_lines, files)):
        of_windows = separator.replace("\n", "\r\n").encode("unicode_escape").decode()
        hint = f"; lines end with \\r\\n: --separator '{of_windows}'"
    terminal.warn(f"no file has the separator {separator!r}, so each is one document{hint}")


def _has_windows_lines(file: SourceFile) -> bool:
    return b"\r\n" in next(blocks(Path(file.path)), b"")


def _check_part(options: Preparation, outcome: Outcome, part: Part, base: int) -> None:
    """Note the documents of a part that are left out. Raises CorpusError if that is not allowed."""

    def place(found: Sequence[Any], short: bool = False) -> str:
        source, record, lines, reason = found
        return f"{where(outcome.files[source], options.reading, base + record, lines, short)}: {reason}"

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
    if n_bad > options.tolerated:
        limit = f"; {options.tolerated:,} tolerated" if options.tolerated else ""
        last = part.bad[-1 if part.n_bad > options.tolerated else 0]
        raise CorpusError(f"{place(last, short=True)}{limit} (--tolerate N leaves out up to N such records)")


def _reasons(parts: Sequence[Part]) -> str:
    empty, bad = sum(part.empty for part in parts), sum(part.n_bad + part.n_not_text for part in parts)
    removed = sum(part.removed for part in parts)
    words = [
        (empty, "empty"),
        (bad, "without text"),
        (removed, "removed by the cleaning (--dry-run shows by which step)"),
    ]
    reasons = ", ".join(f"{count:,} {word}" for count, word in words if count)
    return f": {reasons}" if reasons else ""


# -------------------------------------------------------------------------------------------------- between the passes


def decide(options: Preparation, outcome: Outcome, work: WorkFolder, terminal: Terminal) -> None:
    """Decide which documents are kept, and which are for validation."""
    stems = [work.texts / f"{number:05d}" for number in range(len(outcome.parts))]
    documents = outcome.documents = load_documents(stems, outcome.bases)
    if options.pipeline is not None:
        outcome.cleaning = CleaningReport(options.pipeline)
        for stem in stems:
            for effect in effects(stem):
                outcome.cleaning.add(Cleaned(text=None if effect["removed_by"] else "", **effect))
    if options.exact or options.threshold is not None:
        terminal.print(f"comparing {counted(len(documents), 'document')}")
        _remove_duplicates(options, outcome, documents)
    if len(documents.kept()) == 1:
        outcome.single = True
        cut_single(documents, options.config.val_fraction)
    else:
        documents.split(options.config.val_fraction)
        if options.leaks:
            documents.find_leaks()


def _remove_duplicates(options: Preparation, outcome: Outcome, documents: Documents) -> None:
    assert outcome.cleaning is not None
    repeats = documents.find_duplicates(options.threshold)
    documents.remove(repeats)
    outcome.duplicates = len(repeats)
    examples = {"exact_duplicates": 0, "near_duplicates": 0}
    copies = documents.copies()
    for number in repeats:
        step = "exact_duplicates" if options.exact and copies[number] else "near_duplicates"
        examples[step] += 1
        text = documents.compared_text(number) if examples[step] <= EXAMPLES else ""
        outcome.cleaning.add_removed(step, text)


# ---------------------------------------------------------------------------------------------------- the second pass


def learn_tokenizer(
    options: Preparation, work: WorkFolder, outcome: Outcome, tokenizer: Tokenizer | None, terminal: Terminal
) -> Tokenizer:
    """The given tokenizer, or the one that an interrupted preparation has learned; without either, learn one.

    Raises:
        OSError: it cannot be written.
    """
    if tokenizer is None and work.tokenizer.is_file():
        return load_tokenizer(work.tokenizer)
    if tokenizer is None:
        assert outcome.documents is not None
        if tokenizer_class(options.config).learns_characters:
            texts = [NUL, *(part.characters for part in outcome.parts)]
        else:
            terminal.print(f"learning the tokenizer {options.config.tokenizer}")
            texts = training_sample(outcome.documents, TRAINING_CHARACTERS)
        tokenizer = build_tokenizer(options.config, texts)
        check_end_of_text(tokenizer, options.config)
    tokenizer.save(work.tokenizer)
    return tokenizer


def describe_dataset(
    options: Preparation,
    work: WorkFolder,
    outcome: Outcome,
    tokenizer: Tokenizer,
    splits: dict[str, Split],
    digest: str,
) -> Dataset:
    """The dataset in the work folder, whose dataset.json is not written yet; writes its tokenizer."""
    assert tokenizer.end_of_text is not None
    assert outcome.documents is not None
    dataset = Dataset(
        work.dataset,
        tokenizer.hash(),
        tokenizer.end_of_text,
        id_dtype(tokenizer.vocab_size).name,
        splits,
        [{"path": file.path, "kind": file.kind, "bytes": file.bytes} for file in outcome.files],
        sorted(outcome.documents.leaks),
        {
            "tokenizer": {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size},
            "settings": options.settings(),
            "cleaning": [] if options.pipeline is None else options.pipeline.to_json(),
            "versions": versions(),
            "plan": digest,
            **options.notes,
        },
    )
    tokenizer.save(dataset.tokenizer_path)
    return dataset
