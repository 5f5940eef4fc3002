"""Are planted near duplicates found, and nothing else, and how long do 100,000 documents of 1 kB take?

python -m benchmarks.data_duplicates --documents 100000

One document in ten is a copy whose similarity is just above the threshold, and as many are copies just below it.
"""

from __future__ import annotations

import functools
import itertools
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from rich.table import Table

from benchmarks.common import at_least, machine_facts, verdict
from utils.preparation.duplicates import SHINGLE, THRESHOLD, find_duplicates, fingerprint
from utils.terminal.cli import Parser, script
from utils.terminal.console import Terminal

LEAST, MOST_SECONDS = 0.95, 180
CHUNK = 500  # documents that a worker gets at a time


@script
def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m benchmarks.data_duplicates", description=__doc__)
    parser.add_argument("--documents", type=int, default=5000, metavar="N", help="number of documents (default: 5000)")
    args = parser.parse(argv)
    at_least(1, documents=args.documents)
    Terminal().print(duplicates_table(args.documents), f"machine: {machine_facts()}, {os.cpu_count()} cores")
    return 0


@dataclass(frozen=True)
class Planted:
    """Random texts, some of which are edited copies of earlier ones.

    copies: document -> the earlier one, and their similarity.
    """

    texts: Sequence[str]
    copies: dict[int, tuple[int, float]]

    def repeats(self) -> dict[int, int]:
        """What `find_duplicates` should answer."""
        return {copy: original for copy, (original, similarity) in self.copies.items() if similarity >= THRESHOLD}


def planted(documents: int, share: float = 0.1, size: int = 1000, seed: int = 0) -> Planted:
    """Random documents of `size` characters. A share of them are copies whose similarity is just above the threshold
    (from 0.80 to 0.82), and as many copies whose similarity is just below it (from 0.76 to 0.80)."""
    generator = random.Random(seed)
    pairs = int(documents * share)
    texts = [random_text(generator, size) for _ in range(documents - 2 * pairs)]
    copies: dict[int, tuple[int, float]] = {}
    for original in generator.sample(range(len(texts)), 2 * pairs):
        above = len(copies) < pairs
        low, high = (THRESHOLD, THRESHOLD + 0.02) if above else (THRESHOLD - 0.04, THRESHOLD)
        text, similarity = edited_copy(generator, texts[original], low, high)
        copies[len(texts)] = original, similarity
        texts.append(text)
    return Planted(texts, copies)


def random_text(generator: random.Random, size: int) -> str:
    """`size` characters of words with Zipf's frequencies."""
    words, weights = _vocabulary()
    return " ".join(generator.choices(words, cum_weights=weights, k=size // 2))[:size]


@functools.cache
def _vocabulary(count: int = 20_000) -> tuple[Sequence[str], Sequence[float]]:
    generator = random.Random(0)
    words = ["".join(generator.choices("etaoinshrdlcumwfgypbvk", k=generator.randint(2, 9))) for _ in range(count)]
    return words, list(itertools.accumulate(1 / (rank + 10) for rank in range(count)))


def edited_copy(generator: random.Random, text: str, low: float, high: float) -> tuple[str, float]:
    """A text with single characters replaced, so that the similarity is from `low` up to, not including, `high`."""
    while True:
        characters = list(text)
        total = len(text) - SHINGLE + 1
        hit: set[int] = set()
        aim = low + (high - low) * generator.random()
        for place in generator.sample(range(len(text)), len(text)):
            after = hit | set(range(max(place - SHINGLE + 1, 0), min(place, total - 1) + 1))
            if (total - len(after)) / (total + len(after)) < aim:
                break
            characters[place], hit = generator.choice("0123456789"), after
        copy = "".join(characters)
        if low <= (similarity := reference_similarity(text, copy)) < high:
            return copy, similarity


def reference_similarity(a: str, b: str) -> float:
    """The Jaccard index, by sets of strings."""
    sets = []
    for text in (a, b):
        text = " ".join(text.lower().split())
        sets.append({text[start : start + SHINGLE] for start in range(max(len(text) - SHINGLE + 1, 1))})
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def fingerprints(texts: Sequence[str], workers: int) -> Iterator[bytes]:
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(fingerprint, texts, chunksize=CHUNK)


def duplicates_table(documents: int) -> Table:
    """Find planted duplicates, and check the answer."""
    data = planted(documents)
    workers = os.cpu_count() or 1
    start = time.perf_counter()
    prints = list(fingerprints(data.texts, workers))
    middle = time.perf_counter()
    found = find_duplicates(prints, data.texts.__getitem__)
    end = time.perf_counter()
    right = len(found.items() & data.repeats().items())
    precision, recall = right / max(len(found), 1), right / max(len(data.repeats()), 1)
    table = Table(
        title=f"Near duplicates among {documents:,} documents of 1 kB", title_justify="left", title_style="bold"
    )
    for header in ("", "value", "bound"):
        table.add_column(header, justify="right" if header == "value" else "left")
    table.add_row("planted at a similarity of 0.80 to 0.82", f"{len(data.repeats()):,}", "")
    table.add_row("planted at a similarity of 0.76 to 0.80", f"{len(data.copies) - len(data.repeats()):,}", "")
    table.add_row("precision", f"{precision:.4f}", f"at least {LEAST}: {verdict(precision >= LEAST)}")
    table.add_row("recall", f"{recall:.4f}", f"at least {LEAST}: {verdict(recall >= LEAST)}")
    table.add_row(f"fingerprints, {workers} processes", f"{middle - start:.1f} s", "")
    table.add_row("search and exact similarities", f"{end - middle:.1f} s", "")
    scaled = (end - start) * 100_000 / documents
    bound = f"at most {MOST_SECONDS} s for 100,000: {verdict(scaled <= MOST_SECONDS)}"
    table.add_row("together", f"{end - start:.1f} s", bound)
    return table


if __name__ == "__main__":
    sys.exit(main())
