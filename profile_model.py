"""Where does the time of a training step go, and how far is it from what this machine can do?

python profile_model.py                          # the merged configuration, as train.py would run it
python profile_model.py --n-embd 256 --steps 20
python profile_model.py --out profile/           # also profile.json, profile.png and trace.json (Chrome trace)
python profile_model.py --sweep                  # instead: a table of steps by batch and block size
python profile_model.py --lr-range               # instead: which learning rate? (--out: lr_range.json and .png)
python profile_model.py --compare before/ after/ # two profiles side by side: folders, files or run directories

`train.py --profile-step N` profiles a step of a real run into its artifacts/profile/.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import UserError
from utils.profiling.picture import draw_profile
from utils.profiling.record import Profile, read_profile, save_profile
from utils.profiling.tables import comparison_tables, profile_tables
from utils.runs.log import METRICS_FILE, LogWriter
from utils.terminal.cli import PROJECT_ROOT, ExperimentArguments, Parser, parse_experiment, script
from utils.terminal.console import Terminal

if TYPE_CHECKING:
    from utils.profiling.measure import Step, StepTimes
    from utils.training.setup import Setup
    from utils.training.state import TrainState

OF_MODE = {  # flag -> the mode that it belongs to
    "batch_sizes": "sweep",
    "block_sizes": "sweep",
    "lr_min": "lr_range",
    "lr_max": "lr_range",
    "lr_steps": "lr_range",
}


def add_own_flags(parser: Parser) -> None:
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="steps of each measurement (default: 20)")
    parser.add_argument("--warmup", type=int, default=5, metavar="N", help="steps before them (default: 5)")
    parser.add_argument("--top", type=int, default=12, metavar="N", help="operators shown by name (default: 12)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write profile.json, profile.png and trace.json there")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--compare", type=Path, nargs=2, metavar=("A", "B"), help="show two saved profiles side by side")
    mode.add_argument("--sweep", action="store_true", help="show what a step costs by batch and block size")
    mode.add_argument("--lr-range", action="store_true", help="train with rising learning rates and suggest one")
    parser.add_argument("--batch-sizes", metavar="A,B", help="of --sweep (default: 1/4 to 4 times batch_size)")
    parser.add_argument("--block-sizes", metavar="A,B", help="of --sweep (default: 1/2 to 2 times block_size)")
    parser.add_argument("--lr-min", type=float, metavar="X", help="of --lr-range (default: 1e-5)")
    parser.add_argument("--lr-max", type=float, metavar="X", help="of --lr-range (default: 1)")
    parser.add_argument("--lr-steps", type=int, metavar="N", help="of --lr-range: rates between them (default: 100)")


@script
def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="profile_model.py", description=__doc__)
    add_own_flags(parser)
    parsed = parse_experiment(argv, parser)
    for name, least in (("steps", 1), ("warmup", 0), ("top", 1)):
        if getattr(parsed.own, name) < least:
            raise UserError(f"--{name} must be at least {least}, not {getattr(parsed.own, name)}")
    for name, of in OF_MODE.items():
        if getattr(parsed.own, name) is not None and not getattr(parsed.own, of):
            raise UserError(f"--{name.replace('_', '-')} belongs to --{of.replace('_', '-')}")
    if parsed.own.compare:
        return compare(parsed)
    if parsed.own.sweep:
        return sweep(parsed)
    if parsed.own.lr_range:
        return lr_range(parsed)
    return profile(parsed)


def compare(parsed: ExperimentArguments) -> int:
    """Print two saved profiles side by side."""
    args = parsed.own
    if parsed.files or parsed.overrides or args.out:
        raise UserError("--compare reads two saved profiles: it takes no settings and no --out")
    a, b = map(read_profile, args.compare)
    Terminal().print(*comparison_tables(a, b, [str(path) for path in args.compare], args.top))
    return 0


def make_out(folder: Path | None) -> None:
    """
    Raises:
        UserError: the folder of --out cannot be made.
    """
    if folder is not None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {folder}: cannot be made: {error.strerror}") from None


def sweep(parsed: ExperimentArguments) -> int:
    """What a step costs by batch and block size."""
    args, loaded = parsed.own, parsed.load()
    from utils.profiling.shapes import report_sweep
    from utils.training.setup import check_gates

    terminal = Terminal()
    setup = check_gates(loaded, PROJECT_ROOT, tell=terminal.print)
    make_out(args.out)
    sizes = (args.batch_sizes, args.block_sizes)
    report_sweep(setup, *sizes, steps=args.steps, warmup=args.warmup, out=args.out, terminal=terminal)
    return 0


def lr_range(parsed: ExperimentArguments) -> int:
    """The learning-rate range test of a configuration: its curve, a suggestion, and both in files with --out."""
    args, loaded = parsed.own, parsed.load()
    low = 1e-5 if args.lr_min is None else args.lr_min
    high = 1.0 if args.lr_max is None else args.lr_max
    steps = 100 if args.lr_steps is None else args.lr_steps
    from utils.machine.device import torch_settings
    from utils.training.lr_range import LEAST_STEPS, lr_range_test, report, save
    from utils.training.setup import check_gates
    from utils.training.state import build_state

    if not 0 < low < high < math.inf:
        raise UserError(f"--lr-min and --lr-max: expected 0 < min < max, got {low:g} and {high:g}")
    if steps < LEAST_STEPS:
        raise UserError(f"--lr-steps must be at least {LEAST_STEPS}, not {steps}")
    terminal = Terminal()
    setup = check_gates(loaded, PROJECT_ROOT, tell=terminal.print)
    make_out(args.out)
    with torch_settings(setup.config.train, setup.device):
        state = build_state(setup.config, setup.max_iters, setup.corpus, setup.device, setup.dtype, terminal)
        result = lr_range_test(state, low, high, steps)
    report(result, terminal)
    if args.out is not None:
        try:
            terminal.print(f"written: {', '.join(map(str, save(result, args.out)))}")
        except OSError as error:
            raise UserError(f"--out {args.out}: cannot be written: {error.strerror}") from None
    return 0


def profile(parsed: ExperimentArguments) -> int:
    """Measure the configuration's training step and its generation, print them, and write them to --out."""
    args, loaded = parsed.own, parsed.load()
    from utils.machine.device import torch_settings
    from utils.profiling.measure import read_trace
    from utils.training.setup import check_gates

    terminal = Terminal()
    setup = check_gates(loaded, PROJECT_ROOT, tell=terminal.print)
    make_out(args.out)
    with torch_settings(setup.config.train, setup.device):
        measured, times = measure(setup, args, terminal)
    terminal.print(*profile_tables(measured, args.top))
    if args.out is not None:
        try:
            written = save_profile(args.out, measured, read_trace(times.profiler), draw_profile)
        except OSError as error:
            raise UserError(f"--out {args.out}: cannot be written: {error.strerror or error}") from None
        terminal.print(f"\nwritten: {', '.join(map(str, written))}")
    return 0


