"""A run directory from someone else: it runs no code without consent and cannot choose where files are written."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_runs import config_of, make_run

import experiments
import profile_model
import train
import workbench
from utils.config.loader import ConfigLoader
from utils.errors import UserError
from utils.experiments.reproduce import _adopt, reproduce
from utils.experiments.subjects import Subjects
from utils.runs import trust
from utils.runs.index import read_run
from utils.runs.origin import LOCAL_PATH, config_of_fork, recorded_config
from utils.runs.run import read_record
from utils.runs.trust import check_callback_place, made_elsewhere, made_here, require_trust
from utils.tracking.rebuild import recorded_settings

Argv = Callable[..., list[str]]
ROOT = Path(__file__).resolve().parents[2]
PATCH = "diff --git a/model.py b/model.py\n--- a/model.py\n+++ b/model.py\n@@ -1 +1 @@\n-a\n+b\n"
EVIL = "from workbench import Callback\nopen({!r}, 'w')\nclass Evil(Callback): ...\n"


def change(run: Path, **facts: Any) -> None:
    (run / "run.json").write_text(json.dumps({**read_record(run), **facts}))


@pytest.mark.parametrize(
    ("facts", "where"),
    [
        ({"made": made_here(ROOT)}, None),
        ({}, None),  # an older record, of this host
        ({"host": "eve"}, "on eve"),
        ({"host": None}, "on an unknown host"),
        ({"made": {**made_here(ROOT), "host": "eve"}}, "on eve"),
        ({"made": {**made_here(ROOT), "root": "/home/eve/project"}}, "in /home/eve/project"),
        ({"made": {"host": socket.gethostname()}}, "in an unknown folder"),
        ({"place": {"path": "/home/eve/project/runs/x"}}, "in /home/eve/project/runs"),
        ({"place": {"path": str(ROOT / "other" / "x")}}, None),
        ({"resumes": [{"before": {"host": "eve"}}]}, "on eve"),  # also after it was resumed here without --trust
    ],
)
def test_made_elsewhere_names_the_host_or_folder_that_made_a_run(
    runs_dir: Path, facts: dict[str, Any], where: str | None
) -> None:
    assert made_elsewhere(make_run(runs_dir, "x", **facts), ROOT) == where


def test_trust_is_asked_for_on_a_terminal_and_refused_without_one(
    runs_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(runs_dir, "x", host="eve\x1b[2J")
    require_trust(run, ROOT, [], trusted=False)
    require_trust(run, ROOT, ["callback a:B"], trusted=True)
    with pytest.raises(UserError, match=r"x was made on eve.*would run code here: callback a:B; --trust allows it"):
        require_trust(run, ROOT, ["callback a:B"], trusted=False)
    for answer, allowed in (("y\n", True), ("\n", False), ("", False)):
        terminal = type("Terminal", (), {"isatty": lambda self: True, "readline": lambda self, a=answer: a})()
        monkeypatch.setattr(sys, "stdin", terminal)
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        if allowed:
            require_trust(run, ROOT, ["callback a:B"], trusted=False)
        else:
            with pytest.raises(UserError):
                require_trust(run, ROOT, ["callback a:B"], trusted=False)
        printed = capsys.readouterr().err
        assert "callback a:B\nRun it? [y/N] " in printed
        assert "\x1b" not in printed


def test_a_foreign_run_cannot_choose_where_to_write(runs_dir: Path, tmp_path: Path) -> None:
    places = {"runs_dir": str(tmp_path / "a"), "aim_repo": str(tmp_path / "b"), "corpora_dir": str(tmp_path / "c")}
    (tmp_path / "a").mkdir()
    loader = ConfigLoader(tmp_path)
    for host, expected in (("eve", ("runs", ".", "corpora")), (socket.gethostname(), tuple(places.values()))):
        run = make_run(runs_dir, host, host=host, settings=places)
        for loaded in (recorded_config(run, loader), config_of_fork(run, loader, (), {})):
            tracking, data = loaded.config.tracking, loaded.config.data
            assert (tracking.runs_dir, tracking.aim_repo, data.corpora_dir) == expected
        assert recorded_settings(run, tmp_path).tracking.aim_repo == expected[1]
    assert recorded_config(runs_dir / "eve", loader).source("runs_dir") == LOCAL_PATH


@pytest.mark.parametrize("module", ["runs.x.evil", "x.evil", "evil", "linked", "package.evil"])
def test_a_callback_is_never_imported_from_inside_a_run(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "runs", "x", made=made_here(tmp_path))
    marker = tmp_path / "ran"
    for name in ("evil.py", "__init__.py"):
        (run / name).write_text(EVIL.format(str(marker)))
    (tmp_path / "linked.py").symlink_to(run / "evil.py")
    (tmp_path / "package").symlink_to(run)
    for place in (run, run.parent, tmp_path):
        monkeypatch.syspath_prepend(place)
    for runs_dir in (tmp_path / "runs", tmp_path / "elsewhere"):  # also if the folder of runs is another one
        with pytest.raises(UserError, match=r"callbacks: .*inside a run"):
            check_callback_place(f"{module}:Evil", runs_dir, tmp_path)
    assert not marker.exists()


def test_the_project_itself_may_be_the_folder_of_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    check_callback_place("mine:Mine", tmp_path, tmp_path)
    with pytest.raises(UserError):
        check_callback_place("mine:Mine", tmp_path, ROOT)


def test_the_code_of_a_foreign_run_is_reproduced_only_with_trust(runs_dir: Path, tmp_path: Path) -> None:
    run = read_run(make_run(runs_dir, "x", host="eve", patch=PATCH, settings={"callbacks": ["evil:Evil"]}))
    with pytest.raises(UserError, match=r"callback evil:Evil \(not found\); meta/code.patch, which changes model.py"):
        reproduce(run, ROOT)
    with pytest.raises(UserError, match=r"callback evil:Evil \(not found\); --trust"):
        reproduce(run, ROOT, code="current")
    with pytest.raises(UserError, match="has logged nothing"):  # the next check
        reproduce(run, ROOT, trusted=True)


def test_the_files_of_a_patch_are_those_that_git_would_change(runs_dir: Path) -> None:
    hidden = "--- a/train.py\n+++ b/train.py\n@@ -0,0 +1 @@\n+evil()\n"  # git needs no line `diff --git`
    run = read_run(make_run(runs_dir, "x", host="eve", patch=hidden + PATCH))
    with pytest.raises(UserError, match=r"meta/code.patch, which changes train.py, model.py; --trust"):
        reproduce(run, ROOT)


@pytest.mark.parametrize("damage", ["link", "pipe", "large"])
def test_a_patch_that_is_no_file_of_the_run_is_not_applied_unseen(damage: str, runs_dir: Path) -> None:
    path = make_run(runs_dir, "x", host="eve", patch=PATCH)
    patch = path / "meta" / "code.patch"
    patch.rename(runs_dir / "payload")
    if damage == "link":
        patch.symlink_to("../../payload")
    elif damage == "pipe":
        os.mkfifo(patch)
    else:
        patch.write_text(PATCH)
        os.truncate(patch, (64 << 20) + 1)
    with pytest.raises(UserError, match=r"code\.patch: cannot be read: "):
        reproduce(read_run(path), ROOT)
    with pytest.raises(UserError, match=r"code\.patch: cannot be read: "):
        Subjects(ROOT, runs_dir, runs_dir / "trees").one(os.fspath(path))


def test_a_repetition_copies_no_file_from_outside_of_the_run(runs_dir: Path, tmp_path: Path) -> None:
    run, repetition = (make_run(runs_dir, name) for name in ("x", "y"))
    (tmp_path / "key").write_text("secret")
    (run / "meta" / "git.txt").unlink(missing_ok=True)
    (run / "meta" / "git.txt").symlink_to(tmp_path / "key")
    (repetition / "artifacts").mkdir(exist_ok=True)
    _adopt(read_run(run), repetition, ROOT, keep_code=False)
    assert "secret" not in "".join(path.read_text() for path in (repetition / "meta").iterdir() if path.is_file())


def test_a_link_in_a_foreign_run_is_its_configuration_too(runs_dir: Path, tmp_path: Path) -> None:
    run = make_run(runs_dir, "x", host="eve", settings={"callbacks": ["evil:Evil"]})
    file = run / "meta" / "full_config.json"
    file.rename(tmp_path / "payload.json")
    file.symlink_to(tmp_path / "payload.json")
    with pytest.raises(UserError, match=r"callback evil:Evil \(not found\); --trust"):
        workbench.load_config(file)


def test_the_configuration_of_a_foreign_run_needs_trust_in_a_notebook_too(runs_dir: Path) -> None:
    run = make_run(runs_dir, "x", host="eve", settings={"callbacks": ["evil:Evil"]})
    with pytest.raises(UserError, match=r"callback evil:Evil \(not found\); --trust"):
        workbench.load_config(run / "meta" / "full_config.json")
    assert workbench.load_config(run / "meta" / "full_config.json", trust=True).train.callbacks == ("evil:Evil",)
    assert workbench.load_config(run / "meta" / "full_config.json", callbacks=[]).train.callbacks == ()


def test_the_configuration_of_a_foreign_run_cannot_choose_where_to_write(runs_dir: Path) -> None:
    settings = {"runs_dir": "/home/eve/runs", "aim_repo": "aim://eve:53800", "n_layer": 3}
    file = make_run(runs_dir, "x", host="eve", settings=settings) / "meta" / "full_config.json"
    config = workbench.load_config(file)
    assert (config.model.n_layer, config.tracking.runs_dir, config.tracking.aim_repo) == (3, "runs", ".")
    assert workbench.load_config(file, trust=True).tracking.runs_dir == "/home/eve/runs"
    assert workbench.load_config(file, runs_dir="mine").tracking.runs_dir == "mine"


def test_scripts_run_the_callbacks_of_a_foreign_run_only_with_trust(
    tiny_argv: Argv,
    tmp_path: Path,
    only_run: Callable[[], Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "my_evil.py").write_text("from workbench import Callback\nclass Evil(Callback): ...\n")
    monkeypatch.syspath_prepend(tmp_path / "mine")
    callbacks = ("--callbacks", "my_evil:Evil")
    stop = ("--stop-at-step", "3", "--run-tag", "a", *callbacks)
    assert train.main(tiny_argv(*stop)) == 0
    run = only_run()
    assert read_record(run)["made"] == made_here(ROOT)
    change(run, made={"host": "eve", "root": "/home/eve"})
    del sys.modules["my_evil"]
    file = str(run / "meta" / "full_config.json")
    runs = ["--runs-dir", str(run.parent)]
    for main, words in (
        (train.main, ["--resume", str(run)]),
        (train.main, ["--resume", str(run), "--fork", *runs]),
        (train.main, ["--resume", "auto", "--run-tag", "a", *runs]),
        (train.main, ["--config", file, *runs]),
        (profile_model.main, ["--config", file]),
        (experiments.main, ["reproduce", str(run), "--code", "current"]),
    ):
        assert main(words) == 2, words
        assert "a was made on eve, and would run code here: callback my_evil:Evil (" in capsys.readouterr().err
    assert "my_evil" not in sys.modules
    assert only_run() == run
    assert train.main(["--resume", str(run), "--trust"]) == 0
    assert made_elsewhere(run, ROOT) is None
    assert trust.callback_words(["my_evil:Evil"]) == [f"callback my_evil:Evil ({tmp_path}/mine/my_evil.py)"]
    assert config_of().train.callbacks == ()
