"""Run train.py and kill it with SIGKILL at a chosen moment.

    python tests/killed_training.py MOMENT STEP [arguments of train.py]

A script, not tests: test_resume.py starts it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at(moment: str, step: int) -> None:
    """Patch the code that reaches `moment`, so that the process dies there.

    Moments: micro_step (the second one), evaluation (its end), checkpoint (half-written), pointer (a checkpoint whose
    pointers are not written), step (its end), fed (the views show the step), closing (the views are being closed).
    """
    import data
    import utils.checkpoints.files
    from utils.training import step as training

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
        from utils.training import session

        session.evaluate = after(session.evaluate, lambda state, *_: state.step == step)
    elif moment == "checkpoint":
        write = utils.checkpoints.files.write_tensors
        name = f".step_{step:06d}.tmp"
        utils.checkpoints.files.write_tensors = after(write, lambda path, _: path.parent.name == name)
    elif moment == "pointer":
        import utils.training.checkpointer

        prune = utils.training.checkpointer.prune
        utils.training.checkpointer.prune = after(prune, lambda folder, *_: (folder / f"step_{step:06d}").is_dir())
    elif moment == "step":
        training.optimizer_step = after(training.optimizer_step, lambda state, *_: state.step == step)
    elif moment == "closing":
        from utils.tracking.feeder import Feeders

        Feeders.finish = lambda *_: die()  # type: ignore[method-assign]
    elif moment == "fed":
        wait_until_fed(step)
    else:
        raise ValueError(moment)


def wait_until_fed(step: int) -> None:
    """Hold the loop at a step until all views have shown it, then die: the views are ahead of the checkpoint."""
    from utils.tracking.feeder import Feeder, Feeders
    from utils.training import step as training

    feeders: list[Feeder] = []
    start = Feeders.start

    def remember(self: Feeders) -> None:
        feeders[:] = self.feeders
        start(self)

    def hold(state: training.TrainState, *grad_norms: Any) -> None:
        optimizer_step(state, *grad_norms)
        deadline = time.monotonic() + 60
        while state.step == step and time.monotonic() < deadline:
            noted = [feeder.logs_dir / f"fed_{feeder.view.name}.json" for feeder in feeders]
            if all(path.exists() and json.loads(path.read_text())["last_step"] >= step - 10 for path in noted):
                die()
            time.sleep(0.1)

    optimizer_step = training.optimizer_step
    training.optimizer_step = hold
    Feeders.start = remember  # type: ignore[method-assign]


def wait_for_writes() -> None:
    """Wait for each checkpoint: a step takes a millisecond, so which steps have one would depend on the disk."""
    from utils.training.checkpointer import Checkpointer

    save = Checkpointer.save

    def patched(self: Checkpointer, state: Any) -> None:
        save(self, state)
        self.wait()

    Checkpointer.save = patched  # type: ignore[method-assign]


if __name__ == "__main__":
    import train

    wait_for_writes()
    kill_at(sys.argv[1], int(sys.argv[2]))
    sys.exit(train.main(sys.argv[3:]))
