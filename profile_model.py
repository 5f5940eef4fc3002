# PYTHON_ARGCOMPLETE_OK
"""Where does the time of a training step go, and how close does it come to what this machine can do?

python profile_model.py                          # the merged configuration, as train.py would run it
python profile_model.py --n-embd 256 --steps 20
python profile_model.py --out profile/           # also profile.json, profile.png and trace.json (Chrome trace)
python profile_model.py --sweep                  # instead: step times by batch and block size
python profile_model.py --lr-range               # instead: which learning rate? (--out: lr_range.json and .png)
python profile_model.py --compare before/ after/ # two profiles side by side: folders, files or run directories
torchrun --standalone --nproc-per-node 2 profile_model.py   # a step on several ranks, and their communication

`train.py --profile-step N` profiles one step of a real run into its artifacts/profile/.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.config.loader import LoadedConfig, flag_name
from utils.config.settings import Config
from utils.errors import UserError, number_text
from utils.machine.process import several_ranks
from utils.runs.origin import without_foreign_places
from utils.terminal.cli import PROJECT_ROOT, Parser, numbers, place, script
from utils.terminal.commands import print_json
from utils.terminal.config_flags import ExperimentArguments, parse_experiment
from utils.training.launch import add_trust_flag, facts_of

if TYPE_CHECKING:  # arguments are parsed before torch is imported
    from utils.machine.ranks import Ranks
    from utils.terminal.console import Terminal
    from utils.training.setup import Setup


@script
def main(argv: Sequence[str]) -> int:
    if several_ranks():
        from utils.training.follow import run_on_ranks

        def facts() -> dict[str, Any]:
            _, arguments = parse(argv)
            return facts_of(arguments["loaded"].config, {})

        def work(ranks: Ranks) -> int:
            return run(argv, ranks)

        return run_on_ranks(facts, lead=work, work=work)
    return run(argv)


def run(argv: Sequence[str], ranks: Ranks | None = None) -> int:
    """Carry out a command line, on one of `ranks` if there are several; return the exit status."""
    mode, arguments = parse(argv)
    if ranks is None:
        MODES[mode](**arguments)
    else:
        profile(**arguments, ranks=ranks)
    return 0


def parse(argv: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The mode that a command line chooses, and the arguments of its function.

    Raises:
        UserError: a mistake in the command line, or a mode that does not work with several ranks.
    """
    parser = Parser(prog="profile_model.py", description=__doc__)
    add_flags(parser)
    parsed = parse_experiment(argv, parser)
    mode = next((name for name in MODES if name in parsed.own), "profile")
    if mode != "profile" and several_ranks():
        raise UserError(f"{flag_name(mode)} runs in one process: start it without torchrun")
    return mode, arguments_of(mode, parsed)


# ------------------------------------------------------------------------------------------------- the modes


def profile(
    loaded: LoadedConfig,
    *,
    steps: int = 20,
    warmup: int = 5,
    top: int = 12,
    out: Path | None = None,
    json: bool = False,
    ranks: Ranks | None = None,
) -> None:
    """Measure the training step and the generation of a configuration. With several ranks, rank 0 shows its times."""
    from utils.machine.device import torch_settings
    from utils.profiling.assemble import profile_training
    from utils.profiling.measure import read_trace
    from utils.profiling.picture import draw_profile
    from utils.profiling.record import save_profile
    from utils.profiling.tables import profile_tables
    from utils.training.batch_size import memory_explained

    setup, terminal = prepare(loaded, out, json) if ranks is None else prepare_on_ranks(loaded, out, json, ranks)
    with torch_settings(setup.config.train, setup.device), memory_explained(setup.config, setup.device):
        measured, times = profile_training(setup, steps, warmup, terminal)
    if setup.ranks.rank:
        return
    terminal.print(*profile_tables(measured, top))
    if json:
        print_json(measured.model_dump(mode="json"))
    write(out, lambda folder: save_profile(folder, measured, read_trace(times.profiler), draw_profile), terminal)


