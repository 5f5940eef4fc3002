"""Generator: completions, batches, streams, questions, and statistics of their speed."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_export import BLOCK_SIZE, TOKENIZER, char_tokenizer, save_tiny_run, tiny_model
from tokenizer import TokenizerError
from utils.config.settings import InferenceConfig
from utils.errors import UserError
from utils.inference.decode import Block, generate_tokens, new_cache
from utils.inference.generator import Generator, Request
from utils.inference.quantization import weight_bytes, with_weights
from utils.inference.sampling import SamplingOptions
from utils.inference.static import TOKENS_A_BLOCK
from utils.inference.stats import GenerationStats
from utils.profiling.decoding import decode_bytes

GREEDY = SamplingOptions(temperature=0)
HOT = SamplingOptions(temperature=1.0)


@pytest.fixture
def generator() -> Generator:
    return Generator(tiny_model(), TOKENIZER)


def test_a_run_is_found_by_name(tmp_path: Path) -> None:
    save_tiny_run(tmp_path / "runs", "20260131_142501_first")
    save_tiny_run(tmp_path / "runs", "20260131_142502_second")
    found = Generator.from_run("first", tmp_path / "runs")
    assert found.name == "20260131_142501_first"
    expected = Generator(tiny_model(), TOKENIZER).generate("ab", Request(5, GREEDY))
    assert found.generate("ab", Request(5, GREEDY)).tokens == expected.tokens
    assert Generator.from_run(runs_dir=tmp_path / "runs").name == "20260131_142502_second"
    with pytest.raises(UserError, match="no run third"):
        Generator.from_run("third", tmp_path / "runs")


def test_weights_can_be_loaded_in_bfloat16(tmp_path: Path) -> None:
    save_tiny_run(tmp_path, "a")
    model = Generator.from_run("a", tmp_path, weights="bfloat16").model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_on_a_gpu_weights_are_bfloat16_and_scores_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_run(tmp_path, "a")
    float32 = Generator.from_run("a", tmp_path)
    assert float32.model.token_embedding.weight.dtype == torch.float32
    monkeypatch.setattr("utils.inference.generator.choose_weights", lambda weights, _: "bfloat16")  # as on a GPU
    generator = Generator.from_run("a", tmp_path)
    assert generator.model.token_embedding.weight.dtype == torch.bfloat16
    assert generator.score("abcdef").loss == pytest.approx(float32.score("abcdef").loss, rel=1e-6)
    chosen = Generator.from_run("a", tmp_path, weights="bfloat16")
    assert chosen.score("abcdef").loss != float32.score("abcdef").loss


@pytest.mark.parametrize("options", [GREEDY, HOT])
def test_a_diverged_model_is_refused(generator: Generator, options: SamplingOptions) -> None:
    with torch.no_grad():
        generator.model.final_norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="logits are NaN"):
        generator.generate("ab", Request(5, options))


def test_a_model_in_training_mode_is_refused(generator: Generator) -> None:
    generator.model.train()
    for use in (lambda: generator.generate("ab"), lambda: next(generator.stream("ab")), lambda: generator.score("abc")):
        with pytest.raises(UserError, match="in training mode"):
            use()


def test_a_batch_size_of_zero_is_refused(generator: Generator) -> None:
    with pytest.raises(UserError, match="batch_size must be at least 1"):
        generator.generate_batch(["ab"], batch_size=0)


def test_a_completion_has_the_tokens_of_generate_tokens(generator: Generator) -> None:
    completion = generator.generate("ab", Request(20, HOT, seed=3))
    tokens = list(generate_tokens(generator.model, TOKENIZER.encode("ab"), 20, HOT, seed=3))
    assert completion.tokens == tokens
    assert completion.text == TOKENIZER.decode(tokens)
    assert (completion.prompt, completion.finish, completion.seed) == ("ab", "length", 3)


@torch.no_grad()
def test_log_probabilities_are_those_of_the_model_before_any_filter(generator: Generator) -> None:
    request = Request(10, SamplingOptions(temperature=0.5, top_k=3, repetition_penalty=1.5, banned=(2, 3)))
    completion = generator.generate("ab", request)
    ids = TOKENIZER.encode("ab") + completion.tokens
    chances = generator.model(torch.tensor([ids[:-1]]))[0][0].log_softmax(-1)
    expected = [float(chances[1 + i, token]) for i, token in enumerate(completion.tokens)]
    assert completion.logprobs == pytest.approx(expected, abs=1e-4)


def test_the_stream_is_the_text_of_the_completion(generator: Generator) -> None:
    request = Request(30, HOT)
    parts = list(generator.stream("ab", request))
    assert len(parts) == 30
    assert "".join(parts) == generator.generate("ab", request).text


def test_sequence_i_of_a_call_draws_from_seed_plus_i_in_any_batch(generator: Generator) -> None:
    generator.model.double()
    prompts = ["ab", "", "the quick brown fox jumps", "z", "ab"]
    request = Request(25, HOT, seed=7)
    alone = [generator.generate(prompt, Request(25, HOT, seed=7 + i)) for i, prompt in enumerate(prompts)]
    for batch_size in (1, 2, 5, 16):
        together = generator.generate_batch(prompts, request, batch_size)
        assert [(c.prompt, c.tokens, c.text, c.seed) for c in together] == [
            (c.prompt, c.tokens, c.text, c.seed) for c in alone
        ]
    assert len({completion.text for completion in alone}) == len(prompts)


def test_a_completion_ends_at_a_stop_string_of_several_tokens(generator: Generator) -> None:
    whole = generator.generate("ab", Request(40, HOT)).text
    stop = whole[10:13]
    place = whole.find(stop)
    completion = generator.generate("ab", Request(40, HOT, stops=[stop]))
    assert (completion.text, completion.finish) == (whole[:place], "stop")
    assert len(completion.tokens) == len(completion.logprobs) == place + 3
    assert "".join(generator.stream("ab", Request(40, HOT, stops=[stop]))) == whole[:place]


def test_a_batch_ends_when_all_of_its_sequences_have(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    generator.model.double()
    whole = generator.generate_batch(["a", "b"], Request(40, HOT))
    stops = [whole[0].text[3:7], whole[1].text[20:24]]
    ended = generator.generate_batch(["a", "b"], Request(40, HOT, stops=stops))
    for before, after in zip(whole, ended, strict=True):
        assert after.finish == "stop"
        assert after.text == before.text[: min(before.text.find(stop) % 1000 for stop in stops)]
    generator.stats = GenerationStats()
    generator.generate_batch(["a", "b"], Request(40, HOT, stops=stops))
    assert generator.stats.steps + 1 == max(len(completion.tokens) for completion in ended) < 40


@pytest.mark.parametrize("packing", ["random", "documents", "none"])
def test_a_model_of_whole_documents_ends_its_text_at_end_of_text(packing: str) -> None:
    tokenizer = char_tokenizer(["\0", *TOKENIZER.decode(range(TOKENIZER.vocab_size))])
    model, request = tiny_model(tokenizer).double(), Request(40, HOT, stops=["zzz"])
    of_documents = Generator(model, tokenizer, training={"packing": packing})
    begins = "\0" if packing != "random" else ""
    prompts = ["ab", "b", "a?"]
    whole = Generator(model, tokenizer).generate_batch([begins + prompt for prompt in prompts], request)
    assert sum("\0" in completion.text for completion in whole) >= 2
    for blocks in (False, True):
        of_documents._is_static = blocks
        for before, after in zip(whole, of_documents.generate_batch(prompts, request), strict=True):
            text, end, _ = before.text.partition("\0") if begins else (before.text, "", "")
            assert (after.text, after.finish) == (text, "stop" if end else "length")
            assert after.tokens == tokenizer.encode(text + end)
            assert after.logprobs == pytest.approx(before.logprobs[: len(after.tokens)], abs=1e-5)
        assert "".join(of_documents.stream("ab", request)) == of_documents.generate("ab", request).text


def test_the_beginning_of_a_stop_string_is_text_if_end_of_text_follows() -> None:
    tokenizer = char_tokenizer(["\0", *TOKENIZER.decode(range(TOKENIZER.vocab_size))])
    of_documents = Generator(tiny_model(tokenizer), tokenizer, training={"packing": "documents"})
    whole = of_documents.generate("ab", Request(40, HOT))
    assert whole.finish == "stop"
    assert whole.text
    completion = of_documents.generate("ab", Request(40, HOT, stops=[whole.text[-1] + "\0", whole.text[-1] + "zz"]))
    assert (completion.text, completion.tokens) == (whole.text, whole.tokens)


def test_no_prompts_give_no_completions(generator: Generator) -> None:
    assert generator.generate_batch([]) == []


def test_an_empty_prompt_starts_from_a_line_break(generator: Generator) -> None:
    assert generator.generate("", Request(5, GREEDY)).text == generator.generate("\n", Request(5, GREEDY)).text


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_new_tokens": 0}, "max-new-tokens must be at least 1, not 0"),
        ({"window": "round"}, "window must be sliding or exact, not 'round'"),
        ({"stops": "ab"}, "stops must be several texts"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"seed": 2**63}, "seed must be"),
    ],
)
def test_a_request_out_of_bounds_is_refused(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        Request(**settings)


def test_the_largest_seed_works_for_several_sequences(generator: Generator) -> None:
    assert generator.generate_batch(["a", "a"], Request(1, seed=2**63 - 1))[1].seed == 2**63


def test_a_character_without_a_token_is_refused(generator: Generator) -> None:
    with pytest.raises(TokenizerError, match="'€'"):
        generator.generate_batch(["a", "€"])


def test_a_text_is_scored(generator: Generator) -> None:
    assert generator.score("abcd").tokens == 3


# ------------------------------------------------------------------------------ blocks, as on a GPU


@pytest.fixture
def by_blocks(generator: Generator) -> Generator:
    """A generator that decodes as on a GPU."""
    blocks = Generator(generator.model.double(), TOKENIZER)
    blocks._is_static = True
    return blocks


def test_decoding_in_blocks_gives_the_completions_of_single_steps(generator: Generator, by_blocks: Generator) -> None:
    prompts = ["ab", "", "the quick brown fox jumps", "z", "ab"]
    whole = generator.generate("ab", Request(60, HOT)).text
    for stops in ((), (whole[10:13],), (whole[15:17], whole[3:5])):
        request = Request(60, HOT, stops=stops)
        for one, other in zip(
            generator.generate_batch(prompts, request), by_blocks.generate_batch(prompts, request), strict=True
        ):
            assert (one.text, one.tokens, one.finish) == (other.text, other.tokens, other.finish)
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)
        assert "".join(by_blocks.stream("ab", request)) == generator.generate("ab", request).text


def test_a_stream_in_blocks_comes_in_few_pieces(by_blocks: Generator) -> None:
    parts = list(by_blocks.stream("ab", Request(1 + 3 * TOKENS_A_BLOCK, HOT)))
    assert [len(part) for part in parts] == [1, *[TOKENS_A_BLOCK] * 3]


def test_tokens_of_blocks_are_counted_like_those_of_steps(generator: Generator, by_blocks: Generator) -> None:
    for each in (generator, by_blocks):
        each.generate_batch(["abc", "a" * 30], Request(20, HOT))
    for name in ("prompt_tokens", "steps", "decoded", "attended", "proposed"):
        assert getattr(by_blocks.stats, name) == getattr(generator.stats, name), name
    by_blocks.stats = GenerationStats()
    whole = by_blocks.generate("ab", Request(60, HOT))
    by_blocks.stats = GenerationStats()
    completion = by_blocks.generate("ab", Request(60, HOT, stops=[whole.text[19:21]]))
    assert by_blocks.stats.decoded == len(completion.tokens) - 1  # tokens after the stop are dropped
    assert by_blocks.stats.steps == math.ceil(by_blocks.stats.decoded / TOKENS_A_BLOCK) * TOKENS_A_BLOCK


def test_an_exact_window_is_not_decoded_in_blocks(by_blocks: Generator, generator: Generator) -> None:
    request = Request(2 * BLOCK_SIZE, HOT, window="exact")
    assert by_blocks.generate("ab", request).tokens == generator.generate("ab", request).tokens


def test_a_diverged_model_is_also_refused_in_blocks(by_blocks: Generator) -> None:
    with torch.no_grad():
        by_blocks.model.final_norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="logits are NaN"):
        by_blocks.generate("ab", Request(5, HOT))


# ------------------------------------------------------------------------------ questions


def test_a_question_is_put_into_the_template_and_the_answer_ends_at_the_stop() -> None:
    settings = InferenceConfig(qa_template="Q: {question} {}\nA:", qa_stop="b")
    tokenizer = char_tokenizer([*TOKENIZER.decode(range(TOKENIZER.vocab_size)), "{", "}"])
    generator = Generator(tiny_model(tokenizer), tokenizer, settings=settings)
    prompt = "Q: what? {}\nA:"
    request = Request(60, HOT, stops=["zzzz"])
    whole = generator.generate(prompt, request).text
    assert "b" in whole
    answer = generator.generate_qa("what?", request)
    assert (answer.prompt, answer.text, answer.finish) == (prompt, whole[: whole.find("b")], "stop")
    assert generator.qa_request(request).stops == ("zzzz", "b")


def test_without_a_stop_string_an_answer_continues(generator: Generator) -> None:
    generator.settings = InferenceConfig(qa_template="{question}", qa_stop="")
    assert generator.generate_qa("ab", Request(30, HOT)) == generator.generate("ab", Request(30, HOT))


def test_a_template_that_the_model_cannot_read_is_named(generator: Generator) -> None:
    with pytest.raises(TokenizerError, match=r"'€' .* at position 1 "):
        generator.qa_prompt("a€")
    generator.settings = InferenceConfig(qa_template="<{question}>")
    with pytest.raises(UserError, match=r"qa_template '<{question}>': character '<'"):
        generator.qa_prompt("a")


# ------------------------------------------------------------------------------ speed


def test_the_statistics_count_the_tokens_that_the_model_saw(generator: Generator) -> None:
    generator.generate_batch(["abc", "a" * 30], Request(20, HOT))
    stats = generator.stats
    assert (stats.prompt_tokens, stats.steps, stats.decoded) == (3 + BLOCK_SIZE, 19, 2 * 19)
    assert stats.attended == sum(min(3 + i, BLOCK_SIZE) + BLOCK_SIZE for i in range(1, 20))
    assert stats.prefill_seconds > 0
    assert stats.decode_seconds > 0


@pytest.mark.parametrize("settings", [{}, {"position": "learned", "tie_embeddings": False, "ngram_rows": (7, 9)}])
def test_bytes_read_are_summed_over_the_steps(settings: dict[str, Any]) -> None:
    model = tiny_model(**settings)
    stats = GenerationStats()
    for context in (4, 5, 6):
        stats.add_block(Block([], [], 1, 2 * context), 2, 0.5)
    cache = new_cache(model, 2)
    assert stats.bytes_read(model) == sum(decode_bytes(model, cache, context) for context in (4, 5, 6))


def test_bytes_of_the_weights_are_counted_in_their_precision() -> None:
    model = tiny_model()
    parameters = model.num_parameters()
    assert weight_bytes(model) == 4 * parameters  # the embedding is also the head
    assert weight_bytes(with_weights(model, "bfloat16")) == 2 * parameters
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embedding" not in name]
    head = model.token_embedding.weight
    of_8_bits = sum(p.numel() + 2 * p.size(0) for p in [*matrices, head])
    vectors = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    assert weight_bytes(with_weights(model, "int8")) == of_8_bits + 2 * (vectors + head.size(1))
    learned = tiny_model(position="learned", tie_embeddings=False)
    tables = learned.token_embedding.weight.numel() + learned.position_embedding.weight.numel()
    assert weight_bytes(learned) == 4 * (learned.num_parameters() - tables + 2 * 16)


def test_speeds_are_reported(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("utils.inference.stats.read_limit", lambda _: 1e9)
    assert generator.stats.rows(generator.model) == [("prompt", "0 tokens")]
    stats = GenerationStats(100, 0.5, steps=10, decoded=20, decode_seconds=2.0, attended=0)
    rows = dict(stats.rows(generator.model))
    assert rows["prefill"] == "200 tokens/s, 500.0 ms"
    assert rows["decode"] == "10.0 tokens/s, 20 tokens"
    share = 5 * weight_bytes(generator.model) / 1e9
    assert f"{share:.2f} GB/s" in rows["memory"]
    assert f"{share:.0%} of the 1.0 GB/s" in rows["memory"]
    assert "memory" not in dict(stats.rows(generator.model, cached=False))


def test_the_defaults_in_code_equal_those_of_the_settings() -> None:
    assert Request() == Request.configured(InferenceConfig())


def test_without_a_request_a_generator_follows_its_settings(generator: Generator) -> None:
    generator.settings = InferenceConfig(max_new_tokens=7, temperature=0.5, top_k=3)
    expected = generator.generate("ab", Request(7, SamplingOptions(temperature=0.5, top_k=3)))
    assert generator.generate("ab") == expected
    assert "".join(generator.stream("ab")) == expected.text
