"""Training in a real Jupyter kernel: the output of cells, and the content of logs/train.log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from conftest import ROOT, TINY_FLAGS
from nbclient import NotebookClient

SETTINGS = {name.removeprefix("--").replace("-", "_"): int(value) for name, value in TINY_FLAGS.items()}


def executed(folder: Path, *cells: str) -> list[str]:
    """Execute cells, and return the output of each as text."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()
    return [
        "".join(output.get("text") or str(output.get("data")) for output in cell.outputs) for cell in notebook.cells
    ]


@pytest.mark.slow
def test_quiet_training_shows_nothing_and_other_training_each_line_once(tmp_path: Path, tiny_corpus: Path) -> None:
    places = {"dataset": tiny_corpus, "corpora_dir": tmp_path / "corpora", "runs_dir": tmp_path / "runs"}
    settings = SETTINGS | {key: str(path) for key, path in places.items()} | {"aim_logging": False}
    shown = executed(
        tmp_path,
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom workbench import load_config, train",
        f"config = load_config({settings!r})",
        "results = train(config, quiet=True, run_tag='quiet')",
        "results = train(config, run_tag='loud')",
    )
    assert shown[:3] == ["", "", ""]
    assert shown[3].count("Next") == shown[3].count("run directory") == 1
    assert shown[3].count("text/html") == 1  # the progress bar, which is updated in place
    assert "\x1b[2K" not in shown[3]  # and no attempt to move the cursor
    for tag in ("quiet", "loud"):
        (log,) = tmp_path.glob(f"runs/*_{tag}/logs/train.log")
        text = log.read_text(encoding="utf-8")
        assert text.count("Next") == text.count("run directory") == 1


def outputs_of(cell: Any, kind: str) -> list[str]:
    """The outputs of a cell in one MIME type."""
    return ["".join(output.data[kind]) for output in cell.outputs if kind in output.get("data", {})]


@pytest.mark.slow
def test_the_tour_runs_and_its_results_are_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run examples/tour.ipynb with few steps and another folder of runs."""
    monkeypatch.setenv("TOUR_SCALE", "0.01")
    notebook = nbformat.read(ROOT / "examples" / "tour.ipynb", 4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "commit the notebook without outputs"
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(cells) == 10
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog\n" * 300)
    tiny = {"n_layer": 1, "n_embd": 16, "block_size": 8, "batch_size": 4, "eval_iters": 1, "threads": 1}
    tiny |= {"runs_dir": str(tmp_path / "runs"), "dataset": str(tmp_path / "text.txt"), "sample_tokens": 0}
    cells[0].source += "\nimport workbench, utils.inference.generator as g\nfrom pathlib import Path\n"
    cells[0].source += f"workbench.PROJECT_ROOT = g.PROJECT_ROOT = Path({str(tmp_path)!r})\n"
    cells[1].source = cells[1].source.replace("config = ", f"small |= {tiny!r}\nconfig = ")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tracking.yaml").write_text(f"runs_dir: {tmp_path / 'runs'}\n")
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(ROOT / "examples")}}).execute()
    for cell, end in ((cells[2], "step 10/20"), (cells[3], "step 20/20")):
        (bar,) = (html for html in outputs_of(cell, "text/html") if "elapsed" in html)
        assert end in bar
    (run,), (table,), (comparison,) = (outputs_of(cells[place], "text/html") for place in (4, 7, 8))
    assert "tour-base" in run
    assert "data:image/png;base64," in run
    assert table.count("completed") == 6
    assert "Verdicts" in comparison
    assert "4e-03" in comparison or "0.004" in comparison


def test_texts_of_a_run_are_escaped_in_html(tmp_path: Path) -> None:
    from fake_runs import make_run

    from workbench import Run, RunTable

    path = make_run(tmp_path, "run", tag="<script>alert(1)</script>", notes={"note": "<img src=x onerror=alert(1)>"})
    run = Run(path)
    for html in (run._repr_html_(), RunTable([run])._repr_html_()):
        assert "<script" not in html
        assert "<img" not in html
        assert "&lt;" in html
    assert "no runs" in RunTable()._repr_html_()
