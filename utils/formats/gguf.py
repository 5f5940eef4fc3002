"""The export for llama.cpp and programs built on it: one file in the format GGUF, written by the package gguf.

The tables of the families say which tensors there are, and the package has llama.cpp's names for them. The architecture
llama rotates neighbouring channels, so the rows of its queries and keys are in another order.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model import LanguageModel
from utils.config.settings import ModelConfig
from utils.errors import UserError
from utils.files import write_atomic
from utils.formats.card import model_card
from utils.formats.families import family_for
from utils.formats.folder import MARKER, new_folder
from utils.formats.gguf_tokenizer import Vocabulary, vocabulary_of
from utils.formats.source import Source
from utils.formats.table import Family, FormatError, Place, Shape, half_split, interleaved, places, read_places
from utils.nn.rotary import scaled

MODEL = "model.gguf"
HEAD, ROPE_DIVISORS = "output.weight", "rope_freqs.weight"
ARCHITECTURES = {"GPT2LMHeadModel": "gpt2", "LlamaForCausalLM": "llama", "MistralForCausalLM": "llama"} | {
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
TYPES = {"F32": 0, "F16": 1, "Q8_0": 7}  # types of the matrices, and the `general.file_type` of each
BLOCK = 32  # numbers that share a scale in Q8_0
LOADING = """
import xllamacpp

params = xllamacpp.CommonParams()
params.model.path = "PATH/model.gguf"
server = xllamacpp.Server(params)
print(server.handle_completions({"prompt": "The ", "max_tokens": 50})["choices"][0]["text"])
"""


def gguf_package() -> Any:
    """The package gguf.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise UserError("the format gguf needs the package gguf: pip install gguf") from None


def export_gguf(
    source: Source,
    folder: Path,
    *,
    kind: str = "F32",
    licence: str | None = None,
    check: Callable[[Path], None] = lambda path: None,
) -> dict[str, Any]:
    """Write a model in the format of llama.cpp.

    Args:
        folder: where to write; an older export is replaced.
        kind: type of the matrices, one of TYPES; vectors and position embeddings are F32.
        licence: of the weights, for the model card.
        check: called with the hidden folder before it is renamed; if it raises, that is deleted.

    Returns:
        What was written: architecture, folder, files, bytes, dtype, notes.

    Raises:
        UserError: the format cannot hold the model or its tokenizer; raised before anything is written.
    """
    package = gguf_package()
    family = gguf_family(source)
    vocabulary = vocabulary_of(source.tokenizer)
    table = gguf_places(package, family, source.model)
    notes = [f"The architecture is {ARCHITECTURES[family.architecture]}, the matrices are {kind}.", *vocabulary.notes]
    uneven = [name for name, found in table.items() if len(found.shape) > 1 and _shape(found)[-1] % BLOCK]
    if kind == "Q8_0" and uneven:
        notes.append(f"{len(uneven)} tensors are F16: their rows do not have a multiple of {BLOCK} numbers.")
    with new_folder(folder) as hidden:
        _write(package, hidden / MODEL, source, family, table, vocabulary, kind, licence)
        card = model_card(source, "llama.cpp", LOADING.replace("PATH", folder.name), licence, notes)
        write_atomic(hidden / MARKER, card)
        if (name := differing_weight(source, hidden / MODEL, kind)) is not None:
            raise RuntimeError(f"the weights that were written are not those of the model: {name}")
        check(hidden)
        size = (hidden / MODEL).stat().st_size
    return {
        "architecture": ARCHITECTURES[family.architecture],
        "folder": folder,
        "files": [MODEL],
        "bytes": size,
        "dtype": kind,
        "notes": notes,
    }


def gguf_family(source: Source) -> Family:
    """The family whose llama.cpp architecture computes the model.

    Raises:
        FormatError: there is none; the message names what llama.cpp cannot compute.
    """
    config = source.model.config
    family = family_for(config, source.pretrained.get("architecture"))
    if obstacles := _obstacles(config, ARCHITECTURES[family.architecture]):
        raise FormatError(
            f"GGUF cannot hold this model: llama.cpp's {ARCHITECTURES[family.architecture]} does not support "
            f"{', '.join(obstacles)}"
        )
    return family


def _obstacles(config: ModelConfig, architecture: str) -> list[str]:
    found = []
    if architecture == "gpt2" and config.mlp != "gelu_tanh":
        found.append(f"mlp {config.mlp} (only gelu_tanh)")
    if any((config.window(layer) or config.block_size) < config.block_size for layer in range(config.n_layer)):
        found.append(f"sliding_window {config.sliding_window}")
    if architecture == "qwen3" and (config.bias or config.has_qkv_bias):
        found.append("bias true")
    if architecture != "llama" and config.rope_scaling == "llama3":
        found.append("rope_scaling llama3")
    return found