def sweep(
    loaded: LoadedConfig,
    *,
    batch_sizes: str | None = None,
    block_sizes: str | None = None,
    steps: int = 20,
    warmup: int = 5,
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Measure training steps for several batch and block sizes."""
    from utils.machine.device import torch_settings
    from utils.profiling.shapes import default_batch_sizes, default_block_sizes, save_sweep, sweep_shapes, sweep_table

    batches = numbers(batch_sizes, "--batch-sizes", int, 1) if batch_sizes is not None else None
    blocks = numbers(block_sizes, "--block-sizes", int, 1) if block_sizes is not None else None
    setup, terminal = prepare(loaded, out, json)
    batches, blocks = batches or default_batch_sizes(setup.config), blocks or default_block_sizes(setup.config)
    with torch_settings(setup.config.train, setup.device):
        timings = sweep_shapes(setup, batches, blocks, steps, warmup, terminal)
    dtype = str(setup.dtype).removeprefix("torch.")
    terminal.print(sweep_table(timings), f"{setup.device}, {dtype}; medians over {steps} steps")
    terminal.print("GFLOP/s counts the operations that the matrix products need.")
    if json:
        print_json({"shapes": timings})
    write(out, lambda folder: save_sweep(timings, folder), terminal)


def lr_range(
    loaded: LoadedConfig,
    *,
    lr_min: float = 1e-5,
    lr_max: float = 1.0,
    lr_steps: int = 100,
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Run the learning-rate range test of a configuration; show its curve and a suggestion."""
    from utils.machine.device import torch_settings
    from utils.training.batch_size import memory_explained
    from utils.training.lr_range import LEAST_STEPS, RULE, lr_range_test, report, save
    from utils.training.state import build_state

    if not 0 < lr_min < lr_max < math.inf:
        raise UserError(
            f"--lr-min and --lr-max: expected 0 < min < max, got {number_text(lr_min)} and {number_text(lr_max)}"
        )
    if lr_steps < LEAST_STEPS:
        raise UserError(f"--lr-steps must be at least {LEAST_STEPS}, not {lr_steps}")
    setup, terminal = prepare(loaded, out, json)
    with torch_settings(setup.config.train, setup.device), memory_explained(setup.config, setup.device):
        state = build_state(setup.config, setup.max_iters, setup.corpus, setup.device, setup.dtype, terminal)
        result = lr_range_test(state, lr_min, lr_max, lr_steps)
    report(result, terminal)
    if json:
        print_json({**dataclasses.asdict(result), "rule": RULE})
    write(out, lambda folder: save(result, folder), terminal)


def show_comparison(*, compare: Sequence[Path], top: int = 12, json: bool = False) -> None:
    """Print two saved profiles side by side."""
    from utils.profiling.record import read_profile
    from utils.profiling.tables import comparison_tables
    from utils.terminal.console import Terminal

    a, b = map(read_profile, compare)
    Terminal(quiet=json).print(*comparison_tables(a, b, [str(path) for path in compare], top))
    if json:
        pairs = zip(compare, (a, b), strict=True)
        print_json([{"path": path, "profile": found.model_dump(mode="json")} for path, found in pairs])


# The parameters of a function are the flags that its mode takes. --sweep chooses "sweep", and so on.
MODES: dict[str, Callable[..., None]] = {
    "profile": profile,
    "sweep": sweep,
    "lr_range": lr_range,
    "compare": show_comparison,
}


def prepare_on_ranks(loaded: LoadedConfig, out: Path | None, quiet: bool, ranks: Ranks) -> tuple[Setup, Terminal]:
    """Call `prepare` on rank 0, then on the other ranks, which use the configuration of rank 0 and print nothing."""
    if ranks.rank == 0:
        setup, terminal = prepare(loaded, out, quiet, ranks)
        ranks.share("config", setup.config.model_dump(mode="json"))
        return setup, terminal
    config = Config.model_validate(ranks.share("config", None))
    return prepare(LoadedConfig.from_config(config), None, quiet, ranks)


def prepare(loaded: LoadedConfig, out: Path | None, quiet: bool, ranks: Ranks | None = None) -> tuple[Setup, Terminal]:
    """Check the corpus and the device, create the folder of --out, and open the terminal.

    Raises:
        UserError: a check fails, or the folder cannot be created.
    """
    from utils.machine.ranks import ONE
    from utils.terminal.console import Terminal
    from utils.training.setup import make_setup

    if loaded.config.train.shard != "none":
        raise UserError(f"{loaded.source('shard')}: a sharded model cannot be profiled: shard must be none")
    ranks = ranks or ONE
    terminal = Terminal(quiet or ranks.rank > 0)
    setup = make_setup(loaded, PROJECT_ROOT, report=terminal.print, ranks=ranks)
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"--out {out}: cannot be created: {error.strerror}") from None
    return dataclasses.replace(setup, corpus=setup.corpus.stored()), terminal


