"""Which run is continued and with which settings: what may change, and the reason for everything that may not."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from utils.config.fields import FIELDS, derived_settings, field_fact, flat
from utils.config.loader import ConfigError, ConfigLoader, LoadedConfig
from utils.config.settings import Config, InferenceConfig, ModelConfig, OptimizerConfig, TrainConfig
from utils.errors import UserError
from utils.runs.origin import (
    BATCH,
    FOUND,
    Origin,
    check_callbacks,
    check_fork,
    check_longer,
    check_model,
    check_overrides,
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
from utils.runs.run import Run, RunError, read_record
from utils.runs.trust import made_here

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def loader(tmp_path: Path) -> ConfigLoader:
    """Of a project folder with a configuration of its own, which must not reach a recorded one."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "train.yaml").write_text("batch_size: 24\n")
    return ConfigLoader(tmp_path)


def make(runs_dir: Path, run_id: str, config: Config | None = None, **facts: Any) -> Path:
    """A run that has ended, written by hand, with its configuration unless that is None."""
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


def refusal(run: Path, loader: ConfigLoader, resolved: dict[str, Any] | None = None, **overrides: str | bool) -> str:
    """Why the run does not go on with these flags."""
    recorded = recorded_config(run, loader)
    with pytest.raises(ConfigError) as caught:
        check_overrides(run, recorded, loader.load_onto(recorded, (), overrides), resolved or {})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_rules_of_a_resume_need_no_torch() -> None:
    code = "import sys, utils.runs.origin; sys.exit('torch' in sys.modules)"
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
        ("runs/a:b", "runs/a:b", "latest"),  # no choice: part of a path
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
def test_a_run_resumes_from_its_newest_checkpoint_only(run: Path, runs_dir: Path, which: str) -> None:
    with pytest.raises(RunError) as caught:
        find_origin("resume", f"base:{which}", runs_dir)
    assert str(caught.value) == (
        f"--resume base:{which}: a run continues from its newest checkpoint; "
        "--fork starts a new run from any checkpoint"
    )


def test_a_run_that_is_not_there_is_told(run: Path, runs_dir: Path) -> None:
    with pytest.raises(RunError, match=r"no run bse in .*; did you mean base\?"):
        find_origin("init", "bse:best", runs_dir)


def test_what_run_json_says_of_a_parent(run: Path) -> None:
    facts = parent_facts(Origin("fork", run, "best"), 500, {"run": "of a checkpoint"})
    assert facts == {"run": "20260101_000000_base", "path": str(run), "step": 500, "relation": "fork"}
    of_export = parent_facts(Origin("init", run), 0, {"run": "its run", "export": "sha", "other": 1})
    assert of_export == {"run": "its run", "path": str(run), "step": 0, "relation": "init", "export": "sha"}


def test_an_export_alone_gives_weights_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "model.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    for text in ("weights", "weights:latest", "weights:best"):
        assert find_origin("init", text, tmp_path / "runs") == Origin("init", tmp_path / "weights")
    for relation, text in (("init", "weights:5"), ("fork", "weights"), ("resume", "weights"), ("fork", "weights:5")):
        with pytest.raises(RunError) as caught:
            find_origin(relation, text, tmp_path / "runs")  # type: ignore[arg-type]
        assert str(caught.value) == (
            f"{text} is an export, which has nothing but weights: --init-from weights starts with them"
        )


# ------------------------------------------------------------------------------------- --resume auto


def test_unfinished_runs_of_the_tag_are_found_newest_first(runs_dir: Path) -> None:
    config = Config()
    old = make(runs_dir, "20260101_000000_a", config, tag="a", status="interrupted")
    crashed = make(runs_dir, "20260102_000000_a", config, tag="a", status="running", host="gone", pid=1)
    new = make(runs_dir, "20260103_000000_a", config, tag="a", status="interrupted")
    failed = make(runs_dir, "20260104_000000_a", config, tag="a", status="failed")  # of a full disk, say
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
    (make(runs_dir, "20260108_000000_c", Config()) / "run.json").write_text("{")  # by its id of another tag
    lines.clear()
    assert len(resumable_runs(runs_dir, "a", lines.append)) == 1
    assert lines == [unreadable]  # the others are not newer


