"""Training in a separate process."""

from __future__ import annotations

import io
import os
import signal
import sys
from pathlib import Path

import pytest

from utils.experiments.training_process import _train
from utils.machine.signals import raise_on_signals


class Interrupting(io.StringIO):
    """Sends the signal with the last line of a training that ends by itself."""

    def __init__(self, signum: int) -> None:
        super().__init__()
        self.signum = signum

    def write(self, text: str) -> int:
        if text.startswith("step 2"):
            os.kill(os.getpid(), self.signum)
        return super().write(text)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_counts_even_if_training_ends_by_itself(signum: signal.Signals, tmp_path: Path) -> None:
    ignoring = "import signal\nfor signum in (2, 15): signal.signal(signum, signal.SIG_IGN)\n"
    program = ignoring + "print('step 1\\nstep 2', flush=True)"
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    for output, expected in ((Interrupting(signum), 128 + signum), (io.StringIO(), 0)):
        with raise_on_signals():
            status, _ = _train([sys.executable, "-c", program], tmp_path, output, temporary)
        assert (status, output.getvalue()[:7]) == (expected, "step 1\n")
