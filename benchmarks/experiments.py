"""How fast does experiments.py answer over many runs?

python -m benchmarks.experiments                       # 1,000 runs of 2,000 logged steps, about two minutes
python -m benchmarks.experiments --runs 100 --repeats 3

One small run is trained; the others are copies of it with other ids, seeds and learning rates. Every command runs in
a new process, so that the start of the interpreter counts. The order of the commands rotates with each repeat.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from benchmarks import common
from utils.runs.layout import CHECKPOINTS, CONFIG, RECORD
from utils.terminal.cli import PROJECT_ROOT, Parser, script
from utils.terminal.console import Terminal
from utils.tracking.tensorboard import event_files

WHERE = "status = 'completed' and learning_rate > 1e-3"
GROUP_BY = "SELECT run, min(train_loss), avg(grad_norm), count(*) FROM metrics GROUP BY run ORDER BY 2 LIMIT 10"
LIMITS = {"list": 1.0, "list --where": 1.0, "diff": 0.7, "sql GROUP BY": 2.5}  # seconds
MEMORY_LIMIT = 500.0  # MB of resident memory, for every command
RATES = (3e-4, 1e-3, 3e-3)


@script
def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m benchmarks.experiments", description=__doc__)
    parser.add_argument("--runs", type=int, default=1000, metavar="N", help="run directories (default: 1000)")
    parser.add_argument("--steps", type=int, default=2000, metavar="N", help="logged steps of each (default: 2000)")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="repeats of each command (default: 7)")
    common.add_config_flag(parser)
    args = parser.parse(argv)
    common.at_least(2, runs=args.runs)
    common.at_least(1, steps=args.steps, repeats=args.repeats)
    terminal = Terminal()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ids = make_runs(folder, args.runs, args.steps, args.config)
        commands = {
            "list": ["list"],
            "list --where": ["list", "--where", WHERE, "--sort", "val_loss"],
            "diff": ["diff", ids[0], ids[1]],
            "sql GROUP BY": ["sql", GROUP_BY],
        }
        arms = {
            key: lambda words=words: measure([*words, "--runs-dir", str(folder / "runs")])
            for key, words in commands.items()
        }
        results = common.interleaved(arms, args.repeats)
        alone = statistics.median(duckdb_alone(folder / "runs") for _ in range(args.repeats))
    table = Table(title=f"{args.runs:,} runs of {args.steps:,} logged steps", title_justify="left", title_style="bold")
    table.add_column("command", style="cyan", no_wrap=True)
    for header in ("median s", "slowest s", "limit s", "memory MB", ""):
        table.add_column(header, justify="right")
    for key, measured in results.items():
        seconds, memory = zip(*measured, strict=True)
        reached = statistics.median(seconds) <= LIMITS[key] and max(memory) <= MEMORY_LIMIT
        cells = (statistics.median(seconds), max(seconds), LIMITS[key])
        table.add_row(key, *(f"{cell:.2f}" for cell in cells), f"{max(memory):.0f}", common.verdict(reached))
    terminal.print(
        table,
        f"DuckDB alone, the same GROUP BY: {alone:.2f} s; {args.repeats} repeats",
        f"machine: {common.machine_facts()}",
    )
    return 0


def make_runs(folder: Path, count: int, steps: int, files: Sequence[Path]) -> list[str]:
    """Make `count` run directories in `folder`/runs: a trained one, and copies with other seeds and learning rates."""
    import train

    sizes = {"n_layer": "1", "n_head": "1", "n_embd": "16", "block_size": "8", "batch_size": "2", "threads": "1"}
    rare = {"eval_interval": "250", "eval_iters": "1", "histogram_interval": "0", "sample_tokens": "0"}
    fixed: dict[str, str | bool] = {
        "aim_logging": False,
        "log_interval": "1",
        "checkpoint_interval": "0",
        "max_iters": str(steps),
    }
    template = train.train(common.load_config(files, folder, {**sizes, **rare, **fixed}), quiet=True).run_dir
    shutil.rmtree(template / CHECKPOINTS)
    for path in event_files(template):
        path.unlink()
    record = json.loads((template / RECORD).read_text())
    config = json.loads((template / CONFIG).read_text())
    for number in range(1, count):
        path = template.with_name(f"20260101_{number:06d}_copy")
        shutil.copytree(template, path)
        config["train"]["seed"], config["optimizer"]["learning_rate"] = number, RATES[number % len(RATES)]
        (path / CONFIG).write_text(json.dumps(config))
        loss = record["summary"]["best_val_loss"] + 0.001 * (number % 97)
        facts = {"id": path.name, "tag": "copy", "summary": {**record["summary"], "best_val_loss": loss}}
        (path / RECORD).write_text(json.dumps({**record, **facts}))
    return sorted(path.name for path in template.parent.iterdir())


def measure(words: Sequence[str]) -> tuple[float, float]:
    """Seconds and peak resident memory (MB) of `experiments.py` with these arguments.

    Raises:
        UserError: it fails.
    """
    done = common.launch([sys.executable, str(PROJECT_ROOT / "experiments.py"), *words], " ".join(words))
    return done.seconds, done.memory_mb


def duckdb_alone(runs_dir: Path) -> float:
    """Seconds that DuckDB alone takes for the same query over the same files, in this process."""
    import duckdb

    columns = "columns = {'train/loss': 'DOUBLE', 'grad_norm': 'DOUBLE'}, format = 'newline_delimited', filename = true"
    source = f"read_json('{runs_dir}/*/logs/metrics.jsonl', {columns})"
    query = f'SELECT filename, min("train/loss"), avg(grad_norm), count(*) FROM {source} GROUP BY filename'
    began = time.perf_counter()
    with duckdb.connect(":memory:") as connection:
        connection.execute(query).fetchall()
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
