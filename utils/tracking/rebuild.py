"""Rebuilding the views of a run from its logs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from utils.config.loader import ConfigLoader
from utils.config.settings import Config
from utils.errors import UserError, typed_line
from utils.files import is_regular
from utils.runs.curves import draw_curves
from utils.runs.layout import CONFIG, LOGS, METRIC_REGISTRY, SEAL
from utils.runs.log import LOG_FILES
from utils.runs.mend import mend
from utils.runs.metrics import VIEWS, read_registry
from utils.runs.origin import pin
from utils.runs.run import Run, RunError, read_record, read_status
from utils.runs.seal import read_seal, write_seal
from utils.runs.trust import made_elsewhere
from utils.tracking import RunEnd, View
from utils.tracking.feeder import Budget, Feeder, attempt_each
from utils.tracking.views import build_views, is_installed, wanted_views, without_builds

Report = Callable[[str, int, int], None]  # name of the view, bytes fed, bytes in total


class RebuildError(Exception):
    """A view could not be rebuilt."""


def rebuild(
    path: Path,
    root: Path,
    names: Sequence[str] = (),
    report: Report = lambda name, fed, total: None,
    warn: Callable[[str], None] = print,
) -> list[str]:
    """Empty views of the run in the directory `path`, and feed the whole logs to them.

    Args:
        root: the folder that relative paths start from.
        names: the views to rebuild; empty: those that the configuration of the run names, and those that it has fed.
        report: called a few times a second while a view is fed.
        warn: prints a warning, for example that a damaged file was put aside.

    Returns:
        The names of the views, which are now all complete.

    Raises:
        UserError: the run is being trained, its record is damaged, a log is missing, or a view's package is not
            installed; nothing is changed.
        RebuildError: a view failed; run.json has the reason.
    """
    config = recorded_settings(path, root)
    fed = read_record(path).get("views", {})
    names = list(names) or list(dict.fromkeys([*wanted_views(config), *(name for name in fed if name in VIEWS)]))
    for name in names:
        if not is_installed(name):
            raise UserError(without_builds(name) or f"{name} is not installed: pip install {name}")
    for log_file in LOG_FILES:
        if not is_regular(path / LOGS / log_file, path):
            raise UserError(f"{path / LOGS / log_file} is missing or not a regular file: {path.name} cannot be rebuilt")
    end = RunEnd.read(path)  # before the lock is taken: a crashed run whose lock is held looks like a running one
    run = Run.resume(path)
    try:
        run.settle()
        mend(path, warn)
        read_registry(path / METRIC_REGISTRY)
        with contextlib.suppress(Exception):  # the old picture is good enough
            draw_curves(path)
        total = sum((path / LOGS / name).stat().st_size for name in LOG_FILES)
        for view in build_views(names, path, config, root):
            rebuild_view(view, run, end, lambda name, fed: report(name, fed, total))
    finally:
        run.release()
    return names


def finish(
    path: Path,
    root: Path,
    report: Report = lambda name, fed, total: None,
    warn: Callable[[str], None] = print,
) -> list[str]:
    """Do what a process killed at the end of a run left undone: feed the views, draw the curves, seal the run.

    Returns:
        The names of the views that were fed; views that were complete already are left alone.

    Raises:
        UserError: the run has not ended, or as for `rebuild`.
        RebuildError: a view failed; the run is sealed nevertheless.
    """
    status = read_status(path)
    if status == "running":
        raise RunError(f"{path.name} is still being trained: there is nothing to finish yet")
    if status == "crashed":
        raise RunError(f"{path.name} crashed during training: --resume continues it, rebuild feeds its trackers")
    views = read_record(path).get("views", {})
    names = [name for name in VIEWS if name in views and views[name].get("state") != "complete" and is_installed(name)]
    try:
        if names:
            rebuild(path, root, names, report, warn)
        else:
            run = Run.resume(path)
            try:
                mend(path, warn)
                with contextlib.suppress(Exception):  # a picture is not essential
                    draw_curves(path)
            finally:
                run.release()
    except RebuildError:
        _seal_once(path, warn)
        raise
    _seal_once(path, warn)
    return names


def _seal_once(path: Path, warn: Callable[[str], None]) -> None:
    """Seal a run that has no readable seal. A new seal would vouch for files that were damaged since the old one."""
    try:
        read_seal(path)
    except RunError:
        try:
            write_seal(path)
        except OSError as error:
            warn(f"{path / SEAL} was not written: {error.strerror}")


def rebuild_view(view: View, run: Run, end: RunEnd, report: Callable[[str, int], None]) -> None:
    """Empty one view of a run that has ended, and feed the whole logs to it.

    Raises:
        RebuildError: the view failed.
    """
    feeder = Feeder(view, run.path / LOGS, Budget(1.0), run.update_view, print, rebuild_command="")
    try:
        feeder.rebuild(end, lambda: report(view.name, sum(feeder.offsets.values())))
    except Exception as error:  # the tracker boundary
        reason = typed_line(error)
        attempt_each(view.abandon, lambda: run.update_view(view.name, state="off", reason=reason))
        raise RebuildError(f"{view.name} was not rebuilt: {reason}") from error


def recorded_settings(path: Path, root: Path) -> Config:
    """The configuration that the run in `path` was started with; for a run made elsewhere, with our Aim repository.

    Raises:
        ConfigError: it is missing or damaged.
    """
    loader = ConfigLoader(root)
    config = loader.load_only(path / CONFIG).config
    if made_elsewhere(path, root):
        config = pin(config, {"aim_repo": loader.load().config.tracking.aim_repo})
    return config
