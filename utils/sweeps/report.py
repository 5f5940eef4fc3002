"""The report of a finished sweep: how much each setting matters, and pictures of the trials."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from utils.files import write_output
from utils.sweeps.folder import REPORT, Sweep
from utils.sweeps.sampling import quiet_optuna
from utils.sweeps.study import Study
from utils.terminal.html import render
from utils.terminal.streams import without_warnings

TEMPLATE = Path(__file__).with_name("picture.html.j2")

LEAST_TRIALS = 4  # complete trials; with fewer, importance and pictures mean nothing
PICTURES = {"parallel": "plot_parallel_coordinate", "slice": "plot_slice"}
AXIS_PIXELS, AXIS_INCHES = 150, 1.4  # width of a picture for each axis: one for each setting, and one for the metric
BACKGROUND = "#bfb29c"  # for pictures whose lines and points range from white to blue


def write_report(sweep: Sweep, study: Study) -> tuple[dict[str, float], list[Path]]:
    """Write the pictures of a sweep into its folder report/, each as HTML and PNG.

    Returns:
        The importance of each setting, as shares that sum to 1, largest first; and the pictures. Both are empty if
        there are too few complete trials.

    Raises:
        OSError: a picture cannot be written.
    """
    if sum(map(study.is_complete, study.trials())) < LEAST_TRIALS:
        return {}, []
    folder = sweep.path / REPORT
    folder.mkdir(exist_ok=True)
    with without_warnings():  # Optuna warns for each picture that it is experimental
        return importance(study), [*_write(folder, study)]


def importance(study: Study) -> dict[str, float]:
    """The importance of each setting for the value of a trial, as shares, by PED-ANOVA [Watanabe et al. 2023].

    Settings with a condition are left out: too few trials have them.
    """
    optuna = quiet_optuna()
    keys = [one.key for one in study.sweep.plan.space.dimensions if not one.when]
    try:
        found: dict[str, float] = optuna.importance.get_param_importances(
            study.optuna, evaluator=optuna.importance.PedAnovaImportanceEvaluator(), params=keys
        )
    except (ValueError, RuntimeError):  # for example, all trials have the same value
        return {}
    return found


def _write(folder: Path, study: Study) -> Iterator[Path]:
    """Draw the pictures, and yield the path of each file once it is written."""
    import matplotlib

    matplotlib.use("Agg")  # whatever MPLBACKEND says
    import matplotlib.pyplot as plt
    from optuna import visualization

    goal, axes = str(study.sweep.plan.space.goal), 1 + len(study.sweep.plan.space.dimensions)
    title = f"{study.sweep.name}: {goal} and the settings of each trial"
    for stem, function in PICTURES.items():
        figure = getattr(visualization, function)(study.optuna, target_name=goal)
        write_output(html := folder / f"{stem}.html", _page(figure, title, AXIS_PIXELS * axes))
        yield html
        draw: Callable[..., Any] = getattr(visualization.matplotlib, function)
        drawn = draw(study.optuna, target_name=goal)
        picture = (drawn if hasattr(drawn, "figure") else drawn.flat[0]).figure
        if stem == "parallel":  # Optuna makes the other picture wide enough for its axes
            picture.set_size_inches(AXIS_INCHES * axes, 5)
            drawn.set_facecolor(BACKGROUND)
            drawn.set_title("")
        picture.suptitle(title)
        picture.savefig(png := folder / f"{stem}.png", dpi=120, bbox_inches="tight")
        plt.close(picture)
        yield png


def _page(figure: Any, title: str, width: int) -> str:
    """A plotly figure as a page without requests, which scrolls sideways in a window narrower than `width` pixels."""
    from markupsafe import Markup

    figure.update_layout(title=None, width=None, height=None, autosize=True, margin={"t": 40}, plot_bgcolor=BACKGROUND)
    figure.update_traces(opacity=0.9, selector={"mode": "lines"})
    options = {"displaylogo": False, "responsive": True}  # the logo is a link to a website
    drawn = figure.to_html(full_html=False, include_plotlyjs=True, config=options, default_height="100%")
    return render(TEMPLATE, title=title, width=width, figure=Markup(drawn))
