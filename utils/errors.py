"""The one error type for mistakes that a user can mend: printed as one line, exit status 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

SHOWN = 200  # characters of a value in a message
ALIASES = {  # short names that other programs have: too short for their letters to tell
    "lr": "learning_rate",
    "bs": "batch_size",
    "steps": "max_iters",
    "wd": "weight_decay",
}


class UserError(ValueError):
    """What is wrong, where, and what was expected, in words for the person at the terminal; a line for each mistake.

    >>> try:
    ...     train(learning_rat=3e-3)
    ... except UserError as error:
    ...     print(error)
    unknown key learning_rat; did you mean learning_rate?
    """


class OutOfMemoryError(RuntimeError):
    """Memory is too small, in words for the person at the terminal: printed as one line, exit status 1."""


class RankError(RuntimeError):
    """What ended the ranks of a run, with the rank that did it: printed as one line, exit status 1.

    trace: the traceback of that rank, if it left one.
    """

    def __init__(self, message: str, trace: str = "") -> None:
        super().__init__(message)
        self.trace = trace


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation has failed; torch raises a RuntimeError of its own for each kind of device."""
    words = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
    named = type(error).__name__ == "OutOfMemoryError" or any(word in str(error) for word in words)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and named)


def first_line(error: BaseException) -> str:
    """What an exception of another package says, in one line; its type where it says nothing or only a key.

    >>> first_line(RuntimeError("no\\nbackend")), first_line(EOFError()), first_line(KeyError("rows"))
    ('no', 'EOFError', "KeyError: 'rows'")
    """
    lines = str(error).strip().splitlines()
    return lines[0] if lines and not isinstance(error, KeyError) else typed_line(error)


def typed_line(error: BaseException) -> str:
    """The type of an exception and the first line of what it says, as at the end of a traceback.

    >>> typed_line(ValueError("no\\nbackend")), typed_line(EOFError())
    ('ValueError: no', 'EOFError')
    """
    lines, name = str(error).strip().splitlines(), type(error).__name__
    return f"{name}: {lines[0]}" if lines else name


def number_text(value: float) -> str:
    """A number in as few digits as tell it from all others: read again, it is the same.

    >>> [number_text(value) for value in (3e-4, 0.00123456789, 64.0)]
    ['0.0003', '0.00123456789', '64']
    """
    short = f"{value:g}"
    return short if float(short) == value else str(value)


def shown(value: object) -> str:
    """A value as a message quotes it: as Python writes it, and the beginning of a long one.

    >>> shown("x" * 1000)[197:]
    'xxx... (1,002 characters)'
    """
    try:
        text = repr(value)
    except ValueError:  # a number of thousands of digits
        text = "a number that is too long to show"
    return cut(text, SHOWN)


def cut(text: str, length: int) -> str:
    """The beginning of a text that is longer than `length` characters."""
    return text if len(text) <= length else f"{text[:length]}... ({len(text):,} characters)"


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint naming the closest valid spelling of `name`, or an empty string.

    >>> nearest("batch_sise", ["batch_size", "seed"])
    '; did you mean batch_size?'
    >>> nearest("--lr", ["--mlp", "--learning-rate"])
    '; did you mean --learning-rate?'
    """
    if len(name) > SHOWN:  # comparing takes the square of its length
        return ""
    words = {word.lstrip("-").replace("-", "_"): word for word in valid}  # the dashes of flags are no likeness
    given = name.lstrip("-").replace("-", "_")
    if (alias := ALIASES.get(given)) in words:
        return f"; did you mean {words[alias]}?"
    matches = difflib.get_close_matches(given, list(words), n=1, cutoff=0.6)
    return f"; did you mean {words[matches[0]]}?" if matches else ""
