"""The templates in deploy/: a parser reads them, and their commands are ours."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

SLURM, SKYPILOT = ROOT / "deploy" / "slurm.sbatch", ROOT / "deploy" / "skypilot.yaml"
# Of the manual page of sbatch.
SBATCH = {
    "job-name",
    "output",
    "open-mode",
    "nodes",
    "ntasks",
    "cpus-per-task",
    "gres",
    "mem",
    "time",
    "requeue",
    "signal",
}
# Of https://docs.skypilot.co/en/latest/reference/yaml-spec.html.
TASK = {"name", "workdir", "num_nodes", "resources", "envs", "secrets", "file_mounts", "setup", "run"}
RESOURCES = {"infra", "accelerators", "cpus", "memory", "use_spot", "disk_size", "image_id", "any_of", "job_recovery"}


def test_the_slurm_script_has_options_that_sbatch_knows() -> None:
    lines = SLURM.read_text().splitlines()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", "\n".join(lines), re.MULTILINE))
    assert len(options) == sum(line.startswith("#SBATCH") for line in lines)
    assert options.keys() <= SBATCH
    assert re.fullmatch(r"[A-Z]+@\d+", options["signal"])
    assert "requeue" in options
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first:]), "sbatch stops reading at the first command"


@pytest.mark.parametrize(
    ("words", "status", "ran", "requeued"),
    [
        (["--run-tag", "a b"], 0, ["train.py", "--resume", "auto", "--run-tag", "a b"], False),
        (["--run-tag", "x"], 143, ["train.py", "--resume", "auto", "--run-tag", "x"], True),
        (["sweep", "s.yaml", "--trials", "9"], 1, ["sweep.py", "s.yaml", "--trials", "9", "--resume"], False),
    ],
)
def test_the_slurm_script_starts_again_what_was_stopped(
    tmp_path: Path, words: list[str], status: int, ran: list[str], requeued: bool
) -> None:
    """A dry run, with stand-ins for srun and scontrol."""
    for name, body in (
        ("srun", f'printf "%s\\n" "$@" > srun.txt; exit {status}'),
        ("scontrol", 'echo "$@" > scontrol.txt'),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7"}
    bash = shutil.which("bash")
    assert bash is not None
    done = subprocess.run([bash, SLURM, *words], cwd=tmp_path, env=env)
    assert done.returncode == status
    assert (tmp_path / "srun.txt").read_text().splitlines()[2:] == ran
    assert (tmp_path / "scontrol.txt").exists() == requeued


def test_the_skypilot_task_has_fields_that_are_documented() -> None:
    task = yaml.safe_load(SKYPILOT.read_text())
    assert task.keys() <= TASK
    assert task["resources"].keys() <= RESOURCES
    assert "--resume auto" in task["envs"]["COMMAND"]
    assert {mount["mode"] for mount in task["file_mounts"].values()} == {"MOUNT_CACHED"}  # MOUNT cannot append
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n", "-c", task[part]], check=True)
