"""experiments.py rebuild: a rebuilt view equals the one that was fed during training, point by point."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aim
import pytest
from aim import Repo
from aim.sdk.index_manager import RepoIndexManager
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.api_pb2 import Status
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import experiments
import train
from tests.terminal.test_cli import run_without
from utils.runs import metrics
from utils.runs.log import LOG_FILES, read_metrics
from utils.runs.run import Run, read_record, read_status
from utils.tracking import feeder
from utils.tracking.tensorboard import event_files
from utils.training.callbacks import Callbacks

Argv = Callable[..., list[str]]
ROOT = Path(__file__).resolve().parents[2]
TRACKED = ("--aim-logging", "--tags", "x,y", "--note", "why it was made")
CALLBACK = """from workbench import Callback, Metric, register_metric

register_metric(Metric("mine/odd", "1", "lower", views=("tensorboard", "aim")))


class Odd(Callback):
    def on_step(self, run):
        run.log({"mine/odd": run.loss * 2})
"""


@pytest.fixture(autouse=True)
def quick_pictures() -> None:
    """Render the pictures, because those of two processes are compared."""


@pytest.fixture(autouse=True)
def fresh_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Disable Aim's cache of its list of runs, which lasts longer than some of these runs."""
    monkeypatch.setattr(Repo, "_all_run_hashes", Repo._all_run_hashes.__wrapped__)


@pytest.fixture(autouse=True)
def fast_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeder, "RETRY_SECONDS", (0.001, 0.001, 0.001))


def shown_by_tensorboard(run: Path) -> dict[str, Any]:
    """Everything that TensorBoard reads of a run, without the times of the texts that describe it."""
    sizes = dict.fromkeys(("scalars", "tensors", "histograms", "images"), 0)
    events = EventAccumulator(os.fspath(run), size_guidance=sizes).Reload()
    tags = events.Tags()
    described = {f"{name}/text_summary" for name in ("config", "model", "git", "note", "status")}
    start, end = (
        HParamsPluginData.FromString(events.SummaryMetadata(f"_hparams_/session_{which}_info").plugin_data.content)
        for which in ("start", "end")
    )
    return {
        "tags": {kind: sorted(found) for kind, found in tags.items() if isinstance(found, list)},
        "scalars": {tag: [(e.step, e.value, e.wall_time) for e in events.Scalars(tag)] for tag in tags["scalars"]},
        "histograms": {
            tag: [(e.step, e.histogram_value, e.wall_time) for e in events.Histograms(tag)]
            for tag in tags["histograms"]
        },
        "images": {tag: [(e.step, e.encoded_image_string) for e in events.Images(tag)] for tag in tags["images"]},
        "texts": {
            tag: [
                (e.step, tuple(e.tensor_proto.string_val), None if tag in described else e.wall_time)
                for e in events.Tensors(tag)
            ]
            for tag in tags["tensors"]
            if tag != "custom_scalars__config__"
        },
        "charts": [e.tensor_proto.string_val[0] for e in events.Tensors("custom_scalars__config__")],
        "hparams": {name: str(value) for name, value in start.session_start_info.hparams.items()},
        "status": Status.Name(end.session_end_info.status),
    }


def _plain(value: Any) -> Any:
    """An Aim object converted to numbers or bytes that can be compared."""
    if hasattr(value, "weights"):
        return tuple(value.weights.tolist()), tuple(value.range)
    return value.storage["data"].load() if type(value).__name__ == "Image" else getattr(value, "data", value)


def shown_by_aim(run: Path, repo_folder: Path) -> dict[str, Any]:
    """Everything that Aim reads of a run except its hash and the time of its picture, which is when it was fed."""
    run_hash = read_record(run)["views"]["aim"]["hash"]
    for kind in ("meta", "seqs"):  # the only run
        assert os.listdir(repo_folder / ".aim" / kind / "chunks") == [run_hash]
    repo = Repo(os.fspath(repo_folder))
    RepoIndexManager.get_index_manager(repo).index(run_hash)
    aim_run = aim.Run(run_hash, repo=repo, read_only=True)
    shown: dict[str, Any] = {
        key: aim_run[key] for key in ("hparams", "git", "resolved", "run_dir", "status", "summary")
    }
    shown |= {key: getattr(aim_run, key) for key in ("name", "description", "experiment", "archived")}
    shown["tags"] = sorted(aim_run.tags)
    for kind, dtypes in {
        "metric": ("float", "int"),
        "distributions": "aim.distribution",
        "texts": "aim.text",
        "images": "aim.image",
    }.items():
        for name, context, _ in aim_run.iter_sequence_info_by_type(dtypes):
            steps, (values, _, times) = aim_run._get_sequence(kind, name, context).data.items_list()
            points = zip(steps, map(_plain, values), times if kind != "images" else [None] * len(steps), strict=True)
            shown[f"{kind}: {name} {context.to_dict()}"] = list(points)
    repo.close()
    return shown


