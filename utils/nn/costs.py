"""The floating-point operations that a model needs, counted from the shapes of its parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from utils.nn.roles import HEAD, TIED_EMBEDDING, declared_roles

IN_PLACE = ("normal_", "uniform_", "fill_", "zero_")  # tensor methods that modules initialise parameters with


@runtime_checkable
class MixesTokens(Protocol):
    """A layer with matrix products that involve no parameter, such as attention."""

    def mixing_products(self, context: float) -> float:
        """Multiplications per token, averaged over a sequence whose tokens attend to `context` keys on average.

        Such a sequence has 2 context - 1 tokens, which attend to 1, 2, 3, ... keys: themselves and all before them.
        """


def forward_flops(model: nn.Module, tokens: int, context: float) -> float:
    """Floating-point operations of a forward pass; a multiplication and its addition count as two.

    Only matrix products count, as in PaLM's appendix B [Chowdhery et al. 2022]: norms, activations, softmax and
    lookups need only a few operations per element. A matrix without a declared role counts as if every token were
    multiplied by it.

    Args:
        tokens: the number of tokens that pass through the model, over all sequences.
        context: the mean number of keys that a query attends to if no window limits it: (T + 1) / 2 for T tokens.
    """
    matrices = sum(parameter.numel() for parameter in multiplying(model))
    mixing = sum(layer.mixing_products(context) for layer in model.modules() if isinstance(layer, MixesTokens))
    return 2.0 * tokens * (matrices + mixing)


def prefill_flops(model: nn.Module, tokens: int) -> float:
    """Floating-point operations of one pass over a prompt, whose last token alone goes through the output head."""
    head = sum(weight.numel() for weight, role in declared_roles(model).items() if role in (HEAD, TIED_EMBEDDING))
    return forward_flops(model, tokens, (tokens + 1) / 2) - 2.0 * (tokens - 1) * head


def multiplying(model: nn.Module) -> list[nn.Parameter]:
    """The parameters by which every token is multiplied."""
    roles = declared_roles(model)
    return [p for p in model.parameters() if (roles[p].multiplies if p in roles else p.dim() > 1)]


def training_flops(model: nn.Module, batch_size: int, block_size: int) -> float:
    """Floating-point operations of one update's forward and backward passes.

    The backward pass costs twice as much as the forward pass, except for a frozen matrix, whose gradient is not
    computed: there it costs as much as the forward pass. Attention counts as the lower triangle that it needs, even if
    a kernel computes the whole square.
    """
    tokens = batch_size * block_size
    frozen = sum(p.numel() for p in multiplying(model) if not p.requires_grad)
    return 3.0 * forward_flops(model, tokens, (block_size + 1) / 2) - 2.0 * tokens * frozen


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """A context in which new modules have parameters with shapes but without memory, and draw no random numbers.

    With torch's meta device alone, initialising a parameter would import the compiler, which takes two seconds.
    """
    with torch.device("meta"), _NoInitialisation():
        yield


class _NoInitialisation(TorchFunctionMode):
    """Skips the functions that initialise a tensor."""

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
