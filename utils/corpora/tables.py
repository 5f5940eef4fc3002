"""The text column of Parquet files, and of the Arrow files that the package datasets writes."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from utils.corpora.blocks import named
from utils.corpora.json_lines import RecordError, fields_text
from utils.corpora.sources import CorpusError
from utils.terminal.words import one_line

BATCH_BYTES = 1 << 22  # bytes of a table that are decoded at a time
PIECE = 1 << 20  # bytes of a long cell that are copied at a time
LONG_CELL_BYTES = 1 << 24  # a longer cell is read in pieces
MAGIC = b"ARROW1"  # starts an Arrow file with an index of its batches; other files are streams of batches

Report = Callable[[int], None]  # called with the number of bytes read since the last call
Cell = str | Iterator[bytes] | RecordError


def row_groups(path: Path, field: str) -> list[tuple[int, int]]:
    """For each row group of a Parquet file, the bytes of the column `field` and the number of rows.

    Raises:
        CorpusError: the file cannot be read, or has no such column of text.
    """
    with _reading(path):
        file = _parquet(path)
        _check(path, file.schema_arrow, field)
        column = file.schema_arrow.names.index(field)
        groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
        flat = file.metadata.num_columns == len(file.schema_arrow.names)
        return [
            (group.column(column).total_compressed_size if flat else group.total_byte_size, group.num_rows)
            for group in groups
        ]


def check_arrow(path: Path, field: str) -> None:
    """Raises CorpusError unless an Arrow file can be read and has a text column `field`."""
    with _reading(path):
        _check(path, _arrow(path).schema, field)


def parquet_cells(
    path: Path, field: str, first: int, last: int | None, report: Callable[[int], None]
) -> Iterator[Cell]:
    """The text of each row in the row groups from `first` up to, not including, `last`."""
    with _reading(path):
        file = _parquet(path)
        for number in range(first, file.num_row_groups if last is None else last):
            group = file.metadata.row_group(number)
            rows = max(1, min(4096, BATCH_BYTES * group.num_rows // max(group.total_byte_size, 1)))
            for batch in file.iter_batches(rows, row_groups=[number], columns=[field], use_threads=False):
                yield from _cells(batch.column(0))
            report(sum(group.column(i).total_compressed_size for i in range(group.num_columns)))


def arrow_cells(path: Path, field: str, report: Report) -> Iterator[Cell]:
    """The text of each row of an Arrow file."""
    with _reading(path):
        reader = _arrow(path)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if _indexed(path) else reader
        for batch in batches:
            yield from _cells(batch.column(batch.schema.names.index(field)))
            report(batch.nbytes)


def _cells(column: Any) -> Iterator[Cell]:
    for cell in column.dictionary_decode() if hasattr(column, "dictionary") else column:
        if not cell.is_valid:
            yield RecordError("null, expected a text")
        elif (buffer := cell.as_buffer()).size > LONG_CELL_BYTES:
            yield _parts(buffer)
        else:
            yield _text(buffer)


def _text(buffer: Any) -> Cell:
    data = buffer.to_pybytes()
    try:
        return data.decode()
    except UnicodeDecodeError:
        return iter([data])  # reported like any other bytes that are not text


def _parts(buffer: Any) -> Iterator[bytes]:
    view = memoryview(buffer)
    return (bytes(view[place : place + PIECE]) for place in range(0, len(view), PIECE))


def _check(path: Path, schema: Any, field: str) -> None:
    """Raises CorpusError unless the table has a text column `field`."""
    pyarrow = _package("pyarrow", path)
    if field not in schema.names:
        words = str(fields_text(schema.names, field)).replace("it has", "its columns are", 1)
        raise CorpusError(f"{named(path)}: no column {field!r}: {words} (--field NAME)")
    kind = schema.field(field).type
    of_values = kind.value_type if pyarrow.types.is_dictionary(kind) else kind  # dictionary-encoded text
    if of_values not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
        raise CorpusError(f"{named(path)}: column {field!r} is {kind}, expected text (string)")


def _parquet(path: Path) -> Any:
    return _package("pyarrow.parquet", path).ParquetFile(path, memory_map=True, pre_buffer=False)


def _arrow(path: Path) -> Any:
    ipc, file = _package("pyarrow.ipc", path), _package("pyarrow", path).memory_map(str(path))
    return ipc.open_file(file) if _indexed(path) else ipc.open_stream(file)


def _indexed(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _package(name: str, path: Path) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise CorpusError(f"{named(path)}: {path.suffix} needs the package pyarrow: pip install pyarrow") from None


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn the exceptions of pyarrow into a CorpusError."""
    try:
        yield
    except OSError as error:  # also raised by pyarrow for damaged data
        raise CorpusError(f"{named(path)}: cannot be read: {one_line(error.strerror or str(error))}") from None
    except (ValueError, LookupError) as error:
        if isinstance(error, CorpusError):
            raise
        raise CorpusError(f"{named(path)}: damaged: {one_line(str(error))}") from None
