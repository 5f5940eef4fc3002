"""Pictures drawn by Matplotlib: by its Agg backend and in its own default style, whatever the environment asks for.

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
    """A figure to draw on inside the block; on exit Matplotlib has the style that it had.

    Args:
        width, height: in inches.
        layout: for `set_layout_engine("constrained", ...)`.
    """
    _import_matplotlib()
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure  # not pyplot: that one looks for a display and keeps figures alive

    style: dict[Any, Any] = {name: value for name, value in matplotlib.rcParamsDefault.items() if name != "backend"}
    style |= {"legend.framealpha": 0.85, "legend.edgecolor": "none"}  # to be read where a curve crosses it
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
    """Import it without MPLBACKEND, which may name what is not installed here; pyplot obeys it afterwards."""
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
