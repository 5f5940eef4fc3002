"""Losses of a model: the estimate during training, and the exact loss of a whole split."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager

import torch

from data import BatchSampler
from model import LanguageModel
from utils.inference.graphs import Graphs, addresses
from utils.machine.ranks import ONE, Ranks
from utils.nn.targets import IGNORED

Precision = Callable[[], AbstractContextManager[None]]  # autocast, or nothing


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Turns dropout and gradients off; restores the previous mode on exit."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


class BatchLoss:
    """The loss of a batch, () in nats per token, on the device; on CUDA a graph that is kept (utils/machine/graphs.py).

    Args:
        model: called in eval mode, without gradients.
        precision: of its products.
        graph: whether to record it.
        together: whether ranks must call it equally often, since each has a part of the weights only.
    """

    def __init__(
        self, model: LanguageModel, precision: Precision, *, graph: bool = False, together: bool = False
    ) -> None:
        self.model, self.graph, self.together, self._precision = model, graph, together, precision
        self._device = next(model.parameters()).device
        self._graphs = Graphs(self._device) if graph and self._device.type == "cuda" else None
        self._memory: list[int] = []  # of the weights that the graphs read
        self._batches: dict[torch.Size, torch.Tensor] = {}  # (2, B, T), inputs and targets, where a graph reads them
        self._result = torch.zeros((), device=self._device)

    def renew(self) -> None:
        """Forget the graphs if the weights are elsewhere by now, as a callback leaves them that averages weights."""
        if self._graphs is not None and self._memory != (memory := addresses(self.model)):
            self._graphs, self._memory = Graphs(self._device), memory

    def __call__(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if self._graphs is None:
            return self._loss(inputs, targets)
        if inputs.shape not in self._batches:
            self._batches[inputs.shape] = torch.stack((inputs, targets))
        batch = self._batches[inputs.shape]
        batch[0].copy_(inputs)
        batch[1].copy_(targets)
        self._graphs.run(inputs.shape, lambda: self._work(batch))
        return self._result.clone()

    def _work(self, batch: torch.Tensor) -> None:
        self._result.copy_(self._loss(batch[0], batch[1]))

    def _loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with self._precision():  # in here: autocast keeps its copies of the weights no longer than a batch
            return self.model.loss(inputs, targets)


class EvaluationStoppedError(Exception):
    """An evaluation ended before its last batch, because it was asked to."""


def mean_loss(
    loss: BatchLoss,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    parts: int,
    ranks: Ranks,
) -> float:
    """Mean loss over the targets of batches, in nats; NaN without one. The device is waited for at the end only.

    Args:
        batches: those of this rank.
        parts: the number of batches that all ranks have together.
    """
    losses, counts = [], []
    loss.renew()
    with evaluating(loss.model):
        for inputs, targets in batches:
            losses.append(loss(inputs, targets))
            counts.append((targets != IGNORED).sum())
        if loss.together and len(losses) < -(-parts // ranks.world_size):
            nothing = torch.zeros((1, 1), dtype=torch.int64, device=next(loss.model.parameters()).device)
            loss(nothing, nothing)  # this rank has one batch fewer; the last one of the others needs its weights
    if ranks.several:
        device = next(loss.model.parameters()).device
        own = torch.stack(losses) if losses else torch.zeros(0, device=device)
        own_counts = torch.stack(counts) if counts else torch.zeros(0, dtype=torch.int64, device=device)
        losses, counts = [list(ranks.interleave(of_rank, parts)) for of_rank in (own, own_counts)]
    numbers = [int(count) for count in torch.stack(counts).tolist()]
    of_batches = torch.stack([each for each, number in zip(losses, numbers, strict=True) if number] or losses)
    if len(set(numbers)) == 1:
        return of_batches.mean().item()
    divisor = math.gcd(*numbers)  # small numbers are exact in float32
    sizes = [number // divisor for number in numbers if number]
    shares = torch.tensor(sizes, dtype=of_batches.dtype, device=of_batches.device) / sum(sizes)
    return (of_batches * shares).sum().item()


def estimate_loss(
    loss: BatchLoss,
    sampler: BatchSampler,
    eval_iters: int,
    micro_steps: int,
    watch: Callable[[int, int], bool] = lambda done, total: True,
    ranks: Ranks = ONE,
) -> dict[str, float]:
    """`train/eval_loss` and `val/loss` on the fixed evaluation batches, in nats per token.

    Ranks take turns with the parts, and add the losses of all in the order of one rank: all get the same bits.

    Args:
        eval_iters: batches of each split, which is read at most once.
        micro_steps: parts that each batch is split into, so that it needs no more memory than training does.
        watch: called with the number of sequences done and their total before each part, or on several ranks before
            each round of one part a rank; the evaluation ends when it returns False, which it must do on all ranks.

    Raises:
        EvaluationStoppedError: `watch` returned False.
    """
    streams = {"train/eval_loss": "train_eval", "val/loss": "val"}
    done, total = 0, sum(sampler.evaluation_windows(stream, eval_iters) for stream in streams.values())

    def watched(stream: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        nonlocal done
        before, size = done, sampler.batch_size // micro_steps * ranks.world_size
        batches = own_parts(stream)
        for first in range(0, end := sampler.evaluation_windows(stream, eval_iters), size):
            if not watch(done, total):
                raise EvaluationStoppedError
            if (batch := next(batches, None)) is not None:
                yield batch
            done = before + min(first + size, end)

    def own_parts(stream: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return sampler.evaluation_batches(stream, eval_iters, micro_steps, rank=ranks.rank, world_size=ranks.world_size)

    parts = {name: sampler.evaluation_parts(stream, eval_iters, micro_steps) for name, stream in streams.items()}
    return {name: mean_loss(loss, watched(stream), parts[name], ranks) for name, stream in streams.items()}


def loss_without_leaks(
    loss: BatchLoss, sampler: BatchSampler, eval_iters: int, micro_steps: int, ranks: Ranks = ONE
) -> float | None:
    """`val/loss` of `estimate_loss` without the documents that nearly equal one of the training split.

    None if the dataset knows of no such documents, or the batches have no others.
    """
    prepared = sampler.corpus.prepared
    if prepared is None or not len(prepared.leaks):
        return None
    batches = sampler.evaluation_batches(
        "val", eval_iters, micro_steps, leaks=False, rank=ranks.rank, world_size=ranks.world_size
    )
    found = mean_loss(loss, batches, sampler.evaluation_parts("val", eval_iters, micro_steps), ranks)
    return None if math.isnan(found) else found
