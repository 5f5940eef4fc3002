"""Files named by a user: links, devices and pipes stay what they are, `~` is the home folder, the umask applies."""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import in_child
from fake_runs import make_run, training_records

import experiments
import inference
import profile_model
import train
from utils.config.loader import ConfigError, ConfigLoader
from utils.config.settings import Config, DataConfig, TrackingConfig
from utils.errors import UserError
from utils.files import change_json, expand_home, regular_fd, write_atomic, write_json, write_output
from utils.inference.prompts import check_out
from utils.profiling.record import save_profile
from utils.runs.find import find_export, resolve_run
from utils.runs.log import RunLog
from utils.runs.origin import find_origin
from utils.runs.run import Run, read_record
from utils.tokenization.subwords import HuggingFaceTokenizer


def make_device(path: Path, kind: int = stat.S_IFCHR, number: tuple[int, int] = (1, 3)) -> Path:
    """A device node, by default another /dev/null."""
    try:
        os.mknod(path, kind | 0o666, os.makedev(*number))
    except PermissionError:
        pytest.skip("needs the right to make a device")
    return path


@pytest.fixture
def one_run(runs_dir: Path) -> Path:
    return make_run(runs_dir, "run", metrics=training_records([3.0, 2.0]))


# --------------------------------------------------------------------------------------------- links, devices, pipes


@pytest.mark.parametrize("name", ["report.html", "picture.png"])
def test_a_device_given_as_out_stays_a_device(one_run: Path, tmp_path: Path, name: str) -> None:
    device = make_device(tmp_path / name)
    command = "report" if name.endswith("html") else "plot"
    assert experiments.main([command, str(one_run), "--out", str(device)]) == 0
    assert stat.S_ISCHR(device.stat().st_mode)


@pytest.mark.parametrize("exists", [True, False])
def test_out_through_a_link_writes_its_target(one_run: Path, tmp_path: Path, exists: bool) -> None:
    target, link = tmp_path / "far" / "target.html", tmp_path / "link.html"
    target.parent.mkdir()
    if exists:
        target.write_text("old")
    link.symlink_to("far/target.html")
    assert experiments.main(["report", str(one_run), "--out", str(link)]) == 0
    assert link.is_symlink()
    assert target.read_text().startswith("<!DOCTYPE html>")
    assert os.listdir(target.parent) == ["target.html"]


def test_a_pipe_gets_the_text_if_a_process_reads_it(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="no process reads this pipe"):
        write_output(pipe, "text")
    content: list[str] = []
    reader = threading.Thread(target=lambda: content.append(pipe.read_text()))
    reader.start()
    while True:
        try:
            write_output(pipe, "text " * 50_000)  # more than a pipe holds
            break
        except OSError:  # the reader has not opened it yet
            continue
    reader.join()
    assert content == ["text " * 50_000]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


@pytest.mark.parametrize("append", [False, True])
@pytest.mark.parametrize("name", ["/dev/stdout", "/dev/fd/1", "log", "/dev/stderr"])
def test_the_file_behind_stdout_is_written_to_and_not_replaced(tmp_path: Path, name: str, append: bool) -> None:
    program = "import sys; from utils.files import write_output; from pathlib import Path\nprint('before', flush=True)"
    program += "\nwrite_output(Path(sys.argv[1]), 'text\\n')\nprint('after')"
    log = tmp_path / "log"
    log.write_text("old\n")
    with log.open("a" if append else "w") as file:
        command = [sys.executable, "-c", program, name if name != "log" else str(log)]
        subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=Path(experiments.__file__).parent, check=True
        )
    assert log.read_text() == ("old\n" if append else "") + "before\ntext\nafter\n"
    assert os.listdir(tmp_path) == ["log"]


def test_a_profile_is_written_through_links_and_into_devices(tmp_path: Path) -> None:
    folder, target = tmp_path / "profile", tmp_path / "elsewhere.json"
    folder.mkdir()
    target.write_text("old")
    (folder / "profile.json").symlink_to(target)
    device = make_device(folder / "trace.json")
    profile: Any = SimpleNamespace(model_dump=lambda mode: {})
    save_profile(folder, profile, b"trace", lambda profile, path: path.write_bytes(b"picture"))
    assert (folder / "profile.json").is_symlink()
    assert target.read_text().startswith("{")
    assert stat.S_ISCHR(device.stat().st_mode)
    assert (folder / "profile.png").read_bytes() == b"picture"


