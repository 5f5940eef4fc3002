"""The code of a run (commit, remote, patch) and its environment, as files in meta/.

Git is read through GitPython. If git is missing or broken, or the repository has no commits or a detached HEAD, the
files say so and training continues. Credentials never reach a run directory: they are removed from remote URLs, files
that look like secrets by name or content are left out of the patch, and environment variables are not recorded. Of the
untracked files, only code is recorded (utils/runs/source.py).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import first_line
from utils.files import read_bytes, read_text, real_path, write_atomic
from utils.runs.environment import environment_text, package_versions
from utils.runs.imported import edited_modules, imported_files, source_of, unknown_modules
from utils.runs.layout import CALLBACKS, ENVIRONMENT, GIT, PATCH
from utils.runs.patch import added_lines, file_of, parts_of_patch, patched_files
from utils.runs.secrets import clean_url, find_secret, without_secrets
from utils.runs.source import is_source
from utils.terminal.cli import INSTALLED
from utils.terminal.words import one_line

if TYPE_CHECKING:
    import git

MAX_PATCH_FILE_BYTES = 1_000_000
MAX_UNTRACKED_FILES = 500  # each takes one call to git
NOT_SOURCE = "not a source file"  # a reason to leave a file out
SECRET_NAME = re.compile(
    r"^\.env|\.(env|pem|key|p12|pfx|jks|keystore|kdbx|token)$|^id_(rsa|dsa|ecdsa|ed25519)"
    r"|secrets?([._-]|$)|credential|passw(or)?d|(api|access|private)[._-]?key|(^|[._-])(auth|tokens?)([._-]|$)"
    r"|^\.(netrc|npmrc|pypirc|htpasswd)$",
    re.IGNORECASE,
)
# Variables that only configure git and its connections; the others (GIT_DIR, GIT_INDEX_FILE, ...) can make git read a
# different repository from the one asked for.
GIT_VARIABLES = re.compile(
    r"GIT_(PYTHON_|SSL_|SSH|HTTP_|CONFIG_(GLOBAL|SYSTEM|NOSYSTEM)$|EXEC_PATH$|ASKPASS$|TERMINAL_)"
)
# Headings of lists in git.txt, by which `listed_files` finds them in older runs, too.
LEFT_OUT = f"left out of {PATCH.name}:"
UNREAD = f"in {PATCH.name}, but no code that was trained with:"
DIFF_FLAGS = (
    "--no-color",
    "--no-ext-diff",
    "--no-textconv",
    "--binary",
    "--full-index",
    "--no-renames",
    "--unified=3",
    "--submodule=short",
    "--ignore-submodules=dirty",
)
PREFIX_FLAGS = ("--src-prefix=a/", "--dst-prefix=b/")


@dataclass
class GitFacts:
    """The state of the working tree.

    patch: turns the commit into the working tree; ends with the patches in `unread`.
    unread: path -> patch of each untracked file that is not an imported module: notes, reports, other programs.
    left_out: "path (reason)" of each changed file that the patch does not contain.
    callbacks: module -> its source.
    problem: why all or some of these facts are unknown; None if nothing is.
    """

    commit: str | None = None
    branch: str | None = None
    remote: str | None = None
    dirty: bool = False
    patch: bytes = b""
    unread: dict[str, bytes] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    callbacks: dict[str, bytes] = field(default_factory=dict)
    problem: str | None = None

    @property
    def files(self) -> list[str]:
        """The files that the patch changes."""
        return list(patched_files(self.patch))

    def summary(self) -> dict[str, Any]:
        """The facts for run.json and the trackers."""
        facts = {"commit": self.commit, "branch": self.branch, "dirty": self.dirty, "remote": self.remote}
        return {**facts, "code": self.fingerprint()}

    def fingerprint(self) -> str | None:
        """A hash of the uncommitted code that training can use; None if there is none.

        It covers changes of files that git tracks, untracked modules that are imported, and callbacks.
        """
        code = self.patch.removesuffix(b"".join(self.unread.values()))
        if not code and not self.callbacks:
            return None
        digest = hashlib.sha256(code)
        for name, source in sorted(self.callbacks.items()) if self.callbacks else ():
            digest.update(b"\0%s\0%s" % (name.encode(), source))
        return digest.hexdigest()


def git_environment() -> dict[str, str]:
    """The environment for a git process, without the variables that would make it read another repository."""
    return {name: value for name, value in os.environ.items() if not _misleads_git(name)}


def _misleads_git(name: str) -> bool:
    return name.startswith("GIT_") and GIT_VARIABLES.match(name) is None


@contextlib.contextmanager
def open_repo(folder: Path) -> Iterator[git.Repo]:
    """Open the git repository that contains `folder`. Every use of git goes through here or uses `git_environment`.

    Inside the context, variables that would make git read another repository are removed from the environment.

    Raises:
        git.GitError, OSError, ValueError: there is no repository, or it cannot be read.
    """
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # without git, the import must not raise
    misleading = {name: value for name, value in os.environ.items() if _misleads_git(name)}
    for name in misleading:
        del os.environ[name]
    try:
        import git

        with git.Repo(folder, search_parent_directories=True) as repo:
            yield repo
    finally:
        os.environ.update(misleading)


class CodeReader:
    """Reads the state of the code once, before training.

    Args:
        root: the project folder.
        excluded: files and folders that are not code (the runs, the corpora).
        callbacks: names of the modules of callbacks, already imported; their sources are always recorded.
        named: configuration files named on the command line, relative to `root`; they count as code.
    """

    def __init__(
        self,
        root: Path,
        excluded: tuple[Path, ...] = (),
        callbacks: Iterable[str] = (),
        named: Collection[str] = (),
    ) -> None:
        self.root, self.named = root, named
        sources = {name: source_of(name) for name in callbacks}
        self.callbacks = {name: path for name, path in sources.items() if path is not None}
        self.without_source = sources.keys() - self.callbacks.keys()
        self.excluded = tuple(real_path(path) for path in excluded)

    def git_facts(self) -> GitFacts:
        """Read commit, branch, remote, and the patch that turns the commit into the working tree."""
        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
        import git

        facts = GitFacts()
        for name, path in self.callbacks.items():
            with contextlib.suppress(OSError):
                facts.callbacks[name] = without_secrets(path.read_bytes())
        facts.left_out += [f"{name} (of a callback: no file has its code)" for name in sorted(self.without_source)]
        if INSTALLED:  # a repository around the current folder contains another project's code
            facts.problem = (
                f"the code is the installed package lm-workbench {package_versions().get('lm-workbench', '')}"
            )
            return facts
        try:
            with open_repo(self.root) as repo:
                self._read(repo, facts)
        except git.InvalidGitRepositoryError:
            facts.problem = "not a git repository"
        except git.GitCommandNotFound:
            facts.problem = "the git program is not installed"
        except git.GitCommandError as error:
            facts.problem = f"git cannot be read: {_stderr_line(error)}"
        except (git.GitError, OSError, ValueError) as error:
            facts.problem = f"git cannot be read: {first_line(error)}"
        return facts

    def _read(self, repo: git.Repo, facts: GitFacts) -> None:
        """Fill in `facts`, the cheapest first, so that those found before git fails are kept."""
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
        changed = _paths(repo.git.diff("--name-only", "--no-renames", "--ignore-submodules=dirty", "-z", base))
        untracked = _paths(repo.git.ls_files("--others", "--exclude-standard", "--full-name", "-z", "--", ":/"))
        untracked = [name for name in untracked if "__pycache__" not in name.split("/")]
        top = Path(repo.working_tree_dir)
        changed, untracked = ([n for n in names if not self._is_excluded(top / n)] for names in (changed, untracked))
        hidden = [name for name in hidden_changes(repo) if not self._is_excluded(top / name)]
        submodules = list(dirty_submodules(repo))
        facts.dirty = bool(changed or untracked or hidden or submodules)
        facts.left_out += [f"{name} (changed, but git was told to assume that it is not)" for name in hidden]
        facts.left_out += [f"{name} (uncommitted changes of a submodule)" for name in submodules]
        known = {*_paths(repo.git.ls_files("-z")), *untracked}
        imported = imported_files()
        facts.left_out += edited_modules(top, imported, self.callbacks)
        facts.left_out += unknown_modules(top, known, imported, self.callbacks)
        recorded = [name for name in changed if self._keep(top, name, facts.left_out)]
        if recorded:
            patch = repo.git.diff(
                *DIFF_FLAGS, *PREFIX_FLAGS, base, "--", *(f":(top,literal){name}" for name in recorded), **_RAW
            )
            facts.patch += b"".join(part for part in parts_of_patch(patch) if _is_harmless(part, top, facts.left_out))
        kept = [name for name in untracked if self._is_code(top, name, facts.left_out)]
        facts.left_out += [f"{name} (one of more than {MAX_UNTRACKED_FILES})" for name in kept[MAX_UNTRACKED_FILES:]]
        modules = {real for _, real in imported.values()}
        for name in kept[:MAX_UNTRACKED_FILES]:
            status, patch, _ = repo.git.diff(
                *(*DIFF_FLAGS, *PREFIX_FLAGS, "--no-index", "--", os.devnull, name),
                **_RAW,
                with_exceptions=False,
                with_extended_output=True,
            )
            if status > 1:  # 1 means only that the files differ
                facts.left_out.append(f"{name} (cannot be read)")
            elif os.path.realpath(top / name) in modules:
                facts.patch += patch
            else:
                facts.unread[name] = patch
        facts.patch += b"".join(facts.unread.values())

    def _is_excluded(self, path: Path) -> bool:
        found = (real_path(path), real_path(path.parent) / path.name)  # a link, by its target or its own place
        return any(place == one or place in one.parents for place in self.excluded for one in found)

    def _is_code(self, top: Path, name: str, left_out: list[str]) -> bool:
        """Whether an untracked file belongs in the patch; if not, its name and the reason are added to `left_out`."""
        path = top / name
        place = path.relative_to(self.root) if path.is_relative_to(self.root) else name
        if not is_source(place, self.named):
            reason = "looks like a secret" if _has_secret_name(name) else NOT_SOURCE
        elif path.is_symlink():
            reason = "a symbolic link"
        elif not self._keep(top, name, left_out):
            return False
        else:
            try:
                secret = find_secret(read_bytes(path, limit=MAX_PATCH_FILE_BYTES))
            except OSError as error:
                reason = f"cannot be read: {error.strerror}"
            else:
                if secret is None:
                    return True
                reason = f"looks like a secret: {secret}"
        left_out.append(f"{name} ({reason})")
        return False

    @staticmethod
    def _keep(top: Path, name: str, left_out: list[str]) -> bool:
        """Whether a file may be recorded by its name and size; if not, its name and the reason go to `left_out`."""
        path = top / name
        if _has_secret_name(name):
            left_out.append(f"{name} (looks like a secret)")
            return False
        if path.is_file() and path.stat().st_size > MAX_PATCH_FILE_BYTES:
            left_out.append(f"{name} (larger than 1 MB)")
            return False
        return True


def write_code_and_environment(meta_dir: Path, facts: GitFacts, devices: Mapping[str, str]) -> None:
    """Write git.txt, code.patch, callbacks/ and env.txt into `meta_dir`: meta/ or the folder of a later session."""
    meta_dir.mkdir(parents=True, exist_ok=True)
    write_atomic(meta_dir / GIT.name, git_text(facts))
    if facts.patch:
        write_atomic(meta_dir / PATCH.name, facts.patch)
    for name, source in facts.callbacks.items():
        (meta_dir / CALLBACKS.name).mkdir(exist_ok=True)
        write_atomic(meta_dir / CALLBACKS.name / f"{name}.py", source)
    write_atomic(meta_dir / ENVIRONMENT.name, environment_text(devices))


def hidden_changes(repo: git.Repo) -> Iterator[str]:
    """Yield files that differ from the index although git was told to ignore that (assume-unchanged, skip-worktree)."""
    flagged = [line[2:] for line in _paths(repo.git.ls_files("-v", "-z")) if line[0] == "S" or line[0].islower()]
    if not flagged:
        return
    staged = (line.partition("\t") for line in _paths(repo.git.ls_files("--stage", "-z")))
    blobs = {name: facts.split()[1] for facts, _, name in staged}
    for name in flagged:
        path = Path(str(repo.working_tree_dir), name)
        if path.is_file() and repo.git.hash_object("--", name) != blobs.get(name):
            yield name


def dirty_submodules(repo: git.Repo) -> Iterator[str]:
    """Yield submodules that have uncommitted changes."""
    listing = _paths(repo.git.status("--porcelain=v2", "--ignore-submodules=none", "--untracked-files=no", "-z"))
    for line in listing:  # 1 XY S<commit><modified><untracked> mH mI mW hH hI path
        parts = line.split(" ", 8)
        if parts[0] == "1" and len(parts) == 9 and parts[2][0] == "S" and parts[2][2:] != "..":
            yield parts[8]


def _has_secret_name(name: str) -> bool:
    return any(SECRET_NAME.search(part) for part in Path(name).parts)


def _is_harmless(part: bytes, top: Path, left_out: list[str]) -> bool:
    """Whether the patch of one file has no secret; if it has one, the file's name and the reason go to `left_out`."""
    name = file_of(part)
    content = added_lines(part)
    if b"\nGIT binary patch\n" in part:
        with contextlib.suppress(OSError):
            content = read_bytes(top / name, limit=MAX_PATCH_FILE_BYTES)
    if secret := find_secret(content):
        left_out.append(f"{name} (looks like a secret: {secret.rpartition(' in line ')[0]})")
    return secret is None


_RAW: dict[str, Any] = {"strip_newline_in_stdout": False, "stdout_as_string": False}  # a patch is bytes


def _paths(listing: str) -> list[str]:
    return [name for name in listing.split("\0") if name]


def _stderr_line(error: git.GitCommandError) -> str:
    """The first line that git wrote to stderr, without what GitPython adds to it."""
    lines = str(error.stderr).strip().removeprefix("stderr:").strip(" '").splitlines()
    return lines[0] if lines else "unknown reason"


def git_text(facts: GitFacts) -> str:
    """The content of git.txt."""
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
    for heading, items in ((UNREAD, facts.unread), (LEFT_OUT, facts.left_out)):
        if items:
            lines += ["", heading, *(f"  {one_line(item)}" for item in items)]
    return "\n".join(lines) + "\n"


def listed_files(run: Path, heading: str) -> list[str]:
    """The entries below a heading of git.txt, each "path" or "path (reason)"; empty if there is no such heading."""
    try:
        text = read_text(run / GIT, run)
    except (OSError, ValueError):
        return []
    listing = text.partition(f"{heading}\n")[2].partition("\n\n")[0]
    return [line.strip() for line in listing.splitlines()]
