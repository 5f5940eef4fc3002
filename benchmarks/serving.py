"""How fast does serve.py answer, and does it lose slots? A server with random weights of the 10.7M shape.

python -m benchmarks.serving                       # a few minutes on 2 CPU cores
python -m benchmarks.serving --repeats 3 --requests 200

The server and its clients share the machine. First token: the time from a request with a prompt of 200 tokens to the
first event of its stream, against that to the first piece of Generator.stream in this process; the arms take turns.
Streams: tokens per second of 16 clients that stream at the same time, against those of one. Cancellations: 1,000
requests, whole and streamed, many of which close their connection at a random moment; afterwards all slots must be free
and the memory must not have grown.
"""

from __future__ import annotations

import functools
import http.client
import json
import random
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchmarks import common
from utils.terminal.cli import PROJECT_ROOT, Parser, script
from utils.terminal.console import Terminal

ALPHABET = [chr(32 + index) for index in range(64)] + ["\n"]
PROMPT = 200  # tokens
TOKENS, STREAMS, SHORT_PROMPT = 150, 16, "THE QUICK BROWN "
FIRST_TOKEN, TIMES_ONE = 1.15, 5.0  # limits
FLAT = 10.0  # megabytes that the memory may grow by


@script
def main(argv: Sequence[str]) -> int:
    parser = Parser(prog="python -m benchmarks.serving", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="measurements of each arm (default: 5)")
    parser.add_argument(
        "--requests", type=int, default=1000, metavar="N", help="requests with cancellations (default: 1000)"
    )
    args = parser.parse(argv)
    common.at_least(1, repeats=args.repeats, requests=args.requests)
    terminal = Terminal()
    with tempfile.TemporaryDirectory() as folder:
        export = save_model(Path(folder) / "model")
        with server(export) as (port, process):
            report_first_token(port, export, args.repeats, terminal)
            report_streams(port, args.repeats, terminal)
            report_cancellations(port, process, args.requests, terminal)
    terminal.print(f"machine: {common.machine_facts()}")
    return 0


def save_model(folder: Path) -> Path:
    """The export of a model of 10.7M parameters with random weights."""
    import torch

    from model import LanguageModel
    from tokenizer import tokenizer_from_json
    from utils.config.settings import ModelConfig
    from utils.inference.export import save_export

    form = {"type": "char", "version": 1, "vocabulary": ALPHABET, "unknown_token": None}
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(n_layer=6, n_head=6, n_embd=384, block_size=256), len(ALPHABET)).eval()
    save_export(folder, model, tokenizer_from_json(form, "a benchmark"), {"run": "model"})
    return folder


@contextmanager
def server(export: Path) -> Iterator[tuple[int, int]]:
    """The port and the process id of a server."""
    command = [sys.executable, str(PROJECT_ROOT / "serve.py"), str(export), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield int(process.stdout.readline().split("/")[2].rpartition(":")[2]), process.pid
        finally:
            process.terminate()


def body(prompt: str, tokens: int, seed: int = 0, stream: bool = True) -> bytes:
    request = {"model": "model", "prompt": prompt, "max_tokens": tokens, "seed": seed, "stream": stream}
    return json.dumps(request | ({"stream_options": {"include_usage": True}} if stream else {})).encode()


def post(port: int, content: bytes) -> socket.socket:
    """A connection over which a request was sent."""
    connection = socket.create_connection(("127.0.0.1", port))
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(content)}\r\nConnection: close\r\n\r\n".encode() + content)
    return connection


def long_prompt(seed: int) -> str:
    return "".join(random.Random(seed).choices(ALPHABET, k=PROMPT))


# ------------------------------------------------------------------------------------------------- the reports


def report_first_token(port: int, export: Path, repeats: int, terminal: Terminal) -> None:
    from utils.inference.generator import Generator, Request

    alone = Generator.from_export(export, "cpu")
    prompts = map(long_prompt, range(10**9))

    def served() -> float:
        content = body(next(prompts), TOKENS)
        began = time.perf_counter()
        with post(port, content) as connection:
            received = b""
            while b"\ndata: " not in received:
                received += connection.recv(65536)
            return time.perf_counter() - began

    def generated() -> float:
        prompt = next(prompts)
        began = time.perf_counter()
        next(alone.stream(prompt, Request(TOKENS)))
        return time.perf_counter() - began

    seconds = common.interleaved({"served": served, "alone": generated}, 4 * repeats + 2)
    first, other = seconds["served"][2:], seconds["alone"][2:]
    ratio, low, high = common.median_ratio(first, other)
    terminal.print(
        f"first token after {PROMPT}: served {1000 * statistics.median(first):.1f} ms, "
        f"Generator alone {1000 * statistics.median(other):.1f} ms; {ratio:.2f} times ({low:.2f}-{high:.2f}), "
        f"at most {FIRST_TOKEN:g} {common.verdict(ratio <= FIRST_TOKEN)}"
    )


