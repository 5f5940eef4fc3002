"""The server of `experiments.py ui`: only the pages of runs."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from fastapi import FastAPI
from fastapi.responses import RedirectResponse

from utils.pages.routes import PREFIX, router
from utils.terminal.words import printable
from utils.web.app import create_app, exposure, run_server
from utils.web.guard import is_loopback


def pages_app(runs_dir: Path, *, edit: bool = False, loopback: bool = True) -> FastAPI:
    """Create an app with the pages of the runs in a folder; / redirects to them."""
    app = create_app("Runs", loopback=loopback)
    app.include_router(router(runs_dir, edit))

    @app.get("/", include_in_schema=False)
    def start() -> RedirectResponse:
        return RedirectResponse(PREFIX)

    return app


def serve_pages(runs_dir: Path, host: str, port: int, *, edit: bool = False) -> NoReturn:
    """Serve the pages until a signal.

    Raises:
        UserError: the address is not available.
        StopSignal: at the end, with the signal that ended the server.
    """
    if warning := exposure(host):
        print(printable(warning), flush=True)
    run_server(pages_app(runs_dir, edit=edit, loopback=is_loopback(host)), host, port)
