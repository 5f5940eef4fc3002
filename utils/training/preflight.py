"""What a user should know before a run starts: it was run before, code is not recorded, settings have no effect, ..."""

from __future__ import annotations

import math
import shutil
import statistics
from collections.abc import Callable, Iterator, Sequence

import torch
from rich.text import Text

from utils.config.fields import FIELDS, config_hash, get_value
from utils.config.settings import ArithmeticConfig, Config, DataConfig
from utils.corpora.sources import ARITHMETIC
from utils.errors import UserError, shown
from utils.files import real_path
from utils.machine.attention_kernels import fused_attention
from utils.nn.lora import adapted_layers, count_parameters
from utils.runs.code import NOT_SOURCE, GitFacts
from utils.runs.identity import code_identity, origin_of
from utils.runs.index import IndexedRun, read_index
from utils.runs.layout import PATCH
from utils.runs.origin import parent_facts, pin
from utils.terminal.console import Terminal
from utils.terminal.words import one_line
from utils.training.setup import BYTES_PER_FROZEN_PARAMETER, Setup, decisive_settings, trained_outline

CHECKPOINT_BYTES_PER_PARAMETER = 12  # the weight and the two moments of AdamW, float32
FILES_SHOWN = 5
NO_SOURCE = f" ({NOT_SOURCE})"  # follows the names of files that are left out for this reason
LEAST_SEEDS = 2  # complete runs of other seeds from which the noise is estimated

# Settings that change nothing if the condition holds, with the reason.
WITHOUT_EFFECT: dict[str, tuple[Callable[[Setup], bool], str]] = {
    "bpe_vocab_size": (  # for a prepared dataset see FIXED_BY_DATASET
        lambda s: s.corpus.prepared is None and s.config.data.tokenizer != "bpe",
        "tokenizer is not bpe",
    ),
    **{
        key: (lambda s: s.config.data.dataset != ARITHMETIC, f"dataset is not {ARITHMETIC}")
        for key in ArithmeticConfig.model_fields
    },
    "rope_theta": (lambda s: s.config.model.position != "rope", "position is learned"),
    "rope_factor": (lambda s: s.config.model.rope_scaling == "none", "rope_scaling is none"),
    **{
        key: (
            lambda s: s.config.model.rope_scaling not in ("llama3", "yarn"),
            "rope_scaling is neither llama3 nor yarn",
        )
        for key in ("rope_original_context", "rope_low_freq", "rope_high_freq")
    },
    "full_attention_layers": (lambda s: s.config.model.sliding_window is None, "sliding_window is none"),
    "min_lr": (lambda s: s.config.optimizer.schedule == "constant", "schedule is constant"),
    "lr_decay_iters": (lambda s: s.config.optimizer.schedule == "constant", "schedule is constant"),
    "min_delta": (lambda s: s.config.train.patience is None, "patience is none"),
    "head_lr": (
        lambda s: s.config.model.tie_embeddings or s.config.optimizer.lora_rank is not None,
        "the head is the token embedding, or frozen (lora_rank)",
    ),
    **{
        key: (lambda s: s.config.optimizer.lora_rank is None, "lora_rank is none")
        for key in ("lora_alpha", "lora_dropout", "lora_targets")
    },
    **{
        key: (lambda s: s.config.optimizer.lora_rank is not None, "with lora_rank only adapters are trained")
        for key in ("embedding_lr", "vector_lr")
    },
    "momentum": (lambda s: s.config.optimizer.optimizer_name != "muon", "optimizer_name is not muon"),
    "momentum_warmup_iters": (lambda s: s.config.optimizer.optimizer_name != "muon", "optimizer_name is not muon"),
    "weight_decay_schedule": (lambda s: s.config.optimizer.weight_decay == 0, "weight_decay is 0"),
    "compile_mode": (lambda s: not s.config.train.compile, "compile is off"),
    "tf32": (lambda s: s.device.type != "cuda", "only CUDA has it"),
    "skip_nonfinite": (lambda s: s.dtype != torch.float16, "only float16 skips steps"),
    "profile_step": (lambda s: (s.config.train.profile_step or 0) >= s.max_iters, "the run ends before that step"),
    "sample_prompt": (lambda s: s.config.tracking.sample_tokens == 0, "sample_tokens is 0"),
    "aim_repo": (lambda s: not s.config.tracking.aim_logging, "aim_logging is off"),
    "experiment": (
        lambda s: not s.config.tracking.aim_logging and s.config.tracking.wandb_mode == "disabled",
        "neither Aim nor Weights & Biases is on",
    ),
}
FIXED_BY_DATASET = ("bpe_vocab_size", "special_tokens", "unknown_token", "val_fraction")  # when it is prepared
assert {*WITHOUT_EFFECT, *FIXED_BY_DATASET} <= FIELDS.keys()


