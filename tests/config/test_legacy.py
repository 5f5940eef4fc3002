"""A flat config.json with the setting names of other programs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from utils.config.fields import FIELDS
from utils.config.legacy import NO_COUNTERPART, RENAMED
from utils.config.loader import ConfigError, ConfigLoader

ROOT = Path(__file__).resolve().parents[2]


def project(folder: Path, **settings: object) -> ConfigLoader:
    (folder / "config.json").write_text(json.dumps(settings, indent=2))
    return ConfigLoader(folder)


def test_old_names_are_renamed_and_keep_their_place(tmp_path: Path) -> None:
    loaded = project(
        tmp_path, embedding_dim=96, num_heads=3, num_layers=5, feedforward_dim=200, max_seq_len=32, num_epochs=2
    ).load()
    model, train = loaded.config.model, loaded.config.train
    assert (model.n_embd, model.n_head, model.n_layer, model.ffn_dim, model.block_size) == (96, 3, 5, 200, 32)
    assert (train.epochs, train.max_iters) == (2, None)
    assert loaded.source("n_embd") == "config.json:2"
    assert loaded.ignored == ()


def test_each_ignored_name_is_reported_in_one_line(tmp_path: Path) -> None:
    loaded = project(tmp_path, vocab_size=65, n_embd=96, n_head=3, wandb_project="x").load()
    assert loaded.config.model.n_embd == 96
    assert loaded.ignored == (
        "config.json:2: vocab_size has no counterpart here, so it is ignored: the tokenizer determines it",
        "config.json:5: wandb_project has no counterpart here, so it is ignored: experiment names the project",
    )


def test_what_the_files_in_configs_replace_is_one_line(tmp_path: Path) -> None:
    loader = project(tmp_path, embedding_dim=96, num_heads=3, dropout_rate=0, num_epochs=2)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "a.yaml").write_text("n_embd: 128\ndropout: 0.0\nmax_iters: 9\n")
    (tmp_path / "configs" / "b.yaml").write_text("n_head: 4\n")
    assert loader.load().ignored == (
        "config.json: n_embd, n_head, epochs: not used, as files in configs set something else",
    )


def test_an_old_and_a_new_name_for_one_setting_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json:3: n_embd is set twice in this file"):
        project(tmp_path, n_embd=96, embedding_dim=96).load()


def test_all_unknown_names_are_listed_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refusal:
        project(tmp_path, n_embedding=96, colour="red").load()
    assert [line.split(";")[0] for line in str(refusal.value).splitlines()] == [
        "config.json:2: unknown key n_embedding",
        "config.json:3: unknown key colour",
    ]


def test_other_files_accept_only_the_new_names_and_suggest_them(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("feedforward_dim: 3")
    with pytest.raises(ConfigError, match=r"own\.yaml:1: unknown key feedforward_dim; did you mean ffn_dim"):
        ConfigLoader(tmp_path).load([tmp_path / "own.yaml"])


def test_the_documentation_lists_all_old_names() -> None:
    assert set(RENAMED.values()) <= FIELDS.keys()
    assert not (RENAMED.keys() | NO_COUNTERPART.keys()) & FIELDS.keys()
    assert not RENAMED.keys() & NO_COUNTERPART.keys()
    page = (ROOT / "docs" / "weights.md").read_text(encoding="utf-8")
    for there, here in RENAMED.items():
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{here}` |")]
        assert f"`{there}`" in row
    for name in NO_COUNTERPART:
        assert f"`{name}`" in page
