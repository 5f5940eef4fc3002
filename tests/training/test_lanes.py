"""Updates in lanes have the same bits for any number of ranks, which are threads here."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from data import BatchSampler, load_corpus
from model import LanguageModel
from utils.config.loader import LoadedConfig
from utils.config.settings import Config, DataConfig, ModelConfig, TrainConfig
from utils.errors import UserError
from utils.inference.evaluation import BatchLoss, estimate_loss
from utils.machine.board import Board
from utils.machine.ranks import Ranks
from utils.machine.signals import StopRequest
from utils.terminal.cli import Parser
from utils.terminal.config_flags import parse_experiment
from utils.terminal.console import Terminal
from utils.training.agreement import agree, check_same
from utils.training.compiler import Loss
from utils.training.lanes import GradientSum, Tree, lane_seed, tree_sum
from utils.training.launch import launch_facts
from utils.training.setup import check_ranks, make_setup
from utils.training.state import build_state


@dataclass
class Meeting:
    """The tensors that the ranks, which are threads, have contributed to each sum."""

    world_size: int
    parts: dict[Any, list[torch.Tensor]] = field(default_factory=dict)
    lock: threading.Condition = field(default_factory=threading.Condition)


class Sum:
    """A pending sum, complete once all members have started it."""

    def __init__(self, meeting: Meeting, key: Any, members: int, tensor: torch.Tensor) -> None:
        self.meeting, self.key, self.members, self.tensor = meeting, key, members, tensor
        with meeting.lock:
            meeting.parts.setdefault(key, []).append(tensor.clone())
            meeting.lock.notify_all()

    def wait(self, timeout: timedelta = timedelta()) -> None:
        with self.meeting.lock:
            assert self.meeting.lock.wait_for(lambda: len(self.meeting.parts[self.key]) == self.members, 30)
        first, *others = self.meeting.parts[self.key]  # in the order of arrival, which varies
        total = first.clone()
        for other in others:
            total += other
        self.tensor.copy_(total)

    def is_completed(self) -> bool:
        return len(self.meeting.parts[self.key]) == self.members


@dataclass
class ThreadRanks(Ranks):
    meeting: Meeting = field(default_factory=lambda: Meeting(1))
    counts: dict[Any, int] = field(default_factory=dict)

    def start_sum(self, tensor: torch.Tensor, level: int | None) -> Sum:
        group = (None,) if level is None else (level, self.rank & ~(1 << level))
        number = self.counts[group] = self.counts.get(group, 0) + 1
        members = self.world_size if level is None else 2
        return Sum(self.meeting, (*group, number), members, tensor)

    def wait(self, work: Any) -> None:
        work.wait()


def on_ranks(world_size: int, action: Callable[[Ranks], Any]) -> list[Any]:
    """The results of `action` on each of several ranks."""
    meeting = Meeting(world_size)
    ranks = [ThreadRanks(rank, rank, world_size, "threads", meeting=meeting) for rank in range(world_size)]
    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(action, ranks))


def reference(values: list[torch.Tensor]) -> torch.Tensor:
    """((0 + 1) + (2 + 3)), by recursion."""
    half = len(values) // 2
    return values[0] if not half else reference(values[:half]) + reference(values[half:])


@pytest.mark.parametrize("lanes", [1, 2, 4, 8])
def test_lanes_are_added_in_one_binary_tree(lanes: int) -> None:
    values = [10.0 ** torch.randn(1000) for _ in range(lanes)]  # in another order the last bits differ
    tree = Tree()
    for value in values[:-1]:
        tree.add([value.clone()])
    found = tree.with_last(0, values[-1].clone())
    assert found is not None
    assert torch.equal(found, reference(values))
    assert torch.equal(tree_sum(torch.stack(values)[:, 0]), found[0])
    assert len(tree._sums) <= lanes.bit_length()
    if lanes == 8:
        assert not torch.equal(found, sum(values[1:], values[0]))


def gradients_of(ranks: Ranks, lanes: int, skipped: dict[int, set[int]]) -> list[torch.Tensor | None]:
    """The gradients of three parameters, summed over lanes; `skipped` lists the unused parameters of each lane."""
    generator = torch.Generator().manual_seed(1)
    parameters = [nn.Parameter(torch.zeros(n)) for n in (5, 70, 3)]
    values = [[10.0 ** torch.randn(len(p), generator=generator) for p in parameters] for _ in range(lanes)]
    for of_lane in values:
        of_lane[0][0] = -0.0
    total = GradientSum(parameters, ranks, exact=True) if ranks.several else None
    tree, own = Tree(), lanes // ranks.world_size
    for lane in range(ranks.rank * own, (ranks.rank + 1) * own):
        used = [i for i in range(3) if i not in skipped.get(lane, set())]
        is_last = lane == (ranks.rank + 1) * own - 1
        if is_last and total is not None:
            total.begin(tree)
        loss = sum((parameters[i] * values[lane][i]).sum() for i in used)
        if isinstance(loss, torch.Tensor):
            loss.backward()
        if is_last:
            break
        tree.add([p.grad for p in parameters])
        for p in parameters:
            p.grad = None
    if total is None:
        return [tree.with_last(i, p.grad) for i, p in enumerate(parameters)]
    total.finish()
    return [p.grad for p in parameters]


@pytest.mark.parametrize(
    "skipped",
    [{}, {0: {0}}, {3: {0, 1}}, {7: {0, 1, 2}}, {lane: {1} for lane in range(8)}, {0: {0, 1}, 1: {0, 2}, 6: {2}}],
)
def test_several_ranks_sum_to_the_bits_of_one_rank(
    skipped: dict[int, set[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing gradient counts as zeros, unless it is missing in every lane; then the parameter has none."""
    monkeypatch.setattr("utils.training.lanes.BUCKET_BYTES", 64)
    alone = gradients_of(Ranks(), 8, skipped)
    for world_size in (2, 4, 8):
        for found in on_ranks(world_size, lambda ranks: gradients_of(ranks, 8, skipped)):
            for one, other in zip(alone, found, strict=True):
                assert (one is None) == (other is None)
                if one is not None and other is not None:
                    assert torch.equal(one.view(torch.int32), other.view(torch.int32))  # -0.0 is not 0.0


