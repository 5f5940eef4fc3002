"""Continuous batching: a text does not depend on the others in its batch, and no slot is lost."""

from __future__ import annotations

import math
import random
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

from tests.tiny_export import TOKENIZER, char_tokenizer, tiny_model
from utils.inference.generator import Completion, Generator, Request
from utils.inference.sampling import SamplingOptions
from utils.serving.batch import Batch, Delivery
from utils.serving.chat import QuestionTemplate
from utils.serving.engine import Engine, QueueFullError
from utils.serving.openai import chat_jobs, completion_jobs
from utils.serving.schemas import ChatMessage, ChatRequest, CompletionRequest
from utils.serving.sequence import Job, Piece
from utils.serving.served import Served

PROMPTS = ["ab", "the quick brown fox jumps over", "z", "a?", "lazy dogs sleep", "Q: b", "hello there", "x y z"]
OPTIONS = [
    SamplingOptions(temperature=0),
    SamplingOptions(temperature=1.0),
    SamplingOptions(temperature=0.9, top_p=0.9, repetition_penalty=1.3),
    SamplingOptions(temperature=1.2, top_k=5),
]


def job(prompt: str, count: int = 20, options: SamplingOptions = OPTIONS[1], seed: int = 0, **more: Any) -> Job:
    return Job(TOKENIZER.encode(prompt), TOKENIZER, options, seed, count, **more)


def generator(**settings: Any) -> Generator:
    return Generator(tiny_model(**settings), TOKENIZER)


