"""Imports that the documentation of earlier releases shows work for one more release, with a warning."""

from __future__ import annotations

import importlib
import sys

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
    if module != "utils.config":  # a package in use, which warns at each access
        monkeypatch.delitem(sys.modules, module, raising=False)
    found: dict[str, object] = {}
    with pytest.warns(DeprecationWarning, match=rf"{module}.* is deprecated: .*\b{name}\b") as caught:
        exec(f"from {module} import {name}", found)
    assert found[name] is getattr(workbench, name)
    assert {warning.filename for warning in caught} == {"<string>"}  # the line that has to change


def test_other_names_are_not_there() -> None:
    with pytest.raises(ImportError, match="cannot import name 'Confog'"):
        exec("from utils.config import Confog")
    assert importlib.import_module("utils.config.loader")
    assert not hasattr(sys.modules["utils.config"], "anything")