def test_a_run_that_is_being_trained_is_never_taken(runs_dir: Path) -> None:
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
    assert loaded.config.train.batch_size == 12  # not what configs/ says today
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
def test_without_sources_the_values_count(run: Path, loader: ConfigLoader, content: str | None) -> None:
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
    config["tracking"] |= {"qa_template": "Q {question}", "qa_stop": "A"}  # the section that they were in
    (run / "meta" / "full_config.json").write_text(json.dumps(config))
    sources = {"qa_stop": {"value": "A", "source": "--qa-stop", "shadowed": []}}
    (run / "meta" / "config_sources.json").write_text(json.dumps(sources))
    loaded = recorded_config(run, loader)
    assert (loaded.config.inference.qa_template, loaded.config.inference.qa_stop) == ("Q {question}", "A")
    assert loaded.config.inference.temperature == InferenceConfig().temperature
    assert loaded.source("qa_stop") == "--qa-stop"
    assert loaded.source("temperature") == "20260101_000000_base/meta/full_config.json"


def test_a_configuration_outside_the_run_is_refused(run: Path, loader: ConfigLoader, tmp_path: Path) -> None:
    (run / "meta").rename(tmp_path / "meta")
    (run / "meta").symlink_to(tmp_path / "meta")
    with pytest.raises(ConfigError, match=r"full_config\.json: cannot be read: leads out of"):
        recorded_config(run, loader)