class Recorder(Ranks):
    """Rank 0 of 4, whose sums complete at once; records the level of each."""

    def __init__(self) -> None:
        super().__init__(0, 0, 4, "none")
        self.levels: list[int | None] = []

    def start_sum(self, tensor: torch.Tensor, level: int | None) -> Any:
        self.levels.append(level)
        return SimpleNamespace(is_completed=lambda: True)

    def wait(self, work: Any) -> None: ...


def test_sums_begin_during_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """All levels are summed early for every bucket except that of the last gradient."""
    monkeypatch.setattr("utils.training.lanes.BUCKET_BYTES", 64)
    layers, ranks, seen = [nn.Parameter(torch.ones(16)) for _ in range(3)], Recorder(), []
    total = GradientSum(layers, ranks, exact=True)
    layers[0].register_hook(lambda _: seen.extend(ranks.levels))
    total.begin(Tree())
    hidden = torch.ones(16)
    for layer in layers:
        hidden = hidden * layer
    hidden.sum().backward()
    assert seen == [0, 1, 0, 1]
    total.finish()
    assert ranks.levels == [0, 1, 0, 1, 0, 1, None]


def test_each_micro_step_has_its_own_seed() -> None:
    seeds = {lane_seed(*place) for place in itertools.product((0, 1), range(50), range(8))}
    assert len(seeds) == 2 * 50 * 8
    assert all(0 <= seed < 2**63 for seed in seeds)


def stop_on(ranks: Ranks, requests: dict[int, StopRequest]) -> StopRequest:
    stop = requests.get(ranks.rank, StopRequest())
    agree(stop, ranks)
    return stop


@pytest.mark.parametrize(
    ("requests", "signum"),
    [({}, None), ({2: StopRequest(signum=15, reason="SIGTERM")}, 15), ({1: StopRequest(save=True)}, None)],
)
def test_ranks_agree_to_stop_or_to_save(requests: dict[int, StopRequest], signum: int | None) -> None:
    for rank, stop in enumerate(on_ranks(4, lambda ranks: stop_on(ranks, requests))):
        assert bool(stop) == (signum is not None)
        assert (stop.signum or stop.signum_of_others) == signum
        assert stop.signum is None or rank == 2  # a later signal to another rank counts as its first
        assert (stop.save, stop.save_due) == (False, 1 in requests)


def test_an_evaluation_has_the_same_bits_on_any_number_of_ranks(tmp_path: Path, tiny_corpus: Path) -> None:
    config = DataConfig(dataset=str(tiny_corpus))
    corpus = load_corpus(config, 8, tmp_path / "corpora")
    model = LanguageModel(ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=8), corpus.tokenizer.vocab_size)
    sampler = BatchSampler(corpus, 8, 6, 0, torch.device("cpu"))
    seen = []

    def losses(ranks: Ranks) -> dict[str, float]:
        watch = lambda done, total: seen.append((ranks.rank, done, total)) is None  # noqa: E731
        return estimate_loss(BatchLoss(model.eval(), contextlib.nullcontext), sampler, 1000, 2, watch, ranks)

    (alone,) = on_ranks(1, losses)
    for world_size in (2, 4):
        seen.clear()
        assert on_ranks(world_size, losses) == [alone] * world_size
        rounds = [{place for place in seen if place[0] == rank} for rank in range(world_size)]
        assert (
            len({len(of_rank) for of_rank in rounds}) == 1
        )  # as many batches on each rank, so that all can stop at the same one


