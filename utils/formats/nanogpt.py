"""A checkpoint of nanoGPT: ckpt.pt."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from utils.config.loader import Setting
from utils.errors import UserError
from utils.formats.foreign import GPT2_BLOCK, Foreign, adamw_moments, number, renamed, settings_of, tensors_of

GPT = "nanoGPT's GPT"
NAMES = {  # there -> here; the rows of queries, keys and values are stacked in the same order
    "transformer.wte.weight": "token_embedding.weight",
    "transformer.wpe.weight": "position_embedding.weight",
    **{
        f"transformer.h.*.{there}.{kind}": f"blocks.*.{here}.{kind}"
        for kind in ("weight", "bias")
        for there, here in GPT2_BLOCK
    },
    "transformer.ln_f.weight": "final_norm.weight",
    "transformer.ln_f.bias": "final_norm.bias",
}
HEAD, EMBEDDING = "lm_head.weight", "transformer.wte.weight"  # tied
GPT2_ROWS = (50257, 50304)  # of the embedding: the tokens of GPT-2, alone or padded to a multiple of 64
MASK = ".attn.bias"  # a buffer in old versions
KEYS = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")
HANDLED = (  # names in its configuration that are translated below
    *(*KEYS, "bias", "dropout", "batch_size", "gradient_accumulation_steps", "decay_lr"),
    *("dataset", "device", "dtype", "compile"),
)
DECAY_SETTINGS = ("warmup_iters", "lr_decay_iters", "min_lr")  # unused if decay_lr is off: min_lr may then be anything


def is_nanogpt(checkpoint: Any) -> bool:
    return isinstance(checkpoint, dict) and {"model", "model_args"} <= checkpoint.keys()


def read_nanogpt(path: Path, checkpoint: Mapping[str, Any]) -> Foreign:
    """The model in a checkpoint of nanoGPT, with the state of its optimizer.

    Raises:
        UserError: it has something that nanoGPT's GPT does not have, which the message names.
    """
    arguments, config, source = checkpoint["model_args"], checkpoint.get("config") or {}, path.name
    if not isinstance(arguments, dict) or not isinstance(config, dict):
        raise UserError(f"{path}: model_args and config: expected settings by name")
    if "dim" in arguments:
        raise UserError(f"{path}: a checkpoint of llama2.c: its export.py writes a model.bin, which can be read here")
    sizes = {key: number(arguments, key, f"{path}: model_args", 1 << 24) for key in KEYS}
    tensors = tensors_of(checkpoint["model"], f"{path}: model")
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(MASK) or tensor.dim() != 4}
    embedding, head = tensors.get(EMBEDDING), tensors.pop(HEAD, None)
    if embedding is None or embedding.shape != (sizes["vocab_size"], sizes["n_embd"]):
        raise UserError(f"{path}: {EMBEDDING}: expected shape {(sizes['vocab_size'], sizes['n_embd'])}")
    if head is not None and not torch.equal(head, embedding):
        raise UserError(f"{path}: {HEAD} is not {EMBEDDING}: nanoGPT ties the two")

    notes: list[str] = []
    unused = DECAY_SETTINGS if config.get("decay_lr") is False else ()
    used = {key: value for key, value in config.items() if key not in unused}
    settings = settings_of(used, f"{source}: config", notes, HANDLED)
    settings |= settings_of(arguments, f"{source}: model_args", notes, ("vocab_size", "bias"))
    layers = f"{source}: layers"
    settings |= {
        "bias": Setting(any(name.endswith(".bias") for name in tensors), layers),
        **{key: Setting(value, layers) for key, value in (("mlp", "gelu"), ("norm", "layernorm"))},
    }
    settings |= _training(config, f"{source}: config", notes)
    weights = renamed(tensors, NAMES, path, GPT)
    foreign = Foreign("nanoGPT", path, settings, weights, sizes["vocab_size"], notes=notes)
    if sizes["vocab_size"] in GPT2_ROWS:
        foreign.tokenizer_kind = "gpt2"
    if type(step := checkpoint.get("iter_num")) is int and step >= 0:
        foreign.step = step
    best = checkpoint.get("best_val_loss")
    foreign.best_val_loss = float(best) if isinstance(best, torch.Tensor | float) else None
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    matrices = [name for name in tensors if tensors[name].dim() > 1]
    vectors = [name for name in tensors if tensors[name].dim() < 2]
    orders = [[*matrices, *vectors], [*sorted(matrices), *sorted(vectors)]]  # the second is that of its first versions
    if (found := adamw_moments(checkpoint.get("optimizer"), orders, shapes)) is not None:
        by_kind, foreign.updates = found
        foreign.moments = {kind: renamed(of_kind, NAMES, path, GPT) for kind, of_kind in by_kind.items()}
    elif checkpoint.get("optimizer"):
        notes.append("the state of the optimizer is not that of nanoGPT's AdamW, so it was left out")
    return foreign


def _training(config: Mapping[str, Any], source: str, notes: list[str]) -> dict[str, Setting]:
    """The settings of training that mean something else here.

    nanoGPT's batch_size is that of a micro-step, ours that of an update.
    """
    settings = {}
    micro_batch, steps = config.get("batch_size"), config.get("gradient_accumulation_steps", 1)
    if type(micro_batch) is int and type(steps) is int and min(micro_batch, steps) >= 1:
        settings["batch_size"] = Setting(micro_batch * steps, f"{source}: batch_size x gradient_accumulation_steps")
        settings["gradient_accumulation_steps"] = Setting(steps, f"{source}: gradient_accumulation_steps")
    if config.get("decay_lr") is False:
        settings |= {
            "schedule": Setting("constant", f"{source}: decay_lr"),
            "warmup_iters": Setting(0, f"{source}: decay_lr"),
        }
    for name, why in (
        ("dataset", "--dataset names the text"),
        ("device", "the device is chosen again"),
        ("dtype", "the precision is chosen again"),
        ("compile", "a run is compiled if --compile is given"),
    ):
        if name in config:
            notes.append(f"{name} = {config[name]} is not taken over: {why}")
    return settings
