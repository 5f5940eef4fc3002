# PYTHON_ARGCOMPLETE_OK
"""Inspect, compare and download weights, and move them between runs and other programs.

python weights.py inspect baseline
python weights.py diff baseline:best wider
python weights.py convert out/ckpt.pt --out from_nanogpt
python weights.py download HuggingFaceTB/SmolLM2-135M --verify
python weights.py export baseline --format gguf
python weights.py certify runs/20260131_142501_baseline/artifacts/gguf

WEIGHTS is a run (its export, or else its newest checkpoint; RUN:latest, RUN:best and RUN:STEP are checkpoints), a file,
a folder of safetensors, or hf:NAME, which is a folder or a model in the cache of the Hugging Face hub.
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
    "list the tensors of weights, with shapes, types and sizes, from the headers alone",
    flag("weights", metavar="WEIGHTS", help="run, file, folder or hf:NAME"),
    flag("--stats", action="store_true", help="also read the numbers: norm, largest, zeros, not finite"),
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
    "show how two sets of weights differ, by layer and by tensor",
    flag("a", metavar="A", help="weights, as for inspect"),
    flag("b", metavar="B", help="weights, as for inspect"),
    flag("--all", action="store_true", help="show all tensors that differ"),
    note="relative: the norm of the difference over the norm of A. Only a part of a tensor is in memory at a time.",
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
    flag("--out", metavar="RUN", required=True, help="name of the new run in the folder of runs, or its path"),
    flag("--tokenizer", metavar="KIND", help="char, byte, gpt2, hf:PATH or the tokenizer.json of a run"),
    flag("--dataset", metavar="NAME", help="the text it was trained on, so that train.py --resume can continue"),
    note="No code in a pickle is run; a file that needs it is refused.",
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
    """The lines that convert prints: what the run has, what was left out, and how to use it."""
    yield f"{done.run}: {done.program}, step {done.step:,}, {done.parameters:,} parameters, tokenizer {done.tokenizer}"
    yield from (f"note: {line}" for line in done.notes)
    yield f"generate: python inference.py {name} --prompt TEXT"
    if done.resumes:
        yield f"continue, with the state of its optimizer: python train.py --resume {name}"
    elif done.optimizer:
        command = f"python train.py --fork --resume {name} --dataset TEXT --max-iters N"
        yield f"continue, with the state of its optimizer: {command}"
    yield f"fine-tune: python train.py --init-from {name} --dataset TEXT and the settings of its model"


def warn(message: str) -> None:
    """Print one line on stderr."""
    print(printable(f"warning: {message}"), file=sys.stderr)


def named_weights(text: str, args: argparse.Namespace) -> Stored:
    """The headers of the weights that an argument names."""
    return read_stored(text, find_weights(text, lambda: runs_dir(args)))


def runs_dir(args: argparse.Namespace) -> Path:
    """The folder of runs: --runs-dir, or else the configured one."""
    from utils.experiments.commands import runs_folder

    return runs_folder(args)


@command(
    "export",
    "write the trained model of a run in the format of other programs",
    flag("run", metavar="RUN", help="a run that has completed, or the folder of its export"),
    flag("--format", choices=FORMATS, required=True, help="hf: transformers; gguf: llama.cpp; onnx"),
    flag("--out", type=place, metavar="DIR", help="folder to write (default: RUN/artifacts/FORMAT)"),
    flag(
        "--dtype",
        choices=("float32", "bfloat16", "float16", "q8_0"),
        default="float32",
        help="type of the matrices; q8_0 (8 bits): gguf only, bfloat16: hf only (default: float32)",
    ),
    flag("--shard-size", metavar="SIZE", help=f"hf: largest size of a file of weights (default: {SHARD_SIZE})"),
    flag("--license", metavar="NAME", help="licence in the model card: mit, apache-2.0, ..."),
)
def export(args: argparse.Namespace) -> Answer:
    from utils.experiments.prune import parse_size

    if args.shard_size is not None and args.format != "hf":
        raise UserError(f"--shard-size: only the format hf is split into files, not {args.format}")
    with naming("--shard-size"):
        if (shard_bytes := parse_size(args.shard_size or SHARD_SIZE)) < 1:
            raise UserError(f"expected a size above 0, got {args.shard_size!r}")
    from utils.formats.certificate import DisagreementError, certificate_lines
    from utils.formats.exports import export_as
    from utils.formats.source import default_folder, open_source

    source = open_source(args.run, runs_dir(args))
    folder = args.out or default_folder(source, args.format)
    try:
        found = export_as(source, args.format, folder, args.dtype, shard_bytes, args.license)
    except DisagreementError as error:
        lines = [*error.lines, "the export was not kept"]
        return Answer({"agrees": False, "differences": lines}, lambda console: lines, 1)
    words = f"{found['architecture']}, {size(found['bytes'])} in {args.dtype}, {counted(len(found['files']), 'file')}"
    lines = [str(found["folder"]), words, *found["notes"][1:], *certificate_lines(found["certificate"])]
    return Answer(found, lambda console: lines)


@command(
    "certify",
    "check that an export computes the same in the program that it is made for",
    flag("folder", type=place, metavar="EXPORT", help="a folder that export wrote"),
    flag("--run", metavar="RUN", help="the run it was made from (default: the one whose directory it is in)"),
    note="The details are written to certificate.json in the folder. The command export certifies by itself.",
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
    "download a model from the Hugging Face hub, into its cache or a folder",
    flag("name", metavar="NAME", help="NAME or ORGANISATION/NAME on the hub, or a folder (with --verify)"),
    flag("--out", type=place, metavar="DIR", help="download into this folder instead of the cache"),
    flag("--revision", metavar="R", help="branch, tag or commit (default: main)"),
    flag("--verify", action="store_true", help="also check the hashes and the model: its logits and a generated line"),
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
            else "hashes: not compared, because a local folder has none",
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
