"""Every command of README.md and docs/ is executed, in a copy of the project with a tiny configuration.

docs/development.md lists what happens to a block of each language, and the comments that change it. The blocks of a
page run in order in one copy, so a later block sees the runs of an earlier one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
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
    "docs/callbacks.md",
    "docs/comparing.md",
    "docs/configuration.md",
    "docs/data.md",
    "docs/deploying.md",
    "docs/evaluating.md",
    "docs/exporting.md",
    "docs/gate.md",
    "docs/generating.md",
    "docs/installing.md",
    "docs/performance.md",
    "docs/pretrained.md",
    "docs/ranks.md",
    "docs/resume.md",
    "docs/security.md",
    "docs/serving.md",
    "docs/sweeps.md",
    "docs/tracking.md",
    "docs/weights.md",
)
NOT_RUN = ("docs/LOG.md", "docs/index.md")  # a log of past runs; a copy of README.md
PAGES = [
    name
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    if (name := path.relative_to(ROOT).as_posix()) not in NOT_RUN
]
LANGUAGES = ("bash", "console", "python", "yaml", "json", "text")
TINY = {
    "model": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "ngram_rows": []},
    "optimizer": {"warmup_iters": 2},
    "train": {
        "max_iters": 51,
        "batch_size": 4,
        "eval_interval": 25,
        "eval_iters": 2,
        "threads": 1,
        "gradient_accumulation_steps": 1,
    },
    "tracking": {"histogram_interval": 25, "sample_tokens": 8, "aim_logging": False},
}
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"  # of Tiny Shakespeare
SECONDS = 900  # for one block, on a busy machine

# Numbers of steps from 50 on are divided by ten, as TINY does with the default.
STEPS = re.compile(
    r"((?:--(?:max-iters|stop-at-step|eval-interval|profile-step|steps|min-steps) |max_iters=|max_iters: )"
    r"(?:\d{2,}|[5-9]))0\b"
)
SMALLER = ((STEPS, r"\1"), (re.compile(r"(--trials \d)\d+"), r"\1"), (re.compile(r"(--budget \d+)m"), r"\1s"))
DEFAULT_PORTS = {"python serve.py": 8000, "tensorboard": 6006, "aim up": 43800}
PORT = re.compile(r"(127\.0\.0\.1:|--port )(\d+)")

MARKER = re.compile(
    r"<!-- docs: (?:(help) because|(file|first|with|then|read|type|status)) (.+) -->|<!-- docs: (serves) -->"
)
RUN_ID = r"\d{8}_\d{6}_[\w.-]+?"


@dataclass(frozen=True)
class Block:
    """A fenced block; `marks` are the markers in the comments before it, as (kind, words)."""

    line: int
    language: str
    text: str
    marks: tuple[tuple[str, str], ...] = ()

    def marked(self, kind: str) -> list[str]:
        return [words for name, words in self.marks if name == kind]


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page, with the markers on the lines before each."""
    found, lines = [], text.splitlines()
    marks: list[tuple[str, str]] = []
    i = 0
    while i < len(lines):
        if lines[i].startswith("```"):
            start, language = i, lines[i][3:]
            while lines[i := i + 1] != "```":
                pass
            body = "\n".join(lines[start + 1 : i]) + "\n"
            found.append(Block(start + 1, language, body, tuple(marks)))
        if marker := MARKER.fullmatch(lines[i]):
            because, kind, words, alone = marker.groups()
            marks.append((because or kind or alone, words or ""))
        else:
            marks = []
        i += 1
    return found


def commands(block: Block) -> list[tuple[str, list[str]]]:
    """The commands of a bash or console block, each with the output that is shown below it."""
    if block.language == "bash":
        apart = block.marked("help") or block.marked("serves") or block.marked("status")
        texts = re.sub(r" *\\\n *", " ", block.text).splitlines() if apart else [block.text]
        return [(text, []) for text in texts]
    found: list[tuple[str, list[str]]] = []
    for line in block.text.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        elif line.startswith("> ") and not found[-1][1]:
            found[-1] = (found[-1][0] + "\n" + line[2:], [])
        else:
            found[-1][1].append(line)
    return found