@pytest.mark.parametrize(
    ("train", "count", "message"),
    [
        ({"batch_size": 9}, 2, "2 ranks cannot share a batch of 9 sequences"),
        ({"batch_size": 12, "gradient_accumulation_steps": 3}, 2, "2 ranks cannot share 3 micro-steps"),
        ({"batch_size": 8, "lanes": 2}, 4, "4 ranks cannot share 2 lanes"),
        ({"batch_size": 12, "lanes": 4}, 3, "3 ranks cannot share 4 lanes"),
    ],
)
def test_ranks_that_cannot_share_the_work_are_refused(train: dict[str, int], count: int, message: str) -> None:
    loaded = LoadedConfig.from_config(Config(train=TrainConfig(**train)))
    check_ranks(loaded, Ranks())
    with pytest.raises(UserError, match=message):
        check_ranks(loaded, Ranks(world_size=count))


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"batch_size": 12, "lanes": 3}, "lanes .3. must be a power of two"),
        ({"batch_size": 12, "lanes": 8}, "lanes .8. must divide batch_size .12."),
        ({"batch_size": 12, "lanes": 4, "gradient_accumulation_steps": 6}, "one must divide the other"),
    ],
)
def test_lanes_that_do_not_fit_the_batch_are_refused(train: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**train)


def test_a_rank_with_other_code_or_settings_is_named() -> None:
    facts = launch_facts(["--seed", "1"])
    check_same([facts, dict(facts)])
    for theirs, message in (
        (launch_facts(["--seed", "2"]), "rank 1 .*: seed is 2, and 1 on rank 0"),
        (facts | {"code": "f" * 64}, "rank 1 .* has another version of the code"),
        (facts | {"torch": "1.0"}, "rank 1 .* has another version of torch: 1.0"),
        ({"error": "unknown flag --x"}, "rank 1 .*: unknown flag --x"),
    ):
        with pytest.raises(UserError, match=message):
            check_same([facts, theirs])


def test_the_board_tells_which_ranks_are_gone_and_which_are_behind() -> None:
    store = torch.distributed.HashStore()
    boards = [Board(store, rank, 3) for rank in range(3)]
    for board in boards:
        board.beat(0)
    boards[0].forget()
    assert boards[0].silent([1, 2], 60.0) == []  # just seen for the first time
    boards[0].count = boards[1].count = 7
    boards[2].busy = 1
    boards[1].beat(1)
    boards[2].beat(0)
    boards[0].silent([1, 2], 1.0)
    assert boards[0].never_seen([1, 2]) == []
    boards[0].forget()
    boards[0].silent([1, 2], 1.0)
    boards[1].beat(2)
    boards[0].silent([1, 2], 1.0)
    assert boards[0].never_seen([1, 2]) == [2]
    assert boards[0].behind(7) == []  # rank 2 is busy
    boards[2].busy = 0
    boards[2].beat(1)
    assert boards[0].behind(7) == [2]
    assert boards[1].post_first("failure", "one")
    assert not boards[2].post_first("failure", "two")
    assert (boards[0].read("failure"), boards[0].read("nothing")) == ("one", None)


@pytest.mark.parametrize(
    ("flags", "world_size", "sequences"),
    [
        ((), 1, 8),
        (("--gradient-accumulation-steps", "4"), 1, 2),
        (("--lanes", "4"), 1, 2),
        (("--lanes", "4"), 2, 2),
        (("--lanes", "2", "--gradient-accumulation-steps", "8"), 1, 1),
        ((), 2, 4),
        (("--gradient-accumulation-steps", "4"), 2, 2),
    ],
)
def test_the_trial_compilation_has_the_shape_of_a_micro_step(
    flags: tuple[str, ...],
    world_size: int,
    sequences: int,
    tiny_argv: Callable[..., list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: list[tuple[int, int]] = []

    def compiled(model: LanguageModel, _device: torch.device, _mode: str, tokens: int) -> Loss:
        def loss(idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            found.append((len(idx), tokens))
            return model.loss(idx, targets)

        return loss

    monkeypatch.setattr("utils.training.state.compiled_loss", compiled)
    words = tiny_argv("--compile", "--batch-size", "8", "--block-size", "8", *flags)
    setup = make_setup(parse_experiment(words, Parser(prog="train.py")).load(), tmp_path)
    ranks = Ranks(rank=0, world_size=world_size)
    build_state(setup.config, 6, setup.corpus, setup.device, setup.dtype, Terminal(quiet=True), ranks)
    assert found == [(sequences, 8 * sequences)]
