"""The code of a run: git in every state, a patch that applies, and no secret in what is recorded."""

from __future__ import annotations

import importlib
import json
import os
import stat
import subprocess
import sys
import types
from pathlib import Path

import pytest

from utils.runs.code import (
    MAX_PATCH_FILE_BYTES,
    UNREAD,
    CodeReader,
    GitFacts,
    git_environment,
    listed_files,
    write_code_and_environment,
)
from utils.runs.patch import patched_files

ROOT = Path(__file__).resolve().parents[2]
USER_CONFIGS = {
    "color": "[color]\n\tui = always\n\tdiff = always\n",
    "noprefix": "[diff]\n\tnoprefix = true\n",
    "mnemonicPrefix": "[diff]\n\tmnemonicPrefix = true\n",
    "external": "[diff]\n\texternal = /bin/echo\n",
    "context": "[diff]\n\tcontext = 0\n",
    "renames": "[diff]\n\trenames = copies\n\talgorithm = histogram\n\tsuppressBlankEmpty = true\n",
    "quotePath": "[core]\n\tquotePath = false\n\tpager = less\n",
    "relative": "[diff]\n\trelative = true\n\tcolorMoved = zebra\n\twsErrorHighlight = all\n",
    "submodule": "[diff]\n\tsubmodule = log\n\tignoreSubmodules = all\n[status]\n\trelativePaths = true\n",
    "untracked": "[status]\n\tshowUntrackedFiles = no\n[core]\n\tuntrackedCache = true\n",
}
ODD_NAMES = (
    *("with space.py", "über.py", 'quote".py', "tab\t.py", "line\nbreak.py", "back\\slash.py", "-n.py", "*.py"),
    *("[a].py", ":(top)x.py", "a b/c d.py", "~.py", "'.py", "🙂.py", "trailing .py", "a:b.py", "$HOME.py"),
)


@pytest.fixture(autouse=True)
def user_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's git configuration in this test, instead of the machine's."""
    path = tmp_path / "gitconfig"
    path.write_text("")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(path))
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "A")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "a@example.org")
    return path


def git(folder: Path, *words: str) -> str:
    result = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def write(repo: Path, files: dict[str, bytes | str]) -> None:
    for name, content in files.items():
        path = repo / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))


def commit(repo: Path) -> str:
    git(repo, "add", "--all")
    git(repo, "commit", "--quiet", "--message", "a commit")
    return git(repo, "rev-parse", "HEAD")


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A repository with one commit of a few files, on branch main."""
    path = tmp_path / "repo"
    path.mkdir()
    git(path, "init", "--quiet", "--initial-branch=main")
    write(
        path, {"a.py": "a = 1\n" * 9, "b/c.py": "c = 1", "empty.py": "", "data.bin": bytes(range(256)), "gone.py": "x"}
    )
    commit(path)
    return path


def facts_of(repo: Path, *excluded: Path) -> GitFacts:
    return CodeReader(repo, excluded).git_facts()


def tree(folder: Path) -> dict[str, tuple[bytes, bool]]:
    """Content and executable bit of every file outside .git."""
    return {
        os.fsdecode(path.relative_to(folder)): (path.read_bytes(), bool(path.stat().st_mode & stat.S_IXUSR))
        for path in folder.rglob("*")
        if path.is_file() and ".git" not in path.relative_to(folder).parts
    }


def rebuilt(repo: Path, facts: GitFacts, tmp_path: Path) -> dict[str, tuple[bytes, bool]]:
    """The files of a fresh clone at the commit with the patch applied."""
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", str(repo), str(clone))
    git(clone, "checkout", "--quiet", "--detach", facts.commit or "none")
    (tmp_path / "code.patch").write_bytes(facts.patch)
    if facts.patch:
        git(clone, "apply", str(tmp_path / "code.patch"))
    return tree(clone)


def test_a_folder_outside_git_is_reported_as_such(tmp_path: Path) -> None:
    facts = facts_of(tmp_path)
    assert facts == GitFacts(problem="not a git repository")
    assert facts.summary() == {"commit": None, "branch": None, "dirty": False, "remote": None, "code": None}


