"""Rebuild the views of a run from its logs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from utils.config.loader import ConfigLoader
from utils.config.settings import Config
from utils.errors import UserError
from utils.runs.curves import draw_curves
from utils.runs.layout import CONFIG, LOGS, METRIC_REGISTRY
from utils.runs.log import LOG_FILES
from utils.runs.metrics import read_registry
from utils.runs.run import Run, read_record
from utils.tracking import RunEnd, View
from utils.tracking.feeder import Budget, Feeder
from utils.tracking.views import build_views, is_installed, wanted_views

Report = Callable[[str, int, int], None]  # name of the view, bytes fed, bytes in total


class RebuildError(Exception):
    """A view could not be rebuilt."""


def rebuild(
    path: Path, root: Path, names: Sequence[str] = (), report: Report = lambda name, fed, total: None
) -> list[str]:
    """Empty views of the run in the directory `path`, and feed them the whole logs.

    Args:
        root: the folder that relative paths start from.
        names: of the views; empty: those that the run feeds by its configuration, and those it has fed.
        report: called a few times a second while a view is fed.

    Returns:
        The names of the views, all of them complete.

    Raises:
        UserError: the run is being trained, its record is damaged, a log is missing, or a view's package is not
            installed; nothing is changed.
        RebuildError: a view failed; run.json has the reason.
    """
    config = recorded_settings(path, root)
    fed = read_record(path).get("views", {})
    names = list(names) or list(dict.fromkeys([*wanted_views(config), *fed]))
    for name in names:
        if not is_installed(name):
            raise UserError(f"{name} is not installed: pip install {name}")
    for log_file in LOG_FILES:
        if not (path / LOGS / log_file).is_file():
            raise UserError(f"{path / LOGS / log_file} is missing: {path.name} cannot be fed from its logs")
    end = RunEnd.read(path)  # before the lock is taken: a crashed run with a lock would look like a running one
    run = Run.resume(path)
    try:
        run.settle()
        read_registry(path / METRIC_REGISTRY)
        with contextlib.suppress(OSError, ImportError):  # the old picture will do
            draw_curves(path)
        total = sum((path / LOGS / name).stat().st_size for name in LOG_FILES)
        for view in build_views(names, path, config, root):
            rebuild_view(view, run, end, lambda name, fed: report(name, fed, total))
    finally:
        run.release()
    return names


def rebuild_view(view: View, run: Run, end: RunEnd, report: Callable[[str, int], None]) -> None:
    """Empty one view of a run that has ended, and feed it the whole logs.

    Raises:
        RebuildError: the view failed.
    """
    feeder = Feeder(view, run.path / LOGS, Budget(1.0), run.update_view, print, rebuild_command="")
    try:
        feeder.rebuild(end, lambda: report(view.name, sum(feeder.offsets.values())))
    except Exception as error:  # the tracker boundary
        message = next(filter(None, str(error).splitlines()), "no message")
        reason = f"{type(error).__name__}: {message}"
        run.update_view(view.name, state="off", reason=reason)
        view.abandon()
        raise RebuildError(f"{view.name} was not rebuilt: {reason}") from error


def recorded_settings(path: Path, root: Path) -> Config:
    """The configuration that the run in the directory `path` was started with.

    Raises:
        ConfigError: it is missing or damaged.
    """
    return ConfigLoader(root).load_only(path / CONFIG).config
