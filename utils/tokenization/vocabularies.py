"""The files of subword vocabularies: any tokenizer.json, and those of GPT-2."""

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

MODELS = ("BPE", "Unigram", "WordLevel", "WordPiece")  # what the package tokenizers has
END_OF_TEXT = "<|endoftext|>"
END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>")  # the same role in published vocabularies
GPT2_MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
GPT2_MERGE_FILES = ("vocab.bpe", "merges.txt")  # names of the same file: OpenAI's, Hugging Face's
GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/vocab.bpe"
GPT2_VOCABULARY_FILES = ("encoder.json", "vocab.json")
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # of a vocabulary with byte fallback


def optional_package(name: str, kind: str) -> Any:
    """An optional package.

    Raises:
        TokenizerError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise TokenizerError(f"tokenizer {kind} needs the package {name}: pip install {name}") from None


def read_specification(path: Path) -> str:
    """The content of a tokenizer.json (or of the folder that has it), as JSON without spaces.

    A tokenizer.json that this workbench wrote counts as the vocabulary in it.

    Raises:
        TokenizerError: missing, damaged, or of an unknown model.
    """
    if path.is_dir():
        path = path / "tokenizer.json"
    try:
        value = json.loads(read_named(path))  # in the cache of a hub it is a link
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
    """A tokenizer.json, as JSON without spaces and without what would change a long text: truncation, padding, dropout.

    Raises:
        ValueError: it is none, or of an unknown model.
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
    """The ids of special tokens by role: `end_of_text` for the first of END_NAMES, any other by its text."""
    end = next((name for name in END_NAMES if name in tokens), None)
    return {"end_of_text" if token == end else token: place for token, place in tokens.items()}


def gpt2_merges(folders: Sequence[Path]) -> str:
    """The merges of GPT-2, the content of vocab.bpe, from the first folder that has them.

    Raises:
        TokenizerError: there are none, or a file is damaged or of another model.
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
        f"tokenizer gpt2: its vocabulary is not there: put vocab.bpe and encoder.json ({GPT2_URL}), or the "
        f"tokenizer.json of GPT-2, into {folders[-1]} or into gpt2/ of the folder that WORKBENCH_DATA names"
    )


def checked_merges(merges: str) -> str:
    """`merges` with the line ends of the original.

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
    """Raises TokenizerError if the vocabulary beside the merges, which follows from them, is another one."""
    for path in (folder / name for name in GPT2_VOCABULARY_FILES):
        if path.is_file():
            try:
                size = len(json.loads(_read_text(path)))
            except (ValueError, TypeError, RecursionError):
                size = 0
            if size != 50257:
                raise TokenizerError(f"{path}: damaged, or not the vocabulary of GPT-2: {size:,} tokens, not 50,257")


def gpt2_ranks(merges: str) -> dict[bytes, int]:
    """The bytes of each token of GPT-2 and its id: the 256 bytes, then the merges in their order."""
    byte_of = byte_level_alphabet()
    ranks = {bytes([byte]): rank for rank, byte in enumerate(byte_of.values())}
    for line in merges.splitlines()[1:]:
        ranks[bytes(byte_of[character] for character in line.replace(" ", ""))] = len(ranks)
    return ranks


def byte_level_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level vocabularies, in the order of their ids in GPT-2.

    A printable character of Latin-1 stands for itself, the other bytes have the characters from U+0100 on.
    """
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


def token_pieces(tokenizer: Any, specification: Mapping[str, Any], size: int) -> list[bytes]:
    """The bytes that each token adds in the middle of a text, by id; empty for an id without a token.

    Args:
        tokenizer: of the package tokenizers.
        specification: its tokenizer.json.
        size: of the vocabulary.
    """
    decoder = specification.get("decoder") or {}
    kinds = {part.get("type") for part in decoder.get("decoders") or [decoder]}
    added = {token["id"]: token["content"].encode() for token in specification.get("added_tokens") or []}
    if "ByteLevel" in kinds:
        return [added.get(place) or _byte_level(tokenizer.id_to_token(place) or "") for place in range(size)]
    # Any other decoder may treat the first token of a text in another way: here each follows another token.
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
    """The error for a text with half a surrogate pair, which has no UTF-8; None without one."""
    if not (found := re.search("[\ud800-\udfff]", text)):
        return None
    error = TokenizerError(f"character {found[0]!r} at position {found.start()} is half a surrogate pair: not text")
    error.position = found.start()
    return error


def sample(texts: Iterable[str], characters: int, pieces: int = 64) -> list[str]:
    """All of the texts; of long ones, `pieces` parts of equal length at equal distances, `characters` in all."""
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
