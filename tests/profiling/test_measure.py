"""The profile of a training step: its counts are right, and profile_model.py writes, shows and compares it."""

from __future__ import annotations

import errno
import inspect
import json
import mmap
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.nn.modules.module import register_module_forward_hook
from torch.profiler import record_function

import profile_model
from model import LanguageModel
from utils.config.settings import ModelConfig
from utils.machine import limits
from utils.nn.attention import SHORT_TOKENS, ShortAttention
from utils.nn.costs import training_flops
from utils.profiling import picture
from utils.profiling.assemble import measure_limits
from utils.profiling.decoding import measure_generation
from utils.profiling.measure import StepTimes, measure_steps, new_profiler, read_operators, read_trace
from utils.profiling.memory import ActivationMeter, bytes_of, peak, reset_peak
from utils.profiling.operators import operator_bytes, operator_flops
from utils.profiling.picture import draw_profile, operator_slices, phase_slices
from utils.profiling.record import OTHER_PHASE, Profile, read_profile
from utils.profiling.tables import profile_tables
from utils.terminal.cli import Parser
from utils.terminal.console import Terminal
from utils.training.step import COMMUNICATION, PHASES, Phase

ALONE = [phase for phase in PHASES if phase != COMMUNICATION]  # the phases of one rank
CPU = torch.device("cpu")
Argv = Callable[..., list[str]]


@pytest.fixture(autouse=True)
def quiet_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")


class FixedStep:
    """A step with two phases, and some work outside them."""

    def __init__(self) -> None:
        self.calls = 0
        self.matrix = torch.randn(120, 120)

    def __call__(self, phase: Phase) -> None:
        self.calls += 1
        with phase("data"):
            self.matrix.add(1.0)
        for _ in range(2):
            with phase("forward"):
                for _ in range(20):
                    self.matrix @ self.matrix
        self.matrix.sin()


@pytest.fixture(scope="module")
def times() -> StepTimes:
    return measure_steps(FixedStep(), CPU, steps=4, warmup=1)


def test_phases_are_in_order_and_add_up(times: StepTimes) -> None:
    assert [row.name for row in times.phases] == [*ALONE, OTHER_PHASE]
    rows = {row.name: row for row in times.phases}
    assert (rows["data"].calls, rows["forward"].calls, rows["backward"].calls) == (1.0, 2.0, 0.0)  # per step
    assert rows["forward"].ms > rows["data"].ms
    assert times.phases_ms == pytest.approx(sum(row.ms for row in times.phases))


def test_operators_have_a_phase_a_kind_and_a_cost(times: StepTimes) -> None:
    assert [row.ms for row in times.operators] == sorted((row.ms for row in times.operators), reverse=True)
    rows = {(row.phase, row.name): row for row in times.operators}
    assert rows.keys() == {("data", "add"), ("forward", "matmul"), (OTHER_PHASE, "sin")}
    product = rows["forward", "matmul"]
    assert (product.kind, product.calls) == ("matrix products", 40)
    assert product.gflop == pytest.approx(40 * 2 * 120**3 / 1e9)
    assert product.gbyte == pytest.approx(40 * 3 * 120**2 * 4 / 1e9)
    assert rows["data", "add"].gbyte == pytest.approx(2 * 120**2 * 4 / 1e9)
    assert sum(row.ms for row in times.operators) < times.profiled_ms


def test_each_measurement_runs_its_own_steps_after_the_warmup() -> None:
    step = FixedStep()
    assert measure_steps(step, CPU, steps=3, warmup=2).steps == 3
    assert step.calls == 2 + 3 * 3


def test_the_operators_of_both_passes_add_up_to_the_estimate_from_the_shapes() -> None:
    T = SHORT_TOKENS + 16  # for shorter sequences attention also multiplies the upper triangle
    config = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=T, position="rope")
    model, idx = LanguageModel(config, vocab_size=11), torch.zeros(3, T, dtype=torch.int64)

    def step(phase: Phase) -> None:
        with phase("forward"):
            _, loss = model(idx, idx)
        with phase("backward"):
            loss.backward()

    operators = measure_steps(step, CPU, steps=1, warmup=0).operators
    counted = {name: sum(row.gflop for row in operators if row.phase == name) for name in ("forward", "backward")}
    needed = training_flops(model, 3, config.block_size) / 1e9
    assert counted == pytest.approx({"forward": needed / 3, "backward": needed * 2 / 3})


