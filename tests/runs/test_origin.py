"""The origin of a resumed or forked run: its parent, the checkpoint, and the settings with their sources."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from utils.config.fields import flat
from utils.config.loader import ConfigError, ConfigLoader, LoadedConfig
from utils.config.settings import Config, InferenceConfig, ModelConfig, TrainConfig
from utils.errors import UserError
from utils.runs.origin import (
    BATCH_KEYS,
    FOUND_BATCH,
    Origin,
    config_of_fork,
    find_origin,
    keep_batch,
    parent_facts,
    pin,
    pinned_settings,
    put_on_top,
    recorded_config,
    resumable_runs,
    split_choice,
    without_foreign_places,
)
from utils.runs.origin_checks import check_overrides
from utils.runs.run import Run, RunError, read_record
from utils.runs.trust import made_here

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def loader(tmp_path: Path) -> ConfigLoader:
    """The loader of a project whose own configuration must not change a recorded one."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "train.yaml").write_text("batch_size: 24\n")
    return ConfigLoader(tmp_path)


def make(runs_dir: Path, run_id: str, config: Config | None = None, **facts: Any) -> Path:
    """Write a run that has ended, with its configuration unless that is None."""
    path = runs_dir / run_id
    (path / "meta").mkdir(parents=True)
    record = {"schema_version": 1, "id": run_id, "status": "interrupted", "start": f"2026-01-01T00:00:00.{run_id}"}
    (path / "run.json").write_text(json.dumps(record | facts))
    if config is not None:
        loaded = LoadedConfig.from_config(config)
        (path / "meta" / "full_config.json").write_text(json.dumps(config.model_dump(mode="json")))
        (path / "meta" / "config_sources.json").write_text(json.dumps(loaded.sources_json()))
    return path


@pytest.fixture
def run(runs_dir: Path) -> Path:
    config = Config(model=ModelConfig(n_layer=2), train=TrainConfig(seed=7), tracking={"run_tag": "base"})
    return make(runs_dir, "20260101_000000_base", config, tag="base")


def test_the_rules_of_resuming_do_not_import_torch() -> None:
    code = "import sys, utils.runs.origin_checks; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ------------------------------------------------------------------------------------- RUN[:WHICH]


@pytest.mark.parametrize(
    ("text", "name", "which"),
    [
        ("base", "base", "latest"),
        ("base:latest", "base", "latest"),
        ("base:best", "base", "best"),
        ("base:500", "base", "500"),
        ("base:000500", "base", "000500"),
        ("latest:best", "latest", "best"),
        ("runs/a:b:best", "runs/a:b", "best"),
        ("runs/a:b", "runs/a:b", "latest"),  # not a checkpoint: part of the path
        ("base:", "base:", "latest"),
        ("base:-5", "base:-5", "latest"),
        (":best", ":best", "latest"),
        ("", "", "latest"),
        ("best", "best", "latest"),
        ("500", "500", "latest"),
    ],
)
def test_a_choice_follows_the_last_colon(text: str, name: str, which: str) -> None:
    assert split_choice(text) == (name, which)


def test_an_origin_names_run_and_checkpoint(run: Path, runs_dir: Path) -> None:
    assert find_origin("init", "base:best", runs_dir) == Origin("init", run, "best", False)
    assert find_origin("fork", "latest:500", runs_dir, strict=True) == Origin("fork", run, "500", True)
    assert find_origin("resume", "base", runs_dir) == Origin("resume", run, "latest", False)
    assert find_origin("resume", "base:latest", runs_dir) == Origin("resume", run, "latest", False)
    trusted = find_origin("fork", "base", runs_dir, trusted=True)
    assert trusted == Origin("fork", run, "latest", strict=False, trusted=True)


def test_the_path_of_an_origin_is_absolute(run: Path, runs_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs_dir)
    assert find_origin("fork", f"./{run.name}:best", runs_dir).run == run.resolve()


