"""Run train.py, record a hash of its state after each step, and kill it at a given step, for `train.py --prove`.

A script: `python witness.py SPEC [arguments of train.py]`. SPEC is a JSON file with
    record: the file to which a line for each step is appended;
    kill_at: the step after which the process kills itself with SIGKILL, or null;
    interval: steps between two checkpoints;
    complain: whether to record operators that have no deterministic implementation.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import runpy
import signal
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WAIT_SECONDS = 60.0  # the longest wait for a checkpoint before a kill
LIBRARIES = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))
SEEDS = ("seed", "setstate", "set_state")
NOT_DRAWS = ("getstate", "get_state", "get_bit_generator", "set_bit_generator", "bytes")


class Draws:
    """Where code outside of libraries draws from the global generators of Python and NumPy, which checkpoints lack.

    places: such as "random.shuffle (loader.py:12)", in the order of their first draw.
    seeded: the modules whose generators were seeded.
    """

    def __init__(self) -> None:
        self.places: dict[str, None] = {}
        self.seeded: dict[str, None] = {}

    def watch(self) -> None:
        """Watch the functions of random and numpy.random; call it before importing code that may bind them by name."""
        import numpy.random

        for module, generator in ((random, random._inst), (numpy.random, numpy.random.mtrand._rand)):
            for name in dir(module):
                function = getattr(module, name)
                if getattr(function, "__self__", None) is generator and name not in NOT_DRAWS:
                    setattr(module, name, self._watched(module.__name__, name, function))
        make = numpy.random.default_rng

        def default_rng(seed: Any = None) -> Any:
            if seed is None:
                self._note("numpy.random", "default_rng")
            return make(seed)

        numpy.random.default_rng = default_rng

    def _watched(self, module: str, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            self._note(module, name)
            return function(*args, **kwargs)

        return watched

    def _note(self, module: str, name: str) -> None:
        frame = sys._getframe(2)
        file = frame.f_code.co_filename
        if file.startswith((*LIBRARIES, "<")):
            return
        if name in SEEDS:
            self.seeded[module] = None
        else:
            self.places[f"{module}.{name} ({Path(file).name}:{frame.f_lineno})"] = None


class Witness:
    """Appends a line to the record after each step."""

    def __init__(self, spec: dict[str, Any], draws: Draws) -> None:
        self.spec, self.draws = spec, draws
        self.complaints: dict[str, None] = {}
        self._first: int | None = None

    def after_step(self, callbacks: Any, loss: Any) -> None:
        from utils.checkpoints.optimizer import flatten_optimizer

        state = callbacks._run.state
        step = state.step
        self._first = step - 1 if self._first is None else self._first
        optimizer, _ = flatten_optimizer(state.model, state.optimizer)
        line = {
            "step": step,
            "loss": float(loss).hex(),
            "weights": {name: digest(tensor) for name, tensor in state.model.state_dict().items()},
            "optimizer": {name: digest(tensor) for name, tensor in optimizer.items()},
            "callbacks": {
                f"{type(one).__name__}.{name}": text
                for one in callbacks._callbacks
                for name, value in vars(one).items()
                if (text := fingerprint(value)) is not None
            },
            "draws": list(self.draws.places),
            "seeded": list(self.draws.seeded),
            "complaints": list(self.complaints),
        }
        with open(self.spec["record"], "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if step == self.spec["kill_at"]:
            self._await_checkpoint(callbacks._run.path, step)
            os.kill(os.getpid(), signal.SIGKILL)

    def _await_checkpoint(self, run: Path, step: int) -> None:
        """Wait until a checkpoint of this session is complete, if one was due: the kill is to test a resume from it."""
        from utils.checkpoints.folder import list_checkpoints
        from utils.runs.layout import CHECKPOINTS

        first, interval = self._first or 0, self.spec["interval"]
        due = (first // interval + 1) * interval
        deadline = time.monotonic() + WAIT_SECONDS
        while due < step and time.monotonic() < deadline:
            if any(first < saved for saved, _ in list_checkpoints(run / CHECKPOINTS)):
                return
            time.sleep(0.01)


def digest(tensor: Any) -> str:
    """A hash of the bits of a tensor."""
    import torch

    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def fingerprint(value: Any) -> str | None:
    """A text that is the same for equal values, if they are tensors, generators or of plain types; otherwise None."""
    import torch

    if isinstance(value, torch.Tensor):
        return digest(value)
    if isinstance(value, dict):
        return fingerprint([[key, item] for key, item in value.items()])
    if isinstance(value, list | tuple):
        parts = [fingerprint(item) for item in value]
        return None if None in parts else hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()
    if isinstance(value, random.Random):
        return fingerprint(value.getstate())
    if isinstance(value, torch.Generator):
        return digest(value.get_state())
    return repr(value)[:200] if value is None or isinstance(value, bool | int | float | str) else None


def main(spec: dict[str, Any], argv: list[str]) -> None:
    """Run train.py with the arguments `argv` and watch it; ends as that script does, by SystemExit."""
    sys.path[0] = str(ROOT)
    draws = Draws()
    draws.watch()
    from utils.training import session
    from utils.training.callbacks import Callbacks

    session.draw = lambda *_: None  # drawing the curves takes longer than a few steps, and nobody sees them
    witness, on_step = Witness(spec, draws), Callbacks.on_step
    if spec["complain"]:
        import torch

        def note(message: Warning | str, *_: Any, **__: Any) -> None:
            if "deterministic" in str(message):
                witness.complaints[str(message).split("\n")[0].split(". ")[0]] = None

        warnings.showwarning = note
        use = torch.use_deterministic_algorithms
        torch.use_deterministic_algorithms = lambda mode, **_: use(True, warn_only=True)

    def watched(self: Callbacks, step: int, loss: Any) -> None:
        on_step(self, step, loss)
        witness.after_step(self, loss)

    Callbacks.on_step = watched  # type: ignore[method-assign]
    sys.argv = [str(ROOT / "train.py"), *argv]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), sys.argv[2:])
