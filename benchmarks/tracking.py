"""What does tracking cost a training step? The whole of train.py with its views, without them, and a bare loop.

python -m benchmarks.tracking                     # steps of about 50 ms, five minutes
python -m benchmarks.tracking --step-ms 50,35 --repeats 7

tracked: every step logged, TensorBoard and Aim fed by their threads while training runs. no views: the same
run without feeders. bare: the same without log and progress too. Short runs of the three alternate, each in a new run
directory, and count after their warmup; what the feeders have left over when a run ends is fed between the runs.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from rich.table import Table

from benchmarks.common import add_config_flag, at_least, interleaved, load_config, machine_facts, numbers
from benchmarks.common import ratio_interval, verdict  # fmt: skip
from utils.cli import Parser, script
from utils.config_loader import LoadedConfig
from utils.console import Terminal
from utils.errors import UserError
from utils.run_manager import read_record

if TYPE_CHECKING:
    from utils.tracking import Feeders
    from utils.training import TrainState

TRACKED, NO_VIEWS, BARE = "tracked", "no views", "bare"
LIMIT = 1.05  # tracked / no views, at steps of about 50 ms
CALIBRATION = (4, 24)  # batch sizes; a step costs about a + b * batch_size
