"""Static decoding: the same tokens as the loop of generate_blocks, without reading numbers on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model import LanguageModel
from tests.inference.test_decode import BLOCK, GREEDY, PROMPTS, SETTINGS, lively_model
from utils.inference import graphs, static
from utils.inference.decode import generate_blocks
from utils.inference.sampling import AHEAD, SamplingOptions
from utils.inference.static import TOKENS_A_BLOCK, StaticDecoders, bucket

ALL_OPTIONS = SamplingOptions(0.9, top_k=9, top_p=0.95, min_p=0.01, repetition_penalty=1.3, banned=(3, 5))
EACH_OPTION = [
    GREEDY,
    SamplingOptions(1.0),
    SamplingOptions(1.0, top_k=4),
    SamplingOptions(1.0, top_p=0.7),
    SamplingOptions(1.0, min_p=0.1),
    SamplingOptions(0.0, repetition_penalty=1.5, banned=(1, 2)),
    ALL_OPTIONS,
]


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes several buckets fit into the tiny context."""
    monkeypatch.setattr(static, "SMALLEST_BUCKET", 2)


def both_ways(
    model: LanguageModel, prompts: Sequence[list[int]], count: int, options: SamplingOptions, decoders: StaticDecoders
) -> list[tuple[list[list[int]], list[list[float]], int]]:
    """Tokens, log-probabilities and total context, of the loop and of the static decoder."""
    seeds, results = range(7, 7 + len(prompts)), []
    for blocks in (
        generate_blocks(model, prompts, count, options, seeds),
        decoders.generate(model, prompts, count, options, seeds),
    ):
        tokens: list[list[int]] = [[] for _ in prompts]
        chances: list[list[float]] = [[] for _ in prompts]
        contexts = 0
        for block in blocks:
            for row in range(len(prompts)):
                tokens[row] += block.tokens[row]
                chances[row] += block.logprobs[row]
            contexts += block.context
        results.append((tokens, chances, contexts))
    return results