def text_of(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def drive(batch: Batch, jobs: Sequence[Job], gap: int = 0) -> dict[Job, list[Piece]]:
    """The pieces of all jobs, which join in turn, `gap` steps apart, as soon as a slot is free."""
    pieces: dict[Job, list[Piece]] = defaultdict(list)
    waiting = list(jobs)
    with torch.inference_mode():
        while waiting or len(batch):
            delivered: list[Delivery] = []
            if waiting and batch.has_room:
                delivered += batch.join(waiting.pop(0))
            for _ in range(1 + gap):
                delivered += batch.step() if len(batch) else []
            for a_job, piece in delivered:
                pieces[a_job].append(piece)
    return pieces


@pytest.mark.parametrize("settings", [{}, {"position": "learned"}, {"ngram_rows": (50, 40), "n_kv_head": 1}], ids=str)
def test_a_text_equals_that_of_the_generator_alone_whatever_joins_and_leaves(settings: dict[str, Any]) -> None:
    alone = generator(**settings)
    jobs, expected = [], []
    for index in range(12):
        prompt, options = PROMPTS[index % len(PROMPTS)], OPTIONS[index % len(OPTIONS)]
        count = 1 + 7 * index % 40  # beyond the context of 16 tokens
        jobs.append(job(prompt, count, options, seed=index))
        expected.append(alone.generate(prompt, Request(count, options, seed=index)))
    for slots, gap in ((3, 0), (8, 2)):
        batch = Batch(alone, slots)
        pieces = drive(batch, jobs, gap)
        for a_job, completion in zip(jobs, expected, strict=True):
            check_same(pieces[a_job], completion)
            a_job.__post_init__()
            a_job.generated = 0
        assert len(batch) == 0


def check_same(pieces: Sequence[Piece], completion: Completion) -> None:
    tokens = [token for piece in pieces for token in piece.tokens]
    assert [token.id for token in tokens] == completion.tokens
    assert text_of(pieces) == completion.text
    assert [token.logprob for token in tokens] == pytest.approx(completion.logprobs, abs=1e-4)
    assert [piece.finish for piece in pieces if piece.is_last] == [completion.finish]


def test_a_stop_string_ends_a_text_and_frees_its_slot() -> None:
    alone = generator()
    whole = alone.generate("ab", Request(30, OPTIONS[1], seed=3))
    stop = whole.text[10:12]
    expected = alone.generate("ab", Request(30, OPTIONS[1], stops=[stop], seed=3))
    a_job = job("ab", 30, seed=3, stops=[stop])
    pieces = drive(Batch(alone, 2), [job("z", 40), a_job])
    check_same(pieces[a_job], expected)
    assert expected.finish == "stop"


def test_a_model_of_whole_documents_ends_its_text_at_end_of_text() -> None:
    tokenizer = char_tokenizer(["\0", *TOKENIZER.decode(range(TOKENIZER.vocab_size))])
    alone = Generator(tiny_model(tokenizer), tokenizer, "run", training={"packing": "documents"})
    served = Served("run", alone, QuestionTemplate(alone), 0)
    sampling = {"model": "run", "max_tokens": 40, "seed": 1337, "temperature": 1}
    of_text = completion_jobs(CompletionRequest(prompt="ab", **sampling), served).jobs[0]
    of_chat = chat_jobs(ChatRequest(messages=[ChatMessage(role="user", content="ab")], **sampling), served).jobs[0]
    pieces = drive(Batch(alone, 2), [of_text, of_chat])
    request = Request(40, OPTIONS[1])
    for a_job, expected in ((of_text, alone.generate("ab", request)), (of_chat, alone.generate_qa("ab", request))):
        check_same(pieces[a_job], expected)
        assert expected.finish == "stop"
        assert expected.tokens[-1] == tokenizer.end_of_text


def test_each_token_of_a_prompt_is_scored_given_the_tokens_before_it() -> None:
    alone = generator()
    a_job = job("hello you", 0, top=3, scores_prompt=True)
    (scored, end) = drive(Batch(alone, 1), [a_job])[a_job]
    ids = TOKENIZER.encode("hello you")
    expected = alone.model(torch.tensor([ids]))[0][0].detach().log_softmax(-1)
    assert [token.id for token in scored.prompt] == ids
    assert scored.prompt[0].logprob is None
    for place, token in enumerate(scored.prompt[1:]):
        assert token.logprob == pytest.approx(float(expected[place, token.id]), abs=1e-5)
        values, best = expected[place].topk(3)
        assert [top[0] for top in token.top] == best.tolist()
        assert [top[1] for top in token.top] == pytest.approx(values.tolist(), abs=1e-5)
    assert (end.finish, end.tokens) == ("length", ())


def test_nan_logits_end_a_text_with_an_error() -> None:
    broken = generator()
    with torch.no_grad():
        broken.model.final_norm.weight.fill_(math.nan)
    a_job = job("ab")
    batch = Batch(broken, 1)
    assert "NaN" in (drive(batch, [a_job])[a_job][-1].error or "")
    assert len(batch) == 0


class Reader:
    """Collects the pieces that an engine delivers."""

    def __init__(self) -> None:
        self.pieces: dict[Job, list[Piece]] = defaultdict(list)
        self.changed = threading.Condition()

    def take(self, delivered: Sequence[Delivery]) -> None:
        with self.changed:
            for a_job, piece in delivered:
                self.pieces[a_job].append(piece)
            self.changed.notify_all()

    def wait(self, jobs: Sequence[Job]) -> None:
        def are_done() -> bool:
            return all(self.pieces[each] and self.pieces[each][-1].is_last for each in jobs)

        with self.changed:
            assert self.changed.wait_for(are_done, timeout=60)


@pytest.fixture
def reader() -> Reader:
    return Reader()


@pytest.fixture
def engine(reader: Reader) -> Iterator[Engine]:
    engine = Engine({"a": Batch(generator(), 3), "b": Batch(generator(position="learned"), 2)}, 5, reader.take)
    engine.start()
    yield engine
    engine.close()


def test_several_models_generate_at_the_same_time(engine: Engine, reader: Reader) -> None:
    jobs = {name: [job(prompt, 30, seed=9) for prompt in PROMPTS[:4]] for name in "ab"}
    for name, of_model in jobs.items():
        engine.submit(name, of_model)
    reader.wait([each for of_model in jobs.values() for each in of_model])
    for name, settings in (("a", {}), ("b", {"position": "learned"})):
        alone = generator(**settings)
        for prompt, each in zip(PROMPTS, jobs[name], strict=False):
            assert text_of(reader.pieces[each]) == alone.generate(prompt, Request(30, OPTIONS[1], seed=9)).text


def test_a_full_queue_refuses_jobs_until_others_are_cancelled(engine: Engine, reader: Reader) -> None:
    running = [job("ab", 10**9) for _ in range(3)]
    waiting = [job("ab", 1) for _ in range(5)]
    engine.submit("a", running)
    engine.submit("a", waiting)
    with pytest.raises(QueueFullError, match="waiting already; try again in 1 s") as full:
        engine.submit("a", [job("ab"), job("ab"), job("ab")])
    assert full.value.retry_after == 1
    engine.submit("b", [(other := job("ab", 1))])
    engine.cancel("a", running)
    reader.wait([*waiting, other])
    assert engine.queues["a"].counters.cancelled == 3
    assert engine.queues["a"].counters.finished == 5


def test_unfinished_jobs_fail_when_the_engine_closes(engine: Engine, reader: Reader) -> None:
    jobs = [job("ab", 10**9) for _ in range(5)]
    engine.submit("a", jobs)
    engine.close()
    assert {reader.pieces[each][-1].error for each in jobs} == {"the server is shutting down"}


def test_a_failure_of_the_model_ends_its_texts_and_the_engine_continues(
    engine: Engine, reader: Reader, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise RuntimeError("a kernel")

    first, second = job("ab", 10**9), job("ab", 5)
    with monkeypatch.context() as patch:
        patch.setattr(engine.queues["a"].batch, "step", fail)
        engine.submit("a", [first])
        reader.wait([first])
    engine.submit("a", [second])
    reader.wait([second])
    assert reader.pieces[first][-1].error == "the model failed: RuntimeError"
    assert reader.pieces[second][-1].finish == "length"


def test_a_prompt_that_fails_does_not_end_other_texts(
    engine: Engine, reader: Reader, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    batch, sound = engine.queues["a"].batch, job("ab", 200)
    join = batch.join

    def join_or_fail(newcomer: Job) -> list[Delivery]:
        if newcomer is not sound:
            raise RuntimeError("a kernel")
        return join(newcomer)

    monkeypatch.setattr(batch, "join", join_or_fail)
    engine.submit("a", [sound, bad := job("ab")])
    reader.wait([sound, bad])
    assert reader.pieces[bad][-1].error == "on this prompt: the model failed: RuntimeError"
    assert reader.pieces[sound][-1].finish == "length"
    assert "a kernel" in capsys.readouterr().err


def test_no_slot_is_lost_when_readers_cancel_at_random_times(engine: Engine, reader: Reader) -> None:
    chance = random.Random(0)
    queue, jobs = engine.queues["a"], []
    for index in range(200):
        each = job(chance.choice(PROMPTS), chance.randrange(1, 30), seed=index)
        while True:
            try:
                engine.submit("a", [each])
                break
            except QueueFullError:
                engine.cancel("a", chance.sample(jobs[-8:], k=2))
        jobs.append(each)
        if chance.random() < 0.3:
            engine.cancel("a", [chance.choice(jobs)])
    reader.wait([each for each in jobs if not each.cancelled])
    last = [job("ab", 10) for _ in range(3)]
    engine.submit("a", last)
    reader.wait(last)
    assert len(queue.batch) == len(queue.waiting) == 0
    assert queue.counters.failed == 0
