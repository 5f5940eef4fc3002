"""The pages of runs and their data: everything under /runs.

A request names runs and files by keys (`keys.py`) that are looked up among the contents of the folder: no path is made
from a request. All answers are JSON, which our scripts show as text; the pages themselves are files without data.
"""

from __future__ import annotations

import importlib
import json
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import orjson
from fastapi import APIRouter, Header, Query
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from utils.errors import UserError
from utils.experiments.curve import Axis
from utils.pages.comparison import compare_runs
from utils.pages.curves import ChartRequest, chart
from utils.pages.run_files import chunks, list_files, open_file
from utils.pages.run_page import describe, histograms, logged_names, samples
from utils.pages.series import SeriesStore
from utils.pages.table import RunRows
from utils.runs.index import IndexedRun
from utils.terminal import html
from utils.terminal.cli import PROJECT_ROOT
from utils.terminal.words import one_line
from utils.web.errors import ApiError

PREFIX = "/runs"
STATIC = Path(__file__).parent / "static"
PAGES = {"": "table.html", "/run": "run.html", "/compare": "compare.html"}
STYLE = Path(html.__file__).with_name("page.css")  # shared with the reports
ASSETS = {"base.css": STYLE, **{path.name: path for path in sorted(STATIC.glob("*")) if path.suffix in (".js", ".css")}}
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}
OPEN_PATHS = (*(PREFIX + page for page in PAGES), *(f"{PREFIX}/static/{name}" for name in ASSETS))  # these hold no data
EDIT_HEADER = "X-Workbench-Edit"  # no form can send it, and no page of another origin without a CORS preflight
MOST_RUNS = 200  # of a chart or a comparison
MOST_TEXT = 4000  # characters of a condition or a name
WHERE_SECONDS = 10.0  # for evaluating a condition of the table

Keys = Annotated[list[str], Query(alias="run", max_length=MOST_RUNS, description="keys of runs")]
Key = Annotated[str, Query(alias="run", max_length=MOST_TEXT, description="the key of a run")]
Name = Annotated[str, Query(max_length=MOST_TEXT)]
Number = Annotated[float | None, Query(allow_inf_nan=False)]


class Edit(BaseModel):
    """Changes to the notes of a run; None leaves a value as it is."""

    model_config = ConfigDict(extra="forbid")

    run: str = Field(max_length=MOST_TEXT)
    tag: str | None = Field(None, max_length=200)
    note: str | None = Field(None, max_length=100_000)
    add_tags: list[Annotated[str, Field(min_length=1, max_length=200)]] = Field([], max_length=100)
    remove_tags: list[Annotated[str, Field(max_length=200)]] = Field([], max_length=100)
    pinned: bool | None = None


def router(runs_dir: Path, edit: bool = False, playground: bool = False) -> APIRouter:
    """Make the routes of the pages of the runs in a folder, for an app made by `create_app`.

    Args:
        edit: whether the pages can change tags and notes.
        playground: whether the app has a playground at /, to which the table links.
    """
    table, store = RunRows(runs_dir), SeriesStore()
    threading.Thread(target=importlib.import_module, args=("duckdb",), daemon=True).start()  # the first chart needs it
    routes = APIRouter(prefix=PREFIX, tags=["runs"])
    _add_pages(routes)
    _add_table(routes, table, edit, playground)
    _add_curves(routes, table, store)
    _add_run(routes, table)
    if edit:
        _add_edit(routes, table)
    return routes


def _add_pages(routes: APIRouter) -> None:
    for page, name in PAGES.items():
        routes.add_api_route(page, partial(_asset, STATIC / name), include_in_schema=False)

    @routes.get("/static/{name}", include_in_schema=False)
    def static(name: str) -> Response:
        if name not in ASSETS:
            raise ApiError(404, f"there is no file {one_line(name)!r}")
        return _asset(ASSETS[name])


def _add_table(routes: APIRouter, table: RunRows, edit: bool, playground: bool) -> None:
    @routes.get("/api/runs", summary="The table of runs, or the rows that have changed since a version")
    def runs(since: Annotated[str | None, Query(max_length=100)] = None) -> Response:
        return _json({**table.changes(since), "edit": edit, "playground": playground})

    @routes.get("/api/choose", summary="The keys of the runs that match a condition in SQL")
    def choose(where: Name) -> Response:
        from utils.experiments.sql import choose_runs
        from utils.pages.keys import key_of

        return _json([key_of(run.id) for run in choose_runs(table.runs(), where, seconds=WHERE_SECONDS)])

    @routes.get("/api/compare", summary="The verdict on several runs, and their differences")
    def compare(run: Keys, metric: Name | None = None) -> Response:
        runs = _named(table, run)
        if len({one.path for one in runs}) < 2:
            raise UserError("a comparison needs two different runs")
        return _json(compare_runs(runs, metric, PROJECT_ROOT))


