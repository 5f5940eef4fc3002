"""Speculative decoding: the text that the model alone would generate, in fewer passes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chi2

from model import LanguageModel
from tests.inference.test_decode import BLOCK, GREEDY, SETTINGS, VOCAB, lively_model
from tests.tiny_export import TOKENIZER, char_tokenizer, lively, save_tiny_run, tiny_model
from utils.config.settings import ModelConfig
from utils.errors import UserError
from utils.inference import speculative, static
from utils.inference.decode import generate_tokens
from utils.inference.generator import Generator, Request
from utils.inference.sampling import SamplingOptions
from utils.inference.speculative import NgramDraft, Speculators, judge, probabilities

CPU = torch.device("cpu")


def tiny_draft(**settings: Any) -> LanguageModel:
    torch.manual_seed(1)
    config = ModelConfig(**{"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": BLOCK} | settings)
    return lively(LanguageModel(config, VOCAB).double())


def generated(
    speculators: Speculators, model: LanguageModel, prompt: list[int], count: int, options: SamplingOptions, seed: int
) -> list[int]:
    blocks = speculators.generate(model, prompt, count, options, seed)
    return [token for block in blocks for token in block.tokens[0]]


# ------------------------------------------------------------------------------ the text of the model alone


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("draft", ["ngram", "itself", "rope", "learned"])
def test_greedy_tokens_equal_those_without_a_draft(settings: str, draft: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static, "SMALLEST_BUCKET", 2)
    model = lively_model(**SETTINGS[settings]).double()
    drafts = {"ngram": None, "itself": model}
    by = drafts[draft] if draft in drafts else tiny_draft(position=draft)
    options = SamplingOptions(temperature=0, repetition_penalty=1.2, banned=(2,))
    speculators = Speculators(by, 2)
    for prompt, chosen in (([5, 6, 5, 6, 5], GREEDY), ([3] * BLOCK, GREEDY), ([1, 2], options)):
        expected = list(generate_tokens(model, prompt, 3 * BLOCK, chosen, seed=0))
        assert generated(speculators, model, prompt, 3 * BLOCK, chosen, 0) == expected


@pytest.mark.parametrize("draft", ["ngram", "model", "model with fewer rows", "model with more rows"])
@pytest.mark.parametrize(
    "options", [SamplingOptions(1.0), SamplingOptions(0.7, top_k=4, repetition_penalty=1.5)], ids=["plain", "filtered"]
)
@torch.no_grad()
def test_the_distribution_equals_that_of_the_model_alone(draft: str, options: SamplingOptions) -> None:
    """Three tokens after a prompt, over many seeds, are compared with the exact probabilities."""
    vocab, runs, prompt = 4, 300, [0, 1, 0, 1]
    torch.manual_seed(3)
    models = []
    rows = {"model with fewer rows": vocab - 1, "model with more rows": vocab + 2}.get(draft, vocab)
    for width, vocab_size in ((8, vocab), (4, rows)):
        config = ModelConfig(n_layer=1, n_head=1, n_embd=width, block_size=16, position="rope", tie_embeddings=False)
        models.append(lively(LanguageModel(config, vocab_size), 0.5))
    model, small = models
    expected: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(3):
        longer = {}
        for tokens, chance in expected.items():
            seen = torch.zeros(1, vocab, dtype=torch.bool)
            seen[0, [*prompt, *tokens]] = True
            p = probabilities(model(torch.tensor([[*prompt, *tokens]]))[0][:, -1], options, seen)[0]
            longer |= {(*tokens, token): chance * float(p[token]) for token in range(vocab)}
        expected = longer
    speculators = Speculators(None if draft == "ngram" else small, 2)
    found = Counter(tuple(generated(speculators, model, prompt, 3, options, seed)) for seed in range(runs))
    likely = {tokens: chance for tokens, chance in expected.items() if chance * runs >= 5}
    rest = (runs - sum(found[t] for t in likely), runs * (1 - sum(likely.values())))
    pairs = [(found[t], runs * chance) for t, chance in likely.items()] + ([rest] if rest[1] >= 1 else [])
    statistic = sum((seen - wanted) ** 2 / wanted for seen, wanted in pairs)
    assert statistic < chi2.ppf(0.9999, len(pairs) - 1)
    assert len(pairs) > 8


def test_draws_after_a_rejection_correct_the_distribution() -> None:
    """Over a grid of all random numbers, the first token has the distribution of the model, not of the draft."""
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]], dtype=torch.float64)
    q = torch.tensor([[0.2, 0.2, 0.6]], dtype=torch.float64)
    grid = (torch.arange(20, dtype=torch.float64) + 0.5) / 20
    first = torch.zeros(3, dtype=torch.float64)
    for token in range(3):
        for u in grid:
            for v in grid:
                tokens, accepted = judge(p, q, torch.tensor([token]), torch.stack((u, v)))
                first[tokens[0]] += q[0, token] / len(grid) ** 2
                assert int(tokens[1]) in range(3)
                assert int(accepted) == 0 or int(tokens[0]) == token
    torch.testing.assert_close(first, p[0], atol=0.02, rtol=0)


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others() -> None:
    model, speculators = lively_model().double(), Speculators(tiny_draft(), 3)
    options = SamplingOptions(1.0)
    one, again, other = (generated(speculators, model, [1], 30, options, seed) for seed in (1, 1, 2))
    assert one == again != other


# ------------------------------------------------------------------------------ fewer passes


def test_all_tokens_are_accepted_if_the_draft_is_the_model_itself() -> None:
    model = lively_model(block_size=64).double()
    for options in (GREEDY, SamplingOptions(1.0)):
        blocks = list(Speculators(model, 4).generate(model, [1], 31, options, 0))
        assert [len(block.tokens[0]) for block in blocks] == [1, *[5] * 6]
        assert [(block.proposed, block.accepted) for block in blocks] == [(0, 0), *[(4, 4)] * 6]
        assert [block.context for block in blocks] == [1, *range(6, 32, 5)]


@torch.no_grad()
def test_log_probabilities_are_those_of_the_model() -> None:
    model = lively_model(block_size=64)
    blocks = list(Speculators(tiny_draft().float(), 3).generate(model, [1, 2], 20, SamplingOptions(0.8, 5), 0))
    tokens = [token for block in blocks for token in block.tokens[0]]
    chances = model(torch.tensor([[1, 2, *tokens[:-1]]]))[0][0].log_softmax(-1)
    expected = [float(chances[1 + place, token]) for place, token in enumerate(tokens)]
    assert [chance for block in blocks for chance in block.logprobs[0]] == pytest.approx(expected, abs=1e-4)


def test_the_last_occurrence_of_the_longest_n_gram_is_continued() -> None:
    draft = NgramDraft(3, CPU)

    def proposal(text: list[int]) -> list[int] | None:
        return draft.proposed.tolist() if draft.propose(text, torch.zeros(3)) else None

    draft.start(GREEDY)
    assert proposal([1, 2]) is None
    assert proposal([1, 2, 3, 4, 5, 9, 1, 2]) == [3, 4, 5]
    assert proposal([1, 2, 3, 4, 5, 9, 1, 2, 7, 8, 6, 1, 2]) == [7, 8, 6]
    assert proposal([1, 2, 3, 4, 5, 9, 1, 2, 7, 8, 6, 1, 2, 3]) == [4, 5, 9]  # 1 2 3 is longer than 2 3 and later 1 2
    draft.start(GREEDY)
    assert proposal([7, 8, 7, 8, 7, 8]) == [7, 8, 7]  # the text continues to repeat itself
    draft.start(GREEDY)
    assert proposal([1, 2, 3]) is None  # another text


def test_a_text_that_repeats_itself_takes_few_passes() -> None:
    model = lively_model(block_size=128)
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.zero_()  # the next token depends on the last one alone, so greedy text is a cycle
    generator = Generator(tiny_model(block_size=128), TOKENIZER, draft="ngram")
    blocks = list(Speculators(None, 5).generate(model, [1], 100, GREEDY, 0))
    assert len(blocks) < 50
    generator.generate("abababab", Request(20, GREEDY))
    assert generator.stats.proposed > 0


# ------------------------------------------------------------------------------ in a generator


def test_a_generator_reports_the_tokens_accepted_from_the_draft() -> None:
    helper = Generator(tiny_model(), TOKENIZER, "small")
    generator = Generator(tiny_model(), TOKENIZER, "large", draft=helper, draft_tokens=3)
    completion = generator.generate("ab", Request(13, GREEDY))
    assert completion.tokens == helper.generate("ab", Request(13, GREEDY)).tokens
    stats = generator.stats
    assert (stats.proposed, stats.accepted, stats.steps, stats.decoded) == (9, 9, 3, 12)
    rows = dict(stats.rows(generator.model))
    assert rows["draft"] == "100% of 9 proposed tokens accepted, 4.00 tokens a pass"
    assert "memory" not in rows
    assert "draft" not in dict(helper.stats.rows(helper.model))


def test_a_stop_string_ends_a_text_in_the_middle_of_a_pass() -> None:
    model = tiny_model()
    plain, fast = Generator(model, TOKENIZER), Generator(model, TOKENIZER, draft=Generator(model, TOKENIZER))
    whole = plain.generate("ab", Request(40, GREEDY)).text
    request = Request(40, GREEDY, stops=[whole[9:12]])
    found, expected = fast.generate("ab", request), plain.generate("ab", request)
    assert (found.text, found.tokens, found.finish) == (expected.text, expected.tokens, "stop")


def test_several_sequences_are_generated_one_by_one() -> None:
    generator = Generator(tiny_model(), TOKENIZER, draft="ngram")
    completions = generator.generate_batch(["ab", "c", ""], Request(10, GREEDY))
    expected = Generator(tiny_model(), TOKENIZER).generate_batch(["ab", "c", ""], Request(10, GREEDY))
    assert [c.tokens for c in completions] == [c.tokens for c in expected]
    with pytest.raises(UserError, match="one sequence at a time: batch_size must be 1, not 4"):
        generator.generate_batch(["ab", "c"], batch_size=4)
    with pytest.raises(UserError, match="a draft needs window sliding, not exact"):
        generator.generate("ab", Request(10, window="exact"))


def test_a_draft_with_another_tokenizer_is_refused_with_both_names() -> None:
    other = char_tokenizer("abc")
    helper = Generator(tiny_model(other), other, "small")
    with pytest.raises(UserError, match=r"small cannot draft for large: .* \(char, 3 tokens, not char, \d+ tokens\)"):
        Generator(tiny_model(), TOKENIZER, "large", draft=helper)


def test_more_draft_tokens_than_a_context_holds_are_refused() -> None:
    helper, large = Generator(tiny_model(block_size=4), TOKENIZER, "small"), tiny_model()
    with pytest.raises(UserError, match="draft-tokens must be at most 2, not 3: the draft sees only 4 tokens"):
        Generator(large, TOKENIZER, "large", draft=helper, draft_tokens=3)
    assert Generator(large, TOKENIZER, draft=helper, draft_tokens=2).generate("ab", Request(5)).tokens
    with pytest.raises(UserError, match="draft-tokens must be at most 14, not 15: the model sees only 16 tokens"):
        Generator(large, TOKENIZER, draft="ngram", draft_tokens=15)
    most = Generator(large, TOKENIZER, draft=Generator(large, TOKENIZER), draft_tokens=14)
    most.generate("a", Request(5))
    assert most.stats.proposed == 14


def test_a_draft_is_found_like_a_run(tmp_path: Path) -> None:
    save_tiny_run(tmp_path, "large")
    save_tiny_run(tmp_path, "small", n_layer=1)
    plain = Generator.from_run("large", tmp_path).generate("ab", Request(12, GREEDY))
    for draft in ("small", "ngram"):
        generator = Generator.from_run("large", tmp_path, draft=draft, draft_tokens=2)
        assert generator.generate("ab", Request(12, GREEDY)).tokens == plain.tokens
    with pytest.raises(UserError, match="no run tiny"):
        Generator.from_run("large", tmp_path, draft="tiny")


def test_the_default_of_draft_tokens_is_the_same_in_the_script_and_in_code() -> None:
    import inference

    parser = inference.Parser()
    inference.add_arguments(parser)
    assert parser.get_default("draft_tokens") == speculative.PROPOSED