@pytest.mark.parametrize("inside", [True, False])
def test_sources_may_be_linked_within_the_run_only(
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


# ------------------------------------------------------------------------------------- overrides of a resume

OTHER_VALUES = {  # valid, and not the default
    "dataset": "shakespeare",
    "shard": "fsdp",
    "unknown_token": "?",
    "val_fraction": "0.2",
    "n_kv_head": "2",
    "head_dim": "16",
    "ffn_dim": "64",
    "dropout": "0.5",
    "position": "rope",
    "norm": "rmsnorm",
    "norm_eps": "0.01",
    "mlp": "swiglu",
    "bias": False,
    "min_lr": "0",
    "schedule": "linear",
    "warmup_iters": "3",
    "lr_decay_iters": "300",
    "beta1": "0.5",
    "beta2": "0.5",
    "adam_eps": "0.1",
    "gradient_accumulation_steps": "2",
    "callbacks": "my_module:MyCallback",
    "wandb_mode": "offline",
    "device": "cpu",
    "dtype": "float32",
    "threads": "3",
    "deterministic": True,
    "compile": True,
    "compile_mode": "max-autotune",
    "tf32": False,
    "fp8": True,
    "activation_checkpointing": True,
    "ngram_rows": "64,32",
    "qkv_bias": False,
    "qk_norm": True,
    "mlp_bias": False,
    "tie_embeddings": False,
    "zero_init": True,
    "optimizer_name": "muon",
    "weight_decay_schedule": "linear",
    "momentum": "0.9",
    "patience": "5",
    "export_weights": "best",
    "packing": "documents",
    "arithmetic_operators": "*",
    "arithmetic_format": "padded",
    "run_tag": "other",
    "tags": "a,b",
    "note": "text",
    "keep_best": False,
    "aim_logging": True,
    "tracking_budget": "0.5",
    "flush_interval": "60",
    "top_p": "0.9",
    "min_p": "0.1",
}
ONLY_ONE_VALUE = ("tokenizer",)
LENGTHS = ("max_iters", "epochs")
# Reported as the batch_size that it changes, and refused for the tokenizer, packing or architecture of the run.
OF_ANOTHER = (
    *("tokens_per_step", "special_tokens", "loss_after", "rope_scaling", "qk_norm_weights"),
    *("head_bias", "lora_alpha", "lora_dropout", "lora_targets"),
)


def other_value(key: str) -> str | bool:
    default = flat(Config())[key]
    if key in OTHER_VALUES:
        return OTHER_VALUES[key]
    if isinstance(default, bool):
        return not default
    return f"{default}x" if isinstance(default, str) else f"{(default or 1) * 2:g}"


@pytest.mark.parametrize("key", [key for key in FIELDS if key not in (*ONLY_ONE_VALUE, *LENGTHS, *OF_ANOTHER)])
def test_what_changes_no_numbers_may_be_overridden_and_all_else_is_refused(
    run: Path, loader: ConfigLoader, key: str
) -> None:
    value = other_value(key)
    recorded = recorded_config(run, loader)
    loaded = loader.load_onto(recorded, (), {key: value})
    assert flat(loaded.config)[key] != flat(recorded.config)[key]
    if field_fact(key, "kind") in ("observation", "machine"):
        check_overrides(run, recorded, loaded, {})
    else:
        message = refusal(run, loader, **{key: value})
        flag = ("--no-" if value is False else "--") + key.replace("_", "-")
        assert message.startswith(
            f"{flag}: {key} changes the numbers of a run, so 20260101_000000_base continues with "
        )
        assert message.endswith("; --fork starts a new run from its checkpoint")


def test_a_refusal_shows_both_values(run: Path, loader: ConfigLoader) -> None:
    assert refusal(run, loader, learning_rate="0.01") == (
        "--learning-rate: learning_rate changes the numbers of a run, so 20260101_000000_base continues with 0.001, "
        "not 0.01; --fork starts a new run from its checkpoint"
    )
    assert "continues with none, not 3;" in refusal(run, loader, patience="3")
    assert "continues with on, not off;" in refusal(run, loader, bias=False)


def test_a_setting_in_a_file_is_refused_with_its_line(run: Path, loader: ConfigLoader, tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text("note: text\nseed: 8\n")
    recorded = recorded_config(run, loader)
    with pytest.raises(ConfigError, match=r"^more\.yaml:2: seed changes .* continues with 7, not 8"):
        check_overrides(run, recorded, loader.load_onto(recorded, [tmp_path / "more.yaml"]), {})


def test_an_override_that_says_what_is_so_already_is_none(run: Path, loader: ConfigLoader) -> None:
    recorded = recorded_config(run, loader)
    check_overrides(run, recorded, loader.load_onto(recorded, (), {"seed": "7", "n_layer": "2", "bias": True}), {})


def test_the_length_is_judged_elsewhere(run: Path, loader: ConfigLoader) -> None:
    recorded = recorded_config(run, loader)
    for override in ({"max_iters": "9"}, {"epochs": "2"}):
        check_overrides(run, recorded, loader.load_onto(recorded, (), override), {})


def test_asking_for_the_value_that_auto_resolved_to_is_allowed(run: Path, loader: ConfigLoader) -> None:
    resolved = {"device": "cuda:1", "threads": 2, "n_kv_head": 4}
    recorded = recorded_config(run, loader)
    for flags in ({"device": "cuda:0"}, {"threads": "2"}, {"n_kv_head": "4"}):
        check_overrides(run, recorded, loader.load_onto(recorded, (), flags), resolved)
    assert "continues with cuda:1, not cpu" in refusal(run, loader, resolved, device="cpu")
    assert "continues with 2, not 3" in refusal(run, loader, resolved, threads="3")


# ------------------------------------------------------------------------------------- max_iters may grow


def length_refusal(old: int, new: int, status: str = "interrupted", **settings: Any) -> str:
    """Why a run that was started with `old` steps may not go on to `new`; empty: it may."""
    config = Config(optimizer=OptimizerConfig(**settings), train=TrainConfig(max_iters=max(old, new)))
    record = {"resolved": derived_settings(config, old), "status": status, "last_step": old}
    try:
        check_longer(Path("runs/a_run"), record, config, new)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("status", ["interrupted", "crashed", "failed", "diverged"])
def test_an_incomplete_run_continues_to_its_end(status: str) -> None:
    assert length_refusal(100, 100, status) == ""


def test_a_complete_run_does_not_go_on() -> None:
    assert length_refusal(2000, 2000, "completed") == (
        "a_run is complete (2,000 steps); a larger --max-iters continues it where the schedule allows, "
        "--fork starts a new run from its checkpoint"
    )


@pytest.mark.parametrize("status", ["interrupted", "completed"])
@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": "constant", "warmup_iters": 10},
        {"schedule": "constant", "warmup_iters": 0},
        {"schedule": "cosine", "warmup_iters": 10, "lr_decay_iters": 100},
        {"schedule": "linear", "lr_decay_iters": 80},  # the warmup follows the decay
    ],
)
def test_a_run_may_grow_where_its_schedule_does_not_depend_on_the_length(settings: dict[str, Any], status: str) -> None:
    assert length_refusal(100, 200, status, **settings) == ""


