"""Only utils/runs/layout.py spells out the paths of a run directory."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from utils.runs import layout

ROOT = Path(__file__).resolve().parents[2]
PATHS = [value for value in vars(layout).values() if isinstance(value, Path)]
FILES = {path.name for path in PATHS if path.suffix} | {layout.LOCK.name}
FOLDERS = {path.name for path in PATHS} - FILES
SPELLED = re.compile(rf"(?:^|/)(?:{'|'.join(map(re.escape, FILES))})$|^/?(?:meta|logs|artifacts)/")
# Modules that spell out file names themselves: config/ and the completion of RUN are layers below runs/ and cannot
# import it; tokenization/, datasets and published models have a tokenizer.json of their own.
EXEMPT = (
    *("utils/runs/layout.py", "utils/checkpoints/folder.py", "utils/config/loader.py"),
    *("utils/tokenization/vocabularies.py", "utils/corpora/datasets.py"),
    *("utils/formats/hub.py", "utils/formats/pretrained.py", "utils/terminal/completion.py"),
)
SOURCES = [
    path
    for path in (*ROOT.glob("*.py"), *ROOT.glob("utils/**/*.py"), *ROOT.glob("benchmarks/**/*.py"))
    if path.relative_to(ROOT).as_posix() not in EXEMPT
]


def docstrings(tree: ast.AST) -> set[int]:
    """The ids of constants that are whole statements, like docstrings."""
    return {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def spelled_paths(source: str) -> list[str]:
    """The string literals that name a file or path in a run directory, or a folder of it that is joined to a path."""
    tree = ast.parse(source)
    prose = docstrings(tree)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            found += [node.value] if SPELLED.search(node.value) and " " not in node.value else []
        joined = node.right if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) else None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Path" and node.args:
            joined = node.args[0]
        if isinstance(joined, ast.Constant) and joined.value in FOLDERS:
            found.append(joined.value)
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_paths_of_a_run_directory_are_spelled_only_in_layout(path: Path) -> None:
    assert spelled_paths(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ('run / "logs" / name', ["logs"]),
        ('Path("artifacts", "export")', ["artifacts"]),
        ('path / "meta" / "env.txt"', ["env.txt", "meta"]),
        ('f"{run.name}/meta/full_config.json"', ["/meta/full_config.json"]),
        ('os.path.join(name, "run.json")', ["run.json"]),
        ('device("meta")', []),
        ('def f():\n    """Writes run.json."""', []),
        ('"an entry of models.json"', []),
    ],
)
def test_a_spelled_path_is_found(source: str, found: list[str]) -> None:
    assert sorted(spelled_paths(source)) == sorted(found)


def test_every_path_stays_inside_the_run_directory_and_has_one_name() -> None:
    assert len(set(PATHS)) == len(PATHS) > 20
    assert not any(path.is_absolute() or ".." in path.parts for path in PATHS)
    assert layout.fed_note("aim") == Path("logs", "fed_aim.json")
