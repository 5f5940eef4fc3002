"""How fast does prepare.py encode, how much memory does it need, and does a killed preparation resume correctly?

python -m benchmarks.data_prepare                        # a small size, a few kills
python -m benchmarks.data_prepare --megabytes 50 200 1000 --cases json_lines one_text one_line
python -m benchmarks.data_prepare --kills 20 --repeats 0

The texts are generated. Memory is the peak of the anonymous memory of all processes together, minus that of as many
processes that have only imported what prepare.py imports. The second pass, from text on disk to token files on disk, is
compared with NumPy or the package tokenizers alone, which work in memory on the same text: in processor seconds of all
processes together, so that other load on the machine matters little.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
from rich.table import Table

from benchmarks.common import at_least, interleaved, machine_facts, verdict
from benchmarks.data import ALONE, LEAST, generated_text
from tokenizer import build_tokenizer, tokenizer_class
from utils.config.settings import DataConfig
from utils.corpora.datasets import TOKENIZER_JSON, VERIFIED_JSON
from utils.corpora.readers import units
from utils.corpora.source_files import find_files
from utils.errors import UserError
from utils.preparation.options import Preparation
from utils.preparation.pipeline import decide, learn_tokenizer, read_all
from utils.preparation.shards import write_shards
from utils.preparation.work import work_folder
from utils.terminal.cli import PROJECT_ROOT, Parser, script
from utils.terminal.console import Terminal

MEMORY_MB = 500  # at most
CASES = ("json_lines", "one_text", "one_line")
PATTERN_MB = 4  # of generated text, which is repeated with other words at the beginning of each document
SMALL_PARTS = (  # prepare.py with parts so small that, even with a small text, a kill leaves some done and some not
    "import sys, prepare; from utils.corpora import readers; from utils.preparation import encoding; "
    "readers.UNIT_BYTES, encoding.JOB_BYTES = 50_000, 50_000; sys.exit(prepare.main(sys.argv[1:]))"
)
IMPORTS = "import sys; sys.argv = ['prepare.py']; import prepare, utils.preparation.pipeline, tokenizers; input()"


@script
def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m benchmarks.data_prepare", description=__doc__)
    parser.add_argument(
        "--megabytes", type=int, nargs="+", default=[4], metavar="N", help="sizes of the text (default: 4)"
    )
    parser.add_argument(
        "--cases", nargs="+", default=["json_lines"], choices=CASES, help="forms of the text (default: json_lines)"
    )
    parser.add_argument("--tokenizers", nargs="+", default=["bpe"], metavar="KIND", help="tokenizers (default: bpe)")
    parser.add_argument(
        "--repeats",
        type=int,
        default=1,
        metavar="N",
        help="timings of the second pass, with the first size (default: 1)",
    )
    parser.add_argument("--kills", type=int, default=3, metavar="N", help="kills at random moments (default: 3)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the random moments (default: 0)")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="worker processes (default: 2)")
    args = parser.parse(argv)
    at_least(0, kills=args.kills, repeats=args.repeats)
    at_least(1, megabytes=min(args.megabytes), workers=args.workers)
    terminal = Terminal()
    good = True
    with tempfile.TemporaryDirectory(prefix="prepare_") as name:
        folder = Path(name)
        table = Table(title="prepare.py", title_justify="left", title_style="bold")
        for column in ("text", "tokenizer"):
            table.add_column(column)
        for column in ("seconds", "MB/s", "reading s", "encoding s", f"memory MB (at most {MEMORY_MB})"):
            table.add_column(column, justify="right")
        for case in args.cases:
            for megabytes in args.megabytes:
                source = write_source(folder, case, megabytes)
                for kind in args.tokenizers:
                    seconds, phases, memory = measured(source, folder / "out", kind, args.workers)
                    good = good and memory <= MEMORY_MB
                    shown = (f"{phases.get(name, 0.0):.1f}" for name in ("reading", "encoding"))
                    table.add_row(
                        *(f"{megabytes} MB, {case}", kind, f"{seconds:.1f}", f"{megabytes / seconds:.1f}"),
                        *(*shown, f"{memory:.0f} {verdict(memory <= MEMORY_MB)}"),
                    )
                source.unlink()
        terminal.print(table)
        if args.repeats:
            source = write_source(folder, args.cases[0], args.megabytes[0])
            for kind in args.tokenizers:
                ours, alone = second_pass(source, folder, kind, args.workers, args.repeats)
                words = f"{ours:.2f} and {alone:.2f} processor seconds: {alone / ours:.2f} "
                words += verdict(alone / ours >= LEAST)
                terminal.print(f"{kind}, {args.megabytes[0]} MB, the second pass and the package alone: {words}")
        if args.kills:
            different = killed(folder, args.kills, args.seed, args.workers, min(args.megabytes), terminal)
            good = good and not different
    terminal.print(f"machine: {machine_facts()}")
    return 0 if good else 1


def write_source(folder: Path, case: str, megabytes: int) -> Path:
    """A file of generated text of about `megabytes`."""
    words = generated_text(min(megabytes, PATTERN_MB) * 1_000_000)
    size = megabytes * 1_000_000
    path = folder / ("source.txt" if case == "one_text" else "source.jsonl")
    with path.open("w", encoding="utf-8") as file:
        if case == "one_line":
            file.write('{"id": 1, "text": "')
        while (written := file.tell()) < size:
            round_ = f"{written} "
            if case == "json_lines":
                for document in documents(round_, words, size - written):
                    file.write(json.dumps({"id": written, "text": document}, ensure_ascii=False) + "\n")
            elif case == "one_line":
                file.write(json.dumps(round_ + words[: size - written], ensure_ascii=False)[1:-1])
            else:
                file.write(round_ + words[: size - written])
        if case == "one_line":
            file.write('"}\n')
    return path


def documents(prefix: str, words: str, size: int) -> Iterator[str]:
    """Texts of 200 to 8,000 characters, of about `size` bytes in all."""
    generator = random.Random(prefix)
    place = 0
    while place < min(len(words), size):
        length = int(min(8000, 200 * generator.paretovariate(1)))
        yield prefix + words[place : place + length]
        place += length


def command(source: Path, target: Path, kind: str, workers: int, small_parts: bool = False) -> list[str]:
    script_words = ["-c", SMALL_PARTS] if small_parts else ["prepare.py"]
    words = [sys.executable, *script_words, str(source), "--out", str(target), "--tokenizer", kind, "--no-leaks"]
    return [*words, "--workers", str(workers)]


def measured(source: Path, target: Path, kind: str, workers: int) -> tuple[float, dict[str, float], float]:
    """Seconds of a preparation and of its passes, and megabytes of anonymous memory beyond the imports."""
    shutil.rmtree(target, ignore_errors=True)
    imports = imports_memory()
    began = time.perf_counter()
    process = psutil.Popen(
        command(source, target, kind, workers), cwd=PROJECT_ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    peak, last = 0.0, began
    phases: dict[str, float] = {}
    work = target.with_name(f".{target.name}.preparing")
    while process.poll() is None:
        sizes = [size for child in [process, *children(process)] if (size := anonymous(child.pid))]
        used = sum(max(size - imports, 0) for size in sizes)  # a process without the imports is smaller
        peak = max(peak, used)
        now = time.perf_counter()
        phase = "reading" if not (work / TOKENIZER_JSON).exists() else "encoding"
        phases[phase] = phases.get(phase, 0.0) + now - last
        last = now
        time.sleep(0.05)
    seconds = time.perf_counter() - began
    output = process.stdout.read().decode() if process.stdout else ""
    if process.returncode:
        raise UserError(f"prepare.py failed: {output.strip().splitlines()[-1:]}")
    return seconds, phases, peak


def children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def anonymous(pid: int) -> float:
    """Megabytes of anonymous memory of a process; 0 if it is gone."""
    try:
        found = re.search(r"RssAnon:\s*(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0.0
    return int(found[1]) * 1024 / 1e6 if found else 0.0


def imports_memory() -> float:
    """Megabytes of anonymous memory of a process that has imported everything and done nothing."""
    process = subprocess.Popen([sys.executable, "-c", IMPORTS], cwd=PROJECT_ROOT, stdin=subprocess.PIPE)
    before = -1.0
    while (now := anonymous(process.pid)) != before or now == 0:
        before = now
        time.sleep(0.3)
    process.communicate(b"\n")
    return now


def second_pass(source: Path, folder: Path, kind: str, workers: int, repeats: int) -> tuple[float, float]:
    """Processor seconds for encoding with worker processes, and by the library alone; the least of each."""
    quiet = Terminal(quiet=True)
    config = DataConfig(tokenizer=kind)
    options = Preparation([str(source)], folder / "timed", config, leaks=False, workers=workers)
    files = find_files(options.sources, folder).files
    with work_folder(options.target) as work:
        work.begin("timed")
        outcome = read_all(options, work, units(files, options.reading), files, quiet)
        decide(options, outcome, work, quiet)
        fixed = build_tokenizer(config, ()) if not tokenizer_class(config).learns else None
        tokenizer = learn_tokenizer(options, work, outcome, fixed, quiet)
        documents = outcome.documents
        assert documents is not None
        text = "".join(part.text.read_text(encoding="utf-8") for part in documents.parts)
        alone = ALONE[kind](tokenizer)

        def ours() -> float:
            shutil.rmtree(work.dataset)
            shutil.rmtree(work.tokens)
            work.dataset.mkdir()
            work.tokens.mkdir()
            return processor_seconds(lambda: write_shards(documents, work, tokenizer, workers, quiet))

        seconds = interleaved({"ours": ours, "alone": lambda: processor_seconds(lambda: alone(text))}, repeats)
        work.delete()
    return min(seconds["ours"]), min(seconds["alone"])


def processor_seconds(action: Callable[[], object]) -> float:
    """Processor seconds that the action takes in this process and in the children that it has waited for."""
    before = os.times()
    action()
    return sum(os.times()[:4]) - sum(before[:4])


def killed(folder: Path, kills: int, seed: int, workers: int, megabytes: int, terminal: Terminal) -> int:
    """Kill preparations at random moments, start them again, and count those whose files differ from the expected."""
    source, target = write_source(folder, "json_lines", megabytes), folder / "out"
    words = command(source, target, "bpe", workers, small_parts=True)
    shutil.rmtree(target, ignore_errors=True)
    began = time.perf_counter()
    subprocess.run(words, cwd=PROJECT_ROOT, stdout=subprocess.DEVNULL, check=True)
    seconds = time.perf_counter() - began
    expected = contents(target)
    generator, different, interrupted = random.Random(seed), 0, 0
    for _ in range(kills):
        shutil.rmtree(target)
        process = subprocess.Popen(words, cwd=PROJECT_ROOT, stdout=subprocess.DEVNULL)
        try:
            process.wait(generator.uniform(0.2, seconds))
        except subprocess.TimeoutExpired:
            interrupted += 1
            process.send_signal(signal.SIGKILL)  # only the first process: its workers must end by themselves
            process.wait()
        done = subprocess.run(words, cwd=PROJECT_ROOT, stdout=subprocess.DEVNULL)
        left = [entry.name for entry in target.parent.iterdir() if entry.name.startswith(f".{target.name}")]
        different += bool(done.returncode or contents(target) != expected or left)
    terminal.print(
        f"killed at {kills} random moments of {seconds:.1f} s, {interrupted} before the end: {kills - different} of "
        f"{kills} give the files of an undisturbed run: {verdict(not different)}"
    )
    return different


def contents(folder: Path) -> dict[str, str]:
    """sha256 of each file of a dataset."""
    if not folder.is_dir():
        return {}
    files = (path for path in sorted(folder.iterdir()) if path.name != VERIFIED_JSON)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


if __name__ == "__main__":
    sys.exit(main())
