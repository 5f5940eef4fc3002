"""Generate text from a run's export, streamed to the terminal.

python inference.py baseline --prompt "The "
python inference.py latest --max-new-tokens 500 --temperature 0.7 --top-k 40 --seed 1
python inference.py runs/20260131_142501_baseline --temperature 0     # greedy
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.cli import PROJECT_ROOT, Parser, script
from utils.config_loader import ConfigLoader
from utils.errors import UserError
from utils.run_manager import find_export


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run",
        metavar="RUN",
        nargs="?",
        help="path, id, tag, part of an id, or latest (default: the newest with an export)",
    )
    parser.add_argument(
        "--prompt", default="", metavar="TEXT", help="text to continue; empty: start from a line break (default: empty)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=300, metavar="N", help="tokens to generate (default: 300)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.8, metavar="X", help="below 1 sharper, 0 greedy (default: 0.8)"
    )
    parser.add_argument("--top-k", type=int, metavar="N", help="draw among the N most likely tokens (default: all)")
    parser.add_argument(
        "--top-p",
        type=float,
        metavar="X",
        help="draw among the most likely tokens that reach probability X (default: all)",
    )
    parser.add_argument("--seed", type=int, default=1337, metavar="N", help="of the random stream (default: 1337)")
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps (default: auto)"
    )
    parser.add_argument("--runs-dir", type=Path, metavar="DIR", help="folder of the runs (default: as configured)")


@script
def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="inference.py", usage="python inference.py [RUN] [--FLAG VALUE ...]", description=__doc__)
    add_arguments(parser)
    args = parser.parse(argv)
    if args.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens must be at least 1, not {args.max_new_tokens}")
    if not 0 <= args.seed < 2**63:
        raise UserError(f"--seed must be a whole number from 0 to 2^63 - 1, not {args.seed}")
    runs_dir = PROJECT_ROOT / (args.runs_dir or ConfigLoader(PROJECT_ROOT).load().config.tracking.runs_dir)
    export = find_export(args.run, runs_dir)

    from utils.device import choose_device
    from utils.export import load_export
    from utils.generation import SamplingOptions, generate_tokens, start_tokens

    options = SamplingOptions(args.temperature, args.top_k, args.top_p)
    loaded = load_export(export, choose_device(args.device))
    prompt = start_tokens(loaded.tokenizer, args.prompt)
    if len(prompt) > (block_size := loaded.model.config.block_size):
        print(f"note: of the {len(prompt)} tokens of the prompt the model sees the last {block_size}", file=sys.stderr)
    sys.stdout.write(args.prompt)
    for token in generate_tokens(loaded.model, prompt, args.max_new_tokens, options, args.seed):
        sys.stdout.write(loaded.tokenizer.decode([token]))
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
