"""AdamW in its fused form, with as little around it as a small model needs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class EagerOptimizer(torch.optim.Optimizer):
    """An optimizer that is never part of a compiled graph.

    torch guards these methods against that, and imports its compiler to do so: 70 MB and a second of each start.
    """

    add_param_group = torch.optim.Optimizer.add_param_group.__wrapped__  # type: ignore[attr-defined]

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

    `found_inf`, if set, is 1 (a 0-dimensional tensor) where a gradient is not finite: then a step changes nothing.

    Args:
        groups: with lr, betas, eps, weight_decay, and fused = True.
    """

    _step_supports_amp_scaling = True  # torch's GradScaler sets found_inf, and need not wait for the device
    found_inf: torch.Tensor | None = None

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            adamw_update(group, self.state, self.found_inf)


def adamw_update(
    group: dict[str, Any],
    states: dict[torch.Tensor, dict[str, torch.Tensor]],
    found_inf: torch.Tensor | None = None,
) -> None:
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
    torch._fused_adamw_(
        params,
        [p.grad for p in params],
        [state["exp_avg"] for state in of_params],
        [state["exp_avg_sq"] for state in of_params],
        [],
        [step] * len(params),
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
        found_inf=found_inf,
    )
    if found_inf is not None:
        step.sub_(found_inf)
