"""Every setting of the workbench: type, default, bounds, unit, meaning and kind.

Flags, `--help`, docs/config.schema.json, the config hash and the rules for resuming are derived from
these models, so adding a setting takes one field here and the code that uses it. Importing this file
does not import torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, model_validator

from utils.config.section import (
    MACHINE,
    OBSERVATION,
    TRAJECTORY,
    Float,
    Int,
    Place,
    RuleError,
    Section,
    refuse_bool,
    setting,
)
from utils.config.tags import check_tag
from utils.errors import nearest, number_text, shown

TOKENIZERS = ("char", "byte", "bpe", "gpt2")  # besides hf:PATH
TOKENIZER_SCHEMA = WithJsonSchema(
    {"anyOf": [{"type": "string", "enum": [*TOKENIZERS]}, {"type": "string", "pattern": "^hf:."}]}
)


def check_tokenizer_name(name: str) -> str:
    """Return `name` with `~` expanded; raise ValueError unless it is one of TOKENIZERS or hf:PATH."""
    if name not in TOKENIZERS and not re.match(r"hf:.", name):
        raise ValueError(
            f"expected {', '.join(TOKENIZERS)} or hf:PATH of a tokenizer.json, got {name!r}{nearest(name, TOKENIZERS)}"
        )
    kind, colon, path = name.partition(":")
    return kind + colon + os.path.expanduser(path)


class DataConfig(Section):
    """The training text and its tokenizer.

    >>> config = Config(data=DataConfig(dataset="pydocs", tokenizer="byte"))
    >>> create_model(config).vocab_size
    256
    """

    dataset: Annotated[str, AfterValidator(os.path.expanduser)] = setting(
        "pydocs",
        "a built-in corpus (pydocs, shakespeare, arithmetic), the name or path of a prepared dataset (prepare.py), or "
        "the path of a UTF-8 text file or a folder of such files",
        kind=MACHINE,  # the same text may be stored elsewhere; the config hash contains corpus_hash instead
        min_length=1,
    )
    tokenizer: Annotated[str, AfterValidator(check_tokenizer_name), TOKENIZER_SCHEMA] = setting(
        "char",
        "how text becomes token ids: characters, UTF-8 bytes, byte-pair encoding learned from the corpus, GPT-2's "
        "encoding, or any tokenizer.json",
        kind=TRAJECTORY,
    )
    bpe_vocab_size: Int = setting(
        4096,
        "vocabulary size of `tokenizer: bpe`, including its 256 bytes and the special tokens",
        kind=TRAJECTORY,
        unit="tokens",
        ge=257,
        le=1_000_000,
    )
    special_tokens: tuple[str, ...] = setting(
        (), "special tokens of `tokenizer: bpe`, in addition to <|endoftext|>", kind=TRAJECTORY
    )
    unknown_token: str | None = setting(
        None,
        "with `tokenizer: char`: one character that replaces any character outside the vocabulary; none: such a "
        "character is an error",
        kind=TRAJECTORY,
        min_length=1,
        max_length=1,
    )
    val_fraction: Float = setting(
        0.1, "share of the tokens kept for validation, from the end of the corpus", kind=TRAJECTORY, gt=0, lt=1
    )
    packing: Literal["none", "random", "documents"] = setting(
        "random",
        "how a prepared dataset is cut into samples: one document per row (none), windows at random offsets (random), "
        "or whole documents packed into rows (documents); attention and loss cross documents only with random",
        kind=TRAJECTORY,
    )
    loss_after: str | None = setting(
        None,
        "with packing none or documents: count only the loss of what follows this text in each document, such as the "
        "answer to a question; none: count all of it",
        kind=TRAJECTORY,
        min_length=1,
    )
    corpora_dir: Place = setting(
        "corpora", "folder for downloaded corpora and encoded token files", kind=MACHINE, min_length=1
    )
    datasets_dir: Place = setting("datasets", "folder of prepared datasets", kind=MACHINE, min_length=1)

    @model_validator(mode="after")
    def _rules(self) -> DataConfig:
        needs = {"unknown_token": "char", "special_tokens": "bpe"}
        for key, kind in needs.items():
            if getattr(self, key) and self.tokenizer != kind:
                raise RuleError(f"{key} needs tokenizer {kind}, not {self.tokenizer}", key, "tokenizer")
        if self.loss_after is not None and self.packing == "random":
            raise RuleError("loss_after needs packing none or documents, not random", "loss_after", "packing")
        texts = [*self.special_tokens]
        if "" in texts or "<|endoftext|>" in texts or len(set(texts)) < len(texts):
            raise RuleError(
                f"special_tokens: expected distinct tokens other than <|endoftext|>, got {texts}", "special_tokens"
            )
        if 256 + 1 + len(texts) > self.bpe_vocab_size:
            raise RuleError(
                f"bpe_vocab_size ({self.bpe_vocab_size}) must be at least {257 + len(texts)}: 256 bytes, <|endoftext|> "
                f"and {len(texts)} special tokens",
                "bpe_vocab_size",
                "special_tokens",
            )
        return self


OPERATORS = ("+", "-", "*", "//", "%")


class ArithmeticConfig(Section):
    """The problems that `dataset: arithmetic` generates; other datasets ignore these settings.

    >>> config = Config(data=DataConfig(dataset="arithmetic"), arithmetic=ArithmeticConfig(arithmetic_digits=1))
    >>> create_model(config).tokenizer.encode("1+2")
    [7, 3, 8]
    """

    arithmetic_operators: tuple[str, ...] = setting(
        ("+", "-"), "operators that problems use: +, -, *, // or %, as in Python", kind=TRAJECTORY
    )
    arithmetic_digits: Int = setting(
        2, "largest number of digits in an operand", kind=TRAJECTORY, unit="digits", ge=1, le=9
    )
    arithmetic_terms: Int = setting(
        2,
        "largest number of operands in a problem; with more than two, the order of operations matters",
        kind=TRAJECTORY,
        ge=2,
        le=4,
    )
    arithmetic_negatives: bool = setting(False, "operands may be negative", kind=TRAJECTORY)
    arithmetic_format: Literal["plain", "padded", "reversed"] = setting(
        "plain",
        "how a problem is written: 5+17=22; padded to equal widths, 05+17=022; or padded with the digits of the answer "
        "reversed, 05+17=220",
        kind=TRAJECTORY,
    )
    arithmetic_commute: bool = setting(
        True, "train on each problem in every order that the commutative law allows", kind=TRAJECTORY
    )
    arithmetic_problems: Int = setting(
        20_000,
        "number of problems, before each is written in several orders; if fewer exist, all of them",
        kind=TRAJECTORY,
        unit="problems",
        ge=100,
        le=1_000_000,
    )
    arithmetic_held_out: Float = setting(
        0.1, "share of the problems kept for validation and never trained on, in any order", kind=TRAJECTORY, gt=0, lt=1
    )

    @model_validator(mode="after")
    def _rules(self) -> ArithmeticConfig:
        operators = self.arithmetic_operators
        if not operators or set(operators) - {*OPERATORS} or len(set(operators)) < len(operators):
            raise RuleError(
                f"arithmetic_operators: expected distinct ones of {', '.join(OPERATORS)}, got {', '.join(operators)}",
                "arithmetic_operators",
            )
        return self


# The hidden width of the kinds of MLP that do not use 4 n_embd. A gated MLP has three matrices instead of two; with
# 8/3 n_embd, rounded up to a multiple of 32, it has about as many parameters.
FFN_WIDTHS: dict[str, Callable[[int], int]] = {
    "swiglu": lambda n_embd: -(-8 * n_embd // 96) * 32,
}


class ModelConfig(Section):
    """A decoder-only transformer; settings left at none are derived from the others.

    >>> model = create_model(ModelConfig(n_layer=2, n_head=4, n_embd=64, block_size=32), vocab_size=65)
    >>> get_model_info(model)["layers"]
    2
    """

    n_layer: Int = setting(4, "number of transformer blocks", kind=TRAJECTORY, ge=1, le=1024)
    n_head: Int = setting(4, "number of query heads", kind=TRAJECTORY, ge=1, le=1024)
    n_kv_head: Int | None = setting(
        None,
        "number of key/value heads, each shared by n_head / n_kv_head query heads; none: n_head",
        kind=TRAJECTORY,
        ge=1,
    )
    n_embd: Int = setting(128, "width of the residual stream (C)", kind=TRAJECTORY, ge=1, le=65536)
    head_dim: Int | None = setting(None, "width of each head (D); none: n_embd / n_head", kind=TRAJECTORY, ge=1)
    ffn_dim: Int | None = setting(
        None,
        "hidden width of the MLP; none: 4 n_embd, or for swiglu 8/3 n_embd rounded up to a multiple of 32",
        kind=TRAJECTORY,
        ge=1,
    )
    block_size: Int = setting(64, "context length (T)", kind=TRAJECTORY, unit="tokens", ge=1, le=65536)
    dropout: Float = setting(0.0, "dropout probability", kind=TRAJECTORY, ge=0, lt=1)
    position: Literal["learned", "rope"] = setting(
        "learned", "position encoding: a learned table, or rotary embedding of queries and keys", kind=TRAJECTORY
    )
    rope_theta: Float = setting(10000.0, "base of the rotary frequencies", kind=TRAJECTORY, gt=0)
    rope_scaling: Literal["none", "linear", "llama3", "yarn"] = setting(
        "none",
        "how rotary frequencies are lowered for a context longer than that of the original training: all alike "
        "(linear), or only the low ones, as in Llama 3 or YaRN",
        kind=TRAJECTORY,
    )
    rope_factor: Float = setting(
        1.0,
        "with rope_scaling: factor by which the lowest frequencies (linear: all) are divided",
        kind=TRAJECTORY,
        ge=1,
        le=65536,
    )
    rope_original_context: Int | None = setting(
        None,
        "with rope_scaling llama3 or yarn: context length of the original training",
        kind=TRAJECTORY,
        unit="tokens",
        ge=1,
        le=1 << 24,
    )
    rope_low_freq: Float = setting(
        1.0,
        "with rope_scaling llama3 or yarn: channels with at most this many rotations in rope_original_context are "
        "divided by the whole rope_factor",
        kind=TRAJECTORY,
        gt=0,
    )
    rope_high_freq: Float = setting(
        4.0,
        "with rope_scaling llama3 or yarn: channels with at least this many rotations in rope_original_context are not "
        "scaled (YaRN's value: 32)",
        kind=TRAJECTORY,
        gt=0,
    )
    sliding_window: Int | None = setting(
        None,
        "how many of the most recent tokens each token attends to, itself included; none: all of them",
        kind=TRAJECTORY,
        unit="tokens",
        ge=1,
    )
    full_attention_layers: Int = setting(
        0, "with sliding_window: number of first blocks without a window", kind=TRAJECTORY, unit="blocks", ge=0, le=1024
    )
    ngram_rows: tuple[Annotated[Int, Field(ge=1, le=2**31)], ...] = setting(
        (),
        "rows of the hashed embedding table for the last 2 tokens, the last 3 tokens, and so on; empty: no such tables",
        kind=TRAJECTORY,
    )
    norm: Literal["layernorm", "rmsnorm"] = setting("layernorm", "normalisation before each sublayer", kind=TRAJECTORY)
    norm_eps: Float = setting(1e-5, "epsilon that a norm adds to the variance", kind=TRAJECTORY, gt=0, lt=1)
    mlp: Literal["gelu", "gelu_tanh", "relu2", "swiglu"] = setting(
        "gelu", "activation of the MLP: GELU, its tanh approximation, squared ReLU, or gated SiLU", kind=TRAJECTORY
    )
    bias: bool = setting(True, "biases in linear layers and layernorms", kind=TRAJECTORY)
    qkv_bias: bool | None = setting(None, "bias in the q, k, v projection; none: same as bias", kind=TRAJECTORY)
    mlp_bias: bool | None = setting(None, "biases in the MLP; none: same as bias", kind=TRAJECTORY)
    qk_norm: bool = setting(False, "normalise queries and keys, without learned weights", kind=TRAJECTORY)
    qk_norm_weights: bool = setting(False, "with qk_norm: add learned weights, as in Qwen 3", kind=TRAJECTORY)
    tie_embeddings: bool = setting(
        True, "use one matrix for both the token embedding and the output head", kind=TRAJECTORY
    )
    head_bias: bool = setting(False, "bias in the output head, which must not be tied", kind=TRAJECTORY)
    zero_init: bool = setting(
        False, "initialise projections into the residual stream, and an untied head, to zero", kind=TRAJECTORY
    )
    logit_softcap: Float | None = setting(
        None, "cap c of the logits: x becomes c tanh(x / c); none: no cap", kind=TRAJECTORY, gt=0
    )

    @property
    def kv_heads(self) -> int:
        return self.n_kv_head or self.n_head

    @property
    def head_width(self) -> int:
        return self.head_dim or self.n_embd // self.n_head

    @property
    def has_qkv_bias(self) -> bool:
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def has_mlp_bias(self) -> bool:
        return self.bias if self.mlp_bias is None else self.mlp_bias

    def window(self, layer: int) -> int | None:
        """How many of the most recent tokens a token attends to in a block, itself included; None: all of them."""
        return None if layer < self.full_attention_layers else self.sliding_window

    @property
    def ffn_width(self) -> int:
        if self.ffn_dim is not None:
            return self.ffn_dim
        return FFN_WIDTHS[self.mlp](self.n_embd) if self.mlp in FFN_WIDTHS else 4 * self.n_embd

    @property
    def derived(self) -> dict[str, Any]:
        """The values that settings left at none resolve to."""
        return {
            "n_kv_head": self.kv_heads,
            "head_dim": self.head_width,
            "ffn_dim": self.ffn_width,
            "qkv_bias": self.has_qkv_bias,
        }

    @model_validator(mode="after")
    def _rules(self) -> ModelConfig:
        if self.head_dim is None and self.n_embd % self.n_head:
            raise RuleError(
                f"n_embd ({self.n_embd}) must be divisible by n_head ({self.n_head}), or head_dim must be set",
                "n_embd",
                "n_head",
            )
        if self.n_head % self.kv_heads:
            raise RuleError(
                f"n_head ({self.n_head}) must be divisible by n_kv_head ({self.n_kv_head})", "n_kv_head", "n_head"
            )
        if self.head_bias and self.tie_embeddings:
            raise RuleError("head_bias needs an untied head: tie_embeddings false", "head_bias", "tie_embeddings")
        if self.position == "rope" and self.head_width % 2:
            raise RuleError(
                f"position rope rotates pairs of channels: the head dimension must be even, not {self.head_width}",
                "head_dim",
                "n_embd",
                "n_head",
            )
        if self.rope_scaling != "none" and self.position != "rope":
            raise RuleError(f"rope_scaling {self.rope_scaling} needs position rope", "rope_scaling", "position")
        if self.rope_scaling in ("llama3", "yarn"):
            if self.rope_original_context is None:
                raise RuleError(
                    f"rope_scaling {self.rope_scaling} needs rope_original_context",
                    "rope_scaling",
                    "rope_original_context",
                )
            if self.rope_low_freq >= self.rope_high_freq:
                low, high = number_text(self.rope_low_freq), number_text(self.rope_high_freq)
                raise RuleError(
                    f"rope_low_freq ({low}) must be less than rope_high_freq ({high})",
                    "rope_low_freq",
                    "rope_high_freq",
                )
        if self.rope_scaling == "yarn" and self.rope_theta <= 1:
            raise RuleError("rope_scaling yarn needs rope_theta > 1", "rope_theta", "rope_scaling")
        if self.qk_norm_weights and not self.qk_norm:
            raise RuleError("qk_norm_weights needs qk_norm", "qk_norm_weights", "qk_norm")
        return self


class OptimizerConfig(Section):
    """The optimizer and the learning-rate schedule.

    >>> muon = OptimizerConfig(optimizer_name="muon", learning_rate=3e-3, warmup_iters=10)
    >>> Trainer(Config(optimizer=muon)).config.optimizer.learning_rate
    0.003
    """

    optimizer_name: Literal["adamw", "muon"] = setting(
        "adamw", "optimizer; muon: Muon for the hidden matrices, AdamW for all other parameters", kind=TRAJECTORY
    )
    learning_rate: Float = setting(1e-3, "peak learning rate", kind=TRAJECTORY, gt=0, le=10)
    embedding_lr: Float | None = setting(
        None, "peak learning rate of the embeddings; none: learning_rate", kind=TRAJECTORY, gt=0, le=10
    )
    head_lr: Float | None = setting(
        None, "peak learning rate of an untied output head; none: learning_rate", kind=TRAJECTORY, gt=0, le=10
    )
    vector_lr: Float | None = setting(
        None, "peak learning rate of biases and norm weights; none: learning_rate", kind=TRAJECTORY, gt=0, le=10
    )
    min_lr: Float | None = setting(
        None, "learning rate at the end of the decay; none: learning_rate / 10", kind=TRAJECTORY, ge=0
    )
    schedule: Literal["cosine", "linear", "constant"] = setting(
        "cosine", "shape of the decay after the warmup", kind=TRAJECTORY
    )
    warmup_iters: Int | None = setting(
        None,
        "steps of linear warmup from zero; none: a twentieth of the steps up to the end of the decay",
        kind=TRAJECTORY,
        unit="steps",
        ge=0,
    )
    lr_decay_iters: Int | None = setting(
        None, "step at which the decay ends; none: the last step", kind=TRAJECTORY, unit="steps", ge=1
    )
    weight_decay: Float = setting(
        0.1, "decoupled weight decay; biases and norm weights are exempt", kind=TRAJECTORY, ge=0, le=10
    )
    weight_decay_schedule: Literal["constant", "linear", "cosine"] = setting(
        "constant", "how weight decay changes over the run; linear and cosine end at zero", kind=TRAJECTORY
    )
    momentum: Float = setting(0.95, "Muon: decay rate of the running mean of gradients", kind=TRAJECTORY, ge=0, lt=1)
    momentum_warmup_iters: Int = setting(
        0, "Muon: steps over which momentum rises from 0.85", kind=TRAJECTORY, unit="steps", ge=0
    )
    beta1: Float = setting(0.9, "AdamW: decay rate of the running mean of gradients", kind=TRAJECTORY, ge=0, lt=1)
    beta2: Float = setting(
        0.99, "AdamW: decay rate of the running mean of squared gradients", kind=TRAJECTORY, ge=0, lt=1
    )
    adam_eps: Float = setting(1e-8, "AdamW: epsilon added to the denominator", kind=TRAJECTORY, gt=0, lt=1)
    grad_clip: Float = setting(
        1.0,
        "largest global gradient norm; larger gradients are scaled down to it; 0: no clipping",
        kind=TRAJECTORY,
        ge=0,
    )
    lora_rank: Int | None = setting(
        None,
        "train low-rank adapters (LoRA) of this rank and freeze all other weights, for fine-tuning with --init-from; "
        "none: train all weights",
        kind=TRAJECTORY,
        ge=1,
        le=65536,
    )
    lora_alpha: Float | None = setting(
        None, "the output of adapters is scaled by lora_alpha / lora_rank; none: 2 lora_rank", kind=TRAJECTORY, gt=0
    )
    lora_dropout: Float = setting(
        0.0, "dropout probability on the input of the adapters alone", kind=TRAJECTORY, ge=0, lt=1
    )
    lora_targets: tuple[str, ...] = setting(
        (),
        "layers that get adapters, given by the ends of their names (qkv, attention.proj, up); empty: all linear "
        "layers of the blocks",
        kind=TRAJECTORY,
    )

    @property
    def final_lr(self) -> float:
        return self.learning_rate / 10 if self.min_lr is None else self.min_lr

    @property
    def adapter_alpha(self) -> float:
        """lora_alpha, or its default; only with a lora_rank."""
        assert self.lora_rank is not None
        return 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha

    @model_validator(mode="after")
    def _rules(self) -> OptimizerConfig:
        if self.final_lr > self.learning_rate:
            least, peak = number_text(self.final_lr), number_text(self.learning_rate)
            raise RuleError(
                f"min_lr ({least}) must not exceed learning_rate ({peak})",
                "min_lr",
                "learning_rate",
            )
        return self


def check_callback_name(name: str) -> str:
    """Return `name`; raise ValueError unless it has the form module:Class."""
    module, colon, attribute = name.partition(":")
    is_file = module.endswith(".py")
    if is_file or not (colon and attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))):
        own = module.removesuffix(".py").removeprefix("./").replace("/", ".")
        hint = f"; did you mean {own}:{attribute}?" if is_file and attribute.isidentifier() else ""
        raise ValueError(f"a callback is named module:Class, not {shown(name)}{hint}")
    return name


CallbackName = Annotated[str, AfterValidator(check_callback_name)]


class TrainConfig(Section):
    """The training loop and the machine it runs on.

    >>> config = Config(train=TrainConfig(max_iters=100, batch_size=8, seed=7, device="cpu"))
    >>> config.train.seed
    7
    """

    max_iters: Int | None = setting(2000, "optimizer updates in the run", kind=TRAJECTORY, unit="steps", ge=1)
    epochs: Float | None = setting(
        None, "passes over the training tokens, instead of max_iters", kind=TRAJECTORY, unit="epochs", gt=0
    )
    batch_size: Annotated[int, Field(ge=1), BeforeValidator(refuse_bool)] | Literal["auto"] = setting(
        12,
        "sequences in one optimizer update, over all micro-steps; auto: derived from tokens_per_step if set, otherwise "
        "the largest power of two that fits into memory",
        kind=TRAJECTORY,
        unit="sequences",
    )
    tokens_per_step: Int | None = setting(
        None,
        "tokens in one optimizer update, instead of batch_size, split into as few micro-steps as fit into memory",
        kind=TRAJECTORY,
        unit="tokens",
        ge=1,
    )
    gradient_accumulation_steps: Int = setting(
        1, "micro-steps that each update is split into, to save memory", kind=TRAJECTORY, unit="micro-steps", ge=1
    )
    lanes: Int | None = setting(
        None,
        "fixed slices of a batch (a power of two) whose gradients are added in a binary tree, so that the numbers do "
        "not depend on the number of ranks; none: sum the batch as a whole",
        kind=TRAJECTORY,
        unit="lanes",
        ge=1,
        le=4096,
    )
    shard: Literal["none", "fsdp"] = setting(
        "none",
        "fsdp: each rank stores a share of the rows of every weight, gradient and moment, and gathers the weights of a "
        "block when it needs them; none: each rank stores all of them",
        kind=TRAJECTORY,
    )
    eval_interval: Int = setting(250, "steps between evaluations", kind=TRAJECTORY, unit="steps", ge=1)
    eval_at: tuple[Annotated[Int, Field(ge=1)], ...] = setting(
        (),
        "additional steps to evaluate at; when a resume raises max_iters, the previous last step is added",
        kind=OBSERVATION,
        unit="steps",
    )
    eval_iters: Int = setting(
        20, "batches of each split that an evaluation averages over", kind=TRAJECTORY, unit="batches", ge=1
    )
    seed: Int = setting(1337, "seed for initialisation, batches and dropout", kind=TRAJECTORY, ge=0, lt=2**63)
    device: str = setting(
        "auto",
        "device to train on: auto (the first available of mps, cuda and cpu), cpu, cuda, cuda:N or mps",
        kind=TRAJECTORY,
        pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto",
        "precision of matrix products (autocast); auto: bfloat16 on CUDA devices that support it, otherwise float32",
        kind=TRAJECTORY,
    )
    threads: Int | None = setting(
        None, "CPU threads per tensor operation; none: torch's default", kind=TRAJECTORY, ge=1, le=1024
    )
    deterministic: bool | None = setting(
        None,
        "use only operations that repeat bit for bit; none: yes on the CPU, where it costs nothing, but not on a GPU",
        kind=TRAJECTORY,
    )
    tf32: bool = setting(
        True,
        "CUDA: compute float32 matrix products in TF32 (10 bits of mantissa), which is several times as fast",
        kind=TRAJECTORY,
    )
    cuda_graph: bool = setting(
        True,
        "CUDA: record a step once as CUDA graphs and launch it as a whole, which speeds up small models most; what "
        "cannot be recorded is launched kernel by kernel",
        kind=MACHINE,
    )
    fp8: bool = setting(
        False,
        "CUDA, compute capability 8.9 or later: compute matrix products of blocks and logits in 8 bits; faster only "
        "with compile",
        kind=TRAJECTORY,
    )
    activation_checkpointing: bool = setting(
        False,
        "keep only the input of each block for the backward pass and recompute the rest: less memory, more time",
        kind=MACHINE,
    )
    compile: bool = setting(
        False,
        "compile the model with torch.compile (inductor; aot_eager on mps); if that fails, train in eager mode",
        kind=TRAJECTORY,
    )
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = setting(
        "default",
        "mode of torch.compile; max-autotune also times kernels against each other; reduce-overhead is the same as "
        "default, since cuda_graph has its effect",
        kind=TRAJECTORY,
    )
    checkpoint_interval: Int = setting(
        500, "steps between checkpoints; 0: no checkpoints by step", kind=OBSERVATION, unit="steps", ge=0
    )
    checkpoint_minutes: Float | None = setting(
        15.0,
        "also save a checkpoint once this much wall time has passed since the last one; none: only by step",
        kind=OBSERVATION,
        unit="minutes",
        gt=0,
    )
    keep_last: Int = setting(
        2, "newest checkpoints to keep; older ones are deleted", kind=OBSERVATION, unit="checkpoints", ge=1
    )
    keep_best: bool = setting(
        True, "save a checkpoint whenever val/loss is the best so far, and keep the latest of these", kind=OBSERVATION
    )
    max_minutes: Float | None = setting(
        None,
        "stop with a checkpoint before this much wall time has passed; none: no limit",
        kind=MACHINE,
        unit="minutes",
        gt=0,
    )
    stop_at_step: Int | None = setting(
        None,
        "stop with a checkpoint at this step, as if interrupted; the learning-rate schedule is still that of max_iters",
        kind=MACHINE,
        unit="steps",
        ge=1,
    )
    rank_timeout: Float = setting(
        20.0,
        "how long ranks wait for a rank that has stopped responding before the run fails",
        kind=MACHINE,
        unit="seconds",
        ge=1,
    )
    patience: Int | None = setting(
        None,
        "end training after this many evaluations in a row without a better val/loss; none: train to the last step",
        kind=TRAJECTORY,
        unit="evaluations",
        ge=1,
    )
    min_delta: Float = setting(
        0.0, "with patience: val/loss is better only if lower by more than this", kind=TRAJECTORY, unit="nats", ge=0
    )
    export_weights: Literal["auto", "last", "best"] = setting(
        "auto",
        "weights to export: those of the last step or of the best val/loss; auto: best with early stopping (patience), "
        "otherwise last",
        kind=TRAJECTORY,
    )
    profile_step: Int | None = setting(
        None,
        "step to profile, with the nine steps before it, into artifacts/profile/; none: no profile",
        kind=OBSERVATION,
        ge=0,
    )
    callbacks: tuple[CallbackName, ...] = setting(
        (), "your own classes for training to call, as module:Class (docs/callbacks.md)", kind=TRAJECTORY
    )
    skip_nonfinite: Int = setting(
        20,
        "with float16: how many steps in a row may have a non-finite loss or gradient before the run ends as diverged; "
        "such steps change no weights",
        kind=TRAJECTORY,
        unit="steps",
        ge=0,
    )

    @property
    def sequences(self) -> int:
        """batch_size as a number; utils/training/batch_size.py replaces auto before training starts."""
        assert self.batch_size != "auto"
        return self.batch_size

    @property
    def exports_best(self) -> bool:
        return self.export_weights == "best" or (self.export_weights == "auto" and self.patience is not None)

    @model_validator(mode="after")
    def _rules(self) -> TrainConfig:
        if (self.max_iters is None) == (self.epochs is None):
            raise RuleError("max_iters and epochs are alternatives: set exactly one of them", "epochs", "max_iters")
        if self.batch_size == "auto":
            if self.gradient_accumulation_steps != 1:
                raise RuleError(
                    "batch_size auto also chooses gradient_accumulation_steps: it must be 1, not "
                    f"{self.gradient_accumulation_steps}",
                    "gradient_accumulation_steps",
                    "batch_size",
                )
        elif self.tokens_per_step is not None:
            raise RuleError(
                f"tokens_per_step ({self.tokens_per_step}) and batch_size ({self.batch_size}) are alternatives: "
                "with tokens_per_step, batch_size must be auto",
                "tokens_per_step",
                "batch_size",
            )
        elif self.batch_size % self.gradient_accumulation_steps:
            raise RuleError(
                f"batch_size ({self.batch_size}) must be divisible by "
                f"gradient_accumulation_steps ({self.gradient_accumulation_steps})",
                "gradient_accumulation_steps",
                "batch_size",
            )
        self._check_lanes()
        self._check_shard()
        if self.exports_best and not self.keep_best:
            cause = "export_weights" if self.export_weights == "best" else "patience"
            raise RuleError(f"{cause} exports the best weights: keep_best must be on", "keep_best", cause)
        return self

    def _check_shard(self) -> None:
        """Raise RuleError for a setting that does not work with `shard`."""
        if self.shard == "none":
            return
        refused = {
            "compile": self.compile,
            "fp8": self.fp8,
            "profile_step": self.profile_step is not None,
            "batch_size": self.batch_size == "auto",
            "dtype": self.dtype == "float16",
        }
        for key, found in refused.items():
            if found:
                value = getattr(self, key)
                words = key if value is True else f"{key} {value}"
                raise RuleError(f"shard fsdp does not work with {words}", key, "shard")

    def _check_lanes(self) -> None:
        """Raise RuleError unless lanes divide the batch, and lanes and micro-steps divide each other."""
        if self.lanes is None:
            return
        if self.lanes & (self.lanes - 1):
            raise RuleError(f"lanes ({self.lanes}) must be a power of two, since they are added in pairs", "lanes")
        if self.batch_size != "auto" and self.batch_size % self.lanes:
            raise RuleError(f"lanes ({self.lanes}) must divide batch_size ({self.batch_size})", "lanes", "batch_size")
        micro_steps = self.gradient_accumulation_steps
        if micro_steps % self.lanes and self.lanes % micro_steps:
            raise RuleError(
                f"lanes ({self.lanes}) and gradient_accumulation_steps ({micro_steps}): one must divide the other",
                "lanes",
                "gradient_accumulation_steps",
            )


Tag = Annotated[str, AfterValidator(check_tag)]


def check_aim_repo(repo: str) -> str:
    """Return `repo`, or the parent of a folder named .aim; raise ValueError for a URL other than aim://HOST:PORT."""
    if "://" in repo and not re.fullmatch(r"aim://[^/:@\s]+:\d{1,5}", repo):
        raise ValueError(f"expected a folder or aim://HOST:PORT, got {shown(repo)}")
    return re.sub(r"(^|/)\.aim/?$", "", repo) or ("/" if repo.startswith("/") else ".")


