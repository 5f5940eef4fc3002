"""Pictures do not depend on MPLBACKEND, a matplotlibrc, or settings made in a notebook."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
from conftest import ROOT
from fake_runs import make_run, training_records

from utils.experiments.plot import PlottedCurve, save_plot
from utils.runs.curves import draw_curves
from utils.runs.layout import CURVES
from utils.terminal.pictures import new_figure, picture_of

CURVE = [PlottedCurve("a", [1.0, 2.0], [2.0, 1.0])]
HOSTILE = {  # settings that a matplotlibrc or a notebook could have
    "text.usetex": True,  # LaTeX is not installed
    "figure.facecolor": "black",
    "axes.prop_cycle": matplotlib.cycler(color=["red"]),
    "savefig.bbox": "tight",
    "savefig.dpi": 300,
    "font.size": 30,
    "svg.fonttype": "none",
}


@pytest.fixture(autouse=True)
def quick_pictures() -> None:
    """Render the pictures in these tests, unlike in the others."""


def pictures(folder: Path) -> dict[str, bytes]:
    """Draw a picture of each kind."""
    run = make_run(folder, "run", metrics=training_records([3.0, 2.0, 1.0]))
    (run / "artifacts").mkdir()
    assert draw_curves(run)
    save_plot(CURVE, "val/loss", "step", folder / "plot.svg")
    return {path.name: path.read_bytes() for path in (run / CURVES, folder / "plot.svg")}


def test_matplotlib_settings_of_a_notebook_change_no_picture_and_are_kept(tmp_path: Path) -> None:
    plain = pictures(tmp_path / "plain")
    with matplotlib.rc_context(HOSTILE):
        before = dict(matplotlib.rcParams)
        assert pictures(tmp_path / "hostile") == plain
        assert dict(matplotlib.rcParams) == before


def test_matplotlib_settings_are_restored_after_a_failure() -> None:
    with matplotlib.rc_context({"font.size": 30}):
        with contextlib.suppress(ZeroDivisionError), new_figure(1, 1, dpi=50):
            raise ZeroDivisionError
        assert matplotlib.rcParams["font.size"] == 30


def test_a_configured_backend_that_does_not_exist_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nbackend: nonsense\n")
    code = "import os, sys\nfrom utils.terminal.pictures import new_figure, picture_of\n"
    code += "with new_figure(2, 2, dpi=50) as figure:\n"
    code += "    figure.add_subplot().set(xlabel='x')\n"
    code += "    sys.stdout.buffer.write(picture_of(figure))\n"
    code += "assert os.environ['MPLBACKEND'] == 'nonsense'\n"
    environment = {**os.environ, "MPLBACKEND": "nonsense", "MATPLOTLIBRC": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=False)
    assert result.returncode == 0, result.stderr.decode()
    with new_figure(2, 2, dpi=50) as figure:
        figure.add_subplot().set(xlabel="x")
        assert result.stdout == picture_of(figure)


def test_pyplot_still_obeys_the_environment(tmp_path: Path) -> None:
    """After a training in a notebook, the user's own plots must still appear in it."""
    code = "from utils.terminal.pictures import new_figure\n"
    code += "with new_figure(1, 1, dpi=50): pass\n"
    code += "import matplotlib.pyplot as plt; print(plt.get_backend())"
    environment = {**os.environ, "MPLBACKEND": "svg"}
    words = [sys.executable, "-c", code]
    result = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout == "svg\n"
