"""Evaluate runs after their training: how well they predict a text, or solve a task with a right answer.

python evaluate.py baseline                                # the validation split of its own corpus, all of it
python evaluate.py baseline wider --data notes.txt         # one text, several runs side by side
python evaluate.py sums --task arithmetic                  # held-out problems, by operator and digits

RUN is a path, an id, a tag, latest, NAME@vN of a promoted run, or a part of an id. Results are kept in
artifacts/evaluations.jsonl of each run; `experiments.py show` and `list` show them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import UserError
from utils.files import write_atomic, write_output
from utils.runs.evaluations import append_evaluation
from utils.runs.find import find_export
from utils.runs.layout import ARITHMETIC_PICTURE
from utils.terminal.cli import PROJECT_ROOT, Parser, place, script
from utils.terminal.streams import is_unicode
from utils.terminal.words import json_text, printable

if TYPE_CHECKING:  # arguments are parsed before torch is imported
    from rich.console import RenderableType

    from utils.config.settings import Config
    from utils.evaluation.arithmetic import Answer
    from utils.evaluation.weights import Trained


@script
def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="evaluate.py", usage="python evaluate.py [RUN ...] [--FLAG VALUE ...]", description=__doc__)
    add_arguments(parser)
    args = parser.parse(argv)
    if args.task is not None and (args.data is not None or args.stride is not None):
        raise UserError("--task has problems of its own: --data and --stride are for texts")
    if args.picture is not None:
        if args.task is None:
            raise UserError("--picture is for --task")
        if len(args.runs) > 1:
            raise UserError("--picture is for one RUN")
        if args.picture.suffix.lower() not in (".png", ".svg"):
            raise UserError(f"--picture {args.picture}: expected a name that ends in .png or .svg")
    from utils.config.loader import ConfigLoader

    config = ConfigLoader(PROJECT_ROOT).load().config
    args.runs_dir = PROJECT_ROOT / (args.runs_dir or config.tracking.runs_dir)
    args.runs = args.runs or [str(find_export(None, args.runs_dir).parents[1])]
    return solve_task(args, config) if args.task else score_texts(args, config)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="*", help="(default: the newest run with an export)")
    parser.add_argument(
        "--data",
        metavar="TEXT",
        help="a text file or a folder of them, a registered corpus, or a prepared dataset, whose validation is read "
        "(default: the validation split of the run's own)",
    )
    parser.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="tokens that a window of block_size advances by; each token is predicted once, from at least "
        "block_size - N tokens before it (default: half of block_size)",
    )
    parser.add_argument("--task", choices=("arithmetic",), help="a task with a right answer, instead of a text")
    parser.add_argument(
        "--picture", type=place, metavar="FILE", help=".png or .svg of --task: which digits are taken for which"
    )
    parser.add_argument(
        "--checkpoint",
        metavar="WHICH",
        help="latest, best or a step (default: the export; of a run without one, the newest checkpoint)",
    )
    parser.add_argument(
        "--weights",
        choices=("float32", "bfloat16", "int8"),
        default="float32",
        help="precision of the weights (default: float32)",
    )
    parser.add_argument(
        "--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps (default: auto)"
    )
    parser.add_argument("--runs-dir", type=place, metavar="DIR", help="folder of the runs (default: as configured)")
    parser.add_argument("--no-record", action="store_true", help="only print: leave the run directories as they are")
    parser.add_argument("--json", action="store_true", help="print JSON")


def score_texts(args: argparse.Namespace, config: Config) -> int:
    """--data: loss, perplexity and bits per byte of each run.

    Raises:
        UserError: no such run or text, text without a token, or nothing to predict.
    """
    from utils.evaluation.report import comparison_notes, evaluation_record, score_record, scores_screen
    from utils.evaluation.texts import named_data, own_data, score_data
    from utils.terminal.progress import CompletionProgress

    named = None if args.data is None else named_data(args.data, config.data, PROJECT_ROOT)
    names, records = [], []
    for trained in load_all(args):
        stride = window_stride(args.stride, trained)
        data = named or own_data(trained, config.data, PROJECT_ROOT, note)
        tokens = data.tokens(trained)
        try:
            with CompletionProgress(len(tokens.ids) - 1, noun="token") as progress:
                scores = score_data(trained, tokens, stride, lambda count: progress.advance(count, count))
        except UserError as error:
            raise UserError(f"{data.name}: {error}") from None
        record = evaluation_record(trained, data.name, data.hash)
        record |= score_record(*scores, trained.model.config.block_size, stride)
        keep(args, trained, record)
        names.append(trained.name)
        records.append(record)
    show(args, names, records, comparison_notes(records), scores_screen(names, records))
    return 0


def solve_task(args: argparse.Namespace, config: Config) -> int:
    """--task arithmetic: the held-out problems of each run's own dataset.

    Raises:
        UserError: no such run, it was not trained on arithmetic, or the picture cannot be written.
    """
    from utils.corpora.arithmetic import problem_set
    from utils.evaluation.arithmetic import answer_problems, own_problems, task_record, task_screen
    from utils.evaluation.report import evaluation_record
    from utils.terminal.progress import CompletionProgress

    names, records = [], []
    for trained in load_all(args):
        settings, data_hash = own_problems(trained, PROJECT_ROOT / config.data.corpora_dir)
        problems = problem_set(settings).held_out
        with CompletionProgress(len(problems), noun="problem") as progress:
            answers = answer_problems(trained, settings, problems, lambda count: progress.advance(count, count))
        record = evaluation_record(trained, args.task, data_hash) | task_record(answers)
        keep(args, trained, record)
        save_picture(args, trained, answers, record)
        names.append(trained.name)
        records.append(record)
    show(args, names, records, (), task_screen(names, records))
    return 0


def save_picture(
    args: argparse.Namespace, trained: Trained, answers: Sequence[Answer], record: Mapping[str, Any]
) -> None:
    """Write the picture of a task: to --picture, else beside what is recorded of the run.

    Raises:
        UserError: --picture cannot be written.
    """
    from utils.evaluation.picture import arithmetic_picture

    path, write = args.picture, write_output
    if path is None:
        if args.no_record or trained.run is None:
            return
        path, write = trained.run / ARITHMETIC_PICTURE, write_atomic
    try:
        write(path, arithmetic_picture(trained.name, answers, record, path.suffix[1:].lower()))
    except OSError as error:
        if args.picture is not None:
            raise UserError(f"--picture {path}: cannot be written: {error.strerror}") from None
        note(f"warning: {path}: the picture is not written: {error.strerror}")
        return
    note(f"wrote {path}")


def load_all(args: argparse.Namespace) -> Iterator[Trained]:
    """The models of the runs, one after the other; that all runs exist is checked first."""
    from utils.evaluation.weights import load_trained
    from utils.machine.device import choose_device
    from utils.runs.find import is_export, resolve_run

    device = choose_device(args.device)
    for name in args.runs:
        if not (name and is_export(Path(name))):
            resolve_run(name, args.runs_dir)
    for name in args.runs:
        yield load_trained(name, args.runs_dir, device, args.weights, args.checkpoint, note)


def window_stride(stride: int | None, trained: Trained) -> int:
    """--stride, or its default.

    Raises:
        UserError: out of bounds.
    """
    block_size = trained.model.config.block_size
    if stride is not None and not 1 <= stride <= block_size:
        raise UserError(f"--stride must be from 1 to {block_size}, the block_size of {trained.name}, not {stride}")
    return stride or max(block_size // 2, 1)


def keep(args: argparse.Namespace, trained: Trained, record: Mapping[str, Any]) -> None:
    """Add an evaluation to those of the run."""
    if args.no_record or trained.run is None:
        return
    try:
        append_evaluation(trained.run, record)
    except OSError as error:
        note(f"warning: {trained.name}: the evaluation is not recorded: {error.strerror}")


def show(
    args: argparse.Namespace,
    names: Sequence[str],
    records: Sequence[Mapping[str, Any]],
    notes: Iterable[str],
    screen: Iterable[RenderableType],
) -> None:
    """Print the results, as JSON or for people."""
    from utils.runs.evaluations import as_json
    from utils.terminal.console import Terminal

    if args.json:
        runs = [{"run": name, **as_json(record)} for name, record in zip(names, records, strict=True)]
        print(json_text({"evaluations": runs, "notes": list(notes)}, indent=2, ensure_ascii=not is_unicode(sys.stdout)))
        return
    Terminal().print(*screen)


def note(line: str) -> None:
    print(printable(line), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
