"""The benchmark commands, with tiny sizes: what they return and print, not how fast anything is."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, TINY_FLAGS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from benchmarks import (
    checkpoints,
    common,
    crash_test,
    data_arithmetic,
    data_prepare,
    experiments,
    gpu,
    loading,
    scaling,
    shakespeare,
    speedrun,
    startup,
    switched_run,
    tracking,
    training_arms,
)
from benchmarks import data as encoding
from benchmarks import training as training_benchmark
from benchmarks.callbacks import MARK
from benchmarks.switched_run import ALL, LOG, NAIVE, OFF
from benchmarks.training_arms import (
    ARMS,
    BARE,
    FUSED,
    HF_OFF,
    HF_TRACKED,
    LIGHTNING_OFF,
    LIGHTNING_TRACKED,
    PEAK,
    TRACKED,
    UNTRACKED,
    Result,
    Task,
)
from model import LanguageModel
from utils.config.settings import Config, ModelConfig, OptimizerConfig
from utils.errors import UserError
from utils.machine import device, limits
from utils.runs.log import read_metrics

COMMANDS = {
    "checkpoints": checkpoints.main,
    "crash_test": crash_test.main,
    "data": encoding.main,
    "data_arithmetic": data_arithmetic.main,
    "data_prepare": data_prepare.main,
    "loading": loading.main,
    "experiments": experiments.main,
    "gpu": gpu.main,
    "scaling": scaling.main,
    "shakespeare": shakespeare.main,
    "speedrun": speedrun.main,
    "startup": startup.main,
    "tracking": tracking.main,
    "training": training_benchmark.main,
}


@pytest.fixture(autouse=True)
def quick_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(limits.GEMM_SIZES, "cpu", (64,))


@pytest.fixture
def tiny_file(tmp_path: Path, tiny_corpus: Path) -> Path:
    """The tiny experiment as a file for --config."""
    settings = {flag.removeprefix("--").replace("-", "_"): value for flag, value in TINY_FLAGS.items()}
    settings |= {"dataset": str(tiny_corpus), "corpora_dir": str(tmp_path / "corpora")}
    path = tmp_path / "tiny.yaml"
    path.write_text("".join(f"{key}: {value}\n" for key, value in settings.items()), encoding="utf-8")
    return path


def test_shakespeare_prints_the_loss_of_each_seed_next_to_the_target(
    tiny_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shakespeare.main(["--steps", "4", "--seeds", "1,2", "--config", str(tiny_file)]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("val split", "target 1.90", "nanoGPT 1.886", "GFLOP/s by F.linear"))
    runs = [f"seed {seed}, {position} positions" for seed in (1, 2) for position in ("rope", "learned")]
    assert [printed.index(run) for run in runs] == sorted(printed.index(run) for run in runs)
    assert printed.count("median loss") == 2


def test_shakespeare_measures_the_run_that_it_was_given(tmp_path: Path, tiny_file: Path) -> None:
    loaded = common.load_config([tiny_file], tmp_path, {"seed": "7", "aim_logging": False})
    result = shakespeare.measure(loaded)
    assert (result.seed, result.steps) == (7, 6)
    assert result.split_loss == pytest.approx(result.estimate, abs=0.5)  # the same model on all tokens and on a sample
    assert result.seconds > 0
    assert result.tokens_per_second > 0


def test_a_run_that_diverges_has_no_result(tmp_path: Path, tiny_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diverged = SimpleNamespace(status="diverged", exit_reason="the loss at step 3 is nan")
    monkeypatch.setattr(train, "train", lambda *arguments, **options: diverged)
    with pytest.raises(UserError, match="the run ended as diverged: the loss at step 3 is nan"):
        shakespeare.measure(common.load_config([tiny_file], tmp_path, {"aim_logging": False}))


@pytest.mark.slow
def test_a_switched_run_measures_blocks_of_every_kind(tmp_path: Path, tiny_file: Path) -> None:
    kinds = switched_run.schedule((OFF, LOG, ALL, NAIVE), 2)
    assert sorted(kinds[:4]) == sorted(kinds[4:]) == sorted((OFF, LOG, ALL, NAIVE))
    loaded = tracking.load([tiny_file], tmp_path, batch_size=2, steps=60 + 8 * 20)
    measured = switched_run.run_switched(loaded, kinds, 20, 60)
    assert {kind: len(blocks) for kind, blocks in measured.blocks.items()} == dict.fromkeys((OFF, LOG, ALL, NAIVE), 2)
    assert all(ms > 0 for blocks in measured.blocks.values() for ms in blocks)
    assert len(measured.plain) + len(measured.flushing) + len(measured.binning) == 4 * 20  # steps that were logged
    assert all(0 < spent < 1e6 for spent in measured.plain)
    seconds, wall = measured.feeding
    assert 0 <= seconds < wall
    (run,) = (tmp_path / "runs").iterdir()
    steps = [step for step, _ in read_metrics(run / "logs", "train/loss")]
    blocks = [range(60 + 20 * i, 80 + 20 * i) for i, kind in enumerate(kinds) if kind in (LOG, ALL)]
    assert steps == [*range(60), *(step for block in blocks for step in block)]


def test_the_clock_of_the_views_stands_still_while_they_are_held() -> None:
    switch = switched_run.Switch()
    switch.set(OFF)
    before = switch.clock()
    time.sleep(0.05)
    assert switch.clock() == before
    switch.set(ALL)
    time.sleep(0.05)
    assert 0.04 < switch.clock() - before < 1


@pytest.mark.slow
def test_tracking_prints_each_ratio(tiny_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--parts", "steps", "--step-ms", "2", "--repeats", "1", "--block", "10", "--warmup", "55"]
    assert tracking.main([*words, "--config", str(tiny_file)]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in (LOG, ALL, NAIVE, "off, ms", "batch_size", "budget 2%", "F.linear"))


@pytest.mark.slow
def test_tracking_counts_records_and_closes_a_run(tiny_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--parts", "records,closing", "--records", "3000", "--steps", "60"]
    assert tracking.main([*words, "--config", str(tiny_file)]) == 0
    printed = capsys.readouterr().out
    assert "3,000 records in" in printed
    assert "0 lost in the log, 0 not fed, 0 out of order: reached" in printed
    assert re.search(r"views closed after \d+\.\d\d s", printed)


def test_experiments_makes_its_runs_and_times_each_command(tiny_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert experiments.main(["--runs", "3", "--steps", "12", "--repeats", "1", "--config", str(tiny_file)]) == 0
    printed = capsys.readouterr().out
    assert "3 runs of 12 logged steps" in printed
    assert all(f"│ {name} " in printed for name in experiments.LIMITS)
    assert "DuckDB alone" in printed


def test_a_run_with_a_failed_view_has_no_result(tmp_path: Path, tiny_file: Path) -> None:
    (tmp_path / ".aim").write_text("a file where Aim's folder should be")
    with pytest.raises(UserError, match="aim"):
        tracking.timed_closing(tracking.load([tiny_file], tmp_path, batch_size=2, steps=4))


def test_the_clock_printer_prints_when_the_loop_begins_and_when_a_step_is_done(
    tiny_argv: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    before = time.time()
    words = ("--max-iters", "1", "--callbacks", "benchmarks.callbacks:ClockPrinter")
    assert train.main(tiny_argv(*words)) == 0
    lines = capsys.readouterr().out.splitlines()
    loop, step = (float(line.split(MARK)[1]) for line in lines if line.startswith(MARK))
    assert before < loop < step < time.time()


def test_startup_times_every_command_once_per_repeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[str] = []

    def python(*words: str) -> str:
        commands.append(words[-1] if "--max-iters" not in words else "training")
        return f"{MARK} {time.time() + 3}\n{MARK} {time.time() + 5}\n"

    monkeypatch.setattr(startup, "run_python", python)
    seconds = startup.measure(2, tmp_path)
    assert {name: len(values) for name, values in seconds.items()} == dict.fromkeys(
        (startup.HELP, startup.IMPORT, startup.LOOP, startup.FIRST_STEP), 2
    )
    assert [commands.count(word) for word in ("--help", "import torch", "training")] == [3, 3, 3]  # one is a warmup
    assert seconds[startup.LOOP] == pytest.approx([3, 3], abs=0.5)
    assert seconds[startup.FIRST_STEP] == pytest.approx([5, 5], abs=0.5)
    assert startup.results_table(seconds).row_count == 4


def test_startup_reports_a_command_that_fails() -> None:
    with pytest.raises(UserError, match="unknown flag --no-such-flag"):
        startup.run_python("train.py", "--no-such-flag")


@pytest.mark.slow
def test_speedrun_compares_recipes_and_trains_the_last_for_the_time_of_the_first(
    tiny_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_file.write_text(tiny_file.read_text() + "warmup_iters: 0\n")  # the recipe's warmup would exceed the steps
    words = ["--seeds", "1", "--recipes", "shakespeare_cpu:learned,speedrun_cpu", "--config", str(tiny_file)]
    assert speedrun.main([*words, "--target", "9"]) == 0
    printed = capsys.readouterr().out
    assert printed.index("seed 1: shakespeare_cpu:learned\n") < printed.index("seed 1: speedrun_cpu\n")
    assert "1 of 1" in printed
    assert "mean loss" in printed
    assert "at most 9: reached" in printed
    assert re.search(r"time 1/[0-9.]+ of the first recipe, at most 1/5: (reached|missed)", printed)
    assert re.search(r"in the time of the first recipe: mean loss [0-9.]+, at most 1.65: missed", printed)


def test_help_does_not_import_torch() -> None:
    code = (
        "import contextlib, importlib, sys\n"
        f"for name in {list(COMMANDS)!r}:\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        importlib.import_module(f'benchmarks.{name}').main(['--help'])\n"
        "    assert 'torch' not in sys.modules, f'{name} has imported torch'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: ") == len(COMMANDS)
    assert all(f"benchmarks.{name}" in done.stdout for name in COMMANDS)


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("shakespeare", ["--seeds", "1,x"], "--seeds: expected numbers >= 0"),
        ("speedrun", ["--recipes", "speedrun_cpy"], "--recipes: no preset speedrun_cpy; did you mean speedrun_cpu?"),
        ("speedrun", ["--recipes", ","], "--recipes: expected names of presets"),
        ("shakespeare", ["--steps", "0"], "--steps must be at least 1"),
        ("tracking", ["--step-ms", ","], "--step-ms: expected numbers >= 0.1"),
        ("tracking", ["--warmup", "0"], "--warmup must be at least 1"),
        ("tracking", ["--parts", "stps"], "--parts: unknown: stps; expected steps, records, closing"),
        ("loading", ["--repeats", "0"], "--repeats must be at least 1, not 0"),
        ("data", ["--megabytes", "0"], "--megabytes must be at least 1, not 0"),
        ("data_prepare", ["--megabytes", "0"], "--megabytes must be at least 1, not 0"),
        ("checkpoints", ["--parts", "tape"], "unknown: tape; expected loop, disk"),
        ("crash_test", ["--kills", "0"], "--kills must be at least 1"),
        ("gpu", ["--parts", "paces"], "--parts: unknown: paces; expected some of limits, step, loss, gpt2, decode"),
        ("gpu", ["--minutes", "0"], "--minutes must be more than 0, not 0"),
        ("gpu", ["--out", "/no/such/folder/a.json"], "--out /no/such/folder/a.json: there is no folder"),
        ("gpu", ["--dry-run", "--nanogpt", "/no/such/folder"], "--nanogpt /no/such/folder: not a checkout of nanoGPT"),
        ("scaling", ["--out", "scaling.svg"], "--out scaling.svg: expected a file that ends in .png"),
        ("scaling", ["--out", "/no/such/folder/a.png"], "--out /no/such/folder/a.png: there is no folder"),
        ("training", ["--warmup", "10"], "--warmup must be at least 65, not 10"),
        ("startup", ["--repeat", "3"], "unknown flag --repeat; did you mean --repeats?"),
    ],
)
def test_a_bad_flag_is_reported_in_one_line(
    name: str, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert COMMANDS[name](words) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


@pytest.mark.slow
def test_data_compares_each_tokenizer_with_its_library(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = encoding.generated_text(1)[:20_000]
    monkeypatch.setattr(encoding, "generated_text", lambda size: text)
    assert encoding.main(["--megabytes", "1", "--repeats", "1"]) == 0
    printed = capsys.readouterr().out
    assert all(f"│ {kind} " in printed for kind in ("char", "byte", "bpe"))
    assert "machine: " in printed


def test_data_arithmetic_evaluates_the_held_out_problems_of_the_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert data_arithmetic.main(["--steps", "1", "--digits", "1", "--problems", "100"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"│ 1337 │ 22\d,\d{3} reached │ +1 │ +\d+ reached │ +\d+\.\d\d% of \d+ missed │", printed)


def test_loading_prints_each_figure_with_its_bound(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        loading, "measure", lambda code, folder, kind, what="": {"seconds": len(kind) / 10, "anonymous": 1000.0}
    )
    monkeypatch.setattr(loading.common, "launch", lambda words, name: loading.common.Launched("", 0.3, 40.0))
    assert loading.main(["--shape", "small", "--repeats", "1"]) == 0
    printed = capsys.readouterr().out
    assert "time: 0.67 times (95%: 0.67-0.67), at most 1.3 reached" in printed
    assert "at most 1.2 reached" in printed
    assert re.search(
        r"export for transformers in bfloat16: 0\.8 s, 0\.\d\d times the weights .*, at most 0\.5 reached", printed
    )
    assert "inspect: 0.30 s, 40 MB, at most 0.5 s and 100 MB reached" in printed
    assert re.search(r"decode: loaded [\d,.]+ tokens/s, made in memory .* at least 0.95 (reached|missed)", printed)


def test_checkpoints_prints_the_share_of_plain_writing_and_reading(capsys: pytest.CaptureFixture[str]) -> None:
    assert checkpoints.main(["--parts", "disk", "--megabytes", "1", "--repeats", "1"]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("write / plain write: ", "read / plain read: ", "at least 0.5", "threads"))


@pytest.mark.slow
def test_checkpoints_prints_the_cost_of_saving_per_step(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "INTERVAL", 5)
    assert checkpoints.main(["--parts", "loop", "--models", "0.8M", "--saves", "1", "--repeats", "1"]) == 0
    assert re.search(r"saving / not saving: \d\.\d+ .* limit 1\.03", capsys.readouterr().out)


@pytest.mark.slow
def test_crash_test_kills_resumes_and_compares(capsys: pytest.CaptureFixture[str]) -> None:
    assert crash_test.main(["--kills", "1", "--steps", "300", "--seconds", "5"]) == 0
    printed = capsys.readouterr().out
    assert "resumed                  1 of 1" in printed
    assert "differing weight bits    0" in printed
    assert re.search(r"checkpoints +0 damaged of \d+", printed)


def test_the_machine_is_named_by_its_processor_and_its_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "cpu_generation", lambda: "Zen 9 (family 99, model 7)")
    facts = common.machine_facts()
    assert ", Zen 9 (family 99, model 7), " in facts
    rates = re.search(r"float32 matrix product (\d+) GFLOP/s by F.linear, (\d+) by utils/nn/linear.py", facts)
    assert rates
    assert facts.endswith(f"{torch.get_num_threads()} threads, {rates.group()}, torch {torch.__version__}")


def test_interleaving_measures_every_arm_once_per_repeat_in_rotating_order() -> None:
    order: list[str] = []
    arms = {name: lambda name=name: order.append(name) for name in "abc"}
    common.interleaved(arms, 3)
    assert order == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]


def test_the_ratio_of_medians_has_an_interval_that_excludes_one_outlier() -> None:
    # Of 7 values drawn from these, the median is the least or the largest one in 1% of the draws.
    assert common.ratio_interval([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 100.0], [1.0] * 7) == (4.0, 2.0, 6.0)


def test_the_ratio_keeps_the_runs_of_a_repeat_together() -> None:
    assert common.ratio_interval([2.0, 4.0, 18.0], [1.0, 2.0, 9.0]) == (2.0, 2.0, 2.0)


# ----------------------------------------------------------------------------- ours, transformers and Lightning


def tiny_task(arm: str, tmp_path: Path, *files: Path, **model: Any) -> Task:
    """A task of one layer and 70 steps; `model` overrides its settings."""
    (tmp_path / "task").mkdir(exist_ok=True)
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "batch_size": 2, "threads": 1, **model}
    (tmp_path / "sizes.yaml").write_text("".join(f"{key}: {value}\n" for key, value in sizes.items()))
    config = training_benchmark.experiment([tmp_path / "sizes.yaml", *files], tmp_path)
    task = training_benchmark.make_task(arm, config, steps=5, warmup=65, folder=tmp_path)
    return replace(task, folder=str(tmp_path / "task"))


@pytest.mark.parametrize("arm", [TRACKED, UNTRACKED])
def test_our_arm_trains_with_and_without_tracking(arm: str, tmp_path: Path) -> None:
    result = training_arms.run(tiny_task(arm, tmp_path))
    assert result.step_ms > 0
    assert (
        result.parameters
        == LanguageModel(ModelConfig(n_layer=1, n_head=2, n_embd=16, block_size=8), 65).num_parameters()
    )
    (run,) = (tmp_path / "task" / "runs").iterdir()
    steps = [step for step, _ in read_metrics(run / "logs", "train/loss")]
    assert steps == (list(range(70)) if arm == TRACKED else [])
    assert (run / "logs" / "fed_aim.json").exists() == (arm == TRACKED)


def test_only_the_steps_after_the_warmup_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(training_arms.time, "perf_counter", lambda: now)
    opened = []
    clock = training_arms.StepClock(tiny_task(TRACKED, tmp_path), lambda: opened.append(now))
    for step in range(70):
        now += 1.0 if step < 65 else 0.001 * (step - 64)
        clock.step_done()
    assert opened == [65.0]
    assert clock.step_ms == pytest.approx(3.0)  # the mean of 1, 2, 3, 4 and 5


@pytest.mark.slow
def test_an_arm_is_a_new_process_whose_memory_and_threads_are_reported(tmp_path: Path) -> None:
    result, memory_mb = training_benchmark.measure(tiny_task(PEAK, tmp_path))
    assert result.threads == 1
    assert result.gflops > 0
    assert 100 < memory_mb < 2000


def test_an_arm_that_fails_is_reported_in_one_line(tmp_path: Path) -> None:
    task = replace(tiny_task(UNTRACKED, tmp_path), config=str(tmp_path / "gone.json"))
    with pytest.raises(UserError, match=r"^ours, no tracking: .*gone\.json"):
        training_benchmark.measure(task)


def test_gpt2_gets_the_shape_of_our_model() -> None:
    model = ModelConfig(n_layer=3, n_head=2, n_embd=16, ffn_dim=48, block_size=8, dropout=0.1, norm_eps=1e-6)
    settings = training_benchmark.gpt2_settings(model, 65)
    assert settings.items() >= {"n_layer": 3, "n_head": 2, "n_embd": 16, "n_inner": 48, "n_positions": 8}.items()
    assert settings.items() >= {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}.items()
    assert settings.items() >= {"vocab_size": 65, "layer_norm_epsilon": 1e-6, "activation_function": "gelu"}.items()
    assert training_benchmark.gpt2_settings(ModelConfig(), 65)["n_inner"] == 4 * 128


def test_an_update_is_one_micro_step_in_every_arm(tmp_path: Path) -> None:
    task = tiny_task(BARE, tmp_path, batch_size=6, gradient_accumulation_steps=3)
    assert task.batch_size == 2
    written = json.loads(Path(task.config).read_text())["train"]
    assert (written["batch_size"], written["gradient_accumulation_steps"]) == (2, 1)


def test_settings_that_gpt2_lacks_are_reported() -> None:
    assert training_benchmark.beyond_gpt2(Config(model=ModelConfig(ffn_dim=100, n_kv_head=4, qkv_bias=True))) == []
    llama = ModelConfig(n_kv_head=2, position="rope", norm="rmsnorm", mlp="swiglu", bias=False)
    found = training_benchmark.beyond_gpt2(Config(model=llama, optimizer=OptimizerConfig(learning_rate=1e-4)))
    assert found == ["n_kv_head 2", "position rope", "norm rmsnorm", "mlp swiglu", "bias off", "qkv_bias off"]


def test_a_shape_that_the_arms_cannot_share_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"GPT-2 needs n_embd \(16\) divisible by n_head \(3\)"):
        tiny_task(BARE, tmp_path, n_head=3, head_dim=4)
    with pytest.raises(UserError, match="batch_size auto: "):
        tiny_task(BARE, tmp_path, batch_size="auto")


def test_without_the_other_packages_training_says_how_to_install_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training_benchmark, "PACKAGES", ("torch", "no_such_package"))
    assert training_benchmark.main([]) == 2
    message = "error: not installed: no_such_package; python -m pip install -r requirements-bench.txt\n"
    assert capsys.readouterr().err == message


def test_training_prints_ratios_limits_and_the_time_of_matrix_products(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step_ms = {TRACKED: 10.0, UNTRACKED: 9.0, HF_TRACKED: 15.0}

    def measured(task: Task) -> tuple[Result, float]:
        return Result(step_ms.get(task.arm, 20.0), 800, task.threads, gflops=100.0), 300.0 + len(task.arm)

    monkeypatch.setattr(training_benchmark, "PACKAGES", ())
    monkeypatch.setattr(training_benchmark, "measure", measured)
    assert training_benchmark.main(["--repeats", "2"]) == 0
    printed = capsys.readouterr().out
    assert all(arm in printed for arm in ARMS)
    assert f"{TRACKED} / {BARE}: 2.00 (95%: 2.00-2.00), at least 1.7 reached" in printed
    assert f"{TRACKED} / {HF_TRACKED}: 1.50 (95%: 1.50-1.50), at least 2 missed" in printed
    assert f"{UNTRACKED} / {HF_OFF}: 2.22 (95%: 2.22-2.22), at least 2 reached" in printed
    assert f"{TRACKED} / {LIGHTNING_TRACKED}: 2.00" in printed
    assert f"{UNTRACKED} / {LIGHTNING_OFF}: 2.22" in printed
    assert "3.82 GFLOP a step, 38.2 ms at the 100 GFLOP/s" in printed
    assert "peak memory: 318 MB, bare loop 309 MB, no higher: missed" in printed


@pytest.mark.slow
@pytest.mark.xdist_group("transformers")
@pytest.mark.parametrize("shape", [{}, {"n_head": 1, "ffn_dim": 40, "block_size": 5}])
def test_gpt2_has_as_many_parameters_as_ours(shape: dict[str, int], tmp_path: Path) -> None:
    task = tiny_task(BARE, tmp_path, **shape)
    model = ModelConfig(**{"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, **shape})
    assert training_arms.gpt2(task).num_parameters() == LanguageModel(model, 65).num_parameters()


@pytest.mark.slow
@pytest.mark.xdist_group("transformers")
@pytest.mark.parametrize(
    ("arm", "tags"),
    [
        (BARE, ()),
        (FUSED, ()),
        (HF_TRACKED, ("train/loss", "train/grad_norm", "train/learning_rate")),
        (LIGHTNING_TRACKED, ("train_loss", "learning_rate")),
        (HF_OFF, ()),
        (LIGHTNING_OFF, ()),
    ],
)
def test_the_other_arms_train_and_track_every_step_or_nothing(arm: str, tags: tuple[str, ...], tmp_path: Path) -> None:
    task = tiny_task(arm, tmp_path)
    result = training_arms.run(task)
    assert result.step_ms > 0
    assert result.parameters > 0
    files = list(Path(task.folder).rglob("*tfevents*"))
    assert len(files) == (1 if tags else 0)
    for file in files:
        events = EventAccumulator(str(file), size_guidance={"scalars": 0}).Reload()
        assert [len(events.Scalars(tag)) for tag in tags] == [70] * len(tags)


# ------------------------------------------------------------------------------------------------ scaling


def test_predictions_scale_with_the_operations_from_the_base() -> None:
    shapes = [shape for of_axis in scaling.shapes().values() for shape in of_axis.values()]
    gflop = {shape: 2.0 * dict(shape)["n_layer"] for shape in shapes}
    points = scaling.points_of(dict.fromkeys(shapes, 80.0), gflop)
    assert {axis: [p.value for p in points if p.axis == axis] for axis in scaling.VARIED} == {
        axis: list(values) for axis, values in scaling.VARIED.items()
    }
    assert [p.predicted_ms for p in points if p.axis == "n_layer"] == [20.0, 40.0, 80.0, 160.0, 320.0]
    assert {p.predicted_ms for p in points if p.axis != "n_layer"} == {80.0}


def test_scaling_prints_a_table_and_draws_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 4, "batch_size": 2}
    monkeypatch.setattr(scaling, "BASE", base)
    monkeypatch.setattr(scaling, "VARIED", {axis: (base[axis], 2 * base[axis]) for axis in scaling.VARIED})
    out = tmp_path / "scaling.png"
    assert scaling.main(["--repeats", "1", "--steps", "1", "--warmup", "0", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("batch size", "block size", "width", "depth", "ratio", "MFU", "written"))
    assert out.read_bytes().startswith(b"\x89PNG")