def shown(run: Path, repo_folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    return shown_by_tensorboard(run), shown_by_aim(run, repo_folder)


def rebuild(run: Path, *flags: str) -> int:
    return experiments.main(["rebuild", os.fspath(run), *flags])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one completed run, fed to TensorBoard and Aim during training; tests use copies of it."""
    from conftest import TINY_FLAGS

    folder = tmp_path_factory.mktemp("made")
    text = "".join(f"line {i}: the quick brown fox jumps über {i * i % 97} lazy dogs.\n" for i in range(100))
    (folder / "tiny.txt").write_text(text, encoding="utf-8")
    places = {"--dataset": folder / "tiny.txt", "--corpora-dir": folder / "corpora", "--runs-dir": folder / "runs"}
    flags = TINY_FLAGS | {key: os.fspath(path) for key, path in places.items()} | {"--aim-repo": os.fspath(folder)}
    assert train.main([*[word for pair in flags.items() for word in pair], *TRACKED, "--run-tag", "made"]) == 0
    return folder


@pytest.fixture
def tracked(made: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of a completed run and its Aim repository: the run directory, and the folder of the repository."""
    folder = tmp_path / "copy"
    shutil.copytree(made, folder)
    (run,) = (folder / "runs").iterdir()
    for path in (run / "run.json", run / "meta" / "full_config.json"):  # update the recorded paths
        path.write_text(path.read_text().replace(os.fspath(made), os.fspath(folder)))
    return run, folder


def test_a_rebuilt_view_equals_the_live_one(
    tiny_argv: Argv, tmp_path: Path, only_run: Callable[[], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = (*TRACKED, "--max-iters", "30", "--eval-interval", "10", "--histogram-interval", "10")
    assert train.main(tiny_argv(*words, "--run-tag", "live", "--system-interval", "0.000001")) == 0
    run = only_run()
    live, first = shown(run, tmp_path), read_record(run)["views"]
    assert len(live[0]["scalars"]["train/loss"]) == 30
    assert len(live[1]["metric: loss {'subset': 'train'}"]) == 30
    assert live[0]["scalars"]["system/process_memory"]
    assert live[0]["histograms"]
    assert live[0]["status"] == "STATUS_SUCCESS"
    facts = {key: live[1][key] for key in ("status", "tags", "description", "name", "run_dir")}
    assert facts == {
        "status": "completed",
        "tags": ["live", "x", "y"],
        "description": "why it was made",
        "name": run.name,
        "run_dir": os.fspath(run),
    }
    ((step, picture, _),) = live[1]["images: curves {}"]
    assert (step, picture[:4]) == (30, b"\x89PNG")
    capsys.readouterr()

    for _ in range(2):  # rebuilding twice gives the same
        assert rebuild(run) == 0
        assert capsys.readouterr().out == f"rebuilt from the logs of {run.name}: TensorBoard, Aim\n"
        again = shown(run, tmp_path)
        assert again[0] == live[0]
        assert again[1] == live[1]
    record = read_record(run)
    assert {view["state"] for view in record["views"].values()} == {"complete"}
    assert record["views"]["aim"]["hash"] != first["aim"]["hash"]
    assert len(event_files(run)) == 1
    assert (record["status"], record["last_step"]) == ("completed", 30)
    Run.resume(run).release()  # the lock is free


@pytest.mark.parametrize("flag", ["--aim", "--tensorboard"])
def test_only_the_named_view_is_rebuilt(flag: str, tracked: tuple[Path, Path]) -> None:
    run, _ = tracked
    before = read_record(run)["views"]["aim"]["hash"]
    (event_file,) = event_files(run)
    written = event_file.stat().st_mtime_ns
    assert rebuild(run, flag) == 0
    assert (read_record(run)["views"]["aim"]["hash"] != before) == (flag == "--aim")
    (event_file,) = event_files(run)  # its name has the time in seconds and may be the same
    assert (event_file.stat().st_mtime_ns == written) == (flag == "--aim")


def test_a_rebuild_restores_deleted_views_and_pictures(made: Path, tracked: tuple[Path, Path]) -> None:
    run, folder = tracked
    event_files(run)[0].unlink()
    shutil.rmtree(folder / ".aim")
    (run / "artifacts" / "curves.png").unlink()
    assert rebuild(run) == 0
    (original,) = (made / "runs").iterdir()
    assert repr(shown(run, folder)) == repr(shown(original, made)).replace(os.fspath(made), os.fspath(folder))


def test_a_run_without_aim_can_be_added_to_it_later(
    tiny_argv: Argv, only_run: Callable[[], Path], tmp_path: Path
) -> None:
    assert train.main(tiny_argv("--run-tag", "bare")) == 0
    assert rebuild(only_run()) == 0
    assert "aim" not in read_record(only_run())["views"]
    assert rebuild(only_run(), "--aim") == 0
    found = shown_by_aim(only_run(), tmp_path)
    losses = [point[:2] for point in found["metric: loss {'subset': 'train'}"]]
    assert losses == read_metrics(only_run() / "logs", "train/loss")
    assert (found["status"], found["name"]) == ("completed", only_run().name)


def test_a_torn_last_line_is_ignored(tracked: tuple[Path, Path]) -> None:
    run, folder = tracked
    assert rebuild(run) == 0
    whole = shown(run, folder)
    for name in LOG_FILES:
        with (run / "logs" / name).open("a") as file:
            file.write('{"step": 7, "ti')
    assert rebuild(run) == 0
    assert shown(run, folder) == whole


@pytest.mark.slow
def test_an_interrupted_run_is_rebuilt_as_such_and_can_then_be_resumed(
    tiny_argv: Argv, only_run: Callable[[], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: Callbacks, step: int, loss: object) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Callbacks, "on_step", stop)
        assert train.main(tiny_argv(*TRACKED)) == 143
    live = shown(only_run(), tmp_path)
    assert (live[0]["status"], live[1]["status"]) == ("STATUS_UNKNOWN", "interrupted")
    assert rebuild(only_run()) == 0
    assert shown(only_run(), tmp_path) == live
    assert train.main(["--resume", str(only_run())]) == 0
    whole = shown(only_run(), tmp_path)
    assert [point[0] for point in whole[0]["scalars"]["train/loss"]] == [0, 1, 2, 3, 4, 5]
    assert (whole[0]["status"], whole[1]["status"]) == ("STATUS_SUCCESS", "completed")
    assert rebuild(only_run()) == 0
    again = shown(only_run(), tmp_path)
    # After live feeding TensorBoard shows how each session ended, because its reader does not purge texts.
    assert again[0]["texts"].pop("status/text_summary") == whole[0]["texts"].pop("status/text_summary")[-1:]
    assert again[0] == whole[0]
    # After live feeding Aim has a picture of each session; the rebuilt one shows both sessions.
    assert again[1].pop("images: curves {}") == whole[1].pop("images: curves {}")[-1:]
    assert again[1] == whole[1]


@pytest.mark.slow
def test_a_killed_run_with_a_callback_is_rebuilt_without_its_module(
    tiny_argv: Argv, only_run: Callable[[], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "odd.py").write_text(CALLBACK)
    words = tiny_argv(*TRACKED, "--callbacks", "odd:Odd", "--max-iters", "60", "--flush-interval", "5")
    script = [sys.executable, os.fspath(ROOT / "tests" / "killed_training.py"), "step", "40"]
    env = {**os.environ, "PYTHONPATH": os.fspath(tmp_path / "modules")}
    words += ["--eval-interval", "60"]
    assert subprocess.run([*script, *words], env=env, timeout=120).returncode == -signal.SIGKILL
    run = only_run()
    assert read_status(run) == "crashed"
    monkeypatch.setattr(metrics, "_REGISTRY", dict(metrics._REGISTRY))
    assert rebuild(run) == 0
    assert read_status(run) == "crashed"  # rebuilding does not change the status
    tensorboard, aim = shown(run, tmp_path)
    assert (tensorboard["status"], aim["status"]) == ("STATUS_FAILURE", "crashed")
    for metric in ("odd {'subset': 'mine'}", "loss {'subset': 'train'}"):
        name, _, subset = metric.partition(" ")
        tag = f"{subset.split(chr(39))[3]}/{name}"
        logged = read_metrics(run / "logs", tag)
        assert len(logged) >= 30
        assert [point[:2] for point in tensorboard["scalars"][tag]] == [(s, pytest.approx(v)) for s, v in logged]
        assert [point[:2] for point in aim[f"metric: {metric}"]] == logged


# ------------------------------------------------------------------------------------------ refused and failed


def test_a_run_that_is_being_trained_is_refused(tracked: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = tracked
    before = (run / "run.json").read_text()
    trainer = Run.resume(run)
    try:
        assert rebuild(run) == 2
    finally:
        trainer.release()
    assert capsys.readouterr().err == f"error: run {run.name} is being trained by process {os.getpid()} on " + (
        f"{socket.gethostname()}\n"
    )
    assert (run / "run.json").read_text() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["rebuild"], "the following arguments are required: RUN"),
        (["rebuilt", "latest"], "got 'rebuilt'; did you mean rebuild?"),
        (["rebuild", "latest", "--aimm"], "unknown flag --aimm"),
        (["rebuild", "latest", "--runs-dir", "/nowhere/runs"], "no run latest: /nowhere/runs has no runs yet"),
        (["rebuild", "no-such-run-anywhere"], "no run no-such-run-anywhere"),
    ],
)
def test_a_mistake_is_reported_in_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert experiments.main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert (err.startswith("error: "), err.count("\n")) == (True, 1)


def test_a_rebuild_without_the_package_is_refused_before_anything_is_deleted(
    tracked: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = tracked
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    monkeypatch.setattr("utils.tracking.rebuild.is_installed", lambda name: name != "aim")
    assert rebuild(run) == 2
    assert capsys.readouterr().err == "error: aim is not installed: pip install aim\n"
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == files
    assert rebuild(run, "--tensorboard") == 0


@pytest.mark.parametrize("missing", ["logs/samples.jsonl", "meta/full_config.json", "run.json"])
def test_a_rebuild_of_a_damaged_run_is_refused_before_anything_is_deleted(
    missing: str, tracked: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = tracked
    (run / missing).unlink()
    events = event_files(run)
    assert rebuild(run) == 2
    err = capsys.readouterr().err
    assert (err.startswith("error: "), err.count("\n")) == (True, 1)
    assert event_files(run) == events


def test_a_failed_rebuild_prints_one_line_and_records_the_reason(
    tracked: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = tracked
    assert rebuild(run, "--tensorboard") == 0  # once, to update the recorded paths
    whole = shown_by_tensorboard(run)
    capsys.readouterr()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("utils.tracking.tensorboard.TensorBoardView.feed", full)
        assert rebuild(run, "--tensorboard") == 1
    reason = "OSError: [Errno 28] No space left on device"
    assert capsys.readouterr().err == f"error: tensorboard was not rebuilt: {reason}\n"
    view = read_record(run)["views"]["tensorboard"]
    assert (view["state"], view["reason"]) == ("off", reason)
    assert rebuild(run, "--tensorboard") == 0
    assert shown_by_tensorboard(run) == whole
    assert read_record(run)["views"]["tensorboard"]["state"] == "complete"


def test_the_run_to_rebuild_may_be_the_current_folder(
    tracked: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, folder = tracked
    monkeypatch.chdir(run)
    assert experiments.main(["rebuild", ".", "--aim"]) == 0
    found = shown_by_aim(run, folder)
    assert (found["name"], found["run_dir"]) == (run.name, os.fspath(run))


@pytest.mark.parametrize("words", [["--help"], ["rebuild", "--help"]])
def test_help_needs_neither_torch_nor_trackers(words: list[str]) -> None:
    result = run_without("experiments.py", *words)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("usage: experiments.py")
    assert "rebuild" in result.stdout
