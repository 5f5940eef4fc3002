"""Explaining a setting: its value, its source, the values that it shadows, and its meaning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fake_runs import indexed, write

from utils.config.fields import FIELDS
from utils.config.loader import ConfigLoader, LoadedConfig
from utils.errors import UserError
from utils.experiments.explain import explain, explain_of_run, known_key, settings_with_sources


@pytest.fixture
def loaded(tmp_path: Path) -> LoadedConfig:
    """A configuration whose batch_size is set in all layers."""
    root = tmp_path / "project"
    write(root / "config.json", '{"batch_size": 2}')
    write(root / "configs" / "train.yaml", "seed: 1\nbatch_size: 4\n")
    first, second = write(root / "first.yaml", "batch_size: 8\n"), write(root / "second.yaml", "\nbatch_size: 16\n")
    return ConfigLoader(root).load([first, second], {"batch_size": "32"})


def test_a_setting_is_explained_with_the_values_that_it_shadows(loaded: LoadedConfig) -> None:
    found = explain("batch_size", loaded)
    assert (found.key, found.section, found.value, found.source) == ("batch_size", "train", 32, "--batch-size")
    assert found.shadowed == [
        (16, "second.yaml:2"),
        (8, "first.yaml:1"),
        (4, "configs/train.yaml:2"),
        (2, "config.json:1"),
        (12, "default"),
    ]
    assert (found.default, found.resolved) == (12, None)
    assert found.meaning.startswith("sequences in one optimizer update, over all micro-steps; auto: ")
    assert (found.expected, found.unit, found.kind) == ("integer >= 1 or auto", "sequences", "trajectory")


def test_a_setting_that_nobody_set_is_the_default(loaded: LoadedConfig) -> None:
    found = explain("dropout", loaded)
    assert (found.value, found.source, found.shadowed, found.default) == (0.0, "default", [], 0.0)
    assert found.expected == "number >= 0 and < 1"
    assert explain("n_kv_head", loaded).value is None


@pytest.mark.parametrize("key", FIELDS)
def test_every_setting_has_an_explanation(loaded: LoadedConfig, key: str) -> None:
    found = explain(key, loaded)
    assert found.key == key
    assert found.meaning
    assert found.expected
    assert found.kind in ("trajectory", "observation", "machine")


@pytest.mark.parametrize("spelling", ["batch_size", "batch-size", "--batch-size", "--batch_size", "train.batch_size"])
def test_a_setting_may_be_spelled_in_several_ways(loaded: LoadedConfig, spelling: str) -> None:
    assert explain(spelling, loaded).key == "batch_size"


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("batch_sise", "no setting is named batch_sise; did you mean batch_size?"),
        ("--batch-sise", "no setting is named --batch-sise; did you mean batch_size?"),
        ("zzz", "no setting is named zzz"),
        ("", "no setting is named "),
        ("train", "no setting is named train"),
    ],
)
def test_an_unknown_setting_is_reported_with_the_nearest(loaded: LoadedConfig, key: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        explain(key, loaded)
    assert str(caught.value).startswith(message)


def test_a_setting_is_not_found_in_the_wrong_section(loaded: LoadedConfig) -> None:
    with pytest.raises(UserError):
        explain("model.batch_size", loaded)


def test_the_known_keys_may_be_given(loaded: LoadedConfig) -> None:
    assert known_key("--gone-setting", {"gone_setting": 1}) == "gone_setting"


def test_a_setting_of_a_run_is_explained_with_its_recorded_value(runs_dir: Path) -> None:
    run = indexed(runs_dir, settings={"seed": 5})
    found = explain_of_run("--seed", run)
    assert (found.value, found.source, found.shadowed, found.default) == (5, "code", [(1337, "default")], 1337)
    assert found.resolved is None


def test_a_setting_of_a_run_that_was_none_or_auto_shows_its_resolved_value(runs_dir: Path) -> None:
    run = indexed(runs_dir, resolved={"n_kv_head": 4, "dtype": "float32", "seed": 1337})
    assert (explain_of_run("n_kv_head", run).value, explain_of_run("n_kv_head", run).resolved) == (None, 4)
    assert (explain_of_run("dtype", run).value, explain_of_run("dtype", run).resolved) == ("auto", "float32")
    assert explain_of_run("seed", run).resolved is None
    assert explain_of_run("head_dim", run).resolved is None


def test_a_setting_of_another_version_is_explained_without_its_meaning(runs_dir: Path) -> None:
    run = indexed(runs_dir)
    sources = {"gone": {"value": 3, "source": "--gone", "shadowed": [{"value": 2, "source": "default"}]}}
    write(run.path / "meta" / "config_sources.json", sources)
    found = explain_of_run("gone", run)
    assert (found.value, found.source, found.shadowed) == (3, "--gone", [(2, "default")])
    assert (found.section, found.default, found.meaning, found.expected) == ("unknown to this version", None, "", "")
    with pytest.raises(UserError, match="no setting is named seed"):
        explain_of_run("seed", run)


def test_an_unknown_setting_of_a_run_is_reported_with_the_nearest(runs_dir: Path) -> None:
    with pytest.raises(UserError, match=r"no setting is named sead; did you mean seed\?"):
        explain_of_run("sead", indexed(runs_dir))


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"3", b"null", b"[]", b'["seed"]', b'"seed"', b'{"seed": 3}', b'{"seed": {}}', b'{"seed": null}'),
        *(b'{"seed": {"value": 1}}', b'{"seed": {"value": 1, "source": "x"}}'),
        *(b'{"seed": {"value": 1, "source": "x", "shadowed": 3}}', None),
        *(b"\xff\xfe", b"[" * 100_000),
    ],
    ids=lambda content: repr(content and content[:50]),
)
def test_damaged_sources_are_reported_in_one_line(runs_dir: Path, content: bytes | None) -> None:
    run = indexed(runs_dir)
    path = run.path / "meta" / "config_sources.json"
    path.unlink()
    if content is not None:
        write(path, content)
    with pytest.raises(UserError) as caught:
        explain_of_run("seed", run)
    assert "config_sources.json" in str(caught.value) or "no setting is named seed" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("resolved", [None, "x", 3, ["a"]])
def test_damaged_resolved_values_hide_no_setting(runs_dir: Path, resolved: Any) -> None:
    assert explain_of_run("seed", indexed(runs_dir, resolved=resolved)).value == 1337


def test_the_sources_of_all_settings_are_read(runs_dir: Path) -> None:
    run = indexed(runs_dir, settings={"seed": 5})
    sources = settings_with_sources(run)
    assert sources.keys() == FIELDS.keys()
    assert (sources["seed"], sources["n_layer"]) == ("code", "default")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b"3", b'{"seed": 3}', b'{"seed": {}}', b"[" * 100_000])
def test_damaged_sources_are_treated_as_empty(runs_dir: Path, content: bytes) -> None:
    run = indexed(runs_dir)
    write(run.path / "meta" / "config_sources.json", content)
    assert settings_with_sources(run) == {}


def test_an_explanation_holds_only_json_values(loaded: LoadedConfig) -> None:
    found = explain("tags", loaded)
    assert (found.value, found.default) == ([], [])
    assert json.loads(json.dumps(found.shadowed)) == found.shadowed
