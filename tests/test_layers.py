"""Each package imports only from those below it, and modules that work without torch never import it."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

ORDER = (  # from the bottom up: the packages of utils/, and the scripts and modules beside it
    *("errors", "locks", "crc32", "files", "folders", "config", "tokenization", "tokenizer.py"),
    *("machine", "checkpoints", "nn", "terminal", "web", "runs", "corpora", "packing", "preparation"),
    *("model.py", "data.py", "tracking", "optim", "inference"),
    *("formats", "evaluation", "training", "profiling", "experiments", "sweeps", "pages", "serving"),
    *("inference.py", "evaluate.py", "train.py", "profile_model.py", "prepare.py", "weights.py"),
    *("experiments.py", "sweep.py", "serve.py", "workbench.py"),
)
OLD_NAMES = ("callbacks", "generator", "run_log", "sampling")  # modules that re-export names until the next release
WITHOUT_TORCH = (
    *("errors", "locks", "crc32", "files", "folders", "config", "terminal"),
    *("web", "runs", "corpora", "experiments", "pages"),
    *("checkpoints.folder", "checkpoints.header", "checkpoints.index"),
    *("machine.process", "machine.signals", "machine.watchdog"),
    *("formats.stored", "formats.foreign_files", "formats.weight_index", "formats.c_files", "formats.inspection"),
    *("training.early_stopping", "training.launch", "training.notify", "training.result"),
    *(
        "sweeps.space",
        "sweeps.sampling",
        "sweeps.pruning",
        "sweeps.population",
        "sweeps.folder",
        "sweeps.study",
        "sweeps.results",
    ),
    *("sweeps.trial", "sweeps.driver", "sweeps.table", "sweeps.start", "sweeps.multirun"),
    *(
        "inference.flags",
        "serving.flags",
        "profiling.record",
        "profiling.tables",
        "profiling.picture",
        "profiling.operators",
    ),
    *("inference.py", "evaluate.py", "train.py", "profile_model.py", "prepare.py", "weights.py"),
    *("experiments.py", "sweep.py", "serve.py", "workbench.py"),
)
HEAVY = {"torch", "numpy", "aim", "tensorboard", "safetensors"}


def name_of(module: str) -> str:
    """utils.runs.log -> runs.log, model -> model.py; a module of another project keeps its name."""
    if module.startswith("utils."):
        return module.removeprefix("utils.")
    return f"{module}.py" if (ROOT / f"{module}.py").is_file() else module


def place(name: str) -> str:
    """The entry of ORDER that a module belongs to: runs.log -> runs."""
    return name if name.endswith(".py") else name.split(".")[0]


SOURCES = {
    name_of(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")): path
    for path in [*ROOT.glob("*.py"), *ROOT.glob("utils/*/*.py"), *ROOT.glob("utils/*.py")]
    if path != ROOT / "utils" / "__init__.py"
}
NAMES = sorted(name for name in SOURCES if name not in OLD_NAMES)


def imports(name: str) -> set[str]:
    """The modules that a module imports anywhere, including in functions and for type checking."""
    found = set()
    for node in ast.walk(ast.parse(SOURCES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {name_of(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import"
            assert node.module
            modules = {f"{node.module}.{alias.name}" for alias in node.names} & {f"utils.{known}" for known in SOURCES}
            found |= {name_of(module) for module in modules or {node.module}}
    return found


def works_without_torch(name: str) -> bool:
    return any(name == listed or name.startswith(f"{listed}.") for listed in WITHOUT_TORCH)


@pytest.mark.parametrize("name", NAMES)
def test_a_module_imports_only_from_its_own_package_and_those_below(name: str) -> None:
    assert place(name) in ORDER, "give it a place in ORDER and in docs/architecture.md"
    for imported in map(place, imports(name)):
        assert imported not in (*OLD_NAMES, "tests", "benchmarks", "examples"), f"{name} imports {imported}"
        if imported in ORDER:
            assert ORDER.index(imported) <= ORDER.index(place(name)), f"{name} imports {imported}"


@pytest.mark.parametrize("name", [name for name in NAMES if works_without_torch(name) and not name.endswith(".py")])
def test_a_module_without_torch_does_not_mention_it(name: str) -> None:
    assert not HEAVY & {imported.split(".")[0] for imported in imports(name)}


def test_modules_that_work_without_torch_can_be_imported_without_it() -> None:
    modules = [n.removesuffix(".py") if n.endswith(".py") else f"utils.{n}" for n in NAMES if works_without_torch(n)]
    code = "import importlib, sys; sys.modules.update(torch=None, numpy=None, aim=None, tensorboard=None)\n"
    code += f"for name in {modules!r}: importlib.import_module(name)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_all_modules_and_imports_are_found() -> None:
    """The rules above would hold trivially if the files were not found."""
    assert {"config.settings", "training.step", "tracking.aim", "tracking", "model.py", "train.py"} <= set(NAMES)
    assert set(ORDER) == {place(name) for name in NAMES}
    assert "config.settings" in imports("optim.groups")
    assert {"torch", "nn.linear"} <= imports("model.py")
    assert "inference" in {place(imported) for imported in imports("inference.py")}
