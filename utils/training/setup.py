"""The checks before a run directory is made: configuration, corpus, device, origin."""

from __future__ import annotations

import contextlib
import math
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from data import Corpus, load_corpus
from model import LanguageModel, outline
from tokenizer import Tokenizer, check_tokenizer, load_tokenizer, tokenizer_from_json
from utils.checkpoints.choose import choose_checkpoint
from utils.checkpoints.files import Checkpoint
from utils.checkpoints.folder import TOKENIZER_FILE
from utils.config.fields import derived_settings, get_value
from utils.config.loader import LoadedConfig, rule_error
from utils.config.section import RuleError
from utils.config.settings import Config, warmup_steps
from utils.corpora.absolute_paths import with_absolute_paths
from utils.corpora.datasets import find_dataset
from utils.corpora.sources import ARITHMETIC, NAMES, CorpusError
from utils.errors import UserError, shown
from utils.files import dangling_link
from utils.formats.finetuning import pretrained_as_checkpoint
from utils.inference.decode import start_tokens
from utils.inference.export import export_as_checkpoint
from utils.machine.device import (
    DeviceError,
    available_devices,
    available_memory,
    check_fp8,
    choose_device,
    choose_dtype,
    is_deterministic,
)
from utils.machine.ranks import ONE, Ranks
from utils.nn.costs import shapes_only
from utils.nn.lora import add_adapters, count_parameters
from utils.packing.prepared import check_made_with
from utils.preparation.arithmetic import check_block_size, with_problems
from utils.runs.find import is_export, moved_path
from utils.runs.index import read_settings
from utils.runs.layout import CHECKPOINTS, TOKENIZER
from utils.runs.origin import OUTPUT_KEYS, Origin, pin, pinned_settings
from utils.runs.origin_checks import check_fork, check_model
from utils.runs.run import read_record
from utils.training.batch_size import check_micro_step, find_batch
from utils.training.callbacks import Callback, load_callbacks

TRAINING_BYTES_PER_PARAMETER = {"adamw": 16, "muon": 12}  # at least: float32 weight, gradient, moments; others: 8
BYTES_PER_FROZEN_PARAMETER = 4


@dataclass(frozen=True)
class Setup:
    """Everything that a run needs and that is known before its directory is made.

    loaded: the merged configuration; the batch that `batch_size auto` found is its top layer.
    config: the values of `loaded`; a resume keeps the values that "auto" resolved to when the run was started.
    origin, checkpoint: where a fork or fine-tuning starts. (A resume reads its checkpoint after taking the lock.)
    """

    root: Path
    loaded: LoadedConfig
    config: Config
    corpus: Corpus
    device: torch.device
    dtype: torch.dtype
    max_iters: int
    callbacks: Mapping[str, Callback]
    origin: Origin | None = None
    checkpoint: Checkpoint | None = None
    ranks: Ranks = ONE

    @property
    def resumes(self) -> bool:
        return self.origin is not None and self.origin.relation == "resume"

    @property
    def runs_dir(self) -> Path:
        return self.root / self.config.tracking.runs_dir

    @property
    def epochs(self) -> float:
        """Passes over the training tokens that the run will make."""
        tokens = self.max_iters * self.config.train.sequences * self.config.model.block_size
        return tokens / self.corpus.tokens_of_pass(self.config.model.block_size)


def make_setup(
    loaded: LoadedConfig,
    root: Path,
    origin: Origin | None = None,
    warn: Callable[[str], None] = lambda message: None,
    report: Callable[[str], None] = lambda message: None,
    ranks: Ranks = ONE,
) -> Setup:
    """Check the corpus, device, batch and origin of a configuration that is valid in itself.

    Args:
        root: the folder that relative paths start from.
        warn, report: print one line to the user.
        ranks: the ranks that train together; this process is rank 0.

    Raises:
        UserError: the first mistake found.
    """
    loaded = with_absolute_paths(loaded, root)
    config = loaded.config
    check_output_folders(loaded, root)
    checkpoint, tokenizer, datasets_dir = None, None, root / config.data.datasets_dir
    resumes = origin is not None and origin.relation == "resume"
    if origin is not None and resumes:
        config = pin(config, pinned_settings(config, read_record(origin.run)))
        tokenizer = load_tokenizer(origin.run / TOKENIZER) if (origin.run / TOKENIZER).is_file() else None
    elif origin is not None:
        checkpoint, tokenizer = read_parent(origin, config, datasets_dir, warn)
        if origin.relation == "fork":
            check_fork(config.optimizer, checkpoint.state, origin.run.name)
    device = device_of_rank(config, ranks)  # quick checks first: reading a corpus may take long
    dtype = choose_dtype(config.train.dtype, device)
    if config.train.fp8:
        check_fp8(device, dtype)
    callbacks = load_callbacks(config.train.callbacks, root / config.tracking.runs_dir, root)
    try:
        corpus = read_corpus(config, root, tokenizer, warn, report)
        if corpus.prepared is not None and loaded.source("tokenizer").startswith("--"):
            check_made_with(corpus.prepared.dataset, corpus.tokenizer, config.data)
    except CorpusError as error:
        if resumes and not os.path.exists(config.data.dataset):
            raise UserError(f"{error}; if it was moved, --dataset gives its new place") from None
        raise
    if origin is not None and origin.relation == "fork":
        assert checkpoint is not None
        _warn_of_other_text(origin, checkpoint, corpus, root, warn)
    start_tokens(corpus.tokenizer, config.tracking.sample_prompt)
    check_memory(loaded, corpus.tokenizer.vocab_size, device, ranks)
    if config.train.batch_size == "auto":
        loaded = find_batch(loaded, corpus, device, dtype, report, ranks)
        config = loaded.config
    check_ranks(loaded, ranks)
    check_micro_step(loaded, corpus, device, dtype, ranks)
    max_iters = steps_of(loaded, corpus)
    if origin is not None and origin.relation == "fork":
        assert checkpoint is not None
        _check_steps_left(origin, checkpoint, max_iters)
    return Setup(root, loaded, config, corpus, device, dtype, max_iters, callbacks, origin, checkpoint, ranks)


