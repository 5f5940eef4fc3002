"""How fast is text generated? Our generation against transformers' cached generate, with the same weights.

python -m benchmarks.decode                     # some minutes on 2 CPU cores; needs requirements-bench.txt
python -m benchmarks.decode --repeats 3 --shapes small,medium

Three shapes of GPT-2 with random weights generate one sequence greedily after a prompt of 16 tokens: transformers'
generate(), ours in float32, and ours with bfloat16 and int8 weights. The arms take turns. Each first generates a short
text that is not timed, because the previous arm has left its own code and weights in the caches. The table has medians
over the repeats. A token reads all weights once, so memory bandwidth is the limit: the table has the bytes of weights
and cache read per second, and their share of the bandwidth that is measured in the same run.

Then, with the medium shape: 16 sequences against one, and the first token after a prompt of 200 against a forward pass
over it. With the small shape: 20,000 tokens in a row, with the memory before and after, and the time of a token at each
position in the window.
"""

from __future__ import annotations

import functools
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.table import Table

from benchmarks import common
from benchmarks.training import require
from utils.errors import UserError
from utils.terminal.cli import Parser, script
from utils.terminal.console import Terminal

if TYPE_CHECKING:
    from model import LanguageModel
    from utils.inference.quantization import Weights

WARM_UP = 8  # tokens
PROMPT, BATCH, LONG_PROMPT, LONG_TEXT = 16, 16, 200, 20_000
OURS, THEIRS, BFLOAT16, INT8 = "ours, float32", "transformers, float32", "ours, bfloat16 weights", "ours, int8 weights"
LIMITS = {"batch": 6.0, "first token": 1.2}


@dataclass(frozen=True)
class Shape:
    """The shape of a GPT-2. limits: for some arms, the least tokens/s as a multiple of those of transformers."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int
    tokens: int
    limits: dict[str, float] = field(default_factory=dict)


SHAPES = {
    "small": Shape(4, 4, 128, 64, 65, 48, {OURS: 3.5}),
    "medium": Shape(6, 6, 384, 256, 65, 100, {OURS: 2.2}),
    "large": Shape(12, 12, 768, 1024, 50304, 24, {OURS: 1.25, BFLOAT16: 2.0, INT8: 2.0}),
}


@script
def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m benchmarks.decode", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="measurements of each arm (default: 5)")
    parser.add_argument(
        "--shapes", default=",".join(SHAPES), metavar="NAMES", help=f"some of {', '.join(SHAPES)} (default: all)"
    )
    args = parser.parse(argv)
    common.at_least(1, repeats=args.repeats)
    names = args.shapes.split(",")
    if unknown := [name for name in names if name not in SHAPES]:
        raise UserError(f"--shapes: expected some of {', '.join(SHAPES)}, got {unknown[0]!r}")
    require(("transformers",))
    terminal = Terminal()
    for name in names:
        report_shape(name, SHAPES[name], args.repeats, terminal)
    if "medium" in names:
        report_batch(args.repeats, terminal)
        report_first_token(args.repeats, terminal)
    if "small" in names:
        report_long_text(terminal)
    terminal.print(f"machine: {common.machine_facts()}")
    return 0


# ------------------------------------------------------------------------------------------------- the arms


def gpt2(shape: Shape) -> Any:
    """A GPT2LMHeadModel of this shape, with random weights."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_layer": shape.n_layer, "n_head": shape.n_head, "n_embd": shape.n_embd, "n_positions": shape.block_size}
    return GPT2LMHeadModel(GPT2Config(vocab_size=shape.vocab_size, **sizes)).eval()


def ours(shape: Shape, weights: Weights = "float32") -> LanguageModel:
    """Our model with the weights of `gpt2(shape)`."""
    from benchmarks.foreign_weights import from_transformers
    from utils.inference.quantization import with_weights

    return with_weights(from_transformers(gpt2(shape)), weights)


def by_transformers(model: Any, prompt: list[int], count: int) -> float:
    """Seconds that transformers' generate takes for `count` tokens."""
    import torch

    idx = torch.tensor([prompt])
    began = time.perf_counter()
    model.generate(
        idx,
        attention_mask=torch.ones_like(idx),
        do_sample=False,
        max_new_tokens=count,
        min_new_tokens=count,
        use_cache=True,
        pad_token_id=0,
    )
    return time.perf_counter() - began


def by_us(model: LanguageModel, prompts: Sequence[list[int]], count: int) -> float:
    """Seconds that `generate` takes for `count` tokens of each sequence."""
    from utils.inference.decode import generate
    from utils.inference.sampling import SamplingOptions

    began = time.perf_counter()
    for _ in generate(model, prompts, count, SamplingOptions(temperature=0), range(len(prompts))):
        pass
    return time.perf_counter() - began


def warmed(arm: Callable[[int], float], count: int) -> float:
    """Seconds that an arm takes for `count` tokens, after a warmup."""
    arm(WARM_UP)
    return arm(count)


def a_prompt(length: int, first: int = 0) -> list[int]:
    return [(first + 7 * position) % 65 for position in range(length)]


# ------------------------------------------------------------------------------------------------- the reports


