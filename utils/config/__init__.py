"""The configuration: every setting, and where its value comes from."""

from __future__ import annotations

import os
import warnings
from typing import Any

# Otherwise pydantic would search every installed package for plugins.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

MOVED = ("Config", "DataConfig", "ModelConfig", "OptimizerConfig", "TrackingConfig", "TrainConfig")


def __getattr__(name: str) -> Any:
    """Support `from utils.config import Config`, which is deprecated and will be removed in the next release."""
    if name not in MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from utils.config import settings

    warnings.warn(f"utils.config.{name} is deprecated: from workbench import {name}", DeprecationWarning, stacklevel=2)
    return getattr(settings, name)
