"""Runs one function over many jobs in worker processes, and yields the results in the order of the jobs.

Each worker has its own pipe, so that it ends when its parent process is killed, and so that the parent process notices
when a worker is killed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from utils.errors import OutOfMemoryError, UserError

Report = Callable[[int], None]
RESULT, PROGRESS, FAILURE = "result", "progress", "failure"
REPORT_BYTES = 1 << 22  # a worker reports its progress in amounts of at least this many bytes


class Worker(NamedTuple):
    process: Any
    pipe: Connection


def in_order(
    function: Callable[[Any, Report], Any], jobs: Sequence[Any], workers: int, report: Report
) -> Iterator[Any]:
    """Yield `function(job, report)` for each job.

    Args:
        function: a function defined at the top level of a module, so that it can be pickled.
        workers: number of processes; with one worker or one job, this process does the work.
        report: called with the amounts that the function reports.

    Raises:
        UserError, OSError: raised by the function.
        OutOfMemoryError: a worker was killed.
    """
    workers = min(workers, len(jobs))
    if workers <= 1:
        yield from (function(job, report) for job in jobs)
        return
    context = multiprocessing.get_context("spawn")
    team: list[Worker] = []
    try:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, function), daemon=True)
            process.start()
            theirs.close()
            team.append(Worker(process, ours))
        yield from _results(team, jobs, report)
    finally:
        for worker in team:
            worker.pipe.close()
            worker.process.kill()
        for worker in team:
            worker.process.join()


def _results(team: Sequence[Worker], jobs: Sequence[Any], report: Report) -> Iterator[Any]:
    waiting = iter(enumerate(jobs))
    busy: dict[Connection, Worker] = {}
    done: dict[int, Any] = {}
    for worker in team:
        _give(worker, waiting, busy)
    for number in range(len(jobs)):
        while number not in done:
            for pipe in wait(list(busy)):
                assert isinstance(pipe, Connection)
                worker = busy[pipe]
                try:
                    kind, place, value = pipe.recv()
                except (EOFError, ConnectionResetError):
                    worker.process.join()
                    raise OutOfMemoryError(
                        f"a worker process was killed (exit status {worker.process.exitcode}), perhaps because memory "
                        "ran out: --workers 1 needs less; the same command continues with the finished parts"
                    ) from None
                if kind == PROGRESS:
                    report(value)
                else:
                    done[place] = kind, value
                    del busy[pipe]
                    _give(worker, waiting, busy)
        kind, value = done.pop(number)
        if kind == FAILURE:
            raise value
        yield value


def _give(worker: Worker, waiting: Iterator[tuple[int, Any]], busy: dict[Connection, Worker]) -> None:
    """Send a worker the next job, if there is one."""
    if (job := next(waiting, None)) is not None:
        with contextlib.suppress(BrokenPipeError):  # it was killed, which `_results` notices
            worker.pipe.send(job)
        busy[worker.pipe] = worker


def _work(pipe: Connection, function: Callable[[Any, Report], Any]) -> None:
    """The main function of a worker: run jobs until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent process ends the workers
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # each core has a worker already
    unreported = 0

    def report(amount: int) -> None:
        nonlocal unreported
        unreported += amount
        if unreported >= REPORT_BYTES:
            flush()

    def flush() -> None:
        nonlocal unreported
        if unreported:
            pipe.send((PROGRESS, 0, unreported))
        unreported = 0

    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            number, job = pipe.recv()
            try:
                message = (RESULT, number, function(job, report))
            except (UserError, OSError, MemoryError) as error:
                message = (FAILURE, number, error)
            except Exception as error:
                error.add_note("".join(traceback.format_exception(error)))
                message = (FAILURE, number, RuntimeError("\n".join(error.__notes__)))
            flush()
            pipe.send(message)
