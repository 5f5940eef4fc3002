"""The code of a run (commit, remote, patch) and its environment, as files in meta/.

Git is read through GitPython. Where it is missing, broken, without commits or detached, the files say so and training
continues. Credentials never reach a run directory: user and password are removed from remote URLs, files that look
like secrets are left out of the patch, and environment variables are not recorded at all.
"""

from __future__ import annotations

import functools
import os
import platform
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata as importlib_metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from utils.files import write_atomic
from utils.runs.layout import ENVIRONMENT, GIT, PATCH

if TYPE_CHECKING:
    import git

MAX_PATCH_FILE_BYTES = 1_000_000
MAX_UNTRACKED_FILES = 500  # each takes a call of git
SOURCE_SUFFIXES = frozenset(
    (
        *(".py", ".pyi", ".ipynb", ".sh", ".c", ".h", ".cc", ".cpp", ".cu", ".cuh", ".rs", ".js", ".html", ".css"),
        *(".yaml", ".yml", ".json", ".toml", ".j2", ".cfg", ".ini", ".txt", ".in", ".md", ".rst"),
    )
)
SOURCE_NAMES = frozenset(("Makefile", "Dockerfile", ".gitignore"))
SECRET_NAME = re.compile(
    r"^\.env|\.(env|pem|key|p12|pfx|jks|keystore|kdbx|token)$|^id_(rsa|dsa|ecdsa|ed25519)"
    r"|secrets?([._-]|$)|credential|passw(or)?d|(api|access|private)[._-]?key|(^|[._-])(auth|tokens?)([._-]|$)"
    r"|^\.(netrc|npmrc|pypirc|htpasswd)$",
    re.IGNORECASE,
)
LEFT_OUT = f"left out of {PATCH.name}:"  # heading of a list in git.txt
DIFF_FLAGS = ("--no-color", "--no-ext-diff", "--no-textconv", "--binary", "--full-index", "--no-renames", "--unified=3")
PREFIX_FLAGS = ("--src-prefix=a/", "--dst-prefix=b/")


@dataclass
class GitFacts:
    """State of the working tree. `problem` says why it, or the rest of it, is not known."""

    commit: str | None = None
    branch: str | None = None
    remote: str | None = None
    dirty: bool = False
    patch: bytes = b""
    left_out: list[str] = field(default_factory=list)  # "path (reason)"
    problem: str | None = None

    def summary(self) -> dict[str, Any]:
        """The facts that run.json and trackers show."""
        return {"commit": self.commit, "branch": self.branch, "dirty": self.dirty, "remote": self.remote}


def clean_url(url: str) -> str:
    """`url` without user, password, query and fragment; scp-like `git@host:path` keeps its user.

    >>> clean_url("https://me:secret@example.org/repo.git")
    'https://example.org/repo.git'
    """
    if "://" not in url:
        user, at, place = url.rpartition("@")
        return place if ":" in user else user + at + place
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


