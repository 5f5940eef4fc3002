"""Plain objects in place of modules for decoding, where calling a module takes longer than its arithmetic."""

from __future__ import annotations

import functools
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import nn

M = TypeVar("M", bound=nn.Module)

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_MAY_BE_PLAIN: set[type[nn.Module]] = {nn.Embedding, nn.LayerNorm, nn.RMSNorm}


def may_be_plain(module_class: type[M]) -> type[M]:
    """A class decorator that lets `lean` replace modules of exactly this class (not of subclasses).

    The class must use nn.Module for attributes and calls only: its methods do not use `super()`, and change tensors
    only in place.
    """
    _MAY_BE_PLAIN.add(module_class)
    return module_class


def lean(model: M) -> M:
    """Plain objects that compute what `model` computes, with its tensors and in its current mode.

    They have no hooks, and access to their attributes is fast. They see later in-place changes of tensors, but no other
    changes of the model. A submodule of an unknown class, with a hook, or with a `forward` of its own stays a module,
    and so does everything in it.
    """
    return cast(M, _lean(model, {}))


def is_patched(module: nn.Module) -> bool:
    """Whether calling the module runs anything but the `forward` of its class: a hook, or a `forward` of its own."""
    parts = vars(module)
    return "forward" in parts or any(parts[kind] for kind in HOOKS)


def _lean(module: nn.Module, classes: dict[type, type]) -> Any:
    """The plain object for `module`, or the module itself; `classes` caches the plain class of each module class."""
    parts = vars(module)
    if is_patched(module):
        return module
    if type(module) is nn.Dropout:
        return functools.partial(F.dropout, p=module.p) if module.training and module.p else _identity
    if type(module) is nn.ModuleList:
        return [_lean(child, classes) for child in module]
    if type(module) not in _MAY_BE_PLAIN:
        return module
    if type(module) not in classes:
        classes[type(module)] = _plain_class(type(module))
    plain = classes[type(module)]()
    children = {name: child and _lean(child, classes) for name, child in parts["_modules"].items()}
    vars(plain).update(parts | parts["_parameters"] | parts["_buffers"] | children)
    return plain


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


def _plain_class(module_class: type[nn.Module]) -> type:
    """A class with the methods and constants of `module_class`; calling its objects calls their `forward`."""
    own = {name: value for name, value in vars(module_class).items() if not name.startswith("__")}
    return type(module_class.__name__, (), own | {"__call__": module_class.forward})