def gguf_places(package: Any, family: Family, model: LanguageModel) -> dict[str, Place]:
    """The tensors of a family, by their names in GGUF."""
    known = {architecture: number for number, architecture in package.MODEL_ARCH_NAMES.items()}
    names = package.get_tensor_name_map(known[ARCHITECTURES[family.architecture]], model.config.n_layer)
    found = {}
    for place in places(family, model.config, model.vocab_size, filled=True):
        module, _, kind = place.theirs.rpartition(".")
        name = names.get_name(module)
        assert name is not None, f"the package gguf has no name for {place.theirs}"
        found[f"{name}.{kind}"] = place
    return found


def _shape(place: Place) -> Shape:
    """The shape of a tensor in GGUF, where all matrices are (out, in)."""
    return place.shape[::-1] if place.layout == "transposed" else place.shape


def _stored_as(name: str, place: Place, kind: str) -> str:
    """The type of a tensor in a file whose matrices have type `kind`."""
    if len(place.shape) == 1 or name == "position_embd.weight":
        return "F32"
    return "F16" if kind == "Q8_0" and _shape(place)[-1] % BLOCK else kind


def _heads(place: Place, family: Family, config: ModelConfig) -> int | None:
    """The number of heads of a tensor whose rows are in another order in GGUF; None if the order is ours."""
    if ARCHITECTURES[family.architecture] != "llama":
        return None
    heads = {".q_proj.": config.n_head, ".k_proj.": config.kv_heads}
    return next((count for part, count in heads.items() if part in place.theirs), None)


def _write(
    package: Any,
    path: Path,
    source: Source,
    family: Family,
    table: Mapping[str, Place],
    vocabulary: Vocabulary,
    kind: str,
    licence: str | None,
) -> None:
    config, weights = source.model.config, source.model.state_dict()
    writer = package.GGUFWriter(path, ARCHITECTURES[family.architecture])
    _add_metadata(package, writer, source, kind, licence)
    _add_vocabulary(writer, vocabulary)
    stored = {**table}
    if config.tie_embeddings:  # some readers do not fall back on the embedding
        stored[HEAD] = table["token_embd.weight"]
    type_of = package.GGMLQuantizationType
    types = {name: type_of[_stored_as(name, place, kind)] for name, place in stored.items()}
    shapes = {name: _shape(place) for name, place in stored.items()}
    if config.rope_scaling == "llama3":
        types[ROPE_DIVISORS], shapes[ROPE_DIVISORS] = type_of.F32, (config.head_width // 2,)

    def numbers(name: str) -> np.ndarray[Any, Any]:
        if name == ROPE_DIVISORS:
            return rope_divisors(config).numpy()
        place = stored[name]
        tensor = place.to_ours(place.to_theirs(weights)).to("cpu", torch.float32)
        heads = _heads(place, family, config)
        tensor = tensor if heads is None else interleaved(tensor, heads)
        return package.quants.quantize(tensor.contiguous().numpy(), types[name])

    for name, kind_of_tensor in types.items():
        shape = shapes[name]
        if kind_of_tensor == type_of.Q8_0:
            shape = package.quants.quant_shape_to_byte_shape(shape, kind_of_tensor)
        dtype = np.dtype({type_of.F32: np.float32, type_of.F16: np.float16}.get(kind_of_tensor, np.uint8))
        writer.add_tensor_info(name, shape, dtype, math.prod(shape) * dtype.itemsize, raw_dtype=kind_of_tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in types:
        writer.write_tensor_data(numbers(name).view(_Written))
    writer.close()


class _Written(np.ndarray[Any, Any]):
    """An array whose `tofile` raises the error of the operating system; that of numpy leaves out the reason."""

    def tofile(self, file: Any) -> None:  # type: ignore[override]
        file.write(np.ascontiguousarray(self).data)


def _add_metadata(package: Any, writer: Any, source: Source, kind: str, licence: str | None) -> None:
    config = source.model.config
    writer.add_name(source.name)
    if licence := licence or source.pretrained.get("license"):
        writer.add_license(licence)
    writer.add_file_type(TYPES[kind])
    writer.add_vocab_size(source.model.vocab_size)
    writer.add_context_length(config.block_size)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.ffn_width)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_width)
    writer.add_value_length(config.head_width)
    (writer.add_layer_norm_eps if config.norm == "layernorm" else writer.add_layer_norm_rms_eps)(config.norm_eps)
    if config.position == "rope":
        writer.add_rope_dimension_count(config.head_width)
        writer.add_rope_freq_base(config.rope_theta)
    if config.rope_scaling in ("linear", "yarn"):
        writer.add_rope_scaling_type(package.RopeScalingType(config.rope_scaling))
        writer.add_rope_scaling_factor(config.rope_factor)
    if config.rope_scaling == "yarn":
        writer.add_rope_scaling_orig_ctx_len(config.rope_original_context)
        writer.add_rope_scaling_yarn_beta_slow(config.rope_low_freq)
        writer.add_rope_scaling_yarn_beta_fast(config.rope_high_freq)