def test_a_clean_tree_has_commit_branch_and_no_patch(repo: Path) -> None:
    facts = facts_of(repo)
    assert facts == GitFacts(commit=git(repo, "rev-parse", "HEAD"), branch="main")


def test_a_repository_without_commits_has_a_branch_and_a_patch(tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet", "--initial-branch=trunk")
    write(tmp_path, {"staged.py": "s = 1\n", "untracked.py": "u = 1\n"})
    git(tmp_path, "add", "staged.py")
    facts = facts_of(tmp_path)
    assert (facts.commit, facts.branch, facts.dirty, facts.problem) == (None, "trunk", True, None)
    assert b"+s = 1" in facts.patch
    assert b"+u = 1" in facts.patch
    empty = tmp_path / "elsewhere"
    empty.mkdir()
    git(empty, "init", "--quiet")
    (tmp_path / "code.patch").write_bytes(facts.patch)
    git(empty, "apply", str(tmp_path / "code.patch"))
    assert (empty / "staged.py").read_text() == "s = 1\n"


def test_a_detached_head_has_a_commit_and_no_branch(repo: Path) -> None:
    git(repo, "checkout", "--quiet", "--detach")
    facts = facts_of(repo)
    assert (facts.commit, facts.branch, facts.dirty) == (git(repo, "rev-parse", "HEAD"), None, False)


def test_a_bare_repository_and_a_broken_one_are_reported(tmp_path: Path, repo: Path) -> None:
    git(tmp_path, "init", "--quiet", "--bare", "bare.git")
    assert facts_of(tmp_path / "bare.git").problem == "a bare git repository has no working tree"
    (repo / ".git" / "index").write_bytes(b"damaged")
    assert (facts_of(repo).problem or "").startswith("git cannot be read")


def test_a_missing_git_program_is_reported_and_stops_nothing(repo: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    code = "import dataclasses, json, sys; from pathlib import Path; from utils.runs.code import CodeReader\n"
    code += "facts = CodeReader(Path(sys.argv[1])).git_facts(); print(json.dumps([facts.problem, facts.commit]))"
    result = subprocess.run(
        [sys.executable, "-c", code, str(repo)],
        cwd=ROOT,
        env={"PATH": str(tmp_path / "bin")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout)[0] == "the git program is not installed"


def test_the_project_may_be_a_subfolder_of_the_repository(repo: Path) -> None:
    write(repo, {"b/c.py": "c = 2", "top.py": "t = 1\n"})
    facts = facts_of(repo / "b")
    assert b"a/b/c.py" in facts.patch
    assert b"b/top.py" in facts.patch


def test_the_patch_turns_a_clone_into_the_working_tree(repo: Path, tmp_path: Path) -> None:
    write(
        repo,
        {
            "a.py": "a = 1\n" * 4 + "a = 2\n" + "a = 1\n" * 5,
            "b/c.py": "c = 1\n",  # now with a line break at its end
            "empty.py": "no longer\r\n",
            "data.bin": b"\x00" + bytes(range(255, 0, -1)),
            "staged.py": "s = 'ü'",
            "new/untracked.py": "u = 1",
            "new/empty.py": "",
            "latin.py": b"# caf\xe9\n",
            "run.py": "#!/usr/bin/env python\n",
            "configs/wide.yaml": "n_embd: 256\n",
        },
    )
    (repo / "gone.py").unlink()
    (repo / "run.py").chmod(0o755)
    git(repo, "add", "staged.py")
    facts = facts_of(repo)
    assert facts.dirty
    assert facts.left_out == []
    assert rebuilt(repo, facts, tmp_path) == tree(repo)


def test_renames_mode_changes_and_staged_deletions_are_in_the_patch(repo: Path, tmp_path: Path) -> None:
    git(repo, "mv", "a.py", "moved.py")
    git(repo, "rm", "--quiet", "gone.py")
    (repo / "b" / "c.py").chmod(0o755)
    assert rebuilt(repo, facts_of(repo), tmp_path) == tree(repo)


@pytest.mark.parametrize("tracked", [True, False], ids=["tracked", "untracked"])
def test_odd_file_names_are_in_the_patch(repo: Path, tmp_path: Path, tracked: bool) -> None:
    if tracked:
        write(repo, dict.fromkeys(ODD_NAMES, "before\n"))
        commit(repo)
    write(repo, {name: f"content of {name!r}\n" for name in ODD_NAMES})
    facts = facts_of(repo)
    assert facts.left_out == []
    assert rebuilt(repo, facts, tmp_path) == tree(repo)
    assert sorted(patched_files(facts.patch)) == sorted(facts.files) == sorted(ODD_NAMES)


@pytest.mark.parametrize("suffix", [".py", ".bin"])
def test_file_names_that_are_not_utf_8_do_not_stop_training(repo: Path, tmp_path: Path, suffix: str) -> None:
    name = os.fsdecode(b"caf\xe9" + suffix.encode())
    write(repo, {name: "x = 1\n"})
    capture = CodeReader(repo)
    facts = capture.git_facts()
    write_code_and_environment(tmp_path, facts, {})
    assert "commit: " in (tmp_path / "git.txt").read_text(encoding="utf-8", errors="replace")
    if suffix == ".py":
        assert rebuilt(repo, facts, tmp_path) == tree(repo)


@pytest.mark.parametrize("settings", USER_CONFIGS.values(), ids=USER_CONFIGS)
def test_the_users_git_configuration_changes_nothing(
    repo: Path, tmp_path: Path, user_config: Path, settings: str
) -> None:
    lines = [f"line {i}\n" for i in range(40)]
    write(repo, {"long.py": "".join(lines)})
    commit(repo)
    git(repo, "mv", "gone.py", "moved.py")
    lines[20] = "  changed\t \n"
    write(repo, {"long.py": "".join(lines), "new.py": "n = 1\n", "über x.py": "u", "data.bin": b"\x00\xff"})
    user_config.write_text(settings)
    facts = facts_of(repo)
    assert (facts.problem, facts.left_out, facts.dirty) == (None, [], True)
    user_config.write_text("")
    assert rebuilt(repo, facts, tmp_path) == tree(repo)


def test_git_attributes_and_diff_filters_change_nothing(repo: Path, tmp_path: Path, user_config: Path) -> None:
    write(repo, {".gitattributes": "*.py diff=words\n*.bin -diff\n"})
    commit(repo)
    user_config.write_text('[diff "words"]\n\ttextconv = wc\n\tcommand = /bin/echo\n')
    write(repo, {"a.py": "a = 3\n", "new.py": "n = 1\n", "data.bin": b"text"})
    facts = facts_of(repo)
    user_config.write_text("")
    assert rebuilt(repo, facts, tmp_path) == tree(repo)


@pytest.mark.parametrize(
    "name",
    [
        *(".env", ".env.local", "prod.env", "server.pem", "tls.key", "id_rsa", "id_ed25519.txt", "a/b/.netrc"),
        *("secrets.yaml", "client_secret.json", "credentials.json", "my-password.txt", ".npmrc", "api.token"),
        *("config.secret", "SECRET.py", ".git-credentials", ".pypirc", "store.kdbx", "keys.p12"),
    ],
)
@pytest.mark.parametrize("tracked", [True, False], ids=["tracked", "untracked"])
def test_secret_files_are_left_out_of_the_patch_and_listed(repo: Path, name: str, tracked: bool) -> None:
    if tracked:
        write(repo, {name: "before\n"})
        commit(repo)
    write(repo, {name: "hunter2\n", "a.py": "a = 2\n"})
    facts = facts_of(repo)
    assert b"hunter2" not in facts.patch
    assert b"a = 2" in facts.patch
    assert [item.partition(" (")[0] for item in facts.left_out] == [name]


def test_a_file_name_that_is_a_glob_pattern_does_not_add_a_secret_file(repo: Path) -> None:
    write(repo, {"*.py": "before\n", "secret.py": "before\n"})
    commit(repo)
    write(repo, {"*.py": "star = 1\n", "secret.py": "hunter2\n"})
    facts = facts_of(repo)
    assert b"star = 1" in facts.patch
    assert b"hunter2" not in facts.patch


@pytest.mark.parametrize(
    "name", ["tokenizer.py", "keyboard.py", "environment.py", "secretary.py", "configs/env.yaml", "a.env.py"]
)
def test_a_harmless_file_whose_name_resembles_a_secret_is_kept(repo: Path, name: str) -> None:
    write(repo, {name: "harmless = 1\n"})
    facts = facts_of(repo)
    assert b"harmless" in facts.patch
    assert facts.left_out == []


def test_files_left_out_are_listed_with_the_reason(repo: Path, tmp_path: Path) -> None:
    big = "x" * MAX_PATCH_FILE_BYTES
    write(repo, {"weights.safetensors": b"\x00\x01", "big.py": big + "y", "edge.py": big, ".env": "KEY=1", "n.py": "n"})
    (repo / "link.py").symlink_to("/etc/passwd")
    write(repo, {"a.py": big * 2})
    facts = facts_of(repo)
    assert sorted(facts.left_out) == [
        ".env (looks like a secret)",
        "a.py (larger than 1 MB)",
        "big.py (larger than 1 MB)",
        "link.py (a symbolic link)",
        "weights.safetensors (not a source file)",
    ]
    assert b"edge.py" in facts.patch
    write_code_and_environment(tmp_path, facts, {})
    text = (tmp_path / "git.txt").read_text()
    assert "left out of code.patch:\n" in text
    assert all(f"  {item}\n" in text for item in facts.left_out)


@pytest.mark.parametrize("name", ["ideas.md", "a.txt", "report.json", "my.yaml", "b/report.html", "x.ipynb"])
def test_an_untracked_file_that_training_cannot_read_is_not_code(repo: Path, name: str) -> None:
    write(repo, {name: "notes\n"})
    facts = facts_of(repo)
    assert (facts.patch, facts.fingerprint()) == (b"", None)
    assert facts.left_out == [f"{name} (not a source file)"]


def test_an_untracked_module_that_is_not_imported_is_in_the_patch_but_not_in_the_fingerprint(
    repo: Path, tmp_path: Path
) -> None:
    name = "plot.py"
    write(repo, {name: "notes\n"})
    facts = facts_of(repo)
    assert b"+notes" in facts.patch
    assert facts.fingerprint() is None
    write_code_and_environment(tmp_path / "run" / "meta", facts, {})
    assert listed_files(tmp_path / "run", UNREAD) == [name]
    assert rebuilt(repo, facts, tmp_path)[name] == (b"notes\n", False)


def test_the_fingerprint_covers_imported_modules_and_tracked_files(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(repo, {"mine.py": "m = 1\n", "plot.py": "notes\n"})
    module = types.ModuleType("mine")
    module.__file__ = str(repo / "mine.py")
    monkeypatch.setitem(sys.modules, "mine", module)
    imported = facts_of(repo)
    write(repo, {"mine.py": "m = 2\n"})
    changed = facts_of(repo)
    write(repo, {"a.py": "a = 2\n", "plot.py": "other notes\n"})
    tracked = facts_of(repo)
    assert list(tracked.unread) == ["plot.py"]
    assert len({None, imported.fingerprint(), changed.fingerprint(), tracked.fingerprint()}) == 4
    git(repo, "add", "plot.py")
    assert facts_of(repo).fingerprint() != tracked.fingerprint()


def test_ignored_files_are_neither_in_the_patch_nor_listed(repo: Path) -> None:
    write(repo, {".gitignore": "*.log\ncache/\n"})
    commit(repo)
    write(repo, {"a.log": "x", "cache/b.py": "x"})
    assert facts_of(repo) == GitFacts(commit=git(repo, "rev-parse", "HEAD"), branch="main")


def test_files_in_excluded_folders_are_ignored(repo: Path) -> None:
    write(repo, {"experiments/20260101_000000/run.json": "{}"})
    facts = facts_of(repo, repo / "experiments")
    assert (facts.patch, facts.left_out) == (b"", [])
    assert not facts.dirty


def test_no_password_of_the_remote_reaches_the_run_directory(repo: Path, tmp_path: Path) -> None:
    git(repo, "remote", "add", "origin", "https://me:hunter2@example.org/repo.git")
    git(repo, "remote", "add", "backup", "https://example.org/backup.git")
    facts = facts_of(repo)
    assert facts.remote == facts.summary()["remote"] == "https://example.org/repo.git"
    meta = tmp_path / "meta"
    meta.mkdir()
    write_code_and_environment(meta, facts, {})
    assert b"hunter2" not in b"".join(path.read_bytes() for path in meta.iterdir())


def test_without_origin_another_remote_is_recorded(repo: Path) -> None:
    git(repo, "remote", "add", "upstream", "https://me@example.org/up.git")
    assert facts_of(repo).remote == "https://example.org/up.git"


def test_git_txt_lists_commit_branch_remote_and_patch(repo: Path, tmp_path: Path) -> None:
    meta = tmp_path / "meta"
    meta.mkdir()
    capture = CodeReader(repo)
    write_code_and_environment(meta, capture.git_facts(), {})
    head = git(repo, "rev-parse", "HEAD")
    assert (meta / "git.txt").read_text() == f"commit: {head}\nbranch: main\nremote: none\ndirty: no\npatch: none\n"
    assert not (meta / "code.patch").exists()
    write(repo, {"a.py": "a = 2\n"})
    write_code_and_environment(meta, capture.git_facts(), {})
    assert "dirty: yes\npatch: code.patch\n" in (meta / "git.txt").read_text()
    assert (meta / "code.patch").read_bytes() == capture.git_facts().patch
    write_code_and_environment(meta, GitFacts(problem="not a git repository"), {})
    assert (meta / "git.txt").read_text() == "git: not a git repository\n"


def test_reading_git_leaves_the_repository_as_it_was(repo: Path) -> None:
    write(repo, {"a.py": "a = 2\n", "new.py": "n = 1\n"})
    before = git(repo, "status", "--porcelain")
    facts_of(repo)
    assert git(repo, "status", "--porcelain") == before


# ---------------------------------------------------------------------------------- changes that git does not report


@pytest.mark.parametrize("flag", ["--assume-unchanged", "--skip-worktree"])
def test_changes_that_git_was_told_to_ignore_are_named(repo: Path, flag: str) -> None:
    write(repo, {"hidden.py": "x = 1\n", "same.py": "x = 1\n", "absent.py": "x = 1\n"})
    commit(repo)
    git(repo, "update-index", flag, "hidden.py", "same.py", "absent.py")
    write(repo, {"hidden.py": "x = 2\n"})
    (repo / "absent.py").unlink()
    facts = CodeReader(repo).git_facts()
    assert [item for item in facts.left_out if "assume" in item] == [
        "hidden.py (changed, but git was told to assume that it is not)"
    ]
    assert facts.dirty


def add_submodule(repo: Path, library: Path) -> None:
    """Create a repository at `library` and commit it as the submodule `lib`."""
    library.mkdir()
    git(library, "init", "--quiet")
    write(library, {"lib.py": "x = 1\n"})
    commit(library)
    git(repo, "-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(library), "lib")
    commit(repo)


def test_changes_inside_a_submodule_are_named_and_leave_the_patch_alone(repo: Path, tmp_path: Path) -> None:
    add_submodule(repo, tmp_path / "library")
    assert not CodeReader(repo).git_facts().dirty
    write(repo, {"lib/lib.py": "x = 2\n"})
    git(repo, "config", "diff.ignoreSubmodules", "all")
    facts = CodeReader(repo).git_facts()
    assert facts.left_out == ["lib (uncommitted changes of a submodule)"]
    assert facts.dirty
    assert facts.patch == b""


@pytest.mark.parametrize("form", ["short", "log", "diff"])
def test_the_commit_of_a_submodule_is_in_the_patch_for_any_diff_submodule_setting(
    repo: Path, tmp_path: Path, form: str
) -> None:
    add_submodule(repo, tmp_path / "library")
    write(repo / "lib", {"lib.py": "x = 2\n"})
    commit(repo / "lib")
    git(repo, "config", "diff.submodule", form)
    facts = CodeReader(repo).git_facts()
    assert facts.files == ["lib"]
    assert f"+Subproject commit {git(repo / 'lib', 'rev-parse', 'HEAD').strip()}".encode() in facts.patch


def test_a_module_edited_since_its_import_is_reported(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a notebook, a second training would otherwise record the new code while it runs the old."""
    write(repo, {"edited_here.py": "x = 1\n"})
    monkeypatch.syspath_prepend(str(repo))
    module = importlib.import_module("edited_here")
    old = "edited_here.py (edited since this process imported it: the run uses the code from before the edit)"
    left_out = [facts_of(repo).left_out]
    for text in ("x = 22\n", "x = 1\n", "x = 333\n"):
        write(repo, {"edited_here.py": text})
        left_out.append(facts_of(repo).left_out)
    importlib.reload(module)
    left_out.append(facts_of(repo).left_out)
    del sys.modules["edited_here"]
    assert left_out == [[], [old], [], [old], []]


def test_sources_of_callbacks_are_kept_wherever_they_come_from(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    write(repo, {".gitignore": "*_ignored.py\n", "callback_ignored.py": "import helper_ignored\n"})
    write(repo, {"helper_ignored.py": "y = 1\n"})
    write(elsewhere, {"callback_from_path.py": "x = 1\n"})
    commit(repo)
    for place in (repo, elsewhere):
        monkeypatch.syspath_prepend(str(place))
    names = ["callback_ignored", "callback_from_path"]
    for name in names:
        __import__(name)
    capture = CodeReader(repo, callbacks=names)
    facts = capture.git_facts()
    for name in (*names, "helper_ignored"):
        del sys.modules[name]
    assert facts.callbacks == {names[0]: b"import helper_ignored\n", names[1]: b"x = 1\n"}
    assert facts.left_out == [
        f"callback_from_path.py (of the callback callback_from_path, from {elsewhere}; kept in meta/callbacks)",
        "callback_ignored.py (imported, but git ignores it; kept in meta/callbacks)",
        "helper_ignored.py (imported, but git ignores it)",
    ]
    write_code_and_environment(tmp_path / "meta", facts, {})
    assert (tmp_path / "meta" / "callbacks" / "callback_from_path.py").read_text() == "x = 1\n"
    without = GitFacts(commit=facts.commit)
    assert facts.fingerprint() != without.fingerprint()


def test_environment_variables_that_redirect_git_are_ignored(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(repo, {"changed.py": "x = 1\n"})
    expected = CodeReader(repo).git_facts()
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "--quiet")
    write(other, {"other.py": "x = 1\n"})
    commit(other)
    misleading = {
        "GIT_DIR": str(other / ".git"),
        "GIT_WORK_TREE": str(other),
        "GIT_INDEX_FILE": str(other / ".git" / "index"),
        "GIT_OBJECT_DIRECTORY": str(other / ".git" / "objects"),
        "GIT_COMMON_DIR": str(other / ".git"),
        "GIT_NAMESPACE": "another",
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": "core.worktree",
        "GIT_CONFIG_VALUE_0": str(other),
        "GIT_LITERAL_PATHSPECS": "1",
        "GIT_EXTERNAL_DIFF": "/bin/echo",
    }
    for names in ([name] for name in misleading if not name.startswith("GIT_CONFIG")):
        with monkeypatch.context() as patch:
            for name in names:
                patch.setenv(name, misleading[name])
            assert CodeReader(repo).git_facts() == expected, names
            assert names[0] in os.environ
    for name, value in misleading.items():
        monkeypatch.setenv(name, value)
    assert CodeReader(repo).git_facts() == expected
    assert not set(misleading) & git_environment().keys()
    assert "GIT_CONFIG_GLOBAL" in git_environment()


# ------------------------------------------------------------------------------- which untracked files are recorded


def test_an_untracked_file_is_recorded_only_if_it_is_code(repo: Path) -> None:
    code = {
        "mine.py": "m",
        "package/deep.py": "d",
        "configs/wide.yaml": "n_embd: 8\n",
        "presets/named.yaml": "seed: 1\n",
    }
    other = dict.fromkeys(
        ("ideas.md", "kaggle.json", "notes.ipynb", "kubeconfig.yaml", ".docker/config.json", "venv/a.py", "Makefile",
         "runs/a.py", ".hidden/a.py", "lib/python3/site-packages/a.py", "configs/run.sh"), "x"
    )  # fmt: skip
    write(repo, code | other)
    facts = CodeReader(repo, named={"presets/named.yaml"}).git_facts()
    assert sorted(facts.files) == sorted(code)
    assert sorted(item.partition(" (")[0] for item in facts.left_out) == sorted(other)


def test_the_names_of_the_patched_files_are_listed(repo: Path) -> None:
    names = ["a.py", "b/c.py", "data.bin", "gone.py", "new b/x.py", "ü.py"]
    write(repo, {"a.py": "diff --git a/x b/x\n", "b/c.py": "new", "data.bin": b"\0\1", names[4]: "n", "ü.py": "u"})
    (repo / "gone.py").unlink()
    assert sorted(facts_of(repo).files) == sorted(names)


@pytest.mark.parametrize("tracked", [True, False], ids=["tracked", "untracked"])
def test_a_file_whose_content_looks_like_a_secret_is_left_out_with_the_reason(repo: Path, tracked: bool) -> None:
    if tracked:
        write(repo, {"mine.py": "x = 1\n"})
        commit(repo)
    write(repo, {"mine.py": "x = 1\npassword = 'hunter2hunter2'\n", "a.py": "a = 2\n", "configs/a.yaml": "seed: 1\n"})
    facts = facts_of(repo)
    assert b"hunter2" not in facts.patch
    assert facts.files == ["a.py", "configs/a.yaml"]
    (left_out,) = facts.left_out
    assert left_out.startswith("mine.py (looks like a secret: the value of password")


@pytest.mark.parametrize("name", ["data.bin", "ü.bin"])
def test_a_secret_in_a_binary_file_is_found_whatever_its_name(repo: Path, name: str) -> None:
    write(repo, {name: b"\0\1"})
    commit(repo)
    write(repo, {name: b"\0\1\npassword = 'hunter2hunter2'\n"})
    facts = facts_of(repo)
    assert facts.patch == b""
    assert [item.partition(":")[0] for item in facts.left_out] == [f"{name} (looks like a secret"]


def test_a_secret_that_is_already_committed_does_not_exclude_the_file(repo: Path) -> None:
    write(repo, {"mine.py": "password = 'hunter2hunter2'\nx = 1\n"})
    commit(repo)
    write(repo, {"mine.py": "password = 'hunter2hunter2'\nx = 2\n"})
    assert facts_of(repo).files == ["mine.py"]


def test_the_source_of_a_callback_is_kept_without_its_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "my_reporter.py"
    module.write_text("TOKEN = 'AbCdEf0123456789xyzT'\nx = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    __import__("my_reporter")
    source = CodeReader(tmp_path, callbacks=["my_reporter"]).git_facts().callbacks["my_reporter"]
    assert source == b"TOKEN = '***'\nx = 1\n"


def test_a_callback_that_no_file_has_is_said_not_to_be_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A class of a notebook's cell trained, and nothing said that the run has no code of it."""
    monkeypatch.setitem(sys.modules, "of_a_cell", types.ModuleType("of_a_cell"))
    facts = CodeReader(tmp_path, callbacks=["of_a_cell"]).git_facts()
    assert facts.left_out == ["of_a_cell (of a callback: no file has its code)"]
    assert facts.callbacks == {}
