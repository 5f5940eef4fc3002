"""The configuration: every setting, and where its value came from."""

from __future__ import annotations

import os
import warnings
from typing import Any

os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # it would look for some in every installed package

MOVED = ("Config", "DataConfig", "ModelConfig", "OptimizerConfig", "TrackingConfig", "TrainConfig")


def __getattr__(name: str) -> Any:
    """Deprecated, and gone in the next release: `from utils.config import Config`."""
    if name not in MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from utils.config import settings

    warnings.warn(f"utils.config.{name} is deprecated: from workbench import {name}", DeprecationWarning, stacklevel=2)
    return getattr(settings, name)
