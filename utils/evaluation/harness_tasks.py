"""The tasks of lm-evaluation-harness: finding them and their data, running them, recording and printing the results."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import logging
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import RenderableType
from rich.text import Text

from utils.errors import UserError, first_line, is_out_of_memory, nearest
from utils.evaluation.report import evaluation_record
from utils.evaluation.weights import Trained
from utils.terminal.tables import plain_table
from utils.terminal.words import counted, one_line

TINY_TASKS = Path(__file__).with_name("tiny_tasks")  # three tasks of the workbench, each of a different kind
FORMATS = {"arrow", "csv", "json", "parquet", "text"}  # a task whose dataset is one of these brings its own files
SEED, FEW_SHOT_SEED = 0, 1234  # the defaults of lm_eval, which choose the few-shot examples
COUNTS = ("sample_len", "sample_count")  # results of a task that are not metrics
ACCURACIES = ("acc", "exact_match", "em")  # the first of these that a task has is recorded as its accuracy


def require_harness() -> None:
    """Check that the package lm_eval is installed, and silence it before it is imported.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            "tasks other than arithmetic need lm-evaluation-harness: pip install -r requirements-bench.txt (or lm_eval)"
        )
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    for name in ("lm_eval", "datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)


class HarnessTasks:
    """Tasks and groups of tasks by name.

    Args:
        names: names of lm-evaluation-harness, or `tiny_choice`, `tiny_text` and `tiny_answer` of the workbench.
        folder: the folder from which datasets are read, as FOLDER/ORGANISATION/NAME or FOLDER/NAME; None to use the
            cache of the Hugging Face hub, and then the hub.

    Raises:
        UserError: a name is unknown.
    """

    def __init__(self, names: Sequence[str], folder: Path | None = None) -> None:
        self.names, self._folder = list(names), folder
        tiny = {path.stem for path in TINY_TASKS.glob("*.yaml")}
        self._manager = task_manager(not tiny.issuperset(names))
        for name in names:
            if name not in self._manager.all_tasks:
                raise UserError(f"--task: unknown task {name}{nearest(name, self._manager.all_tasks)}")

    def run(
        self,
        trained: Trained,
        *,
        few_shot: int | None = None,
        limit: int | None = None,
        batch_size: int,
    ) -> list[dict[str, Any]]:
        """Evaluate a model on all tasks; returns a record for each task and group (utils/runs/evaluations.py).

        Args:
            few_shot: number of examples before each question; None for that of the task.
            limit: evaluate only the first `limit` documents of each task.

        Raises:
            UserError: the data of a task cannot be read or has too few examples, or the model cannot read or answer it.
        """
        from lm_eval.evaluator import evaluate

        from utils.evaluation.harness import HarnessModel

        model, began = HarnessModel(trained, batch_size), time.perf_counter()
        with local_data(self._folder), quiet_bars(), package_evaluate():
            loaded = self._manager.load(self._load())
            for task in loaded["tasks"].values():
                configure(task, few_shot)
            random.seed(SEED)
            np.random.seed(FEW_SHOT_SEED)
            found = evaluate(model, loaded, limit=limit, bootstrap_iters=0)  # bootstrapped errors would take minutes
        assert found is not None
        settings = {"batch_size": batch_size, "limit": limit, "seconds": round(time.perf_counter() - began, 3)}
        return [task_record(trained, name, found, settings) for name in found["results"]]

    def _load(self) -> list[Any]:
        """Load the tasks and groups, with their data.

        Raises:
            UserError: the data of a task cannot be loaded.
        """
        loaded: list[Any] = []
        for name in self.names:
            try:
                built = self._manager._load_spec(name)
            except UserError:
                raise
            except Exception as error:  # from the hub, from a file, or from the code of the task
                if is_out_of_memory(error):
                    raise
                hint = "" if self._folder else "; --task-data DIR reads the data from a folder"
                raise UserError(f"{name}: its data cannot be loaded: {first_line(error)}{hint}") from None
            loaded += built if isinstance(built, list) else [built]
        return loaded


@functools.cache
def task_manager(everything: bool) -> Any:
    """lm_eval's TaskManager for the workbench's tasks and, with `everything`, the package's: indexing takes seconds."""
    require_harness()
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(TINY_TASKS), include_defaults=everything)


