"""A stand-in for training, without torch: leaves a run directory, log and checkpoints as training does, in 0.2 s.

    python stand_in.py sweep SPACE.yaml ...     like sweep.py, with trials that this file trains
    python stand_in.py FLAGS                    like train.py

The loss at step k is |log10(learning_rate) + 3| + 1 / (k + 1) + the distance of n_embd from 32. A learning rate above
0.5 diverges, one of exactly 0.25 fails. With `patience` a run stops early at that step. SWEEP_STEP_SECONDS is the time
that a step takes.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from utils.config.loader import LoadedConfig  # noqa: E402
from utils.files import write_json  # noqa: E402
from utils.machine.signals import stop_on_signals  # noqa: E402
from utils.runs.layout import CONFIG, CONFIG_SOURCES, LOGS  # noqa: E402
from utils.runs.log import RunLog, truncate  # noqa: E402
from utils.runs.origin import parent_facts  # noqa: E402
from utils.runs.run import Run, read_record  # noqa: E402
from utils.terminal.cli import Parser, script  # noqa: E402
from utils.terminal.config_flags import parse_experiment  # noqa: E402
from utils.training.launch import add_multirun_flags, add_origin_flags, launches, trial_facts  # noqa: E402


@script
def train(argv: list[str]) -> int:
    parser = Parser(prog="train.py")
    add_origin_flags(parser)
    add_multirun_flags(parser)
    parsed = parse_experiment(argv, parser)
    if parsed.own.multirun is not None:
        from utils.sweeps import trial
        from utils.sweeps.multirun import multirun

        trial.TRAIN = os.path.relpath(__file__, ROOT)
        return multirun(parsed, ROOT)
    ((loaded, origin),) = launches(parsed)
    with stop_on_signals() as stop:
        if origin is not None and origin.relation == "resume":
            run = Run.resume(origin.run)
            step = checkpoint_of(run.path)
            if not (run.path / CONFIG).is_file():
                raise AssertionError("not resumable")
            cut(run.path, step)
            run.restart(argv, step)
        else:
            run = Run.create(
                ROOT / loaded.config.tracking.runs_dir,
                loaded.config.tracking.run_tag,
                argv=argv,
                **trial_facts(parsed.own.trial),
                **({"parent": parent_facts(origin, int(origin.which), {})} if origin is not None else {}),
            )
            step = int(origin.which) if origin is not None else 0
            assert origin is None or checkpoint_of(origin.run) == step, "the checkpoint of the parent is gone"
            write_json(run.path / CONFIG_SOURCES, loaded.sources_json())
            write_json(run.path / CONFIG, loaded.config.model_dump(mode="json"))
            run.update(resolved={"max_iters": loaded.config.train.max_iters})
        status, reason, step, loss = steps(run, loaded, step, stop)
        run.finish(status, reason, last_step=step, summary={"val/loss": loss, "best_val_loss": loss}, best_step=step)
        run.release()
    return 128 + stop.signum if stop.signum else 1 if status in ("failed", "diverged") else 0


def steps(run: Run, loaded: LoadedConfig, step: int, stop: object) -> tuple[str, str | None, int, float]:
    config = loaded.config
    pause = float(os.environ.get("SWEEP_STEP_SECONDS", "0"))
    log = RunLog(run.path / LOGS)
    rate = config.optimizer.learning_rate
    loss = loss_at(rate, config.model.n_embd, step)
    while True:
        loss = loss_at(rate, config.model.n_embd, step)
        patience = config.train.patience
        if step % config.train.eval_interval == 0 or step in (config.train.max_iters, patience, *config.train.eval_at):
            log.metrics.write([{"step": step, "time": time.time(), "val/loss": loss}])
        write_json(run.path / "artifacts" / "step.json", {"step": step, "offset": log.metrics.offset})
        if rate > 0.5:
            return "diverged", f"train/loss is nan at step {step}", step, loss
        if rate == 0.25:
            return "failed", "ValueError: planted", step, loss
        if step == config.train.max_iters:
            return "completed", None, step, loss
        if step == patience:
            return "completed", "early stopping", step, loss
        if config.train.stop_at_step is not None and step >= config.train.stop_at_step:
            return "interrupted", f"stop_at_step ({config.train.stop_at_step:,}) is reached", step, loss
        if stop:
            return "interrupted", stop.reason, step, loss  # type: ignore[attr-defined]
        time.sleep(pause)
        step += 1


def loss_at(rate: float, width: int, step: int) -> float:
    return abs(math.log10(rate) + 3) + abs(width - 32) / 100 + 1 / (step + 1)


def checkpoint_of(path: Path) -> int:
    found = path / "artifacts" / "step.json"
    first = int((read_record(path).get("parent") or {}).get("step", 0))
    return int(json.loads(found.read_text())["step"]) if found.is_file() else first


def cut(path: Path, step: int) -> None:
    """Cut the log back to the checkpoint; its evaluation is repeated."""
    log = path / LOGS / "metrics.jsonl"
    if log.is_file():
        kept = [line for line in log.read_bytes().splitlines(True) if line.endswith(b"\n")]
        kept = [line for line in kept if json.loads(line)["step"] < step]
        truncate(log, sum(map(len, kept)))


def sweep(argv: list[str]) -> int:
    import sweep
    from utils.sweeps import trial

    trial.TRAIN = os.path.relpath(__file__, ROOT)
    return sweep.main(argv)


if __name__ == "__main__":
    words = sys.argv[1:]
    if words[:1] == ["sweep"]:
        sys.argv = sys.argv[1:]
        sys.exit(sweep(words[1:]))
    assert read_record
    sys.exit(train(words))
