"""Weights: look into files of weights, compare them, and turn those of other programs into runs.

python weights.py inspect baseline
python weights.py diff baseline:best wider
python weights.py convert out/ckpt.pt --out from_nanogpt

WEIGHTS is a run (its export, or else its newest checkpoint; RUN:latest, RUN:best or RUN:STEP is a checkpoint), a file,
a folder of safetensors, or hf:NAME, a folder or a model in the cache of the Hugging Face hub.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import UserError
from utils.files import expand_home
from utils.formats.stored import Stored, find_weights, read_stored
from utils.terminal.cli import PROJECT_ROOT, Parser, place, script
from utils.terminal.commands import Answer, Commands, flag
from utils.terminal.words import printable

if TYPE_CHECKING:
    from utils.training.adopt import Adopted

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


# ------------------------------------------------------------------------------------------- from and to other programs


@command(
    "convert",
    "turn a model of nanoGPT, MyPT, llm.c or llama2.c into a run",
    flag("old", metavar="OLD", type=place, help="ckpt.pt, a folder of MyPT, or a .bin of llm.c or llama2.c"),
    flag("--out", metavar="RUN", required=True, help="name of the run in the folder of runs, or a path"),
    flag("--tokenizer", metavar="KIND", help="char, byte, gpt2 or hf:PATH, or a tokenizer.json of a run"),
    flag("--dataset", metavar="NAME", help="what it was trained on: then --resume goes on, with its optimizer state"),
    note="Nothing of a pickle is run: what would need that is refused.",
)
def convert(args: argparse.Namespace) -> Answer:
    target = new_run(args.out, args)
    from utils.formats.convert import read_foreign
    from utils.training.adopt import adopt

    done = adopt(
        read_foreign(args.old),
        target,
        PROJECT_ROOT,
        sys.argv,
        tokenizer=args.tokenizer,
        dataset=args.dataset,
        warn=warn,
    )
    return Answer(done, lambda console: converted_lines(done, args.out))


def new_run(name: str, args: argparse.Namespace) -> Path:
    """The directory of a run that does not exist yet: a name in the folder of runs, or a path."""
    path = Path(expand_home(name))
    if not path.name or path.name in (".", ".."):
        raise UserError(f"--out {name}: expected the name of a new run")
    path = Path(os.path.abspath(path if path.parent != Path() or os.path.isabs(name) else runs_dir(args) / path))
    if os.path.lexists(path):
        raise UserError(f"--out {name}: {path} exists already")
    return path


def converted_lines(done: Adopted, name: str) -> Iterator[str]:
    """What convert prints: what the run has, what was left out, and how to go on."""
    yield f"{done.run}: {done.program}, step {done.step:,}, {done.parameters:,} parameters, tokenizer {done.tokenizer}"
    yield from (f"note: {line}" for line in done.notes)
    yield f"generate: python inference.py {name} --prompt TEXT"
    if done.resumes:
        yield f"go on, with the state of its optimizer: python train.py --resume {name}"
    elif done.optimizer:
        command = f"python train.py --fork --resume {name} --dataset TEXT --max-iters N"
        yield f"go on, with the state of its optimizer: {command}"
    yield f"fine-tune: python train.py --init-from {name} --dataset TEXT and the settings of its model"


def warn(message: str) -> None:
    """Print one line on stderr."""
    print(printable(f"warning: {message}"), file=sys.stderr)


def named_weights(text: str, args: argparse.Namespace) -> Stored:
    """The weights that a word on the command line names, by their headers."""
    return read_stored(text, find_weights(text, lambda: runs_dir(args)))


def runs_dir(args: argparse.Namespace) -> Path:
    """The folder of the runs: --runs-dir, or as configured."""
    from utils.experiments.commands import runs_folder

    return runs_folder(args)


if __name__ == "__main__":
    sys.exit(main())
