"""A Llama 2 of llama2.c: model.bin, and beside it perhaps tokenizer.bin."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import torch

from tokenizer import Tokenizer, tokenizer_from_json
from utils.checkpoints.tensors import map_entries
from utils.config.loader import Setting
from utils.errors import UserError
from utils.files import read_named
from utils.formats.c_files import Layout
from utils.formats.foreign import Foreign, unstacked
from utils.formats.table import half_split
from utils.tokenization.protocol import VERSION

TOKENIZER = "tokenizer.bin"
TOKENIZER_BYTES = 64 << 20
SPACE = "▁"  # what SentencePiece writes for a space
NAMES = {  # there -> here; freqs_cos and freqs_sin are not needed, and q, k and v are one matrix
    "tok_embeddings": "token_embedding.weight",
    "layers.*.attention_norm": "blocks.*.attention_norm.weight",
    "layers.*.ffn_norm": "blocks.*.mlp_norm.weight",
    "layers.*.wo": "blocks.*.attention.proj.weight",
    "layers.*.w1": "blocks.*.mlp.gate.weight",
    "layers.*.w2": "blocks.*.mlp.proj.weight",
    "layers.*.w3": "blocks.*.mlp.up.weight",
    "norm": "final_norm.weight",
    "output": "head.weight",
}
QKV = ("layers.*.wq", "layers.*.wk", "layers.*.wv")


def read_llama2_c(path: Path, layout: Layout) -> Foreign:
    """The model in a file of llama2.c, with the tokenizer beside it.

    Raises:
        UserError: a file cannot be read.
    """
    sizes, header, program = layout.sizes, f"{path.name}: header", "llama2.c"
    values = {key: getattr(sizes, key) for key in ("n_layer", "n_head", "n_kv_head", "n_embd", "ffn_dim", "block_size")}
    settings = {key: Setting(value, header) for key, value in values.items()}
    settings["tie_embeddings"] = Setting(sizes.tied, header)
    fixed = {"norm": "rmsnorm", "norm_eps": 1e-5, "mlp": "swiglu", "position": "rope", "rope_theta": 10000.0}
    settings |= {key: Setting(value, program) for key, value in {**fixed, "bias": False}.items()}
    stacked = map_entries(path, layout.tensors)
    weights = unstacked({name: tensor for name, tensor in stacked.items() if name in NAMES}, NAMES)
    for layer in range(sizes.n_layer):
        q, k, v = (stacked[name][layer] for name in QKV)
        parts = (half_split(q, sizes.n_head), half_split(k, sizes.n_kv_head), v)
        weights[f"blocks.{layer}.attention.qkv.weight"] = torch.cat(parts)
    foreign = Foreign(program, path, settings, weights, sizes.vocab_size)
    if (path.parent / TOKENIZER).is_file():
        foreign.tokenizer = read_tokenizer(path.parent / TOKENIZER, sizes.vocab_size)
    return foreign


def read_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer in a tokenizer.bin: the pieces of SentencePiece with their scores, from which the merges follow.

    Raises:
        UserError: the file is damaged, or has fewer pieces than the model has tokens.
    """
    pieces = _pieces(path, vocab_size)
    ids = {piece: number for number, (piece, _) in enumerate(pieces)}
    if len(ids) < len(pieces):
        raise UserError(f"{path}: a piece appears twice")
    learned = [(piece, score) for piece, score in pieces[3:] if len(piece) > 1 and not _is_byte(piece)]
    merges = []
    for piece, score in learned:
        cuts = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        found = [(ids[left], ids[right], left, right) for left, right in cuts if left in ids and right in ids]
        merges += [(-score, *pair) for pair in found]
    specials = [
        {"id": number, "content": pieces[number][0], "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for number in range(min(3, len(pieces)))
    ]
    specification = {
        "version": "1.0",
        "added_tokens": specials,
        "normalizer": _sequence("normalizers", {"type": "Prepend", "prepend": SPACE}, _replace(" ", SPACE)),
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": _sequence(
            "decoders",
            _replace(SPACE, " "),
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ),
        "model": {
            "type": "BPE",
            "unk_token": pieces[0][0],
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": ids,
            "merges": [[left, right] for *_, left, right in sorted(merges)],
        },
    }
    own = {"type": "hf", "version": VERSION, "tokenizer": json.dumps(specification, ensure_ascii=False)}
    return tokenizer_from_json(own, str(path))


def _pieces(path: Path, vocab_size: int) -> list[tuple[str, float]]:
    """The text and score of each piece; the first three pieces are <unk>, <s> and </s>.

    Raises:
        UserError: the file ends too early, or is larger than any vocabulary.
    """
    try:
        content = read_named(path, TOKENIZER_BYTES)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    pieces: list[tuple[str, float]] = []
    place = 4  # after the length of the longest piece
    try:
        while len(pieces) < vocab_size:
            score, length = struct.unpack_from("<fI", content, place)
            place += 8 + length
            if place > len(content):
                raise ValueError
            pieces.append((content[place - length : place].decode(), score))
    except (struct.error, ValueError):
        raise UserError(f"{path}: ends in piece {len(pieces):,} of the {vocab_size:,} that the model has") from None
    return [(text.strip("\n") if number in (1, 2) else text.replace(" ", SPACE), score)
            for number, (text, score) in enumerate(pieces)]  # fmt: skip


def _is_byte(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")


def _replace(old: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def _sequence(kind: str, *steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", kind: list(steps)}
