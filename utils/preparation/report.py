"""report.json and CARD.md of a dataset: its contents, what was removed, and its origin."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from utils.corpora.cleaning import CleaningReport
from utils.corpora.datasets import Dataset, Split
from utils.files import write_atomic, write_json
from utils.terminal.words import counted, one_line, setting_text, size

REPORT, CARD = "report.json", "CARD.md"
SOURCES_SHOWN = 20


def write_report(dataset: Dataset, summary: dict[str, Any], name: str, cleaning: CleaningReport | None) -> None:
    """Write report.json and CARD.md.

    Args:
        summary: the outcome for the documents (`Outcome.summary`).
        name: name of the dataset, whose folder may still have another one.

    Raises:
        OSError: a file cannot be written.
    """
    report = {"name": name, "splits": {key: split_facts(dataset, key) for key in dataset.splits}, **summary}
    write_json(dataset.folder / REPORT, report)
    write_atomic(dataset.folder / CARD, "\n".join(card_lines(dataset, report, cleaning)) + "\n")


def split_facts(dataset: Dataset, name: str) -> dict[str, Any]:
    """The size of a split, and the lengths of its documents."""
    split = dataset.splits[name]
    lengths = np.concatenate([np.zeros(0, np.uint64), *_lengths(dataset, split)])
    return {
        "documents": split.documents,
        "tokens": split.tokens,
        "bytes": split.bytes,
        "tokens_per_document": {
            "median": int(np.median(lengths)) if len(lengths) else 0,
            "longest": int(lengths.max()) if len(lengths) else 0,
        },
    }


def _lengths(dataset: Dataset, split: Split) -> Iterator[np.ndarray]:
    """The number of tokens of each document, shard by shard."""
    for shard in split.shards:
        yield np.diff(np.fromfile(dataset.path(shard, "ends"), dtype="<u8"), prepend=np.uint64(0))


def card_lines(dataset: Dataset, report: Mapping[str, Any], cleaning: CleaningReport | None) -> Iterator[str]:
    """The lines of CARD.md, the description of the dataset for people."""
    tokenizer = dataset.facts["tokenizer"]
    yield f"# {escaped(report['name'])}"
    yield ""
    yield f"A dataset for training, made by prepare.py; split {report['split']}."
    yield ""
    yield "| split | documents | tokens | text | bytes a token | tokens a document: median, longest |"
    yield "|---|--:|--:|--:|--:|--:|"
    for name, facts in report["splits"].items():
        lengths = facts["tokens_per_document"]
        per_token = facts["bytes"] / max(facts["tokens"] - facts["documents"], 1)
        yield (
            f"| {name} | {facts['documents']:,} | {facts['tokens']:,} | {size(facts['bytes'])} | {per_token:.2f} | "
            f"{lengths['median']:,}, {lengths['longest']:,} |"
        )
    yield ""
    yield (
        f"Tokenizer: {tokenizer['kind']} with {tokenizer['vocab_size']:,} tokens, sha256 "
        f"{dataset.tokenizer_hash[:16]}. Each document begins with token {dataset.end_of_text}."
    )
    yield from _origin(report)
    yield from _left_out(report, cleaning)
    yield from _leaks(report)
    yield from ("", "## Settings", "", "| setting | value |", "|---|---|")
    for key, value in dataset.facts["settings"].items():
        yield f"| {key} | {escaped(setting_text(value)) or '(empty)'} |"


def code(text: str) -> str:
    """Any text, as code in Markdown."""
    return f"`{one_line(text).replace('`', chr(39))}`"


def escaped(text: str) -> str:
    """Any text, escaped for Markdown so that it makes no HTML, image or table border."""
    return re.sub(r"[<|!\[`]", r"\\\g<0>", one_line(text))


def _origin(report: Mapping[str, Any]) -> Iterator[str]:
    notes, sources = report["notes"], report["sources"]
    yield from ("", "## Origin and licence", "")
    yield f"- Licence: {escaped(notes.get('licence', '')) or 'not stated (prepare.py --licence TEXT)'}"
    yield f"- Origin: {escaped(notes.get('origin', '')) or 'not stated (prepare.py --origin TEXT)'}"
    yield f"- {counted(len(sources), 'file')}, {size(sum(source['bytes'] for source in sources))}:"
    for source in sources[:SOURCES_SHOWN]:
        yield f"    - {code(source['path'])} ({source['kind'].replace('_', ' ')}, {size(source['bytes'])})"
    if len(sources) > SOURCES_SHOWN:
        yield f"    - and {len(sources) - SOURCES_SHOWN:,} more, in report.json"


def _left_out(report: Mapping[str, Any], cleaning: CleaningReport | None) -> Iterator[str]:
    yield from ("", "## What was left out", "")
    if not report["left_out"]:
        yield "Nothing." if cleaning is None else "Nothing, apart from what the cleaning removed."
    for reason, facts in report["left_out"].items():
        yield f"- {reason}: {facts['count']:,}"
        for example in facts["examples"]:
            yield f"    - {code(example)}"
    yield from ("", "## Cleaning", "")
    if cleaning is None:
        yield "None: the texts were not changed (prepare.py --clean)."
    else:
        yield from cleaning.lines()


def leak_words(leaks: Mapping[str, Any], val_documents: int) -> str:
    """The number of validation documents that nearly equal a training document, in words."""
    if not leaks["looked_for"]:
        return "not looked for"
    return (
        f"{leaks['documents']:,} of {val_documents:,} validation documents ({leaks['share']:.1%}) nearly equal a "
        "training document"
    )


def _leaks(report: Mapping[str, Any]) -> Iterator[str]:
    leaks = report["leaks"]
    yield from ("", "## Near-duplicates between training and validation", "")
    yield f"{leak_words(leaks, report['splits']['val']['documents']).capitalize()}."
    for example in leaks["examples"]:
        yield f"- {code(example['val'])} is like {code(example['train'])}"
