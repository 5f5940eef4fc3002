"""The files of subword vocabularies: tokenizer.json, and the files of GPT-2."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.files import read_bytes, read_named
from utils.tokenization.protocol import TokenizerError

MODELS = ("BPE", "Unigram", "WordLevel", "WordPiece")  # those of the package tokenizers
END_OF_TEXT = "<|endoftext|>"
END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")  # end-of-text in published vocabularies
GPT2_MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
GPT2_MERGE_FILES = ("vocab.bpe", "merges.txt")  # OpenAI's and Hugging Face's names of the same file
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
GPT2_VOCABULARY_FILES = ("encoder.json", "vocab.json")
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # in a vocabulary with byte fallback


def optional_package(name: str, kind: str) -> Any:
    """Import an optional package that tokenizers of this kind need.

    Raises:
        TokenizerError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise TokenizerError(f"tokenizer {kind} needs the package {name}: pip install {name}") from None


def read_specification(path: Path) -> str:
    """The content of a tokenizer.json, as JSON without spaces. A tokenizer.json of a run yields the one inside it.

    Args:
        path: the file, or the folder that contains it.

    Raises:
        TokenizerError: the file is missing or damaged, or its model is unknown.
    """
    if path.is_dir():
        path = path / "tokenizer.json"
    try:
        value = json.loads(read_named(path))  # in the cache of the Hugging Face hub, it is a link
        if isinstance(value, dict) and isinstance(value.get("tokenizer"), str):
            value = json.loads(value["tokenizer"])
    except FileNotFoundError:
        raise TokenizerError(f"{path}: no such file; expected a tokenizer.json") from None
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: not a tokenizer.json: damaged JSON ({error})") from None
    try:
        return checked_specification(value)
    except ValueError as error:
        raise TokenizerError(f"{path}: {error}") from None


def checked_specification(value: Any) -> str:
    """A tokenizer.json as JSON without spaces, with truncation, padding and dropout turned off.

    Raises:
        ValueError: `value` is not a tokenizer.json, or its model is unknown.
    """
    model = value.get("model") if isinstance(value, dict) else None
    if not isinstance(model, dict) or ("vocab" not in model and model.get("type") in (None, *MODELS)):
        raise ValueError("not a tokenizer.json: it has no model with a vocabulary")
    if (kind := model.get("type", "BPE")) not in MODELS:
        raise ValueError(f"a tokenizer.json of an unknown model {kind!r}: expected {', '.join(MODELS)}")
    value = {**value, "truncation": None, "padding": None}
    if model.get("dropout") is not None:
        value["model"] = {**model, "dropout": None}
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def special_tokens(tokens: Mapping[str, int]) -> dict[str, int]:
    """The ids of special tokens by role: `end_of_text` for the first of END_NAMES, the token itself for all others."""
    end = next((name for name in END_NAMES if name in tokens), None)
    return {"end_of_text" if token == end else token: place for token, place in tokens.items()}


def gpt2_merges(folders: Sequence[Path]) -> str:
    """The merges of GPT-2 (the content of vocab.bpe), from the first folder that has them.

    Raises:
        TokenizerError: no folder has them, or a file is damaged or belongs to another model.
    """
    for folder in folders:
        for name in (*GPT2_MERGE_FILES, "tokenizer.json"):
            if (path := folder / name).is_file():
                merges = _merges_of_json(path) if path.suffix == ".json" else _read_text(path)
                _check_vocabulary(folder)
                try:
                    return checked_merges(merges)
                except ValueError as error:
                    raise TokenizerError(f"{path}: {error}") from None
    raise TokenizerError(
        f"tokenizer gpt2: its vocabulary was not found: put vocab.bpe and encoder.json ({GPT2_URL}), or the "
        f"tokenizer.json of GPT-2, into {folders[-1]} or into gpt2/ of the folder that WORKBENCH_DATA names"
    )


def checked_merges(merges: str) -> str:
    """`merges` with the original's line ends.

    Raises:
        ValueError: they are not those of GPT-2.
    """
    merges = "\n".join(merges.splitlines()) + "\n"
    digest = hashlib.sha256(merges.encode()).hexdigest()
    if digest != GPT2_MERGES_SHA256:
        raise ValueError(f"not the merges of GPT-2: sha256 {digest[:12]}..., not {GPT2_MERGES_SHA256[:12]}...")
    return merges


