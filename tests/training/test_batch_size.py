"""`batch_size auto`: the search, its memory estimate, and runs, which equal those with the same numbers by hand."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import in_child
from equal_runs import assert_equal_runs

import profile_model
import train
import utils.machine.device
import utils.training.batch_size
from data import load_corpus
from model import LanguageModel
from utils.config.fields import flat
from utils.config.loader import LoadedConfig
from utils.config.settings import Config, DataConfig, ModelConfig, TrainConfig
from utils.errors import UserError
from utils.experiments.explain import explain_of_run
from utils.machine.device import available_memory
from utils.machine.ranks import ONE, Ranks
from utils.nn import gelu
from utils.nn.attention import causal_mask
from utils.runs.index import read_run, resolved_setting
from utils.runs.run import read_record
from utils.training.batch_size import (
    FOUND_BATCH,
    ByteCounter,
    CudaProbe,
    Probe,
    bytes_of_training,
    divisors,
    find_batch,
    largest_fitting,
)

Argv = Callable[..., list[str]]
CPU = torch.device("cpu")
TINY = ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=8)
VOCAB = 50


def corpus_of(vocab_size: int) -> Any:
    """A stand-in for a corpus with the attribute that the search reads."""
    return SimpleNamespace(tokenizer=SimpleNamespace(vocab_size=vocab_size))


CORPUS = corpus_of(VOCAB)
AUTO = ("--batch-size", "auto", "--tokens-per-step", "96")


# ---------------------------------------------------------------------------------------- the search


@pytest.mark.parametrize("limit", [0, 1, 2, 3, 5, 6, 64, 100, 4095, 4096, 10**9])
@pytest.mark.parametrize("sizes", [[2**n for n in range(13)], divisors(96), divisors(97), [1]])
def test_the_largest_size_that_fits_is_found_in_few_trials(sizes: list[int], limit: int) -> None:
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= limit

    assert largest_fitting(sizes, fits) == max((size for size in sizes if size <= limit), default=None)
    assert len(set(tried)) == len(tried) <= len(sizes).bit_length()


@pytest.mark.parametrize("number", [1, 2, 12, 36, 97, 1024, 5040])
def test_divisors_are_all_of_them_in_order(number: int) -> None:
    assert divisors(number) == [n for n in range(1, number + 1) if number % n == 0]


def find(
    monkeypatch: pytest.MonkeyPatch, corpus: Path, fitting: int, ranks: Ranks = ONE, **settings: Any
) -> tuple[dict[str, Any], list[str]]:
    """The settings that batch_size auto changes if `fitting` sequences fit, and the lines that it prints."""
    monkeypatch.setattr(utils.training.batch_size, "bytes_of_training", lambda config, corpus, dtype, size: 1000 * size)
    monkeypatch.setattr(utils.training.batch_size, "available_memory", lambda device: int(1000 * fitting / 0.75) + 1)
    data = DataConfig(dataset=str(corpus))
    loaded = LoadedConfig.from_config(
        Config(data=data, model=TINY, train=TrainConfig(batch_size="auto", **settings), tracking={"run_tag": "x"})
    )
    printed: list[str] = []
    loaded_corpus = load_corpus(data, TINY.block_size, corpus.parent / "corpora")
    found = find_batch(loaded, loaded_corpus, CPU, torch.float32, printed.append, ranks)
    changed = {key: value for key, value in flat(found.config).items() if value != flat(loaded.config)[key]}
    assert all(found.source(key) == FOUND_BATCH for key in changed)
    return changed, printed


def test_the_largest_power_of_two_that_fits_is_taken(monkeypatch: pytest.MonkeyPatch, tiny_corpus: Path) -> None:
    changed, (printed,) = find(monkeypatch, tiny_corpus, 100)
    assert changed == {"batch_size": 64}
    assert (
        printed
        == "batch_size auto: 64 sequences, 512 tokens per step (more do not fit into the 0.0 GiB that are free on cpu)"
    )


def test_the_rank_with_the_least_memory_decides_for_all(monkeypatch: pytest.MonkeyPatch, tiny_corpus: Path) -> None:
    ranks = Ranks(
        world_size=4, memory=int(1000 * 20 / 0.75) + 1
    )  # enough for 20 sequences; this rank has memory for 100
    changed, (printed,) = find(monkeypatch, tiny_corpus, 100, ranks)
    assert changed == {"batch_size": 4 * 16}
    assert "64 sequences, 512 tokens per step, 16 at a time" in printed
    changed, _ = find(monkeypatch, tiny_corpus, 100, ranks, lanes=8)
    assert changed == {"batch_size": 8 * 16}
    changed, _ = find(monkeypatch, tiny_corpus, 100, ranks, tokens_per_step=8 * 96)
    assert changed == {"batch_size": 96, "gradient_accumulation_steps": 8, "tokens_per_step": None}
    with pytest.raises(UserError, match=r"97 sequences of 8 tokens cannot be cut into 4 equal parts"):
        find(monkeypatch, tiny_corpus, 100, ranks, tokens_per_step=8 * 97)


def test_a_batch_is_no_larger_than_the_training_text(monkeypatch: pytest.MonkeyPatch, tiny_corpus: Path) -> None:
    text = tiny_corpus.read_text(encoding="utf-8")
    sequences = int(len(text) * 0.9) // 8
    changed, (printed,) = find(monkeypatch, tiny_corpus, 10**6)
    assert changed == {"batch_size": 512}
    assert 512 <= sequences < 1024
    assert printed.endswith(f"4,096 tokens per step (the training text has {sequences:,})")


@pytest.mark.parametrize(
    ("fitting", "micro_steps"), [(1, 12), (2, 6), (3, 4), (4, 3), (5, 3), (6, 2), (11, 2), (12, 1), (99, 1)]
)
def test_tokens_per_step_is_split_into_as_few_micro_steps_as_fit(
    monkeypatch: pytest.MonkeyPatch, tiny_corpus: Path, fitting: int, micro_steps: int
) -> None:
    changed, (printed,) = find(monkeypatch, tiny_corpus, fitting, tokens_per_step=96)
    steps = {"gradient_accumulation_steps": micro_steps} if micro_steps > 1 else {}
    assert changed == {"batch_size": 12, "tokens_per_step": None, **steps}
    assert printed.startswith("batch_size auto: 12 sequences, 96 tokens per step")
    assert (f"in {micro_steps} micro-steps of {12 // micro_steps}, which fit" in printed) == (micro_steps > 1)


def test_a_model_that_does_not_fit_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, tiny_corpus: Path) -> None:
    with pytest.raises(UserError, match="code: batch_size auto: not even one sequence of 8 tokens fits into the") as it:
        find(monkeypatch, tiny_corpus, 0)
    assert "\n" not in str(it.value)


# ---------------------------------------------------------------------------------------- memory


def test_each_storage_is_counted_once_until_it_is_freed() -> None:
    with ByteCounter() as counter:
        first = torch.zeros(100)
        view = first.view(10, 10)[:2]
        second = view + 1
        assert counter.held == 400 + 80
        del first
        assert counter.held == 400 + 80  # the view keeps it alive
        del view, second
        assert (counter.held, counter.peak) == (0, 480)


@pytest.mark.parametrize(("position", "mlp"), [("learned", "gelu_tanh"), ("rope", "gelu")])
@pytest.mark.parametrize("sequences", [1, 5, 64])
def test_the_estimate_equals_the_bytes_of_a_real_step(
    sequences: int, position: Any, mlp: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gelu, "FEW_ELEMENTS", 0)
    config = Config(model=ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, position=position, mlp=mlp))
    causal_mask(8)  # cached for all models, so it is in neither count
    with ByteCounter() as counter:
        real = Probe(config, CORPUS, CPU, torch.float32)
        kept = counter.held
        real.step(sequences)
    assert bytes_of_training(config, CORPUS, torch.float32, sequences) == counter.peak + kept
    weights = 4 * LanguageModel(config.model, VOCAB).num_parameters()
    assert 3 * weights <= kept < 3.3 * weights  # weights, two moments of AdamW, and the rotary table


@pytest.mark.parametrize(
    ("settings", "several"),
    [
        ({"batch_size": 8, "gradient_accumulation_steps": 1}, False),
        ({"batch_size": 8, "gradient_accumulation_steps": 2}, True),
        ({"batch_size": "auto", "tokens_per_step": 32}, True),
        ({"batch_size": 8, "lanes": 2}, True),
    ],
    ids=str,
)
def test_gradients_are_counted_if_there_are_several_micro_steps(settings: dict[str, Any], several: bool) -> None:
    alone = bytes_of_training(Config(model=TINY), CORPUS, torch.float32, 64)
    needed = bytes_of_training(Config(model=TINY, train=TrainConfig(**settings)), CORPUS, torch.float32, 64)
    gradients = 4 * LanguageModel(TINY, VOCAB).num_parameters()
    assert needed - alone == pytest.approx(gradients if several else 0, abs=64)


@pytest.mark.slow
def test_activation_checkpointing_is_counted() -> None:
    deep = TINY.model_copy(update={"n_layer": 8, "dropout": 0.1})
    whole, less = (
        bytes_of_training(Config(model=deep, train=TrainConfig(activation_checkpointing=on)), CORPUS, torch.float32, 64)
        for on in (False, True)
    )
    assert less < whole / 2


def test_the_estimate_grows_with_the_batch_and_allocates_nothing() -> None:
    sizes = [bytes_of_training(Config(model=TINY), CORPUS, torch.float32, 2**n) for n in (0, 4, 20, 21)]
    assert sizes == sorted(sizes)
    assert sizes[3] / sizes[2] == pytest.approx(2, rel=1e-3)
    assert sizes[3] > 2**33  # more than a test could allocate


def test_a_size_that_runs_out_of_cuda_memory_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[None] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(None))
    step = Probe.step

    def small(self: Probe, sequences: int) -> None:
        if sequences > 6:
            raise torch.OutOfMemoryError
        step(self, sequences)

    monkeypatch.setattr(Probe, "step", small)
    cuda_probe = CudaProbe(Config(model=TINY), CORPUS, CPU, torch.float32)
    assert largest_fitting([2**n for n in range(10)], cuda_probe.fits) == 4
    assert len(emptied) == 4
    assert cuda_probe.probe is not None
    assert all(p.grad is None for p in cuda_probe.probe.state.model.parameters())

    monkeypatch.setattr(Probe, "step", lambda self, sequences: small(self, 7))
    assert largest_fitting([1, 2], CudaProbe(Config(model=TINY), CORPUS, CPU, torch.float32).fits) is None


def test_free_memory_respects_the_limit_of_the_container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(utils.machine.device, "CGROUPS", tmp_path)
    free = available_memory(CPU)
    assert 2**20 < free < 2**50
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 100\n")
    assert available_memory(CPU) > 2**20
    (tmp_path / "memory.max").write_text("1000\n")
    assert available_memory(CPU) == 400
    (tmp_path / "memory.max").write_text("500\n")
    assert available_memory(CPU) == 0


@pytest.mark.parametrize(
    ("own", "limited"),
    [
        ("0::/system.slice/train.scope\n", "system.slice/train.scope"),  # a unit of systemd
        ("0::/system.slice/slurmd/job_1/step_0/task_2\n", "system.slice/slurmd/job_1"),  # the limit is on a level above
        ("4:memory:/slurm/uid_1/job_1/step_0\n0::/\n", "memory/slurm/uid_1/job_1"),  # version 1
        ("9:cpu,memory:/a\n", "memory/a"),
        ("0::/user.slice/a\n", "unified/user.slice"),  # version 2 mounted beside version 1
        (
            "0::/kubepods/pod1/container/child\n",
            "container",
        ),  # inside a container, which does not show the first folders
        ("0::/../../elsewhere\n", ""),
    ],
)
def test_a_memory_limit_on_any_level_of_the_cgroup_is_respected(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own: str, limited: str
) -> None:
    cgroups, names = tmp_path / "fs" / "cgroup", ("memory.max", "memory.current")
    if limited.startswith("memory"):
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for path in (cgroups / "memory", cgroups / limited / "below" / "below"):
        path.mkdir(parents=True, exist_ok=True)
    for line in own.splitlines():
        tree = cgroups / ("memory" if "memory" in line else "unified" if limited.startswith("unified") else "")
        if limited != "container" and ".." not in line:
            (tree / line.split(":")[2].lstrip("/")).mkdir(parents=True, exist_ok=True)
    for name, content in zip(names, ("1000", "700"), strict=True):
        (cgroups / limited / name).write_text(content)
    (cgroups / limited / "memory.stat").write_text("inactive_file 50\n")
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr(utils.machine.device, "CGROUPS", cgroups)
    monkeypatch.setattr(utils.machine.device, "OWN_CGROUPS", tmp_path / "own")
    assert available_memory(CPU) == 350
    (cgroups / limited / names[0]).write_text("max")
    assert available_memory(CPU) > 2**20
    (cgroups / limited / "memory.high").write_text("900")  # above this the kernel throttles the process
    assert (available_memory(CPU) == 250) == (names[0] == "memory.max")


@pytest.mark.parametrize(("kind", "field"), [("RLIMIT_AS", 0), ("RLIMIT_DATA", 5)])
def test_a_resource_limit_of_the_process_is_respected(kind: str, field: int) -> None:
    def restrict() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[field]) * resource.getpagesize()
        resource.setrlimit(getattr(resource, kind), (used + 2**28, used + 2**28))

    assert 2**27 < in_child(restrict, lambda: available_memory(CPU)) <= 2**28


# ---------------------------------------------------------------------------------------- runs


@pytest.fixture
def six_fit(monkeypatch: pytest.MonkeyPatch, tiny_text: str) -> None:
    """Memory for micro-batches of six sequences of the tiny experiment."""
    train = TrainConfig(batch_size="auto", tokens_per_step=96)
    config = Config(model=TINY.model_copy(update={"dropout": 0.2}), train=train)
    needed = bytes_of_training(config, corpus_of(len(set(tiny_text))), torch.float32, 6)
    monkeypatch.setattr(utils.training.batch_size, "available_memory", lambda device: int(needed / 0.75) + 1)


def no_search(*arguments: object) -> None:
    raise AssertionError("searched")


@pytest.mark.usefixtures("six_fit", "prompt_writes")
def test_the_run_equals_one_with_the_same_numbers_set_by_hand(
    tiny_argv: Argv, run_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    dropout = ("--dropout", "0.2")
    assert train.main(tiny_argv(*dropout, "--run-tag", "found", *AUTO)) == 0
    assert "batch_size auto: 12 sequences, 96 tokens per step, in 2 micro-steps of 6" in capsys.readouterr().out
    by_hand = ("--batch-size", "12", "--gradient-accumulation-steps", "2")
    assert train.main(tiny_argv(*dropout, "--run-tag", "hand", *by_hand)) == 0

    auto, hand = run_of("found"), run_of("hand")
    assert_equal_runs(auto, hand)
    assert read_record(auto)["config_hash"] == read_record(hand)["config_hash"]
    settings = json.loads((auto / "meta" / "full_config.json").read_text())["train"]
    assert settings == json.loads((hand / "meta" / "full_config.json").read_text())["train"]
    assert (settings["batch_size"], settings["gradient_accumulation_steps"]) == (12, 2)
    assert settings["tokens_per_step"] is None
    assert resolved_setting(read_run(auto), "tokens_per_step") == 96

    found = explain_of_run("batch_size", read_run(auto))
    assert (found.value, found.source) == (12, "batch_size auto")
    assert found.shadowed == [("auto", "--batch-size"), (12, "configs/train.yaml:4"), (12, "default")]


@pytest.mark.slow
@pytest.mark.usefixtures("six_fit", "prompt_writes")
def test_resume_and_fork_keep_the_batch_without_another_search(
    tiny_argv: Argv, run_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(tiny_argv("--run-tag", "straight", *AUTO)) == 0
    assert train.main(tiny_argv("--run-tag", "stopped", *AUTO, "--stop-at-step", "4")) == 0
    run = run_of("stopped")
    monkeypatch.setattr(utils.training.setup, "find_batch", no_search)

    assert train.main(["--resume", str(run), "--tokens-per-step", "192"]) == 2
    assert "batch_size changes the numbers of a run" in capsys.readouterr().err
    assert train.main(tiny_argv("--resume", "auto", "--run-tag", "stopped", *AUTO)) == 0  # the command that started it
    assert_equal_runs(run_of("straight"), run)
    assert explain_of_run("batch_size", read_run(run)).source == "batch_size auto"

    assert train.main(["--resume", f"{run}:4", "--fork", "--learning-rate", "2e-3"]) == 0
    assert read_run(run_of("stopped-fork")).settings["gradient_accumulation_steps"] == 2


@pytest.mark.usefixtures("six_fit")
def test_a_fork_searches_again_if_it_asks_for_auto(tiny_argv: Argv, run_of: Callable[[str], Path]) -> None:
    assert train.main(tiny_argv("--run-tag", "base", "--batch-size", "12", "--gradient-accumulation-steps", "4")) == 0
    words = ("--fork", "--max-iters", "8", "--tokens-per-step", "192")  # --tokens-per-step implies batch_size auto
    assert train.main(["--resume", str(run_of("base")), *words]) == 0
    settings = read_run(run_of("base-fork")).settings
    assert (settings["batch_size"], settings["gradient_accumulation_steps"]) == (24, 4)


def test_no_run_is_created_if_nothing_fits(
    tiny_argv: Argv, runs_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(utils.training.batch_size, "available_memory", lambda device: 1000)
    assert train.main(tiny_argv("--batch-size", "auto")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --batch-size: batch_size auto: not even one sequence of 8 tokens fits")
    assert error.count("\n") == 1
    assert not runs_dir.exists()


def test_the_search_leaves_random_state_and_torch_settings_unchanged(tiny_corpus: Path) -> None:
    data = DataConfig(dataset=str(tiny_corpus))
    config = Config(data=data, model=TINY, train=TrainConfig(batch_size="auto", threads=1, seed=5, deterministic=True))
    corpus = load_corpus(data, TINY.block_size, tiny_corpus.parent / "corpora")
    before = torch.get_rng_state(), torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    find_batch(LoadedConfig.from_config(config), corpus, CPU, torch.float32, lambda line: None)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()) == before[1:]


@pytest.mark.usefixtures("six_fit")
def test_epochs_are_counted_with_the_batch_that_was_found(tiny_argv: Argv, run_of: Callable[[str], Path]) -> None:
    words = tiny_argv("--run-tag", "epochs", *AUTO, "--epochs", "0.1")
    at = words.index("--max-iters")
    assert train.main(words[:at] + words[at + 2 :]) == 0
    resolved = read_record(run_of("epochs"))["resolved"]
    assert resolved["max_iters"] == -(-resolved["train_tokens"] * 0.1 // 96)


@pytest.mark.usefixtures("six_fit")
def test_a_profile_uses_the_batch_that_was_found(tiny_argv: Argv, capsys: pytest.CaptureFixture[str]) -> None:
    assert profile_model.main(tiny_argv(*AUTO, "--steps", "1", "--warmup", "0")) == 0
    printed = capsys.readouterr().out
    assert "batch_size auto: 12 sequences" in printed
    assert "12 x 8 tokens" in printed
