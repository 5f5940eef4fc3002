"""A module without what torch puts around it, for where a call of a module takes longer than its arithmetic."""

from __future__ import annotations

import functools
from typing import Any, TypeVar, cast

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def lean(module: M) -> M:
    """The same code over the same tensors in eval mode, in plain objects: no hooks, attributes found at once.

    A tensor that is replaced in the module later, not changed in place, stays the old one here.
    """
    return cast(M, _lean(module))


def _lean(module: nn.Module) -> Any:
    if isinstance(module, nn.Dropout):
        return _identity
    if isinstance(module, nn.ModuleList):
        return [_lean(child) for child in module]
    parts = vars(module)
    of: Any = type(module)
    plain = _plain_class(of)()
    children = {name: child and _lean(child) for name, child in parts["_modules"].items()}
    vars(plain).update(parts | parts["_parameters"] | parts["_buffers"] | children | {"training": False})
    return plain


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


@functools.cache
def _plain_class(of: Any) -> Any:
    """The methods and constants of a module's class; a call is its forward."""
    own = {name: value for name, value in vars(of).items() if not name.startswith("__")}
    return type(of.__name__, (), own | {"__call__": of.forward})
