"""How fast is a training step? Ours against the same model in Hugging Face transformers and Lightning.

python -m benchmarks.training                     # about half an hour on 2 CPU cores; needs requirements-bench.txt
python -m benchmarks.training --config configs/presets/gpt2_124m.yaml --repeats 3 --steps 50

nanoGPT's CPU model in GPT-2's form (learned positions, tanh GELU, biases, tied head), or as changed by --config; an
update is one micro-step. Every arm is a new process with the same number of threads, float32, batch, window length,
learning rate, weight decay and gradient clipping. All arms run once per repeat, in rotating order. A step's time is the
mean over the steps after the warmup, including work that is done only every 50 or 250 steps; the table shows medians
over the repeats. The text is random characters, since only time is measured.

ours: train.py with log, TensorBoard, Aim and histograms as configured, and the same with tracking off. (Records that
the views have not received when training ends are fed afterwards, which is not timed: see benchmarks.tracking.)
bare loop: GPT2LMHeadModel, clip_grad_norm_ and torch.optim.AdamW, with its default and with its fused kernel. It keeps
no log and never reads the loss.
HF Trainer, Lightning: transformers.Trainer and Lightning's Trainer around GPT2LMHeadModel, without checkpoints and
evaluation. Tracked: their own tracking of every step into TensorBoard (loss and learning rate; transformers also the
gradient norm), and their default progress bars. All off: no logging, progress bars or reports (Lightning:
barebones=True). Ours is compared with each, with all tracking on both sides and with none. All output goes into a pipe.

Matrix products: the time that those of a step would take at the rate of a large one, which is measured in the same run;
MFU is their share of the step. Peak memory is the resident memory of the process, including imports (on a GPU also its
tensors).
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import common
from benchmarks.training_arms import (
    ARMS,
    BARE,
    HF_OFF,
    HF_TRACKED,
    LIGHTNING_OFF,
    LIGHTNING_TRACKED,
    MARK,
    PEAK,
    TRACKED,
    UNTRACKED,
    Result,
    Task,
)
from utils.config.settings import Config, ModelConfig
from utils.errors import UserError
from utils.files import write_json
from utils.terminal.cli import Parser, script
from utils.terminal.console import Terminal
from utils.terminal.words import fact_lines

PACKAGES = ("transformers", "accelerate", "lightning")
LIMITS = (  # tokens/s of the first over those of the second
    (TRACKED, BARE, 1.7),
    (TRACKED, HF_TRACKED, 2.0),
    (UNTRACKED, HF_OFF, 2.0),
    (TRACKED, LIGHTNING_TRACKED, 2.0),
    (UNTRACKED, LIGHTNING_OFF, 2.0),
)
LEAST_WARMUP = 65  # by then the log has been written once, after which the views open
NANOGPT = {
    "n_layer": 4,
    "n_head": 4,
    "n_embd": 128,
    "block_size": 64,
    "dropout": 0.0,
    "position": "learned",
    "norm": "layernorm",
    "mlp": "gelu_tanh",
    "bias": True,
    "batch_size": 12,
    "learning_rate": 1e-3,
    "beta1": 0.9,
    "beta2": 0.99,
    "weight_decay": 0.1,
    "grad_clip": 1.0,
}
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu2": "relu2"}  # our names -> theirs


@script
def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("--steps", type=int, default=250, metavar="N", help="timed steps of a process (default: 250)")
    parser.add_argument(
        "--warmup",
        type=int,
        default=200,
        metavar="N",
        help="steps before those, in which the views open (default: 200)",
    )
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="processes of each arm (default: 7)")
    common.add_config_flag(parser)
    args = parser.parse(argv)
    common.at_least(1, steps=args.steps, repeats=args.repeats)
    common.at_least(LEAST_WARMUP, warmup=args.warmup)
    require(PACKAGES)
    terminal = Terminal()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = experiment(args.config, folder)
        tasks = {arm: make_task(arm, config, args.steps, args.warmup, folder) for arm in (PEAK, *ARMS)}
        terminal.print(experiment_facts(config, tasks[TRACKED]))
        arms = {arm: functools.partial(measure, task) for arm, task in tasks.items()}
        measured = common.interleaved(arms, args.repeats, lambda line: terminal.print(f"  {line}"))
    terminal.print(*report(config, measured, tasks[TRACKED].device), f"machine: {common.machine_facts()}")
    return 0


def require(packages: Sequence[str]) -> None:
    """Check that packages are installed.

    Raises:
        UserError: some are not.
    """
    if missing := [name for name in packages if find_spec(name) is None]:
        raise UserError(f"not installed: {', '.join(missing)}; python -m pip install -r requirements-bench.txt")


# --------------------------------------------------------------------------------------------- what is trained


def experiment(files: Sequence[Path], folder: Path) -> Config:
    """nanoGPT's CPU model changed by `files`, in float32, with a corpus of random characters.

    An update is one micro-step. Sets torch's threads as configured.

    Raises:
        UserError: a mistake in the files, a shape that GPT-2 cannot have, or a batch size that is not a number.
    """
    import torch

    write_json(folder / "nanogpt.json", NANOGPT)
    fixed: dict[str, str | bool] = {
        "dataset": str(common.random_text(folder / "random.txt")),
        "corpora_dir": str(folder / "corpora"),
        "dtype": "float32",
        "tf32": False,
    }
    config = common.load_config([folder / "nanogpt.json", *files], folder, fixed).config
    if config.model.n_embd % config.model.n_head:
        raise UserError(f"GPT-2 needs n_embd ({config.model.n_embd}) divisible by n_head ({config.model.n_head})")
    if config.train.batch_size == "auto":
        raise UserError("batch_size auto: every arm has the same batch, so it must be a number here")
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    batch_size = config.train.sequences // config.train.gradient_accumulation_steps
    single = {"batch_size": batch_size, "gradient_accumulation_steps": 1, "threads": torch.get_num_threads()}
    return config.model_copy(update={"train": config.train.model_copy(update=single)})


def gpt2_form(model: ModelConfig) -> ModelConfig:
    """The GPT-2 of the same depth, widths, heads, context and dropout."""
    return ModelConfig(
        n_layer=model.n_layer,
        n_head=model.n_head,
        n_embd=model.n_embd,
        ffn_dim=model.ffn_width,
        block_size=model.block_size,
        dropout=model.dropout,
        norm_eps=model.norm_eps,
        mlp=model.mlp if model.mlp in ACTIVATIONS else NANOGPT["mlp"],
        tie_embeddings=model.tie_embeddings,
    )


def gpt2_settings(model: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """The arguments of GPT2Config for `gpt2_form(model)`, without special tokens."""
    form = gpt2_form(model)
    return {
        "vocab_size": vocab_size,
        "n_positions": form.block_size,
        "n_embd": form.n_embd,
        "n_layer": form.n_layer,
        "n_head": form.n_head,
        "n_inner": form.ffn_width,
        "activation_function": ACTIVATIONS[form.mlp],
        "layer_norm_epsilon": form.norm_eps,
        "resid_pdrop": form.dropout,
        "embd_pdrop": form.dropout,
        "attn_pdrop": form.dropout,
        "tie_word_embeddings": form.tie_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def beyond_gpt2(config: Config) -> list[str]:
    """What only our model has, such as "position rope" or "mlp swiglu"."""
    form, model = gpt2_form(config.model), config.model
    ours, theirs = (shape.model_dump() | shape.derived for shape in (model, form))
    unused = set() if model.position == "rope" else {"rope_theta"}
    found = [f"{key} {_word(ours[key])}" for key in ours if ours[key] != theirs[key] and key not in unused]
    if config.optimizer.optimizer_name != "adamw":
        found.append(f"optimizer {config.optimizer.optimizer_name}")
    return found + (["compile on"] if config.train.compile else [])


def _word(value: object) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else f"{value}"


def make_task(arm: str, config: Config, steps: int, warmup: int, folder: Path) -> Task:
    from utils.machine.device import choose_device

    write_json(folder / "config.json", config.model_dump(mode="json"))
    optimizer = config.optimizer
    assert config.train.threads is not None
    return Task(
        arm=arm,
        config=str(folder / "config.json"),
        gpt2=gpt2_settings(config.model, len(common.ALPHABET)),
        batch_size=config.train.sequences,
        learning_rate=optimizer.learning_rate,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.adam_eps,
        weight_decay=optimizer.weight_decay,
        grad_clip=optimizer.grad_clip,
        steps=steps,
        warmup=warmup,
        threads=config.train.threads,
        device=choose_device(config.train.device).type,
        folder=str(folder),
    )


def experiment_facts(config: Config, task: Task) -> Any:
    model = config.model
    shape = f"{model.n_layer} layers, {model.n_head} heads, n_embd {model.n_embd}, {model.mlp}"
    data = f"{task.batch_size} x {model.block_size} tokens, vocabulary {len(common.ALPHABET)}"
    lines = [("model", shape), ("batch", data), ("device", f"{task.device}, float32, {task.threads} threads")]
    if more := beyond_gpt2(config):
        lines.append(("ours alone", ", ".join(more)))
    return fact_lines(lines)


# -------------------------------------------------------------------------------------------------- measuring


def measure(task: Task) -> tuple[Result, float]:
    """Run an arm in a new process; returns its result and its peak of resident memory in MB.

    Raises:
        UserError: it failed, or did not use the given number of threads.
    """
    with tempfile.TemporaryDirectory(dir=task.folder) as folder:
        path = Path(folder) / "task.json"
        (Path(folder) / "own").mkdir()
        write_json(path, asdict(task) | {"folder": str(Path(folder) / "own")})
        done = common.launch([sys.executable, "-m", "benchmarks.training_arms", str(path)], task.arm)
    (line,) = (line for line in done.output.splitlines() if line.startswith(MARK))
    result = Result(**json.loads(line.removeprefix(MARK)))
    if result.threads != task.threads:
        raise UserError(f"{task.arm}: computed with {result.threads} threads, not {task.threads}")
    return result, done.memory_mb


def report(config: Config, measured: Mapping[str, Sequence[tuple[Result, float]]], device: str) -> list[Any]:
    """The table and the lines below it."""
    tokens = config.train.sequences * config.model.block_size
    gflops = statistics.median(result.gflops for result, _ in measured[PEAK])
    step_ms = {arm: statistics.median(result.step_ms for result, _ in measured[arm]) for arm in ARMS}
    speeds = {arm: [tokens / result.step_ms * 1000 for result, _ in measured[arm]] for arm in ARMS}
    memory = {arm: max(resident for _, resident in measured[arm]) for arm in ARMS}
    parameters = {arm: measured[arm][0][0].parameters for arm in ARMS}
    table = Table(title="Training steps, medians of processes in turn", title_justify="left", title_style="bold")
    table.add_column("", style="cyan", no_wrap=True)
    for header in ["ms/step", "tokens/s", "/ bare (95%)", "MFU", "peak MB"] + ["GPU MB"] * (device == "cuda"):
        table.add_column(header, justify="right", no_wrap=True)
    for arm, ms in step_ms.items():
        ratio, low, high = common.ratio_interval(speeds[arm], speeds[BARE])
        cells = [f"{ms:.2f}", f"{tokens / ms * 1000:,.0f}", f"{ratio:.2f} ({low:.2f}-{high:.2f})"]
        cells += [f"{gflop(config, arm) / gflops * 1000 / ms:.0%}", f"{memory[arm]:,.0f}"]
        if device == "cuda":
            cells.append(f"{max(result.gpu_mb for result, _ in measured[arm]):,.0f}")
        table.add_row(arm, *cells)
    needed = gflop(config, TRACKED)
    lines = [
        f"parameters: ours {parameters[TRACKED]:,}, GPT-2 {parameters[BARE]:,}",
        f"matrix products: {needed:.2f} GFLOP a step, {needed / gflops * 1000:.1f} ms at the {gflops:,.0f} GFLOP/s of "
        f"a large one; {TRACKED}: {step_ms[TRACKED]:.1f} ms",
    ]
    for own, other, limit in LIMITS:
        ratio, low, high = common.ratio_interval(speeds[own], speeds[other])
        reached = common.verdict(ratio >= limit)
        lines.append(f"{own} / {other}: {ratio:.2f} (95%: {low:.2f}-{high:.2f}), at least {limit:g} {reached}")
    reached = common.verdict(memory[TRACKED] <= memory[BARE])
    lines.append(f"peak memory: {memory[TRACKED]:,.0f} MB, {BARE} {memory[BARE]:,.0f} MB, no higher: {reached}")
    return [table, *lines]


def gflop(config: Config, arm: str) -> float:
    """GFLOP that the matrix products of a step of this arm need."""
    from model import outline
    from utils.nn.costs import training_flops

    model = config.model if arm in (TRACKED, UNTRACKED) else gpt2_form(config.model)
    return training_flops(outline(model, len(common.ALPHABET)), config.train.sequences, model.block_size) / 1e9


if __name__ == "__main__":
    sys.exit(main())
