"""train.py, killed by SIGKILL at a chosen moment: `python tests/killed_training.py MOMENT STEP [train.py's words]`.

A script, not tests: test_resume.py starts it.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(moment: str, step: int) -> None:
    """Patch the moment: the second micro-step, the end of an evaluation, a half-written checkpoint, or a step's end."""
    import data
    import utils.checkpoint
    from utils import training

    def after(function: Callable[..., Any], condition: Callable[..., bool]) -> Callable[..., Any]:
        def patched(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            if condition(*args):
                die()
            return result

        return patched

    if moment == "micro_step":
        sample = data.BatchSampler.train_batch
        data.BatchSampler.train_batch = after(sample, lambda _, at, micro=0, *rest: (at, micro) == (step, 1))  # type: ignore[method-assign]
    elif moment == "evaluation":
        training.evaluate = after(training.evaluate, lambda state, *_: state.step == step)
    elif moment == "checkpoint":
        write = utils.checkpoint.write_tensors
        name = f".step_{step:06d}.tmp"
        utils.checkpoint.write_tensors = after(write, lambda path, _: path.parent.name == name)
    elif moment == "step":
        training.optimizer_step = after(training.optimizer_step, lambda state: state.step == step)
    else:
        raise ValueError(moment)


if __name__ == "__main__":
    import train

    kill_at(sys.argv[1], int(sys.argv[2]))
    sys.exit(train.main(sys.argv[3:]))
