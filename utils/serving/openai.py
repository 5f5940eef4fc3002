"""The routes of the API: /v1/models, /v1/completions, /v1/chat/completions, /health and /metrics."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from tokenizer import TokenizerError
from utils.inference.decode import start_tokens
from utils.inference.sampling import SamplingOptions
from utils.serving.answers import Answer, ChatAnswer, Echo, usage
from utils.serving.metrics import CONTENT_TYPE, metrics_text
from utils.serving.readers import ClientGoneError, Dispatcher, Reader, merged, unless_gone
from utils.serving.schemas import (
    MOST_PROMPTS,
    MOST_TOKENS,
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    Health,
    Model,
    ModelList,
    Sampling,
)
from utils.serving.sequence import Job, Piece
from utils.serving.served import Runs, Served
from utils.web.errors import ApiError, ErrorBody, error_detail

DONE = b"data: [DONE]\n\n"
BUSY: dict[int | str, dict[str, Any]] = {
    429: {"model": ErrorBody, "description": "too many texts are waiting; Retry-After says when to try again"},
    500: {"model": ErrorBody, "description": "the model failed, for instance because its training diverged"},
    503: {"model": ErrorBody, "description": "the server is shutting down"},
}


def add_routes(app: FastAPI, runs: Runs, dispatcher: Dispatcher) -> None:
    """Add the routes of the API to the app."""

    @app.get("/v1/models")
    async def models() -> ModelList:
        """The runs that are served."""
        return ModelList(object="list", data=[run.described() for run in runs.by_name.values()])

    @app.get("/v1/models/{name:path}", responses={404: {"model": ErrorBody, "description": "no such run"}})
    async def model(name: str) -> Model:
        """One run."""
        return find(runs, name).described()

    @app.post("/v1/completions", response_model=Completion, responses=BUSY)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Texts that continue prompts."""
        run = find(runs, body.model)
        asked = await run_in_threadpool(completion_jobs, body, run)
        return await respond(dispatcher, run, asked, body, request)

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses=BUSY)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answers in a conversation, by a run that has a template for conversations."""
        run = find(runs, body.model)
        asked = await run_in_threadpool(chat_jobs, body, run)
        return await respond(dispatcher, run, asked, body, request)

    @app.get("/health", responses={503: {"model": Health, "description": "the server is shutting down"}})
    async def health(response: Response) -> Health:
        """Whether requests are served, and how many texts are running and waiting."""
        queues = {
            name: {"slots": queue.batch.slots, "running": len(queue.batch), "waiting": len(queue.waiting)}
            for name, queue in dispatcher.engine.queues.items()
        }
        if app.state.running.draining or not dispatcher.engine.is_alive:
            response.status_code = 503
            return Health(status="draining" if dispatcher.engine.is_alive else "failed", models=queues)
        return Health(status="ok", models=queues)

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(metrics_text(dispatcher.engine), media_type=CONTENT_TYPE)


@dataclass(frozen=True)
class Asked:
    """The jobs of a request, and how to answer it.

    prompts: the number of tokens in each prompt.
    """

    jobs: Sequence[Job]
    answer: Answer
    prompts: Sequence[int]


def find(runs: Runs, name: str) -> Served:
    """The run that a request names.

    Raises:
        ApiError: no such run (status 404).
    """
    run = runs.find(name)
    if run is None:
        raise ApiError(404, runs.missing(name), param="model", code="model_not_found")
    return run


def completion_jobs(body: CompletionRequest, run: Served) -> Asked:
    """The jobs of a request to /v1/completions.

    Raises:
        ApiError, UserError: the request cannot be served.
    """
    tokenizer, prompts = run.generator.tokenizer, body.prompts
    count = body.max_tokens if body.max_tokens is not None else run.generator.settings.max_new_tokens
    scores = bool(body.echo) and body.logprobs is not None
    first = _job(body, run, [0], count, body.logprobs or 0, scores, len(prompts))
    jobs: list[Job] = []
    echoes, lengths = [], []
    for place, prompt in enumerate(prompts):
        where = f"prompt.{place}" if isinstance(body.prompt, list) and len(prompts) > 1 else "prompt"
        try:
            ids = _prompt_ids(prompt, run)
        except (TokenizerError, UnicodeError) as error:
            raise ApiError(400, f"{where}: {error}", param="prompt") from None
        text = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
        skip = len(ids) - (len(prompt) if not isinstance(prompt, str) else len(tokenizer.encode(prompt)))
        if scores and len(ids) > run.context:
            message = f"{where}: {len(ids):,} tokens; with echo and logprobs at most the context of {run.context:,}"
            raise ApiError(400, message, param="prompt", code="context_length_exceeded")
        lengths.append(len(ids) - skip)
        for _ in range(body.n or 1):
            jobs.append(replace(first, prompt=ids, seed=first.seed + len(jobs), ends=run.generator.ends))
            echoes.append(Echo(text, skip))
    return Asked(jobs, Answer(run.name, tokenizer, body.logprobs, echoes if body.echo else None), lengths)


def _prompt_ids(prompt: str | Sequence[int], run: Served) -> list[int]:
    """The tokens that a text continues, at least one.

    Raises:
        TokenizerError, UnicodeError: part of the prompt has no token.
        ApiError: a token id is outside the vocabulary.
    """
    tokenizer = run.generator.tokenizer
    if isinstance(prompt, str):
        prompt.encode()
        return start_tokens(tokenizer, prompt, run.begin)
    if wrong := [token for token in prompt if token >= tokenizer.vocab_size]:
        message = f"prompt: no token {wrong[0]}: {run.name} has tokens 0 to {tokenizer.vocab_size - 1:,}"
        raise ApiError(400, message, param="prompt")
    return list(prompt) or start_tokens(tokenizer, "", run.begin)


def chat_jobs(body: ChatRequest, run: Served) -> Asked:
    """The jobs of a request to /v1/chat/completions.

    Raises:
        ApiError, UserError: the request cannot be served.
    """
    if run.template is None:
        message = (
            f"{run.name} has no chat or Q&A template: use /v1/completions, or give it one with serve.py --qa-template"
        )
        raise ApiError(400, message, param="model", code="no_chat_template")
    try:
        for turn in body.messages:
            turn.content.encode()
        prompt = run.template(body.messages)
    except (TokenizerError, UnicodeError) as error:
        raise ApiError(400, f"messages: {error}", param="messages") from None
    count = body.max_completion_tokens or body.max_tokens or run.generator.settings.max_new_tokens
    begin = [] if run.begin is None else [run.begin]
    job = _job(body, run, [*begin, *prompt.ids] or [0], count, body.top_logprobs or 0, False, 1)
    job = replace(job, stops=[*job.stops, *prompt.stops], ends=prompt.ends)
    jobs = [replace(job, seed=job.seed + index) for index in range(body.n or 1)]
    top = (body.top_logprobs or 0) if body.logprobs else None
    return Asked(jobs, ChatAnswer(run.name, run.generator.tokenizer, top), [len(prompt.ids)])


def _job(body: Sampling, run: Served, prompt: list[int], count: int, top: int, scores: bool, prompts: int) -> Job:
    """The first job of a request."""
    if prompts > MOST_PROMPTS:
        raise ApiError(400, f"prompt: {prompts:,} prompts, at most {MOST_PROMPTS} in a request", param="prompt")
    texts = prompts * (body.n or 1)
    if texts * count > MOST_TOKENS:
        message = f"{texts:,} texts of up to {count:,} tokens: a request may ask for at most {MOST_TOKENS:,} tokens"
        raise ApiError(400, message, param="max_tokens")
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    given = {name: value for name in names if (value := getattr(body, name)) is not None}
    options = replace(SamplingOptions.configured(run.generator.settings), **given)
    seed = body.seed if body.seed is not None else secrets.randbits(48)
    return Job(prompt, run.generator.tokenizer, options, seed, count, body.stops, top, scores)


async def respond(dispatcher: Dispatcher, run: Served, asked: Asked, body: Sampling, request: Request) -> Response:
    """Generate the texts of a request, and answer it as a whole or as a stream."""
    reader = dispatcher.ask(run.name, asked.jobs)
    if body.stream:
        with_usage = body.stream_options is not None and body.stream_options.include_usage
        return EventStream(events(reader, asked, with_usage), reader)
    pieces: dict[int, list[Piece]] = {index: [] for index in range(len(asked.jobs))}

    async def collect() -> None:
        while new := await reader.read():
            for index, piece in new.items():
                pieces[index].append(piece)

    try:
        await unless_gone(collect(), request.receive)
    except ClientGoneError:
        return Response(status_code=499)
    finally:
        reader.close()
    whole = {index: merged(several) for index, several in pieces.items()}
    return json_response(asked.answer.whole(whole, usage(asked.prompts, asked.jobs)))


def json_response(value: Any) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")


async def events(reader: Reader, asked: Asked, with_usage: bool) -> AsyncIterator[bytes]:
    """Yield the events of a stream: the last one is [DONE], or an error."""
    begun: set[int] = set()
    try:
        while new := await reader.read():
            for index, piece in new.items():
                chunk = asked.answer.chunk(index, piece, is_first=index not in begun)
                begun.add(index)
                yield b"data: %b\n\n" % orjson.dumps(chunk)
    except ApiError as error:
        yield b"data: %b\n\n" % orjson.dumps(ErrorBody(error=error_detail(error)).model_dump())
        return
    if with_usage:
        yield b"data: %b\n\n" % orjson.dumps(asked.answer.last_chunk(usage(asked.prompts, asked.jobs)))
    yield DONE


class EventStream(StreamingResponse):
    """A stream of events that frees its slots whenever the client disconnects."""

    def __init__(self, content: AsyncIterator[bytes], reader: Reader) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(content, media_type="text/event-stream", headers=headers)
        self._reader = reader

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.closing(self._reader):
            await super().__call__(scope, receive, send)
