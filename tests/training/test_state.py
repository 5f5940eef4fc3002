"""Capture and restore: training continues bit for bit from a checkpoint on disk, or the checkpoint is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from data import load_corpus
from utils.checkpoints.files import Checkpoint, read_checkpoint, write_checkpoint
from utils.checkpoints.folder import CheckpointError
from utils.config.settings import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from utils.terminal.console import Terminal
from utils.training.state import (
    TrainState,
    branch,
    build_state,
    capture,
    load_weights,
    mismatch,
    random_states,
    restore,
    set_random_states,
)
from utils.training.step import clip_gradients, forward_backward, optimizer_step

CPU = torch.device("cpu")
Build = Callable[..., TrainState]


@pytest.fixture
def build(tmp_path: Path, tiny_corpus: Path) -> Build:
    """A tiny state on the CPU with dropout. Settings are given by section: `build(train={"seed": 1})`."""

    def make(seed: int = 0, **sections: dict[str, Any]) -> TrainState:
        small = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "dropout": 0.2}
        config = Config(
            data=DataConfig(**{"dataset": str(tiny_corpus)} | sections.get("data", {})),
            model=ModelConfig(**small | sections.get("model", {})),
            optimizer=OptimizerConfig(**sections.get("optimizer", {})),
            train=TrainConfig(**{"batch_size": 4, "max_iters": 100, "patience": 3} | sections.get("train", {})),
        )
        torch.manual_seed(seed)
        corpus = load_corpus(config.data, config.model.block_size, tmp_path / "corpora")
        return build_state(config, 100, corpus, CPU, torch.float32, Terminal(quiet=True))

    return make


def train_steps(state: TrainState, count: int) -> list[float]:
    """The losses of the next updates."""
    losses = []
    for _ in range(count):
        losses.append(forward_backward(state).item())
        clip_gradients(state)
        optimizer_step(state)
    return losses


def saved(state: TrainState, path: Path) -> Checkpoint:
    weights, tensors, facts = capture(state)
    write_checkpoint(path, weights, tensors, state.corpus.tokenizer.to_json(), facts)
    return read_checkpoint(path)


def weights_of(state: TrainState) -> list[list[float]]:
    return [parameter.flatten().tolist() for parameter in state.model.parameters()]


class Counter:
    """A callback with a state."""

    count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def test_training_with_dropout_continues_bit_for_bit(build: Build, tmp_path: Path) -> None:
    straight = build()
    train_steps(straight, 3)
    checkpoint = saved(straight, tmp_path / "step_000003")
    expected = train_steps(straight, 4)

    resumed = build(seed=99)
    restore(resumed, checkpoint)
    assert resumed.step == 3
    assert train_steps(resumed, 4) == expected
    assert weights_of(resumed) == weights_of(straight)


def test_everything_that_training_changes_is_restored(build: Build, tmp_path: Path) -> None:
    state = build()
    train_steps(state, 2)
    state.losses, state.losses_step = {"train/eval_loss": 3.1, "val/loss": 0.1 + 0.2}, 2
    state.best_val_loss, state.best_step, state.nonfinite_in_a_row = 0.1 + 0.2, 1, 5
    state.early_stopping.update(2.0)
    state.early_stopping.update(2.5)
    state.callbacks = {"counter": Counter()}
    state.callbacks["counter"].load_state_dict({"count": 7})
    checkpoint = saved(state, tmp_path / "step_000002")

    again = build(seed=1)
    again.callbacks = {"counter": Counter()}
    restore(again, checkpoint)
    for name in ("step", "losses", "losses_step", "best_val_loss", "best_step", "nonfinite_in_a_row", "early_stopping"):
        assert getattr(again, name) == getattr(state, name)
    assert again.early_stopping.without_improvement == 1
    assert again.callbacks["counter"].state_dict() == {"count": 7}


def test_a_state_before_any_evaluation_is_restored(build: Build, tmp_path: Path) -> None:
    state = build()
    train_steps(state, 1)
    again = build()
    restore(again, saved(state, tmp_path / "step_000001"))
    assert (again.losses, again.losses_step, again.best_val_loss, again.best_step) == (None, None, math.inf, None)


def test_capturing_changes_and_copies_nothing(build: Build) -> None:
    state = build()
    train_steps(state, 1)
    before = torch.get_rng_state()
    weights, tensors, _ = capture(state)
    assert torch.equal(torch.get_rng_state(), before)
    assert weights["token_embedding.weight"].data_ptr() == state.model.token_embedding.weight.data_ptr()
    moment = state.optimizer.state[state.model.token_embedding.weight]["exp_avg"]
    assert tensors["token_embedding.weight/exp_avg"].data_ptr() == moment.data_ptr()


def test_random_streams_continue() -> None:
    torch.manual_seed(5)
    states = random_states()
    expected = torch.rand(100)
    torch.manual_seed(6)
    set_random_states(states)
    assert torch.equal(torch.rand(100), expected)


def test_random_states_of_missing_devices_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    torch.manual_seed(5)
    states = random_states() | {"cuda": ["AAAA"], "mps": "AAAA"}
    expected = torch.rand(1)
    if not torch.backends.mps.is_available():
        set_random_states(states)
        assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        ({"model": {"n_layer": 2}}, "it is of another model: n_layer"),
        ({"model": {"dropout": 0.3}}, "it is of another model: dropout"),
        ({"data": {"unknown_token": "?"}}, "its tokenizer_hash is not that of this run"),
        ({}, ""),
    ],
)
def test_a_checkpoint_of_another_experiment_is_a_mismatch(
    build: Build, tmp_path: Path, sections: dict[str, Any], reason: str
) -> None:
    checkpoint, own = saved(build(**sections), tmp_path / "step_000001"), build()
    assert mismatch(checkpoint, own.config.model, own.corpus) == reason


def test_a_checkpoint_of_another_corpus_is_a_mismatch(build: Build, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("another text of the same experiment, and long enough\n" * 20)
    checkpoint, own = saved(build(data={"dataset": str(other)}), tmp_path / "step_000001"), build()
    assert mismatch(checkpoint, own.config.model, own.corpus) == "its corpus_hash is not that of this run"


def test_a_state_without_facts_is_a_mismatch(build: Build, tmp_path: Path) -> None:
    own = build()
    checkpoint = Checkpoint(**vars(saved(own, tmp_path / "step_000001")) | {"state": {"step": 1}})
    assert mismatch(checkpoint, own.config.model, own.corpus) == "state.json is damaged"


def test_weights_of_another_model_are_refused(build: Build, tmp_path: Path) -> None:
    checkpoint = saved(build(model={"block_size": 4, "n_layer": 2}), tmp_path / "step_000001")
    own = Checkpoint(
        **vars(checkpoint) | {"state": checkpoint.state | capture(build())[2]}
    )  # with the state.json of this model
    for take_over in (load_weights, restore, branch):
        with pytest.raises(CheckpointError) as caught:
            take_over(build(), own)
        message = str(caught.value)
        assert message.startswith(f"{checkpoint.path}: the weights are not those of this model: ")
        assert "position_embedding.weight has shape (4, 16), expected (8, 16)" in message or "more)" in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rng", {}),
        ("rng", {"cpu": "!", "cuda": []}),
        ("rng", {"cpu": "AAAA", "cuda": []}),
        ("optimizer", {}),
        ("optimizer", None),
        ("losses", {"val/loss": "x"}),
        ("best_val_loss", None),
        ("early_stopping", {}),
        ("callbacks", {}),
    ],
)
def test_unusable_facts_are_reported_as_damage(build: Build, tmp_path: Path, key: str, value: object) -> None:
    state = build()
    train_steps(state, 1)
    checkpoint = saved(state, tmp_path / "step_000001")
    checkpoint.state[key] = value
    again = build()
    again.callbacks = {"counter": Counter()}
    with pytest.raises(CheckpointError) as caught:
        restore(again, checkpoint)
    assert str(caught.value).startswith(f"{checkpoint.path}/state.json: damaged (")


def test_a_missing_tensor_of_the_optimizer_is_reported_as_damage(build: Build, tmp_path: Path) -> None:
    state = build()
    train_steps(state, 1)
    checkpoint = saved(state, tmp_path / "step_000001")
    del checkpoint.optimizer_tensors["final_norm.bias/exp_avg"]
    with pytest.raises(CheckpointError, match=r"step_000001/state\.json: damaged \(KeyError: 'final_norm"):
        restore(build(), checkpoint)


def test_fine_tuning_takes_the_weights_and_nothing_else(build: Build, tmp_path: Path) -> None:
    parent = build()
    train_steps(parent, 2)
    checkpoint = saved(parent, tmp_path / "step_000002")
    child = build(seed=1, optimizer={"learning_rate": 0.01})
    before = torch.get_rng_state()
    load_weights(child, checkpoint)
    assert weights_of(child) == weights_of(parent)
    assert (child.step, child.best_step, dict(child.optimizer.state)) == (0, None, {})
    assert torch.equal(torch.get_rng_state(), before)


def test_a_longer_context_takes_the_weights_of_a_rotary_model(build: Build, tmp_path: Path) -> None:
    parent = build(model={"position": "rope"})
    child = build(seed=1, model={"position": "rope", "block_size": 16})
    load_weights(child, saved(parent, tmp_path / "step_000001"))
    assert weights_of(child) == weights_of(parent)
    assert len(child.model.cos) == 16


def test_a_branch_continues_with_its_own_settings_and_best_loss(build: Build, tmp_path: Path) -> None:
    parent = build()
    train_steps(parent, 3)
    parent.best_val_loss, parent.best_step = 2.0, 3
    parent.early_stopping.update(2.0)
    checkpoint = saved(parent, tmp_path / "step_000003")
    settings = {"weight_decay": 0.3, "beta1": 0.5}
    child = build(seed=1, optimizer=settings, model={"dropout": 0.0}, train={"patience": 9})
    branch(child, checkpoint)
    assert child.step == 3
    assert weights_of(child) == weights_of(parent)
    assert (child.best_val_loss, child.best_step, child.early_stopping.best) == (math.inf, None, math.inf)
    groups = child.optimizer.param_groups
    assert [(group["weight_decay"], group["betas"][0]) for group in groups] == [(0.3, 0.5), (0.3, 0.5), (0.0, 0.5)]
    weight = child.model.token_embedding.weight
    moment = parent.optimizer.state[parent.model.token_embedding.weight]["exp_avg"]
    assert torch.equal(child.optimizer.state[weight]["exp_avg"], moment)


def test_a_branch_without_changes_repeats_its_parent_bit_for_bit(build: Build, tmp_path: Path) -> None:
    parent = build()
    train_steps(parent, 3)
    checkpoint = saved(parent, tmp_path / "step_000003")
    expected = train_steps(parent, 3)
    child = build(seed=1)
    branch(child, checkpoint)
    assert train_steps(child, 3) == expected


def test_a_branch_with_another_seed_has_its_own_random_streams(build: Build, tmp_path: Path) -> None:
    parent = build()
    train_steps(parent, 3)
    checkpoint = saved(parent, tmp_path / "step_000003")
    child = build(seed=1, train={"seed": 1})
    before = torch.get_rng_state()
    branch(child, checkpoint)
    assert torch.equal(torch.get_rng_state(), before)


def test_early_stopping_finishes_a_run(build: Build) -> None:
    state = build()
    assert not state.finished
    for _ in range(4):
        state.early_stopping.update(1.0)
    assert state.finished
    assert build().early_stopping.patience == 3


def test_switching_activation_checkpointing_on_resume_changes_no_bit(build: Build, tmp_path: Path) -> None:
    without = build()
    expected = train_steps(without, 6)
    state = build(train={"activation_checkpointing": True})
    first = train_steps(state, 3)
    checkpoint = saved(state, tmp_path / "step_3")
    resumed = build(seed=1)
    restore(resumed, checkpoint)
    assert [*first, *train_steps(resumed, 3)] == expected
    assert weights_of(resumed) == weights_of(without)


def test_fp8_applies_to_blocks_and_logits_and_not_to_parameters(build: Build) -> None:
    state, usual = build(train={"fp8": True}), build()
    assert state.model.fp8_logits
    assert "multiply" in vars(state.model.blocks[0].mlp.up)
    assert "multiply" not in vars(usual.model.blocks[0].mlp.up)
    assert weights_of(state) == weights_of(usual)
    assert not build(model={"n_embd": 18}, train={"fp8": True}).model.fp8_logits
