"""Weights: look into files of weights, compare them, and turn those of other programs into runs.

python weights.py inspect baseline
python weights.py diff baseline wider
python weights.py convert out/ckpt.pt --out runs/from_nanogpt
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from utils.experiments.commands import runs_folder
from utils.terminal.cli import Parser, place, script
from utils.terminal.commands import Answer, Commands, flag
from utils.terminal.words import counted, printable, size

COMMANDS = Commands()
command = COMMANDS.declare
FORMATS = ("hf", "gguf", "onnx")
WEIGHTS = flag("weights", metavar="WEIGHTS", help="RUN, a file or folder of safetensors, or hf:NAME")


@script
def main(argv: Sequence[str]) -> int:
    return COMMANDS.run(Parser(prog="weights.py", description=__doc__), argv)


# ------------------------------------------------------------------------------------------------- looking at weights


@command("inspect", "modules, shapes, types and sizes of weights", WEIGHTS)
def inspect(args: argparse.Namespace) -> Answer:
    raise NotImplementedError


# ------------------------------------------------------------------------------------ to and from other programs


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
    flag("--shard-size", metavar="SIZE", default="5GB", help="hf: largest file of weights (default: 5GB)"),
    flag("--license", metavar="NAME", help="for the model card: mit, apache-2.0, ..."),
)
def export(args: argparse.Namespace) -> Answer:
    from utils.experiments.prune import parse_size

    shard_bytes = parse_size(args.shard_size)
    from utils.formats.certificate import DisagreementError, certificate_lines
    from utils.formats.exports import export_as
    from utils.formats.source import default_place, open_source

    source = open_source(args.run, runs_folder(args))
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
    certificate = certify(args.folder, source_of(args.folder, args.run, runs_folder(args)))
    return Answer(certificate, lambda console: certificate_lines(certificate), 0 if certificate["agrees"] else 1)


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
            f"{counted(len(checked['hashed']), 'file')} with the hash that the hub states",
            f"{checked['architecture']}, {checked['parameters']:,} parameters",
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
