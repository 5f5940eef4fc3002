"""The packages in order: each imports only from those before it, and those without torch never import it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ORDER = [
    "",
    "errors files",
    "config",
    "tokenizer",
    "machine checkpoints",
    "nn",
    "terminal runs corpora",
    "model data tracking",
    "optim inference",
    "profiling training",
    "experiments",
    "callbacks generator run_log sampling",  # old names of modules, until the next release
    "",
][1:-1]  # from the bottom up; a line may import from itself and from the lines above it
FLOOR_OF = {place: floor for floor, places in enumerate(ORDER) for place in places.split()}
WITHOUT_TORCH = (
    *("errors", "files", "config", "terminal", "runs", "corpora", "experiments"),
    *("checkpoints.folder", "machine.process", "machine.signals", "training.early_stopping"),
    *("profiling.record", "profiling.tables", "profiling.picture", "profiling.operators"),
)
HEAVY = {"torch", "numpy", "aim", "tensorboard", "safetensors"}
SCRIPTS = ("train", "inference", "profile_model", "experiments", "workbench")
ABOVE = ("train", "profile_model", "workbench", "tests", "benchmarks")

SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__").removeprefix("utils."): path
    for path in [*ROOT.glob("*.py"), *ROOT.glob("utils/**/*.py")]
    if path.stem not in SCRIPTS or path.parent != ROOT
}
BELOW_SCRIPTS = sorted(name for name in SOURCES if name != "utils")


def imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere, in a function or for type checking too; those of utils without `utils.`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("utils.") for name in found}


def place(name: str) -> str:
    """The package or top-level file of a module: tracking.aim -> tracking."""
    return name.split(".")[0]


def knows_no_torch(name: str) -> bool:
    return any(name == quiet or name.startswith(f"{quiet}.") for quiet in WITHOUT_TORCH)


@pytest.mark.parametrize("name", BELOW_SCRIPTS)
def test_a_module_imports_only_from_its_own_floor_and_those_below(name: str) -> None:
    assert place(name) in FLOOR_OF, "give it a place in ORDER and in docs/architecture.md"
    for imported in imports(SOURCES[name]):
        if place(imported) in FLOOR_OF:
            assert FLOOR_OF[place(imported)] <= FLOOR_OF[place(name)], f"{name} imports {imported}"
        assert place(imported) not in ABOVE, f"{name} imports {imported}"


def test_packages_form_no_circle() -> None:
    uses = {p: set() for p in FLOOR_OF}
    for name in BELOW_SCRIPTS:
        uses[place(name)] |= {place(i) for i in imports(SOURCES[name])} & set(FLOOR_OF) - {place(name)}
    while leaves := [p for p, used in uses.items() if not used]:
        uses = {p: used - set(leaves) for p, used in uses.items() if p not in leaves}
    assert not uses, "each of these imports, by a way around, itself"


@pytest.mark.parametrize("name", [name for name in BELOW_SCRIPTS if knows_no_torch(name)])
def test_what_knows_no_torch_does_not_mention_it(name: str) -> None:
    assert not HEAVY & {place(imported) for imported in imports(SOURCES[name])}


def test_the_scripts_and_what_knows_no_torch_can_be_imported_where_torch_is_not() -> None:
    modules = [name if name in SCRIPTS else f"utils.{name}" for name in BELOW_SCRIPTS if knows_no_torch(name)]
    code = "import importlib, sys; sys.modules.update(torch=None, numpy=None, aim=None, tensorboard=None)\n"
    code += f"for name in {[*modules, *SCRIPTS]!r}: importlib.import_module(name)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


def test_the_whole_design_is_seen() -> None:
    """The rules above mean nothing if the files are not found."""
    assert {"config.settings", "training.step", "tracking.aim", "tracking", "model"} <= set(BELOW_SCRIPTS)
    assert "config.settings.OptimizerConfig" in imports(SOURCES["optim.groups"])
    assert "torch" in imports(SOURCES["model"])
