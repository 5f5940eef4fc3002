"""The losses of a model on the fixed evaluation batches of training."""

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

Precision = Callable[[], AbstractContextManager[None]]  # makes an autocast context, or one that does nothing


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Turn dropout and gradients off; restore the previous mode on exit."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


class BatchLoss:
    """Computes the loss of a batch, () in nats per token, on the device.

    Args:
        model: called in eval mode, without gradients.
        precision: makes the context that the loss is computed in.
        graph: whether to record the loss as a CUDA graph (utils/machine/graphs.py); ignored on other devices.
        together: whether all ranks must call it equally often, because each holds only a shard of the weights.
    """

    def __init__(
        self, model: LanguageModel, precision: Precision, *, graph: bool = False, together: bool = False
    ) -> None:
        self.model, self.graph, self.together, self._precision = model, graph, together, precision
        self._device = next(model.parameters()).device
        self._graphs = Graphs(self._device) if graph and self._device.type == "cuda" else None
        self._memory: list[int] = []  # addresses of the weights that the graphs read
        self._batches: dict[torch.Size, torch.Tensor] = {}  # (2, B, T): inputs and targets, as read by a graph
        self._result = torch.zeros((), device=self._device)

    def renew(self) -> None:
        """Drop the graphs if the weights have moved in memory, as a callback that averages weights may cause."""
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
        with self._precision():  # entered for each batch, so that autocast drops its copies of the weights after it
            return self.model.loss(inputs, targets)


class EvaluationStoppedError(Exception):
    """An evaluation ended before its last batch because `watch` returned False."""


def mean_loss(
    loss: BatchLoss,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    parts: int,
    ranks: Ranks,
) -> float:
    """The mean loss over all targets, in nats; NaN if there are none. Waits for the device only at the end.

    Args:
        batches: the (inputs, targets) of this rank.
        parts: the number of batches of all ranks together.
    """
    losses, counts = [], []
    device = next(loss.model.parameters()).device
    loss.renew()
    with evaluating(loss.model):
        for inputs, targets in batches:
            losses.append(loss(inputs, targets))
            counts.append((targets != IGNORED).sum())
        if loss.together and len(losses) < -(-parts // ranks.world_size):
            nothing = torch.zeros((1, 1), dtype=torch.int64, device=device)
            loss(nothing, nothing)  # this rank has one batch fewer, but the others need its weights for their last one
    if ranks.several:
        own = torch.stack(losses) if losses else torch.zeros(0, device=device)
        own_counts = torch.stack(counts) if counts else torch.zeros(0, dtype=torch.int64, device=device)
        losses, counts = [list(ranks.interleave(of_rank, parts)) for of_rank in (own, own_counts)]
    numbers = [int(count) for count in torch.stack(counts).tolist()]
    of_batches = torch.stack([each for each, number in zip(losses, numbers, strict=True) if number] or losses)
    if len(set(numbers)) == 1:
        return of_batches.mean().item()
    divisor = math.gcd(*numbers)  # keeps the sizes small, and so exact in float32
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

    Ranks evaluate the parts in turn; the losses are then added in the order in which one rank would add them, so that
    every number of ranks gives the same bits.

    Args:
        eval_iters: number of batches of each split; no split is read more than once.
        micro_steps: number of parts that each batch is cut into, so that it needs no more memory than training does.
        watch: called with the number of sequences done and their total before each round, in which every rank
            evaluates one part. The evaluation ends when it returns False, which it must do on all ranks alike.

    Raises:
        EvaluationStoppedError: `watch` returned False.
    """
    streams = {"train/eval_loss": "train_eval", "val/loss": "val"}
    done, total = 0, sum(sampler.evaluation_windows(stream, eval_iters) for stream in streams.values())

    def watched(stream: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        nonlocal done
        before, size = done, sampler.batch_size // micro_steps * ranks.world_size
        batches = sampler.evaluation_batches(
            stream, eval_iters, micro_steps, rank=ranks.rank, world_size=ranks.world_size
        )
        for first in range(0, end := sampler.evaluation_windows(stream, eval_iters), size):
            if not watch(done, total):
                raise EvaluationStoppedError
            if (batch := next(batches, None)) is not None:
                yield batch
            done = before + min(first + size, end)

    parts = {name: sampler.evaluation_parts(stream, eval_iters, micro_steps) for name, stream in streams.items()}
    return {name: mean_loss(loss, watched(stream), parts[name], ranks) for name, stream in streams.items()}


def loss_without_leaks(
    loss: BatchLoss, sampler: BatchSampler, eval_iters: int, micro_steps: int, ranks: Ranks = ONE
) -> float | None:
    """`val/loss` of `estimate_loss` without the documents that are near-duplicates of training documents.

    None if the dataset records no such documents, or if the batches have no others.
    """
    prepared = sampler.corpus.prepared
    if prepared is None or not len(prepared.leaks):
        return None
    batches = sampler.evaluation_batches(
        "val", eval_iters, micro_steps, leaks=False, rank=ranks.rank, world_size=ranks.world_size
    )
    found = mean_loss(loss, batches, sampler.evaluation_parts("val", eval_iters, micro_steps), ranks)
    return None if math.isnan(found) else found
