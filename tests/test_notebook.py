"""Training in a real Jupyter kernel: what a cell shows, and what logs/train.log has."""

from __future__ import annotations

from pathlib import Path

import nbformat
from conftest import ROOT, TINY_FLAGS
from nbclient import NotebookClient

SETTINGS = {name.removeprefix("--").replace("-", "_"): int(value) for name, value in TINY_FLAGS.items()}


def executed(folder: Path, *cells: str) -> list[str]:
    """What each cell has shown, as text."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()
    return [
        "".join(output.get("text") or str(output.get("data")) for output in cell.outputs) for cell in notebook.cells
    ]


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
    for tag in ("quiet", "loud"):
        (log,) = tmp_path.glob(f"runs/*_{tag}/logs/train.log")
        text = log.read_text(encoding="utf-8")
        assert text.count("Next") == text.count("run directory") == 1
