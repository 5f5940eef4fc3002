"""SQL over the runs: a query reads the two views and nothing else."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fake_runs import indexed, make_run, training_records, write

from utils.errors import UserError
from utils.experiments.sql import RunDatabase, choose_runs
from utils.runs.index import read_index
from utils.runs.layout import CONFIG

SECRET = "TOPSECRET"
variable = [SECRET]  # DuckDB can read Python variables as tables


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file that no query may read."""
    return write(tmp_path / "secret.csv", f"a,b\n1,{SECRET}\n")


@pytest.fixture
def database(runs_dir: Path) -> RunDatabase:
    """Two runs, `one` and `two`."""
    make_run(
        runs_dir, "one", settings={"seed": 1}, summary={"best_val_loss": 2.0}, metrics=training_records([3.0, 2.0])
    )
    make_run(
        runs_dir, "two", settings={"seed": 2}, summary={"best_val_loss": 1.0}, metrics=training_records([3.0, 1.0])
    )
    (runs_dir / "bad").mkdir()
    return RunDatabase(read_index(runs_dir))


def rows_of(runs_dir: Path, query: str) -> list[tuple[Any, ...]]:
    """The answer to a query over the runs of this folder."""
    return RunDatabase(read_index(runs_dir)).select(query).rows


def test_a_list_is_a_list_in_sql(runs_dir: Path) -> None:
    settings = {"callbacks": ["a:A", "b:B"], "eval_at": [3, 5]}
    make_run(runs_dir, "one", notes={"tags": ["mine", "old"]}, settings=settings)
    make_run(runs_dir, "two", notes={"tags": ["not mine"]})
    (runs_dir / "bad").mkdir()
    runs = read_index(runs_dir)
    for condition in ("'mine' in tags", "list_contains(tags, 'old')", "'b:B' in callbacks", "5 in eval_at"):
        assert [run.id for run in choose_runs(runs, condition)] == ["one"], condition
    assert RunDatabase(runs).select("SELECT unnest(tags) FROM runs").rows == [("mine",), ("old",), ("not mine",)]


def metrics_of(runs_dir: Path, log: str | bytes, columns: str = "step", registry: Any = None) -> list[tuple[Any, ...]]:
    """The rows of `metrics` for a run with this log."""
    run = make_run(runs_dir, "run")
    write(run / "logs" / "metrics.jsonl", log)
    if registry is not None:
        write(run / "meta" / "metrics.json", registry)
    return rows_of(runs_dir, f"SELECT {columns} FROM metrics ORDER BY step")


def test_the_view_runs_has_a_row_for_each_run_with_typed_columns(database: RunDatabase) -> None:
    table = database.select(
        "SELECT id, status, start, seed, val_loss, dirty, steps, n_layer, tags FROM runs ORDER BY id"
    )
    assert table.columns == ["id", "status", "start", "seed", "val_loss", "dirty", "steps", "n_layer", "tags"]
    start = datetime(2026, 1, 31, 14, 25, 1)
    assert table.rows == [
        ("bad", "damaged", None, None, None, None, None, None, []),
        ("one", "completed", start, 1, 2.0, False, 100, 4, []),
        ("two", "completed", start, 2, 1.0, False, 100, 4, []),
    ]


def test_the_view_metrics_has_a_row_for_each_record(database: RunDatabase) -> None:
    rows = database.select("SELECT run, step, time, tokens, val_loss, train_loss FROM metrics ORDER BY run, step").rows
    assert rows == [
        ("one", 0, 1000.0, 0, 3.0, None),
        ("one", 10, 1010.0, 1000, 2.0, None),
        ("two", 0, 1000.0, 0, 3.0, None),
        ("two", 10, 1010.0, 1000, 1.0, None),
    ]


def test_runs_keep_their_order(database: RunDatabase, runs_dir: Path) -> None:
    assert database.select("SELECT id FROM runs").rows == [("bad",), ("one",), ("two",)]
    reverse = RunDatabase(read_index(runs_dir)[::-1])
    assert reverse.select("SELECT id FROM runs").rows == [("two",), ("one",), ("bad",)]


