"""`batch_size auto`: how many sequences fit into memory, and how many micro-steps an update needs.

A size fits if a whole training step does. On CUDA, steps are tried: running out of memory is an exception there.
Elsewhere it would end the process, so a step runs on tensors without storage (FakeTensorMode), and the bytes that they
would take are counted. Both use the model without torch.compile.
"""

from __future__ import annotations

import bisect
import contextlib
import gc
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data import BatchSampler, Corpus
from model import LanguageModel
from utils.config.loader import LoadedConfig
from utils.config.settings import Config
from utils.errors import OutOfMemoryError, UserError, is_out_of_memory
from utils.machine.device import available_memory, torch_settings
from utils.machine.ranks import ONE, Ranks
from utils.nn.lora import add_adapters, frozen_weights
from utils.optim.groups import build_optimizer
from utils.runs.origin import FOUND_BATCH, put_on_top
from utils.training.state import TrainState, apply_layer_settings
from utils.training.step import clip_gradients, forward_backward, optimizer_step

# Share of the free memory that stays free, for evaluation, histograms and fragmentation. The CPU's allocator takes 0.4%
# to 42% more than the tensors (at most 16% from 1 GiB on), and a process that takes too much is killed.
RESERVE = {"cuda": 0.1, "cpu": 0.25, "mps": 0.25}
GIB = 2**30
LEAST_BYTES = 2  # per number
LARGE_PART = 100  # 1/100 of the free memory is a large part: a step takes 20 to 70 times the inputs of its blocks

Fits = Callable[[int], bool]  # whether a micro-step of that many sequences fits


