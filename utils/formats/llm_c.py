"""A GPT-2 of llm.c: model_*.bin, and beside it perhaps state_*.bin with the state of its AdamW."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Mapping
from pathlib import Path

import torch

from utils.checkpoints.header import BITS, TensorEntry
from utils.checkpoints.tensors import map_entries
from utils.config.loader import Setting
from utils.errors import UserError
from utils.files import open_named
from utils.formats.c_files import LLM_C_HEADER, Layout
from utils.formats.foreign import GPT2_BLOCK, MOMENTS, Foreign, unstacked

STATE_MAGIC, STATE_VERSION = 20240527, 1
NAMES = {  # there -> here; the rows of queries, keys and values are stacked in the same order
    "wte": "token_embedding.weight",
    "wpe": "position_embedding.weight",
    **{f"h.*.{there}.{kind}": f"blocks.*.{here}.{kind}" for kind in ("weight", "bias") for there, here in GPT2_BLOCK},
    "ln_f.weight": "final_norm.weight",
    "ln_f.bias": "final_norm.bias",
}


def read_llm_c(path: Path, layout: Layout) -> Foreign:
    """The model in a file of llm.c, with the state of its optimizer if there is one beside it.

    Raises:
        UserError: the file cannot be read, or the state is of another model.
    """
    sizes, header, program = layout.sizes, f"{path.name}: header", "llm.c"
    values = {"n_layer": sizes.n_layer, "n_head": sizes.n_head, "n_embd": sizes.n_embd, "block_size": sizes.block_size}
    settings = {key: Setting(value, header) for key, value in values.items()}
    fixed = {"mlp": "gelu_tanh", "norm": "layernorm", "position": "learned", "bias": True, "tie_embeddings": True}
    settings |= {key: Setting(value, program) for key, value in fixed.items()}
    weights = _ours(map_entries(path, layout.tensors), sizes.vocab_size)
    foreign = Foreign(program, path, settings, weights, sizes.vocab_size, tokenizer_kind="gpt2")
    number = re.fullmatch(r"model_(\d+)\.bin", path.name)
    if number is None:
        return foreign
    foreign.step = foreign.updates = int(number[1])
    states = sorted(path.parent.glob(f"state_{number[1]}_*.bin"))
    if len(states) > 1:
        foreign.notes.append(f"the state of the optimizer is in {len(states)} parts, so it was left out")
    elif states:
        _add_state(foreign, states[0], layout)
    return foreign


def _add_state(foreign: Foreign, path: Path, layout: Layout) -> None:
    """Take the moments of AdamW from a state file, and the float32 weights if it has them."""
    try:
        with open_named(path) as file:
            header, size = file.read(LLM_C_HEADER), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if len(header) < LLM_C_HEADER or struct.unpack_from("<2i", header) != (STATE_MAGIC, STATE_VERSION):
        raise UserError(f"{path}: not the state of an optimizer of llm.c, version {STATE_VERSION}")
    processes, _, has_weights = struct.unpack_from("<3i", header, 8)
    (step,) = struct.unpack_from("<i", header, 40)
    if processes != 1:
        foreign.notes.append(f"the state of the optimizer is that of {processes} processes, so it was left out")
        return
    kinds = [*MOMENTS, *(["weights"] if has_weights else [])]
    begin = LLM_C_HEADER
    found: dict[str, dict[str, TensorEntry]] = {}
    for kind in kinds:
        entries: dict[str, TensorEntry] = {}
        for name, entry in layout.tensors.items():
            end = begin + entry.elements * BITS["F32"] // 8
            entries[name] = TensorEntry("F32", entry.shape, begin, end)
            begin = end
        found[kind] = entries
    if begin > size:
        raise UserError(f"{path}: has {size:,} bytes, the state of {foreign.path.name} needs {begin:,}")
    if step != foreign.step:
        raise UserError(f"{path}: its header says step {step:,}, its name {foreign.step:,}")
    ours = {kind: _ours(map_entries(path, found[kind]), foreign.vocab_size) for kind in kinds}
    foreign.weights = ours.pop("weights", foreign.weights)
    foreign.moments = ours
    for key, value in (("beta1", 0.9), ("beta2", 0.95), ("adam_eps", 1e-8)):
        foreign.settings[key] = Setting(value, foreign.program)


def _ours(stacked: Mapping[str, torch.Tensor], vocab_size: int) -> dict[str, torch.Tensor]:
    """The tensors by our names, unstacked into layers, without the rows that pad the vocabulary."""
    return unstacked({**stacked, "wte": stacked["wte"][:vocab_size]}, NAMES)