def test_short_attention_is_listed_as_attention() -> None:
    config = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=SHORT_TOKENS // 2)
    model, idx = LanguageModel(config, vocab_size=11), torch.zeros(3, SHORT_TOKENS // 2, dtype=torch.int64)

    def step(phase: Phase) -> None:
        with phase("forward"):
            _, loss = model(idx, idx)
        with phase("backward"):
            loss.backward()

    operators = measure_steps(step, CPU, steps=1, warmup=1).operators
    rows = {row.phase: row for row in operators if row.kind == "attention"}
    assert {phase: row.name for phase, row in rows.items()} == {
        "forward": ShortAttention.__name__,
        "backward": f"{ShortAttention.__name__}Backward",
    }
    product = 2 * 3 * (SHORT_TOKENS // 2) ** 2 * 32 / 1e9  # over all heads
    assert [rows[phase].gflop for phase in ("forward", "backward")] == pytest.approx([2 * 2 * product, 2 * 4 * product])
    assert not any(row.name in ("bmm", "baddbmm") for row in operators)


def test_the_cost_of_an_operator_is_derived_without_fields_that_torch_2_12_added() -> None:
    """Without them, a list of tensors has no shape, so its bytes are unknown."""
    profiler = new_profiler(CPU)
    a, b, pair = torch.ones(20, 30), torch.ones(30, 40), [torch.ones(50), torch.ones(60)]
    with profiler:
        for name in ("step", "forward"):
            with record_function(name):
                a @ b
                a.double() + 1
                torch._foreach_add_(pair, 1.0)
    for event in profiler.events():
        vars(event).pop("structured_input_shapes", None)
        vars(event).pop("input_dtypes", None)
    _, operators = read_operators(profiler, CPU)
    rows = {row.name: row for row in operators if row.phase == "forward"}
    assert (rows["matmul"].kind, rows["matmul"].gflop) == ("matrix products", pytest.approx(2 * 20 * 30 * 40 / 1e9))
    assert rows["matmul"].gbyte == pytest.approx(4 * (20 * 30 + 30 * 40 + 20 * 40) / 1e9)
    assert rows["add"].gbyte == pytest.approx(4 * 2 * 20 * 30 / 1e9)  # unknown types are counted as float
    assert rows["_foreach_add_"].gbyte == 0.0


class EventsOfAGPU:
    """A profiler that recorded one step: kernels have their own times, and the backward pass has its own thread."""

    def __init__(self) -> None:
        self.made: list[FunctionEvent] = []
        self.add("step", 0, 1000)
        self.add("forward", 0, 300)
        self.add("backward", 300, 900)
        linear = self.add("aten::linear", 10, 30, shapes=[[8, 4], [2, 4]], parent=self.made[1])
        self.add("aten::addmm", 12, 28, shapes=[[2], [8, 4], [4, 2]], parent=linear, kernel=100.0)
        node = self.add("autograd::engine::evaluate_function: AddmmBackward0", 310, 360, thread=2)
        self.add("aten::mm", 320, 330, shapes=[[4, 8], [8, 2]], parent=node, kernel=200.0, thread=2)
        self.add("triton_fused", 340, 350, parent=node, kernel=50.0, thread=2)
        self.add("aten::zeros", 950, 960, kernel=10.0)
        self.made.append(FunctionEvent(99, "gemm_kernel", 7, 20, 120, device_type=DeviceType.CUDA, use_device="cuda"))

    def add(
        self,
        name: str,
        start: int,
        end: int,
        shapes: Sequence[list[int]] = (),
        parent: FunctionEvent | None = None,
        kernel: float = 0.0,
        thread: int = 1,
    ) -> FunctionEvent:
        event = FunctionEvent(
            len(self.made),
            name,
            thread,
            start,
            end,
            use_device="cuda",
            input_shapes=list(shapes),
            concrete_inputs=[None] * len(shapes),
        )
        event.structured_input_shapes, event.input_dtypes = list(shapes), ["float"] * len(shapes)
        if kernel:
            event.append_kernel("kernel", 0, kernel)
        if parent is not None:
            parent.append_cpu_child(event)
            event.set_cpu_parent(parent)
        self.made.append(event)
        return event

    def events(self) -> list[FunctionEvent]:
        return self.made


def test_on_a_gpu_operators_have_the_time_of_their_kernels_and_the_phase_that_launched_them() -> None:
    step_ms, operators = read_operators(EventsOfAGPU(), torch.device("cuda"))  # type: ignore[arg-type]
    assert step_ms == 1.0
    assert [(row.name, row.phase, row.kind, row.ms, row.gflop * 1e9) for row in operators] == [
        ("mm", "backward", "matrix products", 0.2, pytest.approx(2 * 4 * 8 * 2)),
        ("linear", "forward", "matrix products", 0.1, pytest.approx(2 * 8 * 4 * 2)),
        ("triton_fused", "backward", "other operators", 0.05, 0.0),
        ("zeros", OTHER_PHASE, "other operators", 0.01, 0.0),
    ]


@pytest.mark.parametrize(
    ("name", "shapes", "flops", "numbers"),
    [
        ("aten::mm", [[2, 3], [3, 5]], 2 * 2 * 3 * 5, 6 + 15 + 10),
        ("aten::addmm", [[5], [2, 3], [3, 5]], 60, 31),
        ("aten::baddbmm", [[4, 2, 5], [4, 2, 3], [4, 3, 5]], 240, 124),
        ("aten::linear", [[7, 2, 3], [5, 3], [5]], 420, 42 + 15 + 70),
        ("aten::gelu", [[2, 3]], None, 12),
        ("aten::sum", [[2, 3]], None, 6),
        ("aten::copy_", [[2, 3], [2, 3]], None, 12),
        ("aten::embedding", [[100, 4], [2, 3]], None, 48),
        ("aten::view", [[2, 3]], None, 0),
        ("aten::_fused_adamw_", [[[2, 3], [4]]] * 4, None, 70),
        ("aten::linear", [[], []], None, 0),
        ("aten::_scaled_mm", [[2, 3], [3, 4], [], []], 48, 6 + 12 + 8),
    ],
)
def test_the_cost_of_an_operator_is_derived_from_its_shapes(
    name: str, shapes: list[list[int]], flops: float | None, numbers: int
) -> None:
    assert operator_flops(name, shapes, []) == flops
    assert operator_bytes(name, shapes, ["float"] * len(shapes)) == 4 * numbers


def test_causal_attention_costs_the_lower_triangle_and_its_backward_pass_twice_that() -> None:
    qkv = [[2, 4, 8, 16]] * 3
    whole = 2 * 2 * 4 * 8 * 8 * 32
    name = "aten::scaled_dot_product_attention"
    assert operator_flops(name, qkv, [0.0, False]) == whole
    assert operator_flops(name, qkv, [0.0, True]) == whole * 9 / 16
    backward = "aten::_scaled_dot_product_flash_attention_backward"
    assert operator_flops(backward, [qkv[0], *qkv], [0.0, True]) == whole * 9 / 8


def test_limits_are_measured_without_changing_the_random_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "GEMM_SIZES", {"cpu": (64, 128)})
    monkeypatch.setattr(limits, "COPY_MIB", {"cpu": (1,)})
    before = torch.get_rng_state()
    measured = measure_limits(CPU, [torch.float32, torch.bfloat16])
    assert measured.gemm.keys() == {"float32", "bfloat16"}
    assert min(*measured.gemm.values(), measured.copy_gbytes) > 0
    assert torch.equal(before, torch.get_rng_state())


def test_a_matrix_product_that_would_take_too_long_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SECONDS", 0.0)
    monkeypatch.setattr(limits, "GEMM_SIZES", {"cpu": (16, 10**6)})
    assert limits.measure_gemm(CPU, torch.float32) > 0


def test_activations_are_the_tensors_that_autograd_keeps_except_weights() -> None:
    layer = torch.nn.Linear(8, 4, bias=False)
    x = torch.randn(16, 8)
    meter = ActivationMeter(layer)
    with meter("forward"):
        hidden = layer(x)  # keeps x
        hidden.view(-1).exp()  # keeps its result
    with meter("backward"):
        layer(x)
    assert meter.bytes == (16 * 8 + 16 * 4) * 4


def test_memory_shared_by_several_tensors_is_counted_once() -> None:
    x = torch.zeros(10)
    assert bytes_of([x, x[2:], x.view(2, 5), torch.zeros(3)]) == 52


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports the peak of a process")
def test_the_peak_of_the_process_is_measured_since_the_last_reset() -> None:
    if not reset_peak(CPU):
        pytest.skip("not allowed here")
    before = peak(CPU)
    with mmap.mmap(-1, 40_000_000) as memory:  # returned to the system, whereas torch may keep freed memory
        for place in range(0, len(memory), mmap.PAGESIZE):
            memory[place] = 1
    assert peak(CPU) - before > 35_000_000
    reset_peak(CPU)
    assert peak(CPU) - before < 20_000_000


@pytest.mark.parametrize("static", [False, True])
def test_the_bytes_of_decoding_are_weights_one_row_of_each_table_and_the_cache(
    static: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("utils.profiling.decoding.is_static", lambda _: static)
    config = ModelConfig(n_layer=2, n_head=2, n_embd=32, block_size=16)
    model = LanguageModel(config, vocab_size=11)
    result = measure_generation(model)
    weights = model.num_parameters() - 15 * 32  # one of 16 positions is looked up
    context = 8 + (8 + 1) / 2
    assert (result.prompt, result.decoded) == (16, 8)
    assert result.decode_gbyte * 1e9 == pytest.approx(4 * (weights + 2 * 2 * 32 * context))
    assert min(result.prefill_ms, result.decode_ms) > 0
    assert model.training


def test_generation_is_measured_on_the_lean_model() -> None:
    called: list[str] = []
    model = LanguageModel(ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=8), vocab_size=11)
    watching = register_module_forward_hook(lambda module, *_: called.append(type(module).__name__))
    try:
        measure_generation(model)
    finally:
        watching.remove()
    assert not called


# ------------------------------------------------------------------------------------------------ the script


@pytest.fixture
def quick_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "GEMM_SIZES", {"cpu": (64,)})
    monkeypatch.setattr(limits, "COPY_MIB", {"cpu": (1,)})


