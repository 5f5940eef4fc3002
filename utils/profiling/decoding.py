"""How fast a model generates: prefill of one block, then decoding one token at a time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from model import LanguageModel
from utils.inference.decode import decode_one_token, new_cache, prefill
from utils.inference.evaluation import evaluating
from utils.inference.quantization import weight_bytes
from utils.machine.device import synchronize
from utils.nn.costs import forward_flops
from utils.nn.kv_cache import KVCache
from utils.profiling.record import Generation

REPEATS = 5
DECODED = 64  # tokens; fewer if the second half of a block is shorter


def measure_generation(model: LanguageModel) -> Generation:
    """Median times for one sequence, generated as inference.py does: in the precision of the weights, not compiled.

    Decoding starts when half a block is in the cache.
    """
    parameter, T = next(model.parameters()), model.config.block_size
    tokens = torch.zeros(1, T, dtype=torch.int64, device=parameter.device)
    cache = new_cache(model, 1)
    begin = T // 2
    decoded = min(T - begin, DECODED)

    def one_prefill() -> None:
        cache.reset()
        prefill(model, tokens, cache)

    def half_a_block() -> None:
        cache.reset()
        if begin:
            prefill(model, tokens[:, :begin], cache)

    def one_decode() -> None:
        for _ in range(decoded):
            decode_one_token(model, tokens[:, 0], cache)

    with evaluating(model):
        prefill_ms = _median_ms(one_prefill, parameter.device)
        decode_ms = _median_ms(one_decode, parameter.device, half_a_block) / decoded
    return Generation(
        dtype=str(parameter.dtype).removeprefix("torch."),
        prompt=T,
        prefill_ms=prefill_ms,
        prefill_gflop=forward_flops(model, T, (T + 1) / 2) / 1e9,
        decoded=decoded,
        decode_ms=decode_ms,
        decode_gbyte=decode_bytes(model, cache, begin + (decoded + 1) / 2) / 1e9,
    )


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
