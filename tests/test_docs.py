"""Every command of README.md and docs/ is executed, in a copy of the project with a tiny configuration.

docs/development.md lists what happens to a block of each language, and the comments that change it. The blocks of a
page run in order in one copy, so a later block sees the runs of an earlier one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from warm_python import WarmPython

from utils.config.loader import ConfigLoader

SLOW = (
    "README.md",
    "docs/api.md",
    "docs/comparing.md",
    "docs/evaluating.md",
    "docs/exporting.md",
    "docs/generating.md",
    "docs/performance.md",
    "docs/resume.md",
    "docs/tracking.md",
)
NOT_RUN = ("docs/LOG.md", "docs/index.md")  # a log of what was run; README.md once more
PAGES = [
    name
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    if (name := path.relative_to(ROOT).as_posix()) not in NOT_RUN
]
LANGUAGES = ("bash", "console", "python", "yaml", "json", "text")
TINY = {
    "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "ngram_rows": []},
    "optimizer": {"warmup_iters": 2},
    "train": {"max_iters": 51, "batch_size": 4, "eval_interval": 25, "eval_iters": 2, "threads": 1},
    "tracking": {"histogram_interval": 25, "sample_tokens": 8, "aim_logging": False},
}
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"  # of Tiny Shakespeare
SECONDS = 900  # for one block, on a busy machine

# A tenth of the steps is trained, if there are 50 or more; TINY has a tenth of the default, too.
STEPS = re.compile(r"(--(?:max-iters|stop-at-step|eval-interval|profile-step|steps) (?:\d{2,}|[5-9]))0\b")

MARKER = re.compile(r"<!-- docs: (skip|help) because (.+) -->|<!-- docs: (file) (\S+) -->")
RUN_ID = r"\d{8}_\d{6}_[\w.-]+?"


@dataclass(frozen=True)
class Block:
    """A fenced block; marker: skip, help, file or empty; detail: its reason or file name."""

    line: int
    language: str
    text: str
    marker: str = ""
    detail: str = ""


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page, with the marker of the line before each."""
    found, lines = [], text.splitlines()
    i = 0
    while i < len(lines):
        if lines[i].startswith("```"):
            start, language = i, lines[i][3:]
            while lines[i := i + 1] != "```":
                pass
            marker = MARKER.fullmatch(lines[start - 1]) if start else None
            kind, reason, file, name = marker.groups() if marker else (None, None, None, None)
            body = "\n".join(lines[start + 1 : i]) + "\n"
            found.append(Block(start + 1, language, body, kind or file or "", reason or name or ""))
        i += 1
    return found


def commands(block: Block) -> list[tuple[str, list[str]]]:
    """The commands of a bash or console block, each with the output that is shown below it."""
    if block.language == "bash":
        return [(block.text, [])]
    found: list[tuple[str, list[str]]] = []
    for line in block.text.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        elif line.startswith("> ") and not found[-1][1]:
            found[-1] = (found[-1][0] + "\n" + line[2:], [])
        else:
            found[-1][1].append(line)
    return found


@dataclass(frozen=True)
class Project:
    """A copy of the project in `path`, whose scripts run with the Python of the tests."""

    path: Path

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(self.path / ".venv" / "bin"), os.environ["PATH"]])
        env = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "WANDB_DIR": str(self.path)}
        env.pop("WORKBENCH_DATA", None)
        return subprocess.run(
            ["bash", "-euo", "pipefail", "-c", STEPS.sub(r"\1", command)],
            cwd=self.path,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
        )


def shrink(folder: Path) -> None:
    """Gives the files of configs/ and the presets tiny values; what else they set stays."""
    for path in folder.rglob("*.yaml"):
        sections = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        if not isinstance(sections, dict):  # cleaning.yaml, a list of steps
            continue
        for name, values in TINY.items():
            if path.parent == folder and path.stem == name:
                sections.setdefault(name, {}).update(values)
            elif name in sections:
                sections[name].update({key: value for key, value in values.items() if key in sections[name]})
        sections.get("train", {}).pop("compile", None)
        path.write_text(yaml.safe_dump(sections, sort_keys=False), encoding="utf-8")


def shakespeare() -> bytes:
    """Stands for Tiny Shakespeare: short, with its dollar sign, which pydocs lacks."""
    return b"".join(b"First Citizen: we have %d $ and no corn; speak, speak.\n" % i for i in range(200))


