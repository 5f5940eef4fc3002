"""Runs that train LoRA adapters: started from another run, resumed, forked, exported, and read by other commands."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from equal_runs import assert_equal_runs
from safetensors.torch import load_file

import experiments
import train
from benchmarks.run_equality import last_checkpoint
from model import LanguageModel
from utils.checkpoints.files import read_checkpoint
from utils.checkpoints.folder import CheckpointError, list_checkpoints
from utils.config.fields import ADDED, config_hash
from utils.config.settings import Config, ModelConfig, OptimizerConfig
from utils.evaluation.weights import load_trained
from utils.formats.stored import find_weights
from utils.inference.export import load_export
from utils.inference.seen import seen
from utils.nn.attention import causal_mask
from utils.nn.lora import frozen_weights, merged_weights
from utils.runs.index import read_run
from utils.runs.layout import CHECKPOINTS, EXPORT
from utils.runs.log import read_metrics
from utils.runs.seal import verify_seal
from utils.training.batch_size import ByteCounter, Probe, bytes_of_training

pytestmark = pytest.mark.usefixtures("prompt_writes")
Argv = Callable[..., list[str]]
RunOf = Callable[[str], Path]
AfterStep = Callable[[int, Callable[[], None]], None]
CPU = torch.device("cpu")
LORA = (
    *("--lora-rank", "2", "--lora-dropout", "0.1", "--dropout", "0.2", "--gradient-accumulation-steps", "2"),
    *("--learning-rate", "0.01", "--max-iters", "20", "--eval-interval", "10", "--checkpoint-interval", "5"),
)


def val_losses(run: Path) -> list[float]:
    return [loss for _, loss in read_metrics(run / "logs", "val/loss")]


def interrupt() -> None:
    raise KeyboardInterrupt


def base_of(run: Path) -> Path:
    return run / CHECKPOINTS / "base.safetensors"


def weights_of(run: Path) -> Path:
    """The file with the adapters in the last checkpoint."""
    return last_checkpoint(run).path / "model.safetensors"


def assert_checkpoint_has_the_adapters_only(run: Path, parent: Path) -> None:
    """A checkpoint holds the adapters and their moments. The base is written once, and equals the parent's export."""
    exported = load_file(parent / EXPORT / "model.safetensors")
    checkpoint = last_checkpoint(run)
    frozen = load_file(base_of(run))
    assert frozen.keys() == exported.keys()
    assert all(torch.equal(frozen[name], exported[name]) for name in frozen)
    own = load_file(weights_of(run))
    assert len(own) == 8
    assert all("lora_" in name for name in (*own, *checkpoint.optimizer_tensors))
    assert checkpoint.weights.keys() == own.keys() | frozen.keys()
    histograms = (run / "logs/histograms.jsonl").read_text(encoding="utf-8").splitlines()
    assert {json.loads(line)["name"].split("/")[1] for line in histograms} == {*own}


def assert_export_has_the_adapters_merged(run: Path) -> None:
    """The export is a plain model that any reader of exports can load."""
    export, frozen = load_export(run / EXPORT, CPU), load_file(base_of(run))
    assert export.training["lora"]["lora_rank"] == 2
    moved = [name for name, weight in export.model.state_dict().items() if not torch.equal(weight, frozen[name])]
    assert moved == [f"blocks.0.{name}.weight" for name in ("attention.qkv", "attention.proj", "mlp.up", "mlp.proj")]


def assert_adapters_are_exported_for_peft(run: Path) -> None:
    folder = run / EXPORT / "adapter"
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["target_modules"] == ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    saved, own = (load_file(path) for path in (folder / "adapter_model.safetensors", weights_of(run)))
    name = "base_model.model.transformer.h.0.mlp.c_fc.lora_B.weight"
    assert torch.equal(saved[name], own["blocks.0.mlp.up.lora_b"])