class TrackingConfig(Section):
    """What is recorded about a run, where, and how often.

    >>> config = Config(tracking=TrackingConfig(run_tag="baseline", note="before the change", aim_logging=False))
    >>> config.tracking.note
    'before the change'
    """

    run_tag: Tag | None = setting(None, "name of the run, part of its directory's name", kind=OBSERVATION)
    tags: tuple[str, ...] = setting((), "labels for finding the run again", kind=OBSERVATION)
    note: str = setting("", "purpose of the run", kind=OBSERVATION)
    runs_dir: Place = setting("runs", "folder of the run directories", kind=MACHINE, min_length=1)
    log_interval: Int = setting(1, "steps between training records", kind=OBSERVATION, unit="steps", ge=1)
    flush_interval: Int = setting(
        50,
        "steps between writes to the log, which is also written every 2 s",
        kind=OBSERVATION,
        unit="steps",
        ge=1,
        le=64,
    )
    histogram_interval: Int = setting(
        250, "steps between histograms of parameters and gradients; 0: none", kind=OBSERVATION, unit="steps", ge=0
    )
    sample_tokens: Int = setting(
        200, "length of the text generated at each evaluation; 0: none", kind=OBSERVATION, unit="tokens", ge=0
    )
    sample_prompt: str = setting(
        "", "prompt for the text generated at each evaluation; empty: a line break, not shown", kind=OBSERVATION
    )
    aim_logging: bool = setting(False, "send the run to Aim in addition to TensorBoard", kind=OBSERVATION)
    aim_repo: Annotated[Place, AfterValidator(check_aim_repo)] = setting(
        ".",
        "folder that contains the .aim repository, or aim://HOST:PORT of an `aim server`",
        kind=MACHINE,
        min_length=1,
    )
    wandb_mode: Literal["offline", "online", "disabled"] = setting(
        "disabled",
        "send the run to Weights & Biases: offline (to files, to sync later), online (to its server), or not at all",
        kind=OBSERVATION,
    )
    experiment: str = setting(
        "workbench", "name of the run's Aim experiment or Weights & Biases project", kind=OBSERVATION, min_length=1
    )
    system_interval: Float = setting(
        10.0,
        "time between measurements of processor, memory, GPU and disk use; 0: none",
        kind=OBSERVATION,
        unit="seconds",
        ge=0,
    )
    tracking_budget: Float = setting(
        0.02,
        "largest share of one processor's time that feeding the trackers may use during training",
        kind=OBSERVATION,
        gt=0,
        le=1,
    )
    closing_seconds: Float = setting(
        30.0,
        "time limit for feeding the rest of the log to the trackers when training ends",
        kind=MACHINE,
        unit="seconds",
        ge=0,
    )