def write(out: Path | None, save: Callable[[Path], Sequence[Path]], terminal: Terminal) -> None:
    """With --out, save the result there, and print the paths that `save` returns.

    Raises:
        UserError: the result cannot be written.
    """
    if out is not None:
        try:
            written = save(out)
        except OSError as error:
            raise UserError(f"--out {out}: cannot be written: {error.strerror or error}") from None
        terminal.print("", f"written: {', '.join(map(str, written))}")


# -------------------------------------------------------------------------------------------- the command line


def add_flags(parser: Parser) -> None:
    """Add the modes, of which at most one may be given, and their flags; a flag that is not given sets no attribute."""
    group = parser.add_argument_group("modes", "at most one of them; without one, the training step is profiled")
    mode = functools.partial(group.add_mutually_exclusive_group().add_argument, default=argparse.SUPPRESS)
    mode("--sweep", action="store_true", help="time steps for several batch and block sizes")
    mode("--lr-range", action="store_true", help="train with rising learning rates and suggest one")
    mode("--compare", type=place, nargs=2, metavar=("A", "B"), help="show two saved profiles side by side")
    flag = functools.partial(parser.add_argument, default=argparse.SUPPRESS)
    flag("--steps", type=at_least(1), metavar="N", help="steps in each measurement (default: 20)")
    flag("--warmup", type=at_least(0), metavar="N", help="warm-up steps before the measurements (default: 5)")
    flag("--top", type=at_least(1), metavar="N", help="operators shown by name (default: 12)")
    flag("--out", type=place, metavar="DIR", help="also write the result to DIR: JSON, picture, trace")
    flag("--json", action="store_true", help="print the result as JSON, instead of tables")
    flag("--batch-sizes", metavar="A,B", help="with --sweep: sizes to time (default: 1/4 to 4 times batch_size)")
    flag("--block-sizes", metavar="A,B", help="with --sweep: sizes to time (default: 1/2 to 2 times block_size)")
    flag("--lr-min", type=float, metavar="X", help="with --lr-range: the first learning rate (default: 1e-5)")
    flag("--lr-max", type=float, metavar="X", help="with --lr-range: the last learning rate (default: 1)")
    flag("--lr-steps", type=int, metavar="N", help="with --lr-range: number of steps (default: 100)")
    add_trust_flag(parser)


def at_least(least: int) -> Callable[[str], int]:
    """A type for flags: a whole number that is not smaller than `least`."""

    def number(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, not {value}")
        return value

    number.__name__ = "whole number"  # argparse: "invalid whole number value"
    return number


def arguments_of(mode: str, parsed: ExperimentArguments) -> dict[str, Any]:
    """The arguments for the function of a mode, from the command line.

    Raises:
        UserError: the mode does not take a flag or settings, or there is a mistake in the configuration.
    """
    taken = {name: inspect.signature(function).parameters for name, function in MODES.items()}
    given = {name: value for name, value in vars(parsed.own).items() if any(name in names for names in taken.values())}
    for name in given:
        if name not in taken[mode]:
            owners = [flag_name(of) if of != "profile" else "a profile" for of, names in taken.items() if name in names]
            raise UserError(f"{flag_name(name)} belongs to {' or '.join(owners)}")
    if "loaded" in taken[mode]:
        loaded = without_foreign_places(parsed.load(), parsed.files, PROJECT_ROOT, parsed.own.trust)
        return {**given, "loaded": loaded}
    if parsed.files or parsed.overrides or parsed.own.config_dir:
        raise UserError(f"{flag_name(mode)} takes no settings")
    return given


if __name__ == "__main__":
    sys.exit(main())