def assert_other_commands_read_it_as_any_run(run: Path, runs_dir: Path) -> None:
    assert find_weights(f"{run}:20", Path) == [weights_of(run), base_of(run)]
    assert verify_seal(run).good
    trained, export = load_trained(str(run), runs_dir, CPU, checkpoint="best"), load_export(run / EXPORT, CPU)
    assert trained.model.state_dict().keys() == export.model.state_dict().keys()
    assert seen(read_run(run), Path.cwd(), 3, top=1).passages[0].loss


def assert_damaged_base_is_found_before_it_is_trained_on(run: Path) -> None:
    with open(base_of(run), "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    with pytest.raises(CheckpointError, match=r"base.safetensors: damaged: its CRC-32"):
        read_checkpoint(list_checkpoints(run / CHECKPOINTS)[0][1])
    assert any("base.safetensors: damaged" in line for line in verify_seal(run).damaged)


@pytest.mark.slow
def test_adapters_are_trained_resumed_exported_forked_and_merged(
    tiny_argv: Argv, runs_dir: Path, run_of: RunOf, after_step: AfterStep, capsys: pytest.CaptureFixture[str]
) -> None:
    """One test because each run takes a second; every part uses the runs of the parts before it."""
    assert train.main(tiny_argv("--run-tag", "base")) == 0
    base = run_of("base")
    tuned = tiny_argv(*LORA, "--init-from", str(base))
    assert train.main([*tuned, "--run-tag", "straight"]) == 0
    straight = run_of("straight")
    printed, frozen_count = capsys.readouterr().out, read_run(base).record["resolved"]["parameters"]
    counts = f"512 trainable ({512 / (512 + frozen_count):.2%}), {frozen_count:,} frozen"
    assert f"preflight: parameters: {counts}" in printed
    assert f"adapters    {counts}" in printed
    assert read_run(straight).record["resolved"]["trainable_parameters"] == 512
    assert experiments.main(["show", "straight", "--runs-dir", str(runs_dir)]) == 0
    assert f"{frozen_count + 512:,}, 512 trained" in capsys.readouterr().out
    assert val_losses(straight)[0] == val_losses(base)[-1]
    assert val_losses(straight)[-1] < val_losses(straight)[0]

    assert_checkpoint_has_the_adapters_only(straight, base)
    assert_export_has_the_adapters_merged(straight)
    assert_adapters_are_exported_for_peft(straight)
    assert not (base / EXPORT / "adapter").exists()

    # Interrupted, and resumed after its parent was deleted, it ends with the same bits.
    after_step(13, interrupt)
    assert train.main([*tuned, "--run-tag", "stopped"]) == 130
    shutil.rmtree(base)
    assert train.main(["--resume", str(run_of("stopped"))]) == 0
    assert_equal_runs(straight, run_of("stopped"))

    assert_other_commands_read_it_as_any_run(straight, runs_dir)

    # A fork continues training the adapters; --init-from starts with the merged weights.
    assert train.main(["--fork", "--resume", f"{straight}:15", "--max-iters", "18", "--run-tag", "fork"]) == 0
    assert base_of(run_of("fork")).read_bytes() == base_of(straight).read_bytes()
    capsys.readouterr()
    for words, found in (
        (["--lora-rank", "4"], "was trained with lora_rank 2, not 4; --init-from starts with its weights"),
        (["--lora-alpha", "2"], "was trained with lora_alpha 4, not 2;"),
        (["--lora-targets", "qkv"], "was trained with lora_targets"),
        (["--lora-rank", "none"], "was trained with lora_rank 2, not none"),
    ):
        assert train.main(["--fork", "--resume", str(straight), "--max-iters", "30", *words]) == 2
        assert found in capsys.readouterr().err.replace("\n", " ")
    assert train.main(tiny_argv("--init-from", f"{straight}:latest", "--run-tag", "merged")) == 0
    assert val_losses(run_of("merged"))[0] == pytest.approx(val_losses(straight)[-1], abs=1e-6)
    assert not base_of(run_of("merged")).exists()

    assert_damaged_base_is_found_before_it_is_trained_on(straight)


def test_mistakes_are_reported_before_a_run_is_created(
    tiny_argv: Argv, runs_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(tiny_argv("--lora-rank", "2", "--lora-targets", "qvk")) == 2
    found = capsys.readouterr().err
    problem = "the model has no linear layer qvk; it has qkv, proj, up; did you mean qkv?"
    assert f"--lora-targets: lora_targets: {problem}" in found
    assert train.main(tiny_argv("--lora-rank", "2", "--strict")) == 2
    assert "lora_rank without --init-from: the frozen weights are random" in capsys.readouterr().err
    assert train.main(tiny_argv("--lora-rank", "500", "--strict")) == 2
    assert "--lora-rank: lora_rank 500 is more than 16, the largest rank that a change of" in capsys.readouterr().err
    assert train.main(tiny_argv("--lora-alpha", "2", "--strict")) == 2
    assert "lora_alpha has no effect: lora_rank is none" in capsys.readouterr().err
    assert not runs_dir.exists()


def test_runs_without_adapters_keep_their_hash() -> None:
    defaults = {key: value for key, value in OptimizerConfig() if key.startswith("lora_")}
    assert len(defaults) == 4
    assert defaults.keys() <= ADDED
    assert config_hash(Config(), {}) != config_hash(Config(optimizer=OptimizerConfig(lora_rank=2)), {})


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_adapters_learn_and_leave_the_base_alone(optimizer: Any) -> None:
    config = Config(
        model=ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, position="rope", mlp="swiglu"),
        optimizer=OptimizerConfig(optimizer_name=optimizer, lora_rank=2, weight_decay=0.1),
    )
    corpus: Any = type("Corpus", (), {"tokenizer": type("Tokenizer", (), {"vocab_size": 20})})
    state = Probe(config, corpus, CPU, torch.float32).state
    before = {name: weight.clone() for name, weight in state.model.state_dict().items()}
    idx = torch.arange(64).view(8, 8) % 20
    losses = []
    for _ in range(20):
        loss = state.loss(idx, idx.roll(-1, 1))
        loss.backward()
        for group in state.optimizer.param_groups:
            group["lr"] = 0.02
        state.optimizer.step()
        state.optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    frozen = frozen_weights(state.model)
    assert all(torch.equal(weight, before[name]) for name, weight in frozen.items())
    plain = LanguageModel(config.model, 20)
    plain.load_state_dict(merged_weights(state.model))
    assert torch.allclose(plain(idx)[0], state.model(idx)[0], atol=1e-5)


def test_memory_is_counted_without_gradients_and_moments_of_the_base() -> None:
    corpus: Any = type("Corpus", (), {"tokenizer": type("Tokenizer", (), {"vocab_size": 50})})
    model = ModelConfig(n_layer=2, n_head=2, n_embd=64, block_size=8)
    config = Config(model=model, optimizer=OptimizerConfig(lora_rank=2))
    causal_mask(8)  # cached for all models, so it is in neither count
    with ByteCounter() as counter:
        real = Probe(config, corpus, CPU, torch.float32)
        kept = counter.held - sum(weight.nbytes for weight in frozen_weights(real.state.model).values())
        real.step(4)
    needed = bytes_of_training(config, corpus, torch.float32, 4)
    assert needed == counter.peak + kept
    assert needed < bytes_of_training(Config(model=model), corpus, torch.float32, 4) / 2


@pytest.mark.slow
def test_a_compiled_run_of_adapters_repeats_after_a_stop(tiny_argv: Argv, run_of: RunOf, after_step: AfterStep) -> None:
    compiled = tiny_argv(*LORA, "--compile", "--n-layer", "2")
    assert train.main([*compiled, "--run-tag", "straight"]) == 0
    after_step(13, interrupt)
    assert train.main([*compiled, "--run-tag", "stopped"]) == 130
    assert train.main(["--resume", str(run_of("stopped"))]) == 0
    assert read_run(run_of("stopped")).record["resolved"]["compiled"] is True
    assert_equal_runs(run_of("straight"), run_of("stopped"))
