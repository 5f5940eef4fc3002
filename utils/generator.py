"""Deprecated, to be removed in the next release; use `from workbench import Generator, Request`."""

import warnings

from utils.inference.generator import Generator, Request

__all__ = ["Generator", "Request"]

MESSAGE = "utils.generator is deprecated: from workbench import Generator, Request"
warnings.warn(MESSAGE, DeprecationWarning, stacklevel=2)
