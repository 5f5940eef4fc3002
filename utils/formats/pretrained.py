"""A folder with a model of transformers, opened for reading: its architecture, its tokenizer and its weights.

The configuration and the names and shapes of all tensors are checked before any memory is allocated for the model.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model import LanguageModel, outline
from tokenizer import Tokenizer, TokenizerError, pretrained_tokenizer
from utils.config.settings import ModelConfig
from utils.formats.families import family_of
from utils.formats.foreign_config import ForeignConfig, our_config
from utils.formats.foreign_files import read_bounded, read_bounded_json
from utils.formats.shards import LOADABLE, Shards, check_regular
from utils.formats.table import Family, FormatError, Place, names_in_table, our_shapes, places, read_places
from utils.tokenization.subwords import LARGEST_VOCABULARY

CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer.json"
TOKENIZER_CONFIG, SPECIAL_TOKENS = "tokenizer_config.json", "special_tokens_map.json"
CHAT_TEMPLATE, CARD = "chat_template.jinja", "README.md"
HEAD = "lm_head.weight"  # in all families


@dataclass(frozen=True)
class Pretrained:
    """A model of transformers in a folder.

    config: the architecture in our settings, with the whole context as block_size.
    foreign: the content of config.json.
    unknown: keys of config.json that have no counterpart and are not used.
    their_names: names of tensors in the files, by their names in the table of the family.
    """

    folder: Path
    family: Family
    config: ModelConfig
    vocab_size: int
    foreign: Mapping[str, Any]
    unknown: list[str]
    shards: Shards
    their_names: Mapping[str, str]
    places: list[Place]

    def tokenizer(self) -> Tokenizer:
        """The model's own tokenizer, with as many ids as the embedding has rows.

        Raises:
            TokenizerError: there is no tokenizer.json, or it has more tokens than the embedding has rows.
        """
        path = self.folder / TOKENIZER
        if not path.exists():
            others = [
                name for name in ("vocab.json", "tokenizer.model", "spiece.model") if (self.folder / name).is_file()
            ]
            raise TokenizerError(
                f"{self.folder}: no {TOKENIZER}"
                + (f", only {others[0]}: AutoTokenizer.from_pretrained(...).save_pretrained(...) of transformers makes "
                   f"a {TOKENIZER} from it" if others else "")
            )  # fmt: skip
        check_regular(path)
        return pretrained_tokenizer(path, self.vocab_size)

    def get(self, name: str) -> torch.Tensor:
        """A tensor by its name in the table of the family."""
        return self.shards.get(self.their_names[name])

    def load(self, device: torch.device, dtype: torch.dtype, context: int | None = None) -> LanguageModel:
        """The model in eval mode; each tensor is copied straight from its file to the device, in precision `dtype`.

        Args:
            context: the block_size, if shorter than that of the model; None for the whole context.
        """
        config = self.with_context(context)
        model = outline(config, self.vocab_size)
        empty = {
            name: torch.empty(shape, dtype=dtype, device=device)
            for name, shape in our_shapes(config, self.vocab_size).items()
        }
        model.load_state_dict(empty, assign=True)
        del empty
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)
        read_places(self.places_for(config), self.get_cropped(config), model)
        return model.eval()

    def with_context(self, context: int | None) -> ModelConfig:
        """The architecture with a context of at most `context` tokens; of learned positions the first are kept."""
        if context is None or context >= self.config.block_size:
            return self.config
        return self.config.model_copy(update={"block_size": context})

    def places_for(self, config: ModelConfig) -> list[Place]:
        """`places` for an architecture with a shorter context."""
        return places(self.family, config, self.vocab_size)

    def get_cropped(self, config: ModelConfig) -> Callable[[str], torch.Tensor]:
        """A function like `get`, which returns only the first rows of learned positions if the context is shorter."""
        cropped = {place.theirs for place in self.places if place.ours == "position_embedding.weight"}

        def get(name: str) -> torch.Tensor:
            tensor = self.get(name)
            return tensor[: config.block_size] if name in cropped else tensor

        return get

    def weights(self, config: ModelConfig) -> Mapping[str, torch.Tensor]:
        """Our weights by name; each is read when it is accessed."""
        return _Weights(self, config)

    def sha256(self) -> str:
        """The SHA-256 of all files of weights, one after another in the order of their names."""
        digest = hashlib.sha256()
        for path in self.shards.files:
            with open(path, "rb") as file:
                while chunk := file.read(1 << 22):
                    digest.update(chunk)
        return digest.hexdigest()

    def facts(self) -> dict[str, Any]:
        """What a run that starts from the model records, so that its own export is complete."""
        found: dict[str, Any] = {"architecture": self.family.architecture, "config": dict(self.foreign)}
        found |= {"generation_config": self._object(GENERATION), "tokenizer_config": self._object(TOKENIZER_CONFIG)}
        for key, token in self._object(SPECIAL_TOKENS).items():
            text = token.get("content") if isinstance(token, dict) else token
            if key in ("bos_token", "eos_token", "unk_token", "pad_token") and isinstance(text, str):
                found["tokenizer_config"].setdefault(key, text)
        for key, name, read in (("chat_template", CHAT_TEMPLATE, str), ("license", CARD, licence_of)):
            path = self.folder / name
            if path.is_file() and (text := read(read_bounded(path).decode("utf-8", "replace"))):
                found[key] = text
        return found

    def _object(self, name: str) -> dict[str, Any]:
        """The object in a JSON file of the folder; empty if there is no such file."""
        path = self.folder / name
        return read_bounded_json(path) if path.is_file() else {}


class _Weights(Mapping[str, torch.Tensor]):
    """Our weights by name; each is read from the files when it is accessed."""

    def __init__(self, pretrained: Pretrained, config: ModelConfig) -> None:
        self._get = pretrained.get_cropped(config)
        self._places: dict[str, list[Place]] = {}
        for place in pretrained.places_for(config):
            self._places.setdefault(place.ours, []).append(place)

    def __getitem__(self, name: str) -> torch.Tensor:
        parts = [place.to_ours(self._get(place.theirs)) for place in self._places[name]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def open_pretrained(folder: Path) -> Pretrained:
    """Read the configuration of a model and the headers of its weights, and check that they agree.

    Raises:
        FormatError, ForeignConfigError: something is missing, damaged or cannot be represented.
    """
    path = folder / CONFIG
    if not folder.is_dir():
        raise FormatError(f"{folder}: no such folder")
    foreign = ForeignConfig(read_bounded_json(path), str(path))
    family = family_of(foreign)
    vocab_size = foreign.integer("vocab_size")
    if vocab_size > LARGEST_VOCABULARY:
        raise foreign.refuse("vocab_size", f"at most {LARGEST_VOCABULARY:,}")
    config = our_config(family.read(foreign), str(path))
    shards = Shards(folder)
    _check_size(config, vocab_size, shards, path)
    expected = places(family, config, vocab_size)
    their_names = {full: name for name, full in names_in_table(family, shards.tensors, expected).items()}
    check_shapes(expected, shards, their_names)
    if config.tie_embeddings:
        _check_tied(expected, shards, their_names)
    return Pretrained(
        folder, family, config, vocab_size, dict(foreign.values), foreign.unread(), shards, their_names, expected
    )


def licence_of(card: str) -> str | None:
    """The licence that the front matter of a model card names."""
    found = re.match(r"---\n(?:.*\n)*?license: *['\"]?([\w.-]{1,64})", card)
    return found[1] if found and "\n---" not in found[0] else None


def _check_size(config: ModelConfig, vocab_size: int, shards: Shards, path: Path) -> None:
    """Raises FormatError if the files are too small for the model that config.json describes.

    This comes first because even the shapes of a model with a thousand blocks take a while.
    """
    numbers = sum(torch.Size(stored.shape).numel() for stored in shards.tensors.values())
    width, attention = config.n_embd, config.n_head * config.head_width
    least = width * vocab_size + config.n_layer * width * (2 * attention + config.ffn_width)
    if config.position == "learned":
        least += config.block_size * width
    if least > numbers:
        raise FormatError(
            f"{path} describes a model of at least {least:,} parameters, but the files have {numbers:,} numbers"
        )


def _check_tied(expected: list[Place], shards: Shards, their_names: Mapping[str, str]) -> None:
    """Raises FormatError if there is a head that differs from the embedding, although config.json ties the two.

    In this case releases of transformers before 5 use the embedding, later ones the head.
    """
    if HEAD not in shards.tensors:
        return
    embedding = next(place.theirs for place in expected if place.ours == "token_embedding.weight")
    name = their_names[embedding]
    if shards.tensors[HEAD][1:] != shards.tensors[name][1:] or not torch.equal(shards.get(HEAD), shards.get(name)):
        raise FormatError(
            f"{shards.folder}: {HEAD} is not {name}, although tie_word_embeddings is true in config.json; set it to "
            "false to use this head"
        )


def check_shapes(expected: list[Place], shards: Shards, their_names: Mapping[str, str]) -> None:
    """Raises FormatError unless the files have each tensor, in the expected shape and a type that can be read."""
    differences = []
    for place in expected:
        if place.theirs not in their_names:
            differences.append(f"{place.theirs} is missing")
        elif (shape := shards.tensors[their_names[place.theirs]].shape) != place.shape:
            differences.append(f"{place.theirs} has shape {shape}, config.json says {place.shape}")
        elif (dtype := shards.tensors[their_names[place.theirs]].dtype) not in LOADABLE:
            differences.append(f"{place.theirs}: expected {', '.join(sorted(LOADABLE))}, got {dtype}")
    if differences:
        more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
        raise FormatError(f"{shards.folder}: {'; '.join(differences[:3])}{more}")
