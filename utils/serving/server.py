"""The app of serve.py: the API, the playground at /, and the pages of runs at /runs."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

from utils.pages.routes import OPEN_PATHS, router
from utils.serving.openai import add_routes
from utils.serving.readers import Dispatcher
from utils.serving.served import Runs
from utils.terminal import html
from utils.web.app import create_app

STATIC = Path(__file__).with_name("static")
PAGE_STYLE = Path(html.__file__).with_name("page.css")  # shared with the reports


def serving_app(
    runs: Runs,
    slots: int,
    most_waiting: int,
    runs_dir: Path,
    *,
    edit: bool = False,
    api_key: str | None = None,
    loopback: bool = True,
) -> FastAPI:
    """Create the app. Its engine runs from the start of the app to its end.

    Args:
        slots: texts of a run that are generated at once.
        most_waiting: texts of a run that may wait for a slot; more are refused.
        runs_dir, edit: see `router`.
        api_key, loopback: see `create_app`.
    """
    app = create_app("lm-workbench", api_key=api_key, loopback=loopback, open_paths=OPEN_PATHS)
    dispatcher = Dispatcher(runs, slots, most_waiting)
    app.router.lifespan_context = _lifespan(dispatcher)
    add_routes(app, runs, dispatcher)
    app.include_router(router(runs_dir, edit, playground=True))

    @app.get("/static/page.css", include_in_schema=False)
    async def style() -> FileResponse:
        return FileResponse(PAGE_STYLE)

    app.mount("/static/playground", StaticFiles(directory=STATIC), name="playground")

    @app.get("/", include_in_schema=False)
    async def playground() -> FileResponse:
        return FileResponse(STATIC / "index.html")

    return app


def _lifespan(dispatcher: Dispatcher) -> Callable[[FastAPI], contextlib.AbstractAsyncContextManager[None]]:
    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        dispatcher.start()
        try:
            yield
        finally:
            dispatcher.engine.close()

    return lifespan
