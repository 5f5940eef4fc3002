"""Weights: look into files of weights, compare them, and turn those of other programs into runs.

python weights.py inspect baseline
python weights.py diff baseline:best wider
python weights.py convert out/ckpt.pt --out from_nanogpt

WEIGHTS is a run (its export, or else its newest checkpoint; RUN:latest, RUN:best or RUN:STEP is a checkpoint), a file,
a folder of safetensors, or hf:NAME, a folder or a model in the cache of the Hugging Face hub.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from utils.formats.stored import Stored, find_weights, read_stored
from utils.terminal.cli import Parser, script
from utils.terminal.commands import Answer, Commands, flag

COMMANDS = Commands()
command = COMMANDS.declare


@script
def main(argv: Sequence[str]) -> int:
    return COMMANDS.run(Parser(prog="weights.py", description=__doc__), argv)


# ------------------------------------------------------------------------------------------------- looking at weights


@command(
    "inspect",
    "the tensors of weights: modules, shapes, types and sizes, from the headers alone",
    flag("weights", metavar="WEIGHTS", help="run, file, folder or hf:NAME"),
    flag("--stats", action="store_true", help="read the numbers, too: norm, largest, zeros, and what is not finite"),
)
def inspect(args: argparse.Namespace) -> Answer:
    from utils.formats import inspection

    stored = named_weights(args.weights, args)
    stats = None
    if args.stats:
        from utils.formats.numbers import statistics

        stats = statistics(stored)
    return Answer(inspection.as_json(stored, stats), lambda console: inspection.screen(stored, stats))


@command(
    "diff",
    "how two sets of weights differ: by layer, by tensor, and what only one has",
    flag("a", metavar="A", help="weights, as for inspect"),
    flag("b", metavar="B", help="weights, as for inspect"),
    flag("--all", action="store_true", help="show each tensor that differs"),
    note="relative: the norm of the difference over the norm of A. A part of a tensor is read at a time.",
)
def diff(args: argparse.Namespace) -> Answer:
    from utils.formats.difference_screen import screen
    from utils.formats.numbers import difference

    found = difference(named_weights(args.a, args), named_weights(args.b, args))
    return Answer(found.as_json(), lambda console: screen(found, args.all))


def named_weights(text: str, args: argparse.Namespace) -> Stored:
    """The weights that a word on the command line names, by their headers."""
    return read_stored(text, find_weights(text, lambda: runs_dir(args)))


def runs_dir(args: argparse.Namespace) -> Path:
    """The folder of the runs: --runs-dir, or as configured."""
    from utils.experiments.commands import runs_folder

    return runs_folder(args)


if __name__ == "__main__":
    sys.exit(main())
