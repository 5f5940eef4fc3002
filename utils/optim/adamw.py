"""AdamW as one fused kernel for each group, without the overhead of torch's optimizer class."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.optim.adamw import adamw

from utils.nn.private import private_operator

FUSED_ADAMW = private_operator("_fused_adamw_")


def _unguarded(method: Any) -> Any:
    """A method of torch's optimizers without its guard against compilation."""
    return getattr(method, "__wrapped__", method)


class EagerOptimizer(torch.optim.Optimizer):
    """An optimizer that is never part of a compiled graph.

    torch's own methods have a guard against that, which imports the compiler: 70 MB and a second at each start.

    found_inf: if set, a 0-dimensional tensor that is 1 if a gradient is not finite: then a step changes nothing.
    scheduled: the settings that a schedule changes. On CUDA a step reads them from the device, so that a recorded step
        (utils/machine/graphs.py) follows them. `publish` copies them there; a step that is not recorded calls it.
    """

    _step_supports_amp_scaling = True  # torch's GradScaler sets found_inf, and need not wait for the device
    found_inf: torch.Tensor | None = None
    scheduled: tuple[str, ...] = ("lr",)
    add_param_group = _unguarded(torch.optim.Optimizer.add_param_group)
    load_state_dict = _unguarded(torch.optim.Optimizer.load_state_dict)

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, {})
        self._published: list[dict[str, torch.Tensor]] = []  # for each group; empty for one that is not on CUDA

    def publish(self) -> None:
        """Copy the scheduled settings of all groups to the device, without waiting for it."""
        if not self._published:
            self._published = [
                {name: torch.zeros((), device=group["params"][0].device) for name in self.scheduled if name in group}
                if group["params"][0].is_cuda
                else {}
                for group in self.param_groups
            ]
        for group, published in zip(self.param_groups, self._published, strict=True):
            for name, tensor in published.items():
                tensor.fill_(group[name])

    def settings(self) -> Iterator[dict[str, Any]]:
        """Each group with its current settings, the published ones as 0-dimensional tensors."""
        if not (any(self._published) and torch.cuda.is_current_stream_capturing()):
            self.publish()
        for group, published in zip(self.param_groups, self._published, strict=True):
            yield group | published

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set all gradients to None.

        Raises:
            ValueError: with set_to_none=False, which is not supported.
        """
        if not set_to_none:
            raise ValueError("gradients are set to None, never filled with zeros")
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


class AdamW(EagerOptimizer):
    """AdamW [Loshchilov and Hutter 2019], one fused kernel a group. Its state is that of torch.optim.AdamW.

    Args:
        groups: parameter groups with lr, betas, eps, weight_decay, and fused = True.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.settings():
            adamw_update(group, self.state, self.found_inf)


def adamw_update(
    group: dict[str, Any],
    states: dict[torch.Tensor, dict[str, torch.Tensor]],
    found_inf: torch.Tensor | None = None,
) -> None:
    """Update the parameters of a group that have a gradient; each counts its own updates, as in torch."""
    params = [p for p in group["params"] if p.grad is not None]
    if not params:
        return
    param_states = [states[p] for p in params]
    for p, state in zip(params, param_states, strict=True):
        if not state:
            state["step"] = torch.zeros((), device=p.device)
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
    steps = [state["step"] for state in param_states]
    torch._foreach_add_(steps, 1)
    beta1, beta2 = group["betas"]
    decay = group["weight_decay"]
    if isinstance(decay, torch.Tensor):  # the kernel takes a number only
        torch._foreach_mul_(params, decay_factor(group, None if found_inf is None else found_inf == 0))
        decay = 0.0
    (FUSED_ADAMW or _public_adamw)(
        params,
        [p.grad for p in params],
        [state["exp_avg"] for state in param_states],
        [state["exp_avg_sq"] for state in param_states],
        [],
        steps,
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=decay,
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
        found_inf=found_inf,
    )
    if found_inf is not None:
        torch._foreach_sub_(steps, [found_inf] * len(steps))


def decay_factor(group: dict[str, Any], finite: torch.Tensor | None) -> Any:
    """The factor (a number or a tensor) by which weight decay multiplies the parameters of a group; 1 if not `finite`.

    Args:
        finite: (), whether all gradients are finite; None: they are.
    """
    factor = 1 - group["lr"] * group["weight_decay"]
    return factor if finite is None else torch.where(finite, factor, 1.0)


def _public_adamw(
    params: list[torch.Tensor],
    gradients: list[torch.Tensor],
    exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor],
    max_exp_avg_sqs: list[torch.Tensor],
    steps: list[torch.Tensor],
    *,
    found_inf: torch.Tensor | None,
    **settings: Any,
) -> None:
    """The update of FUSED_ADAMW by torch's documented function; with `found_inf` it waits for the device."""
    if found_inf is None or not found_inf:
        before = [step - 1 for step in steps]  # the function counts this update itself
        adamw(params, gradients, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, before, **settings)