def test_the_script_writes_profile_trace_and_picture(
    tiny_argv: Argv, tmp_path: Path, runs_dir: Path, quick_limits: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "profile"
    words = ("--steps", "3", "--warmup", "1", "--top", "4", "--gradient-accumulation-steps", "2", "--out", str(out))
    assert profile_model.main(tiny_argv(*words)) == 0

    assert sorted(os.listdir(out)) == ["profile.json", "profile.png", "trace.json"]
    record = json.loads((out / "profile.json").read_text(encoding="utf-8"))
    assert (record["schema_version"], record["steps"], record["run"]) == (1, 3, None)
    assert record["mfu"] > 0
    assert record["config"]["model"]["n_embd"] == 16
    assert record["machine"]["threads"] == 1
    phases = {row["name"]: row for row in record["phases"]}
    assert list(phases) == [*ALONE, OTHER_PHASE]
    assert [phases[name]["calls"] for name in ALONE] == [2, 2, 2, 2, 1]  # one update of two micro-steps
    assert sum(phase["ms"] for phase in phases.values()) == pytest.approx(record["phases_ms"])
    memory = record["memory"]
    assert memory["weights"] == memory["gradients"] == 4 * record["parameters"]
    assert memory["optimizer"] >= 8 * record["parameters"]
    assert memory["activations"] > 0
    assert (out / "profile.png").read_bytes().startswith(b"\x89PNG")

    events = json.loads((out / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    names = [event.get("name") for event in events]
    assert names.count("step") == 3
    assert names.count("forward") == 6
    assert any(str(name).startswith("aten::") for name in names)

    shown = capsys.readouterr().out
    titles = ("Phases of a step", "Where the time goes", "Operators", "Memory", "Generation in float32")
    assert all(title in shown for title in titles)
    for words in (
        "undisturbed",
        "separate steps",
        "further steps",
    ):  # each of the three times has its own steps
        assert shown.count(words) == 1
    growth = re.findall(r"^growth of the process +([\d.]+)$", shown, re.MULTILINE)
    assert growth == ([] if memory["peak"] is None else [f"{memory['peak'] / 1e6:,.1f}"])
    assert str(out / "profile.json") in shown.replace("\n", "")
    tables = [line for line in shown.split("written:")[0].splitlines() if not line.endswith(".")]  # no sentences
    assert max(map(len, tables)) <= 80
    assert not runs_dir.exists()  # profiling creates no run


def test_a_profile_that_cannot_be_written_leaves_the_previous_files(
    tiny_argv: Argv,
    tmp_path: Path,
    quick_limits: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "profile"
    out.mkdir()
    (out / "profile.json").write_text("previous")
    monkeypatch.setattr(picture, "draw_profile", fail)
    assert profile_model.main(tiny_argv("--steps", "1", "--warmup", "0", "--out", str(out))) == 2
    assert f"error: --out {out}: cannot be written: No space left on device" in capsys.readouterr().err
    assert os.listdir(out) == ["profile.json"]
    assert (out / "profile.json").read_text() == "previous"


@pytest.mark.parametrize("written", [None, '{"traceEvents": [{"name": "st'])
def test_a_truncated_trace_is_noticed(written: str | None) -> None:
    class OnAFullDisk:
        def export_chrome_trace(self, path: str) -> None:
            if written is not None:
                Path(path).write_text(written)

    with pytest.raises(OSError, match="the profiler could not write its trace"):
        read_trace(OnAFullDisk())  # type: ignore[arg-type]


def test_the_script_without_out_writes_no_files(
    tiny_argv: Argv,
    tmp_path: Path,
    quick_limits: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert profile_model.main(tiny_argv("--steps", "1", "--warmup", "0", "--json")) == 0
    assert os.listdir() == []
    found = json.loads(capsys.readouterr().out)
    assert (found["steps"], found["config"]["model"]["n_embd"]) == (1, 16)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--steps", "0"), "--steps: must be at least 1, not 0"),
        (("--warmup", "-1"), "--warmup: must be at least 0, not -1"),
        (("--top", "0"), "--top: must be at least 1, not 0"),
        (("--steps", "many"), "--steps: invalid whole number value: 'many'"),
        (("--dataset", "/no/such/text"), "unknown dataset /no/such/text"),
        (("--shard", "fsdp"), "--shard: a sharded model cannot be profiled: shard must be none"),
        (("--lr-range", "--shard", "fsdp"), "--shard: a sharded model cannot be profiled"),
    ],
)
def test_a_mistake_in_the_flags_is_one_line_and_exit_status_2(
    tiny_argv: Argv, words: tuple[str, ...], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert profile_model.main(tiny_argv(*words)) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert error in message
    assert message.count("\n") == 1


def test_an_out_folder_that_cannot_be_created_is_refused(
    tiny_argv: Argv, tiny_corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert profile_model.main(tiny_argv("--out", str(tiny_corpus))) == 2
    assert "cannot be created" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- two profiles


def record(**changes: Any) -> dict[str, Any]:
    """The profile.json of a GPU, with round numbers."""
    return {
        "schema_version": 1,
        "created": "2026-01-31T14:25:01.000+00:00",
        "machine": {
            "device": "cuda",
            "processor": "A GPU",
            "dtype": "bfloat16",
            "threads": 8,
            "torch": "2.13.0",
            "compile": False,
        },
        "config": {"model": {"n_layer": 4, "n_embd": 128, "block_size": 64}, "train": {"batch_size": 12}},
        "parameters": 1000,
        "tokens_per_step": 768,
        "steps": 20,
        "step_ms": 10.0,
        "phases_ms": 12.0,
        "profiled_ms": 15.0,
        "gflop": 100.0,
        "limits": {"gemm": {"bfloat16": 20_000.0, "float32": 5_000.0}, "copy_gbytes": 2000.0},
        "phases": [
            {"name": "forward", "calls": 1.0, "ms": 4.0, "gflop": 33.0},
            {"name": "backward", "calls": 1.0, "ms": 8.0, "gflop": 67.0},
        ],
        "operators": [
            {"name": n, "phase": p, "kind": k, "calls": 2.0, "ms": ms, "gflop": flop, "gbyte": 1.0}
            for n, p, k, ms, flop in (
                ("mm", "backward", "matrix products", 9.0, 60.0),
                ("linear", "forward", "matrix products", 3.0, 30.0),
                ("gelu", "forward", "other operators", 0.5, 0.0),
                ("add", "forward", "other operators", 0.001, 0.0),
            )
        ],
        "operator_times": True,
        "memory": {"weights": 4000, "gradients": 4000, "optimizer": 8000, "activations": None, "peak": 20_000},
        "generation": {
            "dtype": "float32",
            "prompt": 64,
            "prefill_ms": 1.0,
            "prefill_gflop": 1.0,
            "decoded": 32,
            "decode_ms": 0.5,
            "decode_gbyte": 0.1,
        },
        **changes,
    }


def test_a_profile_derives_speed_utilisation_and_time_per_kind() -> None:
    profile = Profile.model_validate(record())
    assert profile.tokens_per_second == 76_800
    assert profile.mfu == pytest.approx(0.5)  # 100 GFLOP in 10 ms, of 20,000 GFLOP/s
    assert profile.operators_ms == pytest.approx(
        {"matrix products": 12.0, "attention": 0.0, "other operators": 0.501, "no operator": 2.499}
    )
    assert Profile.model_validate(record(step_ms=None)).tokens_per_second == 64_000


def test_the_slices_of_the_picture_fill_each_phase_exactly() -> None:
    profile = Profile.model_validate(record())
    slices = list(operator_slices(profile))
    for phase in phase_slices(profile):
        inside = [part for part in slices if phase.left <= part.left < phase.left + phase.width - 1e-9]
        assert sum(part.width for part in inside) == pytest.approx(phase.width)
    widths = {part.label: part.width for part in slices}
    assert widths["mm"] == pytest.approx(8.0)  # the 9 ms under the profiler are scaled to the 8 ms of the phase
    assert widths["linear"] == pytest.approx(3.0)
    assert "add" not in widths  # too short to be seen


@pytest.mark.parametrize(
    "changes", [{"limits": None}, {"generation": None, "run": "r_1", "step": 7}, {"operators": []}]
)
def test_profiles_with_missing_facts_are_drawn_and_compared(
    changes: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in (("a", record()), ("b", record(**changes))):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    b = read_profile(tmp_path / "b.json")
    draw_profile(b, tmp_path / "b.png")
    assert (tmp_path / "b.png").stat().st_size > 10_000
    assert profile_model.main(["--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("device", "noted"), [("cuda", True), ("cpu", False)])
def test_on_cuda_the_table_says_which_steps_were_launched_as_a_graph(
    device: str, noted: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    found = record()
    found["machine"]["device"], found["config"]["train"]["cuda_graph"] = device, True
    Terminal().print(*profile_tables(Profile.model_validate(found), 3))
    assert ("the undisturbed step is a CUDA graph" in capsys.readouterr().out) == noted


def test_two_profiles_are_compared_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machine = {**record()["machine"], "torch": "2.14.0"}
    config = {"model": {"n_layer": 4, "n_embd": 256, "block_size": 64}, "train": {"batch_size": 12}}
    operators = [{**row, "ms": 2 * row["ms"]} for row in record()["operators"]]
    contents = record(), record(step_ms=20.0, machine=machine, config=config, operators=operators)
    for folder, content in zip(("one", "two/artifacts/profile"), contents, strict=True):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "profile.json").write_text(json.dumps(content))
    assert profile_model.main(["--compare", str(tmp_path / "one"), str(tmp_path / "two")]) == 0  # two: a run
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert profile_model.main(["--compare", str(tmp_path / "one"), str(tmp_path / "two"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["profile"]["config"]["model"]["n_embd"] for one in found] == [128, 256]
    assert ["n_embd", "128", "256"] in lines
    assert ["torch", "2.13.0", "2.14.0"] in lines
    assert not [line for line in lines if line[:1] == ["n_layer"]]
    assert ["step", "(ms)", "10.000", "20.000", "+10.000", "2.00"] in lines
    assert ["MFU", "(%)", "50.000", "25.000", "-25.000", "0.50"] in lines
    assert ["mm", "9.000", "18.000", "+9.000", "2.00"] in lines
    assert profile_model.main(["--compare", str(tmp_path / "one"), str(tmp_path / "one")]) == 0
    assert "Settings and machine are the same." in capsys.readouterr().out


def test_comparing_imports_no_torch(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(record()))
    code = "import sys; sys.modules.update(torch=None, numpy=None); import profile_model; "
    code += "sys.exit(profile_model.main(['--compare', 'a.json', 'a.json']))"
    environment = {**os.environ, "PYTHONPATH": str(Path(profile_model.__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (None, "there is no profile.json"),
        ("{", "not a profile: JSONDecodeError"),
        ("[]", "not a profile: TypeError"),
        ('{"steps": 1}', "not a profile: KeyError: 'schema_version'"),
        ('{"schema_version": 7}', "schema_version is 7; this program reads 1"),
        (json.dumps(record(steps="many")), "not a profile: steps: "),
    ],
)
def test_a_file_that_is_not_a_profile_is_reported_in_one_line(
    content: str | None, error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "profile.json").write_text(content)
    assert profile_model.main(["--compare", str(tmp_path), str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert error in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--n-embd", "64"), "--compare takes no settings"),
        (("--config", "a.yaml"), "--compare takes no settings"),
        (("--config-dir", "configs"), "--compare takes no settings"),
        (("--out", "there"), "--out belongs to a profile or --sweep or --lr-range"),
        (("--steps", "5"), "--steps belongs to a profile or --sweep"),
        (("--sweep",), "argument --sweep: not allowed with argument --compare"),
    ],
)
def test_comparing_refuses_flags_that_it_does_not_use(
    words: tuple[str, ...], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert profile_model.main(["--compare", "a", "b", *words]) == 2
    assert capsys.readouterr().err.startswith(f"error: {error}")


def test_every_flag_belongs_to_a_mode_and_every_parameter_of_a_mode_has_a_flag() -> None:
    parser = Parser()
    profile_model.add_flags(parser)
    flags = {action.dest for action in parser._actions} - {"help"}
    parameters = {name for run in profile_model.MODES.values() for name in inspect.signature(run).parameters}
    assert flags - {"sweep", "lr_range", "trust"} == parameters - {"loaded", "ranks"}
    assert flags >= profile_model.MODES.keys() - {"profile"}


def test_help_imports_neither_torch_nor_the_profiler() -> None:
    code = "import profile_model, sys\ntry:\n    profile_model.main(['--help'])\nfinally:\n"
    code += "    print([m for m in sys.modules if m == 'torch' or m.startswith('utils.profiling.')])"
    environment = {**os.environ, "PYTHONPATH": str(Path(profile_model.__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "--lr-steps" in done.stdout
    assert done.stdout.endswith("[]\n"), done.stderr
