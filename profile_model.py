"""Where does the time of a training step go?

python profile_model.py                          # the merged configuration, as train.py would run it
python profile_model.py --n-embd 256 --steps 20
python profile_model.py --out profile/           # also profile.json and trace.json (Chrome trace)
python profile_model.py --lr-range               # instead: which learning rate? (--out: lr_range.json and .png)
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from utils.cli import PROJECT_ROOT, Parser, parse_experiment, script
from utils.console import Terminal, facts, profile_table
from utils.errors import UserError
from utils.files import write_json
from utils.run_log import LogWriter

if TYPE_CHECKING:
    from utils.config_loader import LoadedConfig
    from utils.train_state import TrainState

PHASES = ("data", "forward", "backward", "optimizer", "logging")


@script
def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="profile_model.py", description=__doc__)
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="steps that are measured (default: 20)")
    parser.add_argument("--warmup", type=int, default=5, metavar="N", help="steps before them (default: 5)")
    parser.add_argument("--top", type=int, default=12, metavar="N", help="operators shown by name (default: 12)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write profile.json and trace.json there")
    add_lr_range_flags(parser)
    parsed = parse_experiment(argv, parser)
    args, loaded = parsed.own, parsed.load()
    if args.lr_range:
        return lr_range(args, loaded)
    for name, least in (("steps", 1), ("warmup", 0), ("top", 1)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} must be at least {least}, not {getattr(args, name)}")

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages; read when torch is imported
    from utils.device import torch_settings
    from utils.gates import check_gates
    from utils.profiling import operator_clock, profile_steps
    from utils.train_state import build_state

    terminal = Terminal()
    setup = check_gates(loaded, PROJECT_ROOT, tell=terminal.print)
    if args.out is not None:
        try:
            args.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {args.out}: cannot be made: {error.strerror}") from None
    with torch_settings(setup.config.train, setup.device), tempfile.TemporaryDirectory() as folder:
        state = build_state(setup.config, setup.max_iters, setup.corpus, setup.device, setup.dtype, terminal)
        step = profiled_step(state, LogWriter(Path(folder) / "metrics.jsonl"))
        trace = args.out / "trace.json" if args.out else None
        result = profile_steps(
            step, PHASES, setup.device, steps=args.steps, warmup=args.warmup, top=args.top, trace=trace
        )
    tokens_per_second = state.tokens_per_step / result.step_ms * 1000
    terminal.print(
        facts(
            [
                ("device", f"{setup.device}, {str(setup.dtype).removeprefix('torch.')}"),
                ("model", f"{state.model.num_parameters():,} parameters"),
                ("batch", f"{setup.config.train.batch_size} x {setup.config.model.block_size} tokens"),
                ("step", f"{result.step_ms:.2f} ms under the profiler, {tokens_per_second:,.0f} tokens/s"),
            ]
        ),
        profile_table("Phases of a step", result.phases),
        profile_table(f"Operators, by their own time on {operator_clock(setup.device)}", result.operators),
    )
    if args.out is not None:
        write_json(args.out / "profile.json", result.to_json())
        terminal.print(f"written: {args.out / 'profile.json'}, {args.out / 'trace.json'}")
    return 0


def add_lr_range_flags(parser: Parser) -> None:
    group = parser.add_argument_group("learning-rate range test")
    group.add_argument("--lr-range", action="store_true", help="train with rising learning rates and suggest one")
    group.add_argument("--lr-min", type=float, default=1e-5, metavar="X", help="the first rate (default: 1e-5)")
    group.add_argument("--lr-max", type=float, default=1.0, metavar="X", help="the last rate (default: 1)")
    group.add_argument("--lr-steps", type=int, default=100, metavar="N", help="rates between them (default: 100)")


def lr_range(args: argparse.Namespace, loaded: LoadedConfig) -> int:
    """The learning-rate range test of a configuration: its curve, a suggestion, and both in files with --out."""
    from utils.device import torch_settings
    from utils.gates import check_gates
    from utils.lr_range import LEAST_STEPS, lr_range_test, report, save
    from utils.train_state import build_state

    if not 0 < args.lr_min < args.lr_max < math.inf:
        raise UserError(f"--lr-min and --lr-max: expected 0 < min < max, got {args.lr_min:g} and {args.lr_max:g}")
    if args.lr_steps < LEAST_STEPS:
        raise UserError(f"--lr-steps must be at least {LEAST_STEPS}, not {args.lr_steps}")
    terminal = Terminal()
    setup = check_gates(loaded, PROJECT_ROOT, tell=terminal.print)
    try:
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
        with torch_settings(setup.config.train, setup.device):
            state = build_state(setup.config, setup.max_iters, setup.corpus, setup.device, setup.dtype, terminal)
            result = lr_range_test(state, args.lr_min, args.lr_max, args.lr_steps)
        report(result, terminal)
        if args.out is not None:
            terminal.print(f"written: {', '.join(map(str, save(result, args.out)))}")
    except OSError as error:
        raise UserError(f"--out {args.out}: cannot be written: {error.strerror}") from None
    return 0


def profiled_step(state: TrainState, writer: LogWriter) -> Callable[[], None]:
    """The training loop's own update, with its parts marked for the profiler; every step is flushed to the log."""
    from torch.profiler import record_function

    from utils.device import synchronize
    from utils.optim import learning_rate_at, set_learning_rate
    from utils.step_buffer import StepBuffer
    from utils.training import clip_gradients, forward_backward, optimizer_step

    tracking = state.config.tracking
    buffer = StepBuffer(writer, tracking.flush_interval, tracking.log_interval, state.tokens_per_step)

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        with record_function(name):
            yield
            synchronize(state.device)  # the device's work counts where it was asked for

    def step() -> None:
        lr = learning_rate_at(state.step % state.max_iters, state.config.optimizer, state.max_iters)
        loss = forward_backward(state, phase)
        with phase("optimizer"):
            set_learning_rate(state.optimizer, lr)
            grad_norms = clip_gradients(state)
            optimizer_step(state)
        with phase("logging"):
            buffer.add(state.step - 1, loss, grad_norms, lr)
            buffer.flush()

    state.model.train()
    return step


if __name__ == "__main__":
    sys.exit(main())