@pytest.mark.parametrize(
    "query",
    [
        "SELECT max(seed) FROM runs",
        "FROM runs SELECT max(seed)",
        "select MAX(r.seed) from RUNS r join metrics m on m.run = r.id -- a comment",
        "SELECT seed FROM main.runs ORDER BY seed DESC NULLS LAST LIMIT 1;",
        "WITH best AS (SELECT * FROM runs WHERE val_loss < 1.5) SELECT seed FROM best",
        "SELECT (SELECT max(seed) FROM runs)",
        "SELECT max(r.range) FROM range(3) r",
        "SELECT 2 UNION SELECT 2",
        "SELECT seed FROM runs WHERE id IN (SELECT run FROM metrics WHERE val_loss = 1)",
        "SELECT count(*) FILTER (tag IS NULL AND id != 'bad') FROM runs",
        "WITH RECURSIVE t(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM t WHERE n < 2) SELECT max(n) FROM t",
    ],
)
def test_any_select_over_the_views_is_answered(database: RunDatabase, query: str) -> None:
    assert database.select(query).rows == [(2,)]


def test_no_runs_give_no_rows() -> None:
    for view in ("runs", "metrics"):
        assert RunDatabase([]).select(f"SELECT * FROM {view}").rows == []


WRITES = [
    "DROP TABLE runs",
    "CREATE TABLE t AS SELECT 1",
    "INSERT INTO runs(id) VALUES ('x')",
    "DELETE FROM runs",
    "UPDATE runs SET id = 'x'",
    "MERGE INTO runs USING metrics ON true WHEN MATCHED THEN DELETE",
    "COPY runs TO '{folder}/out.csv'",
    "COPY (SELECT 1) TO '{folder}/out.csv'",
    "EXPORT DATABASE '{folder}/out'",
    "ATTACH '{folder}/out.db'",
    "ATTACH '{folder}/out.db' AS other",
    "PRAGMA database_list",
    "PRAGMA enable_profiling",
    "SET threads = 1",
    "RESET threads",
    "INSTALL httpfs",
    "LOAD httpfs",
    "USE memory",
    "CALL duckdb_tables()",
    "PREPARE x AS SELECT 1",
    "EXECUTE x",
    "VACUUM",
    "CHECKPOINT",
    "BEGIN",
    "EXPLAIN SELECT 1",
    "WITH x AS (COPY runs TO '{folder}/out.csv') SELECT * FROM x",
]
WRITES_IN_CTE = [
    "WITH x AS (DELETE FROM runs RETURNING id) SELECT * FROM x",
    "WITH x AS (UPDATE runs SET id = 'x' RETURNING id) SELECT * FROM x",
    "WITH x AS (INSERT INTO runs(id) VALUES ('x') RETURNING id) SELECT * FROM x",
]


