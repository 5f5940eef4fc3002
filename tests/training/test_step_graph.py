"""A recorded update equals an eager one. Without CUDA nothing is captured, and all other code of the recording runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import utils.training.feed as feed
import utils.training.step_graph as step_graph
from utils.inference.static import StaticDecoders
from utils.optim.schedules import apply_schedules
from utils.training.callbacks import Callback
from utils.training.evaluate import sample_text
from utils.training.feed import Feed
from utils.training.state import TrainState, capture
from utils.training.step import EagerUpdate, PhaseClock, Update, no_phase
from utils.training.step_graph import GraphUpdate, Recording, make_update

NewState = Callable[..., TrainState]


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    """The recordings that are made in the test."""
    made: list[Recording] = []
    init = Recording.__init__
    monkeypatch.setattr(Recording, "__init__", lambda self, state: (made.append(self), init(self, state))[1])
    return made


def step(state: TrainState, update: Update, phase: Any = no_phase) -> tuple[float, list[float]]:
    apply_schedules(state.optimizer, state.step, state.config.optimizer, state.max_iters)
    loss, grad_norms = update.gradients(phase)
    assert any(parameter.grad is not None for parameter in state.model.parameters())
    update.apply(grad_norms)
    return loss.item(), grad_norms.tolist()


def contents(state: TrainState) -> dict[str, torch.Tensor]:
    weights, optimizer, _ = capture(state)
    return {name: tensor.clone() for name, tensor in (weights | optimizer).items()}


def no_warning(message: str) -> None:
    raise AssertionError(message)


@pytest.mark.parametrize(
    "words",
    [
        ("--dropout", "0.2"),
        ("--optimizer-name", "muon", "--weight-decay-schedule", "linear", "--momentum-warmup-iters", "4"),
        ("--gradient-accumulation-steps", "2", "--grad-clip", "0.1"),
    ],
)
def test_recorded_updates_equal_eager_ones(words: tuple[str, ...], new_state: NewState) -> None:
    runs = []
    for make in (EagerUpdate, lambda state: GraphUpdate(state, no_warning)):
        state = new_state(*words)
        update = make(state)
        clock = PhaseClock(state.device)
        numbers = [step(state, update, clock if index == 3 else no_phase) for index in range(6)]
        runs.append((numbers, contents(state)))
    (numbers, tensors), (recorded_numbers, recorded_tensors) = runs
    assert recorded_numbers == numbers
    for name, tensor in tensors.items():
        assert torch.equal(recorded_tensors[name], tensor), name


@pytest.mark.parametrize("on_device", [True, False])
def test_a_feed_yields_the_batches_of_the_sampler(
    on_device: bool, new_state: NewState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "ON_DEVICE", 1 << 28 if on_device else 0)
    sampler = new_state().sampler
    batches = Feed(sampler, micro_steps=2)
    for update in (0, 1, 2, 7, 3):
        batches.load(update)
        for micro_step in range(2):
            expected = sampler.train_batch(update, micro_step, 2)
            for own, other in zip(batches.batch(micro_step), expected, strict=True):
                assert own.is_contiguous()
                assert torch.equal(own, other)


def test_a_changed_optimizer_setting_is_recorded_anew(new_state: NewState, recordings: list[Recording]) -> None:

    state = new_state()
    update = GraphUpdate(state, no_warning)
    for index in range(6):
        if index == 4:
            state.optimizer.param_groups[0]["betas"] = (0.5, 0.5)
        step(state, update)
    assert len(recordings) == 2


def move(weight: torch.Tensor) -> None:
    weight.data = weight.data.clone()


CHANGES: dict[str, Callable[[TrainState], object]] = {
    "nothing": lambda state: None,
    "frozen": lambda state: next(state.model.parameters()).requires_grad_(False),
    "moved": lambda state: move(next(state.model.parameters())),
    "no dropout": lambda state: setattr(state.model.blocks[0].mlp.resid_dropout, "p", 0.0),
    "no dropout in attention": lambda state: setattr(state.model.blocks[0].attention, "dropout", 0.0),
    "a window": lambda state: setattr(state.model.blocks[0].attention, "window", 4),
    "a block that is not trained": lambda state: state.model.blocks[0].eval(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_a_callback_changes_is_recorded_anew(
    change: str, new_state: NewState, recordings: list[Recording]
) -> None:

    state = new_state("--dropout", "0.2")
    state.callbacks = {"own": Callback()}
    update = GraphUpdate(state, no_warning)
    for index in range(6):
        if index == 4:
            CHANGES[change](state)
        step(state, update)
    assert len(recordings) == (1 if change == "nothing" else 2)


HOOKS: dict[str, Callable[[TrainState, Callable[..., None]], object]] = {
    "module": lambda state, hook: state.model.blocks[0].register_forward_hook(hook),
    "gradient": lambda state, hook: next(state.model.parameters()).register_hook(hook),
    "finished gradient": lambda state, hook: next(state.model.parameters()).register_post_accumulate_grad_hook(hook),
}


@pytest.mark.parametrize("place", HOOKS)
def test_a_hook_of_a_callback_ends_the_use_of_recordings(place: str, new_state: NewState) -> None:
    state, warnings, called = new_state(), list[str](), list[int]()
    state.callbacks = {"own": Callback()}
    update = GraphUpdate(state, warnings.append)
    for index in range(6):
        if index == 4:
            HOOKS[place](state, lambda *_: called.append(1))
        step(state, update)
    assert len(warnings) == 1
    assert "hooks" in warnings[0]
    assert len(called) == 2


@pytest.mark.parametrize("obstacle", ["hook", "optimizer", "cuda"])
def test_an_update_that_cannot_be_recorded_runs_eagerly_after_one_warning(
    obstacle: str, new_state: NewState, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, reference, warnings = new_state(), new_state(), list[str]()
    if obstacle == "hook":
        state.model.blocks[0].register_forward_hook(lambda *_: None)
    elif obstacle == "optimizer":
        for each in (state, reference):
            each.optimizer = torch.optim.AdamW(each.model.parameters(), lr=0.1)
            each.optimizer.param_groups[0] |= {"lr_scale": 1.0, "decays": True}
    else:

        def refuse(*_: object) -> None:
            raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors ...")

        monkeypatch.setattr(step_graph, "capture_graph", refuse)
    update = GraphUpdate(state, warnings.append)
    numbers = [step(state, update) for _ in range(5)]
    assert numbers == [step(reference, EagerUpdate(reference)) for _ in range(5)]
    (warning,) = warnings
    reasons = {"hook": "hooks", "optimizer": "AdamW", "cuda": "not permitted when stream is capturing"}
    assert reasons[obstacle] in warning
    assert "\n" not in warning


def test_the_memory_of_a_recording_is_measured_before_the_optimizer_has_its_state(
    new_state: NewState, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, warnings = new_state(), list[str]()
    update = GraphUpdate(state, warnings.append)
    gigabyte, used, peak = 10**9, [2], [40]  # the peak is of an earlier training in this process

    def eager(_phase: Any) -> tuple[torch.Tensor, torch.Tensor]:
        peak[0] = max(peak[0], used[0] + 6)  # the gradients and what they are computed from
        return torch.zeros(()), torch.zeros(1)

    monkeypatch.setattr(state, "device", torch.device("cuda"))
    monkeypatch.setattr(update._eager, "gradients", eager)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: used[0] * gigabyte)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: used[0] * gigabyte)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: peak[0] * gigabyte)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: peak.__setitem__(0, used[0]))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10 * gigabyte, 16 * gigabyte))
    update.gradients(no_phase)
    used[0] = 6  # with the moments of Adam
    update.gradients(no_phase)
    (warning,) = warnings
    assert "it would keep 6.0 GB, evaluations need as much, and 10.0 GB are free" in warning


def test_static_decoders_sample_the_same_text_as_the_loop(new_state: NewState) -> None:
    state = new_state("--sample-tokens", "40")
    expected = sample_text(state)
    state.decoders = StaticDecoders()
    assert sample_text(state) == expected
    with torch.no_grad():
        state.model.token_embedding.weight.mul_(1.5)
    changed = sample_text(state)
    assert changed != expected
    state.decoders = None
    assert changed == sample_text(state)


def test_only_cuda_records(new_state: NewState) -> None:
    assert isinstance(make_update(new_state(), no_warning), EagerUpdate)
