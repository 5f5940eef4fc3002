"""How fast are the pages of runs?

python -m benchmarks.pages                             # 1,000 runs of 2,000 logged steps, about three minutes
python -m benchmarks.pages --runs 100 --repeats 3

One small run is trained; the others are copies of it with other ids, seeds and learning rates; one more has a million
records. Each repeat starts a new server, so that nothing is in its memory. Besides the elapsed time, the table has the
processor time of the server, which other work on the machine changes less.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlencode

import psutil
from rich.table import Table

from benchmarks import common
from benchmarks.experiments import make_runs
from utils.runs.layout import METRICS_LOG, RECORD
from utils.terminal.cli import PROJECT_ROOT, Parser, script
from utils.terminal.console import Terminal

CHROMIUM = "/usr/bin/chromium"
CURVES = 50
LONG_RUN = "20991231_000000_long"  # sorts as the newest
LIMITS = {  # seconds
    "table: first answer": 1.0,
    "table in Chromium": 2.0,
    "50 curves": 0.5,
    "a run of a million points": 1.0,
    "table: what has changed": 0.1,
    "50 curves: what was added": 0.1,
}


@dataclass
class Measured:
    """seconds: elapsed; processor: processor seconds of the server; bytes: the size of the answer."""

    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)


class Server:
    """A running `experiments.py ui`."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.url = url
        self._process = psutil.Process(process.pid)

    def processor(self) -> float:
        times = self._process.cpu_times()
        return times.user + times.system

    def get(self, path: str, *pairs: tuple[str, str | int]) -> bytes:
        with urllib.request.urlopen(f"{self.url}runs/{path}?{urlencode(pairs)}", timeout=120) as answer:
            content: bytes = answer.read()
        return content


@script
def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m benchmarks.pages", description=__doc__)
    parser.add_argument("--runs", type=int, default=1000, metavar="N", help="run directories (default: 1000)")
    parser.add_argument("--steps", type=int, default=2000, metavar="N", help="logged steps of each (default: 2000)")
    parser.add_argument(
        "--points", type=int, default=1_000_000, metavar="N", help="points of the long run (default: 1000000)"
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="repeats of each measurement (default: 5)")
    common.add_config_flag(parser)
    args = parser.parse(argv)
    common.at_least(2, runs=args.runs)
    common.at_least(1, steps=args.steps, points=args.points, repeats=args.repeats)
    terminal = Terminal()
    results = {name: Measured() for name in LIMITS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ids = make_runs(folder, args.runs, args.steps, args.config)
        for _ in range(args.repeats if Path(CHROMIUM).exists() else 0):
            with served(folder / "runs") as server:
                measure_page(server, results["table in Chromium"])
        make_long_run(folder / "runs", ids[0], args.points)
        for _ in range(args.repeats):
            with served(folder / "runs") as server:
                measure(server, folder / "runs", ids[:CURVES], results)
    table = Table(title=f"{args.runs:,} runs of {args.steps:,} logged steps", title_justify="left", title_style="bold")
    table.add_column("request", style="cyan", no_wrap=True)
    for header in ("median s", "slowest s", "processor s", "limit s", "bytes", ""):
        table.add_column(header, justify="right")
    for key, found in results.items():
        if found.seconds:
            median = statistics.median(found.seconds)
            cells = (median, max(found.seconds), statistics.median(found.processor), LIMITS[key])
            size = f"{max(found.bytes):,}" if found.bytes else ""
            table.add_row(key, *(f"{cell:.2f}" for cell in cells), size, common.verdict(median <= LIMITS[key]))
    load = " ".join(f"{one:.1f}" for one in psutil.getloadavg())
    terminal.print(table, f"{args.repeats} repeats; load of the machine {load}", f"machine: {common.machine_facts()}")
    return 0


def make_long_run(runs_dir: Path, template: str, points: int) -> None:
    """A run with a record for each of `points` steps."""
    path = runs_dir / LONG_RUN
    source = runs_dir / template
    (path / METRICS_LOG).parent.mkdir(parents=True)
    record = json.loads((source / RECORD).read_text())
    (path / RECORD).write_text(json.dumps({**record, "id": LONG_RUN, "last_step": points}))
    line = (source / METRICS_LOG).read_text().splitlines()[-2]
    facts = {key: value for key, value in json.loads(line).items() if key not in ("step", "time", "train/loss")}
    rest = json.dumps(facts, separators=(",", ":"))[1:]
    with (path / METRICS_LOG).open("w", encoding="utf-8") as log:
        for step in range(points):
            loss = 2.0 + step * 7919 % 1000 / 1000
            log.write(f'{{"step":{step},"time":{1.76e9 + step / 100:.2f},"train/loss":{loss},{rest}\n')


@contextlib.contextmanager
def served(runs_dir: Path) -> Iterator[Server]:
    """A new server of these runs, once it answers."""
    command = [sys.executable, str(PROJECT_ROOT / "experiments.py"), "ui", "--port", "0", "--runs-dir", str(runs_dir)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        line = process.stdout.readline()
        server = Server(process, line.split(": ", 1)[1].split()[0])
        server.get("static/common.js")
        yield server
    finally:
        process.terminate()
        process.wait(timeout=30)


def measure(server: Server, runs_dir: Path, ids: Sequence[str], results: dict[str, Measured]) -> None:
    """Request the table and curves, then the changes after one of these runs has gained a record."""
    table = timed(server, results["table: first answer"], "runs")
    runs = [("run", name) for name in ids]
    curves = timed(server, results["50 curves"], "curves", ("metric", "train/loss"), ("points", 4000), *runs)
    timed(server, results["a run of a million points"], "curves", ("metric", "train/loss"), ("run", LONG_RUN))
    log = runs_dir / ids[0] / METRICS_LOG
    last = json.loads(log.read_text().splitlines()[-1])
    with log.open("a") as file:
        file.write(json.dumps({**last, "train/loss": 2.5}) + "\n")
    time.sleep(0.6)  # for half a second the table is taken from memory
    timed(server, results["table: what has changed"], "runs", ("since", json.loads(table)["version"]))
    known = [("known", f"{curve['cursor']}:{curve['run']}") for curve in json.loads(curves)["curves"]]
    timed(server, results["50 curves: what was added"], "curves", ("metric", "train/loss"), *runs, *known)


def timed(server: Server, found: Measured, path: str, *pairs: tuple[str, str | int]) -> bytes:
    """The answer to a request, whose cost is added to `found`."""
    computed, began = server.processor(), time.perf_counter()
    answer = server.get(f"api/{path}", *pairs)
    found.seconds.append(time.perf_counter() - began)
    found.processor.append(server.processor() - computed)
    found.bytes.append(len(answer))
    return answer


def measure_page(server: Server, found: Measured) -> None:
    """Open the table in a new Chromium: from the request until the rows and the curves are drawn."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        sizes: list[int] = []
        page.on("requestfinished", lambda asked: sizes.append(asked.sizes()["responseBodySize"]))
        computed, began = server.processor(), time.perf_counter()
        page.goto(f"{server.url}runs")
        page.wait_for_selector("body[data-ready]", timeout=120_000)
        found.seconds.append(time.perf_counter() - began)
        found.processor.append(server.processor() - computed)
        found.bytes.append(sum(sizes))
        browser.close()


if __name__ == "__main__":
    sys.exit(main())
