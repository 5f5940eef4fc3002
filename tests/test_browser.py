"""Aim's own web interface, in headless Chromium, over runs that train.py has made."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

import train

CHROMIUM = "/usr/bin/chromium"
CHROMIUM_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
PAGE_MS = 30_000


@pytest.fixture
def two_runs(tiny_argv: Callable[..., list[str]], runs_dir: Path) -> list[str]:
    """Ids of two tiny runs with different learning rates, fed to an Aim repository in tmp_path."""
    for tag, learning_rate in (("slow", "0.001"), ("fast", "0.01")):
        assert train.main(tiny_argv("--aim-logging", "--run-tag", tag, "--learning-rate", learning_rate)) == 0
    return sorted(path.name for path in runs_dir.iterdir())


@pytest.fixture
def aim_url(two_runs: list[str], tmp_path: Path) -> Iterator[str]:
    """The address of `aim up` over those runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "aim"), "up", "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen([*command, "--repo", str(tmp_path)], start_new_session=True, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_for(url, server)
        yield url
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=30)


def _wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    """Connect until the server answers; its process ends if it cannot."""
    for _ in range(300):
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            assert server.poll() is None, f"aim up ended with status {server.returncode}"
            try:
                server.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                continue
    raise AssertionError(f"{url} does not answer")


@pytest.fixture
def page() -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        page = browser.new_page(viewport={"width": 1500, "height": 900})
        page.set_default_timeout(PAGE_MS)
        expect.set_options(timeout=PAGE_MS)
        yield page
        browser.close()


def test_aim_lists_both_runs_and_charts_their_loss(
    two_runs: list[str], aim_url: str, page: Page, tmp_path: Path
) -> None:
    page.goto(f"{aim_url}/runs")
    for run_id in two_runs:
        expect(page.get_by_text(run_id, exact=True)).to_be_visible()
    page.screenshot(path=tmp_path / "aim_runs.png")

    page.goto(f"{aim_url}/metrics")
    page.get_by_role("button", name="Metrics").first.click()
    page.get_by_text(re.compile(r"^loss subset=.train.$")).click()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Search").first.click()
    lines = page.locator("path.Line")
    expect(lines).to_have_count(2)  # one for each run
    expect(page.get_by_text("Processing...")).to_be_hidden()
    assert all(lines.nth(i).get_attribute("d") for i in range(2))
    page.locator("i.icon-coloring").click()
    page.get_by_placeholder("Select fields").fill("learning_rate")
    page.get_by_text("run.hparams.optimizer.learning_rate").click()
    page.keyboard.press("Escape")
    for value in ("0.001", "0.01"):  # the groups, in the table below the chart
        expect(page.get_by_text(value, exact=True).first).to_be_visible()
    page.screenshot(path=tmp_path / "aim_metrics.png")
