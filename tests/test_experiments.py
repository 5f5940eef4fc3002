"""What the commands of experiments.py print, as text and as JSON, and their exit status."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from fake_runs import RESOLVED, indexed, make_run, training_records, write
from rich.console import Console

import experiments
import inference
from utils.experiments.tables import columns_of, list_table, provenance_facts

Ask = Callable[..., Any]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Three seeds of two experiments, and entries that are not runs."""
    folder = tmp_path / "runs"
    for i, (tag, rate) in enumerate((("slow", 1e-3), ("fast", 3e-3))):
        for seed in (1, 2, 3):
            losses = [3.0, 2.5 - 0.2 * i + 0.01 * seed]
            make_run(
                folder,
                f"2026013{i}_12000{seed}_{tag}",
                settings={"learning_rate": rate, "seed": seed, "run_tag": tag},
                metrics=training_records(losses, 100),
                tag=tag,
                start=f"2026-01-3{i}T12:00:0{seed}.000+00:00",
                end=f"2026-01-3{i}T12:03:0{seed}.000+00:00",
                summary={"val/loss": losses[-1], "train/eval_loss": 2.0, "best_val_loss": losses[-1]},
            )
    (folder / "20260101_000000_half").mkdir()
    (folder / "a_file").write_text("x")
    write(folder / "20260102_000000_newer" / "run.json", {"schema_version": 99, "status": "completed"})
    return folder


@pytest.fixture
def ask(runs: Path, capsys: pytest.CaptureFixture[str]) -> Ask:
    """Runs a command on these runs, and returns its JSON or its text."""

    def run(*words: str, status: int = 0) -> Any:
        assert experiments.main([*words, "--runs-dir", str(runs)]) == status
        captured = capsys.readouterr()
        return json.loads(captured.out) if "--json" in words else captured.out + captured.err

    return run


# -------------------------------------------------------------------------------------------- list and sql


def test_list_shows_settings_that_differ_and_marks_damaged_runs(ask: Ask) -> None:
    text = ask("list")
    header, *lines = text.splitlines()
    assert header.split() == [
        "id",
        "tag",
        "status",
        "age",
        "duration",
        "steps",
        *("best", "val", "last", "val"),
        "learning_rate",
        "seed",
        "commit",
    ]
    assert sum("completed" in line for line in lines) == 6
    assert "20260130_120001_slow" in text
    assert "! 20260101_000000_half: an empty folder" in text
    assert "! a_file: a file, where a run directory was expected" in text
    assert "has schema_version 99, this workbench reads 1" in text


def test_list_shows_the_newest_twenty_runs_and_the_number_of_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad").mkdir()
    for i in range(22):
        make_run(tmp_path, f"run_{i:02d}", start=f"2026-01-{i + 1:02d}T12:00:00.000+00:00")

    def listed(*words: str) -> str:
        assert experiments.main(["list", "--runs-dir", str(tmp_path), *words]) == 0
        return capsys.readouterr().out

    newest = listed()
    assert re.findall(r"^run_\d\d", newest, re.MULTILINE) == [f"run_{i:02d}" for i in range(2, 22)]
    assert newest.endswith("20 of 23 runs (--all shows all); 1 of the others cannot be read\n")
    assert "20 of 22 runs (--all shows all)\n" in listed("--where", "status = 'completed'", "--sort", "id")
    assert listed("--all").count("run_") == 22
    assert len(json.loads(listed("--json"))) == 23
    assert len(json.loads(listed("--json", "--limit", "3"))) == 3


def test_a_tag_stands_for_all_its_runs_in_comparisons(ask: Ask) -> None:
    groups = [("slow", 3), ("fast", 3)]
    for words in (("slow", "fast"), ("--where", "learning_rate > 0"), ("slow", "fast", "--where", "seed < 9")):
        found = ask("compare", *words, "--json")
        assert [(group["name"], len(group["runs"])) for group in found["groups"]] == groups
        assert [verdict["verdict"] for verdict in found["verdicts"]] == ["worse"]
    assert len(ask("plot", "fast", "--where", "seed > 1", "--json")["curves"]) == 2
    assert len(ask("diff", "slow", "fast", "--json")["runs"]) == 2
    assert "compare: expected RUN or --where SQL" in ask("compare", status=2)
    assert "expected a run, got 0: --where seed > 9" in ask("report", "--where", "seed > 9", status=2)


