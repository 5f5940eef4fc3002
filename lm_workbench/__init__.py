"""The installed workbench: the program lm-workbench, and the Python API as `from lm_workbench import train, runs`.

`pip install -e .` leaves the code in the checkout. A wheel has the code in this folder, and uses the folders `runs`,
`configs`, `corpora` and `datasets` in the current folder (docs/installing.md).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CODE = HERE if (HERE / "train.py").is_file() else HERE.parent  # the folder of the scripts


def __getattr__(name: str) -> Any:
    """Import a name from workbench.py."""
    if name.startswith("__"):
        raise AttributeError(name)
    if str(CODE) not in sys.path:
        sys.path.insert(0, str(CODE))
    import workbench

    return getattr(workbench, name)
