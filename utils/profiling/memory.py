"""Measuring the memory of training by category: weights, gradients, optimizer state, activations."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch.autograd.graph import saved_tensors_hooks

from utils.training.state import TrainState


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages of `tensors`; a storage that several tensors share counts once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def state_bytes(state: TrainState) -> dict[str, int]:
    """Bytes of weights (with buffers), of gradients as after a backward pass, and of the optimizer's state."""
    parameters = list(state.model.parameters())
    in_optimizer = (t for entry in state.optimizer.state.values() for t in entry.values() if torch.is_tensor(t))
    return {
        "weights": bytes_of([*parameters, *state.model.buffers()]),
        "gradients": sum(p.numel() * p.element_size() for p in parameters if p.requires_grad),
        "optimizer": bytes_of(in_optimizer),
    }


class ActivationMeter:
    """A phase function that counts the bytes that autograd keeps of a forward pass for the backward pass.

    bytes: the bytes of the largest micro-step, not counting weights and buffers.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.bytes = 0
        self._weights = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        if name != "forward":
            yield
            return
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            with contextlib.suppress(NotImplementedError):  # a sparse tensor has no storage of its own
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self._weights:
                    kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            yield
        self.bytes = max(self.bytes, sum(kept.values()))


def activation_phase(state: TrainState) -> ActivationMeter | None:
    """An ActivationMeter, or None for a sharded model, or a compiled one, which would have to be compiled again."""
    return None if state.compiled or state.shards is not None else ActivationMeter(state.model)


def reset_peak(device: torch.device) -> bool:
    """Reset the peak of the memory in use. Returns False if the peak is not available (only CUDA and Linux have it)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    with contextlib.suppress(OSError):
        if device.type == "cpu":
            Path("/proc/self/clear_refs").write_text("5")
            return True
    return False


def peak(device: torch.device) -> int:
    """The most bytes in use since `reset_peak`: by tensors on a GPU, otherwise by the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
