"""How fast are weights loaded, in how much memory, and how fast does `weights.py inspect` show a file?

python -m benchmarks.loading                    # two minutes on 2 CPU cores; writes 500 MB to a temporary folder
python -m benchmarks.loading --shape small --repeats 1

An export of GPT-2's shape (124M parameters, 498 MB) is loaded into a model that is ready to generate, and its checksum
is verified; its weights are the mapped file. This is compared with safetensors.torch.load_file followed by a copy of
the tensors, which reads the whole file, as the checksum does. load_file alone, the third arm, only maps the file and
reads nothing. Each measurement is a process of its own; the arms take turns. Anonymous memory is the memory of a
process without the pages of files, sampled every 2 ms, minus that before the load. Loads are timed in other processes,
without sampling.

Then exports for transformers, in files of 100 MB, written and read again: the time, and the anonymous memory in
addition to the model itself. Then `weights.py inspect` of the same file: the time and memory of the whole process. Then
greedy generation by the loaded model against the same model made in memory; both take turns in one process.
"""

from __future__ import annotations

import functools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import common
from benchmarks.decode import Shape
from utils.errors import UserError
from utils.terminal.cli import PROJECT_ROOT, Parser, script
from utils.terminal.console import Terminal

LIBRARY, MAPPED, OURS = "load_file, then copied", "load_file alone, mapped", "export to a ready model"
LIMITS = {"seconds": 1.3, "memory": 1.2, "inspect seconds": 0.5, "inspect MB": 100.0, "export": 0.5, "decode": 0.95}
SAMPLER = """
import json, sys, threading, time
from pathlib import Path
import torch

def anonymous():
    with open("/proc/self/status") as status:
        return next((int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon")), 0)

def sample():
    while not done.wait(0.002):
        seen.append(anonymous())

def measured(act):
    global done, seen
    done, before = threading.Event(), anonymous()
    seen = [before]
    sampler = threading.Thread(target=sample if sys.argv[3] == "memory" else done.wait)
    sampler.start()
    began = time.perf_counter()
    kept = act()
    seconds = time.perf_counter() - began
    seen.append(anonymous())
    done.set()
    sampler.join()
    print(json.dumps({"seconds": seconds, "anonymous": max(seen) - before}))
"""
LOAD = """
from safetensors.torch import load_file
from utils.checkpoints.folder import WEIGHTS_FILE
from utils.inference.export import load_export

folder, kind = Path(sys.argv[1]), sys.argv[2]
arms = {
    "mapped": lambda: load_file(folder / WEIGHTS_FILE),
    "copied": lambda: {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS_FILE).items()},
    "ours": lambda: load_export(folder, torch.device("cpu")),
}
measured(arms[kind])
"""
EXPORT = """
sys.modules["transformers"] = None  # its own copy of the weights would be counted
from utils.formats.exports import export_as
from utils.formats.source import open_source

folder, dtype = sys.argv[1:3]
source = open_source(folder, Path())
measured(lambda: export_as(source, "hf", Path(folder).with_name(dtype), dtype, 10**8, None))
"""


SHAPES = {"small": Shape(2, 2, 32, 32, 65, 16), "gpt2": Shape(12, 12, 768, 1024, 50257, 24)}


@script
def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m benchmarks.loading", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="measurements of each arm (default: 5)")
    parser.add_argument("--shape", choices=SHAPES, default="gpt2", help="shape of the model (default: gpt2)")
    args = parser.parse(argv)
    common.at_least(1, repeats=args.repeats)
    terminal, shape = Terminal(), SHAPES[args.shape]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "gpt2"
        size = write_export(folder, shape)
        report_loads(folder, size, args.repeats, terminal)
        report_exports(folder, size, args.repeats, terminal)
        report_inspect(folder, args.repeats, terminal)
        report_decode(folder, shape, args.repeats, terminal)
    terminal.print(f"machine: {common.machine_facts()}")
    return 0


def write_export(folder: Path, shape: Shape) -> int:
    """Write an export with random weights; returns the size of its weights in bytes."""
    from tokenizer import build_tokenizer
    from utils.checkpoints.folder import WEIGHTS_FILE
    from utils.config.settings import DataConfig
    from utils.inference.export import save_export

    characters = (chr(0x20000 + number) for number in range(shape.vocab_size))
    save_export(folder, a_model(shape), build_tokenizer(DataConfig(), ["".join(characters)]), {})
    return (folder / WEIGHTS_FILE).stat().st_size


def a_model(shape: Shape) -> Any:
    import torch

    from model import LanguageModel
    from utils.config.settings import ModelConfig

    sizes = {"n_layer": shape.n_layer, "n_head": shape.n_head, "n_embd": shape.n_embd, "block_size": shape.block_size}
    torch.manual_seed(0)
    return LanguageModel(ModelConfig(mlp="gelu_tanh", **sizes), shape.vocab_size).eval()


