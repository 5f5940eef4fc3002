"""Callbacks: the example of docs/callbacks.md, the order of the hooks, what they log, and what happens if they fail."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from equal_runs import assert_equal_runs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
import utils.training.step
from utils.checkpoints.folder import list_checkpoints
from utils.errors import UserError
from utils.runs import metrics
from utils.runs.log import read_metrics, read_records
from utils.runs.metrics import Metric, register_metric
from utils.runs.run import read_record
from utils.training.callbacks import Callback, Callbacks, TrainingRun, load_callbacks
from utils.training.state import TrainState

pytestmark = pytest.mark.usefixtures("prompt_writes", "warm_processes")
Argv = Callable[..., list[str]]
ROOT = Path(__file__).resolve().parents[2]

SIXTY = ("--max-iters", "60", "--eval-interval", "20", "--checkpoint-interval", "10", "--dropout", "0.2")
EXAMPLE = ("--callbacks", "smooth_loss:SmoothLoss")


class Recorder(Callback):
    """Records its calls as (hook, step), and on_end with its status."""

    calls: ClassVar[list[tuple[Any, ...]]] = []

    def on_start(self, run: TrainingRun) -> None:
        self.calls.append(("start", run.state.step))

    def on_step(self, run: TrainingRun) -> None:
        assert run.loss is not None
        assert run.loss.shape == ()
        assert run.path.is_dir()
        self.calls.append(("step", run.state.step))

    def on_eval(self, run: TrainingRun, losses: Mapping[str, float]) -> None:
        assert losses.keys() == {"val/loss", "train/eval_loss"}
        self.calls.append(("eval", run.state.step))

    def on_end(self, run: TrainingRun, status: str) -> None:
        self.calls.append(("end", run.state.step, status))


class Failing(Callback):
    """Raises in the hook that `hook` names; on_step, on_eval and state_dict raise from step 4 on."""

    hook: ClassVar[str] = ""

    def _fail_in(self, hook: str) -> None:
        if hook == self.hook:
            raise RuntimeError("the cat pulled the plug")

    def on_start(self, run: TrainingRun) -> None:
        self._fail_in("on_start")
        self.state = run.state

    def on_step(self, run: TrainingRun) -> None:
        if run.state.step >= 4:
            self._fail_in("on_step")

    def on_eval(self, run: TrainingRun, losses: Mapping[str, float]) -> None:
        if run.state.step >= 4:
            self._fail_in("on_eval")

    def on_end(self, run: TrainingRun, status: str) -> None:
        self._fail_in("on_end")

    def state_dict(self) -> dict[str, Any]:
        if self.state.step >= 4:
            self._fail_in("state_dict")
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._fail_in("load_state_dict")


class Stopping(Callback):
    """Stops the run after step 4."""

    def on_step(self, run: TrainingRun) -> None:
        if run.state.step == 4:
            run.stop("seen enough")


class Logging(Callback):
    """Logs `values` in every hook."""

    values: ClassVar[dict[str, Any]] = {}

    def on_start(self, run: TrainingRun) -> None:
        run.log(self.values)

    def on_step(self, run: TrainingRun) -> None:
        run.log(self.values)

    def on_eval(self, run: TrainingRun, losses: Mapping[str, float]) -> None:
        run.log(self.values)

    def on_end(self, run: TrainingRun, status: str) -> None:
        run.log(self.values)


@pytest.fixture(autouse=True)
def clean_slate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forgets earlier calls and failures, and restores the registry of metrics after the test."""
    monkeypatch.setattr(metrics, "_REGISTRY", dict(metrics._REGISTRY))
    monkeypatch.setattr(Failing, "hook", "")
    Recorder.calls.clear()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], Path]]:
    """Writes a module that this process and its subprocesses can import."""
    folder = tmp_path / "modules"
    folder.mkdir()
    names: list[str] = []

    def write(name: str, source: str) -> Path:
        names.append(name)
        path = folder / f"{name}.py"
        path.write_text(source, encoding="utf-8")
        return path

    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", os.fspath(folder))
    yield write
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def example(module: Callable[[str, str], Path]) -> None:
    """Writes the example of docs/callbacks.md as the module smooth_loss."""
    text = (ROOT / "docs" / "callbacks.md").read_text(encoding="utf-8")
    source = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)[0]
    module("smooth_loss", source)


