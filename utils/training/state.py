"""The state of training (model, optimizer, scaler, step, best loss): making, capturing and restoring it."""

from __future__ import annotations

import base64
import functools
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from data import BatchSampler, Corpus
from model import LanguageModel, outline
from utils.checkpoints.files import Checkpoint, weight_differences
from utils.checkpoints.folder import CheckpointError
from utils.checkpoints.optimizer import Named, flatten_optimizer, restore_optimizer
from utils.config.settings import Config, ModelConfig, TrainConfig
from utils.errors import typed_line
from utils.inference.adapters import without_adapters
from utils.inference.evaluation import BatchLoss
from utils.inference.exact_match import Question
from utils.inference.static import StaticDecoders
from utils.machine.device import autocast
from utils.machine.ranks import ONE, Ranks
from utils.nn.float8 import MULTIPLE, use_float8
from utils.nn.lora import adapted_layers, adapter_settings, add_adapters, frozen_weights, is_adapter
from utils.nn.roles import declared_roles
from utils.optim.groups import build_optimizer
from utils.runs.metrics import BITS_PER_BYTE, bits_per_byte, decode_number, encode_number
from utils.runs.origin import Relation
from utils.runs.origin_checks import differing_model_settings
from utils.terminal.console import Terminal
from utils.terminal.words import duration
from utils.training.accuracy import held_out_questions
from utils.training.compiler import Loss, compiled_loss
from utils.training.early_stopping import EarlyStopping

if TYPE_CHECKING:
    from utils.training.sharding import Shards


