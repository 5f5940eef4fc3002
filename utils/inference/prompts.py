"""The inputs and outputs of generation: prompt files, stop strings, banned tokens and completion files."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizer import Tokenizer, TokenizerError
from utils.errors import UserError
from utils.files import open_named, output_target, write_output
from utils.inference.generator import Completion
from utils.terminal.words import json_text


@dataclass(frozen=True)
class FilePrompt:
    """A prompt from a file.

    place: FILE:LINE, for messages.
    record: the whole JSON object of its line; for a text file {"prompt": ...}.
    """

    place: str
    text: str
    record: Mapping[str, Any] = field(repr=False)


def read_prompts(path: Path) -> list[FilePrompt]:
    """Read one prompt a line, or from a .jsonl file one object a line, {"prompt": "...", ...}. Skips empty lines.

    Raises:
        UserError: the file is missing, not UTF-8, not JSON, or has no prompt.
    """
    prompts, is_json = [], path.suffix.lower() == ".jsonl"
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        place, text = f"{path}:{number}", line.removesuffix("\r")
        if is_json and text.strip():
            record = _record(text, place)
            prompts.append(FilePrompt(place, record["prompt"], record))
        elif not is_json and text:
            prompts.append(FilePrompt(place, text, {"prompt": text}))
    if not prompts:
        raise UserError(f"{path}: no prompts found, expected one a line")
    return prompts


def read_text(path: Path) -> str:
    """The text of a file, without a byte order mark.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    try:
        with open_named(path) as file:
            return file.read().removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        before = error.object[: error.start]
        number, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        byte = f"byte {column} of the line is 0x{error.object[error.start]:02x}"
        raise UserError(f"{path}:{number}: not UTF-8 text ({byte})") from None


def _record(text: str, place: str) -> dict[str, Any]:
    try:
        record = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise UserError(f'{place}: not JSON ({reason}), expected {{"prompt": "...", ...}}') from None
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise UserError(f'{place}: expected an object with a text "prompt", got {text.strip()[:40]}')
    return record


def _no_number(name: str) -> None:
    """Refuse NaN and Infinity, which Python reads although they are not JSON."""
    raise ValueError(f"{name} is not a number")


def check_out(path: Path, source: Path | None = None) -> None:
    """Raises UserError unless a file can be written at `path`; called before hours of work.

    Args:
        source: a file that is read and must not be overwritten.
    """
    try:
        if (target := output_target(path)) is None:  # a device or a pipe
            return
        if source is not None and target.exists() and target.samefile(source):
            raise UserError(f"{path}: cannot be written: the prompts are read from it")
        tempfile.TemporaryFile(dir=target.parent).close()
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def completion_line(prompt: FilePrompt, completion: Completion) -> str:
    """The record of the prompt, extended by its completion, as one line of JSON.

    tokens: the number of generated tokens, including those of a stop string.
    logprob: the sum of their log-probabilities, in nats, before any filter.
    """
    record = {
        **prompt.record,
        "completion": completion.text,
        "tokens": len(completion.tokens),
        "logprob": sum(completion.logprobs),
        "finish": completion.finish,
        "seed": completion.seed,
    }
    return json_text(record)


def write_out(path: Path, text: str) -> None:
    """Write `text` into the file at `path` (see `write_output`); if that fails, an older file is kept.

    Raises:
        UserError: it cannot be written.
    """
    try:
        write_output(path, text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None


ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


def unescape(text: str) -> str:
    r"""Replace \n, \t, \r and \\ as Python does, because a line break is hard to type in a shell."""
    return re.sub(r"\\([ntr\\])", lambda match: ESCAPES[match[1]], text)


def stop_strings(tokenizer: Tokenizer, texts: Sequence[str]) -> tuple[str, ...]:
    """Make stop strings from texts that may contain escapes.

    Raises:
        UserError: a text is empty or has a part without a token.
    """
    stops = tuple(unescape(text) for text in texts)
    for stop in stops:
        _encode(tokenizer, stop, "stop")
    return stops


def banned_tokens(tokenizer: Tokenizer, texts: Sequence[str], before: Sequence[int] = ()) -> tuple[int, ...]:
    """The ids in `before` and those of all tokens of `texts`, which may contain escapes.

    Raises:
        UserError: a text is empty or has a part without a token, or no token is left to draw.
    """
    banned = sorted({*before, *(token for text in texts for token in _encode(tokenizer, unescape(text), "ban"))})
    if len(banned) == tokenizer.vocab_size:
        raise UserError(f"ban: all {len(banned)} tokens of the vocabulary are banned, at least one must be left")
    return tuple(banned)


def _encode(tokenizer: Tokenizer, text: str, name: str) -> list[int]:
    if not text:
        raise UserError(f"{name}: expected text, got an empty string")
    try:
        return tokenizer.encode(text)
    except TokenizerError as error:
        raise UserError(f"{name} {text!r}: {error}") from None
