"""A module without what torch puts around it, for where a call of a module takes longer than its arithmetic."""

from __future__ import annotations

import functools
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import nn

M = TypeVar("M", bound=nn.Module)

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def lean(module: M) -> M:
    """The same code over the same tensors in the mode that it is in, in plain objects: attributes are found at once.

    What is replaced in the module later (its mode, a hook, a tensor, a part of it) stays the old one here. With hooks
    in it the module itself.
    """
    if any(vars(part)[kind] for part in module.modules() for kind in HOOKS):
        return module
    return cast(M, _lean(module, {}))


def _lean(module: nn.Module, classes: dict[type, type]) -> Any:
    """classes: the plain class of each class of module that was met before."""
    if isinstance(module, nn.Dropout):
        return functools.partial(F.dropout, p=module.p) if module.training and module.p else _identity
    if isinstance(module, nn.ModuleList):
        return [_lean(child, classes) for child in module]
    parts = vars(module)
    of = type(module)
    if of not in classes:
        classes[of] = _plain_class(of)
    plain = classes[of]()
    children = {name: child and _lean(child, classes) for name, child in parts["_modules"].items()}
    vars(plain).update(parts | parts["_parameters"] | parts["_buffers"] | children)
    return plain


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


def _plain_class(of: type[nn.Module]) -> type:
    """The methods and constants of a module's class; a call is its forward."""
    own = {name: value for name, value in vars(of).items() if not name.startswith("__")}
    return type(of.__name__, (), own | {"__call__": of.forward})
