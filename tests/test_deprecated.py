"""Imports that the documentation of earlier releases shows work for one more release, with a warning."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import workbench

MOVED = [
    ("utils.callbacks", ["Callback", "TrainingRun"]),
    ("utils.run_log", ["Metric", "register_metric"]),
    ("utils.generator", ["Generator", "Request"]),
    ("utils.sampling", ["SamplingOptions"]),
    ("utils.config", ["Config", "DataConfig", "ModelConfig", "OptimizerConfig", "TrackingConfig", "TrainConfig"]),
]


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in MOVED for name in names])
def test_an_old_import_gives_the_same_object_and_names_the_new_one(
    module: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if module != "utils.config":  # still a package, which warns at each access
        monkeypatch.delitem(sys.modules, module, raising=False)
    found: dict[str, object] = {}
    with pytest.warns(DeprecationWarning, match=rf"{module}.* is deprecated: .*\b{name}\b") as caught:
        exec(f"from {module} import {name}", found)
    assert found[name] is getattr(workbench, name)
    assert {warning.filename for warning in caught} == {"<string>"}  # the line that has to change


def test_other_names_cannot_be_imported() -> None:
    with pytest.raises(ImportError, match="cannot import name 'Confog'"):
        exec("from utils.config import Confog")
    assert importlib.import_module("utils.config.loader")
    assert not hasattr(sys.modules["utils.config"], "anything")


@pytest.mark.usefixtures("warm_processes")
def test_the_author_of_a_callback_sees_the_warning_once(
    tmp_path: Path, train_command: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["from utils.callbacks import Callback", "from utils.config import Config", "class Old(Callback): ..."]
    (tmp_path / "old.py").write_text("\n".join(lines))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = subprocess.run(train_command("--callbacks", "old:Old"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    warned = [line.removeprefix(f"{tmp_path}/") for line in done.stderr.splitlines() if "Deprecat" in line]
    assert warned == [
        "old.py:1: DeprecationWarning: utils.callbacks is deprecated: from workbench import Callback, TrainingRun",
        "old.py:2: DeprecationWarning: utils.config.Config is deprecated: from workbench import Config",
    ]
