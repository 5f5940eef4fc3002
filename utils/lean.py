"""A module without what torch puts around it, for where a call of a module takes longer than its arithmetic."""

from __future__ import annotations

import functools
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import nn

M = TypeVar("M", bound=nn.Module)


def lean(module: M) -> M:
    """The same code over the same tensors in the mode that it is in, in plain objects: attributes are found at once.

    It has no hooks, and what is replaced in the module later (its mode, a tensor, a part of it) stays the old one here.
    """
    return cast(M, _lean(module))


def _lean(module: nn.Module) -> Any:
    if isinstance(module, nn.Dropout):
        return functools.partial(F.dropout, p=module.p) if module.training and module.p else _identity
    if isinstance(module, nn.ModuleList):
        return [_lean(child) for child in module]
    parts = vars(module)
    of: Any = type(module)
    plain = _plain_class(of)()
    children = {name: child and _lean(child) for name, child in parts["_modules"].items()}
    vars(plain).update(parts | parts["_parameters"] | parts["_buffers"] | children)
    return plain


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


@functools.cache
def _plain_class(of: Any) -> Any:
    """The methods and constants of a module's class; a call is its forward."""
    own = {name: value for name, value in vars(of).items() if not name.startswith("__")}
    return type(of.__name__, (), own | {"__call__": of.forward})