@pytest.mark.parametrize("which", ["best", "500"])
def test_a_run_resumes_only_from_its_newest_checkpoint(run: Path, runs_dir: Path, which: str) -> None:
    with pytest.raises(RunError) as caught:
        find_origin("resume", f"base:{which}", runs_dir)
    assert str(caught.value) == (
        f"--resume base:{which}: a run continues from its newest checkpoint; "
        "--fork starts a new run from any checkpoint"
    )


def test_a_missing_run_is_reported_with_the_nearest_name(run: Path, runs_dir: Path) -> None:
    with pytest.raises(RunError, match=r"no run bse in .*; did you mean base\?"):
        find_origin("init", "bse:best", runs_dir)


def test_run_json_records_the_parent_and_its_checkpoint_or_export(run: Path) -> None:
    facts = parent_facts(Origin("fork", run, "best"), 500, {"run": "the run of a checkpoint"})
    assert facts == {"run": "20260101_000000_base", "path": str(run), "step": 500, "relation": "fork"}
    of_export = parent_facts(Origin("init", run), 0, {"run": "its run", "export": "sha", "other": 1})
    assert of_export == {"run": "its run", "path": str(run), "step": 0, "relation": "init", "export": "sha"}


def test_an_export_can_only_initialize_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    for text in ("weights", "weights:latest", "weights:best"):
        assert find_origin("init", text, tmp_path / "runs") == Origin("init", tmp_path / "weights")
    for relation, text in (("init", "weights:5"), ("fork", "weights"), ("resume", "weights"), ("fork", "weights:5")):
        with pytest.raises(RunError) as caught:
            find_origin(relation, text, tmp_path / "runs")  # type: ignore[arg-type]
        assert str(caught.value) == (
            f"{text} is an export, which has only weights: --init-from weights starts with them"
        )


# ------------------------------------------------------------------------------------- --resume auto


def test_unfinished_runs_of_the_tag_are_found_newest_first(runs_dir: Path) -> None:
    config = Config()
    old = make(runs_dir, "20260101_000000_a", config, tag="a", status="interrupted")
    crashed = make(runs_dir, "20260102_000000_a", config, tag="a", status="running", host="gone", pid=1)
    new = make(runs_dir, "20260103_000000_a", config, tag="a", status="interrupted")
    failed = make(runs_dir, "20260104_000000_a", config, tag="a", status="failed")  # for example on a full disk
    for day, status in enumerate(("completed", "diverged"), start=5):
        make(runs_dir, f"2026010{day}_000000_a", config, tag="a", status=status)
    make(runs_dir, "20260107_000000_b", config, tag="b")
    make(runs_dir, "20260108_000000", config)
    assert resumable_runs(runs_dir, "a") == [failed, new, crashed, old]
    assert resumable_runs(runs_dir, "c") == []
    assert resumable_runs(runs_dir / "nowhere", "a") == []


def test_damaged_records_and_runs_without_configuration_are_left_out(runs_dir: Path) -> None:
    good = make(runs_dir, "20260101_000000_a", Config(), tag="a")
    make(runs_dir, "20260102_000000_a", None, tag="a")  # ended before its configuration was written
    (make(runs_dir, "20260103_000000_a", Config(), tag="a") / "run.json").write_text("{")
    assert resumable_runs(runs_dir, "a") == [good]


def test_why_a_newer_run_is_not_resumed_is_reported(runs_dir: Path) -> None:
    make(runs_dir, "20260101_000000_a", Config(), tag="a", status="diverged", exit_reason="not said: too old")
    make(runs_dir, "20260102_000000_a", Config(), tag="a", status="completed")
    make(runs_dir, "20260103_000000_a", Config(), tag="a", status="diverged", exit_reason="loss is nan")
    make(runs_dir, "20260104_000000_a", None, tag="a")
    (make(runs_dir, "20260105_000000_a", Config(), tag="a") / "run.json").write_text("{")
    make(runs_dir, "20260106_000000_b", Config(), tag="b", status="diverged")
    lines: list[str] = []
    assert resumable_runs(runs_dir, "a", lines.append) == []
    unwritten, diverged, complete, unreadable = lines
    assert unreadable.startswith("20260105_000000_a is not resumed: ")
    assert "run.json cannot be read" in unreadable
    assert unwritten == "20260104_000000_a is not resumed: it ended before its configuration was written"
    assert diverged == "20260103_000000_a is not resumed: it diverged: loss is nan"
    assert complete == "20260102_000000_a is not resumed: it is complete"
    make(runs_dir, "20260107_000000_a", Config(), tag="a", status="failed")
    (make(runs_dir, "20260108_000000_c", Config()) / "run.json").write_text("{")  # its id shows that it has another tag
    lines.clear()
    assert len(resumable_runs(runs_dir, "a", lines.append)) == 1
    assert lines == [unreadable]  # only runs newer than the resumable one are reported