def measure(setup: Setup, args: argparse.Namespace, terminal: Terminal) -> tuple[Profile, StepTimes]:
    """The profile of a training state that is made for it."""
    from utils.machine.device import memory_in_use
    from utils.profiling.assemble import build_profile, limits_of
    from utils.profiling.decoding import measure_generation
    from utils.profiling.measure import measure_steps
    from utils.profiling.memory import activation_phase, peak, reset_peak
    from utils.training.phases import no_phase
    from utils.training.state import build_state

    device, before = setup.device, memory_in_use(setup.device)
    state = build_state(setup.config, setup.max_iters, setup.corpus, device, setup.dtype, terminal)
    with tempfile.TemporaryDirectory() as folder:
        step = training_step(state, LogWriter(Path(folder) / METRICS_FILE))
        activations = activation_phase(state)
        step(no_phase)
        can_tell = reset_peak(device)
        step(activations or no_phase)
        highest = peak(device) - before if can_tell else None
        times = measure_steps(step, device, steps=args.steps, warmup=args.warmup)
    measured = build_profile(
        state,
        times,
        limits_of(state),
        activations=activations.bytes if activations else None,
        peak=highest,
        generation=measure_generation(state.model),
    )
    return measured, times


def training_step(state: TrainState, writer: LogWriter) -> Step:
    """The training loop's own update, in named phases; every step is flushed to the log."""
    from utils.optim.groups import apply_schedules
    from utils.training.phases import Phase
    from utils.training.step import clip_gradients, forward_backward, optimizer_step
    from utils.training.step_buffer import StepBuffer

    tracking = state.config.tracking
    buffer = StepBuffer(writer, tracking.flush_interval, tracking.log_interval, state.tokens_per_step)

    def step(phase: Phase) -> None:
        loss = forward_backward(state, phase)
        with phase("optimizer"):
            lr = apply_schedules(state.optimizer, state.step % state.max_iters, state.config.optimizer, state.max_iters)
            grad_norms = clip_gradients(state)
            optimizer_step(state)
        with phase("logging"):
            buffer.add(state.step - 1, loss, grad_norms, lr)
            buffer.flush()

    state.model.train()
    return step


if __name__ == "__main__":
    sys.exit(main())