@pytest.mark.parametrize("width", [60, 80])
def test_settings_leave_room_for_the_main_columns(runs_dir: Path, width: int) -> None:
    runs = [
        indexed(runs_dir, f"20260131_14250{i}_a_long_tag_for_a_run", tag="a_tag_from_a_person", settings=settings)
        for i, settings in enumerate(({"n_embd": 64}, {"n_embd": 32, "learning_rate": 0.00123456789, "seed": 3}))
    ]
    console = Console(width=width, file=io.StringIO())
    console.print(list_table(runs, columns_of(runs), width))
    lines = console.file.getvalue().splitlines()
    text = " ".join(" ".join(lines[:3]).split())
    for word in ("id", "tag", "status", "best", "last", "completed", "2.0000", "2.5000"):
        assert word in text, lines
    assert "learning_rate" not in lines[0]
    assert max(map(len, lines)) <= width
    ids = "".join(line[: lines[0].index("tag")].strip() for line in lines)
    assert ids.count("a_long_tag_for_a_run") == 2


def test_a_long_id_and_a_long_tag_share_the_width(runs_dir: Path) -> None:
    run = indexed(runs_dir, "20260131_142501_" + "a" * 60, tag="b" * 60)
    console = Console(width=80, file=io.StringIO())
    console.print(list_table([run], columns_of([run]), 80))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len([line for line in lines if "a" * 9 in line or "b" * 9 in line]) <= 5


@pytest.mark.parametrize(("tag", "best", "repeated"), [("slow", 2.5, True), (None, 2.5, True), ("mine", 2.0, False)])
def test_settings_that_differ_replace_columns_that_repeat_another(
    tag: str | None, best: float, repeated: bool, runs_dir: Path
) -> None:
    runs = [
        indexed(
            runs_dir,
            f"20261128_02210{seed}_slow",
            tag=tag,
            settings={"seed": seed, "learning_rate": seed / 10},
            summary={"val/loss": 2.5, "best_val_loss": best},
        )
        for seed in (1, 2)
    ]

    def columns(width: int) -> set[str]:
        console = Console(width=width, file=io.StringIO())
        console.print(list_table(runs, columns_of(runs), width))
        return set(re.split("  +", console.file.getvalue().splitlines()[0]))  # type: ignore[attr-defined]

    narrow = columns(60)
    assert "seed" not in narrow
    assert ("learning_rate" in narrow, "tag" in narrow, "last val" in narrow) == (repeated, not repeated, not repeated)
    assert {"tag", "last val", "learning_rate", "seed"} <= columns(200)


def test_list_where_sort_columns_and_limit(ask: Ask) -> None:
    rows = ask("list", "--where", "status = 'completed' and learning_rate > 1e-3", "--json")
    assert [row["learning_rate"] for row in rows] == [3e-3] * 3
    rows = ask("list", "--sort", "val_loss", "--limit", "2", "--columns", "id,val_loss", "--json")
    assert [list(row) for row in rows] == [["id", "val_loss"]] * 2
    assert [row["val_loss"] for row in rows] == pytest.approx([2.31, 2.32])
    rows = ask("list", "--sort", "val_loss desc", "--json")
    assert rows[0]["val_loss"] == pytest.approx(2.53)
    assert rows[-1]["val_loss"] is None  # damaged runs come last, and are listed
    assert len(ask("list", "--limit", "2", "--json")) == 2
    assert "none of 9 runs fits" in ask("list", "--where", "steps > 1000000")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--where", "learnin_rate > 1"], 'Candidate bindings: "learning_rate"'),
        (["--where", "1 = 1) UNION (SELECT content FROM read_text('/etc/passwd')"], "not allowed"),
        (["--sort", "(SELECT content FROM read_text('/etc/passwd'))"], "not allowed"),
        (["--columns", "id,val_los"], "no column val_los; did you mean val_loss?"),
        (["--limit", "0"], "--limit must be at least 1"),
    ],
)
def test_a_mistake_in_list_is_an_error_without_traceback(ask: Ask, words: list[str], message: str) -> None:
    text = ask("list", *words, status=2)
    assert message in text
    assert "Traceback" not in text


def test_an_empty_list_shows_how_to_train_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert experiments.main(["list", "--runs-dir", str(tmp_path / "none")]) == 0
    assert "has no runs yet: python train.py --run-tag baseline" in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


def test_sql_over_both_views(ask: Ask) -> None:
    query = "SELECT tag, count(*) AS n, min(m.val_loss) AS best FROM metrics m JOIN runs r ON m.run = r.id GROUP BY tag"
    rows = ask("sql", f"{query} ORDER BY best", "--json")
    assert [(row["tag"], row["n"]) for row in rows] == [("fast", 6), ("slow", 6)]
    assert "fast" in ask("sql", f"{query} ORDER BY best")
    assert "error: " in ask("sql", "DROP TABLE runs", status=2)


# ------------------------------------------------------------------------------------ show, diff, compare, explain


@pytest.mark.parametrize(("threads", "words"), [(1, "2.4.0, 1 thread"), (2, "2.4.0, 2 threads"), (None, "2.4.0")])
def test_the_number_of_threads_is_shown(threads: int | None, words: str, runs_dir: Path) -> None:
    run = indexed(runs_dir, resolved={**RESOLVED, "threads": threads})
    assert ("torch", words) in provenance_facts(run, [], [])


