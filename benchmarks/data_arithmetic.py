"""Does the arithmetic preset learn addition and subtraction in minutes? Exact match on all held-out problems.

python -m benchmarks.data_arithmetic
python -m benchmarks.data_arithmetic --digits 3 --steps 4000 --problems 60000
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from benchmarks.common import at_least, load_config, machine_facts, verdict
from utils.errors import UserError
from utils.terminal.cli import PROJECT_ROOT, Parser, numbers, script
from utils.terminal.console import Terminal

PRESET = PROJECT_ROOT / "configs" / "presets" / "arithmetic.yaml"
LEAST, MOST_SECONDS, MOST_PARAMETERS = 0.99, 600, 1_000_000


@script
def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m benchmarks.data_arithmetic", description=__doc__)
    parser.add_argument("--seeds", default="1337", metavar="A,B", help="seeds of the runs (default: 1337)")
    parser.add_argument("--digits", type=int, default=2, metavar="N", help="most digits of an operand (default: 2)")
    parser.add_argument("--steps", type=int, default=500, metavar="N", help="steps of a run (default: 500)")
    parser.add_argument(
        "--problems", type=int, default=20_000, metavar="N", help="problems in the dataset (default: 20000)"
    )
    args = parser.parse(argv)
    at_least(1, steps=args.steps, digits=args.digits)
    terminal = Terminal()
    table = Table(title=f"Addition and subtraction, {args.digits} digits", title_justify="left", title_style="bold")
    for header in ("seed", "parameters", "steps", "seconds", f"held-out problems right (at least {LEAST:.0%})"):
        table.add_column(header, justify="right")
    for seed in numbers(args.seeds, "--seeds", int, 0):
        with tempfile.TemporaryDirectory() as folder:
            table.add_row(f"{seed}", *measured(Path(folder), args.digits, args.steps, args.problems, seed))
    terminal.print(table, f"machine: {machine_facts()}")
    return 0


def measured(folder: Path, digits: int, steps: int, problems: int, seed: int) -> tuple[str, ...]:
    """Train the preset and ask all held-out problems; the cells of a row.

    Raises:
        UserError: the run did not complete.
        KeyboardInterrupt: the run was interrupted.
    """
    import torch

    from train import train
    from utils.corpora.arithmetic import problem_set
    from utils.evaluation.arithmetic import answer_problems
    from utils.evaluation.weights import load_trained

    overrides: dict[str, str | bool] = {
        "arithmetic_digits": str(digits),
        "arithmetic_problems": str(problems),
        "block_size": str(3 * digits + 5),  # end of text, two operands, + and =, an answer with its sign
        "max_iters": str(steps),
        "seed": str(seed),
        "aim_logging": False,
    }
    loaded = load_config([PRESET], folder, overrides)
    result = train(loaded, quiet=True)
    if result.status == "interrupted":
        raise KeyboardInterrupt
    if result.status != "completed":
        raise UserError(f"the run ended as {result.status}: {result.exit_reason}")
    settings = loaded.config.arithmetic
    trained = load_trained(str(result.run_dir), folder, torch.device("cpu"))
    answers = answer_problems(trained, settings, problem_set(settings).held_out)
    share = sum(answer.right for answer in answers) / len(answers)
    return (
        f"{result.parameters:,} {verdict(result.parameters <= MOST_PARAMETERS)}",
        f"{steps:,}",
        f"{result.seconds:.0f} {verdict(result.seconds <= MOST_SECONDS)}",
        f"{share:.2%} of {len(answers):,} {verdict(share >= LEAST)}",
    )


if __name__ == "__main__":
    sys.exit(main())