def preflight(setup: Setup, git: GitFacts, runs: Sequence[IndexedRun] | None = None) -> list[str]:
    """The findings that the user may want to know, one line each. Call it after torch's threads are set.

    Args:
        runs: the index of the folder of runs, if it has been read already.
    """
    runs = read_index(setup.runs_dir) if runs is None else runs
    found = [*_run_before(setup, git, runs), *_code(git), *_disk(setup), *_attention(setup), *_adapters(setup)]
    return [*found, *_fixed_by_dataset(setup), *_without_effect(setup)]


def _run_before(setup: Setup, git: GitFacts, runs: Sequence[IndexedRun]) -> Iterator[str]:
    """A finding if there are runs of the same configuration and code."""
    own = config_hash(setup.config, decisive_settings(setup))
    origin = None
    if setup.origin is not None and setup.checkpoint is not None:  # the numbers depend on another run's weights, too
        parent = parent_facts(setup.origin, setup.checkpoint.step, setup.checkpoint.state)
        origin = (parent["relation"], parent["run"], parent["step"])
    candidates = (run for run in runs if run.record.get("config_hash") == own)
    same = [run for run in candidates if origin_of(run) == origin and _same_code(run, git)]
    if same:
        run, more = same[-1], f" and {len(same) - 1} more" if len(same) > 1 else ""
        loss = run.summary().get("best_val_loss")
        ended = run.status if loss is None else f"{run.status}, best val/loss {loss:.4f}"
        yield f"this configuration and code were run already: {run.id} ({ended}){more}"


def _same_code(run: IndexedRun, git: GitFacts) -> bool:
    commit = (run.record.get("git") or {}).get("commit")
    if commit is None:
        return False
    return code_identity(run) == (git.commit, git.fingerprint())


def _code(git: GitFacts) -> Iterator[str]:
    if git.problem and git.commit is None:
        yield f"the code is not recorded: {git.problem}"
    if git.patch:
        yield f"uncommitted changes, recorded in {PATCH}: {_listed(git.files)}"
    if git.left_out:
        yield f"not recorded: {_listed(_left_out(git.left_out))}"


def _left_out(names: Sequence[str]) -> list[str]:
    """The files left out and why; several that are not source files come first, as their number and an example."""
    data = [name.removesuffix(NO_SOURCE) for name in names if name.endswith(NO_SOURCE)]
    if len(data) < 2:
        return list(names)
    others = (name for name in names if not name.endswith(NO_SOURCE))
    return [f"{len(data):,} files that are not source files, such as {data[0]}", *others]


def _listed(files: Sequence[str]) -> str:
    """The first FILES_SHOWN of `files`, and how many more there are."""
    more = f" and {len(files) - FILES_SHOWN} more" if len(files) > FILES_SHOWN else ""
    return f"{', '.join(map(one_line, files[:FILES_SHOWN]))}{more}"