class Stateful(Protocol):
    """A part of training whose state is saved in checkpoints, as JSON."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class TrainState:
    """What training changes (model, optimizer, scaler, step, best loss) and what it reads."""

    config: Config
    max_iters: int
    device: torch.device
    dtype: torch.dtype
    corpus: Corpus
    sampler: BatchSampler
    model: LanguageModel
    loss: Loss  # the model's, compiled if `compiled`
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    eval_loss: BatchLoss | None = None  # made by the first evaluation
    decoders: StaticDecoders | None = None  # likewise, for the sample text; None without CUDA graphs
    compiled: bool = False
    compile_seconds: float | None = None
    step: int = 0
    extra_tokens: int = 0  # of a fork: the tokens of the steps before it, minus those of as many steps of this run
    losses: dict[str, float] | None = None  # of the last evaluation
    losses_step: int | None = None  # the step of that evaluation
    best_val_loss: float = math.inf
    best_step: int | None = None
    nonfinite_in_a_row: int = 0  # consecutive steps, up to the latest, that the scaler skipped
    early_stopping: EarlyStopping = field(default_factory=lambda: EarlyStopping(None, 0.0))
    ranks: Ranks = ONE
    shards: Shards | None = None  # this rank's shard of the weights; None: each rank has the whole model
    callbacks: dict[str, Stateful] = field(default_factory=dict)

    @property
    def trained(self) -> Named:
        """The parameters that the optimizer updates, by name."""
        return self.model if self.shards is None else self.shards

    @property
    def finished(self) -> bool:
        """Whether the last step is done or early stopping has ended training."""
        return self.step >= self.max_iters or self.early_stopping.stopped

    @property
    def tokens_per_step(self) -> int:
        return self.config.train.sequences * self.config.model.block_size

    def tokens_at(self, step: int) -> int:
        """Tokens that the first `step` updates were trained on, including those before a fork."""
        return step * self.tokens_per_step + self.extra_tokens

    @functools.cached_property
    def bytes_per_token(self) -> dict[str, float]:
        """Bytes of text per token in the batches of each loss; exact for evaluations, whose batches are fixed."""
        count = self.config.train.eval_iters
        of_training = self.sampler.evaluation_bytes("train_eval", count)
        return {
            "train/loss": self.corpus.bytes_per_token if self.config.data.loss_after is None else of_training,
            "train/eval_loss": of_training,
            "val/loss": self.sampler.evaluation_bytes("val", count),
        }

    @functools.cached_property
    def questions(self) -> list[Question]:
        """The questions of val/accuracy: validation documents in which `loss_after` marks where the answer begins."""
        return held_out_questions(self.corpus, self.config.model.block_size)

    def bits_per_byte(self, losses: Mapping[str, float]) -> dict[str, float]:
        """`losses` converted to bits per byte, under the names of those metrics."""
        rates = self.bytes_per_token
        return {BITS_PER_BYTE[name]: bits_per_byte(losses[name], rates[name]) for name in rates if name in losses}


def build_state(
    config: Config,
    max_iters: int,
    corpus: Corpus,
    device: torch.device,
    dtype: torch.dtype,
    terminal: Terminal,
    ranks: Ranks = ONE,
) -> TrainState:
    """Make model, optimizer and sampler on the device; the random generators must have been seeded."""
    shards = None
    if config.train.shard == "fsdp":
        from utils.training.sharding import sharded_model  # its torch modules take seconds to import

        model, shards = sharded_model(config.model, corpus.tokenizer.vocab_size, device, dtype, ranks)
    else:
        model = LanguageModel(config.model, corpus.tokenizer.vocab_size)
    roles = declared_roles(model)
    assert roles.keys() <= model.initialised.keys(), "a subclass that declares roles calls init_weights at its end"
    add_adapters(model, config.model, config.optimizer)
    model = model.to(device)
    apply_layer_settings(model, config.train)
    model.document_token = corpus.document_token
    sampler = BatchSampler(corpus, config.model.block_size, config.train.sequences, config.train.seed, device)
    state = TrainState(
        config=config,
        max_iters=max_iters,
        device=device,
        dtype=dtype,
        corpus=corpus,
        sampler=sampler,
        model=model,
        loss=model.loss,
        optimizer=build_optimizer(model, config.optimizer),
        shards=shards,
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        early_stopping=EarlyStopping(config.train.patience, config.train.min_delta),
        ranks=ranks,
    )
    if shards is not None:
        shards.replace_in(state.optimizer.param_groups)
    if config.train.compile:
        compile_model(state, terminal)
    return state


def apply_layer_settings(model: LanguageModel, config: TrainConfig) -> None:
    """Switch on float8 layers and activation checkpointing if they are configured."""
    if config.fp8:
        use_float8(model.blocks)
        model.fp8_logits = model.config.n_embd % MULTIPLE == 0
    model.recomputes = config.activation_checkpointing


def compile_model(state: TrainState, terminal: Terminal) -> None:
    """Compile the loss with a trial forward and backward pass; if the compiler fails, warn and stay in eager mode.

    The trial does not advance the random streams of the CPU and of CUDA.
    """
    settings, began = state.config.train, time.perf_counter()
    parts = max(settings.gradient_accumulation_steps, settings.lanes or state.ranks.world_size)  # per batch
    terminal.print("compiling: takes up to a minute the first time, later seconds")
    devices = [state.device] if state.device.type == "cuda" else []
    try:
        tokens = state.tokens_per_step // parts
        compiled = compiled_loss(state.model, state.device, settings.compile_mode, tokens)
        with torch.random.fork_rng(devices=devices):
            with autocast(state.device, state.dtype):
                loss = compiled(*state.sampler.train_batch(0, 0, parts))
            loss.backward()
    except torch.OutOfMemoryError:  # without the compiler it would not fit either
        raise
    except Exception as error:  # a compiler can fail in any way, and training works without it
        terminal.warn(f"torch.compile failed, continuing in eager mode: {typed_line(error)}")
        return
    finally:
        state.optimizer.zero_grad(set_to_none=True)
    state.loss, state.compiled = compiled, True
    state.compile_seconds = time.perf_counter() - began
    terminal.print(f"compiled in {duration(state.compile_seconds)}")


# ------------------------------------------------------------------------------------- capture and restore


def capture(state: TrainState) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
    """The weights, the tensors of the optimizer (neither is copied), and the rest of the state as JSON.

    Weights that adapters leave frozen are not included; they are written once per run (see `frozen_weights`).
    """
    tensors, optimizer = flatten_optimizer(state.trained, state.optimizer)
    frozen = frozen_weights(state.model)
    facts = {
        "step": state.step,
        "tokens": state.tokens_at(state.step),
        "losses": {name: encode_number(loss) for name, loss in (state.losses or {}).items()},
        "losses_step": state.losses_step,
        "best_val_loss": encode_number(state.best_val_loss),
        "best_step": state.best_step,
        "early_stopping": state.early_stopping.state_dict(),
        "callbacks": {name: _copied(callback.state_dict()) for name, callback in state.callbacks.items()},
        "nonfinite_in_a_row": state.nonfinite_in_a_row,
        "scaler": state.scaler.state_dict(),
        "rng": random_states(),
        "device": str(state.device),
        "optimizer": optimizer,
        "model": state.config.model.model_dump(mode="json"),
        "seed": state.config.train.seed,
        "corpus_hash": state.corpus.hash,
        "tokenizer_hash": state.corpus.tokenizer.hash(),
        "world_size": state.ranks.world_size,
    }
    if frozen:
        facts["lora"] = adapter_settings(state.config.optimizer)
    weights = {name: tensor for name, tensor in own_weights(state).items() if name not in frozen}
    return weights, tensors, facts


def own_weights(state: TrainState) -> Mapping[str, torch.Tensor]:
    """The weights that this process holds: all of them, or its rows of each."""
    return state.model.state_dict() if state.shards is None else state.shards.own


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """A deep copy of a callback's state, since training continues while the checkpoint is written.

    Raises:
        TypeError, ValueError: it is not a dictionary, or not JSON.
    """
    if not isinstance(state, dict):
        raise TypeError(f"state_dict of a callback must return a dictionary, not {type(state).__name__}")
    copy: dict[str, Any] = json.loads(json.dumps(state, allow_nan=False))
    return copy


def random_states() -> dict[str, Any]:
    """The states of torch's generators, in base64: CPU, each CUDA device, MPS."""

    def encode(state: torch.Tensor) -> str:
        return base64.b64encode(state.cpu().numpy().tobytes()).decode("ascii")

    states: dict[str, Any] = {"cpu": encode(torch.get_rng_state()), "cuda": []}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = [encode(state) for state in torch.cuda.get_rng_state_all()]
    if torch.backends.mps.is_available():
        states["mps"] = encode(torch.mps.get_rng_state())
    return states