def assert_same(*arguments: Any) -> None:
    loop, found = both_ways(*arguments)
    assert found[0] == loop[0]
    for one, other in zip(found[1], loop[1], strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert found[2] == loop[2]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("options", [GREEDY, ALL_OPTIONS], ids=["greedy", "all options"])
def test_the_tokens_equal_those_of_the_loop_past_the_window(settings: str, options: SamplingOptions) -> None:
    model, decoders = lively_model(**SETTINGS[settings]).double(), StaticDecoders()
    for prompts in (PROMPTS, [[1, 2]], PROMPTS):
        assert_same(model, prompts, 3 * BLOCK + 1, options, decoders)


@pytest.mark.parametrize("options", EACH_OPTION, ids=str)
def test_each_option_has_the_same_effect_as_in_the_loop(options: SamplingOptions) -> None:
    assert_same(lively_model(position="rope").double(), PROMPTS[:3], 2 * BLOCK, options, StaticDecoders())


@pytest.mark.parametrize("count", [1, 2, TOKENS_A_BLOCK, TOKENS_A_BLOCK + 1, TOKENS_A_BLOCK + 2, AHEAD + 3])
def test_as_many_tokens_are_generated_as_asked_for(count: int) -> None:
    assert_same(lively_model(position="rope").double(), PROMPTS[:2], count, SamplingOptions(1.0), StaticDecoders())


@pytest.mark.parametrize("block_size", [1, 2, 7])
def test_windows_of_odd_sizes_slide_as_in_the_loop(block_size: int) -> None:
    for position in ("rope", "learned"):
        model = lively_model(position=position, block_size=block_size).double()
        assert_same(model, [[3, 1], [2]], 20, SamplingOptions(1.0), StaticDecoders())


def test_the_first_token_comes_alone_and_the_rest_in_blocks() -> None:
    blocks = StaticDecoders().generate(lively_model(), [[1], [2]], 2 * TOKENS_A_BLOCK + 3, GREEDY, [0, 0])
    assert [len(block.tokens[0]) for block in blocks] == [1, TOKENS_A_BLOCK, TOKENS_A_BLOCK, 2]


def test_a_decoder_is_reused_for_its_batch_size_until_weights_are_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    class Counted(static.StaticDecoder):
        def __init__(self, model: LanguageModel, batch_size: int) -> None:
            made.append(batch_size)
            super().__init__(model, batch_size)

    monkeypatch.setattr(static, "StaticDecoder", Counted)
    model, decoders = lively_model(), StaticDecoders()
    for size in (1, 2, 1, 2):
        list(decoders.generate(model, [[1]] * size, 3, GREEDY, range(size)))
    assert made == [1, 2]
    with torch.no_grad():
        model.final_norm.weight.mul_(-1)  # a change in place needs no new decoder
    assert_same(model, [[1]], 5, GREEDY, decoders)
    assert made == [1, 2]
    model.final_norm.weight = torch.nn.Parameter(-model.final_norm.weight)
    assert_same(model, [[1]], 5, GREEDY, decoders)
    assert made == [1, 2, 1]
    for size in range(3, 3 + graphs.MOST_IDLE):
        list(decoders.generate(model, [[1]] * size, 1, GREEDY, range(size)))
    list(decoders.generate(model, [[1]], 1, GREEDY, [0]))
    assert made[-1] == 1  # its decoder was dropped


def test_two_interleaved_texts_do_not_affect_each_other() -> None:
    model, decoders = lively_model(position="rope"), StaticDecoders()
    options = SamplingOptions(1.0)

    def rows(prompt: list[int]) -> list[Any]:
        return list(decoders.generate(model, [prompt], 20, options, [3]))

    alone = [rows([1]), rows([2, 3])]
    turns = zip(*(decoders.generate(model, [prompt], 20, options, [3]) for prompt in ([1], [2, 3])), strict=True)
    assert [list(side) for side in zip(*turns, strict=True)] == alone


def test_a_text_that_is_abandoned_does_not_affect_the_next() -> None:
    model, decoders = lively_model(position="learned").double(), StaticDecoders()
    blocks = decoders.generate(model, [[1, 2]], 50, ALL_OPTIONS, [3])
    next(blocks)
    next(blocks)
    blocks.close()
    assert_same(model, [[1, 2]], 20, ALL_OPTIONS, decoders)


def test_no_number_is_read_from_the_device_within_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a wait for the device")

    with torch.inference_mode():
        decoder = static.StaticDecoder(lively_model(position="rope"), 2)
        decoder.start([[1], [2, 3]], ALL_OPTIONS, [1, 2])
        for name in ("item", "tolist", "__int__", "__bool__", "__float__", "cpu"):
            monkeypatch.setattr(torch.Tensor, name, fail)
        for _ in range(2 * BLOCK):
            decoder.draw()
            decoder.decode()
        report = decoder.report(2 * BLOCK, 5)
        monkeypatch.undo()
        assert len(report.read().tokens[0]) == 2 * BLOCK


class Operators(TorchDispatchMode):
    """Collects the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(operator._schema.name.removeprefix("aten::"))
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("options", EACH_OPTION, ids=str)
def test_no_operator_of_a_graph_reads_the_device_or_copies_from_the_host(
    settings: str, options: SamplingOptions
) -> None:
    with torch.inference_mode():
        decoder = static.StaticDecoder(lively_model(**SETTINGS[settings]), 2)
        decoder.start([[1], [2, 3]], options, [1, 2])
        for _ in range(BLOCK + 1):  # including one-time preparations and steps beyond the context
            decoder.draw()
            decoder.decode()
        with Operators() as operators:
            decoder._draw()
            decoder._decode(BLOCK)
    assert {"index_copy_", "gather"} <= operators.names
    assert not operators.names & {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "lift_fresh"}


def test_a_step_that_cannot_be_recorded_runs_eagerly_after_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    model = lively_model(position="rope").double()
    monkeypatch.setattr(graphs, "capture_graph", refuse)
    with pytest.warns(RuntimeWarning, match="not permitted") as caught:
        assert_same(model, [[1, 2]], 2 * BLOCK, SamplingOptions(1.0), StaticDecoders())
    assert len(caught) == 1


def test_each_graph_is_recorded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = []

    def note(work: Any, device: torch.device) -> Any:
        recorded.append(work)
        return work

    monkeypatch.setattr(graphs, "capture_graph", note)
    model, decoders = lively_model(position="rope"), StaticDecoders()
    for _ in range(2):
        list(decoders.generate(model, [[1]], 3 * BLOCK, GREEDY, [0]))
    assert len(recorded) == 1 + 4  # sampling, buckets 2, 4 and 8, and past the context
    list(decoders.generate(model, [[1]], 3 * BLOCK, SamplingOptions(1.0), [0]))
    assert len(recorded) == 1 + 4 + 1


def test_attention_covers_a_power_of_two_of_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static, "SMALLEST_BUCKET", 256)
    assert [bucket(n, 1000) for n in (1, 256, 257, 512, 513, 1000, 5000)] == [256, 256, 512, 512, 1000, 1000, 1000]
    assert bucket(5, 8) == 8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("options", [GREEDY, ALL_OPTIONS], ids=["greedy", "all options"])
def test_cuda_graphs_give_the_tokens_of_the_loop(settings: str, options: SamplingOptions) -> None:
    model, decoders = lively_model(**SETTINGS[settings]).double().cuda(), StaticDecoders()
    for prompts in (PROMPTS, PROMPTS):  # recorded during the first call, replayed from the first token on in the second
        assert_same(model, prompts, 3 * BLOCK + 1, options, decoders)