@contextlib.contextmanager
def local_data(folder: Path | None) -> Iterator[None]:
    """Inside the block, the package datasets reads the data of tasks from `folder`, if given, and from TINY_TASKS."""
    import datasets

    original = datasets.load_dataset

    def load(path: str, name: str | None = None, **options: Any) -> Any:
        if path in FORMATS and "data_files" in options:
            return original(path=path, name=name, **options)
        for place in (TINY_TASKS / "data", *([folder] if folder else [])):
            for found in (place / path, place / path.rpartition("/")[2]):
                if found.is_dir():
                    if name is not None and (found / name).is_dir():
                        return original(path=os.fspath(found / name), **options)
                    return original(path=os.fspath(found), name=name, **options)
        if folder is None:
            return original(path=path, name=name, **options)
        raise UserError(
            f"{folder} has no dataset {path}: expected {folder / path} (hf download --repo-type dataset {path} "
            f"--local-dir {folder / path})"
        )

    datasets.load_dataset = load
    try:
        yield
    finally:
        datasets.load_dataset = original


@contextlib.contextmanager
def package_evaluate() -> Iterator[None]:
    """Inside the block, `import evaluate` imports the metrics package that tasks expect, and not evaluate.py."""
    ours, path = sys.modules.pop("evaluate", None), sys.path
    sys.path = [place for place in path if not (Path(place) / "evaluate.py").is_file()]
    try:
        with contextlib.suppress(ImportError):
            importlib.import_module("evaluate")
        sys.path = path
        yield
    finally:
        sys.path = path
        sys.modules.pop("evaluate", None)
        if ours is not None:
            sys.modules["evaluate"] = ours


@contextlib.contextmanager
def quiet_bars() -> Iterator[None]:
    """Inside the block, lm_eval shows no progress bars, because evaluate.py shows one."""
    modules = [importlib.import_module(f"lm_eval.api.{name}") for name in ("model", "task")]
    before = [module.tqdm for module in modules]
    for module in modules:
        module.tqdm = lambda items, **_: items  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module, original in zip(modules, before, strict=True):
            module.tqdm = original  # type: ignore[attr-defined]


def configure(task: Any, few_shot: int | None) -> None:
    """Set the number of examples before each question, as lm_eval's command does: a task that specifies 0 keeps it.

    Raises:
        UserError: the task has fewer examples.
    """
    own = task.get_config("num_fewshot")
    if few_shot is not None and own != 0:
        task.set_config(key="num_fewshot", value=few_shot)
        if few_shot and task.OUTPUT_TYPE != "loglikelihood_rolling":  # a text has no examples
            own_question = task.fewshot_cfg.split is not None and task.fewshot_cfg.split == task.config.test_split
            if few_shot > (examples := len(task.fewshot_docs()) - own_question):
                raise UserError(
                    f"{task.config.task}: --few-shot {few_shot}: it has only {counted(examples, 'example')}"
                )
    elif own is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=FEW_SHOT_SEED)