def test_show_is_one_screen(ask: Ask, runs: Path) -> None:
    make_run(runs, "20260201_child", parent={"run": "20260131_120003_fast", "path": "x", "step": 5, "relation": "fork"})
    text = ask("show", "fast")
    for words in ("20260131_120003_fast", "status", "learning_rate  0.003", "children       20260201_child", "logs"):
        assert words in text
    assert len(text.splitlines()) < 40
    answer = ask("show", "20260201_child", "--json")
    assert answer["parent"] == "20260131_120003_fast"
    assert answer["record"]["parent"]["relation"] == "fork"


def test_show_suggests_the_nearest_name_for_an_unknown_run(ask: Ask) -> None:
    assert "did you mean fast?" in ask("show", "fats", status=2)
    assert "20260101_000000_half is not a run: an empty folder" in ask("show", "20260101_000000_half", status=2)
    assert "schema_version 99" in ask("show", "20260102_000000_newer")  # what is known about it is shown


def test_diff_names_the_setting_and_the_step(ask: Ask) -> None:
    text = ask("diff", "slow", "120003_fast")
    assert "Settings that change the numbers" in text
    assert "learning_rate  0.001" in text
    assert "first difference at step 100: val/loss 2.53 vs 2.3" in text
    answer = ask("diff", "slow", "fast", "--json")
    assert answer["sections"]["Settings that change the numbers"][0]["values"] == [0.001, 0.003]
    assert "expected 2 different runs, got 1" in ask("diff", "slow", "slow", status=2)


def test_compare_gives_a_verdict_for_each_pair(ask: Ask, runs: Path) -> None:
    names = sorted(path.name for path in runs.iterdir() if path.name.endswith(("slow", "fast")))
    answer = ask("compare", *names, "--json")
    (verdict,) = answer["verdicts"]
    assert (verdict["first"], verdict["second"], verdict["verdict"]) == ("slow", "fast", "worse")
    assert verdict["difference"] == pytest.approx(0.2)
    text = ask("compare", *names)
    assert "slow against fast  worse by 0.2000  p = " in text
    assert "val/loss at equal steps" in text
    assert "too few seeds to say" in ask("compare", *names[:4])


def test_explain_names_every_layer(ask: Ask, tmp_path: Path) -> None:
    text = ask("explain", "batch_size")
    assert "set by    configs/train.yaml:" in text
    assert "shadows   12  default" in text
    assert "expected  integer >= 1 or auto, in sequences" in text
    answer = ask("explain", "fast", "learning-rate", "--json")
    assert (answer["value"], answer["source"], answer["default"]) == (0.003, "code", 0.001)
    assert "did you mean batch_size?" in ask("explain", "batch_sise", status=2)
    assert "unknown argument seed" in ask("explain", "fast", "batch_size", "seed", status=2)


def test_plot_and_report(ask: Ask, tmp_path: Path) -> None:
    assert "val/loss" in ask("plot", "slow", "fast")
    for name in ("x.png", "x.svg", "report.html"):
        command = "report" if name.endswith("html") else "plot"
        ask(command, "slow", "fast", "--out", str(tmp_path / name))
        assert (tmp_path / name).stat().st_size > 1000
    for weight in ("1", "-0.1", "nan", "x"):
        text = ask("plot", "slow", f"--smooth={weight}", status=2)
        assert f"argument --smooth: expected a number >= 0 and < 1, got '{weight}'" in text


# --------------------------------------------------------------------------------- edit, promote, prune, check


def test_edit_changes_tag_note_tags_and_pin(ask: Ask, runs: Path) -> None:
    answer = ask("edit", "fast", "--note", "the <best> one", "--pin", "--add-tag", "keep", "--tag", "quick", "--json")
    assert answer == {"tag": "quick", "tags": ["keep"], "note": "the <best> one", "pinned": True}
    (row,) = ask("list", "--where", "pinned", "--json")
    assert (row["tag"], row["tags"], row["note"]) == ("quick", ["keep"], "the <best> one")
    assert "the <best> one" in ask("show", "quick")
    assert "--tag: " in ask("edit", "quick", "--tag", "a b", status=2)
    assert "expected --tag, --note" in ask("edit", "quick", status=2)
    for flag in ("--note", "--add-tag"):  # bytes that are not UTF-8, as Python passes them
        assert f"{flag}: expected Unicode text" in ask("edit", "quick", flag, "caf\udce9", status=2)


