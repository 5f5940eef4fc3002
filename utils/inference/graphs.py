"""The CUDA graphs of a decoder, and a pool of decoders whose graphs need not be recorded again."""

from __future__ import annotations

import contextlib
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Generic, TypeVar

import torch

from model import LanguageModel
from utils.machine.graphs import capture_graph

D = TypeVar("D")

MOST_GRAPHS = 16  # of one decoder; each takes a few megabytes
MOST_IDLE = 4  # idle decoders that a pool keeps


class Graphs:
    """Runs functions: normally the first time, which sets up what they need, and as CUDA graphs from then on.

    A function that CUDA cannot record keeps running normally, with one warning. On a CPU, every function does.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._recorded: OrderedDict[Hashable, Callable[[], object] | None] = OrderedDict()
        self._can_record = True

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        """Run `work`, which must be the same work whenever `key` is the same."""
        if key not in self._recorded:
            self._recorded[key] = None
            while len(self._recorded) > MOST_GRAPHS:
                self._recorded.popitem(last=False)
            work()
            return
        self._recorded.move_to_end(key)
        repeat = self._recorded[key]
        if repeat is None:
            repeat = self._recorded[key] = self._record(work)
        repeat()

    def _record(self, work: Callable[[], None]) -> Callable[[], object]:
        if self._can_record:
            try:
                return capture_graph(work, self._device)
            except RuntimeError as error:
                self._can_record = False
                warnings.warn(f"no CUDA graph, so the host launches each kernel: {error}", RuntimeWarning, stacklevel=2)
        return work


def addresses(model: LanguageModel) -> list[int]:
    """The addresses of the weights: a graph reads these, even if the model has other weights by then."""
    return [weight.data_ptr() for weight in model.parameters()]


class DecoderPool(Generic[D]):
    """Idle decoders, by what they can decode (a batch size, say)."""

    def __init__(self) -> None:
        self._idle: OrderedDict[Hashable, tuple[object, D]] = OrderedDict()

    @contextlib.contextmanager
    def borrow(self, key: Hashable, models: Sequence[LanguageModel], make: Callable[[], D]) -> Iterator[D]:
        """Yield a decoder for exclusive use: an idle one, or a new one if none fits or the weights have moved."""
        memory = [(model, *addresses(model)) for model in models]
        found, decoder = self._idle.pop(key, (None, None))
        if decoder is None or found != memory:
            decoder = make()
        try:
            yield decoder
        finally:
            self._idle[key] = memory, decoder
            while len(self._idle) > MOST_IDLE:
                self._idle.popitem(last=False)