class MetadataCapture:
    """Reads the state of the code once, before training, and writes it into a run directory.

    Args:
        root: the project folder.
        excluded: files and folders that are not code (the runs, the corpora).
    """

    def __init__(self, root: Path, excluded: tuple[Path, ...] = ()) -> None:
        self.root = root
        self.excluded = tuple(path.resolve() for path in excluded)

    def git_facts(self) -> GitFacts:
        """Commit, branch, remote, and the patch that turns the commit into the working tree."""
        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # no exception at import where git is missing
        import git

        try:
            repo = git.Repo(self.root, search_parent_directories=True)
        except git.InvalidGitRepositoryError:
            return GitFacts(problem="not a git repository")
        except (git.GitError, OSError) as error:
            return GitFacts(problem=f"git cannot be read: {error}")
        facts = GitFacts()
        try:
            with repo:
                self._read(repo, facts)
        except git.GitCommandNotFound:
            facts.problem = "the git program is not installed"
        except git.GitCommandError as error:
            facts.problem = f"git cannot be read: {_stderr_line(error)}"
        except (git.GitError, OSError, ValueError) as error:
            facts.problem = f"git cannot be read: {_first_line(str(error))}"
        return facts

    def _read(self, repo: git.Repo, facts: GitFacts) -> None:
        """Fill in `facts`, the cheapest first: if git fails, those that are known are kept."""
        if repo.working_tree_dir is None:
            facts.problem = "a bare git repository has no working tree"
            return
        if repo.head.is_valid():
            facts.commit = repo.head.commit.hexsha
        facts.branch = None if repo.head.is_detached else repo.active_branch.name
        if repo.remotes:
            remote = next((r for r in repo.remotes if r.name == "origin"), repo.remotes[0])
            facts.remote = clean_url(next(iter(remote.urls), ""))
        base = facts.commit or repo.git.hash_object("-t", "tree", os.devnull)
        changed = _paths(repo.git.diff("--name-only", "--no-renames", "-z", base))
        untracked = _paths(repo.git.ls_files("--others", "--exclude-standard", "--full-name", "-z", "--", ":/"))
        top = Path(repo.working_tree_dir)
        changed, untracked = ([n for n in names if not self._is_excluded(top / n)] for names in (changed, untracked))
        facts.dirty = bool(changed or untracked)
        recorded = [name for name in changed if self._keep(top, name, facts.left_out, any_suffix=True)]
        if recorded:
            facts.patch += repo.git.diff(
                *DIFF_FLAGS, *PREFIX_FLAGS, base, "--", *(f":(top,literal){name}" for name in recorded), **_RAW
            )
        kept = [name for name in untracked if self._keep(top, name, facts.left_out, any_suffix=False)]
        facts.left_out += [f"{name} (one of more than {MAX_UNTRACKED_FILES})" for name in kept[MAX_UNTRACKED_FILES:]]
        for name in kept[:MAX_UNTRACKED_FILES]:
            status, patch, _ = repo.git.diff(
                *(*DIFF_FLAGS, *PREFIX_FLAGS, "--no-index", "--", os.devnull, name),
                **_RAW,
                with_exceptions=False,
                with_extended_output=True,
            )
            if status <= 1:  # 1 means only that the files differ
                facts.patch += patch
            else:
                facts.left_out.append(f"{name} (cannot be read)")

    def _is_excluded(self, path: Path) -> bool:
        found = (path.resolve(), path.parent.resolve() / path.name)  # a link, too, is in the folder that it lies in
        return any(place == one or place in one.parents for place in self.excluded for one in found)

    def _keep(self, top: Path, name: str, left_out: list[str], *, any_suffix: bool) -> bool:
        """True if the file belongs in the patch; otherwise its name and the reason are added to `left_out`."""
        path = top / name
        reason = None
        if any(SECRET_NAME.search(part) for part in Path(name).parts):
            reason = "looks like a secret"
        elif not any_suffix and path.suffix not in SOURCE_SUFFIXES and path.name not in SOURCE_NAMES:
            reason = "not a source file"
        elif path.is_symlink() and not any_suffix:
            reason = "a symbolic link"
        elif path.is_file() and path.stat().st_size > MAX_PATCH_FILE_BYTES:
            reason = "larger than 1 MB"
        if reason:
            left_out.append(f"{name} ({reason})")
        return reason is None

    @staticmethod
    def write(meta_dir: Path, facts: GitFacts, devices: Mapping[str, str]) -> None:
        """Write git.txt, code.patch and env.txt into `meta_dir`, the folder meta/ of a run."""
        write_atomic(meta_dir / GIT.name, _git_text(facts))
        if facts.patch:
            write_atomic(meta_dir / PATCH.name, facts.patch)
        write_atomic(meta_dir / ENVIRONMENT.name, environment_text(devices))


_RAW: dict[str, Any] = {"strip_newline_in_stdout": False, "stdout_as_string": False}  # a patch is bytes


def _paths(listing: str) -> list[str]:
    return [name for name in listing.split("\0") if name]


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0] if text.strip() else "unknown reason"


def _stderr_line(error: git.GitCommandError) -> str:
    """The first line that git wrote, without what GitPython adds to it."""
    return _first_line(str(error.stderr).strip().removeprefix("stderr:").strip(" '"))


def _git_text(facts: GitFacts) -> str:
    if facts.problem and not facts.commit:
        return f"git: {facts.problem}\n"
    lines = [
        f"commit: {facts.commit or 'none yet'}",
        f"branch: {facts.branch or 'detached'}",
        f"remote: {facts.remote or 'none'}",
        f"dirty: {'yes' if facts.dirty else 'no'}",
        f"patch: {PATCH.name if facts.patch else 'none'}",
    ]
    if facts.problem:
        lines.append(f"problem: {facts.problem}")
    if facts.left_out:
        lines += ["", LEFT_OUT, *(f"  {item}" for item in facts.left_out)]
    return "\n".join(lines) + "\n"


@functools.cache
def package_versions() -> Mapping[str, str]:
    """The version of each installed package; reading hundreds of files takes a second, so once a process."""
    return {str(dist.metadata["Name"]): dist.version for dist in importlib_metadata.distributions()}


def environment_text(devices: Mapping[str, str]) -> str:
    """Python, platform, devices and package versions, one fact a line."""
    versions = package_versions()
    lines = [
        f"python: {sys.version.split()[0]} ({platform.python_implementation()})",
        f"platform: {platform.platform()}",
        f"cpus: {os.cpu_count()}",
        *(f"{name}: {value}" for name, value in devices.items()),
        "",
        "packages:",
        *(f"  {name}=={versions[name]}" for name in sorted(versions, key=str.lower)),
    ]
    return "\n".join(lines) + "\n"
