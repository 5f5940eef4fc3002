"""SQL over runs and their logs, by DuckDB: a query can read two views, and nothing else.

runs      one row for each run: the columns FACTS of utils/runs/index.py, then every setting
metrics   one row for each record of metrics.jsonl: run, step, time, and every metric, `train/loss` as train_loss
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.config.section import is_unicode
from utils.errors import UserError, nearest
from utils.files import is_regular, read_json
from utils.runs.duration import seconds_of
from utils.runs.index import FACTS, IndexedRun
from utils.runs.layout import METRIC_REGISTRY, METRICS_LOG
from utils.runs.metrics import registered_metrics

if TYPE_CHECKING:
    import duckdb

SQL_VIEWS = ("runs", "metrics")
TABLE_FUNCTIONS = ("unnest", "range", "generate_series")  # others read files or describe the database itself
READING = ("SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE")  # the nodes of a query that reads
EXPRESSION_NAME = re.compile(r"(?!duckdb_|pg_|sqlite_|pragma_)[a-z_][a-z0-9_]*")
MEMORY_LIMIT = "1GB"
ROW = "rowid"  # the pseudo-column of DuckDB: the number of a row, in the order of the runs
FILE_COLUMN = "__file"  # not the name of a metric
COORDINATES = {"step": "BIGINT", "time": "DOUBLE", "tokens": "BIGINT"}


class SqlError(UserError):
    """The query is not valid SQL, or not allowed."""


@dataclass(frozen=True)
class QueryResult:
    """The rows that a query returned.

    problems: messages about logs that DuckDB cannot read; their records are missing.
    """

    columns: list[str]
    rows: list[tuple[Any, ...]]
    problems: tuple[str, ...] = ()


class RunDatabase:
    """Runs and their logs as SQL views.

    Args:
        runs: the rows of the view `runs`, in this order; `metrics` has the logs of those that can be read.
        seconds: the time limit of a query; None: no limit.
    """

    def __init__(self, runs: Sequence[IndexedRun], seconds: float | None = None) -> None:
        self._runs, self._seconds = runs, seconds
        self._keys = dict.fromkeys(key for run in runs for key in run.settings if key.lower() not in ("", ROW))
        self._columns = list(dict.fromkeys([*FACTS, *map(str.lower, self._keys)]))  # DuckDB ignores case

    def select(self, query: str) -> QueryResult:
        """Run one SELECT over the views.

        Raises:
            SqlError: the query is not valid SQL, is more than one statement, writes, reads more than the views, or
                takes too long.
        """
        return self._select(query, READING, self._columns)

    def _select(self, query: str, allowed: Sequence[str], used: Collection[str]) -> QueryResult:
        """Like `select`, for a query whose outermost node is in `allowed` and that uses no columns but `used`."""
        import duckdb

        if not is_unicode(query):
            raise SqlError("the query is not valid Unicode")

        logs = []
        if "metrics" in query.lower():
            every = {run.path / METRICS_LOG: run.path for run in self._runs if run.readable}
            logs = [log for log, run in every.items() if is_regular(log, run)]
        try:
            return self._answer(query, allowed, used, logs)
        except SqlError as error:
            if not isinstance(error.__context__, duckdb.InvalidInputException | duckdb.IOException):
                raise  # the query itself is wrong
            bad = [log for log in logs if not self._can_be_read(log)]  # a bad log must not hide the others
            if not bad:
                raise
        problems = tuple(f"{log}: the log is damaged: DuckDB cannot read it" for log in bad)
        return replace(self._answer(query, allowed, used, [log for log in logs if log not in bad]), problems=problems)

    def _can_be_read(self, log: Path) -> bool:
        try:
            self._answer("SELECT count(run) FROM metrics", READING, (), [log])
        except SqlError:
            return False
        return True

    def _answer(self, query: str, allowed: Sequence[str], used: Collection[str], logs: Sequence[Path]) -> QueryResult:
        import duckdb

        with (
            _user_errors(),
            duckdb.connect(":memory:", config={"memory_limit": MEMORY_LIMIT}) as connection,
            _limit(connection, self._seconds),
        ):
            statements = connection.extract_statements(query)
            if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
                raise SqlError("expected one SELECT: the views runs and metrics can be read, nothing can be written")
            if _check_sources(query, connection) not in allowed:
                raise SqlError("expected a condition and an order, no further SELECT")
            self._create_views(connection, used, logs)
            result = connection.execute(statements[0])
            names = [str(column[0]) for column in result.description or ()]
            unique = [
                f"{name}_{names[:i].count(name) + 1}" if name in names[:i] else name for i, name in enumerate(names)
            ]
            return QueryResult(unique, result.fetchall())

    def _create_views(self, connection: duckdb.DuckDBPyConnection, used: Collection[str], logs: Sequence[Path]) -> None:
        """Create both views, then forbid the connection everything else on this machine.

        Args:
            used: the columns of `runs` that get their values; the others are NULL.
        """
        settings = {key for key in self._keys if key.lower() in used}
        rows = [{key.lower(): value for key, value in run.row(settings).items()} for run in self._runs]
        kinds = {
            name: FACTS.get(name) or _type(row.get(name) for row in rows) for name in self._columns if name in used
        }
        columns = [f"unnest(?::{kind}[]) AS {_quoted(name)}" for name, kind in kinds.items()]
        columns += [f"NULL AS {_quoted(name)}" for name in self._columns if name not in used]
        values = [[_sql_value(row.get(name), kind) for row in rows] for name, kind in kinds.items()]
        connection.execute(f"CREATE TABLE runs AS SELECT {', '.join(columns)}", values)
        connection.execute(_metrics_view(logs))
        connection.execute("SET default_null_order = 'nulls_last'")
        connection.execute("SET TimeZone = 'UTC'")  # `start` is in UTC, so now() must be too
        connection.execute("SET python_enable_replacements = false")
        names = [name for path in logs for name in {os.fspath(path), escaped(os.fspath(path))}]
        connection.execute(f"SET allowed_paths = {_literal(names)}")
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")

    def choose(self, where: str | None = None, order: str | None = None) -> list[IndexedRun]:
        """The runs that fulfil the SQL condition `where`, sorted by `order` (NULL values last) or as given.

        Raises:
            SqlError: as for `select`.
        """
        clauses = [f"WHERE ({where}\n)" if where else "", f"ORDER BY {order or ROW}\n"]
        query = " ".join([f"SELECT {ROW} FROM runs", *clauses])  # copies of a run have the same id
        words = f"{where or ''} {order or ''}".lower()
        return [self._runs[row[0]] for row in self._select(query, ["SELECT_NODE"], self._used(words)).rows]

    def _used(self, words: str) -> Collection[str]:
        """The columns that a condition or order (in lower case) may use: those whose names it contains, or all.

        With a thousand runs, converting all 150 columns takes half a second.
        """
        if re.search(r"\*|\bcolumns\b|\bruns\b", words):  # may use columns without naming them
            return self._columns
        return ["id", *(name for name in self._columns if name in words or not name.isidentifier())]


def choose_runs(
    runs: Sequence[IndexedRun],
    where: str | None = None,
    order: str | None = None,
    seconds: float | None = None,
) -> list[IndexedRun]:
    """The runs that fulfil the SQL condition `where`, sorted by `order` or, without one, in the given order.

    Raises:
        SqlError: `where` or `order` is not valid SQL over the columns of a run, or takes longer than `seconds`.
    """
    return RunDatabase(runs, seconds).choose(where, order) if where or order else list(runs)


def _check_sources(query: str, connection: duckdb.DuckDBPyConnection) -> str:
    """Check what a query reads, and return the type of its outermost node.

    Raises:
        SqlError: the query writes, or reads anything but the views and its own common table expressions.
    """
    serialized = connection.execute("SELECT json_serialize_sql(?::VARCHAR)", [query]).fetchone()
    assert serialized is not None
    parsed = json.loads(serialized[0])
    if parsed["error"]:
        raise SqlError(str(parsed["error_message"]))
    nodes = list(_nodes(parsed))
    if any(node.get("type", "").endswith("_NODE") and node["type"] not in READING for node in nodes):
        raise SqlError("nothing can be written: expected a SELECT in each table expression")
    named = {str(entry["key"]).lower() for node in nodes for entry in (node.get("cte_map") or {}).get("map", ())}
    for name in named:
        if not EXPRESSION_NAME.fullmatch(name):
            raise SqlError(
                f"{name!r}: the name of a table expression has letters, digits and _, and is not that of a system table"
            )
    for node in nodes:
        if node.get("type") == "BASE_TABLE":
            name, schema = str(node.get("table_name")), str(node.get("schema_name") or "")
            known = (name.lower() in SQL_VIEWS and schema in ("", "main")) or (name.lower() in named and not schema)
            if node.get("catalog_name") or not known:
                raise SqlError(f"there is no view {name}{nearest(name, SQL_VIEWS)}; expected {' or '.join(SQL_VIEWS)}")
        if node.get("type") == "TABLE_FUNCTION":
            function = str(node.get("function", {}).get("function_name"))
            if function.lower() not in TABLE_FUNCTIONS:
                raise SqlError(f"{function}() is not allowed: only the views {' and '.join(SQL_VIEWS)} can be read")
    return str(parsed["statements"][0]["node"]["type"])


def _nodes(parsed: Any) -> Iterator[Mapping[str, Any]]:
    """Yield all objects of a parsed query, at every depth."""
    if isinstance(parsed, Mapping):
        yield parsed
    for value in parsed.values() if isinstance(parsed, Mapping) else parsed if isinstance(parsed, list) else ():
        yield from _nodes(value)


@contextlib.contextmanager
def _limit(connection: duckdb.DuckDBPyConnection, seconds: float | None) -> Iterator[None]:
    """Interrupt the queries of a connection after `seconds`, and raise SqlError."""
    import duckdb

    if seconds is None:
        yield
        return
    timer = threading.Timer(seconds, connection.interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    except duckdb.InterruptException:
        raise SqlError(f"given up after {seconds:g} seconds") from None
    finally:
        timer.cancel()


@contextlib.contextmanager
def _user_errors() -> Iterator[None]:
    """Turn errors of DuckDB into SqlErrors with the first lines of their message."""
    import duckdb

    try:
        yield
    except duckdb.Error as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        kept = [line for line in lines if not line.startswith(("LINE ", "^"))]
        raise SqlError("; ".join(kept[:2])) from None
    except RuntimeError as error:
        if "interrupted" in str(error):  # Ctrl-C
            raise KeyboardInterrupt from None
        raise


def _metrics_view(logs: Sequence[Path]) -> str:
    """The statement that creates the view of all records; it skips lines that were cut off or are not JSON."""
    types = {**COORDINATES, **dict.fromkeys(_metric_names(logs), "DOUBLE")}
    columns = {name: _quoted(name.replace("/", "_")) for name in types}
    if not logs:
        nothing = ", ".join(f"NULL::{types[name]} AS {column}" for name, column in columns.items())
        return f"CREATE VIEW metrics AS SELECT NULL::VARCHAR AS run, {nothing} WHERE false"
    selected = ", ".join(f"{_quoted(name)} AS {column}" for name, column in columns.items())
    structure = "{" + ", ".join(f"{_literal(name)}: '{kind}'" for name, kind in types.items()) + "}"
    files = _literal([escaped(os.fspath(path)) for path in logs])
    source = (
        f"read_json({files}, format = 'newline_delimited', columns = {structure}, filename = '{FILE_COLUMN}', "
        "ignore_errors = true)"
    )
    run = f"parse_path({FILE_COLUMN})[-3] AS run"
    return f"CREATE VIEW metrics AS SELECT {run}, {selected} FROM {source} WHERE step IS NOT NULL"


def escaped(path: str) -> str:
    """`path` with its wildcards escaped for DuckDB."""
    return re.sub(r"[*?\[]", lambda found: f"[{found.group()}]", path)


def _metric_names(logs: Sequence[Path]) -> list[str]:
    """The names of the metrics of this workbench, and of those that callbacks have registered in the runs."""
    names = dict.fromkeys(registered_metrics())
    for log in logs:
        try:
            registry = read_json(log.parent.parent / METRIC_REGISTRY, log.parent.parent)
            names |= dict.fromkeys(str(entry["name"]) for entry in registry)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue  # an old or damaged run: the metrics of its callbacks are left out
    taken = {FILE_COLUMN, "run", "", *COORDINATES}  # DuckDB ignores case
    kept = []
    for name in filter(is_unicode, names):
        if (column := name.replace("/", "_").lower()) not in taken:
            taken |= {column, name.lower()}
            kept.append(name)
    return kept


def _literal(value: str | Sequence[str]) -> str:
    """A string, or a list of strings, as an SQL literal."""
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return "[" + ", ".join(map(_literal, value)) + "]"


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _type(values: Iterator[Any]) -> str:
    """The SQL type that holds all values of a setting."""
    given = [value for value in values if value is not None]
    kinds = {type(value) for value in given}
    if kinds == {list}:
        return f"{_type(item for value in given for item in value)}[]"
    if kinds <= {bool} and kinds:
        return "BOOLEAN"
    if kinds <= {int} and kinds:
        return "BIGINT" if all(abs(value) < 2**63 for value in given) else "VARCHAR"
    return "DOUBLE" if kinds <= {int, float} and kinds else "VARCHAR"


def _sql_value(value: Any, kind: str) -> Any:
    """Convert `value` for a column of this SQL type; invalid Unicode is escaped, and an invalid TIMESTAMP is None."""
    if kind.endswith("[]") and value is not None:
        return [_sql_value(item, kind.removesuffix("[]")) for item in value]
    if value is None or kind not in ("VARCHAR", "TIMESTAMP"):
        return value
    if kind == "TIMESTAMP":
        seconds = seconds_of(value)
        return None if seconds is None else datetime.fromtimestamp(seconds, UTC).replace(tzinfo=None)
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text.encode("utf-8", "backslashreplace").decode()
