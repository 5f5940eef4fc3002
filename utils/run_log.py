"""Deprecated, to be removed in the next release; use `from workbench import Metric, register_metric`."""

import warnings

from utils.runs.metrics import Metric, register_metric

__all__ = ["Metric", "register_metric"]

MESSAGE = "utils.run_log is deprecated: from workbench import Metric, register_metric"
warnings.warn(MESSAGE, DeprecationWarning, stacklevel=2)
