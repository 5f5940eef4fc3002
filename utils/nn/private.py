"""Operators that torch does not document, looked up once, at import; None if the installed torch does not have them.

Code that uses one falls back to public operators if it is None.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch


def private_operator(path: str) -> Callable[..., Any] | None:
    """`torch.<path>`, or None if this release or build of torch has no such operator."""
    try:
        found = operator.attrgetter(path)(torch)
    except (AttributeError, RuntimeError):
        return None
    return found if callable(found) else None
