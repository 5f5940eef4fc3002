"""Generation: cached decoding compared with full passes, windows, batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model import LanguageModel
from tests.tiny_export import char_tokenizer, lively
from tokenizer import TokenizerError
from utils.config.settings import ModelConfig
from utils.inference.decode import Window, generate, generate_tokens, new_cache, start_tokens
from utils.inference.sampling import RandomStreams, SamplingOptions, sample
from utils.nn.kv_cache import KVCache

VOCAB, BLOCK = 17, 8
GREEDY = SamplingOptions(temperature=0)


def lively_model(**settings: Any) -> LanguageModel:
    """Weights large enough that the tokens depend on the whole context."""
    torch.manual_seed(0)
    tiny = {"n_layer": 2, "n_head": 4, "n_embd": 16, "block_size": BLOCK}
    return lively(LanguageModel(ModelConfig(**tiny | settings), VOCAB))


@pytest.fixture
def model() -> LanguageModel:
    return lively_model()


def greedy_without_cache(model: LanguageModel, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            logits, _ = model(torch.tensor([tokens[-BLOCK:]]))
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("settings", [{}, {"position": "rope", "n_kv_head": 2, "norm": "rmsnorm", "mlp": "swiglu"}])
@pytest.mark.parametrize("length", [1, 3, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK])
def test_greedy_tokens_equal_those_of_full_passes(settings: dict[str, Any], length: int) -> None:
    model = lively_model(**settings)
    prompt = torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    expected = greedy_without_cache(model, prompt, 3 * BLOCK)
    assert list(generate_tokens(model, prompt, 3 * BLOCK, GREEDY, seed=0, window="exact")) == expected
    assert len(set(expected)) > 1


@pytest.mark.parametrize("count", [0, 1, BLOCK, 2 * BLOCK])
def test_as_many_tokens_are_generated_as_asked_for(model: LanguageModel, count: int) -> None:
    tokens = list(generate_tokens(model, [1], count, SamplingOptions(), seed=0))
    assert len(tokens) == count
    assert all(0 <= token < VOCAB for token in tokens)


def test_only_the_last_block_size_tokens_of_a_prompt_matter(model: LanguageModel) -> None:
    tail = list(range(BLOCK))
    short, long = (
        list(generate_tokens(model, prompt, 20, SamplingOptions(), 3)) for prompt in (tail, [9, 9, 9, *tail])
    )
    assert short == long


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(model: LanguageModel) -> None:
    one, again, other = (list(generate_tokens(model, [1], 30, SamplingOptions(1.0), seed)) for seed in (1, 1, 2))
    assert one == again
    assert one != other


def test_sampled_tokens_equal_those_of_full_passes_beyond_block_size(model: LanguageModel) -> None:
    options = SamplingOptions(temperature=1.5, top_k=5, top_p=0.9)
    stream = RandomStreams([11], torch.device("cpu"))
    tokens = [4]
    for _ in range(3 * BLOCK):
        with torch.no_grad():
            tokens.append(int(sample(model(torch.tensor([tokens[-BLOCK:]]))[0][:, -1], options, stream.draw())))
    assert list(generate_tokens(model, [4], 3 * BLOCK, options, seed=11, window="exact")) == tokens[1:]


@pytest.mark.parametrize("options", [GREEDY, SamplingOptions(1.0, top_k=5, top_p=0.9)])
def test_the_global_random_state_is_left_alone(model: LanguageModel, options: SamplingOptions) -> None:
    before = torch.get_rng_state()
    first = list(generate_tokens(model, [1], 20, options, seed=1))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert list(generate_tokens(model, [1], 20, options, seed=1)) == first


def test_gradients_are_enabled_again_between_tokens(model: LanguageModel) -> None:
    for _ in generate_tokens(model, [1], 3, GREEDY, seed=0):
        assert torch.is_grad_enabled()


# ------------------------------------------------------------------------------ windows


@pytest.mark.parametrize("block_size", [1, 2, 7, 8])
@torch.no_grad()
def test_with_learned_positions_a_full_context_is_cut_to_its_newer_half(block_size: int) -> None:
    model = lively_model(position="learned", block_size=block_size)
    tokens, context, expected = [3, 1], [3, 1][-block_size:], []
    for _ in range(4 * block_size):
        expected.append(int(model(torch.tensor([context]))[0][0, -1].argmax()))
        if len(context) == block_size:
            context = context[len(context) - block_size // 2 :]
        context = [*context, expected[-1]]
    assert list(generate_tokens(model, tokens, 4 * block_size, GREEDY, seed=0)) == expected


@torch.no_grad()
def test_within_the_context_both_windows_give_the_same_tokens() -> None:
    for settings in ({}, {"position": "learned"}):
        model = lively_model(**settings)
        sliding, exact = (
            list(generate_tokens(model, [1, 2], BLOCK - 1, SamplingOptions(), 5, window))
            for window in ("sliding", "exact")
        )
        assert sliding == exact


# ------------------------------------------------------------------------------ batches

PROMPTS = [[1], [2, 3, 4], [5] * 12, [6, 7, 8], [9, 10, 11, 12, 13, 14, 15, 16]]


SETTINGS: dict[str, dict[str, Any]] = {
    "rope": {"position": "rope"},
    "learned": {"position": "learned"},
    "rope, one key head, n-grams": {"position": "rope", "n_kv_head": 1, "ngram_rows": (7, 5), "qk_norm": True},
    "learned, grouped, n-grams": {"position": "learned", "n_kv_head": 2, "ngram_rows": (7, 5)},
    "window, learned qk norm": {"position": "rope", "sliding_window": 3, "qk_norm": True, "qk_norm_weights": True},
    "window of one block": {"position": "learned", "n_kv_head": 2, "sliding_window": 5, "full_attention_layers": 1},
    "scaled rope": {"position": "rope", "rope_scaling": "linear", "rope_factor": 3.0, "sliding_window": 1},
    "more n-grams than context": {"position": "rope", "ngram_rows": (7,) * (BLOCK + 2)},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("window", ["sliding", "exact"])
@pytest.mark.parametrize("options", [GREEDY, SamplingOptions(1.0, top_k=9, repetition_penalty=1.3)], ids=str)
def test_a_sequence_does_not_depend_on_its_batch(settings: str, window: Window, options: SamplingOptions) -> None:
    model, seeds = lively_model(**SETTINGS[settings]).double(), [3, 4, 5, 6, 7]
    steps = list(generate(model, PROMPTS, 3 * BLOCK, options, seeds, window))
    for row, (prompt, seed) in enumerate(zip(PROMPTS, seeds, strict=True)):
        alone = list(generate_tokens(model, prompt, 3 * BLOCK, options, seed, window))
        assert [int(step.tokens[row]) for step in steps] == alone


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_mask_past_the_edge_of_the_window_changes_nothing(settings: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively_model(**SETTINGS[settings]).double()
    dynamic = list(generate(model, PROMPTS, 3 * BLOCK, GREEDY, range(5)))

    def static_cache(*arguments: Any) -> KVCache:
        cache = new_cache(*arguments)
        cache._static = True  # as on a GPU
        return cache

    monkeypatch.setattr("utils.inference.decode.new_cache", static_cache)
    for one, other in zip(dynamic, generate(model, PROMPTS, 3 * BLOCK, GREEDY, range(5)), strict=True):
        assert torch.equal(one.tokens, other.tokens)
        torch.testing.assert_close(one.logits, other.logits)


def test_the_context_of_a_step_is_the_sum_over_its_sequences() -> None:
    steps = generate(lively_model(position="learned"), [[1, 2], [3] * BLOCK], 4, GREEDY, [0, 0])
    assert [step.context for step in steps] == [2 + BLOCK, 3 + BLOCK // 2 + 1, 4 + BLOCK // 2 + 2, 5 + BLOCK // 2 + 3]


def test_logits_are_those_of_the_model_before_any_filter() -> None:
    model = lively_model()
    options = SamplingOptions(1.0, top_k=1, banned=(3,))
    (step,) = generate(model, [[1, 2]], 1, options, [0])
    with torch.no_grad():
        torch.testing.assert_close(step.logits, model(torch.tensor([[1, 2]]))[0][:, -1], atol=1e-5, rtol=0)


def test_no_number_is_read_from_the_device_between_tokens(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a wait for the device")

    for name in ("item", "tolist", "__int__", "__bool__", "__float__", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, fail)
    steps = list(generate(model, [[1], [2, 3]], 3 * BLOCK, SamplingOptions(1.0, top_k=5), [1, 2]))
    assert len(steps) == 3 * BLOCK


# ------------------------------------------------------------------------------ prompts


def test_an_empty_prompt_starts_from_a_line_break_or_the_first_token() -> None:
    assert start_tokens(char_tokenizer("ab\n"), "") == [2]
    assert start_tokens(char_tokenizer("ab"), "") == [0]
    assert start_tokens(char_tokenizer("ab\n"), "ba") == [1, 0]


def test_a_prompt_with_an_unknown_character_is_refused_with_its_position() -> None:
    with pytest.raises(TokenizerError, match=r"'x'.* at position 1 "):
        start_tokens(char_tokenizer("ab"), "ax")
