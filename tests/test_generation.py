"""Generation: greedy and sampled decoding, and the filters of sampling."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model import LanguageModel
from tokenizer import CharTokenizer, TokenizerError
from utils.config import ModelConfig
from utils.errors import UserError
from utils.generation import (
    GenerationError,
    SamplingOptions,
    filter_logits,
    generate_tokens,
    sample,
    start_tokens,
)

VOCAB, BLOCK = 17, 8
GREEDY = SamplingOptions(temperature=0)
INF = float("inf")


def lively_model(**settings: Any) -> LanguageModel:
    """Weights large enough that the tokens depend on the whole context."""
    torch.manual_seed(0)
    tiny = {"n_layer": 2, "n_head": 4, "n_embd": 16, "block_size": BLOCK}
    model = LanguageModel(ModelConfig(**tiny | settings), VOCAB)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.eval()


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
def test_greedy_equals_recomputing_everything(settings: dict[str, Any], length: int) -> None:
    model = lively_model(**settings)
    prompt = torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    expected = greedy_without_cache(model, prompt, 3 * BLOCK)
    assert list(generate_tokens(model, prompt, 3 * BLOCK, GREEDY, seed=0)) == expected
    assert len(set(expected)) > 1


@pytest.mark.parametrize("count", [0, 1, BLOCK, 2 * BLOCK])
def test_as_many_tokens_come_as_are_asked_for(model: LanguageModel, count: int) -> None:
    tokens = list(generate_tokens(model, [1], count, SamplingOptions(), seed=0))
    assert len(tokens) == count
    assert all(0 <= token < VOCAB for token in tokens)


def test_only_the_last_block_size_tokens_of_a_prompt_count(model: LanguageModel) -> None:
    tail = list(range(BLOCK))
    short, long = (
        list(generate_tokens(model, prompt, 20, SamplingOptions(), 3)) for prompt in (tail, [9, 9, 9, *tail])
    )
    assert short == long


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others(model: LanguageModel) -> None:
    one, again, other = (list(generate_tokens(model, [1], 30, SamplingOptions(1.0), seed)) for seed in (1, 1, 2))
    assert one == again
    assert one != other


def test_sampling_goes_on_past_block_size_as_recomputing_does(model: LanguageModel) -> None:
    options = SamplingOptions(temperature=1.5, top_k=5, top_p=0.9)
    generator = torch.Generator().manual_seed(11)
    tokens = [4]
    for _ in range(3 * BLOCK):
        with torch.no_grad():
            tokens.append(int(sample(model(torch.tensor([tokens[-BLOCK:]]))[0][:, -1], options, generator)))
    assert list(generate_tokens(model, [4], 3 * BLOCK, options, seed=11)) == tokens[1:]


@pytest.mark.parametrize("options", [GREEDY, SamplingOptions(1.0, top_k=5, top_p=0.9)])
def test_the_global_random_state_is_left_alone(model: LanguageModel, options: SamplingOptions) -> None:
    before = torch.get_rng_state()
    first = list(generate_tokens(model, [1], 20, options, seed=1))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert list(generate_tokens(model, [1], 20, options, seed=1)) == first


def test_gradients_are_on_again_between_tokens(model: LanguageModel) -> None:
    for _ in generate_tokens(model, [1], 3, GREEDY, seed=0):
        assert torch.is_grad_enabled()


# ------------------------------------------------------------------------------ prompts


def test_an_empty_prompt_starts_from_a_line_break_or_the_first_token() -> None:
    assert start_tokens(CharTokenizer("ab\n"), "") == [2]
    assert start_tokens(CharTokenizer("ab"), "") == [0]
    assert start_tokens(CharTokenizer("ab\n"), "ba") == [1, 0]


def test_a_prompt_of_unknown_characters_is_an_error() -> None:
    with pytest.raises(TokenizerError, match=r"'x'.* at position 1 "):
        start_tokens(CharTokenizer("ab"), "ax")


# ------------------------------------------------------------------------------ filters

# Probabilities 0.5, 0.25, 0.125, 0.0625, 0.0625 in another order, exact in binary.
PROBABILITIES = torch.tensor([0.125, 0.5, 0.0625, 0.25, 0.0625])
LOGITS = PROBABILITIES.log()[None]  # (1, V)


def kept(top_k: int | None = None, top_p: float | None = None, logits: torch.Tensor = LOGITS) -> set[int]:
    filtered = filter_logits(logits, top_k, top_p)
    chosen = filtered[0] > -INF
    assert torch.equal(filtered[0][chosen], logits[0][chosen])  # what is kept is not changed
    return set(chosen.nonzero().flatten().tolist())


@pytest.mark.parametrize(
    ("top_k", "tokens"),
    [(None, {0, 1, 2, 3, 4}), (1, {1}), (2, {1, 3}), (3, {0, 1, 3}), (5, {0, 1, 2, 3, 4}), (100, {0, 1, 2, 3, 4})],
)
def test_top_k_keeps_the_most_likely(top_k: int | None, tokens: set[int]) -> None:
    assert kept(top_k=top_k) == tokens


def test_top_k_keeps_all_that_tie_with_the_last_kept() -> None:
    assert kept(top_k=4) == {0, 1, 2, 3, 4}  # tokens 2 and 4 are equally likely: dropping one would be arbitrary


@pytest.mark.parametrize(
    ("top_p", "tokens"),
    [
        (1e-9, {1}),
        (0.4, {1}),
        (0.51, {1, 3}),
        (0.74, {1, 3}),
        (0.76, {0, 1, 3}),
        (0.99, {0, 1, 2, 3, 4}),
        (1.0, {0, 1, 2, 3, 4}),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p: float, tokens: set[int]) -> None:
    assert kept(top_p=top_p) == tokens


def test_top_p_takes_no_more_than_needed_of_equal_tokens() -> None:
    assert len(kept(top_p=0.6, logits=torch.zeros(1, 4))) == 3
    assert len(kept(top_p=0.9, logits=LOGITS)) == 4


def test_top_p_counts_what_top_k_has_left() -> None:
    # After top_k = 2 the probabilities are 2/3 and 1/3, so the first alone reaches 0.6.
    assert kept(top_k=2, top_p=0.6) == {1}
    assert kept(top_k=2, top_p=0.7) == {1, 3}


def test_rows_are_filtered_on_their_own() -> None:
    logits = torch.stack((LOGITS[0], LOGITS[0].flip(0)))
    for filtered in (filter_logits(logits, 2, None), filter_logits(logits, None, 0.7)):
        assert (filtered > -INF).nonzero().tolist() == [[0, 1], [0, 3], [1, 1], [1, 3]]


@pytest.mark.parametrize(
    "options", [SamplingOptions(0), SamplingOptions(1.0, top_k=1), SamplingOptions(1.0, top_p=0.1)]
)
def test_three_ways_to_the_most_likely_token(options: SamplingOptions) -> None:
    generator = torch.Generator().manual_seed(0)
    assert sample(LOGITS.repeat(50, 1), options, generator).tolist() == [[1]] * 50


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-45, 1e-300])
def test_a_tiny_temperature_is_as_good_as_greedy(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    assert sample(LOGITS.repeat(20, 1), SamplingOptions(temperature), generator).tolist() == [[1]] * 20


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (SamplingOptions(1.0), [2, 8, 1, 4, 1]),
        (SamplingOptions(1.0, top_k=3), [1, 4, 0, 2, 0]),
        (SamplingOptions(1.0, top_p=0.8), [1, 4, 0, 2, 0]),
        (SamplingOptions(0.5, top_k=3), [1, 16, 0, 4, 0]),  # temperature 1/2 squares the odds
        (SamplingOptions(0.5), [4, 64, 1, 16, 1]),
    ],
)
def test_sampled_frequencies_are_those_of_the_filtered_softmax(options: SamplingOptions, expected: list[int]) -> None:
    draws = 20_000
    tokens = sample(LOGITS.repeat(draws, 1), options, torch.Generator().manual_seed(5))
    assert tokens.shape == (draws, 1)
    counts = torch.bincount(tokens.flatten(), minlength=5).double()
    wanted = torch.tensor(expected, dtype=torch.float64)
    assert (counts[wanted == 0] == 0).all()
    means = (wanted / wanted.sum() * draws)[wanted > 0]
    chi_square = ((counts[wanted > 0] - means) ** 2 / means).sum()
    assert chi_square < 18.5  # the 99.9 % point for 4 degrees of freedom


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -0.1},
        {"temperature": INF},
        {"temperature": float("nan")},
        {"top_k": 0},
        {"top_k": -5},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"top_p": -0.5},
        {"top_p": float("nan")},
    ],
    ids=str,
)
def test_an_option_out_of_bounds_is_an_error_that_names_it(settings: dict[str, Any]) -> None:
    ((name, value),) = settings.items()
    with pytest.raises(GenerationError, match=name.replace("_", "-")) as caught:
        SamplingOptions(**settings)
    assert str(value) in str(caught.value)
    assert isinstance(caught.value, UserError)


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 1e9}, {"top_k": 1}, {"top_p": 1.0}], ids=str)
def test_options_at_their_bounds_are_accepted(settings: dict[str, Any]) -> None:
    token = sample(LOGITS, SamplingOptions(**settings), torch.Generator().manual_seed(0))
    assert 0 <= int(token) < 5