def smaller(text: str) -> str:
    """Return a command or a file of a page with fewer steps and trials."""
    for pattern, replacement in SMALLER:
        text = pattern.sub(replacement, text)
    return text


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass(frozen=True)
class Project:
    """A copy of the project in `path`, whose scripts run with the Python of the tests."""

    path: Path
    ports: dict[str, int] = field(default_factory=dict)  # port of the page -> free port
    servers: list[subprocess.Popen[str]] = field(default_factory=list)

    def here(self, text: str) -> str:
        """Return a command or script of a page with free ports."""
        return PORT.sub(lambda found: found[1] + str(self.ports.setdefault(found[2], free_port())), text)

    def start(self, command: str, **options: Any) -> subprocess.Popen[str]:
        path = os.pathsep.join([str(self.path / ".venv" / "bin"), os.environ["PATH"]])
        env = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "WANDB_DIR": str(self.path), "WARM_CHILDREN": "1"}
        env |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(self.path.parent / "hub")}
        env.pop("WORKBENCH_DATA", None)
        return subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", smaller(self.here(command))],
            cwd=self.path,
            env=env,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            **options,
        )

    def run(self, command: str, typed: str = "") -> subprocess.CompletedProcess[str]:
        with self.start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            try:
                printed, _ = process.communicate(typed, timeout=SECONDS)
            except BaseException:
                end(process, signal.SIGKILL)
                raise
        return subprocess.CompletedProcess(command, process.returncode, printed)

    def serve(self, command: str) -> None:
        """Start a server, which runs until the page ends; raises AssertionError if its port does not answer."""
        if not PORT.search(command):
            command += next(f" --port {port}" for program, port in DEFAULT_PORTS.items() if command.startswith(program))
        log = self.path.parent / f"server{len(self.servers)}.txt"
        with log.open("w") as file:
            server = self.start(command, stdin=subprocess.DEVNULL, stdout=file)
        port = int(PORT.findall(self.here(command))[-1][1])
        deadline = time.monotonic() + SECONDS
        try:
            while not answers(port):
                waits = server.poll() is None and time.monotonic() < deadline
                assert waits, f"{command}\n{log.read_text()}"
                time.sleep(0.05)
        except BaseException:
            end(server, signal.SIGKILL)
            server.wait()
            raise
        self.servers.append(server)

    def close(self) -> None:
        """End the servers as Ctrl-C does; raises AssertionError if one ended earlier, or ends with another status."""
        before = [server.poll() for server in self.servers]
        for server in self.servers:
            end(server, signal.SIGINT)
        try:
            after = [server.wait(SECONDS) for server in self.servers]
        finally:
            for server in self.servers:
                end(server, signal.SIGKILL)
        assert not any(status is not None for status in before), before
        assert all(status in (0, 1, 130, -signal.SIGINT) for status in after), after  # 1: click's status after Ctrl-C


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def end(process: subprocess.Popen[str], signum: signal.Signals) -> None:
    """Signal all processes that a command has started; those of `warm_python` end with their clients."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signum)


def shrink(folder: Path) -> None:
    """Give the files of configs/ and the presets tiny values; their other settings stay."""
    for path in folder.rglob("*.yaml"):
        sections = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        if not isinstance(sections, dict):  # cleaning.yaml, a list of steps
            continue
        for name, values in TINY.items():
            if path.parent == folder and path.stem == name:
                sections.setdefault(name, {}).update(values)
            elif name in sections:
                sections[name].update({key: value for key, value in values.items() if key in sections[name]})
        for name in ("compile", "epochs"):
            sections.get("train", {}).pop(name, None)
        path.write_text(yaml.safe_dump(sections, sort_keys=False), encoding="utf-8")


def shakespeare() -> bytes:
    """A short stand-in for Tiny Shakespeare, with its dollar sign, which pydocs lacks."""
    return b"".join(b"ROMEO: we have %d $ and no corn; speak, First Citizen.\n" % i for i in range(200))


@pytest.fixture(scope="session")
def tiny_project(tmp_path_factory: pytest.TempPathFactory, warm_python: WarmPython) -> Path:
    """The files that git tracks, with tiny settings, committed in a repository of their own."""
    path = tmp_path_factory.mktemp("docs") / "project"
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
    (path / ".venv" / "bin").mkdir(parents=True)  # `make` finds everything installed
    for entry in Path(sys.prefix).iterdir():
        if entry.name != "bin":
            (path / ".venv" / entry.name).symlink_to(entry)
    for entry in warm_python.bin.iterdir():
        if entry.name not in ("torchrun", "lm-workbench"):
            (path / ".venv" / "bin" / entry.name).symlink_to(entry)
    torchrun = path / ".venv" / "bin" / "torchrun"  # the first line of the installed one names another interpreter
    torchrun.write_text('#!/bin/sh\nexec python -m torch.distributed.run "$@"\n')
    torchrun.chmod(0o755)
    for name in (".installed", ".installed-dev", ".installed-bench"):
        (path / ".venv" / name).unlink(missing_ok=True)
        (path / ".venv" / name).touch()
    settings = {"user.name": "test", "user.email": "test@localhost", "commit.gpgsign": "false"}
    named = [["config", key, value] for key, value in settings.items()]
    for words in (["init", "-q"], *named, ["add", "-A"], ["commit", "-q", "-m", "a copy"]):
        subprocess.run(["git", *words], cwd=path, check=True)
    return path


@pytest.fixture
def project(tmp_path: Path, tiny_project: Path) -> Iterator[Project]:
    """A copy of the project for one page, whose servers end with it."""
    subprocess.run(["cp", "-Rp", tiny_project, tmp_path / "project"], check=True)
    project = Project(tmp_path / "project")
    try:
        yield project
    finally:
        project.close()


def check_commands(block: Block, project: Project) -> None:
    """Run a bash or console block; raises AssertionError if a command does not do what the page says."""
    statuses = [int(status) for words in block.marked("status") for status in words.split()]
    typed = "".join(f"{words}\n" for words in block.marked("type"))
    for command, shown in commands(block):
        if block.marked("help"):
            make = re.match(r"make\b", command)
            done = project.run(re.sub(r"^make\b", "make -n", command) if make else f"{command} --help")
            assert done.returncode == 0, f"{command}\n{done.stdout}"
            continue
        if block.marked("serves"):
            project.serve(command)
            continue
        done = project.run(command, typed)
        errors = [line for line in shown if line.startswith("error: ")]
        assert done.returncode in (statuses or [2 if errors else 0]), f"{command}\n{done.stdout}"
        printed = " ".join(done.stdout.split())
        for error in errors:  # with any run id and any vocabulary size
            pattern = re.escape(" ".join(error.split())).replace(r"20261121_071807_long", RUN_ID)
            assert re.search(re.sub(r"\d+\\ characters", r"\\d+\\ characters", pattern), printed), done.stdout


def check(block: Block, project: Project) -> None:
    """Run or parse a block, as its language and its markers require."""
    for command in block.marked("first"):
        check_commands(Block(block.line, "bash", command), project)
    for command in block.marked("with"):
        project.serve(command)
    check_block(block, project)
    for command in block.marked("then"):
        check_commands(Block(block.line, "bash", command), project)


def check_block(block: Block, project: Project) -> None:
    for words in block.marked("read"):
        shown, _, meant = words.partition(" as ")
        assert shown in block.text, words
        block = replace(block, text=block.text.replace(shown, meant))
    if block.marked("file"):
        (project.path / block.marked("file")[0]).write_text(smaller(block.text), encoding="utf-8")
    elif block.language == "text":
        pass
    elif block.language in ("bash", "console"):
        check_commands(block, project)
    elif block.language == "python":
        script = project.path / "page_example.py"
        script.write_text(project.here(block.text), encoding="utf-8")
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
    """Raises ConfigError if the file is not a valid configuration."""
    return ConfigLoader(ROOT).load_only(file)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_has_a_language_and_markers_that_are_checked(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = blocks(text)
    for block in found:
        assert block.language in LANGUAGES or re.fullmatch(r"diff recipe=\w+", block.language), f"{page}:{block.line}"
        if block.language == "python":
            assert not re.search(r"^\s*(from|import) utils", block.text, re.MULTILINE), "import from workbench"
    assert text.count("<!-- docs:") == sum(len(block.marks) for block in found) + text.count("`<!-- docs:")
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
def test_every_block_of_a_page_works(page: str, project: Project) -> None:
    for block in blocks((ROOT / page).read_text(encoding="utf-8")):
        try:
            check(block, project)
        except Exception as error:
            error.add_note(f"the block at {page}:{block.line}")
            raise


def test_a_wrong_block_is_noticed(project: Project) -> None:
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


def test_a_marker_that_fails_is_noticed(project: Project) -> None:
    for text, kind, words in (
        ("true", "first", "false"),
        ("true", "then", "false"),
        ("true", "with", "echo no server --port 8000"),
        ("echo no server --port 8000", "serves", ""),
        ("true", "read", "false as true"),
        ("true\nexit 3", "status", "0 1"),
        ("read -r line; test $line = yes", "type", "no"),
        ("python no_such_script.py", "help", "it takes long"),
    ):
        with pytest.raises(AssertionError):
            check(Block(1, "bash", text + "\n", ((kind, words),)), project)


def test_a_page_with_servers_leaves_none_behind(project: Project) -> None:
    """Each server gets its own port, and Ctrl-C at the end."""
    script = "from http.server import *; import sys; HTTPServer(('127.0.0.1', int(sys.argv[-1])), None).serve_forever()"
    project.serve(f'python -c "{script}" --port 8000')
    project.serve(f'python -c "{script}" --port 8001')
    first, second = project.ports.values()
    assert answers(first)
    assert answers(second)
    project.close()
    assert not answers(first)
    assert not answers(second)
    project.servers.clear()
