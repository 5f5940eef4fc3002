"""The records and tables of evaluate.py for the scores of a text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from utils.evaluation.weights import Trained
from utils.inference.scoring import Score, perplexity
from utils.runs.run import utc_now
from utils.terminal.tables import plain_table
from utils.terminal.words import one_line

SAME_BYTES = 256  # the same text may differ by fewer bytes, those of its first token, which is not predicted
OTHER_TEXTS = "The runs were evaluated on different texts: their results are not comparable."
OTHER_SPLITS = "The validation splits begin at different places of the text, because the tokenizers differ."
OTHER_TOKENIZERS = "The tokenizers differ: compare bits per byte. Loss and perplexity are per token."


def evaluation_record(trained: Trained, data: str, data_hash: str) -> dict[str, Any]:
    """The fields that the record of every evaluation begins with (utils/runs/evaluations.py)."""
    return {
        "time": utc_now(),
        "step": trained.step,
        "weights": trained.weights,
        "device": next(trained.model.parameters()).device.type,
        "tokenizer": trained.tokenizer.kind,
        "tokenizer_hash": trained.tokenizer.hash(),
        "data": data,
        "data_hash": data_hash,
    }


def score_record(score: Score, without: Score | None, block_size: int, stride: int) -> dict[str, Any]:
    """The fields of a record for a score, and for the windows with which it was computed.

    Args:
        without: the score without leaked documents; None if there are none.
    """
    leaks = {}
    if without is not None:
        leaks = {"loss_without_leaks": without.loss, "bits_per_byte_without_leaks": without.bits_per_byte}
    return {
        "loss": score.loss,
        "perplexity": score.perplexity,
        "bits_per_byte": score.bits_per_byte,
        **leaks,
        "tokens": score.tokens,
        "bytes": score.bytes,
        "block_size": block_size,
        "stride": stride,
        "seconds": round(score.seconds, 3),
    }


def comparison_notes(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Warnings for users who compare the results of several runs."""
    sizes = [record["bytes"] for record in records if "bytes" in record]
    if len({record["data_hash"] for record in records}) > 1:
        yield OTHER_TEXTS
    elif sizes and max(sizes) - min(sizes) >= SAME_BYTES:
        yield OTHER_SPLITS
    if len({record["tokenizer_hash"] for record in records}) > 1:
        yield OTHER_TOKENIZERS


def scores_screen(names: Sequence[str], records: Sequence[Mapping[str, Any]]) -> Iterator[RenderableType]:
    """A table with a row for each run; the best value is bold if the runs are comparable."""
    data = dict.fromkeys(record["data"] for record in records)
    yield Text(", ".join(map(one_line, data)), style="bold")
    notes = list(comparison_notes(records))
    best = min(record["bits_per_byte"] for record in records)
    table = plain_table(["run", "tokenizer"], ["step", "loss", "perplexity", "bits/byte", "tokens"])
    for name, record in zip(names, records, strict=True):
        is_best = len(records) > 1 and OTHER_TEXTS not in notes and record["bits_per_byte"] == best
        table.add_row(
            Text(one_line(name), style="cyan"),
            record["tokenizer"],
            f"{record['step']:,}" if record["step"] is not None else "",
            f"{record['loss']:.4f}",
            f"{record['perplexity']:.4f}",
            Text(f"{record['bits_per_byte']:.4f}", style="bold green" if is_best else ""),
            f"{record['tokens']:,}",
        )
        if (loss := record.get("loss_without_leaks")) is not None:
            bits = f"{record['bits_per_byte_without_leaks']:.4f}"
            name_cell = Text("  without leaks", style="dim cyan")
            table.add_row(name_cell, "", "", f"{loss:.4f}", f"{perplexity(loss):.4f}", bits)
    yield table
    yield from (Text(line, style="dim") for line in window_lines(names, records))
    yield from (Text(note, style="yellow") for note in notes)


def window_lines(names: Sequence[str], records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The windows of all runs, or, if they differ, of each run."""
    windows = [f"{record['block_size']:,} tokens, advancing by {record['stride']:,}" for record in records]
    if len(set(windows)) == 1:
        yield f"each token is predicted once, in windows of {windows[0]}"
        return
    yield "each token is predicted once, in windows of"
    yield from (f"  {window}: {one_line(name)}" for name, window in zip(names, windows, strict=True))
