"""Does encoding a text cost more than the libraries that do the work? Are near duplicates found, and how fast?

python -m benchmarks.data
python -m benchmarks.data --megabytes 200 --repeats 3
python -m benchmarks.data --documents 100000
python -m benchmarks.data_arithmetic           # what the arithmetic preset learns, and how fast
python -m benchmarks.data_prepare              # speed and memory of prepare.py, and kills

Each tokenizer encodes a generated text into the ids of a token file. For comparison, NumPy alone (with a table of code
points, or the bytes) or the packages tokenizers and tiktoken alone encode the same text, by lines, on the same cores.
With --gpt2 FOLDER, which has GPT-2's vocab.bpe and encoder.json, 10,000 random texts must also have the ids that
tiktoken, tokenizers and transformers give.

A second table shows the cost of a start and of a batch with a prepared dataset of generated tokens
(--prepared-megabytes).
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks.common import at_least, interleaved, machine_facts, timed, verdict
from benchmarks.data_duplicates import duplicates_table
from tokenizer import Tokenizer, build_tokenizer
from utils.config.settings import DataConfig
from utils.errors import UserError
from utils.terminal.cli import Parser, script
from utils.terminal.console import Terminal

LEAST = 0.8  # of the speed of the library alone
WORDS = 50_000  # of the generated text, with Zipf's frequencies


@script
def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m benchmarks.data", description=__doc__)
    parser.add_argument("--megabytes", type=int, default=20, metavar="N", help="size of the text (default: 20)")
    parser.add_argument(
        "--repeats",
        type=int,
        default=3,
        metavar="N",
        help="encodings by each; the fastest counts (default: 3)",
    )
    parser.add_argument(
        "--documents", type=int, default=5000, metavar="N", help="documents with near duplicates (default: 5000)"
    )
    parser.add_argument("--gpt2", type=Path, metavar="FOLDER", help="folder with GPT-2's vocab.bpe and encoder.json")
    parser.add_argument(
        "--prepared-megabytes", type=int, default=20, metavar="N", help="size of the prepared dataset (default: 20)"
    )
    args = parser.parse(argv)
    at_least(1, megabytes=args.megabytes, repeats=args.repeats, documents=args.documents)
    at_least(1, **{"prepared-megabytes": args.prepared_megabytes})
    from benchmarks.data_prepared import prepared_table  # imports torch: not for --help

    terminal = Terminal()
    if args.gpt2:
        os.environ["WORKBENCH_DATA"] = str(args.gpt2)
        if different := differing_ids(args.gpt2, 10_000):
            raise UserError(f"gpt2: other ids than tiktoken, tokenizers or transformers for {different[0]!r}")
        terminal.print("gpt2: the ids of tiktoken, tokenizers and transformers on 10,000 random texts")
    text = generated_text(args.megabytes * 1_000_000)
    table = Table(title=f"Encoding {args.megabytes} MB", title_justify="left", title_style="bold")
    table.add_column("tokenizer", style="cyan")
    for header in ("MB/s", "alone MB/s", f"ratio (at least {LEAST})", "bytes per token"):
        table.add_column(header, justify="right")
    for kind in ("char", "byte", "bpe", *(["gpt2"] if args.gpt2 else [])):
        tokenizer = build_tokenizer(DataConfig(tokenizer=kind), [text])
        table.add_row(kind, *measured(tokenizer, text, args.repeats, args.megabytes))
    terminal.print(table, duplicates_table(args.documents), prepared_table(args.prepared_megabytes, args.repeats))
    terminal.print(f"machine: {machine_facts()}, {os.cpu_count()} cores")
    return 0


def measured(tokenizer: Tokenizer, text: str, repeats: int, megabytes: int) -> tuple[str, ...]:
    """The cells of a row."""
    alone = ALONE[tokenizer.kind](tokenizer)
    arms = {"ours": lambda: timed(lambda: count_tokens(tokenizer, text)), "alone": lambda: timed(lambda: alone(text))}
    seconds = interleaved(arms, repeats)
    ours, theirs = (min(seconds[name]) for name in ("ours", "alone"))
    ratio = theirs / ours
    return (
        f"{megabytes / ours:,.1f}",
        f"{megabytes / theirs:,.1f}",
        f"{ratio:.2f} {verdict(ratio >= LEAST)}",
        f"{len(text.encode()) / count_tokens(tokenizer, text):.2f}",
    )


def count_tokens(tokenizer: Tokenizer, text: str) -> int:
    """Encode a text part by part, as for a token file; returns the number of tokens."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    return sum(len(part.astype(dtype)) for part in tokenizer.encode_parts(text))