def _read_text(path: Path) -> str:
    try:
        return read_bytes(path).decode()
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8'}") from None


def _merges_of_json(path: Path) -> str:
    model = json.loads(read_specification(path))["model"]
    pairs = (pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges") or [])
    return "\n".join(["#version: 0.2", *pairs])


def _check_vocabulary(folder: Path) -> None:
    """Raises TokenizerError if a vocabulary file beside the merges does not have GPT-2's number of tokens."""
    for path in (folder / name for name in GPT2_VOCABULARY_FILES):
        if path.is_file():
            try:
                size = len(json.loads(_read_text(path)))
            except (ValueError, TypeError, RecursionError):
                size = 0
            if size != 50257:
                raise TokenizerError(f"{path}: damaged, or not the vocabulary of GPT-2: {size:,} tokens, not 50,257")


def gpt2_ranks(merges: str) -> dict[bytes, int]:
    """The bytes of each token of GPT-2 -> its id: first the 256 bytes, then the merges in order."""
    byte_of = byte_level_alphabet()
    ranks = {bytes([byte]): rank for rank, byte in enumerate(byte_of.values())}
    for line in merges.splitlines()[1:]:
        ranks[bytes(byte_of[character] for character in line.replace(" ", ""))] = len(ranks)
    return ranks


def byte_level_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level vocabularies -> the byte, in GPT-2's id order.

    A printable character of Latin-1 stands for itself; the other bytes use the characters from U+0100 on.
    """
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


def token_pieces(tokenizer: Any, specification: Mapping[str, Any], size: int) -> list[bytes]:
    """The bytes that each token adds in the middle of a text, by id; empty for an id without a token.

    Args:
        tokenizer: a Tokenizer of the package tokenizers.
        specification: its tokenizer.json.
        size: the vocabulary size.
    """
    decoder = specification.get("decoder") or {}
    kinds = {part.get("type") for part in decoder.get("decoders") or [decoder]}
    added = {token["id"]: token["content"].encode() for token in specification.get("added_tokens") or []}
    if "ByteLevel" in kinds:
        return [added.get(place) or _byte_level(tokenizer.id_to_token(place) or "") for place in range(size)]
    # Other decoders may treat the first token of a text differently, so decode each token after another one.
    first = next((place for place in range(size) if place not in added and tokenizer.decode([place, place])), 0)
    before = tokenizer.decode([first], skip_special_tokens=False)
    pieces = []
    for place in range(size):
        token = tokenizer.id_to_token(place)
        if token is None or place in added:
            pieces.append(added.get(place, b""))
        elif "ByteFallback" in kinds and (found := BYTE_TOKEN.fullmatch(token)):
            pieces.append(bytes([int(found[1], 16)]))
        else:
            pieces.append(tokenizer.decode([first, place], skip_special_tokens=False)[len(before) :].encode())
    return pieces


_BYTES = byte_level_alphabet()


def _byte_level(token: str) -> bytes:
    """The bytes of a token of a byte-level vocabulary."""
    if all(character in _BYTES for character in token):
        return bytes(_BYTES[character] for character in token)
    return token.encode()


def surrogate_error(text: str) -> TokenizerError | None:
    """The error for a text with half a surrogate pair, which UTF-8 cannot encode; None if the text has none."""
    if not (found := re.search("[\ud800-\udfff]", text)):
        return None
    error = TokenizerError(f"character {found[0]!r} at position {found.start()} is half a surrogate pair: not text")
    error.position = found.start()
    return error


def sample(texts: Iterable[str], characters: int, pieces: int = 64) -> list[str]:
    """The texts; if they have more than `characters`, about `pieces` evenly spaced parts with that many in all."""
    texts = list(texts)
    total = sum(map(len, texts))
    if total <= characters:
        return texts
    parts = []
    for text in texts:
        count = max(1, round(pieces * len(text) / total))
        length = characters * len(text) // total // count
        parts += [text[place : place + length] for place in (i * len(text) // count for i in range(count))]
    return parts
