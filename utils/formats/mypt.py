"""A checkpoint folder of MyPT: model.pt, config.json, tokenizer.json, training_state.json and perhaps optimizer.pt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tokenizer import Tokenizer, tokenizer_from_json
from utils.checkpoints.folder import EXPORT_CONFIG_FILE, TOKENIZER_FILE
from utils.config.loader import Setting
from utils.config.parse import CONFIG_BYTES
from utils.errors import UserError, shown
from utils.files import read_named
from utils.formats.foreign import Foreign, adamw_moments, number, renamed, settings_of, tensors_of
from utils.formats.pickles import read_pickle
from utils.tokenization.protocol import VERSION

MODEL, CONFIG, TOKENIZER, STATE = "model.pt", EXPORT_CONFIG_FILE, TOKENIZER_FILE, "training_state.json"
OPTIMIZER = "optimizer.pt"
GPT = "MyPT's GPT"
TOKENIZER_BYTES = 16 << 20
NAMES = {  # there -> here
    "token_embedding_table.weight": "token_embedding.weight",
    "position_embedding_table.weight": "position_embedding.weight",
    **{
        f"blocks.*.{there}.{kind}": f"blocks.*.{here}.{kind}"
        for kind in ("weight", "bias")
        for there, here in (
            ("ln1", "attention_norm"),
            ("sa.qkv", "attention.qkv"),
            ("sa.proj", "attention.proj"),
            ("ln2", "mlp_norm"),
            ("fwd.net.0", "mlp.up"),
            ("fwd.net.2", "mlp.proj"),
            ("fwd.w_gate", "mlp.gate"),
            ("fwd.w_up", "mlp.up"),
            ("fwd.w_down", "mlp.proj"),
        )
    },
    "ln_f.weight": "final_norm.weight",
    "ln_f.bias": "final_norm.bias",
    "lm_head.weight": "head.weight",
    "lm_head.bias": "head.bias",
}
# Keys of config.json that are translated below.
HANDLED = ("vocab_size", "bias", "tie_weights", "device", "batch_size", "rope_scale")


def is_mypt(folder: Path) -> bool:
    return (folder / MODEL).is_file() and (folder / CONFIG).is_file()


def read_mypt(folder: Path) -> Foreign:
    """The model in a folder of MyPT, with its tokenizer and the state of its optimizer.

    Raises:
        UserError: it has something that cannot be represented here, which the message names.
    """
    config = _object(folder / CONFIG, CONFIG_BYTES)
    vocab_size = number(config, "vocab_size", f"{folder / CONFIG}", 1 << 24)
    pickled = read_pickle(folder / MODEL)
    if isinstance(pickled, dict) and "state_dict" in pickled:
        pickled = pickled["state_dict"]
    tensors = {name: tensor for name, tensor in tensors_of(pickled, f"{folder / MODEL}").items() if "tril" not in name}
    if any(".sa.heads." in name for name in tensors):
        raise UserError(
            f"{folder / MODEL}: blocks.*.sa.heads: an early version of MyPT, whose MLP has ReLU; no mlp here has that"
        )
    if config.get("rope_scale", 1.0) != 1.0:
        raise UserError(f"{folder / CONFIG}: rope_scale: expected 1, got {shown(config['rope_scale'])}")

    notes: list[str] = []
    settings = settings_of(config, CONFIG, notes, HANDLED)
    weights = renamed(tensors, NAMES, folder / MODEL, GPT)
    settings |= _layers(config, weights)
    if "device" in config:
        notes.append(f"device = {shown(config['device'])} is not taken over: the device is chosen again")
    if type(config.get("batch_size")) is int and config["batch_size"] >= 1:
        settings["batch_size"] = Setting(config["batch_size"], f"{CONFIG}: batch_size")
    foreign = Foreign("MyPT", folder, settings, weights, vocab_size, notes=notes)
    if (folder / TOKENIZER).exists():
        foreign.tokenizer, foreign.tokenizer_kind = _tokenizer(folder / TOKENIZER, notes)
    state = _object(folder / STATE, CONFIG_BYTES) if (folder / STATE).exists() else {}
    if type(step := state.get("step")) is int and step >= 0:
        foreign.step = step
    if isinstance(training := state.get("training_config"), dict):
        foreign.settings |= {
            key: setting
            for key, setting in settings_of(training, f"{STATE}: training_config", notes, ("batch_size",)).items()
            if key not in foreign.settings
        }
    if (folder / OPTIMIZER).is_file():
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        found = adamw_moments(read_pickle(folder / OPTIMIZER), _orders(tensors, config), shapes)
        if found is None:
            notes.append(f"{OPTIMIZER} is not the state of MyPT's AdamW, so it was left out")
        else:
            by_kind, foreign.updates = found
            foreign.moments = {
                kind: renamed(of_kind, NAMES, folder / OPTIMIZER, GPT) for kind, of_kind in by_kind.items()
            }
            notes.append("weight decay includes the embeddings here, which MyPT leaves out")
    return foreign


def _layers(config: Mapping[str, Any], weights: dict[str, torch.Tensor]) -> dict[str, Setting]:
    """The settings of the model that follow from its tensors.

    If only some layers have biases, zeros are added to `weights` for the others. The head is added or removed according
    to whether it is tied to the embedding.
    """
    gated, rms = "blocks.0.mlp.gate.weight" in weights, "final_norm.bias" not in weights
    learned = "position_embedding.weight" in weights
    layers = {
        "position": "learned" if learned else "rope",
        "norm": "rmsnorm" if rms else "layernorm",
        "norm_eps": 1e-6 if rms else 1e-5,
        "mlp": "swiglu" if gated else "gelu",
        "qkv_bias": "blocks.0.attention.qkv.bias" in weights,
        "bias": any(name.endswith(".bias") and not name.startswith("head.") for name in weights),
        "tie_embeddings": False,
        "head_bias": "head.bias" in weights,
    }
    if gated:
        layers["ffn_dim"] = len(weights["blocks.0.mlp.gate.weight"])
    if config.get("tie_weights") is True:
        weights["head.weight"] = weights["token_embedding.weight"]
        layers["tie_embeddings"] = not layers["head_bias"]
        if not layers["head_bias"]:
            del weights["head.weight"]
    if layers["bias"]:
        for name in [name for name in weights if name.startswith("blocks.") and name.endswith(".weight")]:
            bias = f"{name.removesuffix('.weight')}.bias"
            is_norm = "_norm." in name
            if bias not in weights and not name.endswith("qkv.weight") and not (is_norm and rms):
                weights[bias] = torch.zeros(len(weights[name]))
    return {key: Setting(value, f"{MODEL}: layers") for key, value in layers.items()}


def _orders(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> list[list[str]]:
    """Possible orders of the parameters in the optimizer: in groups with and without weight decay, or in one group."""
    tied = config.get("tie_weights") is True
    names = [name for name in tensors if not (tied and name == "lm_head.weight")]
    # MyPT's own rule for parameters without weight decay.
    kept = [name for name in names if tensors[name].dim() == 1 or "embedding" in name or "ln" in name]
    return [[name for name in names if name not in kept] + kept, names]


def _tokenizer(path: Path, notes: list[str]) -> tuple[Tokenizer | None, str | None]:
    """The tokenizer in a folder of MyPT and None; or for gpt2, None and the kind.

    Raises:
        UserError: the file is damaged.
    """
    state = _object(path, TOKENIZER_BYTES)
    kind, characters = state.get("token_kind"), state.get("chars")
    if kind == "char":
        if not isinstance(characters, list) or not all(isinstance(c, str) and len(c) == 1 for c in characters):
            raise UserError(f"{path}: chars: expected a list of characters")
        if len(set(characters)) < len(characters):
            raise UserError(f"{path}: chars: a character appears twice")
        own = {"type": "char", "version": VERSION, "vocabulary": characters, "unknown_token": None}
        return tokenizer_from_json(own, str(path)), None
    if kind != "gpt2":
        raise UserError(f"{path}: token_kind: expected char or gpt2, got {shown(kind)}")
    if special := state.get("special_token_encoder"):
        notes.append(f"{len(special)} special tokens of {TOKENIZER} have no counterpart: gpt2 has only <|endoftext|>")
    return None, kind


def _object(path: Path, limit: int) -> dict[str, Any]:
    """The JSON object in a small file.

    Raises:
        UserError: it cannot be read, is larger than `limit` bytes, or is not an object.
    """
    try:
        value = json.loads(read_named(path, limit))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected an object, got a {type(value).__name__}")
    return value
