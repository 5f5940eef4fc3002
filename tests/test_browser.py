"""The pages of Aim and TensorBoard, opened in headless Chromium, show three runs that train.py has trained.

Screenshots of the pages are saved below the test's tmp_path, or in the folder that WORKBENCH_SCREENSHOTS names.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import PAGE_MS, ROOT, TINY_FLAGS
from playwright.sync_api import Browser, Locator, Page, Route, expect

from utils.runs.log import read_records
from utils.runs.run import read_record

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("browser"),  # with --dist loadgroup the runs and servers are made once
]

LEARNING_RATES = {"low": "0.0003", "middle": "0.001", "high": "0.003"}
LEARNING_RATE = "hparams.optimizer.learning_rate"
VAL_LOSS = 'loss subset="val"'
TRAIN_THREE = "import json, sys, train; sys.exit(max(train.main(argv) for argv in json.loads(sys.argv[1])))"

Shot = Callable[[str], None]


@dataclass(frozen=True)
class TinyRun:
    """A run directory, and the values that the pages must show for it."""

    path: Path
    learning_rate: str

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def record(self) -> dict[str, Any]:
        return read_record(self.path)

    @property
    def val_loss(self) -> float:
        return float(self.record["summary"]["val/loss"])

    @property
    def samples(self) -> list[str]:
        """The sample texts of all evaluations, with white space collapsed as on a page."""
        return [_one_line(record["text"]) for record in read_records(self.path / "logs" / "samples.jsonl")]

    @property
    def aim_page(self) -> str:
        return f"/runs/{self.record['views']['aim']['hash']}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Holds runs/ and .aim/."""
    return tmp_path_factory.mktemp("browser")


