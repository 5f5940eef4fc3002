"""Any module can be a layer: it trains, is saved, resumes bit for bit, is exported, generates and is profiled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import model
import profile_model
import train
from benchmarks.run_equality import differences, last_checkpoint
from utils.config.settings import ModelConfig
from utils.inference.generator import Generator, Request
from utils.nn.roles import declared_roles

SAME = {"weight bits": 0, "optimizer bits": 0, "export bits": 0, "log records": 0, "state facts": 0}
C = 16  # n_embd of the tiny configuration


def sequential(config: ModelConfig) -> nn.Module:
    return nn.Sequential(nn.Linear(C, 5), nn.Tanh(), nn.Dropout(config.dropout), nn.Linear(5, C))


class Scales(nn.Module):
    """A list of parameters: a vector, a matrix and a tensor of three dimensions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.scales = nn.ParameterList([torch.ones(C), torch.eye(C), torch.full((2, 3, C), 0.1)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        vector, matrix, cube = self.scales
        return x @ matrix * vector * cube.sum((0, 1))


class Louder(model.MLP):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.volume = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.volume * super().forward(x)


class WithLinear(model.Block):
    """A block with a plain nn.Linear before it."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.before = nn.Linear(C, C)

    def forward(self, x: torch.Tensor, *rest: object) -> torch.Tensor:
        return super().forward(x + self.before(x), *rest)


class Mine(model.LanguageModel):
    """A model with an extra layer before the head, and a different MLP in its last block."""

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__(config, vocab_size)
        self.adapter = nn.Linear(C, C)
        self.blocks[-1].mlp = sequential(config)

    def head_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().head_logits(hidden + self.adapter(hidden))


KINDS: dict[str, tuple[str, type | Callable[[ModelConfig], nn.Module], list[str]]] = {
    "nn.Sequential": ("mlp", sequential, ["blocks.0.mlp.0.weight", "blocks.0.mlp.3.bias"]),
    "nn.ParameterList": ("mlp", Scales, ["blocks.0.mlp.scales.0", "blocks.0.mlp.scales.2"]),
    "a subclass of MLP": ("mlp", Louder, ["blocks.0.mlp.volume"]),
    "nn.Linear in a Block": ("Block", WithLinear, ["blocks.0.before.weight", "blocks.0.before.bias"]),
    "a subclass of LanguageModel": ("LanguageModel", Mine, ["adapter.weight", "blocks.0.mlp.0.weight"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_any_module_can_be_a_layer(
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
    tiny_argv: Callable[..., list[str]],
    runs_dir: Path,
    prompt_writes: None,
) -> None:
    place, layer, without_role = KINDS[kind]
    if place == "mlp":
        monkeypatch.setitem(model.MLPS, "gelu", layer)
    elif place == "Block":
        monkeypatch.setattr(model, "Block", layer)
    else:
        monkeypatch.setattr("model.LanguageModel", layer)
        monkeypatch.setattr("utils.training.state.LanguageModel", layer)
        monkeypatch.setattr("utils.inference.export.LanguageModel", layer)

    def run(tag: str) -> Path:
        (path,) = runs_dir.glob(f"*_{tag}")
        return path

    settings = ("--optimizer-name", "muon", "--dropout", "0.2", "--checkpoint-interval", "3")
    assert train.main(tiny_argv(*settings, "--run-tag", "straight")) == 0
    assert train.main(tiny_argv(*settings, "--run-tag", "stopped", "--stop-at-step", "3")) == 0
    first = last_checkpoint(run("stopped"))
    assert train.main(["--resume", str(run("stopped")), "--stop-at-step", "none"]) == 0
    last = last_checkpoint(run("stopped"))
    assert (first.step, last.step) == (3, 6)
    for name in without_role:
        assert not torch.equal(first.weights[name], last.weights[name]), f"{name} is not trained"
    assert differences(run("straight"), run("stopped")) == SAME

    for weights in ("float32", "bfloat16", "int8"):
        generator = Generator.from_run("stopped", runs_dir, "cpu", weights)
        assert len(generator.generate("line", Request(20)).text) > 0
    exported = Generator.from_run("stopped", runs_dir, "cpu").model
    parameters = dict(exported.named_parameters())
    assert all(torch.equal(parameters[name], last.weights[name]) for name in without_role)
    assert not {parameters[name] for name in without_role} & set(declared_roles(exported))

    assert profile_model.main(tiny_argv("--steps", "1", "--warmup", "0")) == 0