def rope_divisors(config: ModelConfig) -> torch.Tensor:
    """The factors (D / 2,) by which llama.cpp divides rotary frequencies, for the scaling of Llama 3."""
    channels = torch.arange(0, config.head_width, 2, dtype=torch.float64)
    frequencies = config.rope_theta ** -(channels / config.head_width)
    return (frequencies / scaled(frequencies, config)).float()


def _add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    if vocabulary.pattern is not None:
        writer.add_tokenizer_pre(vocabulary.pattern)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.end is not None:
        writer.add_bos_token_id(vocabulary.end)
        writer.add_eos_token_id(vocabulary.end)
    writer.add_add_bos_token(False)


def _reader(path: Path) -> Any:
    try:
        return gguf_package().GGUFReader(path)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise FormatError(f"{path}: not a GGUF file that can be read: {error}") from None


def stored_type(path: Path) -> str:
    """The type of the matrices in a GGUF file that we wrote: one of TYPES.

    Raises:
        FormatError: the file is damaged, or has another type.
    """
    field = _reader(path).get_field("general.file_type")
    number = None if field is None else field.contents()
    names = {known: name for name, known in TYPES.items()}
    if number not in names:
        raise FormatError(f"{path}: the type of its matrices is none of {', '.join(TYPES)}")
    return names[number]


def stored_model(path: Path, source: Source) -> LanguageModel:
    """Our model with the weights in a GGUF file, in float32 and in eval mode.

    Raises:
        FormatError: the file is damaged or of another model.
    """
    config = source.model.config
    model = LanguageModel(config, source.model.vocab_size)
    expected = places(gguf_family(source), config, source.model.vocab_size)
    read_places(expected, stored_tensors(path, source), model)
    return model.eval()


def stored_tensors(path: Path, source: Source) -> Callable[[str], torch.Tensor]:
    """A function that reads a tensor of a GGUF file by its name in transformers, in float32 and in the layout there.

    Raises:
        FormatError: the file is damaged or of another model. The function raises it if the tensor is missing or has
            another shape.
    """
    package, config = gguf_package(), source.model.config
    family = gguf_family(source)
    table = gguf_places(package, family, source.model)
    by_theirs = {place.theirs: (name, place) for name, place in table.items()}
    tensors = {tensor.name: tensor for tensor in _reader(path).tensors}

    def get(theirs: str) -> torch.Tensor:
        name, place = by_theirs[theirs]
        if name not in tensors:
            raise FormatError(f"{path}: {name} is missing")
        tensor = torch.from_numpy(package.quants.dequantize(tensors[name].data, tensors[name].tensor_type).copy())
        heads = _heads(place, family, config)
        tensor = tensor if heads is None else half_split(tensor, heads)
        tensor = tensor.t() if place.layout == "transposed" else tensor
        if tuple(tensor.shape) != place.shape:
            raise FormatError(f"{path}: {name} has another shape than the model")
        return tensor

    return get


def differing_weight(source: Source, path: Path, kind: str) -> str | None:
    """The first weight of a GGUF file that is not that of the model, rounded to `kind`; None if all are.

    One tensor is read at a time.
    """
    get, weights = stored_tensors(path, source), source.model.state_dict()
    coarse = {"F32": 0.0, "F16": 2**-10, "Q8_0": 1 / 200}[kind]  # rounding error, relative to the largest number
    for place in places(gguf_family(source), source.model.config, source.model.vocab_size, filled=True):
        tensor = place.to_theirs(weights)
        difference = float((get(place.theirs) - tensor).abs().max())
        if not difference <= coarse * float(weights[place.ours].abs().max() if place.fill is None else 1.0):
            return place.theirs
    stored = {tensor.name: tensor.data for tensor in _reader(path).tensors}
    if source.model.config.tie_embeddings and (
        HEAD not in stored or not np.array_equal(stored["token_embd.weight"], stored[HEAD])
    ):
        return HEAD
    return None
