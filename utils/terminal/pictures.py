"""Matplotlib figures, drawn by the Agg backend in Matplotlib's default style, whatever the environment asks for.

Jupyter sets MPLBACKEND; a matplotlibrc or a notebook may set a style, such as text by LaTeX, that cannot be drawn here.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METADATA = {"png": {"Software": None}, "svg": {"Date": None}}  # the same figure gives the same bytes


@contextlib.contextmanager
def new_figure(width: float, height: float, dpi: int, **layout: Any) -> Iterator[Figure]:
    """A figure to draw on inside the block; restores the previous style of Matplotlib on exit.

    Args:
        width, height: in inches.
        layout: for `set_layout_engine("constrained", ...)`.
    """
    _import_matplotlib()
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot, which looks for a display and keeps figures alive

    style: dict[Any, Any] = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}
    style |= {"legend.framealpha": 0.85, "legend.edgecolor": "none"}  # legible where a curve crosses it
    with matplotlib.rc_context({**style, "svg.hashsalt": "curves"}):
        figure = Figure(figsize=(width, height), dpi=dpi)
        figure.set_layout_engine("constrained", **layout)
        FigureCanvasAgg(figure)
        yield figure


def picture_of(figure: Figure, kind: str = "png") -> bytes:
    """The figure as a PNG or SVG file; call it inside the block of `new_figure`."""
    picture = io.BytesIO()
    figure.savefig(picture, format=kind, metadata=METADATA[kind])
    return picture.getvalue()


def _import_matplotlib() -> None:
    """Import Matplotlib without MPLBACKEND, which may name a backend that is not installed; set it for pyplot later."""
    if "matplotlib" in sys.modules:
        return
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend:
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = backend
