# PYTHON_ARGCOMPLETE_OK
"""Weights: look into them, compare them, download them, and move them between runs and other programs.

python weights.py inspect baseline
python weights.py diff baseline:best wider
python weights.py convert out/ckpt.pt --out from_nanogpt
python weights.py download HuggingFaceTB/SmolLM2-135M --verify
python weights.py export baseline --format gguf
python weights.py certify runs/20260131_142501_baseline/artifacts/gguf

WEIGHTS is a run (its export, or else its newest checkpoint; RUN:latest, RUN:best or RUN:STEP is a checkpoint), a file,
a folder of safetensors, or hf:NAME, a folder or a model in the cache of the Hugging Face hub.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import UserError
from utils.files import expand_home
from utils.formats.stored import Stored, find_weights, read_stored
from utils.machine.signals import raise_on_signals
from utils.terminal.cli import PROJECT_ROOT, Parser, naming, place, script
from utils.terminal.commands import Answer, Commands, flag
from utils.terminal.words import counted, printable, size

if TYPE_CHECKING:
    from utils.training.adopt import Adopted

COMMANDS = Commands()
command = COMMANDS.declare
SHARD_SIZE = "5GB"
FORMATS = ("hf", "gguf", "onnx")


@script
def main(argv: Sequence[str]) -> int:
    with raise_on_signals():
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


@command(
    "export",
    "write the trained model of a run in the format of other programs",
    flag("run", metavar="RUN", help="a run (default weights: its export) or the folder of an export"),
    flag("--format", choices=FORMATS, required=True, help="hf: transformers; gguf: llama.cpp; onnx"),
    flag("--out", type=place, metavar="DIR", help="(default: RUN/artifacts/FORMAT)"),
    flag(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "q8_0"),
        default="float32",
        help="of the matrices; q8_0 (8 bits): gguf only, bfloat16: hf only (default: float32)",
    ),
    flag("--shard-size", metavar="SIZE", help=f"hf: largest file of weights (default: {SHARD_SIZE})"),
    flag("--license", metavar="NAME", help="for the model card: mit, apache-2.0, ..."),
)
def export(args: argparse.Namespace) -> Answer:
    from utils.experiments.prune import parse_size

    if args.shard_size is not None and args.format != "hf":
        raise UserError(f"--shard-size: the format {args.format} is not split into files; hf is")
    with naming("--shard-size"):
        if (shard_bytes := parse_size(args.shard_size or SHARD_SIZE)) < 1:
            raise UserError(f"expected a size above 0, got {args.shard_size!r}")
    from utils.formats.certificate import DisagreementError, certificate_lines
    from utils.formats.exports import export_as
    from utils.formats.source import default_place, open_source

    source = open_source(args.run, runs_dir(args))
    place = args.out or default_place(source, args.format)
    try:
        found = export_as(source, args.format, place, args.dtype, shard_bytes, args.license)
    except DisagreementError as error:
        lines = [*error.lines, "the export was not kept"]
        return Answer({"agrees": False, "differences": lines}, lambda console: lines, 1)
    words = f"{found['architecture']}, {size(found['bytes'])} in {args.dtype}, {counted(len(found['files']), 'file')}"
    lines = [str(found["folder"]), words, *found["notes"][1:], *certificate_lines(found["certificate"])]
    return Answer(found, lambda console: lines)


@command(
    "certify",
    "compare an export with what we compute, in the programs that it is made for",
    flag("folder", type=place, metavar="EXPORT", help="a folder that export wrote"),
    flag("--run", metavar="RUN", help="what it was made from (default: the run that it lies in)"),
    note="certificate.json in the folder has the details; export does this by itself.",
)
def certify(args: argparse.Namespace) -> Answer:
    from utils.formats.certificate import certificate_lines, certify, format_of, source_of

    format_of(args.folder)
    with naming("--run") if args.run is not None else contextlib.nullcontext():
        source = source_of(args.folder, args.run, runs_dir(args))
    certificate = certify(args.folder, source)
    return Answer(
        certificate, lambda console: certificate_lines(certificate), 1 if certificate["agrees"] is False else 0
    )


@command(
    "download",
    "put a model of the Hugging Face hub on this machine, in the cache of the hub or a folder",
    flag("name", metavar="NAME", help="NAME or ORGANISATION/NAME of the hub, or a folder (with --verify)"),
    flag("--out", type=place, metavar="DIR", help="a folder instead of the cache"),
    flag("--revision", metavar="R", help="branch, tag or commit (default: main)"),
    flag("--verify", action="store_true", help="check the hashes, load it, compare with transformers, generate a line"),
)
def download(args: argparse.Namespace) -> Answer:
    from utils.formats.hub import find_pretrained

    name = args.name.removeprefix("hf:")
    found = find_pretrained(name, local_dir=args.out, revision=args.revision, report=note)
    data = {"name": name, "folder": found.folder, "where": found.where, "revision": found.revision}
    lines = [str(found.folder), found.where]
    if args.verify:
        from utils.formats.verification import verify

        data |= (checked := verify(found))
        lines += [
            f"{counted(len(checked['hashed']), 'file')} with the hash that the hub states"
            if checked["hashed"]
            else "hashes: not compared, because a local folder states none",
            f"{checked['architecture']}, {checked['parameters']:,} parameters",
            *([f"keys of config.json that are not used: {', '.join(checked['unused'])}"] if checked["unused"] else []),
            "logits: not compared, transformers is not installed"
            if checked["logit_difference"] is None
            else f"logits differ from those of transformers by {checked['logit_difference']:.1g} at most",
            f"generates: {checked['text']!r}",
        ]
    else:
        from utils.formats.pretrained import open_pretrained

        open_pretrained(found.folder)
    return Answer(data, lambda console: [printable(line) for line in lines])


def note(line: str) -> None:
    """Print one line on stderr."""
    print(printable(f"note: {line}"), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