@pytest.mark.parametrize(
    "words",
    [("edit", "fast", "--note", "x"), ("edit", "fast", "--tag", "x"), ("promote", "fast", "x"), ("seal", "fast"),
     ("report", "fast", "--out", "page.html")],
)  # fmt: skip
def test_a_full_disk_is_a_failure_and_not_a_mistake_in_the_command(
    words: tuple[str, ...], ask: Ask, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    exported(max(path for path in runs.iterdir() if path.name.endswith("fast")))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("utils.files.os.fsync", no_space)
    assert re.fullmatch(r"error: .*(\.json|page\.html): No space left on device\n", ask(*words, status=1))


def exported(run: Path, weights: bytes = b"weights") -> None:
    write(run / "artifacts" / "export" / "model.safetensors", weights)
    write(run / "artifacts" / "export" / "config.json", {"training": {"step": 100, "weights": "best"}})


def test_a_promoted_name_is_usable_wherever_a_run_is(ask: Ask, runs: Path) -> None:
    assert "has no export" in ask("promote", "fast", "prose", status=2)
    for tag in ("fast", "slow"):
        exported(next(path for path in sorted(runs.iterdir(), reverse=True) if path.name.endswith(tag)))
    assert "prose@v1: 20260131_120003_fast, best weights of step_000100" in ask("promote", "fast", "prose")
    answer = ask("promote", "slow", "prose", "--json")
    assert (answer["name"], answer["run"], answer["checkpoint"]) == ("prose@v2", "20260130_120003_slow", "step_000100")
    assert ask("show", "prose@v1", "--json")["promoted"] == ["prose@v1"]
    assert "learning_rate" in ask("diff", "prose@v1", "prose@v2")
    assert inference.find_export("prose@v2", runs).parent.parent.name == "20260130_120003_slow"
    assert "no version v3 of prose: there are v1 to v2" in ask("show", "prose@v3", status=2)
    assert "no model pros " in ask("show", "pros@v1", status=2).replace("pros in", "pros  in")


def test_prune_deletes_only_with_yes(ask: Ask, runs: Path) -> None:
    make_run(runs, "20260103_000000_big", checkpoints={100: 5000, 200: 5000}, start="2026-01-03T00:00:00.000+00:00")
    assert "expected --keep-last N" in ask("prune", status=2)
    assert "--max-size 1B cannot be reached" in ask("prune", "--max-size", "1B", "--keep-last", "3")
    text = ask("prune", "--keep-last", "3")
    assert "--yes would free 10.0 KB" in text
    folder = runs / "20260103_000000_big" / "artifacts" / "checkpoints"
    assert folder.exists()
    answer = ask("prune", "--keep-last", "3", "--yes", "--json")
    assert (answer["deleted"], answer["bytes"]) == (True, 10_000)
    assert not folder.exists()
    assert (runs / "20260103_000000_big" / "run.json").exists()
    assert ask("prune", "--max-size", "1B", "--keep-last", "6", "--yes")
    assert not (runs / "20260103_000000_big").exists()
    assert (runs / "20260101_000000_half").exists()  # a damaged run is left alone


def test_check_names_one_changed_byte(ask: Ask, runs: Path) -> None:
    run = runs / "20260131_120003_fast"
    assert "has no seal" in ask("check", "fast", status=2)
    exported(run)
    write(run / "meta" / "code.patch", "abc")
    assert "sealed" in ask("seal", "fast")
    assert "as sealed" in ask("check", "fast")
    write(run / "meta" / "code.patch", "abd")
    exported(run, b"weightz")
    text = ask("check", "fast", status=1)
    assert "changed  meta/code.patch\n" in text
    assert "changed  artifacts/export/model.safetensors\n" in text
    assert "not as sealed" in text
    assert ask("check", "fast", "--json", status=1)["good"] is False
    assert "fast: " in ask("finish", "fast")  # `finish` seals unsealed runs only, and excuses no damage
    assert "changed  meta/code.patch\n" in ask("check", "fast", status=1)


# ------------------------------------------------------------------------------------------------- all commands


def test_no_command_but_reproduce_imports_torch(runs: Path, tmp_path: Path) -> None:
    commands = [
        ["list", "--where", "seed = 1"],
        ["sql", "SELECT 1"],
        ["show", "fast"],
        ["diff", "slow", "fast"],
        ["compare", "slow", "fast"],
        ["explain", "fast", "seed"],
        ["plot", "fast"],
        ["report", "fast", "--out", str(tmp_path / "page.html")],
        ["edit", "fast", "--pin"],
        ["prune", "--keep-last", "1"],
    ]
    code = (
        "import sys, experiments\n"
        f"for words in {commands!r}:\n"
        f"    assert experiments.main([*words, '--runs-dir', {str(runs)!r}]) == 0, words\n"
        "    assert 'torch' not in sys.modules, words\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_help_names_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        experiments.main(["--help"])
    printed = capsys.readouterr().out
    names = "list sql show diff compare explain plot report edit promote prune seal check reproduce rebuild"
    assert all(f"\n    {name}" in printed for name in names.split())
