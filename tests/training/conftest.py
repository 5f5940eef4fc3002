"""Fixtures of several tests of training: states before their first step, runs by tag, and actions after a step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import utils.training.step
from utils.terminal.cli import Parser
from utils.terminal.config_flags import parse_experiment
from utils.terminal.console import Terminal
from utils.training.setup import make_setup
from utils.training.state import TrainState, build_state


@pytest.fixture
def new_state(tiny_argv: Callable[..., list[str]], tmp_path: Path) -> Callable[..., TrainState]:
    """A state of the tiny experiment before its first step: `new_state("--dropout", "0.2")`."""

    def make(*words: str) -> TrainState:
        setup = make_setup(parse_experiment(tiny_argv(*words), Parser(prog="train.py")).load(), tmp_path)
        torch.manual_seed(1)
        state = build_state(setup.config, 20, setup.corpus, setup.device, setup.dtype, Terminal(quiet=True))
        state.model.train()
        return state

    return make


@pytest.fixture
def run_of(runs_dir: Path) -> Callable[[str], Path]:
    """The newest run with a tag: `run_of("stopped")`."""
    return lambda tag: max(path for path in runs_dir.iterdir() if path.name.endswith(tag))


@pytest.fixture
def after_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """Calls a function once, when training reaches a step: `after_step(4, action)`."""

    def plan(step: int, action: Callable[[], object]) -> None:
        optimizer_step = utils.training.step.optimizer_step
        done: list[int] = []

        def patched(state: TrainState, *grad_norms: torch.Tensor) -> None:
            optimizer_step(state, *grad_norms)
            if state.step == step and not done:
                done.append(step)
                action()

        monkeypatch.setattr(utils.training.step, "optimizer_step", patched)

    return plan
