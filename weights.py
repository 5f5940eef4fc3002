"""Weights: look into files of weights, compare them, and turn those of other programs into runs.

python weights.py inspect baseline
python weights.py diff baseline wider
python weights.py convert out/ckpt.pt --out runs/from_nanogpt
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from utils.terminal.cli import Parser, script
from utils.terminal.commands import Answer, Commands, flag

COMMANDS = Commands()
command = COMMANDS.declare
WEIGHTS = flag("weights", metavar="WEIGHTS", help="RUN, a file or folder of safetensors, or hf:NAME")


@script
def main(argv: Sequence[str]) -> int:
    return COMMANDS.run(Parser(prog="weights.py", description=__doc__), argv)


# ------------------------------------------------------------------------------------------------- looking at weights


@command("inspect", "modules, shapes, types and sizes of weights", WEIGHTS)
def inspect(args: argparse.Namespace) -> Answer:
    raise NotImplementedError


if __name__ == "__main__":
    sys.exit(main())