def check_qa_template(template: str) -> str:
    """Return `template`; raise ValueError unless it contains {question}."""
    if "{question}" not in template:
        raise ValueError(f"expected text that contains {{question}}, got {shown(template)}")
    return template


class InferenceConfig(Section):
    """How text is generated from a trained model: the defaults of inference.py and of a Generator.

    >>> Request.configured(InferenceConfig(max_new_tokens=20, temperature=0.5)).max_new_tokens
    20
    """

    max_new_tokens: Int = setting(
        300, "tokens to generate after a prompt", kind=OBSERVATION, unit="tokens", ge=1, le=1_000_000
    )
    temperature: Float = setting(
        0.8, "divide logits by this: below 1 is less random, 0 is greedy", kind=OBSERVATION, ge=0, le=1_000_000
    )
    top_k: Int | None = setting(None, "sample from the K most likely tokens; none: from all", kind=OBSERVATION, ge=1)
    top_p: Float | None = setting(
        None,
        "sample from the most likely tokens that together reach this probability; none: from all",
        kind=OBSERVATION,
        gt=0,
        le=1,
    )
    min_p: Float | None = setting(
        None,
        "sample from tokens with at least this fraction of the probability of the most likely one; none: from all",
        kind=OBSERVATION,
        ge=0,
        le=1,
    )
    repetition_penalty: Float = setting(
        1.0, "above 1: make tokens that are already in the text less likely", kind=OBSERVATION, ge=0.001, le=1000
    )
    qa_template: Annotated[str, AfterValidator(check_qa_template)] = setting(
        "Question: {question}\nAnswer: ", "prompt that `inference.py --mode qa` makes from a question", kind=OBSERVATION
    )
    qa_stop: str = setting(
        "\n", "text that ends an answer of `inference.py --mode qa`; empty: no such text", kind=OBSERVATION
    )


