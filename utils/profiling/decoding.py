"""Measuring how fast a model generates: prefill of one block, then decoding one token at a time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from model import LanguageModel
from utils.inference.decode import decode_one_token, new_cache, prefill
from utils.inference.evaluation import evaluating
from utils.inference.quantization import weight_bytes
from utils.inference.sampling import SamplingOptions
from utils.inference.static import StaticDecoder, is_static
from utils.machine.device import synchronize
from utils.nn.costs import prefill_flops
from utils.nn.kv_cache import KVCache
from utils.nn.lean import lean
from utils.profiling.record import Generation

REPEATS = 5
DECODED = 64  # tokens; fewer if the second half of a block is shorter


def measure_generation(model: LanguageModel) -> Generation:
    """Median times for one sequence, generated as by inference.py: in the precision of the weights, not compiled.

    Decoding starts with half a block in the cache; on CUDA it replays a graph.
    """
    parameter, T = next(model.parameters()), model.config.block_size
    tokens = torch.zeros(1, T, dtype=torch.int64, device=parameter.device)
    cache = new_cache(model, 1)
    begin = T // 2
    decoded = min(T - begin, DECODED)

    with evaluating(model):
        lean_model = lean(model)

        def one_prefill() -> None:
            cache.reset()
            prefill(lean_model, tokens, cache)

        prefill_ms = _median_ms(one_prefill, parameter.device)
        prompt = tokens[:, :begin]
        if is_static(parameter.device):
            fill, decode = _static_steps(model, prompt)
        else:
            fill, decode = _steps(lean_model, prompt, cache)

        def one_decode() -> None:
            for _ in range(decoded):
                decode()

        decode_ms = _median_ms(one_decode, parameter.device, fill) / decoded
    return Generation(
        dtype=str(parameter.dtype).removeprefix("torch."),
        prompt=T,
        prefill_ms=prefill_ms,
        prefill_gflop=prefill_flops(model, T) / 1e9,
        decoded=decoded,
        decode_ms=decode_ms,
        decode_gbyte=decode_bytes(model, cache, begin + (decoded + 1) / 2) / 1e9,
    )


def _steps(model: LanguageModel, tokens: torch.Tensor, cache: KVCache) -> tuple[Callable[[], None], Callable[[], None]]:
    """Two functions: one fills the cache with `tokens` (1, T), the other decodes one more token."""
    token = torch.zeros(1, dtype=torch.int64, device=tokens.device)

    def fill() -> None:
        cache.reset()
        if tokens.numel():
            prefill(model, tokens, cache)

    def decode() -> None:
        decode_one_token(model, token, cache)

    return fill, decode


def _static_steps(model: LanguageModel, tokens: torch.Tensor) -> tuple[Callable[[], None], Callable[[], None]]:
    """Like `_steps`, with a static decoder, which has its own cache."""
    decoder, prompt = StaticDecoder(model, 1), tokens[0].tolist() or [0]
    return lambda: decoder.start([prompt], SamplingOptions(), [0]), decoder.decode


def decode_bytes(model: LanguageModel, cache: KVCache, context: float) -> float:
    """Bytes read to decode one token of each cached sequence: all weights, and `context` keys and values."""
    return weight_bytes(model) + 2 * cache.keys[:, :, :, 0].numel() * cache.keys.element_size() * context


def _median_ms(call: Callable[[], None], device: torch.device, before: Callable[[], None] = lambda: None) -> float:
    times = []
    for _ in range(REPEATS + 1):
        before()
        synchronize(device)
        began = time.perf_counter()
        call()
        synchronize(device)
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times[1:])  # without the warmup