@pytest.fixture(scope="module")
def runs(folder: Path) -> list[TinyRun]:
    """Three completed runs in the order of their learning rates, trained by a process that renders their pictures."""
    text = "".join(f"line {i}: the quick brown fox jumps over {i * i % 97} lazy dogs.\n" for i in range(100))
    (folder / "tiny.txt").write_text(text, encoding="utf-8")
    places = {
        "--dataset": str(folder / "tiny.txt"),
        "--corpora-dir": str(folder / "corpora"),
        "--runs-dir": str(folder / "runs"),
        "--aim-repo": str(folder),
        "--sample-tokens": "40",
    }
    flags = [word for pair in (TINY_FLAGS | places).items() for word in pair]
    commands = [
        [*flags, "--aim-logging", "--run-tag", tag, "--learning-rate", rate] for tag, rate in LEARNING_RATES.items()
    ]
    process = [sys.executable, "-c", TRAIN_THREE, json.dumps(commands)]
    subprocess.run(process, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    paths = {path.name.rpartition("_")[2]: path for path in (folder / "runs").iterdir()}
    return [TinyRun(paths[tag], rate) for tag, rate in LEARNING_RATES.items()]


@contextmanager
def _server(program: str, *words: str) -> Iterator[str]:
    """Run a web server of the environment within the context, and yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [str(Path(sys.executable).parent / program), *words, "--host", "127.0.0.1", "--port", port]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(command, start_new_session=True, **quiet)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_for(url, server)
        yield url
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=30)


def _wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    """Wait until the server answers, or fail if its process ends."""
    for _ in range(300):
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            assert server.poll() is None, f"the server ended with status {server.returncode}"
            try:
                server.wait(timeout=0.2)
            except subprocess.TimeoutExpired:
                continue
    raise AssertionError(f"{url} does not answer")


@pytest.fixture(scope="module")
def aim_url(runs: list[TinyRun], folder: Path) -> Iterator[str]:
    with _server("aim", "up", "--repo", str(folder)) as url:
        yield url


@pytest.fixture(scope="module")
def tensorboard_url(runs: list[TinyRun], folder: Path) -> Iterator[str]:
    with _server("tensorboard", "--logdir", str(folder / "runs")) as url:
        yield url


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page in a fresh context that reaches this machine only: Aim's pages load news and a Python interpreter."""

    def local_only(route: Route) -> None:
        if route.request.url.startswith(("http://127.0.0.1:", "data:", "blob:")):
            route.continue_()
        else:
            route.abort()

    context = browser.new_context(viewport={"width": 1500, "height": 900})
    context.set_default_timeout(PAGE_MS)
    context.route("**/*", local_only)
    context.add_init_script("localStorage.setItem('communityPopupSeen', 'true')")  # the popup would cover the table
    yield context.new_page()
    context.close()


@pytest.fixture
def shot(page: Page, tmp_path: Path) -> Shot:
    """Saves a screenshot of the page under a name."""
    pictures = Path(os.environ.get("WORKBENCH_SCREENSHOTS", tmp_path))
    pictures.mkdir(parents=True, exist_ok=True)

    def keep(name: str) -> None:
        page.screenshot(path=pictures / f"{name}.png", animations="disabled")

    return keep


def _one_line(text: str) -> str:
    return " ".join(text.split())


# Aim


def _choose(page: Page, button: str, *names: str) -> None:
    """Choose sequences or parameters by name in an explorer of Aim, and search."""
    page.get_by_role("button", name=button).first.click()
    for name in names:
        page.locator("input:focus").fill(name)  # only the entries in view of the long list are rendered
        page.locator("[role=option]").filter(has=page.get_by_text(name, exact=True)).last.click()
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Search").first.click()


def _query(page: Page, words: str) -> None:
    """Replace the query of Aim's search line, and search."""
    page.locator(".monaco-editor").first.click()
    page.keyboard.press("ControlOrMeta+A")
    page.keyboard.type(words)
    page.keyboard.press("Enter")


def _aim_row(page: Page, number: int) -> list[str]:
    """The cells of a row of Aim's table, the newest run being row 0."""
    return [text for text in page.locator(f".Table__cell.index-{number}").all_inner_texts() if text]


def _drawn(lines: Locator) -> bool:
    """Whether each of these SVG paths has points."""
    return all(len(line.get_attribute("d") or "") > 10 for line in lines.all())


def test_aim_runs_has_status_and_hyperparameters(runs: list[TinyRun], aim_url: str, page: Page, shot: Shot) -> None:
    page.goto(f"{aim_url}/runs")
    page.get_by_role("button", name="Manage Columns").click()
    page.get_by_text("Hide All").click()
    for name in (VAL_LOSS, LEARNING_RATE, "status"):
        column = page.locator(".ColumnItem").filter(has=page.get_by_text(name, exact=True))
        column.locator(".ColumnItem__toggle").click()
    page.keyboard.press("Escape")
    expect(page.locator(".Table__cell").get_by_text('"completed"')).to_have_count(3)
    shot("aim_runs")
    rows = {name: cells for name, *cells in (_aim_row(page, number) for number in range(3))}
    assert rows.keys() == {run.id for run in runs}
    for run in runs:
        loss, learning_rate, status = rows[run.id][-3:]
        assert (float(loss), learning_rate, status) == (
            pytest.approx(run.val_loss, abs=1e-6),
            run.learning_rate,
            '"completed"',
        )

    _query(page, f'run.status == "completed" and run.{LEARNING_RATE} > 0.002')
    expect(page.locator(".Table__cell").get_by_text('"completed"')).to_have_count(1)
    shot("aim_runs_query")
    assert _aim_row(page, 0)[0] == runs[-1].id
    _query(page, 'run.status == "crashed"')
    expect(page.get_by_text("No Results")).to_be_visible()


def test_aim_metrics_groups_curves_by_learning_rate(runs: list[TinyRun], aim_url: str, page: Page, shot: Shot) -> None:
    page.goto(f"{aim_url}/metrics")
    _choose(page, "Metrics", VAL_LOSS)
    lines = page.locator("path.Line")
    expect(lines).to_have_count(3)
    expect(page.get_by_text("Processing...")).to_be_hidden()
    assert _drawn(lines)
    page.locator("i.icon-coloring").click()
    page.get_by_placeholder("Select fields").fill("learning_rate")
    page.get_by_text(f"run.{LEARNING_RATE}").click()
    page.keyboard.press("Escape")  # closes the list
    page.keyboard.press("Escape")  # closes the panel around it
    expect(page.get_by_text("Group by color")).to_be_hidden()
    for run in runs:  # the groups, in the table below the chart
        expect(page.get_by_text(run.learning_rate, exact=True).first).to_be_visible()
    assert len({line.get_attribute("stroke") or line.get_attribute("style") for line in lines.all()}) == 3
    shot("aim_metrics")


def test_aim_params_has_an_axis_for_learning_rate_and_loss(
    runs: list[TinyRun], aim_url: str, page: Page, shot: Shot
) -> None:
    page.goto(f"{aim_url}/params")
    _choose(page, "Run Params", LEARNING_RATE, VAL_LOSS)
    lines = page.locator("path.Line")
    expect(lines).to_have_count(3)
    expect(page.get_by_text("Processing...")).to_be_hidden()
    labels = page.locator(".xAxisLabel")
    expect(labels).to_have_count(2)
    assert [_one_line(label) for label in labels.all_inner_texts()] == [LEARNING_RATE, VAL_LOSS]
    assert _drawn(lines)
    ticks = [float(text) for text in page.locator("svg .tick > text").all_text_contents()]
    assert any(tick == pytest.approx(0.003) for tick in ticks)
    losses = [run.val_loss for run in runs]
    assert any(min(losses) <= tick <= max(losses) for tick in ticks)
    shot("aim_params")


def test_aim_shows_distributions_of_a_run(runs: list[TinyRun], aim_url: str, page: Page, shot: Shot) -> None:
    page.goto(f"{aim_url}{runs[0].aim_page}/distributions")
    page.get_by_text("blocks.0.attention.qkv.weight", exact=True).click()
    for kind in ("params", "grads"):
        expect(page.get_by_text(f'kind="{kind}"').and_(page.locator(":visible"))).to_have_count(1)
    expect(page.get_by_text("Step 0")).to_be_visible()
    bars = page.locator(".highcharts-histogram-series rect.highcharts-point")
    expect(bars).to_have_count(64)
    assert sum(float(bar.get_attribute("height") or 0) > 0 for bar in bars.all()) > 5
    shot("aim_distributions")


def test_aim_shows_sample_texts(runs: list[TinyRun], aim_url: str, page: Page, shot: Shot) -> None:
    page.goto(f"{aim_url}{runs[0].aim_page}/texts")
    cells = page.locator("pre")
    expect(cells).to_have_count(3)  # one per evaluation
    assert sorted(map(_one_line, cells.all_inner_texts())) == sorted(runs[0].samples)
    shot("aim_run_texts")
    page.goto(f"{aim_url}/text")
    _choose(page, "Texts", "sample")
    for run in runs:  # the page shows the first step
        expect(page.get_by_text(f'"{run.id}"')).to_be_visible()
        expect(page.get_by_text(run.samples[0]).first).to_be_visible()
    shot("aim_texts")


def test_aim_shows_pictures_of_the_curves(runs: list[TinyRun], aim_url: str, page: Page, shot: Shot) -> None:
    page.goto(f"{aim_url}/images")
    _choose(page, "Images", "curves")
    pictures = page.locator(".ImageBox__imageWrapper-item img")
    expect(pictures).to_have_count(3)
    for picture in pictures.all():
        assert picture.evaluate("image => image.naturalWidth") == 960
    for run in runs:
        expect(page.get_by_text(run.id, exact=True).first).to_be_visible()
    shot("aim_images")


# TensorBoard: its dashboards are in shadow roots, which Playwright's selectors pierce.


def test_tensorboard_scalars_draws_one_curve_per_run(
    runs: list[TinyRun], tensorboard_url: str, page: Page, shot: Shot
) -> None:
    page.goto(f"{tensorboard_url}/#scalars&tagFilter=loss")
    for run in runs:
        expect(page.locator("tf-multi-checkbox").get_by_text(run.id)).to_be_visible()
    for tag in ("train/eval_loss", "train/loss", "val/loss"):
        expect(page.locator("tf-card-heading").get_by_text(f"tag: {tag}", exact=True).first).to_be_attached()
    lines = page.locator("tf-scalar-card vz-line-chart2 path.line[d^=M]")
    expect(lines.nth(2)).to_be_attached()
    expect(page.locator("tf-scalar-card vz-line-chart2 .tick-label").get_by_text("6", exact=True).first).to_be_visible()
    shot("tensorboard_scalars")


def test_tensorboard_shows_histograms(runs: list[TinyRun], tensorboard_url: str, page: Page, shot: Shot) -> None:
    page.goto(f"{tensorboard_url}/#histograms&tagFilter=qkv.weight")
    for kind in ("params", "grads"):
        heading = page.locator("tf-card-heading").get_by_text(f"tag: {kind}/blocks.0.attention.qkv.weight")
        expect(heading).to_have_count(3)
    outlines = page.locator("vz-histogram-timeseries path.outline[d^=M]")
    expect(outlines.nth(5)).to_be_attached()  # three runs, two steps
    assert _drawn(outlines)
    shot("tensorboard_histograms")


def test_tensorboard_texts_describe_the_runs(runs: list[TinyRun], tensorboard_url: str, page: Page, shot: Shot) -> None:
    page.goto(f"{tensorboard_url}/#text")
    headings = page.locator("button.heading")
    rows = page.locator("tf-text-loader tr tr")  # of our tables, which are inside one of TensorBoard's
    settings = rows.filter(has_text="optimizer.learning_rate")
    expect(settings).to_have_count(3)
    shown = sorted(text.split()[1:] for text in settings.all_inner_texts())  # value, and default if it differs
    assert shown == sorted([run.learning_rate, *["0.001"][: run.learning_rate != "0.001"]] for run in runs)
    shot("tensorboard_text_config")

    for name in ("config", "git", "model"):  # closes the first two and opens the third
        headings.filter(has_text=name).click()
    expect(rows.filter(has_text="blocks.0.attention.qkv.weight").first).to_contain_text("48 x 16")
    shot("tensorboard_text_model")

    headings.filter(has_text="model").click()
    headings.filter(has_text="sample").click()
    texts = page.locator("tf-text-loader pre")
    expect(texts).to_have_count(9)
    shown = sorted(_one_line(text) for text in texts.all_inner_texts())
    assert shown == sorted(sample for run in runs for sample in run.samples)
    shot("tensorboard_text_sample")


def test_tensorboard_hparams_compares_the_sessions(
    runs: list[TinyRun], tensorboard_url: str, page: Page, shot: Shot
) -> None:
    page.goto(f"{tensorboard_url}/#hparams")
    cells = page.locator("tf-hparams-table-view vaadin-grid-cell-content:visible")
    for run in runs:
        expect(cells.get_by_text(run.id)).to_be_visible()
    shot("tensorboard_hparams")
    texts = [text.strip() for text in cells.all_inner_texts()]
    for name in ("optimizer.learning_rate", "tracking.run_tag", "val/loss"):  # visible without a click
        assert name in texts
    for run in runs:
        row = texts[texts.index(run.id) :][:8]
        assert run.id.rpartition("_")[2] in row
        assert float(run.learning_rate) in [float(text) for text in row if text.replace(".", "").isdigit()]
        assert f"{run.val_loss:#.5g}" in row
    expect(page.get_by_text("Number of matching session groups: 3")).to_be_attached()
    page.locator("paper-checkbox").get_by_text("Success", exact=True).click()
    expect(page.get_by_text("Number of matching session groups: 0")).to_be_attached()
    shot("tensorboard_hparams_status")


def test_tensorboard_custom_scalars_has_our_layout(
    runs: list[TinyRun], tensorboard_url: str, page: Page, shot: Shot
) -> None:
    page.goto(f"{tensorboard_url}/#custom_scalars")
    cards = page.locator("tf-custom-scalar-multi-line-chart-card")
    for title, curves in (("train and val", 6), ("every step and val", 6), ("tokens per second", 3)):
        card = cards.filter(has_text=title).first
        expect(card.get_by_text(f"Matches ({curves})")).to_be_visible()
        expect(card.locator("path.line[d^=M]").nth(curves - 1)).to_be_attached()
    card = cards.filter(has_text="train and val").first
    card.locator(".toggle-matches-button").click()
    curves = [f"{tag} ({run.id})" for run in runs for tag in ("train/eval_loss", "val/loss")]
    for curve in curves:
        expect(card.locator(".match-list-entry").filter(has_text=curve)).to_be_visible()
    shot("tensorboard_custom_scalars")
