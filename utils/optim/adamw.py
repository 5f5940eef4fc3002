"""AdamW in its fused form, with as little around it as a small model needs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.optim.adamw import adamw

from utils.nn.private import private_operator

FUSED_ADAMW = private_operator("_fused_adamw_")
_ADD_PARAM_GROUP = torch.optim.Optimizer.add_param_group
_ADD_PARAM_GROUP = getattr(_ADD_PARAM_GROUP, "__wrapped__", _ADD_PARAM_GROUP)  # without the guard against compilation


class EagerOptimizer(torch.optim.Optimizer):
    """An optimizer that is never part of a compiled graph.

    torch guards these methods against that, and imports its compiler to do so: 70 MB and a second of each start.
    """

    add_param_group = _ADD_PARAM_GROUP

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Let go of all gradients.

        Raises:
            ValueError: they are to be filled with zeros instead.
        """
        if not set_to_none:
            raise ValueError("gradients are let go, never filled with zeros")
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


class AdamW(EagerOptimizer):
    """AdamW [Loshchilov and Hutter 2019], one fused kernel a group. The state is that of torch.optim.AdamW.

    Args:
        groups: with lr, betas, eps, weight_decay, and fused = True.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            adamw_update(group, self.state)


def adamw_update(group: dict[str, Any], states: dict[torch.Tensor, dict[str, torch.Tensor]]) -> None:
    """One update of the parameters of a group that have a gradient: the same ones every time.

    So they share one count of updates; what is new gets a state.
    """
    params = [p for p in group["params"] if p.grad is not None]
    if not params:
        return
    of_params = [states[p] for p in params]
    step = next((state["step"] for state in of_params if state), None)
    step = torch.ones((), device=params[0].device) if step is None else step.add_(1)
    for p, state in zip(params, of_params, strict=True):
        if not state:
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
        state["step"] = step
    beta1, beta2 = group["betas"]
    update = FUSED_ADAMW or adamw
    steps = [step] * len(params) if FUSED_ADAMW else [step - 1 for _ in params]  # torch's function counts on by itself
    update(
        params,
        [p.grad for p in params],
        [state["exp_avg"] for state in of_params],
        [state["exp_avg_sq"] for state in of_params],
        [],
        steps,
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
    )
