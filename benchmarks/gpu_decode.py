"""The job of benchmarks.gpu that times generation: ours, and the cached generate of transformers."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu_measure import forget
from benchmarks.gpu_task import Task, report

if TYPE_CHECKING:
    from utils.inference.generator import Generator
    from utils.inference.quantization import Weights

PROMPT, LONG_PROMPT, BATCH, NEW = 16, 200, 64, 200  # tokens, tokens, sequences, tokens


def time_decode(task: Task) -> None:
    """Job: greedy generation with random weights of both sizes; if one arm fails, the others go on."""
    arms: dict[str, Callable[[], dict[str, Any]]] = {
        "10.7M bfloat16": lambda: ours(task, "shakespeare_gpu", task.text, "bfloat16"),
        "124M bfloat16": lambda: ours(task, "gpt2_124m", task.words, "bfloat16"),
        "124M transformers": lambda: theirs(task),
        "10.7M float32": lambda: ours(task, "shakespeare_gpu", task.text, "float32"),
        "124M float32": lambda: ours(task, "gpt2_124m", task.words, "float32"),
    }
    if not find_spec("transformers"):
        del arms["124M transformers"]
    results: dict[str, Any] = {}
    for name, arm in arms.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("default")
            try:
                results[name] = arm()
            except Exception as error:  # torch and transformers can fail in any way
                results[name] = {"error": f"{type(error).__name__}: {error}"[:500]}
        results[name]["warnings"] = [f"{warning.category.__name__}: {warning.message}"[:300] for warning in caught[:5]]
        forget()
        report(results)


def time_compiled_decode(task: Task) -> None:
    """Job: transformers with a static cache, for which it compiles its model and records CUDA graphs."""
    if find_spec("transformers"):
        report({"124M transformers, compiled": theirs(task, cache_implementation="static")})


def ours(task: Task, preset: str, text: str, weights: Weights) -> dict[str, Any]:
    """Tokens/s of one sequence and of 64, and milliseconds to the first token after a prompt of 200.

    Through Generator, as a user calls it, so tokenizing, sampling, logprobs and text are included.
    """
    from utils.inference.generator import Request
    from utils.inference.sampling import SamplingOptions

    generator, characters = make_generator(task, preset, text, weights)
    block_size = generator.model.config.block_size
    new = min(NEW, block_size - PROMPT) if not task.dry else 4
    batch, long = (4, block_size // 2) if task.dry else (BATCH, LONG_PROMPT)

    def generate(sequences: int, length: int, count: int) -> None:
        prompts = [characters[row : row + length] for row in range(sequences)]
        request = Request(max_new_tokens=count, options=SamplingOptions(temperature=0))
        completions = generator.generate_batch(prompts, request, batch_size=sequences)
        assert all(len(completion.tokens) == count for completion in completions)

    first = seconds_of(lambda: generate(1, long, 1), 2 if task.dry else 10)
    one = seconds_of(lambda: generate(1, PROMPT, new), task.repeats + 1)
    many = seconds_of(lambda: generate(batch, PROMPT, new), task.repeats)
    return {
        "tokens_per_second": new / one,
        "batch": batch,
        "batch_tokens_per_second": batch * new / many,
        "batch_ratio": batch * one / many,
        "first_token_ms": 1000 * first,
        "first_token_prompt": long,
        "new_tokens": new,
        "parameters": generator.model.num_parameters(),
    }


def make_generator(task: Task, preset: str, text: str, weights: Weights) -> tuple[Generator, str]:
    """A generator with random weights in the shape of a preset, and a text for its prompts."""
    import torch

    from model import LanguageModel
    from tokenizer import build_tokenizer
    from utils.inference.generator import Generator
    from utils.inference.quantization import with_weights

    config = task.load(preset, Path(task.folder), {"dropout": "0.0"}).config
    characters = Path(text).read_text(encoding="utf-8")
    tokenizer = build_tokenizer(config.data, [characters])
    torch.manual_seed(0)
    model = LanguageModel(config.model, tokenizer.vocab_size).to(task.device).eval().requires_grad_(False)
    return Generator(with_weights(model, weights), tokenizer), characters[:10_000]


def theirs(task: Task, **settings: Any) -> dict[str, Any]:
    """Tokens/s of GPT2LMHeadModel with random weights in bfloat16: greedy, cached, one sequence."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 32} if task.dry else {}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50304, **sizes)).to(task.device, torch.bfloat16).eval()
    model.generation_config.eos_token_id = None  # so that it never ends early
    new = 4 if task.dry else NEW
    idx = torch.arange(PROMPT, device=task.device)[None]  # (1, T)

    def generate() -> None:
        mask = torch.ones_like(idx)
        output = model.generate(
            idx, attention_mask=mask, do_sample=False, max_new_tokens=new, use_cache=True, pad_token_id=0, **settings
        )
        assert output.shape == (1, PROMPT + new)
        output.tolist()

    seconds = seconds_of(generate, task.repeats + 1)
    return {"tokens_per_second": new / seconds, "new_tokens": new, "parameters": model.num_parameters()}


def seconds_of(call: Callable[[], object], repeats: int) -> float:
    """Median seconds of a call that returns when its results are on the host, after two calls as a warmup."""
    seconds = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[2:])
