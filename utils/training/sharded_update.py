"""Updates of sharded models: gradients, norms and Muon's orthogonal directions of rows that are spread over the ranks.

Lane i is computed by rank i modulo W, the number of ranks. So W lanes at a time are summed over the ranks, which is a
subtree of the tree of lanes (utils/training/lanes.py); each rank adds the rest of the tree for its own rows. Any number
of ranks that divides the lanes therefore adds the same numbers in the same order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from utils.optim.muon import Muon, orthogonal_blocks
from utils.training.lanes import Gradients, Tree, add_into, lane_seed, tree_sum
from utils.training.state import TrainState
from utils.training.step import EagerUpdate, Phase, micro_step

VECTOR = 16  # the most numbers that a processor computes at once


class ShardedUpdate(EagerUpdate):
    """An update of a sharded model. Random numbers are a function of seed, step, lane and micro-step."""

    def __init__(self, state: TrainState) -> None:
        super().__init__(state)
        assert state.shards is not None
        self.shards, settings = state.shards, state.config.train
        self.lanes, self._exact = settings.lanes or state.ranks.world_size, settings.lanes is not None
        self._in_lane = max(1, settings.gradient_accumulation_steps // self.lanes)
        self._parameters = list(self.shards.own.values())
        if isinstance(state.optimizer, Muon):
            state.optimizer.of_shards = self._orthogonal

    @property
    def message_bytes(self) -> int:
        """A micro-step gathers the weights of blocks twice and others once, and sums gradients in float32."""
        state, world_size = self.state, self.state.ranks.world_size
        own = {name: parameter.numel() for name, parameter in self.shards.own.items()}
        gathered = sum(count * (2 if name.startswith("blocks.") else 1) for name, count in own.items())
        micro_steps = self.lanes // world_size * self._in_lane
        return (gathered * state.dtype.itemsize + 4 * sum(own.values())) * (world_size - 1) * micro_steps

    def gradients(self, phase: Phase) -> tuple[torch.Tensor, torch.Tensor]:
        state = self.state
        losses, total = torch.zeros(self.lanes, device=state.device), None
        for part in range(self._in_lane):
            tree = Tree()
            for first in range(0, self.lanes, state.ranks.world_size):
                lane = first + state.ranks.rank
                losses[lane] += self._micro_step(lane, part, phase)
                tree.add(self.shards.take_gradients())
            total = _sum(total, tree.total())
        with phase("backward"):
            state.ranks.sum_exactly(losses)
        for parameter, gradient in zip(self._parameters, total or [], strict=True):
            parameter.grad = gradient
        with phase("optimizer"):
            return tree_sum(losses) if self._exact else losses.sum(), self.clip()

    def _micro_step(self, lane: int, part: int, phase: Phase) -> torch.Tensor:
        """Compute the gradients of a lane's micro-step, summed over the ranks; return its part of the loss, ()."""
        state, micro_steps = self.state, self.lanes * self._in_lane
        number = lane * self._in_lane + part
        torch.manual_seed(lane_seed(state.config.train.seed, state.step, number))
        return micro_step(state, number, micro_steps, state.step * micro_steps + self._following(lane, part), phase)

    def _following(self, lane: int, part: int) -> int:
        """The micro-step that this rank computes after `part` of `lane`, counted from the first one of this update."""
        world_size = self.state.ranks.world_size
        if lane + world_size < self.lanes:
            return (lane + world_size) * self._in_lane + part
        if part + 1 < self._in_lane:
            return self.state.ranks.rank * self._in_lane + part + 1
        return (self.lanes + self.state.ranks.rank) * self._in_lane

    def clip(self) -> torch.Tensor:
        """`clip_gradients` (utils/training/step.py) over the rows of all ranks.

        Each row is on one rank, and the squares of the norms of rows are added in the order of the rows, so the result
        does not depend on the number of ranks.
        """
        state = self.state
        named = [(self.shards.names[p], p.grad) for group in state.optimizer.param_groups for p in group["params"]]
        counts = [self.shards.shapes[name][0] if gradient is not None else 0 for name, gradient in named]
        rows = torch.zeros(sum(counts), device=state.device)
        for (name, gradient), place in zip(named, rows.split(counts), strict=True):
            if gradient is not None and len(gradient):
                first, end = self.shards.rows(name)
                place[first:end] = gradient.abs() if gradient.dim() == 1 else _row_norms(gradient)
        if state.ranks.several:
            state.ranks.sum_exactly(rows)
        each = torch.stack([place.norm() for place in rows.split(counts)])
        norms = torch.stack(
            [
                of_group.norm()
                for of_group in each.split([len(group["params"]) for group in state.optimizer.param_groups])
            ]
        )
        if limit := state.config.optimizer.grad_clip:
            factor = limit / (norms.norm() + 1e-6)
            gradients = [gradient for _, gradient in named if gradient is not None]
            if state.device.type != "cpu" or factor < 1:
                torch._foreach_mul_(gradients, factor.clamp(max=1.0))
        return norms

    def apply(self, grad_norms: torch.Tensor) -> None:
        optimizer: Any = self.state.optimizer
        adamw = [p for group in optimizer.param_groups if "betas" in group for p in group["params"]]
        with contextlib.ExitStack() as stack:
            for parameter in adamw:
                if parameter.device.type == "cpu" and parameter.numel() % VECTOR:
                    stack.enter_context(_padded(parameter, optimizer.state))
            super().apply(grad_norms)

    # -------------------------------------------------------------------------------------------------------- Muon

    def _orthogonal(
        self, parameters: list[torch.Tensor], blocks: list[list[int]], directions: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """See `Muon.of_shards`. Each rank gets all rows of some directions, makes them orthogonal and sends them back.

        A direction is always computed whole, so the result does not depend on the number of ranks.
        """
        if not self.state.ranks.several:
            return [orthogonal_blocks(*pair) for pair in zip(directions, blocks, strict=True)]
        found: list[torch.Tensor] = []
        world_size = self.state.ranks.world_size
        for first in range(0, len(parameters), world_size):
            names = [self.shards.names[p] for p in parameters[first : first + world_size]]  # type: ignore[index]
            found += self._turn(names, blocks[first:], directions[first : first + world_size])
        return found

    def _turn(
        self, names: Sequence[str], blocks: Sequence[list[int]], directions: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Make the directions orthogonal, rank i that of name i; return this rank's rows of all of them."""
        rank, world_size = self.state.ranks.rank, self.state.ranks.world_size
        sent = [direction.numel() for direction in directions] + [0] * (world_size - len(names))
        received = [0] * world_size
        if rank < len(names):
            shape = self.shards.shapes[names[rank]]
            spans = [self.shards.rows(names[rank], other) for other in range(world_size)]
            received = [(end - begin) * shape[1:].numel() for begin, end in spans]
        own = torch.cat([direction.reshape(-1) for direction in directions])
        whole = self.shards.exchange(own, sent, received)
        if rank < len(names):
            whole = orthogonal_blocks(whole.view(shape), blocks[rank]).reshape(-1)
        back = self.shards.exchange(whole, received, sent)
        return [part.view_as(like) for part, like in zip(back.split(sent), directions, strict=False)]


@contextlib.contextmanager
def _padded(parameter: torch.Tensor, states: dict[Any, dict[str, torch.Tensor]]) -> Iterator[None]:
    """Flatten a parameter, its gradient and moments, and pad them to a whole number of vectors; undo this on exit.

    torch's AdamW kernel rounds the numbers after the last whole vector differently, and which numbers those are depends
    on how many rows a rank has.
    """
    shape, count, values = parameter.shape, parameter.numel(), parameter.data
    gradient, state = parameter.grad, states[parameter]

    def padded(tensor: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(tensor.reshape(-1), (0, -count % VECTOR))

    def is_moment(tensor: torch.Tensor) -> bool:
        return tensor.dim() > 0

    parameter.grad = None
    parameter.data = padded(values)
    parameter.grad = None if gradient is None else padded(gradient)
    state.update({key: padded(tensor) for key, tensor in state.items() if is_moment(tensor)})
    try:
        yield
    finally:
        parameter.grad = None
        values.copy_(parameter.data[:count].view(shape))
        parameter.data = values
        state.update({key: tensor[:count].view(shape) for key, tensor in state.items() if is_moment(tensor)})


def _sum(left: Gradients | None, right: Gradients) -> Gradients:
    return right if left is None else [add_into(*pair) for pair in zip(left, right, strict=True)]


def _row_norms(gradient: torch.Tensor) -> torch.Tensor:
    """The norms (rows,) of the rows of a gradient (rows, ...)."""
    flat: Any = gradient.flatten(1)
    return torch.linalg.vector_norm(flat, dim=1)
