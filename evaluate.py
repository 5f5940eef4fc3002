# PYTHON_ARGCOMPLETE_OK
"""Evaluate trained runs: how well they predict a text, or solve a task with right answers.

python evaluate.py baseline                                # the whole validation split of its own corpus
python evaluate.py baseline wider --data notes.txt         # one text, several runs side by side
python evaluate.py sums --task arithmetic                  # held-out problems, by operator and digits
python evaluate.py baseline --task hellaswag,arc_easy      # tasks of lm-evaluation-harness
python evaluate.py baseline wider --compare                # quality and speed in one table

RUN is a path, an id, a tag, latest, NAME@vN of a promoted run, or part of an id. The results are recorded in
artifacts/evaluations.jsonl of each run; `experiments.py show` and `list` print them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from utils.errors import UserError
from utils.files import write_atomic, write_output
from utils.runs.evaluations import append_evaluation
from utils.runs.find import find_export
from utils.runs.layout import ARITHMETIC_PICTURE
from utils.terminal.cli import PROJECT_ROOT, Parser, place, script
from utils.terminal.words import printable

if TYPE_CHECKING:  # arguments are parsed before torch is imported
    from rich.console import RenderableType

    from model import LanguageModel
    from utils.config.settings import Config
    from utils.evaluation.arithmetic import Answer
    from utils.evaluation.texts import Data
    from utils.evaluation.weights import Trained


ARITHMETIC = "arithmetic"  # the workbench's own task: the held-out problems of a generated dataset


@script
def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="evaluate.py", usage="python evaluate.py [RUN ...] [--FLAG VALUE ...]", description=__doc__)
    add_arguments(parser)
    args = parser.parse(argv)
    check_flags(args)
    from utils.config.loader import ConfigLoader

    config = ConfigLoader(PROJECT_ROOT).load().config
    args.runs_dir = PROJECT_ROOT / (args.runs_dir or config.tracking.runs_dir)
    args.runs = args.runs or [str(find_export(None, args.runs_dir).parents[1])]
    if args.compare:
        return compare(args, config)
    records = [(trained.name, record) for trained in load_all(args) for record in evaluate(args, config, trained)]
    names, found = [name for name, _ in records], [record for _, record in records]
    show(args, names, found, notes_of(args, found), screen_of(args, names, found))
    return 0


def check_flags(args: argparse.Namespace) -> None:
    """Raises UserError if flags are invalid or contradict each other; sets `args.tasks` to the names of the tasks."""
    if args.task is not None and (args.data is not None or args.stride is not None):
        raise UserError("--task brings its own data: --data and --stride are for texts")
    tasks = [] if args.task is None else [name.strip() for name in args.task.split(",")]
    if not all(tasks):
        raise UserError(f"--task: expected names separated by commas, got {args.task!r}")
    if ARITHMETIC in tasks and len(tasks) > 1:
        raise UserError(f"--task {args.task}: {ARITHMETIC} cannot be combined with other tasks")
    args.tasks = tasks
    of_harness = {"--few-shot": args.few_shot, "--limit": args.limit, "--task-data": args.task_data}
    of_harness["--batch-size"] = args.batch_size
    for flag, value in of_harness.items():
        if value is not None and (not tasks or tasks == [ARITHMETIC]):
            raise UserError(f"{flag} is for the tasks of lm-evaluation-harness: expected --task NAME,NAME")
        if isinstance(value, int) and value < (least := 0 if flag == "--few-shot" else 1):
            raise UserError(f"{flag} must be at least {least}, not {value}")
    if args.task_data is not None and not args.task_data.is_dir():
        raise UserError(f"--task-data {args.task_data}: no such folder")
    if args.picture is not None:
        if tasks != [ARITHMETIC]:
            raise UserError(f"--picture is for --task {ARITHMETIC}")
        if len(args.runs) > 1:
            raise UserError("--picture is for one RUN")
        if args.picture.suffix.lower() not in (".png", ".svg"):
            raise UserError(f"--picture {args.picture}: expected a name that ends in .png or .svg")
    if args.compare and len(args.runs) < 2:
        raise UserError("--compare needs at least two RUNs")
    if tasks and tasks != [ARITHMETIC]:
        from utils.evaluation.harness_tasks import require_harness

        require_harness()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="*", help="runs to evaluate (default: the newest with an export)")
    parser.add_argument(
        "--data",
        metavar="TEXT",
        help="a text file, a folder of text files, a registered corpus, or a prepared dataset, of which the validation "
        "split is read (default: the validation split of the run's own data)",
    )
    parser.add_argument(
        "--stride",
        type=int,
        metavar="N",
        help="advance the window of block_size tokens by N; each token is predicted once, from at least block_size - N "
        "tokens before it (default: half of block_size)",
    )
    parser.add_argument(
        "--task",
        metavar="NAME,NAME",
        help="evaluate tasks instead of a text: arithmetic, or, if it is installed, tasks of lm-evaluation-harness "
        "(hellaswag,arc_easy)",
    )
    parser.add_argument("--few-shot", type=int, metavar="N", help="examples before each question (default: the task's)")
    parser.add_argument("--limit", type=int, metavar="N", help="evaluate only the first N documents of each task")
    parser.add_argument(
        "--task-data",
        type=place,
        metavar="DIR",
        help="read the data of tasks from DIR/ORGANISATION/NAME or DIR/NAME, and nothing from the network",
    )
    parser.add_argument("--batch-size", type=int, metavar="N", help="sequences of a task in one pass (default: 32)")
    parser.add_argument(
        "--compare", action="store_true", help="also measure the speed of the runs, and print one table with both"
    )
    parser.add_argument(
        "--picture",
        type=place,
        metavar="FILE",
        help=f"write a picture of --task {ARITHMETIC} to a .png or .svg file: which digits are mistaken for which",
    )
    parser.add_argument(
        "--checkpoint",
        metavar="WHICH",
        help="latest, best or a step (default: the export or, if there is none, the newest checkpoint)",
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
    parser.add_argument("--no-record", action="store_true", help="only print the results, and do not record them")
    parser.add_argument("--json", action="store_true", help="print JSON")


def evaluate(args: argparse.Namespace, config: Config, trained: Trained) -> list[dict[str, Any]]:
    """Evaluate one run with the options of the command line, and record the results; returns the records.

    Raises:
        UserError: there is no such text or task, or the model cannot read it.
    """
    if not args.tasks:
        records = [score_text(args, config, trained)]
    elif args.tasks == [ARITHMETIC]:
        records = [solve_arithmetic(args, config, trained)]
    else:
        records = solve_tasks(args, trained)
    for record in records:
        record_evaluation(args, trained, record)
    return records


def score_text(args: argparse.Namespace, config: Config, trained: Trained) -> dict[str, Any]:
    """Without --task: loss, perplexity and bits per byte of a text.

    Raises:
        UserError: there is no such text, part of it has no token, or there is nothing to predict.
    """
    from utils.evaluation.report import evaluation_record, score_record
    from utils.evaluation.texts import own_data, score_data
    from utils.terminal.progress import CompletionProgress

    stride = window_stride(args.stride, trained)
    data = named_text(args, config) or own_data(trained, config.data, PROJECT_ROOT, note)
    tokens = data.tokens(trained)
    try:
        with CompletionProgress(len(tokens.ids) - 1, noun="token") as progress:
            scores = score_data(trained, tokens, stride, lambda count: progress.advance(count, count))
    except UserError as error:
        raise UserError(f"{data.name}: {error}") from None
    record = evaluation_record(trained, data.name, data.hash)
    return record | score_record(*scores, trained.model.config.block_size, stride)


def named_text(args: argparse.Namespace, config: Config) -> Data | None:
    """The text of --data, which is read once for all runs; None if each run is evaluated on its own data."""
    from utils.evaluation.texts import named_data

    if args.data is not None and not hasattr(args, "named"):
        args.named = named_data(args.data, config.data, PROJECT_ROOT)
    return getattr(args, "named", None)


def solve_arithmetic(args: argparse.Namespace, config: Config, trained: Trained) -> dict[str, Any]:
    """--task arithmetic: the held-out problems of the run's own dataset.

    Raises:
        UserError: the run was not trained on arithmetic, or the picture cannot be written.
    """
    from utils.corpora.arithmetic import problem_set
    from utils.evaluation.arithmetic import answer_problems, own_problems, task_record
    from utils.evaluation.report import evaluation_record
    from utils.terminal.progress import CompletionProgress

    settings, data_hash = own_problems(trained, PROJECT_ROOT / config.data.corpora_dir)
    problems = problem_set(settings).held_out
    with CompletionProgress(len(problems), noun="problem") as progress:
        answers = answer_problems(trained, settings, problems, lambda count: progress.advance(count, count))
    record = evaluation_record(trained, ARITHMETIC, data_hash) | task_record(answers)
    save_picture(args, trained, answers, record)
    return record


def solve_tasks(args: argparse.Namespace, trained: Trained) -> list[dict[str, Any]]:
    """--task with tasks of lm-evaluation-harness: a record for each task and group.

    Raises:
        UserError: there is no such task, or its data cannot be read.
    """
    from utils.evaluation.harness import BATCH_SIZE
    from utils.evaluation.harness_tasks import HarnessTasks

    if not hasattr(args, "harness"):
        args.harness = HarnessTasks(args.tasks, args.task_data)
    options = {"few_shot": args.few_shot, "limit": args.limit, "batch_size": args.batch_size or BATCH_SIZE}
    records: list[dict[str, Any]] = args.harness.run(trained, **options)
    return records


def notes_of(args: argparse.Namespace, records: Sequence[Mapping[str, Any]]) -> Sequence[str]:
    """Warnings about comparing the results."""
    from utils.evaluation.report import comparison_notes

    return () if args.tasks else list(comparison_notes(records))


def screen_of(
    args: argparse.Namespace, names: Sequence[str], records: Sequence[Mapping[str, Any]]
) -> Iterator[RenderableType]:
    """The table of the results."""
    if args.tasks == [ARITHMETIC]:
        from utils.evaluation.arithmetic import task_screen

        return task_screen(names, records)
    if args.tasks:
        from utils.evaluation.harness_tasks import tasks_screen

        return tasks_screen(names, records)
    from utils.evaluation.report import scores_screen

    return scores_screen(names, records)


def compare(args: argparse.Namespace, config: Config) -> int:
    """--compare: evaluate all runs, measure how fast they generate, and print both in one table."""
    from utils.evaluation.comparison import comparison_table, measure_speeds
    from utils.profiling.decoding import measure_generation

    def speed(model: LanguageModel) -> tuple[float, float]:
        found = measure_generation(model)
        return 1000 * found.prompt / found.prefill_ms, 1000 / found.decode_ms

    models = list(load_all(args))
    names = [trained.name for trained in models]
    records = [evaluate(args, config, trained) for trained in models]
    speeds = measure_speeds(models, speed)
    flat = [(name, record) for name, of_run in zip(names, records, strict=True) for record in of_run]
    extra = {"speeds": [{"run": name, **found._asdict()} for name, found in zip(names, speeds, strict=True)]}
    notes = notes_of(args, [record for _, record in flat])
    table = comparison_table(names, records, speeds)
    show(args, [name for name, _ in flat], [record for _, record in flat], notes, table, extra)
    return 0


def save_picture(
    args: argparse.Namespace, trained: Trained, answers: Sequence[Answer], record: Mapping[str, Any]
) -> None:
    """Write the picture of a task to the file of --picture or, without that flag, into the run directory.

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
    """The models of the runs, one after the other, after checking that all runs exist."""
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
    """The value of --stride, or its default.

    Raises:
        UserError: it is out of bounds.
    """
    block_size = trained.model.config.block_size
    if stride is not None and not 1 <= stride <= block_size:
        raise UserError(f"--stride must be from 1 to {block_size}, the block_size of {trained.name}, not {stride}")
    return stride or max(block_size // 2, 1)


def record_evaluation(args: argparse.Namespace, trained: Trained, record: Mapping[str, Any]) -> None:
    """Append an evaluation to those recorded in the run directory, unless --no-record is given."""
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
    more: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Print the results: as a table, or as JSON, to which `more` is added."""
    from utils.runs.evaluations import as_json
    from utils.terminal.commands import print_json
    from utils.terminal.console import Terminal

    if args.json:
        runs = [{"run": name, **as_json(record)} for name, record in zip(names, records, strict=True)]
        print_json({"evaluations": runs, "notes": list(notes), **more})
        return
    Terminal().print(*screen)


def note(line: str) -> None:
    print(printable(line), file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