def set_random_states(states: Mapping[str, Any]) -> None:
    """Restore the states that `random_states` returned, except those of devices that are missing here."""
    torch.set_rng_state(_decoded(states["cpu"]))
    for index, text in enumerate(states["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(_decoded(text), index)
    if "mps" in states and torch.backends.mps.is_available():
        torch.mps.set_rng_state(_decoded(states["mps"]))


def move_random_state(states: Mapping[str, Any], before: torch.device, now: torch.device) -> None:
    """If training has moved to another GPU, continue the previous GPU's random stream on it."""
    if before.type == now.type == "cuda" and (before.index or 0) != (now.index or 0):
        torch.cuda.set_rng_state(_decoded(states["cuda"][before.index or 0]), now)


def _decoded(state: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(state)), dtype=torch.uint8)


def start_from(state: TrainState, checkpoint: Checkpoint, relation: Relation) -> None:
    """Start from a checkpoint: restore it, branch off from it, or use only its weights, as `relation` says.

    Raises:
        CheckpointError: it is of another model or experiment.
    """
    {"resume": restore, "fork": branch, "init": initialise}[relation](state, checkpoint)


def initialise(state: TrainState, checkpoint: Checkpoint) -> None:
    """Start from the weights of a checkpoint, with its adapters merged in; this run's new adapters are kept.

    Raises:
        CheckpointError: they do not fit the model.
    """
    checkpoint = without_adapters(checkpoint)
    if not adapted_layers(state.model):
        load_weights(state, checkpoint)
        return
    plain = outline(state.config.model, state.model.vocab_size)
    if differences := weight_differences(checkpoint.weights, plain):
        raise CheckpointError(f"{checkpoint.path}: the weights are not those of this model: {differences}")
    with torch.no_grad():
        for name, tensor in state.model.state_dict().items():
            if not is_adapter(name):
                tensor.copy_(checkpoint.weights[name])


def load_weights(state: TrainState, checkpoint: Checkpoint) -> None:
    """Load the weights of a checkpoint and nothing else.

    Raises:
        CheckpointError: they do not fit the model.
    """
    if differences := weight_differences(checkpoint.weights, state.model):
        raise CheckpointError(f"{checkpoint.path}: the weights are not those of this model: {differences}")
    weights = checkpoint.weights if state.shards is None else state.shards.part_of(checkpoint.weights)
    with torch.no_grad():  # one at a time, because those of a published model are read on access
        for name, tensor in own_weights(state).items():
            tensor.copy_(weights[name])


def mismatch(checkpoint: Checkpoint, model: ModelConfig, corpus: Corpus) -> str:
    """The reason why a checkpoint cannot be of a run with this model and corpus; empty if it can."""
    own = {"corpus_hash": corpus.hash, "tokenizer_hash": corpus.tokenizer.hash()}
    try:
        differing = differing_model_settings(model, ModelConfig.model_validate(checkpoint.state["model"]))
        if differing:
            return f"it is of another model: {', '.join(differing)}"
        return next((f"its {key} is not that of this run" for key in own if checkpoint.state[key] != own[key]), "")
    except (KeyError, ValueError):
        return "state.json is damaged"


def restore(state: TrainState, checkpoint: Checkpoint) -> None:
    """Continue from a checkpoint of the same run, bit for bit.

    Raises:
        CheckpointError: it is not a checkpoint of this experiment.
    """
    place, facts = checkpoint.path, checkpoint.state
    _branch(state, checkpoint, same_settings=True)
    try:
        state.losses = {name: decode_number(loss) for name, loss in facts["losses"].items()} or None
        state.losses_step = facts["losses_step"]
        state.best_val_loss, state.best_step = decode_number(facts["best_val_loss"]), facts["best_step"]
        state.early_stopping.load_state_dict(facts["early_stopping"])
        state.nonfinite_in_a_row = facts["nonfinite_in_a_row"]
        of_callbacks = {name: facts["callbacks"][name] for name in state.callbacks}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{place}/state.json: damaged ({type(error).__name__}: {error})") from None
    for name, callback in state.callbacks.items():  # outside the try: a failing callback is not a damaged file
        callback.load_state_dict(of_callbacks[name])


def branch(state: TrainState, checkpoint: Checkpoint) -> None:
    """Start another experiment at the step of a checkpoint, with its weights, optimizer state and random streams.

    The best loss and early stopping start afresh, as they belong to each run; with another seed, so do the random
    streams.

    Raises:
        CheckpointError: it is of another model or optimizer.
    """
    _branch(state, checkpoint, same_settings=False)


def _branch(state: TrainState, checkpoint: Checkpoint, *, same_settings: bool) -> None:
    facts, tensors = checkpoint.state, checkpoint.optimizer_tensors
    load_weights(state, checkpoint)
    try:
        restore_optimizer(
            state.trained,
            state.optimizer,
            tensors if state.shards is None else state.shards.part_of(tensors),
            facts["optimizer"],
            keep_settings=not same_settings,
        )
        if state.scaler.is_enabled() and facts["scaler"]:
            state.scaler.load_state_dict(facts["scaler"])
        state.step = checkpoint.step
        state.extra_tokens = facts["tokens"] - state.step * state.tokens_per_step
        if facts["seed"] == state.config.train.seed:
            set_random_states(facts["rng"])
            move_random_state(facts["rng"], torch.device(facts["device"]), state.device)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{checkpoint.path}/state.json: damaged ({type(error).__name__}: {error})") from None