def flags(*names: str) -> tuple[str, str]:
    return "--callbacks", ",".join(f"{__name__}:{name}" for name in names)


def checkpoint_steps(run: Path) -> list[int]:
    return [step for step, _ in list_checkpoints(run / "artifacts" / "checkpoints")]


# ------------------------------------------------------------------------------------------ the example


def test_the_example_logs_its_metric_to_all_views(
    example: None, tiny_argv: Argv, tmp_path: Path, only_run: Callable[[], Path]
) -> None:
    from aim import Repo
    from aim.storage.context import Context

    assert train.main(tiny_argv(*EXAMPLE, "--max-iters", "40", "--aim-logging", "--flush-interval", "7")) == 0
    logs = only_run() / "logs"
    expected, average = [], None
    for step, loss in read_metrics(logs, "train/loss"):
        loss = torch.tensor(loss)
        average = loss if average is None else torch.lerp(loss, average, 0.98)
        expected.append((step, average.item()))
    logged = read_metrics(logs, "train/smooth_loss")
    assert logged == expected
    assert len(logged) == 40

    events = EventAccumulator(str(logs.parent), size_guidance={"scalars": 0}).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/smooth_loss")] == logged
    repo = Repo(str(tmp_path))
    (run,) = repo.iter_runs()
    steps, (values, *_) = run.get_metric("smooth_loss", Context({"subset": "train"})).data.items_list()
    assert list(zip(steps, values, strict=True)) == logged


def test_the_example_stops_a_run_and_a_resume_continues_with_its_state(
    example: None, module: Callable[[str, str], Path], tiny_argv: Argv, only_run: Callable[[], Path]
) -> None:
    module(
        "eager", "from smooth_loss import SmoothLoss\n\n\nclass Eager(SmoothLoss):\n    TARGET, LOOK_EVERY = 9, 10\n"
    )
    words = tiny_argv("--callbacks", "eager:Eager", "--max-iters", "30", "--eval-interval", "30")
    assert train.main(words) == 0
    record = read_record(only_run())
    assert (record["status"], record["exit_reason"]) == ("interrupted", "the smooth loss is below 9")
    assert (record["last_step"], checkpoint_steps(only_run())) == (10, [10])
    assert train.main(["--resume", str(only_run())]) == 0
    assert read_record(only_run())["last_step"] == 20
    assert train.main(["--resume", str(only_run())]) == 0
    assert read_record(only_run())["status"] == "completed"
    assert [step for step, _ in read_metrics(only_run() / "logs", "train/smooth_loss")] == list(range(30))