def steps_of(loaded: LoadedConfig, corpus: Corpus) -> int:
    """The number of steps of the run: `max_iters`, or as many as `epochs` passes over the corpus take.

    Raises:
        UserError: there are too few for the warmup.
    """
    config = loaded.config
    if config.train.max_iters is not None:
        return config.train.max_iters
    assert config.train.epochs is not None
    tokens = config.train.epochs * corpus.tokens_of_pass(config.model.block_size)
    max_iters = math.ceil(tokens / config.train.sequences / config.model.block_size)
    try:
        warmup_steps(config.optimizer, max_iters)
    except RuleError as error:
        raise rule_error(error, loaded) from None
    return max_iters


def read_corpus(
    config: Config,
    root: Path,
    tokenizer: Tokenizer | None,
    warn: Callable[[str], None] = lambda message: None,
    report: Callable[[str], None] = lambda message: None,
) -> Corpus:
    """Read the corpus of a configuration; its tokens may not be stored yet. For the arguments see `make_setup`.

    Raises:
        CorpusError: it cannot be read, `tokenizer` cannot encode it, or it is too short.
    """
    folder, block_size = root / config.data.corpora_dir, config.model.block_size
    data = with_problems(config, folder)
    if config.data.dataset == ARITHMETIC:
        check_block_size(data, block_size)
    datasets_dir = root / config.data.datasets_dir
    corpus = load_corpus(data, block_size, folder, tokenizer, warn, report, keep=False, datasets_dir=datasets_dir)
    return replace(corpus, name=config.data.dataset)


def device_of_rank(config: Config, ranks: Ranks) -> torch.device:
    """The device that this rank computes on; each of several ranks on a machine has a CUDA device of its own.

    Raises:
        DeviceError: there is no such device here, or several ranks cannot use it.
    """
    name = config.train.device
    device = choose_device(name)
    if not ranks.several or device.type == "cpu":
        return device
    if device.type != "cuda":
        raise DeviceError(f"several ranks train on CUDA devices or the CPU, not on {device.type}: --device cpu")
    if ":" in name:
        raise DeviceError(f"device {name} is one device, and each rank needs its own: --device cuda")
    if ranks.local_rank >= torch.cuda.device_count():
        raise DeviceError(
            f"rank {ranks.rank} needs cuda:{ranks.local_rank}, which is not here; available: "
            f"{', '.join(available_devices())}"
        )
    return torch.device("cuda", ranks.local_rank)


def check_ranks(loaded: LoadedConfig, ranks: Ranks) -> None:
    """Raises UserError unless the ranks can share the batch, or its lanes, equally."""
    settings, count = loaded.config.train, ranks.world_size
    if not ranks.several:
        return
    if settings.lanes is not None:
        if settings.lanes % count:
            raise UserError(
                f"{loaded.source('lanes')}: {count} ranks cannot share {settings.lanes} lanes equally: start 1, 2, 4, "
                "... ranks, at most one for each lane"
            )
        return
    if settings.sequences % count:
        raise UserError(
            f"{loaded.source('batch_size')}: {count} ranks cannot share a batch of {settings.sequences:,} sequences "
            "equally: batch_size must be a multiple of the number of ranks"
        )
    micro_steps = settings.gradient_accumulation_steps
    if micro_steps % count and count % micro_steps:
        raise UserError(
            f"{loaded.source('gradient_accumulation_steps')}: {count} ranks cannot share {micro_steps} micro-steps "
            "equally: one must divide the other"
        )


def check_output_folders(loaded: LoadedConfig, root: Path) -> None:
    """Raises UserError if a folder that training writes to has a name that no folder can have.

    Args:
        root: the folder that relative paths start from.
    """
    for key in OUTPUT_KEYS:
        name = str(get_value(loaded.config, key))
        if key == "aim_repo" and ("://" in name or not loaded.config.tracking.aim_logging):
            continue
        try:
            if stat.S_ISDIR(os.stat(root / name).st_mode):
                continue
            reason = "Not a directory"
        except FileNotFoundError:
            if (link := dangling_link(root / name)) is None:
                continue
            reason = f"{link} is a link to {os.readlink(link)}, which does not exist: is a disk not mounted?"
        except ValueError:
            reason = "a path has no NUL character"
        except OSError as error:
            reason = error.strerror or str(error)
        raise UserError(f"{loaded.source(key)}: {key}: {shown(name)}: {reason}")