def find_batch(
    loaded: LoadedConfig,
    corpus: Corpus,
    device: torch.device,
    dtype: torch.dtype,
    report: Callable[[str], None],
    ranks: Ranks = ONE,
) -> LoadedConfig:
    """Replace `auto` by numbers: batch_size and gradient_accumulation_steps, in a layer on top of the configuration.

    Random streams and memory are left as they were, so a run in which these numbers are set by hand is the same.

    Args:
        report: prints one line to the user, which says what was chosen.
        ranks: the ranks that share the batch; this process is rank 0, and the rank with the least memory decides.

    Raises:
        UserError: not even one sequence fits, or tokens_per_step cannot be shared.
    """
    config = loaded.config
    length, tokens = config.model.block_size, config.train.tokens_per_step
    slices = slices_of(config, ranks)
    most = max(1, corpus.tokens_of_pass(length) // length // slices)  # an update should not see a token twice
    if tokens and tokens // length % slices:
        raise UserError(
            f"{loaded.source('tokens_per_step')}: {tokens // length:,} sequences of {length:,} tokens cannot be cut "
            f"into {slices} equal {'lanes' if config.train.lanes else 'parts, one for each rank'}"
        )
    sizes = divisors(tokens // length // slices) if tokens else [2**n for n in range(most.bit_length())]
    free = available_memory(device) if ranks.memory is None else ranks.memory
    with fitting(config, corpus, device, dtype, free) as fits:
        micro_batch = largest_fitting(sizes, fits)
    memory = f"{free / GIB:.1f} GiB that are free on {device}"
    if micro_batch is None:
        raise UserError(
            f"{loaded.source('batch_size')}: batch_size auto: not even one sequence of {length:,} tokens fits into "
            f"the {memory}, less {RESERVE[device.type]:.0%} in reserve: make the model or block_size smaller"
        )
    sequences = tokens // length if tokens else micro_batch * slices
    micro_steps = sequences // micro_batch if tokens else 1
    words = f"batch_size auto: {sequences:,} sequences, {sequences * length:,} tokens per step"
    if micro_steps > 1:
        words += f", in {micro_steps:,} micro-steps of {micro_batch:,}, which fit into the {memory}"
    elif slices > 1 and micro_batch < sizes[-1]:
        words += f", {micro_batch:,} at a time, which fit into the {memory}"
    elif not tokens:
        limit = (
            f"the training text has {most * slices:,}"
            if micro_batch == sizes[-1]
            else f"more do not fit into the {memory}"
        )
        words += f" ({limit})"
    report(words)
    found = {"batch_size": sequences, "gradient_accumulation_steps": micro_steps, "tokens_per_step": None}
    return put_on_top(loaded, found, FOUND_BATCH)


def slices_of(config: Config, ranks: Ranks) -> int:
    """The number of parts that a batch is cut into even without gradient accumulation."""
    return config.train.lanes or ranks.world_size


@contextlib.contextmanager
def memory_explained(config: Config, device: torch.device) -> Iterator[None]:
    """During training, turn an out-of-memory error into an OutOfMemoryError that says what to do about it."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or isinstance(error, OutOfMemoryError):
            raise
        raise OutOfMemoryError(f"out of memory: {_does_not_fit(config, device)}") from error


def check_micro_step(
    loaded: LoadedConfig, corpus: Corpus, device: torch.device, dtype: torch.dtype, ranks: Ranks = ONE
) -> None:
    """Raises UserError if a micro-step certainly does not fit into memory.

    First only the inputs of the blocks, which the backward pass needs, are counted: that takes no time. If they are a
    large part of the memory and the system kills a process that takes too much, the whole step is counted.
    """
    config = loaded.config
    free = available_memory(device) if ranks.memory is None else ranks.memory
    sequences = micro_batch_of(config, ranks)
    needed = sequences * config.model.block_size * config.model.n_layer * config.model.n_embd * LEAST_BYTES
    if device.type != "cuda" and free / LARGE_PART < needed <= free:
        with torch.random.fork_rng(devices=[]), torch_settings(config.train, device):
            needed = bytes_of_training(config, corpus, dtype, sequences)
    if needed > free:
        raise UserError(f"{loaded.source('batch_size')}: {_does_not_fit(config, device, ranks)}")


def micro_batch_of(config: Config, ranks: Ranks) -> int:
    """Sequences per micro-step."""
    return config.train.sequences // max(config.train.gradient_accumulation_steps, slices_of(config, ranks))


def _does_not_fit(config: Config, device: torch.device, ranks: Ranks = ONE) -> str:
    sequences = micro_batch_of(config, ranks)
    return (
        f"a micro-step of {sequences:,} x {config.model.block_size:,} tokens does not fit on {device}: "
        "--batch-size auto finds what fits; --gradient-accumulation-steps N splits an update into N micro-steps"
    )


def largest_fitting(sizes: Sequence[int], fits: Fits) -> int | None:
    """The largest of the ascending `sizes` that fits, found by bisection; None if none does."""
    count = bisect.bisect_left(sizes, True, key=lambda size: not fits(size))
    return sizes[count - 1] if count else None


def divisors(number: int) -> list[int]:
    """All divisors of a number, ascending.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return small + [number // n for n in reversed(small) if n * n != number]


@contextlib.contextmanager
def fitting(config: Config, corpus: Corpus, device: torch.device, dtype: torch.dtype, free: int) -> Iterator[Fits]:
    """Yield a function that tries a size on `device`, with `free` bytes minus the reserve.

    Random streams, settings and memory are restored on exit.
    """
    usable = int(free * (1 - RESERVE[device.type]))
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_cuda else []), torch_settings(config.train, device):
        if not on_cuda:
            yield lambda size: bytes_of_training(config, corpus, dtype, size) <= usable
            return
        cuda_probe = CudaProbe(config, corpus, device, dtype)
        try:
            with limited_cuda(device, usable):
                yield cuda_probe.fits
        finally:
            cuda_probe.probe = None
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)


class ZeroBatches(BatchSampler):
    """Batches that repeat one token, since memory does not depend on the tokens."""

    def train_batch(self, *_place: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.zeros((self.batch_size, self.block_size), dtype=torch.int64, device=self.device)  # (B, T)
        return ids, ids

    def target_share(self, *_place: int) -> None:
        return None

    def prefetch(self, *_place: int) -> None: ...


class Probe:
    """A model and its optimizer, whose state exists from the start, to make updates with micro-steps of any size."""

    def __init__(self, config: Config, corpus: Corpus, device: torch.device, dtype: torch.dtype) -> None:
        # Without clipping, which needs no memory and reads a value, which a fake tensor does not have. Of several
        # micro-steps (or lanes), the second needs the most: its activations exist beside the gradients of the first.
        settings = config.train
        several = settings.tokens_per_step or settings.gradient_accumulation_steps > 1 or (settings.lanes or 1) > 1
        train = settings.model_copy(update={"batch_size": 1, "gradient_accumulation_steps": 2 if several else 1})
        optimizer = config.optimizer.model_copy(update={"grad_clip": 0.0})
        config = config.model_copy(update={"train": train, "optimizer": optimizer})
        with device:
            model = LanguageModel(config.model, corpus.tokenizer.vocab_size)
        add_adapters(model, config.model, config.optimizer)
        apply_layer_settings(model, config.train)
        model.document_token = None if config.data.packing == "random" else 0
        self.state = TrainState(
            config=config,
            max_iters=1,
            device=device,
            dtype=dtype,
            corpus=corpus,
            sampler=ZeroBatches(corpus, config.model.block_size, 1, config.train.seed, device),
            model=model,
            loss=model.loss,
            optimizer=build_optimizer(model, config.optimizer),
            scaler=torch.amp.GradScaler(device.type, enabled=False),
        )
        self.step(1)

    def step(self, sequences: int) -> None:
        """Make one update in micro-steps of so many sequences."""
        self.state.sampler = replace(self.state.sampler, batch_size=sequences)
        forward_backward(self.state)
        grad_norms = clip_gradients(self.state)
        optimizer_step(self.state, None if self.state.device.type == "cpu" else grad_norms)  # fake norms have no value


class CudaProbe:
    """Updates of several sizes on a CUDA device, with one model."""

    def __init__(self, config: Config, corpus: Corpus, device: torch.device, dtype: torch.dtype) -> None:
        self.arguments = (config, corpus, device, dtype)
        self.probe: Probe | None = None

    def fits(self, size: int) -> bool:
        try:
            self.probe = self.probe or Probe(*self.arguments)
            self.probe.step(size)
            fits = True
        except torch.OutOfMemoryError:
            fits = False
        if self.probe is not None:
            self.probe.state.optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()  # the cache of one size must not limit the next
        return fits


@contextlib.contextmanager
def limited_cuda(device: torch.device, usable: int) -> Iterator[None]:
    """Let the process take at most `usable` bytes of a CUDA device beyond those that it holds now."""
    index = torch.cuda.current_device() if device.index is None else device.index
    before = torch.cuda.get_per_process_memory_fraction(index)
    total = torch.cuda.mem_get_info(index)[1]
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(index) + usable) / total, index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, index)


def bytes_of_training(config: Config, corpus: Corpus, dtype: torch.dtype, sequences: int) -> int:
    """The peak memory of training with micro-steps of so many sequences: a step, and the copy for a checkpoint."""
    with FakeTensorMode(), ByteCounter() as counter:
        probe = Probe(config, corpus, torch.device("cpu"), dtype)
        frozen = sum(weight.nbytes for weight in frozen_weights(probe.state.model).values())
        kept = counter.held - frozen  # copied for a checkpoint: weights and the state of the optimizer
        probe.step(sequences)
    return counter.peak + kept


class ByteCounter(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make: `held` now, and the `peak` so far."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._sizes: dict[int, int] = {}  # by the address of the storage, which several tensors may share

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address not in self._sizes:
            self._sizes[address] = storage.nbytes()
            self.held += storage.nbytes()
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self._free, address)

    def _free(self, address: int) -> None:
        self.held -= self._sizes.pop(address)
