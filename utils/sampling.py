"""Deprecated, and gone in the next release: `from workbench import SamplingOptions`."""

import warnings

from utils.inference.sampling import SamplingOptions

__all__ = ["SamplingOptions"]

MESSAGE = "utils.sampling is deprecated: from workbench import SamplingOptions"
warnings.warn(MESSAGE, DeprecationWarning, stacklevel=2)