def trained_outline(config: Config, vocab_size: int) -> LanguageModel:
    """The model that is trained, with its adapters if it has any; its parameters have shapes but no memory."""
    model = outline(config.model, vocab_size)
    with shapes_only():
        add_adapters(model, config.model, config.optimizer)
    return model


def check_memory(loaded: LoadedConfig, vocab_size: int, device: torch.device, ranks: Ranks = ONE) -> None:
    """Raises UserError if the weights, gradients and moments of the model alone do not fit into the free memory.

    Of a sharded model, each CUDA device holds its rank's share of them. A name in `lora_targets` that matches no layer
    raises UserError as well.
    """
    config = loaded.config
    try:
        counts = count_parameters(trained_outline(config, vocab_size))
    except RuntimeError:  # more bytes than 64 bits can count
        counts = None
    except UserError as error:
        raise UserError(f"{loaded.source('lora_targets')}: {error}") from None
    free = available_memory(device) + (psutil.swap_memory().free if device.type == "cpu" else 0)
    bytes_of_trained: float = TRAINING_BYTES_PER_PARAMETER.get(config.optimizer.optimizer_name, 8)
    if config.train.shard != "none" and device.type == "cuda":
        bytes_of_trained /= ranks.world_size
    if counts is None or counts.trainable * bytes_of_trained + counts.frozen * BYTES_PER_FROZEN_PARAMETER > free:
        has = f"{counts.total:,} parameters" if counts is not None else "more parameters than can be counted"
        raise UserError(
            f"the model has {has}, which do not fit into the {free / 2**30:.1f} GiB that are free on {device} with "
            "their gradients and the state of the optimizer: make n_layer, n_embd or ffn_dim smaller"
        )


def decisive_settings(setup: Setup) -> dict[str, Any]:
    """The resolved values of open settings ("auto", none) and other facts, as far as they change the numbers.

    Call it after torch's threads are set.
    """
    config, corpus = setup.config, setup.corpus
    by_rank = setup.ranks.several and config.train.lanes is None  # the order of summation depends on the ranks
    return {
        **({"world_size": setup.ranks.world_size} if by_rank else {}),
        "deterministic": is_deterministic(config.train, setup.device),
        **derived_settings(config, setup.max_iters),
        "device": setup.device.type,
        "dtype": str(setup.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "dataset": corpus.hash,
        "corpus_hash": corpus.hash,
        "tokenizer": corpus.tokenizer.kind,
        "tokenizer_hash": corpus.tokenizer.hash(),
    }


def read_parent(
    origin: Origin, config: Config, datasets_dir: Path, warn: Callable[[str], None]
) -> tuple[Checkpoint, Tokenizer]:
    """Read the checkpoint that a fork or fine-tuning starts from, and its tokenizer. (A prepared dataset has its own.)

    Raises:
        UserError: there is none, it is damaged, or it is of another model.
    """
    if origin.pretrained is not None:
        checkpoint = pretrained_as_checkpoint(origin.run, origin.pretrained, origin.revision, config.model)
    elif is_export(origin.run):
        checkpoint = export_as_checkpoint(origin.run)
    else:
        checkpoint = choose_checkpoint(origin.run / CHECKPOINTS, origin.which, strict=origin.strict, warn=warn)
    check_model(config.model, checkpoint.state["model"], origin.name)
    tokenizer = tokenizer_from_json(checkpoint.tokenizer, str(checkpoint.path / TOKENIZER_FILE))
    if config.data.dataset in NAMES or find_dataset(config.data.dataset, datasets_dir) is None:
        check_tokenizer(config.data, tokenizer, origin.name, checkpoint.path / TOKENIZER_FILE)
    return checkpoint, tokenizer


def _warn_of_other_text(
    origin: Origin, checkpoint: Checkpoint, corpus: Corpus, root: Path, warn: Callable[[str], None]
) -> None:
    """Warn if a fork keeps its parent's dataset by name but the text behind that name has changed."""
    with contextlib.suppress(OSError, ValueError):
        kept = moved_path(str(read_settings(origin.run).get("dataset")), root) == corpus.name
        if kept and checkpoint.state.get("corpus_hash", corpus.hash) != corpus.hash:
            warn(f"{corpus.name}: the text is not the one that {origin.run.name} was trained on")


def _check_steps_left(origin: Origin, checkpoint: Checkpoint, max_iters: int) -> None:
    """Raises UserError if a fork would start at or after its last step."""
    if checkpoint.step >= max_iters:
        raise UserError(
            f"--fork: {origin.run.name} is at step {checkpoint.step:,} already: --max-iters must be more than "
            f"that, not {max_iters:,}"
        )
