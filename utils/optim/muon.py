"""Muon: matrices are updated by their orthogonalized momentum."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from utils.machine.device import has_bf16_units
from utils.optim.adamw import EagerOptimizer, adamw_update, decay_factor

# Coefficients of the quintic iteration, chosen for a steep slope at zero [Jordan et al. 2024, Muon].
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5

Pair = tuple[torch.Tensor, torch.Tensor]


def newton_schulz(matrices: torch.Tensor) -> torch.Tensor:
    """Move the singular values of each matrix towards 1; they end between about 0.7 and 1.2 [Jordan et al. 2024].

    Args:
        matrices: (N, rows, columns) with rows <= columns, in the precision to compute in; bfloat16 is enough.

    Returns:
        (N, rows, columns), float32.
    """
    a, b, c = COEFFICIENTS
    x = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)  # no singular value is above 1
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT  # (N, rows, rows)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.float()


class Muon(EagerOptimizer):
    """Muon [Jordan et al. 2024] for the groups that have a momentum, AdamW for the others.

    An update is the Nesterov momentum, made orthogonal, times 0.2 sqrt(max(rows, columns)). This is about the size of
    AdamW's updates, so one learning rate suits both [Liu et al. 2025, Muon is Scalable for LLM Training].

    Args:
        groups: parameter groups with lr and weight_decay. Those for Muon also have momentum, and blocks: for each
            parameter, the numbers of rows of the matrices that are stacked in it (q, k and v, say), each of which is
            made orthogonal separately. Those for AdamW have the settings of AdamW (utils/optim/adamw.py).

    orthogonalize: the function that makes matrices (N, rows, columns) orthogonal; with lanes, the ranks share its work.
    of_shards: if the parameters are shards, rows of larger ones (utils/training/sharded_update.py), the function that
        makes their directions orthogonal: (parameters, blocks, directions) -> updates, scaled by `update_scale`.
    """

    orthogonalize: Callable[[torch.Tensor], torch.Tensor] = staticmethod(newton_schulz)
    of_shards: Callable[[list[torch.Tensor], list[list[int]], list[torch.Tensor]], list[torch.Tensor]] | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.settings():
            if "momentum" in group:
                self._muon(group)
            else:
                adamw_update(group, self.state, self.found_inf)

    def _muon(self, group: dict[str, Any]) -> None:
        trained = [(p, rows) for p, rows in zip(group["params"], group["blocks"], strict=True) if p.grad is not None]
        if not trained:
            return
        params, gradients = [p for p, _ in trained], [p.grad for p, _ in trained]
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        finite = None if self.found_inf is None else self.found_inf == 0  # (), on the device
        if finite is not None:  # a buffer that is its own gradient does not change
            gradients = [torch.where(finite, g, buffer) for g, buffer in zip(gradients, buffers, strict=True)]
        directions = _nesterov(buffers, gradients, group["momentum"])
        decay = group["weight_decay"]
        if isinstance(decay, torch.Tensor) or decay:
            torch._foreach_mul_(params, decay_factor(group, finite))
        if self.of_shards is not None:
            rate = -group["lr"] if finite is None else -group["lr"] * finite
            for p, update in zip(
                params, self.of_shards(params, [rows for _, rows in trained], directions), strict=True
            ):
                p += update * rate
            return
        blocks: list[Pair] = []
        for (p, rows), direction in zip(trained, directions, strict=True):
            assert p.is_contiguous(), "Muon updates a parameter in place as a matrix of its first dimension"
            matrix, direction = p.view(len(p), -1), direction.reshape(len(p), -1)  # (rows, all other dimensions)
            blocks += zip(matrix.split(rows), direction.split(rows), strict=True)
        for shape, pairs in wide_by_shape(blocks).items():
            updates = self.orthogonalize(stacked([block for _, block in pairs]))
            if finite is not None:
                updates *= finite
            rate = -group["lr"] * update_scale(shape)
            if isinstance(rate, torch.Tensor):
                updates, rate = updates * rate, 1.0
            torch._foreach_add_([w for w, _ in pairs], updates.unbind(), alpha=rate)


def orthogonal_blocks(matrix: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Make each of the matrices that are stacked in `matrix` orthogonal.

    Args:
        matrix: (sum of rows, ...), the direction of a whole parameter.
        rows: the number of rows of each stacked matrix.

    Returns:
        A tensor of the same shape, each of its matrices scaled by `update_scale`.
    """
    flat = matrix.reshape(len(matrix), -1)  # (rows, all other dimensions)
    result = torch.empty_like(flat)
    blocks = zip(flat.split(list(rows)), result.split(list(rows)), strict=True)
    for shape, pairs in wide_by_shape(blocks).items():
        done = newton_schulz(stacked([block for block, _ in pairs])) * update_scale(shape)
        for (_, target), update in zip(pairs, done.unbind(), strict=True):
            target.copy_(update)
    return result.view_as(matrix)


def wide_by_shape(pairs: Iterable[Pair]) -> dict[tuple[int, ...], list[Pair]]:
    """Group pairs of equally shaped matrices by shape; those with more rows than columns are transposed first."""
    found: dict[tuple[int, ...], list[Pair]] = defaultdict(list)
    for a, b in pairs:
        if a.size(0) > a.size(1):
            a, b = a.mT, b.mT
        found[tuple(a.shape)].append((a, b))
    return found


def _nesterov(
    buffers: list[torch.Tensor], gradients: list[torch.Tensor], momentum: float | torch.Tensor
) -> list[torch.Tensor]:
    """Move the buffers towards the gradients; returns the gradients, moved towards the buffers."""
    if not isinstance(momentum, torch.Tensor):
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        return list(torch._foreach_lerp(gradients, buffers, momentum))
    fresh = torch._foreach_mul(gradients, 1 - momentum)  # a lerp by a tensor would launch a kernel for each buffer
    torch._foreach_mul_(buffers, momentum)
    torch._foreach_add_(buffers, fresh)
    directions = torch._foreach_mul(buffers, momentum)
    torch._foreach_add_(directions, fresh)
    return list(directions)


def stacked(matrices: list[torch.Tensor]) -> torch.Tensor:
    """The matrices as one tensor (N, rows, columns), in bfloat16 if the device has units for it.

    Emulated bfloat16 is 3 times slower than float32.
    """
    stacked = torch.stack(matrices)
    return stacked.bfloat16() if has_bf16_units(stacked.device) else stacked


def update_scale(shape: Sequence[int]) -> float:
    """The factor that gives an orthogonal matrix the root mean square of an update of AdamW, about 0.2."""
    return 0.2 * math.sqrt(max(shape))
