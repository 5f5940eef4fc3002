"""Deprecated, to be removed in the next release; use `from workbench import SamplingOptions`."""

import warnings

from utils.inference.sampling import SamplingOptions

__all__ = ["SamplingOptions"]

MESSAGE = "utils.sampling is deprecated: from workbench import SamplingOptions"
warnings.warn(MESSAGE, DeprecationWarning, stacklevel=2)
