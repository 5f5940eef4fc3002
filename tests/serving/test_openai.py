"""serve.py as clients see it: OpenAI's own client, programs that make mistakes, and programs that disconnect."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from conftest import ROOT

from tests.serving.conftest import TEMPLATE, serving
from tests.tiny_export import TOKENIZER
from utils.inference.generator import Generator, Request
from utils.inference.sampling import SamplingOptions
from utils.serving.schemas import CompletionRequest

pytestmark = pytest.mark.xdist_group("serving")

HOT = SamplingOptions(temperature=1.0)


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def alone(runs_dir: Path) -> Generator:
    return Generator.from_run(str(runs_dir / "20260131_142501_first"), device="cpu")


def wait_until(is_so: Callable[[], bool]) -> None:
    for _ in range(300):
        if is_so():
            return
        time.sleep(0.05)
    raise AssertionError("the condition was not met within 15 s")


def running(url: str) -> int:
    return sum(lane["running"] + lane["waiting"] for lane in httpx.get(f"{url}/health").json()["models"].values())


def test_the_models_are_the_runs(client: openai.OpenAI) -> None:
    models = client.models.list().data
    assert [(model.id, model.object) for model in models] == [("first", "model"), ("second", "model")]
    assert models[0].model_dump()["run"] == "20260131_142501_first"
    assert models[0].model_dump()["context"] == 64
    assert client.models.retrieve("first") == models[0]
    assert client.models.retrieve("20260131_142502_second") == models[1]
    for name in ("frist", "a/b"):
        with pytest.raises(openai.NotFoundError, match=f"no model '{name}'.*this server has first, second") as error:
            client.models.retrieve(name)
        assert error.value.code == "model_not_found"


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_completion_equals_that_of_the_generator(client: openai.OpenAI, alone: Generator, temperature: float) -> None:
    options = SamplingOptions(temperature=temperature)
    expected = alone.generate("the ", Request(90, options, seed=5))  # beyond the context
    asked: dict[str, Any] = {
        "model": "first",
        "prompt": "the ",
        "max_tokens": 90,
        "temperature": temperature,
        "seed": 5,
    }
    whole = client.completions.create(**asked, logprobs=2)
    assert whole.choices[0].text == expected.text
    assert whole.choices[0].finish_reason == "length"
    assert whole.choices[0].logprobs is not None
    assert whole.choices[0].logprobs.token_logprobs == pytest.approx(expected.logprobs, abs=1e-3)
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (4, 90, 94)
    stream = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(choice.text for chunk in stream for choice in chunk.choices) == expected.text
    assert [choice.finish_reason for chunk in stream for choice in chunk.choices][-1] == "length"
    assert [chunk.usage for chunk in stream if chunk.usage] == [whole.usage]
    by_id = client.completions.create(**asked | {"model": "20260131_142501_first"})
    assert (by_id.model, by_id.choices[0].text) == ("first", expected.text)


def test_a_request_may_have_several_prompts_with_several_texts_each(client: openai.OpenAI, alone: Generator) -> None:
    texts = ["the ", "a"]
    expected = [alone.generate(texts[i // 2], Request(9, HOT, seed=7 + i)).text for i in range(4)]
    ids = [TOKENIZER.encode(text) for text in texts]
    asked: dict[str, Any] = {"model": "first", "max_tokens": 9, "temperature": 1, "seed": 7}
    prompts: list[Any] = [texts, ids]
    for prompt in prompts:
        answer = client.completions.create(**asked, prompt=prompt, n=2)
        assert [(choice.index, choice.text) for choice in answer.choices] == list(enumerate(expected))
    one = client.completions.create(**asked, prompt=ids[0])
    assert one.choices[0].text == expected[0]
    stream = client.completions.create(
        model="first", prompt=texts, n=2, max_tokens=9, temperature=1, seed=7, stream=True
    )
    parts = ["", "", "", ""]
    for chunk in stream:
        parts[chunk.choices[0].index] += chunk.choices[0].text
    assert parts == expected


def test_echo_scores_the_prompt(client: openai.OpenAI, alone: Generator) -> None:
    answer = client.completions.create(model="first", prompt="the fox", max_tokens=0, echo=True, logprobs=1)
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason) == ("the fox", "length")
    assert choice.logprobs is not None
    found = choice.logprobs
    assert found.tokens == list("the fox")
    assert found.text_offset == list(range(7))
    assert found.token_logprobs is not None
    assert found.top_logprobs is not None
    assert (found.token_logprobs[0], found.top_logprobs[0]) == (None, None)
    score = alone.score("the fox")
    assert -sum(filter(None, found.token_logprobs)) == pytest.approx(score.loss * score.tokens, rel=1e-3)
    for logprob, top in zip(found.token_logprobs[1:], found.top_logprobs[1:], strict=True):
        assert max(top.values()) >= (logprob or 0)
    longer = client.completions.create(model="first", prompt="a", max_tokens=3, echo=True, temperature=0)
    assert longer.choices[0].text == "a" + alone.generate("a", Request(3, SamplingOptions(temperature=0))).text


def test_a_stop_string_is_not_part_of_the_text(client: openai.OpenAI, alone: Generator) -> None:
    whole = alone.generate("ab", Request(40, HOT, seed=3)).text
    stop = whole[10:12]
    for stops in (stop, ["never there", stop]):
        answer = client.completions.create(
            model="first", prompt="ab", max_tokens=40, temperature=1, seed=3, stop=stops
        ).choices[0]
        assert (answer.text, answer.finish_reason) == (whole[: whole.find(stop)], "stop")


def test_a_conversation_is_put_into_the_template(client: openai.OpenAI, alone: Generator) -> None:
    messages: list[Any] = [{"role": "user", "content": "is it so"}]
    asked: dict[str, Any] = {"model": "first", "messages": messages, "max_tokens": 30, "temperature": 1, "seed": 2}
    expected = alone.generate(TEMPLATE.format(question="is it so"), Request(30, HOT, stops=["?"], seed=2))
    answer = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2).choices[0]
    assert (answer.message.role, answer.message.content) == ("assistant", expected.text)
    assert answer.logprobs is not None
    assert answer.logprobs.content is not None
    assert [token.logprob for token in answer.logprobs.content] == pytest.approx(expected.logprobs, abs=1e-3)
    stream = list(client.chat.completions.create(**asked, stream=True))
    assert stream[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == expected.text
    messages += [{"role": "assistant", "content": "no"}, {"role": "user", "content": "why"}]
    text = f"{TEMPLATE.format(question='is it so')}no?{TEMPLATE.format(question='why')}"
    expected = alone.generate(text, Request(30, HOT, stops=["?"], seed=2))
    assert client.chat.completions.create(**asked).choices[0].message.content == expected.text
    for wrong in ([{"role": "system", "content": "be nice"}], messages[:2]):
        with pytest.raises(openai.BadRequestError, match="messages"):
            client.chat.completions.create(model="first", messages=wrong)


MISTAKES = [
    (404, "no model 'frist'; did you mean first", {"model": "frist"}),
    (400, "temperature: .* less than or equal to 1000000", {"temperature": 1e9}),
    (400, "n: .* less than or equal to 16", {"n": 1000}),
    (400, "unknown field 'temprature'; did you mean temperature", {"temprature": 1}),
    (400, "prompt: expected a text", {"prompt": {"text": "a"}}),
    (400, "prompt: expected a text", {"prompt": "\ud800"}),
    (400, "character '€' .* is not among", {"prompt": "€"}),
    (400, "prompt.1: character '€'", {"prompt": ["a", "€"]}),
    (400, "no token 99: first has tokens 0 to 34", {"prompt": [99]}),
    (400, "at most 100,000 tokens", {"max_tokens": 60_000, "n": 2}),
    (400, "max_tokens: .* greater than or equal to 0", {"max_tokens": -1}),
    (400, "257 prompts, at most 256", {"prompt": ["a"] * 257}),
    (400, "17", {"stop": ["a"] * 17}),
    (400, "seed: .* greater than or equal to 0", {"seed": -1}),
    (400, "suffix is not supported", {"suffix": "a"}),
    (400, "logprobs: .* less than or equal to 20", {"logprobs": 21}),
    (400, "stream_options needs stream", {"stream_options": {"include_usage": True}}),
    (
        400,
        "70 tokens; with echo and logprobs at most the context of 64",
        {"prompt": "a" * 70, "echo": True, "logprobs": 1},
    ),
    (400, "40 texts in one request: this server takes at most 12", {"prompt": ["a"] * 40}),
]


@pytest.mark.parametrize(("status", "message", "fields"), MISTAKES, ids=[str(fields)[:40] for *_, fields in MISTAKES])
def test_a_mistake_has_its_status_and_one_message(url: str, status: int, message: str, fields: dict[str, Any]) -> None:
    body = json.dumps({"model": "first", "prompt": "a", "max_tokens": 1} | fields)
    response = httpx.post(f"{url}/v1/completions", content=body, headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert response.status_code == status
    assert re.search(message, error["message"])
    assert "\n" not in error["message"]


@pytest.mark.parametrize(
    ("param", "message", "fields"),
    [
        ("stop", "stop: expected a text in Unicode, or a list of texts", {"stop": 5}),
        ("stop", "stop: expected a text in Unicode, or a list of texts", {"stop": ["a", 5]}),
        ("temprature", "unknown field 'temprature'; did you mean temperature?", {"temprature": 1}),
        (r"\ud800\n", r"unknown field '\ud800\n'", {"\ud800\n": 1}),
        ("stream_options", "stream_options needs stream: true", {"stream_options": {"include_usage": True}}),
        ("suffix", "suffix is not supported: leave it out", {"suffix": "a"}),
        ("seed", "seed: expected less than 2^63 - 4096", {"seed": 2**63 - 1}),
        ("temperature", "temperature: Input should be greater than or equal to 0", {"temperature": -1}),
    ],
)
def test_a_mistake_names_its_field(url: str, param: str, message: str, fields: dict[str, Any]) -> None:
    body = json.dumps({"model": "first", "prompt": "a"} | fields)
    response = httpx.post(f"{url}/v1/completions", content=body, headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert (error["param"], error["message"]) == (param, message)


def test_every_optional_field_may_be_null(url: str, alone: Generator) -> None:
    expected = alone.generate("", Request(9, HOT, seed=7)).text
    asked = {"model": "first", "max_tokens": 9, "temperature": 1, "seed": 7}
    nulls = dict.fromkeys(CompletionRequest.model_fields)
    answer = httpx.post(f"{url}/v1/completions", json=nulls | asked).json()
    assert answer["choices"][0]["text"] == expected


def test_a_full_queue_answers_429_and_when_to_try_again(url: str) -> None:
    body = {"model": "first", "prompt": ["a"] * 12, "max_tokens": 8000, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as busy:
        lines = busy.iter_lines()  # kept, because the stream is closed with its iterator
        next(lines)
        response = httpx.post(f"{url}/v1/completions", json={"model": "first", "prompt": ["a"] * 12, "max_tokens": 1})
    assert response.status_code == 429
    assert "texts are waiting already; try again in" in response.json()["error"]["message"]
    assert 1 <= int(response.headers["retry-after"]) <= 60


@pytest.mark.parametrize("body", [b"\xff\xfe\x00", b'{"model": "\xff"}', b"{", b"[]", b"[" * 100_000, b"1e999", b""])
def test_an_invalid_body_is_refused_with_one_message(url: str, body: bytes) -> None:
    response = httpx.post(f"{url}/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["message"]


def test_a_body_of_ten_megabytes_is_refused(url: str) -> None:
    def chunks() -> Any:
        yield from [b'{"model": "first", "prompt": "', *[b"a" * 1_000_000] * 10, b'"}']

    for content in (b"".join(chunks()), chunks()):
        response = httpx.post(f"{url}/v1/completions", content=content, headers={"content-type": "application/json"})
        assert response.status_code == 413
        assert "at most 4,194,304 bytes" in response.json()["error"]["message"]
    assert httpx.get(f"{url}/health").json()["status"] == "ok"


def test_a_client_that_disconnects_frees_its_slot(url: str, client: openai.OpenAI) -> None:
    asked = {"model": "first", "prompt": "a", "max_tokens": 50_000}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/completions", json=asked, timeout=0.5)
    with httpx.stream("POST", f"{url}/v1/completions", json=asked | {"stream": True}) as response:
        lines = response.iter_lines()  # closes the connection when it is garbage-collected
        assert next(lines).startswith("data: ")
        assert running(url) == 1
    wait_until(lambda: running(url) == 0)
    assert 'workbench_cancelled_total{model="first"} ' in httpx.get(f"{url}/metrics").text
    assert client.completions.create(model="first", prompt="a", max_tokens=2).choices[0].text


def test_a_slow_reader_does_not_delay_others(url: str, client: openai.OpenAI) -> None:
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({"model": "first", "prompt": "a", "max_tokens": 600, "stream": True, "logprobs": 20})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n"
    head += "Content-Type: application/json\r\n\r\n"
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        slow.connect((host, int(port)))
        slow.sendall(f"{head}{body}".encode())
        assert slow.recv(1) == b"H"
        assert client.completions.create(model="first", prompt="a", max_tokens=20).choices[0].text
        wait_until(lambda: running(url) == 0)  # its text is complete although it was not read
        assert slow.recv(1) == b"T"
    assert client.completions.create(model="second", prompt="a", max_tokens=2).choices[0].text


def test_a_server_with_a_key_and_without_a_template_drains_on_sigterm(runs_dir: Path) -> None:
    with serving(runs_dir, "first", WORKBENCH_API_KEY="secret") as (url, server):
        right = openai.OpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0).models.list()
        assert [model.model_dump()["chat"] for model in right.models.list().data] == [False]
        with pytest.raises(openai.BadRequestError, match="first has no chat or Q&A template"):
            right.chat.completions.create(model="first", messages=[{"role": "user", "content": "a"}])
        stream = right.completions.create(model="first", prompt="a", max_tokens=200, stream=True)
        next(iter(stream))
        server.send_signal(signal.SIGTERM)  # running requests may finish
        wait_until(lambda: httpx.get(f"{url}/health").status_code == 503)
        with pytest.raises(openai.InternalServerError, match="shutting down"):
            right.completions.create(model="first", prompt="a")
        assert [choice.finish_reason for chunk in stream for choice in chunk.choices][-1] == "length"
        assert server.wait(timeout=30) == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nobody"], "no run nobody"),
        (["first", "20260131_142501_first", "first"], "two runs have the name first"),
        (["--host", "203.0.113.7", "first"], "cannot listen on 203.0.113.7:8000"),
        (["--port", "99999", "first"], "expected a whole number from 0 to 65,535"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(
    runs_dir: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import serve

    assert serve.main([*words, "--runs-dir", str(runs_dir)]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_help_imports_neither_torch_nor_fastapi() -> None:
    code = "import sys, contextlib, serve\nwith contextlib.suppress(SystemExit): serve.main(['--help'])\n"
    code += "assert not {'torch', 'fastapi', 'uvicorn', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
