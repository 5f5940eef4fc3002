"""The files of llm.c and llama2.c: a header of numbers, then all tensors in a fixed order, without names.

| file                  | header                                                           | tensors  |
|-----------------------|------------------------------------------------------------------|----------|
| llm.c, version 3, 5   | 256 int32: 20240326, version, block_size, vocab_size, n_layer,   | float32, |
|                       | n_head, n_embd, padded vocab_size                                | bfloat16 |
| llama2.c, legacy      | 7 int32: dim, hidden_dim, n_layers, n_heads, n_kv_heads,         | float32  |
|                       | vocab_size (negative: the output head is not tied), max_seq_len  |          |
| llama2.c, version 1   | 256 bytes: "24ka", 1, the same 7, a byte: 1 if the head is tied  | float32  |
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from utils.checkpoints.header import BITS, TensorEntry
from utils.errors import UserError
from utils.files import open_named

LLM_C, LLAMA2_C = "llm.c", "llama2.c"
LLM_C_MAGIC, LLM_C_HEADER = 20240326, 1024
LLM_C_TYPES = {3: "F32", 5: "BF16"}
LLAMA2_C_MAGIC, LLAMA2_C_HEADER = 0x616B3432, 256
LARGEST = {"layers": 1 << 10, "heads": 1 << 10, "width": 1 << 16, "context": 1 << 24, "vocabulary": 1 << 24}
OTHER_MAGICS = {
    20240327: "a debugging state of llm.c",
    20240328: "a tokenizer of llm.c",
    20240520: "a file of tokens of llm.c",
    20240527: "the optimizer state of llm.c, which belongs to a model_*.bin beside it",
    20240803: "a Llama 3 of llm.c",
}


class Sizes(NamedTuple):
    """The numbers in a header, by our names; padded_vocab_size is the number of embedding rows in the file."""

    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    ffn_dim: int
    block_size: int
    vocab_size: int
    padded_vocab_size: int
    tied: bool


@dataclass(frozen=True)
class Layout:
    """The tensors of a file and where they are. A tensor with `*` in its name stacks those of all layers: (L, ...).

    program: llm.c or llama2.c. version: 0 for the legacy format of llama2.c.
    """

    program: str
    version: int
    sizes: Sizes
    tensors: dict[str, TensorEntry]


def read_layout(path: Path) -> Layout | None:
    """The layout of a file of llm.c or llama2.c; None if it is neither.

    Raises:
        UserError: it is of a kind or version that is not supported, or not as long as its header says.
    """
    try:
        with open_named(path) as file:
            return _layout(path, file)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def _layout(path: Path, file: BinaryIO) -> Layout | None:
    size = os.fstat(file.fileno()).st_size
    start = file.read(64)
    if len(start) < 64:
        return None
    magic, version = struct.unpack_from("<Ii", start)
    if magic == LLM_C_MAGIC:
        return _llm_c(path, version, struct.unpack_from("<6i", start, 8), size)
    if magic == LLAMA2_C_MAGIC:
        if version != 1:
            quantized = " (8-bit)" if version == 2 else ""
            raise UserError(
                f"{path}: version {version} of llama2.c's files{quantized}: only legacy files and version 1 can be read"
            )
        return _llama2_c(path, 1, struct.unpack_from("<7i", start, 8), bool(start[36]), size)
    if magic in OTHER_MAGICS:
        raise UserError(f"{path}: {OTHER_MAGICS[magic]}: expected the weights of a GPT-2 (model_*.bin)")
    numbers = struct.unpack_from("<7i", start)
    dim, hidden, layers, heads, kv_heads, vocab_size, context = numbers
    plausible = min(dim, hidden, layers, heads, kv_heads, context) > 0 and vocab_size != 0
    if not plausible or heads > LARGEST["heads"] or layers > LARGEST["layers"] or dim > LARGEST["width"]:
        return None
    return _llama2_c(path, 0, (*numbers[:5], abs(vocab_size), context), vocab_size > 0, size)


def _check(path: Path, sizes: Sizes) -> None:
    """Raises UserError unless the numbers of a header are those of a model."""
    limits = {
        "n_layer": "layers",
        "n_head": "heads",
        "n_kv_head": "heads",
        "n_embd": "width",
        "block_size": "context",
        "vocab_size": "vocabulary",
        "padded_vocab_size": "vocabulary",
    }
    for key, kind in limits.items():
        if not 1 <= (value := getattr(sizes, key)) <= LARGEST[kind]:
            raise UserError(f"{path}: its header says {key} {value:,}: expected 1 to {LARGEST[kind]:,}")
    if not 1 <= sizes.ffn_dim <= 64 * LARGEST["width"]:
        raise UserError(f"{path}: its header says ffn_dim {sizes.ffn_dim:,}")
    if sizes.n_embd % sizes.n_head or sizes.n_head % sizes.n_kv_head:
        raise UserError(
            f"{path}: its header says n_embd {sizes.n_embd}, n_head {sizes.n_head}, n_kv_head {sizes.n_kv_head}: each "
            "must divide the one before"
        )
    if sizes.padded_vocab_size < sizes.vocab_size:
        raise UserError(f"{path}: its header says vocab_size {sizes.vocab_size:,}, padded {sizes.padded_vocab_size:,}")


def _llm_c(path: Path, version: int, numbers: tuple[int, ...], size: int) -> Layout:
    if version not in LLM_C_TYPES:
        raise UserError(f"{path}: version {version} of llm.c's files: only 3 (float32) and 5 (bfloat16) can be read")
    context, vocab_size, layers, heads, width, padded = numbers
    sizes = Sizes(layers, heads, heads, width, 4 * width, context, vocab_size, padded, True)
    _check(path, sizes)
    tensors = _placed(_llm_c_shapes(sizes), LLM_C_TYPES[version], LLM_C_HEADER)
    _check_length(path, tensors, size)
    return Layout(LLM_C, version, sizes, tensors)


def _llm_c_shapes(sizes: Sizes) -> Iterator[tuple[str, tuple[int, ...]]]:
    L, C = sizes.n_layer, sizes.n_embd
    yield "wte", (sizes.padded_vocab_size, C)
    yield "wpe", (sizes.block_size, C)
    yield "h.*.ln_1.weight", (L, C)
    yield "h.*.ln_1.bias", (L, C)
    yield "h.*.attn.c_attn.weight", (L, 3 * C, C)
    yield "h.*.attn.c_attn.bias", (L, 3 * C)
    yield "h.*.attn.c_proj.weight", (L, C, C)
    yield "h.*.attn.c_proj.bias", (L, C)
    yield "h.*.ln_2.weight", (L, C)
    yield "h.*.ln_2.bias", (L, C)
    yield "h.*.mlp.c_fc.weight", (L, 4 * C, C)
    yield "h.*.mlp.c_fc.bias", (L, 4 * C)
    yield "h.*.mlp.c_proj.weight", (L, C, 4 * C)
    yield "h.*.mlp.c_proj.bias", (L, C)
    yield "ln_f.weight", (C,)
    yield "ln_f.bias", (C,)


def _llama2_c(path: Path, version: int, numbers: tuple[int, ...], tied: bool, size: int) -> Layout | None:
    dim, hidden, layers, heads, kv_heads, vocab_size, context = numbers
    sizes = Sizes(layers, heads, kv_heads, dim, hidden, context, vocab_size, vocab_size, tied)
    if version:
        _check(path, sizes)
        tensors = _placed(_version_1_shapes(sizes), "F32", LLAMA2_C_HEADER)
        _check_length(path, tensors, size)
        return Layout(LLAMA2_C, version, sizes, tensors)
    tensors = _placed(_legacy_shapes(sizes), "F32", 28)
    end = max(entry.end for entry in tensors.values())
    if size != end:  # this format has no magic number, so the length decides
        return None
    _check(path, sizes)
    return Layout(LLAMA2_C, version, sizes, tensors)


def _version_1_shapes(sizes: Sizes) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "layers.*.attention_norm", (sizes.n_layer, sizes.n_embd)
    yield "layers.*.ffn_norm", (sizes.n_layer, sizes.n_embd)
    yield "norm", (sizes.n_embd,)
    yield "tok_embeddings", (sizes.vocab_size, sizes.n_embd)
    yield from _attention_shapes(sizes)
    yield from _mlp_shapes(sizes)
    if not sizes.tied:
        yield "output", (sizes.vocab_size, sizes.n_embd)


def _legacy_shapes(sizes: Sizes) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "tok_embeddings", (sizes.vocab_size, sizes.n_embd)
    yield "layers.*.attention_norm", (sizes.n_layer, sizes.n_embd)
    yield from _attention_shapes(sizes)
    yield "layers.*.ffn_norm", (sizes.n_layer, sizes.n_embd)
    yield from _mlp_shapes(sizes)
    yield "norm", (sizes.n_embd,)
    pairs = sizes.n_embd // sizes.n_head // 2
    yield "freqs_cos", (sizes.block_size, pairs)
    yield "freqs_sin", (sizes.block_size, pairs)
    if not sizes.tied:
        yield "output", (sizes.vocab_size, sizes.n_embd)


def _attention_shapes(sizes: Sizes) -> Iterator[tuple[str, tuple[int, ...]]]:
    L, C = sizes.n_layer, sizes.n_embd
    kv_width = sizes.n_kv_head * (C // sizes.n_head)
    yield "layers.*.wq", (L, C, C)
    yield "layers.*.wk", (L, kv_width, C)
    yield "layers.*.wv", (L, kv_width, C)
    yield "layers.*.wo", (L, C, C)


def _mlp_shapes(sizes: Sizes) -> Iterator[tuple[str, tuple[int, ...]]]:
    L, C, F = sizes.n_layer, sizes.n_embd, sizes.ffn_dim
    yield "layers.*.w1", (L, F, C)
    yield "layers.*.w2", (L, C, F)
    yield "layers.*.w3", (L, F, C)


def _placed(shapes: Iterator[tuple[str, tuple[int, ...]]], dtype: str, begin: int) -> dict[str, TensorEntry]:
    tensors = {}
    for name, shape in shapes:
        end = begin + math.prod(shape) * BITS[dtype] // 8
        tensors[name] = TensorEntry(dtype, shape, begin, end)
        begin = end
    return tensors


def _check_length(path: Path, tensors: dict[str, TensorEntry], size: int) -> None:
    """Raises UserError unless the tensors end where the file ends."""
    end = max(entry.end for entry in tensors.values())
    if size != end:
        raise UserError(f"{path}: has {size:,} bytes, its header describes {end:,}")