def report_streams(port: int, repeats: int, terminal: Terminal) -> None:
    arms = {str(count): functools.partial(tokens_per_second, port, count) for count in (1, STREAMS)}
    rates = common.interleaved(arms, repeats + 1)
    one, many = (rates[str(count)][1:] for count in (1, STREAMS))
    ratio, low, high = common.median_ratio(many, one)
    terminal.print(
        f"{STREAMS} streams: {statistics.median(many):,.0f} tokens/s, one: {statistics.median(one):,.0f}; "
        f"{ratio:.1f} times ({low:.1f}-{high:.1f}), at least {TIMES_ONE:g} {common.verdict(ratio >= TIMES_ONE)}"
    )


def tokens_per_second(port: int, streams: int) -> float:
    """Tokens per second of clients that begin together, until the last one has its text."""
    began = time.perf_counter()
    ends: dict[socket.socket, bytes] = {}
    with selectors.DefaultSelector() as selector:
        for seed in range(streams):
            connection = post(port, body(SHORT_PROMPT, TOKENS, seed))
            selector.register(connection, selectors.EVENT_READ, connection)
            ends[connection] = b""
        while selector.get_map():
            for key, _ in selector.select():
                connection = key.data
                if received := connection.recv(65536):
                    ends[connection] = (ends[connection] + received)[-1000:]
                else:
                    selector.unregister(connection)
                    connection.close()
    seconds = time.perf_counter() - began
    assert all(f'"completion_tokens":{TOKENS}'.encode() in end for end in ends.values())
    return streams * TOKENS / seconds


def report_cancellations(port: int, pid: int, requests: int, terminal: Terminal) -> None:
    import psutil

    process, chance = psutil.Process(pid), random.Random(0)
    memory = []
    open_ones: list[tuple[float, socket.socket]] = []
    for index in range(requests):
        content = body(
            long_prompt(index)[: chance.randrange(1, PROMPT)], chance.randrange(1, 60), index, index % 2 == 0
        )
        open_ones.append((time.perf_counter() + chance.random(), post(port, content)))
        while len(open_ones) >= 2 * STREAMS:
            end, connection = open_ones.pop(chance.randrange(len(open_ones)))
            connection.settimeout(max(0.001, end - time.perf_counter()))
            with connection:
                if chance.random() < 0.5:
                    continue  # at once
                try:
                    while connection.recv(65536):
                        pass
                except TimeoutError:
                    continue
        if index % (requests // 10 or 1) == 0:
            memory.append(process.memory_info().rss / 1e6)
    for _, connection in open_ones:
        connection.close()
    lane = wait_until_idle(port)
    memory.append(process.memory_info().rss / 1e6)
    half = memory[len(memory) // 2]
    is_kept = lane == {"slots": STREAMS, "running": 0, "waiting": 0}
    terminal.print(
        f"{requests:,} requests with cancellations: {lane['running']} slots taken afterwards, "
        f"{lane['waiting']} waiting {common.verdict(is_kept)}; memory {memory[0]:.0f} MB after the first, "
        f"{half:.0f} MB after half of them, {memory[-1]:.0f} MB at the end {common.verdict(memory[-1] - half <= FLAT)}"
    )
    report_metrics(port, terminal)


def wait_until_idle(port: int) -> dict[str, int]:
    for _ in range(600):
        lane: dict[str, int] = json.loads(get(port, "/health"))["models"]["model"]
        if not lane["running"] + lane["waiting"]:
            break
        time.sleep(0.05)
    return lane


def report_metrics(port: int, terminal: Terminal) -> None:
    names = ("finished", "cancelled", "failed")
    lines = [line for line in get(port, "/metrics").splitlines() if line.startswith("workbench_")]
    counts = {name: next(line.split()[-1] for line in lines if line.startswith(f"workbench_{name}_")) for name in names}
    terminal.print(", ".join(f"{count} {name}" for name, count in counts.items()))


def get(port: int, path: str) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", path)
    text = connection.getresponse().read().decode()
    connection.close()
    return text


if __name__ == "__main__":
    sys.exit(main())
