"""Making the views of a run again from its logs, which are its truth."""

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

Report = Callable[[str, int, int], None]  # view, bytes fed, bytes in all


class RebuildError(Exception):
    """A view could not be made again."""


def rebuild(
    path: Path, root: Path, names: Sequence[str] = (), report: Report = lambda name, fed, total: None
) -> list[str]:
    """Feed views of the run in the directory `path` from offset 0, in the place of what they show of it.

    Args:
        root: the folder that relative paths start from.
        names: the views; none: those that the run was fed to, or should have been.
        report: called now and then while a view is fed.

    Returns:
        The names of the views, all of them complete.

    Raises:
        UserError: the run is being trained, its record is damaged, a log is missing, or a view's package is not
            installed; nothing is changed.
        RebuildError: a view failed; run.json says why.
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
    end = RunEnd.read(path)  # before the lock is taken: then a crashed run seems to run
    run = Run.resume(path)
    try:
        read_registry(path / METRIC_REGISTRY)
        with contextlib.suppress(OSError, ImportError):  # it was not asked for; the picture of before stays
            draw_curves(path)
        total = sum((path / LOGS / name).stat().st_size for name in LOG_FILES)
        for view in build_views(names, path, config, root):
            feed_anew(view, run, end, lambda name, fed: report(name, fed, total))
    finally:
        run.release()
    return names


def feed_anew(view: View, run: Run, end: RunEnd, report: Callable[[str, int], None]) -> None:
    """Empty one view of a run that has ended and feed it all of the logs.

    Raises:
        RebuildError: it failed.
    """
    feeder = Feeder(view, run.path / LOGS, Budget(1.0), run.update_view, print, rebuild="")
    try:
        feeder.feed_anew(end, lambda: report(view.name, sum(feeder.offsets.values())))
    except Exception as error:  # whatever a tracker raises
        message = next(filter(None, str(error).splitlines()), "no message")
        reason = f"{type(error).__name__}: {message}"
        run.update_view(view.name, state="off", reason=reason)
        view.abandon()
        raise RebuildError(f"{view.name} was not rebuilt: {reason}") from error


def recorded_settings(path: Path, root: Path) -> Config:
    """The configuration in meta/ of a run.

    Raises:
        ConfigError: it is missing or damaged.
    """
    return ConfigLoader(root).load_only(path / CONFIG).config
