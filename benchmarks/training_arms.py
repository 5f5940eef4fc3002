"""The arms of benchmarks.training: each trains in its own process and prints how long its steps took.

Each arm imports only what it needs, because the memory of its process is measured.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from utils.runs.layout import LOGS

if TYPE_CHECKING:
    import torch

TRACKED, UNTRACKED = "ours, all tracking", "ours, no tracking"
BARE, FUSED = "bare loop", "bare loop, fused"
HF_TRACKED, HF_OFF = "HF Trainer, tracked", "HF Trainer, all off"
LIGHTNING_TRACKED, LIGHTNING_OFF = "Lightning, tracked", "Lightning, all off"
PEAK = "matrix products"
MARK = "benchmark result:"
N_TOKENS = 200_000  # from which the windows of GPT-2's arms are cut


@dataclass(frozen=True)
class Task:
    """What an arm trains, as plain numbers, since not every arm reads our configuration.

    config: a file for `train.py --config`, with the shape, batch and optimizer of every arm.
    gpt2: the arguments of GPT2Config for the same model.
    warmup: steps before the timed ones.
    folder: an empty folder for what the arm writes.
    """

    arm: str
    config: str
    gpt2: Mapping[str, Any]
    batch_size: int
    learning_rate: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    grad_clip: float
    steps: int
    warmup: int
    threads: int
    device: str
    folder: str


@dataclass(frozen=True)
class Result:
    """The result of an arm. step_ms: the mean of its timed steps; gpu_mb: the peak of its tensors on a GPU.

    gflops: GFLOP/s of the arm that only multiplies matrices; 0 for the others.
    """

    step_ms: float = 0.0
    parameters: int = 0
    threads: int = 0
    gpu_mb: float = 0.0
    gflops: float = 0.0


class StepClock:
    """The mean time of the steps after the warmup, including the device's work and all periodic tracking.

    before: called after the warmup, and not timed.
    """

    def __init__(self, task: Task, before: Callable[[], None] = lambda: None) -> None:
        self._task, self._before = task, before
        self._done, self._began, self.step_ms = 0, 0.0, 0.0

    def step_done(self) -> None:
        self._done += 1
        if self._done == self._task.warmup:
            self._before()
            self._began = self._now()
        elif self._done == self._task.warmup + self._task.steps:
            self.step_ms = (self._now() - self._began) / self._task.steps * 1000

    def _now(self) -> float:
        if self._task.device == "cuda":
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()


# ------------------------------------------------------------------------------------------------- ours


def ours(task: Task, tracking: bool) -> tuple[float, int]:
    """train.train; without tracking its monitor receives no steps, so log and views have nothing to do.

    With tracking the run prints its lines, as the others do. Evaluations and checkpoints happen only before the first
    timed step and after the last one, since the others have none.

    Returns:
        milliseconds of a step, and the number of parameters.

    Raises:
        UserError: the run or one of its views failed.
    """
    import train
    from benchmarks import common
    from benchmarks.callbacks import StepListener
    from benchmarks.switched_run import check, wait_until_open
    from utils.training import monitor

    folder, last = Path(task.folder), task.warmup + task.steps

    def views_are_open() -> None:
        (run,) = (folder / "runs").iterdir()
        wait_until_open(run / LOGS)

    clock = StepClock(task, views_are_open if tracking else lambda: None)
    overrides: dict[str, str | bool] = {
        "max_iters": str(last),
        "epochs": "none",
        "warmup_iters": "none",
        "lr_decay_iters": "none",
        "stop_at_step": "none",
        "profile_step": "none",
        "eval_interval": str(last),
        "eval_iters": "1",
        "checkpoint_interval": "0",
        "checkpoint_minutes": "none",
        "keep_best": False,
        "aim_logging": tracking,
        "callbacks": "benchmarks.callbacks:StepListener",
    }
    with ExitStack() as patches:
        patches.enter_context(patch.object(StepListener, "step_done", lambda step: clock.step_done(), create=True))
        if not tracking:
            for name in ("log_step", "step_done"):
                patches.enter_context(patch.object(monitor.Monitor, name, lambda *arguments: None))
        result = train.train(common.load_config([Path(task.config)], folder, overrides), quiet=not tracking)
    check(result.run_dir, result.status)
    return clock.step_ms, result.parameters


# ------------------------------------------------------------------------------------------------ GPT-2


class Windows:
    """A map-style dataset of random windows of random tokens, in the form that GPT2LMHeadModel takes."""

    def __init__(self, task: Task) -> None:
        import torch

        self._length = task.gpt2["n_positions"]
        self._tokens = torch.randint(task.gpt2["vocab_size"], (N_TOKENS + self._length,))
        self._starts = torch.randint(N_TOKENS, ((task.warmup + task.steps) * task.batch_size,)).tolist()

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = self._tokens[self._starts[index] : self._starts[index] + self._length]  # (T,)
        return {"input_ids": window, "labels": window}  # the model shifts the labels by itself


def gpt2(task: Task) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(**task.gpt2))


def adamw(task: Task, model: Any, fused: bool | None = None) -> torch.optim.Optimizer:
    import torch

    return torch.optim.AdamW(
        model.parameters(), task.learning_rate, task.betas, task.eps, task.weight_decay, fused=fused
    )


def bare_loop(task: Task, fused: bool | None = None) -> tuple[float, int]:
    """The simplest loop: batch, forward, backward, clip, AdamW; it never reads the loss."""
    import torch

    model = gpt2(task).to(task.device).train()
    optimizer = adamw(task, model, fused)
    windows, clock = Windows(task), StepClock(task)
    for step in range(task.warmup + task.steps):
        numbers = range(step * task.batch_size, (step + 1) * task.batch_size)
        inputs = torch.stack([windows[number]["input_ids"] for number in numbers]).to(task.device)  # (B, T)
        loss = model(input_ids=inputs, labels=inputs).loss
        loss.backward()
        if task.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), task.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        clock.step_done()
    return clock.step_ms, model.num_parameters()


def hf_trainer(task: Task, tracking: bool) -> tuple[float, int]:
    """transformers.Trainer with its own choice of AdamW, without evaluation and checkpoints.

    tracking: loss, gradient norm and learning rate of every step into TensorBoard, and a progress bar.
    """
    from transformers import Trainer, TrainerCallback, TrainingArguments

    clock = StepClock(task)

    class Ticks(TrainerCallback):
        def on_step_end(self, *arguments: Any, **keywords: Any) -> None:
            clock.step_done()

    arguments = TrainingArguments(
        output_dir=task.folder,
        max_steps=task.warmup + task.steps,
        per_device_train_batch_size=task.batch_size,
        learning_rate=task.learning_rate,
        lr_scheduler_type="constant",
        adam_beta1=task.betas[0],
        adam_beta2=task.betas[1],
        adam_epsilon=task.eps,
        weight_decay=task.weight_decay,
        max_grad_norm=task.grad_clip,
        use_cpu=task.device == "cpu",
        dataloader_pin_memory=task.device == "cuda",
        logging_strategy="steps" if tracking else "no",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        eval_strategy="no",
        report_to="tensorboard" if tracking else "none",
        disable_tqdm=not tracking,
    )
    model = gpt2(task)
    Trainer(model=model, args=arguments, train_dataset=Windows(task), callbacks=[Ticks()]).train()
    return clock.step_ms, model.num_parameters()


def lightning_trainer(task: Task, tracking: bool) -> tuple[float, int]:
    """Lightning's Trainer without checkpoints.

    tracking: loss and learning rate of every step into TensorBoard, and a progress bar; without it, Lightning's
    barebones mode: no logger, progress bar, summary or sanity check.
    """
    import lightning
    from lightning.pytorch.loggers import TensorBoardLogger
    from torch.utils.data import DataLoader

    clock = StepClock(task)

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = gpt2(task)

        def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
            loss: torch.Tensor = self.model(**batch).loss
            if tracking:
                self.log("train_loss", loss)
                self.log("learning_rate", self.trainer.optimizers[0].param_groups[0]["lr"])
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return adamw(task, self.model)

        def on_train_batch_end(self, *arguments: Any) -> None:
            clock.step_done()

    module = Module()
    mode: dict[str, Any] = {"barebones": True}
    if tracking:
        mode = {"logger": TensorBoardLogger(task.folder), "log_every_n_steps": 1, "enable_checkpointing": False}
    trainer = lightning.Trainer(
        accelerator="gpu" if task.device == "cuda" else task.device,
        devices=1,
        max_steps=task.warmup + task.steps,
        gradient_clip_val=task.grad_clip or None,
        default_root_dir=task.folder,
        **mode,
    )
    windows: Any = Windows(task)  # a dataset by its methods
    trainer.fit(module, DataLoader(windows, batch_size=task.batch_size, pin_memory=task.device == "cuda"))
    return clock.step_ms, module.model.num_parameters()


# ------------------------------------------------------------------------------------------- the process

ARMS: dict[str, Callable[[Task], tuple[float, int]]] = {
    TRACKED: lambda task: ours(task, tracking=True),
    UNTRACKED: lambda task: ours(task, tracking=False),
    BARE: bare_loop,
    FUSED: lambda task: bare_loop(task, fused=True),
    HF_TRACKED: lambda task: hf_trainer(task, tracking=True),
    HF_OFF: lambda task: hf_trainer(task, tracking=False),
    LIGHTNING_TRACKED: lambda task: lightning_trainer(task, tracking=True),
    LIGHTNING_OFF: lambda task: lightning_trainer(task, tracking=False),
}


def run(task: Task) -> Result:
    """Train an arm in this process.

    Raises:
        UserError: a run of ours failed.
    """
    import torch

    torch.set_num_threads(task.threads)
    torch.manual_seed(0)
    if task.arm == PEAK:
        from utils.machine.limits import measure_gemm

        gflops = measure_gemm(torch.device(task.device), torch.float32) / 1e9
        return Result(gflops=gflops, threads=torch.get_num_threads())
    step_ms, parameters = ARMS[task.arm](task)
    gpu_mb = torch.cuda.max_memory_allocated() / 1e6 if task.device == "cuda" else 0.0
    return Result(step_ms, parameters, torch.get_num_threads(), gpu_mb)


if __name__ == "__main__":
    print(MARK, json.dumps(asdict(run(Task(**json.loads(Path(sys.argv[1]).read_text()))))))