@pytest.mark.parametrize("how", ["SIGTERM", "stop", "SIGKILL"])
def test_a_stop_and_a_resume_change_no_bit_of_what_a_callback_logs(
    how: str, example: None, tiny_argv: Argv, run_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train.main(tiny_argv(*SIXTY, *EXAMPLE, "--run-tag", "straight")) == 0
    words = tiny_argv(*SIXTY, *EXAMPLE, "--run-tag", "stopped")
    if how == "SIGKILL":
        script = [sys.executable, os.fspath(ROOT / "tests" / "killed_training.py"), "step", "37"]
        assert subprocess.run([*script, *words], capture_output=True, timeout=120).returncode == -signal.SIGKILL
    else:
        with monkeypatch.context() as patch:
            on_step = Callbacks.on_step

            def stopping(self: Callbacks, step: int, loss: torch.Tensor) -> None:
                on_step(self, step, loss)
                if step == 36 and how == "stop":
                    self._run.stop("enough")
                elif step == 36:
                    os.kill(os.getpid(), signal.SIGTERM)

            patch.setattr(Callbacks, "on_step", stopping)
            assert train.main(words) == (143 if how == "SIGTERM" else 0)
    straight, stopped = run_of("straight"), run_of("stopped")
    assert train.main(["--resume", str(stopped)]) == 0
    assert_equal_runs(straight, stopped)
    assert len(read_metrics(stopped / "logs", "train/smooth_loss")) == 60
    assert [resume["step"] for resume in read_record(stopped)["resumes"]] == [30 if how == "SIGKILL" else 37]


# ------------------------------------------------------------------------------------------ the hooks


def test_hooks_are_called_in_the_order_of_training(tiny_argv: Argv, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f'callbacks: ["{__name__}:Recorder"]\n')
    assert train.main(tiny_argv("--config", str(tmp_path / "mine.yaml"))) == 0
    assert Recorder.calls == [
        ("start", 0),
        ("eval", 0),
        *[("step", step) for step in (1, 2, 3)],
        ("eval", 3),
        *[("step", step) for step in (4, 5, 6)],
        ("eval", 6),
        ("end", 6, "completed"),
    ]


def test_a_resumed_run_starts_at_the_step_of_its_checkpoint(tiny_argv: Argv, only_run: Callable[[], Path]) -> None:
    assert train.main(tiny_argv(*flags("Stopping", "Recorder"))) == 0
    assert Recorder.calls[-2:] == [("step", 4), ("end", 4, "interrupted")]
    Recorder.calls.clear()
    assert train.main(["--resume", str(only_run())]) == 0
    assert Recorder.calls == [("start", 4), ("step", 5), ("step", 6), ("eval", 6), ("end", 6, "completed")]


@pytest.mark.parametrize("status", ["completed", "interrupted", "diverged", "failed"])
def test_on_end_is_called_once_with_the_status(status: str, tiny_argv: Argv, monkeypatch: pytest.MonkeyPatch) -> None:
    forward_backward = utils.training.step.forward_backward

    def patched(state: TrainState, phase: Any) -> torch.Tensor:
        loss = forward_backward(state, phase)
        if state.step == 4 and status == "interrupted":
            os.kill(os.getpid(), signal.SIGTERM)
        elif state.step == 4 and status == "failed":
            raise RuntimeError("broken")
        return loss * math.nan if state.step == 4 and status == "diverged" else loss

    monkeypatch.setattr(utils.training.step, "forward_backward", patched)
    words = tiny_argv(*flags("Recorder"))
    if status == "failed":
        with pytest.raises(RuntimeError, match="broken"):
            train.main(words)
    else:
        assert train.main(words) == {"completed": 0, "interrupted": 143, "diverged": 1}[status]
    assert [call[2] for call in Recorder.calls if call[0] == "end"] == [status]


def test_a_callback_may_register_module_hooks(tiny_argv: Argv, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[bool] = []

    def watch(recorder: Recorder, run: TrainingRun) -> None:
        run.state.model.blocks[0].register_forward_hook(lambda module, inputs, output: modes.append(module.training))

    monkeypatch.setattr(Recorder, "on_start", watch)
    assert train.main(tiny_argv(*flags("Recorder"))) == 0
    assert modes.count(True) == 6  # one per step


def leave_eval_mode(_: Callback, run: TrainingRun, *losses: object) -> None:
    run.state.model.eval()


def leave_gradients(_: Callback, run: TrainingRun, *losses: object) -> None:
    for parameter in run.state.model.parameters():
        parameter.grad = torch.ones_like(parameter)


@pytest.mark.parametrize("hook", ["on_start", "on_step", "on_eval"])
@pytest.mark.parametrize("leave", [leave_eval_mode, leave_gradients])
def test_the_mode_and_the_gradients_that_a_hook_leaves_do_not_change_training(
    leave: Callable[..., None], hook: str, tiny_argv: Argv, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It went on without dropout, or added the gradients to those of the next batch; on a GPU it did not add them."""
    losses = []
    for number, act in enumerate((lambda *_: None, leave)):
        monkeypatch.setattr(Recorder, hook, act)
        folder = tmp_path / str(number)
        assert train.main(tiny_argv(*flags("Recorder"), "--dropout", "0.5", "--runs-dir", str(folder))) == 0
        losses.append(read_metrics(next(folder.iterdir()) / "logs", "train/loss"))
    assert losses[0] == losses[1]


def test_what_a_hook_writes_into_the_losses_is_not_recorded(
    tiny_argv: Argv, only_run: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As callbacks of other trainers do; it stood in run.json and in the result."""
    monkeypatch.setattr(Recorder, "on_eval", lambda _, run, losses: losses.update({"val/loss": 0.0, "val/mine": 1.0}))
    assert train.main(tiny_argv(*flags("Recorder"))) == 0
    summary = read_record(only_run())["summary"]
    assert "val/mine" not in summary
    assert summary["val/loss"] == read_metrics(only_run() / "logs", "val/loss")[-1][1]


def test_without_callbacks_a_step_does_nothing() -> None:
    run = SimpleNamespace()
    Callbacks([], run).on_step(3, torch.tensor(2.0))  # type: ignore[arg-type]
    assert vars(run) == {}  # with callbacks it would have the loss


# ------------------------------------------------------------------------------------------ failures


@pytest.mark.parametrize(
    ("hook", "checkpoints"),
    [("on_start", []), ("on_step", [3, 2]), ("on_eval", [5, 4]), ("state_dict", [3, 2]), ("on_end", [6, 5])],
)
def test_an_exception_in_a_hook_ends_the_run_as_failed(
    hook: str, checkpoints: list[int], tiny_argv: Argv, only_run: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Failing, "hook", hook)
    with pytest.raises(RuntimeError, match="the cat pulled the plug"):
        train.main(tiny_argv(*flags("Failing"), "--checkpoint-interval", "1", "--no-keep-best"))
    record = read_record(only_run())
    assert (record["status"], record["exit_reason"]) == ("failed", "RuntimeError: the cat pulled the plug")
    log = (only_run() / "logs" / "train.log").read_text()
    assert "Traceback" in log
    assert f"in {hook}" in log
    assert checkpoint_steps(only_run()) == checkpoints
    assert record["views"]["tensorboard"]["state"] == "complete"

    monkeypatch.setattr(Failing, "hook", "")
    if hook == "on_end":
        assert train.main(["--resume", str(only_run())]) in (0, 2)  # all its steps are done
    else:
        assert train.main(["--resume", str(only_run())]) == 0
        assert read_record(only_run())["status"] == "completed"


def test_an_exception_while_state_is_loaded_ends_the_run_as_failed_and_loses_nothing(
    tiny_argv: Argv, only_run: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train.main(tiny_argv(*flags("Failing", "Stopping"))) == 0
    monkeypatch.setattr(Failing, "hook", "load_state_dict")
    with pytest.raises(RuntimeError, match="the cat pulled the plug"):
        train.main(["--resume", str(only_run())])
    assert read_record(only_run())["status"] == "failed"
    assert "in load_state_dict" in (only_run() / "logs" / "train.log").read_text()
    assert checkpoint_steps(only_run())[0] == 4
    monkeypatch.setattr(Failing, "hook", "")
    assert train.main(["--resume", str(only_run())]) == 0
    assert [step for step, _ in read_metrics(only_run() / "logs", "train/loss")] == list(range(6))


@pytest.mark.parametrize("state", [{"value": math.nan}, {"value": {1, 2}}, [1.0], None], ids=str)
def test_a_state_that_is_not_json_ends_the_run_as_failed(
    state: object, tiny_argv: Argv, only_run: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Callback, "state_dict", lambda self: state)
    with pytest.raises((TypeError, ValueError)):
        train.main(tiny_argv(*flags("Recorder")))
    assert read_record(only_run())["status"] == "failed"


def test_an_exception_takes_precedence_over_a_nan_loss_that_is_not_written_yet(
    tiny_argv: Argv, only_run: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("utils.training.step.forward_backward", lambda state, phase: torch.tensor(math.nan))
    monkeypatch.setattr("utils.training.step.clip_gradients", lambda state: torch.tensor([1.0, 1.0, 1.0]))
    monkeypatch.setattr("utils.training.step.optimizer_step", lambda state, _: setattr(state, "step", state.step + 1))
    monkeypatch.setattr(Recorder, "on_step", lambda self, run: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main(tiny_argv(*flags("Recorder")))
    assert read_record(only_run())["exit_reason"] == "ZeroDivisionError: division by zero"
    assert [math.isnan(loss) for _, loss in read_metrics(only_run() / "logs", "train/loss")] == [True]


@pytest.mark.parametrize("hook", ["on_step", "on_end"])
@pytest.mark.parametrize("names", [("Failing", "Recorder"), ("Recorder", "Failing")])
def test_the_other_callbacks_get_on_end_once(
    names: tuple[str, str], hook: str, tiny_argv: Argv, only_run: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Failing, "hook", hook)
    with pytest.raises(RuntimeError, match="the cat pulled the plug"):
        train.main(tiny_argv(*flags(*names)))
    ended_first = names == ("Recorder", "Failing") and hook == "on_end"  # before anything has failed
    assert [call[2] for call in Recorder.calls if call[0] == "end"] == ["completed" if ended_first else "failed"]
    assert read_record(only_run())["status"] == "failed"


def test_all_callbacks_get_on_end_even_if_several_raise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = TrainingRun(tmp_path, SimpleNamespace(step=7, model=torch.nn.Identity()), None, None)  # type: ignore[arg-type]
    callbacks = Callbacks([Failing(), Recorder(), Failing(), Recorder()], run)
    callbacks.on_start()
    Recorder.calls.clear()
    monkeypatch.setattr(Failing, "hook", "on_end")
    with pytest.raises(RuntimeError, match="the cat pulled the plug"):
        callbacks.on_end("completed")
    assert Recorder.calls == [("end", 7, "failed"), ("end", 7, "failed")]
    callbacks.on_end("failed")  # all have had theirs
    assert len(Recorder.calls) == 2


def test_a_callback_that_was_not_started_is_not_ended(tiny_argv: Argv, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Failing, "hook", "on_start")
    with pytest.raises(RuntimeError, match="the cat pulled the plug"):
        train.main(tiny_argv(*flags("Failing", "Recorder")))
    assert Recorder.calls == []


# ------------------------------------------------------------------------------------------ what is logged


def test_an_unregistered_name_is_refused_with_the_remedy(
    tiny_argv: Argv, only_run: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Logging, "values", {"train/nothing": 1.0})
    with pytest.raises(KeyError, match=r"'train/nothing' is not registered: call register_metric\(Metric\("):
        train.main(tiny_argv(*flags("Logging")))
    assert read_record(only_run())["status"] == "failed"


def test_every_hook_logs_at_its_step_and_steps_never_decrease(
    tiny_argv: Argv, only_run: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    register_metric(Metric("mine/number", "1"))
    register_metric(Metric("mine/tensor", "1"))
    monkeypatch.setattr(Logging, "values", {"mine/number": math.nan, "mine/tensor": torch.tensor(0.5)})
    thin = ("--max-iters", "20", "--eval-interval", "10", "--log-interval", "4", "--flush-interval", "3")
    assert train.main(tiny_argv(*thin, *flags("Logging", "Recorder"), "--system-interval", "0.000001")) == 0
    records = list(read_records(only_run() / "logs" / "metrics.jsonl"))
    steps = [record["step"] for record in records]
    assert steps == sorted(steps)
    assert [record["step"] for record in records if "train/loss" in record] == [0, 4, 8, 12, 16]
    assert any("system/process_cpu" in record for record in records)
    mine = [record for record in records if "mine/tensor" in record]
    assert {(record["mine/number"], record["mine/tensor"]) for record in mine} == {("nan", 0.5)}
    start, evaluations, end = 0, (0, 10, 20), 20
    expected = [start, evaluations[0], *range(10), evaluations[1], *range(10, 20), evaluations[2], end]
    assert [record["step"] for record in mine] == expected
    train_losses = [i for i, record in enumerate(records) if "train/loss" in record]
    assert all("mine/number" in records[i + 1] for i in train_losses)  # what on_step logs follows its update


# ------------------------------------------------------------------------------------------ mistakes


BROKEN = """from utils.training.callbacks import Callback


class Broken(Callback):
    def __init__(self):
        raise KeyError("data")


class Misspelt(Callback):
    def on_steps(self, run):
        raise AssertionError


class Stranger:
    pass
"""


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("nowhere:Mine", "callbacks: nowhere:Mine cannot be used: ModuleNotFoundError: No module named 'nowhere'"),
        ("broken:Missing", "AttributeError: module 'broken' has no attribute 'Missing'"),
        ("broken:Stranger", "callbacks: broken:Stranger is not a subclass of workbench.Callback"),
        ("broken:BROKEN", "has no attribute 'BROKEN'"),
        ("broken:Broken", "callbacks: broken:Broken cannot be used: KeyError: 'data' (broken.py:6)"),
        ("typo:Mine", "callbacks: typo:Mine cannot be used: SyntaxError: "),
        ("a_script:Mine", "callbacks: a_script:Mine cannot be used: SystemExit: 3 (a_script.py:2)"),
        (
            "broken:Misspelt",
            "broken:Misspelt has a method on_steps, which nothing calls: expected on_start, on_step, on_eval, on_end; "
            "did you mean on_step?",
        ),
        ("broken.py:Broken", "module:Class, not 'broken.py:Broken'; did you mean broken:Broken?"),
        ("./mine/broken.py:Broken", "module:Class, not './mine/broken.py:Broken'; did you mean mine.broken:Broken?"),
        ("broken", "a callback is named module:Class, not 'broken'"),
        ("broken.py:Broken.x", "a callback is named module:Class, not 'broken.py:Broken.x'"),
        (f"{__name__}:Recorder,{__name__}:Recorder", f"callbacks: {__name__}:Recorder is listed twice"),
    ],
)
def test_an_unusable_callback_is_refused_in_one_line_and_creates_no_run(
    names: str,
    message: str,
    module: Callable[[str, str], Path],
    tiny_argv: Argv,
    runs_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module("broken", BROKEN)
    module("typo", "class Mine(\n")
    module("a_script", "import sys\nsys.exit(3)\n")
    assert train.main(tiny_argv("--callbacks", names)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err
    assert not runs_dir.exists()


def test_a_resume_refuses_other_callbacks(
    tiny_argv: Argv, only_run: Callable[[], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(tiny_argv(*flags("Stopping"))) == 0
    assert train.main(["--resume", str(only_run()), *flags("Recorder")]) == 2
    assert "--callbacks: callbacks changes the numbers of a run" in capsys.readouterr().err
    assert train.main(["--resume", str(only_run()), *flags("Stopping")]) == 0
    assert read_record(only_run())["status"] == "completed"


def test_a_module_that_was_edited_since_an_earlier_run_is_imported_again(
    module: Callable[[str, str], Path], tmp_path: Path
) -> None:
    source = "from workbench import Callback\nclass Mine(Callback):\n    version = {}\n"
    versions = []
    for version in (1, 1, 22):  # 22 changes the size, since the files may have the same modification time
        module("edited", source.format(version))
        versions.append(load_callbacks(["edited:Mine"], tmp_path / "runs", tmp_path)["edited:Mine"].version)  # type: ignore[attr-defined]
    assert versions == [1, 1, 22]


def test_a_module_whose_edit_has_a_mistake_is_not_used_as_it_was_before(
    module: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """The second attempt took the old code, and recorded the new file; a class that was gone could still be used."""
    source = "from workbench import Callback\nclass {}(Callback):\n    pass\n"

    def load(name: str) -> object:
        return load_callbacks([f"mistaken:{name}"], tmp_path / "runs", tmp_path)

    module("mistaken", source.format("Mine"))
    load("Mine")
    module("mistaken", "import no_such_module\n" + source.format("Mine"))
    for _ in range(2):
        with pytest.raises(UserError, match="no_such_module"):
            load("Mine")
    module("mistaken", source.format("Mine"))
    load("Mine")
    module("mistaken", source.format("Renamed"))
    with pytest.raises(UserError, match="no attribute 'Mine'"):
        load("Mine")
    load("Renamed")


def test_a_callback_of_the_script_itself_is_used_as_it_was_imported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A script may be edited while it trains one run after another, but __main__ cannot be imported again."""
    script = ModuleType("__main__")
    script.__file__ = str(tmp_path / "script.py")
    script.Mine = type("Mine", (Callback,), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "__main__", script)
    for text in ("x = 1\n", "x = 22\n"):
        (tmp_path / "script.py").write_text(text)
        callbacks = load_callbacks(["__main__:Mine"], tmp_path / "runs", tmp_path)
        assert type(callbacks["__main__:Mine"]) is script.Mine  # type: ignore[attr-defined]
