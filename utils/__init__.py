"""The code behind the scripts: one idea per file, in the layers that docs/architecture.md describes.

Each script imports from here first, so this is where a missing package or a Python that is too old is reported.
"""

from __future__ import annotations

import importlib.util
import os
import sys

NEEDED = ("numpy", "orjson", "pydantic", "rich", "safetensors", "torch", "yaml")  # searched for, not imported


def environment_problem() -> str | None:
    """Why this Python cannot run the workbench, and what to do about it; None if it can."""
    if sys.platform == "win32":
        return "Windows is not supported, because run directories need POSIX locks and signals; use WSL 2"
    missing = [name for name in NEEDED if name not in sys.modules and importlib.util.find_spec(name) is None]
    if sys.version_info[:2] >= (3, 11) and not missing:
        return None
    what = f"{missing[0]} is not installed" if missing else "3.11 or newer is needed"
    activate = os.path.join(os.path.relpath(os.path.dirname(os.path.dirname(__file__))), ".venv", "bin", "activate")
    remedy = "activate the environment" if os.path.exists(activate) else "make the environment (make setup), then"
    return f"Python {sys.version.split()[0]} in {sys.prefix}: {what}; {remedy}: . {os.path.normpath(activate)}"


if (_problem := environment_problem()) is not None:
    if not hasattr(sys.modules.get("__main__"), "__file__"):  # a notebook or interactive prompt must not exit
        raise ImportError(_problem)
    print(f"error: {_problem}", file=sys.stderr)
    sys.exit(2)