def test_resume_auto_never_takes_a_run_that_is_being_trained(runs_dir: Path) -> None:
    run = Run.create(runs_dir, "a")
    (run.path / "meta" / "full_config.json").write_text(json.dumps(Config().model_dump(mode="json")))
    lines: list[str] = []
    assert resumable_runs(runs_dir, "a", lines.append) == []
    place = f"process {os.getpid()} on {socket.gethostname()}"
    assert lines == [f"{run.path.name} is not resumed: it is being trained by {place}"]
    run.release()  # its process died
    assert resumable_runs(runs_dir, "a") == [run.path]


# ------------------------------------------------------------------------------------- the recorded configuration


def test_the_recorded_configuration_keeps_values_and_sources(run: Path, loader: ConfigLoader) -> None:
    loaded = recorded_config(run, loader)
    assert (loaded.config.model.n_layer, loaded.config.train.seed) == (2, 7)
    assert loaded.config.train.batch_size == 12  # not the value in configs/
    assert (loaded.source("n_layer"), loaded.source("n_head")) == ("code", "default")
    sources = json.loads((run / "meta" / "config_sources.json").read_text())
    assert json.loads(json.dumps(loaded.sources_json())) == sources
    assert sources["seed"]["shadowed"] == [{"value": 1337, "source": "default"}]


def test_epochs_instead_of_max_iters_are_recorded_too(runs_dir: Path, loader: ConfigLoader) -> None:
    path = make(runs_dir, "20260102_000000", Config(train=TrainConfig(max_iters=None, epochs=2.5)))
    train = recorded_config(path, loader).config.train
    assert (train.max_iters, train.epochs) == (None, 2.5)


def test_the_time_limit_of_a_session_is_not_inherited(runs_dir: Path, loader: ConfigLoader) -> None:
    path = make(runs_dir, "20260102_000000", Config(train=TrainConfig(max_minutes=5, checkpoint_minutes=3)))
    recorded = recorded_config(path, loader)
    assert (recorded.config.train.max_minutes, recorded.config.train.checkpoint_minutes) == (None, 3)
    again = loader.load_onto(recorded, (), {"max_minutes": "7"})
    check_overrides(path, recorded, again, {})
    assert again.config.train.max_minutes == 7
    assert loader.load_onto(recorded).config.train.max_minutes is None


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"n_layer": 5}'])
def test_without_recorded_sources_the_values_are_still_read(
    run: Path, loader: ConfigLoader, content: str | None
) -> None:
    sources = run / "meta" / "config_sources.json"
    if content is None:
        sources.unlink()
    else:
        sources.write_text(content)
    loaded = recorded_config(run, loader)
    assert loaded.config.model.n_layer == 2
    assert loaded.source("n_layer") == "20260101_000000_base/meta/full_config.json"
    assert [setting.value for setting in loaded.layers["n_layer"]] == [2]


