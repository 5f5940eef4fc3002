"""Does bisect find planted causes, with real training?

    python -m benchmarks.bisect                # about ten minutes on 2 CPU cores

A commit: a copy of this checkout gets 16 commits; one of them changes the initialisation of the residual projections,
the others only comments. Two settings: of ten that differ, a schedule and the step at which its decay ends do harm only
together. A decay over the whole run is fine, and a constant learning rate has no decay that could end after one step.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import git

from benchmarks import common
from utils.terminal.cli import PROJECT_ROOT, Parser, script
from utils.terminal.console import Terminal
from utils.terminal.words import duration

COMMITS = 16
PLANTED = ("0.02 / math.sqrt(2 * model.config.n_layer)", "0.05 / math.sqrt(2 * model.config.n_layer)")
SMALL = {  # trains in about a second
    **{"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "batch_size": 4, "max_iters": 60},
    **{"eval_interval": 60, "eval_iters": 4, "checkpoint_interval": 0, "histogram_interval": 0},
    **{"sample_tokens": 0, "aim_logging": "false", "threads": 1},
    **{"learning_rate": 0.03, "min_lr": 1e-5, "warmup_iters": 0, "schedule": "constant"},
}
PAIR = {"schedule": "linear", "lr_decay_iters": 1}
HARMLESS = {
    **{"beta2": 0.98, "grad_clip": 0.9, "mlp": "relu2", "norm": "rmsnorm", "weight_decay": 0.05},
    **{"beta1": 0.92, "n_head": 1, "batch_size": 5},
}


@script
def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m benchmarks.bisect", description=__doc__)
    parser.add_argument(
        "--seeds", type=int, default=3, metavar="N", help="seeds of the trials of two settings (default: 3)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="chooses the planted commit (default: 0)")
    args = parser.parse(argv)
    common.at_least(1, seeds=args.seeds)
    terminal = Terminal()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        planted = random.Random(args.seed).randrange(1, COMMITS + 1)
        project = commits(folder / "project", planted)
        found = bisect(project, folder, [f"HEAD~{COMMITS}", "HEAD", "--oracle=bits"], SMALL)
        good = str(found["commit"]).endswith(f" change {planted}")
        report(terminal, f"commit: {found['commit']}", found, good)
        bad = settings_text({**PAIR, **HARMLESS})
        found = bisect(project, folder, ["HEAD", bad, "--oracle=loss", f"--seeds={args.seeds}"], SMALL)
        pair = {*found["settings"]} == {*PAIR}
        report(terminal, f"settings: {', '.join(found['settings']) or found['problem']}", found, pair)
    terminal.print(f"machine: {common.machine_facts()}")
    return 0 if good and pair else 1


def commits(project: Path, planted: int) -> Path:
    """A copy of this checkout with COMMITS more commits; number `planted` changes how the model is initialised."""
    repo = git.Repo.clone_from(str(PROJECT_ROOT), project)
    with repo.config_writer() as config:
        config.set_value("user", "name", "benchmark")
        config.set_value("user", "email", "benchmark@localhost")
    model = project / "model.py"
    for number in range(1, COMMITS + 1):
        code = model.read_text()
        if number == planted:
            assert PLANTED[0] in code
            code = code.replace(*PLANTED)
        model.write_text(f"{code}# change {number}\n")
        repo.git.commit("-qam", f"change {number}")
    repo.close()
    return project


def bisect(project: Path, folder: Path, words: Sequence[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of experiments.py bisect in the copy, and the seconds that it took."""
    began = time.monotonic()
    command = [sys.executable, "experiments.py", "bisect", *words, f"--set={settings_text(settings)}", "--json"]
    done = subprocess.run(
        [*command, f"--runs-dir={folder / 'runs'}"], cwd=project, stdout=subprocess.PIPE, text=True, check=False
    )
    return {**json.loads(done.stdout), "wall": time.monotonic() - began}


def settings_text(settings: Mapping[str, Any]) -> str:
    return ",".join(f"{key}={value}" for key, value in settings.items())


def report(terminal: Terminal, words: str, found: Mapping[str, Any], good: bool) -> None:
    cost = f"{found['trials']} variants, {found['trained']} trainings, {duration(found['wall'])}"
    terminal.print(f"{words}: {cost}: {common.verdict(good)}")


if __name__ == "__main__":
    sys.exit(main())
