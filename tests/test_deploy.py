"""The templates in deploy/ are valid and run the commands of this project."""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from torch.distributed.run import get_args_parser

SLURM, SKYPILOT = ROOT / "deploy" / "slurm.sbatch", ROOT / "deploy" / "skypilot.yaml"
# From the manual page of sbatch.
SBATCH = {
    "job-name",
    "output",
    "open-mode",
    "nodes",
    "ntasks-per-node",
    "cpus-per-task",
    "gres",
    "mem",
    "time",
    "requeue",
    "signal",
}
# From https://docs.skypilot.co/en/latest/reference/yaml-spec.html.
TASK = {"name", "workdir", "num_nodes", "resources", "envs", "secrets", "file_mounts", "setup", "run"}
RESOURCES = {"infra", "accelerators", "cpus", "memory", "use_spot", "disk_size", "image_id", "any_of", "job_recovery"}


def test_the_slurm_script_has_options_that_sbatch_knows() -> None:
    lines = SLURM.read_text().splitlines()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", "\n".join(lines), re.MULTILINE))
    assert len(options) == sum(line.startswith("#SBATCH") for line in lines)
    assert options.keys() <= SBATCH
    assert re.fullmatch(r"B:[A-Z]+@\d+", options["signal"])
    assert "requeue" in options
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first:]), "sbatch stops reading at the first command"


def stand_ins(folder: Path, **bodies: str) -> None:
    """Write shell commands with these names into a folder."""
    for name, body in bodies.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)


def slurm_job(folder: Path, **variables: str) -> dict[str, str]:
    """The environment of job 7, with the stand-ins of a folder."""
    path = f"{folder}:{os.environ['PATH']}"
    return {"PATH": path, "SLURM_SUBMIT_DIR": str(folder), "SLURM_JOB_ID": "7", **variables}


def terminated(folder: Path, *words: str, **variables: str) -> int:
    """Run the Slurm script until srun has created `started`, then send SIGTERM; returns the exit status."""
    process = subprocess.Popen(["bash", SLURM, *words], cwd=folder, env=slurm_job(folder, **variables))
    while not (folder / "started").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.terminate()
    return process.wait(20)


@pytest.mark.parametrize(
    ("words", "status", "ran", "requeued"),
    [
        (["--run-tag", "a b"], 0, ["train.py", "--resume", "auto", "--run-tag", "a b"], False),
        (["--run-tag", "x"], 143, ["train.py", "--resume", "auto", "--run-tag", "x"], True),
        (["sweep", "s.yaml", "--trials", "9"], 1, ["sweep.py", "s.yaml", "--trials", "9", "--resume"], False),
    ],
)
def test_the_slurm_script_requeues_a_stopped_run(
    tmp_path: Path, words: list[str], status: int, ran: list[str], requeued: bool
) -> None:
    """A dry run, with stand-ins for srun and scontrol."""
    stand_ins(tmp_path, srun=f'printf "%s\\n" "$@" > srun.txt; exit {status}', scontrol='echo "$@" > scontrol.txt')
    done = subprocess.run(["bash", SLURM, *words], cwd=tmp_path, env=slurm_job(tmp_path))
    assert done.returncode == status
    assert (tmp_path / "srun.txt").read_text().splitlines()[2:] == ran
    assert (tmp_path / "scontrol.txt").exists() == requeued


def test_the_slurm_script_does_not_requeue_a_run_that_completes_after_the_signal(tmp_path: Path) -> None:
    srun = 'trap "exit 0" TERM; touch started; while :; do sleep 0.05; done'
    stand_ins(tmp_path, srun=srun, scontrol='echo "$@" > scontrol.txt')
    assert terminated(tmp_path, "--run-tag", "x") == 0
    assert not (tmp_path / "scontrol.txt").exists()


def test_the_slurm_script_starts_a_rank_for_each_gpu_and_passes_the_signal_on(tmp_path: Path) -> None:
    """Two nodes of four GPUs; torchrun exits with 1 after a signal, as after any failure.

    The list of nodes is longer than a pipe holds; a reader that stopped after the first name would end the script.
    """
    srun = (
        'printf "%s\\n" "$@" > srun.txt; trap "touch stopped; exit 1" TERM; touch started; while :; do sleep 0.05; done'
    )
    stand_ins(
        tmp_path, srun=srun, scontrol='if [ "$1" = show ]; then seq -f n%g 20000; else echo "$@" > scontrol.txt; fi'
    )
    slurm = {"SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4", "SLURM_JOB_NODELIST": "n[1-2]"}
    assert terminated(tmp_path, "--run-tag", "wide", **slurm) == 1
    words = (tmp_path / "srun.txt").read_text().splitlines()
    assert words[2:] == [
        *("-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "4", "--max-restarts", "3"),
        *("--rdzv-backend", "c10d", "--rdzv-id", "7", "--rdzv-endpoint", "n1:29500"),
        *("train.py", "--resume", "auto", "--run-tag", "wide"),
    ]
    known = get_args_parser().parse_args(words[4:])
    assert (known.nnodes, known.nproc_per_node, known.training_script) == ("2", "4", "train.py")
    assert (tmp_path / "stopped").exists()
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 7\n"


@pytest.mark.parametrize(
    ("nodes", "gpus", "command", "torchrun"),
    [
        ("1", "1", "train.py", False),
        ("2", "1", "train.py", True),
        ("1", "8", "train.py", True),
        ("2", "8", "sweep.py", False),
    ],
)
def test_the_skypilot_task_starts_a_rank_for_each_gpu(
    tmp_path: Path, nodes: str, gpus: str, command: str, torchrun: bool
) -> None:
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    stand_ins(tmp_path / ".venv" / "bin", python='printf "%s\\n" "$@" > python.txt')
    stand_ins(tmp_path, mkdir="true")
    sky = {"SKYPILOT_NUM_NODES": nodes, "SKYPILOT_NUM_GPUS_PER_NODE": gpus, "SKYPILOT_NODE_RANK": "1"}
    sky |= {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_TASK_ID": "t", "COMMAND": f"{command} --seed 1"}
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **sky}
    subprocess.run(["bash", "-c", yaml.safe_load(SKYPILOT.read_text())["run"]], cwd=tmp_path, env=env, check=True)
    words = (tmp_path / "python.txt").read_text().splitlines()
    if not torchrun:
        assert words[:3] == [command, "--seed", "1"]
        return
    known = get_args_parser().parse_args(words[2:])
    assert (known.nnodes, known.nproc_per_node, known.rdzv_endpoint) == (nodes, gpus, "10.0.0.1:29500")
    assert known.rdzv_conf == "is_host=0"
    assert known.training_script_args[:2] == ["--seed", "1"]


def test_the_skypilot_task_has_documented_fields() -> None:
    task = yaml.safe_load(SKYPILOT.read_text())
    assert task.keys() <= TASK
    assert task["resources"].keys() <= RESOURCES
    assert "--resume auto" in task["envs"]["COMMAND"]
    assert {mount["mode"] for mount in task["file_mounts"].values()} == {"MOUNT_CACHED"}  # MOUNT cannot append
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n", "-c", task[part]], check=True)