def task_hash(name: str, found: Mapping[str, Any]) -> str:
    """sha256 of the documents, prompts and targets of a task, as in lm_eval; for a group, of the hashes of its tasks.

    Args:
        found: the result of lm_eval's `evaluate`.
    """
    if name in found["samples"]:
        parts = [s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in found["samples"][name]]
    else:
        parts = [task_hash(child, found) for child in found["group_subtasks"].get(name, ())]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def task_record(trained: Trained, name: str, found: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The record of the results of one task or group.

    Args:
        found: the result of lm_eval's `evaluate`.
        settings: how the task was evaluated; added to the record.
    """
    metrics, errors, directions = {}, {}, {}
    known_directions = found["higher_is_better"].get(name) or {}
    for key, value in found["results"][name].items():
        metric, _, filtered = key.partition(",")
        if metric in COUNTS or metric.endswith("_stderr") or isinstance(value, bool):
            continue
        if isinstance(value, int | float):
            shown = metric if filtered in ("", "none") else f"{metric} ({filtered})"
            metrics[shown] = float(value)
            directions[shown] = known_directions.get(metric)
            samples = [s for s in found["samples"].get(name, ()) if s.get("filter", filtered) == filtered]
            if (error := error_of_mean([sample.get(metric) for sample in samples], value)) is not None:
                errors[shown] = error
    documents = found["n-samples"].get(name, {}).get("effective")
    record = evaluation_record(trained, name, task_hash(name, found))
    record |= {
        "task": name,
        "metrics": metrics,
        "errors": errors,
        "higher_is_better": directions,
        "problems": documents,
    }
    if (accuracy := next((metrics[one] for one in ACCURACIES if one in metrics), None)) is not None:
        record["accuracy"] = accuracy
    if "bits_per_byte" in metrics:
        record["bits_per_byte"] = metrics["bits_per_byte"]
    return record | {
        "task_version": found["versions"].get(name),
        "few_shot": found["n-shot"].get(name),
        "harness": f"lm_eval {importlib.metadata.version('lm_eval')}",
        **settings,
    }


def tasks_screen(names: Sequence[str], records: Sequence[Mapping[str, Any]]) -> Iterator[RenderableType]:
    """A table with a row for each metric of a task and a column for each run, the best value in bold.

    Args:
        names: the name of the run of each record.
    """
    runs = list(dict.fromkeys(names))
    by_task: dict[str, dict[str, Mapping[str, Any]]] = {}
    for run, record in zip(names, records, strict=True):
        by_task.setdefault(record["task"], {})[run] = record
    table = plain_table(["task", "metric"], ["few-shot", "documents"])
    for run in runs:
        table.add_column(Text(one_line(run)), justify="right", overflow="fold")
    for task, of_runs in by_task.items():
        some = next(iter(of_runs.values()))
        for place, metric in enumerate(some["metrics"]):
            values = [record["metrics"].get(metric, math.nan) for record in of_runs.values()]
            numbers = [value for value in values if not math.isnan(value)]
            higher = is_higher_better(metric, some)
            best = math.nan if higher is None else (max if higher else min)(numbers, default=math.nan)
            problems = f"{some['problems']:,}" if some["problems"] else ""
            head = (Text(task, style="cyan"), metric, str(some["few_shot"]), problems)
            cells = []
            for value, record in zip(values, of_runs.values(), strict=True):
                error = recorded_error(metric, record)
                text = f"{value:.4f}" + (f" ± {error:.4f}" if error else "")
                cells.append(Text(text, style="bold green" if len(runs) > 1 and value == best else ""))
            table.add_row(*(head if place == 0 else ("", metric, "", "")), *cells)
    yield table
    if any(len({record["data_hash"] for record in of_runs.values()}) > 1 for of_runs in by_task.values()):
        yield Text("The runs were evaluated on different documents: their results are not comparable.", style="yellow")


def error_of_mean(values: Sequence[Any], mean: float) -> float | None:
    """The standard error of a metric that is the mean of a number per document, as lm_eval computes it.

    None for any other metric, and for fewer than two documents.
    """
    numbers = [float(value) for value in values if isinstance(value, int | float)]
    if len(numbers) < max(2, len(values)) or not math.isclose(statistics.fmean(numbers), mean, abs_tol=1e-9):
        return None
    return statistics.stdev(numbers) / math.sqrt(len(numbers))


def recorded_error(metric: str, record: Mapping[str, Any]) -> float:
    """The standard error of a metric in the record of a task; 0 if it is not known."""
    return float((record.get("errors") or {}).get(metric, 0.0))


def is_higher_better(metric: str, record: Mapping[str, Any]) -> bool | None:
    """Whether higher is better, according to the task; None if it does not say, or if neither is better."""
    direction = (record.get("higher_is_better") or {}).get(metric)
    return None if direction is None else bool(direction)
