"""The report of a finished sweep: how much each setting matters, and pictures of what was found."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from utils.files import write_output
from utils.sweeps.folder import REPORT, Sweep
from utils.sweeps.sampling import quiet_optuna
from utils.sweeps.study import Study

LEAST_TRIALS = 4  # complete ones, for importance and pictures to say anything
PICTURES = {"parallel": "plot_parallel_coordinate", "slice": "plot_slice"}


def write_report(sweep: Sweep, study: Study) -> tuple[Mapping[str, float], list[Path]]:
    """Write the pictures of a sweep into its folder report/, each as HTML and PNG.

    Returns:
        The importance of each setting, as shares that sum to 1, largest first; and the pictures. Both are empty where
        there are too few complete trials.

    Raises:
        OSError: a picture cannot be written.
    """
    if sum(map(study.is_complete, study.trials())) < LEAST_TRIALS:
        return {}, []
    folder = sweep.path / REPORT
    folder.mkdir(exist_ok=True)
    with _without_warnings():
        return importance(study), [*_write(folder, study)]


def importance(study: Study) -> dict[str, float]:
    """The share of each setting in what makes a trial good, by PED-ANOVA [Watanabe et al. 2023].

    Settings with a condition, or with one value in all trials, are left out.
    """
    optuna = quiet_optuna()
    try:
        found: dict[str, float] = optuna.importance.get_param_importances(
            study.optuna, evaluator=optuna.importance.PedAnovaImportanceEvaluator()
        )
    except (ValueError, RuntimeError):  # all trials have the same value, say
        return {}
    return found


def _write(folder: Path, study: Study) -> list[Path]:
    import matplotlib

    matplotlib.use("Agg")  # whatever MPLBACKEND asks for
    import matplotlib.pyplot as plt
    from optuna import visualization

    written = []
    name = str(study.sweep.plan.space.goal)
    for stem, function in PICTURES.items():
        figure = getattr(visualization, function)(study.optuna, target_name=name)
        write_output(html := folder / f"{stem}.html", figure.to_html(include_plotlyjs=True))
        draw: Callable[..., Any] = getattr(visualization.matplotlib, function)
        axes = draw(study.optuna, target_name=name)
        picture = (axes if hasattr(axes, "figure") else axes.flat[0]).figure
        png = folder / f"{stem}.png"
        picture.savefig(png, dpi=120, bbox_inches="tight")
        plt.close(picture)
        written += [html, png]
    return written


@contextlib.contextmanager
def _without_warnings() -> Any:
    """Pictures are experimental in Optuna, and say so for each."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
