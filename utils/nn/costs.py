"""The floating-point operations that a model needs, counted from the shapes of its parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from utils.nn.roles import HEAD, TIED_EMBEDDING, declared_roles

IN_PLACE = ("normal_", "uniform_", "fill_", "zero_")  # what a module may initialise its parameters with


@runtime_checkable
class MixesTokens(Protocol):
    """A layer with matrix products in which no parameter takes part, such as attention."""

    def mixing_products(self, context: float) -> float:
        """Multiplications for one token, the mean over a sequence in which `context` keys precede one on average.

        So the sequence has 2 context - 1 tokens: each meets itself and all before it, 1, 2, 3, ... keys.
        """


def forward_flops(model: nn.Module, tokens: int, context: float) -> float:
    """Floating-point operations of a forward pass; a multiplication and its addition count as two.

    Only matrix products count, as in PaLM's appendix B [Chowdhery et al. 2022]: norms, activations, softmax and
    lookups are a few operations for each number. A matrix whose layer declares no role counts as one by which every
    token is multiplied.

    Args:
        tokens: positions that pass through the model, over all sequences.
        context: keys that a query meets on average where no window limits them: (T + 1) / 2 of T tokens.
    """
    matrices = sum(parameter.numel() for parameter in multiplying(model))
    mixing = sum(layer.mixing_products(context) for layer in model.modules() if isinstance(layer, MixesTokens))
    return 2.0 * tokens * (matrices + mixing)


def prefill_flops(model: nn.Module, tokens: int) -> float:
    """Floating-point operations of one pass over a prompt, of which only the last token meets the output head."""
    head = sum(weight.numel() for weight, role in declared_roles(model).items() if role in (HEAD, TIED_EMBEDDING))
    return forward_flops(model, tokens, (tokens + 1) / 2) - 2.0 * (tokens - 1) * head


def multiplying(model: nn.Module) -> list[nn.Parameter]:
    """The parameters by which every token is multiplied."""
    roles = declared_roles(model)
    return [p for p in model.parameters() if (roles[p].multiplies if p in roles else p.dim() > 1)]


def training_flops(model: nn.Module, batch_size: int, block_size: int) -> float:
    """Floating-point operations of one update's forward and backward passes.

    The backward pass costs twice the forward, or where a matrix is frozen, as much as the forward: the gradient of the
    matrix is left out. Attention counts as what it needs, the lower triangle; a kernel that computes the whole square
    does more.
    """
    tokens = batch_size * block_size
    frozen = sum(p.numel() for p in multiplying(model) if not p.requires_grad)
    return 3.0 * forward_flops(model, tokens, (block_size + 1) / 2) - 2.0 * tokens * frozen


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Modules made inside have parameters with shapes but without memory, and draw no random numbers.

    torch's meta device alone imports the compiler to initialise what has no numbers: two seconds.
    """
    with torch.device("meta"), _NoInitialisation():
        yield


class _NoInitialisation(TorchFunctionMode):
    """Skips what fills a tensor with numbers."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func.__name__ in IN_PLACE or getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