def _add_curves(routes: APIRouter, table: RunRows, store: SeriesStore) -> None:
    @routes.get("/api/metrics", summary="The metrics that any of these runs has logged")
    def metrics(run: Keys) -> Response:
        names = dict.fromkeys(name for one in _named(table, run) for name in logged_names(one))
        return _json([{"name": name, "shown": one_line(name)} for name in names])

    @routes.get("/api/curves", summary="Curves of a metric, or the points that were added since a cursor")
    def curves(
        run: Keys,
        metric: Name,
        x: Axis = "step",
        smooth: Annotated[float, Query(ge=0, lt=1)] = 0.0,
        group: Name | None = None,
        log_x: bool = False,
        points: Annotated[int, Query(ge=10, le=10_000)] = 1000,
        start: Number = None,
        end: Number = None,
        known: Annotated[list[str] | None, Query(max_length=MOST_RUNS)] = None,
    ) -> Response:
        """known: CURSOR:KEY of each curve, or of each group, that the page already has."""
        pairs = (text.partition(":") for text in known or ())
        has = {key: cursor for cursor, _, key in pairs}
        request = ChartRequest(metric, x, smooth, group or None, log_x, points, start, end, has)
        return _json(chart(_named(table, run), store, request))


def _add_run(routes: APIRouter, table: RunRows) -> None:
    @routes.get("/api/run", summary="The facts about a run")
    def run(run: Key) -> Response:
        return _json(describe(_named(table, [run])[0], table.runs()))

    @routes.get("/api/samples", summary="The newest sample texts of a run")
    def of_samples(run: Key) -> Response:
        return _json(samples(_named(table, [run])[0]))

    @routes.get("/api/histograms", summary="Histograms of a tensor over time")
    def of_histograms(run: Key, name: Name | None = None) -> Response:
        found = histograms(_named(table, [run])[0], name)
        return _json({**found, "shown": [one_line(one) for one in found["names"]]})

    @routes.get("/api/files", summary="The files of a run")
    def files(run: Key) -> Response:
        found = list_files(_named(table, [run])[0].path)
        return _json([{"name": file.name, "key": file.key, "bytes": file.bytes} for file in found])

    @routes.get("/api/file", summary="One file of a run", response_class=StreamingResponse)
    def file(run: Key, file: Name) -> StreamingResponse:
        opened = open_file(_named(table, [run])[0].path, file)
        if opened is None:
            raise ApiError(404, f"the run has no file {one_line(file)!r}")
        facts, content = opened
        name = quote(facts.path.name.encode("utf-8", "surrogateescape"))
        headers = {"Content-Disposition": f"attachment; filename*=UTF-8''{name}", "Cache-Control": "no-store"}
        return StreamingResponse(chunks(content), media_type="application/octet-stream", headers=headers)


def _add_edit(routes: APIRouter, table: RunRows) -> None:
    @routes.post("/api/edit", summary="Change the tag, note, tags or pin of a run")
    def change(body: Edit, header: Annotated[str, Header(alias=EDIT_HEADER)] = "") -> Response:
        from utils.experiments.notes import edit

        if header != "1":  # `Guard` has checked that the request comes from one of our pages or from a program
            raise ApiError(403, f"refused: a change needs the header {EDIT_HEADER}: 1")
        run = _named(table, [body.run])[0]
        tags = {"add_tags": tuple(body.add_tags), "remove_tags": tuple(body.remove_tags)}
        try:
            notes = edit(run.path, tag=body.tag, note=body.note, pinned=body.pinned, **tags)
        except OSError as error:
            raise ApiError(500, f"{error.filename}: {error.strerror}") from None
        table.forget(body.run)
        return _json({key: notes[key] for key in ("tag", "tags", "note", "pinned")})


def _named(table: RunRows, keys: Sequence[str]) -> list[IndexedRun]:
    """The runs with these keys, each once.

    Raises:
        ApiError: there is no such run.
    """
    found = []
    for key in dict.fromkeys(keys):
        run = table.run(key)
        if run is None:
            raise ApiError(404, f"there is no run {one_line(key)[:200]!r}", param="run")
        found.append(run)
    return found


def _json(value: Any) -> Response:
    """A response with a value as JSON; names of files may contain bytes that are not text."""
    try:
        content = orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS)
    except TypeError:
        content = json.dumps(value).encode()
    return Response(content, media_type="application/json", headers={"Cache-Control": "no-store"})


def _asset(path: Path) -> Response:
    """A response with one of our own files."""
    return Response(path.read_bytes(), media_type=TYPES[path.suffix], headers={"Cache-Control": "no-cache"})