def test_a_length_that_would_change_the_weight_decay_is_refused() -> None:
    settings = {"schedule": "constant", "warmup_iters": 10, "weight_decay_schedule": "linear"}
    assert "would change the weight decay that a_run was trained with" in length_refusal(
        100, 200, "completed", **settings
    )
    assert length_refusal(100, 200, "completed", **settings, weight_decay=0.0) == ""


@pytest.mark.parametrize(
    ("settings", "change"),
    [
        ({}, "warmup_iters from 100 to 200"),
        ({"warmup_iters": 10}, "lr_decay_iters from 2,000 to 4,000"),
        ({"schedule": "linear", "warmup_iters": 10}, "lr_decay_iters from 2,000 to 4,000"),
        ({"schedule": "constant"}, "warmup_iters from 100 to 200"),
        ({"lr_decay_iters": 3000}, "warmup_iters from 100 to 150"),
    ],
)
@pytest.mark.parametrize("status", ["interrupted", "completed"])
def test_a_length_that_would_change_learning_rates_is_refused(
    settings: dict[str, Any], change: str, status: str
) -> None:
    assert length_refusal(2000, 4000, status, **settings) == (
        f"--max-iters: 4,000 steps would change {change} and so the learning rates that a_run was trained with; "
        "--fork starts a new run from its checkpoint"
    )


@pytest.mark.parametrize("status", ["interrupted", "completed"])
def test_a_run_never_shrinks(status: str) -> None:
    message = length_refusal(2000, 1999, status, schedule="constant", warmup_iters=0)
    assert message == "--max-iters: a_run may grow, not shrink, from 2,000 to 1,999"


def test_a_run_that_ended_before_its_first_step_may_have_any_length() -> None:
    check_longer(Path("a_run"), {"status": "failed"}, Config(), 5)