def test_disks_sockets_and_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for name, reason in (("folder", "Is a directory"), ("socket", "is a socket, not a file")):
            for write in (lambda path: write_output(path, "text"), check_out):
                with pytest.raises((OSError, UserError), match=reason):
                    write(tmp_path / name)
    disk = make_device(tmp_path / "disk", stat.S_IFBLK, (7, 250))
    with pytest.raises(OSError, match="is a disk, not a file"):
        write_output(disk, "text")
    assert stat.S_ISBLK(disk.stat().st_mode)


def test_a_full_device_is_an_error(one_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = make_device(tmp_path / "full", number=(1, 7))
    assert experiments.main(["report", str(one_run), "--out", str(full)]) == 1
    assert capsys.readouterr().err == f"error: {full}: No space left on device\n"


def test_the_output_of_inference_is_checked_at_the_target_of_a_link(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("The ")
    (tmp_path / "link").symlink_to("prompts.txt")
    (tmp_path / "nowhere").symlink_to("missing/completions.jsonl")
    with pytest.raises(UserError, match="the prompts are read from it"):
        check_out(tmp_path / "link", tmp_path / "prompts.txt")
    with pytest.raises(UserError, match="cannot be written: No such file or directory"):
        check_out(tmp_path / "nowhere")
    check_out(make_device(tmp_path / "null"))


def test_our_own_files_never_follow_a_link(tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("old")
    (tmp_path / "run.json").symlink_to("outside")
    write_json(tmp_path / "run.json", 1)
    assert (tmp_path / "outside").read_text() == "old"
    assert not (tmp_path / "run.json").is_symlink()


# -------------------------------------------------------------------------------------------------------------- home


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    return folder


def test_path_settings_expand_the_home_folder(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text('runs_dir: ~/runs\ncorpora_dir: "~"\naim_repo: ~/.aim\ndataset: ~/text.txt\n')
    config = ConfigLoader(tmp_path).load([file]).config
    assert (config.tracking.runs_dir, config.data.corpora_dir) == (f"{home}/runs", f"{home}")
    assert (config.tracking.aim_repo, config.data.dataset) == (f"{home}", f"{home}/text.txt")
    assert ConfigLoader(tmp_path).load([], {"tokenizer": "hf:~/t.json"}).config.data.tokenizer == f"hf:{home}/t.json"
    flags: dict[str, str | bool] = {"runs_dir": "~/other", "aim_repo": "~"}
    config = ConfigLoader(tmp_path).load([], flags).config
    assert (config.tracking.runs_dir, config.tracking.aim_repo) == (f"{home}/other", f"{home}")
    config = Config(data=DataConfig(corpora_dir="~/c"), tracking=TrackingConfig(aim_repo="aim://localhost:53800"))
    assert (config.data.corpora_dir, config.tracking.aim_repo) == (f"{home}/c", "aim://localhost:53800")


def test_the_home_of_an_unknown_user_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--runs-dir: ~nobodyx/runs: there is no home folder ~nobodyx"):
        ConfigLoader(tmp_path).load([], {"runs_dir": "~nobodyx/runs"})
    tokenizer = DataConfig(tokenizer="hf:~nobodyx/t.json")  # as a run made by another user may have recorded it
    with pytest.raises(UserError, match=r"~nobodyx/t\.json: no such file"):
        HuggingFaceTokenizer.build(tokenizer, ())
    with pytest.raises(UserError, match="no home folder"):
        DataConfig(corpora_dir="~nobodyx")
    with pytest.raises(UserError, match=r"no home folder ~nobodyx \(\./~nobodyx for a file of that name\)"):
        expand_home("~nobodyx")


def test_a_file_whose_name_begins_with_a_tilde_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~draft").mkdir()
    assert expand_home("~draft") == "~draft"
    assert expand_home("a/~/b") == "a/~/b"


def test_path_flags_expand_the_home_folder(home: Path, one_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one_run.rename(home / "run")
    assert experiments.main(["report", "run", "--runs-dir=~", "--out=~/report.html"]) == 0
    assert (home / "report.html").is_file()
    assert experiments.main(["show", "~/run", "--json"]) == 0
    capsys.readouterr()
    assert inference.main(["--runs-dir=~/nothing"]) == 2
    assert f"{home}/nothing" in capsys.readouterr().err
    assert profile_model.main(["--compare", "~/a", "~/b"]) == 2
    assert f"{home}/a: there is no" in capsys.readouterr().err
    assert profile_model.main(["--config=~/none.yaml"]) == 2
    assert f"{home}/none.yaml" in capsys.readouterr().err
    assert profile_model.main(["--config-dir=~nobodyx/c"]) == 2
    assert "argument --config-dir: ~nobodyx/c: there is no home folder ~nobodyx" in capsys.readouterr().err


def test_the_path_of_a_run_expands_the_home_folder(home: Path, runs_dir: Path) -> None:
    run = make_run(home, "run")
    export = home / "run" / "artifacts" / "export"
    export.mkdir(parents=True)
    (export / "config.json").write_text("{}")
    assert resolve_run("~/run", runs_dir) == run
    assert find_origin("fork", "~/run:latest", runs_dir).run == run
    assert find_origin("init", "~/run/artifacts/export", runs_dir).run == export
    assert find_export("~/run", runs_dir) == find_export("~/run/artifacts/export", runs_dir) == export
    for find in (resolve_run, find_export):
        with pytest.raises(UserError, match="no home folder ~nobodyx"):
            find("~nobodyx/run", runs_dir)


def test_every_path_flag_has_the_type_that_expands_the_home_folder() -> None:
    """With a flag of type=Path, `--flag=~/x` would create a folder named ~."""
    from utils.inference.flags import add_arguments

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    profile = profile_model.Parser(prog="profile_model.py")
    profile_model.add_flags(profile)
    options: list[Any] = [
        option for command in experiments.COMMANDS for flag in command.flags for option in [flag.options]
    ]
    kinds = [action.type for action in (*parser._actions, *profile._actions)] + [o.get("type") for o in options]
    assert Path not in kinds


# ------------------------------------------------------------------------------------------------------------- modes


@pytest.fixture
def umask() -> Iterator[Callable[[int], object]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def mode(path: Path) -> str:
    return f"{stat.S_IMODE(path.stat().st_mode):03o}"


@pytest.mark.parametrize(("mask", "expected"), [(0o022, "644"), (0o002, "664"), (0o027, "640"), (0o077, "600")])
def test_a_new_file_has_the_mode_that_the_umask_leaves(
    tmp_path: Path, umask: Callable[[int], object], mask: int, expected: str
) -> None:
    umask(mask)
    write_atomic(tmp_path / "atomic", "text")
    change_json(tmp_path / "changed.json", lambda value: 1)
    write_output(tmp_path / "report.html", "text")
    os.close(regular_fd(tmp_path / "log", flags=os.O_WRONLY | os.O_CREAT))
    assert {path.name: mode(path) for path in tmp_path.iterdir()} == dict.fromkeys(
        ("atomic", "changed.json", "report.html", "log"), expected
    )


def test_an_existing_file_keeps_its_mode(tmp_path: Path) -> None:
    for write in (write_atomic, write_output):
        path = tmp_path / write.__name__
        path.touch()
        path.chmod(0o600)
        write(path, "text")
        assert mode(path) == "600"


@pytest.fixture
def shared_runs() -> Iterator[Path]:
    """A folder of runs that a group shares, as `chmod g+ws` sets it up."""
    if os.geteuid() != 0:
        pytest.skip("needs the right to become another user")
    top = Path(tempfile.mkdtemp())
    top.chmod(0o755)
    runs = top / "runs"
    runs.mkdir()
    os.chown(runs, 0, 4242)
    runs.chmod(0o2775)
    yield runs
    shutil.rmtree(top)


def as_member(user: int) -> Callable[[], None]:
    """Return a function that turns this process into a user of the sharing group, with the umask of such groups."""

    def become() -> None:
        os.setgroups([4242])
        os.setgid(user)
        os.setuid(user)
        os.umask(0o002)

    return become


def test_members_of_a_group_resume_each_others_runs_in_a_shared_folder(shared_runs: Path) -> None:
    def train() -> Path:
        run = Run.create(shared_runs, "a")
        RunLog(run.path / "logs").close()
        run.finish("interrupted")
        run.release()
        return run.path

    def resume() -> Any:
        (path,) = shared_runs.iterdir()
        run = Run.resume(path)
        log = RunLog(run.path / "logs")
        log.metrics.write([{"step": 1}])
        log.close()
        run.restart([], 1)
        run.finish("completed")
        run.release()
        return read_record(path)["status"]

    path = in_child(as_member(5001), train)
    assert isinstance(path, Path), path
    assert in_child(as_member(5002), resume) == "completed"
    assert in_child(as_member(5001), resume) == "completed"


@pytest.mark.parametrize("flag", ["--runs-dir", "--corpora-dir"])
def test_a_link_to_a_disk_that_is_not_mounted_is_reported(
    flag: str, tiny_argv: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "link").symlink_to("/not/mounted")
    assert train.main(tiny_argv(flag, str(tmp_path / "link" / "below"))) == 2
    assert f"{tmp_path}/link is a link to /not/mounted, which does not exist" in capsys.readouterr().err
