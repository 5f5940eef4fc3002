"""Our models compared with those of transformers with the same weights (make test-slow installs transformers)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.foreign_weights import from_transformers
from model import LanguageModel
from tests.tiny_export import lively
from utils.inference.decode import decode_one_token, generate, generate_tokens, new_cache, prefill
from utils.inference.sampling import SamplingOptions

pytestmark = pytest.mark.slow

VOCAB, BLOCK = 101, 48
PROMPTS = [[1], [5, 6, 7], list(range(20))]


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_layer=3, n_head=4, n_embd=64, n_positions=BLOCK, vocab_size=VOCAB))


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}
    more = {"intermediate_size": 96, "max_position_embeddings": BLOCK, "vocab_size": VOCAB}
    return LlamaForCausalLM(LlamaConfig(**sizes, **more, tie_word_embeddings=False))


@pytest.fixture(params=[gpt2, llama], ids=["GPT-2", "Llama"])
def models(request: pytest.FixtureRequest) -> tuple[Any, LanguageModel]:
    make: Callable[[], Any] = request.param
    torch.manual_seed(0)
    theirs = lively(make(), 0.1)
    return theirs, from_transformers(theirs)


@torch.no_grad()
def test_logits_equal_those_of_transformers_at_every_position(models: tuple[Any, LanguageModel]) -> None:
    theirs, ours = models
    idx = torch.randint(VOCAB, (3, BLOCK), generator=torch.Generator().manual_seed(0))
    expected = theirs(idx).logits
    torch.testing.assert_close(ours(idx)[0], expected, atol=1e-4, rtol=1e-4)
    cache = new_cache(ours, 3)
    logits = [prefill(ours, idx[:, :7], cache)]
    logits += [decode_one_token(ours, idx[:, place], cache) for place in range(7, BLOCK)]
    torch.testing.assert_close(torch.stack(logits, dim=1), expected[:, 6:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_prompts_of_different_lengths_have_the_logits_of_transformers(models: tuple[Any, LanguageModel]) -> None:
    theirs, ours = models
    steps = list(generate(ours, PROMPTS, BLOCK - 20, SamplingOptions(temperature=0), range(3)))
    for row, prompt in enumerate(PROMPTS):
        tokens = [int(step.tokens[row]) for step in steps]
        expected = theirs(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
        logits = torch.stack([step.logits[row] for step in steps])
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_greedy_text_equals_that_of_transformers(models: tuple[Any, LanguageModel], prompt: list[int]) -> None:
    theirs, ours = models
    count, idx = BLOCK - len(prompt), torch.tensor([prompt])
    theirs.generation_config.eos_token_id = None  # no token ends a text or stands for padding
    settings = {"attention_mask": torch.ones_like(idx), "max_new_tokens": count, "pad_token_id": 0}
    expected = theirs.generate(idx, do_sample=False, use_cache=True, **settings)[0, len(prompt) :]
    tokens = list(generate_tokens(ours, prompt, count, SamplingOptions(temperature=0), seed=0))
    assert tokens == expected.tolist()
    assert len(set(tokens)) > 3
