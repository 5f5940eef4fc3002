"""profile_model.py --sweep: the shapes that are timed, and the table of results."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import profile_model
from model import outline
from utils.config.loader import ConfigLoader
from utils.errors import UserError
from utils.nn.costs import training_flops
from utils.profiling import measure, shapes
from utils.profiling.shapes import ShapeTiming, sizes_around, sweep_table, time_shape, with_shape
from utils.terminal.cli import PROJECT_ROOT
from utils.terminal.console import Terminal
from utils.training.setup import Setup, make_setup
from utils.training.state import TrainState, build_state
from utils.training.step import PhaseClock, no_phase
from utils.training.step_graph import GraphUpdate

QUIET = Terminal(quiet=True)


@pytest.fixture
def setup(tmp_path: Path, tiny_corpus: Path) -> Setup:
    sizes = {"n_layer": "1", "n_head": "2", "n_embd": "16", "block_size": "8", "batch_size": "4"}
    places = {"dataset": str(tiny_corpus), "corpora_dir": str(tmp_path / "corpora"), "device": "cpu"}
    return make_setup(ConfigLoader(PROJECT_ROOT).load([], {**sizes, **places}), PROJECT_ROOT)


def state_of(setup: Setup, batch_size: int) -> TrainState:
    config = with_shape(setup.config, batch_size, 8)
    return build_state(config, setup.max_iters, setup.corpus, setup.device, setup.dtype, QUIET)


def test_default_sizes_surround_the_configured_one() -> None:
    assert sizes_around(12, shapes.BATCH_FACTORS) == [3, 6, 12, 24, 48]
    assert sizes_around(1, shapes.BATCH_FACTORS) == [1, 2, 4]


def test_a_shape_changes_only_the_sizes_and_the_micro_steps(setup: Setup) -> None:
    train = setup.config.train.model_copy(update={"gradient_accumulation_steps": 4})
    config = setup.config.model_copy(update={"train": train})
    shaped = with_shape(config, 3, 16)
    assert (shaped.train.batch_size, shaped.model.block_size, shaped.train.gradient_accumulation_steps) == (3, 16, 1)
    assert with_shape(shaped, 4, 8) == setup.config


@pytest.mark.parametrize(("micro_steps", "lanes", "micro_batch"), [(1, 4, 6), (8, 4, 3), (2, None, 12), (1, None, 24)])
def test_a_shape_is_one_micro_step_however_the_batch_is_split(
    micro_steps: int, lanes: int | None, micro_batch: int, setup: Setup
) -> None:
    sharing = {"batch_size": 24, "gradient_accumulation_steps": micro_steps, "lanes": lanes}
    config = setup.config.model_copy(update={"train": setup.config.train.model_copy(update=sharing)})
    assert micro_batch in shapes.default_batch_sizes(config)
    assert max(shapes.default_batch_sizes(config)) == 4 * micro_batch
    assert time_shape(setup, with_shape(config, 3, 8), 1, 0, QUIET).batch_size == 3


def test_rates_are_derived_from_the_time_of_a_step(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    stepped: list[int] = []
    monkeypatch.setattr(shapes, "training_step", lambda state, warn: lambda phase: stepped.append(1))
    monkeypatch.setattr(shapes, "time_steps", lambda step, device, steps: 2.0 if steps == 7 else None)
    timing = time_shape(setup, setup.config, steps=7, warmup=3, terminal=QUIET)
    assert len(stepped) == 1 + 3  # before the clock starts
    assert timing.step_ms == 2.0
    assert timing.tokens_per_second == pytest.approx(4 * 8 / 0.002)
    model = outline(setup.config.model, setup.corpus.tokenizer.vocab_size)
    operations = training_flops(model, 4, setup.config.model.block_size)
    assert timing.gflops == pytest.approx(operations / 0.002 / 1e9)


def test_the_timed_steps_train_the_model(setup: Setup) -> None:
    state = state_of(setup, 4)
    before = [p.clone() for p in state.model.parameters()]
    measure.training_step(state, print)(no_phase)
    assert state.step == 1
    assert all(not torch.equal(old, new) for old, new in zip(before, state.model.parameters(), strict=True))


def test_an_undisturbed_step_is_launched_as_a_graph_and_one_in_phases_kernel_by_kernel(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[int] = []

    def count_launches(work: Callable[[], object], device: torch.device) -> Callable[[], object]:
        def launch() -> object:
            launched.append(1)
            return work()

        return launch

    monkeypatch.setattr(measure, "make_update", GraphUpdate)
    monkeypatch.setattr("utils.training.step_graph.capture_graph", count_launches)
    state = state_of(setup, 4)
    step = measure.training_step(state, print)
    step(no_phase)  # the first step is not recorded
    assert not launched
    measure.time_steps(step, state.device, 3)
    assert len(launched) == 2 * 3  # the gradients and the optimizer of each step
    step(PhaseClock(state.device))
    assert len(launched) == 2 * 3
    assert state.step == 5


def test_activations_grow_with_the_batch(setup: Setup) -> None:
    configs = (with_shape(setup.config, batch_size, 8) for batch_size in (4, 8))
    one, two = (time_shape(setup, config, 1, 0, QUIET).activation_mb for config in configs)
    assert one
    assert two == pytest.approx(2 * one, rel=0.02)


def test_the_row_with_the_most_tokens_per_second_is_marked(capsys: pytest.CaptureFixture[str]) -> None:
    slow = ShapeTiming(1, 8, step_ms=1.0, tokens_per_second=8000.0, gflops=1.0, activation_mb=0.1)
    Terminal().print(sweep_table([slow, replace(slow, batch_size=2, tokens_per_second=16000.0)]))
    marked = [line for line in capsys.readouterr().out.splitlines() if "best" in line]
    assert len(marked) == 1
    assert "16,000" in marked[0]


def test_a_shape_that_does_not_fit_is_reported_and_skipped(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timed = time_shape

    def small_device(setup: Setup, config: shapes.Config, *rest: object) -> ShapeTiming:
        if config.train.batch_size > 2:
            raise torch.OutOfMemoryError
        return timed(setup, config, 1, 0, QUIET)

    monkeypatch.setattr(shapes, "time_shape", small_device)
    timings = shapes.sweep_shapes(setup, [1, 2, 4], [8], 1, 0, Terminal())
    assert [timing.batch_size for timing in timings] == [1, 2]
    assert "batch 4 x block 8: does not fit" in capsys.readouterr().out


def test_a_block_longer_than_the_corpus_is_refused(setup: Setup) -> None:
    with pytest.raises(UserError, match="--block-sizes: 9,999,999 is too long"):
        shapes.sweep_shapes(setup, [1], [8, 9_999_999], 1, 0, QUIET)


def test_the_script_prints_the_table_and_writes_it(
    tiny_argv: Callable[..., list[str]], tmp_path: Path, runs_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ("--batch-sizes", "1,2", "--block-sizes", "4,8")
    words = ("--sweep", *sizes, "--steps", "2", "--warmup", "0", "--out", str(tmp_path / "out"))
    assert profile_model.main(tiny_argv(*words)) == 0
    rows = json.loads((tmp_path / "out" / "sweep.json").read_text(encoding="utf-8"))["shapes"]
    assert [(row["block_size"], row["batch_size"]) for row in rows] == [(4, 1), (4, 2), (8, 1), (8, 2)]
    assert all(row["step_ms"] > 0 and row["activation_mb"] > 0 for row in rows)
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("tokens/s", "GFLOP/s", "best", "medians over 2 steps", "sweep.json"))
    assert not runs_dir.exists()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--sweep", "--batch-sizes", "0"), "--batch-sizes: expected numbers >= 1"),
        (("--sweep", "--block-sizes", "8,x"), "--block-sizes: expected numbers >= 1"),
        (("--batch-sizes", "8"), "--batch-sizes belongs to --sweep"),
        (("--lr-steps", "8"), "--lr-steps belongs to --lr-range"),
        (("--sweep", "--top", "8"), "--top belongs to a profile or --compare"),
        (("--lr-range", "--steps", "8"), "--steps belongs to a profile or --sweep"),
        (("--lr-range", "--sweep"), "argument --sweep: not allowed with argument --lr-range"),
    ],
)
def test_a_mistake_in_the_flags_is_one_line(
    tiny_argv: Callable[..., list[str]], words: tuple[str, ...], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert profile_model.main(tiny_argv(*words)) == 2
    assert capsys.readouterr().err.startswith(f"error: {error}")
