"""A user's mistake is reported in one clear line, with exit status 2, and leaves no run directory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import one_error

import experiments
import inference
import profile_model
import train

Argv = Callable[..., list[str]]
LONG = "x" * 5000


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--batch-sise", "3"], "did you mean --batch-size?"),
        (["--lr", "3e-4"], "did you mean --learning-rate?"),
        (["--wd", "0"], "did you mean --weight-decay?"),
        (["--quiet"], "unknown flag --quiet"),
        (["--batch-size", "many"], "expected integer >= 1"),
        (["--dropout", "1"], "expected number >= 0 and < 1"),
        (["--learning-rate", "nan"], "expected number > 0"),
        (["--n-embd", "17"], "must be divisible by n_head"),
        (["--config", "nowhere.yaml"], "no such configuration file"),
        (["--run-tag", "a/b"], "letters, digits"),
        (["--run-tag", "latest"], "reserved"),
        (["--run-tag", "x" * 65], "1 to 64"),
        (["--device", "tpu"], "expected auto, cpu, cuda"),
        (["--dataset", "shakespear"], "did you mean shakespeare?"),
        (["--block-size", "2000"], "block_size 2000 needs at least 2,001"),
        (["--qa-template", "Q:"], "--qa-template: expected text that contains {question}, got 'Q:'"),
        (["--logit-softcap", "0"], "--logit-softcap: expected number > 0"),
        (["--ngram-rows", "512,few"], "--ngram-rows: expected list of integers >= 1"),
        (["--warmup-iters", "7"], "must not exceed max_iters (6)"),
        (["surplus"], "unknown argument surplus"),
        (["--jobs", "2"], "--jobs is for the runs of --multirun"),
        (["--note", "caf\udce9"], "--note: expected text"),  # bytes that are not UTF-8, as Python passes them
        (["--dataset", "~nobodyx/foo"], "unknown dataset ~nobodyx/foo"),
        (["--device", "cuda:7"], "available: cpu"),
        (["--callbacks", "no_such:Thing"], "no_such:Thing cannot be used"),
        (["--fp8", "--device", "cpu"], "fp8 needs a CUDA device, not cpu"),
        (["--sample-prompt", "€"], "character '€'"),
        (["--max-iters", "none", "--epochs", "0.01", "--warmup-iters", "900"], "warmup"),
        (["--n-embd", "65536", "--n-layer", "16", "--n-head", "1"], "parameters, which do not fit into the"),
        (["--ffn-dim", str(10**15)], "parameters, which do not fit into the"),
        (["--ffn-dim", str(10**18)], "more parameters than can be counted, which do not fit"),
        (["--init-from", LONG], "File name too long"),
        (["--resume", LONG], "File name too long"),
        (["--dataset", LONG], "unknown dataset xxx"),
        (["--dataset", "a\nb"], r"unknown dataset a\nb"),
        (["--runs-dir", LONG], "File name too long"),
        (["--runs-dir", "/dev/null"], "runs_dir: '/dev/null': Not a directory"),
        (["--runs-dir", "/dev/null/x"], "Not a directory"),
        (["--corpora-dir", LONG], "File name too long"),
        (["--aim-logging", "--aim-repo", LONG], "File name too long"),
        (["--config", LONG + ".yaml"], "File name too long"),
        (["--config", "a\nb.yaml"], r"a\nb.yaml: no such configuration file"),
        (["--config-dir", LONG], "File name too long"),
        (["--run-tag", "a\nb"], "a tag is 1 to 64 letters"),
    ],
)
def test_a_mistake_on_the_command_line_is_reported_in_one_line_and_leaves_nothing(
    words: list[str],
    expected: str,
    tiny_argv: Argv,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("utils.training.setup.available_memory", lambda device: 8 << 30)
    before = sorted(tmp_path.rglob("*"))
    assert train.main(tiny_argv(*words)) == 2
    message = one_error(capsys)
    assert expected in message
    assert len(message) < 3500
    assert sorted(tmp_path.rglob("*")) == before


def test_a_flag_that_only_sweeps_set_is_not_suggested(tiny_argv: Argv, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(tiny_argv("--trail")) == 2
    assert one_error(capsys) == "error: unknown flag --trail\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("batch_sise: 3", "x.yaml:1: unknown key batch_sise; did you mean batch_size?"),
        ("# first\nn_kv_head: many", "x.yaml:2: n_kv_head: expected integer >= 1 or none, got 'many'"),
        ("dropout: .nan", "x.yaml:1: dropout: expected number"),
        ("a: [", "x.yaml:1: not valid YAML"),
        ("- 1\n- 2", "expected a mapping of settings, got a list"),
        ("x: !!python/object/apply:os.system [ls]", "refused the YAML tag"),
    ],
)
def test_a_mistake_in_a_configuration_file(
    text: str, expected: str, tiny_argv: Argv, runs_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.yaml").write_text(text)
    assert train.main(tiny_argv("--config", str(tmp_path / "x.yaml"))) == 2
    assert expected in one_error(capsys)
    assert not runs_dir.exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"", "the corpus is empty"), (b"ab\0cd", "binary file"), (b"line\n\xff\xfe", ":2: not UTF-8")],
)
def test_a_corpus_that_is_not_text_is_refused(
    content: bytes, expected: str, tiny_argv: Argv, runs_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.txt").write_bytes(content)
    assert train.main(tiny_argv("--dataset", str(tmp_path / "bad.txt"))) == 2
    assert expected in one_error(capsys)
    assert not runs_dir.exists()


@pytest.mark.parametrize(("words", "expected"), [(["--steps", "0"], "at least 1"), (["--stepps", "1"], "--steps?")])
def test_a_mistake_in_profiling(
    words: list[str], expected: str, tiny_argv: Argv, capsys: pytest.CaptureFixture[str]
) -> None:
    assert profile_model.main(tiny_argv(*words)) == 2
    assert expected in one_error(capsys)


@pytest.mark.parametrize("key", ["dataset", "runs_dir", "corpora_dir", "aim_repo"])
def test_a_nul_in_a_path_is_reported_in_one_line(
    key: str, tiny_argv: Argv, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.yaml").write_text(f'{key}: "a\\0b"\naim_logging: true\n')
    flags = [word for word in tiny_argv() if word != "--no-aim-logging"]
    position = flags.index(f"--{key.replace('_', '-')}")
    assert train.main([*flags[:position], *flags[position + 2 :], "--config", str(tmp_path / "x.yaml")]) == 2
    assert "a\\x00b" in one_error(capsys)
    assert not (tmp_path / "corpora").exists()


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (experiments.main, ["show", LONG]),
        (experiments.main, ["list", "--runs-dir", LONG]),
        (experiments.main, ["plot", "x", "--out", f"{LONG}.png", "--runs-dir", LONG]),
        (experiments.main, ["explain", LONG]),
        (experiments.main, ["show", "a\nb", "--runs-dir", "c\nd"]),
        (inference.main, [LONG]),
        (inference.main, ["--prompt-file", LONG, "x"]),
        (profile_model.main, ["--compare", LONG, LONG]),
        (profile_model.main, ["--out", LONG, "--n-layer", "1"]),
    ],
)
def test_an_impossible_file_name_is_reported_in_one_line(
    main: Callable[[list[str]], int], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(words) in ([0, 2] if words[0] == "list" else [2])
    if words[0] != "list":
        one_error(capsys)
