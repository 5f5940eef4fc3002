"""The way of pieces from the thread of the engine to the requests that wait for them in the server's event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence

from starlette.types import Message

from utils.serving.batch import Batch, Delivery
from utils.serving.engine import Engine, QueueFullError
from utils.serving.sequence import Job, Piece
from utils.serving.served import Runs
from utils.web.errors import ApiError

MOST_UNREAD = 20_000  # pieces that a slow client may leave unread
TOO_SLOW = "the client reads too slowly"


class ClientGoneError(Exception):
    """The client has disconnected before the response."""


class Reader:
    """Receives the pieces of one request; job i generates text i."""

    def __init__(self, dispatcher: Dispatcher, model: str, jobs: Sequence[Job]) -> None:
        self._dispatcher, self._model, self.jobs = dispatcher, model, jobs
        self._places = {job: place for place, job in enumerate(jobs)}
        self._pieces: dict[int, list[Piece]] = {}
        self._unread = 0
        self._open = len(jobs)
        self._changed = asyncio.Event()

    def put(self, job: Job, piece: Piece) -> None:
        """Add a piece; after MOST_UNREAD unread ones, cancel the job instead, which makes `read` raise."""
        if self._unread >= MOST_UNREAD and not piece.is_last:
            if job.cancelled:
                return
            self._dispatcher.engine.cancel(self._model, [job])
            piece = Piece(error=TOO_SLOW)
        self._unread += 1
        self._pieces.setdefault(self._places[job], []).append(piece)
        self._changed.set()

    async def read(self) -> dict[int, Piece]:
        """Wait for new pieces; returns them merged, by text. Empty: all texts have ended.

        Raises:
            ApiError: one of the texts failed.
        """
        if not self._open:
            return {}
        await self._changed.wait()
        self._changed.clear()
        pieces, self._pieces, self._unread = self._pieces, {}, 0
        new = {place: merged(several) for place, several in pieces.items()}
        for piece in new.values():
            if piece.error is not None:
                raise ApiError(500, piece.error)
            self._open -= piece.is_last
        return new

    def close(self) -> None:
        """Free the slots of texts that have not ended."""
        self._dispatcher.forget(self._model, self.jobs, is_done=not self._open)


def merged(pieces: Sequence[Piece]) -> Piece:
    """Join consecutive pieces of a text."""
    if len(pieces) == 1:
        return pieces[0]
    return Piece(
        "".join(piece.text for piece in pieces),
        tuple(token for piece in pieces for token in piece.tokens),
        tuple(token for piece in pieces for token in piece.prompt),
        pieces[-1].finish,
        next((piece.error for piece in pieces if piece.error is not None), None),
    )


class Dispatcher:
    """Submits the jobs of requests to the engine, and hands its pieces to their readers."""

    def __init__(self, runs: Runs, slots: int, most_waiting: int) -> None:
        self._readers: dict[Job, Reader] = {}
        batches = {name: Batch(run.generator, slots) for name, run in runs.by_name.items()}
        self.engine = Engine(batches, most_waiting, self._hand_over)
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Start the engine, for requests in the running event loop."""
        self._loop = asyncio.get_running_loop()
        self.engine.start()

    def ask(self, model: str, jobs: Sequence[Job]) -> Reader:
        """Submit the jobs of a request; the caller closes the reader that this returns.

        Raises:
            ApiError: the queue is full, or could never hold so many jobs.
        """
        if len(jobs) > (most := self.engine.most_at_once(model)):
            message = f"{len(jobs):,} texts in one request: this server takes at most {most:,} at a time"
            raise ApiError(400, f"{message} (--slots and --queue)", code="too_many_texts")
        reader = Reader(self, model, jobs)
        self._readers |= dict.fromkeys(jobs, reader)
        try:
            self.engine.submit(model, jobs)
        except QueueFullError as full:
            self.forget(model, jobs, is_done=True)
            headers = {"Retry-After": str(full.retry_after)}
            raise ApiError(429, str(full), code="queue_full", headers=headers) from None
        return reader

    def forget(self, model: str, jobs: Sequence[Job], is_done: bool) -> None:
        """Drop the readers of jobs, and cancel those jobs unless all are done."""
        for job in jobs:
            self._readers.pop(job, None)
        if not is_done:
            self.engine.cancel(model, jobs)

    def _hand_over(self, delivered: Sequence[Delivery]) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # a second signal has closed the loop, so nobody waits any more
            self._loop.call_soon_threadsafe(self._dispatch, delivered)

    def _dispatch(self, delivered: Sequence[Delivery]) -> None:
        for job, piece in delivered:
            if reader := self._readers.get(job):
                reader.put(job, piece)


async def unless_gone(work: Awaitable[None], receive: Callable[[], Awaitable[Message]]) -> None:
    """Wait for `work` as long as the client stays connected.

    Raises:
        ClientGoneError: the client has disconnected; `work` is cancelled.
    """

    async def wait_for_end() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(wait_for_end())
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        await working
    finally:
        working.cancel()
        gone.cancel()