def _disk(setup: Setup) -> Iterator[str]:
    """A finding if the disk cannot hold the checkpoints that are kept and the one that is being written."""
    parameters = count_parameters(trained_outline(setup.config, setup.corpus.tokenizer.vocab_size))
    count = setup.config.train.keep_last + setup.config.train.keep_best + 1
    of_one = parameters.trainable * CHECKPOINT_BYTES_PER_PARAMETER
    base = parameters.frozen * BYTES_PER_FROZEN_PARAMETER
    needed = count * of_one + base
    folder = next(path for path in (setup.runs_dir, *real_path(setup.runs_dir).parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        frozen = f" and {_megabytes(base)} of frozen weights" if base else ""
        yield (
            f"the disk cannot hold the planned checkpoints: {count} of {_megabytes(of_one)}{frozen} "
            f"take {_megabytes(needed)}, and {_megabytes(free)} are free in {folder}"
        )


def _attention(setup: Setup) -> Iterator[str]:
    """A finding if attention on a GPU uses a slow kernel; not for float32, which has no fast one."""
    if setup.device.type != "cuda" or setup.dtype == torch.float32:
        return
    model = setup.config.model
    name, reasons = fused_attention(
        setup.device, setup.dtype, model.n_head, model.kv_heads, model.head_width, model.block_size, model.dropout
    )
    if not name:
        yield f"attention uses a slower kernel than FlashAttention or cuDNN's: {reasons}"


def _adapters(setup: Setup) -> Iterator[str]:
    """A finding if adapters would be trained on random weights, or have a higher rank than any change of a layer."""
    rank = setup.config.optimizer.lora_rank
    if rank is None:
        return
    if setup.origin is None:
        yield "lora_rank without --init-from: the frozen weights are random"
    for name, layer in adapted_layers(trained_outline(setup.config, setup.corpus.tokenizer.vocab_size)).items():
        if rank > (largest := min(*layer.lora_rows, layer.in_features)):
            yield (
                f"{setup.loaded.source('lora_rank')}: lora_rank {rank} is more than {largest}, the largest rank that a "
                f"change of {name} can have"
            )
            return


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.{1 if count < 1e7 else 0}f} MB"


def _fixed_by_dataset(setup: Setup) -> Iterator[str]:
    """Findings about settings that were fixed when the dataset was prepared, but have another value now."""
    if setup.corpus.prepared is None:
        return
    made = setup.corpus.prepared.dataset.facts.get("settings", {})
    asked, default = (config.model_dump(mode="json") for config in (setup.config.data, DataConfig()))
    for key in FIXED_BY_DATASET:
        source = setup.loaded.source(key)
        if (source.startswith("--") or asked[key] != default[key]) and asked[key] != made.get(key):
            own = f": {shown(made[key])}" if key in made else ""
            yield f"{source}: {key} has no effect: the prepared dataset has its own{own}"


def _without_effect(setup: Setup) -> Iterator[str]:
    default = Config()
    for key, (holds, reason) in WITHOUT_EFFECT.items():
        if get_value(setup.config, key) != get_value(default, key) and holds(setup):
            yield f"{setup.loaded.source(key)}: {key} has no effect: {reason}"


def report_noise(setup: Setup, git: GitFacts, runs: Sequence[IndexedRun], terminal: Terminal) -> None:
    """Print how much the loss varies with the seed, if this configuration and code were run with other seeds.

    This is not a finding: it says how small a difference the planned seeds can show.
    """
    if setup.origin is not None:
        return
    decisive = decisive_settings(setup)
    losses: dict[int, float] = {}
    for run in runs:
        seed = run.settings.get("seed")
        loss = run.summary().get("val/loss", math.nan)
        if run.status == "completed" and isinstance(seed, int) and math.isfinite(loss):
            of_seed = config_hash(pin(setup.config, {"seed": seed}), decisive)
            if run.record.get("config_hash") == of_seed and _same_code(run, git):
                losses[seed] = loss
    found = [loss for seed, loss in losses.items() if seed != setup.config.train.seed]
    if len(found) >= LEAST_SEEDS:
        deviation, planned = statistics.stdev(found), len(found) + 1
        terminal.print(
            Text.assemble(
                ("preflight: ", "yellow"),
                f"noise: over {len(found)} other seeds, the last val/loss of this configuration has a standard "
                f"deviation of {deviation:.2g}; {planned} seeds, against as many other runs, can show a difference of "
                f"about {detectable(deviation, planned):.2g}",
            )
        )


def detectable(deviation: float, seeds: int) -> float:
    """The difference between the means of two groups of `seeds` runs that a test at 5% finds in about 80% of cases.

    By the normal approximation, (1.96 + 0.84) standard errors of the difference.
    """
    return 2.8 * deviation * math.sqrt(2 / seeds)


def report_adapters(setup: Setup, terminal: Terminal) -> None:
    """Print how many parameters a run with adapters trains; this is not a finding."""
    if setup.config.optimizer.lora_rank is not None:
        counts = count_parameters(trained_outline(setup.config, setup.corpus.tokenizer.vocab_size))
        terminal.print(Text.assemble(("preflight: ", "yellow"), f"parameters: {counts.words}"))


def report_preflight(findings: Sequence[str], strict: bool, terminal: Terminal) -> None:
    """Print what the preflight found.

    Raises:
        UserError: there are findings, and `strict` is set.
    """
    if findings and strict:
        raise UserError("\n".join(f"--strict: {finding}" for finding in findings))
    for finding in findings:
        terminal.print(Text.assemble(("preflight: ", "yellow"), finding))
