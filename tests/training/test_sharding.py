"""Sharded models on one rank, and the rows of each of several ranks; tests/test_sharded_run.py trains on two."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from data import load_corpus
from model import LanguageModel
from utils.checkpoints.files import read_checkpoint
from utils.checkpoints.folder import INDEX_FILE
from utils.checkpoints.index import rows_of
from utils.config.fields import config_hash
from utils.config.section import RuleError
from utils.config.settings import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from utils.errors import UserError
from utils.machine.ranks import Ranks
from utils.terminal.console import Terminal
from utils.training.sharding import Initialisation
from utils.training.state import TrainState, build_state, capture, own_weights, restore
from utils.training.step import no_phase
from utils.training.step_graph import make_update

CPU = torch.device("cpu")
Build = Callable[..., TrainState]
ALL_KINDS = {
    "tie_embeddings": False,
    "norm": "rmsnorm",
    "position": "rope",
    "mlp": "swiglu",
    "ngram_rows": (64, 32),
    "zero_init": True,
}


@pytest.fixture(scope="module", autouse=True)
def no_group_is_left() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def build(tmp_path: Path, tiny_corpus: Path) -> Build:
    """A tiny state with dropout in four lanes: `build("fsdp", optimizer={...})`."""

    def make(shard: str, seed: int = 0, **sections: dict[str, Any]) -> TrainState:
        small = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 8, "dropout": 0.2}
        lanes = {"batch_size": 8, "max_iters": 100, "lanes": 4, "gradient_accumulation_steps": 4, "shard": shard}
        config = Config(
            data=DataConfig(dataset=str(tiny_corpus)),
            model=ModelConfig(**small | sections.get("model", {})),
            optimizer=OptimizerConfig(**sections.get("optimizer", {})),
            train=TrainConfig(**lanes | sections.get("train", {})),
        )
        torch.manual_seed(seed)
        corpus = load_corpus(config.data, config.model.block_size, tmp_path / "corpora")
        return build_state(config, 100, corpus, CPU, torch.float32, Terminal(quiet=True))

    return make


def train(state: TrainState, count: int) -> list[float]:
    """The losses of the next updates."""
    update, losses = make_update(state, print), []
    for _ in range(count):
        loss, norms = update.gradients(no_phase)
        update.apply(norms)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("model", [{}, ALL_KINDS], ids=["default", "all kinds"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_sharded_model_trains_like_a_whole_one(build: Build, model: dict[str, Any], optimizer: str) -> None:
    """The initial weights are equal bit for bit; later numbers differ by the rounding of the norms."""
    states = []
    for shard in ("none", "fsdp"):
        states.append(build(shard, model=model, optimizer={"optimizer_name": optimizer}))
    whole, shards = states
    for before, after in zip(own_weights(whole).items(), own_weights(shards).items(), strict=True):
        assert before[0] == after[0]
        assert torch.equal(before[1], after[1])
    assert train(shards, 4) == pytest.approx(train(whole, 4), abs=1e-5)
    for name, weight in own_weights(whole).items():
        assert torch.allclose(own_weights(shards)[name], weight, atol=1e-5)


def test_initialisation_draws_as_many_random_numbers_as_for_a_whole_model(build: Build) -> None:
    after = []
    for shard in ("none", "fsdp"):
        build(shard)
        after.append(torch.get_rng_state())
    assert torch.equal(*after)


@pytest.mark.parametrize("world_size", [2, 5])
def test_each_rank_initialises_its_rows_of_one_parameter_at_a_time(
    world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=8)
    torch.manual_seed(1)
    whole = LanguageModel(config, 33)
    sizes: list[int] = []
    empty = torch.empty

    def counted(*arguments: Any, **options: Any) -> torch.Tensor:
        found = empty(*arguments, **options)
        if not found.is_meta:
            sizes.append(found.numel())
        return found

    monkeypatch.setattr(torch, "empty", counted)
    for rank in range(world_size):
        torch.manual_seed(1)
        initialisation = Initialisation(Ranks(rank, rank, world_size))
        with torch.device("meta"), initialisation:
            model = LanguageModel(config, 33)
        for name, parameter in model.named_parameters():
            expected = whole.get_parameter(name)
            rows = initialisation.rows_of(name, parameter)
            assert torch.equal(rows, expected[slice(*rows_of(len(expected), rank, world_size))])
    assert max(sizes) <= max(p.numel() for p in whole.parameters())


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("as a value", "is not initialised by"),
        ("truncated", "is not initialised by"),
        ("in parts", "does not fill a whole parameter"),
        ("in steps", "does not fill a whole parameter"),
    ],
)
def test_an_initialisation_that_cannot_be_sharded_is_refused(way: str, message: str) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 2) if way == "as a value" else torch.empty(3, 2))
            if way == "in parts":
                nn.init.normal_(self.weight)
                with torch.no_grad():
                    self.weight[0].fill_(1.0)
            if way == "in steps":
                nn.init.normal_(self.weight)
                with torch.no_grad():
                    self.weight.mul_(2.0)
            if way == "truncated":  # torch does nothing on the meta device
                nn.init.trunc_normal_(self.weight)

    initialisation = Initialisation(Ranks(0, 0, 2))
    with pytest.raises(UserError, match=message):  # noqa: PT012
        with torch.device("meta"), initialisation:
            model = Odd()
        initialisation.rows_of("weight", model.weight)


def test_a_step_with_a_non_finite_gradient_changes_nothing(build: Build) -> None:
    state = build("fsdp", optimizer={"optimizer_name": "muon"})
    train(state, 1)
    before = {name: tensor.clone() for name, tensor in own_weights(state).items()}
    update = make_update(state, print)
    update.gradients(no_phase)
    assert state.shards is not None
    gradient = state.shards.own["final_norm.weight"].grad
    assert gradient is not None
    gradient[0] = float("nan")
    norms = update.clip()  # type: ignore[attr-defined]
    assert norms.isnan().any()
    update.apply(norms)
    assert state.step == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in own_weights(state).items())


def test_clipping_scales_to_the_norm_of_all_rows(build: Build) -> None:
    state = build("fsdp", optimizer={"grad_clip": 0.01})
    _, norms = make_update(state, print).gradients(no_phase)
    assert state.shards is not None
    gradients = [p.grad for p in state.shards.own.values() if p.grad is not None]
    assert len(gradients) == len(state.shards.own)
    assert norms.norm() > 0.01
    assert torch.cat([gradient.flatten() for gradient in gradients]).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_activation_checkpointing_changes_no_bit(build: Build) -> None:
    states = [build("fsdp", train={"activation_checkpointing": on}) for on in (False, True)]
    assert train(states[0], 2) == train(states[1], 2)


def test_a_sharded_checkpoint_can_be_resumed_sharded_and_whole(build: Build, tmp_path: Path) -> None:
    from utils.runs.log import RunLog
    from utils.training.sharded_checkpointer import make_checkpointer

    state = build("fsdp")
    train(state, 2)
    (tmp_path / "logs").mkdir()
    log, warnings = RunLog(tmp_path / "logs"), []
    checkpoints = make_checkpointer(state, tmp_path / "made", state.config.train, "hash", log, warnings.append)
    checkpoints.save(state)
    checkpoints.wait()
    log.close()
    assert not warnings
    assert (tmp_path / "made" / "step_000002" / INDEX_FILE).is_file()
    expected = train(state, 2)
    again, whole = build("fsdp", seed=3), build("none", seed=3)
    for other in (again, whole):
        restore(other, read_checkpoint(tmp_path / "made" / "step_000002"))
    assert train(again, 2) == expected
    assert train(whole, 2) == pytest.approx(expected, abs=1e-6)
    assert all(torch.equal(tensor, own_weights(state)[name]) for name, tensor in own_weights(again).items())
    moments = [capture(found)[1] for found in (state, again)]
    assert all(torch.equal(tensor, moments[1][name]) for name, tensor in moments[0].items())


@pytest.mark.parametrize(
    "setting",
    [{"compile": True}, {"fp8": True}, {"profile_step": 3}, {"batch_size": "auto"}, {"dtype": "float16"}],
    ids=lambda setting: next(iter(setting)),
)
def test_settings_that_sharding_does_not_support_are_refused_by_name(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"shard fsdp does not work with {next(iter(setting))}"):
        TrainConfig(shard="fsdp", **setting)
    with contextlib.suppress(RuleError):
        TrainConfig(**setting)


def test_adapters_are_refused_and_sharding_changes_the_hash() -> None:
    with pytest.raises(ValueError, match="shard fsdp does not work with lora_rank"):
        Config(train=TrainConfig(shard="fsdp"), optimizer=OptimizerConfig(lora_rank=2))
    hashes = {config_hash(Config(train=TrainConfig(shard=shard)), {}) for shard in ("none", "fsdp")}  # type: ignore[arg-type]
    assert len(hashes) == 2
