"""A server process with two tiny runs, one for all tests."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

from tests.tiny_export import save_tiny_run

TEMPLATE = "Q: {question} a: "


@contextlib.contextmanager
def serving(runs_dir: Path, *words: str, **environment: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Start a server on a free port; yields its address and its process."""
    command = [sys.executable, str(ROOT / "serve.py"), *words, "--runs-dir", str(runs_dir), "--port", "0"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env={**os.environ, **environment}, **pipes) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            assert "http://" in line, server.stderr and server.stderr.read()
            yield line.split()[1].rstrip("/"), server
        finally:
            server.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(timeout=30)
            server.kill()


@pytest.fixture(scope="session")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    save_tiny_run(folder, "20260131_142501_first", block_size=64)
    save_tiny_run(folder, "20260131_142502_second", block_size=64, n_layer=1)
    return folder


@pytest.fixture(scope="session")
def url(runs_dir: Path) -> Iterator[str]:
    """The address of a server of the runs first and second, with a template for questions."""
    flags = ("--qa-template", TEMPLATE, "--qa-stop", "?", "--slots", "4", "--queue", "8")
    with serving(runs_dir, "first", "second", *flags) as (address, _):
        yield address