@pytest.mark.parametrize("query", [*WRITES, *WRITES_IN_CTE])
def test_statements_that_write_are_refused(database: RunDatabase, tmp_path: Path, query: str) -> None:
    with pytest.raises(UserError):
        database.select(query.format(folder=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert database.select("SELECT count(*) FROM runs").rows == [(3,)]


@pytest.mark.parametrize(
    "query", ["", "  ", ";", "-- nothing", "/* nothing */", "SELECT 1; SELECT 2", "SELECT 1; DROP TABLE runs"]
)
def test_anything_but_one_statement_is_refused(database: RunDatabase, query: str) -> None:
    with pytest.raises(UserError, match="expected one SELECT"):
        database.select(query)


@pytest.mark.parametrize("query", ["SELECT * FRM runs", "SELECT nope FROM runs", "SELECT (", "SELECT $1", "SELECT 'a"])
def test_a_mistake_is_reported_in_one_line(database: RunDatabase, query: str) -> None:
    with pytest.raises(UserError) as caught:
        database.select(query)
    assert "\n" not in str(caught.value)


def test_a_query_that_is_not_utf_8_is_refused(database: RunDatabase) -> None:
    with pytest.raises(UserError):
        database.select("SELECT '\udcff'")


def test_an_unknown_view_is_reported_with_the_nearest(database: RunDatabase) -> None:
    with pytest.raises(UserError, match="there is no view rnus; did you mean runs"):
        database.select("SELECT * FROM rnus")


OUTSIDE = [
    "read_text('{file}')",
    "read_blob('{file}')",
    "read_csv('{file}')",
    "READ_CSV_AUTO('{file}')",
    "read_json('{log}')",
    "read_text('{log}')",
    "read_parquet('{file}')",
    "parquet_metadata('{file}')",
    "sniff_csv('{file}')",
    "main.read_text('{file}')",
    "glob('/etc/*')",
    "'{file}'",
    '"{file}"',
    "'{log}'",
    "duckdb_settings()",
    "duckdb_tables()",
    "duckdb_tables",
    "duckdb_secrets()",
    "pragma_table_info('runs')",
    "information_schema.tables",
    "system.information_schema.tables",
    "pg_catalog.pg_tables",
    "sqlite_master",
    "query('SELECT 1')",
    "query_table('runs')",
    "json_execute_serialized_sql('x')",
    "seq_scan('runs')",
    "variable",
    "sys",
    "os.environ",
    "information_schema.runs",
]
PLACES: dict[str, Callable[[str], str]] = {
    "directly": lambda source: f"SELECT * FROM {source}",
    "in a subquery": lambda source: f"SELECT (SELECT count(*) FROM {source})",
    "in a condition": lambda source: f"SELECT id FROM runs WHERE EXISTS (SELECT * FROM {source})",
    "in a table expression": lambda source: f"WITH runs AS (SELECT * FROM {source}) SELECT * FROM runs",
    "in a join": lambda source: f"SELECT * FROM runs, metrics CROSS JOIN {source}",
    "in a union": lambda source: f"SELECT 1 UNION ALL (SELECT count(*) FROM {source})",
    "in an order": lambda source: f"SELECT id FROM runs ORDER BY (SELECT count(*) FROM {source})",
    "described": lambda source: f"DESCRIBE SELECT * FROM {source}",
    "summarized": lambda source: f"SELECT * FROM (SUMMARIZE SELECT * FROM {source})",
}


@pytest.mark.parametrize("place", PLACES)
def test_reading_outside_the_views_is_refused(database: RunDatabase, secret: Path, runs_dir: Path, place: str) -> None:
    log = runs_dir / "one" / "logs" / "metrics.jsonl"
    for source in OUTSIDE:
        query = PLACES[place](source.format(file=secret, log=log))
        with pytest.raises(UserError) as caught:
            pytest.fail(f"{query} gave {database.select(query).rows}")
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "query",
    [
        'SELECT (WITH "{file}" AS (SELECT 1) SELECT 1), * FROM "{file}"',
        "WITH tables AS (SELECT 1) SELECT * FROM information_schema.tables",
        "WITH duckdb_tables AS (SELECT 1) SELECT * FROM main.duckdb_tables",
        'SELECT (WITH "{log}" AS (SELECT 1) SELECT 1), * FROM "{log}", (SELECT count(*) FROM metrics)',
    ],
)
def test_a_table_expression_gives_no_access_to_a_file_of_its_name(
    database: RunDatabase, secret: Path, runs_dir: Path, query: str
) -> None:
    with pytest.raises(UserError):
        database.select(query.format(file=secret, log=runs_dir / "one" / "logs" / "metrics.jsonl"))


def chosen(database: RunDatabase, where: str | None = None, order: str | None = None) -> list[str]:
    """The ids of the chosen runs."""
    return [run.id for run in database.choose(where, order)]


def test_copies_of_a_run_are_chosen_each_for_itself(tmp_path: Path) -> None:
    copies = [indexed(tmp_path / place, "run", summary={"best_val_loss": loss}) for place, loss in (("a", 2), ("b", 1))]
    assert choose_runs(copies, "val_loss > 1.5") == copies[:1]
    assert choose_runs(copies, order="val_loss") == copies[::-1]
    assert choose_runs(copies, "true") == copies
    mine = replace(copies[0], settings={"RowID": 7})  # the name of a column of DuckDB's own
    assert choose_runs([mine], "id = 'run'") == [mine]


def test_runs_are_chosen_by_condition_order_and_limit(database: RunDatabase) -> None:
    assert chosen(database) == ["bad", "one", "two"]
    assert chosen(database, "val_loss < 1.5") == ["two"]
    assert chosen(database, "val_loss < 1.5 OR seed = 1", "val_loss") == ["two", "one"]
    assert chosen(database, order="val_loss DESC") == ["one", "two", "bad"]
    assert chosen(database, order="status, seed desc")[:2] == ["two", "one"]
    assert chosen(database, order="val_loss")[:1] == ["two"]
    assert chosen(database, "id IN (SELECT run FROM metrics WHERE val_loss < 1.5)") == ["two"]
    assert chosen(database, "true -- all of them", "id") == ["bad", "one", "two"]
    assert chosen(database, "false") == []


@pytest.mark.parametrize(
    "where",
    [
        "seed = 2 AND val_loss < 1.5",
        'RUNS.Seed = 2 AND "VAL_LOSS" * 1 < 1.5',
        "runs::VARCHAR LIKE '%''seed'': 2,%'",
        "COLUMNS('^s..d$') = 2",
        '"o""dd" = 2',
    ],
)
def test_a_condition_may_name_columns_in_any_way(runs_dir: Path, where: str) -> None:
    for name, number in (("one", 1), ("two", 2)):
        run = make_run(runs_dir, name, settings={"seed": number}, summary={"best_val_loss": 3.0 - number})
        config = json.loads((run / CONFIG).read_text())
        config["train"]['o"dd'] = number
        write(run / CONFIG, config)
    database = RunDatabase(read_index(runs_dir))
    assert database.select(f"SELECT id FROM runs WHERE {where}").rows == [("two",)]
    assert chosen(database, where) == ["two"]


@pytest.mark.parametrize("order", ["coalesce(val_loss, 9) DESC, id", "round(val_loss, 2), id"])
def test_an_order_may_call_a_function(database: RunDatabase, order: str) -> None:
    assert len(chosen(database, order=order)) == 3


@pytest.mark.parametrize(
    "where",
    [
        "true) UNION SELECT content FROM read_text('{file}') --",
        "true) UNION SELECT b FROM '{file}' WHERE (true",
        "true) UNION SELECT tag FROM runs WHERE (true",
        "true); DROP TABLE runs; --",
        "true; DROP TABLE runs",
        "true /*",
        "true)) --",
        "id = (SELECT content FROM read_text('{file}'))",
        "EXISTS (FROM '{file}')",
        "EXISTS (FROM duckdb_settings())",
        "nope > 1",
        "(",
    ],
)
def test_sql_smuggled_into_a_condition_is_refused(database: RunDatabase, secret: Path, where: str) -> None:
    with pytest.raises(UserError):
        chosen(database, where.format(file=secret))


@pytest.mark.parametrize(
    "order",
    [
        "id; DROP TABLE runs",
        "id /*",
        "(SELECT content FROM read_text('{file}'))",
        "nope",
        "id -- ",
    ],
)
def test_sql_smuggled_into_an_order_is_refused_or_has_no_effect(
    database: RunDatabase, secret: Path, order: str
) -> None:
    try:
        found = chosen(database, order=order.format(file=secret))
    except UserError:
        return
    assert order.startswith("id --")
    assert found == ["bad", "one", "two"]


@pytest.mark.parametrize("name", ["it's", 'a"b', "a b", "üb", "$x", "a[b]c", "a?", "{a,b}", "a;b--"])
def test_runs_in_folders_with_odd_names_are_read(tmp_path: Path, name: str) -> None:
    make_run(tmp_path / name / "runs", name, metrics=training_records([2.0, 1.0]))
    make_run(tmp_path / name / "runs", "other", metrics=training_records([4.0]))
    rows = rows_of(tmp_path / name / "runs", "SELECT run, step FROM metrics ORDER BY val_loss")
    assert rows == [(name, 10), (name, 0), ("other", 0)]


def test_a_run_name_with_a_star_reads_no_other_run(runs_dir: Path) -> None:
    make_run(runs_dir, "st*r", metrics=training_records([2.0]))
    make_run(runs_dir, "star", metrics=training_records([1.0]))
    rows = rows_of(runs_dir, "SELECT run, val_loss FROM metrics ORDER BY run")
    assert rows == [("st*r", 2.0), ("star", 1.0)]


def test_runs_in_a_relative_or_linked_folder_are_read(runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(runs_dir, "run", metrics=training_records([2.0]))
    monkeypatch.chdir(runs_dir.parent)
    os.symlink(runs_dir, "link")
    for folder in (Path("runs"), Path("link")):
        assert rows_of(folder, "SELECT run, step FROM metrics") == [("run", 0)]


def test_nonfinite_numbers_are_doubles(runs_dir: Path) -> None:
    make_run(runs_dir, "run", metrics=training_records(["nan", "inf", "-inf", 1.0]))
    query = "SELECT val_loss, isnan(val_loss), isinf(val_loss) FROM metrics ORDER BY step"
    rows = rows_of(runs_dir, query)
    assert [row[1:] for row in rows] == [(True, False), (False, True), (False, True), (False, False)]
    assert math.isnan(rows[0][0])
    assert [row[0] for row in rows[1:]] == [math.inf, -math.inf, 1.0]


@pytest.mark.parametrize("losses", [{"best_val_loss": "inf"}, {"best_val_loss": "nan"}])
def test_nonfinite_losses_of_runs_are_doubles_too(runs_dir: Path, losses: dict[str, str]) -> None:
    make_run(runs_dir, "run", status="diverged", summary=losses)
    (row,) = rows_of(runs_dir, "SELECT isfinite(val_loss) FROM runs")
    assert row == (False,)


LINE = '{"step": 1, "time": 1.0, "tokens": 2, "val/loss": 3.0, "acc": 0.5}\n'


def test_a_torn_last_line_is_ignored(runs_dir: Path) -> None:
    assert metrics_of(runs_dir, LINE + '{"step": 2, "time": 1') == [(1,)]


def test_lines_that_are_not_records_are_ignored(runs_dir: Path) -> None:
    log = LINE.encode() + b'\xff\xfe\n\x00\n[1]\n3\nnull\n"text"\n{}\n{"step": "x"}\n' + LINE.replace("1", "7").encode()
    assert metrics_of(runs_dir, log, "step, val_loss") == [(1, 3.0), (7, 3.0)]


def test_an_empty_log_has_no_records(runs_dir: Path) -> None:
    assert metrics_of(runs_dir, b"") == []


def test_a_metric_of_a_callback_is_a_column(runs_dir: Path) -> None:
    registry = [{"name": "acc", "unit": "1", "direction": "higher", "views": []}, {"name": "val/my acc", "unit": "1"}]
    assert metrics_of(runs_dir, LINE, 'acc, val_loss, "val_my acc"', registry) == [(0.5, 3.0, None)]


@pytest.mark.parametrize(
    "name",
    [
        'a"b',
        "a'b",
        "x', y: 'DOUBLE",
        "run",
        "step",
        "val_loss",
        "filename",
        "Train/Loss",
        "Step",
        "",
    ],
)
def test_a_metric_with_an_odd_name_hides_no_other(runs_dir: Path, name: str) -> None:
    registry = [{"name": name, "unit": "1"}]
    assert metrics_of(runs_dir, LINE, "step, val_loss, train_loss", registry) == [(1, 3.0, None)]


@pytest.mark.parametrize("registry", ["", "{", b"\xff", [3], {"a": 1}, "null", [{"unit": "1"}], "[" * 100_000])
def test_a_damaged_registry_hides_nothing(runs_dir: Path, registry: Any) -> None:
    assert metrics_of(runs_dir, LINE, "step, val_loss", registry) == [(1, 3.0)]


def test_a_log_with_a_very_long_line_hides_no_other_run(runs_dir: Path) -> None:
    make_run(runs_dir, "good", metrics=training_records([1.0]))
    long = make_run(runs_dir, "long")
    write(long / "logs" / "metrics.jsonl", '{"step": 1, "text": "' + "x" * 17_000_000 + '"}\n')
    rows = rows_of(runs_dir, "SELECT step FROM metrics WHERE run = 'good'")
    assert rows == [(0,)]


def test_a_value_of_the_wrong_type_is_null_only_in_its_row(runs_dir: Path) -> None:
    make_run(runs_dir, "a", start="yesterday", git={"dirty": "perhaps"})
    make_run(runs_dir, "b")
    rows = rows_of(runs_dir, "SELECT id, start IS NULL, dirty FROM runs ORDER BY id")
    assert rows == [("a", True, None), ("b", False, False)]


@pytest.mark.parametrize("zone", ["UTC", "Asia/Tokyo", "America/Los_Angeles"])
def test_now_and_start_have_the_same_time_zone(runs_dir: Path, monkeypatch: pytest.MonkeyPatch, zone: str) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        now = datetime.now(UTC)
        for name, age in (("new", 60), ("old", 3600)):
            start = (now - timedelta(seconds=age)).isoformat()
            make_run(runs_dir, name, start=start)
        found = RunDatabase(read_index(runs_dir))
        assert chosen(found, "start > now() - INTERVAL 5 MINUTE") == ["new"]
        assert chosen(found, "start > now() - INTERVAL 2 HOUR", "id") == ["new", "old"]
    finally:
        monkeypatch.undo()
        time.tzset()