def test_a_run_of_an_older_version_keeps_its_settings_and_their_sources(run: Path, loader: ConfigLoader) -> None:
    config = json.loads((run / "meta" / "full_config.json").read_text())
    del config["inference"]
    config["tracking"] |= {"qa_template": "Q {question}", "qa_stop": "A"}  # their section in older versions
    (run / "meta" / "full_config.json").write_text(json.dumps(config))
    sources = {"qa_stop": {"value": "A", "source": "--qa-stop", "shadowed": []}}
    (run / "meta" / "config_sources.json").write_text(json.dumps(sources))
    loaded = recorded_config(run, loader)
    assert (loaded.config.inference.qa_template, loaded.config.inference.qa_stop) == ("Q {question}", "A")
    assert loaded.config.inference.temperature == InferenceConfig().temperature
    assert loaded.source("qa_stop") == "--qa-stop"
    assert loaded.source("temperature") == "20260101_000000_base/meta/full_config.json"


def test_a_configuration_that_is_linked_from_outside_the_run_is_refused(
    run: Path, loader: ConfigLoader, tmp_path: Path
) -> None:
    (run / "meta").rename(tmp_path / "meta")
    (run / "meta").symlink_to(tmp_path / "meta")
    with pytest.raises(ConfigError, match=r"full_config\.json: cannot be read: leads out of"):
        recorded_config(run, loader)


@pytest.mark.parametrize("inside", [True, False])
def test_sources_are_read_through_a_link_only_within_the_run(
    run: Path, loader: ConfigLoader, tmp_path: Path, inside: bool
) -> None:
    sources, target = run / "meta" / "config_sources.json", (run if inside else tmp_path) / "sources.json"
    sources.rename(target)
    sources.symlink_to(target)
    place = f"{run.name}/meta/full_config.json"
    assert recorded_config(run, loader).source("n_layer") == ("code" if inside else place)


def test_without_a_configuration_nothing_can_be_resumed(runs_dir: Path, loader: ConfigLoader) -> None:
    path = make(runs_dir, "20260102_000000", None)
    with pytest.raises(ConfigError, match="20260102_000000 ended before its configuration was written: nothing can"):
        recorded_config(path, loader)


