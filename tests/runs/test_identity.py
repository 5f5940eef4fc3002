"""What distinguishes runs: their resolved settings and their code."""

from __future__ import annotations

import json
from pathlib import Path

from fake_runs import indexed, make_run, write

from utils.runs.identity import code_identity, differing_settings, non_default_settings
from utils.runs.index import read_index


def test_settings_that_differ_are_found_by_kind(runs_dir: Path) -> None:
    runs = [
        indexed(runs_dir, "a", settings={"seed": 1, "n_embd": 64, "log_interval": 2, "corpora_dir": "x"}),
        indexed(runs_dir, "b", settings={"seed": 2, "n_embd": 64, "log_interval": 3, "corpora_dir": "y"}),
    ]
    assert differing_settings(runs) == ["seed"]
    assert differing_settings(runs, ("observation",)) == ["log_interval"]
    assert differing_settings(runs, ("trajectory", "machine")) == ["corpora_dir", "seed"]
    assert differing_settings(runs[:1]) == []
    assert differing_settings([]) == []


def test_a_setting_differs_if_its_resolved_value_differs(runs_dir: Path) -> None:
    one = indexed(runs_dir, "a", resolved={"threads": 2, "dtype": "float32"})
    other = indexed(runs_dir, "b", settings={"dtype": "float32"}, resolved={"threads": 4, "dtype": "float32"})
    assert differing_settings([one, other]) == ["threads"]


def test_an_unknown_setting_is_compared_among_the_runs_that_have_it(runs_dir: Path) -> None:
    for run_id, value in (("a", 5), ("b", 6)):
        path = make_run(runs_dir, run_id)
        config = json.loads((path / "meta" / "full_config.json").read_text())
        config["train"]["gone"] = value
        write(path / "meta" / "full_config.json", config)
    make_run(runs_dir, "c")
    (runs_dir / "empty").mkdir()
    empty, a, b, c = read_index(runs_dir)
    assert differing_settings([empty, a, b, c]) == ["gone"]
    assert differing_settings([empty, a, c]) == []


def test_a_setting_that_is_derived_from_another_one_is_not_reported_twice(runs_dir: Path) -> None:
    narrow = indexed(runs_dir, "a", settings={"n_embd": 64}, resolved={"head_dim": 16, "ffn_dim": 256})
    wide = indexed(runs_dir, "b", settings={"n_embd": 128}, resolved={"head_dim": 32, "ffn_dim": 512})
    assert differing_settings([narrow, wide]) == ["n_embd"]
    explicit = indexed(
        runs_dir, "c", settings={"n_embd": 128, "ffn_dim": 100}, resolved={"head_dim": 32, "ffn_dim": 100}
    )
    assert differing_settings([wide, explicit]) == ["ffn_dim"]


def test_settings_that_differ_from_the_defaults_are_listed(runs_dir: Path) -> None:
    run = indexed(runs_dir, settings={"seed": 5, "tags": ("a",), "n_layer": 4})
    assert non_default_settings(run) == {"seed": 5, "tags": ["a"]}


def test_the_identity_of_the_code_is_commit_and_patch(runs_dir: Path) -> None:
    plain, patched = indexed(runs_dir, "a"), indexed(runs_dir, "b", patch="diff")
    assert code_identity(plain) == ("c" * 40, None)
    assert code_identity(patched)[0] == "c" * 40
    assert len(code_identity(patched)[1] or "") == 64
    (plain.path / "meta" / "code.patch").unlink()
    assert code_identity(plain) == ("c" * 40, None)
    assert code_identity(indexed(runs_dir, "c", git=None)) == (None, None)
