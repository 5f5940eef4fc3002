# PYTHON_ARGCOMPLETE_OK
"""One training experiment: configuration -> run directory -> training loop -> export.

    python train.py --run-tag baseline
    python train.py --config configs/presets/shakespeare_cpu.yaml --n-embd 256
    python train.py --resume baseline
    python train.py --help

From a notebook: `from workbench import Config, train; result = train(Config(...), quiet=True)`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from utils.config.loader import LoadedConfig
from utils.config.settings import Config
from utils.errors import UserError
from utils.machine.process import hide_imports, several_ranks, tune_process
from utils.machine.signals import Deadline
from utils.runs.origin import Origin
from utils.runs.run import RunLockedError
from utils.terminal.cli import PROJECT_ROOT, Parser, script
from utils.terminal.config_flags import parse_experiment
from utils.terminal.streams import lasting_output
from utils.training.launch import add_multirun_flags, add_origin_flags, launches, note, with_budget
from utils.training.notify import Notifier, take_url, without_url
from utils.training.result import TrainResult

if TYPE_CHECKING:  # torch takes a second to import: --help and mistakes must not wait for it
    from utils.machine.ranks import Ranks
    from utils.profiling.in_run import RunProfiler
    from utils.training.session import Session


@script
def main(argv: Sequence[str]) -> int:
    if several_ranks():
        from utils.training.follow import train_on_ranks

        return train_on_ranks(argv, lambda ranks: experiment(argv, ranks), train_session)
    return experiment(argv)


def experiment(argv: Sequence[str], ranks: Ranks | None = None) -> int:
    """Run the experiment of a command line; return the exit status."""
    parser = Parser(prog="train.py", description=__doc__)
    add_origin_flags(parser)
    add_multirun_flags(parser)
    parsed = parse_experiment(argv, parser)
    own = parsed.own
    notifier = take_url(own.notify)
    argv = without_url(argv)
    if own.notify is not None and (own.multirun is not None or own.prove is not None):
        raise UserError("--notify reports the end of one run: leave it out, or leave out --multirun and --prove")
    for flag in ("prove", "multirun", "budget"):
        if ranks is not None and getattr(own, flag) is not None:
            raise UserError(f"--{flag} works with a single process only: leave out torchrun")
    if own.prove is not None:
        from utils.experiments.prove import prove_command

        return prove_command(argv, parsed)
    if own.multirun is not None:
        from utils.sweeps.multirun import multirun

        return multirun(parsed, PROJECT_ROOT)
    if own.jobs != 1:
        raise UserError("--jobs is for the runs of --multirun: this is one run")
    for loaded, origin in launches(parsed):
        loaded, facts = with_budget(own, loaded, origin)
        try:
            result = train(
                loaded,
                origin=origin,
                quiet=own.json,
                argv=("train.py", *argv),
                strict=own.strict,
                facts=facts,
                ranks=ranks,
                notifier=notifier,
            )
            return result.report(as_json=own.json)
        except RunLockedError as error:
            if own.resume != "auto" or ranks is not None:
                raise
            note(str(error))
    raise AssertionError("--resume auto ends with a new run")


def train(
    config: Config | LoadedConfig,
    *,
    origin: Origin | None = None,
    quiet: bool = False,
    argv: Sequence[str] = (),
    root: Path = PROJECT_ROOT,
    strict: bool = False,
    facts: Mapping[str, Any] = MappingProxyType({}),
    ranks: Ranks | None = None,
    notifier: Notifier | None = None,
) -> TrainResult:
    """Run one experiment.

    Args:
        config: the merged configuration, with or without the sources of its values.
        origin: the run that this one resumes, forks, or takes its first weights from.
        quiet: print warnings only.
        argv: the command line, to be recorded.
        root: the folder that relative paths start from.
        strict: raise UserError if the preflight finds anything.
        facts: extra fields for run.json of a new run.
        ranks: the ranks that train together; this process is rank 0. None: this process trains alone.
        notifier: reports how the run ended.

    Returns:
        The result, also of a run that diverged or was interrupted.

    Raises:
        UserError: a mistake found before the run directory is made or changed.
        Exception: the failure that ended the run, after its status was written.
    """
    loaded = config if isinstance(config, LoadedConfig) else LoadedConfig.from_config(config)
    deadline = Deadline(loaded.config.train.max_minutes)
    tune_process()  # before torch is imported
    from utils.machine.device import torch_defaults
    from utils.training.session import StartInterruptedError, one_at_a_time, open_session

    hide_imports()
    try:
        with (
            lasting_output(),
            one_at_a_time(),
            torch_defaults(),
            open_session(
                loaded,
                origin,
                deadline,
                ranks,
                notifier,
                quiet=quiet,
                argv=argv,
                root=root,
                strict=strict,
                facts=facts,
            ) as session,
        ):
            train_session(session)
    except StartInterruptedError as interruption:
        return interruption.result
    return session.result


def train_session(session: Session) -> None:
    """Train until the end, and profile the step that `profile_step` names."""
    from utils.profiling.in_run import RunProfiler

    training_loop(session, RunProfiler(session.state, session.path, session.terminal))


def training_loop(session: Session, profiler: RunProfiler) -> None:
    """Train until all updates are done, early stopping ends the run, or a stop is requested; then save a checkpoint.

    Step k means k completed updates.

    Raises:
        NonFiniteError: a loss or gradient was not finite. Its update was skipped, the log is complete up to the step
            at which this was noticed, and no checkpoint has been saved since.
    """
    from utils.optim.schedules import apply_schedules

    state, update = session.state, session.update
    while True:
        if session.evaluation_due:
            session.evaluate()
        if session.should_stop():
            session.save()
            return
        if session.checkpoint_due:
            session.save()

        lr = apply_schedules(state.optimizer, state.step, state.config.optimizer, state.max_iters)
        with profiler.watch(state.step) as phase:
            loss, grad_norms = update.gradients(phase)  # () and (groups,), on the device until a flush
            with phase("logging"):
                session.log_step(loss, grad_norms, lr)
            with phase("optimizer"):
                update.apply(grad_norms)  # changes nothing if a gradient is not finite
        session.step_done(loss)

        if profiler.ready:
            with session.pause():
                profiler.save()


if __name__ == "__main__":
    sys.exit(main())
