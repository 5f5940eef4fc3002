"""The CUDA graphs of a decoder, and decoders that are kept so that nothing is recorded again."""

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

MOST_GRAPHS = 16  # of one decoder; each keeps a few megabytes
MOST_IDLE = 4  # decoders that wait for their next text


class Graphs:
    """Functions that run as they are the first time, which prepares what they need, and as CUDA graphs from then on.

    One that CUDA cannot record goes on as it is, with one warning.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._recorded: OrderedDict[Hashable, Callable[[], object] | None] = OrderedDict()
        self._can_record = True

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        """Do the work. What has the same key is the same work."""
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
    """Where the weights are: a graph reads them there, even if the model has other ones by then."""
    return [weight.data_ptr() for weight in model.parameters()]


class Reserve(Generic[D]):
    """Decoders that wait for the next text of their kind (a batch size, say)."""

    def __init__(self) -> None:
        self._idle: OrderedDict[Hashable, tuple[object, D]] = OrderedDict()

    @contextlib.contextmanager
    def borrow(self, key: Hashable, models: Sequence[LanguageModel], make: Callable[[], D]) -> Iterator[D]:
        """A decoder that nobody else uses meanwhile; a new one if there is none, or weights of `models` moved."""
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