def test_a_run_that_stopped_early_does_not_go_on_whatever_its_length() -> None:
    config = Config(optimizer=OptimizerConfig(schedule="constant", warmup_iters=0), train=TrainConfig(max_iters=200))
    record = {"resolved": derived_settings(config, 100), "status": "completed", "last_step": 40}
    with pytest.raises(ConfigError, match="a_run is complete: it stopped early at step 40"):
        check_longer(Path("a_run"), record, config, 200)


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
def test_the_tag_of_a_fork_tells_it_from_its_parent(
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


def test_the_values_that_auto_resolved_to_are_kept() -> None:
    record = {"resolved": {"device": "cuda:1", "dtype": "bfloat16", "threads": 3, "deterministic": False, "seed": 9}}
    pinned = pinned_settings(Config(), record)
    assert pinned == {"device": "cuda:1", "dtype": "bfloat16", "threads": 3, "deterministic": False}
    chosen = Config(train=TrainConfig(device="cuda:0", threads=5))
    assert pinned_settings(chosen, record) == {"dtype": "bfloat16", "deterministic": False}  # what was not auto stays
    config = pin(Config(train=TrainConfig(seed=7, threads=5)), pinned)
    train = config.train
    assert (train.device, train.dtype, train.threads, train.deterministic) == ("cuda:1", "bfloat16", 3, False)
    assert train.seed == 7
    assert config.model == Config().model


@pytest.mark.parametrize("record", [{}, {"resolved": None}, {"resolved": {}}, {"resolved": {"parameters": 5}}])
def test_a_run_that_resolved_nothing_pins_nothing(record: dict[str, Any]) -> None:
    assert pinned_settings(Config(), record) == {}
    assert pin(Config(), {}) == Config()


def test_what_is_put_on_top_is_a_layer_with_its_source(run: Path, loader: ConfigLoader) -> None:
    below = loader.load()
    loaded = put_on_top(below, {"seed": 6, "note": "x"}, "here")
    assert [(setting.value, setting.source) for setting in loaded.layers["seed"]] == [(1337, "default"), (6, "here")]
    fork = config_of_fork(run, loader, (), {})
    for one in (loaded, fork, recorded_config(run, loader), below):
        assert {key: layers[-1].value for key, layers in one.layers.items()} == flat(one.config)
    assert below.config.train.seed == 1337


# ------------------------------------------------------------------------------------- whose weights fit


def model(**settings: Any) -> ModelConfig:
    return ModelConfig(**{"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8} | settings)


def misfit(own: ModelConfig, parent: ModelConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        check_model(own, parent.model_dump(mode="json"), "a_run")
    assert isinstance(caught.value, UserError)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("own", "parent"),
    [
        ({}, {}),
        ({"dropout": 0.5}, {"dropout": 0.0}),
        ({"n_kv_head": 2, "head_dim": 8, "ffn_dim": 64, "qkv_bias": True}, {}),  # what none comes to
        ({}, {"n_kv_head": 2, "head_dim": 8, "ffn_dim": 64}),
        ({"position": "rope", "block_size": 32}, {"position": "rope"}),
        ({"position": "rope", "block_size": 4}, {"position": "rope"}),
        ({"position": "rope", "rope_theta": 5e5}, {"position": "rope"}),
    ],
)
def test_weights_of_the_same_shapes_and_meaning_fit(own: dict[str, Any], parent: dict[str, Any]) -> None:
    check_model(model(**own), model(**parent).model_dump(mode="json"), "a_run")


@pytest.mark.parametrize(
    ("own", "parent", "facts", "flags"),
    [
        ({"block_size": 16}, {}, "block_size 8, not 16", "--block-size 8"),
        ({"n_layer": 3}, {}, "n_layer 1, not 3", "--n-layer 1"),
        ({"n_embd": 32}, {}, "n_embd 16, not 32", "--n-embd 16"),  # what derives from it is not listed
        ({"n_head": 4}, {}, "n_head 2, not 4", "--n-head 2"),
        ({"mlp": "swiglu"}, {}, "mlp gelu, not swiglu", "--mlp gelu"),
        ({"bias": False}, {}, "bias on, not off", "--bias"),
        ({}, {"bias": False}, "bias off, not on", "--no-bias"),
        ({"norm": "rmsnorm"}, {}, "norm layernorm, not rmsnorm", "--norm layernorm"),
        ({}, {"norm": "rmsnorm"}, "norm rmsnorm, not layernorm", "--norm rmsnorm"),
        ({"position": "rope"}, {}, "position learned, not rope", "--position learned"),
        ({}, {"position": "rope"}, "position rope, not learned", "--position rope"),
        ({"norm_eps": 1e-6}, {}, "norm_eps 1e-05, not 1e-06", "--norm-eps 1e-05"),
        ({"n_kv_head": 1}, {"n_kv_head": 2}, "n_kv_head 2, not 1", "--n-kv-head 2"),
        ({"ffn_dim": 32}, {"ffn_dim": 48}, "ffn_dim 48, not 32", "--ffn-dim 48"),
        (
            {"bias": False, "qkv_bias": False},
            {"qkv_bias": True},
            "bias on, not off, qkv_bias on, not off",
            "--bias --qkv-bias",
        ),
        (
            {"n_layer": 3, "block_size": 16},
            {},
            "n_layer 1, not 3, block_size 8, not 16",
            "--n-layer 1 --block-size 8",
        ),
    ],
)
def test_what_differs_is_named_with_the_flags_that_fit(
    own: dict[str, Any], parent: dict[str, Any], facts: str, flags: str
) -> None:
    message = misfit(model(**own), model(**parent))
    assert message == f"the weights of a_run are of another model: {facts}; fitting: {flags}"


@pytest.mark.parametrize(
    ("own", "parent"),
    [
        ({"n_layer": 3, "n_embd": 32, "block_size": 16}, {}),
        ({"n_head": 4}, {}),
        ({"mlp": "swiglu"}, {}),
        ({}, {"mlp": "swiglu", "bias": False, "norm": "rmsnorm"}),
        ({"bias": False}, {}),
        ({"n_kv_head": 1}, {}),
        ({}, {"n_kv_head": 1, "head_dim": 4, "ffn_dim": 40}),
    ],
)
def test_the_flags_that_are_said_to_fit_do(loader: ConfigLoader, own: dict[str, Any], parent: dict[str, Any]) -> None:
    words = misfit(model(**own), model(**parent)).split("; fitting: ")[1].split()
    overrides: dict[str, str | bool] = {}
    for index, word in enumerate(words):
        if word.startswith("--"):
            value = words[index + 1] if index + 1 < len(words) and not words[index + 1].startswith("--") else None
            key = word.removeprefix("--no-" if word.startswith("--no-") else "--").replace("-", "_")
            overrides[key] = value if value is not None else not word.startswith("--no-")
    base = LoadedConfig.from_config(Config(model=model(**own)))
    fitting = loader.load_onto(base, (), overrides).config.model
    check_model(fitting, model(**parent).model_dump(mode="json"), "a_run")


# ------------------------------------------------------------------------------------- batch_size auto

AUTO = {"batch_size": "auto", "tokens_per_step": "640"}


@pytest.fixture
def searched(runs_dir: Path, loader: ConfigLoader) -> LoadedConfig:
    """A recorded configuration whose batch was found."""
    found = {"batch_size": 10, "gradient_accumulation_steps": 2, "tokens_per_step": None}
    loaded = put_on_top(loader.load((), AUTO), found, FOUND)
    path = make(runs_dir, "20260101_000000_auto", loaded.config)
    (path / "meta" / "config_sources.json").write_text(json.dumps(loaded.sources_json()))
    return recorded_config(path, loader)


def batch(loaded: LoadedConfig) -> list[Any]:
    return [flat(loaded.config)[key] for key in BATCH]


@pytest.mark.parametrize("overrides", [AUTO, {"tokens_per_step": "640"}, {**AUTO, "note": "again"}, {}])
def test_the_search_that_found_the_batch_of_a_run_is_not_repeated(
    searched: LoadedConfig, loader: ConfigLoader, overrides: dict[str, str | bool]
) -> None:
    loaded = keep_batch(searched, loader.load_onto(searched, (), overrides))
    assert batch(loaded) == [10, 2, None]
    assert loaded.source("batch_size") == FOUND
    assert loaded.layers["batch_size"] == searched.layers["batch_size"]  # also after many resumes
    assert loaded.config.tracking.note == overrides.get("note", "")


def test_a_search_whose_question_is_not_recorded_is_made_again(
    searched: LoadedConfig, runs_dir: Path, loader: ConfigLoader
) -> None:
    path = runs_dir / "20260101_000000_auto"
    sources = json.loads((path / "meta" / "config_sources.json").read_text())
    for key in BATCH:
        sources[key]["shadowed"] = []
    (path / "meta" / "config_sources.json").write_text(json.dumps(sources))
    recorded = recorded_config(path, loader)
    assert recorded.source("batch_size") == FOUND
    loaded = loader.load_onto(recorded, (), AUTO)
    assert keep_batch(recorded, loaded) is loaded


@pytest.mark.parametrize(
    "overrides", [{"batch_size": "auto"}, {"batch_size": "auto", "tokens_per_step": "1280"}, {"batch_size": "20"}]
)
def test_another_batch_than_was_asked_for_then_is_left_as_it_is(
    searched: LoadedConfig, loader: ConfigLoader, overrides: dict[str, str | bool]
) -> None:
    loaded = loader.load_onto(searched, (), overrides)
    assert keep_batch(searched, loaded) is loaded
    assert batch(loaded)[0] == (20 if overrides["batch_size"] == "20" else "auto")


def test_a_batch_that_was_named_is_not_kept_against_auto(run: Path, loader: ConfigLoader) -> None:
    recorded = recorded_config(run, loader)
    loaded = keep_batch(recorded, loader.load_onto(recorded, (), {"batch_size": "auto"}))
    with pytest.raises(ConfigError, match=r"--batch-size: batch_size changes .* continues with 12, not auto"):
        check_overrides(run, recorded, loaded, {})


# ------------------------------------------------------------------------------------- adapters of a fork


def adapted(**settings: Any) -> OptimizerConfig:
    return OptimizerConfig(**{"lora_rank": 2, "lora_targets": ("qkv", "up")} | settings)


def lora_state(config: OptimizerConfig) -> dict[str, Any]:
    """What a checkpoint of a run with these settings says of its adapters."""
    return {"lora": {key: value for key, value in config.model_dump(mode="json").items() if key.startswith("lora_")}}


@pytest.mark.parametrize(
    ("own", "state"),
    [
        (OptimizerConfig(), {}),  # also of an older version
        (OptimizerConfig(), lora_state(OptimizerConfig())),
        (adapted(), lora_state(adapted())),
        (adapted(lora_alpha=adapted().adapter_alpha), lora_state(adapted())),  # what none comes to
        (adapted(learning_rate=0.5, lora_dropout=0.5), lora_state(adapted())),
    ],
)
def test_a_fork_has_the_adapters_of_its_parent(own: OptimizerConfig, state: dict[str, Any]) -> None:
    check_fork(own, state, "a_run")


@pytest.mark.parametrize(
    ("own", "parent", "words"),
    [
        (adapted(lora_rank=4), adapted(), "lora_rank 2, not 4"),
        (adapted(lora_alpha=7.5), adapted(lora_alpha=3), "lora_alpha 3, not 7.5"),
        (adapted(lora_targets=("up",)), adapted(), "lora_targets qkv, up, not up"),
        (OptimizerConfig(), adapted(), "lora_rank 2, not none"),
        (adapted(), OptimizerConfig(), "lora_rank none, not 2"),
    ],
)
def test_other_adapters_than_those_of_its_parent_are_refused(
    own: OptimizerConfig, parent: OptimizerConfig, words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_fork(own, lora_state(parent), "a_run")
    assert str(caught.value) == (
        f"--fork: a_run was trained with {words}; --init-from starts with its weights, adapters merged into them"
    )


# ------------------------------------------------------------------------------------- a file of a run made elsewhere


def test_a_file_of_a_foreign_run_does_not_say_where_to_write(run: Path, loader: ConfigLoader, tmp_path: Path) -> None:
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
    (run / "run.json").unlink()  # in no run
    assert places([theirs]) == ["theirs", "theirs", "flag", "theirs"]


def test_callbacks_of_a_file_of_a_foreign_run_need_trust(run: Path, loader: ConfigLoader, tmp_path: Path) -> None:
    theirs = run / "their.yaml"
    theirs.write_text("callbacks: [evil:Evil]\n")
    (run / "run.json").write_text(json.dumps(read_record(run) | {"host": "eve"}))
    loaded = loader.load([theirs])
    with pytest.raises(UserError, match=r"base was made on eve, .*: callback evil:Evil \(not found\); --trust allows"):
        without_foreign_places(loaded, [theirs], tmp_path, False)
    assert without_foreign_places(loaded, [theirs], tmp_path, True).config == loaded.config
    named = loader.load([theirs], {"callbacks": "mine:Mine"})  # the user's own choice
    assert without_foreign_places(named, [theirs], tmp_path, False).config.train.callbacks == ("mine:Mine",)


def test_callbacks_that_only_a_foreign_run_names_need_trust(
    runs_dir: Path, loader: ConfigLoader, tmp_path: Path
) -> None:
    config = Config(train=TrainConfig(callbacks=("evil:Evil", "known:Known")))
    path = make(runs_dir, "20260102_000000", config, host="eve")
    (tmp_path / "configs" / "callbacks.yaml").write_text("callbacks: [known:Known]\n")

    def check(trusted: bool = False, **overrides: str | bool) -> None:
        check_callbacks(Origin("fork", path, trusted=trusted), config_of_fork(path, loader, (), overrides), loader)

    with pytest.raises(UserError, match=r"20260102_000000 was made on eve, .*: callback evil:Evil \(not found\); --tr"):
        check()
    check(trusted=True)
    check(callbacks="evil:Evil")
    (tmp_path / "configs" / "callbacks.yaml").write_text("callbacks: [known:Known, evil:Evil]\n")
    check()
