"""Deprecated, to be removed in the next release; use `from workbench import Callback, TrainingRun`."""

import warnings

from utils.training.callbacks import Callback, TrainingRun

__all__ = ["Callback", "TrainingRun"]

MESSAGE = "utils.callbacks is deprecated: from workbench import Callback, TrainingRun"
warnings.warn(MESSAGE, DeprecationWarning, stacklevel=2)