class Config(Section):
    """The configuration of one experiment, with built-in defaults; `workbench.load_config` also reads configs/.

    >>> config = Config(model=ModelConfig(n_layer=2, n_embd=64), train=TrainConfig(max_iters=100))
    >>> config.model.n_layer, config.optimizer.learning_rate
    (2, 0.001)
    """

    data: DataConfig = DataConfig()
    arithmetic: ArithmeticConfig = ArithmeticConfig()
    model: ModelConfig = ModelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    tracking: TrackingConfig = TrackingConfig()
    inference: InferenceConfig = InferenceConfig()

    @model_validator(mode="after")
    def _rules(self) -> Config:
        tokens, length = self.train.tokens_per_step, self.model.block_size
        if tokens is not None and tokens % length:
            below = tokens - tokens % length
            nearest = f"{below} or {below + length}" if below else f"{length}"
            raise RuleError(
                f"tokens_per_step ({tokens}) must be a multiple of block_size ({length}): {nearest}",
                "tokens_per_step",
                "block_size",
            )
        if self.train.max_iters is not None:
            warmup_steps(self.optimizer, self.train.max_iters)
        if self.train.shard != "none" and self.optimizer.lora_rank is not None:
            raise RuleError(
                "shard fsdp does not work with lora_rank: adapters leave little to shard", "lora_rank", "shard"
            )
        return self


def warmup_steps(config: OptimizerConfig, max_iters: int) -> int:
    """Number of warmup steps in a run of `max_iters` steps (with epochs, known only once the corpus is loaded).

    Raises:
        RuleError: the warmup would end after the decay or after the run.
    """
    if config.warmup_iters is None:
        return min(max_iters, config.lr_decay_iters or max_iters) // 20
    for key, end in (("lr_decay_iters", config.lr_decay_iters), ("max_iters", max_iters)):
        if end is not None and config.warmup_iters > end:
            raise RuleError(f"warmup_iters ({config.warmup_iters}) must not exceed {key} ({end})", "warmup_iters", key)
    return config.warmup_iters
