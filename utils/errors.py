"""Errors whose message is all that a user needs to see, and helpers that put values into messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

SHOWN = 200  # most characters of a value that a message shows
ALIASES = {  # short names in other programs, too short to be found by similarity
    "lr": "learning_rate",
    "bs": "batch_size",
    "steps": "max_iters",
    "wd": "weight_decay",
}


class UserError(ValueError):
    """A mistake that the user can correct; the message says what is wrong, where, and what was expected.

    The scripts print it, one line for each mistake, and exit with status 2.

    >>> try:
    ...     train(learning_rat=3e-3)
    ... except UserError as error:
    ...     print(error)
    unknown key learning_rat; did you mean learning_rate?
    """


class OutOfMemoryError(RuntimeError):
    """Memory is too small. The scripts print the message as one line and exit with status 1."""


class RankError(RuntimeError):
    """A failure of one rank, named in the message, that ended all of them; printed as one line, exit status 1.

    trace: the traceback of that rank, if it sent one.
    """

    def __init__(self, message: str, trace: str = "") -> None:
        super().__init__(message)
        self.trace = trace


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation has failed; torch raises a different RuntimeError for each kind of device."""
    words = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")
    named = type(error).__name__ == "OutOfMemoryError" or any(word in str(error) for word in words)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and named)


def first_line(error: BaseException) -> str:
    """The first line of the message of another package's exception, with its type if that is empty or only a key.

    >>> first_line(RuntimeError("no\\nbackend")), first_line(EOFError()), first_line(KeyError("rows"))
    ('no', 'EOFError', "KeyError: 'rows'")
    """
    lines = str(error).strip().splitlines()
    return lines[0] if lines and not isinstance(error, KeyError) else typed_line(error)


def typed_line(error: BaseException) -> str:
    """The type and the first line of the message of an exception, as at the end of a traceback.

    >>> typed_line(ValueError("no\\nbackend")), typed_line(EOFError())
    ('ValueError: no', 'EOFError')
    """
    lines, name = str(error).strip().splitlines(), type(error).__name__
    return f"{name}: {lines[0]}" if lines else name


def number_text(value: float) -> str:
    """A number in the fewest digits that read back as the same number.

    >>> [number_text(value) for value in (3e-4, 0.00123456789, 64.0)]
    ['0.0003', '0.00123456789', '64']
    """
    short = f"{value:g}"
    return short if float(short) == value else str(value)


def shown(value: object) -> str:
    """The repr of a value, to be quoted in a message; a long one is cut.

    >>> shown("x" * 1000)[197:]
    'xxx... (1,002 characters)'
    """
    try:
        text = repr(value)
    except ValueError:  # a number of thousands of digits
        text = "a number that is too long to show"
    return cut(text, SHOWN)


def cut(text: str, length: int) -> str:
    """`text`, cut after `length` characters if it is longer, with a note of its full length."""
    return text if len(text) <= length else f"{text[:length]}... ({len(text):,} characters)"


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint naming the closest valid spelling of `name`, or an empty string.

    >>> nearest("batch_sise", ["batch_size", "seed"])
    '; did you mean batch_size?'
    >>> nearest("--lr", ["--mlp", "--learning-rate"])
    '; did you mean --learning-rate?'
    """
    if len(name) > SHOWN:  # the comparison takes quadratic time
        return ""
    words = {word.lstrip("-").replace("-", "_"): word for word in valid}  # dashes of flags must not add similarity
    given = name.lstrip("-").replace("-", "_")
    if (alias := ALIASES.get(given)) in words:
        return f"; did you mean {words[alias]}?"
    matches = difflib.get_close_matches(given, list(words), n=1, cutoff=0.6)
    return f"; did you mean {words[matches[0]]}?" if matches else ""
