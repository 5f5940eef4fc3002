"""The code that a run was trained with: restoring its commit and patch in a folder, and what code it brings along."""

from __future__ import annotations

import os
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import Literal

from utils.config.loader import ConfigLoader
from utils.errors import UserError
from utils.experiments.diff import COMMIT
from utils.files import read_bytes, real_path
from utils.runs.code import LEFT_OUT, git_environment, listed_files, open_repo
from utils.runs.identity import later_code
from utils.runs.index import IndexedRun
from utils.runs.layout import PATCH
from utils.runs.trust import callback_words
from utils.terminal.cli import INSTALLED

Code = Literal["recorded", "current"]


class ReproductionError(UserError):
    """The code, configuration or first weights of a run are no longer available."""


def code_of_its_own(run: IndexedRun, root: Path, code: Code) -> list[str]:
    """The code that a repetition would run and that this project does not have already, in words.

    Raises:
        ReproductionError: the patch of the run cannot be read.
    """
    known = ConfigLoader(root).load().config.train.callbacks
    words = callback_words(name for name in run.settings.get("callbacks") or () if name not in known)
    if code == "recorded" and (patch := recorded_patch(run)):
        words.append(f"{PATCH}, which changes {', '.join(_changed_by(patch)) or 'no file'}")
    return words


def recorded_patch(run: IndexedRun) -> bytes:
    """The uncommitted changes that a run was trained with; empty if there were none.

    Raises:
        ReproductionError: the patch cannot be read, or is not a file within the run.
    """
    try:
        return read_bytes(run.path / PATCH, run.path)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise ReproductionError(f"{run.path / PATCH}: cannot be read: {error.strerror}") from None


def recorded_code(run: IndexedRun, root: Path, folder: Path) -> tuple[Path, list[str]]:
    """Restore the code of a run in `folder`: its commit from the repository of `root`, with its patch applied.

    Returns:
        The project folder there (`root` itself for a run without git), and what is not known about the code, in words.

    Raises:
        ReproductionError: the repository does not have the commit, or the patch cannot be read or does not apply.
    """
    facts = run.record.get("git") or {}
    if facts.get("commit") is None:
        return root, ["the code of the run: it was started without git, so the current code was used"]
    if not COMMIT.fullmatch(str(facts["commit"])):  # git would read "--output=..." as an option
        raise ReproductionError(f"{run.id}: {facts['commit']!r} is not a commit")
    tree = folder / "code"
    try:
        place = unpack_commit(facts["commit"], root, tree, f" of {run.id}")
    except ReproductionError as error:
        raise ReproductionError(f"{error}; --code current trains with the current code") from None
    if patch := recorded_patch(run):
        apply_patch(patch, tree, run.path / PATCH)
    left_out = listed_files(run.path, LEFT_OUT)
    unknown = [f"the content of files that were left out of the patch: {', '.join(left_out)}"] if left_out else []
    unknown += [
        f"the code from step {step:,} on: it was changed between two sessions, and the first is repeated"
        for step, *_ in later_code(run.path, run.record)
    ]
    return place, unknown


def unpack_commit(commit: str, root: Path, tree: Path, of: str = "") -> Path:
    """Unpack the files of a commit into the new folder `tree`.

    Args:
        root: the project folder, whose git repository has the commit.
        of: for messages, whose commit it is (" of RUN").

    Returns:
        The project folder in `tree`.

    Raises:
        ReproductionError: the repository does not have the commit, or it cannot be unpacked.
    """
    import git

    if INSTALLED:
        raise ReproductionError(
            f"commit {commit[:12]}{of}: this workbench is installed as a package, without a repository; work in a "
            "checkout for the code of a commit"
        )
    archive = tree.with_name(f"{tree.name}.tar")
    try:
        with open_repo(root) as repo, archive.open("wb") as file:
            repo.archive(file, commit, format="tar")
            top = Path(str(repo.working_tree_dir))
    except (git.GitError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ReproductionError(
            f"commit {commit[:12]}{of} is not available in the repository of {root} ({reason})"
        ) from None
    tree.mkdir()
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(tree, filter="data")
    except tarfile.TarError as error:
        raise ReproductionError(f"commit {commit[:12]}{of} cannot be unpacked: {error}") from None
    archive.unlink()
    return tree / real_path(root).relative_to(real_path(top))


def apply_patch(patch: bytes, tree: Path, name: Path) -> None:
    """Apply a patch to the files in `tree`; git refuses paths outside it.

    Args:
        name: the patch in messages.

    Raises:
        ReproductionError: it does not apply, or would write outside `tree`.
    """
    command = ["git", "apply", "--whitespace=nowarn"]
    result = subprocess.run(command, cwd=tree, env=_outside(tree), input=patch, capture_output=True)
    if result.returncode:
        reason = (result.stderr.decode(errors="replace").strip().splitlines() or ["git apply failed"])[0]
        raise ReproductionError(f"{name}: the patch cannot be applied: {reason.removeprefix('error: ')}")


def _changed_by(patch: bytes) -> list[str]:
    """The files that `apply_patch` would change; git lists them, as parts of a patch may lack the line `diff --git`."""
    command = ["git", "apply", "--numstat", "-z"]
    with tempfile.TemporaryDirectory() as folder:  # in a repository, git would omit files outside the folder
        listing = subprocess.run(command, cwd=folder, env=_outside(folder), input=patch, capture_output=True).stdout
    return [os.fsdecode(entry.split(b"\t", 2)[-1]) for entry in listing.split(b"\0") if entry]


def _outside(folder: str | Path) -> dict[str, str]:
    """The environment of a git process in `folder` that must ignore any repository around it."""
    return {**git_environment(), "GIT_CEILING_DIRECTORIES": os.fspath(real_path(Path(folder)).parent)}