@pytest.mark.parametrize("content", ["{", '{"n_layers": 2}', '{"n_layer": 0}', "\x00"])
def test_a_damaged_configuration_is_named(run: Path, loader: ConfigLoader, content: str) -> None:
    (run / "meta" / "full_config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"runs/20260101_000000_base/meta/full_config\.json"):
        recorded_config(run, loader)


# ------------------------------------------------------------------------------------- a fork


def test_a_fork_has_the_recorded_settings_and_any_override(run: Path, loader: ConfigLoader, tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text("learning_rate: 0.002\nseed: 8\n")
    overrides: dict[str, str | bool] = {"seed": "9", "max_iters": "50"}
    loaded = config_of_fork(run, loader, [tmp_path / "more.yaml"], overrides)
    assert loaded.config.model.n_layer == 2
    assert loaded.config.optimizer.learning_rate == 0.002
    assert (loaded.config.train.seed, loaded.config.train.max_iters) == (9, 50)
    assert loaded.source("seed") == "--seed"
    assert overrides == {"seed": "9", "max_iters": "50"}


@pytest.mark.parametrize(
    ("tag", "overrides", "expected"),
    [
        ("base", {}, "base-fork"),
        ("base-fork", {}, "base-fork"),
        ("x" * 64, {}, "x" * 59 + "-fork"),
        (None, {}, None),
        ("base", {"run_tag": "mine"}, "mine"),
        ("base", {"run_tag": "none"}, None),
        (None, {"run_tag": "mine"}, "mine"),
    ],
)
def test_the_tag_of_a_fork_differs_from_that_of_its_parent(
    runs_dir: Path, loader: ConfigLoader, tag: str | None, overrides: dict[str, str | bool], expected: str | None
) -> None:
    path = make(runs_dir, "20260102_000000", Config(tracking={"run_tag": tag}), tag=tag)
    assert config_of_fork(path, loader, (), overrides).config.tracking.run_tag == expected


def test_a_tag_in_a_file_is_the_tag_of_the_fork(runs_dir: Path, loader: ConfigLoader, tmp_path: Path) -> None:
    path = make(runs_dir, "20260102_000000_base", Config(tracking={"run_tag": "base"}), tag="base")
    (tmp_path / "tag.yaml").write_text("run_tag: mine\n")
    assert config_of_fork(path, loader, [tmp_path / "tag.yaml"], {}).config.tracking.run_tag == "mine"
    assert config_of_fork(path, loader, (), {}).source("run_tag") == "--fork"


# ------------------------------------------------------------------------------------- pinned settings


def test_a_resume_pins_the_values_that_auto_resolved_to() -> None:
    record = {"resolved": {"device": "cuda:1", "dtype": "bfloat16", "threads": 3, "deterministic": False, "seed": 9}}
    pinned = pinned_settings(Config(), record)
    assert pinned == {"device": "cuda:1", "dtype": "bfloat16", "threads": 3, "deterministic": False}
    chosen = Config(train=TrainConfig(device="cuda:0", threads=5))
    assert pinned_settings(chosen, record) == {"dtype": "bfloat16", "deterministic": False}  # only what was auto
    config = pin(Config(train=TrainConfig(seed=7, threads=5)), pinned)
    train = config.train
    assert (train.device, train.dtype, train.threads, train.deterministic) == ("cuda:1", "bfloat16", 3, False)
    assert train.seed == 7
    assert config.model == Config().model


@pytest.mark.parametrize("record", [{}, {"resolved": None}, {"resolved": {}}, {"resolved": {"parameters": 5}}])
def test_a_run_that_resolved_nothing_pins_nothing(record: dict[str, Any]) -> None:
    assert pinned_settings(Config(), record) == {}
    assert pin(Config(), {}) == Config()


def test_put_on_top_adds_a_layer_with_its_source(run: Path, loader: ConfigLoader) -> None:
    below = loader.load()
    loaded = put_on_top(below, {"seed": 6, "note": "x"}, "here")
    assert [(setting.value, setting.source) for setting in loaded.layers["seed"]] == [(1337, "default"), (6, "here")]
    fork = config_of_fork(run, loader, (), {})
    for one in (loaded, fork, recorded_config(run, loader), below):
        assert {key: layers[-1].value for key, layers in one.layers.items()} == flat(one.config)
    assert below.config.train.seed == 1337


# ------------------------------------------------------------------------------------- batch_size auto

AUTO = {"batch_size": "auto", "tokens_per_step": "640"}


@pytest.fixture
def searched(runs_dir: Path, loader: ConfigLoader) -> LoadedConfig:
    """A recorded configuration whose batch size was found by the search."""
    found = {"batch_size": 10, "gradient_accumulation_steps": 2, "tokens_per_step": None}
    loaded = put_on_top(loader.load((), AUTO), found, FOUND_BATCH)
    path = make(runs_dir, "20260101_000000_auto", loaded.config)
    (path / "meta" / "config_sources.json").write_text(json.dumps(loaded.sources_json()))
    return recorded_config(path, loader)


def batch(loaded: LoadedConfig) -> list[Any]:
    return [flat(loaded.config)[key] for key in BATCH_KEYS]


@pytest.mark.parametrize("overrides", [AUTO, {"tokens_per_step": "640"}, {**AUTO, "note": "again"}, {}])
def test_the_search_that_found_the_batch_of_a_run_is_not_repeated(
    searched: LoadedConfig, loader: ConfigLoader, overrides: dict[str, str | bool]
) -> None:
    loaded = keep_batch(searched, loader.load_onto(searched, (), overrides))
    assert batch(loaded) == [10, 2, None]
    assert loaded.source("batch_size") == FOUND_BATCH
    assert loaded.layers["batch_size"] == searched.layers["batch_size"]  # no layer is added at each resume
    assert loaded.config.tracking.note == overrides.get("note", "")


def test_the_search_is_repeated_if_its_settings_are_not_recorded(
    searched: LoadedConfig, runs_dir: Path, loader: ConfigLoader
) -> None:
    path = runs_dir / "20260101_000000_auto"
    sources = json.loads((path / "meta" / "config_sources.json").read_text())
    for key in BATCH_KEYS:
        sources[key]["shadowed"] = []
    (path / "meta" / "config_sources.json").write_text(json.dumps(sources))
    recorded = recorded_config(path, loader)
    assert recorded.source("batch_size") == FOUND_BATCH
    loaded = loader.load_onto(recorded, (), AUTO)
    assert keep_batch(recorded, loaded) is loaded


@pytest.mark.parametrize(
    "overrides", [{"batch_size": "auto"}, {"batch_size": "auto", "tokens_per_step": "1280"}, {"batch_size": "20"}]
)
def test_a_batch_setting_other_than_the_recorded_one_is_left_alone(
    searched: LoadedConfig, loader: ConfigLoader, overrides: dict[str, str | bool]
) -> None:
    loaded = loader.load_onto(searched, (), overrides)
    assert keep_batch(searched, loaded) is loaded
    assert batch(loaded)[0] == (20 if overrides["batch_size"] == "20" else "auto")


def test_auto_does_not_replace_a_batch_size_that_was_set_explicitly(run: Path, loader: ConfigLoader) -> None:
    recorded = recorded_config(run, loader)
    loaded = keep_batch(recorded, loader.load_onto(recorded, (), {"batch_size": "auto"}))
    with pytest.raises(ConfigError, match=r"--batch-size: batch_size changes .* continues with 12, not auto"):
        check_overrides(run, recorded, loaded, {})


# ------------------------------------------------------------------------------------- a file inside a foreign run


def test_a_configuration_file_inside_a_foreign_run_cannot_choose_where_to_write(
    run: Path, loader: ConfigLoader, tmp_path: Path
) -> None:
    theirs, ours = run / "their.yaml", tmp_path / "ours.yaml"
    ours.write_text("runs_dir: ours\naim_repo: ours\n")
    theirs.write_text("runs_dir: theirs\ncorpora_dir: theirs\ndatasets_dir: theirs\naim_repo: theirs\nn_layer: 3\n")

    def places(files: list[Path], trusted: bool = False) -> list[str]:
        loaded = loader.load(files, {"datasets_dir": "flag"})
        found = without_foreign_places(loaded, files, tmp_path, trusted)
        assert found.config.model.n_layer == 3
        assert flat(found.config) == {key: layers[-1].value for key, layers in found.layers.items()}
        return [flat(found.config)[key] for key in ("runs_dir", "corpora_dir", "datasets_dir", "aim_repo")]

    record = read_record(run)
    (run / "run.json").write_text(json.dumps(record | {"host": "eve"}))
    default = [flat(Config())[key] for key in ("runs_dir", "corpora_dir", "aim_repo")]
    assert places([theirs]) == [default[0], default[1], "flag", default[2]]
    assert places([theirs, ours]) == ["ours", default[1], "flag", "ours"]
    assert places([ours, theirs]) == ["ours", default[1], "flag", "ours"]
    assert places([theirs], trusted=True) == ["theirs", "theirs", "flag", "theirs"]
    (run / "run.json").write_text(json.dumps(record | {"made": made_here(tmp_path)}))
    assert places([theirs]) == ["theirs", "theirs", "flag", "theirs"]
    (run / "run.json").unlink()  # no longer inside a run
    assert places([theirs]) == ["theirs", "theirs", "flag", "theirs"]


def test_callbacks_of_a_configuration_file_inside_a_foreign_run_need_trust(
    run: Path, loader: ConfigLoader, tmp_path: Path
) -> None:
    theirs = run / "their.yaml"
    theirs.write_text("callbacks: [evil:Evil]\n")
    (run / "run.json").write_text(json.dumps(read_record(run) | {"host": "eve"}))
    loaded = loader.load([theirs])
    with pytest.raises(UserError, match=r"base was made on eve, .*: callback evil:Evil \(not found\); --trust allows"):
        without_foreign_places(loaded, [theirs], tmp_path, False)
    assert without_foreign_places(loaded, [theirs], tmp_path, True).config == loaded.config
    named = loader.load([theirs], {"callbacks": "mine:Mine"})  # the user's own choice
    assert without_foreign_places(named, [theirs], tmp_path, False).config.train.callbacks == ("mine:Mine",)
