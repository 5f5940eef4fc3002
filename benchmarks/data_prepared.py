"""A part of benchmarks.data: the cost of a start and of batches with a prepared dataset."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from rich.console import RenderableType
from rich.table import Table

from benchmarks.common import load_config, verdict
from data import BatchSampler, Corpus, load_corpus
from tokenizer import build_tokenizer
from utils.config.settings import Config, DataConfig
from utils.corpora.datasets import TOKENIZER_JSON, Dataset, Shard, ShardWriter, Split
from utils.machine.device import torch_settings
from utils.packing.shuffle import _block, epoch_words
from utils.packing.windows import _epoch_order
from utils.terminal.cli import PROJECT_ROOT
from utils.terminal.console import Terminal
from utils.training.state import TrainState, build_state
from utils.training.step import EagerUpdate, no_phase

MOST_SECONDS = 0.3  # by which a start may take longer than with pydocs
MOST_OF_STEP = 0.03  # the share of a step's time that a batch may take
MEAN_LENGTH = 500  # tokens of a document
TOKENS_OF_SHARD = 1 << 28
PACKINGS = ("random", "none", "documents")


def prepared_table(megabytes: int, repeats: int, steps: int = 30) -> RenderableType:
    """Start-up and batches of a generated dataset of that size, next to those of pydocs."""
    with tempfile.TemporaryDirectory(prefix="datasets-") as folder:
        dataset = generated_dataset(Path(folder) / "generated", megabytes * 1_000_000 // 2)
        documents = dataset.splits["train"].documents
        table = Table(title=f"A dataset of {megabytes:,} MB, {documents:,} documents", title_justify="left")
        table.title_style = "bold"
        table.add_column("corpus", style="cyan")
        for header in ("first start s", "start s", f"more than pydocs (at most {MOST_SECONDS} s)"):
            table.add_column(header, justify="right")
        for header in ("batch ms", "step ms", f"share (at most {MOST_OF_STEP:.0%})"):
            table.add_column(header, justify="right")
        settings = {"device": "cpu", "corpora_dir": f"{folder}/corpora", "datasets_dir": folder}
        reference = None
        for packing in (None, *PACKINGS):
            flags = {"dataset": "generated", "packing": packing} if packing else {"dataset": "pydocs"}
            config = load_config([], Path(folder), {**settings, **flags}).config
            first, *others = [start_seconds(config) for _ in range(repeats + 1)]
            start = min(others)
            reference = reference or start
            batch, step = seconds_of_step(config, steps)
            table.add_row(
                f"generated, {packing}" if packing else "pydocs",
                f"{first:.2f}",
                f"{start:.2f}",
                f"{start - reference:+.2f} {verdict(start - reference <= MOST_SECONDS)}" if packing else "",
                f"{1000 * batch:.3f}",
                f"{1000 * step:.1f}",
                f"{batch / step:.2%} {verdict(batch / step <= MOST_OF_STEP)}",
            )
    return table


def load(config: Config) -> Corpus:
    places = Path(config.data.corpora_dir), Path(config.data.datasets_dir)
    return load_corpus(config.data, config.model.block_size, PROJECT_ROOT / places[0], datasets_dir=places[1])


def start_seconds(config: Config) -> float:
    """Seconds from the configuration to the first update: loading the corpus, and the batches of evaluations."""
    for cached in (epoch_words, _block, _epoch_order):
        cached.cache_clear()
    began, settings = time.perf_counter(), config.train
    corpus = load(config)
    sampler = BatchSampler(corpus, config.model.block_size, settings.sequences, settings.seed, torch.device("cpu"))
    for stream in ("train_eval", "val"):
        sampler.evaluation_bytes(stream, settings.eval_iters)
    sampler.train_batch(0)
    return time.perf_counter() - began


def seconds_of_step(config: Config, steps: int) -> tuple[float, float]:
    """Seconds of a batch, and of a whole step of the default model; the fastest of each counts."""
    device = torch.device("cpu")
    with torch_settings(config.train, device):
        state = build_state(config, steps, load(config), device, torch.float32, Terminal(quiet=True))
        state.model.train()
        update, times = EagerUpdate(state), []
        for _ in range(steps):
            began = time.perf_counter()
            _, norms = update.gradients(no_phase)
            update.apply(norms)
            times.append(time.perf_counter() - began)
        return min(batch_times(state, 3 * steps)), min(times)


def batch_times(state: TrainState, steps: int) -> Iterator[float]:
    for step in range(steps):
        began = time.perf_counter()
        state.sampler.train_batch(step)
        state.sampler.target_share(step, 0, 1)
        yield time.perf_counter() - began


def generated_dataset(folder: Path, n_tokens: int) -> Dataset:
    """Random bytes in documents whose lengths are lognormal, a hundredth of them for validation."""
    folder.mkdir()
    tokenizer = build_tokenizer(DataConfig(tokenizer="byte"), [])
    tokenizer.save(folder / TOKENIZER_JSON)
    generator = np.random.default_rng(0)
    splits = {name: generated_split(folder, name, n, generator) for name, n in parts(n_tokens)}
    dataset = Dataset(folder, tokenizer.hash(), 0, "uint16", splits, [{"path": "generated"}])
    dataset.save()
    dataset.verify()
    return dataset


def parts(n_tokens: int) -> Iterator[tuple[str, int]]:
    yield "train", n_tokens - n_tokens // 100
    yield "val", n_tokens // 100


def generated_split(folder: Path, name: str, n_tokens: int, generator: np.random.Generator) -> Split:
    shards: list[Shard] = []
    for first in range(0, n_tokens, TOKENS_OF_SHARD):
        writer, left = ShardWriter(folder, name, len(shards)), min(TOKENS_OF_SHARD, n_tokens - first)
        while left > 0:
            lengths = generator.lognormal(np.log(MEAN_LENGTH) - 0.5, 1, 2000).astype(np.int64) + 2
            ids = generator.integers(1, 256, int(lengths.sum()), dtype=np.uint16)
            starts = np.cumsum(lengths) - lengths
            ids[starts] = 0
            for number, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
                if left > 0:
                    writer.add(ids[start : start + length].data, 0, number + 1)
                    left -= length
        shards.append(writer.close())
    return Split(shards, sum(shard.tokens - shard.documents for shard in shards))