def load(folder: Path, kind: str) -> dict[str, float]:
    """Load twice, each in a process of its own: for the time and for the memory (see `measure`)."""
    timed, watched = (measure(LOAD, folder, kind, what) for what in ("time", "memory"))
    return {"seconds": timed["seconds"], "anonymous": watched["anonymous"]}


def measure(code: str, folder: Path, kind: str, what: str = "memory") -> dict[str, float]:
    """Run the code in a process of its own; returns seconds, and the most anonymous memory in bytes.

    Args:
        what: "memory", or "time", without sampling of the memory.

    Raises:
        UserError: it fails.
    """
    command = [sys.executable, "-c", SAMPLER + code, str(folder), kind, what]
    result = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"{kind}: {result.stderr.strip().splitlines()[-1]}")
    found: dict[str, float] = json.loads(result.stdout)
    return found


def report_loads(folder: Path, size: int, repeats: int, terminal: Terminal) -> None:
    arms: dict[str, Callable[[], dict[str, float]]] = {
        LIBRARY: functools.partial(load, folder, "copied"),
        MAPPED: functools.partial(load, folder, "mapped"),
        OURS: functools.partial(load, folder, "ours"),
    }
    measured = common.interleaved(arms, repeats)
    table = Table(title=f"an export of {size / 1e6:,.0f} MB", title_justify="left")
    for column in ("", "median s", "least s", "anonymous memory / weights"):
        table.add_column(column, justify="left" if not column else "right")
    for arm, found in measured.items():
        seconds = [one["seconds"] for one in found]
        memory = max(one["anonymous"] for one in found) / size
        table.add_row(arm, f"{statistics.median(seconds):.2f}", f"{min(seconds):.2f}", f"{memory:.2f}")
    ours, theirs = ([one["seconds"] for one in measured[arm]] for arm in (OURS, LIBRARY))
    ratio, low, high = common.ratio_interval(ours, theirs)
    memory = max(one["anonymous"] for one in measured[OURS]) / size
    terminal.print(
        table,
        f"time: {ratio:.2f} times (95%: {low:.2f}-{high:.2f}), at most {LIMITS['seconds']:g} "
        f"{common.verdict(ratio <= LIMITS['seconds'])}",
        f"memory: {memory:.2f} times the weights, at most {LIMITS['memory']:g} "
        f"{common.verdict(memory <= LIMITS['memory'])}",
    )


def report_exports(folder: Path, size: int, repeats: int, terminal: Terminal) -> None:
    for dtype in ("float32", "bfloat16"):
        found = [measure(EXPORT, folder, dtype) for _ in range(repeats)]
        seconds = statistics.median(one["seconds"] for one in found)
        memory = max(one["anonymous"] for one in found) / size
        terminal.print(
            f"export for transformers in {dtype}: {seconds:.1f} s, {memory:.2f} times the weights in addition, at most "
            f"{LIMITS['export']:g} {common.verdict(memory <= LIMITS['export'])}"
        )


def report_inspect(folder: Path, repeats: int, terminal: Terminal) -> None:
    words = [sys.executable, "weights.py", "inspect", str(folder)]
    found = [common.launch(words, "inspect") for _ in range(repeats + 1)][1:]
    seconds, memory = statistics.median(one.seconds for one in found), max(one.memory_mb for one in found)
    reached = seconds <= LIMITS["inspect seconds"] and memory <= LIMITS["inspect MB"]
    terminal.print(
        f"inspect: {seconds:.2f} s, {memory:.0f} MB, at most {LIMITS['inspect seconds']:g} s and "
        f"{LIMITS['inspect MB']:.0f} MB {common.verdict(reached)}"
    )


def report_decode(folder: Path, shape: Shape, repeats: int, terminal: Terminal) -> None:
    import torch

    from benchmarks.decode import PROMPT, a_prompt, by_us, warmed
    from utils.inference.export import load_export
    from utils.inference.quantization import with_weights

    models = {"loaded": load_export(folder, torch.device("cpu")).model, "made": a_model(shape)}
    arms: dict[str, Callable[[], float]] = {
        name: functools.partial(
            warmed, functools.partial(by_us, with_weights(model, "float32"), [a_prompt(PROMPT)]), shape.tokens
        )
        for name, model in models.items()
    }
    seconds = common.interleaved(arms, repeats + 1)
    rates = {name: shape.tokens / statistics.median(times[1:]) for name, times in seconds.items()}
    ratio, low, high = common.median_ratio(seconds["made"][1:], seconds["loaded"][1:])
    terminal.print(
        f"decode: loaded {rates['loaded']:,.1f} tokens/s, made in memory {rates['made']:,.1f}; {ratio:.2f} times "
        f"(95%: {low:.2f}-{high:.2f}), at least {LIMITS['decode']:g} {common.verdict(ratio >= LIMITS['decode'])}"
    )


if __name__ == "__main__":
    sys.exit(main())