def char_alone(tokenizer: Any) -> Callable[[str], object]:
    """One look-up of all code points in a table."""
    points = np.array([ord(character) for character in tokenizer.vocabulary])
    table = np.zeros(int(points.max()) + 1, dtype=np.int64)
    table[points] = np.arange(len(points))
    return lambda text: table[np.frombuffer(text.encode("utf-32-le"), dtype="<u4")].astype(np.uint16)


def byte_alone(tokenizer: Any) -> Callable[[str], object]:
    return lambda text: np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16)


def bpe_alone(tokenizer: Any) -> Callable[[str], object]:
    """The lines of the text as one batch of the package tokenizers, which uses all cores."""
    from tokenizers import Tokenizer as Library

    library = Library.from_str(tokenizer.specification)

    def encode(text: str) -> list[np.ndarray]:
        lines = text.splitlines(keepends=True)
        return [np.array(encoding.ids, dtype=np.uint16) for encoding in library.encode_batch_fast(lines)]

    return encode


def gpt2_alone(tokenizer: Any) -> Callable[[str], object]:
    """The lines of the text as one batch of tiktoken, with one thread per core."""
    encoding = tokenizer._encoding

    def encode(text: str) -> list[np.ndarray]:
        lines = text.splitlines(keepends=True)
        batches = encoding.encode_ordinary_batch(lines, num_threads=os.cpu_count())
        return [np.array(ids, dtype=np.uint16) for ids in batches]

    return encode


ALONE = {"char": char_alone, "byte": byte_alone, "bpe": bpe_alone, "gpt2": gpt2_alone}


def generated_text(size: int) -> str:
    """Lines of words with Zipf's frequencies, numbers and punctuation, about `size` bytes."""
    generator = random.Random(0)
    letters = "etaoinshrdlcumwfgypbvkxqjz" + "é"
    words = ["".join(generator.choices(letters, k=generator.randint(1, 10))) for _ in range(WORDS)]
    weights = [1 / rank for rank in range(1, WORDS + 1)]
    parts: list[str] = []
    length = 0
    while length < size:
        chosen = generator.choices(words, weights, k=100_000)
        for place in range(11, len(chosen), 12):
            chosen[place] += generator.choice((",", ".", ".\n", "!\n\n", " 1,234", " 'quoted'"))
        parts.append(" ".join(chosen))
        length += len(parts[-1].encode())
    return "\n".join(parts)


def differing_ids(folder: Path, count: int) -> list[str]:
    """Random texts for which `gpt2` gives other ids than tiktoken, tokenizers or transformers do.

    Raises:
        UserError: transformers is missing.
    """
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from tiktoken_ext.openai_public import r50k_pat_str
    from tokenizers import Tokenizer as Library
    from tokenizers import models, pre_tokenizers

    files = [str(folder / name) for name in ("vocab.bpe", "encoder.json")]
    ours = build_tokenizer(DataConfig(tokenizer="gpt2"), [])
    theirs = tiktoken.Encoding(
        "gpt2",
        pat_str=r50k_pat_str,
        mergeable_ranks=data_gym_to_mergeable_bpe_ranks(files[0], files[1]),
        special_tokens={},
    )
    library = Library(models.BPE.from_file(files[1], files[0]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    try:
        from transformers import GPT2Tokenizer  # since version 5 the same class as GPT2TokenizerFast
    except ImportError:
        raise UserError("the package transformers is missing: pip install -r requirements-bench.txt") from None
    of_transformers = GPT2Tokenizer(vocab=files[1], merges=files[0])
    generator = random.Random(0)
    texts = []
    for _ in range(count):
        ranges = generator.choices(
            ((32, 127), (9, 14), (0xA0, 0x500), (0x2000, 0x3100), (0x4E00, 0xD7A4), (0xE000, 0x110000)), k=3
        )
        texts.append(
            "".join(chr(generator.randrange(*generator.choice(ranges))) for _ in range(generator.randint(1, 60)))
        )

    def agree(text: str) -> bool:
        ids = ours.encode(text)
        return ids == theirs.encode_ordinary(text) == library.encode(text).ids == of_transformers.encode(text)

    return [text for text in texts if not agree(text)]


if __name__ == "__main__":
    sys.exit(main())