def report_shape(name: str, shape: Shape, repeats: int, terminal: Terminal) -> None:
    import torch

    from utils.machine.limits import measure_read

    arms: dict[str, Callable[[], float]] = {}
    gigabytes: dict[str, float] = {}
    theirs = gpt2(shape)
    arms[THEIRS] = functools.partial(warmed, functools.partial(by_transformers, theirs, a_prompt(PROMPT)), shape.tokens)
    smaller: dict[str, Weights] = {OURS: "float32", BFLOAT16: "bfloat16", INT8: "int8"}
    for arm, weights in smaller.items():
        model = ours(shape, weights)
        arms[arm] = functools.partial(warmed, functools.partial(by_us, model, [a_prompt(PROMPT)]), shape.tokens)
        gigabytes[arm] = bytes_of_a_token(model, PROMPT + shape.tokens / 2) / 1e9
    gigabytes[THEIRS] = gigabytes[OURS]
    for first in arms.values():
        first()
    seconds = common.interleaved(arms, repeats)
    reads = measure_read(torch.device("cpu")) / 1e9
    sizes = (shape.n_layer, shape.n_head, shape.n_embd, shape.block_size, shape.vocab_size)
    table = Table(title=f"{name}: layers, heads, width, context, vocabulary {sizes}", title_justify="left")
    for column in ("", "tokens/s", "/ transformers (95%)", "GB/s", "of the limit"):
        table.add_column(column, justify="left" if not column else "right")
    verdicts = []
    for arm, times in seconds.items():
        rate = shape.tokens / statistics.median(times)
        ratio, low, high = common.ratio_interval(seconds[THEIRS], times)
        used = gigabytes[arm] * rate
        table.add_row(arm, f"{rate:,.1f}", f"{ratio:.2f} ({low:.2f}-{high:.2f})", f"{used:.1f}", f"{used / reads:.0%}")
        if arm in shape.limits:
            least = shape.limits[arm]
            verdicts.append(f"{arm}: {ratio:.2f}, at least {least:g} {common.verdict(ratio >= least)}")
    terminal.print(table, f"limit: {reads:.1f} GB/s read", *verdicts)


def report_batch(repeats: int, terminal: Terminal) -> None:
    shape = SHAPES["medium"]
    model = ours(shape)
    arms: dict[str, Callable[[], float]] = {
        str(batch): functools.partial(by_us, model, [a_prompt(PROMPT, row) for row in range(batch)], shape.tokens)
        for batch in (1, BATCH)
    }
    seconds = common.interleaved(arms, repeats + 1)
    one, many = (shape.tokens * batch / statistics.median(seconds[str(batch)][1:]) for batch in (1, BATCH))
    reached = common.verdict(many >= LIMITS["batch"] * one)
    terminal.print(
        f"medium, {BATCH} sequences: {many:,.0f} tokens/s, one: {one:,.0f}; {many / one:.1f} times, "
        f"at least {LIMITS['batch']:g} {reached}"
    )


def report_first_token(repeats: int, terminal: Terminal) -> None:
    import torch

    model = ours(SHAPES["medium"])
    idx = torch.tensor([a_prompt(LONG_PROMPT)])

    def forward() -> float:
        began = time.perf_counter()
        with torch.no_grad():
            model(idx)
        return time.perf_counter() - began

    arms: dict[str, Callable[[], float]] = {
        "first token": functools.partial(by_us, model, idx.tolist(), 1),
        "forward": forward,
    }
    seconds = common.interleaved(arms, 4 * repeats + 1)
    first, whole = (1000 * statistics.median(seconds[arm][1:]) for arm in arms)
    reached = common.verdict(first <= LIMITS["first token"] * whole)
    terminal.print(
        f"medium, first token after {LONG_PROMPT}: {first:.1f} ms, one forward pass: {whole:.1f} ms; "
        f"{first / whole:.2f} times, at most {LIMITS['first token']:g} {reached}"
    )


def report_long_text(terminal: Terminal) -> None:
    """Print the time of a token at each position in the window, and the memory."""
    import psutil

    from utils.inference.decode import generate
    from utils.inference.sampling import SamplingOptions

    shape, process = SHAPES["small"], psutil.Process()
    model = ours(shape)
    half = shape.block_size // 2
    times: list[float] = []
    memory: list[int] = []
    began = time.perf_counter()
    for index, _ in enumerate(generate(model, [a_prompt(PROMPT)], LONG_TEXT, SamplingOptions(), [0])):
        now = time.perf_counter()
        times.append(now - began)
        if index % (LONG_TEXT // 20) == LONG_TEXT // 20 - 1:
            gc.collect()
            memory.append(process.memory_info().rss)
        began = time.perf_counter()
    # Once the context is full, its newer half is computed again every `half` tokens; that token is shown separately.
    cycles = [times[start : start + half] for start in range(shape.block_size - PROMPT + 1, LONG_TEXT - half, half)]
    places = [1000 * statistics.median(place) for place in zip(*cycles, strict=True)]
    renewal, rest = max(places), sorted(places)[:-1]
    terminal.print(
        f"small, {LONG_TEXT:,} tokens: {LONG_TEXT / sum(times):,.0f} tokens/s; "
        f"memory {memory[0] / 1e6:.1f} MB after {LONG_TEXT // 20:,}, {memory[-1] / 1e6:.1f} MB at the end; "
        f"a token takes {min(rest):.2f} to {max(rest):.2f} ms in the window, {renewal:.2f} ms where it is renewed"
    )


def bytes_of_a_token(model: LanguageModel, context: float) -> float:
    from utils.inference.decode import new_cache
    from utils.profiling.decoding import decode_bytes

    return decode_bytes(model, new_cache(model, 1), context)


if __name__ == "__main__":
    sys.exit(main())