@pytest.fixture
def project(tmp_path: Path, warm_python: WarmPython) -> Project:
    """The files that git tracks, with tiny settings, committed in a repository of their own."""
    path = tmp_path / "project"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.split("\0"):
        if name and (ROOT / name).is_file():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, path / name)
    shrink(path / "configs")
    (path / "corpora").mkdir(exist_ok=True)
    (path / "corpora" / "tinyshakespeare.txt").write_bytes(shakespeare())
    for source in [*path.glob("*.py"), *path.glob("utils/**/*.py")]:
        text = source.read_text(encoding="utf-8")
        if SHAKESPEARE_SHA256 in text:
            digest = hashlib.sha256(shakespeare()).hexdigest()
            source.write_text(text.replace(SHAKESPEARE_SHA256, digest), encoding="utf-8")
    (path / ".venv").mkdir()  # `make` finds everything installed
    for entry in Path(sys.prefix).iterdir():
        (path / ".venv" / entry.name).symlink_to(warm_python.bin if entry.name == "bin" else entry)
    for name in (".installed", ".installed-dev", ".installed-bench"):
        (path / ".venv" / name).unlink(missing_ok=True)
        (path / ".venv" / name).touch()
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "a copy"]):
        subprocess.run([*git, *words], cwd=path, check=True)
    return Project(path)


def check_commands(block: Block, project: Project) -> None:
    """Runs a bash or console block; raises AssertionError if a command does not do what the page says."""
    for command, shown in commands(block):
        if block.marker == "help":
            for line in command.splitlines():
                done = project.run(re.sub(r"^make\b", "make -n", line) if line.startswith("make") else f"{line} --help")
                assert done.returncode == 0, f"{line}\n{done.stdout}"
            continue
        done = project.run(command)
        errors = [line for line in shown if line.startswith("error: ")]
        assert done.returncode == (2 if errors else 0), f"{command}\n{done.stdout}"
        printed = " ".join(done.stdout.split())
        for error in errors:  # in words, whatever the id of the run and the size of the vocabulary are
            pattern = re.escape(" ".join(error.split())).replace(r"20261121_071807_long", RUN_ID)
            assert re.search(re.sub(r"\d+\\ characters", r"\\d+\\ characters", pattern), printed), done.stdout


def check(block: Block, project: Project) -> None:
    """Does with a block what its language and marker ask for."""
    if block.marker == "file":
        (project.path / block.detail).write_text(block.text, encoding="utf-8")
    elif block.marker == "skip" or block.language == "text":
        pass
    elif block.language in ("bash", "console"):
        check_commands(block, project)
    elif block.language == "python":
        script = project.path / "page_example.py"
        script.write_text(block.text, encoding="utf-8")
        done = project.run(f"python {script.name}")
        script.unlink()
        assert done.returncode == 0, done.stdout
    elif block.language == "yaml":
        file = project.path.parent / "page_example.yaml"
        file.write_text(block.text, encoding="utf-8")
        load(file)
    elif block.language == "json":
        for line in block.text.splitlines():
            json.loads(line)


def load(file: Path) -> Any:
    """Raises ConfigError if the file is no valid configuration."""
    return ConfigLoader(ROOT).load_only(file)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_one_that_is_checked(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = blocks(text)
    for block in found:
        assert block.language in LANGUAGES or re.fullmatch(r"diff recipe=\w+", block.language), f"{page}:{block.line}"
        if block.language == "python":
            assert not re.search(r"^\s*(from|import) utils", block.text, re.MULTILINE), "import from workbench"
    assert text.count("<!-- docs:") == sum(bool(block.marker) for block in found) + text.count("`<!-- docs:")
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert not re.search(r"^    \S", outside, flags=re.MULTILINE), "an indented block is not run: use a fenced one"


def test_the_readme_stays_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 180


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.xdist_group(page), *([pytest.mark.slow] if page in SLOW else [])])
        for page in PAGES
    ],
)
def test_what_a_page_shows_works(page: str, project: Project) -> None:
    for block in blocks((ROOT / page).read_text(encoding="utf-8")):
        try:
            check(block, project)
        except Exception as error:
            error.add_note(f"the block at {page}:{block.line}")
            raise


def test_a_page_that_is_wrong_is_noticed(project: Project) -> None:
    """The runner itself: a failing command, a wrong error message, a setting that does not exist."""
    for language, text in (
        ("bash", "python train.py --no-such-flag 3"),
        ("console", "$ python train.py --batch-sise 3\nerror: unknown flag --batch-sise; did you mean --block-size?"),
        ("console", "$ python train.py --help\nerror: no help today"),
        ("python", "raise SystemExit(1)"),
        ("yaml", "no_such_setting: 1"),
        ("json", "{1: 2}"),
    ):
        with pytest.raises(Exception, match=r".*"):
            check(Block(1, language, text + "\n"), project)
